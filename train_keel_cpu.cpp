// train_keel_cpu.cpp: trains a GPT of KEEL highway blocks on a CPU (arXiv 2601.19895), as plain loops with OpenMP.
//
// It is the reference that every other trainer is compared with. It reads in the order data flows: the layers (each
// forward beside its backward), the sub-layer, the model, the optimizer, sampling, the step. What it stands on:
// keel_common.h defines the model (x_0 ... logits), the norm placements and the parameters; keel/ has the exponential
// and the matrix product (matmul.h), the run around the steps (run.h) and what ranks exchange (mpi.h). The same source
// builds in FP32 and, with -DKEEL_FP64, in FP64: the yardstick.
//
// train_keel.cu does the same passes on a GPU and divides them otherwise. With z_l = alpha_l x_l + F_l(u_l):
//
//     z_{l-1} -norm_out-> x_l -norm_in-> u_l -F_l-> z_l -norm_out-> x_{l+1} -norm_in-> u_{l+1}
//                         |-------------- sub-layer l --------------|                                here
//     |--------------- point l ------------|        |---------------- point l+1 -------------|      there
//
// Every result has the same bits for any number of threads: the order of each sum depends on shapes alone, threads
// share out whole outputs, and there are no atomics.

#include "keel/matmul.h"
#include "keel/main.h"
#ifdef KEEL_MPI
#include "keel/mpi.h"
#endif

// ----------------------------------------------------------------------------------------------------
// The layers: each forward beside its backward. A backward adds to gradients of parameters, and sets those of inputs.
//
// What a sub-layer is made of, from the norms to GELU, runs inside its one parallel region: every thread calls the
// function, `omp for` shares its rows out, and all wait for each other at its end (of the last, at the region's).
// Called outside a region, one thread does it all.

// x (B,T,C) = sqrt(C) * (wte[token] + wpe[position]); positions start at `first`, which is 0 but for a KV cache.
// The factor gives x_0 an rms of sqrt(2) at first, close to what a norm would.
void embedding_forward(real* x, const int* tokens, const real* wte, const real* wpe, int B, int T, int C, int first) {
    real scale = std::sqrt(real(C));
    #pragma omp parallel for collapse(2) schedule(static)
    for (index_t b = 0; b < B; b++)
        for (index_t t = 0; t < T; t++) {
            const real *token = wte + size_t(tokens[b * T + t]) * C, *position = wpe + (first + t) * C;
            real* out = x + (b * T + t) * C;
            for (int c = 0; c < C; c++) out[c] = scale * (token[c] + position[c]);
        }
}

// dwte[token] += sqrt(C) dx, dwpe[position] += sqrt(C) dx. Rows with one token add to one row of dwte, so each thread
// has columns of its own.
void embedding_backward(real* dwte, real* dwpe, const real* dx, const int* tokens, int B, int T, int C) {
    real scale = std::sqrt(real(C));
    constexpr int columns = 16;
    #pragma omp parallel for schedule(static)
    for (index_t c0 = 0; c0 < C; c0 += columns) {
        index_t c1 = std::min<index_t>(c0 + columns, C);
        for (index_t b = 0; b < B; b++)
            for (index_t t = 0; t < T; t++) {
                const real* in = dx + (b * T + t) * C;
                real *token = dwte + size_t(tokens[b * T + t]) * C, *position = dwpe + t * C;
                for (index_t c = c0; c < c1; c++) token[c] += scale * in[c], position[c] += scale * in[c];
            }
    }
}

// r = 1 / sqrt(mean(x^2) + 1e-6)
inline real rms_reciprocal(const real* x, int C) {
    real sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int c = 0; c < C; c++) sum += x[c] * x[c];
    return 1 / std::sqrt(sum / C + real(1e-6));
}

// y = g x r, one row
inline void rmsnorm_row_forward(real* y, const real* x, const real* g, int C) {
    real r = rms_reciprocal(x, C);
    for (int c = 0; c < C; c++) y[c] = g[c] * (x[c] * r);
}

// With xh = x r:  dg += dy xh,  dx = r (g dy - xh mean(g dy xh)), one row; dx may be dy. The first term is the
// gradient through x's numerator, the second takes away what would only change x's length, which the norm ignores.
inline void rmsnorm_row_backward(real* dx, real* dg, const real* dy, const real* x, const real* g, int C) {
    real r = rms_reciprocal(x, C), mean = 0;
    #pragma omp simd reduction(+ : mean)
    for (int c = 0; c < C; c++) mean += g[c] * dy[c] * (x[c] * r);
    mean /= C;
    for (int c = 0; c < C; c++) {
        real xh = x[c] * r;
        dg[c] += dy[c] * xh;
        dx[c] = r * (g[c] * dy[c] - xh * mean);
    }
}

// y (rows,C) = RMSNorm(x (rows,C); g (C)). r is not kept: making it again costs one pass over a row in the L1 cache.
void rmsnorm_forward(real* y, const real* x, const real* g, size_t rows, int C) {
    #pragma omp for schedule(static)
    for (index_t i = 0; i < index_t(rows); i++) rmsnorm_row_forward(y + i * C, x + i * C, g, C);
}

// A gain's gradient is a sum over all rows. Blocks of GAIN_ROWS rows sum on their own, whichever thread has them, into
// partial (blocks,C); then one thread adds the blocks in order, while the others go on: partial is written again only
// after a product, at whose end all wait.
constexpr index_t GAIN_ROWS = 32;
inline uint64_t gain_blocks(uint64_t rows) { return (rows + GAIN_ROWS - 1) / GAIN_ROWS; }

inline void add_gain_blocks(real* dg, const real* partial, size_t blocks, size_t stride, int C) {
    #pragma omp single nowait
    for (size_t k = 0; k < blocks; k++)
        for (int c = 0; c < C; c++) dg[c] += partial[k * stride + c];
}

void rmsnorm_backward(real* dx, real* dg, const real* dy, const real* x, const real* g, size_t rows, int C,
                      real* partial) {
    index_t blocks = index_t(gain_blocks(rows));
    #pragma omp for schedule(static)
    for (index_t k = 0; k < blocks; k++) {
        real* sum = partial + k * C;
        std::fill(sum, sum + C, real(0));
        for (index_t i = k * GAIN_ROWS; i < std::min((k + 1) * GAIN_ROWS, index_t(rows)); i++)
            rmsnorm_row_backward(dx + i * C, sum, dy + i * C, x + i * C, g, C);
    }
    add_gain_blocks(dg, partial, size_t(blocks), size_t(C), C);
}

// HybridNorm's RMSNorm of every head's q, k and v: qkv (rows,3,H,D), a gain (D) for each of the three.
void qkv_norm_forward(real* out, const real* qkv, const real* const g[3], size_t rows, int H, int D) {
    #pragma omp for schedule(static)
    for (index_t i = 0; i < index_t(rows); i++)
        for (int which = 0; which < 3; which++)  // q, k, v
            for (int h = 0; h < H; h++) {
                size_t at = ((size_t(i) * 3 + which) * H + h) * D;
                rmsnorm_row_forward(out + at, qkv + at, g[which], D);
            }
}

// In place: dqkv comes in as the gradient of the normed q, k, v. partial: (blocks,3,D)
void qkv_norm_backward(real* dqkv, real* const dg[3], const real* qkv, const real* const g[3], size_t rows, int H,
                       int D, real* partial) {
    index_t blocks = index_t(gain_blocks(rows));
    #pragma omp for schedule(static)
    for (index_t k = 0; k < blocks; k++) {
        real* sum = partial + k * 3 * D;
        std::fill(sum, sum + 3 * D, real(0));
        for (index_t i = k * GAIN_ROWS; i < std::min((k + 1) * GAIN_ROWS, index_t(rows)); i++)
            for (int which = 0; which < 3; which++)
                for (int h = 0; h < H; h++) {
                    size_t at = ((size_t(i) * 3 + which) * H + h) * D;
                    rmsnorm_row_backward(dqkv + at, sum + which * D, dqkv + at, qkv + at, g[which], D);
                }
    }
    for (int which = 0; which < 3; which++)
        add_gain_blocks(dg[which], partial + which * D, size_t(blocks), 3 * size_t(D), D);
}

