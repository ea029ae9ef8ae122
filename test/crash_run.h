// crash_run.h: what the cases of crash_test.cpp share: a trainer's process, a run's folder, what is compared.
#pragma once

#include <poll.h>
#include <sys/wait.h>

#include <chrono>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <sstream>
#include <thread>

#include "files.h"
#include "keel/checkpoint.h"
#include "long.h"

namespace {

namespace fs = std::filesystem;

std::string trainer = "./train_keel_cpu", shim = "build/crash_shim.so";
std::mt19937_64 dice;

double uniform(double least, double most) { return least + (most - least) * double(dice() >> 11) * 0x1p-53; }
bool coin() { return dice() & 1; }
void wait_for(double s) { std::this_thread::sleep_for(std::chrono::duration<double>(s)); }

// ----------------------------------------------------------------------------------------------------
// Cases, and what they found

int passed = 0, failed = 0, skipped = 0;
std::vector<std::string> faults;  // of the case that runs
std::set<std::string> chosen;     // names on the command line; empty: all

void fault(const std::string& what) {
    if (faults.size() < 10) faults.push_back(what);
}
bool expect(bool true_, const std::string& what) {
    if (!true_) fault(what);
    return true_;
}

struct Skip { std::string why; };

void test_case(const char* name, const std::function<std::string()>& body) {
    if (!chosen.empty() && !chosen.count(name)) return;
    faults.clear();
    double start = seconds();
    std::string summary;
    try {
        summary = body();
    } catch (const Skip& skip) {
        skipped++;
        printf("SKIPPED: %s: %s\n", name, skip.why.c_str());
        return;
    } catch (const std::exception& e) {
        fault(e.what());
    }
    (faults.empty() ? passed : failed)++;
    printf("%-12s %s: %s (%.1f s)\n", name, faults.empty() ? "ok" : "FAILED", summary.c_str(), seconds() - start);
    for (const std::string& what : faults) printf("    %s\n", what.c_str());
    fflush(stdout);
}

// ----------------------------------------------------------------------------------------------------
// A trainer's process

// What the new process does before it becomes the trainer.
using Prepare = std::function<void()>;
Prepare as_user(uid_t user) {
    return [=] {
        if (user && setuid(user) != 0) _exit(126);
    };
}

class Process {
public:
    // stdout goes to a file of the folder, unless `prepare` puts something else there; stderr into a pipe, as a limit
    // of file sizes must not keep the trainer from saying so.
    Process(const Words& words, const std::string& folder, const std::map<std::string, std::string>& environment = {},
            const Prepare& prepare = {})
        : out_path(folder + "/stdout") {
        int out = open(out_path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666), ends[2];
        if (out < 0 || pipe2(ends, O_CLOEXEC) != 0) fail("%s: %s", out_path, errno_text());
        child = fork();
        if (child == 0) {
            for (const auto& [name, value] : environment) setenv(name.c_str(), value.c_str(), 1);
            if (!getenv("OMP_NUM_THREADS")) setenv("OMP_NUM_THREADS", "1", 1);  // such a small model is faster so
            dup2(out, 1), dup2(ends[1], 2);
            if (prepare) prepare();
            for (int fd = 3; fd < 256; fd++) close(fd);  // make's, for one
            exec_words(words);
        }
        close(out), close(ends[1]);
        err_end = ends[0];
    }
    ~Process() {
        if (!ended) kill(child, SIGKILL), waitpid(child, nullptr, 0);
        close(err_end);
    }
    Process(const Process&) = delete;
    Process& operator=(const Process&) = delete;

    pid_t id() const { return child; }
    void send(int number) { kill(child, number); }
    bool runs() {
        if (!ended && waitpid(child, &final_status, WNOHANG) == child) ended = true;
        return !ended;
    }
    // What it has written to stderr so far.
    const std::string& err() {
        char buffer[4096];
        for (pollfd p = {err_end, POLLIN, 0}; poll(&p, 1, 0) == 1;) {
            ssize_t n = read(err_end, buffer, sizeof buffer);
            if (n <= 0) break;
            err_text.append(buffer, size_t(n));
        }
        return err_text;
    }
    // Waits until it has printed the text; false if it ended before.
    bool wait_for_output(const std::string& text) {
        bool running;
        do {
            running = runs();
            if (slurp(out_path).find(text) != std::string::npos) return true;
            wait_for(0.001);
        } while (running);
        return false;
    }
    // Until a checkpoint is being written to the folder, or the time is over.
    void wait_for_writing(const std::string& folder, double most) {
        auto writing = [&] {
            std::error_code gone;
            for (fs::directory_iterator entry(folder, gone), end; entry != end && !gone; entry.increment(gone))
                if (entry->path().filename().string().ends_with(".bin.tmp")) return true;
            return false;
        };
        for (double end = seconds() + most; !writing() && seconds() < end;) wait_for(0.0001);
    }
    // Half of the time any moment, half of the time one while a checkpoint is being written.
    void wait_for_a_moment(const std::string& folder, double duration) {
        double start = seconds();
        wait_for(uniform(0, duration));
        if (coin()) return;
        wait_for_writing(folder, start + 2 * duration - seconds());
        wait_for(uniform(0, 0.002));
    }
    // Its end; a process that has none is ended, and found at fault.
    Result wait() {
        for (double end = seconds() + 120; runs(); wait_for(0.001)) {
            err();  // else it waits for room in the pipe
            if (seconds() < end) continue;
            fault("it hangs: " + slurp(out_path) + err());
            kill(child, SIGKILL), waitpid(child, &final_status, 0), ended = true;
        }
        int status = final_status;
        return {WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status), slurp(out_path), err()};
    }

private:
    std::string out_path, err_text;
    pid_t child;
    int err_end;
    bool ended = false;
    int final_status = 0;
};

