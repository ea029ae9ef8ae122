// Tests of the real binaries, ./train_keel_cpu and ./train_keel_cpu_fp64: flags, bad input, resume, dumps, sampling.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
#include <signal.h>
#include <sys/wait.h>

#include <cfloat>
#include <fstream>
#include <functional>
#include <map>
#include <random>
#include <sstream>
#include <thread>

#include "files.h"
#include "keel/checkpoint.h"
#include "keel/process.h"
#include "long.h"

namespace {

namespace fs = std::filesystem;

// Runs a command with the given environment added; kill_at > 0 sends SIGKILL when it has printed that step, if not
// later.
Result run(const Words& words, const std::map<std::string, std::string>& environment = {}, int kill_at = 0) {
    char out_name[] = "/tmp/keel_out_XXXXXX", err_name[] = "/tmp/keel_err_XXXXXX";
    int out = mkstemp(out_name), err = mkstemp(err_name);
    pid_t child = fork();
    if (child == 0) {
        for (const auto& [name, value] : environment) setenv(name.c_str(), value.c_str(), 1);
        dup2(out, 1), dup2(err, 2);
        exec_words(words);
    }
    int status = 0;
    bool ended = false;
    while (kill_at > 0 && !ended) {
        std::string told = slurp(out_name);
        size_t last = told.rfind("\nstep ");
        if (last != std::string::npos && atoi(told.c_str() + last + 6) >= kill_at) break;
        ended = waitpid(child, &status, WNOHANG) == child;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    if (kill_at > 0 && !ended) kill(child, SIGKILL);
    if (!ended) waitpid(child, &status, 0);
    close(out), close(err);
    Result r{WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status), slurp(out_name), slurp(err_name)};
    unlink(out_name), unlink(err_name);
    return r;
}

// A folder with a text of 4000 bytes, and a command line for a tiny model on it.
struct Place {
    std::string path, text;
    Place() {
        char name[] = "/tmp/keel_run_XXXXXX";
        REQUIRE(mkdtemp(name));
        path = name, text = path + "/text.txt";
        std::string content;
        for (int i = 0; content.size() < 4000; i++) content += format("line %d of %d, ", i * i % 97, i);
        spill(text, content);
    }
    ~Place() { fs::remove_all(path); }
    std::string operator/(const std::string& name) const { return path + "/" + name; }
    Words tiny(const Words& more = {}, const std::string& binary = "./train_keel_cpu") const {
        Words words = {binary, "-i", text, "-L", "4", "-C", "8", "-H", "2", "-t", "8", "-b", "2"};
        if (std::find(more.begin(), more.end(), "--dump") == more.end())  // which refuses what trains
            for (const char* word : {"-x", "6", "-s", "0"}) words.push_back(word);
        for (const std::string& word : more) words.push_back(word);
        return words;
    }
    // path -> content of everything in the folder
    std::map<std::string, std::string> contents() const {
        std::map<std::string, std::string> all;
        std::error_code loop;  // of symbolic links
        for (const auto& entry : fs::recursive_directory_iterator(path))
            all[entry.path().string()] = entry.is_regular_file(loop) ? slurp(entry.path().string()) : "";
        return all;
    }
    // The command must fail with one line on stderr that has these words, and leave every file as it was.
    void fails(const Words& words, const Words& expected) const {
        auto before = contents();
        Result r = run(words);
        std::string command;
        for (const std::string& word : words) command += word + " ";
        INFO(command << "\nstderr: " << r.err);
        CHECK(r.code == 1);
        CHECK(std::count(r.err.begin(), r.err.end(), '\n') == 1);
        for (const std::string& word : expected)
            CHECK_MESSAGE(r.err.find(word) != std::string::npos, "missing: " << word);
        CHECK(contents() == before);
    }
};

Words operator+(Words a, const Words& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
}

Result succeeds(const Words& words, const std::map<std::string, std::string>& environment = {}) {
    Result r = run(words, environment);
    REQUIRE_MESSAGE(r.code == 0, words[0] << " " << r.out << r.err);
    return r;
}

std::string shard_of(size_t n, int below, int bad_at = -1, int bad = 0) {
    std::string s(1024, '\0');
    int h[] = {20240520, 1, int(n)};
    memcpy(&s[0], h, 12);
    std::mt19937 r(3);
    for (size_t i = 0; i < n; i++) {
        int t = int(i) == bad_at ? bad : int(r() % uint32_t(below));
        s += char(t & 255), s += char(t >> 8);
    }
    return s;
}

void mend_crc(std::string& bytes) {
    uint32_t crc = crc32(bytes.data(), bytes.size() - 4);
    memcpy(&bytes[bytes.size() - 4], &crc, 4);
}

}  // namespace

TEST_SUITE("flags") {
    TEST_CASE("-h lists every flag with its default, and so does the README") {
        Result r = succeeds({"./train_keel_cpu", "-h"});
        for (const Flag& f : flags) {
            CHECK_MESSAGE(r.out.find(std::string(f.long_name) + " ") != std::string::npos, f.long_name);
            CHECK(r.out.find(f.help) != std::string::npos);
        }
        std::string readme = slurp("README.md"), list = r.out.substr(r.out.find("\n\n") + 2);
        CHECK_MESSAGE(readme.find(list) != std::string::npos, "README.md does not hold the list that -h prints");
    }

    TEST_CASE("A flag and its value may be two words or one") {
        Place p;
        succeeds(p.tiny({"-o", p / "a", "--seed", "5"})), succeeds(p.tiny({"-o", p / "b", "--seed=5"}));
        CHECK(slurp(p / "a/model_00000006.bin") == slurp(p / "b/model_00000006.bin"));
    }

    TEST_CASE("Unknown flags, missing values, repeated flags and numbers that are none are refused") {
        Place p;
        p.fails({"./train_keel_cpu", "--lairs", "3"}, {"unknown flag '--lairs'", "-h"});
        p.fails({"./train_keel_cpu", "-L"}, {"-L", "expected", "found nothing"});
        p.fails(p.tiny({"-o", "-y"}), {"-o", "expected DIR", "found the flag -y"});
        p.fails({"./train_keel_cpu", "-L", "4", "--layers", "6"}, {"given twice"});
        p.fails({"./train_keel_cpu", "a.txt"}, {"a.txt", "quote a glob"});
        p.fails({"./train_keel_cpu", "-y=1"}, {"-y=1"});
        p.fails({"./train_keel_cpu", "-z", "1"}, {"-z", "one rank"});
        for (const char* flag : {"-L", "-C", "-b", "-x", "--seed", "-v", "--top-k"})
            for (const char* value : {"12x", "", "nan", "1.5", "0x10", "-5", "99999999999999999999"})
                p.fails({"./train_keel_cpu", flag, value}, {flag, "expected", "found"});
        for (const char* flag : {"-l", "-c", "--clip", "--temperature"})
            for (const char* value : {"x", "", "nan", "inf", "1e999", "-1", "3,5"})
                p.fails({"./train_keel_cpu", flag, value}, {flag, "expected", "found"});
    }
}

