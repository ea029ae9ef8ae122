// keel/formats.h: what a file is, by its name and its first bytes, and what a glob matches.
#pragma once

#include <glob.h>

#include "../keel_common.h"

// A path as a shell expands it: my\ texts/{a,b}*.txt
inline std::string expandable(const std::string& path) {
    std::string text;
    for (char c : path) {
        if (strchr(" \t'\"\\`()<>|&;!#", c)) text += '\\';
        text += c;
    }
    return text;
}

// Fails where a path that is not there has what a shell expands outside quotes: ~, $NAME, {a,b}. ./PATH is taken as it
// is. several: of a flag that takes a glob.
inline void refuse_unexpanded(const std::string& flag, const std::string& path, bool several) {
    if (path.starts_with("./") || access(path.c_str(), F_OK) == 0) return;
    const char* left = "the shell has not expanded";
    size_t slash = std::min(path.find('/'), path.size()), dollar = path.find('$'), open = path.find('{'),
           close = path.find('}', open);
    if (path == "~" || (path[0] == '~' && slash < path.size()))
        fail("%s: expected a path, found '%s', whose ~ %s, in quotes or behind =; use: %s %s, or ./%s for that very "
             "name",
             flag, path, left, flag, path.substr(0, slash + 1) + quoted(path.substr(std::min(slash + 1, path.size()))),
             path);
    if (dollar < path.size() &&
        (isalpha((unsigned char)path[dollar + 1]) || path.find_first_of("_{(", dollar + 1) == dollar + 1))
        fail("%s: expected a path, found '%s', whose $ %s, in quotes; use: %s \"%s\", or ./PATH for that very name",
             flag, path, left, flag, path);
    std::string list = close < path.size() ? path.substr(open, close - open) : "";
    if (list.find(',') == list.npos && list.find("..") == list.npos) return;
    fail("%s: expected a path%s, found '%s', whose {} %s, in quotes; %s", flag, several ? " or a glob of * ? []" : "",
         path, left,
         several ? format("use: mkdir DIR && ln -sr %s DIR, and %s 'DIR/*'", expandable(path), flag)
                 : "give one path, or ./PATH for that very name");
}

// The paths on the command line.
inline void refuse_unexpanded_paths(const Options& o) {
    for (const Flag& f : flags)
        if (auto* path = std::get_if<std::string Options::*>(&f.member); path && f.is_path() && o.has(f.long_name))
            refuse_unexpanded(*f.short_name ? f.short_name : f.long_name, o.*(*path), false);
}

// llm.c's two kinds of shards. V and the token before each document, where no tokenizer says them: GPT-2's, Llama 3's.
struct ShardFormat { int magic, version, token_bytes, V, separator; };
inline constexpr ShardFormat shard_formats[] = {{20240520, 1, 2, 50257, 50256}, {20240801, 7, 4, 128256, 128000}};

// The files and folders that a glob matches, in the order of their names' bytes. Leading folders that are there by
// these very names match only themselves, as in 'texts [v2]/*.txt'.
inline std::vector<std::string> glob_matches(const std::string& pattern) {
    size_t literal = 0;  // bytes of these folders
    for (size_t slash = pattern.find('/'); slash != pattern.npos; slash = pattern.find('/', slash + 1)) {
        if (access(pattern.substr(0, slash + 1).c_str(), F_OK) != 0) break;
        literal = slash;
    }
    std::string escaped;
    for (size_t i = 0; i < pattern.size(); i++) {
        if (i < literal && strchr("*?[\\", pattern[i])) escaped += '\\';
        escaped += pattern[i];
    }
    glob_t found{};
    std::vector<std::string> names;
    if (::glob(escaped.c_str(), 0, nullptr, &found) == 0) names.assign(found.gl_pathv, found.gl_pathv + found.gl_pathc);
    globfree(&found);
    return names;
}

