// keel/run.h: a run from its command line to its last checkpoint, for any trainer.
#pragma once

#include <optional>

#include "divergence.h"
#include "evaluate.h"
#include "process.h"
#include "sample.h"

inline void print_run(const RunConfig& run, const ParameterLayout& layout, const DataSplit& data) {
    print_model(run, layout);
    if (const HopPrograms& p = data.programs; p.hops)
        print("data       %s: programs without end, %d variables, %d queries of 1 to %d lookups; %d whole ones of %d "
              "characters a sequence\n",
              data.train.pattern, p.variables(), p.queries(), p.hops, (run.T + 1) / p.length(), p.length());
    else
        print("data       %s: %s tokens to train on, %s to validate on\n", data.train.pattern,
              count_text(double(data.train_count)), count_text(double(data.val_count)));
    if (const Tokenizer& t = data.tokenizer; !t.is_bytes()) {
        print("tokenizer  %s: V %d, split %s", t.path, t.V(), split_names[int(t.split())]);
        if (data.text_bytes)
            print("; %.2f bytes a token, encoded at %.0f MB/s", double(data.text_bytes) / double(data.text_tokens),
                  double(data.text_bytes) * 1e-6 / data.encode_seconds);
        print("\n");
    } else if (!tokenizer_of_model(t, run.model.V)) {
        print("note       no --tokenizer says what the tokens are: prompts and samples are ids\n");
    }
    if (run.ranks > 0) print("ranks      %d, -z %d\n", run.ranks, run.zero);
    std::string passes = data.passes(run) > 0 ? format("%.3g passes over the data, ", data.passes(run)) : "";
    print("training   %lld steps of %lld tokens (%s%d x %d x %d), %speak LR %g, warm-up %lld, %s, weight decay %g, "
          "clip %g, seed %llu\n",
          run.steps, run.total_batch, run.ranks > 1 ? format("%d x ", run.ranks) : "", run.accumulation(), run.B, run.T,
          passes, run.lr, run.warmup, schedules[run.schedule].name, run.weight_decay, run.clip, run.seed);
}

// One run: what it starts from, what it takes, its steps. run() calls the functions below in the order they stand in.
template <IsTrainer Trainer>
class Run {
    using Real = typename Trainer::Real;

public:
    Run(const Options& o, RankSession<Trainer>& session) : o(o), session(session) {}

    int run() {
        start_ranks();
        clock.mark("device");
        if (!o.check.empty()) return check_debug_state<Trainer>(o);
        if (!o.dump.empty()) check_dump_target(o.dump);
        find_start();
        if (o.only_samples() && o.dump.empty()) {
            if (ranks.count() > 1) fail("--prompt: expected one rank to sample on, found %d; start one", ranks.count());
            return run_sampling<Trainer>(o, *init);
        }
        resolve();
        plan_memory();
        clock.mark("data");
        load();
        clock.mark("weights");
        double data_entropy = unigram_entropy.get();
        clock.mark("tokens");
        train_data.emplace(data->loader(config, true)), val_data.emplace(data->loader(config, false));
        if (!o.ablate.empty()) return run_ablation(o, *trainer, *val_data);
        if (!o.dump.empty()) return dump_debug_state(o, *trainer, *train_data);
        open_logs(data_entropy);
        open_checkpoints();
        StopSignals::watch();
        print_machine();
        clock.mark("folder, rate");
        train();
        return 0;
    }

    // After an error: a checkpoint that is being written is written to its end.
    void finish_writing() { checkpoints.reset(); }

private:
    // ----- Before anything is written

    bool first_rank() const { return ranks.rank() == 0; }
    bool needs_one_rank() const { return !o.check.empty() || !o.dump.empty() || !o.ablate.empty(); }
    bool wants_checkpoints() const {
        return !o.out.empty() && o.dump.empty() && o.ablate.empty() && o.checkpoint_every > 0;
    }

