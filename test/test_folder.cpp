// Every state that an output folder can be in, and what -y does there: each is made, a real trainer is run in it, and
// what came out must be the table of dev/doc/folder.md. `build/test_folder write` writes that table anew.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <functional>
#include <map>
#include <regex>

#include "files.h"
#include "keel/checkpoint.h"

namespace {

namespace fs = std::filesystem;

const char* const page = "dev/doc/folder.md";
constexpr int RANKS = 3;

// The words of mpirun for RANKS ranks; none where there is no mpirun.
const Words& mpirun() {
    static const Words words = [] {
        FILE* pipe = popen(format("dev/tools/mpi.sh mpirun %d", RANKS).c_str(), "r");
        char line[256] = "";
        if (!pipe || !fgets(line, sizeof line, pipe)) *line = 0;
        if (pipe) pclose(pipe);
        std::stringstream in(line);
        return Words(std::istream_iterator<std::string>(in), {});
    }();
    return words;
}

// Permissions hold for everyone but root, who runs as nobody.
Result run(const Words& words, const std::string& folder) {
    pid_t child = fork();
    if (child == 0) {
        setenv("OMP_NUM_THREADS", "1", 1);
        for (auto [name, fd] : {std::pair{"/stdout", 1}, {"/stderr", 2}})
            dup2(open((folder + name).c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666), fd);
        if (getuid() == 0 && setuid(65534) != 0) _exit(126);
        exec_words(words);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status), slurp(folder + "/stdout"),
            slurp(folder + "/stderr")};
}

// Runs of 8 steps with a checkpoint every 2, and what a test makes of their folders.
class Place {
public:
    std::string path;
    Place() {
        char name[] = "/tmp/keel_folder_XXXXXX";
        if (!mkdtemp(name)) fail("%s: cannot be made", name);
        path = name;
        std::string text;
        for (int i = 0; text.size() < 4000; i++) text += format("line %d of %d, ", i * i % 97, i);
        spill(*this / "text.txt", text);
        std::reverse(text.begin(), text.end());
        spill(*this / "reversed.txt", text);
        for (const char* binary : {"train_keel_cpu", "train_keel_cpu_fp64"}) fs::copy_file(binary, *this / binary);
        chmod(path.c_str(), 0777);
        train("whole", {}), train("other", {"--seed", "7"}), train("fp64", {}, "train_keel_cpu_fp64");
        train("broken", {"-x", "3", "-u", "0", "-l", "1e9"});
        if (mpirun().empty()) return;
        train("ranks", {}, "train_keel_cpu", true), train("ranks_other", {"-x", "6"}, "train_keel_cpu", true);
        // Its states of step 6 have the header of `ranks` but for the history: its first two steps had another rate.
        train("ranks_history", {"-l", "2e-3"}, "train_keel_cpu", true);
        for (int s : {4, 6, 8})
            for (int r = 0; r < RANKS; r++) fs::remove(state_path(*this / "ranks_history", s, r));
        train("ranks_history", {"-y", "-l", "1e-3"}, "train_keel_cpu", true);
    }
    ~Place() { fs::permissions(*this / "run", fs::perms::all), fs::remove_all(path); }
    std::string operator/(const std::string& name) const { return path + "/" + name; }
    // Flags of `more` go before those that a run has by default.
    Words command(const std::string& out, const Words& more, const std::string& binary, bool ranks) const {
        Words words = ranks ? mpirun() : Words{};
        words.push_back(*this / binary);
        words.insert(words.end(), more.begin(), more.end());
        auto given = [&](const char* flag) { return std::find(more.begin(), more.end(), flag) != more.end(); };
        const std::string text = *this / "text.txt", folder = *this / out;
        for (auto [flag, value] : {std::pair<const char*, std::string>{"-i", text},
                                   {"-o", folder},
                                   {"-s", "0"},
                                   {"-v", "0"},
                                   {"-n", "2"},
                                   {"-x", "8"},
                                   {"--keep", "0"}})
            if (!given(flag)) words.insert(words.end(), {flag, value});
        for (auto [flag, value] :
             {std::pair{"-L", "4"}, {"-C", "8"}, {"-H", "2"}, {"-t", "8"}, {"-b", "1"}, {"-d", "24"}, {"-l", "1e-3"}})
            if (!given(flag) && !given("-y")) words.insert(words.end(), {flag, value});
        return words;
    }
    void train(const std::string& out, const Words& more, const std::string& binary = "train_keel_cpu",
               bool ranks = false) const {
        Result r = run(command(out, more, binary, ranks), path);
        if (r.code != 0) fail("%s: %s", out, r.err);
    }
};

