// crash_disk.h: what a disk holds for certain, kept beside a folder while a program writes to it. Shared by the shim
// that watches the program's fsync (crash_shim.cpp) and by crash_test.cpp, which makes of it what a power cut may
// leave.
//
// POSIX promises after fsync of a file its content, and after fsync of a folder its entries; nothing else is certain.
// So the record has the content of each inode at its last fsync, and the names of the folder, each with its inode, at
// the folder's last.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>

#include "files.h"

namespace disk {

namespace fs = std::filesystem;

// An inode by device, number and time of birth, as numbers are used again; "" where there is none.
inline std::string identity(const std::string& path) {
    struct statx s;
    if (statx(AT_FDCWD, path.c_str(), 0, STATX_INO | STATX_BTIME, &s) != 0) return "";
    unsigned long long seconds = s.stx_mask & STATX_BTIME ? (unsigned long long)s.stx_btime.tv_sec : 0,
                       nanoseconds = s.stx_mask & STATX_BTIME ? s.stx_btime.tv_nsec : 0;
    char text[128];
    snprintf(text, sizeof text, "%u_%u_%llu_%llu_%llu", s.stx_dev_major, s.stx_dev_minor, (unsigned long long)s.stx_ino,
             seconds, nanoseconds);
    return text;
}

// Whole or not at all: the process may be killed in here.
inline void put(const std::string& path, const std::string& content) {
    std::string temporary = path + "." + std::to_string(gettid());
    std::ofstream(temporary, std::ios::binary) << content;
    rename(temporary.c_str(), path.c_str());
}

// path: of the file or, while it is open, /proc/self/fd/N.
inline void record_file(const std::string& record, const std::string& path) {
    put(record + "/file_" + identity(path), slurp(path));
}

inline void record_folder(const std::string& record, const std::string& folder) {
    std::string names;
    for (const auto& entry : fs::directory_iterator(folder))
        if (std::string id = identity(entry.path().string()); !id.empty())
            names += entry.path().filename().string() + " " + id + "\n";
    put(record + "/folder", names);
}

inline std::map<std::string, std::string> recorded_names(const std::string& record) {
    std::map<std::string, std::string> names;
    std::ifstream in(record + "/folder");
    for (std::string name, id; in >> name >> id;) names[name] = id;
    return names;
}

}  // namespace disk
