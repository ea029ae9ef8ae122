// What the suites of both trainers share: random numbers, errors between arrays, a folder that goes away, the text of
// an Error. Included after doctest and keel_common.h.
#pragma once

#include <fstream>
#include <functional>

// Uniform in [-scale, scale), a function of the seed.
template <class Real>
std::vector<Real> random_numbers(size_t n, uint32_t seed, double scale = 1) {
    std::vector<Real> values(n);
    for (size_t i = 0; i < n; i++)
        values[i] = Real(scale * (2.0 * philox(seed, uint32_t(i), 0, 0, 77).word[0] * 0x1p-32 - 1));
    return values;
}
inline std::vector<int> random_tokens(size_t n, int V, uint32_t seed) {
    std::vector<int> values(n);
    for (size_t i = 0; i < n; i++) values[i] = int(philox(seed, uint32_t(i), 0, 0, 78).word[0] % uint32_t(V));
    return values;
}

// ||expected - found|| / ||expected||
template <class Real>
double relative_error(const std::vector<Real>& expected, const std::vector<Real>& found) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < expected.size(); i++)
        difference += std::pow(double(expected[i]) - double(found[i]), 2), norm += std::pow(double(expected[i]), 2);
    return difference == 0 ? 0 : std::sqrt(difference / norm);
}

struct TemporaryFolder {
    std::string path;
    TemporaryFolder() {
        char name[] = "/tmp/keel_test_XXXXXX";
        REQUIRE(mkdtemp(name));
        path = name;
    }
    ~TemporaryFolder() { std::filesystem::remove_all(path); }
    std::string write(const std::string& name, const std::string& content) const {  // the new file's path
        std::ofstream(path + "/" + name, std::ios::binary) << content;
        return path + "/" + name;
    }
};

inline std::string error_of(const std::function<void()>& action) {
    try {
        action();
    } catch (const Error& e) {
        return e.what();
    }
    return "";
}
