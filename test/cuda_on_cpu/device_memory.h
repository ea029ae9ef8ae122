// Device memory: a mapping of its own for each allocation, between guard pages, out of the host's reach while the host
// runs.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <deque>

#include "settings.h"

#if defined(__SANITIZE_ADDRESS__)
#define CUDA_ON_CPU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDA_ON_CPU_ASAN 1
#endif
#endif
#ifdef CUDA_ON_CPU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

namespace cuda_on_cpu {

constexpr size_t page = 4096;
constexpr unsigned char canary = 0xC5;
constexpr size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// The offset of the first byte that is not the canary, or n. Not seen by ASan, which has these bytes poisoned.
__attribute__((no_sanitize("address"))) inline size_t damaged_at(const char* p, size_t n) {
    size_t i = 0;
    for (uint64_t eight; i + 8 <= n; i += 8) {
        __builtin_memcpy(&eight, p + i, 8);
        if (eight != 0x0101010101010101u * canary) break;
    }
    while (i < n && (unsigned char)p[i] == canary) i++;
    return i;
}

// [guard page][canary][data, bytes long][canary][guard page]; data is 256-byte aligned, as close to the end as that
// allows.
struct Allocation {
    char* map = nullptr;
    size_t map_bytes = 0;
    char* data = nullptr;
    size_t bytes = 0;
    bool freed = false;
    std::atomic<bool> open{false};  // readable and writable now

    char* first() const { return map + page; }
    char* last() const { return map + map_bytes - page; }
    bool protect(int how) const { return mprotect(first(), size_t(last() - first()), how) == 0; }
    std::string damage() const {
        size_t before = damaged_at(first(), size_t(data - first())),
               after = damaged_at(data + bytes, size_t(last() - data) - bytes);
        if (before != size_t(data - first()))
            return formatted("a write %zu bytes before an allocation of %zu bytes", size_t(data - first()) - before,
                             bytes);
        if (after != size_t(last() - data) - bytes)
            return formatted("a write at offset %zu of an allocation of %zu bytes", bytes + after, bytes);
        return "";
    }
};

inline void install_fault_handler();

struct DeviceMemory {
    std::map<char*, Allocation> live;   // by the address of the mapping
    std::map<char*, Allocation> freed;  // kept reserved, so that a use after free is named
    std::deque<char*> freed_order;
    std::map<char*, size_t> pinned;
    size_t total = 0, used = 0;
    std::atomic<int> running{0};  // the device is: faults in live allocations open them

    DeviceMemory() {
        const char* mib = getenv("CUDA_ON_CPU_MEMORY");
        total = size_t(mib && *mib ? atol(mib) : 8192) << 20;
    }
    static Allocation* find(std::map<char*, Allocation>& in, const void* p) {
        auto at = in.upper_bound((char*)p);
        if (at == in.begin()) return nullptr;
        Allocation& a = (--at)->second;
        return (char*)p < a.map + a.map_bytes ? &a : nullptr;
    }
    // The allocation whose data p points into.
    Allocation* containing(const void* p) {
        Allocation* a = find(live, p);
        return a && (char*)p >= a->data && (char*)p < a->data + a->bytes ? a : nullptr;
    }
    bool contains(const void* p, size_t n) {
        Allocation* a = containing(p);
        return a && n <= a->bytes - size_t((char*)p - a->data);
    }
    bool is_pinned(const void* p) {
        auto at = pinned.upper_bound((char*)p);
        return at != pinned.begin() && (--at, (char*)p < at->first + at->second);
    }

