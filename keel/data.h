// keel/data.h: what a run trains and validates on.
#pragma once

#include <functional>

#include "formats.h"
#include "hops.h"
#include "memory.h"
#include "system.h"
#include "tokenizer.h"

// Data are text files (a byte is a token, V = 256, unless a tokenizer encodes them) or llm.c's token shards (.bin). All
// files of a glob, in the order of their names, are one long row of tokens. Files are opened for each read and not
// kept open, so that ten thousand of them, or a terabyte, cost neither memory nor file descriptors.

struct TokenFile {
    std::string path;
    uint64_t first = 0, count = 0;  // its tokens are [first, first + count) of the row
    dev_t device = 0;
    ino_t inode = 0;
};

class TokenSource {
public:
    std::string pattern;
    std::vector<TokenFile> files;
    const ShardFormat* shards = nullptr;  // null: text
    uint64_t count = 0;                   // tokens in all
    // The tokens of text that has been encoded, below; null: a byte is a token.
    std::shared_ptr<const std::vector<int>> encoded;

    TokenSource() = default;

    // paths: files, or a single glob. flag: the one to name in errors.
    TokenSource(const std::vector<std::string>& paths, const char* flag) {
        pattern = paths.size() == 1 ? paths[0] : format("%zu files", paths.size());
        if (paths.size() != 1 || access(pattern.c_str(), F_OK) == 0) {
            for (const std::string& path : paths) add(path, flag);
        } else if (pattern.find_first_of("*?[") != pattern.npos) {
            add_glob(flag);
        } else {
            refuse_unexpanded(flag, pattern, true);
            add(pattern, flag);
        }
        if (count == 0) fail("%s: expected text or token shards in '%s', found nothing", flag, pattern);
    }

    // Reads tokens [first, first + n) of the row into out (n) and checks that each is below V.
    void read(uint64_t first, size_t n, int V, int* out) const {
        if (encoded) {
            std::copy_n(encoded->begin() + ptrdiff_t(first), n, out);
            return;
        }
        auto file = std::upper_bound(files.begin(), files.end(), first,
                                     [](uint64_t at, const TokenFile& f) { return at < f.first + f.count; });
        while (n > 0) {
            size_t m = std::min<uint64_t>(n, file->first + file->count - first);
            read_from(*file, first - file->first, m, V, out);
            first += m, out += m, n -= m;
            ++file;
        }
    }

    // CRC-32 of tokens [first, first + n) as int32, by which a resume knows its data, however they lie in files: of all
    // up to 2^24, else of 1024 blocks or more, evenly spaced, one in every 2^26 tokens at least.
    uint32_t checksum(uint64_t first, uint64_t n) const {
        size_t block = std::clamp<uint64_t>(n, 1, 1 << 14);
        uint64_t blocks = std::min((n + block - 1) / block, std::max<uint64_t>(1 << 10, n >> 26));
        std::vector<int> tokens(block);
        uint32_t sum = crc32(&n, sizeof n);
        for (uint64_t i = 0; i < blocks; i++) {
            uint64_t at = i == 0 ? 0 : (n - block) * i / (blocks - 1);
            read(first + at, block, INT_MAX, tokens.data());
            sum = crc32(tokens.data(), block * sizeof(int), sum);
        }
        return sum;
    }

    bool same_file(const TokenSource& other) const {
        for (const TokenFile& a : files)
            for (const TokenFile& b : other.files)
                if (a.device == b.device && a.inode == b.inode) return true;
        return false;
    }

