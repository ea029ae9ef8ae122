// sample_cpu: a library that is loaded into a program (LD_PRELOAD) and writes down, a thousand times a second, where
// its main thread is. dev/bench/bench_cpu_layers.py loads it into train_keel_cpu and counts the samples by layer.
//
// KEEL_SAMPLES names the file: a line of hexadecimal addresses a sample, innermost first, then the program's memory map
// (/proc/self/maps), which says whose addresses they are. Time is the clock's, not the thread's: waiting counts.

#include <execinfo.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

namespace {

constexpr long NANOSECONDS = 1000000;  // from a sample to the next
constexpr int DEPTH = 24;              // calls that are kept of a sample
constexpr int OWN = 2;                 // innermost of all: the handler, and what returns from it
constexpr size_t MOST = 200000;        // samples: 200 s

struct Sample {
    int depth;
    void* at[DEPTH];
};
Sample* samples = nullptr;
size_t count = 0;
timer_t timer;

void take(int) {
    int error = errno;
    if (count < MOST) samples[count].depth = backtrace(samples[count].at, DEPTH), count++;
    errno = error;
}

__attribute__((constructor)) void start() {
    const char* path = getenv("KEEL_SAMPLES");
    if (!path) return;
    samples = static_cast<Sample*>(calloc(MOST, sizeof(Sample)));
    void* first[1];
    backtrace(first, 1);  // loads the unwinder, which a handler may not
    struct sigaction action = {};
    action.sa_handler = take;
    action.sa_flags = SA_RESTART;
    sigevent event = {};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = SIGPROF;
    event.sigev_notify_thread_id = pid_t(syscall(SYS_gettid));
    itimerspec period = {{0, NANOSECONDS}, {0, NANOSECONDS}};
    if (!samples || sigaction(SIGPROF, &action, nullptr) || timer_create(CLOCK_MONOTONIC, &event, &timer) ||
        timer_settime(timer, 0, &period, nullptr)) {
        perror("sample_cpu: nothing is recorded");
        free(samples), samples = nullptr;
    }
}

__attribute__((destructor)) void finish() {
    if (!samples) return;
    timer_delete(timer);
    FILE *out = fopen(getenv("KEEL_SAMPLES"), "w"), *maps = fopen("/proc/self/maps", "r");
    if (!out || !maps) return perror("sample_cpu");
    for (size_t i = 0; i < count; i++)
        for (int k = OWN; k < samples[i].depth; k++)
            fprintf(out, "%zx%c", size_t(samples[i].at[k]), k + 1 < samples[i].depth ? ' ' : '\n');
    fputs("maps\n", out);
    for (int c; (c = fgetc(maps)) != EOF;) fputc(c, out);
    if (ferror(out) | fclose(out)) fprintf(stderr, "sample_cpu: the samples could not be written whole\n");
    fclose(maps);
}

}  // namespace
