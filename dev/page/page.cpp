// page.cpp: what the page asks of the trainer. It is compiled to WebAssembly with train_keel_cpu.cpp as it is, and each
// Web Worker has an instance, which trains one model on files of its own in memory.
//
// A function answers 1 and leaves what it was asked for in message() or numbers(), or it answers 0 and leaves in
// message() what was expected, what was found and what to do.

#include <emscripten.h>
#include <emscripten/heap.h>

#include <optional>

#include "../../train_keel_cpu.cpp"

namespace {

// A run without its folder: what keel/run.h's Run makes of a command line.
struct Race {
    Options options;
    DataSplit data;
    RunConfig config;
    std::optional<Trainer> trainer;
    Loader train, validation;
    ProbeLog probe;  // of the last step
    int64_t step = 0;

    explicit Race(const Options& o)
        : options(o), data(o), config(resolve_run(o, nullptr, data.vocabulary(), data.natural_seq_len())),
          train(data.loader(config, true)), validation(data.loader(config, false)) {
        data.check_lengths(config, o), data.check_validation(config), data.check_tokens(config.model.V);
        Trainer::choose_memory_plan(config, emscripten_get_heap_max() - size_t(sbrk(0)));
        trainer.emplace(config);
        trainer->initialise(uint64_t(config.seed));
    }
    const Tokenizer* tokenizer() const { return tokenizer_of_model(data.tokenizer, config.model.V); }
};

std::unique_ptr<Race> race;
std::string text;             // the last message
std::vector<double> results;  // the last numbers

template <class Answer>
int answer(Answer give) {
    text.clear(), results.clear();
    try {
        give();
        return 1;
    } catch (const std::bad_alloc&) {
        text = "out of memory; take fewer sub-layers or channels";
    } catch (const std::exception& e) {
        text = e.what();
    }
    return 0;
}

}  // namespace