// ----------------------------------------------------------------------------------------------------
// A run: a folder, and what is compared

struct Place {
    std::string path, text;
    explicit Place(const char* parent = "/tmp") {
        std::string name = format("%s/keel_crash_XXXXXX",
                                  access("/dev/shm", W_OK) == 0 || strcmp(parent, "/dev/shm") ? parent : "/tmp");
        if (!mkdtemp(name.data())) fail("%s: cannot be made", name.c_str());
        path = name, text = path + "/text.txt";
        std::string content;
        for (int i = 0; content.size() < 6000; i++) content += format("line %d of %d, ", i * i % 97, i);
        spill(text, content);
        chmod(path.c_str(), 0755);
    }
    ~Place() { fs::remove_all(path); }
    std::string operator/(const std::string& name) const { return path + "/" + name; }
    Words command(const std::string& out, const Words& more = {}, int steps = 120, int checkpoint_every = 7) const {
        Words words = {trainer, "-i", text, "-L", "4",  "-C", "16", "-H", "2",  "-t", "8",
                       "-b",    "2",  "-d", "32", "-v", "5",  "-s", "0",  "-y", "-o", out};
        words.insert(words.end(), {"-x", std::to_string(steps), "-n", std::to_string(checkpoint_every)});
        words.insert(words.end(), more.begin(), more.end());
        return words;
    }
};

Result succeeds(const Words& words, const Place& place) {
    Result r = Process(words, place.path).wait();
    std::string command;
    for (const std::string& word : words) command += word + " ";
    expect(r.code == 0, format("%s: exit %d, %s", command.c_str(), r.code, r.err.c_str()));
    return r;
}

// Of two finished runs; counts as one mismatch whatever differs.
bool same_run(const std::string& a, const std::string& b, const std::string& what, int steps = 120) {
    bool same = expect(slurp(model_path(a, steps)) == slurp(model_path(b, steps)) && fs::exists(model_path(a, steps)),
                       what + ": the final models differ");
    same &= expect(slurp(state_path(a, steps)) == slurp(state_path(b, steps)), what + ": the final states differ");
    bool same_log = log_without_times(a + "/log.csv") == log_without_times(b + "/log.csv");
    return same & expect(same_log, what + ": the logs differ");
}

// The step of the last line "checkpoint | .../state_..." (or "resuming"), -1 where there is none: what the trainer has
// promised.
int64_t last_named_step(const std::string& out, const char* word) {
    long long step = -1;
    std::stringstream in(out);
    for (std::string line; std::getline(in, line);)
        if (size_t at = line.find("/state_"); line.starts_with(word) && at != std::string::npos)
            sscanf(line.c_str() + at, "/state_%lld_", &step);
    return step;
}

// What must be so each time a run goes on: no error, and not from before the last checkpoint that it had said was
// written.
void check_resume(const Result& r, int64_t promised, const std::string& what) {
    expect(r.code == 0 || r.code == -SIGKILL, format("%s: exit %d, %s", what.c_str(), r.code, r.err.c_str()));
    int64_t from = last_named_step(r.out, "resuming");
    if (r.out.find("training   ") != std::string::npos && (from >= 0 || r.out.find("step ") != std::string::npos))
        expect(from >= promised, format("%s: resumed from step %lld, and had been told of %lld", what.c_str(),
                                        (long long)from, (long long)promised));
}

// Lines on stderr that are no warnings: a run that fails has one.
int lines_of_errors(const std::string& err) {
    int lines = 0;
    std::stringstream in(err);
    for (std::string line; std::getline(in, line);)
        lines += !line.starts_with("warning: ") && !line.starts_with("skipping a checkpoint: ");
    return lines;
}

bool one_line(const Result& r, const char* words) {
    return expect(r.code == 1 && std::count(r.err.begin(), r.err.end(), '\n') == 1 &&
                      r.err.find(words) != std::string::npos,
                  format("expected exit 1 and one line with '%s', found %d and '%s'", words, r.code, r.err.c_str()));
}

}  // namespace
