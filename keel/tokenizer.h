// keel/tokenizer.h: text to tokens and back, for prompts, samples and text files.
//
// A byte-level BPE (Sennrich et al. 2016; on bytes, Radford et al. 2019) does two things to a text. It cuts it into
// pieces, such as " word", "123" or ".\n", by a fixed pattern. Then each piece starts as single bytes, and two
// neighbours that together are a token become that token, of all such pairs the one of lowest rank first, until there
// is none. A token's rank is its id: frequent pairs were learnt first. No token crosses from one piece into the next.
//
// data/tokenizer.py trains vocabularies and takes those of others; its file has the layout that Tokenizer::read reads.
// The ids are those of tiktoken 0.14 and of Hugging Face's tokenizers 0.23. A text that is not UTF-8, which they do not
// take, has ids too, and decodes to the same bytes.
#pragma once

#include <atomic>
#include <queue>
#include <string_view>

#include "../keel_common.h"
#include "unicode.h"

// ----------------------------------------------------------------------------------------------------
// UTF-8

// What a text has at one place: a character, the start of one that its end cuts off, or bytes that can begin none.
struct Character {
    enum { WHOLE, CUT, INVALID } state;
    int bytes;      // of INVALID: as many as a decoder replaces by one U+FFFD (Unicode 16.0, section 3.9, "maximal
                    // subpart")
    uint32_t code;  // U+FFFD where it is not WHOLE
};

inline Character character_at(std::string_view text) {
    auto byte = [&](int i) { return uint32_t(static_cast<unsigned char>(text[size_t(i)])); };
    uint32_t lead = byte(0);
    if (lead < 0x80) return {Character::WHOLE, 1, lead};
    int bytes = lead < 0xC2 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 1;
    if (bytes == 1) return {Character::INVALID, 1, 0xFFFD};
    // The second byte's bounds leave out what has a shorter form, the surrogates, and what is above U+10FFFF.
    uint32_t least = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    uint32_t most = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    uint32_t code = lead & (0x7Fu >> bytes);
    for (int i = 1; i < bytes; i++, least = 0x80, most = 0xBF) {
        if (size_t(i) == text.size()) return {Character::CUT, i, 0xFFFD};
        if (byte(i) < least || byte(i) > most) return {Character::INVALID, i, 0xFFFD};
        code = code << 6 | (byte(i) & 0x3F);
    }
    return {Character::WHOLE, bytes, code};
}

// Makes text for a terminal of bytes that come token by token: a character waits until it is whole, what can become
// none is U+FFFD, and a control character, which could move the cursor, is its symbol (U+2400 on).
class TextStream {
public:
    std::string add(std::string_view bytes, bool last = false) {
        waiting += bytes;
        std::string out;
        size_t at = 0;
        while (at < waiting.size()) {
            Character c = character_at(std::string_view(waiting).substr(at));
            if (c.state == Character::CUT && !last) break;
            if (c.state != Character::WHOLE || (c.code >= 0x80 && c.code < 0xA0)) out += "\uFFFD";
            else if (c.code == 0x7F) out += "\u2421";
            else if (c.code >= 0x20 || c.code == '\n' || c.code == '\r' || c.code == '\t')
                out.append(waiting, at, size_t(c.bytes));
            else out += {'\xE2', '\x90', char(0x80 + c.code)};
            at += size_t(c.bytes);
        }
        waiting.erase(0, at);
        return out;
    }

private:
    std::string waiting;
};

// ----------------------------------------------------------------------------------------------------
// Splits
//
// The patterns as tiktoken writes them; a ++ or ?+ takes all it can and gives nothing back. They look at a character's
// class alone, apart from a few of ASCII, so that a loop over classes does what a regular-expression engine would.

enum CharacterClass : uint8_t { OTHER, LETTER, NUMBER, SPACE };

inline const std::vector<CharacterClass> class_of = [] {  // of each code point
    std::vector<CharacterClass> table(0x110000, OTHER);
    auto fill = [&](std::span<const CodeRange> ranges, CharacterClass c) {
        for (CodeRange r : ranges) std::fill(table.begin() + r.first, table.begin() + r.last + 1, c);
    };
    fill(letter_ranges, LETTER), fill(number_ranges, NUMBER), fill(space_ranges, SPACE);
    return table;
}();

enum class Split : int32_t { BYTES, GPT2, CL100K, LLAMA3 };
inline constexpr const char* split_names[] = {"none", "GPT-2's", "cl100k's", "Llama 3's"};