std::map<std::string, std::string> contents(const std::string& folder) {
    std::map<std::string, std::string> all;
    std::error_code ignored;
    for (const auto& entry : fs::directory_iterator(folder, ignored))
        all[entry.path().filename()] = entry.is_regular_file() ? slurp(entry.path()) : "";
    return all;
}

// What is done to the folder d of a run after its step 7, whose last checkpoint is of step 6.
using Make = std::function<void(const std::string& d, const Place& place)>;

std::string file(const char* kind, int step, int rank = 0) {
    return *kind == 'm' ? format("model_%08d.bin", step) : format("state_%08d_%05d.bin", step, rank);
}
const std::string S6 = "state_00000006_00000.bin", S7 = "state_00000007_00000.bin", R6 = "state_00000006_00001.bin",
                  M6 = "model_00000006.bin", LOG = "log.csv";

Make nothing() {
    return [](auto&, auto&) {};
}
Make put(const std::string& name, const std::string& content) {
    return [=](auto& d, auto&) { spill(d + "/" + name, content); };
}
Make change(const std::string& name, const std::function<void(std::string&)>& how) {
    return [=](auto& d, auto&) {
        std::string bytes = slurp(d + "/" + name);
        how(bytes);
        spill(d + "/" + name, bytes);
    };
}
Make flip(const std::string& name) {
    return change(name, [](std::string& s) { s[4000] ^= 1; });
}
Make cut(const std::string& name, size_t bytes) {
    return change(name, [=](std::string& s) { s.resize(bytes); });
}
Make drop(const std::string& start) {  // all whose names start so
    return [=](auto& d, auto&) {
        for (const auto& [name, bytes] : contents(d))
            if (name.starts_with(start)) fs::remove_all(d + "/" + name);
    };
}
Make bring(const std::string& from, const std::string& name, const std::string& run = "run") {
    return [=](auto& d, auto& place) {
        fs::copy(place / run + "/" + from, d + "/" + name, fs::copy_options::overwrite_existing);
    };
}
Make folder(const std::string& name) {
    return [=](auto& d, auto&) { fs::remove(d + "/" + name), fs::create_directory(d + "/" + name); };
}
Make dangling(const std::string& name) {
    return [=](auto& d, auto&) { fs::remove(d + "/" + name), fs::create_symlink("none", d + "/" + name); };
}
Make mode(const std::string& name, mode_t bits) {
    return [=](auto& d, auto&) { chmod((d + "/" + name).c_str(), bits); };
}
Make both(const Make& first, const Make& second) {
    return [=](auto& d, auto& place) { first(d, place), second(d, place); };
}
Make held_lock() {
    return [](auto& d, auto&) {
        static FolderLock lock;
        lock = FolderLock(d), spill(d + "/lock", "process 1 on here");
    };
}
// State 7, of a run that broke at step 2.
Make skipped() {
    return both(bring(file("state", 3), S7, "broken"), change(S7, [](std::string& s) {
        s[4 * H_STEP] = 7;
        uint32_t crc = crc32(s.data(), s.size() - 4);
        memcpy(&s[s.size() - 4], &crc, 4);
    }));
}

struct State {
    const char* what;
    Make make;
    Words more = {};  // flags of the resume
};
struct Group {
    const char* heading;
    bool ranks;
    std::vector<State> states;
};

