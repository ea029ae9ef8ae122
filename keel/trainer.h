// keel/trainer.h: what a run asks of a trainer, as a concept; train_keel_cpu.cpp and train_keel.cu each have a Trainer.
#pragma once

#include <concepts>

#include "data.h"
#include "probe.h"
#include "ranks.h"
#include "rate.h"

// The mean loss over the step's tokens, and the norm of the gradient before it is clipped. Where either is not finite
// or an outlier, the step is skipped: nothing has been updated and the gradients are zero for the next step. Nor does a
// step whose start threw a DataError update anything.
struct StepResult {
    double loss, norm;
    double seconds = 0;         // from the end of the step before, or from its start if that one had been finished
    unsigned any = 0, all = 0;  // the RankFlags that any of the ranks, and that all of them, gave to the step
    bool skipped = false;
    RecentSteps recent{};  // with this step
};

// What a rank tells the others with each step's numbers, so that all act on it at the same step.
enum RankFlag : unsigned {
    STOP_ASKED = 1,     // a signal has asked it to stop
    DATA_LOST = 2,      // its sequences could not be read: the step updates nothing
    STATE_WRITTEN = 4,  // its file of a checkpoint's states is on the disk
    MODEL_WRITTEN = 8,  // so is the checkpoint's model
};

// What ranks add up, in rank order, at the end of a step.
struct StepShare {
    double loss_sum = 0, grad_squares = 0;  // over the rank's targets; over the gradients that it owns
    uint64_t flags = 0;
};

// After a step with DATA_LOST, or a validation: throws on all ranks the DataError of the first rank whose data could
// not be read. ranks: a communicator, or Ranks. mine: this rank's error, "" if it has none.
template <class C>
[[noreturn]] void throw_lost_data(C& ranks, const RunConfig& run, const std::string& mine) {
    struct { char text[512]; } ours{};
    std::string from = run.ranks > 0 ? format("rank %d: ", run.rank) : "";
    if (!mine.empty()) snprintf(ours.text, sizeof ours.text, "%s%s", from.c_str(), mine.c_str());
    std::vector<decltype(ours)> all(size_t(std::max(1, run.ranks)));
    ranks.gather(&ours, all.data(), sizeof ours);
    size_t first = 0;
    while (first + 1 < all.size() && !*all[first].text) first++;
    throw DataError(all[first].text);
}

// The three arrays over the parameters that a training state holds, in this order; a model holds the first.
enum Section { PARAMETERS, FIRST_MOMENTS, SECOND_MOMENTS, SECTIONS };

// What carries bytes between the ranks of a run; constructed in each of them.
template <class C>
concept IsCommunicator = requires(C c, const Launch& launch, const void* mine, void* all, size_t bytes) {
    typename C::UniqueId;  // bytes that all need from rank 0, where UniqueId(true) makes them; UniqueId(false): blank
    requires std::constructible_from<C, const Launch&, const typename C::UniqueId&>;
    // What no two ranks may share; empty: nothing.
    { C::device() } -> std::same_as<std::string>;
    c.gather(mine, all, bytes);  // all (ranks, bytes) = mine (bytes) of every rank, in rank order
};