    static int open_file(const std::string& path) {
        int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // opening a pipe must not wait for its writer
        if (fd >= 0) return fd;
        std::string fault = errno_text();
        std::error_code no_link;
        std::filesystem::path target = std::filesystem::read_symlink(path, no_link);
        throw DataError(format("%s: cannot be read (%s%s); expected a text file or a .bin shard", path, fault,
                               no_link ? "" : format(", a link to %s", target)));
    }

private:
    // Adds what a glob matches, but for what holds no data or has been added: that is said.
    void add_glob(const char* flag) {
        std::vector<std::string> names = glob_matches(pattern);
        if (names.empty()) refuse_unexpanded(flag, pattern, true);
        if (("/" + pattern).find("/**") != std::string::npos)
            fail("%s: '%s' goes one folder deep, as ** is no more than * here; use: mkdir DIR && bash -O globstar -c "
                 "%s, and %s 'DIR/*'",
                 flag, pattern, quoted("ln -sr " + expandable(pattern) + " DIR"), flag);
        if (names.empty()) fail("%s: the glob '%s' matches no file; correct it", flag, pattern);
        std::string told;
        size_t passed_over = 0;
        for (const std::string& name : names) {
            std::string why = passed_over_as(name);
            if (why.empty()) add(name, flag);
            else if (++passed_over <= 3) told += format("%s%s (%s)", told.empty() ? "" : ", ", name, why);
        }
        if (passed_over > 3) told += format(" and %zu more", passed_over - 3);
        if (files.empty() && passed_over)
            fail("%s: expected text or token shards in '%s', found %s; give another glob", flag, pattern, told);
        if (passed_over) print("note       %s '%s' passes over %s\n", flag, pattern, told);
    }
    // Why a glob does not take a file, "" for one that it takes, as what cannot be read: that add() refuses.
    std::string passed_over_as(const std::string& path) const {
        struct stat st{};
        if (stat(path.c_str(), &st) != 0) return "";
        if (S_ISDIR(st.st_mode)) return "a folder";
        if (!S_ISREG(st.st_mode)) return "no file";
        if (st.st_size == 0) return "empty";
        for (const TokenFile& f : files)
            if (f.device == st.st_dev && f.inode == st.st_ino) return "a link to " + f.path + ", counted once";
        char head[64] = {};
        int fd = open_file(path);
        ssize_t n = pread(fd, head, sizeof head, 0);
        close(fd);
        return is_own_file(path, std::string_view(head, size_t(std::max<ssize_t>(n, 0)))) ? "a run's own" : "";
    }

    // The glob that reads a folder: of its shards, its texts, or all that it has.
    static std::string glob_of_folder(std::string path, const char* flag) {
        while (path.size() > 1 && path.back() == '/') path.pop_back();
        for (const char* some : {strcmp(flag, "-j") == 0 ? "/*_val_*.bin" : "/*_train_*.bin", "/*.txt"})
            if (!glob_matches(path + some).empty()) return path + some;
        return path + "/*";
    }

    void add(const std::string& path, const char* flag) {
        int fd = open_file(path);
        struct stat st{};
        std::string head(size_t(1) << 16, '\0');
        bool readable = fstat(fd, &st) == 0 && S_ISREG(st.st_mode);
        head.resize(size_t(std::max<ssize_t>(readable ? pread(fd, head.data(), head.size(), 0) : 0, 0)));
        close(fd);
        uint64_t size = uint64_t(st.st_size);
        if (S_ISDIR(st.st_mode))
            fail("%s: expected a file, found a folder; use: %s %s", path, flag, quoted(glob_of_folder(path, flag)));
        if (!readable) fail("%s: expected a file, found something else; name files or a quoted glob", path);
        if (size == 0) fail("%s: the file is empty; leave it out of %s", path, flag);
        int32_t header[256] = {};
        memcpy(header, head.data(), std::min(sizeof header, head.size()));
        const ShardFormat* shard = nullptr;
        for (const ShardFormat& f : shard_formats)
            if (header[0] == f.magic && header[1] == f.version) shard = &f;
        if (!shard) refuse_foreign(path, head);
        if (shard && ending_of(path) != ".bin")
            fail("%s: expected a token shard's name to end in .bin; use: mv %s %s", path, quoted(path),
                 quoted(path + ".bin"));
        auto kind = [](const ShardFormat* f) {
            return f ? format("a shard of %d-byte tokens", f->token_bytes) : "text";
        };
        if (!files.empty() && shard != shards)
            fail("%s: expected %s like %s, found %s; train on one kind, by a glob such as '*.txt' or '*_train_*.bin'",
                 path, kind(shards), files[0].path, kind(shard));
        shards = shard;
        TokenFile file{path, count, size, st.st_dev, st.st_ino};
        if (shard) {
            uint64_t width = uint64_t(shard->token_bytes), body = size - std::min<uint64_t>(size, sizeof header);
            if (header[2] < 0 || body != width * uint64_t(header[2]))
                fail("%s: expected %d tokens from its header, found %llu; fetch the shard again", path, header[2],
                     body / width);
            file.count = uint64_t(header[2]);
            if (file.count == 0) return;
        }
        files.push_back(file);
        count += file.count;
    }

