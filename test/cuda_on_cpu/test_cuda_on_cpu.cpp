// Tests of the CUDA runtime on the CPU, on kernels written for the purpose.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <doctest/doctest.h>
#include <sys/wait.h>

#include <chrono>
#include <set>

#include "suite.h"

struct Stream {
    cudaStream_t s;
    Stream() { CHECK_OK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking)); }
    ~Stream() { cudaStreamDestroy(s); }
    operator cudaStream_t() const { return s; }
};
struct Event {
    cudaEvent_t e;
    Event() { CHECK_OK(cudaEventCreate(&e)); }
    ~Event() { cudaEventDestroy(e); }
    operator cudaEvent_t() const { return e; }
};

// As launch, but the kernel may start before the one before it in its stream has ended.
template <class... Expected, class... Actual>
cudaError_t launch_overlapping(void (*kernel)(Expected...), dim3 grid, dim3 block, cudaStream_t stream,
                               Actual... actual) {
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization,
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = block, config.stream = stream, config.attrs = &overlap,
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, actual...);
}

// ----- bfloat16 and FP8

TEST_CASE("every bfloat16 pattern survives the way through float") {
    int wrong = 0;
    for (uint32_t i = 0; i < 65536; i++) {
        __nv_bfloat16 value = __ushort_as_bfloat16((unsigned short)i);
        float f = __bfloat162float(value);
        bool nan = (i & 0x7fff) > 0x7f80;
        unsigned short back = __bfloat16_as_ushort(__float2bfloat16(f));
        wrong += nan ? !(f != f) || !((back & 0x7fff) > 0x7f80) : back != i || (__float_as_uint(f) != i << 16);
    }
    CHECK(wrong == 0);
}

TEST_CASE("a float becomes the nearest bfloat16, the even one of two equally near") {
    auto bits = [](float x) { return __bfloat16_as_ushort(__nv_bfloat16(x)); };
    auto nearest = [](float x) {  // in double, among the two neighbours
        unsigned short low = (unsigned short)(__float_as_uint(x) >> 16), high = (unsigned short)(low + 1);
        double below = cuda_on_cpu::bf16_value(low),
               above = (high & 0x7fff) == 0x7f80 ? std::copysign(0x1p128, x) : cuda_on_cpu::bf16_value(high);
        double to_low = std::fabs(x - below), to_high = std::fabs(x - above);
        return to_low < to_high || (to_low == to_high && low % 2 == 0) ? low : high;
    };
    int wrong = 0;
    uint32_t x = 12345;
    for (int i = 0; i < 2000000; i++) {
        x = x * 1664525 + 1013904223;
        uint32_t pattern = i % 3 == 0   ? (x & 0xffff0000u) | 0x8000u
                           : i % 3 == 1 ? (x & 0xffff0000u) | (0x8000u + (x >> 8 & 2) - 1)
                                        : x;
        float f = __uint_as_float(pattern);
        if (!(std::fabs(f) <= 3.4e38f)) continue;
        wrong += bits(f) != nearest(f);
    }
    CHECK(wrong == 0);
    CHECK(bits(NAN) == 0x7fff);
    CHECK(bits(__uint_as_float(0x7f800001u)) == 0x7fff);  // a NaN whose upper half alone reads as infinity
    CHECK(bits(3.4028235e38f) == 0x7f80);
    CHECK(bits(INFINITY) == 0x7f80);
    CHECK(bits(-0.0f) == 0x8000);
    __nv_bfloat162 pair = __floats2bfloat162_rn(1, 2);
    CHECK(__bfloat1622float2(pair).y == 2);
    CHECK(sizeof(__nv_bfloat16) == 2);
    CHECK(std::is_trivially_copyable_v<__nv_bfloat162>);
}

template <class F8>
void check_fp8(float largest, float smallest, int numbers) {
    auto encode = [](float value) { return int(F8(value).__x); };
    auto decode = [](int bits) {
        F8 value;
        value.__x = (unsigned char)bits;
        return float(value);
    };
    int finite = 0, wrong = 0;
    float before = -1;
    for (int i = 0; i < 128; i++) {
        float value = decode(i);
        if (!std::isfinite(value)) continue;
        finite++;
        wrong += !(value > before) || encode(value) != i || encode(-value) != i + 128 || decode(i + 128) != -value;
        if (i > 0) {  // halfway goes to the even one, a little less and a little more to the nearer
            float half = (before + value) / 2;
            wrong += encode(half) != (i % 2 ? i - 1 : i) || encode(std::nextafter(half, 0.f)) != i - 1 ||
                     encode(std::nextafter(half, value)) != i;
        }
        before = value;
    }
    CHECK(wrong == 0);
    CHECK(finite == numbers);
    CHECK(before == largest);
    CHECK(decode(1) == smallest);
    CHECK(decode(encode(3 * largest)) == largest);
    CHECK(decode(encode(-INFINITY)) == -largest);
    CHECK(decode(encode(0x1p126f)) == largest);
    CHECK(encode(0x1p-140f) == 0);
    CHECK(std::isnan(decode(encode(NAN))));
}
TEST_CASE("a float becomes the nearest FP8 number of either format, the even one of two equally near, the largest "
          "where it is too large") {
    check_fp8<__nv_fp8_e4m3>(448, 0x1p-9f, 127);
    check_fp8<__nv_fp8_e5m2>(57344, 0x1p-16f, 124);
}

// ----- threads, barriers, shuffles, votes, atomics

