// crash_shim.cpp: preloaded into a trainer, it notes after each fsync what is now certain to be on the disk.
// CRASH_FOLDER is the folder that is watched, CRASH_RECORD where the notes go. CRASH_FSYNC_MS makes each fsync slow.
// With CRASH_CLOCK the time of day, and that since the machine's start, are up to 30 days off in either direction, at
// each call anew.
#include <dlfcn.h>
#include <sys/time.h>

#include "crash_disk.h"

extern "C" int fsync(int fd) {
    static const auto real = reinterpret_cast<int (*)(int)>(dlsym(RTLD_NEXT, "fsync"));
    static const char *folder = getenv("CRASH_FOLDER"), *record = getenv("CRASH_RECORD");
    static const char* delay = getenv("CRASH_FSYNC_MS");
    if (delay) usleep(useconds_t(1000 * atoi(delay)));
    int result = real(fd);
    struct stat st;
    if (result != 0 || !folder || !record || fstat(fd, &st) != 0) return result;
    std::string path = "/proc/self/fd/" + std::to_string(fd);
    if (S_ISREG(st.st_mode)) disk::record_file(record, path);
    else if (S_ISDIR(st.st_mode) && disk::identity(path) == disk::identity(folder)) disk::record_folder(record, folder);
    return result;
}

namespace {

template <class Function>
Function real_one(const char* name) {
    return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}
time_t seconds_off(long fraction) {
    static const bool jumps = getenv("CRASH_CLOCK");
    return jumps ? (fraction / 1000 % 61 - 30) * 86400 : 0;
}

}  // namespace

extern "C" int clock_gettime(clockid_t clock, timespec* t) {
    static const auto real = real_one<int (*)(clockid_t, timespec*)>("clock_gettime");
    int result = real(clock, t);
    if (clock == CLOCK_REALTIME || clock == CLOCK_BOOTTIME) t->tv_sec += seconds_off(t->tv_nsec);
    return result;
}

extern "C" int gettimeofday(timeval* t, void* zone) {
    static const auto real = real_one<int (*)(timeval*, void*)>("gettimeofday");
    int result = real(t, zone);
    t->tv_sec += seconds_off(t->tv_usec * 1000);
    return result;
}

extern "C" time_t time(time_t* t) {
    timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}
