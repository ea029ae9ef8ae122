// A training state, as -y reads it.
#include "fuzz.h"

void fuzz(const unsigned char* data, size_t size) {
    FileReader in(file_of(keel_file(data, size, FILE_STATE), ".bin"), FILE_STATE);
    RunConfig run = resolve_run(Options(), &in.header, {});
    if ((run.B > 0 && run.accumulation() < 1) || run.T > run.model.max_seq_len || run.skipped_in_row > run.skipped)
        abort();
    if (double lr = learning_rate(run, in.header.get<int64_t>(H_STEP) + 1); !std::isfinite(lr) || lr < 0) abort();
    check_same_build(in.header, REAL_FP32, false);
    std::vector<float> values(3 * owned_parameter_count(run.model, in.header.word[H_RANKS], in.header.word[H_RANK]));
    in.read_reals(values.data(), values.size());
    in.finish();
}

std::vector<Bytes> seeds() {
    std::vector<Bytes> all;
    for (int norm = 0; norm < NUM_PLACEMENTS; norm++) {
        FileHeader h = make_header(FILE_STATE, REAL_FP32, tiny_model(NormPlacement(norm)), 7);
        h.word[H_B] = 2, h.word[H_T] = 3, h.word[H_RECOMPUTE] = norm % 3 - 1, h.word[H_RANKS] = 1;
        h.set(H_TOTAL_BATCH, int64_t(12)), h.set(H_STEPS, int64_t(100)), h.set(H_WARMUP, int64_t(10));
        h.set(H_LR, 1e-2), h.set(H_WEIGHT_DECAY, 0.01), h.set(H_CLIP, 1.0), h.set(H_SEED, uint64_t(5));
        h.set(H_TRAIN_TOKENS, int64_t(1000)), h.set(H_VAL_TOKENS, int64_t(100)), h.set(H_VAL_EVERY, int64_t(10)),
            h.set(H_VAL_BATCHES, int64_t(3));
        h.set(H_SKIPPED, int64_t(norm)), h.set(H_SKIPPED_IN_ROW, int64_t(norm / 2));
        all.push_back(keel_seed(h));
    }
    return all;
}
