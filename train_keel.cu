// train_keel.cu: trains a GPT of KEEL highway blocks on a GPU (arXiv 2601.19895), as explicit forward and backward
// kernels; built with NCCL (-DKEEL_NCCL), on as many GPUs as there are, each a process.
//
// It reads from small to large: the layers (each forward beside its backward), the optimizer, the sub-layer's branch,
// the model, sampling, the step. What it stands on is in keel/: memory, launches and graphs (gpu.h), PTX
// (primitives.h), sums (sums.h), matrix products (cublaslt.h), the optimizer's work list (update.h), the run around the
// steps (run.h), what ranks exchange (nccl.h).
//
// train_keel_cpu.cpp does the same passes as plain loops, is the reference for each of them, and divides them
// otherwise. With z_l = alpha_l x_l + F_l(u_l):
//
//     z_{l-1} -norm_out-> x_l -norm_in-> u_l -F_l-> z_l -norm_out-> x_{l+1} -norm_in-> u_{l+1}
//                         |-------------- sub-layer l --------------|                                there
//     |--------------- point l ------------|        |---------------- point l+1 -------------|      here
//
// What lies between two branches reads and writes the same rows: it is one kernel forward and one backward.
//
// The highway (x, z, their gradients and norms) is FP32 always. The branches compute in BF16 on tensor cores, or in
// FP32 with -DKEEL_FP32, the build for comparisons. Weights are FP32, with a BF16 copy for the matrix products.
//
// Every result has the same bits in every run of one program on one kind of GPU with one cuBLAS, KEEL_WGMMA and --tune:
// the order of each sum depends on shapes, the card and the compiled kernel alone, and floats are added atomically in
// one place, attention's dq on Hopper, where blocks take turns in a fixed order.
//
// Conventions, which let a plain C++ compiler build and run this file on machines without a GPU (test/cuda_on_cpu):
// kernels start through launch(); shared memory is dynamic and reached through shared<T>(); PTX is in primitives.h.

#include "keel/cublaslt.h"
#include "keel/main.h"
#include "keel/nccl.h"
#include "keel/update.h"

constexpr float NORM_EPSILON = 1e-6f;  // rms(x) = sqrt(mean(x^2) + this)
constexpr float LOG2_E = 1.44269504088896341f;

// ----------------------------------------------------------------------------------------------------
// The layers: each forward beside its backward. A backward adds to gradients of parameters, and sets those of inputs.

// out (rows,N) = in (rows,K) W^T, W (N,K).  2 rows N K operations
template <class Out>
void matmul_forward(Device& device, Out* out, const branch_t* in, const branch_t* w, size_t rows, size_t K, size_t N) {
    device.product(out, w, TRANSPOSED, in, PLAIN, N, rows, K, SET);  // out^T (N,rows) = W in^T
}

// x in BF16, rounded up or down at random so that the mean is x: 16 random bits are added below BF16's last bit.
__device__ __forceinline__ __nv_bfloat16 round_stochastic(float x, uint32_t random) {
    uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7F800000u) != 0x7F800000u) bits += random & 0xFFFFu;  // infinity and NaN stay
    return __ushort_as_bfloat16(uint16_t(bits >> 16));
}

// g += addend, N numbers a thread, with stochastic rounding: rounding to nearest would lose every addend below 2^-9 of
// the sum.  8 bytes an element
template <int N>
__global__ void add_rounded_kernel(__nv_bfloat16* g, const float* addend, size_t n, size_t first,
                                   RoundingState rounding) {
    begin_kernel();
    size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * N;
    if (at >= n) return;
    size_t block = (first + at) / 4;
    Philox draw =
        philox(rounding.settings->seed, uint32_t(block), uint32_t(block >> 32) | uint32_t(*rounding.micro_batch) << 8,
               uint32_t(rounding.counts->updates), STREAM_GRADIENTS);
    auto sum = load<N>(g + at);
    auto add = load<N>(addend + at);
    for (int i = 0; i < N; i++)
        sum[i] = round_stochastic(float(sum[i]) + add[i], draw.word[N == 4 ? size_t(i) : (first + at) % 4]);
    store<N>(g + at, sum);
}

// dW (N,K) += dout^T in.  2 rows N K operations, added up in FP32
void matmul_backward_weight(Device& device, const MatrixGradient& dw, const branch_t* dout, const branch_t* in,
                            size_t rows, size_t K, size_t N) {
    // dW^T (K,N) += in^T dout
    device.product(dw.bf16 ? dw.scratch : dw.fp32, in, PLAIN, dout, TRANSPOSED, K, N, rows, dw.bf16 ? SET : ADD);
    if (dw.bf16) {
        bool fours = N * K % 4 == 0 && dw.first % 4 == 0 && reinterpret_cast<size_t>(dw.bf16) % 8 == 0;
        launch_threads(fours ? add_rounded_kernel<4> : add_rounded_kernel<1>, N * K / (fours ? 4 : 1), device.stream,
                       dw.bf16, dw.scratch, N * K, dw.first, dw.rounding);
    }
}

// din (rows,K) = dout W, and dW (N,K) += dout^T in.  4 rows N K operations
void matmul_backward(Device& device, branch_t* din, const MatrixGradient& dw, const branch_t* dout, const branch_t* in,
                     const branch_t* w, size_t rows, size_t K, size_t N) {
    matmul_backward_weight(device, dw, dout, in, rows, K, N);
    device.product(din, w, PLAIN, dout, PLAIN, K, rows, N, SET);  // din^T (K,rows) = W^T dout^T
}

// ----- Embedding

// x_0 (B,T,C) = sqrt(C) * (wte[token] + wpe[position]), positions from `first` on.  12 bytes an element, 8 if wpe is
// cached
template <int N>
__global__ void embedding_forward_kernel(float* x, const int* tokens, const float* wte, const float* wpe, int rows,
                                         int T, int C, int first) {
    begin_kernel();
    size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * N;
    if (at >= size_t(rows) * C) return;
    int row = int(at / C), c = int(at % C);
    float scale = sqrtf(float(C));
    auto token = load<N>(wte + size_t(tokens[row]) * C + c), position = load<N>(wpe + size_t(first + row % T) * C + c);
    Pack<float, N> out;
    for (int i = 0; i < N; i++) out[i] = scale * (token[i] + position[i]);
    store<N>(x + at, out);
}

// dwte[token] += sqrt(C) * sum of dx (rows,C) over the token's rows, in two kernels: the first adds up the rows of each
// chunk into sums (chunks,C), a block a chunk; the second the chunks of each token, a block a token.  4 bytes an
// element of dx, 8 of sums and of dwte
__global__ void embedding_chunk_kernel(float* sums, const float* dx, TokenBatch batch, int C) {
    begin_kernel();
    int chunk = blockIdx.x;
    if (chunk >= *batch.chunks) return;
    int begin = batch.start[chunk], end = batch.start[chunk + 1];
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        float sum = 0;
#pragma unroll 8  // so many loads are on their way at a time
        for (int i = begin; i < end; i++) sum += dx[size_t(batch.order[i]) * C + c];
        sums[size_t(chunk) * C + c] = sum;
    }
}
__global__ void embedding_token_kernel(float* dwte, const float* sums, TokenBatch batch, int C) {
    begin_kernel();
    int j = blockIdx.x;
    if (j >= *batch.different) return;
    int begin = batch.first[j], end = batch.first[j + 1];
    float* out = dwte + size_t(batch.tokens[batch.order[batch.start[begin]]]) * C;
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        float sum = 0;
#pragma unroll 8
        for (int k = begin; k < end; k++) sum += sums[size_t(k) * C + c];
        out[c] += sqrtf(float(C)) * sum;
    }
}

// dwpe[position] += sqrt(C) * sum of dx (B,T,C) over the sequences.  4 bytes an element of dx, 8 of dwpe
__global__ void position_backward_kernel(float* dwpe, const float* dx, int B, int T, int C) {
    begin_kernel();
    size_t at = size_t(blockIdx.x) * blockDim.x + threadIdx.x, size = size_t(T) * C;
    if (at >= size) return;
    float sum = 0;
    for (int b = 0; b < B; b++) sum += dx[b * size + at];
    dwpe[at] += sqrtf(float(C)) * sum;
}

void embedding_forward(Device& device, float* x, const int* tokens, const float* wte, const float* wpe, int B, int T,
                       int C, int first) {
    int rows = B * T;
    auto* kernel = C % 4 == 0 ? embedding_forward_kernel<4> : embedding_forward_kernel<1>;
    launch_threads(kernel, size_t(rows) * size_t(C) / (C % 4 == 0 ? 4 : 1), device.stream, x, tokens, wte, wpe, rows, T,
                   C, first);
}

// sums: scratch (TokenBatch::most_chunks, C), at most as large as dx
void embedding_backward(Device& device, float* dwte, float* dwpe, float* sums, const float* dx, const TokenBatch& batch,
                        int B, int T, int C, int V) {
    size_t rows = size_t(B) * size_t(T);
    unsigned threads = unsigned(std::min<size_t>(1024, round_up(size_t(C), WARP)));
    launch(embedding_chunk_kernel, TokenBatch::most_chunks(rows, size_t(V)), threads, 0, device.stream, sums, dx, batch,
           C);
    launch(embedding_token_kernel, std::min(rows, size_t(V)), threads, 0, device.stream, dwte, sums, batch, C);
    launch_threads(position_backward_kernel, size_t(T) * size_t(C), device.stream, dwpe, dx, B, T, C);
}

// ----- The highway
//
// It is stored once, as z. At point l, between the branches of sub-layers l-1 and l (0: after the embedding, L: before
// the head),
//     x_l = norm_out of sub-layer l-1 ? gamma_out z r_out : z,   r_out = 1 / rms(z),    z = z_{l-1}; x_0 at point 0
//     u_l = norm_in of sub-layer l    ? gamma_in x_l r_in : x_l, r_in = 1 / rms(x_l),   u_L: what the head reads
// so that with the two numbers r a row, whoever needs x or u has it from z again with the same bits. alpha, norm_in and
// norm_out of each sub-layer are rows of the table `placements` in keel_common.h (KEEL's first two sub-layers are
// exceptions, the paper's section 3.1).
struct HighwayPoint {
    float* z;                // (rows,C)
    float *r_out, *r_in;     // (rows)
    const float* gamma_out;  // (C), null: no norm
    const float* gamma_in;   // (C), null: no norm
    branch_t* u;             // (rows,C), null: not wanted
    __device__ float r_out_of(int row) const { return gamma_out ? r_out[row] : 1; }
    __device__ float r_in_of(int row) const { return gamma_in ? r_in[row] : 1; }
};

// A row lies in the registers of a warp, or if it is long of several: 32 N K columns in each, lane by lane N at K
// places. So all of its loads are on their way before the first is used. Beyond its end are zeros. N is 4 where C is
// whole fours.
constexpr int MAX_ROW_WARPS = 8;  // of up to 255 registers a thread, they fill the 65536 of a multiprocessor
inline int row_columns(int C) { return C % 4 ? 512 : 1024; }  // in a warp at most
inline int most_channels(int C) { return MAX_ROW_WARPS * row_columns(C); }
struct RowShared { float warp[MAX_ROW_WARPS], gains[]; };
template <int N, int K>
struct RowLane {
    int C, warps;        // columns, and warps that share a row: all of a block's, or 1
    int first;           // this lane's first column
    int row, rows_away;  // its warp's first row, and how far on the next is, where blocks have more
    __device__ RowLane(int C, int warps) : C(C), warps(warps) {
        int warp = threadIdx.x / WARP, rows_a_block = blockDim.x / WARP / warps;
        first = warp % warps * WARP * N * K + threadIdx.x % WARP * N;
        row = blockIdx.x * rows_a_block + warp / warps, rows_away = gridDim.x * rows_a_block;
    }
    __device__ int column(int k) const { return first + k * WARP * N; }
    template <class T>
    __device__ void load(Pack<T, N> (&values)[K], const T* from) const {
#pragma unroll
        for (int k = 0; k < K; k++) values[k] = column(k) < C ? ::load<N>(from + column(k)) : Pack<T, N>{};
    }
    template <class T>
    __device__ void store(T* to, const Pack<T, N> (&values)[K]) const {
#pragma unroll
        for (int k = 0; k < K; k++)
            if (column(k) < C) ::store<N>(to + column(k), values[k]);
    }
    // A norm's gains; ones where there is none, which with r = 1 change no bit.
    __device__ Pack<float, N> gains(const float* gamma, int k) const {
        Pack<float, N> values;
        for (float& value : values.v) value = 1;
        if (!gamma || column(k) >= C) return values;
        if constexpr (BRANCH_BF16) return ::load<N>(gamma + column(k));
        else  // behind HybridNorm's gains, of any D numbers each, they may start anywhere
            for (int i = 0; i < N; i++) values[i] = gamma[column(k) + i];
        return values;
    }
    // The sum over the row, in all of its threads with the same bits.
    __device__ float sum(float value) const {
        value = warp_sum(value);
        if (warps == 1) return value;
        float* sums = shared<RowShared>().warp;
        __syncthreads();  // the sum before has been read
        sums[threadIdx.x / WARP] = value;
        __syncthreads();
        value = 0;
        for (int w = 0; w < warps; w++) value += sums[w];
        return value;
    }
    // 1 / rms, where there is a norm; the row's first thread leaves it in r.
    __device__ float rms_reciprocal(const Pack<float, N> (&x)[K], const float* gamma, float* r) const {
        if (!gamma) return 1;
        float squares = 0;
#pragma unroll
        for (int k = 0; k < K; k++)
            for (float value : x[k].v) squares += value * value;
        float reciprocal = 1 / sqrtf(sum(squares) / C + NORM_EPSILON);
        if (first == 0) *r = reciprocal;
        return reciprocal;
    }
    // z becomes gamma z r.
    __device__ void scale(Pack<float, N> (&z)[K], const float* gamma, float r) const {
#pragma unroll
        for (int k = 0; k < K; k++) {
            auto g = gains(gamma, k);
            for (int i = 0; i < N; i++) z[k][i] = g[i] * (z[k][i] * r);
        }
    }
    // From z, which is lost: r_out, r_in and u of a point; where the first two are there, u again with the same bits.
    __device__ void norms(const HighwayPoint& p, Pack<float, N> (&z)[K], int row, bool again = false) const {
        scale(z, p.gamma_out, again ? p.r_out_of(row) : rms_reciprocal(z, p.gamma_out, p.r_out + row));
        float r_in = again ? p.r_in_of(row) : rms_reciprocal(z, p.gamma_in, p.r_in + row);
        if (!p.u) return;
        scale(z, p.gamma_in, r_in);
        Pack<branch_t, N> u[K];
#pragma unroll
        for (int k = 0; k < K; k++)
            for (int i = 0; i < N; i++) u[k][i] = branch_t(z[k][i]);
        store(p.u + size_t(row) * C, u);
    }
};

// z_l = alpha x_l + f, from point l to point l+1, whose norms it makes too.  In BF16 12 bytes an element: z 4 and f 2
// in, z 4 and u 2 out.  to.z may be from.z.
template <int N, int K>
__global__ void highway_forward_kernel(HighwayPoint to, HighwayPoint from, const branch_t* f, float alpha, int rows,
                                       int C, int warps) {
    begin_kernel();
    RowLane<N, K> lane(C, warps);
    int row = lane.row;
    if (row >= rows) return;
    size_t at = size_t(row) * C;
    Pack<float, N> z[K];
    Pack<branch_t, N> branch[K];
    lane.load(z, from.z + at), lane.load(branch, f + at);
    lane.scale(z, from.gamma_out, from.r_out_of(row));
#pragma unroll
    for (int k = 0; k < K; k++)
        for (int i = 0; i < N; i++) z[k][i] = alpha * z[k][i] + float(branch[k][i]);
    lane.store(to.z + at, z);
    lane.norms(to, z, row);
}

// r_out, r_in and u of a point whose z is there.  In BF16 6 bytes an element.  Where x (rows,C) is given, for dumps and
// probes, x of a point that has its norms, and nothing else.
template <int N, int K>
__global__ void highway_norms_kernel(HighwayPoint p, float* x, int rows, int C, int warps) {
    begin_kernel();
    RowLane<N, K> lane(C, warps);
    int row = lane.row;
    if (row >= rows) return;
    Pack<float, N> z[K];
    lane.load(z, p.z + size_t(row) * C);
    if (x) lane.scale(z, p.gamma_out, p.r_out_of(row)), lane.store(x + size_t(row) * C, z);
    else lane.norms(p, z, row);
}

struct HighwayGradients {
    float* dz;                      // (rows,C) comes as dz_l, goes as dz_{l-1}; at point L nothing comes
    const branch_t* du;             // (rows,C) du_l
    branch_t* df;                   // (rows,C) dF_{l-1} = dz_{l-1} for the branch before; null: not wanted
    float* dx;                      // (rows,C) dx_l; null: not wanted
    float *dgamma_out, *dgamma_in;  // (C), added to; null as the gains are
};

// Backward at point l, which ends sub-layer l's backward and begins sub-layer l-1's; z is z_{l-1}:
//     dx_l     = alpha_l dz_l + (norm_in ? RMSNorm_backward(du_l, x_l) : du_l)
//     dz_{l-1} = norm_out ? RMSNorm_backward(dx_l, z_{l-1}) : dx_l
//     dF_{l-1} = dz_{l-1}
//     RMSNorm_backward(dy, x): xh = x r;  dg += sum_rows dy xh;  dx = r (g dy - xh mean(g dy xh))
// The line of dz_{l-1} is where Post-LN dies: with gains of 1, and F of x's size and orthogonal to it, it divides the
// shortcut by rms(z), about sqrt(2), L times over: 2^(-L/2) (the paper's eq. 14-15). KEEL's alpha = L makes rms(z) =
// sqrt(alpha^2 + 1), and the alpha in the line of dx_l takes back what was divided: (alpha/sqrt(alpha^2 + 1))^L -> 1
// (eq. 18-19).
//
// In BF16 16 bytes an element: du 2, dz 4, z 4 in, dz 4, df 2 out; 6 more where u of the point before is made again
// (before.u not null), 4 more where dx is wanted. The gains' gradients of a lane's columns are in registers, too, then
// in shared memory (RowShared and 2C floats for each row that a block has at a time).  partial (blocks,2,C)
template <int N, int K>
__global__ void highway_backward_kernel(HighwayPoint p, HighwayPoint before, HighwayGradients g, float alpha,
                                        bool last_point, int rows, int C, int warps, float* partial) {
    begin_kernel();
    RowLane<N, K> lane(C, warps);
    Pack<float, N> sum_out[K]{}, sum_in[K]{};
    for (int row = lane.row; row < rows; row += lane.rows_away) {
        size_t at = size_t(row) * C;
        Pack<float, N> z[K], d[K], dx[K]{};
        Pack<branch_t, N> du[K], df[K];
        lane.load(z, p.z + at), lane.load(du, g.du + at);
        if (!last_point) lane.load(dx, g.dz + at);
        float r_out = p.r_out_of(row), r_in = p.r_in_of(row), mean_in = 0, mean_out = 0;
#pragma unroll
        for (int k = 0; k < K; k++) {
            auto gamma_out = lane.gains(p.gamma_out, k), gamma_in = lane.gains(p.gamma_in, k);
            for (int i = 0; i < N; i++) {
                float dui = float(du[k][i]), xh = gamma_out[i] * (z[k][i] * r_out) * r_in;
                sum_in[k][i] += dui * xh;
                d[k][i] = gamma_in[i] * dui;
                mean_in += d[k][i] * xh;
            }
        }
        mean_in = p.gamma_in ? lane.sum(mean_in) / C : 0;
#pragma unroll
        for (int k = 0; k < K; k++) {
            auto gamma_out = lane.gains(p.gamma_out, k);
            for (int i = 0; i < N; i++) {
                float zh = z[k][i] * r_out, xh = gamma_out[i] * zh * r_in;
                dx[k][i] = r_in * (d[k][i] - xh * mean_in) + alpha * dx[k][i];
                sum_out[k][i] += dx[k][i] * zh;
                d[k][i] = gamma_out[i] * dx[k][i];
                mean_out += d[k][i] * zh;
            }
        }
        mean_out = p.gamma_out ? lane.sum(mean_out) / C : 0;
        if (g.dx) lane.store(g.dx + at, dx);
#pragma unroll
        for (int k = 0; k < K; k++)
            for (int i = 0; i < N; i++) {
                d[k][i] = r_out * (d[k][i] - z[k][i] * r_out * mean_out);
                df[k][i] = branch_t(d[k][i]);
            }
        lane.store(g.dz + at, d);
        if (g.df) lane.store(g.df + at, df);
        if (before.u) lane.load(z, before.z + at), lane.norms(before, z, row, true);
    }

    if (!p.gamma_out && !p.gamma_in) return;
    float* sums = shared<RowShared>().gains;  // (rows a block,2,C)
    int rows_a_block = int(blockDim.x) / WARP / warps;
    float* own = sums + 2 * C * (int(threadIdx.x) / WARP / warps);
    lane.store(own, sum_out), lane.store(own + C, sum_in);
    __syncthreads();
    for (int i = threadIdx.x * N; i < 2 * C; i += blockDim.x * N) {
        auto sum = load<N>(sums + i);
        for (int r = 1; r < rows_a_block; r++)
            for (int j = 0; j < N; j++) sum[j] += sums[2 * C * r + i + j];
        store<N>(partial + size_t(blockIdx.x) * 2 * C + i, sum);
    }
}

