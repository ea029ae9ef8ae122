// Tests of keel/tokenizer.h and of text as training data: splits, merges against a slow encoder that is easily seen to
// be right, cuts, streams, files that are damaged or foreign. test_tokenizer.py compares with other libraries.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <map>
#include <numeric>
#include <random>

#include "files.h"
#include "keel/data.h"
#include "long.h"

namespace {

namespace fs = std::filesystem;
using Tokens = std::vector<int>;

constexpr Split all_splits[] = {Split::NONE, Split::GPT2, Split::CL100K, Split::LLAMA3};

struct Place {
    std::string path;
    Place() {
        path = access("/dev/shm", W_OK) == 0 ? "/dev/shm/keel_tokenizer_XXXXXX" : "/tmp/keel_tokenizer_XXXXXX";
        REQUIRE(mkdtemp(path.data()));
    }
    ~Place() { fs::remove_all(path); }
    std::string operator/(const std::string& name) const { return path + "/" + name; }
    // A file with the content, and its path.
    std::string file(const std::string& name, const std::string& content) const {
        spill(*this / name, content);
        return *this / name;
    }
};

// What the error of a call says; "" without one.
template <class Call>
std::string error_of(const Call& call) {
    try {
        call();
    } catch (const Error& e) {
        return e.what();
    }
    return "";
}

std::vector<std::string> pieces(Split split, std::string_view text) {
    std::vector<std::string> all;
    for (size_t at = 0, end; at < text.size(); at = end) {
        end = piece_end(split, text, at);
        all.emplace_back(text.substr(at, end - at));
    }
    return all;
}

// The bytes of a tokenizer's file.
std::string tokenizer_file(const std::vector<std::string>& entries, Split split, int specials) {
    FileHeader h;
    memcpy(&h.word[0], "KEEL", 4);
    h.word[1] = 1, h.word[2] = 4, h.word[5] = int(entries.size()), h.word[7] = int(split), h.word[8] = specials;
    std::string file(reinterpret_cast<const char*>(&h), sizeof h);
    for (const std::string& entry : entries) file += {char(entry.size()), char(entry.size() >> 8)}, file += entry;
    uint32_t crc = crc32(file.data(), file.size());
    return file.append(reinterpret_cast<const char*>(&crc), 4);
}

Tokenizer read_bytes(const std::string& file) {
    Place place;
    return Tokenizer::read(place.file("tokenizer.bin", file));
}

std::vector<std::string> single_bytes() {
    std::vector<std::string> bytes;
    for (int b = 0; b < 256; b++) bytes.emplace_back(1, char(b));
    return bytes;
}

// What the tokenizers here are learnt from: this repository's README and some lines in other scripts.
std::string training_text() {
    return slurp("README.md") + slurp("keel/tokenizer.h") +
           "Ein Zeichen, zwei Zeichen: größer als 12 345 Stück, für 99,50 €.\n"
           "Les élèves n'ont pas reçu l'œuvre. ¿Dónde está? ¡Aquí!\n"
           "Быстрая коричневая лиса перепрыгивает через ленивую собаку.\n"
           "Η γρήγορη αλεπού πηδάει πάνω από τον τεμπέλη σκύλο.\n"
           "快速的棕色狐狸跳过了懒狗。　日本語の文章は、空白なしで書かれる。\n"
           "다람쥐 헌 쳇바퀴에 타고파. الثعلب البني السريع ١٢٣ يقفز.\n"
           "नमस्ते दुनिया, ५६७ बार। สวัสดีชาวโลก 😀😀 "
           "👩‍🚀 "
           "e\u0301e\u0301\r\n\r\n";
}

// The ranks that a text teaches: again and again its most frequent pair of neighbours becomes a token.
std::vector<std::string> learn(Split split, const std::string& text, int merges) {
    std::map<std::string, int> count_of;
    for (const std::string& piece : pieces(split, text)) count_of[piece]++;
    std::vector<std::pair<std::vector<int>, int>> words;  // as tokens; how often
    for (const auto& [piece, count] : count_of) {
        words.push_back({{}, count});
        for (unsigned char c : piece) words.back().first.push_back(c);
    }
    std::vector<std::string> ranks = single_bytes();
    while (merges-- > 0) {
        std::map<std::pair<int, int>, int> frequency;
        for (const auto& [word, count] : words)
            for (size_t i = 0; i + 1 < word.size(); i++) frequency[{word[i], word[i + 1]}] += count;
        auto best = std::max_element(frequency.begin(), frequency.end(),
                                     [](const auto& a, const auto& b) { return a.second < b.second; });
        if (best == frequency.end()) break;
        auto [left, right] = best->first;
        std::string joined = ranks[size_t(left)] + ranks[size_t(right)];
        int id = int(ranks.size());
        for (auto& [word, count] : words)
            for (size_t i = 0; i + 1 < word.size(); i++)
                if (word[i] == left && word[i + 1] == right) word[i] = id, word.erase(word.begin() + ptrdiff_t(i) + 1);
        if (std::find(ranks.begin(), ranks.end(), joined) == ranks.end()) ranks.push_back(joined);
    }
    return ranks;
}

// A tokenizer of these ranks and four special tokens, one without a name, and the slow encoder.
struct SlowTokenizer {
    Tokenizer tokenizer;
    std::map<std::string, int> rank_of;