    void read_from(const TokenFile& file, uint64_t first, size_t n, int V, int* out) const {
        size_t width = shards ? size_t(shards->token_bytes) : 1;
        uint64_t offset = (shards ? 1024 : 0) + first * width;
        std::vector<unsigned char> bytes(n * width);
        int fd = open_file(file.path);
        size_t done = 0;
        int error = 0;
        while (done < bytes.size() && !error) {
            ssize_t got = pread(fd, bytes.data() + done, bytes.size() - done, off_t(offset + done));
            if (got == 0) break;
            if (got > 0) done += size_t(got);
            else if (errno != EINTR) error = errno;
        }
        close(fd);
        if (error)
            throw DataError(format("%s: cannot be read (%s); see to its disk, or restore it", file.path,
                                   strerror(error)));
        if (done < bytes.size())
            throw DataError(format("%s: expected %llu tokens as at the start of the run, found fewer; the file has "
                                   "been cut short, restore it",
                                   file.path, file.count));
        for (size_t i = 0; i < n; i++) {
            uint32_t token = 0;
            memcpy(&token, &bytes[i * width], width);
            if (token >= uint32_t(V))
                throw DataError(format("%s: expected tokens below the model's V = %d, found %u at token %llu; use "
                                       "other data or another model",
                                       file.path, V, token, first + i));
            out[i] = int(token);
        }
    }
};

// A tokenizer lies under this name beside the models of a run and beside the shards that it has written.
inline std::string tokenizer_path(const std::string& folder) { return folder + "/tokenizer.bin"; }
// The folder in which a file lies, or that to which a link leads.
inline std::string folder_of(const std::string& file) {
    std::error_code fault;
    std::filesystem::path path = std::filesystem::canonical(file, fault);
    return (fault ? std::filesystem::path(file) : path).parent_path();
}

// The tokenizer of --tokenizer; else the one beside the model of -e or the state of -y, which names its own by its
// CRC-32; else the one in the folder of -y, whose run has no checkpoint yet, or beside shards; else bytes. init: that
// model or state, or null. shards: their folder, or "".
inline Tokenizer open_tokenizer(const Options& o, const FileReader* init, const std::string& shards) {
    std::string path = o.tokenizer;
    ModelConfig model = init ? init->header.model() : ModelConfig{};
    if (path.empty() && model.tokenizer) {
        path = tokenizer_path(folder_of(init->path));
        if (access(path.c_str(), F_OK) != 0)
            fail("--tokenizer: expected the tokenizer of CRC-32 %08x, with which %s was trained, found none, nor %s; "
                 "give it by --tokenizer FILE",
                 model.tokenizer, init->path, path);
    }
    for (const std::string& folder : {o.resume ? o.out : "", shards})
        if (path.empty() && !init && !folder.empty() && access(tokenizer_path(folder).c_str(), F_OK) == 0)
            path = tokenizer_path(folder);
    if (path.empty()) return {};
    Tokenizer t = Tokenizer::read(path);
    if (model.tokenizer && model.tokenizer != t.crc)
        fail("--tokenizer: expected the tokenizer of CRC-32 %08x, with which %s was trained, found %s of CRC-32 %08x; "
             "give that one",
             model.tokenizer, init->path, path, t.crc);
    if (init && model.V != t.V())
        fail("--tokenizer: expected V = %d as in %s, found %d tokens in %s; give its own, or leave it out", model.V,
             init->path, t.V(), path);
    return t;
}