// The end of the piece that starts at text[at].
inline size_t piece_end(Split split, std::string_view text, size_t at) {
    struct Step {
        CharacterClass kind;
        size_t next;
    };
    auto look = [&](size_t i) -> Step {
        if (static_cast<unsigned char>(text[i]) < 0x80) return {class_of[uint32_t(text[i])], i + 1};
        Character c = character_at(text.substr(i));
        return {class_of[c.code], i + size_t(c.bytes)};
    };
    auto run = [&](CharacterClass kind, size_t i, int most = INT_MAX) {  // the end of at most so many of one class
        for (Step s; most > 0 && i < text.size() && (s = look(i)).kind == kind; most--) i = s.next;
        return i;
    };
    auto is_break = [&](size_t i) { return text[i] == '\r' || text[i] == '\n'; };
    if (split == Split::BYTES) return at + 1;
    bool gpt2 = split == Split::GPT2;

    // '(?:[sdmt]|ll|ve|re), in cl100k of either case, where the long s (U+017F) is a form of s
    if (text[at] == '\'') {
        auto letter = [&](size_t i) {
            return i >= text.size() ? '\0' : gpt2 || text[i] < 'A' || text[i] > 'Z' ? text[i] : char(text[i] + 32);
        };
        char a = letter(at + 1), b = letter(at + 2);
        if (a == 's' || a == 'd' || a == 'm' || a == 't') return at + 2;
        if ((a == 'l' && b == 'l') || (a == 'v' && b == 'e') || (a == 'r' && b == 'e')) return at + 3;
        if (!gpt2 && text.substr(at + 1).starts_with("\u017F")) return at + 3;
    }
    Step first = look(at);
    size_t second = first.next;
    CharacterClass follows = second < text.size() ? look(second).kind : SPACE;
    if (gpt2) {
        //  ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++
        if (first.kind != SPACE) return run(first.kind, second);
        if (text[at] == ' ' && follows != SPACE) return run(follows, second);
    } else {
        // [^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+
        if (first.kind == LETTER || (first.kind != NUMBER && !is_break(at) && follows == LETTER))
            return run(LETTER, second);
        if (first.kind == NUMBER) return run(NUMBER, second, 2);
        if (first.kind == OTHER || (text[at] == ' ' && follows == OTHER)) {
            size_t end = run(OTHER, second);
            while (end < text.size() && is_break(end)) end++;
            return end;
        }
    }
    // White space: \s++$, in cl100k then \s*[\r\n], then \s+(?!\S)|\s, which leaves the last one to the word after it.
    // Llama 3's has no \s++$.
    size_t end = at, last = at, after_break = 0;
    for (Step s; end < text.size() && (s = look(end)).kind == SPACE; end = s.next) {
        last = end;
        if (is_break(end)) after_break = end + 1;
    }
    if (end == text.size() && split != Split::LLAMA3) return end;
    if (after_break && !gpt2) return after_break;
    return end == text.size() || last == at ? end : last;
}

// Where a text may be cut without a change of its tokens: behind a line break between two characters that are not white
// space. Returns the last such place in [1, text.size()), or 0 where there is none.
inline size_t last_cut(std::string_view text) {
    auto is_dark = [&](size_t first, size_t end) {
        Character c = character_at(text.substr(first, end - first));
        return c.state == Character::WHOLE && class_of[c.code] != SPACE;
    };
    for (size_t at = text.size(); at-- > 2;) {
        if (text[at - 1] != '\n') continue;
        size_t before = at - 2;  // the start of the character before the line break
        while (before > 0 && at - before < 5 && (text[before] & 0xC0) == 0x80) before--;
        if (is_dark(at, text.size()) && is_dark(before, at - 1)) return at;
    }
    return 0;
}

// ----------------------------------------------------------------------------------------------------
// The vocabulary

class Tokenizer {
public:
    std::string path;  // "": bytes
    uint32_t crc = 0;  // of its file
    Split split = Split::BYTES;
    int specials = 0;  // the last of the V entries; an empty one is an id that nothing has

    // Bytes: every byte is its own token, V = 256.
    Tokenizer() {
        for (int b = 0; b < 256; b++) add(std::string(1, char(b)));
        index_ranks();
    }