__global__ void write_indices(int* out) {
    int thread = int(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
    int block = int(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
    int i = block * int(blockDim.x * blockDim.y * blockDim.z) + thread;
    out[i] = i;
}
TEST_CASE("every thread of every block runs once, with its own indices") {
    for (int threads_per_worker : {1, 2, 4}) {
        int before = std::exchange(settings().threads, threads_per_worker);
        Device<int> out(3 * 2 * 4 * 60);
        CHECK_OK(launch(write_indices, dim3(3, 2, 4), dim3(5, 4, 3), 0, nullptr, out.p));
        std::vector<int> found = out.read();
        for (size_t i = 0; i < found.size(); i++) REQUIRE(found[i] == int(i));
        settings().threads = before;
    }
}

struct Reversed { int value[256]; };
__global__ void reverse(int* x, int rounds) {
    Reversed& s = shared<Reversed>();
    for (int round = 0; round < rounds; round++) {
        s.value[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
        __syncthreads();
        x[blockIdx.x * blockDim.x + threadIdx.x] = s.value[blockDim.x - 1 - threadIdx.x] + 1;
        __syncthreads();
    }
}
TEST_CASE("what is written before a barrier is read after it") {
    std::vector<int> x(1024);
    for (int i = 0; i < 1024; i++) x[size_t(i)] = i;
    Device<int> d(x);
    CHECK_OK(launch(reverse, 4, 256, sizeof(Reversed), nullptr, d.p, 10));
    std::vector<int> found = d.read();
    for (int i = 0; i < 1024; i++) REQUIRE(found[size_t(i)] == i + 10);
}

__global__ void count_in_barriers(int* out) {
    int odd = threadIdx.x % 2, last = threadIdx.x == blockDim.x - 1;
    int sum = __syncthreads_count(odd), any = __syncthreads_or(last), none = __syncthreads_or(0),
        all = __syncthreads_and(1), not_all = __syncthreads_and(!last);
    out[threadIdx.x] = sum * 16 + any * 8 + none * 4 + all * 2 + not_all;
}
TEST_CASE("barriers count, or and and their predicates") {
    Device<int> out(100);
    CHECK_OK(launch(count_in_barriers, 1, 100, 0, nullptr, out.p));
    for (int value : out.read()) CHECK(value == 50 * 16 + 8 + 2);
}

template <class T>
__global__ void shuffle_all(T* out, int width, int by) {
    T mine = T(threadIdx.x * 3 + 1);
    T* to = out + threadIdx.x * 4;
    to[0] = __shfl_sync(~0u, mine, by, width);
    to[1] = __shfl_xor_sync(~0u, mine, by, width);
    to[2] = __shfl_up_sync(~0u, mine, unsigned(by), width);
    to[3] = __shfl_down_sync(~0u, mine, unsigned(by), width);
}
template <class T>
void check_shuffles() {
    for (int width : {32, 16, 8, 2})
        for (int by = 0; by < width; by++) {
            Device<T> out(64 * 4);
            CHECK_OK(launch(shuffle_all<T>, 1, 64, 0, nullptr, out.p, width, by));
            std::vector<T> found = out.read();
            for (int i = 0; i < 64; i++) {
                int first = i / width * width, in = i % width;
                auto value = [](int thread) { return T(thread * 3 + 1); };
                REQUIRE(found[size_t(i) * 4] == value(first + by));
                REQUIRE(found[size_t(i) * 4 + 1] == value(first + (in ^ by)));
                REQUIRE(found[size_t(i) * 4 + 2] == value(in >= by ? i - by : i));
                REQUIRE(found[size_t(i) * 4 + 3] == value(in + by < width ? i + by : i));
            }
        }
}
TEST_CASE("shuffles move values of all types between the lanes that their definitions name") {
    check_shuffles<int>();
    check_shuffles<unsigned>();
    check_shuffles<float>();
    check_shuffles<double>();
    check_shuffles<long long>();
    check_shuffles<unsigned long long>();
}

__global__ void vote_halves(unsigned* out) {
    unsigned lane = threadIdx.x % 32;
    // The halves of a warp meet apart from each other, in different branches.
    if (lane < 16) out[threadIdx.x] = __ballot_sync(0xffffu, lane % 3 == 0);
    else
        out[threadIdx.x] =
            unsigned(__all_sync(0xffff0000u, lane >= 16)) + 2 * unsigned(__any_sync(0xffff0000u, lane == 40));
    __syncwarp();
    unsigned sum = lane;
    for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
    out[64 + threadIdx.x] = sum;
}
TEST_CASE("votes and shuffles work on parts of a warp and on the whole") {
    for (uint64_t seed = 1; seed < 20; seed++) {
        WithSeed with(seed);
        Device<unsigned> out(128);
        CHECK_OK(launch(vote_halves, 1, 64, 0, nullptr, out.p));
        std::vector<unsigned> found = out.read();
        for (size_t i = 0; i < 64; i++) {
            REQUIRE(found[i] == (i % 32 < 16 ? 0x9249u : 1u));
            REQUIRE(found[64 + i] == 496);
        }
    }
}

__global__ void atomics(int* ints, unsigned* counts, float* f, double* d, unsigned long long* big) {
    int i = int(blockIdx.x * blockDim.x + threadIdx.x);
    atomicAdd(ints, 1), atomicMax(ints + 1, i), atomicMin(ints + 2, -i);
    for (int old = ints[3], seen; (seen = atomicCAS(ints + 3, old, old + 2)) != old;) old = seen;
    atomicInc(counts, 9);
    atomicAdd(counts + 1, 2u);
    if (atomicExch(counts + 2, 1u) == 0) atomicAdd(counts + 3, 1u);
    atomicAdd(f, 0.5f), atomicAdd(d, 0.25), atomicAdd(big, 1ull << 33);
}
TEST_CASE("atomics of all blocks add up") {
    Device<int> ints(std::vector<int>(4, 0));
    Device<unsigned> counts(std::vector<unsigned>(4, 0));
    Device<float> f(std::vector<float>{0});
    Device<double> d(std::vector<double>{0});
    Device<unsigned long long> big(std::vector<unsigned long long>{0});
    CHECK_OK(launch(atomics, 16, 64, 0, nullptr, ints.p, counts.p, f.p, d.p, big.p));
    CHECK(ints.read() == std::vector<int>{1024, 1023, -1023, 2048});
    CHECK(counts.read() == std::vector<unsigned>{4, 2048, 1, 1});
    CHECK(f.read()[0] == 512);
    CHECK(d.read()[0] == 256);
    CHECK(big.read()[0] == 1024ull << 33);
}

__global__ void last_block_sums(float* out, float* parts, unsigned* arrived) {
    if (threadIdx.x == 0) parts[blockIdx.x] = float(blockIdx.x);
    __threadfence();
    unsigned before = threadIdx.x == 0 ? atomicInc(arrived, gridDim.x - 1) : 0;
    if (__syncthreads_or(threadIdx.x == 0 && before == gridDim.x - 1) && threadIdx.x == 0)
        for (unsigned i = 0; i < gridDim.x; i++) *out += parts[i];
}
TEST_CASE("the last block to arrive sees what all others wrote") {
    Device<float> out(std::vector<float>{0}), parts(100);
    Device<unsigned> arrived(std::vector<unsigned>{0});
    CHECK_OK(launch(last_block_sums, 100, 32, 0, nullptr, out.p, parts.p, arrived.p));
    CHECK(out.read()[0] == 4950);
}

__global__ void wait_for_flag(volatile int* flag) {
    if (threadIdx.x == 0)
        while (*flag != 1) __nanosleep(100);
    else if (threadIdx.x == 1) *flag = 1;
}
TEST_CASE("a thread that spins with __nanosleep lets the thread that it waits for go on") {
    Device<int> flag(std::vector<int>{0});
    CHECK_OK(launch(wait_for_flag, 1, 32, 0, nullptr, (volatile int*)flag.p));
    CHECK(flag.read()[0] == 1);
}

// Blocks take numbers as they start. Each waits for the one before it, of which the first may fail.
__global__ void in_turn(unsigned* next, volatile unsigned* done, unsigned* sum, bool fails) {
    unsigned& mine = shared<unsigned>();
    if (threadIdx.x == 0) mine = atomicAdd(next, 1u);
    __syncthreads();
    if (fails && mine == 0) __shfl_sync(1u, 0, 1);
    if (threadIdx.x == 0)
        while (mine > 0 && done[mine - 1] == 0) __nanosleep(20);
    __syncthreads();
    if (threadIdx.x == 1) sum[mine] = mine + (mine > 0 ? sum[mine - 1] : 0);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) done[mine] = 1;
}
TEST_CASE("a block may wait for one that has started before it, until that one fails") {
    for (int threads : {1, 2, 4}) {
        int before = std::exchange(settings().threads, threads);
        for (bool fails : {false, true}) {
            Device<unsigned> next(std::vector<unsigned>{0}), done(std::vector<unsigned>(200)), sum(200);
            std::string message = misuse_of([&] {
                launch(in_turn, 200, 64, sizeof(unsigned), nullptr, next.p, (volatile unsigned*)done.p, sum.p, fails);
            });
            CHECK(fails == (message != ""));
            if (!fails) CHECK(sum.read()[199] == 19900);
        }
        settings().threads = before;
    }
}

TEST_CASE("integer and bit functions follow their definitions") {
    CHECK(__popc(0xf0f0u) == 8);
    CHECK(__clz(1) == 31);
    CHECK(__clz(0) == 32);
    CHECK(__ffs(8) == 4);
    CHECK(__ffs(0) == 0);
    CHECK(__umulhi(0xffffffffu, 0xffffffffu) == 0xfffffffeu);
    CHECK(__brev(0x80000001u) == 0x80000001u);
    CHECK(__brev(2u) == 0x40000000u);
    CHECK(min(3, 4u) == 3u);
    CHECK(max(-1, 1) == 1);
    CHECK(min(2.5f, 1.5f) == 1.5f);
    CHECK(__float_as_uint(1.0f) == 0x3f800000u);
    CHECK(__expf(0.0f) == 1);
    CHECK(rsqrtf(4.0f) == 0.5f);
    CHECK(__fmaf_rn(2, 3, 4) == 10);
    CHECK(sizeof(float4) == 16);
    CHECK(alignof(float4) == 16);
    CHECK(alignof(float2) == 8);
    CHECK(alignof(float3) == 4);
}

// ----- tensor-core primitives

struct Tiles {
    __nv_bfloat16 a[16][24], b[16][24];  // rows of 48 bytes: aligned to 16, not the dense layout
};
// a (16,16), b (16,8) row-major (k, column), c and d (16,8). Fragments by PTX's tables for mma.m16n8k16.
__global__ void multiply_by_tables(const float* a, const float* b, const float* c, float* d) {
    int lane = int(threadIdx.x % 32), group = lane >> 2, in_group = lane % 4;
    auto pack = [](float low, float high) {
        return __bfloat16_as_ushort(__nv_bfloat16(low)) | uint32_t(__bfloat16_as_ushort(__nv_bfloat16(high))) << 16;
    };
    uint32_t fa[4];
    for (int i = 0; i < 8; i += 2) {
        auto row = [&](int i) { return (0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8; };
        auto column = [&](int i) { return in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0); };
        fa[i / 2] = pack(a[row(i) * 16 + column(i)], a[row(i + 1) * 16 + column(i + 1)]);
    }
    auto brow = [&](int i) { return in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0); };
    uint32_t b0 = pack(b[brow(0) * 8 + group], b[brow(1) * 8 + group]),
             b1 = pack(b[brow(2) * 8 + group], b[brow(3) * 8 + group]);
    float fd[4];
    auto place = [&](int i) { return (i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1); };
    for (int i = 0; i < 4; i++) fd[i] = c[place(i)];
    mma_16x8x16(fd, fa, b0, b1);
    for (int i = 0; i < 4; i++) d[place(i)] = fd[i];
}
// The same, its fragments fetched by ldmatrix: a as four tiles, b (row-major k) by the transpose.
__global__ void multiply_by_ldmatrix(const float* a, const float* b, const float* c, float* d) {
    Tiles& s = shared<Tiles>();
    int lane = int(threadIdx.x);
    for (int i = lane; i < 256; i += 32) s.a[i / 16][i % 16] = __nv_bfloat16(a[i]);
    for (int i = lane; i < 128; i += 32)
        s.b[i / 8][i % 8] = __nv_bfloat16(b[i]), s.b[i / 8][8 + i % 8] = __nv_bfloat16(0.f);
    __syncthreads();
    uint32_t fa[4], fb[4];
    ldmatrix_x4(fa, &s.a[lane % 16][lane / 16 * 8]);
    ldmatrix_x4_trans(fb, &s.b[lane % 16][lane / 16 * 8]);
    int group = lane / 4, pair = lane % 4 * 2;
    float fd[4] = {c[group * 8 + pair], c[group * 8 + pair + 1], c[(group + 8) * 8 + pair],
                   c[(group + 8) * 8 + pair + 1]};
    mma_16x8x16(fd, fa, fb[0], fb[1]);
    d[group * 8 + pair] = fd[0], d[group * 8 + pair + 1] = fd[1], d[(group + 8) * 8 + pair] = fd[2],
                  d[(group + 8) * 8 + pair + 1] = fd[3];
}
TEST_CASE("mma by PTX's fragment tables, and with fragments from ldmatrix, is the scalar product") {
    std::vector<float> a(256), b(128), c(128);
    // Small integers: exact in bfloat16, and their sums in float, so the order of the sum cannot matter.
    for (size_t i = 0; i < 256; i++) a[i] = float(int(i * 37 % 29) - 14);
    for (size_t i = 0; i < 128; i++) b[i] = float(int(i * 53 % 31) - 15), c[i] = float(i);
    Device<float> da(a), db(b), dc(c), dd(128), de(128);
    CHECK_OK(launch(multiply_by_tables, 1, 32, 0, nullptr, da.p, db.p, dc.p, dd.p));
    CHECK_OK(launch(multiply_by_ldmatrix, 1, 32, sizeof(Tiles), nullptr, da.p, db.p, dc.p, de.p));
    std::vector<float> tables = dd.read(), ldmatrix = de.read();
    for (size_t row = 0; row < 16; row++)
        for (size_t column = 0; column < 8; column++) {
            float sum = c[row * 8 + column];
            for (size_t k = 0; k < 16; k++) sum += a[row * 16 + k] * b[k * 8 + column];
            CHECK(tables[row * 8 + column] == sum);
            CHECK(ldmatrix[row * 8 + column] == sum);
        }
}

struct FourMatrices { __nv_bfloat16 m[4][8][8]; };
__global__ void load_four(uint32_t* out) {
    FourMatrices& s = shared<FourMatrices>();
    for (unsigned i = threadIdx.x; i < 256; i += 32) (&s.m[0][0][0])[i] = __ushort_as_bfloat16((unsigned short)i);
    __syncthreads();
    uint32_t r[4], t[4];
    ldmatrix_x4(r, s.m[threadIdx.x / 8][threadIdx.x % 8]);
    ldmatrix_x4_trans(t, s.m[threadIdx.x / 8][threadIdx.x % 8]);
    for (unsigned i = 0; i < 4; i++) out[threadIdx.x * 8 + i] = r[i], out[threadIdx.x * 8 + 4 + i] = t[i];
}
TEST_CASE("ldmatrix gives lane l row l/4 and elements 2(l%4), 2(l%4)+1, or of the transpose") {
    Device<uint32_t> out(32 * 8);
    CHECK_OK(launch(load_four, 1, 32, sizeof(FourMatrices), nullptr, out.p));
    std::vector<uint32_t> found = out.read();
    for (uint32_t lane = 0; lane < 32; lane++)
        for (uint32_t m = 0; m < 4; m++) {
            uint32_t row = lane / 4, pair = lane % 4 * 2, straight = m * 64 + row * 8 + pair,
                     across = m * 64 + pair * 8 + row;
            CHECK(found[lane * 8 + m] == (straight | (straight + 1) << 16));
            CHECK(found[lane * 8 + 4 + m] == (across | (across + 8) << 16));
        }
}

struct Copies { float4 x[4][32]; };
__global__ void copy_async(const float4* from, float4* out) {
    Copies& s = shared<Copies>();
    unsigned i = threadIdx.x;
    for (unsigned stage = 0; stage < 4; stage++) {
        s.x[stage][i] = make_float4(7, 7, 7, 7);
        cp_async_16(&s.x[stage][i], from + stage * 32 + i, stage != 3);
        cp_async_commit();
    }
    out[i] = s.x[0][i];  // before any wait
    cp_async_wait<3>();
    out[32 + i] = s.x[0][i];
    out[64 + i] = s.x[1][i];
    cp_async_wait<1>();
    out[96 + i] = s.x[2][i];
    cp_async_wait<0>();
    out[128 + i] = s.x[3][i];
}
TEST_CASE("cp.async lands at its wait and not before, group by group, and zeros where it is not valid") {
    std::vector<float4> from(128);
    for (size_t i = 0; i < 128; i++) from[i] = make_float4(float(i), 1, 2, 3);
    Device<float4> source(from), out(160);
    CHECK_OK(launch(copy_async, 1, 32, sizeof(Copies), nullptr, (const float4*)source.p, out.p));
    std::vector<float4> found = out.read();
    for (size_t i = 0; i < 32; i++) {
        REQUIRE(__float_as_uint(found[i].x) == 0x01010101u * settings().poison);
        REQUIRE(found[32 + i].x == float(i));
        REQUIRE(__float_as_uint(found[64 + i].w) == 0x01010101u * settings().poison);
        REQUIRE(found[96 + i].x == float(64 + i));
        REQUIRE(found[128 + i].w == 0);
    }
}

// ----- misuse inside kernels

__global__ void some_skip_the_barrier(int from) {
    if (int(threadIdx.x) >= from) return;
    __syncthreads();
}
__global__ void barrier_in_two_places() {
    if (threadIdx.x < 32) __syncthreads();
    else __syncthreads();
}
__global__ void barrier_beside_shuffle() {
    if (threadIdx.x % 32 == 5) __syncthreads();
    else __shfl_sync(~0u, 1, 0);
}
TEST_CASE("a barrier that not all threads of the block reach is found") {
    std::string message = misuse_of([] { launch(some_skip_the_barrier, 1, 64, 0, nullptr, 60); });
    CHECK_HAS(message, "some_skip_the_barrier(int), block (0,0,0), thread (0,0,0)");
    CHECK_HAS(message, "expected all 64 threads of the block at __syncthreads, found 60 at __syncthreads");
    CHECK_HAS(message, "4 ended, the first of them thread (60,0,0)");
    CHECK(misuse_of([] { launch(some_skip_the_barrier, 1, 64, 0, nullptr, 64); }) == "");
    CHECK_HAS(misuse_of([] { launch(barrier_in_two_places, 1, 64, 0, nullptr); }), "found this one at line");
    CHECK_HAS(misuse_of([] { launch(barrier_beside_shuffle, 1, 64, 0, nullptr); }), "at a shuffle");
}

__global__ void collective_after_some_ended(int ends) {
    if (int(threadIdx.x) == ends) return;
    __syncwarp();
}
__global__ void collective_of_two_kinds() {
    if (threadIdx.x < 16) __syncwarp();
    else __any_sync(~0u, 1);
}
__global__ void collective_of_two_masks() {
    if (threadIdx.x < 16) __shfl_xor_sync(~0u, 1, 1);
    else __shfl_xor_sync(0xffff8000u, 1, 1);
}
__global__ void not_in_my_mask() { __any_sync(0xfffeu, 1); }
__global__ void from_outside_the_mask() {
    if (threadIdx.x < 8) __shfl_sync(0xffu, 1, 9);
}
__global__ void mma_by_half_a_warp() {
    float d[4] = {};
    uint32_t a[4] = {};
    if (threadIdx.x < 16) mma_16x8x16(d, a, 0, 0);
}
TEST_CASE("warp collectives that do not meet are found") {
    for (uint64_t seed = 1; seed < 6; seed++) {
        WithSeed with(seed);
        CHECK_HAS(misuse_of([] { launch(collective_after_some_ended, 1, 32, 0, nullptr, 3); }), "__syncwarp (line ");
        CHECK_HAS(misuse_of([] { launch(collective_after_some_ended, 1, 32, 0, nullptr, 3); }), "found that lanes "
                                                                                                "0x00000008 ended");
        CHECK(misuse_of([] { launch(collective_after_some_ended, 1, 32, 0, nullptr, 32); }) == "");
        CHECK(misuse_of([] { launch(collective_after_some_ended, 1, 20, 0, nullptr, 32); }) ==
              "");  // lanes that never were
        CHECK_HAS(misuse_of([] { launch(collective_of_two_kinds, 1, 32, 0, nullptr); }), "expected all lanes of the "
                                                                                         "mask at the same operation, "
                                                                                         "found lanes");
        CHECK_HAS(misuse_of([] { launch(collective_of_two_masks, 1, 32, 0, nullptr); }), "expected the same mask from "
                                                                                         "all its lanes");
        CHECK_HAS(misuse_of([] { launch(not_in_my_mask, 1, 32, 0, nullptr); }), "found lane");
        CHECK_HAS(misuse_of([] { launch(from_outside_the_mask, 1, 32, 0, nullptr); }), "expected a source lane of the "
                                                                                       "mask, found lane 9");
        CHECK_HAS(misuse_of([] { launch(mma_by_half_a_warp, 1, 32, 0, nullptr); }), "mma_16x8x16");
        CHECK_HAS(misuse_of([] { launch(mma_by_half_a_warp, 1, 16, 0, nullptr); }), "expected a warp of 32 lanes, "
                                                                                    "found 16");
    }
}

__global__ void wait_in_a_circle() {
    if (threadIdx.x < 3) __shfl_sync(1u << threadIdx.x | 1u << (threadIdx.x + 1) % 3, 1, int(threadIdx.x));
}
TEST_CASE("a deadlock is found, and says who waits where") {
    std::string message = misuse_of([] { launch(wait_in_a_circle, 1, 32, 0, nullptr); });
    CHECK_HAS(message, "wait_in_a_circle");
    CHECK_HAS(message, "deadlock");
    CHECK_HAS(message, "mask 0x00000003");
}

struct Bytes { alignas(16) char at[48]; };
__global__ void misaligned(int which, const __nv_bfloat16* global) {
    Bytes& s = shared<Bytes>();
    auto* half = reinterpret_cast<__nv_bfloat16*>(s.at);
    uint32_t r[4];
    if (which == 0) as_vector<float4>(half + 1)->x = 0;
    if (which == 1) cp_async_16(s.at + 8, global, true);
    if (which == 2) cp_async_16(s.at, global + 1, true);
    if (which == 3) ldmatrix_x4(r, half + 1);
    if (which == 4) ldmatrix_x4(r, half + 24);
    if (which == 5) cp_async_16(s.at + 48, global, true);
    if (which == 6) cp_async_16(s.at, global, true), cp_async_commit();
    if (which == 7) cp_async_16(s.at, global, true), cp_async_wait<0>();
    if (which == 8) cp_async_16(s.at, nullptr, false), cp_async_commit(), cp_async_wait<0>();
    if (which == 9) as_vector<const float4>((const float*)s.at);
    if (which == 10) shared<FourMatrices>();
    if (which == 11) atomicAdd(reinterpret_cast<int*>(s.at + 2), 1);
}
TEST_CASE("misaligned and misplaced accesses through the primitives are found") {
    Device<__nv_bfloat16> global(64);
    auto message = [&](int which) {
        return misuse_of([&] {
            launch(misaligned, 1, 32, sizeof(Bytes), nullptr, which, (const __nv_bfloat16*)global.p);
        });
    };
    CHECK_HAS(message(0), "as_vector: expected an address aligned to 16 bytes");
    CHECK_HAS(message(1), "cp_async_16, destination: expected an address aligned");
    CHECK_HAS(message(2), "cp_async_16, source: expected an address aligned");
    CHECK_HAS(message(3), "ldmatrix_x4: expected an address aligned");
    CHECK_HAS(message(4), "ldmatrix_x4: expected 16 bytes inside the block's 48 bytes of shared memory, found them at "
                          "offset 48");
    CHECK_HAS(message(5), "cp_async_16, destination: expected 16 bytes inside");
    CHECK_HAS(message(6), "expected a cp_async_wait for every cp_async_16, found 1 never waited for");
    CHECK_HAS(message(7), "never waited for");  // it was in no committed group
    CHECK(message(8) == "");
    CHECK(message(9) == "");
    CHECK_HAS(message(10), "shared<T>(): expected a launch with 512 bytes of shared memory, found 48");
    CHECK_HAS(message(11), "an atomic: expected an address aligned to 4 bytes");
}

#ifndef CUDA_ON_CPU_ASAN  // which ends the program at the write
__global__ void write_shared(int offset) { reinterpret_cast<volatile char*>(shared<Bytes>().at)[offset] = 1; }
__global__ void write_global(char* p, int offset) { ((volatile char*)p)[offset] = 1; }
TEST_CASE("stray writes damage a canary, which tells of them") {
    CHECK_HAS(misuse_of([] { launch(write_shared, 1, 1, sizeof(Bytes), nullptr, 48); }), "expected writes inside the "
                                                                                         "block's 48 bytes of shared "
                                                                                         "memory, found one at offset "
                                                                                         "48");
    CHECK_HAS(misuse_of([] { launch(write_shared, 1, 1, sizeof(Bytes), nullptr, -3); }), "found one 3 bytes before it");
    CHECK(misuse_of([] { launch(write_shared, 1, 1, sizeof(Bytes), nullptr, 47); }) == "");
    Device<char> d(1000);
    CHECK_HAS(misuse_of([&] { launch(write_global, 1, 1, 0, nullptr, d.p, 1000); }), "a write at offset 1000 of an "
                                                                                     "allocation of 1000 bytes");
    CHECK_HAS(misuse_of([&] { launch(write_global, 1, 1, 0, nullptr, d.p, -1); }), "a write 1 bytes before an "
                                                                                   "allocation");
    CHECK(misuse_of([&] { launch(write_global, 1, 1, 0, nullptr, d.p, 999); }) == "");
}
#endif

__global__ void waits_but_for_one(int forgetful_block, int forgetful_thread) {
    if (int(blockIdx.x) == forgetful_block && int(threadIdx.x) == forgetful_thread) return;
    wait_for_predecessor();
}
TEST_CASE("a thread that does not wait for the kernel before, in a launch that may overlap it, is found and named") {
    for (uint64_t seed = 1; seed < 4; seed++) {
        WithSeed with(seed);
        CHECK_HAS(misuse_of([] { launch_overlapping(waits_but_for_one, 3, 40, nullptr, 2, 37); }), "kernel "
                                                                                                   "waits_but_for_one("
                                                                                                   "int, int), block "
                                                                                                   "(2,0,0), thread "
                                                                                                   "(37,0,0): expected "
                                                                                                   "wait_for_"
                                                                                                   "predecessor() "
                                                                                                   "in each thread");
    }
    CHECK(misuse_of([] { launch_overlapping(waits_but_for_one, 3, 40, nullptr, -1, -1); }) == "");
    // A fiber that has waited serves the next block: its thread there must wait again.
    CHECK_HAS(misuse_of([] {
        launch_overlapping(waits_but_for_one, 3, 40, nullptr, -1, -1);
        launch_overlapping(waits_but_for_one, 1, 1, nullptr, 0, 0);
    }),
              "block (0,0,0), thread (0,0,0): expected wait_for_predecessor()");
    CHECK(misuse_of([] { launch(waits_but_for_one, 3, 40, 0, nullptr, 2, 37); }) ==
          "");  // it starts when all before it has ended
}

__global__ void starts_before_waiting(int hasty_thread) {
    if (int(threadIdx.x) == hasty_thread) start_successor();
    wait_for_predecessor();
    start_successor();
}
TEST_CASE("a thread that starts the next kernel before it has waited for the one before is found and named") {
    for (uint64_t seed = 1; seed < 4; seed++) {
        WithSeed with(seed);
        CHECK_HAS(misuse_of([] { launch_overlapping(starts_before_waiting, 1, 40, nullptr, 37); }), "kernel "
                                                                                                    "starts_before_"
                                                                                                    "waiting(int), "
                                                                                                    "block (0,0,0), "
                                                                                                    "thread (37,0,0): "
                                                                                                    "start_successor():"
                                                                                                    " expected "
                                                                                                    "wait_for");
    }
    CHECK(misuse_of([] { launch_overlapping(starts_before_waiting, 3, 40, nullptr, -1); }) == "");
    CHECK(misuse_of([] { launch(starts_before_waiting, 3, 40, 0, nullptr, 37); }) == "");  // all before it has ended
}

TEST_CASE("code that looks built for compute capability 8.0 says so and does not wait: an overlapping launch is "
          "found") {
    int before = settings().ptx;
    cudaFuncAttributes code;
    for (int ptx : {90, 80}) {
        settings().ptx = ptx;
        CHECK_OK(cudaFuncGetAttributes(&code, starts_before_waiting));
        CHECK(code.ptxVersion == ptx);
        CHECK(code.binaryVersion == 90);  // what the driver makes of either for this card
        CHECK(misuse_of([] { launch(starts_before_waiting, 3, 40, 0, nullptr, -1); }) == "");
        std::string found = misuse_of([] { launch_overlapping(starts_before_waiting, 3, 40, nullptr, -1); });
        if (ptx == 90) CHECK(found == "");
        else CHECK_HAS(found, "expected wait_for_predecessor() in each thread");
    }
    settings().ptx = before;
}

__global__ void nothing(const int*) {}
TEST_CASE("launches that a card would refuse are refused, and leave the device usable") {
    const int* none = nullptr;
    auto refused = [&](dim3 grid, dim3 block, size_t bytes) {
        return launch(nothing, grid, block, bytes, nullptr, none);
    };
    CHECK(refused(1, 1025, 0) == cudaErrorInvalidConfiguration);
    CHECK_HAS(cuda_on_cpu::last_misuse(), "expected a block of 1 to 1024 threads, z up to 64, found (1025,1,1)");
    CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration);
    CHECK(cudaGetLastError() == cudaSuccess);
    CHECK(refused(1, dim3(1, 1, 65), 0) == cudaErrorInvalidConfiguration);
    CHECK(refused(0, 1, 0) == cudaErrorInvalidConfiguration);
    CHECK(refused(dim3(1, 65536), 1, 0) == cudaErrorInvalidConfiguration);
    CHECK(refused(dim3(1, 1, 65536), 1, 0) == cudaErrorInvalidConfiguration);
    CHECK(refused(1u << 31, 1, 0) == cudaErrorInvalidConfiguration);
    CHECK(refused(1, 1, 49153) == cudaErrorInvalidValue);
    CHECK_HAS(cuda_on_cpu::last_misuse(), "expected up to 49152 bytes of shared memory, found 49153");
    CHECK(cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 232449) == cudaErrorInvalidValue);
    CHECK_OK(cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 232448));
    CHECK_OK(refused(1, 1, 232448));
    CHECK(refused(1, 1, 232449) == cudaErrorInvalidValue);
    cuda_on_cpu::clear_misuse();
    CHECK_OK(cudaDeviceSynchronize());
    int on_host = 0;
    CHECK(launch(nothing, 1, 1, 0, nullptr, &on_host) != cudaSuccess);
    CHECK_HAS(cuda_on_cpu::last_misuse(), "expected argument 1 to point into device or pinned memory");
    cuda_on_cpu::clear_misuse();
}