// out (rows,N) = in (rows,K) W^T, W (N,K)
void matmul_forward(real* out, const real* in, const real* w, size_t rows, int K, int N) {
    team_product(rows, N, K, row_major(in, K), row_major(w, K).transposed(), out, N, SET);
}

// din (rows,K) = dout W,  dW (N,K) += dout^T in
void matmul_backward(real* din, real* dw, const real* dout, const real* in, const real* w, size_t rows, int K, int N) {
    team_product(rows, K, N, row_major(dout, N), row_major(w, K), din, K, SET);
    team_product(N, K, rows, row_major(dout, N).transposed(), row_major(in, K), dw, K, ADD);
}

// Causal attention, y = softmax(q k^T / sqrt(D)) v for every head: y (B,Tq,C), lse (B,Tq,H), qkv (B,T,3C). Queries are
// the last Tq = T - first positions of each sequence, keys and values all T (with a KV cache only the new positions
// ask).
//
// Tiles of ATT x ATT scores, never (T,T): a row's largest score m and the sum of exp(s - m) are kept while the tiles of
// keys pass, and what was summed under an older, smaller m is scaled down (Milakov and Gimelshein 2018; Dao et al.
// 2022). lse = m + log(sum) is all that the backward needs to have the probabilities again: p = exp(s - lse).
//
// A tile has a row a key and a column a query, so that a vector holds one key's scores for neighbouring queries: no sum
// runs across a vector, and q alone needs packing, once. Keys come in strips of TILE_N; a strip skips the queries, and
// a query the strips, that causality parts.
constexpr int ATT = 64;

// Reals of scratch for each thread: of the backward, which needs more than the forward.
size_t attention_scratch(int T, int D) { return 5 * size_t(ATT + TILE_N) * size_t(D + TILE_N) + size_t(T); }

void attention_forward(real* y, real* lse, const real* qkv, int B, int T, int C, int H, int first) {
    int D = C / H, Tq = T - first, tiles = (Tq + ATT - 1) / ATT;
    size_t stride = 3 * size_t(C);
    real scale = 1 / std::sqrt(real(D)), minus_infinity = -std::numeric_limits<real>::infinity();
    if (!omp_in_parallel()) reserve_scratch(attention_scratch(T, D));
    #pragma omp for collapse(3) schedule(static)
    for (int b = 0; b < B; b++)
        for (int h = 0; h < H; h++)
            for (int tile = 0; tile < tiles; tile++) {
                int q0 = first + tile * ATT, nq = std::min(ATT, T - q0);
                const real* heads = qkv + size_t(b) * T * stride + size_t(h) * D;
                real* out = y + (size_t(b) * Tq + size_t(q0 - first)) * C + size_t(h) * D;
                real* panels = own_scratch();
                Matrix q = row_major(heads + size_t(q0) * stride, stride);
                Tiles q_t = pack_b(q.transposed(), nq, D, panels);
                panels += (ATT + TILE_N) * D;
                real p[ATT * ATT], m[ATT], sum[ATT], shrink[ATT];  // p[key][query]
                std::fill(m, m + nq, minus_infinity), std::fill(sum, sum + nq, real(0));
                for (int k0 = 0; k0 < q0 + nq; k0 += ATT) {
                    int nk = std::min(ATT, q0 + nq - k0);
                    Matrix k = row_major(heads + C + size_t(k0) * stride, stride);
                    Matrix v = row_major(heads + 2 * C + size_t(k0) * stride, stride);
                    auto first_query = [&](int j) { return std::max(0, k0 + j - q0); };  // that sees key j
                    auto first_tile = [&](int j) { return first_query(j / TILE_N * TILE_N) / TILE_N; };
                    std::copy(m, m + nq, shrink);
                    for (int j0 = 0; j0 < nk; j0 += TILE_N) {
                        int i0 = first_tile(j0) * TILE_N, rows = std::min(TILE_N, nk - j0);
                        multiply_block(rows, nq - i0, D, a_tiles(k.at(j0, 0)), q_t.from(first_tile(j0)),
                                       p + j0 * ATT + i0, ATT, true);
                        for (int j = j0; j < j0 + rows; j++) {
                            real* row = p + j * ATT;
                            std::fill(row + i0, row + std::max(i0, first_query(j)), minus_infinity);
                            for (int i = i0; i < nq; i++) m[i] = std::max(m[i], scale * row[i]);
                        }
                    }
                    for (int i = 0; i < nq; i++) shrink[i] = exponential(shrink[i] - m[i]), sum[i] *= shrink[i];
                    for (int j = 0; j < nk; j++) {
                        real* row = p + j * ATT;
                        #pragma omp simd
                        for (int i = first_tile(j) * TILE_N; i < nq; i++) {
                            row[i] = exponential(scale * row[i] - m[i]);
                            sum[i] += row[i];
                        }
                    }
                    for (int i = 0; i < nq && k0 > 0; i++)
                        for (int d = 0; d < D; d++) out[size_t(i) * C + d] *= shrink[i];
                    Tiles values = b_tiles(v, D, nk, panels);
                    Matrix p_t = row_major(p, ATT).transposed();
                    for (int i = 0; i < nq; i += TILE_N) {
                        int keys = std::min(nk, q0 + i + TILE_N - k0);
                        multiply_block(std::min(TILE_N, nq - i), D, keys, a_tiles(p_t.at(i, 0)), values,
                                       out + size_t(i) * C, C, k0 == 0);
                    }
                }
                for (int i = 0; i < nq; i++) {
                    for (int d = 0; d < D; d++) out[size_t(i) * C + d] /= sum[i];
                    lse[(size_t(b) * Tq + size_t(q0 - first) + i) * H + h] = m[i] + std::log(sum[i]);
                }
            }
}

// With p the probabilities and s = q k^T / sqrt(D):
//     dv = p^T dy,   dp = dy v^T,   ds = p (dp - sum_j p dp),   dq = ds k / sqrt(D),   dk = ds^T q / sqrt(D)
// and sum_j p_ij dp_ij = dy_i . y_i = delta_i, which needs no (T,T) matrix either. dqkv, qkv (B,T,3C); dy, y (B,T,C);
// lse (B,T,H). Here a tile has a row a query, and what is packed is a tile of keys and values.
void attention_backward(real* dqkv, const real* dy, const real* qkv, const real* y, const real* lse, int B, int T,
                        int C, int H) {
    int D = C / H;
    size_t stride = 3 * size_t(C);
    real scale = 1 / std::sqrt(real(D)), minus_infinity = -std::numeric_limits<real>::infinity();
    if (!omp_in_parallel()) reserve_scratch(attention_scratch(T, D));
    #pragma omp for collapse(2) schedule(static)
    for (int b = 0; b < B; b++)
        for (int h = 0; h < H; h++) {
            size_t start = size_t(b) * T * stride + size_t(h) * D, out = size_t(b) * T * C + size_t(h) * D;
            size_t panel = size_t(ATT + TILE_N) * (D + TILE_N);
            real *panels = own_scratch(), *delta = panels + 5 * panel;
            for (int i = 0; i < T; i++) {
                const real *dyi = dy + out + size_t(i) * C, *yi = y + out + size_t(i) * C;
                real sum = 0;
                #pragma omp simd reduction(+ : sum)
                for (int d = 0; d < D; d++) sum += dyi[d] * yi[d];
                delta[i] = sum;
            }
            for (int k0 = 0; k0 < T; k0 += ATT) {
                int nk = std::min(ATT, T - k0);
                size_t at_k = start + C + k0 * stride, at_v = at_k + C;
                Matrix k = row_major(qkv + at_k, stride), v = row_major(qkv + at_v, stride);
                Tiles k_t = pack_b(k.transposed(), nk, D, panels), v_t = pack_b(v.transposed(), nk, D, panels + panel),
                      keys = b_tiles(k, D, nk, panels + 2 * panel);
                for (int q0 = k0; q0 < T; q0 += ATT) {
                    int nq = std::min(ATT, T - q0);
                    size_t at_q = start + q0 * stride;
                    Matrix q = row_major(qkv + at_q, stride), dout = row_major(dy + out + size_t(q0) * C, C);
                    real p[ATT * ATT], ds[ATT * ATT];                                       // [query][key]
                    auto seen = [&](int i) { return std::clamp(q0 + i - k0 + 1, 0, nk); };  // keys that query i sees
                    for (int i0 = 0; i0 < nq; i0 += TILE_N) {
                        int end = std::min(i0 + TILE_N, nq), n = seen(end - 1);
                        multiply_block(end - i0, n, D, a_tiles(q.at(i0, 0)), k_t, p + i0 * ATT, ATT, true);
                        multiply_block(end - i0, n, D, a_tiles(dout.at(i0, 0)), v_t, ds + i0 * ATT, ATT, true);
                        for (int i = i0; i < end; i++) {
                            real *pi = p + i * ATT, *dsi = ds + i * ATT, row_delta = delta[q0 + i],
                                 row_lse = lse[(size_t(b) * T + q0 + i) * H + h];
                            std::fill(pi + seen(i), pi + n, minus_infinity);
                            #pragma omp simd
                            for (int j = 0; j < n; j++) {
                                pi[j] = exponential(scale * pi[j] - row_lse);
                                dsi[j] = scale * pi[j] * (dsi[j] - row_delta);
                            }
                        }
                        multiply_block(end - i0, D, n, a_tiles(row_major(ds + i0 * ATT, ATT)), keys,
                                       dqkv + at_q + size_t(i0) * stride, stride, k0 == 0);
                    }
                    Tiles douts = b_tiles(dout, D, nq, panels + 3 * panel),
                          queries = b_tiles(q, D, nq, panels + 4 * panel);
                    Matrix p_t = row_major(p, ATT).transposed(), ds_t = row_major(ds, ATT).transposed();
                    for (int j = 0; j < nk; j += TILE_N) {
                        int n = std::min(TILE_N, nk - j), i0 = std::max(0, k0 + j - q0) / TILE_N * TILE_N;
                        multiply_block(n, D, nq - i0, a_tiles(p_t.at(j, i0)), douts.from_row(i0),
                                       dqkv + at_v + size_t(j) * stride, stride, q0 == k0);
                        multiply_block(n, D, nq - i0, a_tiles(ds_t.at(j, i0)), queries.from_row(i0),
                                       dqkv + at_k + size_t(j) * stride, stride, q0 == k0);
                    }
                }
            }
        }
}

