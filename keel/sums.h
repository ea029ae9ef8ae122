// keel/sums.h: numbers that a thread loads together, and sums over the threads of a warp and of a block.
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

constexpr unsigned MAX_PARTIAL_BLOCKS = 1024;  // of a kernel whose blocks each leave sums of their own
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