extern "C" {

EMSCRIPTEN_KEEPALIVE const char* message() { return text.c_str(); }
EMSCRIPTEN_KEEPALIVE const double* numbers() { return results.data(); }
EMSCRIPTEN_KEEPALIVE size_t number_count() { return results.size(); }

// A model and its data from a command line, a word a line. message(): what the run is, as JSON.
EMSCRIPTEN_KEEPALIVE int create(const char* command_line) {
    return answer([&] {
        race.reset();
        std::vector<std::string> words;
        for (std::string_view rest = command_line; !rest.empty();) {
            size_t end = std::min(rest.find('\n'), rest.size());
            words.emplace_back(rest.substr(0, end));
            rest.remove_prefix(std::min(end + 1, rest.size()));
        }
        std::vector<const char*> argv{"train_keel_cpu"};
        for (const std::string& word : words) argv.push_back(word.c_str());
        race = std::make_unique<Race>(parse_command_line(int(argv.size()), argv.data()));
        const RunConfig& run = race->config;
        const ModelConfig& m = run.model;
        text = format("{\"L\":%d,\"C\":%d,\"H\":%d,\"T\":%d,\"B\":%d,\"V\":%d,\"alpha\":%.9g,\"lr\":%.9g,\"warmup\":"
                      "%lld,\"steps\":%lld,\"tokens\":%lld,\"parameters\":%zu,\"entropy\":%.6f,\"columns\":\"%s\"}",
                      m.L, m.C, m.H, run.T, run.B, m.V, double(m.alpha), run.lr, run.warmup, run.steps, run.total_batch,
                      race->trainer->layout().count, race->data.unigram_entropy(m.V), ProbeLog::COLUMNS);
    });
}

// One step. numbers(): loss, norm of the gradient, learning rate, seconds; then, where these are finite, the probe's
// figures (L, columns) of the model before the step's update.
EMSCRIPTEN_KEEPALIVE int step() {
    return answer([] {
        RunConfig& run = race->trainer->run;
        if (race->step >= run.steps) fail("the run has its %lld steps; reset it, or give it more", run.steps);
        double begin = seconds();
        race->probe.last.clear();
        StepResult result = race->trainer->step(race->train, ++race->step, &race->probe);
        bool skipped = !std::isfinite(result.loss) || !std::isfinite(result.norm);
        run.skipped += skipped, run.skipped_in_row = skipped ? run.skipped_in_row + 1 : 0;
        if (run.skipped_in_row >= race->options.max_skips)
            fail("step %lld: the loss or the gradient of %lld steps in a row is not finite, and nothing is updated any "
                 "more; take a smaller learning rate",
                 race->step, run.skipped_in_row);
        results = {result.loss, result.norm, learning_rate(run, race->step), seconds() - begin};
        for (const SublayerFigures& figures : race->probe.last) {
            auto values = std::bit_cast<std::array<double, sizeof figures / sizeof(double)>>(figures);
            results.insert(results.end(), values.begin(), values.end());
        }
    });
}

// message(): the prompt and so many tokens that go on from it, by default -g's temperature and -k.
EMSCRIPTEN_KEEPALIVE int sample(const char* prompt, int tokens) {
    return answer([&] {
        Options o = race->options;
        o.prompt = prompt, o.sample_tokens = tokens;
        const Tokenizer* tokenizer = race->tokenizer();
        TextStream stream;
        std::string drawn = prompt;
        draw_tokens(*race->trainer, o, prompt_tokens(o, tokenizer, race->config.model.V), race->config.T,
                    uint64_t(race->config.seed), race->step, [&](int token) {
            drawn += tokenizer ? stream.add(tokenizer->token(token)) : format("%d ", token);
        });
        text = drawn + stream.finish();
    });
}

// numbers(): the loss on the first -m batches of the validation data, as train_keel_cpu's log has it; bits per byte.
EMSCRIPTEN_KEEPALIVE int validation_loss() {
    return answer([] {
        Validation v = *validate(*race->trainer, race->validation, race->config, race->tokenizer());
        results = {v.loss, v.bits_per_byte};
    });
}

// numbers(): the probabilities (T,T) of head h of attention sub-layer l in the first sequence that the model has read
// last, a row a query: softmax(q k / sqrt(D)), of the activations with the gains of after the update.
EMSCRIPTEN_KEEPALIVE int attention(int l, int h) {
    return answer([&] {
        Model& model = race->trainer->model;
        const ModelConfig& c = race->config.model;
        int T = race->config.T, D = c.D();
        if (l < 0 || l >= c.L || !is_attention(l) || h < 0 || h >= c.H)
            fail("attention: expected an attention sub-layer below %d and a head below %d, found %d and %d", c.L, c.H,
                 l, h);
        if (race->step == 0) fail("expected a step first, as attention is that of its batch");
        if (model.recompute.level != 0) fail("expected a model whose activations are all kept; take a smaller one");
        BranchActivations a = model.activations(l);
        const real* qkv = a.qkv;
        if (SublayerTensors<real> w = model.weights(l); w[GAMMA_Q]) {  // all sub-layers normalise into one buffer
            const real* const gains[] = {w[GAMMA_Q], w[GAMMA_K], w[GAMMA_V]};
            qkv_norm_forward(a.qkv_normed, a.qkv, gains, size_t(T), c.H, D);
            qkv = a.qkv_normed;
        }
        results.assign(size_t(T) * size_t(T), 0);
        for (int i = 0; i < T; i++) {
            double *row = &results[size_t(i) * size_t(T)], sum = 0;
            for (int j = 0; j <= i; j++) {
                const real* q = qkv + size_t(i) * 3 * size_t(c.C) + h * D;
                const real* k = qkv + (size_t(j) * 3 + 1) * size_t(c.C) + h * D;
                double score = 0;
                for (int d = 0; d < D; d++) score += double(q[d]) * double(k[d]);
                sum += row[j] = std::exp(score / std::sqrt(double(D)) - double(a.lse[i * c.H + h]));
            }
            for (int j = 0; j <= i; j++) row[j] /= sum;
        }
    });
}

// Writes the model to a file that train_keel_cpu -e reads.
EMSCRIPTEN_KEEPALIVE int save(const char* path) {
    return answer([&] { write_model(path, *race->trainer, race->step); });
}

}  // extern "C"