    SlowTokenizer(Split split, std::vector<std::string> entries) {
        for (size_t i = 0; i < entries.size(); i++) rank_of[entries[i]] = int(i);
        for (const char* name : {"", "<|endoftext|>", "<|end", "<|end|>"}) entries.push_back(name);
        tokenizer = read_bytes(tokenizer_file(entries, split, 4));
    }

    // encode by its definition, in the square of a piece's length
    Tokens slowly(std::string_view text) const {
        Tokens tokens;
        auto rank = [&](const std::string& bytes) {
            auto found = rank_of.find(bytes);
            return found == rank_of.end() ? INT_MAX : found->second;
        };
        for (const std::string& piece : pieces(tokenizer.split(), text)) {
            std::vector<std::string> parts;
            if (rank(piece) < INT_MAX) parts = {piece};
            else
                for (char c : piece) parts.emplace_back(1, c);
            while (parts.size() > 1) {
                size_t best = 0;
                for (size_t i = 1; i + 1 < parts.size(); i++)
                    if (rank(parts[i] + parts[i + 1]) < rank(parts[best] + parts[best + 1])) best = i;
                if (rank(parts[best] + parts[best + 1]) == INT_MAX) break;
                parts[best] += parts[best + 1];
                parts.erase(parts.begin() + ptrdiff_t(best) + 1);
            }
            for (const std::string& part : parts) tokens.push_back(rank(part));
        }
        return tokens;
    }
    Tokens encode(std::string_view text) const {
        Tokens tokens;
        tokenizer.encode(text, tokens);
        return tokens;
    }
};

// For each split one of 400 learnt merges and of whole pieces, which merges seldom reach; one of the same ranks in any
// order, as no text teaches them.
const std::vector<SlowTokenizer>& tokenizers() {
    static const std::vector<SlowTokenizer> all = [] {
        std::vector<SlowTokenizer> made;
        for (Split split : all_splits) {
            std::vector<std::string> ranks = single_bytes(), whole = pieces(split, training_text());
            if (split != Split::NONE) {
                ranks = learn(split, training_text(), 400);
                for (size_t i = 0; i < whole.size(); i += 97)
                    if (std::find(ranks.begin(), ranks.end(), whole[i]) == ranks.end()) ranks.push_back(whole[i]);
            }
            made.emplace_back(split, ranks);
            std::shuffle(ranks.begin(), ranks.end(), std::mt19937(7));
            made.emplace_back(split, ranks);
        }
        return made;
    }();
    return all;
}

const SlowTokenizer& cl100k() { return tokenizers()[4]; }

std::string named(const SlowTokenizer& v, std::string_view text) {
    std::string shown = std::string(split_names[int(v.tokenizer.split())]) + " split, bytes";
    for (unsigned char c : text) shown += format(" %02x", c);
    return shown;
}

// Text of what splits and UTF-8 are decided by: words and white space of many kinds, digits, contractions, and bytes
// that are no UTF-8.
std::string random_text(std::mt19937& random, size_t parts, bool utf8 = false) {
    static const std::string learnt = training_text();
    static const char* const chosen[] = {
        " ", " ", "  ", "\n", "\n", "\r\n", "\r", "\t", "\v", "\u00A0", "\u0085", "\u2028", "\u3000", "'s", "'T", "'Ll",
        "'vE", "'re", "'", "\u017F", "\u212A", "a", "B", "der", "é", "ß", "Я", "語", "語文", "0", "12", "345", "½", "٣",
        "Ⅷ", ".", "!", "--", "(", "😀", "\u0301", "\u200D", "\uFEFF", "\U0010FFFF", "<|endoftext|>",
        // cut characters, lone continuation bytes, surrogates, overlong forms, above U+10FFFF
        "\xE3\x80", "\x80", "\xC2", "\xFF", "\xED\xA0\x80", "\xC0\xA0", "\xE0\x80\xA0", "\xF4\x90\x80\x80"};
    constexpr size_t valid = std::size(chosen) - 8;
    std::string text;
    while (parts-- > 0) {
        uint32_t r = random();
        if (r % 16 == 0) {  // a part of what was learnt, between two spaces
            size_t from = learnt.find(' ', random() % learnt.size());
            if (from != learnt.npos) text += learnt.substr(from, learnt.find(' ', from + 1 + random() % 9) - from);
        } else if (r % 16 == 1 && !utf8) text += char(random());
        else text += chosen[(r >> 8) % (utf8 ? valid : std::size(chosen))];
    }
    return text;
}

}  // namespace