const Words new_run = {"-L", "4", "-C", "8", "-H", "2", "-t", "8", "-b", "1", "-d", "24", "-l", "1e-3"};
// clang-format off
const std::vector<Group> groups = {
    {"One rank", false, {
        {"nothing", drop(""), new_run},
        {"files of others", both(drop(""), put("notes.txt", "mine")), new_run},
        {"a run that has not come to its first checkpoint", both(drop("state"), drop("model")), new_run},
        {"the same, and `log.csv` may not be read",
         both(both(drop("state"), drop("model")), mode(LOG, 0)), new_run},
        {"whole checkpoints of steps 2, 4 and 6", nothing()},
        {"half-written files, `.tmp`", both(put(S7 + ".tmp", "half"), put("model_00000007.bin.tmp", "half"))},
        {"the lock of a run that was killed", put("lock", "process 1 on another")},
        {"the lock of a run that goes on", held_lock()},
        {"no model of step 6", drop(M6)},
        {"no state of step 6, but its model", drop(S6)},
        {"models alone", drop("state")},
        {"state 6 is empty", put(S6, "")},
        {"state 6 is cut short", cut(S6, 5000)},
        {"a bit of state 6 is flipped", flip(S6)},
        {"all states are damaged", both(both(cut(file("state", 2), 5000), flip(file("state", 4))), put(S6, "KEEL"))},
        {"state 6 is of a newer version of the file", change(S6, [](std::string& s) { s[4 * H_VERSION] = 2; })},
        {"state 6 may not be read", mode(S6, 0)},
        {"a folder has the name of state 6", folder(S6)},
        {"state 6 is a link that leads nowhere", dangling(S6)},
        {"state 4 under the name of step 7", bring(file("state", 4), S7)},
        {"a model under the name of state 7", bring(M6, S7)},
        {"almost the names of states", both(put("state_7_00000.bin", "mine"), put(S7 + ".old", "mine"))},
        {"state 7, whose last steps were skipped", skipped()},
        {"nothing but a state whose last steps were skipped", both(drop(""), skipped())},
        {"state 7 is damaged, and has its model", both(put(S7, "KEEL"), put("model_00000007.bin", "mine"))},
        {"another run's state of a later step, 8", bring(file("state", 8), file("state", 8), "other")},
        {"another run's state of an earlier step, 5", bring(file("state", 4), file("state", 5), "other")},
        {"states of the FP64 build", both(drop(""), bring(S6, S6, "fp64"))},
        {"whole checkpoints; other data of the same length", nothing(), {"-i", "reversed.txt"}},
        {"whole checkpoints; another model asked for", nothing(), {"-L", "6"}},
        {"whole checkpoints; fewer steps asked for than there are", nothing(), {"-x", "4"}},
        {"no `log.csv`", drop(LOG)},
        {"`log.csv` was cut after step 3", change(LOG, [](std::string& s) { s.resize(s.find("\n4,") + 1); })},
        {"`log.csv` ends in half a row and zeros",
         change(LOG, [](std::string& s) { s += "8,2.1" + std::string(9, 0); })},
        {"`log.csv` has the line ends of Windows",
         change(LOG, [](std::string& s) { s = std::regex_replace(s, std::regex("\n"), "\r\n"); })},
        {"a line of `log.csv` was edited",
         change(LOG, [](std::string& s) { s.replace(s.find("\n4,") + 1, 1, "four"); })},
        {"`log.csv` may not be read", mode(LOG, 0)},
        {"`log.csv` is a folder", folder(LOG)},
        {"the folder may not be read", mode("", 0333)},
        {"the folder may not be written", mode("", 0555)},
    }},
    {"Three ranks", true, {
        {"whole checkpoints of steps 2, 4 and 6", nothing()},
        {"states of step 2 from ranks 1 and 2 alone",
         both(both(drop("model"), drop(file("state", 2))),
              both(drop("state_00000004"), drop("state_00000006"))),
         new_run},
        {"rank 0's state of step 6 is missing", drop(S6)},
        {"rank 1's state of step 6 is missing", drop(R6)},
        {"a bit of rank 1's state of step 6 is flipped", flip(R6)},
        {"rank 1's state of step 6 may not be read", mode(R6, 0)},
        {"rank 2's state of step 6 under rank 1's name", bring(file("state", 6, 2), R6)},
        {"rank 1's state of step 4 under the name of step 6", bring(file("state", 4, 1), R6)},
        {"rank 1's state of step 6 is another run's, of fewer steps", bring(R6, R6, "ranks_other")},
        {"rank 1's state of step 6 is another run's, whose steps 1 and 2 had another rate",
         bring(R6, R6, "ranks_history")},
    }},
};
// clang-format on