__global__ void recurse(int* depth) {
    volatile char frame[4096];
    frame[0] = char(++*depth);
    if (*depth < 1000000) recurse(depth);
    frame[1] = frame[0];
}
// What a child process writes to stderr before the signal that ends it; "" if it ends otherwise.
template <class Action>
std::string crash_of(Action&& action) {
    int pipe_ends[2];
    REQUIRE(pipe(pipe_ends) == 0);
    fflush(nullptr);
    pid_t child = fork();
    if (child == 0) {
        dup2(pipe_ends[1], 2);
        settings().threads = 1;  // the pool's threads stayed behind
        signal(SIGSEGV, SIG_DFL);
        cuda_on_cpu::install_fault_handler();
        action();
        _exit(0);
    }
    close(pipe_ends[1]);
    std::string said;
    char part[512];
    for (ssize_t n; (n = read(pipe_ends[0], part, sizeof part)) > 0;) said.append(part, size_t(n));
    close(pipe_ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? "" : said;
}
__global__ void read_at(int* out, const int* p, size_t offset) { *out = p[offset]; }
TEST_CASE("accesses that fault say what they hit") {
    Device<int> d(1000), out(1);
    CHECK_HAS(crash_of([&] { out.p[0] = d.p[10]; }), "host access to device memory, allocation of 4000 bytes + offset "
                                                     "40");
    CHECK_HAS(crash_of([&] {
        launch(read_at, 1, 1, 0, nullptr, out.p, d.p, size_t(1024));
        cudaDeviceSynchronize();
    }),
              "in kernel read_at(int*, int const*, unsigned long), block (0,0,0), thread (0,0,0): access to a guard "
              "page of device memory, allocation of 4000 bytes + offset 4096");
    CHECK_HAS(crash_of([&] {
        int* freed = d.p;
        cudaFree(d.p);
        *freed = 1;
    }),
              "host access to freed device memory, allocation of 4000 bytes + offset 0");
#ifndef CUDA_ON_CPU_ASAN  // which tells of the overflow itself
    Device<int> depth(std::vector<int>{0});
    CHECK_HAS(crash_of([&] {
        launch(recurse, 1, 1, 0, nullptr, depth.p);
        cudaDeviceSynchronize();
    }),
              "whose stack of 64 KiB is full");
#endif
    settings().protect = false;
    CHECK(crash_of([&] { d.p[0] = 1; }) == "");
    settings().protect = true;
}

// ----- random orders

__global__ void race(int* out) {
    atomicExch(out, int(threadIdx.x));
    out[1 + blockIdx.x] = *out;  // whoever came last
}
TEST_CASE("a kernel whose result hangs on an order gives different results for different seeds, equal ones for one "
          "seed") {
    int before = std::exchange(settings().threads, 1);
    std::set<std::vector<int>> found;
    for (uint64_t seed = 1; seed <= 8; seed++) {
        std::vector<int> first;
        for (int again = 0; again < 2; again++) {
            WithSeed none(0);
            cuda_on_cpu::shared_state().random();  // the launch counter starts anew with a new seed
            WithSeed with(seed);
            Device<int> d(std::vector<int>(9, 0));
            CHECK_OK(launch(race, 8, 64, 0, nullptr, d.p));
            if (again) CHECK(d.read() == first);
            first = d.read();
        }
        found.insert(first);
    }
    CHECK(found.size() == 8);
    std::set<std::vector<int>> right;
    for (uint64_t seed = 1; seed <= 8; seed++) {
        WithSeed with(seed);
        Device<int> d(std::vector<int>(1024, 1));
        CHECK_OK(launch(reverse, 4, 256, sizeof(Reversed), nullptr, d.p, 3));
        right.insert(d.read());
    }
    CHECK(right.size() == 1);
    settings().threads = before;
}

// ----- memory

__global__ void read_shared(unsigned* out) { out[threadIdx.x] = unsigned(shared<Reversed>().value[threadIdx.x]); }
TEST_CASE("fresh device, pinned and shared memory hold the poison, for each block anew") {
    unsigned char before = settings().poison;
    for (unsigned char poison : {0xFF, 0x3D}) {
        settings().poison = poison;
        unsigned pattern = 0x01010101u * poison;
        Device<unsigned> d(1000), out(256);
        for (unsigned value : d.read()) REQUIRE(value == pattern);
        unsigned* pinned;
        CHECK_OK(cudaMallocHost(&pinned, 40));
        CHECK(pinned[9] == pattern);
        CHECK_OK(cudaFreeHost(pinned));
        Device<int> ones(std::vector<int>(256, 1));
        CHECK_OK(launch(reverse, 1, 256, sizeof(Reversed), nullptr, ones.p, 1));
        CHECK_OK(launch(read_shared, 1, 256, sizeof(Reversed), nullptr, out.p));
        for (unsigned value : out.read()) REQUIRE(value == pattern);
    }
    settings().poison = before;
    CHECK(std::isnan(__uint_as_float(0xffffffffu)));
    CHECK(__uint_as_float(0x3d3d3d3du) == doctest::Approx(0.0462).epsilon(0.01));
}

TEST_CASE("allocations are counted, aligned, and fail when the memory is used up") {
    size_t free_before, free_now, total;
    CHECK_OK(cudaMemGetInfo(&free_before, &total));
    char *p, *too_much;
    CHECK_OK(cudaMalloc(&p, 1000));
    CHECK(uintptr_t(p) % 256 == 0);
    CHECK_OK(cudaMemGetInfo(&free_now, &total));
    CHECK(free_before - free_now == 1024);
    CHECK(cudaMalloc(&too_much, total) == cudaErrorMemoryAllocation);
    CHECK(too_much == nullptr);
    CHECK(cudaGetLastError() == cudaErrorMemoryAllocation);
    CHECK(cudaMalloc(&too_much, ~size_t(0)) == cudaErrorMemoryAllocation);
    cudaGetLastError();
    CHECK_OK(cudaFree(p));
    CHECK(cudaFree(p) == cudaErrorInvalidValue);
    CHECK_OK(cudaFree(nullptr));
    CHECK_OK(cudaMemGetInfo(&free_now, &total));
    CHECK(free_before == free_now);
    Device<char> d(16);
    char host[32] = {};
    CHECK(cudaMemcpy(d.p, host, 17, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
    CHECK(cudaMemcpy(host, d.p, 16, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
    CHECK(cudaMemset(host, 0, 16) == cudaErrorInvalidValue);
    cudaGetLastError();
}

// ----- streams, events, graphs

__global__ void append(int* list, int what) {
    int at = atomicAdd(list, 1);
    list[1 + at] = what;
}
std::vector<int> listed(const Device<int>& list) {
    std::vector<int> all = list.read();
    return {all.begin() + 1, all.begin() + 1 + all[0]};
}
TEST_CASE("nothing runs before the host synchronises, and copies from pinned memory read it only then") {
    Stream stream;
    int* pinned;
    CHECK_OK(cudaMallocHost(&pinned, 8));
    pinned[0] = 1, pinned[1] = -1;
    int pageable = 1;
    Device<int> d(2);
    CHECK_OK(cudaMemcpyAsync(d.p, pinned, 4, cudaMemcpyHostToDevice, stream));
    CHECK_OK(cudaMemcpyAsync(d.p + 1, &pageable, 4, cudaMemcpyHostToDevice, stream));
    CHECK_OK(cudaMemcpyAsync(pinned + 1, d.p + 1, 4, cudaMemcpyDeviceToHost, stream));
    pinned[0] = pageable = 2;
    CHECK(pinned[1] == -1);
    CHECK_OK(cudaStreamSynchronize(stream));
    CHECK(pinned[1] == 1);
    CHECK(d.read() == std::vector<int>{2, 1});
    CHECK_OK(cudaFreeHost(pinned));
    Device<int> set(4);
    CHECK_OK(cudaMemsetAsync(set.p, 1, 16, stream));
    CHECK(cudaStreamQuery(stream) == cudaSuccess);  // a query runs one operation
    CHECK(set.read()[3] == 0x01010101);
}

TEST_CASE("streams run in any order that their events allow") {
    std::set<std::vector<int>> orders;
    for (uint64_t seed = 1; seed <= 100; seed++) {
        WithSeed with(seed);
        Device<int> list(std::vector<int>(10, 0));
        Stream a, b;
        Event event;
        CHECK_OK(cudaDeviceSynchronize());
        launch(append, 1, 1, 0, a, list.p, 1), launch(append, 1, 1, 0, b, list.p, 2);
        CHECK_OK(cudaEventRecord(event, b));
        CHECK(cudaEventQuery(event) == cudaErrorNotReady);
        CHECK_OK(cudaStreamWaitEvent(a, event));
        launch(append, 1, 1, 0, a, list.p, 3), launch(append, 1, 1, 0, b, list.p, 4);
        CHECK_OK(cudaDeviceSynchronize());
        CHECK_OK(cudaEventQuery(event));
        std::vector<int> found = listed(list);
        REQUIRE(found.size() == 4);
        auto at = [&](int what) { return std::find(found.begin(), found.end(), what) - found.begin(); };
        CHECK(at(1) < at(3));
        CHECK(at(2) < at(3));
        CHECK(at(2) < at(4));
        orders.insert(found);
    }
    cudaGetLastError();
    CHECK(orders.size() == 5);  // all that are allowed
}

TEST_CASE("the legacy stream waits for blocking streams and they for it, but not non-blocking ones") {
    bool overtaken = false;
    for (uint64_t seed = 1; seed <= 12; seed++) {
        WithSeed with(seed);
        Device<int> list(std::vector<int>(10, 0));
        cudaStream_t blocking;
        CHECK_OK(cudaStreamCreate(&blocking));
        Stream free_one;
        launch(append, 1, 1, 0, blocking, list.p, 1), launch(append, 1, 1, 0, nullptr, list.p, 2),
            launch(append, 1, 1, 0, blocking, list.p, 3);
        launch(append, 1, 1, 0, free_one, list.p, 9);
        CHECK_OK(cudaDeviceSynchronize());
        std::vector<int> found = listed(list);
        overtaken = overtaken || found.back() != 9;
        std::erase(found, 9);
        CHECK(found == std::vector<int>{1, 2, 3});
        CHECK_OK(cudaStreamDestroy(blocking));
    }
    CHECK(overtaken);
}

TEST_CASE("a captured fork and join becomes a graph whose nodes run in any order that it allows, at every launch") {
    std::set<std::vector<int>> orders;
    Device<int> list(std::vector<int>(20, 0));
    Stream a, b;
    Event fork, join;
    CHECK_OK(cudaStreamBeginCapture(a, cudaStreamCaptureModeGlobal));
    CHECK_OK(launch(append, 1, 1, 0, a, list.p, 1));
    CHECK_OK(cudaEventRecord(fork, a));
    CHECK_OK(cudaStreamWaitEvent(b, fork));
    launch(append, 1, 1, 0, a, list.p, 2), launch(append, 1, 1, 0, b, list.p, 3), launch(append, 1, 1, 0, b, list.p, 4);
    CHECK_OK(cudaEventRecord(join, b));
    CHECK_OK(cudaStreamWaitEvent(a, join));
    CHECK_OK(launch(append, 1, 1, 0, a, list.p, 5));
    cudaStreamCaptureStatus status;
    CHECK_OK(cudaStreamIsCapturing(b, &status));
    CHECK(status == cudaStreamCaptureStatusActive);
    cudaGraph_t graph;
    CHECK_OK(cudaStreamEndCapture(a, &graph));
    CHECK(listed(list).empty());
    size_t nodes = 0;
    CHECK_OK(cudaGraphGetNodes(graph, nullptr, &nodes));
    CHECK(nodes == 5);
    cudaGraphExec_t exec;
    CHECK_OK(cudaGraphInstantiate(&exec, graph, 0));
    CHECK_OK(cudaGraphDestroy(graph));
    CHECK_OK(cudaGraphUpload(exec, a));
    for (int i = 0; i < 20; i++) {
        CHECK_OK(cudaMemsetAsync(list.p, 0, 4, a));
        CHECK_OK(cudaGraphLaunch(exec, a));
        CHECK_OK(cudaGraphLaunch(exec, a));
        CHECK_OK(cudaStreamSynchronize(a));
        std::vector<int> found = listed(list);
        REQUIRE(found.size() == 10);
        for (auto start : {found.begin(), found.begin() + 5}) {
            std::vector<int> once(start, start + 5);
            CHECK(once.front() == 1);
            CHECK(once.back() == 5);
            CHECK(std::find(once.begin(), once.end(), 3) < std::find(once.begin(), once.end(), 4));
            orders.insert(once);
        }
    }
    CHECK(orders.size() == 3);
    CHECK_OK(cudaGraphExecDestroy(exec));
}

TEST_CASE("what may not happen during a capture is an error and ends the capture") {
    Device<int> d(4);
    Stream stream, other;
    Event event, outside;
    cudaGraph_t graph;
    int host = 0, *more;
    auto spoilt_by = [&](auto&& call) {
        CHECK_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
        cudaError_t error = call();
        CHECK(cudaStreamEndCapture(stream, &graph) == cudaErrorStreamCaptureInvalidated);
        CHECK(graph == nullptr);
        cudaGetLastError();
        return error;
    };
    CHECK(spoilt_by([&] { return cudaStreamSynchronize(stream); }) == cudaErrorStreamCaptureUnsupported);
    CHECK(spoilt_by([&] { return cudaDeviceSynchronize(); }) == cudaErrorStreamCaptureUnsupported);
    CHECK(spoilt_by([&] { return cudaMalloc(&more, 4); }) == cudaErrorStreamCaptureUnsupported);
    CHECK(spoilt_by([&] { return cudaFree(d.p); }) == cudaErrorStreamCaptureUnsupported);
    CHECK(spoilt_by([&] { return cudaMemcpy(&host, d.p, 4, cudaMemcpyDeviceToHost); }) ==
          cudaErrorStreamCaptureUnsupported);
    CHECK_OK(cudaEventRecord(outside, other));
    CHECK(spoilt_by([&] { return cudaStreamWaitEvent(stream, outside); }) == cudaErrorStreamCaptureIsolation);
    CHECK(cudaStreamEndCapture(stream, &graph) == cudaErrorIllegalState);
    CHECK(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal) == cudaErrorStreamCaptureUnsupported);

    CHECK_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    CHECK_OK(cudaEventRecord(event, stream));
    CHECK_OK(cudaStreamWaitEvent(other, event));
    CHECK_OK(cudaMemsetAsync(d.p, 0, 4, other));
    CHECK(cudaStreamEndCapture(stream, &graph) == cudaErrorStreamCaptureUnjoined);

    CHECK_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    CHECK_OK(cudaEventRecord(event, stream));
    CHECK_OK(cudaStreamWaitEvent(other, event));
    CHECK(cudaStreamEndCapture(other, &graph) == cudaErrorStreamCaptureUnmatched);
    CHECK(cudaStreamEndCapture(stream, &graph) == cudaErrorStreamCaptureInvalidated);

    CHECK_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
    CHECK_OK(cudaMalloc(&more, 4));
    CHECK_OK(cudaStreamEndCapture(stream, &graph));
    CHECK_OK(cudaGraphDestroy(graph));
    CHECK_OK(cudaFree(more));

    cudaStream_t blocking;
    CHECK_OK(cudaStreamCreate(&blocking));
    CHECK_OK(cudaStreamBeginCapture(blocking, cudaStreamCaptureModeRelaxed));
    CHECK(cudaMemsetAsync(d.p, 0, 4, nullptr) == cudaErrorStreamCaptureImplicit);
    CHECK(cudaStreamEndCapture(blocking, &graph) == cudaErrorStreamCaptureInvalidated);
    CHECK_OK(cudaStreamDestroy(blocking));
    cudaGetLastError();
}

TEST_CASE("host functions run in their stream's order, and events measure time") {
    Stream stream;
    Event start, end;
    std::vector<int> seen;
    CHECK_OK(cudaEventRecord(start, stream));
    for (int i = 0; i < 2; i++)
        CHECK_OK(cudaLaunchHostFunc(stream, [](void* p) { static_cast<std::vector<int>*>(p)->push_back(1); }, &seen));
    CHECK_OK(cudaEventRecord(end, stream));
    CHECK(seen.empty());
    float milliseconds = -1;
    CHECK(cudaEventElapsedTime(&milliseconds, start, end) == cudaErrorNotReady);
    CHECK_OK(cudaEventSynchronize(end));
    CHECK(seen.size() == 2);
    CHECK_OK(cudaEventElapsedTime(&milliseconds, start, end));
    CHECK(milliseconds >= 0);
    cudaGetLastError();
}

template <int N>
__global__ void a_template(int) {}
TEST_CASE("kernels that ran are listed by their names, those that did not are not") {
    CHECK_OK(launch(a_template<3>, 1, 1, 0, nullptr, 0));
    auto has = [](const std::string& name) {
        for (auto& [kernel, count] : cuda_on_cpu::launched_kernels())
            if (kernel.find(name) != std::string::npos) return count > 0;
        return false;
    };
    CHECK(!has("a_template<3>"));
    CHECK_OK(cudaDeviceSynchronize());
    CHECK(has("a_template<3>"));
    CHECK(!has("a_template<4>"));
    const char* name;
    CHECK_OK(cudaFuncGetName(&name, (const void*)a_template<3>));
    CHECK(std::string(name) == "_Z10a_templateILi3EEvi");
}

// ----- cuBLASLt

struct Matmul {
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t desc;
    cublasLtMatmulPreference_t preference;
    cublasLtMatrixLayout_t a, b, c;

    Matmul(bool ta, bool tb, cudaDataType in, cudaDataType out, uint64_t m, uint64_t n, uint64_t k, int64_t lda,
           int64_t ldb, int64_t ldc) {
        int32_t trans_a = ta ? CUBLAS_OP_T : CUBLAS_OP_N, trans_b = tb ? CUBLAS_OP_T : CUBLAS_OP_N;
        cublasLtCreate(&handle), cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F),
            cublasLtMatmulPreferenceCreate(&preference);
        CHECK(cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &trans_a, sizeof trans_a) ==
              CUBLAS_STATUS_SUCCESS);
        CHECK(cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSB, &trans_b, sizeof trans_b) ==
              CUBLAS_STATUS_SUCCESS);
        cublasLtMatrixLayoutCreate(&a, in, ta ? k : m, ta ? m : k, lda),
            cublasLtMatrixLayoutCreate(&b, in, tb ? n : k, tb ? k : n, ldb);
        cublasLtMatrixLayoutCreate(&c, out, m, n, ldc);
    }
    ~Matmul() {
        for (auto layout : {a, b, c}) cublasLtMatrixLayoutDestroy(layout);
        cublasLtMatmulPreferenceDestroy(preference), cublasLtMatmulDescDestroy(desc), cublasLtDestroy(handle);
    }
    cublasStatus_t run(const void* A, const void* B, void* C, float alpha, float beta,
                       const cublasLtMatmulAlgo_t* algo = nullptr, void* workspace = nullptr,
                       size_t workspace_bytes = 0, cudaStream_t stream = nullptr) const {
        return cublasLtMatmul(handle, desc, &alpha, A, a, B, b, &beta, C, c, C, c, algo, workspace, workspace_bytes,
                              stream);
    }
};
template <class T>
cudaDataType type_of() {
    return sizeof(T) == 2 ? CUDA_R_16BF : CUDA_R_32F;
}
template <class T>
std::vector<T> random_matrix(size_t n, uint32_t seed) {
    std::vector<T> values(n);
    for (T& value : values) value = T(float(int((seed = seed * 1664525 + 1013904223) >> 24) - 128) / 64);
    return values;
}
template <class In, class Out>
void check_product(bool ta, bool tb, size_t m, size_t n, size_t k, float beta) {
    auto padded = [](size_t rows) { return (rows + 7) / 8 * 8 + 8; };
    size_t lda = padded(ta ? k : m), ldb = padded(tb ? n : k), ldc = padded(m);
    std::vector<In> a = random_matrix<In>(lda * (ta ? m : k), 1), b = random_matrix<In>(ldb * (tb ? k : n), 2);
    std::vector<Out> c = random_matrix<Out>(ldc * n, 3);
    if (beta == 0) c.assign(c.size(), Out(NAN));
    Device<In> da(a), db(b);
    Device<Out> dc(c);
    Matmul matmul(ta, tb, type_of<In>(), type_of<Out>(), m, n, k, int64_t(lda), int64_t(ldb), int64_t(ldc));
    CHECK(matmul.run(da.p, db.p, dc.p, 0.5f, beta) == CUBLAS_STATUS_SUCCESS);
    std::vector<Out> found = dc.read();
    double worst = 0;
    for (size_t j = 0; j < n; j++)
        for (size_t i = 0; i < m; i++) {
            double sum = 0, size = 0;
            for (size_t l = 0; l < k; l++) {
                double product =
                    double(float(a[ta ? i * lda + l : l * lda + i])) * double(float(b[tb ? l * ldb + j : j * ldb + l]));
                sum += product, size += std::fabs(product);
            }
            double expected = 0.5 * sum + (beta == 0 ? 0 : beta * double(float(c[j * ldc + i])));
            // k roundings of FP32 sums, and one to the output's type
            double allowed =
                double(k) * 0x1p-24 * size + std::fabs(expected) * (sizeof(Out) == 2 ? 0x1p-8 : 0x1p-22) + 1e-6;
            double error = std::fabs(expected - double(float(found[j * ldc + i]))) / allowed;
            worst = error <= worst ? worst : error;  // a NaN is taken along
        }
    CHECK_MESSAGE(worst <= 1, "m ", m, ", n ", n, ", k ", k, ", transposes ", ta, tb, ", beta ", beta);
}
TEST_CASE("matrix products equal a scalar loop, in all transposes, types, odd shapes, with and without the old C") {
    for (int transposes = 0; transposes < 4; transposes++)
        for (float beta : {0.f, 1.f, -0.5f}) {
            bool ta = transposes & 1, tb = transposes & 2;
            for (auto [m, n, k] :
                 {std::tuple<size_t, size_t, size_t>{1, 1, 1}, {17, 13, 5}, {64, 96, 80}, {130, 70, 33}}) {
                check_product<__nv_bfloat16, __nv_bfloat16>(ta, tb, m, n, k, beta);
                check_product<__nv_bfloat16, float>(ta, tb, m, n, k, beta);
                check_product<float, float>(ta, tb, m, n, k, beta);
            }
        }
}

TEST_CASE("a matrix product has the same bits on any number of threads and in a graph, and waits for its stream") {
    std::vector<float> a = random_matrix<float>(96 * 200, 5), b = random_matrix<float>(200 * 120, 6);
    Device<float> da(a), db(b), dc(96 * 120);
    Matmul matmul(false, false, CUDA_R_32F, CUDA_R_32F, 96, 120, 200, 96, 200, 96);
    std::set<std::vector<float>> results;
    int before = settings().threads;
    for (int threads : {1, 2, 3}) {
        settings().threads = threads;
        CHECK(matmul.run(da.p, db.p, dc.p, 1, 0) == CUBLAS_STATUS_SUCCESS);
        results.insert(dc.read());
    }
    settings().threads = before;
    CHECK_OK(cudaMemset(dc.p, 0, dc.n * 4));
    CHECK_OK(cudaDeviceSynchronize());
    Stream stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    CHECK(matmul.run(da.p, db.p, dc.p, 1, 0, nullptr, nullptr, 0, stream) == CUBLAS_STATUS_SUCCESS);
    CHECK_OK(cudaStreamEndCapture(stream, &graph));
    CHECK_OK(cudaGraphInstantiate(&exec, graph, 0));
    CHECK(dc.read()[5] == 0);
    CHECK_OK(cudaGraphLaunch(exec, stream));
    CHECK_OK(cudaStreamSynchronize(stream));
    results.insert(dc.read());
    CHECK(results.size() == 1);
    CHECK_OK(cudaGraphExecDestroy(exec));
    CHECK_OK(cudaGraphDestroy(graph));
}

TEST_CASE("batches of matrices are multiplied one by one") {
    std::vector<float> a = random_matrix<float>(2 * 64, 7), b = random_matrix<float>(2 * 64, 8), together, apart;
    Device<float> da(a), db(b), dc(2 * 64);
    Matmul matmul(false, true, CUDA_R_32F, CUDA_R_32F, 8, 8, 8, 8, 8, 8);
    for (int i = 0; i < 2; i++)
        CHECK(matmul.run(da.p + i * 64, db.p + i * 64, dc.p + i * 64, 1, 0) == CUBLAS_STATUS_SUCCESS);
    apart = dc.read();
    CHECK_OK(cudaMemset(dc.p, 0, 512));
    int32_t count = 2;
    int64_t stride = 64;
    for (auto layout : {matmul.a, matmul.b, matmul.c}) {
        CHECK(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count) ==
              CUBLAS_STATUS_SUCCESS);
        CHECK(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride,
                                               sizeof stride) == CUBLAS_STATUS_SUCCESS);
    }
    CHECK(matmul.run(da.p, db.p, dc.p, 1, 0) == CUBLAS_STATUS_SUCCESS);
    CHECK(dc.read() == apart);
}

