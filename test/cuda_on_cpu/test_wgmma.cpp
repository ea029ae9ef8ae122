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

// ----- Layouts

TEST_CASE("fragments and tiles lie as CUTLASS's layouts say") {
    using namespace cuda_on_cpu;
    int wrong = 0;
    for (int thread = 0; thread < 128; thread++)
        for (int i = 0; i < 128; i++) {  // 64 rows by 256 columns: d for N = 256, whose first are those of all others
            Place at = place_in_fragment(thread, i);
            wrong += at.row + 64 * at.column != wgmma_layouts::fragment(thread, i);
        }
    CHECK(wrong == 0);
    for (uint32_t start : {0u, 5 * 1024u, 32 * 1024u}) {
        uint32_t leading = 6 * 1024, stride = 2 * 1024;
        auto built = [&](uint32_t from) {
            return uint64_t(from >> 4 | leading >> 4 << 16) | uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
        };
        for (int mn = 0; mn < 256; mn++)
            for (int k = 0; k < 16; k++) {
                for (uint32_t step : {0u, 32u, 64u, 96u})
                    wrong += tile_address(built(start + step), K_MAJOR, mn, k) !=
                             wgmma_layouts::k_major(start + step, stride, mn, k);
                wrong += tile_address(built(start), MN_MAJOR, mn, k) !=
                         wgmma_layouts::mn_major(start, leading, stride, mn, k);
            }
    }
    CHECK(wrong == 0);
}

// a (64, 16) from fragments by stmatrix, then as a product's operand. b is the identity, d a.
__global__ void store_and_multiply(const __nv_bfloat16* a, const __nv_bfloat16* identity, float* d) {
    char *at = &shared<char>(), *bt = at + BLOCK;
    copy_tile(bt, K_MAJOR, 16, identity, DEPTH, 0, 128);
    uint32_t r[4];
    load_fragment(r, a, 16, 0);
    // Matrices of a fragment: rows 0-7 and 8-15 of columns 0-7, then of columns 8-15.
    int lane = int(threadIdx.x % 32), row = int(threadIdx.x / 32) * 16 + lane % 16;
    stmatrix_x4((__nv_bfloat16*)chunk(at, K_MAJOR, row, lane / 16 * 8), r);
    cp_async_commit();
    cp_async_wait<0>();
    fence_proxy_async();
    __syncthreads();
    float sum[2][4];
    wgmma_fence(sum);
    wgmma<16, K_MAJOR, K_MAJOR>(sum, descriptor(at, K_MAJOR, 0), descriptor(bt, K_MAJOR, 0), false);
    wgmma_commit();
    wgmma_wait<0>(sum);
    for (int n = 0; n < 2; n++)
        for (int i = 0; i < 4; i++) element<16>(d, n, i) = sum[n][i];
}
TEST_CASE("stmatrix stores fragments where products find them") {
    std::vector<__nv_bfloat16> a = random_bf16(64 * 16, 3), identity(16 * DEPTH, __nv_bfloat16(0));
    for (size_t i = 0; i < 16; i++) identity[i * DEPTH + i] = __nv_bfloat16(1);
    Device<__nv_bfloat16> da(a), di(identity);
    Device<float> d(64 * 16);
    CHECK_OK(launch(store_and_multiply, 1, 128, size_t(2 * BLOCK), nullptr, (const __nv_bfloat16*)da.p,
                    (const __nv_bfloat16*)di.p, d.p));
    CHECK(d.read() == std::vector<float>(a.begin(), a.end()));
}

// ----- Misuse

