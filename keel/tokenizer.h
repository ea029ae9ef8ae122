// keel/tokenizer.h: text to tokens and back, for prompts, samples and text files: byte-level BPE.
//
// Training a vocabulary (Sennrich et al. 2016; on bytes, Radford et al. 2019) starts from the 256 bytes. Again and
// again the most frequent pair of neighbouring tokens in a text becomes a new token, whose id is the next number. So an
// id is a rank: the lower, the earlier learnt and the more frequent. data/tokenizer.py trains, by a library, and takes
// the vocabularies of others; here is encoding with their ranks:
//
//     cut the text into pieces such as " word", "123" or ".\n" by a fixed pattern; no token goes over a piece's end
//     of each piece: it is a token as a whole -> that token
//                    else its parts are its bytes, and while two neighbours joined are a token:
//                    join the two of lowest rank, of equal ones the leftmost
//
// The ids are those of tiktoken 0.14 and of Hugging Face's tokenizers 0.23. A text that is not UTF-8, which they do not
// take, has ids too, and decodes to the same bytes.
#pragma once

#include <atomic>
#include <future>
#include <queue>
#include <string_view>

#include "../keel_common.h"
#include "unicode.h"

// ----------------------------------------------------------------------------------------------------
// UTF-8

// The UTF-8 character at the start of a text: whole, cut short by the text's end, or invalid.
struct Character {
    enum { WHOLE, INCOMPLETE, INVALID } state;
    // Of INVALID: as many as a decoder replaces by one U+FFFD (Unicode 16.0, section 3.9, "maximal subpart").
    int bytes;
    uint32_t code;  // U+FFFD where it is not WHOLE
};

inline Character character_at(std::string_view text) {
    auto byte = [&](int i) { return uint32_t(static_cast<unsigned char>(text[size_t(i)])); };
    uint32_t lead = byte(0);
    if (lead < 0x80) return {Character::WHOLE, 1, lead};
    if (lead < 0xC2 || lead > 0xF4) return {Character::INVALID, 1, 0xFFFD};
    int bytes = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    // The second byte's bounds leave out what has a shorter form, the surrogates, and what is above U+10FFFF.
    uint32_t least = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    uint32_t most = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    uint32_t code = lead & (0x7Fu >> bytes);
    for (int i = 1; i < bytes; i++, least = 0x80, most = 0xBF) {
        if (size_t(i) == text.size()) return {Character::INCOMPLETE, i, 0xFFFD};
        if (byte(i) < least || byte(i) > most) return {Character::INVALID, i, 0xFFFD};
        code = code << 6 | (byte(i) & 0x3F);
    }
    return {Character::WHOLE, bytes, code};
}

// Turns bytes that come token by token into text for a terminal. A character waits until it is whole; bytes that can
// become none, and the controls U+0080 to U+009F, are U+FFFD; the other controls but tab, LF and CR LF are their
// symbols (U+2400 on), so that no sample can steer the terminal, nor a lone CR write over its line.
class TextStream {
public:
    std::string add(std::string_view bytes) {
        waiting += bytes;
        return take(false);
    }
    // What still waits for its rest, which does not come.
    std::string finish() { return take(true); }

private:
    std::string waiting;

    std::string take(bool all) {
        std::string out;
        size_t at = 0;
        while (at < waiting.size()) {
            Character c = character_at(std::string_view(waiting).substr(at));
            bool last = at + 1 == waiting.size(), ends_line = c.code == '\r' && !last && waiting[at + 1] == '\n';
            if (!all && (c.state == Character::INCOMPLETE || (c.code == '\r' && last))) break;
            if (c.state != Character::WHOLE || (c.code >= 0x80 && c.code < 0xA0)) out += "\uFFFD";
            else if (c.code == 0x7F) out += "\u2421";
            else if (c.code >= 0x20 || c.code == '\n' || c.code == '\t' || ends_line)
                out.append(waiting, at, size_t(c.bytes));
            else out += {'\xE2', '\x90', char(0x80 + c.code)};
            at += size_t(c.bytes);
        }
        waiting.erase(0, at);
        return out;
    }
};

