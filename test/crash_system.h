// crash_system.h: cases of crash_test.cpp in which the system around a run changes: its limits, its clock, its streams.
#pragma once

#include <sys/resource.h>

#include "crash_run.h"

namespace {

// Lines on stderr that are no warnings: a run that fails has one.
int lines_of_errors(const std::string& err) {
    int lines = 0;
    std::stringstream in(err);
    for (std::string line; std::getline(in, line);)
        lines += !line.starts_with("warning: ") && !line.starts_with("skipping a checkpoint: ");
    return lines;
}

void nothing_half_written(const std::string& folder, const std::string& what) {
    std::error_code gone;
    for (const auto& entry : fs::directory_iterator(folder, gone))
        expect(entry.path().extension() != ".tmp", what + ": " + entry.path().string() + " is left over");
}

// What a fault may do to a run: one line and exit 1, or nothing. Without the fault it goes on, and ends equal. Returns
// whether it had ended with the line.
bool fails_or_survives(const Result& r, const Words& command, const Place& place, const std::string& whole,
                       const std::string& folder, const std::string& what, int steps) {
    expect(r.code == 0 || (r.code == 1 && lines_of_errors(r.err) == 1),
           format("%s: exit %d, %s", what.c_str(), r.code, r.err.c_str()));
    nothing_half_written(folder, what);
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
                            {"address space", RLIMIT_AS, 0, 4 * MiB, "2"}};
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
                Process process(command(limited), place.path, {{"OMP_NUM_THREADS", limit.threads}}, [&] {
                    as_user(user)();
                    if (!at_start) return;
                    // The loader, which is not ours, takes 4 files and 16 MiB.
                    low += of_space ? 16 * MiB : limit.resource == RLIMIT_NOFILE ? 4 : 0;
                    rlimit set = {low, low};
                    setrlimit(limit.resource, &set);
                });
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

}  // namespace
