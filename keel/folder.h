// keel/folder.h: the output folder of a run: names and order of its checkpoints, its lock, its logs, its disk.
#pragma once

#include <sys/file.h>
#include <sys/statvfs.h>

#include <fstream>

#include "../keel_common.h"
#include "system.h"

// The output folder holds model_00001000.bin and state_00001000_00000.bin for each checkpoint, log.csv, and where asked
// for probe.csv, probe_weights.csv, hops.csv and ablate.csv.

inline std::string model_path(const std::string& folder, int64_t step) {
    return format("%s/model_%08lld.bin", folder, step);
}
inline std::string state_path(const std::string& folder, int64_t step, int rank = 0) {
    return format("%s/state_%08lld_%05d.bin", folder, step, rank);
}

// The names in a folder, in order; none where there is no folder.
inline std::vector<std::string> names_in(const std::string& folder) {
    std::vector<std::string> names;
    std::error_code error;
    std::filesystem::directory_iterator entry(folder, error), end;
    for (; !error && entry != end; entry.increment(error)) names.push_back(entry->path().filename().string());
    if (error && error != std::errc::no_such_file_or_directory)
        throw UnreadableError(format("-o: %s cannot be read (%s); %s", folder, error.message(),
                                     errno_advice(error.value())));
    std::sort(names.begin(), names.end());
    return names;
}

// The files of a folder whose names fit a pattern such as "state_%lld_00000.bin%n", each with its step, newest first.
inline std::vector<std::pair<long long, std::string>> files_by_step(const std::string& folder, const char* pattern) {
    std::vector<std::pair<long long, std::string>> found;
    for (const std::string& name : names_in(folder)) {
        long long step;
        int end = 0;
        bool fits = sscanf(name.c_str(), pattern, &step, &end) == 1 && size_t(end) == name.size();
        std::string digits = fits ? format("_%08lld", step) : "";  // other spellings of a step are not ours
        if (fits && name.compare(name.find('_'), digits.size(), digits) == 0)
            found.push_back({step, folder + "/" + name});
    }
    std::sort(found.rbegin(), found.rend());
    return found;
}
inline constexpr const char *STATE_PATTERN = "state_%lld_00000.bin%n", *ANY_STATE_PATTERN = "state_%lld_%*5[0-9].bin%n",
                            *MODEL_PATTERN = "model_%lld.bin%n";

// --keep: removes all but the newest `keep` of the checkpoints up to this step, which is whole. Those that a resume
// passed over do not count, and go once they are older than it; those of later steps stay.
inline void remove_old_checkpoints(const std::string& folder, int64_t step, int64_t keep,
                                   const std::set<int64_t>& passed_over) {
    if (keep == 0) return;
    int64_t seen = 0;
    long long oldest = 0;  // the first step that stays
    for (const auto& file : files_by_step(folder, STATE_PATTERN))
        if (file.first <= step && !passed_over.count(file.first) && ++seen == keep) oldest = file.first;
    auto goes = [&](long long s) { return s < oldest || (s < step && passed_over.count(s)); };
    std::error_code gone;
    for (const char* pattern : {ANY_STATE_PATTERN, MODEL_PATTERN})
        for (const auto& [file_step, path] : files_by_step(folder, pattern))  // and no links, which are others'
            if (goes(file_step) && is_regular_file(std::filesystem::symlink_status(path, gone))) unlink(path.c_str());
}

// Removes what a killed run left half-written.
inline void remove_unfinished_files(const std::string& folder) {
    for (const char* pattern : {"state_%lld_%*5[0-9].bin.tmp%n", "model_%lld.bin.tmp%n"})
        for (const auto& file : files_by_step(folder, pattern)) unlink(file.second.c_str());
}

// The training states of a checkpoint, a file a rank.
struct StateFiles {
    std::string folder;
    int64_t step = -1;                   // -1: none
    int ranks = 0;                       // how many wrote it
    std::set<int64_t> passed_over = {};  // steps of newer checkpoints, from which a resume cannot go on
    explicit operator bool() const { return step >= 0; }
    std::string path(int rank) const { return state_path(folder, step, rank); }

    // Opens a rank's file, which must belong to the checkpoint of rank 0's file, whose header is `first`.
    FileReader open(int rank, const FileHeader& first) const {
        FileReader in(path(rank), FILE_STATE);
        FileHeader expected = first;
        expected.word[H_RANK] = rank;
        if (in.header.word != expected.word)
            fail("%s: expected rank %d of the checkpoint of %s, found another's", path(rank), rank, path(0));
        return in;
    }
    // The path of a file that is missing; "" where none is.
    std::string missing() const {
        for (int r = 0; r < ranks; r++)
            if (is_absent(path(r))) return path(r);
        return "";
    }
};