    void start_ranks() {
        for (const char* flag : {"--tune", "--moments", "--grads"})
            if (Trainer::on_host && o.has(flag)) fail("%s: is for the GPU trainer, train_keel; leave it out", flag);
        Trainer::require_machine(session.launch);
        session.start();
        ranks = session.ranks();
        if (o.zero > 0 && session.launch.launcher.empty())
            fail("-z: expected 0, found %lld; this run has one rank, and ZeRO shards over several", o.zero);
        if (ranks && o.probe > 0 && !Trainer::probes_ranks)
            fail("--probe: expected a run started alone, found one started by %s; leave it out, or use train_keel_cpu",
                 session.launch.launcher);
        if (ranks.count() > 1 && needs_one_rank())
            fail("--dump, --check and --ablate: expected one rank, found %d; start one", ranks.count());
    }

    // Opens what the run starts from: the file of -e, or the newest checkpoint of -o.
    void find_start() {
        if (!o.out.empty()) {
            std::error_code ignored;
            if (first_rank()) check_output_folder(o.out);
            if (first_rank() && std::filesystem::is_directory(o.out, ignored)) lock = FolderLock(o.out);
            if (first_rank() && !o.resume && o.ablate.empty()) refuse_other_run(o.out);
            if (o.resume) resume_from = newest_states(o.out, ranks);
            if (first_rank() && o.resume && !resume_from) check_fresh_resume(o.out);
        }
        if (!o.init.empty()) init = std::make_unique<FileReader>(o.init, FILE_MODEL);
        if (resume_from) init = std::make_unique<FileReader>(resume_from.path(0), FILE_STATE);
        if (resume_from) check_same_build(init->header, real_type<Real>, Trainer::branch_bf16);
    }

    void resolve() {
        data = std::make_unique<DataSplit>(o, init.get(), session.launch.local_ranks);
        if (int hops = resume_from ? init->header.word[H_HOPS] : data->programs.hops; hops != data->programs.hops) {
            auto kind = [](int k) { return k ? format("hops:%d", k) : std::string("files"); };
            fail("-i: expected %s as in the checkpoint, found %s; give the same data", kind(hops),
                 kind(data->programs.hops));
        }
        config = resolve_run(o, init ? &init->header : nullptr, data->vocabulary(), data->natural_seq_len(),
                             !needs_one_rank() && ranks ? ranks.count() : 0, ranks.rank());
        Trainer::check_model(config.model);
        if (Trainer::on_host && (config.types.moments_bf16 || config.types.grads_bf16))
            fail("-y: expected a checkpoint with FP32 moments and gradients, found BF16 ones; resume with "
                 "train_keel_fp32, or start from its model by -e");
        if (!o.ablate.empty() && o.ablate != "all") parse_integer("--ablate", o.ablate, 0, config.model.L - 1);
        if (o.ablate.empty() || data->programs.hops) data->check_lengths(config, o);
        read_all_tokens();
        if ((config.val_every > 0 || !o.ablate.empty()) && o.dump.empty()) data->check_validation(config);
        auto same_count = [&](const char* flag, const char* what, HeaderWord word, uint64_t found) {
            if (uint64_t expected = init->header.template get<uint64_t>(word); expected != found)
                fail("%s: expected the %llu %s tokens of the checkpoint, found %llu; give the same data", flag,
                     expected, what, found);
        };
        if (resume_from) same_count("-i", "training", H_TRAIN_TOKENS, data->train_count);
        if (resume_from && config.val_every > 0) same_count("-j", "validation", H_VAL_TOKENS, data->val_count);
        auto same_sum = [&](const char* flag, HeaderWord word, uint32_t found) {
            if (uint32_t expected = init->header.template get<uint32_t>(word); expected && found && expected != found)
                fail("%s: expected the data of the checkpoint, of checksum %08x, found others of as many tokens, of "
                     "checksum %08x; give the same data",
                     flag, expected, found);
        };
        if (resume_from) same_sum("-i", H_TRAIN_SUM, data->train_sum);
        if (resume_from && config.val_every > 0) same_sum("-j", H_VAL_SUM, data->val_sum);
        if (o.sample_every > 0) prompt_tokens(o, tokenizer(), config.model.V);
        // Ranks that train on different data or models would go unnoticed. -z stands where the header has the step.
        FileHeader same = state_header(real_type<Real>, Trainer::branch_bf16, config, config.zero, *data);
        same.word[H_RANK] = 0;
        std::vector<uint32_t> sums = ranks.gather(crc32(&same, sizeof same));
        for (size_t r = 0; r < sums.size(); r++)
            if (sums[r] != sums[0])
                fail("ranks: expected the same flags, files and data on all, found others on rank %zu than on rank 0; "
                     "start all alike",
                     r);
    }

