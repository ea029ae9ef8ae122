// A tokenizer's file, and text by the tokenizer that it makes.
#include "fuzz.h"

namespace {

// The input: a byte of choices, V, split, special entries, how many bytes are the file's body; these; the rest is text.
// As a file needs entries for all 256 bytes and a CRC-32, choices mend it: 1 gives it a true header, 2 the entries of
// the bytes, 4 takes from the body one byte for an entry's length and counts V, 8 the CRC-32.
constexpr int HEADER = 1, SINGLE_BYTES = 2, ENTRIES = 4, CRC = 8, ALL = 15;

void put(Bytes& file, std::string_view entry) {
    file.insert(file.end(), {uint8_t(entry.size()), uint8_t(entry.size() >> 8)});
    file.insert(file.end(), entry.begin(), entry.end());
}

Bytes tokenizer_file(int choices, const unsigned char* words, std::string_view body) {
    FileHeader header;
    int V = words[0];
    memcpy(&header.word[H_MAGIC], "KEEL", 4);
    header.word[H_VERSION] = 1, header.word[H_KIND] = FILE_TOKENIZER;
    header.word[H_SPLIT] = int8_t(words[1]), header.word[H_SPECIALS] = int8_t(words[2]);
    Bytes entries;
    if (choices & SINGLE_BYTES) {
        for (int b = 0; b < 256; b++) put(entries, std::string(1, char(b)));
        V += 256;
    }
    if (choices & ENTRIES) {
        V -= words[0];
        while (!body.empty()) {
            std::string_view entry = body.substr(1, static_cast<unsigned char>(body[0]));
            put(entries, entry);
            body.remove_prefix(1 + entry.size());
            V++;
        }
    }
    entries.insert(entries.end(), body.begin(), body.end());
    header.word[H_V] = V;
    Bytes file(sizeof header);
    if (!(choices & HEADER)) header.word[words[0] % 256] = words[1];
    memcpy(file.data(), &header, sizeof header);
    file.insert(file.end(), entries.begin(), entries.end());
    uint32_t crc = choices & CRC ? crc32(file.data(), file.size()) : 0;
    file.insert(file.end(), reinterpret_cast<unsigned char*>(&crc), reinterpret_cast<unsigned char*>(&crc) + 4);
    return file;
}

void require(bool good) {
    if (!good) abort();
}

}  // namespace

void fuzz(const unsigned char* data, size_t size) {
    if (size < 5) return;
    std::string_view rest(reinterpret_cast<const char*>(data) + 5, size - 5);
    std::string_view body = rest.substr(0, data[4]), text = rest.substr(body.size());
    Bytes file = tokenizer_file(data[0], data + 1, body);
    Tokenizer t = Tokenizer::read(file_of(file, ".bin"));
    std::string written = t.file();
    if (data[0] & HEADER) require(Bytes(written.begin(), written.end()) == file);

    std::vector<int> tokens, parts, prompt;
    t.encode(text, tokens);
    require(t.decode(tokens) == text);
    for (int token : tokens) require(token >= 0 && token < t.mergeable());
    size_t cut = last_boundary(text);
    t.encode(text.substr(0, cut), parts), t.encode(text.substr(cut), parts);
    require(parts == tokens);
    t.encode_with_specials(text, prompt);
    require(t.decode(prompt) == text && prompt.size() <= text.size());

    TextStream whole, single;
    std::string shown, at_once = whole.add(text);
    at_once += whole.finish();
    for (char c : text) shown += single.add({&c, 1});
    shown += single.finish();
    require(shown == at_once);
    for (std::string_view left = shown; !left.empty();) {  // UTF-8 without control characters
        Character c = character_at(left);
        require(c.state == Character::WHOLE && (c.code >= 0xA0 || (c.code >= ' ' && c.code < 0x7F) || c.code == '\n' ||
                                                c.code == '\r' || c.code == '\t'));
        left.remove_prefix(size_t(c.bytes));
    }
}

std::vector<Bytes> seeds() {
    std::vector<Bytes> all;
    std::string body, text = "The theatre's 123\u3000\u017F\n\xFF<|end|> <|end\r\n\x1B[1m\U0001F600";
    for (const char* entry : {"he", "the", " t", "\xE3\x80", "\u3000", "12", "<|end|>", "", "<|end"})
        body += char(strlen(entry)), body += entry;
    for (int choices : {ALL, ALL - ENTRIES, ALL - SINGLE_BYTES, ALL - HEADER, ALL - CRC})
        for (int split = 0; split < 4; split++) {
            all.push_back({uint8_t(choices), 0, uint8_t(split), 3, uint8_t(body.size())});
            for (const std::string& part : {body, text}) all.back().insert(all.back().end(), part.begin(), part.end());
        }
    return all;
}