    static Tokenizer read(const std::string& path) {
        FileReader in(path, FILE_TOKENIZER);
        Tokenizer t((Nothing()));
        int V = in.header.word[H_V], split = in.header.word[H_SPLIT];
        t.path = path, t.specials = in.header.word[H_SPECIALS], t.split = Split(split);
        auto damaged = [&](const std::string& what) { fail("%s: %s; the file is damaged", path, what); };
        if (V < 256 || V > MAX_V) damaged(format("V must be from 256 to %d and is %d", MAX_V, V));
        if (split < 0 || split > 3) damaged(format("its split must be from 0 to 3 and is %d", split));
        if (t.specials < 0 || t.specials > V - 256)
            damaged(format("it must have 0 to %d special tokens and has %d", V - 256, t.specials));
        if (t.split == Split::BYTES && V - t.specials != 256)
            damaged(format("without a split it must have 256 tokens beside special ones and has %d", V - t.specials));
        std::string body(in.body, '\0');
        in.read(body.data(), body.size());
        t.crc = in.finish();
        std::string_view left = body;
        for (int id = 0; id < V; id++) {
            size_t bytes = left.size() < 2 ? SIZE_MAX : uint8_t(left[0]) | size_t(uint8_t(left[1])) << 8;
            if (left.size() < 2 || left.size() - 2 < bytes) damaged(format("it ends within token %d of %d", id, V));
            t.add(left.substr(2, bytes));
            left.remove_prefix(2 + bytes);
        }
        if (!left.empty()) damaged(format("%zu bytes are left after its %d tokens", left.size(), V));
        if (std::string fault = t.index_ranks(); !fault.empty()) damaged(fault);
        return t;
    }

    // The bytes of its file.
    std::string file() const {
        FileHeader h;
        memcpy(&h.word[H_MAGIC], "KEEL", 4);
        h.word[H_VERSION] = FILE_VERSION, h.word[H_KIND] = FILE_TOKENIZER;
        h.word[H_V] = V(), h.word[H_SPLIT] = int32_t(split), h.word[H_SPECIALS] = specials;
        std::string bytes(reinterpret_cast<const char*>(&h), sizeof h);
        auto put = [&](auto value) { bytes.append(reinterpret_cast<const char*>(&value), sizeof value); };
        for (int id = 0; id < V(); id++) put(uint16_t(token(id).size())), bytes += token(id);
        put(crc32(bytes.data(), bytes.size()));
        return bytes;
    }

    int V() const { return int(start.size()) - 1; }
    int ranks() const { return V() - specials; }
    bool is_special(int id) const { return id >= ranks(); }
    // The bytes of a token; of a special token its name.
    std::string_view token(int id) const {
        return std::string_view(all).substr(start[size_t(id)], start[size_t(id) + 1] - start[size_t(id)]);
    }
    // Bytes of text that a token stands for.
    size_t text_bytes(int id) const { return is_special(id) ? 0 : token(id).size(); }
    // The special token before each document, the first that there is; -1: none.
    int separator() const {
        for (int id = ranks(); id < V(); id++)
            if (!token(id).empty()) return id;
        return -1;
    }
    std::string decode(std::span<const int> ids) const {
        std::string text;
        for (int id : ids) text += token(id);
        return text;
    }

    // Adds the tokens of a text, in which the name of a special token is text like any other.
    void encode(std::string_view text, std::vector<int>& out) const {
        for (size_t at = 0, end; at < text.size(); at = end) {
            end = piece_end(split, text, at);
            std::string_view piece = text.substr(at, end - at);
            if (int id = find(piece); id >= 0) out.push_back(id);
            else merge(piece, out);
        }
    }
    // The same, but a special token's name is that token; of two that fit the longer.
    void encode_with_specials(std::string_view text, std::vector<int>& out) const {
        size_t from = 0;
        for (size_t at = 0; at < text.size();) {
            int found = -1;
            for (int id = ranks(); id < V(); id++)
                if (!token(id).empty() && text.substr(at).starts_with(token(id)) &&
                    (found < 0 || token(id).size() > token(found).size()))
                    found = id;
            if (found < 0) {
                at++;
                continue;
            }
            encode(text.substr(from, at - from), out);
            out.push_back(found);
            from = at += token(found).size();
        }
        encode(text.substr(from), out);
    }

    // encode by several threads, the same tokens.
    void encode_parallel(std::string_view text, int threads, std::vector<int>& out) const;

private:
    std::string all;                 // the bytes of all tokens
    std::vector<uint32_t> start{0};  // (V+1): where each begins in `all`
    std::vector<uint64_t> slots;     // of the hash table: the hash's upper half, and the rank + 1; 0: free
    struct Nothing {};
    explicit Tokenizer(Nothing) {}

    void add(std::string_view bytes) {
        all += bytes;
        start.push_back(uint32_t(all.size()));
    }