// gelu(h) = h/2 (1 + tanh(w)),  w = sqrt(2/pi) (h + 0.044715 h^3), the tanh form of Hendrycks and Gimpel 2016.
// As (1 + tanh(w))/2 = sigmoid(2w), one exponential does it, without cancellation for h far below zero.
constexpr real GELU_SCALE = real(2 * 0.79788456080286535588), GELU_CUBIC = real(0.044715);

void gelu_forward(real* out, const real* h, size_t n) {
    #pragma omp simd
    for (size_t i = 0; i < n; i++) {
        real sigmoid = 1 / (1 + exponential(-GELU_SCALE * (h[i] + GELU_CUBIC * h[i] * h[i] * h[i])));
        out[i] = h[i] * sigmoid;
    }
}

// d gelu/dh = sigmoid(2w) + h sigmoid(2w) (1 - sigmoid(2w)) 2 dw/dh.  dh comes in as the gradient of gelu's output.
void gelu_backward(real* dh, const real* h, size_t n) {
    #pragma omp simd
    for (size_t i = 0; i < n; i++) {
        real sigmoid = 1 / (1 + exponential(-GELU_SCALE * (h[i] + GELU_CUBIC * h[i] * h[i] * h[i])));
        real slope = GELU_SCALE * (1 + 3 * GELU_CUBIC * h[i] * h[i]);
        dh[i] *= sigmoid + h[i] * sigmoid * (1 - sigmoid) * slope;
    }
}

// h (rows,N) = in (rows,K) W^T, out = gelu(h), W (N,K): gelu on each block of h while it is in the cache.
void matmul_gelu_forward(real* out, real* h, const real* in, const real* w, size_t rows, int K, int N) {
    team_product(rows, N, K, row_major(in, K), row_major(w, K).transposed(), h, N, SET,
                 [=](size_t i, size_t j, size_t m, size_t n) {
        for (size_t at = i * N + j; m > 0; m--, at += N) gelu_forward(out + at, h + at, n);
    });
}

// For out (rows,N) = gelu(h) W^T, h (rows,K), W (N,K):  dh (rows,K) = (dout W) gelu'(h),  dW += dout^T gelu(h)
void matmul_gelu_backward(real* dh, real* dw, const real* dout, const real* gelu, const real* h, const real* w,
                          size_t rows, int K, int N) {
    team_product(rows, K, N, row_major(dout, N), row_major(w, K), dh, K, SET,
                 [=](size_t i, size_t j, size_t m, size_t n) {
        for (size_t at = i * K + j; m > 0; m--, at += K) gelu_backward(dh + at, h + at, n);
    });
    team_product(N, K, rows, row_major(dout, N).transposed(), row_major(gelu, K), dw, K, ADD);
}

// loss (rows) = lse - logit[target], lse (rows) = log sum_j exp(logit_j) over the V real tokens. logits (rows,Vp)
void cross_entropy_forward(real* loss, real* lse, const real* logits, const int* targets, size_t rows, int V, int Vp) {
    #pragma omp parallel for schedule(static)
    for (index_t i = 0; i < index_t(rows); i++) {
        const real* row = logits + i * Vp;
        real largest = row[0], sum = 0;
        for (int v = 1; v < V; v++) largest = std::max(largest, row[v]);
        #pragma omp simd reduction(+ : sum)
        for (int v = 0; v < V; v++) sum += exponential(row[v] - largest);
        lse[i] = largest + std::log(sum);
        loss[i] = lse[i] - row[targets[i]];
    }
}

// dlogits = scale (softmax(logits) - onehot(target)), in place; scale = 1 / (targets of the whole batch)
void cross_entropy_backward(real* logits, const real* lse, const int* targets, size_t rows, int V, int Vp, real scale) {
    #pragma omp parallel for schedule(static)
    for (index_t i = 0; i < index_t(rows); i++) {
        real* row = logits + i * Vp;
        for (int v = 0; v < V; v++) row[v] = scale * exponential(row[v] - lse[i]);
        row[targets[i]] -= scale;
    }
}

// ----------------------------------------------------------------------------------------------------
// The sub-layer: one for all norm placements

// What a sub-layer's branch computes on its way. Attention has qkv, y and lse, feed-forward h and gelu.
struct BranchActivations {
    real* u;           // (rows,C) the branch's input, where norm_in makes one
    real* qkv;         // (B,T,3C)
    real* qkv_normed;  // (B,T,3C) HybridNorm only
    real* y;           // (rows,C) attention's output, before its projection
    real* lse;         // (rows,H)
    real* h;           // (rows,4C) before GELU
    real* gelu;        // (rows,4C)
};

// f (rows,C) = attention(u (rows,C)), rows = B * (T - first), first: the positions that are in the KV cache already, 0
// in training. f null: only the activations are made.
void attention_branch_forward(real* f, const BranchActivations& a, const real* u, const SublayerTensors<real>& w,
                              const ModelConfig& c, int B, int T, int first) {
    size_t rows = size_t(B) * size_t(T - first), start = size_t(first) * 3 * size_t(c.C);
    matmul_forward(a.qkv + start, u, w[QKVW], rows, c.C, 3 * c.C);
    const real* qkv = a.qkv;
    if (w[GAMMA_Q]) {
        const real* const gains[] = {w[GAMMA_Q], w[GAMMA_K], w[GAMMA_V]};
        qkv_norm_forward(a.qkv_normed + start, a.qkv + start, gains, rows, c.H, c.D());
        qkv = a.qkv_normed;
    }
    attention_forward(a.y, a.lse, qkv, B, T, c.C, c.H, first);
    if (f) matmul_forward(f, a.y, w[ATTPROJW], rows, c.C, c.C);
}

