// keel/system.h: what macOS names otherwise than Linux, and where the program lies.
#pragma once

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <filesystem>

#ifdef __APPLE__
#include <mach-o/dyld.h>

#define O_PATH O_RDONLY
#define CLOCK_BOOTTIME CLOCK_MONOTONIC
// Sockets and pipes there stay open where a program starts another, which the trainers do not once they have any.
#define SOCK_CLOEXEC 0
inline int accept4(int listener, sockaddr* from, socklen_t* size, int) { return accept(listener, from, size); }
inline int pipe2(int* ends, int) { return pipe(ends); }
#endif

// The path of this program; empty where the system does not say.
inline std::filesystem::path program_path() {
#ifdef __APPLE__
    char path[4096];
    uint32_t size = sizeof path;
    return _NSGetExecutablePath(path, &size) == 0 ? path : "";
#else
    std::error_code ignored;
    return std::filesystem::read_symlink("/proc/self/exe", ignored);
#endif
}
