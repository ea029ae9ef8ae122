// crash_test.cpp: does to a real trainer what happens to a run of three weeks, and compares what comes out with an
// undisturbed run.
//
//     crash_test [--trainer PATH] [--shim PATH] [--kills N] [--cuts N] [--signals N] [--seed N] [CASE...]
//
// Equal means: the final model and state bit for bit, log.csv but for times and rates. The moments are random; the seed
// is printed. Ends with "N passed, N failed". With LONG=1, as make crash_test sets it, several times as often.
#include <sched.h>
#include <sys/mount.h>

#include "crash_disk.h"
#include "crash_folder.h"
#include "crash_run.h"
#include "crash_system.h"

namespace {

int64_t kills_wanted = lean(42, 210), cuts_wanted = lean(12, 60), signals_wanted = lean(9, 30);

// ----------------------------------------------------------------------------------------------------
// The cases

// Killed at a random moment, again and again, until the run has reached its end; then anew with another model.
std::string kills() {
    int64_t kills = 0, resumes = 0, runs = 0, mismatches = 0;
    Place place;
    for (int turn = 0; kills < kills_wanted; turn++) {
        Words more = {"--norm", placements[turn % NUM_PLACEMENTS].name};
        if (turn % 2) more.insert(more.end(), {"--probe", "3"});
        std::string whole = place / "whole", killed = place / "killed";
        double start = seconds();
        succeeds(place.command(whole, more), place);
        double duration = seconds() - start;
        int64_t promised = -1;
        for (int64_t here = 0; here < lean(6, 60) && kills < kills_wanted;) {
            Process process(place.command(killed, more), place.path);
            process.wait_for_a_moment(killed, 0.5 * duration);
            process.send(SIGKILL);
            Result r = process.wait();
            check_resume(r, promised, "after a kill");
            resumes += r.out.find("resuming") != std::string::npos;
            promised = std::max(promised, last_named_step(r.out, "checkpoint"));
            if (r.code == 0) break;
            kills++, here++;
        }
        Result r = succeeds(place.command(killed, more), place);
        check_resume(r, promised, "after the last kill");
        resumes += r.out.find("resuming") != std::string::npos;
        mismatches += !same_run(whole, killed,
                                format("%s, %lld kills", placements[turn % NUM_PLACEMENTS].name, (long long)kills));
        for (const char* file : {"/probe.csv", "/probe_weights.csv"})
            if (turn % 2) expect(slurp(whole + file) == slurp(killed + file), std::string(file + 1) + " differs");
        for (const auto& entry : fs::directory_iterator(killed)) {
            std::string name = entry.path().filename().string();
            expect(!name.ends_with(".tmp") && name != "lock", name + " is left over");
        }
        runs++;
        fs::remove_all(whole), fs::remove_all(killed);
    }
    return format("%lld kills, %lld resumes, %lld runs, %lld mismatches", (long long)kills, (long long)resumes,
                  (long long)runs, (long long)mismatches);
}

// SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 at random moments: exit 0, a checkpoint of the last step that the log has,
// nothing lost.
std::string signals() {
    Place place;
    int64_t sent = 0, mismatches = 0;
    double start = seconds();
    succeeds(place.command(place / "whole"), place);
    double duration = seconds() - start;
    while (sent < signals_wanted) {
        fs::remove_all(place / "stopped");
        for (bool end = false; !end && sent < signals_wanted;) {
            Process process(place.command(place / "stopped"), place.path);
            bool started = process.wait_for_output("step ");  // before that nobody has asked for these signals
            wait_for(uniform(0, duration / 3));
            const int numbers[] = {SIGTERM, SIGINT, SIGUSR1, SIGUSR2};
            process.send(numbers[sent % 4]);
            Result r = process.wait();
            end = r.out.find("stopping") == std::string::npos;
            sent += !end;
            expect(started || end, "no step before the signal: " + r.out + r.err);
            expect(r.code == 0, format("exit %d after a signal: %s", r.code, r.err.c_str()));
            long long last = 0;
            read_csv_rows(place / "stopped/log.csv", INT64_MAX, [&](int64_t step, const std::string&) { last = step; });
            expect(last_named_step(r.out, end ? "step" : "checkpoint") == (end ? -1 : last),
                   format("the last step is %lld, and the checkpoint another", last));
        }
        succeeds(place.command(place / "stopped"), place);
        mismatches += !same_run(place / "whole", place / "stopped", "after signals");
    }
    // The second ends it at once, whatever it is doing.
    Words slow = place.command(place / "slow", {"-r", "none"});
    for (size_t i = 0; i < slow.size(); i++)
        if (slow[i] == "-C") slow[i + 1] = "256";
        else if (slow[i] == "-d") slow[i + 1] = "32768";
        else if (slow[i] == "-L") slow[i + 1] = "16";
        else if (slow[i] == "-i") spill(place / "long.txt", std::string(400000, 'a')), slow[i + 1] = place / "long.txt";
    Process process(slow, place.path);
    // Its first step takes seconds. On a busy machine it may see two signals less than 50 ms apart: then one more ends
    // it.
    process.wait_for_output("machine ");
    for (int first : {SIGHUP, SIGTERM}) {  // of two kinds
        process.send(first);
        wait_for(0.2);
        expect(process.runs(), "the first of two signals ended it");
    }
    do {
        process.send(SIGTERM);
        wait_for(0.2);
    } while (process.runs());
    Result r = process.wait();
    expect(r.code == -SIGTERM && r.out.find("step ") == std::string::npos,
           format("a second signal: code %d, %s", r.code, r.out.c_str()));
    return format("%lld signals, %lld mismatches, the second one ends it at once", (long long)sent,
                  (long long)mismatches);
}

// What a power cut may leave of the folder, by crash_disk.h's record: each name that was not certain is there or not,
// each content that was not certain is the last certain one, the newest, or torn.
void cut_power(const std::string& folder, const std::string& record) {
    auto certain = disk::recorded_names(record);
    std::map<std::string, std::string> now, content;
    for (const auto& entry : fs::directory_iterator(folder)) {
        std::string id = disk::identity(entry.path().string());
        now[entry.path().filename().string()] = id, content[id] = slurp(entry.path().string());
    }
    std::set<std::string> names;
    for (const auto* list : {&certain, &now})
        for (const auto& [name, id] : *list) names.insert(name);
    std::map<std::string, std::string> left;
    for (const std::string& name : names) {
        bool was = certain.count(name), is = now.count(name);
        std::string id;
        if (was && is) id = certain[name] == now[name] || coin() ? now[name] : certain[name];
        else if (coin()) id = was ? certain[name] : now[name];
        if (id.empty()) continue;
        std::string saved = record + "/file_" + id, durable = fs::exists(saved) ? slurp(saved) : "";
        std::string newest = content.count(id) ? content[id] : durable;
        if (newest != durable) {
            int kind = int(dice() % 3);
            if (kind == 0) newest = durable;
            if (kind == 1 && !newest.empty()) {  // torn: the tail is zeros or missing, but what was certain is there
                size_t keep =
                    std::max(newest.starts_with(durable) ? durable.size() : 0, size_t(dice() % newest.size()));
                newest = newest.substr(0, keep) + (coin() ? std::string(newest.size() - keep, '\0') : "");
            }
        }
        left[name] = newest;
    }
    fs::remove_all(folder), fs::create_directory(folder);
    for (const auto& [name, bytes] : left) spill(folder + "/" + name, bytes);
}

std::string power() {
    if (access(shim.c_str(), R_OK) != 0) throw Skip{shim + " is not there"};
    Place place("/dev/shm");
    int64_t cuts = 0, runs = 0, mismatches = 0, torn = 0;
    std::string folder = place / "cut", record = place / "record", whole = place / "whole";
    double start = seconds();
    succeeds(place.command(whole, {"--keep", "1"}), place);
    double duration = seconds() - start;
    while (cuts < cuts_wanted) {
        int64_t promised = -1;
        fs::remove_all(folder), fs::create_directory(folder);
        for (bool end = false; !end && cuts < cuts_wanted;) {
            fs::remove_all(record), fs::create_directory(record);
            disk::record_folder(record, folder);
            for (const auto& entry : fs::directory_iterator(folder)) disk::record_file(record, entry.path().string());
            Process process(place.command(folder, {"--keep", "1"}), place.path,
                            {{"LD_PRELOAD", fs::absolute(shim).string()},
                             {"CRASH_FOLDER", folder},
                             {"CRASH_RECORD", record}});
            process.wait_for_a_moment(folder, duration);
            process.send(SIGKILL);
            Result r = process.wait();
            check_resume(r, promised, "after a power cut");
            torn += r.err.find("skipping") != std::string::npos;
            promised = std::max(promised, last_named_step(r.out, "checkpoint"));
            cuts += r.code != 0;
            end = r.code == 0;
            cut_power(folder, record);
        }
        Result r = succeeds(place.command(folder, {"--keep", "1"}), place);
        check_resume(r, promised, "after the last power cut");
        runs++;
        mismatches += !same_run(whole, folder, "after power cuts");
    }
    expect(torn == 0, format("%lld states under their final name were torn", (long long)torn));
    return format("%lld cuts, %lld runs, %lld mismatches, %lld torn states", (long long)cuts, (long long)runs,
                  (long long)mismatches, (long long)torn);
}

// In a name space of its own, where we may mount: as root, or as a user whom the kernel lets be root in there. The
// body's faults come back as lines.
std::string with_mounts(const std::function<std::string()>& body) {
    int ends[2];
    if (pipe(ends) != 0) fail("no pipe");
    pid_t child = fork();
    if (child == 0) {
        close(ends[0]);
        uid_t user = getuid();
        bool mounts = unshare(user == 0 ? CLONE_NEWNS : CLONE_NEWUSER | CLONE_NEWNS) == 0;
        if (mounts && user != 0) spill("/proc/self/uid_map", format("0 %u 1", user));
        mounts = mounts && mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0;
        if (!mounts) _exit(77);
        std::string text;
        try {
            text = body();
        } catch (const Skip&) {
            _exit(77);
        } catch (const std::exception& e) {
            fault(e.what());
        }
        for (const std::string& what : faults) text += "\n" + what;
        if (write(ends[1], text.data(), text.size()) < 0) _exit(1);
        _exit(0);
    }
    close(ends[1]);
    std::string text;
    char buffer[4096];
    for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) text.append(buffer, size_t(n));
    close(ends[0]);
    int status;
    waitpid(child, &status, 0);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77) throw Skip{"nothing can be mounted here"};
    std::stringstream lines(text);
    std::string summary, line;
    std::getline(lines, summary);
    while (std::getline(lines, line)) fault(line);
    return summary;
}

