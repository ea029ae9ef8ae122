// Several ranks: the real binaries under mpirun, the CPU trainer and train_keel.cu on the CPU, whose nccl.h runs over
// MPI; and the parts of keel_common.h that hold ranks together.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include <map>
#include <thread>

#include "files.h"
#include "keel/checkpoint.h"
#include "long.h"

namespace {

namespace fs = std::filesystem;

// A program in the background.
struct Process {
    pid_t child;
    std::string out_name, err_name;

    Process(const Words& words, const std::map<std::string, std::string>& environment = {}) {
        char out[] = "/tmp/keel_out_XXXXXX", err[] = "/tmp/keel_err_XXXXXX";
        int out_fd = mkstemp(out), err_fd = mkstemp(err);
        out_name = out, err_name = err;
        child = fork();
        if (child == 0) {
            for (const char* threads : {"OMP_NUM_THREADS", "CUDA_ON_CPU_THREADS"}) setenv(threads, "1", 1);
            setenv("CUDA_ON_CPU_PROTECT", "0",
                   1);  // system calls for each time the device runs: the tests of what a rank sends have it on
            for (const auto& [name, value] : environment) setenv(name.c_str(), value.c_str(), 1);
            dup2(out_fd, 1), dup2(err_fd, 2);
            exec_words(words);
        }
        close(out_fd), close(err_fd);
    }
    Result wait() {
        int status = 0;
        waitpid(child, &status, 0);
        Result r{WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status), slurp(out_name), slurp(err_name)};
        unlink(out_name.c_str()), unlink(err_name.c_str());
        return r;
    }
    // Waits until the program has printed the words; false if it ends before, or hangs for ten minutes.
    bool prints(const std::string& words) const {
        for (double limit = seconds() + 600; seconds() < limit; usleep(5000)) {
            siginfo_t ended = {};
            waitid(P_PID, id_t(child), &ended, WEXITED | WNOHANG | WNOWAIT);
            if (slurp(out_name).find(words) != std::string::npos) return true;
            if (ended.si_pid == child) return false;
        }
        return false;
    }
};

// `words` as n ranks; 0: alone.
Words on_ranks(int n, const Words& words, const Words& options = {}) {
    if (n == 0) return words;
    static const std::string launcher = [] {
        FILE* pipe = popen("dev/tools/mpi.sh mpirun N", "r");
        char line[256] = "";
        if (!pipe || !fgets(line, sizeof line, pipe)) *line = 0;
        if (pipe) pclose(pipe);
        return std::string(line);
    }();
    Words all;
    std::stringstream in(launcher);
    for (std::string word; in >> word;) all.push_back(word == "N" ? std::to_string(n) : word);
    all.insert(all.end(), options.begin(), options.end());
    all.insert(all.end(), words.begin(), words.end());
    return all;
}

// A file of /proc, "" where its process ends meanwhile.
std::string slurp_proc(const std::string& path) {
    try {
        return slurp(path);
    } catch (const std::exception&) {
        return "";
    }
}

// The processes of the ranks of `binary` that have KEEL_TEST_PLACE=place in their environment.
std::map<int, pid_t> rank_processes(const std::string& binary, const std::string& place) {
    std::map<int, pid_t> found;
    std::error_code ignored;
    for (const auto& entry : fs::directory_iterator("/proc", ignored)) {
        if (atoi(entry.path().filename().c_str()) == 0) continue;
        std::string environment = slurp_proc(entry.path().string() + "/environ"), name = "OMPI_COMM_WORLD_RANK=";
        size_t rank = environment.find(name);
        if (rank == std::string::npos || environment.find("KEEL_TEST_PLACE=" + place) == std::string::npos) continue;
        if (fs::read_symlink(entry.path() / "exe", ignored).filename() != fs::path(binary).filename()) continue;
        found[atoi(environment.c_str() + rank + name.size())] = atoi(entry.path().filename().c_str());
    }
    return found;
}

struct Build {
    const char *name, *binary;
    bool bf16;
    int C;
};
const Build cpu = {"CPU", "./train_keel_cpu", false, 8},
            gpu_fp32 = {"GPU, FP32", "build/train_keel_fp32_on_cpu", false, 8},
            gpu_bf16 = {"GPU, BF16", "build/train_keel_on_cpu", true, 64};
const Build all_builds[] = {cpu, gpu_fp32, gpu_bf16};
// The first `count` of them, or the one that KEEL_TEST_BUILD names by its number. `left_out` is for LONG=1.
std::vector<Build> builds(int count, const Build* left_out = nullptr) {
    if (left_out && !long_tests()) {
        std::vector<Build> some;
        for (const Build& build : builds(count))
            if (build.binary != left_out->binary) some.push_back(build);
        return some;
    }
    if (const char* only = getenv("KEEL_TEST_BUILD"))
        return atoi(only) < count ? std::vector<Build>{all_builds[atoi(only)]} : std::vector<Build>{};
    return {all_builds, all_builds + count};
}

struct Place {
    std::string path, text;
    Place() {
        char name[] = "/tmp/keel_ranks_XXXXXX";
        REQUIRE(mkdtemp(name));
        path = name, text = path + "/text.txt";
        std::string content;
        for (int i = 0; content.size() < 6000; i++) content += format("line %d of %d, ", i * i % 97, i);
        spill(text, content);
    }
    ~Place() { fs::remove_all(path); }
    std::string operator/(const std::string& name) const { return path + "/" + name; }

    // 12 sequences of 8 tokens a step: 4 ranks of micro-batches of one take three micro-steps. Three blocks: at -z 2
    // the first one's gradients come where the third's were.
    Words words(const Build& build, const std::string& out, const Words& more = {}) const {
        Words all = {build.binary, "-i", text, "-L", "6",  "-C", std::to_string(build.C),
                     "-H",         "2",  "-t", "8",  "-d", "96", "-l",
                     "1e-2",       "-v", "0",  "-s", "0",  "-o", path + "/" + out};
        all.insert(all.end(), more.begin(), more.end());
        return all;
    }
    Result run(int n, const Words& command, std::map<std::string, std::string> environment = {}) const {
        environment["KEEL_TEST_PLACE"] = path;
        Result r = Process(on_ranks(n, command), environment).wait();
        std::string text;
        for (const std::string& word : command) text += word + " ";
        REQUIRE_MESSAGE(r.code == 0, n << " ranks: " << text << "\n" << r.out << r.err);
        return r;
    }
    std::vector<double> losses(const std::string& out) const {
        std::vector<double> all;
        read_csv_rows(path + "/" + out + "/log.csv", INT64_MAX, [&](int64_t, const std::string& line) {
            all.push_back(atof(line.c_str() + line.find(',') + 1));
        });
        return all;
    }
    std::string model(const std::string& out, int64_t step) const { return slurp(model_path(path + "/" + out, step)); }
};

// The largest relative difference of two loss curves.
double apart(const std::vector<double>& a, const std::vector<double>& b) {
    if (a.size() != b.size() || a.empty()) return INFINITY;
    double most = 0;
    for (size_t i = 0; i < a.size(); i++) most = std::max(most, std::fabs(a[i] - b[i]) / std::fabs(b[i]));
    return most;
}

ModelConfig config_of(NormPlacement norm, int L, int C, int H) {
    ModelConfig c;
    c.max_seq_len = 8, c.V = 256, c.L = L, c.C = C, c.H = H, c.norm = norm;
    return c;
}

}  // namespace