// The tokenizer of a model's tokens; null where what they mean is not known, as of shards without a tokenizer.
inline const Tokenizer* tokenizer_of_model(const Tokenizer& t, int V) { return t.V() == V ? &t : nullptr; }

// Where the first MiB of a file stops being UTF-8; npos where it does not.
inline size_t find_no_utf8(std::string_view text) {
    text = text.substr(0, size_t(1) << 20);
    for (size_t at = 0; at < text.size();) {
        Character c = character_at(text.substr(at));
        if (c.state == Character::INVALID) return at;
        at += size_t(c.bytes);
    }
    return text.npos;
}

// Encodes the files of a text source, each of them a document. The tokens stay in memory, in that of each of the
// machine's local_ranks.
inline void encode_source(TokenSource& source, const Tokenizer& t, int local_ranks) {
    constexpr size_t block = size_t(64) << 20;  // bytes
    local_ranks = std::max(1, local_ranks);
    auto tokens = std::make_shared<std::vector<int>>();
    uint64_t bytes = source.count, done = 0;
    // Makes room for what the rest of the text needs at the rate so far. Growing keeps the old array until it is
    // copied.
    auto make_room = [&] {
        uint64_t left = uint64_t(double(tokens->size()) / double(done) * double(bytes - std::min(bytes, done)));
        if (tokens->capacity() - tokens->size() >= left) return;
        uint64_t needed = (tokens->size() + left) * sizeof(int), available = available_memory() / uint64_t(local_ranks);
        if (needed > available)
            fail("%s: its tokens need %s of memory, found %s; write shards: python3 data/tokenizer.py encode -t %s -o "
                 "DIR FILES",
                 source.pattern, bytes_text(double(needed)), bytes_text(double(available)), quoted(t.path));
        tokens->reserve(tokens->size() + left + left / 8);
    };
    bool told = false;
    for (const TokenFile& file : source.files) {
        std::unique_ptr<FILE, CloseFile> in(fdopen(TokenSource::open_file(file.path), "rb"));
        if (t.separator() >= 0) tokens->push_back(t.separator());
        std::string text;
        for (bool more = true; more;) {
            size_t had = text.size();
            text.resize(had + std::min<uint64_t>(block, file.count + 1));  // so that a small file's end is seen at once
            size_t got = fread(text.data() + had, 1, text.size() - had, in.get());
            more = had + got == text.size();
            text.resize(had + got);
            size_t end = more ? last_boundary(text) : text.size();
            if (more && end == 0) continue;  // a block that cannot be divided
            std::string_view part = std::string_view(text).substr(0, end);
            if (size_t zero = part.find('\0'); zero != part.npos)
                fail("%s: expected text, found a zero byte at %llu; train on text alone", file.path,
                     done - file.first + zero);
            if (size_t at = find_no_utf8(part); !told && done == file.first && at != part.npos)
                told = true, print("note       %s is not UTF-8 at byte %zu: such bytes become tokens of their own; if "
                                   "it is Latin-1, use: iconv -f LATIN1 -t UTF-8 %s > text.txt\n",
                                   file.path, at, quoted(file.path));
            t.encode_parallel(part, int(std::thread::hardware_concurrency()) / local_ranks, *tokens);
            text.erase(0, end), done += end;
            make_room();
        }
        if (ferror(in.get())) fail("%s: could not be read to its end (%s)", file.path, errno_text());
    }
    source.count = tokens->size(), source.encoded = tokens;
}

