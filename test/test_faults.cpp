// Tests of what a run does when its numbers, its files or its folder go wrong, on the CPU trainer's own code: steps
// that are not finite, the detector of divergence on recorded curves, locks, checkpoints in the background, headers
// that lie. Built plainly and under the sanitizers.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
#include <sys/wait.h>

#include <fstream>
#include <map>
#include <sstream>

#include "../train_keel_cpu.cpp"
#include "files.h"
#include "long.h"

namespace {

namespace fs = std::filesystem;

// The CPU trainer with faults: in the steps of KEEL_TEST_BAD, a list such as "3,4,9", a weight is not a number while
// the step is computed. From step KEEL_TEST_BROKEN on it stays so, as after an update that went too far; the
// update of step KEEL_TEST_BREAKS does so. In the steps of KEEL_TEST_SPIKES a weight is too large.
struct FaultyTrainer : Trainer {
    using Trainer::Trainer;
    void start(const Loader& data, int64_t step, ProbeLog* probe, unsigned flags = 0) {
        static const char *bad = getenv("KEEL_TEST_BAD"), *broken = getenv("KEEL_TEST_BROKEN"),
                          *breaks = getenv("KEEL_TEST_BREAKS");
        static const char* spikes = getenv("KEEL_TEST_SPIKES");
        auto in = [&](const char* steps) {
            return steps && ("," + std::string(steps) + ",").find(format(",%lld,", step)) != std::string::npos;
        };
        bool once = in(bad) || in(spikes);
        real& weight = model.params[model.layout.offset(FCPROJW, 1)];
        if (broken && step == atoll(broken)) weight = real(NAN);
        real good = weight;
        if (once) weight = in(bad) ? real(NAN) : real(1e4);
        Trainer::start(data, step, probe, flags);
        if (once) weight = good;
        if (breaks && step == atoll(breaks)) weight = real(NAN);
    }
    // KEEL_TEST_RATE: the fastest, the median and the share; to measure them takes seconds under a sanitizer.
    static MatrixRate matrix_rate(int) {
        MatrixRate rate{1e9, 1e9};
        if (const char* text = getenv("KEEL_TEST_RATE"))
            sscanf(text, "%lf,%lf,%lf", &rate.fastest, &rate.median, &rate.share);
        return rate;
    }
};

struct Place {
    std::string path, text;
    Place() {
        char name[] = "/tmp/keel_faults_XXXXXX";
        REQUIRE(mkdtemp(name));
        path = name, text = path + "/text.txt";
        std::string content;
        for (int i = 0; content.size() < 4000; i++) content += format("line %d of %d, ", i * i % 97, i);
        spill(text, content);
    }
    ~Place() { fs::remove_all(path); }
    std::string operator/(const std::string& name) const { return path + "/" + name; }
    Words tiny(const Words& more = {}) const {
        Words words = {"train", "-i", text, "-L", "4",  "-C", "8",  "-H", "2",      "-t", "8",  "-b",         "2",
                       "-x",    "24", "-n", "2",  "-v", "0",  "-s", "0",  "--keep", "0",  "-o", path + "/run"};
        words.insert(words.end(), more.begin(), more.end());
        return words;
    }
};

// The trainer's program in a process of its own, which starts anew as this binary: OpenMP does not live through a fork.
Result run(const Words& words, const std::map<std::string, std::string>& environment = {}) {
    char out_name[] = "/tmp/keel_out_XXXXXX", err_name[] = "/tmp/keel_err_XXXXXX";
    int out = mkstemp(out_name), err = mkstemp(err_name);
    pid_t child = fork();
    if (child == 0) {
        setenv("KEEL_TEST_TRAINER", "1", 1);
        setenv("OMP_NUM_THREADS", "1", 1);  // such a small model is faster so
        for (const auto& [name, value] : environment) setenv(name.c_str(), value.c_str(), 1);
        dup2(out, 1), dup2(err, 2);
        exec_words(words, "/proc/self/exe");
    }
    int status = 0;
    waitpid(child, &status, 0);
    close(out), close(err);
    Result r{WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status), slurp(out_name), slurp(err_name)};
    unlink(out_name), unlink(err_name);
    return r;
}

// Before doctest's main: this binary as a trainer.
const bool is_trainer = [] {
    if (!getenv("KEEL_TEST_TRAINER")) return false;
    std::string words = slurp("/proc/self/cmdline");
    std::vector<char*> argv;
    for (size_t at = 0; at < words.size(); at += strlen(&words[at]) + 1) argv.push_back(&words[at]);
    int code = trainer_main<FaultyTrainer>(int(argv.size()), argv.data());
    fflush(stdout);
    exit(code);
}();