TEST_CASE("what cuBLASLt would refuse is refused") {
    Device<__nv_bfloat16> a(64 * 64), b(64 * 64), c(64 * 64);
    Device<float> f(64 * 64);
    Device<char> workspace(2 << 20);
    auto status = [&](cudaDataType in, cudaDataType out, int64_t lda, int64_t ldb, int64_t ldc) {
        return Matmul(false, false, in, out, 16, 16, 16, lda, ldb, ldc).run(a.p, b.p, c.p, 1, 0);
    };
    CHECK(status(CUDA_R_16BF, CUDA_R_16BF, 16, 16, 16) == CUBLAS_STATUS_SUCCESS);
    CHECK(status(CUDA_R_16BF, CUDA_R_16BF, 15, 16, 16) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(status(CUDA_R_16BF, CUDA_R_16BF, 20, 16, 16) == CUBLAS_STATUS_NOT_SUPPORTED);
    CHECK(status(CUDA_R_16BF, CUDA_R_16BF, 16, 16, 20) == CUBLAS_STATUS_NOT_SUPPORTED);
    CHECK(status(CUDA_R_16BF, CUDA_R_32F, 16, 16, 17) == CUBLAS_STATUS_SUCCESS);
    CHECK(status(CUDA_R_32F, CUDA_R_16BF, 16, 16, 16) == CUBLAS_STATUS_NOT_SUPPORTED);
    Matmul matmul(false, false, CUDA_R_16BF, CUDA_R_16BF, 64, 64, 64, 64, 64, 64);
    CHECK(matmul.run(a.p + 1, b.p, c.p, 1, 0) == CUBLAS_STATUS_NOT_SUPPORTED);
    CHECK(matmul.run(nullptr, b.p, c.p, 1, 0) == CUBLAS_STATUS_INVALID_VALUE);
    float one = 1;
    cublasLtMatrixLayout_t wrong = nullptr;
    cublasLtMatrixLayoutCreate(&wrong, CUDA_R_16BF, 64, 56, 64);
    CHECK(cublasLtMatmul(matmul.handle, matmul.desc, &one, a.p, matmul.a, b.p, wrong, &one, c.p, matmul.c, c.p,
                         matmul.c, nullptr, nullptr, 0, nullptr) == CUBLAS_STATUS_INVALID_VALUE);
    cublasLtMatrixLayoutDestroy(wrong);

    uint64_t bytes = 2 << 20;
    CHECK(cublasLtMatmulPreferenceSetAttribute(matmul.preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes,
                                               sizeof bytes) == CUBLAS_STATUS_SUCCESS);
    cublasLtMatmulHeuristicResult_t results[3];
    int count = 0;
    CHECK(cublasLtMatmulAlgoGetHeuristic(matmul.handle, matmul.desc, matmul.a, matmul.b, matmul.c, matmul.c,
                                         matmul.preference, 3, results, &count) == CUBLAS_STATUS_SUCCESS);
    CHECK(count == 3);
    for (int i = 0; i < count; i++) {
        size_t needed = results[i].workspaceSize;
        CHECK(results[i].state == CUBLAS_STATUS_SUCCESS);
        CHECK(matmul.run(a.p, b.p, c.p, 1, 0, &results[i].algo, workspace.p, needed) == CUBLAS_STATUS_SUCCESS);
        if (needed)
            CHECK(matmul.run(a.p, b.p, c.p, 1, 0, &results[i].algo, workspace.p, needed - 1) ==
                  CUBLAS_STATUS_INVALID_VALUE);
    }
    CHECK_OK(cudaDeviceSynchronize());
    std::vector<__nv_bfloat16> host(64 * 64);
    CHECK_HAS(misuse_of([&] { CHECK(matmul.run(host.data(), b.p, c.p, 1, 0) != CUBLAS_STATUS_SUCCESS); }), "expected "
                                                                                                           "A's 8192 "
                                                                                                           "bytes "
                                                                                                           "inside one "
                                                                                                           "device "
                                                                                                           "allocatio"
                                                                                                           "n");
    CHECK_HAS(misuse_of([&] { CHECK(matmul.run(a.p, b.p + 8, c.p, 1, 0) != CUBLAS_STATUS_SUCCESS); }), "expected B's "
                                                                                                       "8192 bytes");
    CHECK(std::string(cublasGetStatusString(CUBLAS_STATUS_NOT_SUPPORTED)) == "CUBLAS_STATUS_NOT_SUPPORTED");
}

// gelu in FP64 as its paper has it, and its derivative by a central difference.
double gelu(double h) { return 0.5 * h * (1 + std::tanh(std::sqrt(2 / M_PI) * (h + 0.044715 * h * h * h))); }
double gelu_slope(double h) { return (gelu(h + 1e-5) - gelu(h - 1e-5)) / 2e-5; }

template <class Out>
void check_epilogue(cublasLtEpilogue_t epilogue, size_t m, size_t n, size_t k) {
    int64_t ld = int64_t(m + 7) / 8 * 8, aux_ld = ld + 8;
    std::vector<__nv_bfloat16> a = random_matrix<__nv_bfloat16>(size_t(ld) * k, 1),
                               b = random_matrix<__nv_bfloat16>((k + 7) / 8 * 8 * n, 2);
    std::vector<Out> aux = random_matrix<Out>(size_t(aux_ld) * n, 3), before = aux;
    Device<__nv_bfloat16> da(a), db(b);
    Device<Out> dc(size_t(ld) * n), daux(aux);
    Matmul matmul(false, false, CUDA_R_16BF, type_of<Out>(), m, n, k, ld, int64_t((k + 7) / 8 * 8), ld);
    uint32_t which = epilogue;
    CHECK(cublasLtMatmulDescSetAttribute(matmul.desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &which, sizeof which) ==
          CUBLAS_STATUS_SUCCESS);
    CHECK(cublasLtMatmulDescSetAttribute(matmul.desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &aux_ld, sizeof aux_ld) ==
          CUBLAS_STATUS_SUCCESS);
    CHECK(matmul.run(da.p, db.p, dc.p, 0.25f, 0) == CUBLAS_STATUS_INVALID_VALUE);  // no matrix for it yet
    CHECK(cublasLtMatmulDescSetAttribute(matmul.desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &daux.p,
                                         sizeof daux.p) == CUBLAS_STATUS_SUCCESS);
    CHECK(matmul.run(da.p, db.p, dc.p, 0.25f, 0) == CUBLAS_STATUS_SUCCESS);
    std::vector<Out> found = dc.read();
    aux = daux.read();
    double worst = 0, last_place = sizeof(Out) == 2 ? 0x1p-8 : 0x1p-20;
    size_t written = 0;
    for (size_t j = 0; j < n; j++)
        for (size_t i = 0; i < m; i++) {
            double x = 0;
            for (size_t l = 0; l < k; l++)
                x += 0.25 * double(float(a[l * size_t(ld) + i])) * double(float(b[j * ((k + 7) / 8 * 8) + l]));
            size_t at = j * size_t(aux_ld) + i;
            bool forward = epilogue == CUBLASLT_EPILOGUE_GELU_AUX;
            double expected = forward ? gelu(x) : x * gelu_slope(double(float(before[at]))),
                   kept = forward ? x : double(float(before[at]));
            for (auto [wanted, value] :
                 {std::pair{expected, double(float(found[j * size_t(ld) + i]))}, {kept, double(float(aux[at]))}}) {
                double error = std::fabs(wanted - value) / (std::fabs(wanted) * last_place + 1e-5);
                worst = error <= worst ? worst : error;  // a NaN is taken along
            }
        }
    for (size_t j = 0; j < n; j++)  // between the columns of the auxiliary matrix nothing is written
        for (size_t i = m; i < size_t(aux_ld); i++)
            written += float(aux[j * size_t(aux_ld) + i]) != float(before[j * size_t(aux_ld) + i]);
    CHECK_MESSAGE(worst <= 1, "epilogue ", int(epilogue), ", m ", m, ", n ", n, ", k ", k);
    CHECK(written == 0);
}
TEST_CASE("GELU's epilogues equal a scalar loop: of the sums before they are rounded forward, of the stored matrix "
          "backward") {
    for (auto epilogue : {CUBLASLT_EPILOGUE_GELU_AUX, CUBLASLT_EPILOGUE_DGELU})
        for (auto [m, n, k] : {std::tuple<size_t, size_t, size_t>{17, 13, 5}, {64, 40, 33}}) {
            check_epilogue<__nv_bfloat16>(epilogue, m, n, k);
            check_epilogue<float>(epilogue, m, n, k);
        }
}
TEST_CASE("GELU's epilogues are refused without a matrix of their own that is large enough") {
    Device<__nv_bfloat16> a(64 * 64), b(64 * 64), c(64 * 64), aux(64 * 64);
    Matmul matmul(false, false, CUDA_R_16BF, CUDA_R_16BF, 64, 64, 64, 64, 64, 64);
    auto set = [&](cublasLtMatmulDescAttributes_t which, auto value) {
        return cublasLtMatmulDescSetAttribute(matmul.desc, which, &value, sizeof value);
    };
    CHECK(set(CUBLASLT_MATMUL_DESC_EPILOGUE, uint32_t(4)) == CUBLAS_STATUS_NOT_SUPPORTED);  // a bias
    CHECK(set(CUBLASLT_MATMUL_DESC_EPILOGUE, uint16_t(CUBLASLT_EPILOGUE_DGELU)) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(set(CUBLASLT_MATMUL_DESC_EPILOGUE, uint32_t(CUBLASLT_EPILOGUE_GELU_AUX)) == CUBLAS_STATUS_SUCCESS);
    CHECK(set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux.p) == CUBLAS_STATUS_SUCCESS);
    cublasLtMatmulHeuristicResult_t result;
    int count = 0;
    auto offered = [&] {
        return cublasLtMatmulAlgoGetHeuristic(matmul.handle, matmul.desc, matmul.a, matmul.b, matmul.c, matmul.c,
                                              matmul.preference, 1, &result, &count);
    };
    for (int64_t ld : {0, 56, 68}) {
        CHECK(set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, ld) == CUBLAS_STATUS_SUCCESS);
        CHECK(offered() == CUBLAS_STATUS_INVALID_VALUE);
        CHECK(matmul.run(a.p, b.p, c.p, 1, 0) == CUBLAS_STATUS_INVALID_VALUE);
    }
    CHECK(set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, int64_t(64)) == CUBLAS_STATUS_SUCCESS);
    CHECK(offered() == CUBLAS_STATUS_SUCCESS);
    CHECK(matmul.run(a.p, b.p, c.p, 1, 0) == CUBLAS_STATUS_SUCCESS);
    CHECK(set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux.p + 1) == CUBLAS_STATUS_SUCCESS);
    CHECK(matmul.run(a.p, b.p, c.p, 1, 0) == CUBLAS_STATUS_NOT_SUPPORTED);
    CHECK(set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux.p + 8) == CUBLAS_STATUS_SUCCESS);
    CHECK_HAS(misuse_of([&] { CHECK(matmul.run(a.p, b.p, c.p, 1, 0) != CUBLAS_STATUS_SUCCESS); }), "expected the "
                                                                                                   "epilogue's 8192 "
                                                                                                   "auxiliary bytes "
                                                                                                   "inside one device "
                                                                                                   "allocation");
    int32_t batch = 2;
    for (auto layout : {matmul.a, matmul.b, matmul.c})
        cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch, sizeof batch);
    CHECK(offered() == CUBLAS_STATUS_NOT_SUPPORTED);
}