// Deals the sequences of tokens [start, start + count) of a source, or those that a generator makes. An epoch divides
// the tokens into n = (count-1)/T sequences of T inputs (targets are one further on) and shuffles them; the fewer than
// T tokens left over are other ones in every epoch. Sequence s is a function of (seed, s) alone: a resume needs no
// state of the loader, and any rank can read any sequence of any batch.
class Loader {
public:
    Loader(const TokenSource& source, uint64_t start, uint64_t count, int T, int V, uint64_t seed, bool shuffle)
        : source(&source), T(size_t(T)), start(start), V(V), seed(seed), shuffle(shuffle) {
        sequences = count > uint64_t(T) ? (count - 1) / uint64_t(T) : 0;
        spare = sequences ? count - 1 - sequences * uint64_t(T) : 0;
        half_bits = 1;
        while ((uint64_t(1) << (2 * half_bits)) < sequences) half_bits++;
    }

    // generate(s, n, row) makes the first n tokens of sequence s, for any s: there is no last sequence.
    using Generate = std::function<void(uint64_t s, int n, int* row)>;
    Loader(Generate generate, int T) : generate(std::move(generate)), T(size_t(T)), sequences(UINT64_MAX) {}

    uint64_t sequences_per_epoch() const { return sequences; }

    // Where sequence s, counted from the start of training, begins in the source's row of tokens.
    uint64_t position(uint64_t s) const {
        uint64_t epoch = s / sequences, i = s % sequences;
        if (!shuffle) return start + i * T;
        uint64_t shift =
            philox(seed, uint32_t(epoch), uint32_t(epoch >> 32), 0xFFFFFFFFu, STREAM_DATA).word[0] % (spare + 1);
        return start + shift + permuted(i, epoch) * T;
    }

    // Sequences s .. s+B-1 as tokens (B,T) and targets (B,T).
    void batch(uint64_t s, int B, int* tokens, int* targets) const {
        std::vector<int> row(T + 1);
        for (int b = 0; b < B; b++) {
            if (generate) generate(s + uint64_t(b), int(T + 1), row.data());
            else source->read(position(s + uint64_t(b)), T + 1, V, row.data());
            std::copy(row.begin(), row.end() - 1, tokens + size_t(b) * T);
            std::copy(row.begin() + 1, row.end(), targets + size_t(b) * T);
        }
    }

private:
    const TokenSource* source = nullptr;
    Generate generate;  // empty: sequences come from the source
    size_t T;
    uint64_t start = 0, sequences = 0, spare = 0;
    int V = 0, half_bits = 0;
    uint64_t seed = 0;
    bool shuffle = false;

    // A permutation of [0, sequences) without a table: a Feistel network is a bijection of 2*half_bits bits, whatever
    // its round function; what falls outside is sent through again until it lands inside (Black and Rogaway 2002,
    // "cycle walking").
    uint64_t permuted(uint64_t i, uint64_t epoch) const {
        const uint64_t mask = (uint64_t(1) << half_bits) - 1;
        do {
            uint64_t left = i >> half_bits, right = i & mask;
            for (uint32_t round = 0; round < 6; round++) {
                uint32_t f = philox(seed ^ (epoch >> 32), uint32_t(right), uint32_t(epoch), round, STREAM_DATA).word[0];
                std::swap(left, right);
                right = (right ^ f) & mask;
            }
            i = left << half_bits | right;
        } while (i >= sequences);
        return i;
    }
};

// The data of -i; by default the trainer's own sources, which lie beside the program.
inline TokenSource open_training_data(const Options& o) {
    if (!o.train.empty()) return TokenSource(o.train, "-i");
    std::error_code ignored;
    std::filesystem::path folder = program_path().parent_path();
    std::vector<std::string> own;
    for (const char* name : {"keel_common.h", "train_keel.cu", "train_keel_cpu.cpp"})
        if (access((folder / name).c_str(), R_OK) == 0) own.push_back(folder / name);
    for (const auto& file : std::filesystem::directory_iterator(folder / "keel", ignored))
        if (file.path().extension() == ".h") own.push_back(file.path());
    if (own.empty())
        fail("-i: expected training data, found none, nor the trainer's own sources beside it; give -i PATH");
    std::sort(own.begin(), own.end());
    TokenSource source(own, "-i");
    source.pattern = "the trainer's own sources";
    return source;
}

