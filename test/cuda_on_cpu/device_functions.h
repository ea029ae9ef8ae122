// The functions that kernels call: barriers, shuffles, votes, atomics, arithmetic.
#pragma once

#include <atomic>
#include <bit>
#include <cmath>
#include <type_traits>

#include "fibers.h"

// The line of the call is taken along for the messages.
#define CUDA_ON_CPU_LINE int line = __builtin_LINE()

__forceinline__ void __syncthreads(CUDA_ON_CPU_LINE) { cuda_on_cpu::device().barrier(0, line); }
__forceinline__ int __syncthreads_count(int predicate, CUDA_ON_CPU_LINE) {
    return cuda_on_cpu::device().barrier(predicate != 0, line);
}
__forceinline__ int __syncthreads_or(int predicate, CUDA_ON_CPU_LINE) {
    return cuda_on_cpu::device().barrier(predicate != 0, line) != 0;
}
__forceinline__ int __syncthreads_and(int predicate, CUDA_ON_CPU_LINE) {
    return cuda_on_cpu::device().barrier(predicate == 0, line) == 0;
}

namespace cuda_on_cpu {

// Every lane of the mask brings a value and the lane that it reads from, and gets that lane's value.
template <class T>
__forceinline__ T shuffle(unsigned mask, T value, unsigned source, int line) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
    Worker& w = device();
    unsigned lane = w.current->index % 32;
    Warp& warp = w.warps[w.current->index / 32];
    if (!(mask & warp.exists & (1u << source)))
        w.misuse(formatted("a shuffle (line %d, mask 0x%08x): expected a source lane of the mask, found lane %u", line,
                           mask, source));
    memcpy(&warp.value[lane], &value, sizeof value);
    warp.source[lane] = source;
    uint64_t result;
    warp.operands[lane] = &result;
    w.collective(Wait::shuffle, mask, line, [mask](Warp& warp) {
        for (unsigned rest = mask & warp.exists; rest; rest &= rest - 1) {
            int to = __builtin_ctz(rest);
            *static_cast<uint64_t*>(warp.operands[to]) = warp.value[warp.source[to]];
        }
    });
    memcpy(&value, &result, sizeof value);
    return value;
}

// The lanes of the mask whose predicate holds.
__forceinline__ unsigned vote(unsigned mask, bool predicate, int line) {
    Worker& w = device();
    unsigned lane = w.current->index % 32;
    Warp& warp = w.warps[w.current->index / 32];
    unsigned result;
    warp.value[lane] = predicate;
    warp.operands[lane] = &result;
    w.collective(Wait::vote, mask, line, [mask](Warp& warp) {
        unsigned all = 0;
        for (unsigned rest = mask & warp.exists; rest; rest &= rest - 1)
            all |= unsigned(warp.value[__builtin_ctz(rest)]) << __builtin_ctz(rest);
        for (unsigned rest = mask & warp.exists; rest; rest &= rest - 1)
            *static_cast<unsigned*>(warp.operands[__builtin_ctz(rest)]) = all;
    });
    return result;
}

inline unsigned lane() { return device().current->index % 32; }
// Shuffles stay inside segments of `width` lanes, a power of two.
inline unsigned in_segment(unsigned lane, int width, int wanted) {
    unsigned first = lane & ~unsigned(width - 1);
    return wanted < 0 || wanted >= width ? lane : first + unsigned(wanted);
}

// Other threads may run before an atomic or a fence; always at a nanosleep, so that a spinning thread lets others go
// on.
inline void maybe_yield(uint32_t one_in) {
    if (!worker || worker->current == &worker->home) return;
    if (worker->random.below(one_in) == 0) worker->yield();
}
template <class T>
std::atomic_ref<T> atomic(T* p) {
    maybe_yield(8);
    if (reinterpret_cast<uintptr_t>(p) % sizeof(T))
        device().misuse(formatted("an atomic: expected an address aligned to %zu bytes, found %p", sizeof(T),
                                  (void*)p));
    return std::atomic_ref<T>(*p);
}
template <class T, class Change>
T atomic_change(T* p, Change&& change) {
    auto at = atomic(p);
    T old = at.load();
    while (!at.compare_exchange_weak(old, change(old))) {}
    return old;
}

}  // namespace cuda_on_cpu