    // Checks every token while the device is made ready; run() waits for the result before anything is written.
    void read_all_tokens() {
        auto look = [data = data.get(), V = config.model.V] {
            data->check_tokens(V);
            return data->unigram_entropy(V);
        };
        try {
            unigram_entropy = std::async(std::launch::async, look);
        } catch (const std::system_error&) {  // no more threads
            unigram_entropy = std::async(std::launch::deferred, look);
        }
    }

    // Plans the memory, prints the plan and compares it with what there is, before any is taken.
    void plan_memory() {
        const ModelConfig& model = config.model;
        MemoryRow beside = Trainer::memory_beside(config, o);
        uint64_t available = Trainer::available_memory();
        if (ranks && Trainer::on_host && session.launch.local_ranks > 1)  // which share the machine's
            available /= uint64_t(session.launch.local_ranks);
        for (uint64_t others : ranks.gather(available)) available = std::min(available, others);  // all choose alike
        Trainer::choose_memory_plan(config, available > beside.bytes ? available - beside.bytes : 0);
        if (!o.dump.empty())
            require_memory(debug_state_bytes<Real>(model, config.B, config.T), available_memory(),
                           "a smaller -b, -t or -L");
        std::vector<MemoryRow> memory = Trainer::memory_rows(config);
        memory.push_back(beside);
        if (wants_checkpoints()) {
            if (resume_from && first_rank()) remove_unfinished_files(o.out);
            std::string fault = space_fault(o.out, checkpoint_bytes(model, real_type<Real>));
            if (!fault.empty() && !resume_from) fail("%s", fault);  // else --keep may make room
        }
        uint64_t host_left = ::available_memory(), snapshot = sizeof(Real);
        snapshot *= CheckpointWriter<Trainer>::snapshot_count(ParameterLayout(model, config.ranks), ranks);
        if (wants_checkpoints()) {
            uint64_t with_thread = snapshot + (8 << 20);  // 8 MiB: the stack of the thread that writes
            if (Trainer::on_host) host_left -= std::min(host_left, total_bytes(memory));
            in_background = with_thread <= host_left || ranks;
            if (in_background && Trainer::on_host) memory.push_back({"snapshot for checkpoints", with_thread});
        }
        print_run(config, ParameterLayout(model), *data);
        if (std::string told = data->repetition(config, parameter_count(model)); !told.empty() && !needs_one_rank())
            print("note       %s\n", told);
        print("memory     needs %s of %s, micro-batch %d, recompute %s:\n", bytes_text(double(total_bytes(memory))),
              bytes_text(double(available)), config.B, config.recompute.name(config.model.L));
        print_memory_table(memory);
        if (wants_checkpoints()) print_checkpoint_memory(snapshot, host_left);
        fflush(stdout);
    }

    void print_checkpoint_memory(uint64_t snapshot, uint64_t host_left) {
        if (!in_background)
            print("note       a snapshot of %s does not fit into the %s of memory left: training waits while a "
                  "checkpoint is written\n",
                  bytes_text(double(snapshot)), bytes_text(double(host_left)));
        else if (!Trainer::on_host)
            print("  %-38s %12s\n", "snapshot for checkpoints, on the host", bytes_text(double(snapshot)));
        uint64_t disk = (uint64_t(o.keep) + 1) * checkpoint_bytes(config.model, real_type<Real>);
        if (o.keep > 0 && o.keep < 1000 && free_space(o.out) < disk)
            print("note       %s is free in %s, and --keep %lld checkpoints with the next beside them take %s\n",
                  bytes_text(double(free_space(o.out))), o.out, o.keep, bytes_text(double(disk)));
    }

    // ----- Trainer, logs, checkpoints