// ----------------------------------------------------------------------------------------------------
TEST_CASE("Splits: the pieces of chosen texts are those of GPT-2, cl100k and Llama 3, which differ in some") {
    // The pieces, between bars. "" in the last two columns: as in the column before.
    struct Row { const char *gpt2, *cl100k, *llama3; };
    const Row rows[] = {
        {"Hello| world|!", "", ""},
        {"don|'t| DON|'|T| we|'ll|'ve|'re|'d|'m|'s", "don|'t| DON|'T| we|'ll|'ve|'re|'d|'m|'s", ""},
        {"'|LLa|'|Vea|'|rEa|'s|a|'|Ta", "'LL|a|'Ve|a|'rE|a|'s|a|'T|a", ""},
        {"'|\u017Fa|'|\u212Aa", "'\u017F|a|'\u212Aa", ""},  // the long s is an s, the Kelvin sign no contraction
        {"''|s| '|s", "''|s| '|s", ""},
        {"12345| 6789|a|1", "123|45| |678|9|a|1", ""},
        {"½²٣٤|x|Ⅷ", "½²٣|٤|x|Ⅷ", ""},
        {"(|word|)(|other|)", "(word|)(|other|)", ""},
        {"\t|tab| |\t|tab", "\ttab| |\ttab", ""},
        {"a| | b|   | c", "", ""},
        {"größer| Я| 語文| ё", "", ""},
        {"e|\u0301|x", "e|\u0301x", ""},
        {"a|\u00A0|\u00A0|b|\u3000|c", "a|\u00A0|\u00A0b|\u3000c", ""},
        {"😀😀!| 😀|a", "😀😀!| 😀|a", ""},
        {"x|!|\r\n|\n|y", "x|!\r\n\n|y", ""},
        {"x|\n|\n|y", "x|\n\n|y", ""},
        {"x| \n\n | y", "x| \n\n| | y", ""},
        {"x|\n   | y", "x|\n|   | y", ""},
        {"x|   ", "x|   ", "x|   "},
        {"x| \n  ", "x| \n  ", "x| \n|  "},  // white space at the text's end
        {"x|\u2028\r\t", "x|\u2028\r\t", "x|\u2028\r|\t"},
        {"x|\n\n", "x|\n\n", ""},
        {"a|\xFF|b| \xE3\x80|c",
         "a|\xFF"
         "b| \xE3\x80|c",
         ""},  // bytes that are no character are like a symbol
        {"x|\xC2\x85|\xC2", "", ""},
    };
    for (const Row& row : rows) {
        const char* columns[] = {row.gpt2, *row.cl100k ? row.cl100k : row.gpt2, row.llama3};
        if (!*columns[2]) columns[2] = columns[1];
        for (int i = 0; i < 3; i++) {
            std::string expected = columns[i], text = expected, found;
            std::erase(text, '|');
            for (const std::string& piece : pieces(all_splits[i + 1], text))
                found += (found.empty() ? "" : "|") + piece;
            CHECK_MESSAGE(found == expected, std::string(split_names[i + 1]));
        }
    }
    CHECK(pieces(Split::NONE, "é 1").size() == 4);
}

TEST_CASE("Encoding merges the pair of lowest rank, the leftmost first, and takes a piece that is a token whole") {
    std::mt19937 random(1);
    int count = lean(1500, 20000);
    for (const SlowTokenizer& v : tokenizers())
        for (int i = 0; i < count; i++) {
            std::string text = random_text(random, 1 + random() % 24);
            Tokens expected = v.slowly(text), found = v.encode(text);
            REQUIRE_MESSAGE(found == expected, named(v, text));
            REQUIRE_MESSAGE(v.tokenizer.decode(found) == text, named(v, text));
        }
    std::string text = training_text();
    for (const SlowTokenizer& v : tokenizers()) {
        Tokens found = v.encode(text);
        CHECK(found == v.slowly(text));
        if (v.tokenizer.split() != Split::NONE) CHECK(found.size() < text.size() * 3 / 5);
    }
}