// clang-format off
// What people have beside text and shards, by a file's first bytes, and the command that makes of it what is read here;
// data/shards.py has the rows that are text packed or encoded otherwise.
struct ForeignFormat { std::string_view start; const char *name, *command; size_t at = 0; };
inline const ForeignFormat foreign_formats[] = {
    {{"\xFF\xFE\0\0", 4},  "UTF-32",         "iconv -f UTF-32 -t UTF-8 FILE > text.txt"},
    {"\xFF\xFE",           "UTF-16",         "iconv -f UTF-16 -t UTF-8 FILE > text.txt"},
    {"\xFE\xFF",           "UTF-16",         "iconv -f UTF-16 -t UTF-8 FILE > text.txt"},
    {"\x1F\x8B",           "gzip",           "gzip -dc FILE > text.txt"},
    {"BZh91AY&SY",         "bzip2",          "bzip2 -dc FILE > text.txt"},
    {"\xFD""7zXZ",          "xz",             "xz -dc FILE > text.txt"},
    {"\x28\xB5\x2F\xFD",   "Zstandard",      "zstd -dc FILE > text.txt"},
    {"PK\x03\x04",         "zip",            "unzip FILE"},
    {"ustar",              "tar",            "tar -xf FILE", 257},
    {"%PDF-",              "PDF",            "pdftotext FILE"},
    {"PAR1\x15",           "Parquet",        "python3 data/tokenizer.py encode -t TOKENIZER -o DIR FILE"},
    {"\x93NUMPY",          "NumPy's .npy",   "python3 data/shards.py convert -o DIR FILE"},
    {"BIN.TOK\n",          "LLM.Q's tokens", "python3 data/shards.py convert -o DIR FILE"},
    {{"KEEL\1\0\0\0", 8},  "a file of a KEEL trainer", "python3 dev/keel_file.py FILE"},
};
// clang-format on

// The ending of a file's name in lower case, with its dot.
inline std::string ending_of(const std::filesystem::path& path) {
    std::string ending = path.extension();
    for (char& c : ending) c = char(tolower((unsigned char)c));
    return ending;
}

// The iconv name of UTF-16 without a mark at its start, "" for what is none: by the zero byte of its blanks and line
// ends, as Chinese has zero bytes on the other side too, or where it has no blanks by that of its ASCII.
inline std::string unmarked_utf16(std::string_view head) {
    for (bool blanks : {true, false}) {
        size_t big = 0, little = 0;
        auto counts = [=](char c) { return blanks ? c == ' ' || c == '\n' || c == '\r' : c > 0; };
        for (size_t i = 0; i + 1 < head.size(); i += 2)
            big += !head[i] && counts(head[i + 1]), little += !head[i + 1] && counts(head[i]);
        if (std::max(big, little) >= std::max<size_t>(1, head.size() / (blanks ? 1000 : 10)))
            return little > big ? "UTF-16LE" : "UTF-16BE";
    }
    return "";
}

// Fails where a file is not text, by its name and its first bytes. Text may have any encoding that leaves ASCII as it
// is, and no zero byte among these.
inline void refuse_foreign(const std::string& path, std::string_view head) {
    for (const ForeignFormat& f : foreign_formats)
        if (head.substr(std::min(f.at, head.size())).starts_with(f.start)) {
            std::string command = f.command;
            std::string_view inner = "";  // of shards.bin.gz .bin: text.bin is made of it
            for (std::string_view ending : {".bin", ".jsonl", ".parquet", ".tar"})
                if (std::filesystem::path(path).stem().string().ends_with(ending)) inner = ending;
            if (command.find("-dc") != command.npos && !inner.empty()) command.replace(command.rfind(".txt"), 4, inner);
            command.replace(command.find("FILE"), 4, quoted(path));
            fail("%s: expected text or a .bin shard, found %s; use: %s", path, f.name, command);
        }
    int32_t word[2] = {};
    memcpy(word, head.data(), std::min(sizeof word, head.size()));
    std::string ending = ending_of(path);
    if (ending == ".bin")
        fail("%s: expected a token shard (magic %d, version %d), found %d, %d; if it is nanoGPT's, without a header, "
             "use: python3 data/shards.py convert -o DIR %s",
             path, shard_formats[0].magic, shard_formats[0].version, word[0], word[1], quoted(path));
    if (ending == ".jsonl" || ending == ".ndjson")
        fail("%s: expected text or a .bin shard, found JSON lines; use: python3 data/tokenizer.py encode -t TOKENIZER "
             "-o DIR %s",
             path, quoted(path));
    size_t zero = head.find('\0');
    std::string utf16 = unmarked_utf16(head);
    if (zero != head.npos && !utf16.empty())
        fail("%s: expected text, found a zero byte at %zu, as in UTF-16; use: iconv -f %s -t UTF-8 %s > text.txt", path,
             zero, utf16, quoted(path));
    if (zero != head.npos)
        fail("%s: expected text, found a zero byte at %zu; leave it out, or make text of it", path, zero);
}

// Whether a run, or data/tokenizer.py beside its shards, has written the file: a glob over their folder is not for it.
// data/shards.py passes over the same.
inline bool is_own_file(const std::filesystem::path& path, std::string_view head) {
    for (std::string_view start : {"KEEL\1", "step,loss,val_loss,", "step,hops,", "step,sublayer,", "sublayer,kind,"})
        if (head.starts_with(start)) return true;
    std::string name = path.filename();
    return (name == "lock" && head.starts_with("process ")) ||
           (name.ends_with("_progress.json") && head.starts_with("{\n \"settings\""));
}