    void load() {
        trainer.emplace(config, session.communicator.get());
        clock.mark("memory");
        if (resume_from) load_states(*trainer, resume_from);
        else if (init) load_parameters(*trainer, *init), init->finish();
        else trainer->initialise(uint64_t(config.seed));
        if (!resume_from) return;
        step = newest = last_updated = init->header.template get<int64_t>(H_STEP);
        print("resuming   %s%s\n", resume_from.path(0),
              resume_from.ranks > 1 || ranks.count() > 1 ? format(", of %d ranks", resume_from.ranks) : "");
        print_changes();
        if (int32_t stored = init->header.word[H_B]; stored != config.B && !o.batch)
            print("note       the checkpoint's micro-batch of %d does not fit %d ranks and -d %lld: taking %d\n",
                  stored, ranks.count(), config.total_batch, config.B);
    }

    // What this resume changes, and the learning rate before and after it.
    void print_changes() const {
        FileHeader now = state_header(real_type<Real>, Trainer::branch_bf16, trainer->run, step, *data);
        std::string changes = changed_settings(init->header, now);
        if (changes.empty()) return;
        Settings before;
        restore_settings(before, {}, init->header);
        double was = learning_rate(before, step), would_be = learning_rate(before, std::min(step + 1, before.steps)),
               is = learning_rate(config, step + 1);
        bool other_rate = step > 0 && step < config.steps && is != would_be;
        print("changed    %s%s\n", changes,
              other_rate ? format("; the learning rate was %.3g at step %lld and is %.3g at step %lld", was, step, is,
                                  step + 1)
                         : "");
    }

    void open_logs(double data_entropy) {
        divergence.emplace(config.steps, config.warmup, data_entropy);
        if (resume_from)  // the detector gets the losses of the steps already done
            read_csv_rows(o.out + "/log.csv", step, [&](int64_t row_step, const std::string& line) {
                divergence->add(row_step, atof(line.c_str() + std::min(line.size(), line.find(',') + 1)));
            });
        open_folder();
        if (!o.out.empty() && first_rank()) {
            keep_tokenizer();
            remove_unfinished_files(o.out);
            int64_t kept = resume_from ? step : -1;
            bool copy_later = !resume_from;  // or where a checkpoint that was whole once has been passed over
            for (int64_t s : resume_from.passed_over) copy_later |= !is_absent(model_path(o.out, s));
            log = std::make_unique<CsvLog>(o.out + "/log.csv",
                                           "step,loss,val_loss,lr,grad_norm,ms,tokens_per_second,mfu,val_bits_per_byte",
                                           kept, copy_later, true);
            if (o.probe > 0) probe_log = std::make_unique<ProbeLog>(o.out, kept, copy_later);
            if (data->programs.hops)
                hops_log = std::make_unique<CsvLog>(o.out + "/hops.csv", HopAccuracy::COLUMNS, kept, copy_later);
        } else if (o.probe > 0) {
            probe_log = std::make_unique<ProbeLog>();
        }
    }

    void open_folder() {
        if (o.out.empty()) return;
        if (first_rank()) {
            create_output_folder(o.out);
            if (!lock) {  // the folder is new, unless another run has just made it
                lock = FolderLock(o.out);
                if (!resume_from) refuse_other_run(o.out);
            }
        }
        ranks.barrier();
        check_shared_folder(o.out, ranks);
        ranks.barrier();
    }

    // Leaves the tokenizer beside the models, which are worth little without it; on a resume in place of a damaged one.
    void keep_tokenizer() const {
        const Tokenizer& t = data->tokenizer;
        std::string path = tokenizer_path(o.out);
        std::optional<uint32_t> found;  // the CRC-32 of a whole one
        try {
            found = Tokenizer::read(path).crc;
        } catch (const UnreadableError&) {
            throw;
        } catch (const Error&) {}
        if (found == t.crc) return;
        bool another = t.is_bytes() ? found.has_value() : access(path.c_str(), F_OK) == 0;
        if (another && !(resume_from && (t.is_bytes() || !found)))
            fail("-o: expected no tokenizer but the run's own, found %s%s; give it by --tokenizer, or another folder",
                 path, found ? format(" of CRC-32 %08x", *found) : "");
        if (!t.is_bytes()) FileWriter::replace(path, t.file());
    }