template <class F8>
std::vector<F8> random_fp8(size_t n, uint32_t seed) {
    std::vector<float> values = random_matrix<float>(n, seed);
    std::vector<F8> rounded;
    for (float value : values) rounded.push_back(F8(value));
    return rounded;
}
template <class A, class B, class Out>
void check_fp8_product(cudaDataType a_type, cudaDataType b_type, float beta) {
    constexpr size_t m = 48, n = 20, k = 96, ld = 112;
    std::vector<A> a = random_fp8<A>(ld * m, 1);
    std::vector<B> b = random_fp8<B>(ld * n, 2);
    std::vector<Out> c = random_matrix<Out>(m * n, 3);
    Device<A> da(a);
    Device<B> db(b);
    Device<Out> dc(c);
    Device<float> scales(2);
    Matmul matmul(true, false, a_type, type_of<Out>(), m, n, k, ld, ld, m);
    cublasLtMatrixLayoutSetAttribute(matmul.b, CUBLASLT_MATRIX_LAYOUT_TYPE, &b_type, sizeof b_type);
    const float *a_scale = scales.p, *b_scale = scales.p + 1;
    CHECK(cublasLtMatmulDescSetAttribute(matmul.desc, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &a_scale, sizeof a_scale) ==
          CUBLAS_STATUS_SUCCESS);
    CHECK(cublasLtMatmulDescSetAttribute(matmul.desc, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &b_scale, sizeof b_scale) ==
          CUBLAS_STATUS_SUCCESS);
    // The scales are read when the product runs, not when it is asked for.
    Stream stream;
    std::vector<float> values = {0.5f, 3};
    CHECK_OK(cudaMemcpyAsync(scales.p, values.data(), 8, cudaMemcpyHostToDevice, stream));
    CHECK(matmul.run(da.p, db.p, dc.p, 2, beta, nullptr, nullptr, 0, stream) == CUBLAS_STATUS_SUCCESS);
    CHECK_OK(cudaStreamSynchronize(stream));
    std::vector<Out> found = dc.read();
    double worst = 0;
    for (size_t j = 0; j < n; j++)
        for (size_t i = 0; i < m; i++) {
            double sum = 0;
            for (size_t l = 0; l < k; l++) sum += double(float(a[i * ld + l])) * double(float(b[j * ld + l]));
            double expected = 2 * 0.5 * 3 * sum + (beta == 0 ? 0 : beta * double(float(c[j * m + i])));
            double error = std::fabs(expected - double(float(found[j * m + i]))) /
                           (std::fabs(expected) * (sizeof(Out) == 2 ? 0x1p-8 : 0x1p-20) + 1e-3);
            worst = error <= worst ? worst : error;
        }
    CHECK(worst <= 1);
}
TEST_CASE("FP8 products equal a scalar loop in both formats, scaled by what the device's memory holds when they run") {
    check_fp8_product<__nv_fp8_e4m3, __nv_fp8_e4m3, __nv_bfloat16>(CUDA_R_8F_E4M3, CUDA_R_8F_E4M3, 0);
    check_fp8_product<__nv_fp8_e4m3, __nv_fp8_e5m2, __nv_bfloat16>(CUDA_R_8F_E4M3, CUDA_R_8F_E5M2, 0);
    check_fp8_product<__nv_fp8_e5m2, __nv_fp8_e4m3, float>(CUDA_R_8F_E5M2, CUDA_R_8F_E4M3, 1);
}
TEST_CASE("FP8 products that Hopper does not have are refused") {
    Device<char> a(64 * 64), b(64 * 64);
    Device<float> c(64 * 64);
    auto status = [&](bool ta, bool tb, cudaDataType a_type, cudaDataType b_type, cudaDataType out, int64_t ld) {
        Matmul matmul(ta, tb, a_type, out, 32, 32, 32, ld, ld, 32);
        cublasLtMatrixLayoutSetAttribute(matmul.b, CUBLASLT_MATRIX_LAYOUT_TYPE, &b_type, sizeof b_type);
        int8_t fast = 1;
        CHECK(cublasLtMatmulDescSetAttribute(matmul.desc, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &fast, sizeof fast) ==
              CUBLAS_STATUS_SUCCESS);
        return matmul.run(a.p, b.p, c.p, 1, 0);
    };
    CHECK(status(true, false, CUDA_R_8F_E4M3, CUDA_R_8F_E4M3, CUDA_R_32F, 32) == CUBLAS_STATUS_SUCCESS);
    CHECK(status(false, false, CUDA_R_8F_E4M3, CUDA_R_8F_E4M3, CUDA_R_32F, 32) == CUBLAS_STATUS_NOT_SUPPORTED);
    CHECK(status(true, true, CUDA_R_8F_E4M3, CUDA_R_8F_E4M3, CUDA_R_32F, 32) == CUBLAS_STATUS_NOT_SUPPORTED);
    CHECK(status(true, false, CUDA_R_8F_E5M2, CUDA_R_8F_E5M2, CUDA_R_32F, 32) == CUBLAS_STATUS_NOT_SUPPORTED);
    CHECK(status(true, false, CUDA_R_8F_E4M3, CUDA_R_16BF, CUDA_R_32F, 32) == CUBLAS_STATUS_NOT_SUPPORTED);
    CHECK(status(true, false, CUDA_R_8F_E4M3, CUDA_R_8F_E4M3, CUDA_R_8F_E4M3, 32) == CUBLAS_STATUS_NOT_SUPPORTED);
    CHECK(status(true, false, CUDA_R_8F_E4M3, CUDA_R_8F_E4M3, CUDA_R_32F, 40) == CUBLAS_STATUS_NOT_SUPPORTED);
    CHECK(status(true, false, CUDA_R_16BF, CUDA_R_16BF, CUDA_R_32F, 32) ==
          CUBLAS_STATUS_INVALID_VALUE);  // fast accumulation is FP8's
    Matmul matmul(true, false, CUDA_R_8F_E4M3, CUDA_R_32F, 32, 32, 32, 32, 32, 32);
    CHECK(matmul.run(a.p + 8, b.p, c.p, 1, 0) == CUBLAS_STATUS_NOT_SUPPORTED);
    float on_host = 1;
    const float* scale = &on_host;
    CHECK(cublasLtMatmulDescSetAttribute(matmul.desc, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &scale, sizeof scale) ==
          CUBLAS_STATUS_SUCCESS);
    CHECK_HAS(misuse_of([&] { CHECK(matmul.run(a.p, b.p, c.p, 1, 0) != CUBLAS_STATUS_SUCCESS); }), "expected A's and "
                                                                                                   "B's scales in "
                                                                                                   "device memory");
}

