// Training data: a token shard behind an odd first byte, text behind an even one.
#include "fuzz.h"

void fuzz(const unsigned char* data, size_t size) {
    if (size == 0) return;
    bool shard = data[0] & 1;
    Bytes file;
    if (shard) {  // three words of the header, zeros, the tokens; bit 1: the count is mended, for the shard's width
        file.resize(1024);
        memcpy(file.data(), data + 1, std::min<size_t>(size - 1, 12));
        if (size > 13) file.insert(file.end(), data + 13, data + size);
        int32_t count = int32_t(file.size() - 1024) / (file[0] == (shard_formats[1].magic & 0xFF) ? 4 : 2);
        if (data[0] & 2) memcpy(&file[8], &count, 4);
        if (data[0] & 4) file.resize(size_t(data[0]) * 16);  // cut
    } else {
        file.assign(data + 1, data + size);
    }
    std::string path = file_of(file, shard ? ".bin" : ".txt");
    TokenSource source({path}, "-i");
    std::vector<int> tokens(source.count);
    source.read(0, source.count, data[0] & 8 ? shard_formats[0].V : 65536, tokens.data());
    Loader loader(source, 0, source.count, 4, 65536, 1, data[0] & 16);
    if (loader.sequences_per_epoch() == 0) return;
    int batch[2][8];
    loader.batch(uint64_t(data[0]) * 1000, 2, batch[0], batch[1]);
}

std::vector<Bytes> seeds() {
    std::vector<Bytes> all;
    for (const ShardFormat& f : shard_formats) {
        Bytes shard(1 + 12 + 40);
        shard[0] = 3;
        int32_t words[] = {f.magic, f.version, 40 / f.token_bytes};
        memcpy(&shard[1], words, sizeof words);
        all.push_back(shard);
    }
    std::vector<std::string> texts = {"some text of a few words\n"};
    for (const ForeignFormat& f : foreign_formats)
        texts.push_back(std::string(f.at, '.') + std::string(f.start) + "...");
    for (const std::string& text : texts) {
        all.push_back({0});
        all.back().insert(all.back().end(), text.begin(), text.end());
    }
    return all;
}