__forceinline__ void __syncwarp(unsigned mask = ~0u, CUDA_ON_CPU_LINE) {
    cuda_on_cpu::device().collective(cuda_on_cpu::Wait::syncwarp, mask, line, [](cuda_on_cpu::Warp&) {});
}
template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_ON_CPU_LINE) {
    return cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::in_segment(cuda_on_cpu::lane(), width, source & (width - 1)),
                                line);
}
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, CUDA_ON_CPU_LINE) {
    unsigned lane = cuda_on_cpu::lane(), other = lane ^ unsigned(lanes);
    // A lane of a later segment is out of reach; an earlier one is not, as on a card.
    return cuda_on_cpu::shuffle(mask, value, other < (lane | unsigned(width - 1)) + 1 ? other : lane, line);
}
template <class T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_LINE) {
    unsigned lane = cuda_on_cpu::lane();
    return cuda_on_cpu::shuffle(mask, value,
                                cuda_on_cpu::in_segment(lane, width, int(lane & unsigned(width - 1)) + int(delta)),
                                line);
}
template <class T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_LINE) {
    unsigned lane = cuda_on_cpu::lane();
    return cuda_on_cpu::shuffle(mask, value,
                                cuda_on_cpu::in_segment(lane, width, int(lane & unsigned(width - 1)) - int(delta)),
                                line);
}
__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_LINE) {
    return cuda_on_cpu::vote(mask, predicate != 0, line);
}
__forceinline__ int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_LINE) {
    return cuda_on_cpu::vote(mask, predicate != 0, line) != 0;
}
__forceinline__ int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_LINE) {
    return cuda_on_cpu::vote(mask, predicate == 0, line) == 0;
}
inline unsigned __activemask() { return 1u << cuda_on_cpu::lane(); }  // nothing more is promised

inline void __threadfence() {
    std::atomic_thread_fence(std::memory_order_seq_cst);
    cuda_on_cpu::maybe_yield(2);
}
inline void __threadfence_block() { __threadfence(); }
inline void __threadfence_system() { __threadfence(); }
inline void __nanosleep(unsigned) { cuda_on_cpu::maybe_yield(1); }

// Only the types that CUDA has, so that what compiles here compiles there.
#define CUDA_ON_CPU_ATOMICS(T)                                                          \
    inline T atomicMin(T* p, T v) {                                                     \
        return cuda_on_cpu::atomic_change(p, [v](T old) { return v < old ? v : old; }); \
    }                                                                                   \
    inline T atomicMax(T* p, T v) {                                                     \
        return cuda_on_cpu::atomic_change(p, [v](T old) { return v > old ? v : old; }); \
    }
CUDA_ON_CPU_ATOMICS(int)
CUDA_ON_CPU_ATOMICS(unsigned)
CUDA_ON_CPU_ATOMICS(long long)
CUDA_ON_CPU_ATOMICS(unsigned long long)
#undef CUDA_ON_CPU_ATOMICS
#define CUDA_ON_CPU_ATOMICS(T) \
    inline T atomicAdd(T* p, T v) { return cuda_on_cpu::atomic(p).fetch_add(v); }
CUDA_ON_CPU_ATOMICS(int)
CUDA_ON_CPU_ATOMICS(unsigned)
CUDA_ON_CPU_ATOMICS(unsigned long long)
CUDA_ON_CPU_ATOMICS(float)
CUDA_ON_CPU_ATOMICS(double)
#undef CUDA_ON_CPU_ATOMICS
inline float4 atomicAdd(float4* p, float4 v) {  // compute capability 9.0: each number by itself
    return {atomicAdd(&p->x, v.x), atomicAdd(&p->y, v.y), atomicAdd(&p->z, v.z), atomicAdd(&p->w, v.w)};
}
#define CUDA_ON_CPU_ATOMICS(T)                                                    \
    inline T atomicExch(T* p, T v) { return cuda_on_cpu::atomic(p).exchange(v); } \
    inline T atomicCAS(T* p, T expected, T v) {                                   \
        cuda_on_cpu::atomic(p).compare_exchange_strong(expected, v);              \
        return expected;                                                          \
    }                                                                             \
    inline T atomicAnd(T* p, T v) { return cuda_on_cpu::atomic(p).fetch_and(v); } \
    inline T atomicOr(T* p, T v) { return cuda_on_cpu::atomic(p).fetch_or(v); }   \
    inline T atomicXor(T* p, T v) { return cuda_on_cpu::atomic(p).fetch_xor(v); }