TEST_SUITE("bad input") {
    TEST_CASE("Shapes that cannot be: odd L, H that does not divide C, T over the model's, totals that are no "
              "multiple") {
        Place p;
        std::string o = p / "run";
        p.fails({"./train_keel_cpu", "-i", p.text, "-o", o, "-L", "5"}, {"-L", "expected an even", "found 5"});
        p.fails({"./train_keel_cpu", "-i", p.text, "-o", o, "-C", "12", "-H", "5"},
                {"-H", "expected a divisor", "found 5"});
        p.fails(p.tiny({"-o", o, "-d", "24"}), {"-d", "expected a multiple of 16", "found 24"});
        p.fails({"./train_keel_cpu", "-i", p.text, "-o", o, "-t", "1", "-b", "1", "-d", "900000000000"},
                {"-d", "at most 2147483647 sequences", "found 900000000000"});
        p.fails(p.tiny({"-o", o, "--norm", "batch"}), {"--norm", "keel, pre, post", "found 'batch'"});
        p.fails(p.tiny({"-o", o, "--norm", "pre", "-a", "3"}), {"-a", "no alpha"});
        for (const char* norm : {"keel", "deepnorm"})
            p.fails(p.tiny({"-o", o, "--norm", norm, "-a", "3e18"}), {"alpha (-a)", "at most 1.88", "is 3e+18"});
        succeeds(p.tiny({"--norm", "deepnorm", "-a", "1.88e18"}));
        p.fails(p.tiny({"-o", o, "-u", "7"}), {"-u", "expected at most the 6 steps", "found 7"});
        p.fails(p.tiny({"-o", o, "-r", "3"}), {"-r", "expected", "found '3'"});
        succeeds(p.tiny({"-o", p / "good"}));
        std::string model = p / "good/model_00000006.bin";
        p.fails({"./train_keel_cpu", "-i", p.text, "-o", o, "-e", model, "-t", "9"},
                {"-t", "expected at most 8", "found 9"});
        p.fails({"./train_keel_cpu", "-i", p.text, "-o", o, "-e", model, "-L", "6"},
                {"--layers", "expected 4", "found 6"});
        p.fails({"./train_keel_cpu", "-i", p.text, "-o", o, "-e", model, "--norm", "pre"},
                {"--norm", "expected keel", "found pre"});
    }

    TEST_CASE("Data that cannot be trained on: missing, empty, a folder, no match, too short, tokens past V, mixed "
              "kinds") {
        Place p;
        std::string o = p / "run";
        auto with = [&](const std::string& data) {
            return Words{
                "./train_keel_cpu", "-i", data, "-o", o, "-L", "4", "-C", "8", "-H", "2", "-t", "8", "-b", "2"};
        };
        spill(p / "empty.txt", ""), spill(p / "short.txt", "abcdefgh");
        p.fails(with(p / "missing.txt"), {"missing.txt", "cannot be read", "expected"});
        p.fails(with(p / "empty.txt"), {"empty.txt", "is empty"});
        p.fails(with(p.path), {"expected a file, found a folder; use: -i '" + (p / "*.txt'")});
        p.fails(with(p / "*.none"), {"matches no file"});
        p.fails(with(p / "short.txt"), {"expected at least 17 tokens", "found 8"});
        std::vector<int32_t> header(256);
        header[0] = 20240520, header[1] = 1, header[2] = 1000;
        std::vector<uint16_t> tokens(1000, 300);
        std::string shard((char*)header.data(), 1024);
        shard.append((char*)tokens.data(), 2000);
        spill(p / "s.bin", shard), spill(p / "cut.bin", shard.substr(0, 2000));
        header[0] = 7;
        spill(p / "other.bin", std::string((char*)header.data(), 1024) + shard.substr(1024));
        p.fails(with(p / "cut.bin"), {"expected 1000 tokens", "found 488"});
        p.fails(with(p / "other.bin"), {"expected a token shard", "found 7"});
        p.fails(with(p / "s*"), {"train on one kind"});
        succeeds(p.tiny({"-o", p / "good", "-n", "6"}));
        p.fails({"./train_keel_cpu", "-i", p / "s.bin", "-o", o, "-e", p / "good/model_00000006.bin"},
                {"expected tokens below the model's V = 256", "found 300"});
        p.fails(p.tiny({"-o", o, "-j", p.text}), {"-j", "as well"});
        p.fails(p.tiny({"-o", o, "-j", "hops:1"}), {"-j", "expected files like -i", "give -i hops:1"});
        p.fails(p.tiny({"-o", o, "-j", p / "short.txt"}), {"-j", "expected at least T + 1 = 9", "found 8"});
        Words words = with(p / "s.bin");
        for (const char* more : {"-x", "2", "-s", "0"}) words.push_back(more);
        succeeds(words);  // and a good shard trains
    }

    TEST_CASE("What is there by its very name is no glob, nor are the folders before one") {
        Place p;
        fs::resize_file(p.text, 4000);
        fs::create_directory(p / "texts [v2]");
        for (const char* name : {"data [v2].txt", "a*b.txt", "texts [v2]/1.txt", "texts [v2]/2.txt"})
            fs::copy(p.text, p / name);
        spill(p / "data v.txt", "what the glob 'data [v2].txt' matches, which is too little to train on");
        for (auto [data, count] : {std::pair{"data [v2].txt", 1}, {"a*b.txt", 1}, {"texts [v2]/*.txt", 2}}) {
            Words words = p.tiny({"-j", p.text});
            words[2] = p / data;
            std::string out = succeeds(words).out;
            CHECK_MESSAGE(out.find(format("%d.00 K tokens to train on", 4 * count)) != std::string::npos, out);
            std::swap(words[2], words.back());
            CHECK(succeeds(words).out.find(format("%d.00 K to validate on", 4 * count)) != std::string::npos);
        }
    }

    TEST_CASE("A glob passes over what holds no data, and what it has already, and says so") {
        Place p;
        fs::resize_file(p.text, 4000);
        auto with = [&](const std::string& data, const std::string& out) {
            Words words = p.tiny({"-o", p / out});
            words[2] = p / data;
            return words;
        };
        fs::create_directories(p / "d/folder.txt"), fs::create_directories(p / "d/more");
        spill(p / "d/a.txt", slurp(p.text)), spill(p / "d/empty.txt", "");
        fs::create_symlink("a.txt", p / "d/soft.txt"), fs::create_hard_link(p / "d/a.txt", p / "d/z.txt");
        REQUIRE(mkfifo((p / "d/pipe.txt").c_str(), 0600) == 0);
        Result r = succeeds(with("d/*", "d/more"));
        CHECK_MESSAGE(r.out.find("note       -i '" + (p / "d/*") + "' passes over " + (p / "d/empty.txt (empty), ") +
                                 (p / "d/folder.txt (a folder), ") + (p / "d/more (a folder) and 3 more\n")) !=
                          std::string::npos,
                      r.out);
        CHECK(r.out.find("3.60 K tokens to train on") != std::string::npos);
        r = succeeds(with("d/[sz]*.txt", "links"));
        CHECK(r.out.find((p / "d/z.txt") + " (a link to " + (p / "d/soft.txt") + ", counted once)") !=
              std::string::npos);
        // the run's own files, in the folder of its data
        fs::remove_all(p / "d"), fs::create_directory(p / "d"), fs::copy(p.text, p / "d/a.txt");
        Words words = with("d/*", "d") + Words{"--probe", "3"};
        succeeds(words), words.push_back("-y"), *std::find(words.begin(), words.end(), "6") = "9";
        r = succeeds(words);
        CHECK_MESSAGE(r.out.find("log.csv (a run's own)") != std::string::npos, r.out);
        CHECK(r.out.find("step 9/9") != std::string::npos);
        p.fails(with("d/[lp]*.csv", "x"), {"expected text", "found " + (p / "d/log.csv (a run's own)")});
        // a progress file and a model beside shards
        std::string tokens = shard_of(700, 50257);
        fs::create_directory(p / "s"), spill(p / "s/text_train_000001.bin", tokens);
        spill(p / "s/model.bin", "KEEL\1"), spill(p / "s/text_progress.json", "{\n \"settings\": {}}");
        CHECK(succeeds(with("s/*", "of_shards")).out.find("630 tokens to train on") != std::string::npos);
        p.fails(with("s", "x"), {"found a folder; use: -i '" + (p / "s/*_train_*.bin'")});
        // what should have had data is no smaller than it was
        fs::create_symlink("gone.txt", p / "d/b.txt");
        p.fails(with("d/*", "x"), {p / "d/b.txt", "cannot be read", "a link to gone.txt"});
        fs::remove(p / "d/b.txt"), spill(p / "d/b.bin", tokens);
        p.fails(with("d/*", "x"), {p / "d/b.bin", "train on one kind", "a glob such as '*.txt'"});
        fs::remove(p / "d/b.bin"), spill(p / "d/b.txt", slurp(p.text)), fs::permissions(p / "d/b.txt", fs::perms::none);
        if (access((p / "d/b.txt").c_str(), R_OK) != 0)  // root reads everything
            p.fails(with("d/*", "x"), {p / "d/b.txt", "cannot be read (Permission denied)"});
    }

    TEST_CASE("What the shell has not expanded, a ~, a $NAME, {a,b} or **, is said with the command that works") {
        Place p;
        fs::resize_file(p.text, 4000);
        fs::create_directories(p / "my texts/deep");
        for (const char* name : {"a.txt", "b.txt", "deep/c.txt"}) fs::copy(p.text, p / "my texts/" + name);
        std::string binary = fs::absolute("./train_keel_cpu").string();
        std::string rest = " -L 4 -C 8 -H 2 -t 8 -b 2 -x 2 -s 0 -v 0 ";
        auto bash = [&](const std::string& flags) {
            return run({"bash", "-c", format("cd %s && %s", p.path, flags)}, {{"HOME", p.path}});
        };
        struct {
            const char *flags, *expected, *trains_on;  // K tokens of the command that is named
        } cases[] = {{"-i '~/my texts/a.txt'", "-i: expected a path, found '~/my texts/a.txt', whose ~", "3.60"},
                     {"-i '~/my texts/*.txt'", "whose ~", "7.20"},
                     {"--train='$HOME/my texts/*.txt'", "whose $", "7.20"},
                     {"-i 'my texts/{a,b}.txt'", "whose {}", "7.20"},
                     {"-i 'my texts/{a..b}*.txt'", "whose {}", "7.20"},
                     {"-i 'my texts/**/*.txt'", "** is no more than *", "10.80"},
                     {"-i text.txt -j '~/my texts/a.txt'", "-j: expected a path", ""},
                     {"-i text.txt --out=~/run", "-o: expected a path, found '~/run', whose ~", ""},
                     {"-i text.txt -o '$HOME/run'", "-o: expected a path, found '$HOME/run', whose $", ""},
                     {"-i text.txt -o '{a,b}'", "-o: expected a path, found '{a,b}', whose {}", ""},
                     {"-e '~/m.bin' --prompt a", "-e: expected a path", ""},
                     {"-i text.txt --tokenizer=~/t.bin", "--tokenizer: expected a path", ""},
                     {"-i text.txt --dump=~/dump", "--dump: expected a path", ""},
                     {"--check '~'", "--check: expected a path", ""}};
        for (const auto& c : cases) {
            bool trains = *c.trains_on != 0;
            Result r = bash(binary + (trains ? rest : " ") + c.flags);
            INFO(std::string(c.flags) << "\n" << r.out << r.err);
            CHECK(r.code == 1);
            CHECK(std::count(r.err.begin(), r.err.end(), '\n') == 1);
            CHECK(r.err.find(c.expected) != std::string::npos);
            size_t at = r.err.find("use: ");
            if (!trains || at == std::string::npos) continue;
            std::string use = r.err.substr(at + 5, r.err.find('\n') - at - 5);
            use.resize(std::min(use.find(", or ./"), use.size()));
            fs::remove_all(p / "DIR");
            if (size_t flag = use.find(", and -i"); flag != use.npos) use.replace(flag, 5, " && " + binary + rest);
            else use = binary + rest + use;
            r = bash(use);
            INFO(use << "\n" << r.out << r.err);
            CHECK(r.code == 0);
            CHECK(r.out.find(std::string(": ") + c.trains_on + " K tokens to train on") != std::string::npos);
        }
        CHECK(bash("ls").out == "DIR\nmy texts\ntext.txt\n");
        fs::create_directory(p / "~"), fs::copy(p.text, p / "~/a{1,2}$x.txt");  // what is there is no ~ nor list
        CHECK(bash(binary + rest + "-i '~/a{1,2}$x.txt'").code == 0);
        CHECK(bash(binary + rest + "-i '~/a{1,2}*.txt' -o './$run'").code == 0);
        CHECK(bash(binary + rest + "-i text.txt -o 'run{}$'").code == 0);
    }

    TEST_CASE("The passes over the data are said, and that a model learns them by heart, with where to find more") {
        Place p;
        fs::resize_file(p.text, 400);
        auto out = [&](const Words& more) { return succeeds({p.tiny(more + Words{"-v", "0"})}).out; };
        std::string few = out({"-d", "240", "-o", p / "run"});  // 6 steps of 240 of 360
        CHECK_MESSAGE(few.find(", 4 passes over the data, ") != std::string::npos, few);
        CHECK(few.find("by heart") == std::string::npos);
        Words resume = p.tiny({"-v", "0", "-o", p / "run", "-y", "-d", "240"});
        *std::find(resume.begin(), resume.end(), "6") = "8";
        for (const std::string& many : {out({"-d", "320"}), succeeds(resume).out}) {
            CHECK_MESSAGE(many.find(", 5.33 passes over the data, ") != std::string::npos, many);
            CHECK_MESSAGE(many.find("K parameters see 360 tokens 5 times and learn them by heart") != std::string::npos,
                          many);
            CHECK(many.find("python3 data/tinyshakespeare.py\n") != std::string::npos);
        }
        // README's -L 1024, and a model that is too small to learn its text by heart
        DataSplit data(parse_command_line(3, std::array<const char*, 3>{"train", "-i", p.text.c_str()}.data()));
        RunConfig run;
        run.steps = 400, run.total_batch = 65536, data.train_count = 400000;
        CHECK(data.passes(run) == doctest::Approx(65.536));
        CHECK(data.repetition(run, 403000000).ends_with("python3 data/fineweb_edu.py --max-files 1"));
        CHECK(data.repetition(run, 20001).find("400.00 K tokens 66 times") != std::string::npos);
        CHECK(data.repetition(run, 20000) == "");
        run.steps = 24;  // 3.9 passes
        CHECK(data.repetition(run, 403000000) == "");
        run.steps = 400000;
        CHECK(data.repetition(run, 403000000).ends_with("python3 data/fineweb_edu.py"));
    }

    TEST_CASE("Output folders that cannot be: below a file, a file, one that holds a run") {
        Place p;
        p.fails(p.tiny({"-o", p.text + "/run"}), {"-o", "expected a folder"});
        p.fails(p.tiny({"-o", p.text}), {"-o", "expected a folder"});
        p.fails(p.tiny({"-o", "/proc/keel"}), {"-o", "cannot be"});
        fs::create_symlink("b", p / "a"), fs::create_symlink("a", p / "b");
        for (const std::string& name : {std::string(256, 'x'), "new/" + std::string(256, 'x'), std::string("a"),
                                        std::string("a/b"), std::string(5000, 'x')})
            p.fails(p.tiny({"-o", p / name}), {"-o", "cannot be", "another folder"});
        succeeds(p.tiny({"-o", p / "run"}));
        p.fails(p.tiny({"-o", p / "run"}), {"-o", "holds a run", "-y"});
        p.fails(p.tiny({"-y"}), {"-y", "add -o"});
    }

    TEST_CASE("Model files of another kind, version, type or size, or damaged, are refused") {
        Place p;
        succeeds(p.tiny({"-o", p / "good"})), succeeds(p.tiny({"--dump", p / "debug.bin"}));
        std::string good = slurp(p / "good/model_00000006.bin");
        auto with = [&](const std::string& file) {
            return Words{"./train_keel_cpu", "-i", p.text, "-o", p / "run", "-e", file};
        };
        auto changed = [&](int word, int32_t value) {
            std::string bad = good;
            memcpy(&bad[size_t(word) * 4], &value, 4);
            mend_crc(bad);
            spill(p / "bad.bin", bad);
            return p / "bad.bin";
        };
        p.fails(with(p / "missing.bin"), {"missing.bin", "cannot be read"});
        p.fails(with(p.text), {"expected", "KEEL"});
        p.fails(with(p / "good/state_00000006_00000.bin"), {"expected a model (kind 1)", "found a training state (kind "
                                                                                         "2)"});
        p.fails(with(p / "debug.bin"), {"expected a model (kind 1)", "found a debug state (kind 3)"});
        p.fails(with(changed(0, 1)), {"expected the bytes KEEL"});
        p.fails(with(changed(1, 2)), {"expected file version 1", "found 2"});
        p.fails(with(changed(3, 9)), {"type", "found 9"});
        p.fails(with(changed(7, 6)), {"bytes from its header", "found"});
        p.fails(with(changed(7, 1 << 30)), {"damaged"});
        p.fails(with(changed(9, 1 << 16)), {"damaged"});
        p.fails(with(changed(8, 3)), {"damaged"});
        p.fails(with(changed(10, 99)), {"damaged"});
        std::string bad = good;
        bad[2000] = char(bad[2000] ^ 4);
        spill(p / "bad.bin", bad);
        p.fails(with(p / "bad.bin"), {"expected CRC-32", "found"});
        spill(p / "bad.bin", good.substr(0, good.size() - 100));
        p.fails(with(p / "bad.bin"), {"expected", "bytes", "found"});
        spill(p / "bad.bin", good.substr(0, 100));
        p.fails(with(p / "bad.bin"), {"cut short"});
    }

    TEST_CASE("An error names what was given, and a mode refuses the flags that it does not use") {
        Place p;
        succeeds(p.tiny({"-o", p / "run", "-u", "5", "-n", "3"}));
        Words resume = {"./train_keel_cpu", "-i", p.text, "-y", "-o", p / "run"};
        p.fails(resume + Words{"-x", "5"}, {"-x: expected at least the 6 steps that the checkpoint has, found 5"});
        fs::remove(p / "run/state_00000006_00000.bin"), fs::remove(p / "run/model_00000006.bin");
        p.fails(resume + Words{"-x", "4"}, {"-x: expected at least the 5 steps of warm-up of the checkpoint, found 4"});
        p.fails(resume + Words{"-b", "3"}, {"-b: expected a multiple of 24 tokens (B*T)", "as in the checkpoint"});
        p.fails({"./train_keel_cpu", "-i", p.text, "-t", "8", "-b", "1048576"}, {"-i: expected", "or a smaller -b"});
        succeeds(p.tiny({"--dump", p / "d.bin"}));
        std::string model = p / "run/model_00000003.bin", dump = slurp(p / "d.bin");
        for (const Words& more : {Words{"-y", "-o", p / "run"}, {"-e", model}, {"-L", "4"}, {"-i", p.text}})
            p.fails(Words{"./train_keel_cpu", "--check", p / "d.bin"} + more, {"--check", "does not use --"});
        p.fails({"./train_keel_cpu", "-e", model, "--prompt", "a", "-l", "1"}, {"only samples", "not use --lr"});
        p.fails(p.tiny({"--dump", p / "d.bin", "-l", "1"}), {"--dump", "does not use --lr"});
        memset(&dump[4 * H_B], 0, 4), mend_crc(dump), spill(p / "bad.bin", dump);
        p.fails({"./train_keel_cpu", "--check", p / "bad.bin"}, {"B must be from 1 to", "and is 0"});
    }

    TEST_CASE("What a resume changes is said, old and new, with the learning rate before and after; what would change "
              "the order of the data is refused") {
        Place p;
        succeeds(p.tiny({"-o", p / "run", "-l", "0.01"}));
        Words resume = {"./train_keel_cpu", "-i", p.text, "-s", "0", "-y", "-o", p / "run"};
        for (auto [flag, value] : {std::pair{"-t", "4"}, {"-d", "48"}, {"--seed", "2"}})
            p.fails(resume + Words{flag, value}, {"as in the checkpoint", "in another order", "-e"});
        CHECK(succeeds(resume + Words{"-l", "0.01", "-d", "16"}).out.find("changed") == std::string::npos);
        auto changes = [&](const Words& more) {
            std::string out = succeeds(resume + more).out;
            size_t at = out.find("\nchanged    ");
            REQUIRE_MESSAGE(at != out.npos, out);
            return out.substr(at + 12, out.find('\n', at + 1) - at - 12);
        };
        std::string expected = "--steps from 6 to 12; the learning rate was 1e-07 at step 6 and is 0.00429 at step 7";
        CHECK(changes({"-x", "12"}) == expected);
        expected = "--lr from 0.01 to 0.02, --schedule from cosine to wsd, --final-lr from 0 to 0.5, --decay-steps "
                   "from 0 to 3, --steps from 12 to 18; the learning rate was 1e-07 at step 12 and is 0.02 at step 13";
        Words wsd = {"--schedule", "wsd", "--decay-steps", "3", "--final-lr", "0.5"};
        CHECK(changes(wsd + Words{"-x", "18", "-l", "0.02"}) == expected);
        expected = "--clip from 1 to 2, --skip-loss from 0 to 5, --batch from 2 to 1, --recompute from none to layer";
        CHECK(changes({"-r", "layer", "-b", "1", "--clip", "2", "--skip-loss", "5"}) == expected);
        CHECK(slurp(p / "run/log.csv").find("\n18,") != std::string::npos);
    }

    TEST_CASE("--schedule, --final-lr and --decay-steps refuse what has no use for them, and are in the training "
              "state") {
        Place p;
        p.fails(p.tiny({"--schedule", "step"}), {"--schedule: expected one of cosine, linear, wsd, constant"});
        p.fails(p.tiny({"--decay-steps", "2"}), {"--decay-steps: expected --schedule wsd, found cosine"});
        p.fails(p.tiny({"--schedule", "constant", "--final-lr", "0.1"}), {"--final-lr", "that falls, found constant"});
        for (const char* out : {"whole", "part"}) {
            Words words = p.tiny({"-o", p / out, "-n", "2", "--schedule", "wsd", "--final-lr", "0.2"});
            succeeds(words + Words{"--decay-steps", "4"});
        }
        for (const char* file : {"state_00000006_00000.bin", "model_00000006.bin", "state_00000004_00000.bin"})
            fs::remove(p / "part" + ("/" + std::string(file)));
        succeeds({"./train_keel_cpu", "-i", p.text, "-s", "0", "-n", "2", "-y", "-o", p / "part"});
        CHECK(slurp(p / "whole/state_00000006_00000.bin") == slurp(p / "part/state_00000006_00000.bin"));
        CHECK(log_without_times(p / "whole/log.csv") == log_without_times(p / "part/log.csv"));
    }

    TEST_CASE("Too little memory is said before it is taken, with the flag to turn") {
        Place p;
        auto limited = [&](const std::string& flags) {
            return Words{"bash", "-c",
                         "ulimit -v 3000000; exec ./train_keel_cpu -i " + p.text + " -o " + (p / "run") +
                             " -t 64 -d 128 " + flags};
        };
        for (const char* more : {"", " -b 2"})  // where the parameters alone do not fit, no -b helps
            p.fails(limited(std::string("-L 1024 -C 1024 -H 8") + more), {"memory: expected at least", "smaller -C, "
                                                                                                       "-L"});
        p.fails(Words{"bash", "-c",
                      "ulimit -v 3000000; exec ./train_keel_cpu -i keel_common.h -L 256 -C 64 -H 2 -t 64 -r none -b "
                      "256 -o " +
                          (p / "run")},
                {"memory: expected at least", "a smaller -b"});
        Result r;
        for (int limit = 30000; limit < 110000;
             limit += 8000) {  // KiB, from too little for the program itself to enough
            r = run({"bash", "-c",
                     format("ulimit -v %d; exec ./train_keel_cpu -i %s -L 8 -C 128 -H 2 -t 128 -b 8 -x 1 -v 0 -s 0",
                            limit, p.text.c_str())});
            INFO(limit << " KiB: " << r.err);
            CHECK((r.code == 0 || r.err.find("memory: expected at least") != std::string::npos ||
                   r.err.find("error while loading shared libraries") != std::string::npos));
        }
        // What fits only with recomputation is trained with it.
        r = run({"bash", "-c",
                 "ulimit -v 900000; OMP_NUM_THREADS=1 exec ./train_keel_cpu -i " + p.text +
                     " -L 256 -C 64 -H 2 -t 256 -b 8 -x 1 -v 0 -s 0"});
        INFO(r.out << r.err);
        CHECK(r.code == 0);
        CHECK(r.out.find("recompute none") == std::string::npos);
    }
}