// du (rows,C) from df (rows,C). dqkv (B,T,3C) is scratch; du serves as dy's on the way.
void attention_branch_backward(real* du, const real* df, real* dqkv, const BranchActivations& a, const real* u,
                               const SublayerTensors<real>& w, const SublayerTensors<real>& dw, const ModelConfig& c,
                               int B, int T, real* partial) {
    size_t rows = size_t(B) * size_t(T);
    matmul_backward(du, dw[ATTPROJW], df, a.y, w[ATTPROJW], rows, c.C, c.C);
    if (w[GAMMA_Q]) {
        const real* const gains[] = {w[GAMMA_Q], w[GAMMA_K], w[GAMMA_V]};
        real* const dgains[] = {dw[GAMMA_Q], dw[GAMMA_K], dw[GAMMA_V]};
        qkv_norm_forward(a.qkv_normed, a.qkv, gains, rows, c.H, c.D());  // one buffer serves all sub-layers
        attention_backward(dqkv, du, a.qkv_normed, a.y, a.lse, B, T, c.C, c.H);
        qkv_norm_backward(dqkv, dgains, a.qkv, gains, rows, c.H, c.D(), partial);
    } else {
        attention_backward(dqkv, du, a.qkv, a.y, a.lse, B, T, c.C, c.H);
    }
    matmul_backward(du, dw[QKVW], dqkv, u, w[QKVW], rows, c.C, 3 * c.C);
}

// f (rows,C) = gelu(u fcw^T) fcprojw^T. f null: only h is made, to be recomputed from.
void feed_forward_branch_forward(real* f, const BranchActivations& a, const real* u, const SublayerTensors<real>& w,
                                 const ModelConfig& c, size_t rows) {
    if (!f) return matmul_forward(a.h, u, w[FCW], rows, c.C, 4 * c.C);
    matmul_gelu_forward(a.gelu, a.h, u, w[FCW], rows, c.C, 4 * c.C);
    matmul_forward(f, a.gelu, w[FCPROJW], rows, 4 * c.C, c.C);
}

// du (rows,C) from df (rows,C). dh (rows,4C) is scratch.
void feed_forward_branch_backward(real* du, const real* df, real* dh, const BranchActivations& a, const real* u,
                                  const SublayerTensors<real>& w, const SublayerTensors<real>& dw, const ModelConfig& c,
                                  size_t rows) {
    matmul_gelu_backward(dh, dw[FCPROJW], df, a.gelu, a.h, w[FCPROJW], rows, 4 * c.C, c.C);
    matmul_backward(du, dw[FCW], dh, u, w[FCW], rows, c.C, 4 * c.C);
}

// z = alpha x + f, and in place x' = norm_out ? RMSNorm(z; gamma_out) : z.   x, z, f (rows,C); gamma null for no norm
void highway_forward(real* x, real* z, const real* f, const real* gamma, real alpha, size_t rows, int C) {
    #pragma omp for schedule(static) nowait
    for (index_t i = 0; i < index_t(rows); i++) {
        real *xi = x + i * C, *zi = z + i * C;
        for (int c = 0; c < C; c++) zi[c] = alpha * xi[c] + f[i * C + c];
        if (gamma) rmsnorm_row_forward(xi, zi, gamma, C);
        else memcpy(xi, zi, size_t(C) * sizeof(real));
    }
}

// dx_l = alpha_l dz_l + dx_branch, where dx_branch is du_l taken through the inner norm; dx_l may be dz_l.
void shortcut_backward(real* dx, const real* dz, const real* dx_branch, real alpha, size_t n) {
    #pragma omp for simd schedule(static) nowait
    for (index_t i = 0; i < index_t(n); i++) dx[i] = alpha * dz[i] + dx_branch[i];
}

// x_{l+1} (rows,C) in x, in place of x_l, rows = B * (T - first); z gets z_l, f is scratch:
//     u_l     = norm_in  ? RMSNorm(x_l; gamma_in_l)  : x_l
//     z_l     = alpha_l * x_l + F_l(u_l)
//     x_{l+1} = norm_out ? RMSNorm(z_l; gamma_out_l) : z_l
// ablated: F_l = 0.
void sublayer_forward(real* x, real* z, real* f, const BranchActivations& a, const SublayerTensors<real>& w,
                      const ModelConfig& c, int l, int B, int T, int first, bool ablated = false) {
    SublayerNorm norm = c.sublayer(l);
    size_t rows = size_t(B) * size_t(T - first);
    const real* u = norm.norm_in ? a.u : x;
    if (ablated) std::fill(f, f + rows * size_t(c.C), real(0));
    #pragma omp parallel
    {
        if (norm.norm_in) rmsnorm_forward(a.u, x, w[GAMMA_IN], rows, c.C);
        if (is_attention(l) && !ablated) attention_branch_forward(f, a, u, w, c, B, T, first);
        else if (!ablated) feed_forward_branch_forward(f, a, u, w, c, rows);
        highway_forward(x, z, f, w[GAMMA_OUT], real(norm.alpha), rows, c.C);
    }
}

// ----------------------------------------------------------------------------------------------------
// The model: its memory, its forward and its backward

// Sum of squares in double. Chunks of a fixed size on any thread, then the chunks in order.
double sum_of_squares(const real* values, size_t n) {
    constexpr size_t chunk = 1 << 14;
    std::vector<double> partial((n + chunk - 1) / chunk);
    #pragma omp parallel for schedule(static)
    for (index_t k = 0; k < index_t(partial.size()); k++) {
        double sum = 0;
        size_t end = std::min(n, (size_t(k) + 1) * chunk);
        #pragma omp simd reduction(+ : sum)
        for (size_t i = size_t(k) * chunk; i < end; i++) sum += double(values[i]) * double(values[i]);
        partial[size_t(k)] = sum;
    }
    double sum = 0;
    for (double p : partial) sum += p;
    return sum;
}

struct Model {
    ModelConfig config;
    ParameterLayout layout, grad_layout;  // of params; of grads, which differs at -z 2 alone
    int B, T;                             // the largest micro-batch, and the sequence length
    Recompute recompute;
    ActivationSlots slots;
    Sharing sharing;

    // params and grads lie as layout and grad_layout say. m, v: AdamW's moments, from -z 1 on only of this rank's
    // shards.
    Buffer<real> params, grads, m, v;
    // With several ranks: of this rank's shards, the step's gradients summed over the ranks.
    Buffer<real> shard_grads;
    // What AdamW updates: all parameters, or from -z 1 on this rank's shards.
    std::vector<ShardRange> update_ranges;
    // With several ranks: called in the backward pass when a bucket's gradients are complete.
    std::function<void(size_t bucket)> bucket_done;

    // The highway is stored once, as z: kept holds x_0 = "z_{-1}", z_0, ..., z_{L-1}, or with -r K every K-th of them
    // and the last, the others of one segment being in segment. x and u are made from it again.
    Buffer<real> kept, segment;
    // The branches' activations, a slot for each sub-layer that keeps them.
    Buffer<real> u, qkv, qkv_normed, y, lse, h, gelu;
    Buffer<real> x, f;                     // (B,T,C) the highway and the branch's output, of the sub-layer at work
    Buffer<real> dx, du, dbranch;          // (B,T,C), (B,T,C), (B,T,4C)
    Buffer<real> logits, row_lse, losses;  // a chunk of rows of (.,Vp), its log-sum-exp; (B,T)
    Buffer<real> gain_partial;             // the gains' gradients before their last sum

    StepProbe* probe = nullptr;  // what --probe writes; null while nothing is probed
    std::vector<real> probed_r;  // (L,rows) 1 / rms(z_l) of the micro-batch, while probed
    int ablated = -1;            // the sub-layer whose branch evaluate leaves out; -1: none

    // One row a buffer: what it is called in the table at the start, its elements, where it lives.
    struct BufferRow {
        const char* name;
        Buffer<real> Model::* buffer;
        uint64_t elements;
    };

    static uint64_t head_rows(const ModelConfig& c, uint64_t rows) {
        // Logits of so many rows at a time that 16 M elements hold them, whatever V is.
        return std::min(rows, std::max<uint64_t>(16, (uint64_t(1) << 24) / uint64_t(c.Vp())));
    }