// The first half is asked before a Trainer is made. What a user can mend throws an Error.
//
// A Trainer(run, communicator) then uses the run's model, B, T, recompute, ranks and the optimizer's settings; its
// parameters are not yet set, its moments zero. communicator: null where no launcher started the run.
template <class T>
concept IsTrainer =
    IsCommunicator<typename T::Communicator> &&
    requires(RunConfig& run, const ModelConfig& c, const Options& o, const Launch& l, uint64_t available, int window) {
        typename T::Real;       // of its files and debug states
        typename T::HostArray;  // HostArray(n): n Reals at data() in the host's memory, to which save() is fast
        { T::branch_bf16 } -> std::convertible_to<bool>;  // header word H_BRANCH_BF16
        { T::on_host } -> std::convertible_to<bool>;      // available_memory is the host's; it refuses the GPU's flags
        { T::steps_in_flight } -> std::convertible_to<int>;   // steps that may have been started and not finished
        { T::ranks_by } -> std::convertible_to<const char*>;  // by what ranks talk; null where the build has one rank
        { T::ranks_needs } -> std::convertible_to<const char*>;  // what to install for a build with more
        { T::probes_ranks } -> std::convertible_to<bool>;        // --probe works on several ranks
        T::require_machine(l);  // takes this rank's device; throws where there is nothing to compute on
        T::check_model(c);      // throws where this build cannot run the shape
        { T::available_memory() } -> std::same_as<uint64_t>;  // bytes of the memory that the three below count
        T::choose_memory_plan(run, available);  // fills in B and recompute where still open; throws where nothing fits
        { T::memory_rows(run) } -> std::same_as<std::vector<MemoryRow>>;  // what a Trainer of this run takes
        // What else it takes, with its name for the table: samples and probe, or the debug states of --dump (one) and
        // --check (two) where they lie in that memory. B may still be 0.
        { T::memory_beside(run, o) } -> std::same_as<MemoryRow>;
        // Bytes of a Trainer of B = T = 1, recompute 1, and of its Generator.
        { T::sampling_bytes(c, window) } -> std::same_as<uint64_t>;
    } &&
    requires(T t, Section section, const ShardRange& range, size_t n, typename T::Real* out, const typename T::Real* in,
             const Loader& data, int64_t step, ProbeLog* probe, unsigned flags, const int* tokens, int* predictions,
             int l, DebugState<typename T::Real>& debug) {
        requires std::constructible_from<T, const RunConfig&, typename T::Communicator*>;
        { t.run } -> std::same_as<RunConfig&>;  // the constructor's; the run counts its skipped steps here
        { t.layout() } -> std::same_as<const ParameterLayout&>;

        // Parameters and moments, in and out. load and save take n elements, from the first-th on, of a range that this
        // rank owns. loaded() and saved() complete what has been asked for; all ranks call loaded(), and save_model,
        // which gives rank 0 all parameters in their order.
        t.initialise(uint64_t());  // from a seed
        t.load(section, range, n, n, in);
        t.loaded();
        t.save(section, range, n, n, out);
        t.save_model(out);
        t.saved();
        t.gather_weights();  // called by all ranks before evaluate or a Generator, which read all weights

        // The sum of the losses of b <= B sequences, (b,T). predictions (b,T), if given, gets the likeliest token after
        // each; of equals the lower.
        { t.evaluate(tokens, tokens, l, predictions) } -> std::same_as<double>;
        t.ablate(l);  // from now on evaluate leaves out the branch of sub-layer l, z_l = alpha_l x_l; -1: of none

        // start gives the trainer a step, finish waits for the oldest one that is started and not finished. Steps come
        // in order, and only these two calls come while one is in flight. probe: null where it is not probed. flags:
        // this rank's RankFlags. Where the data of one rank could not be read, finish throws a DataError on all.
        t.start(data, step, probe, flags);
        { t.finish() } -> std::same_as<StepResult>;
        { t.step_bytes } -> std::convertible_to<size_t>;  // bytes that this rank sent in the first step

        t.debug_pass(debug, l, l);  // (debug, B, T): one forward and backward pass of its tokens fills in the rest
        { t.matrix_rate(l) } -> std::same_as<MatrixRate>;  // of this rank, one of l on this machine (0: not known)
        { t.machine_name() } -> std::same_as<std::string>;

        // A Generator keeps what attention needs of the tokens fed; feed returns the logits (V) after the last, on the
        // host.
        requires std::constructible_from<typename T::Generator, decltype((t.model)), int>;
        requires requires(typename T::Generator g) {
            { g.feed(tokens, l) } -> std::same_as<const typename T::Real*>;
            g.clear();
            { g.size() } -> std::same_as<int>;  // tokens fed since the start or clear
        };
    };