TEST_SUITE("the run") {
    TEST_CASE("log.csv has the documented columns and a row a step; 0 means never, the end validates and checkpoints "
              "otherwise") {
        Place p;
        succeeds(p.tiny({"-o", p / "a", "-v", "4", "-n", "4"}));
        std::string log = slurp(p / "a/log.csv");
        CHECK(log.substr(0, log.find('\n')) == "step,loss,val_loss,lr,grad_norm,ms,tokens_per_second,mfu,val_bits_per_"
                                               "byte");
        CHECK(std::count(log.begin(), log.end(), '\n') == 7);
        std::stringstream in(log);
        std::string line;
        std::getline(in, line);
        for (int step = 1; std::getline(in, line); step++) {
            CHECK(std::stoi(line) == step);
            size_t second = line.find(',', line.find(',') + 1);
            CHECK((line[second + 1] == ',') == (step != 4 && step != 6));  // val_loss empty where not measured
        }
        for (const char* name :
             {"model_00000004.bin", "model_00000006.bin", "state_00000004_00000.bin", "state_00000006_00000.bin"})
            CHECK_MESSAGE(fs::exists(p / "a" + "/" + name), name);
        Result r = succeeds(p.tiny({"-o", p / "b", "-v", "0", "-n", "0"}));
        CHECK(r.out.find("validation |") == std::string::npos);
        CHECK(std::distance(fs::directory_iterator(p / "b"), {}) == 1);
        Words none = p.tiny({"-o", p / "c"});
        for (size_t i = 0; i < none.size(); i++)
            if (none[i] == "-x") none[i + 1] = "0";
        CHECK(succeeds(none).out.find("validation |") != std::string::npos);
        CHECK(fs::exists(p / "c/model_00000000.bin"));
        auto before = p.contents();
        succeeds(p.tiny());
        CHECK(p.contents() == before);  // without -o nothing is written
    }

    TEST_CASE("On a machine that others keep busy the matrix rate holds, and a note says that it is busy") {
        Place p;
        auto rate = [&](std::string& out) {
            out = succeeds(p.tiny({"-v", "0", "-n", "0"})).out;
            size_t end = out.find(" GFLOP/s in matrix products");
            REQUIRE_MESSAGE(end != std::string::npos, out);
            return atof(out.c_str() + out.rfind(' ', end - 1));
        };
        std::string out;
        double as_it_is = rate(out);
        struct Others {  // busy loops, to the end of the test
            std::vector<pid_t> children;
            Others() {
                for (unsigned i = 0; i < 4 * std::thread::hardware_concurrency(); i++) {
                    children.push_back(fork());
                    if (children.back() == 0)
                        for (volatile unsigned spin = 0;;) spin = spin + 1;
                }
            }
            ~Others() {
                for (pid_t child : children) kill(child, SIGKILL), waitpid(child, nullptr, 0);
            }
        } others;
        bool said = false;
        for (int turn = 0; turn < 20 && !said; turn++) {  // a process just begun may be given its first 20 ms in one
            double busy = rate(out);
            INFO(as_it_is << " GFLOP/s, then beside " << others.children.size() << " others " << busy << "\n" << out);
            CHECK(busy > 0.4 * as_it_is);  // half: where two of the machine's processors share one core
            said = out.find("note       the machine is busy: its threads had ") != std::string::npos;
        }
        CHECK_MESSAGE(said, out);
    }

    TEST_CASE("The same bits for any number of threads, FP32 and FP64") {
        Place p;
        for (const char* binary : {"./train_keel_cpu", "./train_keel_cpu_fp64"}) {
            std::string first;
            for (const char* threads : {"1", "2", "3", "7"}) {
                std::string out = p / threads;
                succeeds({binary, "-i", p.text, "-L",  "6",  "-C", "24", "-H", "3",  "-t", "70",
                          "-b",   "3",  "-d",   "420", "-x", "3",  "-s", "0",  "-o", out},
                         {{"OMP_NUM_THREADS", threads}});
                std::string model = slurp(out + "/model_00000003.bin");
                if (first.empty()) first = model;
                CHECK_MESSAGE(model == first, binary << " with " << threads << " threads");
                fs::remove_all(out);
            }
        }
    }

    TEST_CASE("OMP_NUM_THREADS that is no number of threads is refused, more than there are processors noted, and a "
              "limit of threads or of a control group's CPU time kept") {
        Place p;
        for (const char* threads : {"0", "-1", "x", "2x", "4097", "99999999999999999999"}) {
            Result r = run(p.tiny(), {{"OMP_NUM_THREADS", threads}});
            INFO(threads, ": ", r.out, r.err);
            CHECK(r.code == 1);
            CHECK(r.err.find(format("expected a number of threads from 1 to 4096 in the environment, found '%s'",
                                    threads)) != std::string::npos);
            CHECK(r.out.empty());
        }
        auto says = [&](const std::map<std::string, std::string>& environment, const std::string& text) {
            Result r = run(p.tiny(), environment);
            INFO(text, ": ", r.out, r.err);
            CHECK(r.code == 0);
            return ("\n" + r.out).find("\n" + text) != std::string::npos;
        };
        unsigned processors = std::thread::hardware_concurrency();
        std::string many = std::to_string(processors + 1), note = "note       OMP_NUM_THREADS asks for " + many;
        CHECK(says({{"OMP_NUM_THREADS", many + ",2"}}, note + " threads on"));
        CHECK(says({{"OMP_NUM_THREADS", many}}, "machine    " + many + " threads"));
        CHECK(!says({{"OMP_NUM_THREADS", ""}}, "note       OMP_NUM_THREADS"));
        CHECK(says({{"OMP_NUM_THREADS", "2"}, {"OMP_THREAD_LIMIT", "1"}}, "machine    1 threads"));

        CHECK(group_processors(p.path) == INT_MAX);
        for (auto& [text, limit] :
             std::map<std::string, int>{{"max 100000\n", INT_MAX}, {"150000 100000\n", 2}, {"50000 100000\n", 1}}) {
            spill(p / "cpu.max", text);
            CHECK_MESSAGE(group_processors(p.path) == limit, text);
        }
        fs::remove(p / "cpu.max"), fs::create_directory(p / "cpu");
        spill(p / "cpu/cpu.cfs_quota_us", "-1\n"), spill(p / "cpu/cpu.cfs_period_us", "100000\n");
        CHECK(group_processors(p.path) == INT_MAX);
        spill(p / "cpu/cpu.cfs_quota_us", "400000\n");
        CHECK(group_processors(p.path) == 4);
    }

    TEST_CASE("A run that is killed anywhere and resumed ends with the bits and the log of one that never was, in all "
              "placements") {
        for (const PlacementRow& placement : placements) {
            Place p;
            auto command = [&](const std::string& out) {
                Words words = p.tiny({"--norm", placement.name, "-d", "32", "-n", "7", "-v", "5", "-o", out, "-y"});
                for (size_t i = 0; i < words.size(); i++)
                    if (words[i] == "-x") words[i + 1] = "120";
                return words;
            };
            // one thread: such a small model is faster so, and the kills fall into every part of the run
            const std::map<std::string, std::string> one_thread = {{"OMP_NUM_THREADS", "1"}};
            succeeds(command(p / "whole"), one_thread);
            int kills = 0;
            for (int i = 0; i < 6; i++) {
                int at = 1 + 18 * i + int(philox(uint64_t(i), uint32_t(placement.name[0]), 0, 0, 80).word[0] % 18);
                kills += run(command(p / "killed"), one_thread, at).code == -SIGKILL;
            }
            succeeds(command(p / "killed"), one_thread);
            CHECK(kills > 0);
            INFO(placement.name << ", killed " << kills << " times");
            CHECK(slurp(p / "whole/model_00000120.bin") == slurp(p / "killed/model_00000120.bin"));
            CHECK(slurp(p / "whole/state_00000120_00000.bin") == slurp(p / "killed/state_00000120_00000.bin"));
            CHECK(log_without_times(p / "whole/log.csv") == log_without_times(p / "killed/log.csv"));
        }
    }

    TEST_CASE("A resume needs the folder and the data alone, skips a damaged checkpoint, and refuses another model or "
              "other data") {
        Place p;
        succeeds(p.tiny({"-o", p / "whole", "-n", "2", "-l", "0.02", "--seed", "9"}));
        fs::copy(p / "whole", p / "part");
        fs::remove(p / "part/state_00000006_00000.bin");
        std::string newest = p / "part/state_00000004_00000.bin", bytes = slurp(newest);
        bytes[3000] = char(bytes[3000] ^ 1);
        spill(newest, bytes);
        Words resume = {"./train_keel_cpu", "-i", p.text, "-o", p / "part", "-y", "-s", "0", "-n", "2"};
        for (auto [flag, value, name] : std::vector<std::array<const char*, 3>>{{"-L", "6", "--layers"},
                                                                                {"-C", "16", "--channels"},
                                                                                {"-H", "4", "--heads"},
                                                                                {"--norm", "post", "--norm"}}) {
            Words words = resume;
            words.push_back(flag), words.push_back(value);
            Result r = run(words);
            CHECK(r.code == 1);
            CHECK_MESSAGE(r.err.find(std::string(name) + ": expected") != std::string::npos, r.err);
        }
        spill(p / "other.txt", slurp(p.text) + "more than before");
        Words other = resume;
        other[2] = p / "other.txt";
        CHECK(run(other).err.find("training tokens of the checkpoint") != std::string::npos);
        Result r = succeeds(resume);
        CHECK_MESSAGE(r.err.find("state_00000004_00000.bin: expected CRC-32") != std::string::npos, r.err);
        CHECK(r.out.find("state_00000002_00000.bin") != std::string::npos);
        CHECK(slurp(p / "whole/model_00000006.bin") == slurp(p / "part/model_00000006.bin"));
        CHECK(log_without_times(p / "whole/log.csv") == log_without_times(p / "part/log.csv"));
        fs::create_directory(p / "models");
        fs::copy(p / "whole/model_00000006.bin", p / "models/model_00000006.bin");
        p.fails({"./train_keel_cpu", "-i", p.text, "-o", p / "models", "-y"},
                {"-y", "expected a training state", "found only models"});
        for (const char* step : {"2", "4", "6"}) spill(p / "part/state_0000000" + step + "_00000.bin", "KEEL");
        r = run(resume);
        CHECK(r.code == 1);
        CHECK(r.err.find("found none among 3") != std::string::npos);
    }

    TEST_CASE("Every level of recomputation ends with the same model, but for the level stored in the state") {
        Place p;
        std::string first;
        for (const char* level : {"none", "gelu", "layer", "2", "4"}) {
            succeeds(p.tiny({"-r", level, "-o", p / level}));
            std::string model = slurp(p / level + std::string("/model_00000006.bin"));
            if (first.empty()) first = model;
            CHECK_MESSAGE(model == first, level);
        }
    }

    TEST_CASE("-e goes on from a model, of either build") {
        Place p;
        succeeds(p.tiny({"-o", p / "a", "-l", "0.02"}));
        succeeds(p.tiny({"-o", p / "b", "-l", "0.02"}, "./train_keel_cpu_fp64"));
        for (const char* binary : {"./train_keel_cpu", "./train_keel_cpu_fp64"})
            for (const char* from : {"a", "b"}) {
                succeeds({binary, "-i", p.text, "-e", p / from + std::string("/model_00000006.bin"), "-x", "1", "-l",
                          "0", "-b", "2", "-s", "0", "-o", p / "c"});
                // no step at a learning rate of 0: the validation loss is that of the model it started from
                auto last_val = [&](const std::string& folder) {
                    std::string log = slurp(p / folder + "/log.csv");
                    std::string line = log.substr(log.rfind('\n', log.size() - 2) + 1);
                    return std::stod(line.substr(line.find(',', line.find(',') + 1) + 1));
                };
                CHECK(last_val("c") == doctest::Approx(last_val(from)).epsilon(1e-4));
                fs::remove_all(p / "c");
            }
    }

    TEST_CASE("Where memory holds the run but no snapshot, checkpoints are written while training waits, which is "
              "said") {
        Place p;
        bool said = false, silent = false;
        for (int limit = 40000; limit <= 120000 && !silent; limit += 5000) {  // KiB
            fs::remove_all(p / "run");
            Result r = run({"bash", "-c",
                            format("ulimit -v %d; exec ./train_keel_cpu -i %s -L 16 -C 128 -H 2 -t 64 -b 4 -r layer -x "
                                   "1 -n 1 -v 0 -s 0 -o %s",
                                   limit, p.text.c_str(), (p / "run").c_str())},
                           {{"OMP_NUM_THREADS", "1"}});
            if (r.code != 0) continue;
            bool note = r.out.find("does not fit into the") != std::string::npos;
            (note ? said : silent) = true;
            CHECK(note ==
                  (r.out.find("snapshot for checkpoints") == std::string::npos));  // its row in the memory table
            CHECK(fs::exists(p / "run/state_00000001_00000.bin"));
        }
        CHECK(said);
        CHECK(silent);
    }

    TEST_CASE("Where memory is short, activations are made again in as few sub-layers as will do, with the same bits, "
              "and a resume that has more memory goes on with them") {
        Place p;
        std::string flags = format("-i %s -L 16 -C 64 -H 2 -t 128 -b 16 -d 2048 -x 4 -n 2 -v 0 -s 0", p.text.c_str());
        auto train = [&](int limit, const char* folder, const char* more) {  // KiB of address space
            return run({"bash", "-c",
                        format("ulimit -v %d; exec ./train_keel_cpu %s -o %s %s", limit, flags, p / folder, more)},
                       {{"OMP_NUM_THREADS", "1"}});
        };
        CHECK(train(1 << 20, "whole", "").out.find("recompute none") != std::string::npos);
        std::string expected = slurp(p / "whole/model_00000004.bin");
        int partial = 0;
        for (int limit = 90000; limit <= 200000; limit += 2000) {
            fs::remove_all(p / "run");
            Result r = train(limit, "run", "");
            if (r.out.find("of 16 sub-layers") == std::string::npos) continue;
            partial++;
            CHECK(slurp(p / "run/model_00000004.bin") == expected);
            for (const char* file : {"model", "state"})
                for (const auto& entry : fs::directory_iterator(p / "run"))
                    if (entry.path().filename().string().find(std::string(file) + "_00000004") == 0)
                        fs::remove(entry.path());
            CHECK(train(1 << 20, "run", "-y").out.find("in 2 of 16 sub-layers") != std::string::npos);
            CHECK(slurp(p / "run/model_00000004.bin") == expected);
            if (partial == 2) break;
        }
        CHECK(partial > 0);
    }

    TEST_CASE("--probe writes a row for each sub-layer and for each tensor, and changes no bit") {
        Place p;
        succeeds(p.tiny({"-o", p / "a", "--probe", "2"})), succeeds(p.tiny({"-o", p / "b"}));
        CHECK(slurp(p / "a/model_00000006.bin") == slurp(p / "b/model_00000006.bin"));
        std::string csv = slurp(p / "a/probe.csv");
        CHECK(std::count(csv.begin(), csv.end(), '\n') == 1 + 3 * 4);
        CHECK(csv.find("nan") == std::string::npos);
        CHECK(csv.starts_with("step,sublayer,kind,rms_x,rms_f,rms_z,shortcut_gain,shortcut_gain_to_top,dx_norm,df_norm,"
                              "grad_norm,update_norm,same_x\n2,0,attention,"));
        ModelConfig c;
        c.max_seq_len = 8, c.V = 256, c.L = 4, c.H = 2, c.C = 8;
        csv = slurp(p / "a/probe_weights.csv");
        CHECK(csv.starts_with("step,sublayer,tensor,weight_norm,grad_norm,update_norm\n2,-1,wte,"));
        CHECK(std::count(csv.begin(), csv.end(), '\n') == long(1 + 3 * ParameterLayout(c).tensors.size()));
        CHECK(csv.find("nan") == std::string::npos);
    }

    TEST_CASE("A gradient that dies over depth is 0 where it would fall below the normal range, which slows every "
              "step") {
        Place p;
        Words w = {"./train_keel_cpu", "-i", p.text, "-o", p / "a"};
        std::istringstream flags("-L 1024 -C 8 -H 2 -t 8 -b 2 --norm post -l 1e-2 -u 10 -x 40 -v 0 -n 0 -s 0 --probe "
                                 "40");
        for (std::string word; flags >> word;) w.push_back(word);
        succeeds(w);
        std::istringstream csv(slurp(p / "a/probe.csv"));
        int zero = 0, normal = 0;
        for (std::string row; std::getline(csv, row);) {
            if (!row.starts_with("40,")) continue;
            for (int column = 0; column < 8; column++) row.erase(0, row.find(',') + 1);
            double dx_norm = std::stod(row);
            CHECK_MESSAGE((dx_norm == 0 || dx_norm >= FLT_MIN), dx_norm);
            (dx_norm == 0 ? zero : normal)++;
        }
        CHECK(zero > 100);
        CHECK(normal > 100);
    }

    TEST_CASE("hops:K trains without a file, reports the accuracy of each number of lookups at each validation, and "
              "resumes to the same folder") {
        Place p;
        Words w = {"./train_keel_cpu",
                   "-i",
                   "hops:2",
                   "-L",
                   "4",
                   "-C",
                   "8",
                   "-H",
                   "2",
                   "-b",
                   "2",
                   "-x",
                   "6",
                   "-s",
                   "0",
                   "-v",
                   "2",
                   "-m",
                   "30",
                   "-n",
                   "3",
                   "-o"};
        Result r = succeeds(w + Words{p / "whole"});
        CHECK(r.out.find("5 variables, 8 queries of 1 to 2 lookups; 1 whole ones of 52 characters a sequence") !=
              std::string::npos);
        CHECK(r.out.find("of 60 | by chance 25.0 %") != std::string::npos);
        std::stringstream csv(slurp(p / "whole/hops.csv"));
        std::string line;
        std::getline(csv, line);
        CHECK(line == "step,hops,accuracy,count");
        for (int step : {2, 4, 6}) {
            int count[2], at, hops;
            double accuracy;
            for (int h : {1, 2}) {
                REQUIRE(std::getline(csv, line));
                REQUIRE(sscanf(line.c_str(), "%d,%d,%lf,%d", &at, &hops, &accuracy, &count[h - 1]) == 4);
                CHECK(at == step);
                CHECK(hops == h);
                CHECK((accuracy >= 0 && accuracy <= 1));
            }
            CHECK(count[0] + count[1] == 60);  // 30 batches of 2 programs
        }
        CHECK(!std::getline(csv, line));

        fs::copy(p / "whole", p / "part");
        fs::remove(p / "part/model_00000006.bin"), fs::remove(p / "part/state_00000006_00000.bin");
        succeeds({"./train_keel_cpu", "-i", "hops:2", "-s", "0", "-y", "-o", p / "part"});
        for (const char* file : {"model_00000006.bin", "state_00000006_00000.bin", "hops.csv"})
            CHECK_MESSAGE(slurp(p / "whole/" + file) == slurp(p / "part/" + file), file);
        p.fails({"./train_keel_cpu", "-i", "hops:3", "-y", "-o", p / "whole"},
                {"-i", "expected hops:2", "found hops:3"});
        p.fails({"./train_keel_cpu", "-i", p.text, "-y", "-o", p / "whole"}, {"-i", "expected hops:2", "found files"});
        succeeds(p.tiny({"-o", p / "text"}));
        p.fails({"./train_keel_cpu", "-i", "hops:2", "-y", "-o", p / "text"}, {"-i", "expected files", "found hops:2"});
    }

    TEST_CASE("hops:K without a number from 1 to 9, with -j, or in sequences that hold no program is refused; a file "
              "of that name is a path") {
        Place p;
        for (const char* word :
             {"hops:0", "hops:10", "hops:", "hops:x", "hops:-1", "hops:+1", "hops:2.5", "hops:99999999999", "hops:3,4"})
            p.fails({"./train_keel_cpu", "-i", word}, {"-i", "expected hops:K", "from 1 to 9", "found", word});
        p.fails({"./train_keel_cpu", "-i", "hops:2", "-j", p.text}, {"-j", "expected none", "hops:2", "found"});
        p.fails({"./train_keel_cpu", "-i", "hops:2", "-t", "50"}, {"-t", "expected at least 51", "found 50"});
        spill(p / "hops:2", slurp(p.text));
        succeeds(p.tiny({"-j", p / "hops:2"}));
    }

    TEST_CASE("--ablate prints and writes the loss without each sub-layer; the whole model's is that of its run's last "
              "validation") {
        Place p;
        succeeds(p.tiny({"-o", p / "run", "-l", "0.03"}));
        std::string model = p / "run/model_00000006.bin", before = slurp(model), log = slurp(p / "run/log.csv");
        Words w = {"./train_keel_cpu", "-i", p.text, "-e", model, "-b", "2", "--ablate"};
        Result all = succeeds(w + Words{"all", "-o", p / "run"}), printed = succeeds(w + Words{"all"}),
               one = succeeds(w + Words{"2"});
        std::string csv = slurp(p / "run/ablate.csv");
        CHECK(all.out.ends_with(csv));
        CHECK(printed.out.ends_with(csv));
        CHECK(std::count(csv.begin(), csv.end(), '\n') == 6);
        CHECK(csv.starts_with("sublayer,kind,val_loss,perplexity,perplexity_lost\n-1,whole model,"));
        std::string row = csv.substr(csv.find("\n2,attention,") + 1);
        CHECK(one.out.ends_with(row.substr(0, row.find('\n') + 1)));
        CHECK(csv.find("\n3,feed-forward,") != std::string::npos);
        double loss, whole, perplexity, lost, last_loss = 0;
        REQUIRE(sscanf(csv.c_str() + csv.find("model,") + 6, "%lf", &loss) == 1);
        std::string last = log.substr(log.rfind('\n', log.size() - 2) + 1);
        REQUIRE(sscanf(last.c_str(), "6,%*f,%lf", &last_loss) == 1);
        CHECK(std::fabs(loss / last_loss - 1) < 1e-6);
        REQUIRE(sscanf(row.c_str(), "2,attention,%lf,%lf,%lf", &loss, &perplexity, &lost) == 3);
        REQUIRE(sscanf(csv.c_str() + csv.find("model,") + 6, "%*f,%lf", &whole) == 1);
        CHECK(perplexity == doctest::Approx(std::exp(loss)));
        CHECK(lost == doctest::Approx(perplexity - whole).epsilon(1e-3));
        CHECK(slurp(model) == before);
        CHECK(slurp(p / "run/log.csv") == log);
        CHECK(!fs::exists(p / "run/lock"));
    }

    TEST_CASE("--ablate without a model, with a run to make, or of a sub-layer that is not there is refused") {
        Place p;
        succeeds(p.tiny({"-o", p / "run"}));
        std::string model = p / "run/model_00000006.bin";
        p.fails(p.tiny({"--ablate", "all"}), {"--ablate", "expected a model with -e", "found none"});
        Words w = {"./train_keel_cpu", "-i", p.text, "-e", model, "--ablate"};
        for (const char* which : {"4", "-1", "x", "1.5", "All", "0,1"})
            p.fails(w + Words{which}, {"--ablate", "expected", "found"});
        for (const Words& more : {Words{"--probe", "1", "-o", p / "new"}, Words{"--dump", p / "d.bin"},
                                  Words{"--check", p / "d.bin"}, Words{"--prompt", "a"}, Words{"-x", "3"}})
            p.fails(w + Words{"all"} + more, {"--ablate", "leave one of the two out"});
        p.fails({"./train_keel_cpu", "-i", p.text, "-e", model, "-y", "-o", p / "run", "--ablate", "all"}, {"--"
                                                                                                            "resume"});
        p.fails(w + Words{"all", "-j", p / "none"}, {"none"});
    }
}

