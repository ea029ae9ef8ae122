// keel/primitives.h: what kernels are made of, and all of the trainer's PTX (PTX ISA 8.0, the sections of the
// instructions' names): tensor-core products, asynchronous copies, flags between blocks, overlapping starts.
#pragma once

#include "gpu.h"

#if defined(CUDA_ON_CPU) || (defined(__CUDA_ARCH_FEAT_SM90_ALL) && !defined(KEEL_NO_WGMMA))
#define HOPPER_CODE
#endif
#ifndef CUDA_ON_CPU  // there, the headers bring their own
// The block's shared memory as a T, a struct or the first of an array; its size in bytes is an argument of launch().
template <class T>
__device__ __forceinline__ T& shared() {
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    return *reinterpret_cast<T*>(shared_memory);
}

// p as a pointer to whole vectors, to which it must be aligned.
template <class Vector, class T>
__device__ __forceinline__ Vector* as_vector(T* p) {
    return reinterpret_cast<Vector*>(p);
}

// d (16,8) += a (16,16) b (16,8), a warp's tile on the tensor cores: BF16 in, FP32 out. With g = lane / 4, t = lane % 4
// a lane holds
//     d[0..1] = d(g, 2t..2t+1)     d[2..3] = d(g+8, 2t..2t+1)
//     a[0] = a(g, 2t..2t+1)   a[1] = a(g+8, 2t..2t+1)   a[2] = a(g, 2t+8..2t+9)   a[3] = a(g+8, 2t+8..2t+9)
//     b0 = b(2t..2t+1, g)     b1 = b(2t+8..2t+9, g)
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// p in shared memory as PTX takes it, in bytes.
__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Four 8x8 matrices of BF16 from shared memory. Lane i gives the address of row i % 8 of matrix i / 8 and gets, in
// r[j], elements 2t and 2t+1 of row g of matrix j; transposed, elements (2t, g) and (2t+1, g).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const __nv_bfloat16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const __nv_bfloat16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// 16 bytes from global to shared memory behind the thread's back, zeros where not valid; they are there after the wait,
// and for other threads after a barrier too. wait<N> lets the N groups committed last go on.
__device__ __forceinline__ void cp_async_16(void* to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ----- A warpgroup's products, in code built for Hopper (sm_90a; PTX ISA, "asynchronous warpgroup level matrix
// multiply-accumulate"). d (64,N) = or += a (64,16) b (16,N), BF16 in, FP32 out, by 4 warps together, which go on while
// the tensor cores work. Warp w of the 4 has rows 16w to 16w + 15 of d, and of an a in registers, laid out in its lanes
// as mma_16x8x16's d and a are: d[n] is the tile of columns 8n. From issue to wait no thread may touch the registers
// of a product, nor anyone write the shared memory that it reads.

// An operand in shared memory is a matrix of rows of 64 numbers, 128 bytes: of its chunks of 16 bytes the one at place
// c of row r lies at c ^ r % 8, so that neither 8 rows of one chunk nor 8 chunks of one row meet in a bank. K_MAJOR: a
// row is one row of a, or one column of b, and runs along k, of which a product takes 16 numbers. MN_MAJOR: a row is
// one k, of which a product takes 16, and runs along d's rows or columns.
enum Major { K_MAJOR, MN_MAJOR };  // as wgmma's transpose bits, 0 and 1

// The asm's operands are numbered: d's registers, a (a descriptor, or 4 registers), b, add, then whether a, where it is
// in shared memory, and b are MN_MAJOR. p, 1, 1: d is added to where p; a and b keep their signs.
#define D4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define D16(i) D4(i), D4(i + 1), D4(i + 2), D4(i + 3)
#define LIST_32                                                                                                      \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
    "%30,%31"
#define LIST_64                                                                                                     \
    LIST_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56," \
            "%57,%58,%59,%60,%61,%62,%63"
#define WGMMA(n, list, add, a, b_and_rest, ...)                                                                        \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" add ", 0; wgmma.mma_async.sync.aligned.m64n" n "k16.f32.bf16.bf16 " \
                 "{" list "}, " a ", %" b_and_rest ";}"                                                                \
                 : __VA_ARGS__)
template <int N, Major A, Major B>
__device__ __forceinline__ void wgmma(float (&d)[N / 8][4], uint64_t a, uint64_t b, bool add) {
    static_assert(N == 64 || N == 128);
    if constexpr (N == 64)
        WGMMA("64", LIST_32, "34", "%32", "33, p, 1, 1, %35, %36", D16(0), D16(4) : "l"(a), "l"(b), "r"(int(add)),
              "n"(int(A)), "n"(int(B)));
    else
        WGMMA("128", LIST_64, "66", "%64", "65, p, 1, 1, %67, %68", D16(0), D16(4), D16(8), D16(12) : "l"(a), "l"(b),
              "r"(int(add)), "n"(int(A)), "n"(int(B)));
}
template <int N, Major B>
__device__ __forceinline__ void wgmma(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool add) {
    static_assert(N == 64 || N == 128);
    if constexpr (N == 64)
        WGMMA("64", LIST_32, "37", "{%32,%33,%34,%35}", "36, p, 1, 1, %38", D16(0), D16(4) : "r"(a[0]), "r"(a[1]),
              "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(B)));
    else
        WGMMA("128", LIST_64, "69", "{%64,%65,%66,%67}", "68, p, 1, 1, %70", D16(0), D16(4), D16(8),
              D16(12) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(B)));
}

// fence: products issued after it see what the thread has made of these registers. commit: the products issued since
// the last make a group. wait: until all but the N newest groups are done; these registers, theirs, are the thread's
// again.
template <class T, int N>
__device__ __forceinline__ void pin(T (&registers)[N][4]) {  // so that the compiler moves no access to them across
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            if constexpr (std::is_same_v<T, float>) asm volatile("" : "+f"(registers[i][j])::"memory");
            else asm volatile("" : "+r"(registers[i][j])::"memory");
}
template <class... Registers>
__device__ __forceinline__ void wgmma_fence(Registers&... registers) {
    (pin(registers), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N, class... Registers>
__device__ __forceinline__ void wgmma_wait(Registers&... registers) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
    (pin(registers), ...);
}

// What this thread has written to shared memory, a landed cp.async too, products issued after a barrier see.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The way back of ldmatrix_x4: lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void stmatrix_x4(__nv_bfloat16* row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

// A number in global memory by which one block tells another how far it is: who loads it sees what its storer, and with
// a barrier before it the storer's block, has written before.
__device__ __forceinline__ unsigned load_acquire(const unsigned* p) {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
    return value;
}
__device__ __forceinline__ void store_release(unsigned* p, unsigned value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

// Programmatic dependent launch, in code built for Hopper and later; elsewhere kernels start one after another. wait:
// until the kernel before has ended and its writes are visible. start: once every block of this kernel has come here or
// ended, the next one's may be placed.
__device__ __forceinline__ void wait_for_predecessor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void start_successor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// 2^x, to 2 units in the last place
__device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

// Every kernel calls it before its first access to global memory: launch() lets a kernel start before the one before it
// has ended. The next kernel waits for the end of this one alone, and yet may read what earlier ones wrote: its blocks
// come only once each block here is past its own wait, so that of all kernels before it this one alone is still
// running.
__device__ __forceinline__ void begin_kernel() {
    wait_for_predecessor();
    start_successor();
}

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