// use(N, K, warps a row, warps a block) with the kernels' numbers for rows of C columns, of which N and K are constants
template <class Use>
void with_rows(int C, Use use) {
    unsigned warps = unsigned(ceil_div(size_t(C), size_t(row_columns(C))));
    size_t places = ceil_div(size_t(C), size_t(WARP) * 4 * warps);
    auto with = [&](auto N, auto K) { use(N, K, warps, warps > 1 ? warps : K() <= 2 ? 8 : 4); };
    std::integral_constant<int, 4> four;
    if (C % 4) with(std::integral_constant<int, 1>(), std::integral_constant<int, 16>());
    else if (places <= 2) with(four, std::integral_constant<int, 2>());
    else if (places <= 4) with(four, four);
    else if (places <= 6) with(four, std::integral_constant<int, 6>());
    else with(four, std::integral_constant<int, 8>());
}
void highway_forward(Device& device, const HighwayPoint& to, const HighwayPoint& from, const branch_t* f, float alpha,
                     size_t rows, int C) {
    with_rows(C, [&](auto N, auto K, unsigned warps, unsigned block) {
        launch(highway_forward_kernel<N(), K()>, ceil_div(rows, block / warps), block * WARP, sizeof(RowShared),
               device.stream, to, from, f, alpha, int(rows), C, int(warps));
    });
}
void highway_norms(Device& device, const HighwayPoint& p, size_t rows, int C, float* x = nullptr) {
    with_rows(C, [&](auto N, auto K, unsigned warps, unsigned block) {
        launch(highway_norms_kernel<N(), K()>, ceil_div(rows, block / warps), block * WARP, sizeof(RowShared),
               device.stream, p, x, int(rows), C, int(warps));
    });
}
void highway_backward(Device& device, const HighwayPoint& p, const HighwayPoint& before, const HighwayGradients& g,
                      float alpha, bool last_point, size_t rows, int C, float* partial) {
    with_rows(C, [&](auto N, auto K, unsigned warps, unsigned block) {
        sum_over_rows<float>(device.stream, {C, {g.dgamma_out, g.dgamma_in}}, partial, 2 * size_t(C),
                             highway_backward_kernel<N(), K()>, rows, block / warps, block * WARP,
                             sizeof(RowShared) + block / warps * 2 * size_t(C) * 4, p, before, g, alpha, last_point,
                             int(rows), C, int(warps));
    });
}

// ----- HybridNorm's RMSNorm of every head's q, k and v: qkv (rows,3,H,D), a gain (D) for each of the three

struct QkvGains {
    const float* gamma[3];
    float* dgamma[3];
};

// A warp a head.  4 bytes an element in BF16
__global__ void qkv_norm_forward_kernel(branch_t* out, const branch_t* qkv, QkvGains g, int rows, int H, int D) {
    begin_kernel();
    size_t head = size_t(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;
    int lane = threadIdx.x % WARP, which = int(head / H % 3);
    if (head >= size_t(rows) * 3 * H) return;
    const branch_t* x = qkv + head * D;
    float sum = 0;
    for (int d = lane; d < D; d += WARP) sum += float(x[d]) * float(x[d]);
    float r = 1 / sqrtf(warp_sum(sum) / D + NORM_EPSILON);
    for (int d = lane; d < D; d += WARP) out[head * D + d] = branch_t(g.gamma[which][d] * (float(x[d]) * r));
}

// RMSNorm_backward as in the highway, x being a head's D numbers. In place: dqkv comes as the gradient of the normed q,
// k, v. A warp a row, all heads. Shared: 3 D floats a warp. partial (blocks,3,D). 6 bytes an element in BF16
__global__ void qkv_norm_backward_kernel(branch_t* dqkv, const branch_t* qkv, QkvGains g, int rows, int H, int D,
                                         float* partial) {
    begin_kernel();
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    float* dgamma = &shared<float>() + size_t(warp) * 3 * D;
    for (int which = 0; which < 3; which++)
        for (int d = lane; d < D; d += WARP) dgamma[which * D + d] = 0;
    for (int row = blockIdx.x * warps + warp; row < rows; row += gridDim.x * warps)
        for (int which = 0; which < 3; which++)
            for (int h = 0; h < H; h++) {
                size_t at = ((size_t(row) * 3 + which) * H + h) * D;
                const float* gamma = g.gamma[which];
                float sum = 0, mean = 0;
                for (int d = lane; d < D; d += WARP) sum += float(qkv[at + d]) * float(qkv[at + d]);
                float r = 1 / sqrtf(warp_sum(sum) / D + NORM_EPSILON);
                for (int d = lane; d < D; d += WARP) {
                    float dy = float(dqkv[at + d]), xh = float(qkv[at + d]) * r;
                    dgamma[which * D + d] += dy * xh, mean += gamma[d] * dy * xh;
                }
                mean = warp_sum(mean) / D;
                for (int d = lane; d < D; d += WARP) {
                    float dy = float(dqkv[at + d]), xh = float(qkv[at + d]) * r;
                    dqkv[at + d] = branch_t(r * (gamma[d] * dy - xh * mean));
                }
            }
    __syncthreads();
    for (int i = threadIdx.x; i < 3 * D; i += blockDim.x) {
        float sum = 0;
        for (int w = 0; w < warps; w++) sum += (&shared<float>())[size_t(w) * 3 * D + i];
        partial[size_t(blockIdx.x) * 3 * D + i] = sum;
    }
}

void qkv_norm_forward(Device& device, branch_t* out, const branch_t* qkv, const QkvGains& g, size_t rows, int H,
                      int D) {
    launch_threads(qkv_norm_forward_kernel, rows * 3 * size_t(H) * WARP, device.stream, out, qkv, g, int(rows), H, D);
}
void qkv_norm_backward(Device& device, branch_t* dqkv, const branch_t* qkv, const QkvGains& g, size_t rows, int H,
                       int D, float* partial) {
    // 8, or fewer where two blocks would not fit into a multiprocessor of Hopper
    unsigned warps = unsigned(std::clamp(std::min(112 << 10, shared_limit()) / (3 * 4 * D), 1, 8));
    sum_over_rows<float>(device.stream, {D, {g.dgamma[0], g.dgamma[1], g.dgamma[2]}}, partial, 3 * size_t(D),
                         qkv_norm_backward_kernel, rows, warps, warps * WARP, warps * size_t(D) * 3 * 4, dqkv, qkv, g,
                         int(rows), H, D);
}

// ----- Attention
//
// Causal, y = softmax(q k^T / sqrt(D)) v for every head, D = C / H: attention_forward makes y (B,Tq,C) and lse (B,H,Tq)
// from qkv (B,T,3C), attention_backward dqkv (B,T,3C) from dy, y (B,T,C), qkv and lse. Queries are the last Tq = T -
// first positions of each sequence, keys and values all T (with a KV cache only the new positions ask). In the kernels
// `head` is b * H + h. (The CPU trainer's lse is (rows,H).)
//
// Tiles of scores, never (T,T): a row's largest score m and the sum of exp(s - m) are kept while the tiles of keys
// pass, and what was summed under an older, smaller m is scaled down (Milakov and Gimelshein 2018; Dao et al. 2022).
// lse = m + log(sum) is all that the backward needs: p = exp(s - lse). With s = q k^T / sqrt(D):
//     dv = p^T dy,   dp = dy v^T,   ds = p (dp - sum_j p dp),   dq = ds k / sqrt(D),   dk = ds^T q / sqrt(D)
// and sum_j p_ij dp_ij = dy_i . y_i = delta_i (B,H,T), made first. dq is a sum over keys, dk and dv over queries: two
// kinds of blocks, so that no sum crosses blocks (7 products of tiles instead of 5, as the scores are made twice, and
// the same bits always; on Hopper, below, 5, and dq a sum over blocks in a fixed order). Half of the scores are masked:
// forward 2 T^2 D operations a head, backward 7 T^2 D, on Hopper 5.
struct AttentionShape {
    int T, C, H, first;
    __host__ __device__ int queries() const { return T - first; }
};
inline bool by_wgmma(const Device& device, int D) { return device.wgmma && (D == 64 || D == 128); }

#ifdef KEEL_FP32
// Without tensor cores, for any D: a thread has a row, and meets 16 rows of the other side at a time. These are the
// same for a warp's threads, whose loads of them are one.
constexpr int PLAIN_ROWS = 16;
struct HeadRows {  // q, k, v or dy (T,D) of a head
    const float* first;
    size_t stride;
    int T, D;
    __device__ const float* operator[](int row) const { return first + size_t(min(row, T - 1)) * stride; }
};

// dots[j] = own . others[first + j]
__device__ void dot_rows(float (&dots)[PLAIN_ROWS], const float* own, const HeadRows& others, int first) {
    for (float& dot : dots) dot = 0;
    for (int d = 0; d < others.D; d++)
#pragma unroll
        for (int j = 0; j < PLAIN_ROWS; j++) dots[j] += own[d] * others[first + j][d];
}

// out (D) = shrink * out + sum_j weights[j] others[first + j]; with shrink 0 out holds nothing yet.
__device__ void add_rows(float* out, float shrink, const float (&weights)[PLAIN_ROWS], const HeadRows& others,
                         int first) {
    for (int d = 0; d < others.D; d++) {
        float sum = shrink == 0 ? 0 : shrink * out[d];
#pragma unroll
        for (int j = 0; j < PLAIN_ROWS; j++) sum += weights[j] * others[first + j][d];
        out[d] = sum;
    }
}

// A thread a query, n = B H Tq.
__global__ void attention_forward_kernel(float* y, float* lse, const float* qkv, size_t n, AttentionShape shape) {
    begin_kernel();
    int T = shape.T, C = shape.C, H = shape.H, D = C / H, Tq = shape.queries();
    size_t at = size_t(blockIdx.x) * blockDim.x + threadIdx.x, head = at / Tq, b = head / H, stride = 3 * size_t(C);
    if (at >= n) return;
    int row = int(at % Tq), query = shape.first + row;
    const float* of_head = qkv + b * T * stride + head % H * D;
    HeadRows q{of_head, stride, T, D}, k{of_head + C, stride, T, D}, v{of_head + 2 * C, stride, T, D};
    float *out = y + (b * Tq + row) * C + head % H * D, scale = 1 / sqrtf(float(D)), m = -INFINITY, sum = 0;
    for (int k0 = 0; k0 <= query; k0 += PLAIN_ROWS) {
        float p[PLAIN_ROWS], before = m;
        dot_rows(p, q[query], k, k0);
#pragma unroll
        for (int j = 0; j < PLAIN_ROWS; j++) p[j] = k0 + j <= query ? scale * p[j] : -INFINITY, m = fmaxf(m, p[j]);
        float shrink = expf(before - m);
        sum *= shrink;
#pragma unroll
        for (float& weight : p) sum += weight = expf(weight - m);
        add_rows(out, shrink, p, v, k0);
    }
    for (int d = 0; d < D; d++) out[d] /= sum;
    lse[at] = m + logf(sum);
}

// A thread a query, which meets the keys up to it, for delta and dq; or a key, which meets the queries from it on, for
// dk and dv: the same loop, with the two sides in each other's place. n = B H T
__global__ void attention_backward_kernel(float* dqkv, float* delta, const float* dy, const float* y, const float* qkv,
                                          const float* lse, size_t n, AttentionShape shape, bool of_queries) {
    begin_kernel();
    int T = shape.T, C = shape.C, H = shape.H, D = C / H;
    size_t at = size_t(blockIdx.x) * blockDim.x + threadIdx.x, head = at / T, b = head / H, stride = 3 * size_t(C);
    if (at >= n) return;
    int own = int(at % T), first = of_queries ? 0 : own / PLAIN_ROWS * PLAIN_ROWS, end = of_queries ? own + 1 : T;
    size_t in_qkv = b * T * stride + head % H * D, in_y = b * T * C + head % H * D;
    HeadRows q{qkv + in_qkv, stride, T, D}, k{q.first + C, stride, T, D}, v{k.first + C, stride, T, D},
        dout{dy + in_y, size_t(C), T, D}, out{y + in_y, size_t(C), T, D};
    HeadRows left = of_queries ? k : q, right = of_queries ? v : dout;  // of the other side
    float *dq = dqkv + in_qkv + own * stride, *dk = dq + C, *dv = dk + C, scale = 1 / sqrtf(float(D)), sum = 0;
    for (int d = 0; of_queries && d < D; d++) sum += dout[own][d] * out[own][d];
    if (of_queries) delta[at] = sum;
    for (int other0 = first; other0 < end; other0 += PLAIN_ROWS) {
        float p[PLAIN_ROWS], ds[PLAIN_ROWS], kept = other0 > first ? 1 : 0;
        dot_rows(p, of_queries ? q[own] : k[own], left, other0);
        dot_rows(ds, of_queries ? dout[own] : v[own], right, other0);  // dp
#pragma unroll
        for (int j = 0; j < PLAIN_ROWS; j++) {
            int query = of_queries ? own : other0 + j, key = of_queries ? other0 + j : own;
            bool visible = key <= query && query < T;
            p[j] = visible ? expf(scale * p[j] - lse[head * T + query]) : 0;
            ds[j] = visible ? scale * p[j] * (ds[j] - delta[head * T + query]) : 0;
        }
        add_rows(of_queries ? dq : dk, kept, ds, left, other0);
        if (!of_queries) add_rows(dv, kept, p, right, other0);
    }
}

void attention_forward(Device& device, float* y, float* lse, const float* qkv, int B, int T, int C, int H, int first) {
    size_t n = size_t(B) * size_t(H) * size_t(T - first);
    launch_threads(attention_forward_kernel, n, device.stream, y, lse, qkv, n, AttentionShape{T, C, H, first});
}
inline size_t attention_scratch(int, int, int, int) { return 0; }
void attention_backward(Device& device, float* dqkv, float* delta, const float* dy, const float* qkv, const float* y,
                        const float* lse, int B, int T, int C, int H, float*) {
    size_t n = size_t(B) * size_t(H) * size_t(T);
    for (bool of_queries : {true, false})  // delta, which the second reads
        launch_threads(attention_backward_kernel, n, device.stream, dqkv, delta, dy, y, qkv, lse, n,
                       AttentionShape{T, C, H, 0}, of_queries);
}
#else
// On tensor cores. A warp has M tiles of 16 rows, a block 4 warps, and walks over N rows of the other side at a time,
// the next of them on their way (cp.async) while these are at work. Scores stay in registers: as d of one product they
// are a of the next. M = 2: what a warp reads from shared memory serves two products, or shared memory would be the
// bound. Where a warp's sums and scores would not fit into 255 registers, M and N are less.
constexpr int ATT_WARPS = 4;
template <int D>
struct AttentionTiles {
    static constexpr int FORWARD_M = 2, FORWARD_N = D == 32 || D == 64 ? 64 : 32;
    static constexpr int BACKWARD_M = D == 128 ? 1 : 2, KV_N = D == 64 ? 16 : 32;
    static constexpr int Q_N = D == 64 ? 32 : 64;
    static constexpr int KV_STAGE = D == 128 ? 32 : 64;  // queries that are copied at a time
};
constexpr int att_rows(int M) { return 16 * M * ATT_WARPS; }  // of a block

// A tile (rows,D) in shared memory: where the 8 numbers of `chunk` in `row` are. Within a row chunks change places, so
// that the 8 rows that ldmatrix reads at once lie in different banks: 8 chunks of 16 bytes pass over all 32 banks.
template <int D>
__device__ __forceinline__ int tile_at(int row, int chunk) {
    constexpr int chunks = D / 8 < 8 ? D / 8 : 8, rows_a_pass = 8 / chunks;
    return row * D + (chunk ^ (row / rows_a_pass % chunks)) * 8;
}

// Starts the copy of rows [first, first + ROWS) to a tile by ATT_WARPS warps; rows from `end` on are zero.
template <int ROWS, int D>
__device__ __forceinline__ void load_tile(branch_t* tile, const branch_t* from, size_t stride, int first, int end) {
    for (int i = threadIdx.x; i < ROWS * (D / 8); i += ATT_WARPS * WARP) {
        int row = i / (D / 8), chunk = i % (D / 8);
        bool valid = first + row < end;
        cp_async_16(tile + tile_at<D>(row, chunk), from + size_t(valid ? first + row : 0) * stride + chunk * 8, valid);
    }
}

// Operands of mma_16x8x16 from a tile. a: rows [row, row+16), channels [16k, 16k+16) of it. b of two products side by
// side: b[0], b[1] for n = 0..7 and b[2], b[3] for n = 8..15. rows: n runs over the tile's rows, k over its channels;
// columns: the other way.
template <int D>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const branch_t* tile, int row, int k, int lane) {
    ldmatrix_x4(a, tile + tile_at<D>(row + lane % 16, 2 * k + lane / 16));
}
template <int D>
__device__ __forceinline__ void load_b_rows(uint32_t (&b)[4], const branch_t* tile, int row, int k, int lane) {
    ldmatrix_x4(b, tile + tile_at<D>(row + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
}
template <int D>
__device__ __forceinline__ void load_b_columns(uint32_t (&b)[4], const branch_t* tile, int row, int n, int lane) {
    ldmatrix_x4_trans(b, tile + tile_at<D>(row + lane % 16, 2 * n + lane / 16));
}

__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
}

// A warp's numbers (16 M, columns) as mma_16x8x16 leaves them: [m][n] is the tile of rows 16m and columns 8n; of it a
// lane holds, with g = lane / 4 and t = lane % 4, [0..1] = (g, 2t..2t+1) and [2..3] = (g+8, 2t..2t+1).
template <int M, int COLUMNS>
struct WarpTile {
    float v[M][COLUMNS / 8][4];
    __device__ __forceinline__ void zero() {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; n++) v[m][n][0] = v[m][n][1] = v[m][n][2] = v[m][n][3] = 0;
    }
    // action(value, m, half, column, others' values...) for each number of the lane: its row is 16 m + 8 half + g
    template <class Action, class... Others>
    __device__ __forceinline__ void each(int lane, Action action, const Others&... others) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    action(v[m][n][i], m, i / 2, n * 8 + lane % 4 * 2 + i % 2, others.v[m][n][i]...);
    }
};