TEST_SUITE("dump and check") {
    TEST_CASE("A dump of either build passes the check of the other, in all placements and at L = 64") {
        Place p;
        auto both_ways = [&](const Words& words) {
            for (auto [writer, reader] : {std::pair("./train_keel_cpu", "./train_keel_cpu_fp64"),
                                          {"./train_keel_cpu_fp64", "./train_keel_cpu"}}) {
                Words dump = words;
                dump[0] = writer;
                succeeds(dump);
                Result r = run({reader, "--check", p / "d.bin"});
                CHECK_MESSAGE(r.code == 0, r.out);
            }
        };
        for (const PlacementRow& placement : placements)
            both_ways(p.tiny({"--norm", placement.name, "--dump", p / "d.bin"}));
        both_ways({"", "-i", p.text, "-L", "64", "-C", "64", "-H", "2", "-t", "64", "-b", "2", "--dump", p / "d.bin"});
    }

    TEST_CASE("A run whose losses are not finite stops after --max-skips of them, and names the last good checkpoint") {
        Place p;
        Words words = p.tiny({"-l", "1e9", "-c", "1e9", "-o", p / "run", "-n", "1", "--max-skips", "2"});
        Result r = run(words);
        INFO(r.out << r.err);
        CHECK(r.code == 1);
        CHECK(r.err.find("expected a loss and gradient norm that are finite, found") != std::string::npos);
        CHECK(std::count(r.err.begin(), r.err.end(), '\n') == 1);
    }

    TEST_CASE("A dump replaces an older dump and nothing else, and needs a folder that is there") {
        Place p;
        p.fails(p.tiny({"--dump", p.text}), {"--dump", "expected a new file", "found"});
        p.fails(p.tiny({"--dump", p.path}), {"--dump", "expected a new file", "found"});
        p.fails(p.tiny({"--dump", p / "none/d.bin"}), {"--dump", "expected a folder", "found"});
        p.fails(p.tiny({"--dump", p / "d.bin", "-o", p / "a"}), {"--dump", "does not use --out"});
        spill(p / "d.bin.tmp", "precious");
        p.fails(p.tiny({"--dump", p / "d.bin"}), {"--dump", "d.bin.tmp"});
        fs::remove(p / "d.bin.tmp");
        succeeds(p.tiny({"--dump", p / "d.bin"})), succeeds(p.tiny({"--dump", p / "d.bin"}));
        succeeds(p.tiny({"-o", p / "a", "-n", "6"}));
        p.fails(p.tiny({"--dump", p / "a/model_00000006.bin"}), {"--dump", "expected a new file"});
    }

    TEST_CASE("A value moved past its tolerance fails in its row alone; without the CRC mended the file is refused") {
        Place p;
        succeeds(p.tiny({"--dump", p / "d.bin"}, "./train_keel_cpu_fp64"));
        std::string good = slurp(p / "d.bin");
        ModelConfig c;
        c.max_seq_len = 8, c.V = 256, c.L = 4, c.H = 2, c.C = 8, c.alpha = 4;
        ParameterLayout layout(c);
        size_t rows = 16, logits = 1024 + layout.count * 8 + 2 * rows * 4 + 8, x = logits + rows * 256 * 8;
        size_t grads = x + 5 * rows * 8 * 8, dx = grads + layout.count * 8;
        struct {
            size_t at;
            const char* row;
        } moves[] = {{logits + 77 * 8, "logits"},
                     {x + (2 * 128 + 5) * 8, "x[2]"},
                     {dx + (3 * 128 + 1) * 8, "dx[3]"},
                     {grads + (layout.offset(FCW, 3) + 9) * 8, "d fcw[3]"},
                     {grads + (layout.offset(GAMMA_OUT, 1) + 2) * 8, "d gamma_out[1]"},
                     {logits - 8, "loss"}};
        for (auto [at, row] : moves) {
            std::string bad = good;
            double value;
            memcpy(&value, &bad[at], 8);
            value += 1e-4;
            memcpy(&bad[at], &value, 8);
            spill(p / "bad.bin", bad);
            Result r = run({"./train_keel_cpu_fp64", "--check", p / "bad.bin"});
            CHECK(r.code == 1);
            CHECK(r.err.find("CRC-32") != std::string::npos);
            mend_crc(bad);
            spill(p / "bad.bin", bad);
            r = run({"./train_keel_cpu_fp64", "--check", p / "bad.bin"});
            CHECK(r.code == 1);
            std::stringstream in(r.out);
            int blamed = 0;
            for (std::string line; std::getline(in, line);)
                if (line.find("NOT OK") != std::string::npos) {
                    blamed++;
                    CHECK_MESSAGE(line.substr(0, line.find("  ")) == row, line);
                }
            CHECK(blamed == 1);
        }
    }
}

