// keel/checkpoint.h: parameters and moments, from a trainer to files and back.
#pragma once

#include <atomic>
#include <exception>

#include "trainer.h"

inline FileHeader state_header(RealType type, bool branch_bf16, const RunConfig& run, int64_t step,
                               const DataSplit& data) {
    FileHeader h = make_header(FILE_STATE, type, run.model, step, branch_bf16);
    h.word[H_B] = run.B, h.word[H_T] = run.T, h.word[H_RECOMPUTE] = run.recompute.level;
    store_settings(h, run);
    h.set(H_TOTAL_BATCH, run.total_batch);
    h.set(H_TRAIN_TOKENS, int64_t(data.train_count)), h.set(H_VAL_TOKENS, int64_t(data.val_count));
    h.set(H_SKIPPED, run.skipped), h.set(H_SKIPPED_IN_ROW, run.skipped_in_row);
    h.set(H_RECENT, run.recent), h.word[H_OUTLIER] = run.outlier;
    h.word[H_ATTENTION] = run.attention, h.word[H_TUNED] = !run.tune.empty();
    h.word[H_MOMENTS_BF16] = run.types.moments_bf16, h.word[H_GRADS_BF16] = run.types.grads_bf16;
    h.word[H_RANKS] = std::max(1, run.ranks), h.word[H_RANK] = run.rank;
    h.word[H_HOPS] = data.programs.hops;
    h.set(H_TRAIN_SUM, data.train_sum), h.set(H_VAL_SUM, data.val_sum), h.set(H_HISTORY, run.history);
    return h;
}

// What a resume changes of a run, "--lr from 0.009 to 0.001, --steps from 20 to 40": its state and what it would be
// now.
inline std::string changed_settings(const FileHeader& before, const FileHeader& now) {
    std::string text;
    auto compare = [&](const char* name, const std::string& a, const std::string& b) {
        if (a != b) text += format("%s%s from %s to %s", text.empty() ? "" : ", ", name, a, b);
    };
    for (const Flag& f : flags) {
        if (!f.is_setting()) continue;
        bool integer = std::holds_alternative<int64_t Options::*>(f.member);
        auto value = [&](const FileHeader& h) {
            return integer ? f.text(h.get<int64_t>(f.stored_in)) : format("%.9g", h.get<double>(f.stored_in));
        };
        compare(f.long_name, value(before), value(now));
    }
    auto bf16 = [](int yes) { return std::string(yes ? "bf16" : "fp32"); };
    compare("--batch", format("%d", before.word[H_B]), format("%d", now.word[H_B]));
    compare("--recompute", Recompute{before.word[H_RECOMPUTE]}.name(), Recompute{now.word[H_RECOMPUTE]}.name());
    compare("--moments", bf16(before.word[H_MOMENTS_BF16]), bf16(now.word[H_MOMENTS_BF16]));
    compare("--grads", bf16(before.word[H_GRADS_BF16]), bf16(now.word[H_GRADS_BF16]));
    const char* by[] = {"not said", "mma.sync", "wgmma"};
    compare("attention", by[before.word[H_ATTENTION]], by[now.word[H_ATTENTION]]);
    if (before.word[H_ATTENTION] || !now.word[H_ATTENTION])  // older states say neither
        compare("--tune", before.word[H_TUNED] ? "a table" : "none", now.word[H_TUNED] ? "a table" : "none");
    compare("ranks", format("%d", before.word[H_RANKS]), format("%d", now.word[H_RANKS]));
    return text;
}

// -y: refuses a checkpoint of a build with other types, as this one cannot go on from it bit for bit.
inline void check_same_build(const FileHeader& state, RealType type, bool branch_bf16) {
    auto numbers = [](int type, bool bf16) { return format("type %d%s", type, bf16 ? " with a branch in BF16" : ""); };
    if (state.word[H_TYPE] != type || (state.word[H_BRANCH_BF16] != 0) != branch_bf16)
        fail("-y: expected a checkpoint of reals of %s, found %s; resume with the build that wrote it, or start from "
             "its model by -e",
             numbers(type, branch_bf16), numbers(state.word[H_TYPE], state.word[H_BRANCH_BF16] != 0));
}