    static uint64_t hash(std::string_view s) {
        uint64_t h = s.size() * 0x9E3779B97F4A7C15u;
        auto mix = [&](uint64_t word) { h = (h ^ word) * 0xD6E8FEB86659FD93u, h ^= h >> 32; };
        for (; s.size() >= 8; s.remove_prefix(8)) {
            uint64_t word;
            memcpy(&word, s.data(), 8);
            mix(word);
        }
        uint64_t word = 0;
        for (unsigned char c : s) word = word << 8 | c;
        mix(word);
        return h * 0x9E3779B97F4A7C15u;
    }

    // The rank of some bytes; -1 where they are no token.
    int find(std::string_view bytes) const {
        uint64_t h = hash(bytes);
        for (size_t slot = h;; slot++) {
            uint64_t entry = slots[slot & (slots.size() - 1)];
            if (entry == 0) return -1;
            if ((entry ^ h) >> 32 == 0 && token(int(uint32_t(entry)) - 1) == bytes) return int(uint32_t(entry)) - 1;
        }
    }

    // Fills the hash table; returns what is wrong with the vocabulary, or "".
    std::string index_ranks() {
        slots.assign(std::bit_ceil(2 * size_t(ranks())), 0);
        for (int id = 0; id < ranks(); id++) {
            if (token(id).empty()) return format("token %d is empty", id);
            if (int other = find(token(id)); other >= 0) return format("tokens %d and %d are the same", other, id);
            uint64_t h = hash(token(id));
            size_t slot = h;
            while (slots[slot & (slots.size() - 1)]) slot++;
            slots[slot & (slots.size() - 1)] = h >> 32 << 32 | uint32_t(id + 1);
        }
        for (int b = 0; b < 256; b++)
            if (char c = char(b); find({&c, 1}) < 0) return format("no token is the byte %d", b);
        std::set<std::string_view> names;
        for (int id = ranks(); id < V(); id++)
            if (!token(id).empty() && !names.insert(token(id)).second)
                return format("token %d has the name of another special token", id);
        return "";
    }

    // Adds the tokens of a piece that is not a token itself. The parts are a linked list over the bytes at which they
    // start; the pairs wait in a heap, where one whose parts have changed is passed over.
    void merge(std::string_view piece, std::vector<int>& out) const {
        struct Pair {
            int rank;
            size_t first, end;  // the bytes that the two parts cover
            bool operator<(const Pair& o) const { return rank != o.rank ? rank > o.rank : first > o.first; }
        };
        size_t n = piece.size();
        std::vector<size_t> next(n + 1), before(n + 1);
        std::vector<bool> alive(n + 1, true);
        std::priority_queue<Pair> pairs;
        auto offer = [&](size_t first) {
            if (next[first] >= n) return;
            size_t end = next[next[first]];
            if (int rank = find(piece.substr(first, end - first)); rank >= 0) pairs.push({rank, first, end});
        };
        for (size_t i = 0; i <= n; i++) next[i] = i + 1, before[i] = i - 1;
        for (size_t i = 0; i + 1 < n; i++) offer(i);
        while (!pairs.empty()) {
            auto [rank, first, end] = pairs.top();
            pairs.pop();
            if (!alive[first] || next[first] >= n || next[next[first]] != end) continue;
            alive[next[first]] = false;
            next[first] = end, before[end] = first;
            offer(first);
            if (first > 0) offer(before[first]);
        }
        for (size_t i = 0; i < n; i = next[i]) out.push_back(find(piece.substr(i, next[i] - i)));
    }
};

inline void Tokenizer::encode_parallel(std::string_view text, int threads, std::vector<int>& out) const {
    constexpr size_t piece = size_t(1) << 20;  // bytes that a thread takes at once, about
    std::vector<std::string_view> chunks;
    while (!text.empty()) {
        size_t end = text.size() <= piece ? text.size() : last_cut(text.substr(0, piece));
        for (size_t most = 2 * piece; end == 0; most *= 2)  // no place to cut so far
            end = most >= text.size() ? text.size() : last_cut(text.substr(0, most));
        chunks.push_back(text.substr(0, end));
        text.remove_prefix(end);
    }
    std::vector<std::vector<int>> tokens(chunks.size());
    std::atomic<size_t> taken = 0;
    auto work = [&] {
        for (size_t i; (i = taken++) < chunks.size();) encode(chunks[i], tokens[i]);
    };
    std::vector<std::thread> others;
    try {
        for (int t = 1; t < std::min(threads, int(chunks.size())); t++) others.emplace_back(work);
    } catch (const std::system_error&) {  // no more threads
    }
    work();
    for (std::thread& thread : others) thread.join();
    for (const std::vector<int>& part : tokens) out.insert(out.end(), part.begin(), part.end());
}