    void open_checkpoints() {
        // A run killed between a checkpoint's two files has left the state, from which the model can be made.
        bool no_model = resume_from && log && access(model_path(o.out, step).c_str(), F_OK) != 0;
        if (wants_checkpoints()) {
            std::vector<CsvLog*> logs;
            if (first_rank()) logs.push_back(log.get());
            if (first_rank() && probe_log) logs.push_back(&probe_log->sublayers), logs.push_back(&probe_log->weights);
            if (hops_log) logs.push_back(hops_log.get());
            checkpoints = std::make_unique<CheckpointWriter<Trainer>>(*trainer, *data, o.out, o.keep, in_background,
                                                                      logs, ranks, first_rank() ? &lock : nullptr);
            checkpoints->resume(resume_from);
            if (ranks && !ranks.all(!no_model)) checkpoints->write_model(step);
        }
        if (!ranks && no_model) write_model(model_path(o.out, step), *trainer, step);
    }

    void print_machine() {
        MatrixRate measured = MatrixRate::together(ranks.gather(trainer->matrix_rate(session.launch.local_ranks)));
        rate = measured.fastest;
        print("machine    %s, %.0f GFLOP/s in matrix products%s\n", trainer->machine_name(), rate * 1e-9,
              ranks.count() > 1 ? format(", all %d ranks together", ranks.count()) : "");
        if (std::string doubt = measured.doubt(); !doubt.empty()) print("note       %s\n", doubt);
        if (!init)
            print("note       the first loss is not ln V = %.2f: the tied head sees each input token's own embedding\n",
                  std::log(double(config.model.V)));
    }

    // ----- Steps

    bool stop_asked() const { return ranks ? told_to_stop : StopSignals::asked(); }
    bool due_at(int64_t s, int64_t every) const { return every > 0 && (s % every == 0 || s == config.steps); }
    bool due(int64_t every) const { return due_at(step, every); }
    bool probing(int64_t s) const { return o.probe > 0 && s % o.probe == 0; }
    // Whether nothing comes between step s and the next: the trainer can have that one before s's result is known.
    bool goes_straight_on(int64_t s) const {
        return !overdue && !due_at(s, config.val_every) && !(checkpoints && due_at(s, o.checkpoint_every)) &&
               !due_at(s, o.sample_every) && !probing(s) && !probing(s + 1);
    }

    void train() {
        if (step >= config.steps && resume_from)
            print("the run has its %lld steps; -x with a larger number goes on\n", config.steps);
        if (config.steps == 0) {
            validate_if_due();
            checkpoint();
            sample_if_due();
        }
        if (resume_from) validate_again();
        started = step;
        static_assert(Trainer::steps_in_flight <= 2);
        while (started > step || (step < config.steps && !stop_asked())) {
            start_steps();
            if (started > step) finish_step();
            else break;
        }
        if (data_error) end_without_data();
        if (stop_asked() && step < config.steps) {
            if (step > 0) checkpoint();
            print("stopping   after step %lld, as a signal asked\n", step);
        }
        if (checkpoints) checkpoints->wait();
        end();
    }

    bool skips_outliers() const { return config.skip_loss > 0 || config.skip_grad > 0; }

    // Whether the last step's loss or gradient was not finite: the weights are perhaps beyond repair.
    bool unsound() const { return trainer->run.skipped_in_row > 0 && !trainer->run.outlier; }

    // Says what a run has left whose last steps were skipped, or whose last update broke the weights.
    void end() {
        int64_t skipped = trainer->run.skipped, in_row = unsound() ? trainer->run.skipped_in_row : 0;
        if (skipped > 0)
            print("skipped    %lld of %lld steps, whose loss or gradient was not finite%s\n", skipped, step,
                  skips_outliers() ? " or an outlier" : "");
        if (stop_asked()) return;
        if (in_row == 0 && (!checkpoints || weights_are_sound())) {
            if (checkpoints) checkpoints->remove_old(newest);
            return;
        }
        std::string found = in_row ? format("found the last %lld steps skipped, and the weights those of step %lld",
                                            in_row, step - in_row)
                                   : "found weights whose loss is not finite";
        std::string text =
            format("step %lld: expected a run whose last step updates the weights, %s; %s", step, found, advice());
        if (in_row >= steps_here && steps_here > 0) fail("%s", text);
        if (first_rank()) warn(text);
    }

