// keel/evaluate.h: what a run does with a model beside training it: validation, --dump and --check, --ablate.
#pragma once

#include <optional>

#include "checkpoint.h"
#include "process.h"

// A number as the logs have it: without the sign of a NaN, which means nothing.
inline std::string number_text(double x) { return std::isnan(x) ? "nan" : format("%.9g", x); }

//     bits per byte = sum of the targets' losses in nats / (ln 2 * bytes of text that the targets stand for)
//
// Losses a token do not compare between vocabularies, as longer tokens are fewer; bits per byte do, on the same text. A
// special token costs bits and stands for no byte.
struct Validation {
    double loss;           // nats a token
    double bits_per_byte;  // NaN where what the tokens mean is not known
};

// Over the first -m batches of the validation data, in order; the ranks take micro-batches in rotation. tokenizer: null
// where it is not known. hops: counts the answers of programs; null for files. None where a signal asks the run to stop
// meanwhile: whoever sent it may not wait that long for the checkpoint. Data that any rank cannot read throw a
// DataError on all.
template <IsTrainer Trainer>
std::optional<Validation> validate(Trainer& trainer, const Loader& loader, const RunConfig& run,
                                   const Tokenizer* tokenizer, const Ranks& ranks = {}, HopAccuracy* hops = nullptr) {
    uint64_t sequences =
        std::min(uint64_t(run.val_batches) * uint64_t(run.batch_sequences()), loader.sequences_per_epoch());
    std::vector<int> tokens(size_t(run.B) * size_t(run.T)), targets(tokens.size()),
        predictions(hops ? tokens.size() : 0);
    double sum = 0, bytes = 0;
    uint64_t B = uint64_t(run.B);
    std::string lost;  // why this rank's data could not be read
    bool left = false;
    for (uint64_t s = uint64_t(ranks.rank()) * B; s < sequences; s += uint64_t(ranks.count()) * B) {
        if ((left = StopSignals::asked())) break;
        int b = int(std::min(B, sequences - s));
        try {
            loader.batch(s, b, tokens.data(), targets.data());
        } catch (const DataError& e) {
            lost = e.what();
            break;
        }
        sum += trainer.evaluate(tokens.data(), targets.data(), b, hops ? predictions.data() : nullptr);
        for (size_t i = 0; tokenizer && i < size_t(b) * size_t(run.T); i++)
            bytes += double(tokenizer->text_bytes(targets[i]));
        if (!hops) continue;
        for (int i = 0; i < b; i++)
            for (const HopPrograms::Answer& answer :
                 hops->programs.answers(uint64_t(run.seed), s + uint64_t(i), run.T)) {
                size_t at = size_t(i) * size_t(run.T) + size_t(answer.position);
                hops->add(answer, predictions[at] == targets[at]);
            }
    }
    if (!ranks.all(lost.empty())) throw_lost_data(ranks, run, lost);
    if (!ranks.all(!left)) return {};
    if (hops)
        for (auto* counts : {&hops->count, &hops->right})
            for (int64_t& n : *counts) n = int64_t(ranks.sum(double(n)));
    sum = ranks.sum(sum), bytes = ranks.sum(bytes);
    return Validation{sum / (double(sequences) * run.T), bytes > 0 ? sum / M_LN2 / bytes : NAN};
}

// Fails, before --dump computes anything, unless its file can be written and replaces nothing but an older dump.
inline void check_dump_target(const std::string& path) {
    namespace fs = std::filesystem;
    std::error_code error;
    fs::path folder = fs::absolute(path, error).parent_path();
    if (!fs::is_directory(folder, error) || access(folder.c_str(), W_OK | X_OK) != 0)
        fail("--dump: expected a folder that can be written for %s, found '%s'; create it first", path, folder);
    if (fs::exists(path + ".tmp", error))
        fail("--dump: expected no file %s.tmp, which it writes first; move it away or give another name", path);
    if (!fs::exists(path, error)) return;
    int32_t word[3] = {};
    FILE* file = fs::is_regular_file(path, error) ? fopen(path.c_str(), "rb") : nullptr;
    bool older_dump =
        file && fread(word, 4, 3, file) == 3 && memcmp(word, "KEEL", 4) == 0 && word[H_KIND] == FILE_DEBUG;
    if (file) fclose(file);
    if (!older_dump)
        fail("--dump: expected a new file or an older dump, found something else in %s; give another name", path);
}

