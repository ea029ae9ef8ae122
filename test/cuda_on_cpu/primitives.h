// What a kernel file gets from PTX under nvcc: shared memory, vector access, tensor-core products, asynchronous copies.
#pragma once

#include "cuda_bf16.h"
#include "device_functions.h"

namespace cuda_on_cpu {

inline bool in_shared(const Worker& w, const void* p, size_t bytes) {
    return (const char*)p >= w.shared && (const char*)p + bytes <= w.shared + w.shared_bytes;
}
inline void expect_aligned(const char* what, const void* p, size_t alignment) {
    if (reinterpret_cast<uintptr_t>(p) % alignment)
        device().misuse(formatted("%s: expected an address aligned to %zu bytes, found %p", what, alignment, p));
}
inline void expect_shared(const char* what, const void* p, size_t bytes) {
    Worker& w = device();
    if (!in_shared(w, p, bytes))
        w.misuse(formatted("%s: expected %zu bytes inside the block's %zu bytes of shared memory, found them at offset "
                           "%td",
                           what, bytes, w.shared_bytes, (const char*)p - w.shared));
}

struct MmaOperands {
    float* d;
    const uint32_t* a;
    uint32_t b0, b1;
};
inline float low_bf16(uint32_t pair) { return std::bit_cast<float>(pair << 16); }
inline float high_bf16(uint32_t pair) { return std::bit_cast<float>(pair & 0xffff0000u); }

// d (16,8) += a (16,16) b (16,8), each lane holding the elements that PTX's fragment tables give it.
inline void multiply_fragments(Warp& warp) {
    device().work.operations += 2 * 16 * 8 * 16;
    typedef float Row __attribute__((vector_size(32)));  // 8 columns
    alignas(32) float a[16][16], b[16][8], d[16][8];     // a is (row, k), b (k, column)
    for (int lane = 0; lane < 32; lane++) {
        const MmaOperands& o = *static_cast<MmaOperands*>(warp.operands[lane]);
        int group = lane / 4, pair = lane % 4 * 2;
        for (int i = 0; i < 4; i++) {  // 0: upper left, 1: lower left, 2: upper right, 3: lower right
            float* at = &a[group + i % 2 * 8][pair + i / 2 * 8];
            at[0] = low_bf16(o.a[i]), at[1] = high_bf16(o.a[i]);
        }
        b[pair][group] = low_bf16(o.b0), b[pair + 1][group] = high_bf16(o.b0);
        b[pair + 8][group] = low_bf16(o.b1), b[pair + 9][group] = high_bf16(o.b1);
        d[group][pair] = o.d[0], d[group][pair + 1] = o.d[1], d[group + 8][pair] = o.d[2],
        d[group + 8][pair + 1] = o.d[3];
    }
    for (int row = 0; row < 16; row += 4) {
        Row sum[4];
        for (int i = 0; i < 4; i++) memcpy(&sum[i], d[row + i], sizeof(Row));
        for (int k = 0; k < 16; k++) {
            Row columns;
            memcpy(&columns, b[k], sizeof(Row));
            for (int i = 0; i < 4; i++) sum[i] += a[row + i][k] * columns;
        }
        for (int i = 0; i < 4; i++) memcpy(d[row + i], &sum[i], sizeof(Row));
    }
    for (int lane = 0; lane < 32; lane++) {
        float* to = static_cast<MmaOperands*>(warp.operands[lane])->d;
        int group = lane / 4, pair = lane % 4 * 2;
        to[0] = d[group][pair], to[1] = d[group][pair + 1], to[2] = d[group + 8][pair], to[3] = d[group + 8][pair + 1];
    }
}

struct LdmatrixOperands {
    uint32_t* r;
    const __nv_bfloat16* row;
};
// Lane l gets, of each 8x8 matrix, row l/4's elements 2(l%4) and 2(l%4)+1; of the transpose, with `transposed`.
inline void load_matrices(Warp& warp, bool transposed) {
    auto operands = [&](int lane) -> LdmatrixOperands& { return *static_cast<LdmatrixOperands*>(warp.operands[lane]); };
    for (int matrix = 0; matrix < 4; matrix++) {
        unsigned short rows[8][8];
        for (int row = 0; row < 8; row++) memcpy(rows[row], operands(matrix * 8 + row).row, 16);
        for (int lane = 0; lane < 32; lane++) {
            int row = lane / 4, pair = lane % 4 * 2;
            uint32_t low = transposed ? rows[pair][row] : rows[row][pair],
                     high = transposed ? rows[pair + 1][row] : rows[row][pair + 1];
            operands(lane).r[matrix] = low | high << 16;
        }
    }
}
__forceinline__ void ldmatrix(uint32_t (&r)[4], const __nv_bfloat16* row, bool transposed, int line) {
    expect_aligned("ldmatrix_x4", row, 16);
    expect_shared("ldmatrix_x4", row, 16);
    Worker& w = device();
    LdmatrixOperands mine{r, row};
    w.warps[w.current->index / 32].operands[w.current->index % 32] = &mine;
    w.collective(Wait::ldmatrix, ~0u, line, [transposed](Warp& warp) { load_matrices(warp, transposed); });
}

// For the warpgroup products that may read these 16 bytes: a write begins, and has happened.
inline void note_write(Worker& w, const char* what, const void* p);
inline void note_written(Worker& w, unsigned thread, const void* p);

}  // namespace cuda_on_cpu