TEST_SUITE("sampling alone") {
    TEST_CASE("-e with --prompt starts with the prompt, repeats itself, follows the seed, and goes on past T") {
        Place p;
        succeeds(p.tiny({"-o", p / "a"}));
        auto sample = [&](const Words& more) {
            Words words = {"./train_keel_cpu", "-e", p / "a/model_00000006.bin", "--prompt", "line", "-g", "40"};
            words.insert(words.end(), more.begin(), more.end());
            std::string out = succeeds(words).out;
            return out.substr(out.find("--- sample"));
        };
        std::string one = sample({});
        CHECK(one.find("\nline") != std::string::npos);
        CHECK(one.size() > 40);
        CHECK(sample({}) == one);
        Result odd =
            succeeds({"./train_keel_cpu", "-e", p / "a/model_00000006.bin", "--prompt", "a\rb\x1B[2J", "-g", "1"});
        CHECK_MESSAGE(odd.out.find("\na\u240Db\u241B[2J") != std::string::npos, odd.out);
        CHECK(sample({"--seed", "2"}) != one);
        CHECK(sample({"--temperature", "0"}) == sample({"--temperature", "0", "--seed", "2"}));
        CHECK(sample({"--top-k", "1"}) == sample({"--temperature", "0"}));
    }
}

namespace {
// The whole folder: names, bytes, logs but for times.
void same_folder(const std::string& a, const std::string& b, const std::string& what) {
    auto all = [](const std::string& p) {
        std::map<std::string, std::string> m;
        for (const auto& e : fs::directory_iterator(p))
            m[e.path().filename().string()] =
                e.path().filename() == "log.csv" ? log_without_times(e.path().string()) : slurp(e.path().string());
        return m;
    };
    auto x = all(a), y = all(b);
    for (auto& [n, v] : x) {
        bool s = y.count(n) && y[n] == v;
        CHECK_MESSAGE(s, what << ": " << n << (y.count(n) ? " differs" : " is missing"));
    }
    for (auto& [n, v] : y) CHECK_MESSAGE(x.count(n) == 1, what << ": " << n << " is left over");
}
}  // namespace