// The kinds that the detector names on a curve of the file, with their steps.
std::vector<std::pair<std::string, int64_t>> found_on(const std::string& name, int64_t warmup) {
    std::ifstream in("test/loss_curves.csv");
    std::string line, cell;
    std::getline(in, line);
    std::stringstream head(line);
    int column = 0;
    while (std::getline(head, cell, ',') && cell != name) column++;
    std::vector<double> curve;
    while (std::getline(in, line)) {
        std::stringstream cells(line);
        for (int i = 0; i <= column; i++) cell.clear(), std::getline(cells, cell, ',');
        if (!cell.empty()) curve.push_back(std::stod(cell));
    }
    REQUIRE(curve.size() >= 400);
    DivergenceDetector detector(int64_t(curve.size()), warmup, 3.160);  // the unigram entropy of these runs' text
    std::vector<std::pair<std::string, int64_t>> found;
    for (size_t i = 0; i < curve.size(); i++)
        if (std::string text = detector.add(int64_t(i) + 1, curve[i]); !text.empty())
            found.push_back({text.substr(0, text.find(':')), int64_t(i) + 1});
    return found;
}

}  // namespace

TEST_CASE("CRC-32: pieces combined are the CRC of the whole, by one thread and by many") {
    std::vector<unsigned char> bytes(size_t(23) << 20);
    for (size_t i = 0; i < bytes.size(); i++)
        bytes[i] = (unsigned char)(philox(1, uint32_t(i / 16), 0, 0, 90).word[i / 4 % 4] >> 8 * (i % 4));
    CHECK(crc32("123456789", 9) == 0xCBF43926u);  // the check value of the CRC catalogues
    uint32_t whole = crc32(bytes.data(), bytes.size());
    for (size_t cut : {size_t(0), size_t(1), size_t(7), size_t(4096), bytes.size() / 3, bytes.size() - 1, bytes.size()})
        CHECK(crc32_combine(crc32(bytes.data(), cut), crc32(bytes.data() + cut, bytes.size() - cut),
                            bytes.size() - cut) == whole);
    CHECK(crc32_parallel(bytes.data(), bytes.size()) == whole);
    CHECK(crc32_parallel(bytes.data() + 5, bytes.size() - 5, crc32(bytes.data(), 5)) == whole);
}

TEST_CASE("A step that is not finite updates nothing and is counted; a run that is resumed among such steps ends with "
          "the same bits") {
    Place p;
    const std::map<std::string, std::string> bad = {{"KEEL_TEST_BAD", "1,5,6,7,12,13,20"}};
    Result whole = run(p.tiny({"--max-skips", "4"}), bad);
    REQUIRE_MESSAGE(whole.code == 0, whole.err);
    CHECK(whole.out.find("skipped    step 7, whose loss or gradient is not finite: nothing is updated; 3 in a row, 4 "
                         "in all") != std::string::npos);
    CHECK(whole.out.find("skipped    7 of 24 steps") != std::string::npos);
    CHECK(slurp(p / "run/log.csv").find("\n6,nan,,") != std::string::npos);
    fs::rename(p / "run", p / "whole");
    for (int64_t from : {2, 4, 8, 10, 14}) {  // a checkpoint is not written in a skipped step
        fs::create_directory(p / "run");
        fs::copy(p / "whole/log.csv", p / "run/log.csv"),
            fs::copy(state_path(p / "whole", from), state_path(p / "run", from));
        Result r = run({"train", "-y", "-i", p.text, "-o", p / "run", "-s", "0", "-n", "2", "--keep", "0"}, bad);
        CHECK_MESSAGE(r.code == 0, r.err);
        CHECK_MESSAGE(slurp(state_path(p / "run", 24)) == slurp(state_path(p / "whole", 24)), from);
        CHECK_MESSAGE(log_without_times(p / "run/log.csv") == log_without_times(p / "whole/log.csv"), from);
        fs::remove_all(p / "run");
    }
    CHECK(!fs::exists(state_path(p / "whole", 6)));
    CHECK(!fs::exists(state_path(p / "whole", 12)));
    CHECK(fs::exists(state_path(p / "whole", 21)));  // the one that was due at 20
}

