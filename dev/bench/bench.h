// What bench_kernels and bench_products share: their flags, buffers that together pass the L2 cache, comparisons of
// results, rows of a table of results. Included after train_keel.cu.
#pragma once

#include <fstream>
#include <functional>

struct Bench {
    const char* name;        // the program's, for its errors
    bool small = false;      // shapes for a dry run, also on the CPU headers
    size_t cache_bytes = 0;  // what a comparison's buffers together must pass
    int bad = 0;             // results that are not what they should be
    std::string csv_path;

    explicit Bench(const char* name) : name(name) {}

    // Takes argv[i], and its value, where it is one of the flags of every benchmark.
    bool takes_flag(int argc, char** argv, int& i) {
        std::string word = argv[i];
        if (word == "--small") return small = true;
        if (word == "--csv" && i + 1 < argc) return csv_path = argv[++i], true;
        return false;
    }
    // After the flags: is there a machine to measure?
    void begin() {
        Trainer::require_machine();
        cache_bytes = small ? 1 << 16 : size_t(gpu_properties().l2CacheSize);
    }
    size_t sets_for(size_t bytes) const { return std::max<size_t>(1, ceil_div(4 * cache_bytes, bytes)); }

    // Appends a row to --csv's file. Its metric is one word. Values under ten get more digits.
    void add_row(const std::string& metric, double value, const char* unit, double peer) const {
        if (csv_path.empty()) return;
        bool fresh = access(csv_path.c_str(), F_OK) != 0;
        std::ofstream csv(csv_path, std::ios::app);
        if (fresh) csv << "metric,value,unit,peer_value,ratio\n";
        auto number = [](double x) { return std::fabs(x) < 10 ? format("%.3f", x) : format("%.1f", x); };
        csv << format("%s,%s,%s,%s,%.3f\n", metric, number(value), unit, number(peer), value / peer);
        if (!csv) fail("%s: could not be written (%s)", csv_path, errno_text());
    }
};

// Sets of one buffer, by turns.
template <class T>
struct Ring {
    size_t n, sets;
    DeviceArray<T> all;
    Ring(size_t n, size_t sets) : n(round_up(n, 256)), sets(sets), all(this->n * sets) {}
    T* operator()(int i) const { return all.data() + size_t(i) % sets * n; }
};

// Uniform in [-bound, bound).
template <class T>
void fill(Device& device, const Ring<T>& ring, float bound, uint32_t seed) {
    size_t n = ring.all.size();
    launch(initialise_kernel<T>, ceil_div(ceil_div(n, 4), THREADS), THREADS, 0, device.stream, ring.all.data(),
           TensorStart{1, n, 1, 1, bound, bound, seed}, uint64_t(seed));
}
template <class T>
std::vector<float> host(Device& device, const T* from, size_t n) {
    std::vector<T> values(n);
    device.copy(values.data(), from, n);
    device.synchronize();
    return std::vector<float>(values.begin(), values.end());
}

// ||expected - found|| / ||expected||
inline double relative_error(const std::vector<float>& expected, const std::vector<float>& found) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < expected.size(); i++) {
        double d = double(expected[i]) - double(found[i]);
        difference += d * d, norm += double(expected[i]) * double(expected[i]);
    }
    return std::sqrt(difference / norm);
}

// A benchmark's program: what a user can mend is one line on stderr and exit status 1.
inline int bench_main(const Bench& bench, int (*run)(int, char**), int argc, char** argv) {
    setvbuf(stdout, nullptr, _IOLBF, 0);
    try {
        return run(argc, argv);
    } catch (const Error& e) {
        fprintf(stderr, "%s: %s\n", bench.name, e.what());
        return 1;
    }
}