// A tmpfs of random size fills up somewhere; with more space the run goes on.
std::string full_disk() {
    return with_mounts([] {
        Place place;
        succeeds(place.command(place / "whole", {"--keep", "0"}), place);
        int64_t files = 0, mismatches = 0;
        size_t all = 0;
        for (const auto& entry : fs::directory_iterator(place / "whole")) all += entry.file_size();
        int full = 0;
        for (int turn = 0; turn < lean(4, 12); turn++) {
            std::string folder = place / "full";
            fs::create_directory(folder);
            size_t size = size_t(uniform(0.1, 0.95) * double(all)) / 4096 * 4096;
            if (mount("tmpfs", folder.c_str(), "tmpfs", 0, format("size=%zu", size).c_str()) != 0) throw Skip{""};
            Result r = Process(place.command(folder, {"--keep", "0"}), place.path).wait();
            // Told before the first step, or at the end after checkpoints that were put off, or by a write where space
            // went meanwhile.
            std::string last_line = r.err.substr(r.err.rfind('\n', r.err.size() < 2 ? 0 : r.err.size() - 2) + 1);
            full += expect(r.code == 1 && (last_line.find("disk: expected at least") != std::string::npos ||
                                           last_line.find("No space left on device") != std::string::npos),
                           format("a disk of %zu bytes: exit %d, %s", size, r.code, r.err.c_str()));
            int64_t promised = last_named_step(r.out, "checkpoint");
            for (const auto& entry : fs::directory_iterator(folder))
                expect(entry.path().extension() != ".tmp", entry.path().string() + " is left over");
            for (const auto& [step, path] : files_by_step(folder, STATE_PATTERN)) {
                FileReader(path, FILE_STATE).finish();  // throws where it is not whole
                files++;
            }
            if (mount("tmpfs", folder.c_str(), "tmpfs", MS_REMOUNT, format("size=%zu", 4 * all).c_str()) != 0)
                throw Skip{""};
            Result again = succeeds(place.command(folder, {"--keep", "0"}), place);
            check_resume(again, promised, "after a full disk");
            mismatches += !same_run(place / "whole", folder, "after a full disk");
            umount(folder.c_str());
        }
        return format("%d disks filled up, %lld states on them whole, %lld mismatches", full, (long long)files,
                      (long long)mismatches);
    });
}