TEST_CASE("A step whose loss or gradient is an outlier is skipped where --skip-loss or --skip-grad asks, a resume "
          "skips the same, and a checkpoint is written then as after any step") {
    Place p;
    const std::map<std::string, std::string> spikes = {{"KEEL_TEST_SPIKES", "9,340,350"}};
    auto train = [&](const char* flag, const char* z) {
        Words words = p.tiny({flag, z});
        for (size_t i = 0; i < words.size(); i++)
            if (words[i] == "-x" || words[i] == "-n") words[i + 1] = words[i] == "-x" ? "400" : "20";
        Result r = run(words, spikes);
        CHECK_MESSAGE(r.code == 0, r.err);
        return r.out;
    };
    std::string out = train("--skip-grad", "8");
    CHECK_MESSAGE(out.find("skipped    step 340, whose gradient norm is ") != std::string::npos, out);
    CHECK(out.find("skipped    2 of 400 steps, whose loss or gradient was not finite or an outlier") != out.npos);
    fs::remove_all(p / "run");
    CHECK(train("--skip-grad", "0").find("skipped ") == std::string::npos);
    fs::remove_all(p / "run");
    out = train("--skip-loss", "5");
    CHECK_MESSAGE(out.find("skipped    step 340, whose loss is ") != std::string::npos, out);
    CHECK_MESSAGE(out.find("skipped    step 350, whose loss is ") != std::string::npos, out);
    fs::rename(p / "run", p / "whole");
    for (int64_t from : {320, 340}) {
        fs::create_directory(p / "run");
        fs::copy(p / "whole/log.csv", p / "run/log.csv");
        fs::copy(state_path(p / "whole", from), state_path(p / "run", from));
        Result r = run({"train", "-y", "-i", p.text, "-o", p / "run", "-s", "0", "-n", "20", "--keep", "0"}, spikes);
        CHECK_MESSAGE(r.code == 0, r.err);
        CHECK(r.out.find("changed ") == std::string::npos);
        CHECK_MESSAGE(slurp(state_path(p / "run", 400)) == slurp(state_path(p / "whole", 400)), from);
        fs::remove_all(p / "run");
    }
    fs::create_directory(p / "run");  // a run whose last step, here its only one, is an outlier ends as any other
    fs::copy(state_path(p / "whole", 320), state_path(p / "run", 320));
    const Words last = {"train", "-y", "-i", p.text, "-o", p / "run", "-s", "0", "-x", "321"};
    for (bool again : {false, true}) {
        Result r = run(last, {{"KEEL_TEST_SPIKES", "321"}});
        CHECK_MESSAGE((r.code == 0 && r.err.find("checkpoint") == std::string::npos), r.err);
        CHECK((r.out.find("skipped    step 321") != std::string::npos) != again);
        CHECK((r.out.find("the run has its 321 steps") != std::string::npos) == again);
    }
    // --max-skips of them end the run, with a checkpoint of the weights, which are sound
    Words more = last;
    more.back() = "400", more.insert(more.end(), {"--max-skips", "2"});
    Result r = run(more, {{"KEEL_TEST_SPIKES", "330,331"}});
    CHECK(r.code == 1);
    CHECK_MESSAGE(r.err.find("(--max-skips); a larger --skip-loss or --skip-grad, or else: ") != r.err.npos, r.err);
    CHECK(fs::exists(state_path(p / "run", 331)));
}

TEST_CASE("Of a table of --tune, which older states do not say, no change is said") {
    FileHeader before{}, now{};
    now.word[H_ATTENTION] = 2, now.word[H_TUNED] = 1;
    CHECK(changed_settings(before, now) == "attention from not said to wgmma");
    before.word[H_ATTENTION] = 2;
    CHECK(changed_settings(before, now) == "--tune from none to a table");
}

TEST_CASE("AdamW's bias corrections count updates, not steps: after a skipped first step the second is a first one") {
    Place p;
    auto end = [&](const char* bad, const char* steps) {
        Words words = p.tiny({"-u", "0", "-d", "16"});
        for (size_t i = 0; i < words.size(); i++)
            if (words[i] == "-x") words[i + 1] = steps;
        fs::remove_all(p / "run");
        REQUIRE(run(words, {{"KEEL_TEST_BAD", bad}}).code == 0);
        return slurp(state_path(p / "run", atoll(steps)));
    };
    std::string state = end("1", "2");
    FileHeader header;
    memcpy(&header, state.data(), sizeof header);
    CHECK(header.get<int64_t>(H_SKIPPED) == 1);
    CHECK(header.get<int64_t>(H_SKIPPED_IN_ROW) == 0);
    // One update from zero moments moves each weight by lr g / (|g| + eps) and its decay, whatever the step is called:
    // a correction for step 2 would move it by 0.73 of that.
    ModelConfig c = header.model();
    ParameterLayout layout(c);
    const float* after = reinterpret_cast<const float*>(state.data() + sizeof header);
    RunConfig run_config;
    run_config.steps = 2, run_config.lr = default_lr(c);
    double lr = learning_rate(run_config, 2);
    for (const TensorInfo& t : layout.tensors) {
        if (t.id != FCW) continue;
        std::vector<float> before(t.size());
        for (size_t i = 0; i < layout.tensors.size(); i++)
            if (&layout.tensors[i] == &t) initialise_tensor(before.data(), t, i, 1337, 0, t.rows);
        for (size_t e = 0; e < t.size(); e++) {
            double moved = std::fabs(double(after[t.offset + e]) - double(before[e]) * (1 - lr * 0.01));
            CHECK(moved == doctest::Approx(lr).epsilon(0.02 + 1e-6 / lr));
        }
    }
}