// d (16 M, N) = a_tile[row .. row + 16 M) (16 M, D) b_tile[0..N) (N,D)^T
template <int M, int N, int D>
__device__ __forceinline__ void tile_product(WarpTile<M, N>& d, const branch_t* a_tile, int row, const branch_t* b_tile,
                                             int lane) {
    d.zero();
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) load_a<D>(a[m], a_tile, row + 16 * m, k, lane);
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
            uint32_t b[4];
            load_b_rows<D>(b, b_tile, 16 * n, k, lane);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_16x8x16(d.v[m][2 * n], a[m], b[0], b[1]);
                mma_16x8x16(d.v[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// sum (16 M, D) += s (16 M, N) tile[0..N) (N,D), s as a product left it
template <int M, int N, int D>
__device__ __forceinline__ void add_tile_product(WarpTile<M, D>& sum, const WarpTile<M, N>& s, const branch_t* tile,
                                                 int lane) {
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) {
            const auto &left = s.v[m][2 * k], &right = s.v[m][2 * k + 1];
            a[m][0] = pack_pair(left[0], left[1]), a[m][1] = pack_pair(left[2], left[3]);
            a[m][2] = pack_pair(right[0], right[1]), a[m][3] = pack_pair(right[2], right[3]);
        }
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            uint32_t b[4];
            load_b_columns<D>(b, tile, 16 * k, n, lane);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_16x8x16(sum.v[m][2 * n], a[m], b[0], b[1]);
                mma_16x8x16(sum.v[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// A warp's rows from `row` on, times a factor each, to memory; rows from `end` on are left out.
template <int M, int D, class Factor>
__device__ __forceinline__ void store_rows(branch_t* out, size_t stride, int row, int end, const WarpTile<M, D>& d,
                                           int lane, Factor factor) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int r = row + 16 * m + 8 * half + lane / 4;
            if (r >= end) continue;
#pragma unroll
            for (int n = 0; n < D / 8; n++)
                *as_vector<uint32_t>(out + size_t(r) * stride + n * 8 + lane % 4 * 2) =
                    pack_pair(factor(m, half) * d.v[m][n][2 * half], factor(m, half) * d.v[m][n][2 * half + 1]);
        }
}

// Blocks for the tiles of B * H heads: x, a head of a group; y, a tile, and in the backward its kind; z, a group. A
// block that meets few tiles of the other side ends early, so of a group the longest tiles come first, or a few of them
// would end alone. A group is as large a part of the heads as keeps its q, k, v and dy in the L2: 16 MiB. (The backward
// on Hopper has one block a multiprocessor, and dq's sums in the L2 too: half as many.)
constexpr int ATT_GROUP =
    512;  // blocks: twice what a Hopper holds of mma.sync's, two a multiprocessor (three at D = 16)
inline Grid attention_grid(size_t heads, size_t tiles, size_t kinds, size_t blocks = ATT_GROUP) {
    size_t group = std::clamp<size_t>(blocks / (kinds * tiles), 1, heads);
    while (heads % group) group--;
    return {group, kinds * tiles, heads / group};
}
__device__ __forceinline__ unsigned attention_head() { return blockIdx.z * gridDim.x + blockIdx.x; }  // of a block

constexpr float LN_2 = 0.69314718055994531f;

// The running softmax of a warp's rows: row 16 m + 8 half + g has its largest score so far, the sum of exp2(scale score
// - scale largest) over this lane's columns, and what the last tile has shrunk the earlier ones by.
template <int M>
struct OnlineSoftmax {
    float largest[M][2], sum[M][2], shrinks[M][2];
    __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
        for (int m = 0; m < M; m++) largest[m][0] = largest[m][1] = -INFINITY, sum[m][0] = sum[m][1] = 0;
    }
    // The next tile's scores become weights.
    template <int N>
    __device__ __forceinline__ void weigh(WarpTile<M, N>& p, float scale) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float most = largest[m][half], added = 0;
#pragma unroll
                for (int n = 0; n < N / 8; n++) most = fmaxf(most, fmaxf(p.v[m][n][2 * half], p.v[m][n][2 * half + 1]));
                most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));  // the four lanes of a row
                most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
                float shift = scale * most;
                shrinks[m][half] = fast_exp2(scale * (largest[m][half] - most));  // exactly 1 where the largest stays
                largest[m][half] = most;
#pragma unroll
                for (int n = 0; n < N / 8; n++)
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; i++)
                        added += p.v[m][n][i] = fast_exp2(scale * p.v[m][n][i] - shift);
                sum[m][half] = sum[m][half] * shrinks[m][half] + added;
            }
    }
    template <int D>
    __device__ __forceinline__ void shrink(WarpTile<M, D>& out) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < D / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) out.v[m][n][i] *= shrinks[m][i / 2];
    }
    // y and lse of the warp's rows, from query warp_q0 on
    template <int D>
    __device__ __forceinline__ void store(branch_t* y, float* lse, const WarpTile<M, D>& out,
                                          const AttentionShape& shape, unsigned head, int warp_q0, int lane,
                                          float scale) {
        int T = shape.T, C = shape.C, H = shape.H, Tq = shape.queries();
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                sum[m][half] += __shfl_xor_sync(ALL_LANES, sum[m][half], 1);
                sum[m][half] += __shfl_xor_sync(ALL_LANES, sum[m][half], 2);
                int query = warp_q0 + 16 * m + 8 * half + lane / 4;
                if (lane % 4 == 0 && query < T)
                    lse[size_t(head) * Tq + query - shape.first] =
                        LN_2 * (scale * largest[m][half]) + logf(sum[m][half]);
            }
        store_rows(y + size_t(head / H) * Tq * C + head % H * D, C, warp_q0 - shape.first, Tq, out, lane,
                   [&](int m, int half) { return 1 / sum[m][half]; });
    }
};

template <int D, int ROWS, int N>
struct AttentionForwardShared {
    branch_t q[ROWS * D], k[2][N * D], v[2][N * D];
};

template <int D, int M, int N>
__global__ void __launch_bounds__(ATT_WARPS* WARP)
    attention_forward_kernel(branch_t* y, float* lse, const branch_t* qkv, AttentionShape shape) {
    begin_kernel();
    constexpr int ROWS = att_rows(M);
    auto& s = shared<AttentionForwardShared<D, ROWS, N>>();
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, T = shape.T, C = shape.C, H = shape.H;
    unsigned head = attention_head();
    int q0 = shape.first + int(gridDim.y - 1 - blockIdx.y) * ROWS, warp_q0 = q0 + warp * 16 * M;
    size_t b = head / H, stride = 3 * size_t(C);
    const branch_t *q = qkv + b * T * stride + head % H * D, *k = q + C, *v = k + C;
    int end = min(q0 + ROWS, T);             // of the keys that any query here sees
    float scale = LOG2_E / sqrtf(float(D));  // scores in units of log 2

    load_tile<ROWS, D>(s.q, q, stride, q0, T);
    load_tile<N, D>(s.k[0], k, stride, 0, end);
    load_tile<N, D>(s.v[0], v, stride, 0, end);
    cp_async_commit();
    WarpTile<M, D> out;
    out.zero();
    OnlineSoftmax<M> softmax;
    for (int k0 = 0; k0 < end; k0 += N) {
        int now = k0 / N % 2;
        if (k0 + N < end) {
            load_tile<N, D>(s.k[1 - now], k, stride, k0 + N, end);
            load_tile<N, D>(s.v[1 - now], v, stride, k0 + N, end);
        }
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        if (k0 < warp_q0 + 16 * M && warp_q0 < T) {  // some query of this warp sees some of these keys
            WarpTile<M, N> p;
            tile_product<M, N, D>(p, s.q, warp * 16 * M, s.k[now], lane);
            if (k0 + N > warp_q0)  // some keys are later than some queries
                p.each(lane, [&](float& score, int m, int half, int column) {
                    if (k0 + column > warp_q0 + 16 * m + 8 * half + lane / 4) score = -INFINITY;
                });
            softmax.weigh(p, scale);
            softmax.shrink(out);
            add_tile_product<M, N, D>(out, p, s.v[now], lane);
        }
        __syncthreads();  // before the tiles are overwritten
    }
    cp_async_wait<0>();
    softmax.store(y, lse, out, shape, head, warp_q0, lane, scale);
}

// delta (B,H,T) = sum_d dy y, n = B T C numbers: D / 8 lanes share a head's row, 8 channels a lane; and zeros to the
// backward's counters.  4 bytes an element
template <int D>
__global__ void attention_delta_kernel(float* delta, const branch_t* dy, const branch_t* y, size_t n,
                                       unsigned* counters, size_t count, AttentionShape shape) {
    begin_kernel();
    size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8, head = at / D, row = head / shape.H, T = shape.T;
    for (size_t i = at / 8; i < count; i += size_t(gridDim.x) * blockDim.x) counters[i] = 0;
    float sum = 0;
    if (at < n) {
        auto dys = load<8>(dy + at), ys = load<8>(y + at);
        for (int i = 0; i < 8; i++) sum += float(dys[i]) * float(ys[i]);
    }
    for (int distance = D / 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, distance);
    if (at < n && at % D == 0) delta[(row / T * shape.H + head % shape.H) * T + row % T] = sum;
}

template <int D, int ROWS, int N>
struct AttentionQShared {
    branch_t q[ROWS * D], dy[ROWS * D], k[2][N * D], v[2][N * D];
};

// dq of the queries from q0 on: a warp has queries, and meets the keys up to them.
template <int D, int M, int N>
__device__ __forceinline__ void attention_dq(branch_t* dqkv, const branch_t* dy, const branch_t* qkv, const float* lse,
                                             const float* delta, const AttentionShape& shape, int q0) {
    constexpr int ROWS = att_rows(M);
    auto& s = shared<AttentionQShared<D, ROWS, N>>();
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, T = shape.T, C = shape.C, H = shape.H;
    int end = min(q0 + ROWS, T), warp_q0 = q0 + warp * 16 * M;
    unsigned head = attention_head();
    size_t b = head / H, stride = 3 * size_t(C), at = b * T * stride + head % H * D;
    const branch_t *q = qkv + at, *k = q + C, *v = k + C, *dout = dy + b * T * C + head % H * D;
    float scale = LOG2_E / sqrtf(float(D)), row_lse[M][2], row_delta[M][2];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int query = warp_q0 + 16 * m + 8 * half + lane / 4;
            row_lse[m][half] = query < T ? LOG2_E * lse[size_t(head) * T + query] : 0;
            row_delta[m][half] = query < T ? delta[size_t(head) * T + query] : 0;
        }

    load_tile<ROWS, D>(s.q, q, stride, q0, T);
    load_tile<ROWS, D>(s.dy, dout, C, q0, T);
    load_tile<N, D>(s.k[0], k, stride, 0, end);
    load_tile<N, D>(s.v[0], v, stride, 0, end);
    cp_async_commit();
    WarpTile<M, D> dq;
    dq.zero();
    for (int k0 = 0; k0 < end; k0 += N) {
        int now = k0 / N % 2;
        if (k0 + N < end) {
            load_tile<N, D>(s.k[1 - now], k, stride, k0 + N, end);
            load_tile<N, D>(s.v[1 - now], v, stride, k0 + N, end);
        }
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        if (k0 < warp_q0 + 16 * M && warp_q0 < T) {
            bool masked = k0 + N > warp_q0;
            WarpTile<M, N> p, ds;
            tile_product<M, N, D>(p, s.q, warp * 16 * M, s.k[now], lane);
            tile_product<M, N, D>(ds, s.dy, warp * 16 * M, s.v[now], lane);
            ds.each(lane, [&](float& value, int m, int half, int column, float score) {
                float probability = fast_exp2(scale * score - row_lse[m][half]);
                int query = warp_q0 + 16 * m + 8 * half + lane / 4;
                value = masked && k0 + column > query ? 0 : probability * (value - row_delta[m][half]);
            }, p);
            add_tile_product<M, N, D>(dq, ds, s.k[now], lane);
        }
        __syncthreads();
    }
    cp_async_wait<0>();
    store_rows(dqkv + at, stride, warp_q0, T, dq, lane, [&](int, int) { return scale * LN_2; });  // 1 / sqrt(D)
}

template <int D, int ROWS, int STAGE>
struct AttentionKvShared {
    branch_t k[ROWS * D], v[ROWS * D], q[2][STAGE * D], dy[2][STAGE * D];
    float lse[2][STAGE], delta[2][STAGE];
};

// dk and dv of the keys from k0 on: a warp has keys, and meets the queries from them on. Scores are (keys, queries).
template <int D, int M, int N, int STAGE>
__device__ __forceinline__ void attention_dk_dv(branch_t* dqkv, const branch_t* dy, const branch_t* qkv,
                                                const float* lse, const float* delta, const AttentionShape& shape,
                                                int k0) {
    constexpr int ROWS = att_rows(M);
    auto& s = shared<AttentionKvShared<D, ROWS, STAGE>>();
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, T = shape.T, C = shape.C, H = shape.H;
    int warp_k0 = k0 + warp * 16 * M;
    unsigned head = attention_head();
    size_t b = head / H, stride = 3 * size_t(C), at = b * T * stride + head % H * D;
    const branch_t *q = qkv + at, *k = q + C, *v = k + C, *dout = dy + b * T * C + head % H * D;
    float scale = LOG2_E / sqrtf(float(D));

    auto load_queries = [&](int q0, int buffer) {
        load_tile<STAGE, D>(s.q[buffer], q, stride, q0, T);
        load_tile<STAGE, D>(s.dy[buffer], dout, C, q0, T);
        for (int i = threadIdx.x; i < STAGE; i += ATT_WARPS * WARP) {
            s.lse[buffer][i] = q0 + i < T ? LOG2_E * lse[size_t(head) * T + q0 + i] : 0;
            s.delta[buffer][i] = q0 + i < T ? delta[size_t(head) * T + q0 + i] : 0;
        }
    };
    load_tile<ROWS, D>(s.k, k, stride, k0, T);
    load_tile<ROWS, D>(s.v, v, stride, k0, T);
    load_queries(k0, 0);
    cp_async_commit();
    WarpTile<M, D> dk, dv;
    dk.zero(), dv.zero();
    for (int stage = k0; stage < T; stage += STAGE) {
        int now = (stage - k0) / STAGE % 2;
        if (stage + STAGE < T) load_queries(stage + STAGE, 1 - now);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
#pragma unroll 1
        for (int first = 0; first < STAGE; first += N) {
            int q0 = stage + first;
            if (q0 + N <= warp_k0 || q0 >= T || warp_k0 >= T)
                continue;  // none of these queries sees a key of this warp
            bool masked = q0 < warp_k0 + 16 * M || q0 + N > T;
            const branch_t *q_tile = s.q[now] + first * D, *dy_tile = s.dy[now] + first * D;
            WarpTile<M, N> p, ds;
            tile_product<M, N, D>(p, s.k, warp * 16 * M, q_tile, lane);
            tile_product<M, N, D>(ds, s.v, warp * 16 * M, dy_tile, lane);
            p.each(lane, [&](float& score, int m, int half, int column) {
                score = fast_exp2(scale * score - s.lse[now][first + column]);
                if (masked && (q0 + column >= T || warp_k0 + 16 * m + 8 * half + lane / 4 > q0 + column)) score = 0;
            });
            add_tile_product<M, N, D>(dv, p, dy_tile, lane);
            ds.each(lane, [&](float& value, int, int, int column, float probability) {
                value = probability * (value - s.delta[now][first + column]);
            }, p);
            add_tile_product<M, N, D>(dk, ds, q_tile, lane);
        }
        __syncthreads();
    }
    cp_async_wait<0>();
    store_rows(dqkv + at + C, stride, warp_k0, T, dk, lane, [&](int, int) { return scale * LN_2; });  // 1 / sqrt(D)
    store_rows(dqkv + at + 2 * C, stride, warp_k0, T, dv, lane, [](int, int) { return 1.0f; });
}

// Both kinds of blocks in one launch: 32 heads of 1024 positions are 256 blocks of each kind, and a Hopper holds 264.
// Of equally long ones dk's and dv's come first, as a tile of theirs takes 1.3 to 1.6 times as long.
template <int D>
__global__ void __launch_bounds__(ATT_WARPS* WARP)
    attention_backward_kernel(branch_t* dqkv, const branch_t* dy, const branch_t* qkv, const float* lse,
                              const float* delta, AttentionShape shape) {
    begin_kernel();
    using Tiles = AttentionTiles<D>;
    constexpr int M = Tiles::BACKWARD_M, ROWS = att_rows(M);
    int tiles = int(gridDim.y / 2), longer = int(blockIdx.y / 2);  // longer: how many tiles of the kind take longer
    if (blockIdx.y % 2 == 0)
        attention_dk_dv<D, M, Tiles::KV_N, Tiles::KV_STAGE>(dqkv, dy, qkv, lse, delta, shape, longer * ROWS);
    else attention_dq<D, M, Tiles::Q_N>(dqkv, dy, qkv, lse, delta, shape, (tiles - 1 - longer) * ROWS);
}

// ----- Attention on Hopper: heads of 64 and 128 channels, by products of warpgroups
//
// The same formulas as above. A warpgroup has 64 rows, a warp 16 of them, and its numbers lie in its lanes as
// mma_16x8x16 leaves them. Tiles lie in shared memory as wgmma reads them: panels (ROWS,64), swizzled. Copies are
// cp.async's, a tile ahead (the forward's values at D = 128: in their own); each thread shows what it has copied to the
// tensor cores (fence_proxy_async), then a barrier to the others.
inline constexpr int WARPGROUP = 4 * WARP, PANEL = 64;

template <int ROWS>
__device__ __forceinline__ int panel_at(int row, int chunk) {
    return chunk / 8 * ROWS * PANEL + row * PANEL + (chunk % 8 ^ row % 8) * 8;
}
// As load_tile, to panels. The rows' addresses are made by adding: products would be kept in registers.
template <int ROWS, int D, int THREADS>
__device__ __forceinline__ void load_panels(branch_t* tile, const branch_t* from, unsigned stride, int first, int end) {
    constexpr int CHUNKS = D / 8, AT_ONCE = THREADS / CHUNKS;  // rows that all threads copy at a time
    static_assert(ROWS % AT_ONCE == 0 && AT_ONCE % 8 == 0);
    int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    const branch_t* source = from + size_t(first + row) * stride + chunk * 8;
    branch_t* to = tile + panel_at<ROWS>(row, chunk);
#pragma unroll
    for (int i = 0; i < ROWS; i += AT_ONCE, source += AT_ONCE * stride)
        cp_async_16(to + i * PANEL, source, first + row + i < end);
}
// The copies on their way but for the N newest groups are there, for the tensor cores too, and all threads have come.
template <int N = 0>
__device__ __forceinline__ void await_panels() {
    cp_async_wait<N>();
    fence_proxy_async();
    __syncthreads();
}