enum Bug {
    NONE,
    READ_EARLY,
    NO_FENCE,
    TOUCHED,
    NO_SECOND_FENCE,
    FRAGMENT_UNNAMED,
    FRAGMENT_TOUCHED,
    NO_COMMIT,
    NO_WAIT,
    COPY_OVER,
    COPY_BEFORE_OTHERS_WAIT,
    STORE_OVER,
    FRAGMENT_CHANGED,
    WRITTEN_IN_FLIGHT,
    SCALED_IN_FLIGHT,
    FRAGMENT_NEVER_NAMED,
    NAMED_IN_FLIGHT,
    FRAGMENT_IN_FLIGHT,
    NEVER_NAMED,
    OTHER_SHAPE,
    NO_PROXY_FENCE,
    PROXY_FENCE_EARLY,
    NEVER_WRITTEN,
    WRITTEN_OTHERWISE,
    MISALIGNED,
    OUTSIDE,
    NO_SWIZZLE,
    BASE_OFFSET,
    ODD_STRIDE,
    WARP_ELSEWHERE,
    WARP_OTHERWISE,
    WARP_WITHOUT,
    HALF_A_WARP,
    LANE_COMMITS,
    LANE_WAITS_ELSEWHERE,
    WARP_ENDS,
    NO_BARRIER
};
__global__ void planted(int bug, const __nv_bfloat16* a, const __nv_bfloat16* b, float* out) {
    char *at = &shared<char>(), *bt = at + BLOCK;
    int thread = int(threadIdx.x), warp = thread / 32;
    auto over = [&] { cp_async_16(bt, b, true), cp_async_commit(), cp_async_wait<0>(); };
    if (bug != NEVER_WRITTEN) copy_tile(at, K_MAJOR, 64, a, DEPTH, 0, 128);
    copy_tile(bt, K_MAJOR, 64, b, DEPTH, 0, 128);
    cp_async_commit();
    if (bug == PROXY_FENCE_EARLY) fence_proxy_async();
    cp_async_wait<0>();
    if (bug != NO_PROXY_FENCE && bug != PROXY_FENCE_EARLY) fence_proxy_async();
    if (bug != NO_BARRIER) __syncthreads();
    if (bug == WRITTEN_OTHERWISE && thread == 0) bt[16] ^= 1;
    uint64_t da = descriptor(at, K_MAJOR, 0), db = descriptor(bt, K_MAJOR, 0);
    if (bug == MISALIGNED) da += 1;
    if (bug == OUTSIDE) da += 1024 * 15 >> 4;
    if (bug == NO_SWIZZLE) da &= ~(uint64_t(3) << 62);
    if (bug == BASE_OFFSET) da |= uint64_t(1) << 49;
    if (bug == ODD_STRIDE) db += uint64_t(128 >> 4) << 32;
    if (bug == WARP_OTHERWISE && warp == 2) db += 2;
    float d[8][4] = {};
    uint32_t fragment[4] = {};
    if (bug == FRAGMENT_UNNAMED) wgmma_fence(d);
    else if (bug != NO_FENCE) wgmma_fence(d, fragment);
    if (bug == TOUCHED) d[7][3] = 1;
    if (bug == FRAGMENT_TOUCHED) fragment[3] = 1;
    if (bug == LANE_COMMITS && thread == 77) wgmma_commit();
    if (bug == WARP_ENDS && warp == 2) return;
    if (bug == WARP_ELSEWHERE && warp == 2) wgmma<64, K_MAJOR, K_MAJOR>(d, da, db, true);
    else if (!(bug == WARP_WITHOUT && warp == 2) && !(bug == HALF_A_WARP && thread < 16))
        wgmma<64, K_MAJOR, K_MAJOR>(d, da, db, true);
    if (bug == OTHER_SHAPE) {
        float (&half)[4][4] = reinterpret_cast<float (&)[4][4]>(d);
        wgmma<32, K_MAJOR, K_MAJOR>(half, da, db, true);
    }
    wgmma<64, K_MAJOR>(d, fragment, db + 2, true);
    if (bug != NO_COMMIT) wgmma_commit();
    if (bug == READ_EARLY) out[thread] = d[3][1];
    if (bug == COPY_OVER && thread == 100) over();
    if (bug == STORE_OVER && warp == 1) stmatrix_x4((__nv_bfloat16*)(at + thread % 32 * 16), fragment);
    if (bug == FRAGMENT_CHANGED && thread == 9) fragment[2] = 1;
    if (bug == WRITTEN_IN_FLIGHT && thread == 9) d[2][2] = 1;
    if (bug == SCALED_IN_FLIGHT && thread == 9) d[2][2] *= 2;
    if (bug == NO_WAIT) return;
    if (bug == NAMED_IN_FLIGHT) wgmma_wait<1>(d);
    if (bug == FRAGMENT_IN_FLIGHT) wgmma_wait<1>(fragment);
    if (bug == NEVER_NAMED) wgmma_wait<0>();
    else if (bug == FRAGMENT_NEVER_NAMED) wgmma_wait<0>(d), fragment[1] = 1, wgmma_fence(d, fragment);
    else if (bug == LANE_WAITS_ELSEWHERE && thread == 9) wgmma_wait<0>(d, fragment);
    else wgmma_wait<0>(d, fragment);
    if (bug == LANE_WAITS_ELSEWHERE)
        wgmma_fence(d), wgmma<64, K_MAJOR, K_MAJOR>(d, da, db, true), wgmma_commit(), wgmma_wait<0>(d);
    if (bug == COPY_BEFORE_OTHERS_WAIT) over();
    if (bug == NO_SECOND_FENCE) wgmma<64, K_MAJOR, K_MAJOR>(d, da, db, true), wgmma_commit(), wgmma_wait<0>(d);
    if (bug == NONE) out[thread] = d[3][1];
}
std::string misuse_of_planted(Bug bug, unsigned threads = 128, std::vector<float>* out = nullptr) {
    Device<__nv_bfloat16> a(random_bf16(64 * DEPTH, 1)), b(random_bf16(64 * DEPTH, 2));
    Device<float> d(128);
    std::string message = misuse_of([&] {
        launch(planted, 1, threads, size_t(2 * BLOCK), nullptr, int(bug), (const __nv_bfloat16*)a.p,
               (const __nv_bfloat16*)b.p, d.p);
    });
    if (out) *out = d.read();
    return message;
}
TEST_CASE("between issue and wait an accumulator's registers are poison") {
    std::vector<float> values;
    for (unsigned char poison : {0x3D, 0xFF}) {
        settings().poison = poison;
        CHECK(misuse_of_planted(READ_EARLY, 128, &values) == "");
        for (float value : values) CHECK(__float_as_uint(value) == (poison == 0xFF ? 0xFFBFFFFF : 0x3D3D3D3D));
        CHECK(misuse_of_planted(NONE, 128, &values) == "");
        for (float value : values) CHECK(std::fabs(value) < 64);
    }
}
TEST_CASE("each misuse of warpgroup products is named") {
    struct {
        Bug bug;
        const char *name, *message;
    } bugs[] = {
        {NO_FENCE, "no wgmma_fence", "expected d as a wgmma_fence has named it, found no wgmma_fence that names it"},
        {TOUCHED, "d written after the fence", "expected d as a wgmma_fence has named it, found that it has changed"},
        {NO_SECOND_FENCE, "no fence after landing", "expected d as a wgmma_fence has named it, found no wgmma_fence"},
        {FRAGMENT_UNNAMED, "a not named", "expected a as a wgmma_fence has named it, found no wgmma_fence"},
        {FRAGMENT_TOUCHED, "a written after the fence", "expected a as a wgmma_fence has named it, found that it has"},
        {NO_COMMIT, "no commit", "wgmma_wait<0>: expected a wgmma_commit after the wgmma of line"},
        {NO_WAIT, "no wait", "expected a wgmma_commit and a wgmma_wait for every wgmma, found that of line"},
        {COPY_OVER, "copy over an operand", "cp_async_16: expected shared memory that no product in flight reads"},
        {COPY_BEFORE_OTHERS_WAIT, "copy before all have waited", "reads until all its warps have waited for it"},
        {STORE_OVER, "stmatrix over an operand", "stmatrix_x4: expected shared memory that no product in flight reads"},
        {FRAGMENT_CHANGED, "a changed in flight", "unchanged until this wait, found it changed"},
        {WRITTEN_IN_FLIGHT, "d written in flight", "expected d untouched until a wgmma_wait names it"},
        {SCALED_IN_FLIGHT, "d scaled in flight", "expected d untouched until a wgmma_wait names it"},
        {FRAGMENT_NEVER_NAMED, "a written, no wait has named it", "unchanged until a wgmma_wait names it, found it"},
        {NAMED_IN_FLIGHT, "d named in flight", "expected registers that no product uses any more, found the d"},
        {FRAGMENT_IN_FLIGHT, "a named in flight", "expected registers that no product uses any more, found the a"},
        {NEVER_NAMED, "d never named", "expected a wgmma_wait that names each accumulator"},
        {OTHER_SHAPE, "another shape in flight", "products of the same shape, found N = 32 after N = 64"},
        {NO_PROXY_FENCE, "no proxy fence", "written without fence_proxy_async, by thread"},
        {PROXY_FENCE_EARLY, "proxy fence before the copy landed", "written without fence_proxy_async, by thread"},
        {NEVER_WRITTEN, "operand never written", "a: expected operands that cp_async_16 or stmatrix_x4 has written"},
        {NO_BARRIER, "no barrier after the proxy fence", "a: expected operands that cp_async_16 or stmatrix_x4 has"},
        {WRITTEN_OTHERWISE, "operand written by a store", "found offset 8208 written otherwise"},
        {MISALIGNED, "start misaligned", "a: expected a start at a multiple of 1024 bytes, or 32, 64 or 96 after one"},
        {OUTSIDE, "outside", "a: expected a tile inside the block's 16384 bytes of shared memory, found a chunk at"},
        {NO_SWIZZLE, "no swizzle", "a: expected 128-byte swizzle (1 << 62), found no swizzle"},
        {BASE_OFFSET, "a base offset", "a: expected zeros in bits 14-15, 30-31 and 46-61"},
        {ODD_STRIDE, "stride", "b: expected a stride of a multiple of 1024 bytes, found 1152"},
        {WARP_ELSEWHERE, "a warp at another line", "expected the threads of a warpgroup to issue the same products"},
        {WARP_OTHERWISE, "a warp's other operand", "expected the threads of a warpgroup to issue the same products"},
        {WARP_WITHOUT, "a warp that skips one", "expected the threads of a warpgroup to issue the same products"},
        {HALF_A_WARP, "half a warp that skips one", "expected the threads of a warpgroup to issue the same products"},
        {WARP_ENDS, "a warp that ends",
         "deadlock: expected all 128 threads of the warpgroup to issue the wgmma that is"},
        {LANE_COMMITS, "a lane that commits more", "and other fences, commits or waits before"},
        {LANE_WAITS_ELSEWHERE, "a lane at another line's wait", "expected the lanes of a warp to have come by"},
    };
    for (auto& planted : bugs)
        for (uint64_t seed = 1; seed <= 5; seed++) {
            WithSeed with(seed);
            INFO(std::string(planted.name), ", seed ", seed);
            std::string found = misuse_of_planted(planted.bug);
            CHECK_HAS(found, planted.message);
            CHECK_HAS(found, "kernel planted(");
        }
    CHECK_HAS(misuse_of_planted(NONE, 96), "expected a warpgroup of 128 threads, found 96");
    settings().ptx = 80;
    CHECK_HAS(misuse_of_planted(NONE), "expected code built for 9.0a, found 80");
    settings().ptx = 90;
}

