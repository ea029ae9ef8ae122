// A run is never lost on a GPU: the real GPU trainer on the CPU headers, with one CUDA or cuBLASLt call that fails, at
// every place that makes one. CUDA_ON_CPU_CALLS lists the calls of an undisturbed run, CUDA_ON_CPU_FAIL fails one.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
#include <sys/wait.h>

#include <map>
#include <set>

#include "files.h"
#include "keel_common.h"
#include "long.h"

namespace {

namespace fs = std::filesystem;
using Environment = std::map<std::string, std::string>;
using Files = std::map<std::string, std::string>;  // names and contents

// A program that runs for longer than a minute hangs: it is killed, and its code is -SIGKILL.
Result run(const Words& words, const Environment& environment = {}) {
    char out_name[] = "/tmp/keel_out_XXXXXX", err_name[] = "/tmp/keel_err_XXXXXX";
    int out = mkstemp(out_name), err = mkstemp(err_name);
    pid_t child = fork();
    if (child == 0) {
        for (const char* threads : {"OMP_NUM_THREADS", "CUDA_ON_CPU_THREADS"}) setenv(threads, "1", 1);
        setenv("CUDA_ON_CPU_PROTECT", "0", 1);  // costs system calls
        for (const auto& [name, value] : environment) setenv(name.c_str(), value.c_str(), 1);
        dup2(out, 1), dup2(err, 2);
        std::vector<char*> argv;
        for (const std::string& word : words) argv.push_back(const_cast<char*>(word.c_str()));
        argv.push_back(nullptr);
        execv(argv[0], argv.data());
        _exit(127);
    }
    close(out), close(err);
    int status = 0;
    for (int ms = 0; waitpid(child, &status, WNOHANG) == 0; ms++, usleep(1000))
        if (ms == 60000) kill(child, SIGKILL);
    Result r{WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status), slurp(out_name), slurp(err_name)};
    unlink(out_name), unlink(err_name);
    return r;
}

struct Place {
    std::string path;
    Place() {
        char name[] = "/tmp/keel_device_XXXXXX";
        REQUIRE(mkdtemp(name));
        path = name;
        std::string content;
        for (int i = 0; content.size() < 4000; i++) content += format("line %d of %d, ", i * i % 97, i);
        spill(path + "/text.txt", content);
    }
    ~Place() { fs::remove_all(path); }
    std::string operator/(const std::string& name) const { return path + "/" + name; }
};

Words operator+(Words words, const Words& more) {
    words.insert(words.end(), more.begin(), more.end());
    return words;
}

const char *fp32 = "build/train_keel_fp32_on_cpu", *bf16 = "build/train_keel_on_cpu";

// Three micro-batches a step; two steps are in flight at 1, 2 and 4.
Words tiny(const char* binary, const Place& p) {
    bool wide = binary == bf16;
    return {binary, "-i", p / "text.txt", "-L", "2",  "-C", wide ? "64" : "8", "-H",     wide ? "4" : "2",
            "-t",   "8",  "-b",           "2",  "-d", "48", "-x",              "7",      "-n",
            "3",    "-v", "3",            "-m", "1",  "-s", "5",               "-g",     "2",
            "--keep", "0"};
}

// What lies in a folder; of logs what does not depend on the clock.
Files files_of(const std::string& folder) {
    Files files;
    std::error_code ignored;
    for (const auto& entry : fs::directory_iterator(folder, ignored)) {
        std::string name = entry.path().filename();
        files[name] = name == "log.csv" ? log_without_times(entry.path()) : slurp(entry.path());
    }
    return files;
}

// A file that is half-written or not whole, "" where there is none.
std::string damaged_file(const Files& files) {
    for (const auto& [name, content] : files) {
        if (name.ends_with(".tmp")) return name;
        if (!name.ends_with(".bin")) continue;
        uint32_t sum = 0;
        size_t body = content.size() - std::min(content.size(), sizeof sum);
        memcpy(&sum, content.data() + body, content.size() - body);
        if (content.size() < 1024 || crc32(content.data(), body) != sum) return name;
    }
    return "";
}

// Whether what an undisturbed run leaves is there; a run that was stopped may leave checkpoints of more steps.
std::string missing_file(const Files& files, const Files& undisturbed) {
    for (const auto& [name, content] : undisturbed)
        if (auto found = files.find(name); found == files.end() || found->second != content) return name;
    return "";
}

struct Call {
    std::string number, name;
    std::string place;  // return addresses, innermost first
};
std::vector<Call> calls_of(const std::string& list) {
    std::vector<Call> calls;
    std::ifstream in(list);
    for (std::string line; std::getline(in, line);) {
        std::stringstream words(line);
        Call call;
        words >> call.number >> call.name;
        std::getline(words, call.place);
        calls.push_back(call);
    }
    return calls;
}

// One of the calls from each place that no earlier test has had: with LONG=1 places differ where any caller does, else
// where one of the innermost does.
std::vector<Call> a_call_of_each_place(const char* binary, const std::vector<Call>& calls) {
    static std::set<std::string> seen;
    std::map<std::string, std::vector<Call>> by_place;
    for (const Call& call : calls) {
        size_t end = 0;
        for (int depth = 0; depth < lean(4, 64) && end != std::string::npos; depth++) end = call.place.find(' ', end + 1);
        by_place[binary + call.name + call.place.substr(0, end)].push_back(call);
    }
    std::vector<Call> chosen;
    for (const auto& [place, of_place] : by_place)
        if (seen.insert(place).second) chosen.push_back(of_place[of_place.size() / 2]);
    return chosen;
}