CUDA_ON_CPU_ATOMICS(int)
CUDA_ON_CPU_ATOMICS(unsigned)
CUDA_ON_CPU_ATOMICS(unsigned long long)
#undef CUDA_ON_CPU_ATOMICS
inline float atomicExch(float* p, float v) { return cuda_on_cpu::atomic(p).exchange(v); }
inline int atomicSub(int* p, int v) { return cuda_on_cpu::atomic(p).fetch_sub(v); }
inline unsigned atomicSub(unsigned* p, unsigned v) { return cuda_on_cpu::atomic(p).fetch_sub(v); }
inline unsigned atomicInc(unsigned* p, unsigned limit) {
    return cuda_on_cpu::atomic_change(p, [limit](unsigned old) { return old >= limit ? 0 : old + 1; });
}
inline unsigned atomicDec(unsigned* p, unsigned limit) {
    return cuda_on_cpu::atomic_change(p, [limit](unsigned old) { return old == 0 || old > limit ? limit : old - 1; });
}

template <class T>
T __ldg(const T* p) {
    return *p;
}
template <class T>
T __ldcs(const T* p) {
    return *p;
}
template <class T>
T __ldcg(const T* p) {
    return *p;
}
template <class T>
T __ldca(const T* p) {
    return *p;
}
template <class T>
void __stcs(T* p, T value) {
    *p = value;
}
template <class T>
void __stcg(T* p, T value) {
    *p = value;
}

// glibc declares the first of these as C functions that it does not export.
extern "C" inline float __expf(float x) noexcept { return expf(x); }
extern "C" inline float __logf(float x) noexcept { return logf(x); }
extern "C" inline float __log2f(float x) noexcept { return log2f(x); }
extern "C" inline float __powf(float x, float y) noexcept { return powf(x, y); }
extern "C" inline float __sinf(float x) noexcept { return sinf(x); }
extern "C" inline float __cosf(float x) noexcept { return cosf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __frsqrt_rn(float x) { return 1 / sqrtf(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
inline float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1 : 0; }
// Rounded by themselves: the compiler must not contract them with their neighbours.
inline float __fadd_rn(float x, float y) {
    volatile float sum = x + y;
    return sum;
}
inline float __fsub_rn(float x, float y) {
    volatile float difference = x - y;
    return difference;
}
inline float __fmul_rn(float x, float y) {
    volatile float product = x * y;
    return product;
}
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline double __dadd_rn(double x, double y) {
    volatile double sum = x + y;
    return sum;
}
inline double __dmul_rn(double x, double y) {
    volatile double product = x * y;
    return product;
}

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline int __float2int_rn(float x) { return int(nearbyintf(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned((uint64_t(x) * y) >> 32); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    return (unsigned long long)(((unsigned __int128)x * y) >> 64);
}
inline int __mulhi(int x, int y) { return int((int64_t(x) * y) >> 32); }
inline unsigned __brev(unsigned x) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; i++) reversed |= (x >> i & 1) << (31 - i);
    return reversed;
}

// CUDA's min and max take mixed integer types; the result has the type of the usual arithmetic conversions.
#define CUDA_ON_CPU_MIN_MAX(R, A, B) \
    inline R min(A a, B b) {         \
        R x = a, y = b;              \
        return x < y ? x : y;        \
    }                                \
    inline R max(A a, B b) {         \
        R x = a, y = b;              \
        return x > y ? x : y;        \
    }
CUDA_ON_CPU_MIN_MAX(int, int, int)
CUDA_ON_CPU_MIN_MAX(unsigned, unsigned, unsigned)
CUDA_ON_CPU_MIN_MAX(unsigned, int, unsigned)
CUDA_ON_CPU_MIN_MAX(unsigned, unsigned, int)
CUDA_ON_CPU_MIN_MAX(long, long, long)
CUDA_ON_CPU_MIN_MAX(unsigned long, unsigned long, unsigned long)
CUDA_ON_CPU_MIN_MAX(unsigned long, long, unsigned long)
CUDA_ON_CPU_MIN_MAX(unsigned long, unsigned long, long)
CUDA_ON_CPU_MIN_MAX(long long, long long, long long)
CUDA_ON_CPU_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
CUDA_ON_CPU_MIN_MAX(unsigned long long, long long, unsigned long long)
CUDA_ON_CPU_MIN_MAX(unsigned long long, unsigned long long, long long)
#undef CUDA_ON_CPU_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(float a, double b) { return fmin(a, b); }
inline double max(float a, double b) { return fmax(a, b); }
inline double min(double a, float b) { return fmin(a, b); }
inline double max(double a, float b) { return fmax(a, b); }