TEST_CASE("Bytes that are not UTF-8 come back as they were") {
    std::mt19937 random(2);
    for (const SlowTokenizer& v : tokenizers())
        for (int i = 0; i < lean(300, 5000); i++) {
            std::string bytes(random() % 64, '\0');
            for (char& c : bytes) c = char(random() >> (i % 3) * 8);
            REQUIRE_MESSAGE(v.tokenizer.decode(v.encode(bytes)) == bytes, named(v, bytes));
        }
    CHECK(tokenizers()[0].encode("").empty());
}

TEST_CASE("A text may be cut where last_boundary says: the tokens of both parts are those of the whole") {
    std::mt19937 random(3);
    size_t cuts = 0, last = 0;
    for (const SlowTokenizer& v : tokenizers())
        for (int i = 0; i < lean(2000, 30000); i++) {
            std::string text = random_text(random, 1 + random() % 40);
            size_t cut = last_boundary(text);
            if (cut == 0) continue;
            cuts++;
            REQUIRE(cut < text.size());
            REQUIRE((text[cut - 1] == '\n' || text[cut] == ' '));
            Tokens both = v.encode(std::string_view(text).substr(0, cut));
            v.tokenizer.encode(std::string_view(text).substr(cut), both);
            REQUIRE_MESSAGE(both == v.encode(text), named(v, text));
        }
    CHECK(cuts > 1000);
    // Where it may not cut: beside white space of any kind, at the text's ends, before or behind a part of a character.
    for (const char* text :
         {"",          "\n",         "a\n",         "\nb",          "a\n b",  "a\tb",       "a\n\nb",
          " a",        "\t a",       "\u3000 a",    "\xE3\x80 a",   "a\r\nb", "a\n\u3000b", "a\u3000\nb",
          "a\n\u0085", "a\u2028\nb", "a\n\xE3\x80", "a\xE3\x80\nb", "ab",     "a\n\xFF"})
        CHECK_MESSAGE(last_boundary(text) == 0, text);
    for (const char* text : {"a\nb", "語\n語", "😀\n😀", "x\ny\n\nz", "語 \n", "a b", "x\na\n\u3000"})
        CHECK_MESSAGE((last = last_boundary(text)) > 0, text);
    CHECK(last == 2);
}

TEST_CASE("Several threads find the tokens that one finds, wherever line ends and wide spaces fall") {
    std::mt19937 random(4);
    const size_t bytes = size_t(lean(2.2, 4.0) * (1 << 20));
    std::vector<std::string> texts(5);
    std::string some = random_text(random, 4000);
    for (size_t i = 0; texts[0].size() < bytes; i++) texts[0] += some.substr(random() % some.size(), 200);
    for (size_t i = 0; texts[1].size() < bytes; i++)  // lines that begin or end in spaces
        texts[1] += i % 2 ? "\u3000語 word\n" : i % 3 ? "a b\u3000\n" : "b, \u00A0\n\n";
    for (size_t i = 0; texts[2].size() < bytes; i++) texts[2] += format("line%zu_of_it,", i);  // no place to cut
    for (size_t i = 0; texts[3].size() < bytes; i++) texts[3] += format("line %zu of it.\r\n", i);
    for (size_t i = 0; texts[4].size() < bytes; i++)  // places to cut that are rarer than the pieces threads take
        texts[4] += format("%zu %s", i, i % 100000 ? "\n " : "\n");
    for (const SlowTokenizer& v : tokenizers()) {
        if (!long_tests() && &v != &cl100k()) continue;
        if (&v - tokenizers().data() == 2 * int(v.tokenizer.split()) + 1)
            continue;  // the order of ranks changes no cut
        for (const std::string& text : texts) {
            Tokens expected = v.encode(text);
            for (int threads : long_tests() ? Tokens{1, 2, 3, 8} : Tokens{3}) {
                Tokens found = {-5};
                v.tokenizer.encode_parallel(text, threads, found);
                CHECK(found[0] == -5);
                found.erase(found.begin());
                CHECK_MESSAGE(found == expected, split_names[int(v.tokenizer.split())]
                                                     << ", text " << &text - texts.data() << ", " << threads
                                                     << " threads");
            }
        }
    }
}

TEST_CASE("A piece of a megabyte takes no quadratic time, which would be hours") {
    std::mt19937 random(5);
    std::string one(1 << 20, 'e'), letters = one, spaces(1 << 20, ' '), breaks(1 << 20, '\n');
    for (char& c : letters) c = "etaoin"[random() % 6];
    for (const SlowTokenizer& v : tokenizers())
        if (long_tests() || &v == &cl100k())
            for (const std::string& text : {one, letters, spaces + "x", "x" + breaks + "x"})
                CHECK(v.tokenizer.decode(v.encode(text)) == text);
}

