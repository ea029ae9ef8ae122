// keel/process.h: the process of a run and the system around it: its streams, its signals, its threads, its start.
#pragma once

#include <signal.h>

#include <atomic>
#include <exception>
#include <mutex>

#include "../keel_common.h"
#include "system.h"

// A program started with a standard stream closed would get its number for the next file that it opens, and print into
// a log or a checkpoint: /dev/null stands in its place.
inline void open_standard_streams() {
    for (int fd : {0, 1, 2})
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", fd == 0 ? O_RDONLY : O_WRONLY) < 0) _exit(1);
}

// Signals that ask a run to finish its step, write a checkpoint and end with status 0: so that a scheduler can take the
// machine back, a terminal can close and `| head` can end. A second SIGTERM, SIGINT or SIGUSR1 of the same kind ends it
// at once; two within 50 ms count as one, as some programs signal a process and its group. SIGHUP and SIGPIPE stay
// ignored where they were, as under nohup. A limit of file sizes makes writes fail instead of killing the program.
class StopSignals {
public:
    // Lasts to the end of the process: a signal just after the run's end must not change its exit status.
    static void watch() {
        for (int number : {SIGTERM, SIGINT, SIGUSR1, SIGHUP, SIGPIPE, SIGXCPU}) {
            struct sigaction action = {}, before = {};
            action.sa_handler = may_end(number) ? ask_or_end : ask;
            action.sa_flags = SA_RESTART;
            sigaction(number, nullptr, &before);
            if (may_end(number) || before.sa_handler != SIG_IGN) sigaction(number, &action, nullptr);
        }
    }
    static void ignore_file_size() { signal(SIGXFSZ, SIG_IGN); }
    static bool asked() { return told; }

private:
    static inline std::atomic<bool> told = false;
    static inline std::atomic<int64_t> first_at[NSIG] = {};  // nanoseconds, when each kind came first; 0: not yet

    static bool may_end(int number) { return number == SIGTERM || number == SIGINT || number == SIGUSR1; }
    static void ask(int) { told = true; }
    static void ask_or_end(int number) {
        told = true;
        timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        int64_t at = int64_t(t.tv_sec) * 1000000000 + t.tv_nsec, first = 0;
        if (first_at[number].compare_exchange_strong(first, at) || at - first < 50000000) return;
        signal(number, SIG_DFL);
        raise(number);
    }
};

// The threads that OMP_NUM_THREADS asks for, at the outer level where it is a list; 0 where it is not set.
inline int threads_asked_for() {
    const char* text = getenv("OMP_NUM_THREADS");
    if (!text || !*text) return 0;
    char* end = nullptr;
    long n = strtol(text, &end, 10);
    constexpr int most = 4096;
    if (n < 1 || n > most || !strchr(" ,", *end))
        fail("OMP_NUM_THREADS: expected a number of threads from 1 to %d in the environment, found '%s'; unset it to "
             "have one a processor",
             most, text);
    return int(n);
}

// The processors whose time the control group leaves to this process, as in a container of `docker run --cpus 2`, where
// nproc counts the whole machine's; INT_MAX where it sets no limit.
inline int group_processors(const std::string& groups = "/sys/fs/cgroup") {
    double quota = -1, period = 0;  // microseconds
    auto read = [&](const char* file, const char* pattern, auto... numbers) {
        std::unique_ptr<FILE, CloseFile> f(fopen((groups + file).c_str(), "re"));
        return f && fscanf(f.get(), pattern, numbers...) == int(sizeof...(numbers));
    };
    bool limited = read("/cpu.max", "%lf %lf", &quota, &period) ||  // version 2, "max 100000" where there is no limit
                   (read("/cpu/cpu.cfs_quota_us", "%lf", &quota) && read("/cpu/cpu.cfs_period_us", "%lf", &period));
    return limited && quota > 0 && period > 0 ? int(std::min(std::ceil(quota / period), 1e9)) : INT_MAX;
}

// How many threads to start where OpenMP would start `most`; a note says where that is not one a processor.
inline int wanted_threads(int most, int processors) {
    int asked = threads_asked_for(), wanted = asked ? asked : std::min(most, group_processors());
    if (!asked && wanted < most)
        print("note       %d threads on %d processors, as the control group has a limit of CPU time; OMP_NUM_THREADS "
              "sets another number\n",
              wanted, most);
    if (asked > processors)
        print("note       OMP_NUM_THREADS asks for %d threads on %d processors: slower than one a processor\n", asked,
              processors);
    return wanted;
}

// How many threads, of the n wanted and this one counted, a limit of processes or of memory lets start. By pthreads:
// the first free() in a std::thread would give malloc an arena of 64 MiB of address space for it.
inline int startable_threads(int n) {
    std::vector<pthread_t> threads(static_cast<size_t>(n));
    std::mutex waiting;
    auto wait = [](void* mutex) -> void* {
        std::lock_guard lock(*static_cast<std::mutex*>(mutex));
        return nullptr;
    };
    int started = 1;
    waiting.lock();
    while (started < n && pthread_create(&threads[size_t(started)], nullptr, wait, &waiting) == 0) started++;
    waiting.unlock();
    for (int t = 1; t < started; t++) pthread_join(threads[size_t(t)], nullptr);
    return started;
}

// Seconds since the process was started, to the kernel's clock tick of 10 ms; 0 where the kernel does not say.
inline double seconds_since_launch() {
    FILE* file = fopen("/proc/self/stat", "re");
    if (!file) return 0;
    char text[2048] = {};
    size_t got = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    const char* field = got ? strrchr(text, ')') : nullptr;  // the program's name, field 2, may hold spaces
    for (int i = 2; field && i < 22; i++) field = strchr(field + 1, ' ');
    timespec now;
    if (!field || clock_gettime(CLOCK_BOOTTIME, &now) != 0) return 0;
    return std::max(0.0, double(now.tv_sec) + double(now.tv_nsec) * 1e-9 - atof(field) / double(sysconf(_SC_CLK_TCK)));
}

// What the time from the process's start to the end of the first step went to.
class StartClock {
public:
    StartClock() : last(seconds()) { add("program", seconds_since_launch()); }
    void mark(const char* name) {
        double now = seconds();
        add(name, now - last);
        last = now;
    }
    void add(const char* name, double time) {
        total += time;
        text += format("%s%s %.2f", text.empty() ? "" : ", ", name, time);
    }
    void print() const { ::print("start-up   %.2f s to the end of the first step: %s\n", total, text); }

private:
    double last, total = 0;
    std::string text;
};

// Ends the process 20 seconds after an error has left its scope: what frees the device could else wait for ever for
// ranks that are gone.
struct EndByAlarm {
    const bool armed;
    const int exceptions = std::uncaught_exceptions();
    explicit EndByAlarm(bool armed) : armed(armed) {}
    ~EndByAlarm() {
        if (armed && std::uncaught_exceptions() > exceptions) signal(SIGALRM, SIG_DFL), alarm(20);
    }
};