    // Whether the weights give a finite loss, on the first micro-batch of the step that would be next.
    bool weights_are_sound() {
        if (ranks) trainer->gather_weights();
        std::vector<int> tokens(size_t(config.B) * size_t(config.T)), targets(tokens.size());
        double loss = 0;
        try {
            train_data->batch(config.sequence(step + 1, 0), config.B, tokens.data(), targets.data());
            loss = trainer->evaluate(tokens.data(), targets.data(), config.B, nullptr);
        } catch (const DataError&) {  // the run has ended, and nothing can be told of its weights
        }
        return ranks.all(std::isfinite(loss));
    }

    // After steps that were skipped: from where to go on. A checkpoint is good if a finite step was made from it.
    std::string advice() const {
        if (newest < 0) return "there is no checkpoint: start again with a smaller -l";
        std::string again = "start again in another folder with a smaller -l";
        if (last_updated < 0) return "no checkpoint was written after a finite step: " + again;
        if (known_good >= 0 && !is_absent(state_path(o.out, known_good)))
            return format("the last good checkpoint is %s: %sgo on from it by -y with a smaller -l",
                          state_path(o.out, known_good), known_good < last_updated ? "remove the newer ones and " : "");
        auto states = files_by_step(o.out, STATE_PATTERN);
        auto older = std::find_if(states.begin(), states.end(), [&](const auto& f) { return f.first < last_updated; });
        if (older != states.end())
            again = format("remove it and go on from %s, by -y with a smaller -l", older->second);
        return format("no finite step was made from %s: %s", state_path(o.out, last_updated), again);
    }

    // Gives the trainer the next step, and the one after it where nothing comes between the two.
    void start_steps() {
        while (!data_error && started < config.steps && !stop_asked() &&
               (started == step || (started < step + Trainer::steps_in_flight && goes_straight_on(started)))) {
            try {
                unsigned flags = (StopSignals::asked() ? STOP_ASKED : 0u) | (checkpoints ? checkpoints->flags() : 0u);
                trainer->start(*train_data, started + 1, probing(started + 1) ? probe_log.get() : nullptr, flags);
                started++;
            } catch (const DataError&) {  // the steps in flight have their data
                data_error = std::current_exception();
            }
        }
    }

    [[noreturn]] void end_without_data() {
        if (step > 0) checkpoint();
        if (checkpoints) checkpoints->wait();
        std::rethrow_exception(data_error);
    }

    // Finishes the oldest step in flight and does all that is due after it.
    void finish_step() {
        StepResult result;
        try {
            result = trainer->finish();
        } catch (const DataError&) {  // on any rank: this step and those after it have updated nothing
            data_error = std::current_exception(), started = step;
            return;
        }
        told_to_stop = result.any & STOP_ASKED;
        step++;
        bool skipped = result.skipped;
        std::string why = skipped ? reason(result) : "";
        trainer->run.recent = result.recent;
        trainer->run.skipped += skipped;
        trainer->run.skipped_in_row = skipped ? trainer->run.skipped_in_row + 1 : 0;
        trainer->run.outlier = skipped && std::isfinite(result.loss) && std::isfinite(result.norm);
        double numbers[] = {double(step), skipped ? 0 : result.loss, skipped ? 0 : result.norm};
        trainer->run.history = crc32(numbers, sizeof numbers, trainer->run.history);
        if (!unsound()) known_good = newest;
        spent += result.seconds, steps_here++;
        if (steps_here == 1) clock.add("first step", result.seconds), clock.print();
        if (steps_here == 1 && ranks) print("network    %zu bytes sent by rank 0 in a step\n", trainer->step_bytes);
        report(result, why);
        if (trainer->run.skipped_in_row >= o.max_skips) end_after_skips(result);
        if (std::string kind = divergence->add(step, result.loss); !kind.empty()) warn_of_divergence(kind);
        if (checkpoints) checkpoints->poll(result.all), checkpoints->remove_old(known_good);
        // While steps are not finite the parameters stay as they are: no checkpoint but at the end.
        if (overdue || due(o.checkpoint_every)) {
            if (!unsound() || step == config.steps) checkpoint();
            else overdue = bool(checkpoints);
        }
        sample_if_due();
    }

