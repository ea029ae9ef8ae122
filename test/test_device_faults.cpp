// A run is never lost on a GPU: the real GPU trainer on the CPU headers, with one CUDA or cuBLASLt call that fails, at
// every place that makes one. CUDA_ON_CPU_CALLS lists the calls of an undisturbed run, CUDA_ON_CPU_FAIL fails one.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
#include <sys/wait.h>

#include <array>
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
        exec_words(words);
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

// Three micro-batches a step; two steps are in flight at 1, 2 and 4. other: flags in place of these or beside them.
Words tiny(const char* binary, const Place& p, const std::map<std::string, std::string>& other = {}) {
    std::map<std::string, std::string> flags = {{"-i", p / "text.txt"}};
    std::string shape = "-L 2 -C 8 -H 2 -t 8 -b 2 -d 48", run = " -x 7 -n 3 -v 3 -m 1 -s 5 -g 2 --keep 0";
    std::stringstream in(other.count("--dump") ? shape : shape + run);
    for (std::string flag, value; in >> flag >> value;) flags[flag] = value;
    if (binary == bf16) flags["-C"] = "64", flags["-H"] = "4";
    for (const auto& [flag, value] : other) flags[flag] = value;
    Words words = {binary};
    for (const auto& [flag, value] : flags) words = words + Words{flag, value};
    return words;
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

// Whether a table of --tune ends with its last row, and each row has all columns.
bool whole_lines(const std::string& table) {
    std::stringstream in(table);
    for (std::string line; std::getline(in, line);)
        if (std::count(line.begin(), line.end(), ',') != 12) return false;
    return table.empty() || table.back() == '\n';
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

// Which calls to fail: one from each place that no earlier test has had, or all.
struct Choice {
    int depth = 4;          // places differ where one of so many innermost addresses does; with LONG=1 where any does
    bool all = false;       // each call, in both ways; else, without LONG=1, the two ways by turns
    const char* part = "";  // of the calls' names
};
std::vector<Call> chosen_calls(const char* binary, const std::vector<Call>& calls, const Choice& choice) {
    static std::set<std::string> seen;
    std::map<std::string, std::vector<Call>> by_place;
    for (const Call& call : calls) {
        size_t end = 0;
        bool frees = call.name.find("Free") != std::string::npos;  // the most, and survived
        for (int i = 0; i < lean(choice.depth - frees, 64) && end != std::string::npos; i++)
            end = call.place.find(' ', end + 1);
        std::string place = choice.all ? call.number : call.place.substr(0, end);
        if (call.name.find(choice.part) != std::string::npos) by_place[binary + call.name + place].push_back(call);
    }
    std::vector<Call> chosen;
    for (const auto& [place, of_place] : by_place)
        if (seen.insert(place).second) chosen.push_back(of_place[of_place.size() / 2]);
    return chosen;
}

// Whether a call's failure may cost a run nothing: it frees, tells a version, is made in the trainer's destructor, or
// is for the snapshot of checkpoints, without which training waits.
bool may_be_survived(const Call& call, const Result& r) {
    for (const char* part : {"Free", "Destroy", "GetVersion", "cudaStreamSynchronize"})
        if (call.name.find(part) != std::string::npos) return true;
    return call.name == "cudaMallocHost" && r.out.find("no snapshot (cudaMallocHost: ") != std::string::npos;
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
    bool named = has(call.name) || (call.name == "cudaGetDeviceCount" && has("an NVIDIA GPU"));
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

// Fails calls of a run that trains.
void fail_training(const std::string& what, const Words& words, const Place& p, const Choice& choice = {}) {
    const std::string folder = p / "run", table = p / "tune.csv";
    Words fresh = words + Words{"-o", folder}, resume = fresh + Words{"-y"};
    auto run_fresh = [&](const char* setting, const std::string& value) {
        fs::remove_all(folder), fs::remove(table);
        return run(fresh, {{setting, value}});
    };
    Result whole = run_fresh("CUDA_ON_CPU_CALLS", p / "calls");
    REQUIRE_MESSAGE((whole.code == 0 && whole.err.empty()), whole.err);
    const Files undisturbed = files_of(folder);
    std::vector<Call> calls = calls_of(p / "calls"), chosen = chosen_calls(words[0].c_str(), calls, choice);
    std::map<Files, std::string> resumed;  // what a resume from such a folder lacks: equal folders end alike
    Counts counts;
    for (size_t i = 0; i < chosen.size(); i++)
        for (bool stays : {false, true}) {
            if (!long_tests() && stays != (i % 2 == 1)) continue;
            const Call& call = chosen[i];
            CAPTURE(call.place);
            Result r = run_fresh("CUDA_ON_CPU_FAIL", faults(call, stays));
            Files left = files_of(folder);
            CHECK_MESSAGE(damaged_file(left) == "", call.number, " ", call.name);
            CHECK_MESSAGE((!fs::exists(table + ".tmp") && whole_lines(slurp(table))), slurp(table));
            if (r.code == 0) {
                counts.survived++;
                CHECK_MESSAGE(may_be_survived(call, r), call.number, " ", call.name);
                CHECK_MESSAGE((r.err.empty() && left == undisturbed), call.number, " ", call.name, "\n", r.err);
                continue;
            }
            counts.ended++;
            check_ending(r, call, stays);
            auto [at, is_new] = resumed.try_emplace(left);
            if (is_new) {
                Result again = run(resume);
                at->second = again.code == 0 ? missing_file(files_of(folder), undisturbed) : again.err;
            }
            CHECK_MESSAGE(at->second == "", call.number, " ", call.name);
        }
    counts.print(what, calls.size());
}

// Fails calls of a program that trains nothing and writes at most one file: where it ends by an error, that file is not
// there.
void fail_other(const std::string& what, const Words& words, const std::string& made = "") {
    Place p;
    Result whole = run(words, {{"CUDA_ON_CPU_CALLS", p / "calls"}});
    REQUIRE_MESSAGE(whole.code == 0, whole.err);
    const std::string undisturbed = slurp(made);
    std::vector<Call> calls = calls_of(p / "calls"), chosen = chosen_calls(words[0].c_str(), calls, {});
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
                CHECK_MESSAGE(may_be_survived(call, r), call.number, " ", call.name);
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
    fail_training("training", tiny(fp32, p), p, {.all = long_tests()});
    fail_training("--probe, -r layer", tiny(fp32, p, {{"--probe", "2"}, {"-r", "layer"}, {"-s", "0"}}), p);
    fail_training("-r K", tiny(fp32, p, {{"-L", "4"}, {"-r", "2"}, {"-s", "0"}}), p);
    fail_training("BF16 with its moments and gradients, --tune",
                  tiny(bf16, p, {{"--moments", "bf16"}, {"--grads", "bf16"}, {"--tune", p / "tune.csv"}, {"-x", "2"}}),
                  p, {.depth = 3});
}

// With 1024 rows the sums of weight gradients are split, and in BF16 a product goes through GELU.
TEST_CASE("A failure of cuBLASLt is not taken for its answer that it cannot: the products would have other bits") {
    Place p;
    fail_training("products with split sums and GELU",
                  tiny(bf16, p, {{"-t", "32"}, {"-b", "32"}, {"-d", "1024"}, {"-x", "1"}, {"-v", "0"}, {"-s", "0"}}), p,
                  {.depth = 64, .part = "Algo"});
}

TEST_CASE("A CUDA or cuBLASLt call that fails ends --dump, --check, --ablate and sampling by one line, and leaves no "
          "file") {
    Place p;
    Words train = tiny(fp32, p, {{"-x", "1"}, {"-o", p / "run"}}), dump = tiny(fp32, p, {{"--dump", p / "dump"}});
    REQUIRE(run(train).code == 0);
    const std::string model = p / "run/model_00000001.bin";
    fail_other("--dump", dump, p / "dump");
    REQUIRE(run(dump).code == 0);
    fail_other("--check", {fp32, "--check", p / "dump"});
    fail_other("sampling", {fp32, "-e", model, "--prompt", "line", "-g", "3"});
    fail_other("--ablate", {fp32, "-e", model, "--ablate", "all", "-i", p / "text.txt", "-m", "1"});
}

TEST_CASE("--tune and --dump in a folder that is gone end by one line, not by an exception") {
    Place p;
    for (const char* flag : {"--tune", "--dump"}) {
        std::string line = format("mkdir %s && cd %s && rmdir %s && exec", p / "gone", p / "gone", p / "gone");
        Words words = tiny(fp32, p, {{flag, "file"}});
        words[0] = fs::absolute(fp32);
        for (const std::string& word : words) line += " " + word;
        Result r = run({"sh", "-c", line});
        CHECK_MESSAGE((r.code == 1 && std::count(r.err.begin(), r.err.end(), '\n') == 1 &&
                       r.err.find(format("%s: expected a folder", flag)) != std::string::npos),
                      r.code, r.err);
    }
}

TEST_CASE("A CUDA call that fails while a checkpoint is written leaves it whole, and the one before") {
    Place p;
    const std::string folder = p / "run";
    const Environment slow_disk = {{"LD_PRELOAD", "build/crash_shim.so"}, {"CRASH_FSYNC_MS", "40"}};
    Words fresh = tiny(fp32, p, {{"-v", "0"}, {"-s", "0"}, {"--keep", "1"}, {"-o", folder}});
    Environment listing = slow_disk;
    listing["CUDA_ON_CPU_CALLS"] = p / "calls";
    Result whole = run(fresh, listing);
    REQUIRE_MESSAGE(whole.code == 0, whole.err);
    const Files undisturbed = files_of(folder);
    std::vector<Call> calls = calls_of(p / "calls");
    int failed = 0, written_meanwhile = 0;
    for (size_t i = calls.size() / 2; i < calls.size(); i += lean(calls.size() / 20, calls.size() / 200)) {
        if (may_be_survived(calls[i], {})) continue;
        fs::remove_all(folder);
        Environment failing = slow_disk;
        failing["CUDA_ON_CPU_FAIL"] = faults(calls[i], true);
        Result r = run(fresh, failing);
        Files left = files_of(folder);
        failed++;
        check_ending(r, calls[i], true);
        CHECK(damaged_file(left) == "");
        for (int step : {3, 6}) {  // the older one goes when the newer one is whole
            bool told = r.out.find(format("checkpoint | %s/state_%08d", folder, step)) != std::string::npos;
            bool there = left.count(format("state_%08d_00000.bin", step)) == 1;
            if (told) CHECK((there || left.count("state_00000006_00000.bin") == 1));
            written_meanwhile += !told && there;
        }
        Result again = run(fresh + Words{"-y"});
        CHECK_MESSAGE((again.code == 0 && missing_file(files_of(folder), undisturbed) == ""), again.err);
    }
    CHECK(written_meanwhile > 0);
    printf("%d failed on a slow disk, %d of them while a checkpoint was written\n", failed, written_meanwhile);
}

TEST_CASE("SIGTERM at any call: the run writes a checkpoint of the last step that its log has, and -y ends equal") {
    Place p;
    const std::string folder = p / "run";
    Words fresh = tiny(fp32, p, {{"-o", folder}});
    Result whole = run(fresh, {{"CUDA_ON_CPU_CALLS", p / "calls"}});
    REQUIRE_MESSAGE(whole.code == 0, whole.err);
    const Files undisturbed = files_of(folder);
    std::vector<Call> calls = calls_of(p / "calls");
    int stopped = 0, too_late = 0, too_early = 0;
    for (size_t i = 0; i < calls.size(); i += calls.size() / lean<size_t>(24, 200)) {
        fs::remove_all(folder);
        Result r = run(fresh, {{"CUDA_ON_CPU_SIGNAL", calls[i].number}});
        Files left = files_of(folder);
        CAPTURE(calls[i].number);
        CAPTURE(calls[i].name);
        CHECK(damaged_file(left) == "");
        CHECK_MESSAGE(r.err.empty(), r.err);
        size_t at = r.out.find("stopping   after step ");
        if (r.code == -SIGTERM) {
            too_early++;  // before its first step a run has nothing to lose
            CHECK(r.out.find("\nstep ") == std::string::npos);
        } else if (at == std::string::npos) {
            too_late++;
            bool cut = r.out.find("is left to -y") != std::string::npos;
            CHECK((r.code == 0 && (cut || left == undisturbed)));
        } else {
            stopped++;
            int step = atoi(r.out.c_str() + at + strlen("stopping   after step "));
            const std::string& log = left["log.csv"];
            CHECK(r.code == 0);
            CHECK(log.find(format("\n%d,", step + 1)) == std::string::npos);
            if (step > 0) CHECK(log.find(format("\n%d,", step)) != std::string::npos);
            if (step > 0) CHECK(left.count(format("state_%08d_00000.bin", step)) == 1);
        }
        Result again = run(fresh + Words{"-y"});
        CHECK_MESSAGE((again.code == 0 && missing_file(files_of(folder), undisturbed) == ""), again.err);
    }
    CHECK(stopped > 0);
    printf("%d stopped by a signal and went on to equal results, %d ended before it, %d had no step yet\n", stopped,
           too_late, too_early);
}

TEST_CASE("A call that fails on one of two ranks ends both by a line that names it, and -y goes on to equal results") {
    std::string launcher;
    FILE* pipe = popen("[ -z \"$(dev/tools/mpi.sh compile)\" ] || dev/tools/mpi.sh mpirun 1", "r");
    for (int c; pipe && (c = getc(pipe)) != EOF;) launcher += char(c);
    if (pipe) pclose(pipe);
    if (launcher.empty()) return;
    Place p;
    const std::string folder = p / "run";
    const Words rank = tiny(fp32, p, {{"-d", "64"}, {"-z", "1"}, {"-o", folder}});
    // settings: of rank 0 and of rank 1, for env
    auto run_ranks = [&](const std::array<Words, 2>& settings, const Words& more) {
        std::stringstream in(launcher);
        Words words;
        for (std::string word; in >> word;) words.push_back(word);
        words = words + Words{"env"} + settings[0] + rank + more;
        return run(words + Words{":", "-np", "1", "env"} + settings[1] + rank + more);
    };
    auto list = [&](int r) { return p / format("calls%d", r); };
    Result whole = run_ranks({Words{"CUDA_ON_CPU_CALLS=" + list(0)}, Words{"CUDA_ON_CPU_CALLS=" + list(1)}}, {});
    REQUIRE_MESSAGE(whole.code == 0, whole.err);
    const Files undisturbed = files_of(folder);
    Counts counts;
    size_t made = 0;
    for (size_t r : {0, 1}) {
        std::vector<Call> calls = calls_of(list(int(r)));
        made += calls.size();
        for (int i = 1, n = lean(3, 40); i < n; i++) {
            // The first one of each rank is NCCL's. How often a rank asks for an event, its next calls' numbers and so
            // the call that fails, depend on the other rank.
            size_t at = calls.size() * size_t(i) / size_t(n);
            while (i == 1 && !calls[at].name.starts_with("nccl")) at++;
            fs::remove_all(folder);
            std::array<Words, 2> settings;
            settings[r] = {"CUDA_ON_CPU_FAIL=" + faults(calls[at], i % 2 == 0)};
            Result ended = run_ranks(settings, {});
            Files left = files_of(folder);
            CHECK(damaged_file(left) == "");
            if (ended.code == 0) {
                counts.survived++;
                CHECK(left == undisturbed);
                continue;
            }
            counts.ended++;
            std::string who =
                r == 0 ? "train_keel_fp32_on_cpu: " : "rank 0: rank 1 (process ";  // rank 0 prints for all
            std::string line = ended.err.substr(0, ended.err.find('\n'));
            auto has = [&](const char* part) { return line.find(part) != std::string::npos; };
            CHECK_MESSAGE((line.starts_with(who) && (has("cuda") || has("cublasLt") || has("nccl"))), calls[at].number,
                          " ", calls[at].name, "\n", ended.err);
            Result again = run_ranks({}, {"-y"});
            CHECK_MESSAGE((again.code == 0 && missing_file(files_of(folder), undisturbed) == ""), again.err);
        }
    }
    counts.print("two ranks, -z 1", made);
}