// The block's shared memory, at the type of the kernel's struct.
template <class T>
T& shared() {
    cuda_on_cpu::Worker& w = cuda_on_cpu::device();
    static_assert(alignof(T) <= cuda_on_cpu::shared_alignment, "shared memory is aligned to 1024 bytes");
    if (sizeof(T) > w.shared_bytes)
        w.misuse(cuda_on_cpu::formatted("shared<T>(): expected a launch with %zu bytes of shared memory, found %zu",
                                        sizeof(T), w.shared_bytes));
    return *reinterpret_cast<T*>(w.shared);
}

template <class Vector, class T>
Vector* as_vector(T* p) {
    cuda_on_cpu::expect_aligned("as_vector", p, alignof(Vector));
    return reinterpret_cast<Vector*>(p);
}

__forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, CUDA_ON_CPU_LINE) {
    cuda_on_cpu::Worker& w = cuda_on_cpu::device();
    cuda_on_cpu::MmaOperands mine{d, a, b0, b1};
    w.warps[w.current->index / 32].operands[w.current->index % 32] = &mine;
    w.collective(cuda_on_cpu::Wait::mma, ~0u, line, cuda_on_cpu::multiply_fragments);
}

__forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const __nv_bfloat16* row, CUDA_ON_CPU_LINE) {
    cuda_on_cpu::ldmatrix(r, row, false, line);
}
__forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const __nv_bfloat16* row, CUDA_ON_CPU_LINE) {
    cuda_on_cpu::ldmatrix(r, row, true, line);
}

// The copy lands at its wait, as late as hardware may let it; until then its destination is poison.
inline void cp_async_16(void* shared_dst, const void* global_src, bool valid) {
    using namespace cuda_on_cpu;
    expect_aligned("cp_async_16, destination", shared_dst, 16);
    expect_shared("cp_async_16, destination", shared_dst, 16);
    if (valid) expect_aligned("cp_async_16, source", global_src, 16);
    Worker& w = device();
    if (valid && in_shared(w, global_src, 1))
        w.misuse("cp_async_16: expected a source in global memory, found shared memory");
    note_write(w, "cp_async_16", shared_dst);
    memset(shared_dst, settings().poison, 16);
    w.work.copied += 16;
    w.current->copies.push_back({shared_dst, valid ? global_src : nullptr, w.current->groups_committed});
}
inline void cp_async_commit() { cuda_on_cpu::device().current->groups_committed++; }
// Lands the groups that are older than the N newest. Copies issued since the last commit are in no group yet.
template <int N>
void cp_async_wait() {
    static_assert(N >= 0);
    cuda_on_cpu::Worker& w = cuda_on_cpu::device();
    cuda_on_cpu::Fiber& self = *w.current;
    size_t landed = 0;
    for (; landed < self.copies.size() && self.copies[landed].group + N < self.groups_committed; landed++) {
        const cuda_on_cpu::AsyncCopy& copy = self.copies[landed];
        copy.from ? memcpy(copy.to, copy.from, 16) : memset(copy.to, 0, 16);
        cuda_on_cpu::note_written(w, self.index, copy.to);
    }
    self.copies.erase(self.copies.begin(), self.copies.begin() + std::ptrdiff_t(landed));
}

inline unsigned load_acquire(const unsigned* p) { return cuda_on_cpu::atomic(const_cast<unsigned*>(p)).load(); }
inline void store_release(unsigned* p, unsigned value) { cuda_on_cpu::atomic(p).exchange(value); }

// What launches that overlap must do: wait before they touch global memory, and only then let the next one start. Here
// a kernel starts when the one before has ended; that each thread waits, and waits first, is checked. Code built for
// less than 9.0 does neither.
__forceinline__ void wait_for_predecessor() {
    if (cuda_on_cpu::settings().ptx >= 90) cuda_on_cpu::device().current->waited = true;
}
__forceinline__ void start_successor() {
    cuda_on_cpu::Worker& w = cuda_on_cpu::device();
    if (cuda_on_cpu::settings().ptx >= 90 && w.launch->overlaps && !w.current->waited)
        w.misuse("start_successor(): expected wait_for_predecessor() before it in a launch that may overlap, found "
                 "none");
}

inline float fast_exp2(float x) { return exp2f(x); }

#include "wgmma.h"