TEST_SUITE("what ranks own and read") {
    TEST_CASE("Each element belongs to one rank, and a file has as many as its header says") {
        for (int norm = 0; norm < NUM_PLACEMENTS; norm++)
            for (int ranks : {1, 2, 3, 4, 7, 64}) {
                ModelConfig c = config_of(NormPlacement(norm), 6, 24, 3);
                ParameterLayout flat(c), layout(c, ranks);
                std::vector<int> owners(flat.count);
                std::vector<bool> memory(layout.size);
                size_t sum = 0;
                for (int r = 0; r < ranks; r++) {
                    std::vector<bool> shard(layout.shard_size);
                    for (const ShardRange& s : layout.owned(r))
                        for (size_t i = 0; i < s.count; i++) {
                            owners[flat.tensors[s.tensor].offset + s.first + i]++;
                            CHECK(!memory[s.memory + i]);
                            CHECK(!shard[s.shard + i]);
                            memory[s.memory + i] = shard[s.shard + i] = true;
                        }
                    CHECK(layout.owned_count(r) == owned_parameter_count(c, ranks, r));
                    sum += layout.owned_count(r);
                }
                CHECK(sum == flat.count);
                CHECK(std::count(owners.begin(), owners.end(), 1) == int64_t(flat.count));
                for (size_t i = 0; i < flat.tensors.size(); i++)
                    CHECK(layout.tensors[i].file_offset == flat.tensors[i].offset);
            }
    }

    TEST_CASE("The gradients of -z 2 have room for two blocks, which alternate") {
        ParameterLayout layout(config_of(HYBRIDNORM, 10, 24, 3), 3), two = layout.with_two_blocks();
        CHECK(two.size == layout.buckets[0].shard * 3 + 2 * layout.buckets[1].shard * 3);
        for (const TensorInfo& t : two.tensors) {
            size_t u = two.bucket_of(t);
            CHECK(t.offset == two.offset(t.id, t.layer));
            CHECK(t.offset >= two.buckets[u].first);
            CHECK(t.offset + t.size() <= two.buckets[u].first + two.buckets[u].count);
            if (u >= 1) CHECK(two.buckets[u].first == two.buckets[1 + (u - 1) % 2].first);
        }
    }

    TEST_CASE("Ranks read disjoint parts of each batch, together those of one rank") {
        for (int ranks : {1, 2, 3, 4})
            for (int B : {1, 2}) {
                RunConfig run;
                run.T = 8, run.B = B, run.ranks = ranks, run.total_batch = 24 * 8;
                std::vector<int> read(96);
                for (int64_t step = 1; step <= 4; step++)
                    for (run.rank = 0; run.rank < ranks; run.rank++)
                        for (int micro = 0; micro < run.accumulation(); micro++)
                            for (int b = 0; b < B; b++) {
                                size_t s = run.sequence(step, micro) + size_t(b);
                                CHECK(s / 24 == size_t(step - 1));
                                read[s]++;
                            }
                CHECK(std::count(read.begin(), read.end(), 1) == 96);
            }
    }
}

TEST_SUITE("the lifeline, without MPI") {
    // Where processes wait for each other: memory that they share.
    struct Meeting {
        std::atomic<int>* come =
            static_cast<std::atomic<int>*>(mmap(nullptr, sizeof(std::atomic<int>), PROT_READ | PROT_WRITE,
                                                MAP_SHARED | MAP_ANONYMOUS, -1, 0));
        ~Meeting() { munmap(come, sizeof *come); }
        void wait_for(int n) {
            for ((*come)++; *come < n;) usleep(1000);
        }
    };
    // Runs `act` in each of n processes that hold a lifeline, and gives back their exit codes and what each printed on
    // stderr. A rank for which `before` is false stays away.
    std::vector<Result> with_lifeline(int n, const std::map<std::string, std::string>& environment,
                                      const std::function<int(int, Lifeline&)>& act, double silence = 0,
                                      const std::function<bool(int)>& before = nullptr) {
        std::vector<pid_t> children;
        std::vector<std::string> names;
        for (int r = 0; r < n; r++) {
            char err[] = "/tmp/keel_err_XXXXXX";
            int fd = mkstemp(err);
            names.push_back(err);
            children.push_back(fork());
            if (children.back() == 0) {
                dup2(fd, 2);
                for (const auto& [name, value] : environment) setenv(name.c_str(), value.c_str(), 1);
                setenv("RANK", std::to_string(r).c_str(), 1), setenv("WORLD_SIZE", std::to_string(n).c_str(), 1);
                int code = 7;
                try {
                    if (silence > 0) Lifeline::silence = silence;
                    if (before && !before(r)) _exit(0);
                    char gift[100] = "";
                    if (r == 0) strcpy(gift, "from rank 0");
                    Lifeline lifeline(Launch::from_environment(), nullptr, gift);
                    if (strcmp(gift, "from rank 0") != 0) _exit(8);
                    code = act(r, lifeline);
                    if (code > 0) lifeline.fail_all("test", format("failure %d", code));
                } catch (const Error& e) {
                    fprintf(stderr, "%s\n", e.what());
                }
                _exit(code);
            }
            close(fd);
        }
        std::vector<Result> results;
        for (int r = 0; r < n; r++) {
            int status = 0;
            waitpid(children[size_t(r)], &status, 0);
            results.push_back({WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status), "",
                               slurp(names[size_t(r)])});
            unlink(names[size_t(r)].c_str());
        }
        return results;
    }
    std::map<std::string, std::string> by_port() {
        return {{"MASTER_ADDR", "127.0.0.1"}, {"MASTER_PORT", std::to_string(21000 + getpid() % 9000)}};
    }

    TEST_CASE("Ranks find each other by an address or by a shared file, and part in peace") {
        Place p;
        std::map<std::string, std::string> by_file = {{"KEEL_RENDEZVOUS", p / "rendezvous"}};
        for (const auto& environment : {by_port(), by_file})
            for (const Result& r :
                 with_lifeline(4, environment, [](int r, Lifeline&) { return usleep(unsigned(r) * 100000), 0; })) {
                CHECK(r.code == 0);
                CHECK(r.err == "");
            }
        CHECK(!fs::exists(p / "rendezvous"));
    }

    TEST_CASE("A rank that is killed, that fails, that is stopped: the others end and name it") {
        struct {
            const char* what;
            int (*act)(Lifeline&);
            const char* words;
            bool named_by_all;
        } fates[] = {{"killed", [](Lifeline&) { return raise(SIGKILL); }, "has died", true},
                     {"failing", [](Lifeline&) { return 3; }, "failure 3", false},
                     {"stopped", [](Lifeline&) { return raise(SIGSTOP); }, "no sign of life", true}};
        for (const auto& fate : fates)
            for (int victim : {0, 2}) {
                Meeting all_there;
                pid_t parent = getpid();
                bool stopped = strcmp(fate.what, "stopped") == 0;
                std::thread wake([&] {  // what is stopped must be killed to be waited for, once the others have ended
                    for (size_t others = 1; stopped && others > 0; usleep(20000)) {
                        pid_t victims_process = 0;
                        others = *all_there.come < 4;
                        for (const auto& entry :
                             fs::directory_iterator("/proc", fs::directory_options::skip_permission_denied)) {
                            if (atoi(entry.path().filename().c_str()) == 0) continue;
                            std::string stat = slurp_proc(entry.path().string() + "/stat");
                            size_t name = stat.rfind(')');
                            if (name == std::string::npos || stat.size() <= name + 4 ||
                                atoi(stat.c_str() + name + 4) != parent)
                                continue;
                            if (stat[name + 2] == 'T') victims_process = atoi(stat.c_str());
                            else others += stat[name + 2] != 'Z';
                        }
                        if (!victims_process) others++;
                        if (others == 0) kill(victims_process, SIGKILL);
                    }
                });
                std::vector<Result> results = with_lifeline(4, by_port(), [&](int r, Lifeline& lifeline) {
                    all_there.wait_for(4);
                    if (r == victim) return fate.act(lifeline);
                    sleep(30);  // a step that cannot finish: all must end sooner, with 1 and not 0
                    return 0;
                }, stopped ? 4 : 0);
                wake.join();
                for (int r = 0; r < 4; r++) {
                    INFO(fate.what << " " << victim << ", seen by " << r << ": " << results[size_t(r)].err);
                    if (r == victim) continue;
                    CHECK(results[size_t(r)].code == 1);
                    if (fate.named_by_all || r == 0)
                        CHECK(results[size_t(r)].err.find(fate.words) != std::string::npos);
                    if (fate.named_by_all)
                        CHECK(results[size_t(r)].err.find(format("rank %d (process", victim)) != std::string::npos);
                    if (!fate.named_by_all && r > 0) CHECK(results[size_t(r)].err == "");
                }
            }
    }

    TEST_CASE("A rank that comes late is waited for, whoever else calls; those that are there are not silent "
              "meanwhile") {
        Meeting all_there;
        auto environment = by_port();
        auto late = [&](int r) {
            if (r != 2) return true;
            sleep(1);
            int fd = socket(AF_INET, SOCK_STREAM, 0);
            sockaddr_in to{};
            to.sin_family = AF_INET, to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
            to.sin_port = htons(uint16_t(atoi(environment["MASTER_PORT"].c_str())));
            std::string words = "GET /healthz HTTP/1.1\r\nHost: of a cluster's probe\r\n\r\n";
            bool sent = connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof to) == 0 &&
                        write(fd, words.data(), words.size()) > 0;
            sleep(2);
            return sent;
        };
        for (const Result& r :
             with_lifeline(3, environment, [&](int, Lifeline&) { return all_there.wait_for(3), 0; }, 1.5, late)) {
            CHECK(r.code == 0);
            CHECK(r.err == "");
        }
        auto never = [](int r) { return r != 2; };
        std::vector<Result> failing = with_lifeline(3, by_port(), [](int r, Lifeline&) {
            if (r == 1) return 3;  // before the third has come
            return int(sleep(30));
        }, 0, never);
        CHECK_MESSAGE(failing[0].err.find("rank 1 (process") != std::string::npos, failing[0].err);
        CHECK_MESSAGE(failing[0].err.find("failure 3") != std::string::npos, failing[0].err);
        CHECK(failing[1].err == "");
    }

    TEST_CASE("Ranks that wait say early for whom and whose word it is, and end with what is missing") {
        for (int missing : {0, 1}) {
            auto here = [&](int r) {
                StartLimits::all = 1.5, StartLimits::patience = 0.2;
                return r != missing;
            };
            std::vector<Result> results =
                with_lifeline(3, by_port(), [](int, Lifeline&) { return int(sleep(30)); }, 0, here);
            std::string unset = "where no launcher has started this, unset RANK WORLD_SIZE\n";
            for (int r = 0; r < 3; r++) {
                const std::string& err = results[size_t(r)].err;
                INFO("rank " << r << " without rank " << missing << ": " << err);
                if (r == missing) continue;
                CHECK(results[size_t(r)].code != 0);
                if (missing == 1 && r == 2) {  // it has rank 0, which says all
                    CHECK(err == "");
                    continue;
                }
                std::string whom =
                    r == 0 ? "rank 0: waiting for 1 of 3 ranks" : format("rank %d: waiting for rank 0 of 3 ranks", r);
                CHECK(err.find(whom + ", as WORLD_SIZE=3 in the environment says; " + unset) == 0);
                CHECK(err.find(r == 0 ? "expected 3 within 2 s, found 2, rank 1 not among them"
                                      : "expected rank 0 at 127.0.0.1:") != std::string::npos);
                CHECK(std::count(err.begin(), err.end(), '\n') == 2);
            }
        }
    }

    TEST_CASE("The message of a rank that fails while rank 0 dies is printed by the rank itself") {
        pid_t* first = static_cast<pid_t*>(mmap(nullptr, sizeof(pid_t), PROT_READ | PROT_WRITE,
                                                MAP_SHARED | MAP_ANONYMOUS, -1, 0));
        Meeting all_there;
        std::vector<Result> results = with_lifeline(3, by_port(), [&](int r, Lifeline&) {
            if (r == 0) *first = getpid();
            all_there.wait_for(3);
            if (r == 0) return raise(SIGSTOP);
            usleep(r == 1 ? 500000 : 200000);
            if (r == 1) return kill(*first, SIGKILL), int(sleep(30));
            return 3;
        });
        munmap(first, sizeof *first);
        CHECK_MESSAGE(results[2].err == "test: rank 2: failure 3\n", results[2].err);
        CHECK_MESSAGE(results[1].err.find("rank 1: rank 0 (process") == 0, results[1].err);
    }

    TEST_CASE("Beside torchrun's own store on MASTER_PORT the ranks take the next port; a port that is none is named") {
        auto environment = by_port();
        int store = socket(AF_INET, SOCK_STREAM, 0), on = 1;
        setsockopt(store, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        sockaddr_in at{};
        at.sin_family = AF_INET, at.sin_port = htons(uint16_t(atoi(environment["MASTER_PORT"].c_str())));
        REQUIRE(bind(store, reinterpret_cast<sockaddr*>(&at), sizeof at) == 0);
        REQUIRE(listen(store, 9) == 0);
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "True";
        for (const Result& r : with_lifeline(3, environment, [](int, Lifeline&) { return 0; })) {
            CHECK(r.code == 0);
            CHECK(r.err == "");
        }
        close(store);
        environment["MASTER_PORT"] = "tcp";
        for (const Result& r : with_lifeline(2, environment, [](int, Lifeline&) { return 0; }))
            CHECK(r.err.find("MASTER_PORT: expected a number from 1 to 65534 in the environment, found 'tcp'") == 0);
    }
}