    static std::vector<BufferRow> plan(const ModelConfig& c, const ParameterLayout& layout, int B, int T, Recompute r,
                                       Sharing s = {}) {
        uint64_t rows = uint64_t(B) * uint64_t(T), C = uint64_t(c.C);
        uint64_t partial = gain_blocks(rows) * std::max(C, c.norm == HYBRIDNORM ? 3 * uint64_t(c.D()) : 0);
        ActivationSlots slots(c.L, r);
        return {
            {"parameters", &Model::params, layout.size},
            {"gradients", &Model::grads, s.grad_layout(layout).size},
            {"gradients of this rank's shards", &Model::shard_grads, s.ranks > 0 ? layout.shard_size : 0},
            {"AdamW's first moment", &Model::m, s.states() ? layout.shard_size : layout.size},
            {"AdamW's second moment", &Model::v, s.states() ? layout.shard_size : layout.size},
            {"highway z", &Model::kept, slots.kept_z() * rows * C},
            {"highway z of one segment", &Model::segment, slots.segment_z() * rows * C},
            {"u", &Model::u, slots.u_count() * rows * C},
            {"q, k, v", &Model::qkv, slots.count / 2 * rows * 3 * C},
            {"q, k, v normed", &Model::qkv_normed, c.norm == HYBRIDNORM ? rows * 3 * C : 0},
            {"attention's output", &Model::y, slots.count / 2 * rows * C},
            {"attention's log-sum-exp", &Model::lse, slots.count / 2 * rows * size_t(c.H)},
            {"feed-forward before GELU", &Model::h, slots.count / 2 * rows * 4 * C},
            {"feed-forward after GELU", &Model::gelu, slots.gelu_count() * rows * 4 * C},
            {"x", &Model::x, rows * C},
            {"branch output", &Model::f, rows * C},
            {"gradient of x", &Model::dx, rows * C},
            {"gradient of u", &Model::du, rows * C},
            {"gradient inside a branch", &Model::dbranch, rows * 4 * C},
            {"logits, a chunk", &Model::logits, head_rows(c, rows) * size_t(c.Vp())},
            {"log-sum-exp of logits", &Model::row_lse, head_rows(c, rows)},
            {"losses", &Model::losses, rows},
            {"gains' gradients, partial sums", &Model::gain_partial, partial},
        };
    }

    static uint64_t bytes(const ModelConfig& c, const ParameterLayout& layout, int B, int T, Recompute r,
                          Sharing s = {}) {
        uint64_t sum = 0;
        for (const BufferRow& row : plan(c, layout, B, T, r, s)) sum += row.elements * sizeof(real);
        return sum;
    }

    Model(const ModelConfig& config, int B, int T, Recompute recompute, Sharing sharing = {})
        : config(config), layout(config, sharing.ranks), grad_layout(sharing.grad_layout(layout)), B(B), T(T),
          recompute(recompute), slots(config.L, recompute), sharing(sharing) {
        for (const BufferRow& row : plan(config, layout, B, T, recompute, sharing))
            this->*row.buffer = Buffer<real>(row.elements);
        reserve_panels(), reserve_scratch(attention_scratch(T, config.D()));
        grads.zero(), shard_grads.zero(), m.zero(), v.zero();
        if (sharing.ranks > 0) params.zero();  // the padding
        update_ranges = sharing.states() ? layout.owned(sharing.rank) : ParameterLayout(config).owned(0);
    }

    SublayerTensors<real> weights(int l = -1) { return {params.data(), layout, l}; }
    SublayerTensors<real> gradients(int l = -1) { return {grads.data(), grad_layout, l}; }

    void initialise(uint64_t seed) {
        for (size_t i = 0; i < layout.tensors.size(); i++) {
            const TensorInfo& t = layout.tensors[i];
            #pragma omp parallel for schedule(static)
            for (index_t row = 0; row < index_t(t.rows); row++)
                initialise_tensor(params.data() + t.offset, t, i, seed, size_t(row), size_t(row) + 1);
        }
    }

    // z(l) is z_l (rows,C) for l = 0..L-1; z(-1) is x_0.
    real* z(int l) {
        return (slots.z_is_kept(l) ? kept : segment).data() +
               slots.z_slot(l) * size_t(B) * size_t(T) * size_t(config.C);
    }

    BranchActivations activations(int l) {
        size_t rows = size_t(B) * size_t(T), C = size_t(config.C), slot = slots.of(l) / 2;
        return {.u = u.data() + slots.u_of(l) * rows * C,
                .qkv = qkv.data() + slot * rows * 3 * C,
                .qkv_normed = qkv_normed.data(),
                .y = y.data() + slot * rows * C,
                .lse = lse.data() + slot * rows * size_t(config.H),
                .h = h.data() + slot * rows * 4 * C,
                .gelu = gelu.data() + slots.gelu_of(l) * rows * 4 * C};
    }

    // x_{l+1} in x, in place of x_l; z_l and the branch's activations in their slots.
    void forward_sublayer(int l, int b) {
        size_t rows = size_t(b) * size_t(T);
        if (probe) probe_x(l, rows);
        sublayer_forward(x.data(), z(l), f.data(), activations(l), weights(l), config, l, b, T, 0, l == ablated);
        if (probe) probe_forward(l, rows);
    }

    // x_l, made again from z_{l-1} by the operations that made it, so that it has the same bits.
    void restore_x(int l, size_t rows) {
        const real* gamma = l > 0 ? weights(l - 1)[GAMMA_OUT] : nullptr;
        const real* z_before = z(l - 1);
        if (gamma) return rmsnorm_forward(x.data(), z_before, gamma, rows, config.C);
        #pragma omp for simd schedule(static)
        for (index_t i = 0; i < index_t(rows) * config.C; i++) x[size_t(i)] = z_before[i];
    }

    // dx_l in dx, in place of dx_{l+1}:
    //     dz_l = norm_out ? RMSNorm_backward(dx_{l+1}, z_l) : dx_{l+1}
    //     dF_l = dz_l                        -> branch backward -> du_l
    //     dx_l = alpha_l * dz_l + (norm_in ? RMSNorm_backward(du_l, x_l) : du_l)
    // The line of dz_l is where Post-LN dies: with gains of 1, and F of x's size and orthogonal to it, it divides the
    // shortcut by rms(z_l), about sqrt(2), L times over: 2^(-L/2) (the paper's eq. 14-15). KEEL's alpha = L makes
    // rms(z_l) = sqrt(alpha^2 + 1), and the alpha in the line of dx_l takes back what was divided:
    // (alpha/sqrt(alpha^2 + 1))^L -> 1 (eq. 18-19).
    void sublayer_backward(int l, int b) {
        SublayerNorm norm = config.sublayer(l);
        SublayerTensors<real> w = weights(l), dw = gradients(l);
        BranchActivations a = activations(l);
        size_t rows = size_t(b) * size_t(T), n = rows * size_t(config.C);
        real *dx_next = dx.data(), *dz = dx_next, *df = dz, *dx_l = dz;  // each in the place of the one before
        real *du_l = du.data(), *partial = gain_partial.data();

        const real *x_l = x.data(), *u_l = norm.norm_in ? a.u : x_l;
        real* dx_branch = du_l;  // in its place
        #pragma omp parallel
        {
            if (norm.norm_out)
                rmsnorm_backward(dz, dw[GAMMA_OUT], dx_next, z(l), w[GAMMA_OUT], rows, config.C, partial);
            if (probe) {
                #pragma omp single
                probe->sublayers[size_t(l)].df += sum_of_squares(df, n);
            }

            restore_x(l, rows);
            if (norm.norm_in && recompute.drops_u(l)) rmsnorm_forward(a.u, x_l, w[GAMMA_IN], rows, config.C);
            if (is_attention(l)) {
                if (recompute.drops_all(l)) attention_branch_forward(nullptr, a, u_l, w, config, b, T, 0);
                attention_branch_backward(du_l, df, dbranch.data(), a, u_l, w, dw, config, b, T, partial);
            } else {
                if (recompute.drops_all(l)) feed_forward_branch_forward(nullptr, a, u_l, w, config, rows);
                #pragma omp for schedule(static)
                for (index_t i = 0; i < index_t(recompute.drops_u(l) ? rows : 0); i++)
                    gelu_forward(a.gelu + i * 4 * config.C, a.h + i * 4 * config.C, 4 * size_t(config.C));
                feed_forward_branch_backward(du_l, df, dbranch.data(), a, u_l, w, dw, config, rows);
            }
            if (norm.norm_in)
                rmsnorm_backward(dx_branch, dw[GAMMA_IN], du_l, x_l, w[GAMMA_IN], rows, config.C, partial);
            shortcut_backward(dx_l, dz, dx_branch, real(norm.alpha), n);
        }
        if (probe) probe->sublayers[size_t(l)].dx += sum_of_squares(dx_l, n);
    }

