// Settings, random numbers, and what happens when misuse is found.
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <thread>

#include "types.h"

namespace cuda_on_cpu {

struct Settings {
    uint64_t seed;         // of every random order: threads in a block, blocks in a grid, streams, graph nodes
    unsigned char poison;  // fills device, pinned and shared memory that nothing has been written to
    int threads;           // OS threads that run a grid
    bool protect;          // device memory is out of the host's reach
    bool trace;            // the program ends with a table of the kernels that it launched
    bool epilogues;        // whether cuBLASLt has GELU in its epilogues
    int devices;           // of the machine, all its processes' the same; 0: one for each process
    int ptx;               // what the kernels look built for: 90, or 80, where they cannot wait for the kernel before
    uint64_t fail_at;      // the number of the call that fails, from 1; 0: none
    bool fail_on;          // its fault stays: the device is lost, or the memory used up
    uint64_t signal_at;    // the number of the call at which SIGTERM comes; 0: none
    const char* calls;     // a file for the list of all calls; null: none
};

inline Settings& settings() {
    static Settings values = [] {
        auto number = [](const char* name, long otherwise) {
            const char* text = getenv(name);
            return text && *text ? strtol(text, nullptr, 0) : otherwise;
        };
        const char *fail = getenv("CUDA_ON_CPU_FAIL"), *list = getenv("CUDA_ON_CPU_CALLS");
        long hardware = std::max(1, int(std::thread::hardware_concurrency()));
        return Settings{uint64_t(number("CUDA_ON_CPU_SEED", 1)),
                        (unsigned char)number("CUDA_ON_CPU_POISON", 0xFF),
                        int(std::max(1L, number("CUDA_ON_CPU_THREADS", std::min(2L, hardware)))),
                        number("CUDA_ON_CPU_PROTECT", 1) != 0,
                        number("CUDA_ON_CPU_TRACE", 0) != 0,
                        number("CUDA_ON_CPU_EPILOGUES", 1) != 0,
                        int(number("CUDA_ON_CPU_DEVICES", 0)),
                        int(number("CUDA_ON_CPU_PTX", 90)),
                        uint64_t(number("CUDA_ON_CPU_FAIL", 0)),
                        fail && strchr(fail, '+') != nullptr,
                        uint64_t(number("CUDA_ON_CPU_SIGNAL", 0)),
                        list && *list ? list : nullptr};
    }();
    return values;
}

// xorshift64: the scheduler draws one number a switch, so it must cost next to nothing.
struct Random {
    uint64_t state = 1;
    static uint64_t mix(uint64_t x) {
        x = (x ^ (x >> 31)) * 0x7fb5d329728ea185u;
        x = (x ^ (x >> 27)) * 0x81dadef4bc2dd44du;
        return x ^ (x >> 33);
    }
    void start(uint64_t seed, uint64_t a, uint64_t b) { state = mix(mix(mix(seed + 0x9e37) + a) + b) | 1; }
    uint32_t below(uint32_t n) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        return uint32_t(((state >> 32) * n) >> 32);
    }
};

// What a kernel's blocks have done: operations of mma and wgmma, bytes that cp.async was asked for, whole barriers.
struct Work {
    uint64_t operations = 0, copied = 0, barriers = 0;
    Work& operator+=(const Work& other) {
        operations += other.operations, copied += other.copied, barriers += other.barriers;
        return *this;
    }
};
// Of one kernel: launches, the largest block and dynamic shared memory of any, and the work of all.
struct Launches {
    size_t count = 0, shared_bytes = 0;
    unsigned threads = 0;
    Work work;
};
inline std::string kernel_name(const void* function);

inline void print_trace(const std::map<const void*, Launches>& launched) {
    printf("%9s %8s %13s  %s\n", "launches", "threads", "shared bytes", "kernel");
    std::map<std::string, Launches> by_name;
    for (auto& [function, l] : launched) by_name[kernel_name(function)] = l;
    for (auto& [name, l] : by_name) printf("%9zu %8u %13zu  %s\n", l.count, l.threads, l.shared_bytes, name.c_str());
}

// What all host threads share. The lock is recursive since a synchronising call runs queued work, which calls back.
struct Shared {
    std::recursive_mutex mutex;
    std::mutex misuse_mutex;
    std::string misuse;
    cudaError_t sticky = cudaSuccess;
    std::map<const void*, Launches> launched;
    uint64_t launches = 0;
    Random order;
    uint64_t order_seed = ~uint64_t(0);

    // Orders outside blocks restart when the seed is changed, so that two runs of a test with one seed are equal.
    Random& random() {
        if (order_seed != settings().seed)
            order_seed = settings().seed, launches = 0, order.start(order_seed, 0x5eed, 0);
        return order;
    }
    ~Shared() {
        if (settings().trace) print_trace(launched);
    }
};
inline Shared& shared_state() {
    static Shared state;
    return state;
}

inline std::string symbol_of(const void* function) {
    Dl_info info;
    if (dladdr(function, &info) && info.dli_sname && info.dli_saddr == function) return info.dli_sname;
    char address[32];
    snprintf(address, sizeof address, "%p", function);
    return address;
}
inline std::string kernel_name(const void* function) {
    std::string symbol = symbol_of(function);
    int status = 0;
    char* plain = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
    std::string name = status == 0 ? plain : symbol;
    free(plain);
    return name;
}

template <class... Values>
std::string formatted(const char* pattern, Values... values) {
    char text[1024];
    snprintf(text, sizeof text, pattern, values...);
    return text;
}
inline std::string text(uint3 v) { return formatted("(%u,%u,%u)", v.x, v.y, v.z); }

// Misuse by the device, or of it by the host. Device misuse ends the context, as on a card: later calls fail too.
inline void report_misuse(const std::string& message, bool sticky) {
    fprintf(stderr, "CUDA on CPU: %s\n", message.c_str());
    std::lock_guard lock(shared_state().misuse_mutex);
    shared_state().misuse = message;
    if (sticky) shared_state().sticky = cudaErrorLaunchFailure;
}
inline std::string last_misuse() {
    std::lock_guard lock(shared_state().misuse_mutex);
    return shared_state().misuse;
}

// Demangled names of the kernels that have run, with the number of launches.
inline std::map<std::string, size_t> launched_kernels() {
    std::lock_guard lock(shared_state().mutex);
    std::map<std::string, size_t> names;
    for (auto [function, launches] : shared_state().launched) names[kernel_name(function)] += launches.count;
    return names;
}
// The work of all launches of kernels so named.
inline Work work_done(const std::string& name) {
    std::lock_guard lock(shared_state().mutex);
    Work sum;
    for (auto& [function, launches] : shared_state().launched)
        if (kernel_name(function).find(name) != std::string::npos) sum += launches.work;
    return sum;
}

}  // namespace cuda_on_cpu