// Where no checkpoint fits, the run does not begin. Where the next one does not fit, training goes on, and has it as
// soon as there is space.
std::string little_space() {
    return with_mounts([] {
        Place place;
        constexpr int STEPS = 2090;  // after the second checkpoint hundreds, in which there must be space again
        auto command = [&](const std::string& folder) { return place.command(folder, {"--keep", "0"}, STEPS, 700); };
        succeeds(command(place / "whole"), place);
        size_t one =
            fs::file_size(state_path(place / "whole", STEPS)) + fs::file_size(model_path(place / "whole", STEPS));
        size_t log = fs::file_size(place / "whole/log.csv") + 65536;
        std::string folder = place / "little";
        fs::create_directory(folder);
        auto resize = [&](size_t bytes, unsigned long flags) {
            if (mount("tmpfs", folder.c_str(), "tmpfs", flags, format("size=%zu", bytes).c_str()) != 0) throw Skip{""};
        };
        resize(one / 2 / 4096 * 4096, 0);
        Result r = Process(command(folder), place.path).wait();
        expect(one_line(r, "disk: expected at least") && r.err.find("another -o or -n 0") != std::string::npos,
               "half a checkpoint's space: " + r.err);
        expect(fs::is_empty(folder), "a refused run has written something");
        resize(3 * one + log, MS_REMOUNT);
        spill(folder + "/other", std::string(2 * one, 'x'));  // someone else's
        Process process(command(folder), place.path);
        process.wait_for_output("checkpoint |");  // the first one fits
        while (process.runs() && process.err().find("is put off") == std::string::npos) wait_for(0.001);
        fs::remove(folder + "/other");
        r = process.wait();
        expect(r.err.find("warning: the checkpoint of step 1400 is put off: disk: expected at least") !=
                   std::string::npos,
               "no warning: " + r.err);
        int states = 0;
        for (const auto& [step, path] : files_by_step(folder, STATE_PATTERN))
            FileReader(path, FILE_STATE).finish(), states += step > 1400;
        expect(r.code == 0 && states >= 1,
               format("exit %d, %d states after there was space: %s", r.code, states, r.err.c_str()));
        resize(8 * one + log, MS_REMOUNT);
        succeeds(command(folder), place);
        bool same = same_run(place / "whole", folder, "after too little space", STEPS);
        umount(folder.c_str());
        return format("refused at the start; a checkpoint put off; %d states after there was space; %s", states,
                      same ? "the same run" : "another run");
    });
}