TEST_SUITE("more bad input and faults") {
    TEST_CASE("-h ends each flag's line with its default, and a numeric default is the one that is used") {
        Result r = succeeds({"./train_keel_cpu", "--help"});
        CHECK(r.err.empty());
        Options used;
        for (const Flag& f : flags) {
            std::string fallback = default_text(f);
            if (fallback.empty()) continue;
            size_t at = std::min(r.out.find(f.help), r.out.size());
            std::string line = r.out.substr(at, r.out.find('\n', at) - at);
            CHECK_MESSAGE(line.ends_with(" [" + fallback + "]"), f.long_name << ": " << line);
            if (!isdigit((unsigned char)fallback[0])) continue;
            double v = -1;
            if (auto* m = std::get_if<int64_t Options::*>(&f.member)) v = double(used.**m);
            if (auto* m = std::get_if<double Options::*>(&f.member)) v = used.**m;
            CHECK_MESSAGE(v == atof(fallback.c_str()), f.long_name << ": -h " << fallback << ", used " << v);
        }
    }

    TEST_CASE("Every flag refuses what is no number, a missing or empty value, and a second time") {
        Place p;
        for (const Flag& f : flags) {
            bool integer = std::holds_alternative<int64_t Options::*>(f.member),
                 real = std::holds_alternative<double Options::*>(f.member);
            if (std::holds_alternative<bool Options::*>(f.member)) {
                p.fails({"./train_keel_cpu", f.long_name, f.long_name}, {"twice"});
                continue;
            }
            p.fails({"./train_keel_cpu", f.long_name}, {f.long_name, "expected", "found"});
            p.fails({"./train_keel_cpu", f.long_name, ""}, {f.long_name, "expected", "found"});
            std::string value = format("%.0f", std::clamp(2.0, std::ceil(f.least), f.most));
            if (f.is_schedule()) value = f.text(2);
            p.fails({"./train_keel_cpu", f.long_name, value, f.long_name, value}, {"twice"});
            Words wrong;
            if (integer || real) wrong = {"12x", "nan", "1e9999", " 5", "--"};
            if (integer) wrong = wrong + Words{"0x10", "1.5", "1e3", "99999999999999999999", f.least > 0 ? "0" : "-5"};
            if (real) wrong.push_back("-5");
            for (const std::string& w : wrong)
                p.fails({"./train_keel_cpu", f.long_name, w}, {f.long_name, "expected", "found"});
        }
    }

    TEST_CASE("Bad shards of every kind are refused") {
        Place p;
        auto with = [&](const std::string& name, const std::string& bytes, const Words& said) {
            spill(p / name, bytes);
            Words w = p.tiny({"-o", p / "run"});
            w[2] = p / name;
            p.fails(w, said);
        };
        std::string good = shard_of(400, 50257);
        std::string v = good, n = good, c = good;
        v[4] = 2, n[11] = char(0x80), c[8] = char(c[8] + 3);
        with("v.bin", v, {"version 1", "found"}), with("n.bin", n, {"expected", "found 400"}),
            with("c.bin", c, {"expected 403", "found 400"});
        with("odd.bin", good.substr(0, good.size() - 1), {"expected 400", "found 399"}),
            with("header_cut.bin", good.substr(0, 100), {"expected", "found"});
        with("none.bin", good.substr(0, 8) + std::string(1016, '\0'), {"expected", "found nothing"});
        with("above.bin", shard_of(400, 50257, 37, 50257), {"V = 50257", "found 50257", "token 37"});
        with("text.bin", slurp(p.text), {"expected a token shard", "found"});
        spill(p / "good.bin", good);
        p.fails(p.tiny({"-o", p / "run", "-j", p / "good.bin"}), {"-j", "expected text", "found shards"});
        fs::create_symlink(p.text, p / "again.txt");
        p.fails(p.tiny({"-o", p / "run", "-j", p / "again.txt"}), {"-j", "-i"});
    }

    TEST_CASE("A full disk is one line, leaves what was there, no .tmp, and the run goes on when there is space") {
        Place p;
        Words base = {"-i", p.text, "-L", "4", "-C", "16", "-H", "2", "-t", "8",
                      "-b", "2",    "-s", "0", "-x", "8",  "-n", "4", "-y", "-o"};
        succeeds(Words{"./train_keel_cpu"} + base + Words{p / "whole"});
        fs::copy(p / "whole", p / "part");
        fs::remove(p / "part/model_00000008.bin"), fs::remove(p / "part/state_00000008_00000.bin");
        std::string old = slurp(p / "part/state_00000004_00000.bin");
        for (const char* kib : {"60", "20"}) {
            Result r =
                run(Words{"bash", "-c",
                          std::string("trap '' XFSZ; ulimit -f ") + kib + "; exec ./train_keel_cpu \"$@\"", "b"} +
                    base + Words{p / "part"});
            CHECK_MESSAGE((r.code == 1 && std::count(r.err.begin(), r.err.end(), '\n') == 1 &&
                           r.err.find("could not be written") != std::string::npos),
                          kib << ": code " << r.code << " '" << r.err << "'");
            CHECK(slurp(p / "part/state_00000004_00000.bin") == old);
            for (const auto& e : fs::directory_iterator(p / "part"))
                CHECK_MESSAGE(e.path().extension() != ".tmp", e.path().string());
        }
        succeeds(Words{"./train_keel_cpu"} + base + Words{p / "part"});
        same_folder(p / "whole", p / "part", "after space was freed");
    }

    TEST_CASE("Where a limit of file sizes ends the writing of a model or a state, a resume ends with the same "
              "folder") {
        Place p;
        Words base = {"-i", p.text, "-L", "4",  "-C", "16", "-H", "2", "-t",      "8", "-b", "2",     "-d", "32",
                      "-s", "0",    "-x", "12", "-n", "4",  "-v", "3", "--probe", "2", "-r", "layer", "-y", "-o"};
        succeeds(Words{"./train_keel_cpu"} + base + Words{p / "whole"});
        size_t m = fs::file_size(p / "whole/model_00000012.bin"), s = fs::file_size(p / "whole/"
                                                                                        "state_00000012_00000.bin");
        for (size_t limit : {m / 2, (m + s) / 2}) {
            std::string out = p / std::to_string(limit);
            fs::copy(p / "whole", out);
            for (const char* step : {"08", "12"})
                fs::remove(out + "/model_000000" + step + ".bin"),
                    fs::remove(out + "/state_000000" + step + "_00000.bin");
            Result r =
                run(Words{"bash", "-c",
                          "ulimit -c 0; ulimit -f " + std::to_string(limit / 1024) + "; exec ./train_keel_cpu \"$@\"",
                          "b"} +
                    base + Words{out});
            CHECK(r.code == 1);
            CHECK(std::count(r.err.begin(), r.err.end(), '\n') == 1);
            CHECK_MESSAGE(r.err.find("File too large") != std::string::npos, r.err);
            for (const auto& entry : fs::directory_iterator(out)) CHECK(entry.path().extension() != ".tmp");
            succeeds(Words{"./train_keel_cpu"} + base + Words{out});
            same_folder(p / "whole", out, "limit " + std::to_string(limit));
        }
    }

    TEST_CASE("A resume from the last step of an epoch, as from any, goes on as the run that was never stopped") {
        Place p;
        spill(p.text, slurp(p.text).substr(0, 1000));
        const int steps = 350, epoch = 112;  // 900 tokens are 112 sequences of 8
        auto words = [&](const std::string& out) {
            Words data = {"./train_keel_cpu", "-i", p.text, "-t", "8", "-b", "1", "-d", "8", "-o", out, "-y"};
            Words model = {"-L", "4", "-C", "8", "-H", "2", "-x", std::to_string(steps)};
            return data + model + Words{"-s", "0", "-v", "50", "-n", std::to_string(epoch), "--keep", "0"};
        };
        CHECK(run(words(p / "whole")).code == 0);
        for (int from = epoch; from < steps; from += epoch) {
            fs::remove_all(p / "run");
            fs::copy(p / "whole", p / "run");
            for (int later = from + epoch; later < steps + epoch; later += epoch)
                for (const std::string& path :
                     {state_path(p / "run", std::min(later, steps)), model_path(p / "run", std::min(later, steps))})
                    CHECK(fs::remove(path));
            Result r = run(words(p / "run"));
            CHECK(r.out.find(state_path(p / "run", from)) != std::string::npos);
            CHECK(slurp(state_path(p / "run", steps)) == slurp(state_path(p / "whole", steps)));
            CHECK(log_without_times(p / "run/log.csv") == log_without_times(p / "whole/log.csv"));
        }
    }

    TEST_CASE("Steps beyond 2^32 have a row, a checkpoint and a name each, and --keep removes the oldest") {
        for (const std::string binary : {"./train_keel_cpu", "build/train_keel_fp32_on_cpu"}) {
            for (int64_t base : {int64_t(99999998), int64_t(4294967294)}) {
                Place p;
                REQUIRE(run(p.tiny({"-v", "0", "-o", p / "run"}, binary)).code == 0);
                std::string state = slurp(state_path(p / "run", 6));
                int64_t last = base + 4;
                memcpy(state.data() + 4 * H_STEP, &base, 8), memcpy(state.data() + 4 * H_STEPS, &last, 8);
                uint32_t sum = crc32(state.data(), state.size() - 4);
                memcpy(state.data() + state.size() - 4, &sum, 4);
                fs::remove_all(p / "run"), fs::create_directory(p / "run");
                spill(state_path(p / "run", base), state);
                Result r = run({binary, "-i", p.text, "-o", p / "run", "-y", "-s", "0", "-n", "1", "--keep", "2"});
                INFO(r.err);
                CHECK(r.code == 0);
                for (int64_t step = base; step <= last; step++)
                    CHECK(fs::exists(state_path(p / "run", step)) == (step > last - 2));
                int64_t expected = base;
                read_csv_rows(p / "run/log.csv", INT64_MAX,
                              [&](int64_t step, const std::string&) { CHECK(step == ++expected); });
                CHECK(expected == last);
            }
        }
    }

    TEST_CASE("A long run takes no more memory than its first steps, with all that can come between steps") {
        Place p;
        std::string out = p / "out";
        Words words = {
            "./train_keel_cpu", "-i", p.text, "-L", "4", "-C", "8", "-H", "2", "-t", "8",  "-b",      "2", "-x",
            "100000",           "-v", "2",    "-m", "1", "-s", "2", "-g", "2", "-n", "50", "--probe", "2", "-o",
            p / "run"};
        pid_t child = fork();
        if (child == 0) {
            int fd = open(out.c_str(), O_WRONLY | O_CREAT, 0666);
            dup2(fd, 1);
            exec_words(words);
        }
        auto most_at = [&](int step) {  // KiB resident, up to this step
            while (slurp(out).find(format("\nstep %d/", step)) == std::string::npos &&
                   waitpid(child, nullptr, WNOHANG) == 0)
                std::this_thread::sleep_for(std::chrono::milliseconds(20));
            std::string status = slurp(format("/proc/%d/status", child));
            size_t at = status.find("VmHWM:");
            return at == status.npos ? -1 : atoi(status.c_str() + at + 6);
        };
        int early = most_at(100), late = most_at(700);
        kill(child, SIGKILL), waitpid(child, nullptr, 0);
        INFO(early << " KiB, then " << late << " KiB");
        CHECK(early > 0);
        CHECK(late >= early);        // it still ran
        CHECK(late <= early + 400);  // pages of the heap; 700 bytes lost a step would show
    }

    TEST_CASE("Every placement and the FP64 build resume to the same folder, probe included; what is not given comes "
              "from the state") {
        Place p;
        auto check = [&](const std::string& binary, const std::string& norm) {
            Words w = p.tiny({"--norm", norm,  "-n",     "3",     "-v", "2",     "--probe", "2",
                              "-d",     "32",  "-l",     "0.004", "-u", "2",     "-c",      "0.05",
                              "--clip", "0.7", "--seed", "99",    "-r", "layer", "-o",      p / "whole"},
                             binary);
            succeeds(w);
            fs::copy(p / "whole", p / "part");
            fs::remove(p / "part/model_00000006.bin"), fs::remove(p / "part/state_00000006_00000.bin");
            succeeds({binary, "-i", p.text, "-s", "0", "--probe", "2", "-y", "-o", p / "part"});
            same_folder(p / "whole", p / "part", binary + " " + norm);
            fs::remove_all(p / "whole"), fs::remove_all(p / "part");
        };
        for (const PlacementRow& row : placements) check("./train_keel_cpu", row.name);
        check("./train_keel_cpu_fp64", "keel");
        succeeds(p.tiny({"-o", p / "run"}));
        p.fails({"./train_keel_cpu_fp64", "-i", p.text, "-y", "-o", p / "run"},
                {"-y", "expected", "found", "build", "-e"});
        // A state whose branch was in BF16 is another build's too. Word 16 of the header says so.
        std::string path = p / "run/state_00000006_00000.bin", good = slurp(path), bf16 = good;
        bf16[4 * H_BRANCH_BF16] = 1;
        mend_crc(bf16), spill(path, bf16);
        p.fails({"./train_keel_cpu", "-i", p.text, "-y", "-o", p / "run"},
                {"-y", "expected", "found", "BF16", "build", "-e"});
        spill(path, good);
        auto before = p.contents();
        succeeds({"./train_keel_cpu", "-i", p.text, "-y", "-s", "0", "-o", p / "run"});
        CHECK(p.contents() == before);  // a finished run
    }

    TEST_CASE("Shards: padding rows stay zero in training, ids as prompt, several shards are one, several texts are "
              "one") {
        Place p;
        spill(p / "all.bin", shard_of(700, 50257));
        std::string all = slurp(p / "all.bin");
        auto part = [&](size_t a, size_t b) {
            std::string s = all.substr(0, 1024) + all.substr(1024 + 2 * a, 2 * (b - a));
            int n = int(b - a);
            memcpy(&s[8], &n, 4);
            return s;
        };
        spill(p / "s_0.bin", part(0, 333)), spill(p / "s_1.bin", part(0, 0)), spill(p / "s_2.bin", part(333, 700));
        Words one = p.tiny({"-o", p / "one"}), many = p.tiny({"-o", p / "many"});
        one[2] = p / "all.bin", many[2] = p / "s_*.bin";
        succeeds(one), succeeds(many);
        same_folder(p / "one", p / "many", "shards");
        std::string f = slurp(p / "one/model_00000006.bin");
        int32_t padded_vocabulary;
        memcpy(&padded_vocabulary, &f[24], 4);
        CHECK(padded_vocabulary == 50304);
        // wte is the first tensor: 50257 rows of 8 floats, then 47 rows of padding
        size_t first = 1024 + size_t(50257) * 32;
        CHECK(f.substr(first, 47 * 32) == std::string(47 * 32, '\0'));
        Result r =
            succeeds({"./train_keel_cpu", "-e", p / "one/model_00000006.bin", "--prompt", "15496,995", "-g", "3"});
        CHECK_MESSAGE(r.out.find("\n15496 995 ") != std::string::npos, r.out);
        for (const char* w : {"hello", "15496,", "50257", "1,,2", "-1"})
            p.fails({"./train_keel_cpu", "-e", p / "one/model_00000006.bin", "-g", "3", "--prompt", w},
                    {"--prompt", "expected", "found"});
        std::string text = slurp(p.text);
        spill(p / "t_a.txt", text.substr(0, 1001)), spill(p / "t_b.txt", text.substr(1001, 7)),
            spill(p / "t_c.txt", text.substr(1008));
        Words a = p.tiny({"-o", p / "ta"}), b = p.tiny({"-o", p / "tb"});
        b[2] = p / "t_*.txt";
        succeeds(a), succeeds(b);
        same_folder(p / "ta", p / "tb", "texts");
    }
}