    void* allocate(size_t bytes) {
        size_t inner = round_up(round_up(bytes, 256), page), charged = round_up(bytes, 512);
        if (charged < bytes || charged > total - used) return nullptr;
        install_fault_handler();
        void* map = mmap(nullptr, inner + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (map == MAP_FAILED) return nullptr;
        Allocation& a = live[(char*)map];
        a.map = (char*)map, a.map_bytes = inner + 2 * page, a.bytes = bytes, used += charged;
        a.data = a.last() - round_up(bytes, 256);
        a.protect(PROT_READ | PROT_WRITE);
        memset(a.first(), canary, inner);
        memset(a.data, settings().poison, bytes);
        ASAN_POISON_MEMORY_REGION(a.first(), size_t(a.data - a.first()));
        ASAN_POISON_MEMORY_REGION(a.data + bytes, size_t(a.last() - a.data) - bytes);
        if (settings().protect) a.protect(PROT_NONE);
        a.open = !settings().protect;
        return a.data;
    }
    bool release(void* p) {
        Allocation* a = containing(p);
        if (!a || a->data != p) return false;
        if (!a->open) a->protect(PROT_READ | PROT_WRITE);
        std::string damage = a->damage();
        if (!damage.empty()) report_misuse("found when it was freed: " + damage, true);
        a->protect(PROT_NONE);
        madvise(a->first(), size_t(a->last() - a->first()), MADV_DONTNEED);
        ASAN_UNPOISON_MEMORY_REGION(a->map, a->map_bytes);
        used -= round_up(a->bytes, 512);
        Allocation& f = freed[a->map];
        f.map = a->map, f.map_bytes = a->map_bytes, f.data = a->data, f.bytes = a->bytes, f.freed = true;
        freed_order.push_back(a->map);
        live.erase(a->map);
        if (freed_order.size() > 1000) {
            Allocation& oldest = freed[freed_order.front()];
            munmap(oldest.map, oldest.map_bytes);
            freed.erase(freed_order.front());
            freed_order.pop_front();
        }
        return true;
    }
};
inline DeviceMemory& memory() {
    static DeviceMemory instance;
    return instance;
}

// What the faulting thread was doing, "" on the host, given the address; fibers.h fills it in.
inline thread_local std::string (*current_place)(const void*) = nullptr;
inline struct sigaction previous_action;

// While the device runs, the first touch of an allocation comes here and opens it: a flush then costs as many mprotect
// calls as it touches allocations, not as there are. Any other fault is an error, told and passed on.
__attribute__((no_sanitize("address", "undefined"))) inline void on_fault(int number, siginfo_t* info, void* context) {
    char* p = (char*)info->si_addr;
    Allocation* a = DeviceMemory::find(memory().live, p);
    if (a && (memory().running || !settings().protect) && p >= a->first() && p < a->last() &&
        a->protect(PROT_READ | PROT_WRITE)) {
        a->open = true;
        return;
    }
    bool freed = false;
    if (!a) a = DeviceMemory::find(memory().freed, p), freed = a != nullptr;
    std::string place = current_place ? current_place(p) : "";
    std::string message = place.empty() ? "host access to " : "in " + place + ": access to ";
    if (a)
        message += formatted("%sdevice memory, allocation of %zu bytes + offset %td",
                             freed                              ? "freed "
                             : p < a->first() || p >= a->last() ? "a guard page of "
                                                                : "",
                             a->bytes, p - a->data);
    else message += formatted("address %p, which is no device memory", (void*)p);
    if (a || !place.empty()) {
        message = "CUDA on CPU: " + message + "\n";
        if (write(2, message.data(), message.size()) < 0) _exit(1);
    }
    // Passed on to the handler that was there before, a sanitizer's or a test framework's.
    if (previous_action.sa_flags & SA_SIGINFO && previous_action.sa_sigaction)
        return previous_action.sa_sigaction(number, info, context);
    if (previous_action.sa_handler && previous_action.sa_handler != SIG_IGN) return previous_action.sa_handler(number);
    signal(number, SIG_DFL);  // the access is repeated on return, and now kills
}

// Test frameworks put their handlers back between tests, so this looks each time.
inline void install_fault_handler() {
    stack_t old;
    sigaltstack(nullptr, &old);
    if (old.ss_flags & SS_DISABLE) {  // a stack of its own lets the handler tell of a stack overflow
        static thread_local char space[64 << 10];
        stack_t mine{};
        mine.ss_sp = space, mine.ss_size = sizeof space;
        sigaltstack(&mine, nullptr);
    }
    struct sigaction now;
    sigaction(SIGSEGV, nullptr, &now);
    if (now.sa_flags & SA_SIGINFO && now.sa_sigaction == on_fault) return;
    previous_action = now;
    struct sigaction mine{};
    mine.sa_sigaction = on_fault;
    mine.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &mine, nullptr);
}

// The device runs for as long as one of these lives.
struct DeviceRunning {
    DeviceRunning() {
        install_fault_handler();
        memory().running++;
    }
    ~DeviceRunning() {
        if (--memory().running) return;
        for (auto& [map, a] : memory().live) {
            if (!a.open) continue;
            std::string damage = a.damage();
            if (!damage.empty()) {
                report_misuse("found when the device was synchronised: " + damage + " since the last synchronisation",
                              true);
                repair(a);
            }
            if (settings().protect) a.open = !a.protect(PROT_NONE);
        }
    }
    // One damage is told once.
    __attribute__((no_sanitize("address"))) static void repair(const Allocation& a) {
        for (volatile char* p = a.first(); p < a.data; p++) *p = (char)canary;
        for (volatile char* p = a.data + a.bytes; p < a.last(); p++) *p = (char)canary;
    }
};

}  // namespace cuda_on_cpu