    // Why a step is skipped, by what was known before it.
    std::string reason(const StepResult& result) const {
        if (!std::isfinite(result.loss) || !std::isfinite(result.norm)) return "loss or gradient is not finite";
        const RecentSteps& recent = trainer->run.recent;
        auto z = [](double x, RecentSteps::Moments m) { return (x - m.mean) / std::sqrt(m.variance); };
        double loss = z(result.loss, recent.loss), grad = z(result.norm, recent.grad);
        bool by_loss = config.skip_loss > 0 && loss > config.skip_loss;
        return format("%s is %.1f standard deviations above the mean of recent steps, %.4g",
                      by_loss ? "loss" : "gradient norm", by_loss ? loss : grad,
                      by_loss ? recent.loss.mean : recent.grad.mean);
    }

    void report(const StepResult& result, const std::string& why_skipped) {
        double tokens_per_second = double(config.total_batch) / result.seconds, lr = learning_rate(config, step);
        double mfu = flops_per_token(config.model, config.T) * tokens_per_second / rate;
        print("step %lld/%lld | loss %.4f | grad norm %.3g | lr %.2e | %.0f ms | %.0f tokens/s | %s %% of matrix "
              "rate | %s left\n",
              step, config.steps, result.loss, result.norm, lr, result.seconds * 1e3, tokens_per_second,
              mfu < 0.1 ? format("%.2g", 100 * mfu) : format("%.0f", 100 * mfu),
              duration_text(spent / double(steps_here) * double(config.steps - step)));
        if (mfu > 1 && !std::exchange(rate_beaten, true))
            print("note       step %lld was faster than the matrix rate, which was measured too low: the percentages "
                  "and mfu of this run are too high\n",
                  step);
        if (result.skipped)
            print("skipped    step %lld, whose %s: nothing is updated; %lld in a row, %lld in all\n", step, why_skipped,
                  trainer->run.skipped_in_row, trainer->run.skipped);
        auto [val_loss, bits_per_byte] = validate_if_due();
        if (log)
            log->row(format("%lld,%s,%s,%.9g,%s,%.3f,%.1f,%.4g,%s", step, number_text(result.loss), val_loss, lr,
                            number_text(result.norm), result.seconds * 1e3, tokens_per_second, mfu, bits_per_byte));
    }

    const Tokenizer* tokenizer() const { return tokenizer_of_model(data->tokenizer, config.model.V); }

    std::pair<std::string, std::string> validate_if_due() {  // loss and bits per byte, empty where none is measured
        if (!due(config.val_every)) return {};
        return validate_now();
    }

    std::pair<std::string, std::string> validate_now() {
        if (ranks) trainer->gather_weights();
        HopAccuracy hops(data->programs);
        std::optional<Validation> found;
        try {
            found = validate(*trainer, *val_data, config, tokenizer(), ranks, data->programs.hops ? &hops : nullptr);
        } catch (const DataError&) {  // on all ranks: the run ends with the weights of this step
            data_error = std::current_exception();
            return {};
        }
        if (!found) {
            print("note       the validation of step %lld is left%s, as a signal asks the run to stop\n", step,
                  checkpoints ? " to -y" : "");
            told_to_stop = true;
            return {};
        }
        auto [loss, bits_per_byte] = *found;
        bool known = std::isfinite(bits_per_byte);
        print("validation | loss %.4f | perplexity %.3f%s\n", loss, std::exp(loss),
              known ? format(" | %.4f bits per byte", bits_per_byte) : "");
        if (data->programs.hops) hops.print();
        if (hops_log) hops.write(*hops_log, step);
        return {number_text(loss), known ? number_text(bits_per_byte) : ""};
    }