// ----------------------------------------------------------------------------------------------------
TEST_SUITE("tokenizers") {
    // A tokenizer's file: the bytes, then the merges, then the special tokens.
    void spill_tokenizer(const std::string& path, const Words& merges, const Words& specials = {"<|endoftext|>"}) {
        FileHeader h;
        memcpy(&h.word[H_MAGIC], "KEEL", 4);
        h.word[H_VERSION] = 1, h.word[H_KIND] = FILE_TOKENIZER, h.word[H_SPLIT] = int(Split::CL100K);
        h.word[H_V] = int(256 + merges.size() + specials.size()), h.word[H_SPECIALS] = int(specials.size());
        std::string bytes((const char*)&h, sizeof h);
        auto add = [&](const std::string& token) { bytes += {char(token.size()), '\0'}, bytes += token; };
        for (int b = 0; b < 256; b++) add(std::string(1, char(b)));
        for (const std::string& token : merges + specials) add(token);
        bytes += "crc.";
        mend_crc(bytes);
        spill(path, bytes);
    }
    const Words merges = {"li", "ne", "line", " line", " o", " of", ", "};

    // What data/tokenizer.py encode writes of one text, in one of llm.c's formats.
    std::string shard(const Tokenizer& t, const std::string& text, const ShardFormat& f) {
        std::vector<int> tokens;
        if (t.separator() >= 0) tokens.push_back(t.separator());
        t.encode(text, tokens);
        int32_t header[256] = {f.magic, f.version, int32_t(tokens.size())};
        std::string bytes((const char*)header, sizeof header);
        for (int token : tokens) bytes.append((const char*)&token, size_t(f.token_bytes));
        return bytes;
    }

    TEST_CASE("Text with --tokenizer trains as the shards of its tokens do, on each trainer: the same log, the same "
              "bits; and goes on so") {
        for (const char* binary : {"./train_keel_cpu", "build/train_keel_on_cpu"}) {
            Place p;
            spill_tokenizer(p / "tok.bin", merges);
            Tokenizer t = Tokenizer::read(p / "tok.bin");
            spill(p / "short.bin", shard(t, slurp(p.text), shard_formats[0]));
            spill(p / "long.bin", shard(t, slurp(p.text), shard_formats[1]));
            auto command = [&](const std::string& data, const std::string& out, const char* steps = "4") -> Words {
                return {binary, "-i", data,  "--tokenizer", p / "tok.bin", "-L", "4", "-C", "64", "-t", "16",   "-b",
                        "2",    "-x", steps, "-u",          "1",           "-v", "2", "-s", "0",  "-o", p / out};
            };
            Result r = succeeds(command(p.text, "text"));
            CHECK_MESSAGE(r.out.find("V 264, split cl100k; ") != std::string::npos, r.out);
            CHECK_MESSAGE(r.out.find(" bits per byte\n") != std::string::npos, r.out);
            succeeds(command(p / "short.bin", "short")), succeeds(command(p / "long.bin", "long"));
            for (const char* other : {"short/", "long/"}) {
                for (const char* file : {"model_00000004.bin", "state_00000004_00000.bin", "tokenizer.bin"})
                    CHECK(slurp(p / "text/" + file) == slurp(p / other + file));
                CHECK(log_without_times(p / "text/log.csv") == log_without_times(p / other + "log.csv"));
            }
            CHECK(slurp(p / "text/tokenizer.bin") == slurp(p / "tok.bin"));
            CHECK(FileReader(p / "text/model_00000004.bin", FILE_MODEL).header.model().tokenizer == t.crc);
            fs::remove(p / "tok.bin");  // a resume takes the one beside the state
            Words go_on = command(p.text, "text", "6") + Words{"-y"};
            go_on.erase(go_on.begin() + 3, go_on.begin() + 5);
            succeeds(go_on);
            fs::copy(p / "long/tokenizer.bin", p / "tok.bin");
            succeeds(command(p / "long.bin", "long", "6") + Words{"-y"});
            CHECK(slurp(p / "text/model_00000006.bin") == slurp(p / "long/model_00000006.bin"));
            // its prompt and samples are text; a special token's name is, unless asked for
            auto sample = [&](const Words& more) {
                return succeeds(Words{binary, "-e", p / "text/model_00000006.bin", "-g", "5", "--prompt"} + more).out;
            };
            std::string plain = sample({"line 7, \u4E2D\r\n<|endoftext|>"});
            CHECK_MESSAGE(plain.find("\nline 7, \u4E2D\r\n<|endoftext|>") != std::string::npos, plain);
            CHECK(sample({"line 7, \u4E2D\r\n<|endoftext|>", "--special"}) != plain);
        }
    }

    std::vector<Words> rows_of(const std::string& log) {  // the cells of each row, the header's too
        std::vector<Words> rows;
        std::stringstream in(slurp(log));
        for (std::string row; std::getline(in, row);) {
            rows.push_back({""});
            for (char c : row)
                if (c == ',') rows.back().push_back("");
                else rows.back().back() += c;
        }
        return rows;
    }

    TEST_CASE("Bits per byte are the loss over the bytes of the targets' text") {
        Place p;
        spill_tokenizer(p / "tok.bin", merges);
        succeeds(p.tiny({"-o", p / "bytes"})), succeeds(p.tiny({"-o", p / "tokens", "--tokenizer", p / "tok.bin"}));
        Tokenizer t = Tokenizer::read(p / "tok.bin");
        std::vector<int> row = {t.separator()};
        t.encode(slurp(p.text), row);
        size_t count = row.size() / 10, start = row.size() - count, targets = (count - 1) / 8 * 8, bytes = 0;
        targets = std::min(targets, size_t(16 * 2 * 8));  // -m batches of -b sequences of -t tokens
        for (size_t i = 1; i <= targets; i++) bytes += t.token(row[start + i]).size();
        for (auto [folder, scale] : {std::pair{"bytes", 1.0}, {"tokens", double(targets) / double(bytes)}}) {
            Words last = rows_of(p / folder + "/log.csv").back();
            REQUIRE(last.size() == 9);
            CHECK(atof(last[8].c_str()) == doctest::Approx(atof(last[2].c_str()) / M_LN2 * scale).epsilon(1e-7));
        }
    }

    TEST_CASE("A model and a state refuse another tokenizer, or none, and name both") {
        Place p;
        spill_tokenizer(p / "tok.bin", merges),
            spill_tokenizer(p / "other.bin", {"li", "ne", "line", " l", " o", " of", ", "});
        spill_tokenizer(p / "small.bin", {"li"});
        auto crc = [&](const char* name) { return format("%08x", Tokenizer::read(p / name).crc); };
        Words tokenizer = {"--tokenizer", p / "tok.bin"};
        succeeds(p.tiny(tokenizer + Words{"-o", p / "run"})), succeeds(p.tiny({"-o", p / "bytes"}));
        std::string model = p / "run/model_00000006.bin";
        Words sample = {"./train_keel_cpu", "-e", model, "--prompt", "line"};
        p.fails(sample + Words{"--tokenizer", p / "other.bin"},
                {"--tokenizer", crc("tok.bin"), model, p / "other.bin", crc("other.bin")});
        p.fails(p.tiny({"-o", p / "run", "-y", "--tokenizer", p / "other.bin"}),
                {crc("tok.bin"), crc("other.bin"), "state_"});
        p.fails(p.tiny({"-o", p / "bytes", "-y", "--tokenizer", p / "small.bin"}), {"V = 256", "258 tokens", "state_"});
        p.fails({"./train_keel_cpu", "-e", p / "bytes/model_00000006.bin", "--prompt", "a", "--tokenizer",
                 p / "tok.bin"},
                {"V = 256", "264"});
        fs::create_directory(p / "bare"), fs::copy(model, p / "bare/model.bin");
        p.fails({"./train_keel_cpu", "-e", p / "bare/model.bin", "--prompt", "line"},
                {"--tokenizer", crc("tok.bin"), "found none", "bare/tokenizer.bin"});
        succeeds(Words{"./train_keel_cpu", "-e", p / "bare/model.bin", "--prompt", "line"} + tokenizer);
        fs::create_directory(p / "taken"), fs::copy(p / "other.bin", p / "taken/tokenizer.bin");
        p.fails(p.tiny(tokenizer + Words{"-o", p / "taken"}), {"-o", "taken/tokenizer.bin", crc("other.bin")});
        p.fails(p.tiny({"--tokenizer", model}), {model, "expected a tokenizer (kind 4), found a model (kind 1)"});
        p.fails(p.tiny({"--tokenizer", p.text}), {p.text, "data/tokenizer.py import"});
        p.fails({"./train_keel_cpu", "-e", p / "tok.bin", "--prompt", "a"}, {"expected a model", "found a tokenizer"});
        Words hops = p.tiny(tokenizer);
        hops[2] = "hops:1";
        p.fails(hops, {"-i", "hops:1", p / "tok.bin"});
        // It is found beside a model behind a link, beside shards, and in the folder of a run without a checkpoint.
        auto finds_it = [&](const Words& words) {
            std::string out = succeeds(words).out;
            CHECK_MESSAGE(out.find("V 264") != std::string::npos, out);
        };
        fs::create_symlink(model, p / "link.bin");
        finds_it({"./train_keel_cpu", "-e", p / "link.bin", "--prompt", "line"});
        fs::create_directory(p / "shards"), fs::copy(p / "tok.bin", p / "shards/tokenizer.bin");
        spill(p / "shards/s.bin", shard(Tokenizer::read(p / "tok.bin"), slurp(p.text), shard_formats[0]));
        Words on_shards = p.tiny();
        on_shards[2] = p / "shards/s.bin";
        finds_it(on_shards);
        fs::create_directory(p / "killed"), fs::copy(p / "tok.bin", p / "killed/tokenizer.bin");
        p.fails(p.tiny({"-o", p / "killed"}), {"-o", "killed/tokenizer.bin", crc("tok.bin"), "--tokenizer"});
        finds_it(p.tiny({"-o", p / "killed", "-y"}));
        spill(p / "run/tokenizer.bin", "damaged");
        p.fails(p.tiny({"-o", p / "run", "-y"}), {p / "run/tokenizer.bin"});
        Words longer = p.tiny(tokenizer + Words{"-o", p / "run", "-y"});
        *(std::find(longer.begin(), longer.end(), "-x") + 1) = "8";
        succeeds(longer);
        CHECK(slurp(p / "run/tokenizer.bin") == slurp(p / "tok.bin"));
        // a model of shards whose vocabulary is not known takes no text as bytes, but its tokenizer, once it is there
        spill(p / "s.bin", shard(Tokenizer::read(p / "tok.bin"), slurp(p.text), shard_formats[0]));
        Words shards = p.tiny({"-o", p / "unknown"});
        shards[2] = p / "s.bin";
        succeeds(shards);
        p.fails(p.tiny({"-e", p / "unknown/model_00000006.bin"}), {"--tokenizer", "V = 50257", "byte"});
    }

    TEST_CASE("A run whose logs have no bits per byte and no same_x yet goes on, and the columns are added") {
        Place p;
        succeeds(p.tiny({"-o", p / "run", "--probe", "3"}));
        for (const char* file : {"run/log.csv", "run/probe.csv"}) {
            std::string older;
            for (Words& row : rows_of(p / file)) {
                for (size_t i = 0; i + 1 < row.size(); i++) older += (i ? "," : "") + row[i];
                older += row[0] == "3" ? "\r\n" : "\n";  // one that an editor has changed
            }
            spill(p / file, older);
        }
        Words more = p.tiny({"-o", p / "run", "-y", "--probe", "3"});
        *(std::find(more.begin(), more.end(), "-x") + 1) = "9";
        succeeds(more);
        struct {
            const char* file;
            size_t rows, columns, older;
        } logs[] = {{"run/log.csv", 10, 9, 9}, {"run/probe.csv", 1 + 3 * 4, 13, 1 + 2 * 4}};
        for (auto [file, size, columns, older] : logs) {
            std::vector<Words> rows = rows_of(p / file);
            REQUIRE(rows.size() == size);
            for (size_t i = 0; i < rows.size(); i++) {
                REQUIRE(rows[i].size() == columns);
                CHECK(rows[i].back().empty() == (i > 0 && i < older));
                CHECK(rows[i][columns - 2].find('\r') == std::string::npos);
            }
        }
    }

    TEST_CASE("What is not text is not trained on: each kind is named, with the command that helps, in a .txt and a "
              ".bin") {
        Place p;
        Words files;
        for (const ForeignFormat& f : foreign_formats) {
            for (const char* ending : {".txt", ".bin"}) {
                std::string path = p / format("%zu%s", files.size(), ending), command = f.command;
                spill(path, std::string(f.at, 'x') + std::string(f.start) + std::string(500, 'x'));
                Words words = p.tiny();
                words[2] = path;
                p.fails(words, {path, f.name, command.substr(0, command.find("FILE"))});
                files.push_back(path);
            }
        }
        auto refused = [&](const std::string& name, const std::string& content, const Words& expected) {
            Words words = p.tiny();
            words[2] = p / name;
            spill(p / name, content);
            p.fails(words, expected);
        };
        std::string tokens(2000, '\1');
        refused("train.bin", tokens, {"nanoGPT", "data/shards.py convert -o DIR", p / "train.bin"});
        refused("utf16", std::string("a\0b\0", 4) + "c", {"zero byte at 1", "iconv -f UTF-16LE"});
        // Chinese, whose U+4E00 has its zero byte on the other side than the line's end
        refused("le.txt", std::string("\0\x4E\x09\x4E\0\x4E\x0A\0\x09\x4E", 10),
                {"zero byte at 0", "iconv -f UTF-16LE"});
        refused("be.txt", std::string("\x4E\0\x4E\x09\x4E\0\0\x0A\x4E\x09", 10),
                {"zero byte at 1", "iconv -f UTF-16BE"});
        std::string binary(4000, '\xE9');
        binary[999] = '\0';
        refused("binary.txt", binary, {"zero byte at 999; leave it out"});
        refused("texts.JSONL", "{\"text\": \"a\"}\n",
                {"JSON lines", "encode -t TOKENIZER -o DIR " + (p / "texts.JSONL")});
        refused("my text.gz", "\x1F\x8B", {"gzip -dc '" + (p / "my text.gz") + "' > text.txt"});
        refused("s.bin.gz", "\x1F\x8B", {"gzip -dc " + (p / "s.bin.gz") + " > text.bin"});
        refused("x.dat", shard(Tokenizer(), "abc", shard_formats[0]), {"mv " + (p / "x.dat")});
        refused("T.BIN", std::string("\1\0", 2) + tokens, {"nanoGPT", "data/shards.py convert -o DIR"});
        spill(p / "X.BIN", shard(Tokenizer(), slurp(p.text), shard_formats[0]));
        Words upper = p.tiny();
        upper[2] = p / "X.BIN";
        succeeds(upper);
    }
}

