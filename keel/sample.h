// keel/sample.h: text from a model.
#pragma once

#include "checkpoint.h"
#include "process.h"

// Draws a token from logits (V): the likeliest for temperature 0, else by softmax(logits / temperature) over the top_k
// likeliest (0: over all; of equals the lower token counts as likelier). uniform: a random number in [0, 1).
template <class Real>
int sample_token(const Real* logits, int V, double temperature, int top_k, double uniform) {
    std::vector<int> order(static_cast<size_t>(V));
    for (int v = 0; v < V; v++) order[size_t(v)] = v;
    auto likelier = [&](int a, int b) { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); };
    if (temperature == 0) return *std::min_element(order.begin(), order.end(), likelier);
    if (top_k > 0 && top_k < V) {
        std::nth_element(order.begin(), order.begin() + top_k - 1, order.end(), likelier);
        order.resize(size_t(top_k));
        std::sort(order.begin(), order.end());
    }
    double largest = -INFINITY, sum = 0;
    for (int v : order) largest = std::max(largest, double(logits[v]));
    std::vector<double> p;
    for (int v : order) p.push_back(std::exp((double(logits[v]) - largest) / temperature)), sum += p.back();
    double left = uniform * sum;
    for (size_t i = 0; i < p.size(); i++)
        if ((left -= p[i]) < 0) return order[i];
    return order[size_t(std::max_element(p.begin(), p.end()) - p.begin())];
}

// The prompt as tokens, by default what stands before a text. tokenizer: null where it is not known, and the prompt is
// ids separated by commas.
inline std::vector<int> prompt_tokens(const Options& o, const Tokenizer* tokenizer, int V) {
    std::vector<int> tokens;
    const std::string& prompt = o.prompt;
    bool given = o.has("--prompt");
    if (tokenizer) {
        if (!given && tokenizer->separator() >= 0) return {tokenizer->separator()};
        if (o.special) tokenizer->encode_with_specials(prompt, tokens);
        else tokenizer->encode(prompt, tokens);
        return tokens;
    }
    for (const ShardFormat& f : shard_formats)
        if (!given && f.V == V) return {f.separator};
    if (!given) return {V - 1};
    if (prompt.find_first_not_of("0123456789,") != prompt.npos)
        fail("--prompt: expected token ids such as 15496,995, as no --tokenizer says what text is, found '%s'", prompt);
    for (size_t at = 0; at <= prompt.size();) {
        size_t comma = std::min(prompt.find(',', at), prompt.size());
        tokens.push_back(int(parse_integer("--prompt", prompt.substr(at, comma - at), 0, V - 1)));
        at = comma + 1;
    }
    return tokens;
}

// Draws -g tokens, or until a signal asks the run to stop, that go on from text, which is of one token at least, and
// gives each to emit(token). Each time the window (tokens) is full, its second half starts a new one.
template <IsTrainer Trainer, class Emit>
void draw_tokens(Trainer& trainer, const Options& o, std::vector<int> text, int window, uint64_t seed, int64_t step,
                 Emit emit) {
    typename Trainer::Generator generator(trainer.model, window);
    size_t fed = text.size() > size_t(window) ? text.size() - size_t(window) : 0;
    for (int64_t i = 0; i < o.sample_tokens && !StopSignals::asked(); i++) {
        if (generator.size() + int(text.size() - fed) > window) {
            generator.clear();
            fed = text.size() - size_t(std::max(1, window / 2));
        }
        const auto* logits = generator.feed(text.data() + fed, int(text.size() - fed));
        fed = text.size();
        Philox draw = philox(seed, uint32_t(i), uint32_t(step), uint32_t(uint64_t(step) >> 32), STREAM_SAMPLE);
        text.push_back(sample_token(logits, trainer.run.model.V, o.temperature, int(o.top_k), draw.word[0] * 0x1p-32));
        emit(text.back());
    }
}

// Prints the prompt and -g more tokens.
template <IsTrainer Trainer>
void print_sample(Trainer& trainer, const Options& o, const Tokenizer* tokenizer, int window, uint64_t seed,
                  int64_t step) {
    std::vector<int> text = prompt_tokens(o, tokenizer, trainer.run.model.V);
    TextStream stream;
    auto print_token = [&](int token) {
        print("%s", tokenizer ? stream.add(tokenizer->token(token)) : format("%d ", token));
        fflush(stdout);
    };
    print("--- sample%s\n", step > 0 ? format(" at step %lld", step) : "");
    for (int token : text) print_token(token);
    draw_tokens(trainer, o, text, window, seed, step, print_token);
    print("%s\n---\n", stream.finish());
}

inline void print_model(const RunConfig& run, const ParameterLayout& layout) {
    const ModelConfig& m = run.model;
    print("model      %s, L %d sub-layers, C %d, H %d, T %d, V %d", placements[m.norm].name, m.L, m.C, m.H, run.T, m.V);
    if (placements[m.norm].alpha) print(", alpha %g", double(m.alpha));
    print("; %s parameters; %s\n", count_text(double(layout.count)), placements[m.norm].source);
}

// Sampling without training: -e model.bin --prompt TEXT
template <IsTrainer Trainer>
int run_sampling(const Options& o, FileReader& file) {
    RunConfig run = resolve_run(o, &file.header, {});
    Trainer::check_model(run.model);
    Tokenizer its_own = open_tokenizer(o, &file, "");
    const Tokenizer* tokenizer = tokenizer_of_model(its_own, run.model.V);
    prompt_tokens(o, tokenizer, run.model.V);  // refuses a bad prompt before the model is loaded
    require_memory(Trainer::sampling_bytes(run.model, run.T), Trainer::available_memory(),
                   "a smaller -t or a larger machine");
    RunConfig least = run;  // what takes the least memory for activations, as nothing is trained
    least.B = least.T = 1, least.total_batch = 1, least.recompute = {1}, least.recompute_chosen = true;
    Trainer trainer(least, nullptr);
    load_parameters(trainer, file);
    file.finish();
    print_model(run, trainer.layout());
    print_sample(trainer, o, tokenizer, run.T, run.seed, file.header.get<int64_t>(H_STEP));
    return 0;
}