// Training and validation data: programs, two sources, or one source that is divided at nine tenths.
struct DataSplit {
    HopPrograms programs;
    TokenSource train, val;
    uint64_t train_count = 0, val_start = 0, val_count = 0;  // 0 for programs
    uint32_t train_sum = 0, val_sum = 0;                     // as in TokenSource::checksum; 0 for programs
    Tokenizer tokenizer;
    uint64_t text_bytes = 0, text_tokens = 0;  // what the tokenizer has encoded
    double encode_seconds = 0;

    // init: as in open_tokenizer. local_ranks: as in encode_source.
    explicit DataSplit(const Options& o, const FileReader* init = nullptr, int local_ranks = 1)
        : programs{o.train.size() == 1 ? HopPrograms::parse(o.train[0]) : 0} {
        if (!programs.hops) train = open_training_data(o);
        tokenizer = open_tokenizer(o, init, train.shards ? folder_of(train.files[0].path) : "");
        if (programs.hops && !tokenizer.is_bytes())
            fail("-i: expected a model and a run of bytes for %s, which is made of characters, found the tokenizer %s; "
                 "leave it out, or give another -e",
                 o.train[0], tokenizer.path);
        if (programs.hops) {
            if (!o.val.empty())
                fail("-j: expected none with -i %s, whose validation programs are its own, found '%s'; leave it out",
                     o.train[0], o.val[0]);
            train.pattern = o.train[0];
            return;
        }
        encode(train, local_ranks);
        if (o.val.empty()) {
            val = train;
            val_start = train_count = train.count - train.count / 10;
            val_count = train.count / 10;
            take_sums();
            return;
        }
        if (o.val.size() == 1 && o.val[0].starts_with("hops:"))
            fail("-j: expected files like -i, found %s; give -i %s, whose validation programs are its own, and no -j",
                 o.val[0], o.val[0]);
        val = TokenSource(o.val, "-j");
        if ((val.shards == nullptr) != (train.shards == nullptr))
            fail("-j: expected %s like -i, found %s", train.shards ? "shards" : "text", val.shards ? "shards" : "text");
        if (val.same_file(train)) fail("-j: a file is in -i as well; validate on data that training never sees");
        encode(val, local_ranks);
        train_count = train.count, val_count = val.count;
        take_sums();
    }
    Vocabulary vocabulary() const {
        return {train.shards && tokenizer.is_bytes() ? train.shards->V : tokenizer.V(), tokenizer.crc};
    }
    // Times that the steps of a whole run read each training token; 0 for programs, which have no end.
    double passes(const RunConfig& run) const {
        return train_count ? double(run.steps) * double(run.total_batch) / double(train_count) : 0;
    }
    // What to say of a run that learns its data by heart, "" of another. Muennighoff et al. 2023, "Scaling
    // Data-Constrained Language Models": up to 4 passes are worth nearly as much as new text, and after 16 little is
    // gained. A model of fewer parameters than a twentieth of the tokens (Hoffmann et al. 2022, "Training
    // Compute-Optimal Large Language Models") is too small for that.
    std::string repetition(const RunConfig& run, size_t parameters) const {
        if (passes(run) <= 4 || 20 * double(parameters) <= double(train_count)) return "";
        struct {
            double tokens;
            const char* command;
        } larger[] = {{1e6, "tinyshakespeare.py"},
                      {7e8, "fineweb_edu.py --max-files 1"},
                      {1e10, "fineweb_edu.py"},
                      {INFINITY, "fineweb_edu.py --sample 100BT"}};
        const auto* text = larger;
        while (double(train_count) * passes(run) / 4 > text->tokens) text++;
        return format("%s parameters see %s tokens %.0f times and learn them by heart: past 4 passes little new is "
                      "learnt; for more text: python3 data/%s",
                      count_text(double(parameters)), count_text(double(train_count)), passes(run), text->command);
    }
    int natural_seq_len() const { return programs.hops ? programs.length() - 1 : 0; }  // 0: any

