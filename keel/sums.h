// keel/sums.h: sums over the threads of a warp, of a block and of a grid, in an order that shapes, the card and the
// compiled kernel alone decide, so that they have the same bits in every run; and numbers that are loaded together.
#pragma once

#include "gpu.h"

#ifndef CUDA_ON_CPU  // there, the headers bring their own, which checks p
// p as a pointer to whole vectors, to which it must be aligned.
template <class Vector, class T>
__device__ __forceinline__ Vector* as_vector(T* p) {
    return reinterpret_cast<Vector*>(p);
}
#endif

// N numbers that are loaded and stored at once
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
    T v[N];
    __device__ T& operator[](int i) { return v[i]; }
    __device__ const T& operator[](int i) const { return v[i]; }
};
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* p) {
    return *as_vector<const Pack<T, N>>(p);
}
template <int N, class T>
__device__ __forceinline__ void store(T* p, const Pack<T, N>& values) {
    *as_vector<Pack<T, N>>(p) = values;
}

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

// True in all threads of the last of `blocks` blocks to arrive here; it sees what the others wrote before.
__device__ inline bool last_to_arrive(unsigned* arrived, unsigned blocks) {
    __syncthreads();
    bool last = false;
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(arrived, 1u) == blocks - 1;
    }
    if (!__syncthreads_or(last)) return false;
    if (threadIdx.x == 0) *arrived = 0;  // again, for the next kernel
    __threadfence();
    return true;
}

constexpr int SUM_THREADS = 256;
struct SumShared { double warp[SUM_THREADS / WARP]; };

// The sum over a block of SUM_THREADS, in each thread, in the order of lanes and warps.
__device__ inline double block_sum(SumShared& s, double value) {
    value = warp_sum(value);
    if (threadIdx.x % WARP == 0) s.warp[threadIdx.x / WARP] = value;
    __syncthreads();
    double total = 0;
    for (double w : s.warp) total += w;
    return total;
}

// Sums over thread blocks run in two rounds (add_partials): the last of every FAN_IN blocks to arrive
// adds up their rows, and the last of those adds up the results. Each group has an arrival counter, and so has the end.
constexpr unsigned FAN_IN = 16, MAX_PARTIAL_BLOCKS = 1024, ARRIVAL_COUNTERS = 1 + MAX_PARTIAL_BLOCKS / FAN_IN;

// Sums over all blocks in an order that the grid's size alone decides, within the kernel that makes them. Each block
// has written its row of partial (blocks,n), which is overwritten. The last block of every FAN_IN adds up their rows in
// order, the last of those adds up the results, and calls out(i, sum) for each column. A thread has N columns at a
// time, and n is a multiple of N. arrived: 1 + blocks / FAN_IN rounded up counters, zero before and after.
template <int N, class T, class Out>
__device__ void add_partials(T* partial, int n, unsigned* arrived, Out out) {
    unsigned group = blockIdx.x / FAN_IN, groups = (gridDim.x + FAN_IN - 1) / FAN_IN, first = group * FAN_IN;
    unsigned members = gridDim.x - first < FAN_IN ? gridDim.x - first : FAN_IN;
    auto sum_rows = [&](unsigned from, unsigned step, unsigned count, int i) {
        Pack<T, N> sum{};
#pragma unroll 16
        for (unsigned k = 0; k < count; k++) {
            auto row = load<N>(partial + size_t(from + k * step) * n + i);
            for (int j = 0; j < N; j++) sum[j] += row[j];
        }
        return sum;
    };
    int mine = threadIdx.x * N, step = blockDim.x * N;
    if (!last_to_arrive(&arrived[1 + group], members)) return;
    for (int i = mine; i < n; i += step) store<N>(partial + size_t(first) * n + i, sum_rows(first, 1, members, i));
    if (!last_to_arrive(&arrived[0], groups)) return;
    for (int i = mine; i < n; i += step) {
        auto sum = sum_rows(0, FAN_IN, groups, i);
        for (int j = 0; j < N; j++) out(i + j, sum[j]);
    }
}

// Launches a kernel that sums over rows, a row a warp at a time, in as many blocks as the GPU holds at once.
template <class... Parameters, class... Arguments>
void launch_gains(void (*kernel)(Parameters...), size_t rows, unsigned warps, size_t shared_bytes, cudaStream_t stream,
                  Arguments... arguments) {
    size_t blocks = std::min<size_t>(resident_blocks(kernel, warps * WARP, shared_bytes), MAX_PARTIAL_BLOCKS);
    launch(kernel, std::min(ceil_div(rows, warps), blocks), warps * WARP, shared_bytes, stream, arguments...);
}