    // logits = u_L wte^T, u_L = norm_final ? RMSNorm(x_L) : x_L, a chunk of rows at a time; returns the sum of the
    // losses. With backward, dx = du_L = dlogits wte and dwte += dlogits^T u_L as well, so that logits and their
    // gradients never exist for more than a chunk. logits_out (rows,V) and predictions (rows), the likeliest tokens,
    // are filled where given.
    double head(const real* in, const int* targets, size_t rows, bool backward, real scale, real* logits_out,
                int* predictions = nullptr) {
        size_t C = size_t(config.C), V = size_t(config.V), Vp = size_t(config.Vp()),
               chunk = head_rows(config, size_t(B) * size_t(T));
        real *wte = weights()[WTE], *dwte = gradients()[WTE];
        for (size_t i = 0; i < rows; i += chunk) {
            size_t n = std::min(chunk, rows - i);
            const real* xi = in + i * C;
            product(n, V, C, row_major(xi, C), row_major(wte, C).transposed(), logits.data(), Vp, SET);
            for (size_t r = 0; logits_out && r < n; r++)
                memcpy(logits_out + (i + r) * V, &logits[r * Vp], V * sizeof(real));
            for (size_t r = 0; predictions && r < n; r++)
                predictions[i + r] = int(std::max_element(&logits[r * Vp], &logits[r * Vp] + V) - &logits[r * Vp]);
            cross_entropy_forward(losses.data() + i, row_lse.data(), logits.data(), targets + i, n, config.V,
                                  config.Vp());
            if (!backward) continue;
            cross_entropy_backward(logits.data(), row_lse.data(), targets + i, n, config.V, config.Vp(), scale);
            product(n, C, V, row_major(logits.data(), Vp), row_major(wte, C), dx.data() + i * C, C, SET);
            product(V, C, n, row_major(logits.data(), Vp).transposed(), row_major(xi, C), dwte, C, ADD);
        }
        double sum = 0;
        for (size_t i = 0; i < rows; i++) sum += double(losses[i]);
        return sum;
    }

    // x_L in x. tokens (b,T), b at most B.
    void forward(const int* tokens, int b) {
        embedding_forward(x.data(), tokens, weights()[WTE], weights()[WPE], b, T, config.C, 0);
        std::copy(x.data(), x.data() + size_t(b) * size_t(T) * size_t(config.C), z(-1));
        if (probe) probed_r.resize(size_t(config.L) * size_t(b) * size_t(T));
        for (int l = 0; l < config.L; l++) forward_sublayer(l, b);
        if (probe) probe->add_shortcuts(config, probed_r.data(), size_t(b) * size_t(T));
    }

    // What the head reads: x_L or, in f, its norm.
    const real* final_norm_forward(size_t rows) {
        real* gamma = weights()[GAMMA_FINAL];
        if (!gamma) return x.data();
        #pragma omp parallel
        rmsnorm_forward(f.data(), x.data(), gamma, rows, config.C);
        return f.data();
    }

    // Sum of the losses of one micro-batch, tokens and targets (b,T).
    double evaluate(const int* tokens, const int* targets, int b, int* predictions = nullptr) {
        size_t rows = size_t(b) * size_t(T);
        forward(tokens, b);
        return head(final_norm_forward(rows), targets, rows, false, 0, nullptr, predictions);
    }

    // Sum of the losses; adds to the gradients those of scale * sum. debug, if given, gets logits, x and dx.
    double forward_backward(const int* tokens, const int* targets, int b, real scale,
                            DebugState<real>* debug = nullptr) {
        size_t rows = size_t(b) * size_t(T), stream = rows * size_t(config.C);
        forward(tokens, b);
        if (debug)
            debug->logits.resize(rows * size_t(config.V)), debug->x.resize((size_t(config.L) + 1) * stream),
                debug->dx.resize(debug->x.size());
        auto record = [&](std::vector<real> DebugState<real>::* list, int l, const Buffer<real>& from) {
            if (debug) std::copy(from.data(), from.data() + stream, (debug->*list).data() + size_t(l) * stream);
        };
        record(&DebugState<real>::x, config.L, x);
        double loss =
            head(final_norm_forward(rows), targets, rows, true, scale, debug ? debug->logits.data() : nullptr);
        real *du_L = dx.data(), *dx_L = du_L;  // in its place
        if (real* gamma = weights()[GAMMA_FINAL]) {
            #pragma omp parallel
            rmsnorm_backward(dx_L, gradients()[GAMMA_FINAL], du_L, x.data(), gamma, rows, config.C,
                             gain_partial.data());
        }
        record(&DebugState<real>::dx, config.L, dx);
        int K = recompute.segments() ? recompute.level : config.L;
        for (int end = config.L; end > 0;) {
            int begin = (end - 1) / K * K;  // the segment's first sub-layer
            if (end < config.L) {           // the last segment's activations are still there
                #pragma omp parallel
                restore_x(begin, rows);
                StepProbe* backward_probe = std::exchange(probe, nullptr);  // the first forward has been probed
                for (int l = begin; l < end; l++) forward_sublayer(l, b);
                probe = backward_probe;
            }
            for (int l = end - 1; l >= begin; l--) {
                sublayer_backward(l, b);  // leaves x_l in x
                if (bucket_done && is_attention(l)) bucket_done(ParameterLayout::block_bucket(l));
                record(&DebugState<real>::x, l, x);
                record(&DebugState<real>::dx, l, dx);
            }
            end = begin;
        }
        embedding_backward(gradients()[WTE], gradients()[WPE], dx.data(), tokens, b, T, config.C);
        if (bucket_done) bucket_done(0);
        return loss;
    }

    void probe_x(int l, size_t rows) {
        size_t C = size_t(config.C);
        probe->sublayers[size_t(l)].x += sum_of_squares(x.data(), rows * C);
        #pragma omp parallel
        for (size_t i = 0; i < rows; i++)
            #pragma omp for schedule(static) nowait  // a thread has the same channels in every row
            for (index_t k = 0; k < config.C; k++) probe->x_sums[size_t(l) * C + k] += double(x[i * C + k]);
    }

    void probe_forward(int l, size_t rows) {
        SublayerProbe& p = probe->sublayers[size_t(l)];
        const real* zl = z(l);
        real* r = probed_r.data() + size_t(l) * rows;
        p.f += sum_of_squares(f.data(), rows * size_t(config.C));
        p.z += sum_of_squares(zl, rows * size_t(config.C));
        #pragma omp parallel for schedule(static)
        for (index_t i = 0; i < index_t(rows); i++) r[i] = rms_reciprocal(zl + i * config.C, config.C);
    }

    // Sums of squares, one a tensor, of values in parameter order.
    std::vector<double> tensor_squares(const Buffer<real>& values) const {
        std::vector<double> squares;
        for (const TensorInfo& t : layout.tensors)
            squares.push_back(sum_of_squares(values.data() + t.offset, t.size()));
        return squares;
    }

    // Before the update. Of several ranks, each has the sums of the gradients that it owns.
    void probe_parameters(int rank) {
        probe->weights = tensor_squares(params);
        if (sharing.ranks > 0) {
            probe->gradients.assign(layout.tensors.size(), 0);
            for (const ShardRange& s : layout.owned(rank))
                probe->gradients[s.tensor] = sum_of_squares(shard_grads.data() + s.shard, s.count);
        } else {
            probe->gradients = tensor_squares(grads);
        }
        probe->set_gains(config, [&](int l) { return weights(l)[GAMMA_OUT]; });
    }
};

// ----------------------------------------------------------------------------------------------------
// The optimizer: AdamW (Loshchilov and Hutter 2019)