TEST_CASE("A run says what makes its matrix rate unsure, and small shares of it to two digits") {
    Place p;
    auto count = [](const std::string& text, const std::string& words) {
        int n = 0;
        for (size_t at = text.find(words); at != std::string::npos; at = text.find(words, at + 1)) n++;
        return n;
    };
    Result sure = run(p.tiny(), {{"KEEL_TEST_RATE", "1e13,1e13,1"}});
    REQUIRE_MESSAGE(sure.code == 0, sure.err);
    CHECK(sure.out.find("10000 GFLOP/s in matrix products\n") != std::string::npos);
    CHECK_MESSAGE((count(sure.out, "busy") == 0 && count(sure.out, "faster than") == 0), sure.out);
    std::string log = slurp(p / "run/log.csv");
    for (size_t row = log.find('\n'), line = 0, step = 1; step <= 24; step++) {
        size_t cell = row;
        for (int i = 0; i < 7; i++) cell = log.find(',', cell + 1);
        double mfu = atof(log.c_str() + cell + 1);
        line = sure.out.find(format("step %d/24 ", int(step)), line);
        size_t end = sure.out.find(" % of matrix rate", line), start = sure.out.rfind(' ', end - 1);
        double shown = atof(sure.out.c_str() + start) / 100;
        INFO(sure.out.substr(line, end - line) << ", mfu in log.csv " << mfu);
        CHECK((mfu > 0 && mfu < 0.01));
        CHECK(std::fabs(shown - mfu) <= 0.051 * mfu);  // half a unit in the second digit, and log.csv's fourth
        row = log.find('\n', row + 1);
    }
    fs::remove_all(p / "run");

    Result unsure = run(p.tiny(), {{"KEEL_TEST_RATE", "2e3,1e3,0.1"}});
    CHECK(unsure.out.find("note       the machine is busy: its threads had 10 % of their processors, so steps will be "
                          "slow; products ran at 0 (median) to 0 GFLOP/s, of which the fastest counts\n") !=
          std::string::npos);
    CHECK_MESSAGE(count(unsure.out, "note       step 1 was faster than the matrix rate") == 1, unsure.out);
    CHECK_MESSAGE(count(unsure.out, "faster than the matrix rate") == 1, unsure.out);
}

TEST_CASE("--max-skips: the run stops and names the last checkpoint from which a finite step was made") {
    Place p;
    Result r = run(p.tiny({"--max-skips", "3"}), {{"KEEL_TEST_BAD", "8,9,10,11"}});
    CHECK(r.code == 1);
    CHECK(std::count(r.err.begin(), r.err.end(), '\n') == 1);
    for (const char* words :
         {"step 10: expected a loss and gradient norm that are finite, found", "3 skipped in a row (--max-skips)",
          "last good checkpoint is", "state_00000006_00000.bin", "-y"})
        CHECK_MESSAGE(r.err.find(words) != std::string::npos, r.err);
    fs::remove_all(p / "run");
    // The update of step 8 went wrong: its checkpoint holds what cannot be trained, and the one before is named.
    r = run(p.tiny({"--max-skips", "3"}), {{"KEEL_TEST_BROKEN", "9"}});
    CHECK(r.code == 1);
    CHECK_MESSAGE(r.err.find("state_00000006_00000.bin: remove the newer ones") != std::string::npos, r.err);
    FileReader(state_path(p / "run", 6), FILE_STATE).finish();
    fs::remove_all(p / "run");
    r = run({"train", "-i", p.text, "-L", "4", "-C", "8", "-H", "2", "-t", "8", "-b", "2", "-n", "0", "--max-skips",
             "1"},
            {{"KEEL_TEST_BAD", "3"}});
    CHECK_MESSAGE(r.err.find("there is no checkpoint") != std::string::npos, r.err);
    // A checkpoint from which no finite step was made is never called good, however often a resume starts from it.
    r = run(p.tiny({"--max-skips", "3"}), {{"KEEL_TEST_BROKEN", "3"}});
    std::string dead = state_path(p / "run", 2), start_again = "no finite step was made from " + dead + ": start again";
    CHECK_MESSAGE(r.err.find(start_again) != std::string::npos, r.err);
    Words resume = {"train", "-y", "-i", p.text, "-o", p / "run", "-s", "0", "-n", "2", "--max-skips", "3"};
    r = run(resume, {{"KEEL_TEST_BROKEN", "3"}});
    CHECK_MESSAGE(r.err.find(start_again) != std::string::npos, r.err);
    REQUIRE(run(resume).code == 0);  // with steps 2, 4, ... 24
    fs::remove(state_path(p / "run", 24));
    r = run(resume, {{"KEEL_TEST_BROKEN", "23"}});
    CHECK_MESSAGE(r.err.find("no finite step was made from " + state_path(p / "run", 22) +
                             ": remove it and go on from " + state_path(p / "run", 20)) != std::string::npos,
                  r.err);
}

