// keel/update.h: a batch and a step's numbers as the GPU has them, where it keeps each gradient, the optimizer's work
// list, and the time predicted for a micro-step.
#pragma once

#include "gpu.h"

// One batch as the device gets it: tokens and targets (rows), and the rows' numbers sorted by token, in chunks of at
// most CHUNK_ROWS rows of one token. A token's gradient is the sum of its chunks' sums, both in a fixed order, so that
// many blocks share a frequent token. Chunk k has the rows order[start[k]] .. order[start[k + 1] - 1]; the j-th of the
// tokens that occur has the chunks first[j] .. first[j + 1] - 1.
struct TokenBatch {
    static constexpr int CHUNK_ROWS = 64;
    int *tokens, *targets, *order;  // (rows)
    int *start, *first;             // (rows + 1), of which chunks + 1 and different + 1 are used
    int *chunks, *different;        // (1) how many chunks there are, and how many different tokens
    int* number;                    // (1) of the micro-batch in its step, from 0
    TokenBatch(int* base, size_t rows)
        : tokens(base), targets(base + rows), order(base + 2 * rows), start(base + 3 * rows), first(start + rows + 1),
          chunks(first + rows + 1), different(chunks + 1), number(chunks + 2) {}
    static size_t size(size_t rows) { return 5 * rows + 5; }
    static size_t most_chunks(size_t rows, size_t V) { return std::min(rows, V + rows / CHUNK_ROWS); }

    // On the host, from tokens (rows): a counting sort, stable. count: scratch (V+1)
    void sort(size_t rows, int V, std::vector<int>& count) {
        count.assign(size_t(V) + 1, 0);
        for (size_t i = 0; i < rows; i++) count[size_t(tokens[i]) + 1]++;
        *chunks = *different = 0;
        for (int v = 0; v < V; v++) {
            int begin = count[size_t(v)], end = begin + count[size_t(v) + 1];
            if (begin < end) first[(*different)++] = *chunks;
            for (int i = begin; i < end; i += CHUNK_ROWS) start[(*chunks)++] = i;
            count[size_t(v) + 1] = end;
        }
        start[*chunks] = int(rows), first[*different] = *chunks;
        for (size_t i = 0; i < rows; i++) order[count[size_t(tokens[i])]++] = int(i);
        std::fill(start + *chunks + 1, start + rows + 1, 0);  // not used, but copied
        std::fill(first + *different + 1, first + rows + 1, 0);
    }
};

// All that changes from step to step is read from the device's memory, so that a graph of launches serves every step.
struct StepSettings {  // written by the host
    double lr, weight_decay;
    double max_norm;  // of the gradient; 0: no clipping
    uint64_t seed;    // of stochastic rounding
    double tokens;    // of the step
    double skip_loss, skip_grad;
};
struct StepState {              // read by the host
    double loss_sum;            // over the step's targets
    double grad_squares, norm;  // of all gradients, before clipping
    float clip;                 // the factor of every gradient
    int taken;                  // 0: the step is skipped and updates nothing
    float step_size;            // lr / (1 - b1^n)
    float v_scale;              // 1 / (1 - b2^n)
    float decay;                // lr * weight decay
    unsigned any, all;          // with several ranks: RankFlags
    RecentSteps recent;
};

struct UpdateCounts {   // stays on the device
    long long updates;  // steps that updated the parameters so far
    int data_lost;      // with several ranks: 1 from the step in which a rank's data could not be read
    RecentSteps recent;
};

// Where each tensor's gradient is. With --grads bf16 the blocks' matrices have theirs in BF16; those of the embeddings,
// to which a batch adds many times, and of the gains, which are few, stay in FP32.
struct GradientLayout {
    std::vector<std::array<size_t, NUM_TENSORS>> at;  // [layer + 1][tensor], in grads or in grads_bf16
    size_t fp32 = 0, bf16 = 0, largest = 0;           // elements of grads, of grads_bf16, of its largest matrix
    static bool is_block_matrix(Tensor t) { return t == QKVW || t == ATTPROJW || t == FCW || t == FCPROJW; }

