// The API's calls are counted, and one of them can fail or bring a signal: a test can have a device lost at any place.
#pragma once

#include <execinfo.h>
#include <signal.h>

#include "settings.h"

namespace cuda_on_cpu {

// A call that takes memory; with settings().fail_on the memory stays used up.
inline bool takes_memory(const char* call) {
    for (const char* part : {"lloc", "Create", "Instantiate"})
        if (strstr(call, part)) return true;
    return false;
}

// Where in the program a call comes from: the return addresses, innermost first, without what differs from process to
// process.
inline std::string place_of_call() {
    void* frames[64];
    std::string place;
    for (int i = 0, n = backtrace(frames, 64); i < n; i++) {
        Dl_info info{};
        dladdr(frames[i], &info);
        place += formatted(" %tx", static_cast<char*>(frames[i]) - static_cast<char*>(info.dli_fbase));
    }
    return place;
}

struct Calls {
    uint64_t made = 0;
    bool memory_gone = false;
    FILE* list = settings().calls ? fopen(settings().calls, "we") : nullptr;
    ~Calls() {
        if (list) fclose(list);
    }
};
inline Calls& calls() {
    static Calls instance;
    return instance;
}

// At the start of every call that returns a status, under the lock: the error that it is to return without doing
// anything else.
inline cudaError_t fault_of_call(const char* name) {
    Calls& c = calls();
    const Settings& s = settings();
    uint64_t number = ++c.made;
    if (c.list) fprintf(c.list, "%llu %s%s\n", (unsigned long long)number, name, place_of_call().c_str());
    if (number == s.signal_at) raise(SIGTERM);
    if (c.memory_gone && takes_memory(name)) return cudaErrorMemoryAllocation;
    if (number != s.fail_at) return cudaSuccess;
    if (takes_memory(name)) return c.memory_gone = s.fail_on, cudaErrorMemoryAllocation;
    if (!s.fail_on) return cudaErrorUnknown;
    return shared_state().sticky = cudaErrorIllegalAddress;
}

}  // namespace cuda_on_cpu
