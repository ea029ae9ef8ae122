// keel/data.h: what a run trains and validates on.
#pragma once

#include "hops.h"

// The data of -i; by default the trainer's own sources, which lie beside the program.
inline TokenSource open_training_data(const Options& o) {
    if (!o.train.empty()) return TokenSource(o.train, "-i");
    std::error_code ignored;
    std::filesystem::path folder = std::filesystem::read_symlink("/proc/self/exe", ignored).parent_path();
    std::vector<std::string> own;
    for (const char* name : {"keel_common.h", "train_keel.cu", "train_keel_cpu.cpp"})
        if (access((folder / name).c_str(), R_OK) == 0) own.push_back(folder / name);
    for (const auto& file : std::filesystem::directory_iterator(folder / "keel", ignored))
        if (file.path().extension() == ".h") own.push_back(file.path());
    if (own.empty())
        fail("-i: expected training data, found none, nor the trainer's own sources beside it; give -i PATH");
    std::sort(own.begin(), own.end());
    TokenSource source(own, "-i");
    source.pattern = "the trainer's own sources";
    return source;
}

// Training and validation data: programs, two sources, or one source that is divided at nine tenths.
struct DataSplit {
    HopPrograms programs;
    TokenSource train, val;
    size_t train_count = 0, val_start = 0, val_count = 0;  // 0 for programs

    explicit DataSplit(const Options& o) : programs{o.train.size() == 1 ? HopPrograms::parse(o.train[0]) : 0} {
        if (programs.hops) {
            if (!o.val.empty())
                fail("-j: expected none with -i %s, whose validation programs are its own, found '%s'; leave it out",
                     o.train[0], o.val[0]);
            train.pattern = o.train[0];
            return;
        }
        train = open_training_data(o);
        if (o.val.empty()) {
            val = train;
            val_start = train_count = train.count - train.count / 10;
            val_count = train.count / 10;
            return;
        }
        val = TokenSource(o.val, "-j");
        if (val.shards != train.shards)
            fail("-j: expected %s like -i, found %s", train.shards ? "shards" : "text", val.shards ? "shards" : "text");
        if (val.same_file(train)) fail("-j: a file is in -i as well; validate on data that training never sees");
        train_count = train.count, val_count = val.count;
    }
    int natural_vocabulary() const { return train.shards ? GPT2_VOCABULARY : 256; }
    int natural_seq_len() const { return programs.hops ? programs.length() - 1 : 0; }  // 0: any

    Loader loader(const RunConfig& run, bool training) const {
        uint64_t seed = uint64_t(run.seed);
        if (programs.hops)
            return Loader([=, programs = programs](uint64_t s, int n, int* row) {
                programs.sequence(seed, s, !training, n, row);
            }, run.T);
        return training ? Loader(train, 0, train_count, run.T, run.model.V, seed, true)
                        : Loader(val, val_start, val_count, run.T, run.model.V, seed, false);
    }

    // Checks the first 2^27 tokens, which take seconds to read, against V before anything is written; later ones are
    // checked as they are read.
    void check_tokens(int V) const {
        if (programs.hops && V <= 'z')
            fail("-i: expected a model of V above %d for %s, found V = %d; use another model", int('z'), train.pattern,
                 V);
        if (programs.hops) return;
        for (const TokenSource* source : {&train, &val}) {
            if (!source->shards && V >= 256) continue;
            std::vector<int> chunk(1 << 16);
            size_t n = std::min(source->count, size_t(1) << 27);
            for (size_t at = 0; at < n; at += chunk.size())
                source->read(at, std::min(chunk.size(), n - at), V, chunk.data());
        }
    }

    // The loss, in nats a token, of a model that knows how frequent each token is and nothing more; taken from the
    // first 2^22 training tokens.
    double unigram_entropy(int V) const {
        size_t n = programs.hops ? size_t(1) << 18 : std::min(train_count, size_t(1) << 22);
        std::vector<size_t> counts(static_cast<size_t>(V));
        std::vector<int> chunk(1 << 16);
        for (size_t at = 0; at < n; at += chunk.size()) {
            size_t m = std::min(chunk.size(), n - at);
            if (programs.hops) programs.sequence(0, at, false, int(m), chunk.data());
            else train.read(at, m, V, chunk.data());
            for (size_t i = 0; i < m; i++) counts[size_t(chunk[i])]++;
        }
        double sum = 0;
        for (size_t count : counts)
            if (count) sum -= double(count) * std::log(double(count) / double(n));
        return sum / double(n);
    }
    void check_lengths(const RunConfig& run) const {
        if (programs.hops && run.T < natural_seq_len())
            fail("-t: expected at least %d, a whole program of -i %s, found %d; give a larger -t or fewer hops",
                 natural_seq_len(), train.pattern, run.T);
        if (programs.hops) return;
        size_t need = size_t(run.total_batch) + 1;
        if ((train_count - 1) / size_t(run.T) < size_t(run.batch_sequences()))
            fail("-i: expected at least %zu tokens to train on, one batch of -d %lld and a target, found %zu; give "
                 "more data or a smaller -d",
                 need, run.total_batch, train_count);
    }
    void check_validation(const RunConfig& run) const {
        if (!programs.hops && val_count < size_t(run.T) + 1)
            fail("-j: expected at least T + 1 = %d tokens to validate on, found %zu; give more data, a smaller -t, or "
                 "-v 0",
                 run.T + 1, val_count);
    }
};