TEST_CASE("In a prompt a special token's name is that token, the longest that fits; in a text it is text") {
    const SlowTokenizer& v = cl100k();
    const Tokenizer& t = v.tokenizer;
    int end_of_text = t.mergeable() + 1, end = t.mergeable() + 2, end_bar = t.mergeable() + 3;
    REQUIRE(t.token(end) == "<|end");
    auto prompt = [&](std::string_view text) {
        Tokens tokens;
        t.encode_with_specials(text, tokens);
        return tokens;
    };
    auto with = [&](const char* before, int id, const char* after) {
        Tokens tokens = v.encode(before);
        tokens.push_back(id);
        t.encode(after, tokens);
        return tokens;
    };
    CHECK(prompt("one<|endoftext|> two") == with("one", end_of_text, " two"));
    CHECK(prompt("<|end|>") == Tokens{end_bar});
    CHECK(prompt("<|endo") == with("", end, "o"));
    CHECK(prompt("<|endoftext|><|end|><|end<|en") == [&] {
        Tokens a = {end_of_text, end_bar, end};
        t.encode("<|en", a);
        return a;
    }());
    CHECK(prompt("no name, \u3000 of one ") == v.encode("no name, \u3000 of one "));
    CHECK(prompt("").empty());
    for (int id : v.encode("one<|endoftext|> two")) CHECK(!t.is_special(id));
    CHECK(t.decode(prompt("one<|endoftext|> two")) == "one<|endoftext|> two");
    CHECK(t.separator() == end_of_text);  // the first that has a name
    CHECK(t.text_bytes(end) == 0);
    CHECK(t.text_bytes(v.encode("e")[0]) == 1);
    CHECK(Tokenizer().separator() == -1);
    CHECK(Tokenizer().V() == 256);
}

TEST_CASE("A stream shows a character when it is whole, U+FFFD where none can come, control characters as symbols") {
    struct Row { std::string bytes, shown; };
    const std::string bad = "\uFFFD";
    const Row rows[] = {
        {"plain\r\n\ttext", "plain\r\n\ttext"},
        {"é語😀\u0301\U0010FFFF", "é語😀\u0301\U0010FFFF"},
        {std::string("\0\x07\x1B[2J\x1F", 7), "\u2400\u2407\u241B[2J\u241F"},
        {"over\rwritten\r\r\n\r", "over\u240Dwritten\u240D\r\n\u240D"},  // a CR that ends no line
        {"\x7F", "\u2421"},
        {"\u0085\u009B"
         "1m\u00A0",
         bad + bad + "1m\u00A0"},  // C1, which moves a cursor as ESC [ does
        // The Unicode Standard 16.0, table 3-8 to 3-11: one U+FFFD for each maximal subpart
        {"\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41", bad + bad + bad + bad + bad + bad + bad + bad + "A"},
        {"\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41", bad + bad + bad + bad + bad + bad + bad + bad + "A"},
        {"\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42", bad + bad + bad + bad + bad + "A" + bad + bad + "B"},
        {"\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41", bad + bad + bad + bad + "A"},
        {"a\xE3\x80", "a" + bad},  // cut off by the end
        {"a\xF0\x9F\x98", "a" + bad},
    };
    for (const Row& row : rows) {
        TextStream whole, single;
        std::string shown = whole.add(row.bytes);
        CHECK(shown + whole.finish() == row.shown);
        shown.clear();
        for (char c : row.bytes) shown += single.add(std::string_view(&c, 1));
        CHECK(shown + single.finish() == row.shown);
    }
    TextStream stream;
    CHECK(stream.add("\xF0") == "");
    CHECK(stream.add("\x9F\x98") == "");
    CHECK(stream.add("\x80 ") == "😀 ");
    CHECK(stream.add("\xE3\x80") == "");
    CHECK(stream.add("a") == bad + "a");
    CHECK(stream.add("\xE3") == "");
    CHECK(stream.finish() == bad);
    CHECK(stream.finish() == "");
}

TEST_CASE("Text is called no UTF-8 where a byte is none, not where its end or that of the first MiB cuts a character") {
    std::string chinese;
    for (int i = 0; i < 400000; i++) chinese += "\u4E00";  // 1.2 MB, whose first MiB ends within one
    CHECK(find_no_utf8(chinese) == chinese.npos);
    CHECK(find_no_utf8("ab\xE4\xB8") == chinese.npos);
    CHECK(find_no_utf8("ab\xE4\xB8 c") == 2);
}