// ----------------------------------------------------------------------------------------------------
// train_keel as it is: on the GPU where there is one, else built with test/cuda_on_cpu and its kernels run on the CPU.
TEST_SUITE("the GPU trainer") {
    const std::string gpu_fp32 = "build/train_keel_fp32_on_cpu", gpu_bf16 = "build/train_keel_on_cpu";
    // A model that the BF16 build takes too.
    Words wide(const Place& p, const std::string& binary, const char* steps, const Words& more) {
        Words words = {binary, "-i", p.text, "-L", "6",   "-C", "64", "-H", "2", "-t", "16",  "-b",
                       "2",    "-d", "64",   "-x", steps, "-s", "0",  "-v", "4", "-l", "3e-3"};
        for (const std::string& word : more) words.push_back(word);
        return words;
    }
    // Column of log.csv as numbers; empty fields are left out.
    std::vector<double> column(const std::string& path, int which) {
        std::stringstream in(slurp(path));
        std::vector<double> values;
        std::string line;
        std::getline(in, line);
        while (std::getline(in, line)) {
            std::stringstream cells(line);
            std::string cell;
            for (int i = 0; i <= which; i++) std::getline(cells, cell, ',');
            if (!cell.empty()) values.push_back(std::stod(cell));
        }
        return values;
    }

    TEST_CASE("It has the CPU trainer's flags, and trains the same losses, norms and validation losses with the same "
              "data") {
        auto flags_of = [](const std::string& binary) {
            std::string out = succeeds({binary, "-h"}).out;
            return out.substr(out.find('\n'));
        };
        CHECK(flags_of(gpu_fp32) == flags_of("./train_keel_cpu"));
        CHECK(flags_of(gpu_bf16) == flags_of("./train_keel_cpu"));
        for (const char* norm : {"keel", "hybridnorm", "pre"}) {
            Place p;
            succeeds(wide(p, "./train_keel_cpu", "8", {"--norm", norm, "-o", p / "cpu"}));
            succeeds(wide(p, gpu_fp32, "8", {"--norm", norm, "-o", p / "fp32"}));
            succeeds(wide(p, gpu_bf16, "8", {"--norm", norm, "-o", p / "bf16"}));
            for (auto [folder, tolerance] : {std::pair<const char*, double>{"fp32", 1e-4},
                                             {"bf16", 2e-2}})  // AdamW's first steps enlarge rounding
                for (int which : {1, 2, 4}) {
                    auto cpu = column(p / "cpu/log.csv", which),
                         gpu = column(p / (std::string(folder) + "/log.csv"), which);
                    REQUIRE(cpu.size() == gpu.size());
                    double worst = 0;
                    for (size_t i = 0; i < cpu.size(); i++) worst = std::max(worst, std::fabs(gpu[i] / cpu[i] - 1));
                    CHECK_MESSAGE(worst < tolerance, norm << " " << folder << " column " << which
                                                          << ": worst relative difference " << worst);
                }
        }
    }

    TEST_CASE("It says its memory and its graphs, killed runs resume to the same bits and log, and a finished one is "
              "left alone") {
        for (const std::string& binary : {gpu_fp32, gpu_bf16}) {
            Place p;
            auto command = [&](const std::string& out) { return wide(p, binary, "24", {"-n", "2", "-o", out, "-y"}); };
            Result whole = succeeds(command(p / "whole"));
            for (const char* words : {"memory     needs ", "highway z", "graphs     micro-step ", "step 24/24"})
                CHECK_MESSAGE(whole.out.find(words) != std::string::npos, words);
            int kills = 0;
            for (int i = 0; i < 4; i++)
                kills += run(command(p / "killed"), {}, 1 + 5 * i + int(philox(uint64_t(i), 1, 0, 0, 81).word[0] % 5))
                             .code == -SIGKILL;
            CHECK(kills > 0);
            succeeds(command(p / "killed"));
            CHECK(slurp(p / "whole/model_00000024.bin") == slurp(p / "killed/model_00000024.bin"));
            CHECK(slurp(p / "whole/state_00000024_00000.bin") == slurp(p / "killed/state_00000024_00000.bin"));
            CHECK(log_without_times(p / "whole/log.csv") == log_without_times(p / "killed/log.csv"));
            auto before = p.contents();
            succeeds(command(p / "killed"));
            CHECK(p.contents() == before);
        }
    }

    TEST_CASE("The GPU trainer skips outliers and a resume skips the same; another attention than the run's is said") {
        Place p;
        std::string noisy = p / "noisy.txt", text = slurp(p.text);
        for (uint32_t i = 0; i < 60; i++) text[text.size() / 2 + i] = char(128 + philox(1, i, 0, 0, 0).word[0] % 128);
        spill(noisy, text);
        Words words = {gpu_bf16, "-i", noisy, "-L", "2",  "-C", "64", "-H", "1",
                       "-t",     "8",  "-b",  "1",  "-v", "0",  "-s", "0"};
        Result r = succeeds(words + Words{"-x", "240", "-n", "80", "--skip-grad", "3", "-o", p / "whole"});
        size_t skips = r.out.find("skipped    step ");
        CHECK_MESSAGE(skips != r.out.npos, r.out);
        fs::copy(p / "whole", p / "part");
        for (const char* file : {"state_00000240_00000.bin", "model_00000240.bin", "state_00000160_00000.bin"})
            fs::remove(p / "part" + ("/" + std::string(file)));
        Words resume = {gpu_bf16, "-i", noisy, "-s", "0", "-n", "80", "-y", "-o", p / "part"};
        CHECK(succeeds(resume).out.find("changed ") == std::string::npos);
        CHECK(slurp(p / "whole/state_00000240_00000.bin") == slurp(p / "part/state_00000240_00000.bin"));
        r = run(resume + Words{"-x", "241"}, {{"KEEL_WGMMA", "0"}});
        CHECK_MESSAGE(r.out.find("attention from wgmma to mma.sync") != r.out.npos, r.out);
    }

    TEST_CASE("It says where its start went, and takes --tune, --moments and --grads, which the CPU trainer refuses") {
        Place p;
        Result r = succeeds(wide(p, gpu_bf16, "4",
                                 {"-o", p / "run", "--tune", p / "tune.csv", "--moments", "bf16", "--grads=bf16"}));
        for (const char* words : {"start-up   ", " s to the end of the first step: program ", ", device ", ", weights ",
                                  ", first step ", "gradients in BF16", "AdamW's second moment in BF16", "tuned "})
            CHECK_MESSAGE(r.out.find(words) != std::string::npos, words);
        CHECK(slurp(p / "tune.csv").starts_with("gpu,cublaslt,"));
        Result again = succeeds(wide(p, gpu_bf16, "8", {"-o", p / "run", "--tune", p / "tune.csv", "-y"}));
        CHECK(again.out.find("gradients in BF16") != std::string::npos);  // what is not given comes from the state
        CHECK(again.out.find("tuned ") == std::string::npos);
        for (const char* flag : {"--tune", "--moments", "--grads"})
            p.fails(wide(p, "./train_keel_cpu", "4", {flag, "fp32"}), {flag, "the GPU trainer"});
        p.fails(wide(p, gpu_bf16, "4", {"--moments", "fp16"}), {"--moments", "expected fp32 or bf16", "fp16"});
        p.fails(wide(p, gpu_bf16, "4", {"-o", p / "new", "--tune", p.text}), {"--tune", "expected the columns"});
        p.fails(wide(p, gpu_bf16, "4", {"-o", p / "new", "--tune", "/proc/self/mem"}),  // whose first page is none
                {"--tune", "could not be read to its end"});
        succeeds(wide(p, gpu_fp32, "4", {"-o", p / "fp32", "--moments", "bf16"}));
        p.fails(wide(p, "./train_keel_cpu", "8", {"-o", p / "fp32", "-y"}), {"-y", "FP32 moments", "train_keel_fp32"});
    }

    TEST_CASE("Models go from one trainer to the other, and sample the same text; states stay with the build that "
              "wrote them") {
        Place p;
        succeeds(wide(p, "./train_keel_cpu", "8", {"-o", p / "cpu"}));
        succeeds(wide(p, gpu_bf16, "8", {"-o", p / "bf16"}));
        auto sample = [&](const std::string& binary, const std::string& model) {
            std::string out =
                succeeds({binary, "-e", model, "--prompt", "line 1", "-g", "24", "--temperature", "0"}).out;
            return out.substr(out.find("---"));
        };
        for (const std::string& model : {p / "cpu/model_00000008.bin", p / "bf16/model_00000008.bin"})
            CHECK(sample("./train_keel_cpu", model) == sample(gpu_fp32, model));
        CHECK(sample(gpu_bf16, p / "bf16/model_00000008.bin").find("line 1") != std::string::npos);
        succeeds({gpu_bf16, "-i", p.text, "-e", p / "cpu/model_00000008.bin", "-t", "16", "-b", "2", "-x", "2", "-s",
                  "0"});
        p.fails({"./train_keel_cpu", "-i", p.text, "-y", "-o", p / "bf16"}, {"-y", "expected", "BF16", "build"});
        p.fails({gpu_bf16, "-i", p.text, "-y", "-o", p / "cpu"}, {"-y", "expected", "BF16", "build"});
    }

    TEST_CASE("clang++ builds the same source, and what it dumps passes the check of g++'s build" *
              doctest::skip(!long_tests())) {
        Place p;
        succeeds({"build/train_keel_clang_on_cpu", "-i", p.text, "-L", "6", "-C", "64", "-H", "2", "-t", "16", "-b",
                  "2", "--dump", p / "dump"});
        succeeds({gpu_bf16, "--check", p / "dump"});
    }

    // A benchmark's rows: a header, and five columns of which the first is one word.
    void check_rows(const std::string& path) {
        std::stringstream rows(slurp(path));
        std::string row;
        REQUIRE(std::getline(rows, row));
        CHECK(row == "metric,value,unit,peer_value,ratio");
        size_t count = 0;
        for (; std::getline(rows, row); count++) {
            CHECK_MESSAGE(std::count(row.begin(), row.end(), ',') == 4, row);
            CHECK_MESSAGE(row.substr(0, row.find(',')).find(' ') == std::string::npos, row);
        }
        CHECK(count > 10);
    }

    TEST_CASE("The kernels' benchmark agrees with the CPU at small shapes, and writes a row a figure" *
              doctest::skip(!long_tests())) {
        Place p;
        Result r = succeeds({"build/bench_kernels_on_cpu", "--small", "--csv", p / "figures.csv"});
        CHECK_MESSAGE(r.out.find("every result agrees with the CPU's") != std::string::npos, r.out);
        check_rows(p / "figures.csv");
    }

    TEST_CASE("The products' benchmark: every way agrees with the trainer's products at small shapes, none is left "
              "out, and each figure is a row" *
              doctest::skip(!long_tests())) {
        Place p;
        Result r = succeeds({"build/bench_products_on_cpu", "--small", "--csv", p / "figures.csv"});
        CHECK_MESSAGE(r.out.find("every result agrees with the trainer's") != std::string::npos, r.out);
        CHECK_MESSAGE(r.out.find("not offered") == std::string::npos, r.out);  // the headers offer all of them
        for (const char* part :
             {"tune head dW", "GELU fcproj din", "DGELU epilogue", "accumulate head dW", "FP8, fast accumulation",
              "FP8 fc with its casts", "32 slices of rows", "small fc and fcproj dW", "gain FP8 with amax and casts"})
            CHECK_MESSAGE(r.out.find(part) != std::string::npos, part, " in\n", r.out);
        check_rows(p / "figures.csv");
        p.fails({"build/bench_products_on_cpu", "--smal"}, {"expected --small", "'--smal'"});
    }

    TEST_CASE("Shapes that the tensor cores' build cannot run are refused before anything is written, and name the "
              "builds that can") {
        Place p;
        p.fails({gpu_bf16, "-i", p.text, "-C", "72", "-o", p / "run"},
                {"-C", "multiple of 64", "72", "train_keel_fp32"});
        p.fails({gpu_bf16, "-i", p.text, "-C", "64", "-H", "8", "-o", p / "run"},
                {"-H", "16, 32, 64 or 128", "8", "train_keel_fp32"});
        p.fails({gpu_fp32, "-i", p.text, "-C", "16384", "-t", "8", "-b", "1", "-o", p / "run"}, {"-C", "at most 8192"});
        std::string odd = "at most 4096 channels on a GPU that are no multiple of 4";
        p.fails({gpu_fp32, "-i", p.text, "-C", "4097", "-t", "8", "-b", "1", "-o", p / "run"}, {"-C", odd});
        // a card of 1100 MiB, 1 GiB of which is set aside
        Result r = run({gpu_bf16, "-i", p.text, "-L", "64", "-C", "256", "-t", "64", "-b", "1", "-o", p / "run"},
                       {{"CUDA_ON_CPU_MEMORY", "1100"}});
        CHECK(r.code == 1);
        CHECK_MESSAGE(r.err.find("memory: expected at least") != std::string::npos, r.err);
        CHECK(!fs::exists(p / "run"));
    }
}