// Calls whose failure costs a run nothing: they free, they tell a version, or they are made beside an error.
bool may_be_survived(const std::string& call) {
    for (const char* part : {"Free", "Destroy", "GetVersion"})
        if (call.find(part) != std::string::npos) return true;
    return call == "cudaMallocHost"           // the snapshot for checkpoints
           || call == "cudaStreamSynchronize";  // in the trainer's destructor
}

std::string faults(const Call& call, bool stays) { return call.number + (stays ? "+" : ""); }

// That a program has ended by one line, which names the call or what it was to get. `stays`: as later calls fail too,
// it may be one of those.
void check_ending(const Result& r, const Call& call, bool stays) {
    std::string line;
    int lines = 0;
    std::stringstream in(r.err);
    for (std::string one; std::getline(in, one);)
        if (!one.starts_with("warning: ")) line = one, lines++;
    auto has = [&](const std::string& part) { return line.find(part) != std::string::npos; };
    bool named = has(call.name) || has("GPU memory: ") || has("page-locked memory: ") || has("an NVIDIA GPU");
    if (stays) named = named || has("cuda") || has("cublasLt");
    CHECK_MESSAGE(r.code == 1, call.number, " ", call.name, ": ", r.code, "\n", r.err);
    CHECK_MESSAGE((lines == 1 && named && has("; ")), call.number, " ", call.name, ":\n", r.err);
}

struct Counts {
    int ended = 0, survived = 0;
    void print(const std::string& what, size_t calls) const {
        printf("%-48s %5zu calls, %4d failed: %4d ended with a line, %3d survived with equal results\n", what.c_str(),
               calls, ended + survived, ended, survived);
        fflush(stdout);
    }
};

// Fails calls of a run that trains. all: every call, in both ways; else those of new places, in the two ways by turns.
void fail_training(const std::string& what, const Words& words, const Place& p, bool all = false,
                   const Environment& environment = {}) {
    const std::string folder = p / "run";
    Words fresh = words + Words{"-o", folder}, resume = fresh + Words{"-y"};
    Environment listing = environment;
    listing["CUDA_ON_CPU_CALLS"] = p / "calls";
    Result whole = run(fresh, listing);
    REQUIRE_MESSAGE((whole.code == 0 && whole.err.empty()), whole.err);
    const Files undisturbed = files_of(folder);
    std::vector<Call> calls = calls_of(p / "calls"), chosen = all ? calls : a_call_of_each_place(words[0].c_str(), calls);
    std::map<Files, std::string> resumed;  // what a resume from such a folder lacks: equal folders end alike
    Counts counts;
    for (size_t i = 0; i < chosen.size(); i++)
        for (bool stays : {false, true}) {
            if (!long_tests() && stays != (i % 2 == 1)) continue;
            const Call& call = chosen[i];
            CAPTURE(call.place);
            fs::remove_all(folder);
            Environment failing = environment;
            failing["CUDA_ON_CPU_FAIL"] = faults(call, stays);
            Result r = run(fresh, failing);
            Files left = files_of(folder);
            CHECK_MESSAGE(damaged_file(left) == "", call.number, " ", call.name);
            if (r.code == 0) {
                counts.survived++;
                CHECK_MESSAGE(may_be_survived(call.name), call.number, " ", call.name);
                CHECK_MESSAGE((r.err.empty() && left == undisturbed), call.number, " ", call.name, "\n", r.err);
                continue;
            }
            counts.ended++;
            check_ending(r, call, stays);
            auto [at, is_new] = resumed.try_emplace(left);
            if (is_new) {
                Result again = run(resume, environment);
                at->second = again.code == 0 ? missing_file(files_of(folder), undisturbed) : again.err;
            }
            CHECK_MESSAGE(at->second == "", call.number, " ", call.name);
        }
    counts.print(what, calls.size());
}

// Fails calls of a program that writes at most one file. Where it ends by an error, that file is not there.
void fail_once(const std::string& what, const Words& words, const std::string& made = "") {
    Place p;
    Result whole = run(words, {{"CUDA_ON_CPU_CALLS", p / "calls"}});
    REQUIRE_MESSAGE(whole.code == 0, whole.err);
    const std::string undisturbed = slurp(made);
    std::vector<Call> calls = calls_of(p / "calls"), chosen = a_call_of_each_place(words[0].c_str(), calls);
    Counts counts;
    for (size_t i = 0; i < chosen.size(); i++)
        for (bool stays : {false, true}) {
            if (!long_tests() && stays != (i % 2 == 1)) continue;
            const Call& call = chosen[i];
            CAPTURE(call.place);
            unlink(made.c_str());
            Result r = run(words, {{"CUDA_ON_CPU_FAIL", faults(call, stays)}});
            CHECK_FALSE(fs::exists(made + ".tmp"));
            if (r.code == 0) {
                counts.survived++;
                CHECK_MESSAGE(may_be_survived(call.name), call.number, " ", call.name);
                CHECK_MESSAGE((r.out == whole.out && slurp(made) == undisturbed), call.number, " ", call.name);
                continue;
            }
            counts.ended++;
            check_ending(r, call, stays);
            CHECK_MESSAGE(slurp(made) == "", call.number, " ", call.name);
        }
    counts.print(what, calls.size());
}

}  // namespace

TEST_CASE("A CUDA or cuBLASLt call that fails ends a run by one line, and -y goes on to the same bits") {
    Place p;
    fail_training("training, FP32", tiny(fp32, p), p, long_tests());
}
