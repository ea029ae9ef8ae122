// keel/sums.h: loads that are on their way together, and sums over a warp, a block and all blocks of a kernel.
#pragma once

#include "primitives.h"

// Calls use(c, load(c)) for c = first, first + step, ... below end. IN_FLIGHT loads are on their way before the first
// of them is used: a store in use() would hold up the loads after it, as the compiler cannot tell them apart.
constexpr int IN_FLIGHT = 4;
template <class Load, class Use>
__device__ __forceinline__ void each_in_flight(int first, int end, int step, Load load, Use use) {
    for (int c0 = first; c0 < end; c0 += step * IN_FLIGHT) {
        decltype(load(0)) values[IN_FLIGHT] = {};
#pragma unroll
        for (int j = 0; j < IN_FLIGHT; j++)
            if (c0 + j * step < end) values[j] = load(c0 + j * step);
#pragma unroll
        for (int j = 0; j < IN_FLIGHT; j++)
            if (c0 + j * step < end) use(c0 + j * step, values[j]);
    }
}

// The sum or the largest over a warp, in every lane with the same bits.
template <class T>
__device__ T warp_sum(T value) {
    for (int distance = WARP / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(ALL_LANES, value, distance);
    return value;
}
__device__ inline float warp_max(float value) {
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, distance));
    return value;
}

constexpr unsigned MAX_PARTIAL_BLOCKS = 1024;  // of a kernel whose blocks each leave sums of their own
constexpr int SUM_THREADS = 256;
struct SumShared { double warp[SUM_THREADS / WARP]; };

// The sum over a block of SUM_THREADS, in each thread, in the order of lanes and warps; once a kernel.
__device__ inline double block_sum(SumShared& s, double value) {
    value = warp_sum(value);
    if (threadIdx.x % WARP == 0) s.warp[threadIdx.x / WARP] = value;
    __syncthreads();
    double total = 0;
    for (double w : s.warp) total += w;
    return total;
}

// ----- Sums over blocks, in an order that shapes, the card and the compiled kernel alone decide: each block of a
// kernel leaves a row of partial (blocks,columns), and a second kernel adds them up

// Where the sums go: that of column i is added to out[i / n][i % n], or nowhere where that is null.
template <class T>
struct ColumnSums {
    int n;
    T* out[3];
};

// A block has 32 columns, its warp w the rows w, w + warps, ... of them. Shared: a T a thread
template <class T>
__global__ void add_columns_kernel(ColumnSums<T> to, const T* partial, int blocks, int columns) {
    begin_kernel();
    T* sums = &shared<T>();
    int i = blockIdx.x * WARP + threadIdx.x % WARP, warps = blockDim.x / WARP;
    T sum = 0;
#pragma unroll 8  // so many loads are on their way at a time
    for (int b = threadIdx.x / WARP; b < blocks && i < columns; b += warps) sum += partial[size_t(b) * columns + i];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x >= WARP || i >= columns) return;
    for (int w = 1; w < warps; w++) sum += sums[w * WARP + threadIdx.x];
    int which = i / to.n;
    T* out = which == 0 ? to.out[0] : which == 1 ? to.out[1] : to.out[2];  // by an index, they would be on the stack
    if (out) out[i % to.n] += sum;
}
template <class T>
void add_columns(cudaStream_t stream, const ColumnSums<T>& to, const T* partial, size_t blocks, size_t columns) {
    unsigned threads = unsigned(std::min<size_t>(blocks, 32)) * WARP;
    launch(add_columns_kernel<T>, ceil_div(columns, WARP), threads, threads * sizeof(T), stream, to, partial,
           int(blocks), int(columns));
}

// Launches a kernel whose blocks have so many rows at a time and leave their sums in partial, its last parameter: in as
// many blocks as the GPU holds at once. Then adds up what they have left.
template <class T, class... Parameters, class... Arguments>
void sum_over_rows(cudaStream_t stream, const ColumnSums<T>& to, T* partial, size_t columns,
                   void (*kernel)(Parameters...), size_t rows, unsigned rows_a_block, unsigned threads,
                   size_t shared_bytes, Arguments... arguments) {
    size_t blocks = std::min({ceil_div(rows, rows_a_block), resident_blocks(kernel, threads, shared_bytes),
                              size_t(MAX_PARTIAL_BLOCKS)});
    launch(kernel, blocks, threads, shared_bytes, stream, arguments..., partial);
    if (std::any_of(to.out, std::end(to.out), [](T* out) { return out; }))
        add_columns(stream, to, partial, blocks, columns);
}