// Calls take(section, range) for all that this rank owns, in the order of a file's body: the parameters (sections 1),
// or the parameters and both moments (3).
template <IsTrainer Trainer, class Take>
void each_owned_range(Trainer& trainer, int sections, Take take) {
    std::vector<ShardRange> ranges;  // neighbours in memory as one: of a rank alone, all parameters
    const ParameterLayout& layout = trainer.layout();
    auto bucket_of = [&](const ShardRange& r) { return layout.bucket_of(layout.tensors[r.tensor]); };
    for (const ShardRange& r : layout.owned(trainer.run.rank)) {
        bool neighbour = !ranges.empty() && ranges.back().memory + ranges.back().count == r.memory &&
                         bucket_of(ranges.back()) == bucket_of(r);
        if (neighbour) ranges.back().count += r.count;
        else ranges.push_back(r);
    }
    for (int section = 0; section < sections; section++)
        for (const ShardRange& range : ranges) take(Section(section), range);
}

// Copies what this rank owns to out and returns where it ends; the copy is complete after trainer.saved().
template <IsTrainer Trainer>
typename Trainer::Real* save_owned(Trainer& trainer, int sections, typename Trainer::Real* out) {
    each_owned_range(trainer, sections, [&](Section section, const ShardRange& range) {
        trainer.save(section, range, 0, range.count, out);
        out += range.count;
    });
    return out;
}

// Writes a file's body straight from the trainer, in chunks of at most 1 MiB.
template <IsTrainer Trainer>
void save_body(Trainer& trainer, FileWriter& out, int sections) {
    std::vector<typename Trainer::Real> chunk;
    constexpr size_t most = (size_t(1) << 20) / sizeof(typename Trainer::Real);
    each_owned_range(trainer, sections, [&](Section section, const ShardRange& range) {
        for (size_t at = 0; at < range.count; at += chunk.size()) {
            chunk.resize(std::min(range.count - at, most));
            trainer.save(section, range, at, chunk.size(), chunk.data());
            trainer.saved();
            out.write(std::span<const typename Trainer::Real>(chunk));
        }
    });
}

template <IsTrainer Trainer>
void write_model(const std::string& path, Trainer& trainer, int64_t step) {
    FileWriter out(path);
    FileHeader header =
        make_header(FILE_MODEL, real_type<typename Trainer::Real>, trainer.run.model, step, Trainer::branch_bf16);
    out.write(&header, sizeof header);
    save_body(trainer, out, 1);
    out.commit();
}

// This rank's range of each tensor, in the parameter order; of count 0 where it owns none of it.
template <IsTrainer Trainer>
std::vector<ShardRange> own_ranges(Trainer& trainer) {
    std::vector<ShardRange> own(trainer.layout().tensors.size());
    for (const ShardRange& range : trainer.layout().owned(trainer.run.rank)) own[range.tensor] = range;
    return own;
}

// Loads what this rank owns from the body of a file that holds the ranges `stored` in each of its sections. The caller
// calls trainer.loaded() after the last file.
template <IsTrainer Trainer>
void load_body(Trainer& trainer, FileReader& in, const std::vector<ShardRange>& stored, int sections) {
    const std::vector<ShardRange> own = own_ranges(trainer);
    std::vector<typename Trainer::Real> chunk;
    for (int section = 0; section < sections; section++)
        for (const ShardRange& range : stored)
            for (size_t at = range.first, end = range.first + range.count; at < end; at += chunk.size()) {
                chunk.resize(std::min(end - at, size_t(1) << 18));
                in.read_reals(chunk.data(), chunk.size());
                const ShardRange& ours = own[range.tensor];
                size_t from = std::max(at, ours.first), to = std::min(at + chunk.size(), ours.first + ours.count);
                if (from < to)
                    trainer.load(Section(section), ours, from - ours.first, to - from, chunk.data() + (from - at));
            }
}

// Loads the parameters, with which the bodies of models and debug states begin.
template <IsTrainer Trainer>
void load_parameters(Trainer& trainer, FileReader& in) {
    load_body(trainer, in, ParameterLayout(in.header.model()).owned(0), 1);
    trainer.loaded();
}

