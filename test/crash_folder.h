// crash_folder.h: cases of crash_test.cpp in which a run's folder holds what the run has not left there, or loses what
// it has.
#pragma once

#include "crash_run.h"

namespace {

// The folder of a run that was killed after a checkpoint of at least this step.
void make_killed_run(const Words& command, const Place& place, const std::string& folder, int64_t step) {
    for (int64_t promised = -1; promised < step;) {
        fs::remove_all(folder);
        Process process(command, place.path);
        process.wait_for_output("step ");
        process.wait_for_a_moment(folder, 0.1);
        process.send(SIGKILL);
        if (Result r = process.wait(); r.code != 0) promised = last_named_step(r.out, "checkpoint");
    }
}

// What may lie in a folder. `elsewhere` is a file outside of it, which nothing in it may change.
const char* const kinds_of_things[] = {"file", "folder", "pipe", "dangling link", "link to a file", "link to itself"};
void put(int kind, const std::string& path, const std::string& elsewhere) {
    fs::remove(path);
    if (kind == 0) spill(path, "mine");
    if (kind == 1) fs::create_directory(path), spill(path + "/file", "mine");
    if (kind == 2) mkfifo(path.c_str(), 0666);
    if (kind >= 3) fs::create_symlink(kind == 3 ? elsewhere + ".not" : kind == 4 ? elsewhere : path, path);
}
bool is_there(int kind, const std::string& path, const std::string& elsewhere) {
    fs::file_status s = fs::symlink_status(path);
    if (kind == 0) return is_regular_file(s) && slurp(path) == "mine";
    if (kind == 1) return is_directory(s) && slurp(path + "/file") == "mine";
    if (kind == 2) return is_fifo(s);
    return is_symlink(s) && fs::read_symlink(path) == (kind == 3 ? elsewhere + ".not" : kind == 4 ? elsewhere : path);
}

// Foreign things of each kind under the run's names, and under almost those. (What a resume does with files that are
// states, of this run or another: test_folder.cpp.)
std::string foreign() {
    Place place;
    std::string whole = place / "whole", base = place / "base", folder = place / "run", elsewhere = place / "elsewhere";
    const Words command = place.command(folder);
    succeeds(place.command(whole), place);
    make_killed_run(place.command(base), place, base, 14);
    spill(elsewhere, "mine");
    enum Owner { NOBODY, FILES_GO, RUN };  // the run leaves all there, removes files, replaces what it finds
    const std::pair<std::string, Owner> names[] = {
        {"state_5_00000.bin", NOBODY},
        {"state_00000005_0000x.bin", NOBODY},
        {"model_x.bin", NOBODY},
        {"log.csv.old", NOBODY},
        {"state_00000900_00000.bin", NOBODY},
        {"model_00000900.bin", NOBODY},
        {"state_00000001_00000.bin", FILES_GO},
        {"model_00000001.bin", FILES_GO},
        {"state_00000119_00000.bin", RUN},
        {"model_00000119.bin", RUN},
        {"state_00000119_00000.bin.tmp", RUN},
        {"model_00000119.bin.tmp", RUN},
        {"log.csv", RUN},
        {"log.csv.tmp", RUN},
        {"lock", RUN},
    };
    int64_t things = 0, refused = 0, named = 0;
    for (const auto& [name, owner] : names)
        for (int kind = 0; kind < 6; kind++) {
            if (!long_tests() && dice() % 4) continue;
            std::string what = format("a %s under the name %s", kinds_of_things[kind], name.c_str());
            std::string path = folder + "/" + name;
            fs::remove_all(folder), fs::copy(base, folder);
            put(kind, path, elsewhere);
            Result r = Process(command, place.path).wait();
            expect(r.code == 0 || (r.code == 1 && lines_of_errors(r.err) == 1 && r.err.find(name) != std::string::npos),
                   format("%s: exit %d, %s", what.c_str(), r.code, r.err.c_str()));
            bool stays = r.code != 0 || owner == NOBODY || (owner == FILES_GO && kind != 0);
            expect(!stays || is_there(kind, path, elsewhere), what + " is gone");
            expect(slurp(elsewhere) == "mine" && !fs::exists(elsewhere + ".not"), what + ": a link was followed");
            things++, refused += r.code != 0, named += r.code == 0 && !r.err.empty();
            if (r.code != 0) {
                fs::remove_all(path);
                if (name == "log.csv") fs::copy(base + "/log.csv", path);
                succeeds(command, place);
            }
            if (name == "log.csv" && r.code == 0)
                fs::copy(whole + "/log.csv", path, fs::copy_options::overwrite_existing);
            same_run(whole, folder, what);
        }
    return format("%lld things: %lld refused, %lld named and passed over, the others in nobody's way",
                  (long long)things, (long long)refused, (long long)named);
}

// ----------------------------------------------------------------------------------------------------

// The folder, or a file in it, vanishes or is moved away while the run goes on.
std::string vanished() {
    Place place;
    constexpr int STEPS = 600;
    std::string whole = place / "whole", folder = place / "run", away = place / "away";
    const Words command = place.command(folder, {}, STEPS, 20);
    succeeds(place.command(whole, {}, STEPS, 20), place);
    fs::create_directory(place / "second");  // for what a second run prints
    int64_t turns = 0, failures = 0;
    auto equal_but_for_log = [&](const std::string& what) {
        fs::copy(whole + "/log.csv", folder + "/log.csv", fs::copy_options::overwrite_existing);
        same_run(whole, folder, what, STEPS);
    };
    const char* const events[] = {"the folder is moved away",    "the folder is removed",
                                  "log.csv is removed",          "log.csv is moved",
                                  "the newest state is removed", "the lock is removed",
                                  "another folder is put there", "another run begins in the folder's place"};
    for (int turn = 0; turn < lean(1, 8); turn++)
        for (int event = 0; event < 8; event++, turns++) {
            std::string what = events[event];
            fs::remove_all(folder), fs::remove_all(away);
            Process process(command, place.path);
            process.wait_for_output("step ");
            process.wait_for_a_moment(folder, 0.1);
            std::error_code gone;  // the run removes files as well
            if (event == 0 || event >= 6) fs::rename(folder, away);
            if (event == 1)
                while (fs::exists(folder)) fs::remove_all(folder, gone);
            if (event == 2) fs::remove(folder + "/log.csv");
            if (event == 3) fs::rename(folder + "/log.csv", folder + "/log.old");
            if (event == 4)
                if (auto states = files_by_step(folder, STATE_PATTERN); !states.empty()) fs::remove(states[0].second);
            if (event == 5) fs::remove(folder + "/lock");
            if (event == 6) fs::create_directory(folder);
            if (event == 7) {
                Result second = Process(command, place / "second").wait();
                expect(second.code == 0, what + ": " + second.err);
            }
            Result r = process.wait();
            expect(r.code == 0 || (r.code == 1 && lines_of_errors(r.err) == 1),
                   format("%s: exit %d, %s", what.c_str(), r.code, r.err.c_str()));
            failures += r.code != 0;
            if (event == 7) same_run(whole, folder, what + ", the other run", STEPS);
            if (event == 6) expect(fs::is_empty(folder), what + ", and is written to");
            if (event == 0 || event >= 6) fs::remove_all(folder), fs::rename(away, folder);
            int64_t promised = event == 1 || event == 4 ? -1 : last_named_step(r.out, "checkpoint");
            if (r.code != 0) check_resume(succeeds(command, place), promised, what);
            if (event == 2 || event == 3) equal_but_for_log(what);
            else if (event != 1 || r.code != 0) same_run(whole, folder, what, STEPS);
        }
    return format("%lld times, %lld of them the run ended with a line", (long long)turns, (long long)failures);
}

// ----------------------------------------------------------------------------------------------------

// A run is resumed with a rate that breaks the weights, at random after or before a checkpoint, of which one is kept.
// What the run then says must help: from there a sane rate makes finite steps to the end.
std::string dead() {
    Place place;
    std::string folder = place / "run";
    int64_t turns = 0, removed = 0, stopped = 0;
    for (; turns < lean(6, 60); turns++) {
        auto command = [&](const Words& more) { return place.command(folder, more, 120, int(1 + dice() % 9)); };
        fs::remove_all(folder);
        make_killed_run(command({"--keep", "1"}), place, folder, 1);
        Result r = Process(command({"--keep", "1", "-l", format("1e%d", int(2 + dice() % 8)), "-c", "1e9", "-u", "0",
                                    "--max-skips", "5"}),
                           place.path)
                       .wait();
        expect(r.code == 0 || (r.code == 1 && lines_of_errors(r.err) == 1),
               format("exit %d, %s", r.code, r.err.c_str()));
        stopped += r.code != 0;
        const std::string text = r.err;
        auto named = [&](const char* words) {  // the step of the state whose path follows the words
            long long step = -1;
            if (size_t at = text.find(words); at != text.npos)
                sscanf(text.c_str() + text.find("/state_", at), "/state_%lld_", &step);
            return step;
        };
        long long good = named("the last good checkpoint is"), bad = named("no finite step was made from");
        for (const auto& [step, path] : files_by_step(folder, STATE_PATTERN))
            if ((step > good && text.find("remove the newer ones") != text.npos) || step == bad) {
                fs::remove(path), fs::remove(model_path(folder, step)), removed++;
            }
        Result again = Process(command({"-l", "1e-3", "-c", "1"}), place.path).wait();
        expect(again.code == 0 && again.out.find("skipped    ") == std::string::npos,
               format("after '%s': exit %d, %s", text.c_str(), again.code, again.err.c_str()));
    }
    return format("%lld runs, of which %lld stopped; %lld checkpoints removed as they said, and all trained on",
                  (long long)turns, (long long)stopped, (long long)removed);
}

}  // namespace