// ----------------------------------------------------------------------------------------------------
// Splits: the patterns that cut text into pieces, also called pre-tokenization
//
// As tiktoken writes them; a ++ or ?+ takes all it can and gives nothing back.
//
//     gpt2    '(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s
//     cl100k  '(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|
//             \s+(?!\S)|\s
//     llama3  as cl100k, without its \s++$
//
// They look at the classes of characters alone, \p{L} letters, \p{N} numbers, \s white space, apart from a few
// characters of ASCII. So a loop over classes does what a regular-expression engine would.

enum class Split : int32_t { NONE, GPT2, CL100K, LLAMA3 };  // NONE: each byte is a piece
inline constexpr const char* split_names[] = {"none", "gpt2", "cl100k", "llama3"};

enum class CharacterClass : uint8_t { OTHER, LETTER, NUMBER, SPACE };

inline const std::vector<CharacterClass> class_of = [] {  // of each code point
    using enum CharacterClass;
    std::vector<CharacterClass> table(0x110000, OTHER);
    auto fill = [&](std::span<const CodeRange> ranges, CharacterClass c) {
        for (CodeRange r : ranges) std::fill(table.begin() + r.first, table.begin() + r.last + 1, c);
    };
    fill(letter_ranges, LETTER), fill(number_ranges, NUMBER), fill(space_ranges, SPACE);
    return table;
}();

// The end of the piece that starts at text[at].
inline size_t piece_end(Split split, std::string_view text, size_t at) {
    using enum CharacterClass;
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
        while (most-- > 0 && i < text.size()) {
            Step s = look(i);
            if (s.kind != kind) break;
            i = s.next;
        }
        return i;
    };
    auto is_break = [&](size_t i) { return text[i] == '\r' || text[i] == '\n'; };
    if (split == Split::NONE) return at + 1;
    bool gpt2 = split == Split::GPT2;

    // contractions; (?i:s) takes the long s, U+017F, too
    if (text[at] == '\'') {
        auto letter = [&](size_t i) {
            char c = i < text.size() ? text[i] : '\0';
            return !gpt2 && c >= 'A' && c <= 'Z' ? char(c + 32) : c;
        };
        char a = letter(at + 1), b = letter(at + 2);
        if (a == 's' || a == 'd' || a == 'm' || a == 't') return at + 2;
        if ((a == 'l' && b == 'l') || (a == 'v' && b == 'e') || (a == 'r' && b == 'e')) return at + 3;
        if (!gpt2 && text.substr(at + 1).starts_with("\u017F")) return at + 3;
    }
    Step first = look(at);
    size_t second = first.next;
    // At the text's end nothing follows, which the alternatives below treat as they treat white space.
    CharacterClass follows = second < text.size() ? look(second).kind : SPACE;
    if (gpt2) {  // letters, numbers or others, with a space before them
        if (first.kind != SPACE) return run(first.kind, second);
        if (text[at] == ' ' && follows != SPACE) return run(follows, second);
    } else {
        // letters, with one character before them that is no line break, letter or number
        if (first.kind == LETTER || (first.kind != NUMBER && !is_break(at) && follows == LETTER))
            return run(LETTER, second);
        if (first.kind == NUMBER) return run(NUMBER, second, 2);
        // others, with a space before them and line breaks behind them
        if (first.kind == OTHER || (text[at] == ' ' && follows == OTHER)) {
            size_t end = run(OTHER, second);
            while (end < text.size() && is_break(end)) end++;
            return end;
        }
    }
    // white space: all of it at the text's end; in cl100k up to its last line break; else all but the last character,
    // which is left to the word after it
    size_t end = at, last = at, after_break = 0;
    while (end < text.size()) {
        Step s = look(end);
        if (s.kind != SPACE) break;
        if (is_break(end)) after_break = end + 1;
        last = end, end = s.next;
    }
    if (end == text.size() && split != Split::LLAMA3) return end;
    if (after_break && !gpt2) return after_break;
    return end == text.size() || last == at ? end : last;
}