// Why a resume cannot go on from a checkpoint, by the header of rank 0's file, which it returns; "" where it can.
inline std::string header_fault(const StateFiles& states, FileHeader& first) {
    first = FileReader(states.path(0), FILE_STATE).header;
    if (int64_t step = first.get<int64_t>(H_STEP); step != states.step)
        return format("%s: expected step %lld as in its name, found %lld", states.path(0), states.step, step);
    if (int64_t skipped = first.get<int64_t>(H_SKIPPED_IN_ROW); skipped > 0 && !first.word[H_OUTLIER])
        return format("%s: expected one whose last step updated the weights, found that its last %lld were skipped",
                      states.path(0), skipped);
    return "";
}

// The newest checkpoint of the folder that a resume can go on from, or none where the folder has no checkpoint: its
// states are whole, and its last step was not skipped. Those passed over are named on stderr. The ranks divide the
// files among them to read, and all return the same answer.
inline StateFiles newest_states(const std::string& folder, const Ranks& ranks) {
    std::set<int64_t> steps, passed_over;
    if (ranks.rank() == 0)
        for (const char* pattern : {ANY_STATE_PATTERN, MODEL_PATTERN})  // a model alone has lost its states
            for (const auto& file : files_by_step(folder, pattern))
                if (pattern == ANY_STATE_PATTERN || !steps.empty()) steps.insert(file.first);
    int complete = 0;  // of those passed over
    auto pass_over = [](const std::string& why) { fprintf(stderr, "skipping a checkpoint: %s\n", why.c_str()); };
    for (;;) {
        struct {
            int64_t step;
            int32_t ranks, complete;
        } candidate = {-1, 0, complete};
        if (!steps.empty()) {
            StateFiles states{folder, *steps.rbegin(), 1};
            std::string why;
            candidate.step = states.step;
            steps.erase(states.step);
            try {
                FileHeader first;
                if (states.missing().empty()) why = header_fault(states, first), states.ranks = first.word[H_RANKS];
                if (!why.empty()) complete++;
                else if (std::string path = states.missing(); path.empty()) candidate.ranks = states.ranks;
                else why = format("expected the file %s, found none", path);
            } catch (const UnreadableError&) {
                throw;
            } catch (const Error& e) {
                why = e.what(), complete++;
            }
            if (!why.empty()) pass_over(why), passed_over.insert(states.step);
        }
        ranks.broadcast(&candidate, sizeof candidate);
        StateFiles states{folder, candidate.step, candidate.ranks, passed_over};
        if (!states) {
            if (candidate.complete > 0)
                fail("-y: expected a checkpoint to go on from in %s, found none among %d; restore one, or move the "
                     "folder away to start fresh",
                     folder, candidate.complete);
            return states;
        }
        int whole = candidate.ranks > 0;
        try {
            for (int r = ranks.rank(); whole && r < states.ranks; r += ranks.count()) {
                FileHeader first = FileReader(states.path(0), FILE_STATE).header;
                states.open(r, first).finish();
            }
        } catch (const UnreadableError&) {
            throw;
        } catch (const Error& e) {
            whole = 0;
            pass_over(e.what());
        }
        if (ranks.all(whole)) return states;
        complete += candidate.ranks > 0;
        passed_over.insert(candidate.step);
    }
}

// Fails where the folder, which rank 0 has locked, is not the same one on this rank: folders of one name on disks of
// their own would each get a part of every checkpoint, of which no resume finds all.
inline void check_shared_folder(const std::string& folder, const Ranks& ranks) {
    if (access(folder.c_str(), W_OK) != 0)
        fail("-o: expected the folder %s of rank 0 on all ranks, found none that can be written (%s); give one that "
             "all share",
             folder, errno_text());
    auto found = [&] {
        std::array<char, 256> holder = FolderLock::holder(folder);
        return crc32(holder.data(), holder.size());
    };
    uint32_t expected = found();
    ranks.broadcast(&expected, sizeof expected);
    for (int i = 0; i < 20 && found() != expected; i++) usleep(100000);  // a network may be late
    if (found() != expected)
        fail("-o: expected the folder %s of rank 0 on all ranks, found another of this name on the machine of rank %d; "
             "give one that all share",
             folder, ranks.rank());
}