// Fails, before anything is written, unless the folder can be made and written.
inline void check_output_folder(const std::string& folder) {
    namespace fs = std::filesystem;
    std::error_code error;
    fs::file_type type = fs::status(folder, error).type();
    if (type == fs::file_type::none) fail("-o: %s cannot be used (%s); give another folder", folder, error.message());
    if (type != fs::file_type::not_found && type != fs::file_type::directory)
        fail("-o: expected a folder, found the file %s; give another name", folder);
    for (const auto& part : fs::path(folder))
        if (part.native().size() > NAME_MAX)
            fail("-o: %s cannot be used (%s); give another folder", folder, strerror(ENAMETOOLONG));
    // The nearest folder that exists is the one that must be writable.
    fs::path probe = fs::absolute(folder, error);
    if (error) fail("-o: %s cannot be used (%s); give another folder", folder, error.message());
    while (!fs::exists(probe, error) && probe.has_parent_path() && probe != probe.parent_path())
        probe = probe.parent_path();
    if (!fs::is_directory(probe, error)) fail("-o: expected a folder, found the file %s; give another name", probe);
    if (access(probe.c_str(), W_OK | X_OK) != 0)
        fail("-o: %s cannot be written (%s); give a folder that can", probe, errno_text());
}

// Fails where the folder holds a run, which a new one would write over.
inline void refuse_other_run(const std::string& folder) {
    for (const std::string& name : names_in(folder))
        for (const char* ours : {"log.csv", "probe.csv", "probe_weights.csv", "hops.csv"})
            if (name == ours)
                fail("-o: %s holds a run (%s); go on with it by -y, or give another folder", folder, name);
    for (const char* pattern : {ANY_STATE_PATTERN, MODEL_PATTERN})
        for (const auto& file : files_by_step(folder, pattern))
            fail("-o: %s holds a run (%s); go on with it by -y, or give another folder", folder, file.second);
}

// -y in a folder without checkpoints starts fresh, unless models in it show that a run has lost its states.
inline void check_fresh_resume(const std::string& folder) {
    for (const auto& model : files_by_step(folder, MODEL_PATTERN))
        fail("-y: expected a training state in %s, found only models such as %s; start from one by -e in another -o",
             folder, model.second);
    print("starting   fresh, as there is no checkpoint in %s\n", folder);
}

// Makes the folder and those above it; each is on the disk before the next is made.
inline void create_output_folder(const std::string& folder) {
    std::filesystem::path path;
    for (const auto& part : std::filesystem::path(folder)) {
        path /= part;
        if (mkdir(path.c_str(), 0777) == 0) {
            sync_folder(path.has_filename() ? path.string() : path.parent_path().string());
            continue;
        }
        std::string why = errno_text();
        if (std::error_code error; !std::filesystem::is_directory(path, error))
            fail("-o: %s cannot be created (%s); give another folder", folder, why);
    }
}

// Whether the path leads to another file than the open one, or to none. What cannot be looked at is no other.
inline bool leads_elsewhere(const std::string& path, int fd) {
    struct stat ours, there;
    if (stat(path.c_str(), &there) != 0) return errno == ENOENT || errno == ENOTDIR;
    return fstat(fd, &ours) == 0 && (ours.st_ino != there.st_ino || ours.st_dev != there.st_dev);
}

// The folder of a run, held open: another may get its name while the run goes on.
class RunFolder {
public:
    explicit RunFolder(const std::string& path)
        : path(path), fd(open(path.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC)) {}
    ~RunFolder() {
        if (fd >= 0) close(fd);
    }
    RunFolder(const RunFolder&) = delete;
    RunFolder& operator=(const RunFolder&) = delete;

    // The fault if a checkpoint would now go to another folder; empty if it would not.
    std::string fault() const {
        if (fd < 0 || !leads_elsewhere(path, fd)) return "";
        return format("-o: expected the folder %s of this run, found it moved or removed; put it back", path);
    }

private:
    std::string path;
    int fd;
};

