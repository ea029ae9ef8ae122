// keel/checkpoint.h: parameters and moments, from a trainer to files and back.
#pragma once

#include <atomic>
#include <exception>

#include "data.h"
#include "trainer.h"

inline FileHeader state_header(RealType type, bool branch_bf16, const RunConfig& run, int64_t step,
                               const DataSplit& data) {
    FileHeader h = make_header(FILE_STATE, type, run.model, step, branch_bf16);
    h.word[H_B] = run.B, h.word[H_T] = run.T, h.word[H_RECOMPUTE] = run.recompute.level;
    store_settings(h, run);
    h.set(H_TOTAL_BATCH, run.total_batch);
    h.set(H_TRAIN_TOKENS, int64_t(data.train_count)), h.set(H_VAL_TOKENS, int64_t(data.val_count));
    h.set(H_SKIPPED, run.skipped), h.set(H_SKIPPED_IN_ROW, run.skipped_in_row);
    h.word[H_MOMENTS_BF16] = run.types.moments_bf16, h.word[H_GRADS_BF16] = run.types.grads_bf16;
    h.word[H_RANKS] = std::max(1, run.ranks), h.word[H_RANK] = run.rank;
    h.word[H_HOPS] = data.programs.hops;
    return h;
}

// -y: a run goes on bit for bit only in the numbers that it began in.
inline void check_same_build(const FileHeader& state, RealType type, bool branch_bf16) {
    auto numbers = [](int type, bool bf16) { return format("type %d%s", type, bf16 ? " with a branch in BF16" : ""); };
    if (state.word[H_TYPE] != type || (state.word[H_BRANCH_BF16] != 0) != branch_bf16)
        fail("-y: expected a checkpoint of reals of %s, found %s; resume with the build that wrote it, or start from "
             "its model by -e",
             numbers(type, branch_bf16), numbers(state.word[H_TYPE], state.word[H_BRANCH_BF16] != 0));
}

// What this rank owns, in the order of a file's body: the parameters (sections 1), or those and both moments (3).
template <IsTrainer Trainer, class Take>
void each_owned_range(Trainer& trainer, int sections, Take take) {
    const std::vector<ShardRange> owned = trainer.layout().owned(trainer.run.rank);
    for (int section = 0; section < sections; section++)
        for (const ShardRange& range : owned) take(Section(section), range);
}

// The sections into memory; returns where they end. trainer.saved() follows.
template <IsTrainer Trainer>
typename Trainer::Real* save_owned(Trainer& trainer, int sections, typename Trainer::Real* out) {
    each_owned_range(trainer, sections, [&](Section section, const ShardRange& range) {
        trainer.save(section, range, 0, range.count, out);
        out += range.count;
    });
    return out;
}