// Loads a checkpoint that any number of ranks wrote; files that hold nothing of what this rank owns are not read.
template <IsTrainer Trainer>
void load_states(Trainer& trainer, const StateFiles& files) {
    FileHeader first = FileReader(files.path(0), FILE_STATE).header;
    ParameterLayout stored(first.model(), files.ranks);
    const std::vector<ShardRange> own = own_ranges(trainer);
    for (int rank = 0; rank < files.ranks; rank++) {
        const std::vector<ShardRange> ranges = stored.owned(rank);
        bool needed = std::any_of(ranges.begin(), ranges.end(), [&](const ShardRange& r) {
            const ShardRange& ours = own[r.tensor];
            return std::max(r.first, ours.first) < std::min(r.first + r.count, ours.first + ours.count);
        });
        if (!needed) continue;
        FileReader in = files.open(rank, first);
        load_body(trainer, in, ranges, SECTIONS);
        in.finish();
    }
    trainer.loaded();
}

// Writes the checkpoints of a run: the state first, then the model, which a resume can make from the state if it is
// missing. Where the host's memory has room for a snapshot of parameters and moments, training stalls only while that
// is taken, and a thread writes the files meanwhile. The next checkpoint and the run's end wait until a write under way
// has ended. An error in it is thrown by the next call.
//
// With several ranks each writes its own state, always from a snapshot. Once all states are on the disk, which the
// ranks tell each other with a step's numbers, rank 0 writes the model, and only then does the checkpoint count. All
// ranks make the same calls.
template <IsTrainer Trainer>
class CheckpointWriter {
public:
    using Real = typename Trainer::Real;

    CheckpointWriter(Trainer& trainer, const DataSplit& data, const std::string& folder, int64_t keep, bool background,
                     std::vector<CsvLog*> logs, const Ranks& ranks = {}, FolderLock* lock = nullptr)
        : trainer(trainer), data(data), folder(folder), home(folder), keep(keep), logs(std::move(logs)), ranks(ranks),
          lock(lock), owned(trainer.layout().owned_count(ranks.rank())) {
        if (!background && !ranks) return;
        try {
            snapshot = typename Trainer::HostArray(snapshot_count(trainer.layout(), ranks));
        } catch (const Error& e) {
            if (ranks) throw;  // free memory cannot always be had: a container may limit pinned memory
            print("note       training waits while a checkpoint is written: no snapshot (%s)\n", e.what());
            return;
        }
        take_snapshot();  // touches its pages, which would make the first checkpoint stall longer
    }
    ~CheckpointWriter() {
        if (thread.joinable()) thread.join();
    }

    // Reals of a snapshot: what this rank owns, and in a launched run's rank 0 the whole model.
    static size_t snapshot_count(const ParameterLayout& layout, const Ranks& ranks) {
        return SECTIONS * layout.owned_count(ranks.rank()) + (ranks && ranks.rank() == 0 ? layout.count : 0);
    }

    // states: the checkpoint that a resume goes on from, if any, and those passed over.
    void resume(const StateFiles& states) {
        whole = states.step, passed_over = states.passed_over, outdated = bool(states);
    }
    // Why no checkpoint can be written now; empty if one can.
    std::string fault(uint64_t bytes) const {
        std::string moved = home.fault();
        return moved.empty() ? space_fault(folder, bytes) : moved;
    }

    void write(int64_t step) {
        wait();
        double start = seconds();
        job = new_job(step);
        error = nullptr;
        passed_over.erase(step);
        if (snapshot.size()) {
            take_snapshot();
            job.stalled = seconds() - start;
            if (start_writing(ranks ? STATE : STATE_AND_MODEL)) return;
        }
        write_files(STATE_AND_MODEL);
        job.stalled = seconds() - start;
        finish();
    }

    // With several ranks: writes the model that a killed run left missing beside a whole set of states.
    void write_model(int64_t step) {
        job = new_job(step);
        take_snapshot();
        if (ranks.rank() == 0) write_files(MODEL);
        if (error) std::rethrow_exception(std::exchange(error, nullptr));
    }