    GradientLayout(const ParameterLayout& layout, int L, bool matrices_bf16, Sharing sharing = {})
        : at(size_t(L) + 1), matrices_bf16(matrices_bf16) {
        for (auto& row : at) row.fill(ParameterLayout::absent);
        if (sharing.ranks > 0) {  // in buckets, as the ranks reduce them
            ParameterLayout places = sharing.grad_layout(layout);
            for (const TensorInfo& t : places.tensors) at[size_t(t.layer + 1)][t.id] = t.offset;
            fp32 = places.size;
            return;
        }
        for (const TensorInfo& t : layout.tensors) {
            size_t& end = in_bf16(t.id) ? bf16 : fp32;
            at[size_t(t.layer + 1)][t.id] = end;
            end += t.size();
            if (in_bf16(t.id)) largest = std::max(largest, t.size());
        }
    }
    bool in_bf16(Tensor t) const { return matrices_bf16 && is_block_matrix(t); }
    size_t of(const TensorInfo& t) const { return at[size_t(t.layer + 1)][t.id]; }

private:
    bool matrices_bf16;
};

// Beside the element, what the random numbers of a gradient's rounding depend on: the same after a resume.
struct RoundingState {
    const StepSettings* settings;  // seed
    const UpdateCounts* counts;    // finished steps
    const int* micro_batch;        // in its step
};

// The gradient of a matrix (N,K). In FP32 products add to it. With --grads bf16 a product makes its addend in
// `scratch`, and a kernel adds it with stochastic rounding.
struct MatrixGradient {
    float* fp32;  // null with bf16
    __nv_bfloat16* bf16;
    float* scratch;  // (N,K), of one matrix at a time
    size_t first;    // where the matrix starts in the parameter order
    RoundingState rounding;
};

// The gradients of one sub-layer's parameters.
struct SublayerGradients {
    float* grads;
    __nv_bfloat16* grads_bf16;
    float* scratch;
    const GradientLayout& gradients;
    const ParameterLayout& layout;
    RoundingState rounding;
    int l;

    float* gain(Tensor t) const {
        size_t at = gradients.at[size_t(l + 1)][t];
        return at == ParameterLayout::absent ? nullptr : grads + at;
    }
    MatrixGradient matrix(Tensor t) const {
        size_t at = gradients.at[size_t(l + 1)][t];
        bool bf16 = gradients.in_bf16(t);
        return {bf16 ? nullptr : grads + at, bf16 ? grads_bf16 + at : nullptr, scratch, layout.offset(t, l), rounding};
    }
};

// Whether the FP32 weights of the blocks, the masters, are of what the rank owns alone: products read the BF16 copy.
inline bool masters_apart(Sharing sharing) { return BRANCH_BF16 && sharing.states(); }

// Elements of one tensor that a thread block updates: one launch updates all tensors, each with its own decay.
struct UpdateChunk {
    size_t first;             // its first element in the parameter order, by which its random numbers are drawn
    size_t parameter, copy;   // where it starts in the parameters (or masters), and in their copy
    size_t gradient, moment;  // where it starts in grads or grads_bf16, and in the moments
    int count;                // elements
    bool decayed, bf16;       // bf16: its gradient is in grads_bf16
    bool master;              // its FP32 weights are in masters
};
constexpr int UPDATE_CHUNK = 8192;  // elements

// The chunks of all parameters, or from -z 1 on of what the rank owns.
inline std::vector<UpdateChunk> update_chunks(const ParameterLayout& layout, const GradientLayout& gradients,
                                              Sharing sharing = {}) {
    std::vector<UpdateChunk> chunks;
    auto add = [&](const ShardRange& range) {
        const TensorInfo& t = layout.tensors[range.tensor];
        bool sharded = sharing.states(), master = masters_apart(sharing) && layout.bucket_of(t) > 0;
        size_t parameter = master ? range.shard - layout.buckets[0].shard : range.memory;
        size_t gradient = sharded ? range.shard : gradients.of(t), moment = sharded ? range.shard : range.memory;
        for (size_t at = 0; at < range.count; at += UPDATE_CHUNK) {
            int count = int(std::min(range.count - at, size_t(UPDATE_CHUNK)));
            chunks.push_back({t.file_offset + range.first + at, parameter + at, range.memory + at, gradient + at,
                              moment + at, count, t.decay, gradients.in_bf16(t.id), master});
        }
    };
    if (sharing.states())
        for (const ShardRange& range : layout.owned(sharing.rank)) add(range);
    else
        for (size_t i = 0; i < layout.tensors.size(); i++)
            add({i, 0, layout.tensors[i].size(), layout.tensors[i].offset, layout.tensors[i].offset});
    return chunks;
}