// ----------------------------------------------------------------------------------------------------
TEST_CASE("A tokenizer's file is read back as the same bytes, and its CRC-32 is its last word") {
    Place place;
    for (const SlowTokenizer& v : tokenizers()) {
        std::string path = place.file("tokenizer.bin", v.tokenizer.file());
        Tokenizer t = Tokenizer::read(path);
        CHECK(t.file() == slurp(path));
        uint32_t crc;
        memcpy(&crc, &slurp(path)[slurp(path).size() - 4], 4);
        CHECK(t.crc == crc);
        CHECK(t.path == path);
        CHECK(t.V() == int(v.rank_of.size()) + 4);
        CHECK(t.V() - t.mergeable() == 4);
        CHECK(t.split() == v.tokenizer.split());
    }
    std::vector<std::string> entries = single_bytes();
    entries.push_back(std::string(65535, 'x'));  // as long as a token can be
    std::string file = tokenizer_file(entries, Split::GPT2, 0);
    Tokenizer t = read_bytes(file);
    CHECK(t.file() == file);
    CHECK(t.token(256).size() == 65535);
}

TEST_CASE("A tokenizer's file with any byte changed, cut at any length or with more bytes is an error with its path") {
    Place place;
    std::vector<std::string> entries = single_bytes();
    for (const char* more : {"th", " the", "<|endoftext|>", ""}) entries.push_back(more);
    const std::string good = tokenizer_file(entries, Split::CL100K, 2);
    std::string path = place.file("tokenizer.bin", good);
    CHECK(error_of([&] { Tokenizer::read(path); }) == "");
    auto refused = [&](const std::string& what, const std::string& bytes) {
        spill(path, bytes);
        std::string error = error_of([&] { Tokenizer::read(path); });
        CHECK_MESSAGE(error.find(path) != error.npos, what << ": " << error);
        CHECK_MESSAGE(error.find('\n') == error.npos, error);
    };
    for (size_t at = 0; at < good.size(); at++)
        for (int flip : long_tests() ? Tokens{1, 2, 4, 8, 16, 32, 64, 128, 255} : Tokens{1 << at % 8}) {
            std::string bad = good;
            bad[at] = char(bad[at] ^ flip);
            refused(format("byte %zu, flipped by %d", at, flip), bad);
        }
    for (size_t size = 0; size < good.size(); size++) refused(format("%zu bytes", size), good.substr(0, size));
    refused("a byte more", good + "x");
    refused("four zeros more", good + std::string(4, '\0'));
}

TEST_CASE("What is not a tokenizer's file is refused by its path, whatever it is") {
    Place place;
    std::string model = slurp("test/dumps/adamw.bin");
    for (const auto& entry : fs::directory_iterator("test/dumps"))
        if (entry.path().extension() == ".bin") model = slurp(entry.path());
    REQUIRE(model.starts_with("KEEL"));
    std::string ranks;
    for (int i = 0; i < 400; i++) ranks += format("IQ== %d\n", i);
    const std::pair<const char*, std::string> foreign[] = {
        {"a debug state", model},
        {"ranks.tiktoken", ranks},
        {"tokenizer.json", "{\"version\": \"1.0\", \"model\": {\"type\": \"BPE\"}}" + std::string(2000, ' ')},
        {"empty", ""},
        {"zeros", std::string(5000, '\0')},
    };
    for (const auto& [name, content] : foreign) {
        std::string path = place.file(name, content), error = error_of([&] { Tokenizer::read(path); });
        CHECK_MESSAGE(error.starts_with(path + ": expected "), error);
    }
    for (const std::string& path : {place.path, place / "none"}) {
        std::string error = error_of([&] { Tokenizer::read(path); });
        CHECK_MESSAGE(error.starts_with(path + ": "), error);
    }
}

