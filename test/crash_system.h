// crash_system.h: cases of crash_test.cpp in which the system around a run changes: its limits, its clock, its streams.
#pragma once

#include <sys/resource.h>

#include "crash_run.h"

namespace {

// What a fault may do to a run: one line and exit 1, or nothing. Without the fault it goes on, and ends equal. Returns
// whether it had ended with the line.
bool fails_or_survives(const Result& r, const Words& command, const Place& place, const std::string& whole,
                       const std::string& folder, const std::string& what, int steps) {
    expect(r.code == 0 || (r.code == 1 && lines_of_errors(r.err) == 1),
           format("%s: exit %d, %s", what.c_str(), r.code, r.err.c_str()));
    for (const std::string& name : names_in(folder)) expect(!name.ends_with(".tmp"), what + ": it leaves " + name);
    if (r.code != 0)
        check_resume(succeeds(command, place), last_named_step(r.out, "checkpoint"), what + ", on resuming");
    same_run(whole, folder, what, steps);
    return r.code != 0;
}

// ----------------------------------------------------------------------------------------------------

struct Limit {
    const char* name;
    __rlimit_resource resource;
    rlim_t least, most;  // that are set; of the address space, beyond what it has or what a start takes
    const char* threads;
};
constexpr rlim_t MiB = 1 << 20;
const Limit limits_set[] = {{"file size", RLIMIT_FSIZE, 0, 200000, "1"},  // a state has 126 kB
                            {"open files", RLIMIT_NOFILE, 0, 8, "1"},
                            {"processes", RLIMIT_NPROC, 0, 2, "2"},
                            {"address space", RLIMIT_AS, 0, MiB / 4, "2"}};
const char* const limit_moments[] = {"start", "data ", "machine ", "step ", "validation", "checkpoint", "any"};

// As that user, whom root may not always limit.
void limit_process(pid_t id, uid_t user, __rlimit_resource resource, rlim_t low) {
    pid_t child = fork();
    if (child == 0) {
        as_user(user)();
        rlimit set = {low, low};
        _exit(prlimit(id, resource, &set, nullptr) == 0 || errno == ESRCH ? 0 : 1);
    }
    int status;
    waitpid(child, &status, 0);
    expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a limit cannot be set");
}

// Each limit is set low before the start, at each phase and at any moment.
std::string limits() {
    Place place;
    constexpr int STEPS = 60;
    std::string whole = place / "whole", limited = place / "limited", copy = place / "trainer";
    fs::copy_file(trainer, copy);
    // The kernel counts processes by user, and not root's.
    uid_t user = getuid() == 0 ? uid_t(100000 + getpid() % 100000) : 0;
    auto command = [&](const std::string& out) {
        Words words = place.command(out, {}, STEPS, 6);
        words[0] = copy;
        return words;
    };
    double start = seconds();
    succeeds(command(whole), place);
    double duration = seconds() - start;
    int64_t set = 0, failures = 0;
    for (int turn = 0; turn < lean(1, 8); turn++)
        for (const Limit& limit : limits_set)
            for (std::string moment : limit_moments) {
                std::string what = format("limit of %s, %s", limit.name, moment.c_str());
                fs::remove_all(limited), fs::create_directory(limited), chmod(limited.c_str(), 0777);
                rlim_t low = limit.least + dice() % (limit.most - limit.least);
                bool at_start = moment == "start", of_space = limit.resource == RLIMIT_AS;
                // The loader, which is not ours, takes 4 files and 24 MiB.
                if (at_start) low += of_space ? 24 * MiB : limit.resource == RLIMIT_NOFILE ? 4 : 0;
                Process process(command(limited), place.path, {{"OMP_NUM_THREADS", limit.threads}}, [&] {
                    as_user(user)();
                    if (!at_start) return;
                    rlimit set = {low, low};
                    setrlimit(limit.resource, &set);
                });
                if (!at_start) process.wait_for_output("starting ");  // the loader is at its end
                if (moment == "any") wait_for(uniform(0, duration));
                else if (moment == "checkpoint") process.wait_for_writing(limited, duration);
                else if (!at_start) process.wait_for_output(moment);
                if (!at_start) {
                    if (of_space) low += 4096 * rlim_t(atoll(slurp(format("/proc/%d/statm", process.id())).c_str()));
                    limit_process(process.id(), user, limit.resource, low);
                }
                failures += fails_or_survives(process.wait(), command(limited), place, whole, limited,
                                              what + format(" to %llu", (unsigned long long)low), STEPS);
                set++;
            }
    return format("%lld limits, %lld of them ended the run with a line, the others it survived", (long long)set,
                  (long long)failures);
}

// ----------------------------------------------------------------------------------------------------

// The time of day jumps back and forth, and between kills each file is from 1970 or from 2100.
std::string clocks() {
    if (access(shim.c_str(), R_OK) != 0) throw Skip{shim + " is not there"};
    Place place;
    std::string whole = place / "whole", folder = place / "run";
    double start = seconds();
    succeeds(place.command(whole), place);
    double duration = seconds() - start;
    const std::map<std::string, std::string> jumping = {{"LD_PRELOAD", fs::absolute(shim).string()},
                                                        {"CRASH_CLOCK", "1"}};
    int64_t days = 0, kills = 0, runs = 0;
    for (int i = 0; i < 20 && !days; i++)
        days = (atoll(Process({"date", "+%s"}, place.path, jumping).wait().out.c_str()) - time(nullptr)) / 86400;
    expect(days != 0, "the clock does not jump");
    for (; kills < lean(8, 60); runs++, fs::remove_all(folder)) {
        int64_t promised = -1;
        for (int code = -1; code != 0;) {
            Process process(place.command(folder), place.path, jumping);
            process.wait_for_a_moment(folder, duration);
            process.send(SIGKILL);
            Result r = process.wait();
            check_resume(r, promised, "after a jump of the clock");
            promised = std::max(promised, last_named_step(r.out, "checkpoint"));
            std::error_code none;  // killed before it had a folder
            for (const auto& entry : fs::directory_iterator(folder, none)) {
                timespec then = {coin() ? 0 : 4102444800, 0}, both[] = {then, then};
                utimensat(AT_FDCWD, entry.path().c_str(), both, 0);
            }
            code = r.code, kills += code != 0;
        }
        same_run(whole, folder, "after jumps of the clock");
    }
    return format("%lld kills in %lld runs, in which the clock jumped and files were from 1970 or 2100",
                  (long long)kills, (long long)runs);
}

// ----------------------------------------------------------------------------------------------------

// stdout is a pipe, or a terminal of the process's own, whose other end reads some of it after the first step and goes
// away.
struct Reader {
    bool terminal;
    int ends[2] = {-1, -1};  // ours, the trainer's
    explicit Reader(bool terminal) : terminal(terminal) {
        if (!terminal) {
            if (pipe2(ends, O_CLOEXEC) != 0) fail("no pipe");
            return;
        }
        ends[0] = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
        if (ends[0] < 0 || grantpt(ends[0]) != 0 || unlockpt(ends[0]) != 0) throw Skip{"no terminals here"};
    }
    void prepare() {
        if (terminal) setsid(), ends[1] = open(ptsname(ends[0]), O_RDWR);  // which becomes its terminal
        dup2(ends[1], 1);
    }
    void read_and_leave() {
        if (!terminal) close(ends[1]);
        std::string text;
        char buffer[256];
        for (size_t most = dice() % 40000, first = 0; !first || text.size() < first + most;) {
            ssize_t n = read(ends[0], buffer, sizeof buffer);
            if (n <= 0) break;
            text.append(buffer, size_t(n));
            if (size_t at = text.find("step "); !first && at != std::string::npos) first = at;
        }
        close(ends[0]);
    }
};

std::string streams() {
    Place place;
    std::string whole = place / "whole", folder = place / "run";
    constexpr int STEPS = 600;
    const Words command = place.command(folder, {}, STEPS, 50);
    succeeds(place.command(whole, {}, STEPS, 50), place);
    auto equal = [&](const std::string& what) {
        same_run(whole, folder, what, STEPS);
        for (const auto& entry : fs::directory_iterator(folder))
            for (const char* printed : {"| loss ", "train_keel", "warning", "checkpoint"})
                expect(slurp(entry.path().string()).find(printed) == std::string::npos,
                       what + ": what was printed is in " + entry.path().string());
        fs::remove_all(folder);
    };
    int64_t starts = 0, left = 0;
    for (int open_ones = 0; open_ones < 7; open_ones++, starts++) {
        std::string what = "of stdin, stdout and stderr open: ";
        for (int fd : {0, 1, 2}) what += open_ones >> fd & 1 ? char('0' + fd) : '-';
        Result r = Process(command, place.path, {}, [=] {
            for (int fd : {0, 1, 2})
                if (!(open_ones >> fd & 1)) close(fd);
        }).wait();
        expect(r.code == 0, format("%s: exit %d, %s", what.c_str(), r.code, r.err.c_str()));
        equal(what);
    }
    Result full = Process(command, place.path, {}, [] {
        int fd = open("/dev/full", O_WRONLY);
        dup2(fd, 1), dup2(fd, 2);
    }).wait();
    expect(full.code == 0, format("a full device: exit %d", full.code));
    equal("a full device");
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0 || fcntl(ends[1], F_SETPIPE_SZ, 16384) < 0) fail("no pipe");
    Process unread(command, place.path, {}, [&] { dup2(ends[1], 1); });
    for (pollfd p = {ends[1], POLLOUT, 0}; poll(&p, 1, 0) == 1 && unread.runs();) wait_for(0.001);
    wait_for(0.1);
    expect(unread.runs(), "it does not wait for the reader of its pipe");
    unread.send(SIGTERM);
    Result asked = unread.wait();
    expect(asked.code == 0, format("SIGTERM while nobody reads the pipe: exit %d, %s", asked.code, asked.err.c_str()));
    int64_t stopped_at = 0;
    read_csv_rows(folder + "/log.csv", INT64_MAX, [&](int64_t step, const std::string&) { stopped_at = step; });
    expect(fs::exists(model_path(folder, stopped_at)), "SIGTERM while nobody reads the pipe: no checkpoint");
    close(ends[0]), close(ends[1]);
    succeeds(command, place);
    equal("a pipe that nobody reads");
    for (int turn = 0; turn < lean(1, 10); turn++)
        for (bool terminal : {false, true})
            for (bool ignored : {false, true}) {
                std::string what = format("the %s goes away%s", terminal ? "terminal" : "pipe's reader",
                                          ignored ? ", which is ignored" : "");
                Reader reader(terminal);
                Process process(command, place.path, {}, [&] {
                    signal(terminal ? SIGHUP : SIGPIPE, ignored ? SIG_IGN : SIG_DFL);
                    reader.prepare();
                });
                reader.read_and_leave();
                Result r = process.wait();
                expect(r.code == 0 && r.err.empty(), format("%s: exit %d, %s", what.c_str(), r.code, r.err.c_str()));
                int64_t last = 0;
                read_csv_rows(folder + "/log.csv", INT64_MAX, [&](int64_t step, const std::string&) { last = step; });
                expect(fs::exists(model_path(folder, last)) && (last == STEPS || !ignored),
                       format("%s: ended at step %lld without its checkpoint", what.c_str(), (long long)last));
                left += last < STEPS;
                succeeds(command, place);
                equal(what);
            }
    expect(left > 0, "no run was stopped");
    return format("%lld starts with streams closed, a full device, %lld runs stopped as their reader had gone",
                  (long long)starts, (long long)left);
}

}  // namespace