// wgmma's descriptor of panels: their address and, in the same units of 16 bytes, how far it is to the next panel and
// to the next 8 rows; bit 62 says 128-byte swizzle.
template <int ROWS>
__device__ __forceinline__ uint64_t panels(const branch_t* tile) {
    return (shared_address(tile) & 0x3FFFF) >> 4 | uint64_t(ROWS * 8) << 16 | uint64_t(64) << 32 | uint64_t(1) << 62;
}
// d (64,N) = a b^T, or += where `add`: panels a (64 of A_ROWS rows,K) and b (N,K), 16 columns at a time.
template <int K, int A_ROWS, int N>
__device__ __forceinline__ void multiply_rows(WarpTile<1, N>& d, uint64_t a, uint64_t b, bool add) {
#pragma unroll
    for (int k = 0; k < K / 16; k++)  // 32 bytes on; every fourth in the next panel
        wgmma<N, K_MAJOR, K_MAJOR>(d.v[0], a + k / 4 * A_ROWS * 8 + k % 4 * 2, b + k / 4 * N * 8 + k % 4 * 2,
                                   add || k > 0);
    wgmma_commit();
}
// d (64,N) += a b, a (64,K) in registers and panels b (K,N), 16 rows at a time.
inline constexpr int SIXTEEN_ROWS = 128;  // how far in a panel, in a descriptor's units
template <int N, int K16>
__device__ __forceinline__ void add_product(WarpTile<1, N>& d, const uint32_t (&a)[K16][4], uint64_t b) {
#pragma unroll
    for (int k = 0; k < K16; k++) wgmma<N, MN_MAJOR>(d.v[0], a[k], b + k * SIXTEEN_ROWS, true);
    wgmma_commit();
}
// Numbers of a product in BF16, as a of the next: a[k] is of columns 16 k to 16 k + 15.
template <int N>
__device__ __forceinline__ void pack(uint32_t (&a)[N / 16][4], const WarpTile<1, N>& s) {
#pragma unroll
    for (int k = 0; k < N / 16; k++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            a[k][i] = pack_pair(s.v[0][2 * k + i / 2][i % 2 * 2], s.v[0][2 * k + i / 2][i % 2 * 2 + 1]);
}

// A block is one warpgroup with 64 queries, and has a product, the softmax and a product of each tile of 64 keys one
// after the other. The tensor cores are kept at work by the other blocks of the multiprocessor, five (D = 128: three),
// which need no turns: nothing but its own copies ever holds one up. A second place for values is worth less than a
// third block: at D = 128 there is one, and a tile's values are copied beside its own first product and softmax.
template <int D>
struct HopperForward {
    static constexpr int N = 64, BLOCKS = D == 64 ? 5 : 3, VALUES = D == 64 ? 2 : 1;
    branch_t q[64 * D], k[2][N * D], v[VALUES][N * D];
};
template <int D>
__global__ void __launch_bounds__(WARPGROUP, HopperForward<D>::BLOCKS)
    attention_forward_hopper_kernel(branch_t* y, float* lse, const branch_t* qkv, AttentionShape shape) {
    begin_kernel();
#ifdef HOPPER_CODE
    constexpr int N = HopperForward<D>::N, VALUES = HopperForward<D>::VALUES;
    auto& s = shared<HopperForward<D>>();
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, T = shape.T, C = shape.C, H = shape.H;
    unsigned head = attention_head(), stride = 3 * unsigned(C);
    int q0 = shape.first + int(gridDim.y - 1 - blockIdx.y) * 64, warp_q0 = q0 + warp * 16;
    const branch_t *q = qkv + size_t(head / H) * T * stride + head % H * D, *k = q + C, *v = k + C;
    int end = min(q0 + 64, T);  // of the keys that any query here sees
    float scale = LOG2_E / sqrtf(float(D));
    WarpTile<1, N> scores;
    WarpTile<1, D> out;
    OnlineSoftmax<1> softmax;

    load_panels<64, D, WARPGROUP>(s.q, q, stride, q0, T);
    load_panels<N, D, WARPGROUP>(s.k[0], k, stride, 0, end);
    if (VALUES == 2) load_panels<N, D, WARPGROUP>(s.v[0], v, stride, 0, end);
    cp_async_commit();
    out.zero();
    for (int k0 = 0; k0 < end; k0 += N) {
        int now = k0 / N % 2;
        // This tile's keys have come, and all have done with the tile before: copies may take its places.
        await_panels();
        if (VALUES == 1) {
            load_panels<N, D, WARPGROUP>(s.v[0], v, stride, k0, end);
            cp_async_commit();
        }
        if (k0 + N < end) {
            load_panels<N, D, WARPGROUP>(s.k[1 - now], k, stride, k0 + N, end);
            if (VALUES == 2) load_panels<N, D, WARPGROUP>(s.v[(1 - now) % VALUES], v, stride, k0 + N, end);
        }
        cp_async_commit();
        wgmma_fence(scores.v[0]);
        multiply_rows<D, 64>(scores, panels<64>(s.q), panels<N>(s.k[now]), false);
        wgmma_wait<0>(scores.v[0]);
        if (k0 + N > warp_q0)  // some keys are later than some queries
            scores.each(lane, [&](float& score, int, int half, int column) {
                if (k0 + column > warp_q0 + 8 * half + lane / 4) score = -INFINITY;
            });
        softmax.weigh(scores, scale);
        if (__any_sync(ALL_LANES, softmax.shrinks[0][0] != 1 || softmax.shrinks[0][1] != 1)) softmax.shrink(out);
        uint32_t p[N / 16][4];
        pack(p, scores);
        if (VALUES == 1) await_panels<1>();  // its values
        wgmma_fence(out.v[0], p);
        add_product(out, p, panels<N>(s.v[now % VALUES]));
        wgmma_wait<0>(out.v[0], p);
    }
    softmax.store(y, lse, out, shape, head, warp_q0, lane, scale);
#else
    __trap();  // code for no Hopper
#endif
}

// A block is two warpgroups with 64 keys each of a tile of 128, and meets tiles of Q queries from the last one down to
// its keys. s, p, dp and ds are (keys, queries); a warpgroup has those of its 64 keys in registers. A tile, in order:
//     s = k q^T        p is made of it beside the next product
//     dp = v dy^T      added to -delta in ds's registers; times p it is ds
//     dv += p dy       beside it ds goes to shared memory; then a barrier, as dq needs that of both warpgroups
//     dq = ds^T k      over all 128 keys; each warpgroup makes half of dq
//     dk += ds q       beside it dq is added to its sum
// dq of a query tile is a sum over the blocks of its head, which they add up in the order of their keys: the first
// stores, the others add once the one before has said that it is done, the last writes dqkv. So dq has the same bits in
// whatever order blocks run, and as all begin with the last queries and go down at one pace, they hardly wait. A sum
// stays as it lies in the warps' lanes.
struct DqSums {
    float4* sums;     // (heads, query tiles, 8, threads)
    unsigned* added;  // (heads, query tiles): how many key tiles are in it; behind them the next ticket
};
template <int D>
struct HopperBackward {
    static constexpr int KEYS = 128, Q = D == 64 ? 128 : 64, THREADS = 2 * WARPGROUP;
    static constexpr size_t SUMS = Q * D;  // floats of a query tile's sum, as many for either D
    branch_t k[KEYS * D], v[KEYS * D], q[2][Q * D], dy[2][Q * D], ds[KEYS * Q];
    float lse[Q], delta[Q];
    unsigned ticket;
};
template <int D>
__global__ void __launch_bounds__(HopperBackward<D>::THREADS, 1)
    attention_backward_hopper_kernel(branch_t* dqkv, const branch_t* dy, const branch_t* qkv, const float* lse,
                                     const float* delta, DqSums dq_sums, AttentionShape shape) {
    begin_kernel();
#ifdef HOPPER_CODE
    using Block = HopperBackward<D>;
    constexpr int Q = Block::Q, KEYS = Block::KEYS, THREADS = Block::THREADS;
    auto& s = shared<Block>();
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = warp / 4, T = shape.T, C = shape.C, H = shape.H,
        query_tiles = (T + Q - 1) / Q;
    // Blocks take their work by tickets, in the order of attention_grid: one waits only for blocks that have begun.
    if (threadIdx.x == 0) s.ticket = atomicAdd(dq_sums.added + size_t(gridDim.x * gridDim.z) * query_tiles, 1u);
    __syncthreads();
    unsigned ticket = s.ticket, head = ticket / (gridDim.x * gridDim.y) * gridDim.x + ticket % gridDim.x,
             stride = 3 * unsigned(C);
    int key_tile = int(ticket / gridDim.x % gridDim.y), k0 = key_tile * KEYS, warp_k0 = k0 + warp * 16;
    size_t b = head / H, at = b * T * stride + head % H * D;
    const branch_t *q = qkv + at, *k = q + C, *v = k + C, *dout = dy + b * T * C + head % H * D;
    float scale = LOG2_E / sqrtf(float(D));

    float next_lse = 0, next_delta = 0;  // of one query of the next tile, in the first Q threads
    auto load_queries = [&](int tile, int buffer) {
        load_panels<Q, D, THREADS>(s.q[buffer], q, stride, tile * Q, T);
        load_panels<Q, D, THREADS>(s.dy[buffer], dout, C, tile * Q, T);
        cp_async_commit();
        int query = tile * Q + int(threadIdx.x);
        bool valid = threadIdx.x < Q && query < T;
        next_lse = valid ? lse[head * unsigned(T) + unsigned(query)] : 0;
        next_delta = valid ? delta[head * unsigned(T) + unsigned(query)] : 0;
    };
    auto store_numbers = [&] {  // once the loads have come, and nobody reads the ones before
        if (threadIdx.x < Q) s.lse[threadIdx.x] = LOG2_E * next_lse, s.delta[threadIdx.x] = next_delta;
    };
    auto sum_of = [&](int tile) { return head * unsigned(query_tiles) + unsigned(tile); };
    auto last_key_tile = [&](int tile) { return tile * Q / KEYS; };  // of those that its queries see

    load_panels<KEYS, D, THREADS>(s.k, k, stride, k0, T);
    load_panels<KEYS, D, THREADS>(s.v, v, stride, k0, T);
    load_queries(query_tiles - 1, 0);
    store_numbers();
    // The warpgroup's half of dq: where there are 128 queries of 64 channels, 64 queries; of 64 of 128, 64 channels.
    int dq_row = D == 64 ? group * 64 : 0, dq_column = D == 64 ? 0 : group * 64;
    WarpTile<1, D> dk, dv;
    dk.zero(), dv.zero();
    for (int tile = query_tiles - 1; tile >= k0 / Q; tile--) {
        int now = (query_tiles - 1 - tile) % 2, q0 = tile * Q;
        // This tile is there, its lse and delta too, and all have done with the tile before: q, dy and ds may be
        // overwritten.
        await_panels();
        if (tile > k0 / Q) load_queries(tile - 1, 1 - now);
        unsigned added = key_tile > 0 ? load_acquire(&dq_sums.added[sum_of(tile)]) : 0;
        uint64_t q_tile = panels<Q>(s.q[now]), dy_tile = panels<Q>(s.dy[now]);
        WarpTile<1, Q> p, ds;
        uint32_t p_bf16[Q / 16][4], ds_bf16[Q / 16][4];
#pragma unroll
        for (int n = 0; n < Q / 8; n++) {  // ds begins as -delta, to which the product adds dp
            auto row_delta = load<2>(&s.delta[n * 8 + lane % 4 * 2]);
#pragma unroll
            for (int i = 0; i < 4; i++) ds.v[0][n][i] = -row_delta[i % 2];
        }
        wgmma_fence(p.v[0], ds.v[0]);
        multiply_rows<D, KEYS>(p, panels<KEYS>(s.k + group * 64 * PANEL), q_tile, false);
        multiply_rows<D, KEYS>(ds, panels<KEYS>(s.v + group * 64 * PANEL), dy_tile, true);
        // All stores to the sum of the tile before were before that barrier: the next block may add. (The block's last
        // tile needs no word: its queries see no later keys.)
        if (threadIdx.x == 0 && tile < query_tiles - 1)
            store_release(&dq_sums.added[sum_of(tile + 1)], unsigned(key_tile) + 1);
        wgmma_wait<1>(p.v[0]);
#pragma unroll
        for (int n = 0; n < Q / 8; n++) {  // beside dp
            auto row_lse = load<2>(&s.lse[n * 8 + lane % 4 * 2]);
#pragma unroll
            for (int i = 0; i < 4; i++) p.v[0][n][i] = fast_exp2(scale * p.v[0][n][i] - row_lse[i % 2]);
        }
        if (q0 < warp_k0 + 16)  // some queries are before some keys
            p.each(lane, [&](float& probability, int, int half, int column) {
                if (warp_k0 + 8 * half + lane / 4 > q0 + column) probability = 0;
            });
        wgmma_wait<0>(ds.v[0]);
        ds.each(lane, [&](float& value, int, int, int, float probability) { value *= probability; }, p);
        pack(p_bf16, p);
        wgmma_fence(dv.v[0], p_bf16);
        add_product(dv, p_bf16, dy_tile);
        pack(ds_bf16, ds);
#pragma unroll
        for (int i = 0; i < Q / 16; i++)  // (keys, queries)
            stmatrix_x4(s.ds + panel_at<KEYS>(warp * 16 + lane % 16, 2 * i + lane / 16), ds_bf16[i]);
        fence_proxy_async();
        __syncthreads();  // ds is there, of both warpgroups, and lse and delta have been read
        WarpTile<1, 64> dq;
        wgmma_fence(dq.v[0], dk.v[0], ds_bf16);
        uint64_t ds_tile = panels<KEYS>(s.ds + dq_row * KEYS), k_tile = panels<KEYS>(s.k + dq_column * KEYS);
#pragma unroll
        for (int i = 0; i < KEYS / 16; i++)
            wgmma<64, MN_MAJOR, MN_MAJOR>(dq.v[0], ds_tile + i * SIXTEEN_ROWS, k_tile + i * SIXTEEN_ROWS, i > 0);
        wgmma_commit();
        add_product(dk, ds_bf16, q_tile);
        float4* sum = dq_sums.sums + size_t(sum_of(tile)) * (Block::SUMS / 4) + threadIdx.x;
        while (added < unsigned(key_tile)) {
            __nanosleep(32);
            added = load_acquire(&dq_sums.added[sum_of(tile)]);
        }
        wgmma_wait<1>(dq.v[0], dv.v[0], p_bf16);
        if (key_tile == last_key_tile(tile)) {
            if (key_tile > 0)
#pragma unroll
                for (int n = 0; n < 8; n++) {
                    float4 before = __ldcg(sum + n * THREADS);
                    dq.v[0][n][0] += before.x, dq.v[0][n][1] += before.y, dq.v[0][n][2] += before.z,
                        dq.v[0][n][3] += before.w;
                }
            store_rows(dqkv + at + dq_column, stride, q0 + dq_row + warp % 4 * 16, T, dq, lane,
                       [&](int, int) { return scale * LN_2; });  // 1 / sqrt(D)
        } else {
            auto own = [&](int n) { return make_float4(dq.v[0][n][0], dq.v[0][n][1], dq.v[0][n][2], dq.v[0][n][3]); };
            if (key_tile == 0)
#pragma unroll
                for (int n = 0; n < 8; n++) __stcg(sum + n * THREADS, own(n));
            else
#pragma unroll
                for (int n = 0; n < 8; n++) atomicAdd(sum + n * THREADS, own(n));
        }
        store_numbers();
        wgmma_wait<0>(dk.v[0], ds_bf16);
    }
    store_rows(dqkv + at + C, stride, warp_k0, T, dk, lane, [&](int, int) { return scale * LN_2; });  // 1 / sqrt(D)
    store_rows(dqkv + at + 2 * C, stride, warp_k0, T, dv, lane, [](int, int) { return 1.0f; });
#else
    __trap();
#endif
}

// The kernels of each D that the BF16 build has.
template <class Action>
void by_head_size(int D, Action action) {
    if (D == 16) action(std::integral_constant<int, 16>{});
    else if (D == 32) action(std::integral_constant<int, 32>{});
    else if (D == 64) action(std::integral_constant<int, 64>{});
    else if (D == 128) action(std::integral_constant<int, 128>{});
    else fail("-H: expected heads of 16, 32, 64 or 128 channels, found %d", D);
}

void attention_forward(Device& device, branch_t* y, float* lse, const branch_t* qkv, int B, int T, int C, int H,
                       int first) {
    size_t heads = size_t(B) * size_t(H), queries = size_t(T - first);
    AttentionShape shape{T, C, H, first};
    by_head_size(C / H, [&](auto size) {
        constexpr int D = size, M = AttentionTiles<D>::FORWARD_M, N = AttentionTiles<D>::FORWARD_N, ROWS = att_rows(M);
        if constexpr (D >= 64)
            if (by_wgmma(device, D))
                return launch(attention_forward_hopper_kernel<D>, attention_grid(heads, ceil_div(queries, 64), 1),
                              WARPGROUP, sizeof(HopperForward<D>), device.stream, y, lse, qkv, shape);
        launch(attention_forward_kernel<D, M, N>, attention_grid(heads, ceil_div(queries, ROWS), 1), ATT_WARPS * WARP,
               sizeof(AttentionForwardShared<D, ROWS, N>), device.stream, y, lse, qkv, shape);
    });
}

// Floats that the backward by wgmma needs beside its results, whatever they hold: DqSums.
inline size_t attention_scratch(int B, int T, int C, int H) {
    int D = C / H;
    if (!Device::has_wgmma() || (D != 64 && D != 128)) return 0;
    size_t tiles = ceil_div(size_t(T), HopperBackward<64>::SUMS / size_t(D));
    return size_t(B) * size_t(H) * tiles * (HopperBackward<64>::SUMS + 1) + 1;
}

void attention_backward(Device& device, branch_t* dqkv, float* delta, const branch_t* dy, const branch_t* qkv,
                        const branch_t* y, const float* lse, int B, int T, int C, int H, float* scratch) {
    AttentionShape shape{T, C, H, 0};
    size_t heads = size_t(B) * size_t(H), n = size_t(B) * size_t(T) * size_t(C);
    by_head_size(C / H, [&](auto size) {
        constexpr int D = size;
        using Tiles = AttentionTiles<D>;
        using Hopper = HopperBackward<D>;
        bool hopper = by_wgmma(device, D);
        size_t tiles = hopper ? heads * ceil_div(size_t(T), Hopper::Q) : 0;
        DqSums sums{reinterpret_cast<float4*>(scratch), reinterpret_cast<unsigned*>(scratch + tiles * Hopper::SUMS)};
        launch_threads(attention_delta_kernel<D>, n / 8, device.stream, delta, dy, y, n, sums.added,
                       hopper ? tiles + 1 : 0, shape);
        if constexpr (D >= 64)
            if (hopper)
                return launch(attention_backward_hopper_kernel<D>,
                              attention_grid(heads, ceil_div(size_t(T), Hopper::KEYS), 1, ATT_GROUP / 2),
                              Hopper::THREADS, sizeof(Hopper), device.stream, dqkv, dy, qkv, lse, delta, sums, shape);
        constexpr int ROWS = att_rows(Tiles::BACKWARD_M);
        launch(attention_backward_kernel<D>, attention_grid(heads, ceil_div(size_t(T), ROWS), 2), ATT_WARPS * WARP,
               std::max(sizeof(AttentionQShared<D, ROWS, Tiles::Q_N>),
                        sizeof(AttentionKvShared<D, ROWS, Tiles::KV_STAGE>)),
               device.stream, dqkv, dy, qkv, lse, delta, shape);
    });
}
#endif

// ----- GELU
//
// gelu(h) = h/2 (1 + tanh(w)),  w = sqrt(2/pi) (h + 0.044715 h^3), the tanh form of Hendrycks and Gimpel 2016.
// As (1 + tanh(w))/2 = sigmoid(2w), one exponential does it, without cancellation for h far below zero.
constexpr float GELU_SCALE = float(2 * 0.79788456080286535588) /* 2 sqrt(2/pi) */, GELU_CUBIC = 0.044715f;

__device__ __forceinline__ float gelu_sigmoid(float h) {
    return 1 / (1 + expf(-GELU_SCALE * (h + GELU_CUBIC * h * h * h)));
}

// 4 bytes an element in BF16
__global__ void gelu_forward_kernel(branch_t* out, const branch_t* h, size_t n) {
    begin_kernel();
    size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * WIDE;
    if (at >= n) return;
    auto x = load<WIDE>(h + at);
    for (int i = 0; i < WIDE; i++) x[i] = branch_t(float(x[i]) * gelu_sigmoid(float(x[i])));
    store<WIDE>(out + at, x);
}

// d gelu/dh = sigmoid(2w) (1 + h (1 - sigmoid(2w)) 2 dw/dh).  dh comes as that of gelu's output.  6 bytes an element
__global__ void gelu_backward_kernel(branch_t* dh, const branch_t* h, size_t n) {
    begin_kernel();
    size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * WIDE;
    if (at >= n) return;
    auto x = load<WIDE>(h + at);
    auto d = load<WIDE>(dh + at);
    for (int i = 0; i < WIDE; i++) {
        float hi = float(x[i]), sigmoid = gelu_sigmoid(hi), slope = GELU_SCALE * (1 + 3 * GELU_CUBIC * hi * hi);
        d[i] = branch_t(float(d[i]) * (sigmoid + hi * sigmoid * (1 - sigmoid) * slope));
    }
    store<WIDE>(dh + at, d);
}

// n: a multiple of WIDE, as a hidden layer of 4C is
void gelu_forward(Device& device, branch_t* out, const branch_t* h, size_t n) {
    launch_threads(gelu_forward_kernel, n / WIDE, device.stream, out, h, n);
}
void gelu_backward(Device& device, branch_t* dh, const branch_t* h, size_t n) {
    launch_threads(gelu_backward_kernel, n / WIDE, device.stream, dh, h, n);
}

// Backward through a product that read gelu(h), and through GELU: dh (rows,K) = (dout W) gelu'(h); dout (rows,N),
// W (N,K), h (rows,K). Where cuBLASLt offers it, the product's epilogue multiplies by gelu'(h): 4 bytes an element in
// BF16 instead of the 8 of product and kernel. Every level of recomputation reads the same stored h, so has the same
// bits. The FP32 build, made for comparisons, takes the kernel: cuBLASLt may approximate gelu'.
void matmul_gelu_backward(Device& device, branch_t* dh, const branch_t* dout, const branch_t* w, const branch_t* h,
                          size_t rows, size_t K, size_t N) {
    if (BRANCH_BF16 && device.product_dgelu(dh, w, PLAIN, dout, PLAIN, h, K, rows, N)) return;
    device.product(dh, w, PLAIN, dout, PLAIN, K, rows, N, SET);
    gelu_backward(device, dh, h, rows * K);
}

// ----- Cross entropy
//
// loss (rows) = lse - logit[target],  lse = log sum_j exp(logit_j) over the V real tokens,  dlogits = scale (softmax -
// onehot(target)), in place of logits (rows,Vp) if `backward`; padded columns get zeros. A block a row.  In BF16 4
// bytes an element, without backward 2; the row waits in shared memory for its second pass, unless it is so long that a
// multiprocessor of Hopper would not hold two: then 6.
constexpr int MAX_CROSS_ENTROPY_WARPS = 16, MAX_STASH = 110 << 10;  // bytes
struct CrossEntropyShared { float largest[MAX_CROSS_ENTROPY_WARPS], sum[MAX_CROSS_ENTROPY_WARPS]; };

template <bool backward>
__global__ void cross_entropy_kernel(float* loss, branch_t* logits, const int* targets, int V, int Vp, float scale,
                                     bool stashed) {
    begin_kernel();
    auto& s = shared<CrossEntropyShared>();
    branch_t* stash = reinterpret_cast<branch_t*>(&s + 1);  // (Vp), each thread's own numbers
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    branch_t* row = logits + size_t(blockIdx.x) * Vp;
    int target = targets[blockIdx.x];
    float target_logit = float(row[target]), largest = -INFINITY, sum = 0;
    each_in_flight(threadIdx.x * WIDE, V, blockDim.x * WIDE, [&](int v0) { return load<WIDE>(row + v0); },
                   [&](int v0, const Pack<branch_t, WIDE>& x) {
        if (backward && stashed) store<WIDE>(stash + v0, x);
        float logit[WIDE], before = largest;
        for (int i = 0; i < WIDE; i++) logit[i] = float(x[i]);
        if (v0 + WIDE > V)
            for (int i = 0; i < WIDE; i++)
                if (v0 + i >= V) logit[i] = -INFINITY;
        for (float l : logit) largest = fmaxf(largest, l);
        sum *= fast_exp2(LOG2_E * (before - largest));
        for (float l : logit) sum += fast_exp2(LOG2_E * (l - largest));
    });
    float warp_largest = warp_max(largest);
    // 0: no logit here; a NaN goes on
    sum = warp_sum(sum == 0 ? 0.0f : sum * fast_exp2(LOG2_E * (largest - warp_largest)));
    if (lane == 0) s.largest[warp] = warp_largest, s.sum[warp] = sum;
    __syncthreads();  // from here on the row's logits may be overwritten: all threads have read the target's
    largest = -INFINITY, sum = 0;
    for (int w = 0; w < warps; w++) largest = fmaxf(largest, s.largest[w]);
    for (int w = 0; w < warps; w++)
        if (s.sum[w] != 0) sum += s.sum[w] * fast_exp2(LOG2_E * (s.largest[w] - largest));
    float lse = largest + logf(sum);
    if (threadIdx.x == 0) loss[blockIdx.x] = lse - target_logit;
    if constexpr (backward)
        for (int v0 = threadIdx.x * WIDE; v0 < Vp; v0 += blockDim.x * WIDE) {
            Pack<branch_t, WIDE> x{};
            if (v0 < V) x = stashed ? load<WIDE>(stash + v0) : load<WIDE>(row + v0);
            if (v0 + WIDE <= V && (target < v0 || target >= v0 + WIDE))
                for (branch_t& d : x.v) d = branch_t(scale * fast_exp2(LOG2_E * (float(d) - lse)));
            else
                for (int i = 0; i < WIDE; i++) {
                    float softmax = fast_exp2(LOG2_E * (float(x[i]) - lse));
                    x[i] = branch_t(v0 + i < V ? scale * (softmax - (v0 + i == target ? 1.0f : 0.0f)) : 0.0f);
                }
            store<WIDE>(row + v0, x);
        }
}

void cross_entropy(Device& device, float* loss, branch_t* logits, const int* targets, size_t rows, int V, int Vp,
                   bool backward, float scale) {
    unsigned threads =
        unsigned(std::clamp<size_t>(round_up(size_t(Vp) / WIDE, WARP), WARP, MAX_CROSS_ENTROPY_WARPS * WARP));
    size_t stash = size_t(Vp) * sizeof(branch_t);
    bool stashed = backward && stash + sizeof(CrossEntropyShared) <= size_t(std::min(MAX_STASH, shared_limit()));
    launch(backward ? cross_entropy_kernel<true> : cross_entropy_kernel<false>, rows, threads,
           sizeof(CrossEntropyShared) + (stashed ? stash : 0), device.stream, loss, logits, targets, V, Vp, scale,
           stashed);
}

// predictions (rows) = the likeliest token of each row of logits (rows,Vp), of equals the lower.  A warp a row; 4 or 2
// bytes an element
__global__ void predict_kernel(int* predictions, const branch_t* logits, int rows, int V, int Vp) {
    begin_kernel();
    int row = int(blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP), lane = threadIdx.x % WARP;
    float largest = -INFINITY;
    int best = V;
    for (int v = lane; row < rows && v < V; v += WARP)
        if (float x = float(logits[size_t(row) * Vp + v]); best == V || x > largest) largest = x, best = v;
    float row_largest = warp_max(largest);
    // The lowest token with that logit: small whole numbers are exact in FP32.
    float first = warp_max(largest == row_largest ? -float(best) : -float(V));
    if (row < rows && lane == 0) predictions[row] = int(-first);
}

void predict(Device& device, int* predictions, const branch_t* logits, size_t rows, int V, int Vp) {
    launch_threads(predict_kernel, rows * WARP, device.stream, predictions, logits, int(rows), V, Vp);
}

// ----- Sums

// partial (blocks) = the sums of values, or of their squares, in double.  4 or 2 bytes an element
constexpr int SUM_UNROLL = 4;
template <class T, bool squares>
__global__ void sum_kernel(const T* values, size_t n, double* partial) {
    begin_kernel();
    auto& s = shared<SumShared>();
    bool aligned = reinterpret_cast<size_t>(values) % sizeof(Pack<T, SUM_UNROLL>) == 0;  // a tensor may start anywhere
    double sum = 0;
    // A thread adds 4 numbers in FP32 before they go to double: the same elements whatever the grid's order.
    for (size_t at = (size_t(blockIdx.x) * SUM_THREADS + threadIdx.x) * SUM_UNROLL; at < n;
         at += size_t(gridDim.x) * SUM_THREADS * SUM_UNROLL) {
        float four = 0;
        Pack<T, SUM_UNROLL> value;
        if (aligned && at + SUM_UNROLL <= n) value = load<SUM_UNROLL>(values + at);
        else
            for (int i = 0; i < SUM_UNROLL; i++) value[i] = at + i < n ? values[at + i] : T(0.0f);
        for (int i = 0; i < SUM_UNROLL; i++) four += squares ? float(value[i]) * float(value[i]) : float(value[i]);
        sum += four;
    }
    sum = block_sum(s, sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// out += that sum
template <bool squares, class T>
void add_sum(Device& device, double* out, const T* values, size_t n) {
    size_t blocks = std::clamp<size_t>(ceil_div(n, SUM_THREADS * SUM_UNROLL), 1, MAX_PARTIAL_BLOCKS);
    double* partial = device.partial_doubles.data();
    launch(sum_kernel<T, squares>, blocks, SUM_THREADS, sizeof(SumShared), device.stream, values, n, partial);
    add_columns<double>(device.stream, {1, {out}}, partial, blocks, 1);
}

// partial (blocks,C): x (rows,C) summed over rows.  4 bytes an element
__global__ void sum_rows_kernel(const float* x, int rows, int C, double* partial) {
    begin_kernel();
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        double sum = 0;
        for (int row = blockIdx.x; row < rows; row += gridDim.x) sum += x[size_t(row) * C + c];
        partial[size_t(blockIdx.x) * C + c] = sum;
    }
}

// ----------------------------------------------------------------------------------------------------
// The parameters: AdamW (Loshchilov and Hutter 2019), initial values, the branch's copy

// clip = min(1, max_norm / norm), and whether the step is taken: norm and loss are finite (x * 0 is 0 for a finite x
// alone) and no outliers. AdamW's numbers follow from n, the steps so far that were taken, so that a skipped one leaves
// no trace. With several ranks (shares), loss and norm are the ranks' sums in rank order; once one rank's data are
// lost, neither this step nor one in flight updates anything.
__global__ void prepare_update_kernel(StepState* state, const StepSettings* settings, UpdateCounts* counts,
                                      const StepShare* shares, int ranks) {
    begin_kernel();
    if (ranks > 0) {
        double loss_sum = 0, squares = 0;
        unsigned any = 0, all = ~0u;
        for (int r = 0; r < ranks; r++) {
            loss_sum += shares[r].loss_sum, squares += shares[r].grad_squares;
            any |= unsigned(shares[r].flags), all &= unsigned(shares[r].flags);
        }
        state->loss_sum = loss_sum, state->grad_squares = squares, state->any = any, state->all = all;
        if (any & DATA_LOST) counts->data_lost = 1;
    }
    state->norm = sqrt(state->grad_squares);
    double limit = settings->max_norm / state->norm;
    state->clip = float(settings->max_norm > 0 && limit < 1 ? limit : 1.0);
    double zero_if_finite = state->norm * 0 + state->loss_sum * 0;
    state->taken =
        zero_if_finite == 0 && !counts->data_lost &&
        counts->recent.add(state->loss_sum / settings->tokens, state->norm, settings->skip_loss, settings->skip_grad);
    state->recent = counts->recent;
    double n = double(counts->updates += state->taken);
    state->step_size = float(settings->lr / (1 - pow(BETA1, n)));
    state->v_scale = float(1 / (1 - pow(BETA2, n)));
    state->decay = float(settings->lr * settings->weight_decay);
}

// This rank's share of the step's numbers, for the others.
__global__ void share_kernel(StepShare* share, const StepState* state, const uint64_t* flags) {
    begin_kernel();
    *share = {state->loss_sum, state->grad_squares, *flags};
}

// sum += addend.  12 bytes an element
__global__ void accumulate_kernel(float* sum, const float* addend, size_t n) {
    begin_kernel();
    size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;  // a shard is a multiple of 128
    if (at >= n) return;
    auto a = load<4>(sum + at), b = load<4>(addend + at);
    for (int i = 0; i < 4; i++) a[i] += b[i];
    store<4>(sum + at, a);
}

// With the clipped gradient g:  m = b1 m + (1-b1) g,  v = b2 v + (1-b2) g^2,
//     p -= lr wd p,   p -= lr mhat / (sqrt(vhat) + eps),   mhat = m / (1 - b1^n), vhat = v / (1 - b2^n)
// and g = 0 for the next step. branch_copy: p in BF16. With --moments bf16 the update takes m and v before they are
// rounded, and what is stored is rounded stochastically: to nearest, v would stop where (1-b2) g^2 falls below 2^-9 of
// it. counter: n, of the random numbers. 34 bytes an element in BF16: p, g, m, v in, the same and the copy out; 4 less
// with BF16 gradients, 8 with BF16 moments.
template <int N, class Gradient, class Moment>
__device__ void adamw(float* p, branch_t* branch_copy, Gradient* g, Moment* m, Moment* v, size_t at, float decay,
                      const StepState& s, uint64_t seed, uint32_t counter) {
    constexpr float b1 = float(BETA1), b2 = float(BETA2), epsilon = float(ADAM_EPSILON);
    auto ps = load<N>(p);
    auto gs = load<N>(g);
    auto ms = load<N>(m), vs = load<N>(v);
    Pack<branch_t, N> copy;
    Philox draw{};
    if constexpr (sizeof(Moment) == 2)
        draw = philox(seed, uint32_t(at / 4), uint32_t(at / 4 >> 32), counter, STREAM_MOMENTS);
    for (int i = 0; i < N; i++) {
        float gi = s.clip * float(gs[i]), mi = b1 * float(ms[i]) + (1 - b1) * gi,
              vi = b2 * float(vs[i]) + (1 - b2) * gi * gi;
        ps[i] -= decay * ps[i];
        ps[i] -= s.step_size * mi / (sqrtf(vi * s.v_scale) + epsilon);
        gs[i] = Gradient(0.0f);
        copy[i] = branch_t(ps[i]);
        if constexpr (sizeof(Moment) == 2) {
            uint32_t word = draw.word[(at + i) % 4];
            ms[i] = round_stochastic(mi, word), vs[i] = round_stochastic(vi, word >> 16);
        } else {
            ms[i] = mi, vs[i] = vi;
        }
    }
    store<N>(p, ps), store<N>(g, gs), store<N>(m, ms), store<N>(v, vs);
    if (branch_copy) store<N>(branch_copy, copy);
}

template <class Gradient, class Moment>
__device__ void update_chunk(float* p, branch_t* branch_copy, Gradient* g, Moment* m, Moment* v,
                             const UpdateChunk& chunk, const StepState& s, uint64_t seed, uint32_t counter) {
    float decay = chunk.decayed ? s.decay : 0;
    p += chunk.parameter, g += chunk.gradient, m += chunk.moment, v += chunk.moment;
    if (branch_copy) branch_copy += chunk.copy;
    // Fours where all of them start at multiples of four; what is left over, one by one.
    int in_fours =
        (chunk.first | chunk.parameter | chunk.copy | chunk.gradient | chunk.moment) % 4 == 0 ? chunk.count / 4 * 4 : 0;
    for (int i = threadIdx.x * 4; i < in_fours; i += blockDim.x * 4)
        adamw<4>(p + i, branch_copy ? branch_copy + i : nullptr, g + i, m + i, v + i, chunk.first + i, decay, s, seed,
                 counter);
    for (int i = in_fours + threadIdx.x; i < chunk.count; i += blockDim.x)
        adamw<1>(p + i, branch_copy ? branch_copy + i : nullptr, g + i, m + i, v + i, chunk.first + i, decay, s, seed,
                 counter);
}

// Where the step is skipped, parameters and moments stay, and the gradients become zero as after any step.
template <class Moment>
__global__ void adamw_kernel(float* params, float* masters, branch_t* branch_copy, float* g, __nv_bfloat16* g_bf16,
                             Moment* m, Moment* v, const UpdateChunk* chunks, const StepSettings* settings,
                             const StepState* state, const UpdateCounts* counts) {
    begin_kernel();
    UpdateChunk chunk = chunks[blockIdx.x];
    StepState s = *state;
    float* p = chunk.master ? masters : params;
    if (!s.taken) {
        for (int i = threadIdx.x; i < chunk.count; i += blockDim.x)
            if (chunk.bf16) g_bf16[chunk.gradient + i] = __nv_bfloat16(0.0f);
            else g[chunk.gradient + i] = 0;
        return;
    }
    uint64_t seed = settings->seed;
    uint32_t counter = uint32_t(counts->updates);
    if (chunk.bf16) update_chunk(p, branch_copy, g_bf16, m, v, chunk, s, seed, counter);
    else update_chunk(p, branch_copy, g, m, v, chunk, s, seed, counter);
}

// Initial weights, with the bits of initialise_tensor in keel_common.h; a thread draws four. TensorStart is what the
// kernel needs of TensorInfo. bound 0: a gain, all ones
struct TensorStart {
    size_t rows, cols, used_rows, tail_row;
    float bound, bound_tail;
    uint32_t index;  // of the tensor in the parameter order
};

template <class Out>
__global__ void initialise_kernel(Out* out, TensorStart t, uint64_t seed) {
    begin_kernel();
    size_t block = size_t(blockIdx.x) * blockDim.x + threadIdx.x, size = t.rows * t.cols;
    if (block * 4 >= size) return;
    Philox draw = philox(seed, uint32_t(block), uint32_t(block >> 32), t.index, STREAM_WEIGHTS);
    for (size_t e = block * 4; e < block * 4 + 4 && e < size; e++) {
        size_t row = e / t.cols;
        float bound = row < t.tail_row ? t.bound : t.bound_tail, u = uniform24(draw.word[e % 4]);
        out[e] = Out(t.bound == 0 ? 1.0f : row >= t.used_rows ? 0.0f : bound * (2 * u - 1));
    }
}

DeviceArray<branch_t> Device::random_matrix(size_t n) {
    DeviceArray<branch_t> matrix(n);
    launch_threads(initialise_kernel<branch_t>, ceil_div(n, 4), stream, matrix.data(), TensorStart{1, n, 1, 1, 1, 1, 0},
                   uint64_t(1));
    return matrix;
}

// The branch's copy of FP32 weights; BF16 moments for a file or a snapshot, which hold FP32.  6 bytes an element
template <class To, class From>
__global__ void convert_kernel(To* out, const From* in, size_t n) {
    begin_kernel();
    size_t at = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < n) out[at] = To(in[at]);
}

// What the probe sums the squares of: the gradients where grads is given, else values, or values - before.
struct SquaresOf {
    const float *values, *before, *grads;
    const __nv_bfloat16* grads_bf16;
};

// squares (chunks) = the sum of squares of each chunk: the norms of all tensors in one launch.  4 bytes an element, 8
// with before, 2 of a BF16 gradient
__global__ void chunk_squares_kernel(double* squares, SquaresOf of, const UpdateChunk* chunks) {
    begin_kernel();
    auto& s = shared<SumShared>();
    UpdateChunk chunk = chunks[blockIdx.x];
    double sum = 0;
    for (int i = threadIdx.x; i < chunk.count; i += SUM_THREADS) {
        float value = !of.grads    ? of.values[chunk.first + i] - (of.before ? of.before[chunk.first + i] : 0.0f)
                      : chunk.bf16 ? float(of.grads_bf16[chunk.gradient + i])
                                   : of.grads[chunk.gradient + i];
        sum += double(value) * double(value);
    }
    sum = block_sum(s, sum);
    if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}

// ----------------------------------------------------------------------------------------------------
// The sub-layer's branch: attention or feed-forward

// What a branch computes on its way. Attention has qkv, y and lse, feed-forward h and gelu.
struct BranchActivations {
    branch_t* u;           // (rows,C) the branch's input
    branch_t* qkv;         // (B,T,3C)
    branch_t* qkv_normed;  // (B,T,3C) HybridNorm only
    branch_t* y;           // (rows,C) attention's output, before its projection
    float* lse;            // (B,H,Tq)
    branch_t* h;           // (rows,4C) before GELU
    branch_t* gelu;        // (rows,4C)
};

// f (rows,C) = attention(u (rows,C)), rows = B * (T - first). f may be null: then only the activations are made. first
// > 0, with a KV cache, wants B = 1: the new rows are next to each other in qkv.
void attention_branch_forward(Device& device, branch_t* f, const BranchActivations& a,
                              const SublayerTensors<branch_t>& w, const SublayerTensors<float>& gains,
                              const ModelConfig& c, int B, int T, int first) {
    size_t rows = size_t(B) * size_t(T - first), C = size_t(c.C), start = size_t(first) * 3 * C;
    matmul_forward(device, a.qkv + start, a.u, w[QKVW], rows, C, 3 * C);
    const branch_t* qkv = a.qkv;
    if (gains[GAMMA_Q]) {
        qkv_norm_forward(device, a.qkv_normed + start, a.qkv + start,
                         {{gains[GAMMA_Q], gains[GAMMA_K], gains[GAMMA_V]}, {}}, rows, c.H, c.D());
        qkv = a.qkv_normed;
    }
    attention_forward(device, a.y, a.lse, qkv, B, T, c.C, c.H, first);
    if (f) matmul_forward(device, f, a.y, w[ATTPROJW], rows, C, C);
}

// f (rows,C) = gelu(u fcw^T) fcprojw^T. f may be null.
void feed_forward_branch_forward(Device& device, branch_t* f, const BranchActivations& a,
                                 const SublayerTensors<branch_t>& w, const ModelConfig& c, size_t rows) {
    size_t C = size_t(c.C);
    matmul_forward(device, a.h, a.u, w[FCW], rows, C, 4 * C);
    gelu_forward(device, a.gelu, a.h, rows * 4 * C);
    if (f) matmul_forward(device, f, a.gelu, w[FCPROJW], rows, 4 * C, C);
}

// f (rows,C) = F_l(u_l), rows = B * (T - first).
void branch_forward(Device& device, branch_t* f, const BranchActivations& a, const SublayerTensors<branch_t>& w,
                    const SublayerTensors<float>& gains, const ModelConfig& c, int l, int B, int T, int first) {
    if (is_attention(l)) attention_branch_forward(device, f, a, w, gains, c, B, T, first);
    else feed_forward_branch_forward(device, f, a, w, c, size_t(B) * size_t(T - first));
}

// Scratch that the backward passes of all branches share.
struct BranchScratch {
    branch_t* dbranch;  // (rows,4C) dqkv or dh
    float* delta;       // (B,H,T)
    float* attention;   // attention_scratch
    float* partial;     // (blocks,2C) or (blocks,3D) of the gains
};

// du (rows,C) from df (rows,C); du serves as dy's on the way.
void attention_branch_backward(Device& device, branch_t* du, const branch_t* df, const BranchActivations& a,
                               const SublayerTensors<branch_t>& w, const SublayerTensors<float>& gains,
                               const SublayerGradients& dw, const ModelConfig& c, int B, int T,
                               const BranchScratch& s) {
    size_t rows = size_t(B) * size_t(T), C = size_t(c.C);
    matmul_backward(device, du, dw.matrix(ATTPROJW), df, a.y, w[ATTPROJW], rows, C, C);
    QkvGains g{{gains[GAMMA_Q], gains[GAMMA_K], gains[GAMMA_V]},
               {dw.gain(GAMMA_Q), dw.gain(GAMMA_K), dw.gain(GAMMA_V)}};
    bool normed = g.gamma[0];
    if (normed) qkv_norm_forward(device, a.qkv_normed, a.qkv, g, rows, c.H, c.D());  // one buffer for all sub-layers
    attention_backward(device, s.dbranch, s.delta, du, normed ? a.qkv_normed : a.qkv, a.y, a.lse, B, T, c.C, c.H,
                       s.attention);
    if (normed) qkv_norm_backward(device, s.dbranch, a.qkv, g, rows, c.H, c.D(), s.partial);
    matmul_backward(device, du, dw.matrix(QKVW), s.dbranch, a.u, w[QKVW], rows, C, 3 * C);
}

// du (rows,C) from df (rows,C).
void feed_forward_branch_backward(Device& device, branch_t* du, const branch_t* df, const BranchActivations& a,
                                  const SublayerTensors<branch_t>& w, const SublayerGradients& dw, const ModelConfig& c,
                                  size_t rows, const BranchScratch& s) {
    size_t C = size_t(c.C);
    matmul_backward_weight(device, dw.matrix(FCPROJW), df, a.gelu, rows, 4 * C, C);
    matmul_gelu_backward(device, s.dbranch, df, w[FCPROJW], a.h, rows, 4 * C, C);
    matmul_backward(device, du, dw.matrix(FCW), s.dbranch, a.u, w[FCW], rows, C, 4 * C);
}

// ----------------------------------------------------------------------------------------------------
// The model: its memory, its forward and its backward

// A model's shape and its buffers. Where the table only counts, it is the plan of their memory.
struct ModelMemory {
    ModelConfig config;
    StateCounts counts;
    int B, T;  // the largest micro-batch, and the sequence length
    Recompute recompute;
    ActivationSlots slots{config.L, recompute};
    size_t C = size_t(config.C), H = size_t(config.H), BT = size_t(B) * size_t(T), BTC = BT * C;
    BufferTable table;

    // In parameter order, with several ranks in buckets. With --grads bf16 and --moments bf16 those in BF16 stand for
    // the others. masters: FP32 weights of this rank's shards of the blocks, where params holds bucket 0 alone.
    DeviceArray<float> params =
        table(counts.masters ? "parameters outside the blocks" : "parameters", counts.parameters);
    DeviceArray<float> masters = table("parameters of this rank's shards", counts.masters);
    DeviceArray<float> grads = table("gradients", counts.grads);
    DeviceArray<__nv_bfloat16> grads_bf16 = table("gradients in BF16", counts.grads_bf16);
    DeviceArray<float> grad_scratch = table("gradient of one matrix", counts.grad_scratch);
    DeviceArray<float> shard_grads = table("gradients of this rank's shards", counts.shard_grads);  // over all ranks
    DeviceArray<float> incoming = table("gradients from the other ranks", counts.incoming);
    DeviceArray<float> m = table("AdamW's first moment", counts.moments);
    DeviceArray<float> v = table("AdamW's second moment", counts.moments);
    DeviceArray<__nv_bfloat16> m_bf16 = table("AdamW's first moment in BF16", counts.moments_bf16);
    DeviceArray<__nv_bfloat16> v_bf16 = table("AdamW's second moment in BF16", counts.moments_bf16);
    DeviceArray<branch_t> branch_copy = table("parameters in BF16", counts.branch_copy);  // which products read

    // The highway is stored once, as z: kept holds x_0 = "z_{-1}", z_0, ..., z_{L-1}, or with -r K every K-th of them
    // and the last, the others of one segment being in segment.
    DeviceArray<float> kept = table("highway z", slots.kept_z() * BTC);
    DeviceArray<float> segment = table("highway z of one segment", slots.segment_z() * BTC);
    DeviceArray<float> r_out = table("1 / rms of z", (size_t(config.L) + 1) * BT);
    DeviceArray<float> r_in = table("1 / rms of x", (size_t(config.L) + 1) * BT);
    // BranchActivations, a slot for each sub-layer that keeps them.
    DeviceArray<branch_t> u = table("u", slots.u_count() * BTC);
    DeviceArray<branch_t> qkv = table("q, k, v", slots.count / 2 * 3 * BTC);
    DeviceArray<branch_t> qkv_normed = table("q, k, v normed", config.norm == HYBRIDNORM ? 3 * BTC : 0);
    DeviceArray<branch_t> y = table("attention's output", slots.count / 2 * BTC);
    DeviceArray<float> lse = table("attention's log-sum-exp", slots.count / 2 * BT * H);
    DeviceArray<branch_t> h = table("feed-forward before GELU", slots.count / 2 * 4 * BTC);
    DeviceArray<branch_t> gelu = table("feed-forward after GELU", slots.gelu_count() * 4 * BTC);
    DeviceArray<branch_t> head_in = table("head's input", BTC);
    // Of the sub-layer at work.
    DeviceArray<branch_t> f = table("branch output", BTC);
    DeviceArray<branch_t> df = table("gradient of branch output", BTC);
    DeviceArray<branch_t> du = table("gradient of u", BTC);
    DeviceArray<branch_t> dbranch = table("gradient inside a branch", 4 * BTC);
    DeviceArray<float> dz = table("gradient of z", BTC);
    DeviceArray<float> delta = table("attention's delta", size_t(B) * H * size_t(T));
    DeviceArray<float> attention =
        table("attention's dq, partial sums", Device::wants_wgmma() ? attention_scratch(B, T, config.C, config.H) : 0);
    DeviceArray<branch_t> logits = table("logits, a chunk", head_rows(config, BT) * size_t(config.Vp()));
    DeviceArray<float> losses = table("losses", BT);
    DeviceArray<float> gain_partial = table("gains' gradients, partial sums",  // (blocks,2C) or (blocks,3D)
                                            3 * C * std::min<size_t>(BT, MAX_PARTIAL_BLOCKS));
    DeviceArray<int> batch = table("tokens", TokenBatch::size(BT));
    DeviceArray<StepState> state = table("step's numbers out", 1);
    DeviceArray<StepSettings> settings = table("step's numbers in", 1);
    DeviceArray<UpdateCounts> updates = table("updates so far", 1);
    DeviceArray<StepShare> shares = table("each rank's numbers", counts.ranks);
    DeviceArray<uint64_t> rank_flags = table("this rank's flags", counts.ranks ? 1 : 0);
    DeviceArray<UpdateChunk> chunks = table("optimizer's work list", counts.chunks);

    ModelMemory(const ModelConfig& config, const StateCounts& counts, int B, int T, Recompute recompute,
                BufferTable::Kind kind)
        : config(config), counts(counts), B(B), T(T), recompute(recompute),
          table(kind, kind == BufferTable::TOGETHER ? total_bytes(plan(config, counts, B, T, recompute)) - Device::BYTES
                                                    : 0) {}

    static std::vector<MemoryRow> plan(const ModelConfig& c, const StateCounts& counts, int B, int T, Recompute r) {
        std::vector<MemoryRow> rows;
        for (const BufferTable::Row& row : ModelMemory(c, counts, B, T, r, BufferTable::COUNTED).table.rows)
            rows.push_back({row.name, round_up(row.bytes, ALIGNMENT)});
        rows.push_back({"products' workspace, partial sums", Device::BYTES});
        return rows;
    }

    // Logits come in chunks of rows, as few as 2^28 elements a chunk (512 MiB in BF16) allow, as each reads and writes
    // the whole of wte's gradient: equal but for the last, in whole tiles of a product, of which there is at least one.
    // Not const: a test makes it smaller.
    static inline size_t head_elements = size_t(1) << 28;
    static size_t head_rows(const ModelConfig& c, size_t rows) {
        constexpr size_t TILE = 128;  // rows
        size_t most = std::max<size_t>(1, head_elements / size_t(c.Vp()) / TILE) * TILE, chunks = ceil_div(rows, most);
        return std::min(rows, round_up(ceil_div(rows, chunks), TILE));
    }

    // What --tune measures on, for the largest product of a micro-step of B sequences: a dW, whose result is FP32, or
    // the gradient through GELU, whose h and dh are both (rows,4C). A validation's products are a forward's; sampling
    // measures none.
    static size_t tuning_bytes(const ModelConfig& c, int B, int T) {
        size_t rows = size_t(B) * size_t(T), C = size_t(c.C);
        return std::max({Device::tuning_bytes(C, 4 * C, rows, true, Epilogue::ADD),
                         Device::tuning_bytes(4 * C, rows, C, !BRANCH_BF16,
                                              BRANCH_BF16 ? Epilogue::DGELU : Epilogue::SET),
                         Device::tuning_bytes(C, size_t(c.Vp()), head_rows(c, rows), true, Epilogue::ADD)});
    }
};

struct Model : ModelMemory {
    ParameterLayout layout;
    StateTypes types;
    Sharing sharing;
    ParameterLayout grad_layout;  // with several ranks: of grads, which differs from layout at -z 2 alone
    GradientLayout gradient_layout;
    Device device;
    Communicator* communicator;  // null: alone
    // With several ranks, recorded when a bucket's weights are complete, and in the backward pass when its gradients
    // have been reduced.
    std::vector<Event<>> bucket_events;
    size_t update_blocks = 0;  // chunks in use, the blocks of adamw_kernel

    DeviceArray<ProbeSums> probe;  // (L), of size 0 but for --probe
    DeviceArray<double> probe_x;   // (L,C), as probe: x_l summed over rows
    bool probing = false;
    int ablated = -1;  // the sub-layer whose branch evaluate leaves out; -1: none

    // All buffers share one allocation. Not const: the tests give each its own, with guards on the CPU headers
    // that catch a stray index; and so does KEEL_SANITIZE in the environment, for compute-sanitizer, which sees no
    // overrun from one buffer into the next.
    static inline bool one_allocation = !getenv("KEEL_SANITIZE");

    Model(const ModelConfig& config, int B, int T, Recompute recompute, StateTypes types = {}, Sharing sharing = {},
          Communicator* communicator = nullptr)
        : ModelMemory(config, StateCounts(config, types, sharing), B, T, recompute,
                      one_allocation ? BufferTable::TOGETHER : BufferTable::APART),
          layout(config, sharing.ranks), types(types), sharing(sharing), grad_layout(sharing.grad_layout(layout)),
          gradient_layout(layout, config.L, types.grads_bf16, sharing), communicator(communicator),
          bucket_events(sharing.ranks > 0 ? layout.buckets.size() : 0) {
        std::vector<UpdateChunk> work = update_chunks(layout, gradient_layout, sharing);
        device.copy(chunks.data(), work.data(), work.size());
        update_blocks = work.size();
        device.zero(grads, grads_bf16, m, v, m_bf16, v_bf16, shard_grads, state, updates, batch);
        device.synchronize();
    }

    branch_t* branch_params() {
        void* from = BRANCH_BF16 ? static_cast<void*>(branch_copy.data()) : params.data();
        return static_cast<branch_t*>(from);
    }
    SublayerTensors<branch_t> weights(int l) { return {branch_params(), layout, l}; }
    SublayerTensors<float> gains(int l) { return {params.data(), layout, l}; }
    SublayerGradients gradients(int l) {
        return {grads.data(), grads_bf16.data(), grad_scratch.data(), gradient_layout, layout, rounding(), l};
    }
    RoundingState rounding() { return {settings.data(), updates.data(), TokenBatch(batch.data(), BT).number}; }
    float* parameter(Tensor id, int l = -1) {
        size_t at = layout.offset(id, l);
        return at == ParameterLayout::absent ? nullptr : params.data() + at;
    }
    float* gradient(Tensor id, int l = -1) { return gradients(l).gain(id); }

    // Where masters are apart, a tensor of the blocks is made whole where its gradient will be, and this rank's shard
    // and the BF16 copy are made from there: every rank has the same, and none sends anything.
    void initialise(uint64_t seed) {
        const std::vector<ShardRange> owned = layout.owned(sharing.rank);
        auto range = owned.begin();
        for (size_t i = 0; i < layout.tensors.size(); i++) {
            const TensorInfo& t = layout.tensors[i];
            bool apart = masters_apart(sharing) && layout.bucket_of(t) > 0;
            float* whole = apart ? grads.data() + gradient_layout.of(t) : params.data() + t.offset;
            launch_threads(initialise_kernel<float>, ceil_div(t.size(), 4), device.stream, whole,
                           TensorStart{t.rows, t.cols, t.used_rows, t.tail_row, t.bound, t.bound_tail, uint32_t(i)},
                           seed);
            bool ours = range != owned.end() && range->tensor == i;
            if (apart && ours) device.copy(owned_weights(*range), whole + range->first, range->count);
            if (ours) ++range;
            if (!apart) continue;
            launch_threads(convert_kernel<branch_t, float>, t.size(), device.stream, branch_params() + t.offset, whole,
                           t.size());
            CUDA(cudaMemsetAsync(whole, 0, t.size() * sizeof(float), device.stream));
        }
        if (BRANCH_BF16) round_params();
        device.synchronize();
    }

    // The FP32 weights of a range that this rank owns.
    float* owned_weights(const ShardRange& range) {
        if (!masters_apart(sharing) || layout.bucket_of(layout.tensors[range.tensor]) == 0)
            return params.data() + range.memory;
        return masters.data() + range.shard - layout.buckets[0].shard;
    }
    // This rank's shard of a bucket of the blocks, where masters are apart.
    float* master(const Bucket& bucket) { return masters.data() + bucket.shard_first - layout.buckets[0].shard; }

    // After this rank's weights and moments were written from outside: the others and the products' copy get them.
    void parameters_changed() {
        if (communicator) share_states();
        else if (BRANCH_BF16) round_params();
        device.synchronize();
    }
    void round_params(cudaStream_t on = nullptr) {
        launch_threads(convert_kernel<branch_t, float>, params.size(), on ? on : device.stream, branch_params(),
                       params.data(), params.size());
    }

    // ----- Several ranks. What travels is on the communicator's stream, in the order of the calls, joined by events.

    // Called in the backward pass when a bucket's gradients are complete: sums them over the ranks and adds this rank's
    // shard to shard_grads, while the next block's backward runs. At bucket_events[i] the bucket's memory is zero
    // again.
    void reduce_bucket(size_t i) {
        const Bucket& bucket = grad_layout.buckets[i];
        float* of_bucket = grads.data() + bucket.first;
        communicator->fork(device.stream);
        communicator->reduce_scatter(incoming.data(), of_bucket, bucket.shard);
        launch_threads(accumulate_kernel, bucket.shard / 4, communicator->stream,
                       shard_grads.data() + bucket.shard_first, incoming.data(), bucket.shard);
        CUDA(cudaMemsetAsync(of_bucket, 0, bucket.shard * communicator->ranks * sizeof(float), communicator->stream));
        CUDA(cudaEventRecord(bucket_events[i], communicator->stream));
    }
    // From -z 1 on: gathers the weights that the other ranks have updated; bucket i's are complete at bucket_events[i].
    void gather_updates() {
        communicator->fork(device.stream);
        for (size_t i = 0; i < layout.buckets.size(); i++) {
            const Bucket& bucket = layout.buckets[i];
            if (BRANCH_BF16 && i > 0) communicator->all_gather(branch_params() + bucket.first, bucket.shard);
            else communicator->all_gather(params.data() + bucket.first, bucket.shard);
            if (BRANCH_BF16 && i == 0) round_params(communicator->stream);  // params is bucket 0
            CUDA(cudaEventRecord(bucket_events[i], communicator->stream));
        }
    }
    // Gathers an array over all parameters: every rank's shard goes to all.
    template <class T>
    void gather_buckets(const DeviceArray<T>& of) {
        communicator->fork(device.stream);
        for (const Bucket& bucket : layout.buckets)
            if (of.size()) communicator->all_gather(of.data() + bucket.first, bucket.shard);
        communicator->join(device.stream);
    }
    // The step's loss and gradient norm: each rank adds up its own, then all have them all.
    void share_numbers() {
        add_sum<true>(device, &state.data()->grad_squares, shard_grads.data(), shard_grads.size());
        launch(share_kernel, 1, 1, 0, device.stream, shares.data() + communicator->rank,
               static_cast<const StepState*>(state.data()), static_cast<const uint64_t*>(rank_flags.data()));
        communicator->fork(device.stream);
        communicator->all_gather(shares.data(), 1);
        communicator->join(device.stream);
    }
    // -z 0: every rank updates everything.
    void gather_gradients() {
        for (const Bucket& bucket : layout.buckets)
            device.copy(grads.data() + bucket.first + communicator->rank * bucket.shard,
                        shard_grads.data() + bucket.shard_first, bucket.shard);
        gather_buckets(grads);
        device.zero(shard_grads);
    }
    void share_states() {
        for (size_t i = 1; masters_apart(sharing) && i < layout.buckets.size(); i++) {
            const Bucket& bucket = layout.buckets[i];
            branch_t* copy = branch_params() + bucket.first + communicator->rank * bucket.shard;
            launch_threads(convert_kernel<branch_t, float>, bucket.shard, device.stream, copy, master(bucket),
                           bucket.shard);
        }
        if (sharing.states()) {
            gather_updates();
            communicator->join(device.stream);
            return;
        }
        gather_buckets(params);
        gather_buckets(m), gather_buckets(v), gather_buckets(m_bf16), gather_buckets(v_bf16);
        if (BRANCH_BF16) round_params();
    }
    // The whole of a bucket's FP32 weights, where masters are apart, in its gradients' memory, to be zeroed after.
    float* gather_masters(size_t i) {
        const Bucket& bucket = layout.buckets[i];
        float* whole = grads.data() + grad_layout.buckets[i].first;
        device.copy(whole + communicator->rank * bucket.shard, master(bucket), bucket.shard);
        communicator->fork(device.stream);
        communicator->all_gather(whole, bucket.shard);
        communicator->join(device.stream);
        return whole;
    }
    void await_bucket(size_t i) { CUDA(cudaStreamWaitEvent(device.stream, bucket_events[i], 0)); }

    // z(l) is z_l (rows,C) for l = 0..L-1; z(-1) is x_0.
    float* z(int l) { return (slots.z_is_kept(l) ? kept : segment).data() + slots.z_slot(l) * BTC; }

    BranchActivations activations(int l) {
        size_t slot = slots.of(l) / 2;
        return {.u = u.data() + slots.u_of(l) * BTC,
                .qkv = qkv.data() + slot * 3 * BTC,
                .qkv_normed = qkv_normed.data(),
                .y = y.data() + slot * BTC,
                .lse = lse.data() + slot * BT * H,
                .h = h.data() + slot * 4 * BTC,
                .gelu = gelu.data() + slots.gelu_of(l) * 4 * BTC};
    }

    HighwayPoint point(int l) {
        HighwayPoint p{};
        p.z = z(l - 1), p.r_out = r_out.data() + size_t(l) * BT, p.r_in = r_in.data() + size_t(l) * BT;
        p.gamma_out = l > 0 ? parameter(GAMMA_OUT, l - 1) : nullptr;
        p.gamma_in = l < config.L ? parameter(GAMMA_IN, l) : parameter(GAMMA_FINAL);
        p.u = l < config.L ? activations(l).u : head_in.data();
        return p;
    }

    // F_l(u_l) in out, or only the branch's activations where out is null.
    void forward_branch(int l, int b, branch_t* out) {
        if (l == ablated) device.zero(f);
        else branch_forward(device, out, activations(l), weights(l), gains(l), config, l, b, T, 0);
    }

    // du_l in du, from dF_l in df.
    void branch_backward(int l, int b) {
        BranchActivations a = activations(l);
        BranchScratch scratch{dbranch.data(), delta.data(), attention.data(), gain_partial.data()};
        size_t rows = size_t(b) * size_t(T);
        if (recompute.drops_all(l)) forward_branch(l, b, nullptr);
        else if (recompute.drops_u(l) && !is_attention(l))
            gelu_forward(device, a.gelu, a.h, rows * 4 * size_t(config.C));
        if (is_attention(l))
            attention_branch_backward(device, du.data(), df.data(), a, weights(l), gains(l), gradients(l), config, b, T,
                                      scratch);
        else
            feed_forward_branch_backward(device, du.data(), df.data(), a, weights(l), gradients(l), config, rows,
                                         scratch);
    }

    // From point l to point l + 1: z_l = alpha_l x_l + F_l(u_l).
    void sublayer_forward(int l, int b) {
        forward_branch(l, b, f.data());
        highway_forward(device, point(l + 1), point(l), f.data(), config.sublayer(l).alpha, size_t(b) * size_t(T),
                        config.C);
    }

    // From dz_l in dz (at point L: the head's du_L) to dz_{l-1} in dz and dF_{l-1} in df; x, u as point l has them.
    void point_backward(int l, int b, float* dx) {
        HighwayPoint before = l > 0 ? point(l - 1) : HighwayPoint{};
        if (!recompute.drops_u(l - 1)) before.u = nullptr;  // it was kept
        HighwayGradients g{dz.data(), du.data(), nullptr, dx, nullptr, nullptr};
        if (l > 0) g.df = df.data(), g.dgamma_out = gradient(GAMMA_OUT, l - 1);
        g.dgamma_in = l < config.L ? gradient(GAMMA_IN, l) : gradient(GAMMA_FINAL);
        highway_backward(device, point(l), before, g, l < config.L ? config.sublayer(l).alpha : 0, l == config.L,
                         size_t(b) * size_t(T), config.C, gain_partial.data());
    }

    // logits = u_L wte^T, a chunk of rows at a time. With backward, du = dlogits wte and dwte += dlogits^T u_L as well,
    // so that logits and their gradients never exist for more than a chunk. targets: on the device. logits_out, if
    // given, on the host (rows,V). predictions, if given, on the device (rows).
    void head(const int* targets, size_t rows, bool backward, float scale, float* logits_out,
              int* predictions = nullptr) {
        size_t V = size_t(config.V), Vp = size_t(config.Vp()), chunk = head_rows(config, BT);
        const branch_t* wte = branch_params() + layout.offset(WTE);
        for (size_t i = 0; i < rows; i += chunk) {
            size_t n = std::min(chunk, rows - i);
            const branch_t* in = head_in.data() + i * C;
            matmul_forward(device, logits.data(), in, wte, n, C, Vp);
            if (logits_out) copy_logits(logits_out + i * V, logits.data(), n, V, Vp);
            if (predictions) predict(device, predictions + i, logits.data(), n, config.V, config.Vp());
            cross_entropy(device, losses.data() + i, logits.data(), targets + i, n, config.V, config.Vp(), backward,
                          scale);
            if (backward)
                matmul_backward(device, du.data() + i * C, gradients(-1).matrix(WTE), logits.data(), in, wte, n, C, Vp);
        }
        add_sum<false>(device, &state.data()->loss_sum, losses.data(), rows);
    }

    void copy_logits(float* out, const branch_t* from, size_t rows, size_t V, size_t Vp) {
        std::vector<branch_t> host(rows * Vp);
        device.copy(host.data(), from, host.size());
        device.synchronize();
        for (size_t r = 0; r < rows; r++)
            for (size_t j = 0; j < V; j++) out[r * V + j] = float(host[r * Vp + j]);
    }

    // From tokens (b,T) on the device to u_L in head_in. gather: weights come meanwhile from other ranks, by buckets.
    void forward(const int* tokens, int b, bool gather = false) {
        size_t rows = size_t(b) * size_t(T), n = rows * size_t(config.C);
        if (gather) gather_updates(), await_bucket(0);
        embedding_forward(device, z(-1), tokens, parameter(WTE), parameter(WPE), b, T, config.C, 0);
        highway_norms(device, point(0), rows, config.C);
        for (int l = 0; l < config.L; l++) {
            if (gather && is_attention(l)) await_bucket(ParameterLayout::block_bucket(l));
            sublayer_forward(l, b);
            if (!probing) continue;
            ProbeSums* sums = probe.data() + l;
            highway_norms(device, point(l), rows, config.C, scratch_x());
            add_sum<true>(device, &sums->x, scratch_x(), n);
            sum_over_rows<double>(device.stream, {config.C, {probe_x.data() + size_t(l) * config.C}},
                                  reinterpret_cast<double*>(gain_partial.data()), size_t(config.C), sum_rows_kernel,
                                  rows, 8, THREADS, 0, scratch_x(), int(rows), config.C);
            add_sum<true>(device, &sums->f, f.data(), n);
            add_sum<true>(device, &sums->z, z(l), n);
        }
    }

    // (rows,C) in FP32 that is free between a branch's passes: dbranch has room for it in both builds.
    float* scratch_x() { return reinterpret_cast<float*>(dbranch.data()); }

    // Adds the sum of the losses of tokens and targets (b,T) to state.loss_sum.
    void evaluate(const int* tokens, const int* targets, int b, int* predictions = nullptr) {
        forward(tokens, b);
        head(targets, size_t(b) * size_t(T), false, 0, nullptr, predictions);
    }

    // Forward and backward of the b sequences of the TokenBatch in `batch`: adds the sum of their losses to
    // state.loss_sum, and the gradients of scale * sum to grads, or of several ranks to shard_grads. debug, if given,
    // gets logits (rows,V), x and dx (L+1,rows,C).
    void forward_backward(int b, float scale, DebugState<float>* debug = nullptr, bool gather = false) {
        size_t rows = size_t(b) * size_t(T), n = rows * size_t(config.C);
        TokenBatch tokens(batch.data(), rows);
        forward(tokens.tokens, b, gather);
        if (debug)
            debug->logits.resize(rows * size_t(config.V)), debug->x.resize((size_t(config.L) + 1) * n),
                debug->dx.resize(debug->x.size());
        head(tokens.targets, rows, true, scale, debug ? debug->logits.data() : nullptr);

        auto to_point = [&](int l) {
            bool observed = debug || probing;
            point_backward(l, b, observed ? scratch_x() : nullptr);
            if (debug) {
                device.copy(debug->dx.data() + size_t(l) * n, scratch_x(), n);
                highway_norms(device, point(l), rows, config.C, scratch_x());
                device.copy(debug->x.data() + size_t(l) * n, scratch_x(), n);
            } else if (probing) {
                if (l < config.L) add_sum<true>(device, &probe.data()[l].dx, scratch_x(), n);
                if (l > 0) add_sum<true>(device, &probe.data()[l - 1].df, dz.data(), n);
            }
        };
        to_point(config.L);
        int K = recompute.segments() ? recompute.level : config.L;
        for (int end = config.L; end > 0;) {
            int begin = (end - 1) / K * K;                     // the segment's first sub-layer
            if (end < config.L) forward_again(begin, end, b);  // the last segment's activations are still there
            for (int l = end - 1; l >= begin; l--) {
                size_t bucket = ParameterLayout::block_bucket(l);  // of several ranks
                if (sharing.gradients() && !is_attention(l) && bucket + 2 < layout.buckets.size())
                    await_bucket(bucket + 2);  // its gradients were where this block's come
                branch_backward(l, b);
                if (communicator && is_attention(l)) reduce_bucket(bucket);
                to_point(l);
            }
            end = begin;
        }
        // dz is now dz_{-1} = dx_0.
        embedding_backward(device, gradient(WTE), gradient(WPE), scratch_x(), dz.data(), tokens, b, T, config.C,
                           config.V);
        if (communicator) reduce_bucket(0), await_bucket(0);
    }

    // What the backward of sub-layers [begin, end) needs, from the z before them. The last one's z is there.
    void forward_again(int begin, int end, int b) {
        highway_norms(device, point(begin), size_t(b) * size_t(T), config.C);
        for (int l = begin; l < end - 1; l++) sublayer_forward(l, b);
        forward_branch(end - 1, b, nullptr);
    }

    // Norm, clip and AdamW, in place; the gradients are zero afterwards, all that a skipped step changes.
    void update() {
        if (communicator) {
            share_numbers();
        } else {
            add_sum<true>(device, &state.data()->grad_squares, grads.data(), grads.size());
            if (grads_bf16.size())
                add_sum<true>(device, &state.data()->grad_squares, grads_bf16.data(), grads_bf16.size());
        }
        launch(prepare_update_kernel, 1, 1, 0, device.stream, state.data(), settings.data(), updates.data(),
               shares.data(), sharing.ranks);
        if (communicator && !sharing.states()) gather_gradients();
        auto adamw = [&](auto* first, auto* second) {
            launch(adamw_kernel<std::remove_pointer_t<decltype(first)>>, update_blocks, THREADS, 0, device.stream,
                   params.data(), masters.data(), BRANCH_BF16 ? branch_params() : nullptr,
                   sharing.states() ? shard_grads.data() : grads.data(), grads_bf16.data(), first, second,
                   chunks.data(), settings.data(), state.data(), updates.data());
        };
        if (types.moments_bf16) adamw(m_bf16.data(), v_bf16.data());
        else adamw(m.data(), v.data());
    }

    // All gradients in the parameter order, in FP32 on the host.
    void copy_gradients(float* out) {
        for (const TensorInfo& t : layout.tensors) {
            const float* from = grads.data() + gradient_layout.of(t);
            if (gradient_layout.in_bf16(t.id)) {
                from = grad_scratch.data();
                launch_threads(convert_kernel<float, __nv_bfloat16>, t.size(), device.stream, grad_scratch.data(),
                               grads_bf16.data() + gradient_layout.of(t), t.size());
            }
            device.copy(out + t.offset, from, t.size());
        }
        device.synchronize();
    }
};

// ----------------------------------------------------------------------------------------------------
// Sampling

// Feeds tokens through the model a few at a time, keeping q, k and v of every block and position (the KV cache), so
// that a new token costs one row through each layer. The layers are those of training, on rows instead of batches.
class TokenGenerator {
public:
    TokenGenerator(Model& model, int window)
        : model(model), window(window), C(size_t(model.config.C)), cache(size_t(model.config.L / 2) * window * 3 * C),
          normed_cache(model.config.norm == HYBRIDNORM ? cache.size() : 0), u(window * C), f(window * C), y(window * C),
          h(window * 4 * C), gelu(window * 4 * C), logits(size_t(model.config.Vp())), z(window * C),
          r(2 * size_t(window)), lse(size_t(window) * size_t(model.config.H)), tokens(size_t(window)),
          host_logits(logits.size()), result(size_t(model.config.V)) {}

    static size_t bytes(const ModelConfig& c, int window) {
        size_t caches = (c.norm == HYBRIDNORM ? 2 : 1) * size_t(c.L / 2) * 3 * size_t(c.C);
        return (size_t(window) * (caches + 11 * size_t(c.C)) + size_t(c.Vp())) * sizeof(branch_t) +
               size_t(window) * (size_t(c.C) + size_t(c.H) + 3) * 4;
    }

    // Appends n tokens; returns the logits (V) that follow the last. At most `window` tokens fit.
    const float* feed(const int* new_tokens, int n) {
        const ModelConfig& c = model.config;
        Device& device = model.device;
        int end = length + n;
        size_t rows = size_t(n);
        device.copy(tokens.data(), new_tokens, rows);
        embedding_forward(device, z.data(), tokens.data(), model.parameter(WTE), model.parameter(WPE), 1, n, c.C,
                          length);
        highway_norms(device, point(0), rows, c.C);
        for (int l = 0; l < c.L; l++) {
            size_t block = size_t(l / 2) * size_t(window) * 3 * C;
            branch_t* normed = normed_cache.size() ? normed_cache.data() + block : nullptr;
            BranchActivations a{u.data(), cache.data() + block, normed, y.data(), lse.data(), h.data(), gelu.data()};
            branch_forward(device, f.data(), a, model.weights(l), model.gains(l), c, l, 1, end, length);
            highway_forward(device, point(l + 1), point(l), f.data(), c.sublayer(l).alpha, rows, c.C);
        }
        length = end;
        matmul_forward(device, logits.data(), u.data() + (rows - 1) * C,
                       model.branch_params() + model.layout.offset(WTE), 1, C, size_t(c.Vp()));
        device.copy(host_logits.data(), logits.data(), host_logits.size());
        device.synchronize();
        for (size_t v = 0; v < result.size(); v++) result[v] = float(host_logits[v]);
        return result.data();
    }
    void clear() { length = 0; }
    int size() const { return length; }

private:
    // All points share z, u and the norms' numbers: each is read for the last time as the next is made.
    HighwayPoint point(int l) {
        HighwayPoint p = model.point(l);
        p.z = z.data(), p.r_out = r.data(), p.r_in = r.data() + window, p.u = u.data();
        return p;
    }

    Model& model;
    int window, length = 0;
    size_t C;
    DeviceArray<branch_t> cache, normed_cache, u, f, y, h, gelu, logits;
    DeviceArray<float> z, r, lse;
    DeviceArray<int> tokens;
    std::vector<branch_t> host_logits;
    std::vector<float> result;
};

// ----------------------------------------------------------------------------------------------------
// The trainer: the step, and what else a run asks for (keel/trainer.h)

struct Trainer {
    using Real = float;
    using HostArray = PinnedArray<float>;
    static constexpr bool branch_bf16 = BRANCH_BF16, on_host = false;
    static constexpr int steps_in_flight = 2;
    using Communicator = ::Communicator;
    static constexpr const char *ranks_by = Communicator::NAME, *ranks_needs = "NCCL (nccl.h)";
    static constexpr bool probes_ranks = false;

    RunConfig run;
    Model model;
    PinnedArray<int> staging[2];         // batches on their way to the device, used alternately
    Event<> staged[2];                   // the device has the batch
    uint64_t batches = 0;                // staged so far
    PinnedArray<StepSettings> settings;  // one for each step under way
    PinnedArray<StepState> state;        // and one more, of evaluate and debug_pass
    // Step i goes from mark(i) to mark(i + 1), at which its state is on the host.
    Event<cudaEventDefault> marks[steps_in_flight + 1];
    uint64_t started = 0, finished = 0;  // steps
    std::vector<int> token_counts;       // scratch of TokenBatch::sort
    // Recorded at the start of the second step, when every kernel has been loaded. first_micro_step: where ranks own
    // the states, the step's first one, in which weights are gathered too.
    Graph first_micro_step, micro_step, update;
    bool use_graphs = true;
    Communicator* communicator;         // null: alone
    PinnedArray<uint64_t> rank_flags;   // of several ranks, for each step under way: its RankFlags
    std::string lost[steps_in_flight];  // and why its data could not be read
    size_t step_bytes = 0;

    explicit Trainer(const RunConfig& run, Communicator* communicator = nullptr)
        : run(run), model(run.model, run.B, run.T, run.recompute, run.types, Sharing(run),
                          run.ranks > 0 ? communicator : nullptr),
          settings(steps_in_flight), state(steps_in_flight + 1), communicator(model.communicator),
          rank_flags(steps_in_flight) {
        if (model.communicator && run.types.grads_bf16)
            fail("--grads: expected fp32 with several ranks, found bf16; use -z 2, which divides the gradients among "
                 "them");
        if (model.communicator) share_products(model.device, *model.communicator);
        if (!run.tune.empty()) {
            std::string gpu = gpu_properties().name;  // the table's name for what products run on
            if (int some = model.device.product_multiprocessors) gpu += format(" (%d multiprocessors)", some);
            model.device.tuning = std::make_unique<TuningTable>(run.tune, gpu, cublasLtGetVersion(), run.rank == 0);
        }
        this->run.attention = !BRANCH_BF16 ? 0 : by_wgmma(model.device, run.model.D()) ? 2 : 1;
        for (PinnedArray<int>& batch : staging) batch = PinnedArray<int>(TokenBatch::size(rows()));
    }
    ~Trainer() {
        cudaStreamSynchronize(model.device.stream);  // nothing may be thrown here
    }

    size_t rows() const { return size_t(run.B) * size_t(run.T); }

    // One optimizer step: the gradient of the mean loss over run.total_batch tokens, a micro-batch at a time, then
    // AdamW. start() only gives the device its work; finish() waits for the oldest step that was started. With two
    // under way the device goes from one into the next while the host prints, logs and reads data.
    void start(const Loader& data, int64_t step, ProbeLog* log, unsigned flags = 0) {
        Device& device = model.device;
        if (started == 0) upload_updates(step - 1 - run.skipped);
        if (started > 0 && use_graphs && !update.launches) record_graphs();
        bool replay = update.launches && !log;
        StepProbe probe(run.model);
        int slot = int(started % steps_in_flight);
        size_t sent_before = bytes_sent();
        if (started == finished) CUDA(cudaEventRecord(mark(started), device.stream));
        begin_step(step, slot);
        if (log) begin_probe();
        Device::Tuning tuning(device, started == 0);

        for (int micro = 0; micro < run.accumulation(); micro++) {
            try {
                stage_batch(micro, [&](int* tokens, int* targets) {
                    data.batch(run.sequence(step, micro), run.B, tokens, targets);
                });
            } catch (const DataError& e) {
                if (!communicator) throw;
                lost[slot] = e.what();
                flags |= DATA_LOST;  // the other ranks wait for this one's sums: it computes on with the tokens it has
            }
            bool gather = micro == 0 && model.sharing.states();
            if (replay) CUDA(cudaGraphLaunch((gather ? first_micro_step : micro_step).launches, device.stream));
            else micro_batch(gather);
            if (log) probe_shortcuts(probe);
        }
        if (communicator) {
            rank_flags[size_t(slot)] = flags;
            device.copy(model.rank_flags.data(), &rank_flags[size_t(slot)], 1);
        }
        if (log) probe_gradients(probe);
        if (replay) CUDA(cudaGraphLaunch(update.launches, device.stream));
        else model.update();

        device.copy(&state[size_t(slot)], model.state.data(), 1);
        CUDA(cudaEventRecord(mark(started + 1), device.stream));
        if (started++ == 0) step_bytes = bytes_sent() - sent_before;
        if (!log) return;
        device.synchronize();
        if (!state[size_t(slot)].taken) return;
        probe.updates = tensor_squares({model.params.data(), params_before.data(), nullptr, nullptr});
        write_probe(*log, run, model.layout, step, probe);
    }

    StepResult finish() {
        size_t slot = finished % steps_in_flight;
        const StepState& s = state[slot];
        cudaEvent_t begin = mark(finished), end = mark(++finished);
        wait(end);
        if (communicator && (s.any & DATA_LOST)) throw_lost_data(*communicator, run, lost[slot]);
        float ms = 0;  // by the device: the host stages the next step's batches before it waits here, and comes late
        CUDA(cudaEventElapsedTime(&ms, begin, end));
        return {s.loss_sum / double(run.total_batch), s.norm, ms * 1e-3, s.any, s.all, !s.taken, s.recent};
    }
    cudaEvent_t mark(uint64_t step) const { return marks[step % std::size(marks)]; }

    // ----- Several ranks
    size_t bytes_sent() const { return communicator ? communicator->bytes_sent : 0; }
    void wait(cudaEvent_t event) {
        if (communicator) communicator->wait(event);
        else CUDA(cudaEventSynchronize(event));
    }
    void gather_weights() {
        if (!communicator || !model.sharing.states()) return;
        model.gather_updates();
        model.await_bucket(model.layout.buckets.size() - 1);
    }
    StepResult step(const Loader& data, int64_t step, ProbeLog* log) {
        start(data, step, log);
        return finish();
    }

    // AdamW's count of finished steps, which the device goes on with by itself.
    void upload_updates(int64_t count) {
        UpdateCounts counts{count, 0, run.recent};
        model.device.copy(model.updates.data(), &counts, 1);
        model.device.synchronize();
    }

    // What the kernels read that changes from step to step.
    void begin_step(int64_t step, int slot) {
        double lr = learning_rate(run, step), tokens = double(run.total_batch);
        settings[size_t(slot)] = {lr,     run.weight_decay, run.clip,     uint64_t(run.seed),
                                  tokens, run.skip_loss,    run.skip_grad};
        model.device.copy(model.settings.data(), &settings[size_t(slot)], 1);
        model.device.zero(model.state);
    }

    // Reads a batch, read(tokens, targets), while the device is at work on the one before. micro: its number in the
    // step.
    template <class Read>
    void stage_batch(int micro, Read read) {
        size_t slot = batches++ % 2;
        wait(staged[slot]);
        TokenBatch batch(staging[slot].data(), rows());
        read(batch.tokens, batch.targets);
        batch.sort(rows(), run.model.V, token_counts);
        *batch.number = micro;
        model.device.copy(model.batch.data(), staging[slot].data(), staging[slot].size());
        CUDA(cudaEventRecord(staged[slot], model.device.stream));
    }

    void micro_batch(bool gather = false) {
        model.forward_backward(run.B, float(1.0 / double(run.total_batch)), nullptr, gather);
    }

    void record_graphs() {
        double start = seconds();
        bool gather = model.sharing.states();
        if (gather) first_micro_step.record(model.device.stream, [&] { micro_batch(true); });
        if (!gather || run.accumulation() > 1) micro_step.record(model.device.stream, [&] { micro_batch(false); });
        update.record(model.device.stream, [&] { model.update(); });
        print("graphs     micro-step %zu nodes, update %zu nodes, %s, made in %.2f s beside the first step\n",
              std::max(micro_step.nodes, first_micro_step.nodes), update.nodes,
              bytes_text(double(first_micro_step.bytes + micro_step.bytes + update.bytes)), seconds() - start);
    }

    double evaluate(const int* tokens, const int* targets, int b, int* predictions = nullptr) {
        size_t n = size_t(b) * size_t(run.T);
        Device& device = model.device;
        TokenBatch batch(model.batch.data(), n);
        device.copy(batch.tokens, tokens, n), device.copy(batch.targets, targets, n);
        device.zero(model.state);
        Device::Tuning tuning(device, !communicator);  // of several ranks each may have other shapes
        // order serves only the backward pass
        model.evaluate(batch.tokens, batch.targets, b, predictions ? batch.order : nullptr);
        device.copy(&state[steps_in_flight], model.state.data(), 1);
        if (predictions) device.copy(predictions, batch.order, n);
        device.synchronize();
        return state[steps_in_flight].loss_sum;
    }
    void ablate(int l) { model.ablated = l; }

    // One forward and backward on the parameters in the model and the tokens in the state; fills the rest of the state.
    void debug_pass(DebugState<float>& s, int B, int T) {
        Device& device = model.device;
        s.header = make_header(FILE_DEBUG, REAL_FP32, run.model, 0, branch_bf16);
        s.header.word[H_B] = B, s.header.word[H_T] = T;
        s.params.resize(model.layout.count), s.grads.resize(model.layout.count);
        stage_batch(0, [&](int* tokens, int* targets) {
            std::copy(s.tokens.begin(), s.tokens.end(), tokens), std::copy(s.targets.begin(), s.targets.end(), targets);
        });
        device.zero(model.state);
        model.forward_backward(B, float(1 / (double(B) * T)), &s);
        device.copy(s.params.data(), model.params.data(), s.params.size());
        model.copy_gradients(s.grads.data());
        device.copy(&state[steps_in_flight], model.state.data(), 1);
        device.synchronize();
        s.loss = float(state[steps_in_flight].loss_sum / (double(B) * T));
    }

    // ----- --probe: the step's kernels one by one, with sums between them
    DeviceArray<double> chunk_squares;  // a sum for each of the model's chunks
    DeviceArray<float> params_before;

    void begin_probe() {
        if (model.probe.size() == 0) {
            model.probe = DeviceArray<ProbeSums>(size_t(run.model.L));
            model.probe_x = DeviceArray<double>(size_t(run.model.L) * size_t(run.model.C));
            chunk_squares = DeviceArray<double>(model.update_blocks);
            params_before = DeviceArray<float>(model.layout.count);
        }
        model.device.zero(model.probe, model.probe_x);
        model.probing = true;
    }

    // Sums of squares, one a tensor.
    std::vector<double> tensor_squares(const SquaresOf& of) {
        std::vector<double> chunks(model.update_blocks), squares;
        launch(chunk_squares_kernel, model.update_blocks, SUM_THREADS, sizeof(SumShared), model.device.stream,
               chunk_squares.data(), of, model.chunks.data());
        model.device.copy(chunks.data(), chunk_squares.data(), chunks.size());
        model.device.synchronize();
        const double* chunk = chunks.data();
        for (const TensorInfo& t : model.layout.tensors) {
            squares.push_back(0);
            for (size_t at = 0; at < t.size(); at += UPDATE_CHUNK) squares.back() += *chunk++;
        }
        return squares;
    }

    // After each micro-batch.
    void probe_shortcuts(StepProbe& probe) {
        std::vector<float> r(size_t(run.model.L) * rows());
        model.device.copy(r.data(), model.point(1).r_out, r.size());  // of z_0 .. z_{L-1}
        model.device.synchronize();
        probe.add_shortcuts(run.model, r.data(), rows());
    }

    void probe_gradients(StepProbe& probe) {
        Device& device = model.device;
        model.probing = false;
        std::vector<ProbeSums> sums(size_t(run.model.L));
        std::vector<float> gains(size_t(run.model.L) * size_t(run.model.C));  // gamma_out (L,C), where it exists
        device.copy(sums.data(), model.probe.data(), sums.size());
        device.copy(probe.x_sums.data(), model.probe_x.data(), probe.x_sums.size());
        auto gain = [&](int l) {
            return model.parameter(GAMMA_OUT, l) ? gains.data() + size_t(l) * size_t(run.model.C) : nullptr;
        };
        for (int l = 0; l < run.model.L; l++)
            if (gain(l)) device.copy(gain(l), model.parameter(GAMMA_OUT, l), size_t(run.model.C));
        device.copy(params_before.data(), model.params.data(), model.layout.count);
        device.synchronize();
        for (size_t l = 0; l < sums.size(); l++) static_cast<ProbeSums&>(probe.sublayers[l]) = sums[l];
        probe.set_gains(run.model, gain);
        probe.weights = tensor_squares({model.params.data(), nullptr, nullptr, nullptr});
        probe.gradients = tensor_squares({nullptr, nullptr, model.grads.data(), model.grads_bf16.data()});
    }

    // ----- Parameters and moments, in and out. Files have them in FP32.
    const ParameterLayout& layout() const { return model.layout; }
    void initialise(uint64_t seed) { model.initialise(seed); }

    // Where a range of what this rank owns is, in FP32 or, of moments with --moments bf16, in BF16; the other is null.
    std::pair<float*, __nv_bfloat16*> place(Section section, const ShardRange& range) {
        if (section == PARAMETERS) return {model.owned_weights(range), nullptr};
        size_t at = model.sharing.states() ? range.shard : range.memory;
        bool first = section == FIRST_MOMENTS;
        if (model.types.moments_bf16) return {nullptr, (first ? model.m_bf16 : model.v_bf16).data() + at};
        return {(first ? model.m : model.v).data() + at, nullptr};
    }
    void load(Section section, const ShardRange& range, size_t first, size_t n, const float* values) {
        auto [fp32, bf16] = place(section, range);
        std::vector<__nv_bfloat16> rounded(values, values + (fp32 ? 0 : n));  // exact where --moments bf16 wrote them
        if (fp32) model.device.copy(fp32 + first, values, n);
        else model.device.copy(bf16 + first, rounded.data(), n);
        model.device.synchronize();
    }
    void loaded() { model.parameters_changed(); }

    // BF16 goes by way of the memory for logits, where it is widened.
    void save(Section section, const ShardRange& range, size_t first, size_t n, float* out) {
        auto [fp32, bf16] = place(section, range);
        if (fp32) return model.device.copy(out, static_cast<const float*>(fp32) + first, n);
        float* wide = static_cast<float*>(static_cast<void*>(model.logits.data()));
        size_t most = model.logits.size() * sizeof(branch_t) / sizeof(float);
        for (size_t done = 0; done < n; done += most) {
            size_t m = std::min(most, n - done);
            launch_threads(convert_kernel<float, __nv_bfloat16>, m, model.device.stream, wide, bf16 + first + done, m);
            model.device.copy(out + done, static_cast<const float*>(wide), m);
        }
    }
    // Where masters are apart, a bucket of the blocks is gathered where its gradients will be.
    void save_model(float* out) {
        Device& device = model.device;
        gather_weights();
        size_t gathered = 0;
        const float* weights = nullptr;
        auto clear = [&] {
            size_t n = model.layout.buckets[gathered].shard * size_t(run.ranks);
            float* from = model.grads.data() + model.grad_layout.buckets[gathered].first;
            if (gathered) CUDA(cudaMemsetAsync(from, 0, n * sizeof(float), device.stream));
        };
        for (const TensorInfo& t : model.layout.tensors) {
            size_t bucket = model.layout.bucket_of(t);
            bool apart = masters_apart(model.sharing) && bucket > 0;
            if (apart && bucket != gathered) clear(), weights = model.gather_masters(gathered = bucket);
            const float* from =
                apart ? weights + (t.offset - model.layout.buckets[bucket].first) : model.params.data() + t.offset;
            if (run.rank == 0) device.copy(out, from, t.size()), out += t.size();
        }
        clear();
    }
    void saved() { model.device.synchronize(); }

    using Generator = TokenGenerator;

    // ----- The machine
    static void require_machine(const Launch& launch = {}) { require_gpu(launch); }

    static void check_model(const ModelConfig& c) {
        if (c.C > most_channels(c.C))
            fail("-C: expected at most %d channels on a GPU%s, found %d; use a smaller -C, or train_keel_cpu",
                 most_channels(c.C), c.C % 4 ? " that are no multiple of 4" : "", c.C);
        if (!BRANCH_BF16) return;
        if (c.C % 64)
            fail("-C: expected a multiple of 64 in this build, found %d; use another -C, or train_keel_fp32 or "
                 "train_keel_cpu",
                 c.C);
        if (c.D() != 16 && c.D() != 32 && c.D() != 64 && c.D() != 128)
            fail("-H: expected heads of 16, 32, 64 or 128 channels (C / H) in this build, found %d; use another -H, "
                 "train_keel_fp32 or train_keel_cpu",
                 c.D());
    }

    std::string machine_name() {
        cudaDeviceProp p = gpu_properties();
        const char* attention = !BRANCH_BF16 ? "" : by_wgmma(model.device, model.config.D()) ? "wgmma" : "mma.sync";
        return format("%s, %d multiprocessors%s%s", p.name, p.multiProcessorCount, BRANCH_BF16 ? ", attention by " : "",
                      attention);
    }

    MatrixRate matrix_rate(int = 1) { return model.device.matrix_rate(); }

    // ----- Memory
    static uint64_t available_memory() { return available_gpu_memory(); }

    static std::vector<MemoryRow> memory_rows(const RunConfig& run) {
        return plan(run, StateCounts(run.model, run.types, Sharing(run)), run.B, run.recompute);
    }
    static std::vector<MemoryRow> plan(const RunConfig& run, const StateCounts& counts, int B, Recompute r) {
        std::vector<MemoryRow> rows = Model::plan(run.model, counts, B, run.T, r);
        if (!run.tune.empty()) rows.push_back({"tuning scratch", Model::tuning_bytes(run.model, B, run.T)});
        return rows;
    }

    static MemoryRow memory_beside(const RunConfig& run, const Options& o) {
        size_t bytes = size_t(run.model.L / 2) << 20;  // of the graphs: by an H100's peak 0.7 MiB a block
        if (o.check.empty() && o.dump.empty() && o.sample_every > 0) bytes += TokenGenerator::bytes(run.model, run.T);
        ParameterLayout layout(run.model);
        GradientLayout gradients(layout, run.model.L, run.types.grads_bf16);
        if (o.probe > 0)
            bytes += layout.count * sizeof(float) + size_t(run.model.L) * sizeof(ProbeSums) +
                     (size_t(run.model.L) * run.model.C + update_chunks(layout, gradients).size()) * sizeof(double);
        return {"samples, probe, graphs", bytes};
    }

    static uint64_t sampling_bytes(const ModelConfig& c, int window) {
        return total_bytes(Model::plan(c, StateCounts(c, {}), 1, 1, {1})) + TokenGenerator::bytes(c, window);
    }

    static constexpr int64_t MAX_ROWS = int64_t(1) << 30;  // kernels count rows in int
    static void choose_memory_plan(RunConfig& run, uint64_t available) {
        if (int64_t(run.B) * run.T >= MAX_ROWS)
            fail("-b: expected fewer than 2^30 tokens (B*T) at a time, found %lld; use a smaller -b",
                 int64_t(run.B) * run.T);
        StateCounts counts(run.model, run.types, Sharing(run));
        auto bytes = [&](int B, Recompute r) { return total_bytes(plan(run, counts, B, r)); };
        auto cost = [&](int B, Recompute r) { return predicted_seconds(run.model, B, run.T, r, run.types) / B; };
        choose_micro_batch(run, available, available / 64, MAX_ROWS - 1, bytes, cost);
    }
};

#ifndef KEEL_NO_MAIN  // the tests have a main of their own
int main(int argc, char** argv) { return trainer_main<Trainer>(argc, argv); }
#endif
