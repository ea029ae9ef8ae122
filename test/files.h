// What tests that read and write a run's files share.
#pragma once

#include <unistd.h>

#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

using Words = std::vector<std::string>;  // of a command line

// How a program ended.
struct Result {
    int code;  // exit status; -signal if killed
    std::string out, err;
};

// In a child process: becomes the program of words[0], or `program`, with these words; exit status 127 where it cannot.
[[noreturn]] inline void exec_words(const Words& words, const char* program = nullptr) {
    std::vector<char*> argv;
    for (const std::string& word : words) argv.push_back(const_cast<char*>(word.c_str()));
    argv.push_back(nullptr);
    execvp(program ? program : argv[0], argv.data());
    _exit(127);
}

inline std::string slurp(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    return std::string((std::istreambuf_iterator<char>(in)), {});
}
inline void spill(const std::string& path, const std::string& content) {
    std::ofstream(path, std::ios::binary) << content;
}

// log.csv without what depends on the clock: ms, tokens_per_second and mfu, its columns 5 to 7 from 0
inline std::string log_without_times(const std::string& path) {
    std::stringstream in(slurp(path));
    std::string kept;
    for (std::string line; std::getline(in, line); kept += '\n') {
        int column = 0;
        for (char c : line) {
            column += c == ',';
            if (column < 5 || column > 7) kept += c;
        }
    }
    return kept;
}