// Where a text may be divided without a change of its tokens: before a space behind a character that is not white
// space, and behind a "\n" between two such characters. No piece of any split goes on over such a space, and such a
// "\n" ends a piece whether text follows or not. ("\r\n" is no such place: at a text's end gpt2 takes both together.)
// Returns the last place in [1, text.size()), 0 where there is none. Those of data/shards.py are among these.
inline size_t last_boundary(std::string_view text) {
    auto is_solid = [&](size_t first, size_t end) {
        Character c = character_at(text.substr(first, end - first));
        return c.state == Character::WHOLE && class_of[c.code] != CharacterClass::SPACE;
    };
    auto is_solid_before = [&](size_t end) {
        size_t first = end - 1;
        while (first > 0 && end - first < 4 && (text[first] & 0xC0) == 0x80) first--;
        return is_solid(first, end);
    };
    for (size_t at = text.size(); at-- > 1;) {
        if (text[at] == ' ' && is_solid_before(at)) return at;
        if (text[at - 1] == '\n' && at > 1 && is_solid(at, text.size()) && is_solid_before(at - 1)) return at;
    }
    return 0;
}

// ----------------------------------------------------------------------------------------------------
// The vocabulary

class Tokenizer {
public:
    std::string path;  // "": bytes
    uint32_t crc = 0;  // of its file

    // Bytes: each byte is its own token, V = 256.
    Tokenizer() {
        header.word[H_V] = 256;
        for (int b = 0; b < 256; b++) body += {'\1', '\0', char(b)};
        read_tokens();
    }
    // Moved and not copied: its tokens point into its body.
    Tokenizer(Tokenizer&&) = default;
    Tokenizer& operator=(Tokenizer&&) = default;

    static Tokenizer read(const std::string& path) {
        FileReader in(path, FILE_TOKENIZER);
        Tokenizer t;
        t.path = path, t.header = in.header;
        t.body.resize(in.body_bytes);
        in.read(t.body.data(), t.body.size());
        t.crc = in.finish();
        if (std::string fault = t.read_tokens(); !fault.empty()) fail("%s: %s; the file is damaged", path, fault);
        return t;
    }
    // The bytes of its file.
    std::string file() const {
        return std::string(reinterpret_cast<const char*>(&header), sizeof header) + body +
               std::string(reinterpret_cast<const char*>(&crc), sizeof crc);
    }

    bool is_bytes() const { return path.empty(); }
    Split split() const { return Split(header.word[H_SPLIT]); }
    int V() const { return header.word[H_V]; }
    int mergeable() const { return V() - header.word[H_SPECIALS]; }  // ids below are ranks, others special tokens
    bool is_special(int id) const { return id >= mergeable(); }
    // The bytes of a token; of a special token its name, "" where nothing has the id.
    std::string_view token(int id) const { return tokens[size_t(id)]; }
    // Bytes of text that a token stands for.
    size_t text_bytes(int id) const { return is_special(id) ? 0 : token(id).size(); }
    // The special token before each document, the first that there is (tiktoken's eot_token, others' bos); -1: none.
    int separator() const {
        for (int id = mergeable(); id < V(); id++)
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
            end = piece_end(split(), text, at);
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
            size_t longest = 0;
            for (int id = mergeable(); id < V(); id++)
                if (token(id).size() > longest && text.substr(at).starts_with(token(id)))
                    found = id, longest = token(id).size();
            if (found < 0) {
                at++;
                continue;
            }
            encode(text.substr(from, at - from), out);
            out.push_back(found);
            from = at += longest;
        }
        encode(text.substr(from), out);
    }

    // encode by several threads, the same tokens.
    void encode_parallel(std::string_view text, int threads, std::vector<int>& out) const {
        constexpr size_t chunk_bytes = size_t(1) << 20;  // that a thread takes at once, about
        std::vector<std::string_view> chunks;
        for (size_t most = chunk_bytes; !text.empty();) {
            size_t end = most >= text.size() ? text.size() : last_boundary(text.substr(0, most));
            if (end == 0) {
                most *= 2;
                continue;
            }
            chunks.push_back(text.substr(0, end));
            text.remove_prefix(end), most = chunk_bytes;
        }
        std::vector<std::vector<int>> ids(chunks.size());
        std::atomic<size_t> taken = 0;
        auto work = [&] {
            for (size_t i; (i = taken++) < chunks.size();) encode(chunks[i], ids[i]);
        };
        std::vector<std::future<void>> others;
        try {
            for (size_t t = 1; t < std::min(size_t(std::max(1, threads)), chunks.size()); t++)
                others.push_back(std::async(std::launch::async, work));
        } catch (const std::system_error&) {  // no more threads
        }
        work();
        for (std::future<void>& other : others) other.get();
        for (const std::vector<int>& part : ids) out.insert(out.end(), part.begin(), part.end());
    }

