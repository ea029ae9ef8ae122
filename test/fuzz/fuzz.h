// fuzz.h: what the fuzz targets share. A target defines fuzz(), seeds(), and gets main() and the rest from libFuzzer;
// -h of a target lists its flags.
#pragma once
#include <sys/stat.h>

#include "keel/run.h"

using Bytes = std::vector<unsigned char>;

void fuzz(const unsigned char* data,
          size_t size);  // an Error is what a parser should throw; anything else is a finding
std::vector<Bytes> seeds();

// A file of the bytes, on a tmpfs where there is one; its name ends as asked.
inline std::string file_of(const Bytes& bytes, const char* ending) {
    static const std::string folder = [] {
        std::string name = access("/dev/shm", W_OK) == 0 ? "/dev/shm/keel_fuzz_XXXXXX" : "/tmp/keel_fuzz_XXXXXX";
        if (!mkdtemp(name.data())) abort();
        static std::string removed_at_exit = name;
        atexit([] { std::filesystem::remove_all(removed_at_exit); });
        return name;
    }();
    std::string path = folder + "/file" + ending;
    static int fd = -1;
    static std::string open_path;
    static size_t before = 0;
    if (open_path != path && fd >= 0) close(fd);
    if (open_path != path) fd = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600), open_path = path, before = 0;
    if ((std::exchange(before, bytes.size()) > bytes.size() && ftruncate(fd, off_t(bytes.size())) != 0) ||
        pwrite(fd, bytes.data(), bytes.size(), 0) != ssize_t(bytes.size()))
        abort();
    return path;
}

// One of our files from a short input: a byte of choices, the first 64 words of the header, the body. As it is, a
// mutated file would seldom come past the first checks, so the choices mend it up to one: 1 the header's first words, 2
// its length, by zeros, 4 its CRC.
inline Bytes keel_file(const unsigned char* data, size_t size, FileKind kind) {
    if (size == 0) return {};
    int choices = *data++;
    size--;
    FileHeader header;
    memcpy(header.word.data(), data, std::min<size_t>(size, 256));
    if (choices & 1) {
        memcpy(&header.word[H_MAGIC], "KEEL", 4);
        header.word[H_VERSION] = 1, header.word[H_KIND] = kind,
        header.word[H_TYPE] = int(uint32_t(header.word[H_TYPE]) % 3);
        if (header.word[H_V] > 0 && header.word[H_V] <= MAX_V) header.word[H_VP] = header.model().Vp();
    }
    Bytes file(sizeof header);
    memcpy(file.data(), &header, sizeof header);
    if (size > 256) file.insert(file.end(), data + 256, data + size);
    ModelConfig c = header.model();
    if (choices & 2 && config_fault(c).empty() && double(c.L) * c.C * c.C < 256)
        if (size_t expected = expected_file_size(header); expected > 0 && expected < 8192) file.resize(expected);
    if (choices & 4 && file.size() >= 4) {
        uint32_t crc = crc32(file.data(), file.size() - 4);
        memcpy(&file[file.size() - 4], &crc, 4);
    }
    return file;
}

// The input that keel_file makes a whole file of a tiny model of.
inline Bytes keel_seed(const FileHeader& header) {
    Bytes seed(1 + 256);
    seed[0] = 7;
    memcpy(&seed[1], header.word.data(), 256);
    return seed;
}

inline ModelConfig tiny_model(NormPlacement norm) {
    ModelConfig c;
    c.max_seq_len = 3, c.V = 5, c.L = 2, c.H = 1, c.C = 2, c.norm = norm, c.alpha = 2;
    return c;
}

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, size_t size) {
    try {
        fuzz(data, size);
    } catch (const Error&) {}
    return 0;
}

// Writes the seeds into the folder of the corpus, before libFuzzer reads it.
extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
    for (int i = 1; i < *argc; i++)
        if (std::filesystem::is_directory((*argv)[i])) {
            std::vector<Bytes> all = seeds();
            for (size_t s = 0; s < all.size(); s++) {
                FILE* file = fopen(format("%s/seed_%zu", (*argv)[i], s).c_str(), "wb");
                if (file) fwrite(all[s].data(), 1, all[s].size(), file), fclose(file);
            }
        }
    return 0;
}