TEST_CASE("A run whose last steps were skipped says what it has left, and a resume goes on from before them; one whose "
          "every step was skipped fails") {
    Place p;
    Result r = run(p.tiny(), {{"KEEL_TEST_BAD", "23,24"}});
    CHECK(r.code == 0);
    CHECK_MESSAGE(r.err.find("found the last 2 steps skipped, and the weights those of step 22; the last good "
                             "checkpoint is " +
                             state_path(p / "run", 20)) != std::string::npos,
                  r.err);
    Result again = run({"train", "-y", "-i", p.text, "-o", p / "run", "-s", "0"});
    CHECK(again.code == 0);
    CHECK_MESSAGE(again.err.find("skipping a checkpoint: " + state_path(p / "run", 24) +
                                 ": expected one whose last step updated the weights") != std::string::npos,
                  again.err);
    CHECK(again.out.find("resuming   " + state_path(p / "run", 22)) != std::string::npos);
    fs::rename(p / "run", p / "mended");
    REQUIRE(run(p.tiny()).code == 0);
    CHECK(slurp(model_path(p / "mended", 24)) == slurp(model_path(p / "run", 24)));
    fs::remove_all(p / "run");
    r = run(p.tiny({"--max-skips", "99"}), {{"KEEL_TEST_BROKEN", "1"}});
    CHECK(r.code == 1);
    CHECK_MESSAGE(r.err.find("the last 24 steps skipped") != std::string::npos, r.err);
    r = run({"train", "-y", "-i", p.text, "-o", p / "run", "-s", "0"});
    CHECK(r.code == 1);
    CHECK_MESSAGE(r.err.find("expected a checkpoint to go on from") != std::string::npos, r.err);
}

TEST_CASE("A run whose last update broke the weights says so, also when it is resumed, and keeps the checkpoint "
          "before") {
    Place p;
    Words words = p.tiny();
    *(std::find(words.begin(), words.end(), "--keep") + 1) = "1";
    Result r = run(words, {{"KEEL_TEST_BREAKS", "24"}});
    for (int turn = 0; turn < 2; turn++) {
        CHECK(r.code == 0);
        CHECK_MESSAGE(r.err.find("found weights whose loss is not finite") != std::string::npos, r.err);
        CHECK(files_by_step(p / "run", STATE_PATTERN).size() == 2);
        r = run({"train", "-y", "-i", p.text, "-o", p / "run", "-s", "0", "--keep", "1"});
    }
}

TEST_CASE("--keep 1 leaves two checkpoints until a finite step was made from the newer") {
    Place p;
    Words words = p.tiny({"--max-skips", "3"});
    *(std::find(words.begin(), words.end(), "--keep") + 1) = "1";
    CHECK(run(words, {{"KEEL_TEST_BROKEN", "9"}}).code == 1);
    std::string steps;
    for (const auto& file : files_by_step(p / "run", STATE_PATTERN)) steps += format("%lld ", file.first);
    CHECK(steps == "8 6 ");
    CHECK(fs::exists(model_path(p / "run", 6)));
}

TEST_CASE("The checksum of data: of the tokens, not of their files; of all of them up to 2^24, else of blocks") {
    Place p;
    std::string text(size_t(17) << 20, 'a');
    auto sum = [&](const std::string& content, size_t first, size_t n) {
        spill(p / "data.txt", content);
        return TokenSource({p / "data.txt"}, "-i").checksum(first, n);
    };
    uint32_t whole = sum(text, 0, text.size()), small = sum(text, 5, 100000);
    for (size_t at : {size_t(0), text.size() - 1}) {
        text[at] = 'b';
        CHECK(sum(text, 0, text.size()) != whole);
        CHECK(sum(text, 5, 100000) == small);
        text[at] = 'a';
    }
    for (size_t at : {5, 16388, 16389, 70000, 100004}) {
        text[at] = 'b';
        CHECK_MESSAGE(sum(text, 5, 100000) != small, at);
        text[at] = 'a';
    }
    const size_t block = size_t(1) << 14, fifty = 50 * block;
    uint32_t even = sum(text, 0, fifty);
    for (size_t i = 1; i <= 50; i++) {  // the last token of each block
        text[i * block - 1] = 'b';
        CHECK_MESSAGE(sum(text, 0, fifty) != even, i);
        text[i * block - 1] = 'a';
    }
    spill(p / "1.txt", text.substr(0, 7)), spill(p / "2.txt", text.substr(7, 99998));
    CHECK(TokenSource({p / "[12].txt"}, "-i").checksum(5, 100000) == small);
}

TEST_CASE("Divergence: healthy recorded curves raise no alarm") {
    CHECK(found_on("keel", 100).empty());
    CHECK(found_on("keel_long", 200).empty());
    CHECK(found_on("pre", 100).empty());
}