// With the clipped gradient g:  m = b1 m + (1-b1) g,  v = b2 v + (1-b2) g^2,
//     p -= lr wd p,   p -= lr mhat / (sqrt(vhat) + eps),   mhat = m / (1 - b1^n), vhat = v / (1 - b2^n)
// at update n = 1, 2, ... (steps that were skipped are not counted); gains are not decayed. Leaves the gradients at
// zero for the next step. Where the model is probed, notes the sum of squares of each tensor's update.
void adamw_update(Model& model, const RunConfig& run, int64_t step, double norm) {
    double lr = learning_rate(run, step);
    real clip = real(run.clip > 0 ? std::min(1.0, run.clip / norm) : 1.0);
    real b1 = real(BETA1), b2 = real(BETA2), eps = real(ADAM_EPSILON);
    double n = double(step - run.skipped);
    real step_size = real(lr / (1 - std::pow(BETA1, n))), v_scale = real(1 / (1 - std::pow(BETA2, n)));
    Buffer<real> before(model.probe ? model.params.size() : 0);
    std::copy(model.params.data(), model.params.data() + before.size(), before.data());
    bool sharded = model.sharing.states();
    #pragma omp parallel
    for (const ShardRange& range : model.update_ranges) {
        const TensorInfo& t = model.layout.tensors[range.tensor];
        real decay = real(t.decay ? lr * run.weight_decay : 0);
        size_t at = sharded ? range.shard : t.offset;
        real *p = model.params.data() + t.offset + range.first,
             *g = (sharded ? model.shard_grads : model.grads).data() + at;
        real *m = model.m.data() + at, *v = model.v.data() + at;
        #pragma omp for simd schedule(static) nowait
        for (index_t i = 0; i < index_t(range.count); i++) {
            real gi = clip * g[i];
            m[i] = b1 * m[i] + (1 - b1) * gi;
            v[i] = b2 * v[i] + (1 - b2) * gi * gi;
            p[i] -= decay * p[i];
            p[i] -= step_size * m[i] / (std::sqrt(v[i] * v_scale) + eps);
            g[i] = 0;
        }
    }
    if (!model.probe) return;
    model.probe->updates.assign(model.layout.tensors.size(), 0);
    for (const ShardRange& range : model.layout.owned(run.rank)) {
        real* change = before.data() + range.memory;
        const real* after = model.params.data() + range.memory;
        #pragma omp parallel for simd schedule(static)
        for (index_t i = 0; i < index_t(range.count); i++) change[i] -= after[i];
        model.probe->updates[range.tensor] = sum_of_squares(change, range.count);
    }
}

// The global gradient norm.
double gradient_norm(const Model& model) {
    double sum = 0;
    for (double square : model.tensor_squares(model.grads)) sum += square;
    return std::sqrt(sum);
}

// ----------------------------------------------------------------------------------------------------
// Sampling

// Feeds tokens through the model a few at a time, keeping q, k and v of every block and position (the KV cache), so
// that a new token costs one row through each layer. The layers are those of training, on rows instead of batches.
class TokenGenerator {
public:
    TokenGenerator(Model& model, int window)
        : model(model), window(window), length(0), C(size_t(model.config.C)),
          cache(size_t(model.config.L / 2) * window * 3 * C),
          normed_cache(model.config.norm == HYBRIDNORM ? cache.size() : 0), x(window * C), u(window * C), f(window * C),
          z(window * C), y(window * C), lse(size_t(window) * size_t(model.config.H)), h(window * 4 * C),
          gelu(window * 4 * C), logits(size_t(model.config.Vp())) {}

    static uint64_t bytes(const ModelConfig& c, int window) {
        uint64_t caches = (c.norm == HYBRIDNORM ? 2 : 1) * uint64_t(c.L / 2) * 3 * uint64_t(c.C);
        return (uint64_t(window) * (caches + 13 * uint64_t(c.C) + uint64_t(c.H)) + uint64_t(c.Vp())) * sizeof(real);
    }

    // Appends n tokens; returns the logits (V) that follow the last. At most `window` tokens fit.
    const real* feed(const int* tokens, int n) {
        const ModelConfig& c = model.config;
        int end = length + n;
        size_t rows = size_t(n);
        embedding_forward(x.data(), tokens, model.weights()[WTE], model.weights()[WPE], 1, n, c.C, length);
        for (int l = 0; l < c.L; l++) {
            size_t block = size_t(l / 2) * size_t(window) * 3 * C;
            real* normed = normed_cache.size() ? normed_cache.data() + block : nullptr;
            BranchActivations a{u.data(), cache.data() + block, normed, y.data(), lse.data(), h.data(), gelu.data()};
            sublayer_forward(x.data(), z.data(), f.data(), a, model.weights(l), c, l, 1, end, length);
        }
        length = end;
        real* last = x.data() + (rows - 1) * C;
        if (real* gamma = model.weights()[GAMMA_FINAL]) rmsnorm_forward(last, last, gamma, 1, c.C);
        product(1, size_t(c.V), C, row_major(last, C), row_major(model.weights()[WTE], C).transposed(), logits.data(),
                size_t(c.Vp()), SET);
        return logits.data();
    }
    void clear() { length = 0; }
    int size() const { return length; }

private:
    Model& model;
    int window, length;
    size_t C;
    Buffer<real> cache, normed_cache, x, u, f, z, y, lse, h, gelu, logits;
};

// ----------------------------------------------------------------------------------------------------
// The trainer: the step, and what else a run asks for (keel/trainer.h)

struct Trainer {
    using Real = real;
    using HostArray = Buffer<real>;
    static constexpr bool branch_bf16 = false, on_host = true;
#ifdef KEEL_MPI
    using Communicator = ::Communicator;
    static constexpr const char* ranks_by = "MPI";
#else
    using Communicator = NoCommunicator;
    static constexpr const char* ranks_by = nullptr;
#endif
    static constexpr const char* ranks_needs = "MPI (mpicc)";
    static constexpr bool probes_ranks = true;
    static constexpr int steps_in_flight = 1;

    RunConfig run;
    Model model;
    Communicator* communicator;        // null: alone
    std::vector<int> tokens, targets;  // (B,T) one micro-batch
    StepResult result{};               // of the step that was started
    size_t step_bytes = 0;             // of several ranks: sent by this one in its first step

    explicit Trainer(const RunConfig& run, Communicator* communicator = nullptr)
        : run(run), model(run.model, run.B, run.T, run.recompute, Sharing(run)), communicator(communicator),
          tokens(size_t(run.B) * size_t(run.T)), targets(tokens.size()) {
#ifdef KEEL_MPI
        if (run.ranks > 0) model.bucket_done = [this](size_t i) { reduce_bucket(i); };
#endif
    }
    Trainer(const Trainer&) = delete;
    Trainer& operator=(const Trainer&) = delete;

    // One optimizer step: the gradient of the mean loss over run.total_batch tokens, a micro-batch at a time, then
    // AdamW.
    StepResult step(const Loader& data, int64_t step, ProbeLog* log, unsigned flags = 0) {
        StepProbe probe(run.model);
        model.probe = log ? &probe : nullptr;
        double loss = 0;
        size_t sent_before = bytes_sent();
        std::string lost;  // of several ranks: why this one's data could not be read
        for (int micro = 0; micro < run.accumulation(); micro++) {
            try {
                data.batch(run.sequence(step, micro), run.B, tokens.data(), targets.data());
            } catch (const DataError& e) {
                if (run.ranks == 0) throw;
                lost = e.what(),
                flags |= DATA_LOST;  // the others wait for this rank: it computes on with the tokens it has
            }
            loss += model.forward_backward(tokens.data(), targets.data(), run.B, real(1.0 / double(run.total_batch)));
        }
        StepResult result = run.ranks > 0
                                ? share_step(loss, flags, lost)
                                : StepResult{.loss = loss / double(run.total_batch), .norm = gradient_norm(model)};
        if (log) model.probe_parameters(run.rank);
        result.recent = run.recent;
        result.skipped = !std::isfinite(result.loss) || !std::isfinite(result.norm) ||
                         !result.recent.add(result.loss, result.norm, run.skip_loss, run.skip_grad);
        if (!result.skipped) {
            adamw_update(model, run, step, result.norm);
            if (run.ranks > 0) finish_update();
            if (step_bytes == 0) step_bytes = bytes_sent() - sent_before;
            if (log && run.ranks > 0)
                probe.add_ranks(run.ranks, [&](const void* mine, void* all, size_t bytes) {
                    communicator->gather(mine, all, bytes);
                });
            if (log) write_probe(*log, run, model.layout, step, probe);
        } else {
            model.grads.zero(), model.shard_grads.zero();  // as the update leaves them
        }
        model.probe = nullptr;
        return result;
    }

