// crash_shim.cpp: preloaded into a trainer, it notes after each fsync what is now certain to be on the disk.
// CRASH_FOLDER is the folder that is watched, CRASH_RECORD where the notes go. CRASH_FSYNC_MS makes each fsync slow.
#include <dlfcn.h>

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