// A file's body straight from the trainer, a chunk of at most 64 MiB at a time.
template <IsTrainer Trainer>
void save_body(Trainer& trainer, FileWriter& out, int sections) {
    std::vector<typename Trainer::Real> chunk;
    constexpr size_t most = (size_t(64) << 20) / sizeof(typename Trainer::Real);
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

// The reverse: takes what this rank owns from the body of a file that has the sections of the ranges `stored`. Reading
// ends where they end. trainer.loaded() follows, after the last file.
template <IsTrainer Trainer>
void load_body(Trainer& trainer, FileReader& in, const std::vector<ShardRange>& stored, int sections) {
    std::vector<ShardRange> own(trainer.layout().tensors.size());  // of each tensor
    for (const ShardRange& range : trainer.layout().owned(trainer.run.rank)) own[range.tensor] = range;
    std::vector<typename Trainer::Real> chunk;
    for (int section = 0; section < sections; section++)
        for (const ShardRange& range : stored)
            for (size_t at = range.first, end = range.first + range.count; at < end; at += chunk.size()) {
                chunk.resize(std::min(end - at, size_t(4) << 20));
                in.read_reals(chunk.data(), chunk.size());
                const ShardRange& ours = own[range.tensor];
                size_t from = std::max(at, ours.first), to = std::min(at + chunk.size(), ours.first + ours.count);
                if (from < to)
                    trainer.load(Section(section), ours, from - ours.first, to - from, chunk.data() + (from - at));
            }
}

// The parameters that a model, or a debug state, begins with.
template <IsTrainer Trainer>
void load_parameters(Trainer& trainer, FileReader& in) {
    load_body(trainer, in, ParameterLayout(in.header.model()).owned(0), 1);
    trainer.loaded();
}

// A checkpoint of any number of ranks. Files that have nothing of this rank's are not read.
template <IsTrainer Trainer>
void load_states(Trainer& trainer, const StateFiles& files) {
    FileHeader first = FileReader(files.path(0), FILE_STATE).header;
    ParameterLayout stored(first.model(), files.ranks);
    std::vector<ShardRange> own(stored.tensors.size());
    for (const ShardRange& range : trainer.layout().owned(trainer.run.rank)) own[range.tensor] = range;
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

// Checkpoints of a run: the state first, then its model, as a resume writes a model that is missing. Where the host's
// memory holds a snapshot of parameters and moments, training stalls for that copy only, and a thread writes the files
// beside it. One write at a time: the next waits for it, and so does the run's end. An error in it is thrown by the
// next call.
//
// Of several ranks each writes its own state, always from a snapshot. When all states are on the disk, which the ranks
// tell each other with a step's numbers, rank 0 writes the model, and when it has, the checkpoint counts. All ranks
// make the same calls.
template <IsTrainer Trainer>
class CheckpointWriter {
public:
    using Real = typename Trainer::Real;

    CheckpointWriter(Trainer& trainer, const DataSplit& data, const std::string& folder, int64_t keep, bool background,
                     std::vector<CsvLog*> logs, const Ranks& ranks = {})
        : trainer(trainer), data(data), folder(folder), keep(keep), logs(std::move(logs)), ranks(ranks),
          owned(trainer.layout().owned_count(ranks.rank())) {
        if (!background && !ranks) return;
        try {
            snapshot = typename Trainer::HostArray(snapshot_count(trainer.layout(), ranks));
        } catch (const Error& e) {
            if (ranks) throw;  // free memory is not always memory that can be had, such as pinned memory in a container
            print("note       training waits while a checkpoint is written: no snapshot (%s)\n", std::string(e.what()));
            return;
        }
        take_snapshot();  // touches its pages, which would stall the first checkpoint
    }
    ~CheckpointWriter() {
        if (thread.joinable()) thread.join();
    }

    // Reals of a snapshot: what this rank owns, and of several ranks the model on rank 0.
    static size_t snapshot_count(const ParameterLayout& layout, const Ranks& ranks) {
        return SECTIONS * layout.owned_count(ranks.rank()) + (ranks && ranks.rank() == 0 ? layout.count : 0);
    }

    // Where steps are being skipped, nothing is removed for the new checkpoint: it may hold what cannot be trained.
    void write(int64_t step) {
        wait();
        double start = seconds();
        job = {step,
               trainer.run.skipped_in_row > 0 ? 0 : keep,
               0,
               0,
               state_header(real_type<Real>, Trainer::branch_bf16, trainer.run, step, data),
               make_header(FILE_MODEL, real_type<Real>, trainer.run.model, step, Trainer::branch_bf16)};
        error = nullptr;
        if (snapshot.size()) {
            take_snapshot();
            job.stalled = seconds() - start;
            if (start_writing(ranks ? STATE : STATE_AND_MODEL)) return;
        }
        write_files(STATE_AND_MODEL);
        job.stalled = seconds() - start;
        finish();
    }

    // Of several ranks: the model of a checkpoint whose states are all there.
    void write_model(int64_t step) {
        job = {step, 0,  0,
               0,    {}, make_header(FILE_MODEL, real_type<Real>, trainer.run.model, step, Trainer::branch_bf16)};
        take_snapshot();
        if (ranks.rank() == 0) write_files(MODEL);
        if (error) std::rethrow_exception(std::exchange(error, nullptr));
    }

    // Between steps: says what has been written, or throws why it could not be. all: the RankFlags that all ranks gave
    // to the step.
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
    unsigned flags() const { return phase != NOTHING && done.load(std::memory_order_acquire) ? flag_of_phase() : 0u; }
    int64_t last_step() const { return last; }  // of the newest that is whole and on the disk; -1: none

private:
    enum Phase { NOTHING, STATE, MODEL, STATE_AND_MODEL };
    struct Job {
        int64_t step, keep;
        double stalled, written;  // seconds
        FileHeader state, model;
    };

    unsigned flag_of_phase() const { return phase == STATE ? STATE_WRITTEN : MODEL_WRITTEN; }

    void take_snapshot() {
        Real* end = save_owned(trainer, SECTIONS, snapshot.data());
        if (ranks) trainer.save_model(end);
        trainer.saved();
    }

    // False where there are no more threads, and the caller must write.
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
                FileWriter out(state ? state_path(folder, job.step, ranks.rank()) : model_path(folder, job.step));
                out.write(state ? &job.state : &job.model, sizeof(FileHeader));
                if (phase == NOTHING && !ranks) {  // there is no snapshot
                    save_body(trainer, out, state ? SECTIONS : 1);
                } else {
                    size_t model = ranks ? SECTIONS * owned : 0;  // where it is in the snapshot
                    out.write(snapshot.data() + (state ? 0 : model),
                              (state ? SECTIONS * owned : trainer.layout().count) * sizeof(Real));
                }
                out.commit();
            }
            if (!ranks) remove_old_checkpoints(folder, job.step, job.keep);
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
        last = job.step;
        if (ranks && ranks.rank() == 0) remove_old_checkpoints(folder, job.step, job.keep);
        print("checkpoint | %s | training stalled for %.1f ms, written in %.0f ms\n", state_path(folder, job.step),
              job.stalled * 1e3, job.written * 1e3);
    }

    Trainer& trainer;
    const DataSplit& data;
    std::string folder;
    int64_t keep, last = -1;
    std::vector<CsvLog*> logs;
    Ranks ranks;
    size_t owned;                          // reals of the parameters that this rank owns
    typename Trainer::HostArray snapshot;  // empty: checkpoints are written while training waits
    Job job{};
    Phase phase = NOTHING;
    std::exception_ptr error;
    std::atomic<bool> done = false;
    std::thread thread;
};
