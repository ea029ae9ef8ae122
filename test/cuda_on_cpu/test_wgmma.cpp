// Tests of the warpgroup products on the CPU: their numbers, their layouts, and that each misuse is named.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <doctest/doctest.h>

#include <chrono>

#include "suite.h"
#include "wgmma_layouts.h"

constexpr int DEPTH = 64, BLOCK = 8192;  // k of a tile; bytes of 64 rows of 128 bytes

// A tile of `size` rows or columns by DEPTH, 128-byte swizzle. K-major: a row of 128 bytes for each mn. MN-major:
// blocks of 64 mn, each with a row for each k.
uint64_t descriptor(const char* tile, Major major, int step) {
    uint32_t address = shared_address(tile) + uint32_t(step * (major == K_MAJOR ? 32 : 2048));
    return (address & 0x3FFFF) >> 4 | uint64_t(BLOCK >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
// The place of the eight numbers from (mn, k) on.
char* chunk(char* tile, Major major, int mn, int k) {
    int row = major == K_MAJOR ? mn : mn / 64 * 64 + k, column = major == K_MAJOR ? k / 8 : mn % 64 / 8;
    return tile + row * 128 + (column ^ row % 8) * 16;
}
int tile_bytes(int size) { return (size + 63) / 64 * BLOCK; }
// From (size, depth), or from its transpose where MN-major; by all threads from `first` on.
void copy_tile(char* tile, Major major, int size, const __nv_bfloat16* from, int depth, int first, int threads) {
    for (int i = int(threadIdx.x) - first; i < size * DEPTH / 8; i += threads) {
        int row = major == K_MAJOR ? i / (DEPTH / 8) : i / (size / 8),
            column = (major == K_MAJOR ? i % (DEPTH / 8) : i % (size / 8)) * 8;
        int mn = major == K_MAJOR ? row : column, k = major == K_MAJOR ? column : row;
        cp_async_16(chunk(tile, major, mn, k), from + (major == K_MAJOR ? mn * depth + k : k * size + mn), true);
    }
}
// A thread's fragment of a K-major a (64, depth).
void load_fragment(uint32_t (&r)[4], const __nv_bfloat16* a, int depth, int k) {
    int thread = int(threadIdx.x % 128), g = thread / 32 * 16 + thread % 32 / 4, t = thread % 4 * 2;
    for (int i = 0; i < 4; i++) memcpy(&r[i], a + (g + i % 2 * 8) * depth + k + i / 2 * 8 + t, 4);
}
template <int N>
float& element(float* d, int n, int i) {
    int thread = int(threadIdx.x % 128);
    return d[(thread / 32 * 16 + thread % 32 / 4 + i / 2 * 8) * N + 8 * n + thread % 4 * 2 + i % 2];
}

// d (64, N) += a (64, depth) b (depth, N) by each warpgroup, which has an a and a d of its own.
template <int N, Major A, Major B, bool A_IN_REGISTERS>
__global__ void multiply(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d, int tiles) {
    char* memory = &shared<char>();
    int group = int(threadIdx.x / 128), depth = tiles * DEPTH, of_a = int(blockDim.x / 128) * BLOCK;
    a += group * 64 * depth, d += group * 64 * N;
    auto a_tile = [&](int i) { return memory + i * (of_a + tile_bytes(N)) + group * BLOCK; };
    auto b_tile = [&](int i) { return memory + i * (of_a + tile_bytes(N)) + of_a; };
    for (int i = 0; i < tiles; i++) {
        if (!A_IN_REGISTERS)
            copy_tile(a_tile(i), A, 64, a + i * DEPTH * (A == K_MAJOR ? 1 : 64), depth, group * 128, 128);
        copy_tile(b_tile(i), B, N, b + i * DEPTH * (B == K_MAJOR ? 1 : N), depth, 0, int(blockDim.x));
        cp_async_commit();
    }
    float sum[N / 8][4];
    for (int n = 0; n < N / 8; n++)
        for (int i = 0; i < 4; i++) sum[n][i] = element<N>(d, n, i);
    uint32_t fragments[2][4][4];
    cp_async_wait<0>();
    fence_proxy_async();
    __syncthreads();
    for (int i = 0; i < tiles; i++) {
        if (A_IN_REGISTERS)
            for (int k = 0; k < 4; k++) load_fragment(fragments[i % 2][k], a, depth, i * DEPTH + k * 16);
        wgmma_fence(sum, fragments[i % 2]);
        for (int k = 0; k < 4; k++)
            if constexpr (A_IN_REGISTERS) wgmma<N, B>(sum, fragments[i % 2][k], descriptor(b_tile(i), B, k), true);
            else wgmma<N, A, B>(sum, descriptor(a_tile(i), A, k), descriptor(b_tile(i), B, k), true);
        wgmma_commit();
        wgmma_wait<1>(fragments[(i + 1) % 2]);
    }
    wgmma_wait<0>(sum);
    for (int n = 0; n < N / 8; n++)
        for (int i = 0; i < 4; i++) element<N>(d, n, i) = sum[n][i];
}

std::vector<__nv_bfloat16> random_bf16(size_t n, uint32_t seed) {
    std::vector<__nv_bfloat16> values(n);
    for (auto& value : values)
        seed = seed * 1664525 + 1013904223, value = __nv_bfloat16(float(int(seed >> 8)) * 0x1p-23f - 1);
    return values;
}

template <int N, Major A, Major B, bool A_IN_REGISTERS = false>
void check_product(int groups) {
    constexpr int TILES = 2, K = TILES * DEPTH;
    INFO("N = ", N, ", majors ", int(A), " ", int(B), A_IN_REGISTERS ? ", a in registers, " : ", ", groups,
         " warpgroups");
    std::vector<__nv_bfloat16> a = random_bf16(size_t(groups * 64 * K), 1), b = random_bf16(size_t(N * K), 2);
    std::vector<float> expected(size_t(groups * 64 * N), 0.25f);
    Device<__nv_bfloat16> da(a), db(b);
    Device<float> dd(expected);
    for (int row = 0; row < groups * 64; row++)
        for (int n = 0; n < N; n++) {
            float& sum = expected[size_t(row * N + n)];
            for (int k = 0; k < K; k++)
                sum += float(a[size_t(row / 64 * 64 * K + (A == K_MAJOR ? row % 64 * K + k : k * 64 + row % 64))]) *
                       float(b[size_t(B == K_MAJOR ? n * K + k : k * N + n)]);
        }
    auto kernel = multiply<N, A, B, A_IN_REGISTERS>;
    size_t bytes = size_t(TILES * (groups * BLOCK + tile_bytes(N)));
    CHECK_OK(cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
    CHECK_OK(launch(kernel, 1, unsigned(groups * 128), bytes, nullptr, (const __nv_bfloat16*)da.p,
                    (const __nv_bfloat16*)db.p, dd.p, TILES));
    CHECK(dd.read() == expected);
}
template <int N>
void check_products(int groups) {
    check_product<N, K_MAJOR, K_MAJOR>(groups);
    check_product<N, K_MAJOR, MN_MAJOR>(groups);
    check_product<N, MN_MAJOR, K_MAJOR>(groups);
    check_product<N, MN_MAJOR, MN_MAJOR>(groups);
    check_product<N, K_MAJOR, K_MAJOR, true>(groups);
    check_product<N, K_MAJOR, MN_MAJOR, true>(groups);
}
TEST_CASE("products have the bits of a scalar loop, for both majors, a in registers, groups in flight, two "
          "warpgroups") {
    unsigned char before = settings().poison;
    for (unsigned char poison : {0xFF, 0x3D})
        for (uint64_t seed : {1, 2, 3}) {
            WithSeed with(seed);
            settings().poison = poison;
            check_products<32>(1 + int(seed % 2));
            check_products<64>(2);
            check_products<128>(1 + int(seed % 2));
        }
    check_product<192, K_MAJOR, MN_MAJOR>(1);
    check_product<256, K_MAJOR, K_MAJOR>(1);
    check_product<8, K_MAJOR, K_MAJOR>(1);
    settings().poison = before;
}