TEST_SUITE("launchers") {
    // The environment without any launcher's word but these.
    Launch launched(const std::map<std::string, std::string>& variables) {
        std::vector<std::string> names;
        for (char** entry = environ; *entry; entry++) names.push_back(std::string(*entry, strcspn(*entry, "=")));
        for (const std::string& name : names)
            for (const char* start :
                 {"OMPI_", "PMI", "MPI_", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_", "TORCHELASTIC_"})
                if (name.starts_with(start)) unsetenv(name.c_str());
        for (const auto& [name, value] : variables) setenv(name.c_str(), value.c_str(), 1);
        struct Unset {
            const std::map<std::string, std::string>& variables;
            ~Unset() {
                for (const auto& [name, value] : variables) unsetenv(name.c_str());
            }
        } unset{variables};
        return Launch::from_environment();
    }

    TEST_CASE("Of several launchers' variables those of the one that has started this process count") {
        struct {
            const char* what;
            int rank, ranks, local_rank, local_ranks;
            const char *launcher, *warning;
            std::map<std::string, std::string> variables;
        } cases[] = {
            // clang-format off
            {"no launcher", 0, 0, -1, 0, "", "",
             {}},
            {"mpirun", 1, 4, 0, 2, "mpirun", "",
             {{"OMPI_COMM_WORLD_RANK", "1"}, {"OMPI_COMM_WORLD_SIZE", "4"}, {"OMPI_COMM_WORLD_LOCAL_RANK", "0"},
              {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}}},
            {"mpirun in a job of Slurm, whose daemon srun has started", 9, 16, 1, 0, "mpirun", "",
             {{"OMPI_COMM_WORLD_RANK", "9"}, {"OMPI_COMM_WORLD_SIZE", "16"}, {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
              {"SLURM_PROCID", "1"}, {"SLURM_STEP_NUM_TASKS", "2"}, {"SLURM_NTASKS", "16"}}},
            {"srun on nodes of unequal numbers", 3, 5, 1, 0, "srun", "",
             {{"SLURM_PROCID", "3"}, {"SLURM_STEP_NUM_TASKS", "5"}, {"SLURM_LOCALID", "1"},
              {"SLURM_STEP_TASKS_PER_NODE", "2(x2),1"}}},
            {"srun --mpi=pmi2", 5, 8, 1, 4, "mpirun", "",
             {{"PMI_RANK", "5"}, {"PMI_SIZE", "8"}, {"SLURM_PROCID", "5"}, {"SLURM_STEP_NUM_TASKS", "8"},
              {"SLURM_LOCALID", "1"}, {"SLURM_STEP_TASKS_PER_NODE", "4(x2)"}}},
            {"hydra", 1, 2, 1, 2, "mpirun", "",
             {{"PMI_RANK", "1"}, {"PMI_SIZE", "2"}, {"MPI_LOCALRANKID", "1"}, {"MPI_LOCALNRANKS", "2"}}},
            {"srun --pty bash", 0, 1, 0, 0, "srun", "",
             {{"SLURM_PROCID", "0"}, {"SLURM_STEP_NUM_TASKS", "1"}, {"SLURM_LOCALID", "0"}}},
            {"eight processes started in such a shell", 3, 8, 3, 8, "RANK and WORLD_SIZE", "",
             {{"SLURM_PROCID", "0"}, {"SLURM_STEP_NUM_TASKS", "1"}, {"SLURM_LOCALID", "0"}, {"RANK", "3"},
              {"WORLD_SIZE", "8"}, {"LOCAL_RANK", "3"}, {"LOCAL_WORLD_SIZE", "8"}}},
            {"srun torchrun", 9, 16, 1, 8, "torchrun", "",
             {{"SLURM_PROCID", "1"}, {"SLURM_STEP_NUM_TASKS", "2"}, {"SLURM_LOCALID", "0"}, {"RANK", "9"},
              {"WORLD_SIZE", "16"}, {"LOCAL_RANK", "1"}, {"LOCAL_WORLD_SIZE", "8"}, {"TORCHELASTIC_RUN_ID", "none"}}},
            {"a pod of Kubernetes", 1, 4, -1, 0, "RANK and WORLD_SIZE", "",
             {{"RANK", "1"}, {"WORLD_SIZE", "4"}}},
            {"mpirun in such a pod", 7, 8, 7, 0, "mpirun", "",
             {{"RANK", "1"}, {"WORLD_SIZE", "4"}, {"OMPI_COMM_WORLD_RANK", "7"}, {"OMPI_COMM_WORLD_SIZE", "8"},
              {"OMPI_COMM_WORLD_LOCAL_RANK", "7"}}},
            {"the local rank by hand", 1, 4, 1, 0, "mpirun", "",
             {{"PMI_RANK", "1"}, {"PMI_SIZE", "4"}, {"LOCAL_RANK", "1"}}},
            {"a world of one", 0, 1, -1, 0, "RANK and WORLD_SIZE", "",
             {{"RANK", "0"}, {"WORLD_SIZE", "1"}}},
            {"a local rank alone", 0, 0, -1, 0, "", "",
             {{"LOCAL_RANK", "1"}}},
            {"a rank alone", 0, 0, -1, 0, "", "RANK=1 is set without WORLD_SIZE",
             {{"RANK", "1"}}},
            {"a world alone", 0, 0, -1, 0, "", "WORLD_SIZE=4 is set without RANK",
             {{"WORLD_SIZE", "4"}}},
            {"a batch script", 0, 0, -1, 0, "", "SLURM_NTASKS=8 is set, and srun has not started this",
             {{"SLURM_NTASKS", "8"}, {"SLURM_PROCID", "0"}, {"SLURM_LOCALID", "0"}}},
            // clang-format on
        };
        for (const auto& c : cases) {
            INFO(c.what);
            Launch l = launched(c.variables);
            CHECK(l.rank == c.rank);
            CHECK(l.ranks == c.ranks);
            CHECK(l.local_rank == c.local_rank);
            CHECK(l.local_ranks == c.local_ranks);
            CHECK(l.launcher == c.launcher);
            CHECK(l.warning == c.warning);
        }
        for (const auto& [rank, ranks, words] :
             {std::tuple{"4", "4",
                         "RANK: expected a number from 0 to 3 in the environment, found '4'; see to the launcher, "
                         "or where none has started this, unset RANK WORLD_SIZE"},
              {"", "4", "RANK: expected a number from 0 to 3 in the environment, found ''"},
              {"0", "four", "WORLD_SIZE: expected a number from 1 to 65536 in the environment, found 'four'"}})
            CHECK_THROWS_WITH_AS(launched({{"RANK", rank}, {"WORLD_SIZE", ranks}}), doctest::Contains(words), Error);
    }

    TEST_CASE("A rank takes the GPU of its local rank, or the one that it is shown; two never share one unnoticed") {
        Launch l;
        l.rank = 5, l.ranks = 8, l.local_rank = 1;
        CHECK(l.device(4) == 1);
        CHECK(l.device(1) == 0);
        l.local_rank = 4;
        CHECK_THROWS_WITH(l.device(4), "ranks: expected at most 4 on this machine, one for each GPU, found local rank "
                                       "4 (rank 5); start fewer, or show each its own by CUDA_VISIBLE_DEVICES");
        l.local_rank = -1;
        CHECK(l.device(1) == 0);
        CHECK_THROWS_WITH(l.device(4), doctest::Contains("which of the 4 GPUs here is rank 5's, found no LOCAL_RANK"));
    }

    TEST_CASE("More ranks than GPUs, and two on one GPU, are refused once, before anything is trained") {
        Place p;
        struct {
            const char *gpus, *expected;
        } cases[] = {{"2", "ranks: expected at most 2 on this machine, one for each GPU, found local rank 2 (rank 2)"},
                     {"1", "ranks: expected a GPU for each, found ranks "},
                     {"3", nullptr}};
        for (const auto& c : cases) {
            Words words = p.words(gpu_fp32, "run", {"-x", "1", "-b", "1"});
            Result r = Process(on_ranks(3, words), {{"CUDA_ON_CPU_DEVICES", c.gpus}}).wait();
            INFO(c.gpus << " GPUs: " << r.err);
            CHECK((r.code == 0) == !c.expected);
            CHECK(fs::exists(p / "run") == !c.expected);
            if (!c.expected) continue;
            size_t at = r.err.find(c.expected);
            CHECK(at != std::string::npos);
            CHECK(r.err.find("ranks: expected", at + 1) == std::string::npos);
        }
    }

    TEST_CASE("A launcher's leftovers in the environment are named, whatever rank they speak of") {
        Place p;
        std::string ended = p / "environment";
        Process(on_ranks(2, {"sh", "-c", "cp /proc/self/environ " + ended + ".$OMPI_COMM_WORLD_RANK"})).wait();
        std::map<std::string, std::string> of_ended;  // mpirun, with all that it has set
        std::stringstream in(slurp(ended + ".1"));
        for (std::string entry; std::getline(in, entry, '\0');)
            of_ended[entry.substr(0, entry.find('='))] = entry.substr(entry.find('=') + 1);
        std::map<std::string, std::string> ompi = {{"OMPI_COMM_WORLD_RANK", "1"}, {"OMPI_COMM_WORLD_SIZE", "4"}},
                                           slurm = {{"SLURM_PROCID", "2"}, {"SLURM_STEP_NUM_TASKS", "4"}},
                                           torch = {{"RANK", "3"}, {"WORLD_SIZE", "4"}};
        struct {
            std::map<std::string, std::string> environment;
            Words words;
            const char *expected, *unset;
        } cases[] = {
            {ompi, {"-L", "4"}, "rank 1: MPI: expected rank 1 of 4", "OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE"},
            {slurm, {"-L", "4"}, "rank 2: MPI: expected rank 2 of 4", "SLURM_PROCID SLURM_STEP_NUM_TASKS"},
            {torch, {"-L", "4"}, "rank 3: MPI: expected rank 3 of 4", "RANK WORLD_SIZE"},
            {of_ended,
             {"-L", "4"},
             "rank 1: MPI_Init has ended this process",
             "OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE"},
            {torch, {"-q"}, "rank 3: unknown flag '-q'", ""},
            {torch, {"-h"}, nullptr, ""}};
        std::vector<Process> processes;
        for (const auto& c : cases) {
            Words words = {"./train_keel_cpu"};
            words.insert(words.end(), c.words.begin(), c.words.end());
            processes.emplace_back(words, c.environment);
        }
        for (size_t i = 0; i < processes.size(); i++) {
            Result r = processes[i].wait();
            INFO(r.err);
            CHECK(r.code == (cases[i].expected ? 1 : 0));
            CHECK((r.out.find("usage:") == 0) == !cases[i].expected);
            if (!cases[i].expected) continue;
            CHECK(r.err.find(cases[i].expected) != std::string::npos);
            if (*cases[i].unset)
                CHECK(r.err.find(format("where no launcher has started this, unset %s\n", cases[i].unset)) !=
                      std::string::npos);
            if (cases[i].environment != of_ended) CHECK(std::count(r.err.begin(), r.err.end(), '\n') == 1);
        }
    }

    TEST_CASE("A process of a launcher: a rank that holds a lifeline" * doctest::skip()) {
        Launch launch = Launch::from_environment();
        char gift[100] = "";
        if (launch.rank == 0) strcpy(gift, "from rank 0");
        Lifeline lifeline(launch, nullptr, gift);
        CHECK(strcmp(gift, "from rank 0") == 0);
        if (const char* victim = getenv("KEEL_TEST_VICTIM")) {
            if (launch.rank == atoi(victim)) raise(SIGKILL);
            sleep(30);
        }
    }

    TEST_CASE("dev/cluster/local.sh starts ranks that find each other, and ends them all when one is killed") {
        Words words = {"dev/cluster/local.sh", "3", "build/test_ranks", "-ns", "-tc=A process of a launcher*"};
        std::map<std::string, std::string> under = {{"SLURM_PROCID", "1"}, {"SLURM_STEP_NUM_TASKS", "2"}};  // srun
        Result r = Process(words, under).wait();
        INFO(r.out << r.err);
        CHECK(r.code == 0);
        CHECK(r.err == "");
        size_t ranks = 0;
        for (size_t at = 0; (at = r.out.find("SUCCESS", at)) != std::string::npos; at++) ranks++;
        CHECK(ranks == 3);
        under["KEEL_TEST_VICTIM"] = "1";
        Result killed = Process(words, under).wait();
        INFO(killed.out << killed.err);
        CHECK(killed.code == 128 + SIGKILL);
        CHECK(killed.err.find("rank 0: rank 1 (process") != std::string::npos);
        CHECK(killed.err.find("local.sh: rank 1 (process") != std::string::npos);
        CHECK(killed.err.find("was ended by signal 9; all end") != std::string::npos);
    }
}

TEST_SUITE("training") {
    TEST_CASE("N ranks give the loss curve of one, the same bits at every ZeRO level and every time") {
        for (const Build& build : builds(3, &gpu_bf16)) {
            Place p;
            auto losses = [&](int n, const std::string& name, int zero) {
                p.run(n, p.words(build, name, {"-x", "20", "-b", n == 0 ? "12" : "1", "-z", std::to_string(zero)}));
                return p.losses(name);
            };
            std::vector<double> one = losses(0, "alone", 0);
            REQUIRE(one.size() == 20);
            for (int n : {1, 2, 4}) {
                std::string log, model;
                for (int zero : {0, 1, 2}) {
                    if (n != 4 && (build.bf16 || zero != 2 - n % 2)) continue;  // 1 on one rank, 2 on two
                    std::string name = format("%d_%d", n, zero);
                    double difference = apart(losses(n, name, zero), one);
                    INFO(build.name << ", " << n << " ranks, -z " << zero << ": losses differ by " << difference);
                    CHECK(difference < (build.bf16 ? 1e-2 : 1e-5));
                    if (log.empty()) log = log_without_times(p / name + "/log.csv"), model = p.model(name, 20);
                    CHECK(log_without_times(p / name + "/log.csv") == log);
                    CHECK(p.model(name, 20) == model);
                }
                if (n != 4) continue;
                losses(n, "again", 2);
                CHECK(log_without_times(p / "again/log.csv") == log);
                CHECK(p.model("again", 20) == model);
            }
        }
    }

    TEST_CASE("The share of the matrix rate is that of all ranks' rates together") {
        Place p;
        std::string out = p.run(2, p.words(cpu, "run", {"-x", "3"})).out;
        std::string end = " GFLOP/s in matrix products, all 2 ranks together\n";
        size_t at = out.find(end);
        REQUIRE_MESSAGE(at != std::string::npos, out);
        double rate = atof(out.c_str() + out.rfind(' ', at - 1)) * 1e9,
               flops = flops_per_token(config_of(KEEL, 6, 8, 2), 8);
        read_csv_rows(p / "run/log.csv", INT64_MAX, [&](int64_t, const std::string& line) {
            std::vector<double> cells;
            std::stringstream in(line);
            for (std::string cell; std::getline(in, cell, ',');) cells.push_back(atof(cell.c_str()));
            CHECK(cells[7] == doctest::Approx(flops * cells[6] / rate).epsilon(0.01));  // the printed rate is rounded
        });
    }

    TEST_CASE("With --tune all ranks take the algorithms of rank 0, and a run by its table has the same bits") {
        Place p;
        spill(p / "other.txt", slurp(p.text) + "and so on");
        auto run = [&](const std::string& name) {  // 1024 rows a rank: some algorithms split a dW's sum, others do not
            Words words = {gpu_bf16.binary, "-t", "1024", "-i", p.text, "-j", p / "other.txt", "-L", "2", "-C", "64"};
            for (const std::string& word : Words{"-H", "2", "-b", "1", "-x", "2", "-v", "1", "-s", "0"})
                words.push_back(word);
            for (const std::string& word : Words{"-o", p / name, "--tune", p / "tune.csv"}) words.push_back(word);
            p.run(2, words);
            return p.model(name, 2);
        };
        std::string measured = run("measured"), table = slurp(p / "tune.csv");
        CHECK(std::count(table.begin(), table.end(), '\n') > 10);
        CHECK(run("by_table") == measured);
        CHECK(slurp(p / "tune.csv") == table);
        CHECK(!fs::exists(p / "tune.csv.tmp"));
    }

    // What dev/cluster/scale.py prints.
    int64_t scale(const std::string& words) {
        FILE* pipe = popen(("${PYTHON:-python3} dev/cluster/scale.py " + words).c_str(), "r");
        char line[64] = "";
        if (!pipe || !fgets(line, sizeof line, pipe)) *line = 0;
        if (pipe) pclose(pipe);
        return atoll(line);
    }

    TEST_CASE("The bytes that a rank sends and the memory it needs are those of the model in dev/doc/scale.md") {
        for (const Build& build : builds(3))
            for (auto [n, zero] : {std::pair{4, 0}, {4, 1}, {4, 2}}) {
                if (build.binary == gpu_fp32.binary && zero < 2) continue;
                Place p;
                Result r =
                    p.run(n, p.words(build, "run", {"-x", "2", "-b", "1", "-n", "0", "-z", std::to_string(zero)}),
                          {{"CUDA_ON_CPU_TRACE", "1"}, {"CUDA_ON_CPU_PROTECT", "1"}});
                std::string flags = format("-L 6 -C %d -H 2 -t 8 -b 1 -d 96 -V 256 --ranks %d -z %d --weights %s",
                                           build.C, n, zero, build.bf16 ? "bf16" : "fp32");
                INFO(build.name << ", " << n << " ranks, -z " << zero << "\n" << r.out);
                int64_t predicted = scale("--bytes " + flags), told = 0;
                CHECK(predicted > 0);
                size_t at = r.out.find("network    ");
                REQUIRE(at != std::string::npos);
                CHECK(atoll(r.out.c_str() + at + 11) == predicted);
                // What nccl.h has sent in two steps, beside which a run's start tells a few numbers.
                if (at = r.out.find("nccl: "); at != std::string::npos) told = atoll(r.out.c_str() + at + 6);
                if (build.binary != cpu.binary) CHECK(told >= 2 * predicted);
                CHECK(told <= 2 * predicted + 3 * 64);
                if (!build.bf16) continue;
                double memory = 0;
                std::stringstream lines(r.out);
                for (std::string line; std::getline(lines, line);)
                    for (const char* name :
                         {"  parameters", "  gradients from", "  gradients of this", "  gradients  ", "  AdamW"}) {
                        double value;
                        char unit;
                        if (line.starts_with(name) && line.size() > 40 &&
                            sscanf(line.c_str() + 40, "%lf %c", &value, &unit) == 2)
                            memory += value * (unit == 'K' ? 1024 : unit == 'M' ? 1 << 20 : 1);
                    }
                double expected = double(scale("--memory " + flags));
                CHECK_MESSAGE(std::fabs(memory - expected) < 0.01 * expected, memory << " beside " << expected);
            }
        CHECK(std::system("${PYTHON:-python3} dev/cluster/scale.py --check dev/doc/scale.md > /dev/null") == 0);
    }

    TEST_CASE("--probe and validation see all ranks' parts") {
        for (const Build& build : builds(1)) {
            Place p;
            for (int n : {0, 4})
                p.run(n, p.words(build, std::to_string(n),
                                 {"-x", "4", "-b", "1", "--probe", "2", "--norm", "hybridnorm"}));
            std::stringstream one(slurp(p / "0/probe.csv")), four(slurp(p / "4/probe.csv"));
            int lines = 0;
            for (std::string a, b; std::getline(one, a) && std::getline(four, b); lines++) {
                std::stringstream cells_a(a), cells_b(b);
                for (std::string x, y; std::getline(cells_a, x, ',') && std::getline(cells_b, y, ',');) {
                    if (x == y) continue;
                    CHECK_MESSAGE(std::fabs(atof(x.c_str()) - atof(y.c_str())) <= 1e-3 * std::fabs(atof(x.c_str())),
                                  build.name << ":\n"
                                             << a << "\n"
                                             << b);
                }
            }
            CHECK(lines == 1 + 2 * 6);
        }
    }
}

TEST_SUITE("checkpoints") {
    TEST_CASE("A checkpoint of N ranks is resumed on M, and the run goes on as if nothing had been") {
        for (const Build& build : builds(3, &gpu_fp32)) {
            Place p;
            p.run(4, p.words(build, "whole", {"-x", "12", "-b", "1", "-n", "6", "-z", "2"}));
            p.run(0, p.words(build, "one", {"-x", "12", "-b", "1", "-n", "6"}));
            struct {
                const char* from;
                int to;
                const char* zero;
                bool same_bits;
            } cases[] = {{"whole", 4, "2", true},  {"whole", 4, "0", true}, {"whole", 0, "0", false},
                         {"whole", 3, "1", false}, {"one", 4, "1", false},  {"one", 4, "0", false}};
            for (const auto& c : cases) {
                if (build.bf16 && *c.zero == '0' && c.to == 4) continue;  // -z 2 and 1 are what differs in BF16
                fs::remove_all(p / "run");
                fs::copy(p / c.from, p / "run");
                for (const char* later : {"model_00000012.bin", "state_00000012_00000.bin", "state_00000012_00001.bin"})
                    fs::remove(p / "run/" + later);
                Result r = p.run(c.to, {build.binary, "-i", p.text, "-y", "-o", p / "run", "-s", "0", "-z", c.zero});
                INFO(build.name << ": " << c.from << " to " << c.to << " ranks, -z " << c.zero << "\n"
                                << r.out << r.err);
                CHECK(r.out.find("state_00000006_00000.bin") != std::string::npos);
                CHECK(apart(p.losses("run"), p.losses(c.from)) < (build.bf16 ? 1e-2 : 1e-5));
                if (c.same_bits) CHECK(p.model("run", 12) == p.model(c.from, 12));
                for (int rank = 0; rank < std::max(1, c.to); rank++)
                    CHECK_NOTHROW(FileReader(state_path(p / "run", 12, rank), FILE_STATE).finish());
            }
        }
    }

    TEST_CASE("The micro-batch is chosen anew where the ranks make it too large") {
        Place p;
        p.run(0, p.words(cpu, "run", {"-x", "2", "-b", "12"}));
        Result r = p.run(3, {cpu.binary, "-i", p.text, "-y", "-o", p / "run", "-s", "0", "-x", "4"});
        CHECK(r.out.find("micro-batch of 12 does not fit 3 ranks and -d 96: taking 4") != std::string::npos);
    }

    TEST_CASE("A checkpoint counts when all its ranks' files are there and whole") {
        Place p;
        p.run(4, p.words(cpu, "run", {"-x", "9", "-b", "1", "-n", "3"}));
        std::string model = p.model("run", 9), log = log_without_times(p / "run/log.csv");
        unlink(state_path(p / "run", 9, 3).c_str());
        std::string damaged = slurp(state_path(p / "run", 6, 2));
        damaged[damaged.size() / 2] ^= 1;
        spill(state_path(p / "run", 6, 2), damaged);
        Result r = p.run(4, {cpu.binary, "-i", p.text, "-y", "-o", p / "run", "-s", "0"});
        CHECK(r.err.find("state_00000009_00003.bin, found none") != std::string::npos);
        CHECK(r.err.find("state_00000006_00002.bin: expected CRC-32") != std::string::npos);
        CHECK(r.out.find("state_00000003_00000.bin, of 4 ranks") != std::string::npos);
        CHECK(p.model("run", 9) == model);
        CHECK(log_without_times(p / "run/log.csv") == log);
    }

    TEST_CASE("What a resume passed over stays until a newer checkpoint is whole: put right, it is gone on from") {
        Place p;
        Words words = p.words(cpu, "run", {"-x", "6", "-b", "1", "-n", "4"});
        p.run(3, words);
        std::string six = state_path(p / "run", 6), model = p.model("run", 6);
        fs::rename(six, p / "away");
        Words resume = {cpu.binary, "-i", p.text, "-y", "-o", p / "run", "-s", "0", "-x", "5", "-n", "0"};
        Result r = p.run(3, resume);
        CHECK_MESSAGE(r.err.find("skipping a checkpoint: expected the file " + six) != std::string::npos, r.err);
        CHECK(r.out.find("state_00000004_00000.bin, of 3 ranks") != std::string::npos);
        fs::rename(p / "away", six);
        resume[9] = "6";
        r = p.run(3, resume);
        CHECK_MESSAGE(r.out.find("state_00000006_00000.bin, of 3 ranks") != std::string::npos, r.out);
        CHECK(p.model("run", 6) == model);
    }

    TEST_CASE("No rank writes into a folder that has got the name of the run's own; with that one back the run goes "
              "on") {
        Place p;
        Words words = p.words(cpu, "run", {"-x", "1500", "-b", "1", "-n", "500", "-y"});
        Process run(on_ranks(2, words), {{"KEEL_TEST_PLACE", p.path}});
        CHECK(run.prints("checkpoint |"));
        fs::rename(p / "run", p / "away"), fs::create_directory(p / "run");
        std::string others = state_path(p / "run", 1500, 1);
        spill(others, "another run's");
        Result r = run.wait();
        INFO(r.out << r.err);
        CHECK(r.code == 1);
        CHECK(r.err.find("found it moved or removed; put it back") != std::string::npos);
        CHECK(slurp(others) == "another run's");
        CHECK(fs::exists(state_path(p / "away", 500, 1)));
        fs::remove_all(p / "run"), fs::rename(p / "away", p / "run");
        p.run(2, words);
        words.back() = "--norm", words.push_back("keel"),
        *std::find(words.begin(), words.end(), p / "run") = p / "whole";
        p.run(2, words);
        CHECK(p.model("run", 1500) == p.model("whole", 1500));
    }

    TEST_CASE("One rank has the bits of a run alone, and each goes on from the other's checkpoint") {
        for (const Build& build : builds(2)) {
            Place p;
            auto words = [&](const char* name) { return p.words(build, name, {"-x", "4", "-b", "2", "-n", "2"}); };
            p.run(0, words("alone")), p.run(1, words("launched")), fs::create_directory(p / "mixed");
            CHECK(slurp(state_path(p / "launched", 4)) == slurp(state_path(p / "alone", 4)));
            fs::copy(state_path(p / "launched", 2), state_path(p / "mixed", 2));
            p.run(0, {build.binary, "-i", p.text, "-y", "-o", p / "mixed", "-s", "0"});
            CHECK(slurp(state_path(p / "mixed", 4)) == slurp(state_path(p / "alone", 4)));
        }
    }

    TEST_CASE("A run that is killed before its first checkpoint is whole starts fresh, and clears it away in the end") {
        Place p;
        p.run(4, p.words(cpu, "run", {"-x", "3", "-b", "1"}));
        unlink(state_path(p / "run", 3, 0).c_str()), unlink(model_path(p / "run", 3).c_str());
        Result r = p.run(2, p.words(cpu, "run", {"-x", "2", "-b", "1", "-y"}));
        CHECK(r.out.find("starting   fresh") != std::string::npos);
        CHECK(fs::exists(state_path(p / "run", 3, 1)));
        CHECK(fs::exists(state_path(p / "run", 2, 1)));
        p.run(2, {cpu.binary, "-i", p.text, "-y", "-o", p / "run", "-s", "0", "-x", "4"});
        CHECK(!fs::exists(state_path(p / "run", 3, 1)));
    }
}

TEST_SUITE("ends") {
    TEST_CASE("A rank that is killed takes the others with it, who name it; the run goes on from the last whole "
              "checkpoint") {
        for (const Build& build : builds(2))
            for (bool recovery : {false, true}) {
                Place p;
                Words words = p.words(build, "run", {"-x", "100000", "-u", "0", "-b", "1", "-n", "5", "-z", "2", "-y"});
                // With recovery on, mpirun leaves the other ranks alone.
                Process run(on_ranks(4, words, recovery ? Words{"--enable-recovery"} : Words{}),
                            {{"KEEL_TEST_PLACE", p.path}});
                CHECK(run.prints("checkpoint |"));
                std::map<int, pid_t> ranks = rank_processes(build.binary, p.path);
                REQUIRE(ranks.size() == 4);
                double start = seconds();
                kill(ranks[2], SIGKILL);
                Result r = run.wait();
                double took = seconds() - start;
                INFO(build.name << (recovery ? ", mpirun leaves them alone" : "") << ": " << took << " s\n" << r.err);
                CHECK(took < 30);
                CHECK(rank_processes(build.binary, p.path).empty());
                for (int other : {0, 1, 3})
                    CHECK(r.err.find(format("rank %d: rank 2 (process %d on ", other, int(ranks[2]))) !=
                          std::string::npos);
                if (recovery) continue;
                StateFiles last = newest_states(p / "run", {});
                REQUIRE(last);
                std::string more = std::to_string(last.step + 3);
                Result resumed =
                    p.run(4, {build.binary, "-i", p.text, "-y", "-o", p / "run", "-s", "0", "-x", more, "-z", "2"});
                CHECK(resumed.out.find(format("state_%08lld_00000.bin, of 4 ranks", (long long)last.step)) !=
                      std::string::npos);
            }
    }

    TEST_CASE("A stop asked of one rank stops all at the same step, with a checkpoint, exit 0; the run ends as one "
              "that was never stopped") {
        for (const Build& build : builds(2)) {
            Place p;
            Words words = p.words(build, "run", {"-x", "30", "-b", "1", "-n", "1000", "-y"});
            Result r{};
            for (int turn = 0; turn < 20; turn++) {  // on a busy machine a run may have ended before it is asked
                fs::remove_all(p / "run");
                Process run(on_ranks(4, words), {{"KEEL_TEST_PLACE", p.path}});
                CHECK(run.prints("step 3/"));
                std::map<int, pid_t> ranks = rank_processes(build.binary, p.path);
                if (ranks.count(3)) kill(ranks[3], SIGTERM);
                r = run.wait();
                if (r.code != 0 || r.out.find("stopping   after step") != std::string::npos) break;
            }
            INFO(build.name << "\n" << r.out << r.err);
            CHECK(r.code == 0);
            CHECK(r.out.find("stopping   after step") != std::string::npos);
            StateFiles last = newest_states(p / "run", {});
            REQUIRE(last);
            CHECK(last.step < 30);
            p.run(4, words);
            words.back() = "--norm", words.push_back("keel"),
            *std::find(words.begin(), words.end(), p / "run") = p / "whole";
            p.run(4, words);
            CHECK(p.model("run", 30) == p.model("whole", 30));
            CHECK(log_without_times(p / "run/log.csv") == log_without_times(p / "whole/log.csv"));
        }
    }

    TEST_CASE("A signal in a validation or a sample leaves it on all ranks; a resume makes up for the validation") {
        for (const Build& build : builds(2)) {
            Place p;
            std::string val = p / "val.txt";
            spill(val, std::string(8 << 20, 'a'));
            auto words = [&](const char* out, const Words& more) {
                Words all = p.words(build, out, {"-x", "6", "-b", "1", "-y", "-j", val});
                *(std::find(all.begin(), all.end(), "-v") + 1) = "3";
                all.insert(all.end(), more.begin(), more.end());
                return all;
            };
            Process run(on_ranks(2, words("run", {"-m", "1000000000"})), {{"KEEL_TEST_PLACE", p.path}});
            CHECK(run.prints("step 3/"));
            for (auto [rank, id] : rank_processes(build.binary, p.path)) kill(id, SIGTERM);
            Result r = run.wait();
            INFO(build.name << "\n" << r.out << r.err);
            CHECK(r.code == 0);
            CHECK(r.out.find("the validation of step 3 is left to -y") != std::string::npos);
            CHECK(r.out.find("validation |") == std::string::npos);
            fs::copy(p / "run", p / "other");
            p.run(2, words("run", {"-m", "1"}));
            p.run(2, words("whole", {"-m", "1"}));
            CHECK(p.model("run", 6) == p.model("whole", 6));
            CHECK(log_without_times(p / "run/log.csv") == log_without_times(p / "whole/log.csv"));
            Words other = words("other", {"-m", "1"});  // with which step 3 would have none
            *(std::find(other.begin(), other.end(), "-v") + 1) = "4";
            p.run(2, other);
            CHECK(last_row(p / "other/log.csv", 3).find(",,") == std::string::npos);
            Words sampling = words("sampled", {"-m", "1", "-g", "1000000"});
            *(std::find(sampling.begin(), sampling.end(), "-s") + 1) = "1";
            Process sampled(on_ranks(2, sampling), {{"KEEL_TEST_PLACE", p.path}});
            CHECK(sampled.prints("--- sample at step 1"));
            for (auto [rank, id] : rank_processes(build.binary, p.path)) kill(id, SIGTERM);
            CHECK(sampled.wait().code == 0);
            CHECK(newest_states(p / "sampled", {}));
            Words alone = words("run", {"-m", "1000000000"});  // without a folder there is nothing to resume
            alone.erase(std::find(alone.begin(), alone.end(), "-y"));
            auto folder = std::find(alone.begin(), alone.end(), "-o");
            alone.erase(folder, folder + 2);
            Process left(alone);
            CHECK(left.prints("step 3/"));
            kill(left.child, SIGTERM);
            CHECK(left.wait().out.find("the validation of step 3 is left, as a signal") != std::string::npos);
        }
    }

    TEST_CASE("SIGTERM to mpirun, which then no longer reads what the ranks print, leaves the last step's checkpoint") {
        Place p;
        Words words = p.words(cpu, "run", {"-x", "100000", "-b", "1", "-n", "100000", "-g", "64"});
        *(std::find(words.begin(), words.end(), "-s") + 1) = "1";
        Words all = on_ranks(2, words, {"--mca", "odls_base_sigkill_timeout", "2"});    // seconds until SIGKILL
        if (std::find(all.begin(), all.end(), "--oversubscribe") == all.end()) return;  // it is not Open MPI's
        Process run(all);
        CHECK(run.prints("step 3/"));
        kill(run.child, SIGTERM);
        Result r = run.wait();
        INFO(r.err);
        StateFiles last = newest_states(p / "run", {});
        REQUIRE(last);
        int64_t step = 0;
        read_csv_rows(p / "run/log.csv", INT64_MAX, [&](int64_t s, const std::string&) { step = s; });
        CHECK(last.step == step);
    }

    TEST_CASE("A folder that is another one on each rank's machine is refused, before anything is trained") {
        for (const Build& build : builds(long_tests() ? 3 : 1)) {
            Place p;
            Words words = p.words(build, "run", {"-b", "1"});
            words[0] = fs::absolute(build.binary);
            *(std::find(words.begin(), words.end(), "-o") + 1) = "run";
            for (const char* host : {"a", "b"}) fs::create_directories(p / host + "/run");
            Words all = on_ranks(1, words, {"-wdir", p / "a"});
            for (const char* word : {":", "-np", "1", "-wdir"}) all.push_back(word);
            all.push_back(p / "b");
            all.insert(all.end(), words.begin(), words.end());
            Result r = Process(all).wait();
            INFO(r.out << r.err);
            CHECK(r.code != 0);
            CHECK(r.err.find("-o: expected the folder run of rank 0 on all ranks, found another of this name on the "
                             "machine of rank 1") != std::string::npos);
            CHECK(r.out.find("step 1/") == std::string::npos);
            CHECK(!fs::exists(p / "a/run/log.csv"));
        }
    }

    TEST_CASE("Data that one rank cannot read stop all, with a checkpoint of the last finished step") {
        Place p;
        Process run(on_ranks(4, p.words(cpu, "run", {"-x", "100000", "-b", "1", "-n", "1000"})),
                    {{"KEEL_TEST_PLACE", p.path}});
        CHECK(run.prints("step 3/"));
        fs::resize_file(p.text, 5000);
        Result r = run.wait();
        INFO(r.out << r.err);
        CHECK(r.code == 1);
        CHECK(r.err.find("expected 6") != std::string::npos);
        CHECK(r.err.find("the file has been cut short, restore it") != std::string::npos);
        CHECK(newest_states(p / "run", {}));
    }

    TEST_CASE("A rank that cannot write its part of a checkpoint ends all; a resume passes over what the others "
              "wrote") {
        Place p;
        Words words = p.words(cpu, "run", {"-b", "1", "-x", "60", "-n", "20"}), all = on_ranks(1, words);
        for (const char* word : {":", "-np", "1", "sh", "-c", "ulimit -f 4; exec \"$@\"", "sh"}) all.push_back(word);
        all.insert(all.end(), words.begin(), words.end());
        double start = seconds();
        Result r = Process(all, {{"KEEL_TEST_PLACE", p.path}}).wait();
        INFO(r.out << r.err);
        CHECK(r.code != 0);
        CHECK(seconds() - start < 30);
        CHECK(r.err.find("could not be written (File too large)") != std::string::npos);
        CHECK(!fs::exists(p / "run/model_00000020.bin"));
        words.push_back("-y");
        r = p.run(2, words);
        CHECK(r.out.find("step 60/60") != std::string::npos);
        CHECK(newest_states(p / "run", {}).step == 60);
    }

    TEST_CASE("A token past V behind those that are looked at first, and validation data that are lost, end a run with "
              "a checkpoint of the last finished step") {
        Place p;
        int32_t header[256] = {shard_formats[0].magic, shard_formats[0].version, INT32_MAX};
        spill(p / "sparse.bin", std::string((const char*)header, sizeof header));
        fs::resize_file(p / "sparse.bin", sizeof header + 2 * uint64_t(INT32_MAX));  // zeros, which take no disk
        TokenSource shard({p / "sparse.bin"}, "-i");
        // The first sequence from step 3 on that lies behind the first 2^27 tokens.
        Loader loader(shard, 0, shard.count - shard.count / 10, 8, 50257, 1337, true);
        uint64_t bad = 2 * 12;
        while (loader.position(bad) < 1 << 27) bad++;
        std::fstream file(p / "sparse.bin", std::ios::in | std::ios::out | std::ios::binary);
        file.seekp(std::streamoff(sizeof header + 2 * (loader.position(bad) + 5))) << "\x60\xEA" << std::flush;
        for (int n : {0, 3}) {
            std::string out = format("bad_%d", n);
            Words words = p.words(cpu, out, {"-x", "9", "-b", "2"});
            words[2] = p / "sparse.bin";
            Result r = Process(on_ranks(n, words)).wait();
            INFO(r.out << r.err);
            CHECK(r.code == 1);
            CHECK(r.err.find(format("expected tokens below the model's V = 50257, found 60000 at token %llu; use other "
                                    "data or another model\n",
                                    loader.position(bad) + 5)) != std::string::npos);
            CHECK(newest_states(p / out, {}).step == int64_t(bad / 12));
        }
        // The first to validate on are looked at first too, wherever they lie.
        file.seekp(std::streamoff(sizeof header + 2 * (shard.count - shard.count / 10 + 7)))
            << "\x60\xEA" << std::flush;
        Words at_start = p.words(cpu, "at_start");
        at_start[2] = p / "sparse.bin";
        Result refused = Process(at_start).wait();
        CHECK(refused.err.find(format("found 60000 at token %llu", shard.count - shard.count / 10 + 7)) !=
              std::string::npos);
        CHECK(!fs::exists(p / "at_start"));
        for (const Build& build : builds(2)) {
            for (int n : {0, 3}) {
                std::string val = p / "val.txt";
                spill(val, slurp(p.text));
                fs::remove_all(p / "run");
                Words words = p.words(build, "run", {"-x", "100000", "-u", "3", "-b", "2", "-j", val});
                *(std::find(words.begin(), words.end(), "-v") + 1) = "5";
                Process run(on_ranks(n, words));
                CHECK(run.prints("step 3/"));
                fs::resize_file(val, 100);
                Result r = run.wait();
                INFO(build.name << "\n" << r.out << r.err);
                CHECK(r.code == 1);
                CHECK(r.err.find("val.txt: expected 6") != std::string::npos);
                CHECK(r.err.find("the file has been cut short, restore it\n") != std::string::npos);
                StateFiles last = newest_states(p / "run", {});
                CHECK(last.step >= 5);
                CHECK(last.step % 5 == 0);
                CHECK(p.losses("run").size() == size_t(last.step));
                auto validated = [&] {  // by the log, the last step before the one that comes next
                    std::string row;
                    read_csv_rows(p / "run/log.csv", last.step, [&](int64_t, const std::string& line) { row = line; });
                    return row.find(",,") == std::string::npos;
                };
                CHECK(!validated());
                spill(val, slurp(p.text));  // with the data back, what is lacking is made up for
                *(std::find(words.begin(), words.end(), "-x") + 1) = std::to_string(last.step + 1);
                words.push_back("-y");
                r = Process(on_ranks(n, words)).wait();
                CHECK_MESSAGE(r.code == 0, r.out << r.err);
                CHECK(validated());
                CHECK(p.losses("run").size() == size_t(last.step) + 1);
            }
        }
    }

    TEST_CASE("What cannot be is refused by all ranks, said once") {
        Place p;
        struct {
            int ranks;
            Words words;
            const char* expected;
        } cases[] = {{0, p.words(cpu, "run", {"-z", "1"}), "-z: expected 0, found 1; this run has one rank"},
                     {4, p.words(cpu, "run", {"-b", "5"}),
                      "-d: expected a multiple of 160 tokens (B*T times the ranks) as total batch, found 96"},
                     {2, {cpu.binary, "-i", p.text, "-L", "6", "--dump", p / "dump"}, "expected one rank, found 2"},
                     {2, p.words(cpu, "run", {"-q"}), "unknown flag '-q'"},
                     {2, p.words(gpu_fp32, "run", {"--probe", "1"}), "--probe: expected a run started alone"},
                     {2, p.words(gpu_bf16, "run", {"--grads", "bf16"}), "--grads: expected fp32 with several ranks"},
                     {2, p.words({"", "build/train_keel_clang_on_cpu", false, 64}, "run"),
                      "this build has one rank, found 2 started"}};
        for (const auto& c : cases) {
            if (c.words[0].find("clang") != std::string::npos && !long_tests()) continue;  // not built
            Result r = Process(on_ranks(c.ranks, c.words)).wait();
            INFO(r.err);
            CHECK(r.code != 0);
            size_t at = r.err.find(c.expected);
            CHECK(at != std::string::npos);
            if (at != std::string::npos) CHECK(r.err.find(c.expected, at + 1) == std::string::npos);
            CHECK(!fs::exists(p / "run"));
        }
        // Each rank with a seed of its own
        Result r = Process(on_ranks(2, {"sh", "-c",
                                        format("exec ./train_keel_cpu -i %s -L 4 -t 8 -x 2 --seed "
                                               "$OMPI_COMM_WORLD_RANK",
                                               p.text.c_str())}))
                       .wait();
        CHECK(r.err.find("expected the same flags, files and data on all, found others on rank 1") !=
              std::string::npos);
    }
}