TEST_CASE("Divergence: each of the paper's three kinds is found on recorded curves, while the run is not yet over") {
    struct {
        const char *curve, *kind;
        int64_t warmup, latest;
    } wanted[] = {{"post_64_layers", "stagnation", 100,
                   250},  // Post-LN at 64 layers, peak 3e-3: no gradient reaches the first layers
                  {"post_ramp", "stagnation", 600, 400},  // the paper's protocol: the rate rises through the whole run
                  {"keel_hot", "stagnation", 40, 250},    // peak 0.3, thirty times too much
                  {"pre_hot", "stagnation", 40, 250},
                  {"pre_ramp", "instability", 600, 600},  // from a rate of 0.1 on the loss climbs, and does not return
                  {"keel_slow", "degradation", 100, 400}};  // peak 1e-5, a thousandth of what it should be
    for (const auto& row : wanted) {
        auto found = found_on(row.curve, row.warmup);
        REQUIRE_MESSAGE(!found.empty(), row.curve);
        CHECK_MESSAGE(found[0].first == row.kind,
                      row.curve << ": " << found[0].first << " at step " << found[0].second);
        CHECK_MESSAGE(found[0].second <= row.latest, row.curve << ": at step " << found[0].second);
    }
}

TEST_CASE("Divergence: a spike that comes down again is none, and one that does not is") {
    auto alarm = [](bool returns) -> std::string {
        DivergenceDetector detector(1000, 0, 3.0);
        for (int64_t step = 1; step <= 1000; step++) {
            double noise = 0.1 * (uniform24(philox(7, uint32_t(step), 0, 0, 91).word[0]) - 0.5);
            double loss = 1.5 + 3 * std::exp(-double(step) / 60) + noise;
            if (step > 500) loss += returns ? 2 * std::exp(-double(step - 500) / 40) : 0.8;
            if (std::string text = detector.add(step, step == 300 ? NAN : loss); !text.empty()) return text;
        }
        return "";
    };
    CHECK(alarm(true) == "");
    CHECK_MESSAGE(alarm(false).starts_with("instability"), alarm(false));
}

TEST_CASE("Divergence in a run: a warning by default, a stop with --stop-on-divergence; a resume goes on watching "
          "where the log ends") {
    Place p;
    // Pure noise: nothing can be learned beyond how frequent each byte is, so the loss stays there.
    std::string noise;
    for (uint32_t i = 0; i < 40000; i++) noise += char('a' + philox(5, i, 0, 0, 92).word[0] % 16);
    spill(p.text, noise);
    auto words = [&](const Words& more) {
        Words all = {"train", "-i", p.text, "-L", "2",   "-C", "8",   "-H", "2", "-t", "8", "-b", "16",     "-u",
                     "20",    "-l", "0.02", "-x", "400", "-n", "100", "-v", "0", "-s", "0", "-o", p / "run"};
        all.insert(all.end(), more.begin(), more.end());
        return all;
    };
    Result r = run(words({}));
    CHECK(r.code == 0);
    CHECK_MESSAGE(r.err.find("warning: stagnation: the loss stays at 2.") != std::string::npos, r.err);
    fs::remove_all(p / "run");
    r = run(words({"--stop-on-divergence"}));
    CHECK(r.code == 1);
    CHECK_MESSAGE(r.err.find("(--stop-on-divergence)") != std::string::npos, r.err);
    int64_t last = 0;
    read_csv_rows(p / "run/log.csv", INT64_MAX, [&](int64_t step, const std::string&) { last = step; });
    CHECK(last < 400);
    Result again =
        run(words({"--stop-on-divergence", "-y"}));  // from step 100, before the alarm: it comes at the same step
    CHECK(again.code == 1);
    CHECK(again.err == r.err);
}

TEST_CASE("--keep: the newest K states and models stay, 0 keeps all, and checkpoints later than the one a resume took "
          "are left alone") {
    Place p;
    auto kept = [&](const Words& more) {
        fs::remove_all(p / "run");
        Words words = p.tiny(more);
        for (size_t i = 0; i + 1 < words.size(); i++)
            if (words[i] == "--keep") words.erase(words.begin() + long(i), words.begin() + long(i) + 2);
        REQUIRE(run(words).code == 0);
        std::string steps;
        auto states = files_by_step(p / "run", STATE_PATTERN), models = files_by_step(p / "run", MODEL_PATTERN);
        CHECK(states.size() == models.size());
        for (const auto& file : states) steps += format("%lld ", file.first);
        return steps;
    };
    CHECK(kept({}) == "24 22 20 ");
    CHECK(kept({"--keep=1"}) == "24 ");
    CHECK(kept({"--keep=0"}) == "24 22 20 18 16 14 12 10 8 6 4 2 ");
    CHECK(kept({"--keep=5"}) == "24 22 20 18 16 ");
    spill(state_path(p / "run", 24), "damaged"), spill(state_path(p / "run", 99), "damaged too");
    Result r = run({"train", "-y", "-i", p.text, "-o", p / "run", "-s", "0", "-n", "1", "--keep", "2"});
    CHECK_MESSAGE(r.code == 0, r.err);
    CHECK(r.err.find("skipping a checkpoint: " + state_path(p / "run", 99)) != std::string::npos);
    CHECK(r.err.find("skipping a checkpoint: " + state_path(p / "run", 24)) != std::string::npos);
    CHECK(files_by_step(p / "run", STATE_PATTERN).size() == 3);  // 23, 24 and what is not this run's
}