__global__ void many_products(const __nv_bfloat16* a, const __nv_bfloat16* b, int rounds) {
    char *at = &shared<char>(), *bt = at + BLOCK;
    copy_tile(at, K_MAJOR, 64, a, DEPTH, 0, 128);
    copy_tile(bt, MN_MAJOR, 128, b, DEPTH, 0, 128);
    cp_async_commit(), cp_async_wait<0>(), fence_proxy_async();
    __syncthreads();
    float d[16][4] = {};
    wgmma_fence(d);
    for (int i = 0; i < rounds; i++) {
        for (int k = 0; k < 4; k++)
            wgmma<128, K_MAJOR, MN_MAJOR>(d, descriptor(at, K_MAJOR, k), descriptor(bt, MN_MAJOR, k), true);
        wgmma_commit();
        wgmma_wait<1>();
    }
    wgmma_wait<0>(d);
}
TEST_CASE("the time of an emulated product, for information") {
    Device<__nv_bfloat16> a(random_bf16(64 * DEPTH, 1)), b(random_bf16(128 * DEPTH, 2));
    auto start = std::chrono::steady_clock::now();
    CHECK_OK(launch(many_products, 1, 128, size_t(3 * BLOCK), nullptr, (const __nv_bfloat16*)a.p,
                    (const __nv_bfloat16*)b.p, 250));
    CHECK_OK(cudaDeviceSynchronize());
    double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    MESSAGE("m64n128k16: ", seconds * 1e6 / 1000, " us");
}