TEST_CASE("an algorithm is usable for a product that cuBLASLt offers, and says how much workspace it needs") {
    Matmul matmul(false, false, CUDA_R_16BF, CUDA_R_16BF, 64, 64, 64, 64, 64, 64);
    uint64_t bytes = 2 << 20;
    CHECK(cublasLtMatmulPreferenceSetAttribute(matmul.preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes,
                                               sizeof bytes) == CUBLAS_STATUS_SUCCESS);
    cublasLtMatmulHeuristicResult_t results[3], checked;
    int count = 0;
    CHECK(cublasLtMatmulAlgoGetHeuristic(matmul.handle, matmul.desc, matmul.a, matmul.b, matmul.c, matmul.c,
                                         matmul.preference, 3, results, &count) == CUBLAS_STATUS_SUCCESS);
    CHECK(count == 3);
    auto check = [&](const Matmul& product, const cublasLtMatmulAlgo_t* algo, cublasLtMatmulHeuristicResult_t* result) {
        return cublasLtMatmulAlgoCheck(matmul.handle, product.desc, product.a, product.b, product.c, product.c, algo,
                                       result);
    };
    for (int i = 0; i < count; i++) {
        memset(&checked, 0xFF, sizeof checked);
        CHECK(check(matmul, &results[i].algo, &checked) == CUBLAS_STATUS_SUCCESS);
        CHECK(checked.state == CUBLAS_STATUS_SUCCESS);
        CHECK(checked.workspaceSize == results[i].workspaceSize);
        CHECK(memcmp(&checked.algo, &results[i].algo, sizeof checked.algo) == 0);
    }
    cublasLtMatmulAlgo_t unknown{{0x6b64}};
    CHECK(check(matmul, &unknown, &checked) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(check(matmul, nullptr, &checked) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(check(matmul, &results[0].algo, nullptr) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(check(Matmul(false, false, CUDA_R_16BF, CUDA_R_16BF, 64, 64, 64, 68, 64, 64), &results[0].algo, &checked) ==
          CUBLAS_STATUS_NOT_SUPPORTED);
    CHECK(check(Matmul(false, false, CUDA_R_32F, CUDA_R_16BF, 64, 64, 64, 64, 64, 64), &results[0].algo, &checked) ==
          CUBLAS_STATUS_NOT_SUPPORTED);
    CHECK(check(Matmul(false, false, CUDA_R_16BF, CUDA_R_16BF, 64, 64, 64, 56, 64, 64), &results[0].algo, &checked) ==
          CUBLAS_STATUS_INVALID_VALUE);
    CHECK(cublasLtMatmulAlgoCheck(nullptr, matmul.desc, matmul.a, matmul.b, matmul.c, matmul.c, &results[0].algo,
                                  &checked) == CUBLAS_STATUS_NOT_INITIALIZED);
}

TEST_CASE("a product whose sum over k an algorithm is told to split adds up its slices in order, in workspace") {
    constexpr size_t m = 16, n = 8, k = 101, slices = 4;
    std::vector<float> a = random_matrix<float>(m * k, 1), b = random_matrix<float>(k * n, 2), c(m * n);
    Device<float> da(a), db(b), dc(c), workspace(slices * m * n);
    Matmul matmul(false, false, CUDA_R_32F, CUDA_R_32F, m, n, k, m, k, m);
    cublasLtMatmulHeuristicResult_t first, checked;
    int count = 0;
    CHECK(cublasLtMatmulAlgoGetHeuristic(matmul.handle, matmul.desc, matmul.a, matmul.b, matmul.c, matmul.c,
                                         matmul.preference, 1, &first, &count) == CUBLAS_STATUS_SUCCESS);
    CHECK(first.wavesCount == 0.25f);  // one tile of 128 x 128 on four multiprocessors
    auto check = [&](int32_t split, uint32_t scheme) {
        checked.algo = first.algo;
        CHECK(cublasLtMatmulAlgoConfigSetAttribute(&checked.algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &split,
                                                   sizeof split) == CUBLAS_STATUS_SUCCESS);
        CHECK(cublasLtMatmulAlgoConfigSetAttribute(&checked.algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &scheme,
                                                   sizeof scheme) == CUBLAS_STATUS_SUCCESS);
        cublasLtMatmulAlgo_t algo = checked.algo;
        return cublasLtMatmulAlgoCheck(matmul.handle, matmul.desc, matmul.a, matmul.b, matmul.c, matmul.c, &algo,
                                       &checked);
    };
    CHECK(check(0, CUBLASLT_REDUCTION_SCHEME_NONE) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(check(102, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(check(slices, CUBLASLT_REDUCTION_SCHEME_NONE) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(check(slices, CUBLASLT_REDUCTION_SCHEME_INPLACE) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(check(slices, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE) == CUBLAS_STATUS_SUCCESS);
    CHECK(checked.workspaceSize == slices * m * n * sizeof(float));
    int32_t told = 0;
    CHECK(cublasLtMatmulAlgoConfigGetAttribute(&checked.algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &told, sizeof told,
                                               nullptr) == CUBLAS_STATUS_SUCCESS);
    CHECK(told == slices);
    CHECK(matmul.run(da.p, db.p, dc.p, 1, 1, &checked.algo, workspace.p, checked.workspaceSize - 1) ==
          CUBLAS_STATUS_INVALID_VALUE);
    CHECK(matmul.run(da.p, db.p, dc.p, 1, 1, &checked.algo, workspace.p, checked.workspaceSize) ==
          CUBLAS_STATUS_SUCCESS);
    std::vector<float> found = dc.read();
    for (size_t j = 0; j < n; j++)
        for (size_t i = 0; i < m; i++) {
            float total = 0;
            for (size_t s = 0; s < slices; s++) {
                float sum = 0;
                for (size_t l = k * s / slices; l < k * (s + 1) / slices; l++) sum += a[l * m + i] * b[j * k + l];
                total = s ? total + sum : sum;
            }
            CHECK(found[j * m + i] == c[j * m + i] + total);
        }
}

TEST_CASE("the device describes itself as a small Hopper") {
    int count, device, value;
    cudaDeviceProp p;
    CHECK_OK(cudaGetDeviceCount(&count));
    CHECK(count == 1);
    CHECK_OK(cudaSetDevice(0));
    CHECK(cudaSetDevice(1) == cudaErrorInvalidDevice);
    CHECK_OK(cudaGetDevice(&device));
    CHECK_OK(cudaGetDeviceProperties(&p, device));
    CHECK(std::string(p.name) == "CUDA on CPU");
    CHECK(p.major * 10 + p.minor == 90);
    CHECK(p.sharedMemPerBlockOptin == 232448);
    CHECK_OK(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    CHECK(value == 232448);
    CHECK_OK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&value, reverse, 256, 100));
    CHECK(value == 8);
    CHECK(std::string(cudaGetErrorName(cudaErrorLaunchFailure)) == "cudaErrorLaunchFailure");
    cudaGetLastError();
}

// ----- cost

template <int N>
__global__ void many_barriers(int*) {
    for (int i = 0; i < N; i++) __syncthreads();
}
template <int N>
__global__ void many_products(float* out) {
    float d[4] = {};
    const uint32_t a[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
    for (int i = 0; i < N; i++) mma_16x8x16(d, a, 0x3f803f80, 0x3f803f80);
    out[threadIdx.x] = d[0];
}
namespace {
// The next call fails; its fault stays, where asked.
void fail_next(bool stays) { settings().fail_at = cuda_on_cpu::calls().made + 1, settings().fail_on = stays; }
volatile sig_atomic_t signals = 0;
}  // namespace

TEST_CASE("a call that is to fail does nothing and returns an error of its kind; the next works again") {
    Device<int> numbers(std::vector<int>{7});
    fail_next(false);
    CHECK(cudaMemset(numbers.p, 0, 4) == cudaErrorUnknown);
    CHECK(cudaGetLastError() == cudaErrorUnknown);
    CHECK(numbers.read()[0] == 7);
    void* p = nullptr;
    cublasLtMatmulDesc_t description = nullptr;
    for (auto allocate : {+[](void** p) { return cudaMalloc(p, 4); }, +[](void** p) { return cudaMallocHost(p, 4); }}) {
        fail_next(false);
        CHECK(allocate(&p) == cudaErrorMemoryAllocation);
        CHECK_OK(allocate(&p));
        CHECK((cudaFree(p) == cudaSuccess || cudaFreeHost(p) == cudaSuccess));
    }
    fail_next(false);
    CHECK(cublasLtMatmulDescCreate(&description, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_ALLOC_FAILED);
    CHECK(cublasLtMatmulDescCreate(&description, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS);
    fail_next(false);
    CHECK(cublasLtMatmulDescDestroy(description) == CUBLAS_STATUS_INTERNAL_ERROR);
    CHECK(cublasLtMatmulDescDestroy(description) == CUBLAS_STATUS_SUCCESS);
    settings().fail_at = 0;
}

TEST_CASE("a fault that stays: the device is lost to all later calls, or no more memory is to be had") {
    void* p = nullptr;
    int devices = 0;
    cudaEvent_t event = nullptr;
    fail_next(true);
    CHECK(cudaMalloc(&p, 4) == cudaErrorMemoryAllocation);
    CHECK(cudaEventCreate(&event) == cudaErrorMemoryAllocation);
    CHECK_OK(cudaDeviceSynchronize());
    cuda_on_cpu::clear_misuse();
    CHECK_OK(cudaEventCreate(&event));
    fail_next(true);
    CHECK(cudaEventRecord(event) == cudaErrorIllegalAddress);
    CHECK(cudaMalloc(&p, 4) == cudaErrorIllegalAddress);
    CHECK(cudaGetDeviceCount(&devices) == cudaErrorIllegalAddress);
    CHECK(cudaEventDestroy(event) == cudaErrorIllegalAddress);
    CHECK(cudaGetLastError() == cudaErrorIllegalAddress);
    cuda_on_cpu::clear_misuse();
    settings().fail_at = 0;
    CHECK_OK(cudaDeviceSynchronize());
}

TEST_CASE("each call counts once, by its name, whatever it is made of; a signal comes at the call that it is set to") {
    const std::string list = "/tmp/cuda_on_cpu_calls_" + std::to_string(getpid());
    fflush(stdout);
    if (pid_t child = fork(); child == 0) {
        cuda_on_cpu::calls().list = fopen(list.c_str(), "w");
        void *p = nullptr, *pinned = nullptr;
        int value = 0;
        cudaStream_t stream = nullptr;
        cudaEvent_t event = nullptr;
        cublasLtHandle_t handle = nullptr;
        cudaMalloc(&p, 4), cudaMallocHost(&pinned, 4), cudaMemset(p, 0, 4), cudaStreamCreate(&stream);
        cudaEventCreate(&event), cudaDeviceGetAttribute(&value, cudaDevAttrWarpSize, 0), cublasLtCreate(&handle);
        launch(write_indices, 1, 1, 0, stream, static_cast<int*>(p));
        fclose(cuda_on_cpu::calls().list);
        _exit(0);
    } else {
        waitpid(child, nullptr, 0);
    }
    FILE* file = fopen(list.c_str(), "r");
    REQUIRE(file);
    std::string names;
    char line[2048], name[256];
    for (unsigned long long number, before = 0; fgets(line, sizeof line, file); before = number) {
        int place = 0;
        REQUIRE(sscanf(line, "%llu %255s %n", &number, name, &place) == 2);
        CHECK((before == 0 || number == before + 1));
        CHECK(strchr(line + place, ' '));  // more than one address
        names += std::string(name) + " ";
    }
    fclose(file);
    unlink(list.c_str());
    CHECK(names == "cudaMalloc cudaMallocHost cudaMemset cudaStreamCreate cudaEventCreate cudaDeviceGetAttribute "
                   "cublasLtCreate cudaLaunchKernelEx ");

    auto before = signal(SIGTERM, [](int) { signals = signals + 1; });
    settings().signal_at = cuda_on_cpu::calls().made + 2;
    int device = 0;
    CHECK_OK(cudaGetDevice(&device));
    CHECK(signals == 0);
    CHECK_OK(cudaGetDevice(&device));
    CHECK(signals == 1);
    settings().signal_at = 0;
    signal(SIGTERM, before);
}

TEST_CASE("cost: printed, not judged, since it depends on the machine and the build") {
    Device<float> out(32);
    int* none = nullptr;
    auto nanoseconds = [](double count) {
        auto start = std::chrono::steady_clock::now();
        CHECK_OK(cudaDeviceSynchronize());
        return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count() / count;
    };
    launch(many_barriers<100>, 1, 256, 0, nullptr, none), nanoseconds(1);
    launch(many_barriers<1000>, 1, 256, 0, nullptr, none);
    MESSAGE("a switch: ", nanoseconds(256 * 1000), " ns");
    launch(many_products<20000>, 1, 32, 0, nullptr, out.p);
    MESSAGE("mma_16x8x16 by a warp: ", nanoseconds(20000), " ns");
    CHECK(out.read()[0] == 16 * 20000);
    for (int i = 0; i < 1000; i++) launch(nothing, 1, 32, 0, nullptr, (const int*)nullptr);
    MESSAGE("a launch of one warp: ", nanoseconds(1000), " ns");
    Device<float> a(std::vector<float>(128 * 256, 1)), b(std::vector<float>(256 * 1024, 1)), c(128 * 1024);
    Matmul matmul(false, false, CUDA_R_32F, CUDA_R_32F, 128, 1024, 256, 128, 256, 128);
    for (int i = 0; i < 5; i++) matmul.run(a.p, b.p, c.p, 1, 0);
    MESSAGE("matrix product 128 x 1024 x 256: ", 2.0 * 128 * 1024 * 256 / nanoseconds(5), " GFLOP/s");
}