TEST_CASE("Checkpoints written in the background, from the snapshot, and while training waits have the same bytes; an "
          "error of the thread is thrown") {
    Place p;
    REQUIRE(run(p.tiny()).code == 0);
    fs::rename(p / "run", p / "background");
    DataSplit data(parse_command_line(3, std::array<const char*, 3>{"train", "-i", p.text.c_str()}.data()));
    FileReader file(state_path(p / "background", 24), FILE_STATE);
    Options o;
    RunConfig config = resolve_run(o, &file.header, {});
    Trainer trainer(config);
    load_body(trainer, file, trainer.layout().owned(0), SECTIONS), trainer.loaded(), file.finish();
    CsvLog log(p / "log.csv", "step", -1, false);
    for (bool background : {false, true}) {
        std::string folder = p / (background ? "b" : "f");
        fs::create_directory(folder);
        CheckpointWriter<Trainer> writer(trainer, data, folder, 0, background, {&log});
        writer.write(24);
        if (background) trainer.model.params.zero();  // the snapshot is what is written
        writer.wait();
        CHECK(slurp(state_path(folder, 24)) == slurp(state_path(p / "background", 24)));
        CHECK(slurp(model_path(folder, 24)) == slurp(model_path(p / "background", 24)));
    }
    // An error of the thread comes out of the next call, and what was there is untouched.
    CheckpointWriter<Trainer> writer(trainer, data, p / "none", 0, true, {&log});
    writer.write(24);
    CHECK_THROWS_AS(writer.wait(), Error);
}

TEST_CASE("The stall of a checkpoint of 1 GB is that of the copy") {
    if (getenv("KEEL_TEST_SMALL")) return;  // sanitizers are too slow for it
    Place p;
    ModelConfig c;
    c.max_seq_len = 64, c.V = 256, c.L = lean(4, 14), c.H = 16, c.C = 1024, c.norm = PRE;
    RunConfig config;
    config.model = c, config.T = 64, config.B = 1, config.total_batch = 64, config.recompute = {1};
    size_t bytes = 3 * parameter_count(c) * sizeof(real);
    if (available_memory() < 3 * bytes) return;
    Trainer trainer(config);
    trainer.initialise(1);
    DataSplit data(parse_command_line(3, std::array<const char*, 3>{"train", "-i", p.text.c_str()}.data()));
    CheckpointWriter<Trainer> writer(trainer, data, p.path, 1, true, {});
    double start = seconds();
    writer.write(1);
    double stall = seconds() - start;
    bool written = std::filesystem::exists(state_path(p.path, 1));
    writer.wait();
    double whole = seconds() - start;
    MESSAGE(format("a state of %.2f GB: training stalled for %.0f ms, written after %.2f s", double(bytes) * 1e-9,
                   stall * 1e3, whole));
    CHECK(bytes > lean<size_t>(300000000, 1000000000));
    CHECK(!written);  // when write() came back
    CHECK(std::filesystem::exists(state_path(p.path, 1)));
}

TEST_CASE("The lock: a second run is refused and told who holds the folder; a dead run's file stands in nobody's way") {
    Place p;
    {
        FolderLock lock(p.path);
        try {
            FolderLock second(p.path);
            FAIL("two locks");
        } catch (const Error& e) {
            CHECK_MESSAGE(std::string(e.what()).find(format("in use by process %d on ", getpid())) != std::string::npos,
                          e.what());
        }
        Words words = p.tiny();
        words.back() = p.path;
        Result r = run(words);
        CHECK(r.code == 1);
        CHECK_MESSAGE(r.err.find(format("in use by process %d on ", getpid())) != std::string::npos, r.err);
    }
    CHECK(!fs::exists(p / "lock"));
    spill(p / "lock", "process 1 on nowhere");
    FolderLock lock(p.path);
    CHECK(slurp(p / "lock").starts_with(format("process %d on ", getpid())));
}