// --dump: writes one batch's debug state.
template <IsTrainer Trainer>
int dump_debug_state(const Options& o, Trainer& trainer, const Loader& data) {
    const RunConfig& run = trainer.run;
    DebugState<typename Trainer::Real> debug;
    debug.tokens.resize(size_t(run.B) * size_t(run.T)), debug.targets.resize(debug.tokens.size());
    data.batch(0, run.B, debug.tokens.data(), debug.targets.data());
    trainer.debug_pass(debug, run.B, run.T);
    debug.write(o.dump);
    print("wrote      %s, loss %.9g\n", o.dump, double(debug.loss));
    return 0;
}

// --check: exit status 0 if every tensor of the file is what this build computes from its parameters and tokens.
template <IsTrainer Trainer>
int check_debug_state(const Options& o) {
    using Real = typename Trainer::Real;
    const char* advice = "a dump of a smaller -b, -t or -L";
    FileHeader header = FileReader(o.check, FILE_DEBUG).header;
    RunConfig run;
    run.model = header.model(), run.B = header.word[H_B], run.T = header.word[H_T];
    run.total_batch = int64_t(run.B) * run.T, run.recompute_chosen = true;
    Trainer::check_model(run.model);
    require_memory(Trainer::memory_beside(run, o).bytes + total_bytes(Trainer::memory_rows(run)),
                   Trainer::available_memory(), advice);
    require_memory(2 * debug_state_bytes<Real>(run.model, run.B, run.T), available_memory(), advice);
    DebugState<Real> file = DebugState<Real>::read(o.check), ours;
    Trainer trainer(run, nullptr);
    FileReader again(o.check, FILE_DEBUG);  // its body starts with the parameters, as a model's does
    load_parameters(trainer, again);
    ours.tokens = file.tokens, ours.targets = file.targets;
    trainer.debug_pass(ours, run.B, run.T);
    return print_check_table(compare_debug_states(file, ours)) ? 0 : 1;
}

// --ablate: the validation loss with the branch of one sub-layer removed, so that F_l = 0 and z_l = alpha_l x_l; for
// the sub-layer given, or for one after another.
template <IsTrainer Trainer>
int run_ablation(const Options& o, Trainer& trainer, const Loader& val) {
    const RunConfig& run = trainer.run;
    std::unique_ptr<CsvLog> csv;
    const char* columns = "sublayer,kind,val_loss,perplexity,perplexity_lost";
    if (!o.out.empty()) {
        create_output_folder(o.out);
        csv = std::make_unique<CsvLog>(o.out + "/ablate.csv", columns);
    }
    print("%s\n", columns);
    double whole = 0;
    auto evaluate = [&](int l, const char* kind) {
        trainer.ablate(l);
        double loss = validate(trainer, val, run, nullptr)->loss, perplexity = std::exp(loss);
        if (l < 0) whole = perplexity;
        std::string row = format("%d,%s,%s,%s,%s", l, kind, number_text(loss), number_text(perplexity),
                                 number_text(perplexity - whole));
        print("%s\n", row);
        if (csv) csv->row(row);
    };
    evaluate(-1, "whole model");
    int first = o.ablate == "all" ? 0 : atoi(o.ablate.c_str()), last = o.ablate == "all" ? run.model.L - 1 : first;
    for (int l = first; l <= last; l++) evaluate(l, is_attention(l) ? "attention" : "feed-forward");
    return 0;
}
