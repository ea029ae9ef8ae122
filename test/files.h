// What tests that read and write a run's files share.
#pragma once

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

inline std::string slurp(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    return std::string((std::istreambuf_iterator<char>(in)), {});
}
inline void spill(const std::string& path, const std::string& content) {
    std::ofstream(path, std::ios::binary) << content;
}

// log.csv without what depends on the clock: step, loss, val_loss, lr, grad_norm
inline std::string log_without_times(const std::string& path) {
    std::stringstream in(slurp(path));
    std::string kept;
    for (std::string line; std::getline(in, line);) {
        size_t at = 0;
        for (int comma = 0; comma < 5 && at != std::string::npos; comma++) at = line.find(',', at + 1);
        kept += line.substr(0, at) + "\n";
    }
    return kept;
}