// Elements of the buffers for parameters, gradients and moments, and of what ranks exchange.
struct StateCounts {
    size_t parameters, branch_copy, masters = 0, grads, grads_bf16, grad_scratch, shard_grads = 0, incoming = 0,
                                    moments, moments_bf16 = 0, ranks, chunks;
    StateCounts(const ModelConfig& c, StateTypes types, Sharing s = {}) {
        ParameterLayout layout(c, s.ranks);
        GradientLayout g(layout, c.L, types.grads_bf16, s);
        parameters = layout.size, branch_copy = BRANCH_BF16 ? layout.size : 0;
        grads = g.fp32, grads_bf16 = g.bf16, grad_scratch = g.largest;
        moments = s.states() ? layout.shard_size : layout.size, ranks = size_t(s.ranks);
        chunks = layout.count / UPDATE_CHUNK + size_t(NUM_TENSORS) * size_t(c.L);
        if (types.moments_bf16) std::swap(moments, moments_bf16);
        if (masters_apart(s))
            parameters = layout.buckets[0].shard * ranks, masters = layout.shard_size - layout.buckets[0].shard;
        if (ranks > 0)
            shard_grads = layout.shard_size, incoming = std::max(layout.buckets[0].shard, layout.buckets[1].shard);
    }
};

// Seconds of a micro-step of B sequences on one large GPU, by a rough model that need only put the choices in order:
// the time of products, at a rate that falls where their tiles do not fill the multiprocessors, or of their bytes where
// that is longer, and to begin and end each; of attention, forward and backward; of the other kernels' bytes; and of
// each of the graph's nodes. The rates are near an H100's, of which dev/doc/speed.md tells and dev/bench/predict.py has
// a closer model; there are the bytes and nodes of a block too.
inline double predicted_seconds(const ModelConfig& c, int B, int T, Recompute r, StateTypes types = {}) {
    constexpr double matrix_rate = 700e12, product_seconds = 3.5e-6, attention_rate = 326e12,
                     attention_backward_rate = 224e12, memory_rate = 2.6e12, node_seconds = 1e-6, multiprocessors = 132;
    if (r.may_be_partial() && r.first < c.L)
        return std::lerp(predicted_seconds(c, B, T, r.level_before(), types),
                         predicted_seconds(c, B, T, {r.level}, types), double(r.first) / c.L);
    double rows = double(B) * T, C = c.C, blocks = c.L / 2;
    bool again = r.level == 1 || r.segments();
    double filled = std::min(1.0, std::ceil(rows / 128) * std::ceil(C / 128) / multiprocessors);
    double layers = 12 * C * C * blocks, head = C * c.Vp();  // weights
    // layer makes two of a block's products again, 7/12 of its forward's operations
    double passes = 3 + (r.segments() ? 1 : again ? 7.0 / 12 : 0);
    double operations = 2 * rows * (passes * layers + 3 * head) / (matrix_rate * filled);
    double attention = rows * C * blocks * T * ((again ? 4 : 2) / attention_rate + 5 / attention_backward_rate);
    // Bytes a token in units of C, of products and of highway, GELU and delta: what a level makes again comes on top.
    double operands = rows * C * blocks * (104 + (r.segments() ? 32 : again ? 18 : 0)) / memory_rate;
    double bytes = rows * C * blocks * (76 + (r.segments() ? 40 : r.may_be_partial() ? 28 : 0));
    // A micro-batch reads the weights, and adds to their gradients.
    bytes += (2 * (again ? 3 : 2) + (types.grads_bf16 ? 12 : 8)) * layers + (4 + 8) * head;
    double nodes = blocks * (22 + (r.level == -1 ? 1 : r.level == 1 ? 4 : again ? 8 : 0) + (types.grads_bf16 ? 4 : 0));
    double products = blocks * (12 + (r.segments() ? 4 : again ? 2 : 0));
    return std::max(operations, operands) + products * product_seconds + attention + bytes / memory_rate +
           nodes * node_seconds;
}