// What came out, as a row of the table; `fault` gets what must not be.
std::string row_of(const State& state, bool ranks, const Place& place, std::string& fault) {
    std::string d = place / "run", whole = place / (ranks ? "ranks" : "whole");
    fs::remove_all(d), fs::copy(whole, d, fs::copy_options::recursive);
    for (int r = 0; r < (ranks ? RANKS : 1); r++) fs::remove(state_path(d, 8, r));
    fs::remove(model_path(d, 8));
    change(LOG, [](std::string& s) { s.resize(s.find("\n8,") + 1); })(d, place);
    state.make(d, place);
    if (getuid() == 0 && std::system(format("chown -R nobody %s 2>/dev/null", d).c_str()) != 0 && fs::exists(d))
        fault = "chown";
    auto before = contents(d);
    Words more = {"-y", "--keep", "2"};
    for (const std::string& word : state.more) more.push_back(word.ends_with(".txt") ? place / word : word);
    Words words = place.command("run", more, "train_keel_cpu", ranks);
    Result r = run(words, place.path);
    fs::permissions(d, fs::perms::all);
    auto after = contents(d);

    std::string does = r.code != 0 ? "refuses" : "?", says = r.err, left;
    long long from = -1;
    if (size_t at = r.out.find("resuming   "); r.code == 0 && at != std::string::npos)
        if (size_t name = r.out.find("/state_", at); sscanf(r.out.c_str() + name, "/state_%lld_", &from) == 1)
            does = format("goes on from %lld", from);
    if (r.code == 0 && from < 0) does = "starts fresh";
    if (r.code != 0 && r.code != 1) fault = format("exit %d", r.code);
    auto same = [&](const std::string& name) { return after.count(name) && slurp(whole + "/" + name) == after[name]; };
    auto name_of = [](const std::string& path) { return path.substr(path.rfind('/') + 1); };
    auto same_log = [&] { return log_without_times(d + "/log.csv") == log_without_times(whole + "/log.csv"); };
    bool equal = same(name_of(model_path(d, 8))) && same_log();
    for (int rank = 0; rank < (ranks ? RANKS : 1); rank++) equal &= same(name_of(state_path(d, 8, rank)));
    if (r.code == 0) left = equal ? "equal" : same(name_of(model_path(d, 8))) ? "equal but for the log" : "another run";
    else left = "as it was";
    bool lock_stays = r.code != 0 && after.count("lock") && !before.count("lock");  // ranks end each other at once
    if (lock_stays) after.erase("lock"), left += "; new: `lock`";
    if (r.code != 0 && before != after) left = "changed";
    if (left == "changed") fault = "a refused run has changed the folder: " + r.err;
    for (const auto& [name, bytes] : before) {
        if (r.code != 0 || name == "log.csv" || fs::exists(whole + "/" + name)) continue;
        left += format("; `%s` %s", name, after.count(name) ? "stays" : "goes");
        if (after.count(name) && after[name] != bytes) left += ", changed";
    }
    for (const auto& [name, bytes] : after)
        if (r.code == 0 && !before.count(name) && !fs::exists(whole + "/" + name)) left += format("; new: `%s`", name);

    if (size_t at = says.find("--------"); at != says.npos) says.resize(at);  // what mpirun adds
    for (auto [what, with] : {std::pair{"train_keel_cpu: ", ""},
                              {"(CRC-32|found|checksum) [0-9a-f]{8}\\b", "$1 ..."},
                              {"process [0-9]+ on [^ );]+", "process N on HOST"}})
        says = std::regex_replace(says, std::regex(what), with);
    for (auto [what, with] : {std::pair{d, "DIR"}, {place.path + "/", ""}})
        for (size_t at; (at = says.find(what)) != says.npos;) says.replace(at, what.size(), with);
    while (says.ends_with("\n")) says.pop_back();
    says = std::regex_replace(says, std::regex("\n+"), "<br>");
    return format("| %s | %s | %s | %s |\n", state.what, does, says, left);
}

std::string all_rows(std::vector<std::string>& faults) {
    Place place;
    std::string text;
    for (const Group& group : groups) {
        if (group.ranks && mpirun().empty()) continue;
        text += format("\n### %s\n\n| the folder holds | `-y` | on stderr | afterwards |\n|---|---|---|---|\n",
                       group.heading);
        for (const State& state : group.states) {
            std::string fault;
            text += row_of(state, group.ranks, place, fault);
            if (!fault.empty()) faults.push_back(std::string(state.what) + ": " + fault);
        }
    }
    return text;
}

}  // namespace

TEST_CASE("What -y does in each state of a folder is what dev/doc/folder.md says") {
    std::vector<std::string> faults;
    std::string text = slurp(page), found = all_rows(faults);
    for (const std::string& fault : faults) FAIL_CHECK(fault);
    std::stringstream rows(found);
    for (std::string line; std::getline(rows, line);)
        CHECK_MESSAGE(text.find(line + "\n") != std::string::npos, page << " has no row\n" << line);
    CHECK_MESSAGE(text.ends_with(found) != mpirun().empty(), page << ": build/test_folder write");
}

int main(int argc, char** argv) {
    if (argc == 2 && std::string(argv[1]) == "write") {
        std::vector<std::string> faults;
        std::string text = slurp(page), rows = all_rows(faults);
        for (const std::string& fault : faults) fprintf(stderr, "%s\n", fault.c_str());
        spill(page, text.substr(0, text.find("\n### ")) + rows);
        return !faults.empty();
    }
    return doctest::Context(argc, argv).run();
}