TEST_CASE("A vocabulary that no encoder can use is refused with what is wrong in it, though its CRC-32 is right") {
    struct Row {
        const char* says;
        std::function<void(std::vector<std::string>&, Split&, int&)> change;
    };
    using Entries = std::vector<std::string>;
    const Row rows[] = {
        {"", [](Entries&, Split&, int&) {}},
        {"V must be from 256", [](Entries& e, Split&, int&) { e.resize(255); }},
        {"V must be from 256", [](Entries& e, Split&, int&) { e.clear(); }},
        {"no token is the byte 65", [](Entries& e, Split&, int&) { e['A'] = "AA"; }},
        {"tokens 97 and 256 are the same", [](Entries& e, Split&, int&) { e[256] = "a"; }},
        {"token 256 is empty", [](Entries& e, Split&, int&) { e[256] = ""; }},
        {"token 3 is empty", [](Entries& e, Split&, int&) { e[3] = ""; }},
        {"token 258 has the name", [](Entries& e, Split&, int&) { e[258] = e[257]; }},
        {"", [](Entries& e, Split&, int&) { e[257] = e[258] = ""; }},  // ids that nothing has
        {"", [](Entries& e, Split&, int&) { e[258] = "th"; }},         // a name may be a token's
        {"0 to 3 special tokens and has 4", [](Entries&, Split&, int& s) { s = 4; }},
        {"special tokens and has -1", [](Entries&, Split&, int& s) { s = -1; }},
        {"special tokens and has 2147483647", [](Entries&, Split&, int& s) { s = INT_MAX; }},
        {"its split must be from 0 to 3 and is 4", [](Entries&, Split& split, int&) { split = Split(4); }},
        {"without a split it must have 256 mergeable tokens",
         [](Entries&, Split& split, int&) { split = Split::NONE; }},
        {"its split must be from 0 to 3 and is -1", [](Entries&, Split& split, int&) { split = Split(-1); }},
    };
    for (const Row& row : rows) {
        std::vector<std::string> entries = single_bytes();
        for (const char* more : {"th", "<|endoftext|>", "<|end|>"}) entries.push_back(more);
        Split split = Split::GPT2;
        int specials = 2;
        row.change(entries, split, specials);
        std::string error = error_of([&] { read_bytes(tokenizer_file(entries, split, specials)); });
        CHECK_MESSAGE((*row.says ? error.find(row.says) != error.npos : error.empty()),
                      "expected '" << row.says << "', found '" << error << "'");
    }
    // Lengths that do not fill the file, and a V that they do not come to.
    std::string file = tokenizer_file(single_bytes(), Split::GPT2, 0);
    auto mended = [&](size_t at, int value, int bytes) {
        std::string changed = file.substr(0, file.size() - 4);
        memcpy(&changed[at], &value, size_t(bytes));
        uint32_t crc = crc32(changed.data(), changed.size());
        return error_of([&] { read_bytes(changed.append(reinterpret_cast<char*>(&crc), 4)); });
    };
    CHECK(mended(1024, 60000, 2).find("it ends within token 0 of 256") != std::string::npos);
    CHECK(mended(file.size() - 4 - 3, 2, 2).find("it ends within token 255 of 256") != std::string::npos);
    CHECK(mended(4 * H_V, 257, 4).find("it ends within token 256 of 257") != std::string::npos);
    CHECK(mended(4 * H_V, (1 << 24) + 1, 4).find("V must be from 256 to 16777216") != std::string::npos);
}

// ----------------------------------------------------------------------------------------------------
TEST_CASE("Text files are documents: in the order given, each behind the separator, and read block by block") {
    Place place;
    std::mt19937 random(6);
    std::vector<std::string> names, texts = {training_text(), "\u3000 x\n", random_text(random, 500), " \n"};
    if (long_tests())  // more than a block of 2^26 bytes: one text without a place to cut, one with many
        for (char end : {' ', '\n'}) {
            std::string& text = texts.emplace_back();
            while (text.size() < (size_t(1) << 26) + (1 << 20)) {
                std::string part = training_text().substr(0, 4000 + random() % 4000);
                std::replace(part.begin(), part.end(), '\n', end);
                text += part;
            }
        }
    for (const std::string& text : texts) names.push_back(place.file(format("%zu.txt", names.size()), text));
    for (const SlowTokenizer& v : tokenizers()) {
        if (long_tests() && &v != &cl100k()) continue;
        TokenSource source(names, "-i");
        CHECK(!source.shards);
        encode_source(source, v.tokenizer, 2);
        Tokens expected;
        for (const std::string& text : texts) {
            expected.push_back(v.tokenizer.separator());
            v.tokenizer.encode(text, expected);
        }
        REQUIRE(source.count == expected.size());
        CHECK(*source.encoded == expected);
        Tokens read(source.count - 3);
        source.read(3, read.size(), v.tokenizer.V(), read.data());
        CHECK(std::equal(read.begin(), read.end(), expected.begin() + 3));
    }
    Tokenizer plain = read_bytes(tokenizer_file(single_bytes(), Split::GPT2, 0));  // no special token: nothing between
    TokenSource two({names[1], names[3]}, "-i");
    encode_source(two, plain, 1);
    CHECK(plain.decode(*two.encoded) == texts[1] + texts[3]);
    TokenSource glob({place / "[13].txt"}, "-i");
    encode_source(glob, plain, 1);
    CHECK(*glob.encoded == *two.encoded);
}