// Keeps a second run out of the folder. The lock is the kernel's, on a file that names its holder: it ends with the
// process, however that ends, and the file that a killed run leaves behind blocks nobody.
class FolderLock {
public:
    FolderLock() = default;
    explicit FolderLock(const std::string& folder) : folder(folder), path(folder + "/lock") {
        for (;;) {
            fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW, 0666);
            if (fd < 0) fail("-o: %s %s", path, write_fault(errno));
            if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
                if (errno != EWOULDBLOCK) {
                    print("note       %s cannot be locked (%s): see that no other run writes there\n", folder,
                          errno_text());
                    return;
                }
                close(fd);
                std::string by = holder(folder).data();
                fail("-o: %s is in use by %s; wait for it, end it, or give another folder", folder,
                     by.empty() ? "another run" : by);
            }
            if (!leads_elsewhere(path, fd)) break;
            close(fd);  // the last holder has removed the file between our open and our lock
        }
        locked = true;
        std::string text = process_name();
        if (ftruncate(fd, 0) != 0 || pwrite(fd, text.data(), text.size(), 0) != ssize_t(text.size())) {
        }  // on a full disk the lock names no holder
    }
    ~FolderLock() {
        if (fd < 0) return;
        if (locked && !leads_elsewhere(path, fd)) unlink(path.c_str());
        close(fd);
    }
    FolderLock(FolderLock&& other) noexcept { *this = std::move(other); }
    FolderLock& operator=(FolderLock&& other) noexcept {
        std::swap(folder, other.folder), std::swap(path, other.path);
        std::swap(fd, other.fd), std::swap(locked, other.locked);
        return *this;
    }
    explicit operator bool() const { return fd >= 0; }

    // Who has the folder, as its lock says; empty where it says nothing.
    static std::array<char, 256> holder(const std::string& folder) {
        std::array<char, 256> text = {};
        int fd = open((folder + "/lock").c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW);
        if (fd >= 0 && pread(fd, text.data(), text.size() - 1, 0) < 0) text = {};
        if (fd >= 0) close(fd);
        return text;
    }

    // Takes it anew where someone has removed its file.
    void retake() {
        if (locked && leads_elsewhere(path, fd)) *this = FolderLock(folder);
    }

private:
    std::string folder, path;
    int fd = -1;
    bool locked = false;  // false: the file system has no locks
};

// What was not as a run leaves it in a log.
struct LogFaults {
    size_t odd = 0, first_odd = 0;  // lines that are none of its rows; the number of the first, from 1
    size_t later = 0;               // rows of steps after last_step
    bool windows = false;           // its lines end in CR LF
};

// Calls row(step, line) for the rows of a log up to last_step: whole lines that start with a step, in order. Rows of
// later steps and half a line at the end are what a killed run leaves; any other line is odd. No file is an empty one.
template <class Row>
LogFaults read_csv_rows(const std::string& path, int64_t last_step, Row row) {
    LogFaults faults;
    int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    std::string why = errno_text();
    if (fd < 0 && is_absent(path)) return faults;
    struct stat st;
    std::unique_ptr<FILE, CloseFile> file(fd >= 0 ? fdopen(fd, "r") : nullptr);
    if (!file || fstat(fd, &st) != 0 || !S_ISREG(st.st_mode))
        throw UnreadableError(format("%s: cannot be read (%s); make it readable, or move it away", path,
                                     file ? "it is no file" : why));
    char* line = nullptr;
    size_t capacity = 0, number = 0;
    ssize_t length;
    int64_t before = 0;
    while ((length = getline(&line, &capacity, file.get())) > 0) {
        number++;
        if (line[length - 1] != '\n') break;
        faults.windows |= length > 1 && line[length - 2] == '\r';
        int64_t step = isdigit((unsigned char)line[0]) && size_t(length) == strlen(line) ? atoll(line) : -1;
        faults.later += step > last_step;
        if (step > last_step || (number == 1 && std::string_view(line).starts_with("step,"))) continue;
        if (step < before && faults.odd++ == 0) faults.first_odd = number;
        if (step < before) continue;
        before = step;
        row(step, std::string(line, size_t(length)));
    }
    free(line);
    if (ferror(file.get())) throw UnreadableError(format("%s: could not be read to its end; see to its disk", path));
    return faults;
}

// The row of that step in a log, without its line end; "" where there is none.
inline std::string last_row(const std::string& path, int64_t step) {
    std::string row;
    read_csv_rows(path, step, [&](int64_t s, const std::string& line) {
        if (s == step) row = line.substr(0, line.size() - 1);
    });
    return row;
}