    Loader loader(const RunConfig& run, bool training) const {
        uint64_t seed = uint64_t(run.seed);
        if (programs.hops)
            return Loader([=, programs = programs](uint64_t s, int n, int* row) {
                programs.sequence(seed, s, !training, n, row);
            }, run.T);
        return training ? Loader(train, 0, train_count, run.T, run.model.V, seed, true)
                        : Loader(val, val_start, val_count, run.T, run.model.V, seed, false);
    }

    // Checks the first 2^27 tokens to train and to validate on, which take seconds to read, against V before anything
    // is written; later ones are checked as they are read.
    void check_tokens(int V) const {
        if (programs.hops && V <= 'z')
            fail("-i: expected a model of V above %d for %s, found V = %d; use another model", int('z'), train.pattern,
                 V);
        if (programs.hops) return;
        struct {
            const TokenSource& source;
            uint64_t start, count;
        } parts[] = {{train, 0, train_count}, {val, val_start, val_count}};
        for (const auto& [source, start, count] : parts) {
            if (source.encoded || (!source.shards && V >= 256)) continue;
            std::vector<int> chunk(1 << 16);
            size_t n = std::min<uint64_t>(count, 1 << 27);
            for (size_t at = 0; at < n; at += chunk.size())
                source.read(start + at, std::min(chunk.size(), n - at), V, chunk.data());
        }
    }

    // The loss, in nats a token, of a model that knows how frequent each token is and nothing more; taken from the
    // first 2^22 training tokens.
    double unigram_entropy(int V) const {
        size_t n = programs.hops ? 1 << 18 : std::min<uint64_t>(train_count, 1 << 22);
        std::vector<size_t> counts(static_cast<size_t>(V));
        std::vector<int> chunk(1 << 16);
        for (size_t at = 0; at < n; at += chunk.size()) {
            size_t m = std::min(chunk.size(), n - at);
            if (programs.hops) programs.sequence(0, at, false, int(m), chunk.data());
            else train.read(at, m, V, chunk.data());
            for (size_t i = 0; i < m; i++) counts[size_t(chunk[i])]++;
        }
        double sum = 0;
        for (size_t count : counts)
            if (count) sum -= double(count) * std::log(double(count) / double(n));
        return sum / double(n);
    }
    void check_lengths(const RunConfig& run, const Options& o) const {
        if (!programs.hops && !train.shards && tokenizer.is_bytes() && run.model.V > 256)
            fail("-i: expected --tokenizer FILE for text and a model of V = %d, found none; a byte is no token of it",
                 run.model.V);
        if (programs.hops && run.T < natural_seq_len())
            fail("-t: expected at least %d, a whole program of -i %s, found %d; give a larger -t or fewer hops",
                 natural_seq_len(), train.pattern, run.T);
        if (programs.hops) return;
        if ((train_count - 1) / uint64_t(run.T) < uint64_t(run.batch_sequences()))
            fail("-i: expected at least %lld tokens to train on, one batch of %lld and a target, found %llu; give more "
                 "data or a smaller %s",
                 run.total_batch + 1, run.total_batch, train_count, o.batch && !o.total_batch ? "-b" : "-d");
    }
    void check_validation(const RunConfig& run) const {
        if (!programs.hops && val_count < uint64_t(run.T) + 1)
            fail("-j: expected at least T + 1 = %d tokens to validate on, found %llu; give more data, a smaller -t, or "
                 "-v 0",
                 run.T + 1, val_count);
    }

private:
    void take_sums() { train_sum = train.checksum(0, train_count), val_sum = val.checksum(val_start, val_count); }
    void encode(TokenSource& source, int local_ranks) {
        if (source.shards || tokenizer.is_bytes()) return;
        double begin = seconds();
        text_bytes += source.count;
        encode_source(source, tokenizer, local_ranks);
        text_tokens += source.count, encode_seconds += seconds() - begin;
    }
};