private:
    static constexpr uint64_t LOW_HALF = 0xFFFFFFFF;
    FileHeader header;
    std::string body;                      // of the file
    std::vector<std::string_view> tokens;  // (V), in the body
    // The rank of some bytes, by open addressing: the upper half of their hash, and the rank + 1; 0 is free. At least
    // twice as many as there are mergeable tokens, a power of two. (By std::unordered_map encoding takes twice the
    // time.)
    std::vector<uint64_t> slots;

    // Takes the tokens from header and body; returns what is wrong with them, or "".
    std::string read_tokens() {
        int specials = header.word[H_SPECIALS];
        if (V() < 256 || V() > MAX_V) return format("V must be from 256 to %d and is %d", MAX_V, V());
        if (header.word[H_SPLIT] < 0 || split() > Split::LLAMA3)
            return format("its split must be from 0 to %d and is %d", int(Split::LLAMA3), header.word[H_SPLIT]);
        if (specials < 0 || specials > V() - 256)
            return format("it must have 0 to %d special tokens and has %d", V() - 256, specials);
        if (split() == Split::NONE && mergeable() != 256)
            return format("without a split it must have 256 mergeable tokens and has %d", mergeable());
        tokens.clear();
        std::string_view left = body;
        for (int id = 0; id < V(); id++) {
            uint16_t bytes = 0;
            memcpy(&bytes, left.data(), std::min(left.size(), sizeof bytes));
            if (left.size() < sizeof bytes + bytes) return format("it ends within token %d of %d", id, V());
            tokens.push_back(left.substr(sizeof bytes, bytes));
            left.remove_prefix(sizeof bytes + bytes);
        }
        if (!left.empty()) return format("%zu bytes are left after its %d tokens", left.size(), V());
        slots.assign(std::bit_ceil(2 * size_t(mergeable())), 0);
        for (int id = 0; id < mergeable(); id++) {
            if (token(id).empty()) return format("token %d is empty", id);
            size_t slot = slot_of(token(id));
            if (slots[slot]) return format("tokens %d and %d are the same", find(token(id)), id);
            slots[slot] = (hash(token(id)) & ~LOW_HALF) | uint64_t(id + 1);
        }
        for (int b = 0; b < 256; b++)
            if (find(std::string(1, char(b))) < 0) return format("no token is the byte %d", b);
        std::set<std::string_view> names;
        for (int id = mergeable(); id < V(); id++)
            if (!token(id).empty() && !names.insert(token(id)).second)
                return format("token %d has the name of another special token", id);
        return "";
    }

    // Eight bytes at a time, mixed by a multiplication (its factor: MurmurHash3's fmix64) and a shift.
    static uint64_t hash(std::string_view bytes) {
        uint64_t h = bytes.size();
        auto mix = [&](uint64_t word) { h = (h ^ word) * 0xFF51AFD7ED558CCD, h ^= h >> 32; };
        for (; bytes.size() >= 8; bytes.remove_prefix(8)) {
            uint64_t word;
            memcpy(&word, bytes.data(), 8);
            mix(word);
        }
        uint64_t word = 0;
        for (unsigned char c : bytes) word = word << 8 | c;
        mix(word);
        return h;
    }
    // The slot of some bytes: theirs, or the first free one.
    size_t slot_of(std::string_view bytes) const {
        uint64_t h = hash(bytes);
        for (size_t slot = h;; slot++) {
            uint64_t entry = slots[slot &= slots.size() - 1];
            if (!entry || ((entry ^ h) <= LOW_HALF && tokens[(entry & LOW_HALF) - 1] == bytes)) return slot;
        }
    }
    // The rank of some bytes; -1 where they are no token.
    int find(std::string_view bytes) const { return int(slots[slot_of(bytes)] & LOW_HALF) - 1; }

    // Adds the tokens of a piece that is not a token itself.
    void merge(std::string_view piece, std::vector<int>& out) const {
        constexpr size_t most = 64;  // bytes of a piece whose pairs are all looked at after each merge
        if (piece.size() > most) return merge_long(piece, out);
        struct Part {
            size_t start;
            int rank;  // of this part and the next joined; INT_MAX: they are no token
        } parts[most + 1];
        size_t count = piece.size();
        for (size_t i = 0; i <= count; i++) parts[i].start = i;  // the last one is the piece's end
        auto look = [&](Part* p) {
            int rank = p + 2 > parts + count ? -1 : find(piece.substr(p->start, p[2].start - p->start));
            p->rank = rank < 0 ? INT_MAX : rank;
        };
        for (Part* p = parts; p <= parts + count; p++) look(p);
        auto lower = [](const Part& a, const Part& b) { return a.rank < b.rank; };
        for (Part* best; (best = std::min_element(parts, parts + count, lower))->rank < INT_MAX;) {
            std::copy(best + 2, parts + count + 1, best + 1), count--;
            look(best);
            if (best > parts) look(best - 1);
        }
        for (Part* p = parts; p < parts + count; p++)
            out.push_back(find(piece.substr(p->start, p[1].start - p->start)));
    }

    // The same in n log n steps: a piece can be a megabyte of one letter. The pairs wait in a heap. The parts are a
    // linked list over the bytes at which they start, and a pair of which a part has been merged since is passed over.
    void merge_long(std::string_view piece, std::vector<int>& out) const {
        struct Pair {
            int rank;
            size_t first, end;  // the bytes that the two parts cover
            bool operator<(const Pair& o) const { return rank != o.rank ? rank > o.rank : first > o.first; }
        };
        size_t n = piece.size();
        std::vector<size_t> next(n + 1), previous(n + 1);
        std::priority_queue<Pair> pairs;
        auto push_pair = [&](size_t first) {
            if (next[first] >= n) return;
            size_t end = next[next[first]];
            if (int rank = find(piece.substr(first, end - first)); rank >= 0) pairs.push({rank, first, end});
        };
        for (size_t i = 0; i <= n; i++) next[i] = i + 1, previous[i] = i - 1;
        for (size_t i = 0; i + 1 < n; i++) push_pair(i);
        while (!pairs.empty()) {
            auto [rank, first, end] = pairs.top();
            pairs.pop();
            size_t middle = next[first];
            if (next[middle] != end) continue;
            next[middle] = n;  // no part starts here any more: n, whose next is no pair's end
            next[first] = end, previous[end] = first;
            push_pair(first);
            if (first > 0) push_pair(previous[first]);
        }
        for (size_t i = 0; i < n; i = next[i]) out.push_back(find(piece.substr(i, next[i] - i)));
    }
};