// A csv file that a resumed run continues: rows of later steps than the checkpoint's are dropped first. What else is
// dropped is told, and the file as it was is kept beside it.
class CsvLog {
public:
    CsvLog() = default;  // one that drops its rows, for the ranks that write no files
    // A new table, in place of an older one of these columns.
    CsvLog(const std::string& path, const std::string& columns) : path(path) {
        std::error_code ignored;
        std::string line;
        auto is_older = [&] {  // a pipe would be waited for
            if (!std::filesystem::is_regular_file(path, ignored)) return false;
            std::ifstream file(path);
            return std::getline(file, line) && line == columns;
        };
        if (access(path.c_str(), F_OK) == 0 && !is_older())
            fail("%s: expected an older table of the columns %s, found another file; move it away", path, columns);
        begin(columns + "\n");
    }
    // copy_later: rows of later steps are kept in a copy, as the checkpoints that they belong to may come back.
    // every_step: it has a row for each.
    CsvLog(const std::string& path, const std::string& columns, int64_t resume_step, bool copy_later,
           bool every_step = false)
        : path(path) {
        std::string kept = columns + "\n";
        int64_t rows = 0;
        LogFaults faults = read_csv_rows(path, resume_step, [&](int64_t, const std::string& line) {
            auto commas = [](const std::string& text) { return std::count(text.begin(), text.end(), ','); };
            // Columns that an older program did not know are empty.
            size_t unknown = size_t(std::max<ptrdiff_t>(0, commas(columns) - commas(line)));
            kept += line.substr(0, line.find_last_not_of("\r\n") + 1) + std::string(unknown, ',') + "\n";
            rows++;
        });
        std::string copy;
        if (faults.odd || (faults.later && copy_later)) {
            for (int i = 1; copy = format("%s.%d", path, i), access(copy.c_str(), F_OK) == 0;) i++;
            if (link(path.c_str(), copy.c_str()) != 0 && rename(path.c_str(), copy.c_str()) != 0)
                fail("%s: %s", copy, write_fault(errno));
        }
        if (faults.odd)
            warn(format("%s: expected rows that start with a step, in order, found %zu other lines (the first is line "
                        "%zu), which are left out; the file is kept as %s",
                        path, faults.odd, faults.first_odd, copy));
        else if (!copy.empty())
            print("note       %s has %zu rows of later steps, and is kept as %s\n", path, faults.later, copy);
        if (every_step && rows < resume_step)
            warn(format("%s: expected a row for each of %lld steps, found %lld", path, resume_step, rows));
        if (faults.windows) print("note       %s had the line ends of Windows, and has LF again\n", path);
        begin(kept);
    }
    void row(const std::string& text) {
        if (!file) return;
        if (fprintf(file.get(), "%s\n", text.c_str()) < 0 || fflush(file.get()) != 0)
            fail("%s: %s, and go on by -y", path, write_fault(errno));
    }
    // Puts another row in the place of the last one: whatever happens meanwhile, one of them is there.
    void replace_last(const std::string& row) {
        std::ifstream old(path);
        std::string text((std::istreambuf_iterator<char>(old)), {});
        text.resize(text.rfind('\n', text.size() - 2) + 1);
        begin(text + row + "\n");
    }
    // The rows from before the call are on the disk after it; another thread may add rows meanwhile.
    void sync() {
        if (fsync(fileno(file.get())) != 0 && errno != EINVAL)
            fail("%s: %s, and go on by -y", path, write_fault(errno));
        if (leads_elsewhere(path, fileno(file.get())) && !std::exchange(told, true))
            warn(format("%s: expected the file that the run writes, found it moved or removed, with its rows", path));
    }

private:
    std::string path;
    std::unique_ptr<FILE, CloseFile> file;
    bool told = false;  // that it is no longer there

    void begin(const std::string& text) {  // on the disk before a row is added: no crash may bring the old file back
        FileWriter::replace(path, text);
        file.reset(fopen(path.c_str(), "ae"));
        if (!file) fail("%s: %s", path, write_fault(errno));
    }
};

// Bytes that may still be written to a folder, or to the nearest one above it that exists; UINT64_MAX where the file
// system does not say.
inline uint64_t free_space(const std::string& folder) {
    std::error_code ignored;
    std::filesystem::path path = std::filesystem::absolute(folder, ignored);
    struct statvfs fs;
    while (statvfs(path.c_str(), &fs) != 0) {
        if (path == path.parent_path()) return UINT64_MAX;
        path = path.parent_path();
    }
    return fs.f_blocks ? uint64_t(fs.f_bavail) * uint64_t(fs.f_frsize) : UINT64_MAX;
}

// Bytes of a checkpoint's model and states; the headers of other ranks' states are left out.
inline uint64_t checkpoint_bytes(const ModelConfig& c, RealType type) {
    return expected_file_size(make_header(FILE_STATE, type, c, 0)) +
           expected_file_size(make_header(FILE_MODEL, type, c, 0));
}

// The fault if a checkpoint does not fit beside the older ones, which stay until it is whole; empty if it fits.
inline std::string space_fault(const std::string& folder, uint64_t bytes) {
    uint64_t free = free_space(folder);
    if (free >= bytes) return "";
    return format("disk: expected at least %s free in %s for a checkpoint, found %s; free some space, or give another "
                  "-o or -n 0",
                  bytes_text(double(bytes)), folder, bytes_text(double(free)));
}