    // Called after each step: prints what has been written, or throws why it could not be. all: the RankFlags that all
    // ranks gave to the step.
    void poll(unsigned all = 0) {
        if (phase != NOTHING && done.load(std::memory_order_acquire) && (!ranks || error || (all & flag_of_phase())))
            advance();
    }
    void wait() {
        while (phase != NOTHING) {
            if (thread.joinable()) thread.join();
            if (error) std::rethrow_exception(std::exchange(error, nullptr));
            ranks.barrier();
            advance();
        }
    }
    // --keep, called after a finite step from the weights of the checkpoint of step `proven`: only then does the newest
    // one stand for those before it, as its last update may have left weights from which nothing can be trained.
    void remove_old(int64_t proven) {
        if (!outdated || phase != NOTHING || proven != whole) return;
        try {
            if (ranks.rank() == 0) remove_old_checkpoints(folder, whole, keep, passed_over);
            outdated = false;
        } catch (const UnreadableError&) {  // no reason to end a run: the next step tries again
        }
    }
    unsigned flags() const { return phase != NOTHING && done.load(std::memory_order_acquire) ? flag_of_phase() : 0u; }

private:
    enum Phase { NOTHING, STATE, MODEL, STATE_AND_MODEL };
    struct Job {
        int64_t step = -1;
        double stalled = 0, written = 0;  // seconds
        FileHeader state = {}, model = {};
    };

    Job new_job(int64_t step) const {
        Job j;
        j.step = step;
        j.state = state_header(real_type<Real>, Trainer::branch_bf16, trainer.run, step, data);
        j.model = make_header(FILE_MODEL, real_type<Real>, trainer.run.model, step, Trainer::branch_bf16);
        return j;
    }
    unsigned flag_of_phase() const { return phase == STATE ? STATE_WRITTEN : MODEL_WRITTEN; }

    void take_snapshot() {
        Real* end = save_owned(trainer, SECTIONS, snapshot.data());
        if (ranks) trainer.save_model(end);
        trainer.saved();
    }

    // Starts a thread that writes; false where there is none to be had and the caller must write.
    bool start_writing(Phase what) {
        phase = what, done = false;
        try {
            thread = std::thread([this, what] { write_files(what); });
            return true;
        } catch (const std::system_error&) {
            if (!ranks) return phase = NOTHING, false;
            write_files(what);
            return true;
        }
    }

    void write_files(Phase what) {
        double start = seconds();
        try {
            for (CsvLog* log : logs) log->sync();  // no checkpoint is ahead of its log
            for (bool state : {true, false}) {
                if (what != STATE_AND_MODEL && state != (what == STATE)) continue;
                if (!state && ranks.rank() != 0) continue;
                if (std::string moved = home.fault(); !moved.empty()) fail("%s, and go on by -y", moved);
                if (lock) lock->retake();
                FileWriter out(state ? state_path(folder, job.step, ranks.rank()) : model_path(folder, job.step));
                out.write(state ? &job.state : &job.model, sizeof(FileHeader));
                if (phase == NOTHING && !ranks) {  // there is no snapshot
                    save_body(trainer, out, state ? SECTIONS : 1);
                } else {
                    size_t model = ranks ? SECTIONS * owned : 0;  // where the model starts in the snapshot
                    out.write(snapshot.data() + (state ? 0 : model),
                              (state ? SECTIONS * owned : trainer.layout().count) * sizeof(Real));
                }
                out.commit();
            }
        } catch (...) {
            error = std::current_exception();
        }
        job.written += seconds() - start;
        done.store(true, std::memory_order_release);
    }

    void advance() {
        if (thread.joinable()) thread.join();
        if (phase == STATE && !error) {
            start_writing(MODEL);
            return;
        }
        finish();
    }

    void finish() {
        phase = NOTHING;
        if (error) std::rethrow_exception(std::exchange(error, nullptr));
        whole = job.step, outdated = true;
        print("checkpoint | %s | training stalled for %.1f ms, written in %.0f ms\n", state_path(folder, job.step),
              job.stalled * 1e3, job.written * 1e3);
    }

    Trainer& trainer;
    const DataSplit& data;
    std::string folder;
    RunFolder home;
    int64_t keep;
    std::vector<CsvLog*> logs;
    Ranks ranks;
    FolderLock* lock;                      // of the folder; null: another rank, or the caller, has it
    size_t owned;                          // reals of the parameters that this rank owns
    typename Trainer::HostArray snapshot;  // empty: checkpoints are written while training waits
    Job job;
    int64_t whole = -1;             // step of the last checkpoint that is on the disk
    bool outdated = false;          // older ones than that have not been removed yet
    std::set<int64_t> passed_over;  // steps of checkpoints from which a resume could not go on
    Phase phase = NOTHING;
    std::exception_ptr error;
    std::atomic<bool> done = false;
    std::thread thread;
};