std::string read_only() {
    Place place;
    uid_t user = getuid() == 0 ? 65534 : 0;  // permissions hold for everyone but root
    std::string copy = place / "trainer";
    fs::copy_file(trainer, copy);
    // Enough steps after the first checkpoint that the folder is read-only before the last.
    constexpr int STEPS = 1200;
    Words command = place.command(place / "run", {}, STEPS, 70);
    command[0] = copy;
    fs::create_directory(place / "run"), chmod((place / "run").c_str(), 0777);
    succeeds(place.command(place / "whole", {}, STEPS, 70), place);
    Process process(command, place.path, {}, as_user(user));
    process.wait_for_output("checkpoint |");
    chmod((place / "run").c_str(), 0555);
    Result r = process.wait();
    one_line(r, "Permission denied");
    int64_t promised = last_named_step(r.out, "checkpoint");
    Result refused = Process(command, place.path, {}, as_user(user)).wait();
    one_line(refused, "cannot be written");
    chmod((place / "run").c_str(), 0777);
    Process again(command, place.path, {}, as_user(user));
    check_resume(again.wait(), promised, "after a folder was read-only");
    int64_t mismatches = !same_run(place / "whole", place / "run", "after a folder was read-only", STEPS);
    return format("stopped after step %lld's checkpoint, %lld mismatches", (long long)promised, (long long)mismatches);
}