    // ----- Several ranks
    // Called in the backward pass when a bucket's gradients are complete: sums them over the ranks and adds this rank's
    // shard to shard_grads.
#ifdef KEEL_MPI
    void reduce_bucket(size_t i) {
        const Bucket& bucket = model.grad_layout.buckets[i];
        real* grads = model.grads.data() + bucket.first;
        communicator->reduce_scatter(model.shard_grads.data() + bucket.shard_first, grads, bucket.shard);
        #pragma omp parallel for simd schedule(static)
        for (index_t k = 0; k < index_t(bucket.shard * size_t(run.ranks)); k++)
            grads[k] = 0;  // for the next micro-batch, or at -z 2 the next block but one
    }
    void gather_buckets(Buffer<real>& of) {
        for (const Bucket& bucket : model.layout.buckets)
            communicator->all_gather(of.data() + bucket.first, bucket.shard);
    }
    size_t bytes_sent() const { return communicator ? communicator->bytes_sent() : 0; }
#else
    void gather_buckets(Buffer<real>&) {}
    size_t bytes_sent() const { return 0; }
#endif
    void gather_weights() {}  // they are whole after each step

    // The step's loss and norm over all ranks: each rank sums its own, then the sums are added in rank order.
    StepResult share_step(double loss, unsigned flags, const std::string& lost) {
        StepShare mine{loss, sum_of_squares(model.shard_grads.data(), model.shard_grads.size()), flags}, sum{0, 0, 0};
        std::vector<StepShare> shares(size_t(run.ranks));
        communicator->gather(&mine, shares.data(), sizeof mine);
        StepResult result{};
        result.all = ~0u;
        for (const StepShare& s : shares) {
            sum.loss_sum += s.loss_sum, sum.grad_squares += s.grad_squares;
            result.any |= unsigned(s.flags), result.all &= unsigned(s.flags);
        }
        result.loss = sum.loss_sum / double(run.total_batch), result.norm = std::sqrt(sum.grad_squares);
        if (result.any & DATA_LOST) {
            model.shard_grads.zero();
            throw_lost_data(*communicator, run, lost);
        }
        if (run.zero == 0) {  // every rank updates everything
            for (const Bucket& bucket : model.layout.buckets)
                std::copy_n(model.shard_grads.data() + bucket.shard_first, bucket.shard,
                            model.grads.data() + bucket.first + size_t(run.rank) * bucket.shard);
            gather_buckets(model.grads);
        }
        return result;
    }
    void finish_update() {
        model.shard_grads.zero();
        if (run.zero > 0) gather_buckets(model.params);
    }

    // ----- Parameters and moments, in and out
    real* place(Section section, const ShardRange& range) {
        Buffer<real>& array = section == PARAMETERS ? model.params : section == FIRST_MOMENTS ? model.m : model.v;
        return array.data() + (section != PARAMETERS && model.sharing.states() ? range.shard : range.memory);
    }
    void load(Section section, const ShardRange& range, size_t first, size_t n, const real* values) {
        std::copy_n(values, n, place(section, range) + first);
    }
    void loaded() {
        if (run.ranks == 0) return;
        gather_buckets(model.params);
        if (run.zero == 0) gather_buckets(model.m), gather_buckets(model.v);
    }
    void save(Section section, const ShardRange& range, size_t first, size_t n, real* out) {
        const real* from = place(section, range) + first;
        #pragma omp parallel for simd schedule(static)
        for (index_t i = 0; i < index_t(n); i++) out[i] = from[i];
    }
    void save_model(real* out) {
        if (run.rank > 0) return;
        for (const TensorInfo& t : model.layout.tensors)
            out = std::copy_n(model.params.data() + t.offset, t.size(), out);
    }
    void saved() {}

    void start(const Loader& data, int64_t number, ProbeLog* log, unsigned flags = 0) {
        double begin = seconds();
        result = step(data, number, log, flags);
        result.seconds = seconds() - begin;
    }
    StepResult finish() const { return result; }

    double evaluate(const int* tokens, const int* targets, int b, int* predictions = nullptr) {
        return model.evaluate(tokens, targets, b, predictions);
    }
    void ablate(int l) { model.ablated = l; }

    // One forward and backward on the parameters in the model and the tokens in the state; fills the rest of the state.
    void debug_pass(DebugState<real>& s, int B, int T) {
        s.header = make_header(FILE_DEBUG, real_type<real>, run.model, 0, branch_bf16);
        s.header.word[H_B] = B, s.header.word[H_T] = T;
        s.params.assign(model.params.data(), model.params.data() + model.params.size());
        double rows = double(B) * T;
        s.loss = real(model.forward_backward(s.tokens.data(), s.targets.data(), B, real(1 / rows), &s) / rows);
        s.grads.assign(model.grads.data(), model.grads.data() + model.grads.size());
    }

    const ParameterLayout& layout() const { return model.layout; }
    void initialise(uint64_t seed) { model.initialise(seed); }

    using Generator = TokenGenerator;

    static void require_machine(const Launch& = {}) {
        int threads = threads_to_start(omp_get_max_threads(), omp_get_num_procs()), started = 0;
        omp_set_num_threads(threads);
        // Has OpenMP start its threads, which stay, whatever limit comes later; on macOS they do not have this one's
        // treatment of subnormals.
        #pragma omp parallel reduction(+ : started)
        flush_subnormals(), started++;
        omp_set_num_threads(started);  // fewer where OMP_THREAD_LIMIT or OMP_DYNAMIC says so
    }
    static void check_model(const ModelConfig&) {}  // any shape that config_fault lets pass
    static std::string machine_name() { return format("%d threads", omp_get_max_threads()); }

    static MatrixRate matrix_rate(int ranks_here) { return product_rate(ranks_here); }
    static uint64_t available_memory() { return ::available_memory(); }

    static std::vector<MemoryRow> memory_rows(const RunConfig& run) {
        std::vector<MemoryRow> rows;
        for (const Model::BufferRow& row :
             Model::plan(run.model, ParameterLayout(run.model, run.ranks), run.B, run.T, run.recompute, Sharing(run)))
            if (row.elements) rows.push_back({row.name, row.elements * sizeof(real)});
#ifdef KEEL_MPI
        if (run.ranks > 1)
            rows.push_back({"gradients from the other ranks",
                            Communicator::bytes(ParameterLayout(run.model, run.ranks))});
#endif
        return rows;
    }

    static MemoryRow memory_beside(const RunConfig& run, const Options& o) {
        uint64_t debug_state = debug_state_bytes<real>(run.model, run.B ? run.B : run.rank_sequences(), run.T),
                 rows = uint64_t(run.B ? run.B : run.batch_sequences()) * uint64_t(run.T), bytes = 0;
        if (!o.check.empty()) return {"debug states", 2 * debug_state};
        if (!o.dump.empty()) bytes = debug_state;
        else if (o.sample_every > 0) bytes = TokenGenerator::bytes(run.model, run.T);
        if (o.probe > 0)  // the parameters before their update; 1 / rms(z) of all rows
            bytes += sizeof(real) * (parameter_count(run.model) + uint64_t(run.model.L) * rows);
        // of each thread: its stack and its panels
        bytes += size_t(omp_get_max_threads()) * ((size_t(8) << 20) + (A_PANELS + B_PANELS) * sizeof(real));
        return {o.dump.empty() ? "samples, probe, threads" : "debug state, threads", bytes};
    }

    static uint64_t sampling_bytes(const ModelConfig& c, int window) {
        return Model::bytes(c, ParameterLayout(c), 1, 1, {1}) + TokenGenerator::bytes(c, window);
    }

    // The cost that a CPU knows: least recomputation, then the largest micro-batch of at most 8192 tokens, from where
    // on a larger one is no faster.
    static void choose_memory_plan(RunConfig& run, uint64_t available) {
        ParameterLayout layout(run.model, run.ranks);
        auto bytes = [&](int B, Recompute r) { return Model::bytes(run.model, layout, B, run.T, r, Sharing(run)); };
        auto cost = [](int B, Recompute r) {
            return MAX_B * (r.segments() ? 3.0 : r.level == 1 ? 2.0 : r.level == -1 ? 1.0 : 0.0) - B;
        };
        choose_micro_batch(run, available, available / 8, 8192, bytes, cost);  // a thread's heap may reserve 64 MiB
    }
};

#ifndef KEEL_NO_MAIN  // the tests have a main of their own
int main(int argc, char** argv) {
    flush_subnormals();
    limit_spinning(argv);
    return trainer_main<Trainer>(argc, argv);
}
#endif