TEST_CASE("A state whose numbers cannot be is refused although its CRC is right, and so is a debug state whose sizes "
          "overflow") {
    Place p;
    REQUIRE(run(p.tiny()).code == 0);
    std::string good = slurp(state_path(p / "run", 24));
    auto refused = [&](FileKind kind, const std::string& from, const std::function<void(FileHeader&)>& change,
                       const char* words) {
        std::string bad = from;
        FileHeader header;
        memcpy(&header, bad.data(), sizeof header);
        change(header);
        memcpy(bad.data(), &header, sizeof header);
        uint32_t crc = crc32(bad.data(), bad.size() - 4);
        memcpy(&bad[bad.size() - 4], &crc, 4);
        spill(p / "bad.bin", bad);
        try {
            FileReader(p / "bad.bin", kind).finish();
            FAIL(words);
        } catch (const Error& e) {
            CHECK_MESSAGE(std::string(e.what()).find(words) != std::string::npos, e.what());
        }
    };
    refused(FILE_STATE, good, [](FileHeader& h) { h.word[H_T] = 0; }, "T must be");
    refused(FILE_STATE, good, [](FileHeader& h) { h.word[H_B] = -1; }, "B must be");
    refused(FILE_STATE, good, [](FileHeader& h) { h.word[H_RECOMPUTE] = 7; }, "recomputation");
    refused(FILE_STATE, good, [](FileHeader& h) { h.set(H_TOTAL_BATCH, int64_t(17)); }, "total batch");
    refused(FILE_STATE, good, [](FileHeader& h) {
        h.set(H_TOTAL_BATCH, int64_t(1) << 36), h.word[H_B] = h.word[H_T] = 1;
    }, "total batch");  // the fuzzer's: 2^36 micro-batches
    refused(FILE_STATE, good, [](FileHeader& h) { h.set(H_STEP, int64_t(-1)); }, "the step");
    refused(FILE_STATE, good, [](FileHeader& h) { h.set(H_STEPS, INT64_MIN); }, "--steps");
    refused(FILE_STATE, good, [](FileHeader& h) { h.set(H_WARMUP, INT64_MAX); }, "--warmup");
    refused(FILE_STATE, good, [](FileHeader& h) { h.set(H_VAL_BATCHES, int64_t(0)); }, "--val-batches");
    refused(FILE_STATE, good, [](FileHeader& h) { h.set(H_LR, double(NAN)); }, "--lr");
    refused(FILE_STATE, good, [](FileHeader& h) { h.set(H_CLIP, -1.0); }, "clip");
    refused(FILE_STATE, good, [](FileHeader& h) { h.set(H_SKIPPED, int64_t(25)); }, "skipped steps");
    refused(FILE_STATE, good, [](FileHeader& h) { h.word[H_RANKS] = 0; }, "rank 0 of 0");
    refused(FILE_STATE, good, [](FileHeader& h) { h.word[H_RANK] = 1; }, "rank 1 of 1");
    refused(FILE_STATE, good, [](FileHeader& h) { h.word[H_RANKS] = 1 << 20; }, "of 1048576");
    refused(FILE_STATE, good, [](FileHeader& h) { h.word[H_RANKS] = 2, h.word[H_B] = 1; }, "bytes from its header");
    refused(FILE_MODEL, slurp(model_path(p / "run", 24)), [](FileHeader& h) { h.set(H_STEP, int64_t(-1)); },
            "step must be");
    // B T V and (L+1) B T C beyond 2^64
    refused(FILE_DEBUG, good, [](FileHeader& h) {
        h.word[H_KIND] = FILE_DEBUG, h.word[H_MAX_T] = h.word[H_T] = MAX_T, h.word[H_B] = MAX_B;
    }, "bytes from its header");
}

TEST_CASE("A pipe where a file is expected is refused, not waited for") {
    Place p;
    REQUIRE(mkfifo((p / "pipe").c_str(), 0600) == 0);
    REQUIRE(mkfifo((p / "pipe.bin").c_str(), 0600) == 0);
    for (const char* name : {"pipe", "pipe.bin"}) CHECK_THROWS_AS(TokenSource({p / name}, "-i"), Error);
    CHECK_THROWS_AS(FileReader(p / "pipe", FILE_MODEL), Error);
    CHECK_THROWS_AS(read_csv_rows(p / "pipe", 9, [](int64_t, const std::string&) {}), UnreadableError);
    CHECK_THROWS_AS(CsvLog(p / "pipe", "sublayer,val_loss"), Error);
}

TEST_CASE("Rows of a log: half a line, zeros, words, steps that go back and steps after the checkpoint are dropped") {
    Place p;
    spill(p / "log.csv",
          std::string("step,loss\n1,2.5\nnoise\n2,2.4\n1,9\n\n") + std::string(5, '\0') + "\n3,2.3\n4,2.2\n5,2");
    std::string rows;
    LogFaults faults = read_csv_rows(p / "log.csv", 3, [&](int64_t step, const std::string& line) {
        rows += format("%lld:", (long long)step) + line;
    });
    CHECK(rows == "1:1,2.5\n2:2,2.4\n3:3,2.3\n");
    CHECK(faults.odd == 4);
    CHECK(faults.first_odd == 3);
    CHECK(!faults.windows);
}