std::string data_lost() {
    Place place;
    std::string content = slurp(place.text);
    constexpr int STEPS = 1200;  // enough of them after the first checkpoint that the data are gone before the last
    succeeds(place.command(place / "whole", {}, STEPS, 70), place);
    int64_t mismatches = 0, turns = 0;
    for (int how = 0; how < lean(3, 6); how++, turns++) {
        std::string folder = place / std::to_string(how);
        Process process(place.command(folder, {}, STEPS, 70), place.path);
        bool checkpointed = process.wait_for_output("checkpoint |");
        if (how % 3 == 0) fs::resize_file(place.text, size_t(how) * 100);
        else fs::remove(place.text);
        if (how % 3 == 2) fs::create_directory(place.text);
        Result r = process.wait();
        if (expect(checkpointed && r.code == 1, format("it went on to its end, code %d", r.code))) {
            one_line(r, how % 3 ? "cannot be read" : "has been cut");
            int64_t last = 0;
            read_csv_rows(folder + "/log.csv", INT64_MAX, [&](int64_t step, const std::string&) { last = step; });
            expect(last_named_step(r.out, "checkpoint") == last,
                   format("the last step is %lld, the last checkpoint %lld", (long long)last,
                          (long long)last_named_step(r.out, "checkpoint")));
        }
        fs::remove(place.text), spill(place.text, content);
        succeeds(place.command(folder, {}, STEPS, 70), place);
        mismatches += !same_run(place / "whole", folder, "after data was lost", STEPS);
    }
    return format("%lld times, %lld mismatches", (long long)turns, (long long)mismatches);
}