    // On a resume: the validation that a signal or lost data have cut short, whose row in the log has no val_loss. It
    // was due by the settings of then.
    void validate_again() {
        std::string row;
        int64_t every = init->header.template get<int64_t>(H_VAL_EVERY);
        bool ended = step == init->header.template get<int64_t>(H_STEPS) || step == config.steps;
        bool was_due = config.val_every > 0 && every > 0 && (step % every == 0 || ended);
        if (log && was_due) row = last_row(o.out + "/log.csv", step);
        size_t at = row.find(',', row.find(',') + 1) + 1;  // where val_loss is, in "step,loss,val_loss,..."
        bool again = !row.empty() && row[at] == ',';
        ranks.broadcast(&again, sizeof again);
        if (!again) return;
        auto [val_loss, bits_per_byte] = validate_now();
        if (log && !val_loss.empty()) log->replace_last(row.insert(at, val_loss) + bits_per_byte);
    }

    // Where the disk has no room for a checkpoint, or the folder is not there, training goes on and the next step tries
    // again; the run's end fails.
    void checkpoint() {
        if (!checkpoints || newest == step) return;
        if (unsound() && step < config.steps) return;                              // a resume could not go on from it
        if (!unsound()) checkpoints->wait(), checkpoints->remove_old(known_good);  // before space is asked for
        std::string fault = checkpoints->fault(checkpoint_bytes(config.model, real_type<Real>));
        if (ranks.all(fault.empty())) fault = "";
        else if (fault.empty())
            fault = "disk: expected all ranks to find the folder and space in it, found one that does not";
        if (!fault.empty() && (step >= config.steps || stop_asked())) fail("step %lld: %s", step, fault);
        if (!fault.empty() && !overdue && first_rank())
            warn(format("the checkpoint of step %lld is put off: %s", step, fault));
        overdue = !fault.empty();
        if (overdue) return;
        checkpoints->write(step), newest = step;
        if (!unsound()) last_updated = step;
    }

    void sample_if_due() {
        if (ranks && due(o.sample_every)) trainer->gather_weights();
        if (due(o.sample_every) && !stop_asked() && first_rank())
            print_sample(*trainer, o, tokenizer(), config.T, uint64_t(config.seed), step);
        fflush(stdout);
    }

    [[noreturn]] void end_after_skips(const StepResult& result) {
        if (!unsound()) checkpoint();
        if (checkpoints) checkpoints->wait();
        fail("step %lld: expected a loss and gradient norm that are finite%s, found %s and %s, the last of %lld "
             "skipped in a row (--max-skips); %s",
             step, skips_outliers() ? " and no outliers" : "", number_text(result.loss), number_text(result.norm),
             trainer->run.skipped_in_row,
             (skips_outliers() ? "a larger --skip-loss or --skip-grad, or else: " : "") + advice());
    }

    void warn_of_divergence(const std::string& kind) {
        if (first_rank()) warn(kind);
        if (!o.stop_on_divergence) return;
        if (checkpoints) checkpoints->wait();
        fail("step %lld: expected a loss that goes down, found it diverged (--stop-on-divergence); use a smaller -l or "
             "a longer -u",
             step);
    }

    // ----- Members, in the order in which they are made; they are destroyed in the reverse.
    const Options& o;
    RankSession<Trainer>& session;
    StartClock clock;
    Ranks ranks;
    StateFiles resume_from;
    FolderLock lock;
    std::unique_ptr<FileReader> init;  // null: a new model
    std::unique_ptr<DataSplit> data;
    RunConfig config;
    std::future<double> unigram_entropy;
    bool in_background = false;  // a thread writes the checkpoints
    std::optional<Trainer> trainer;
    std::optional<Loader> train_data, val_data;
    std::optional<DivergenceDetector> divergence;
    std::unique_ptr<CsvLog> log, hops_log;
    std::unique_ptr<ProbeLog> probe_log;
    std::unique_ptr<CheckpointWriter<Trainer>> checkpoints;

    double rate = 1;                // of matrix products, operations a second, of all ranks
    bool rate_beaten = false;       // by a step
    int64_t step = 0, started = 0;  // steps done; steps given to the trainer, done or in flight
    double spent = 0;               // seconds in steps
    int64_t steps_here = 0;         // steps done by this process
    // Steps of checkpoints: the last; the last whose step updated the weights; the last that a finite step followed.
    int64_t newest = -1, last_updated = -1, known_good = -1;
    bool overdue = false;       // a checkpoint waits for room on the disk, or for a finite step
    bool told_to_stop = false;  // by the flags of the last step, or in a validation: the same on all ranks
    std::exception_ptr data_error;
};