TEST_CASE("What is neither text nor a shard is named with the command that makes text or a shard of it") {
    Place place;
    for (const ForeignFormat& f : foreign_formats)
        for (const char* name : {"data.txt", "data.bin", "data"}) {
            std::string path = place.file(name, std::string(f.at, '.') + std::string(f.start) + "...");
            std::string error = error_of([&] { TokenSource({path}, "-i"); }), command = f.command;
            command.replace(command.find("FILE"), 4, path);
            CHECK_MESSAGE(error ==
                              format("%s: expected text or a .bin shard, found %s; use: %s", path, f.name, command),
                          error);
        }
    const std::tuple<const char*, std::string, const char*> rows[] = {
        {"a.txt", std::string("\x1F\x8B\x08\0", 4), "use: gzip -dc "},
        {"b.txt",
         std::string("\xFF\xFE"
                     "a\0",
                     4),
         "use: iconv -f UTF-16 -t UTF-8 "},
        {"c.txt", std::string("\xFF\xFE\0\0a\0\0\0", 8), "use: iconv -f UTF-32 -t UTF-8 "},
        {"d.txt", std::string("a\0b\0", 4), "found a zero byte at 1, as in UTF-16; use: iconv -f UTF-16LE"},
        {"e.bin", "\x01\x02\x03\x04\x05\x06\x07\x08", "use: python3 data/shards.py convert -o DIR "},
        {"f.bin", "x", "expected a token shard (magic 20240520, version 1), found 120, 0"},
        {"g.parquet", "PAR1\x15", "use: python3 data/tokenizer.py encode -t TOKENIZER -o DIR "},
        {"h.JSONL", "{}", "found JSON lines; use: python3 data/tokenizer.py encode -t TOKENIZER -o DIR "},
        {"i.txt", std::string("\0a\0b", 4), "found a zero byte at 0, as in UTF-16; use: iconv -f UTF-16BE"},
        {"it's [1].txt", "\x1F\x8B", "it'\\''s [1].txt' > text.txt"},
    };
    for (const auto& [name, content, says] : rows) {
        std::string path = place.file(name, content), error = error_of([&] { TokenSource({path}, "-i"); });
        CHECK_MESSAGE((error.starts_with(path + ": ") && error.find(says) != error.npos), error);
    }
    // Text in any encoding that leaves ASCII as it is; a byte order mark of UTF-8 is text.
    for (const char* text : {"\xE9t\xE9", "\xEF\xBB\xBFtext", "B", "KEEL, a trainer", "PAR1 is", "%PD", "P"})
        CHECK(TokenSource({place.file("h.txt", text)}, "-i").count == strlen(text));
}

TEST_CASE("Shards of 16-bit and of 32-bit tokens are read alike; one that lies about its length is refused") {
    Place place;
    for (const ShardFormat& f : shard_formats) {
        Tokens tokens = {0, 1, 255, 256, f.V - 1};
        int32_t header[256] = {f.magic, f.version, int32_t(tokens.size())};
        std::string shard(reinterpret_cast<const char*>(header), sizeof header);
        for (int token : tokens) shard.append(reinterpret_cast<const char*>(&token), size_t(f.token_bytes));
        std::string path = place.file("a.bin", shard);
        TokenSource source({path, path}, "-i");
        CHECK(source.shards == &f);
        REQUIRE(source.count == 2 * tokens.size());
        Tokens read(source.count), expected = tokens;
        expected.insert(expected.end(), tokens.begin(), tokens.end());
        source.read(0, read.size(), f.V, read.data());
        CHECK(read == expected);
        std::string error = error_of([&] { source.read(0, read.size(), f.V - 1, read.data()); });
        CHECK_MESSAGE(error.starts_with(format("%s: expected tokens below the model's V = %d, found %d at token 4",
                                               path, f.V - 1, f.V - 1)),
                      error);
        error = error_of([&] { TokenSource({place.file("b.txt", shard)}, "-i"); });
        CHECK_MESSAGE(error.ends_with(format("use: mv %s %s.bin", place / "b.txt", place / "b.txt")), error);
        error = error_of([&] { TokenSource({place.file("c.bin", shard + "x")}, "-i"); });
        CHECK_MESSAGE(error.find("expected 5 tokens from its header, found 5") != error.npos, error);
        error = error_of([&] { TokenSource({path, place.file("d.txt", "text")}, "-i"); });
        CHECK_MESSAGE(error.find("expected a shard of") != error.npos, error);
    }
}