// A bit flipped in each KiB of a file of each kind: refused with one line wherever a checksum covers it. Shards and
// texts have none.
std::string flips() {
    Place place;
    Words base = {trainer, "-i", place.text, "-L", "4",  "-C", "8",  "-H", "2",  "-t", "8",
                  "-b",    "2",  "-x",       "6",  "-n", "3",  "-v", "0",  "-s", "0"};
    auto with = [&](Words words, const Words& more) {
        words.insert(words.end(), more.begin(), more.end());
        return words;
    };
    succeeds(with(base, {"-o", place / "run"}), place);
    succeeds(with(Words(base.begin(), base.end() - 8), {"--dump", place / "dump.bin"}), place);
    std::string shard(1024, '\0');
    int32_t header[] = {shard_formats[0].magic, shard_formats[0].version, 4000};
    memcpy(shard.data(), header, sizeof header);
    for (int i = 0; i < 4000; i++) shard += char(dice()), shard += char(dice() % 100);
    spill(place / "shard.bin", shard);
    Words on_shard = with(base, {"-o", place / "out"});
    on_shard[2] = place / "shard.bin";
    std::string state = state_path(place / "run", 6);
    struct {
        std::string path;
        Words command;
        bool checked;  // by a CRC
    } kinds[] = {
        {model_path(place / "run", 6), with(base, {"-e", model_path(place / "run", 6), "-o", place / "out"}), true},
        {state, with(base, {"-y", "-o", place / "run"}), true},
        {place / "dump.bin", {trainer, "--check", place / "dump.bin"}, true},
        {place / "shard.bin", on_shard, false},
        {place.text, with(base, {"-o", place / "out"}), false},
        {place / "run/log.csv", with(base, {"-y", "-o", place / "run"}), false},
    };
    std::string model = slurp(model_path(place / "run", 6)), good_state = slurp(state), summary;
    int64_t flipped = 0, passed_over = 0;
    for (auto& kind : kinds) {
        std::string good = slurp(kind.path);
        for (size_t at = 0; at < good.size(); at += 1024, flipped++) {
            std::string bad = good;
            size_t byte = at + dice() % std::min<size_t>(1024, good.size() - at);
            bad[byte] = char(bad[byte] ^ (1 << dice() % 8));
            spill(kind.path, bad);
            Result r = Process(kind.command, place.path).wait();
            std::string what = format("%s, byte %zu: exit %d, %s", kind.path.c_str(), byte, r.code, r.err.c_str());
            if (kind.path == state) {  // the older one is taken, and the run ends as it did
                expect(r.code == 0 && r.err.find("skipping a checkpoint") != std::string::npos, what);
                bool same = slurp(state) == good_state && slurp(model_path(place / "run", 6)) == model;
                expect(same, what + ": the resumed run ends with other bits");
            } else if (kind.checked) {
                expect(r.code == 1 && std::count(r.err.begin(), r.err.end(), '\n') == 1, what);
            } else {
                expect(r.code == 0 || (r.code == 1 && std::count(r.err.begin(), r.err.end(), '\n') == 1), what);
                passed_over += r.code == 0;
            }
            fs::remove_all(place / "out");
        }
        spill(kind.path, good);
    }
    return format("%lld flips in 6 kinds of files; every one under a checksum found (%lld in shards, texts and logs, "
                  "which have none, trained on)",
                  (long long)flipped, (long long)passed_over);
}

}  // namespace

int main(int argc, char** argv) {
    uint64_t seed = std::random_device()();
    for (int i = 1; i < argc; i++) {
        std::string word = argv[i], value = i + 1 < argc ? argv[i + 1] : "";
        if (word == "--trainer") trainer = value, i++;
        else if (word == "--shim") shim = value, i++;
        else if (word == "--kills") kills_wanted = std::stoll(value), i++;
        else if (word == "--cuts") cuts_wanted = std::stoll(value), i++;
        else if (word == "--signals") signals_wanted = std::stoll(value), i++;
        else if (word == "--seed") seed = std::stoull(value), i++;
        else chosen.insert(word);
    }
    dice.seed(seed);
    printf("crash test of %s, --seed %llu\n", trainer.c_str(), (unsigned long long)seed);
    test_case("kills", kills);
    test_case("signals", signals);
    test_case("power", power);
    test_case("full_disk", full_disk);
    test_case("little_space", little_space);
    test_case("read_only", read_only);
    test_case("data_lost", data_lost);
    test_case("flips", flips);
    test_case("limits", limits);
    test_case("clocks", clocks);
    test_case("streams", streams);
    test_case("foreign", foreign);
    test_case("vanished", vanished);
    test_case("dead", dead);
    printf("%d passed, %d failed%s\n", passed, failed, skipped ? format(", %d skipped", skipped).c_str() : "");
    return failed != 0;
}
