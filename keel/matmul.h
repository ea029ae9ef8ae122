// keel/matmul.h: the CPU's numbers: their type, buffers of them, the exponential and the matrix product.
#pragma once

#include <array>
#include <omp.h>
#include <sys/mman.h>

#include "rate.h"

#ifdef KEEL_FP64
using real = double;
#else
using real = float;
#endif
using index_t = std::ptrdiff_t;  // OpenMP loops want it signed; L*B*T*C overflows an int

// A register of reals, through the compiler's vector extension: the same source for AVX-512, AVX2, SSE and NEON.
#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, REGISTER_ROWS = 12;  // 32 registers: 12 x 2 sums, 2 of B, 1 of A
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, REGISTER_ROWS = 6;  // 16 registers: 6 x 2 sums, 2 of B, 1 of A
#elif defined(__ARM_NEON) && defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, REGISTER_ROWS = 12;  // 32 registers, as with AVX-512
#elif defined(__wasm_simd128__)
constexpr int VECTOR_BYTES = 16, REGISTER_ROWS = 4;  // of the 16 registers beneath, a browser leaves fewer to us
#else
constexpr int VECTOR_BYTES = 16, REGISTER_ROWS = 6;
#endif
typedef real vec __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));  // aligned like a real
constexpr int LANES = VECTOR_BYTES / int(sizeof(real));

// A buffer aligned for vectors. Nothing is written to it at first: a page goes near the thread that first touches it.
// Large ones ask for pages of 2 MiB: a step passes over all activations, and of pages of 4 KiB nearly each would wait
// for its address to be looked up.
template <class T>
class Buffer {
public:
    Buffer() = default;
    explicit Buffer(uint64_t n) : n(size_t(n)) {
        if (n == 0) return;
        uint64_t bytes = round_up(n * sizeof(T), 64);
        if (bytes <= SIZE_MAX) data_ = static_cast<T*>(aligned_alloc(64, bytes));
        if (!data_)
            fail("expected %s of memory, found less; use a smaller -b, -t, -C or -L, or -r layer",
                 bytes_text(double(bytes)));
#ifdef MADV_HUGEPAGE
        size_t to_page = size_t(-reinterpret_cast<uintptr_t>(data_)) % 4096;
        if (bytes > (4 << 20)) madvise(reinterpret_cast<char*>(data_) + to_page, bytes - to_page, MADV_HUGEPAGE);
#endif
    }
    Buffer(Buffer&& b) noexcept : data_(std::exchange(b.data_, nullptr)), n(std::exchange(b.n, 0)) {}
    Buffer& operator=(Buffer&& b) noexcept {
        std::swap(data_, b.data_), std::swap(n, b.n);
        return *this;
    }
    ~Buffer() { free(data_); }
    T* data() { return data_; }
    const T* data() const { return data_; }
    size_t size() const { return n; }
    T& operator[](size_t i) { return data_[i]; }
    void zero() {
        #pragma omp parallel for schedule(static)
        for (index_t i = 0; i < index_t(n); i++) data_[i] = T(0);
    }

private:
    T* data_ = nullptr;
    size_t n = 0;
};

// exp as 2^n e^r with |r| <= ln(2)/2 and the Taylor series of e^r, which ends where the next term is below half a unit
// in the last place. It has no branch, so that a loop around it vectorises, unlike libm's. It is exact to 1.5 ulp from
// x = -87.6 to 88.3 (FP64: -708.3 to 709.4); n is limited to one step more, where 2^n has the bits of 0 and of
// infinity.
inline real exponential(real x) {
    constexpr bool fp64 = sizeof(real) == 8;
    using bits = std::conditional_t<fp64, int64_t, int32_t>;
    constexpr int degree = fp64 ? 13 : 7, mantissa = fp64 ? 52 : 23;
    constexpr bits bias = fp64 ? 1023 : 127;
    constexpr real lowest = fp64 ? real(-709) : real(-88), highest = fp64 ? real(709.6) : real(88.5);
    // adding and taking away 1.5 * 2^mantissa rounds to the nearest integer, which is in the sum's lowest bits
    constexpr real round_magic = fp64 ? real(6755399441055744.0) : real(12582912.0);
    // ln 2 in two parts, the first with trailing zeros, so that n * ln2_high is exact
    constexpr real ln2_high = fp64 ? real(6.93147180369123816490e-01) : real(0.693359375);
    constexpr real ln2_low = fp64 ? real(1.90821492927058770002e-10) : real(-2.12194440e-4);
    constexpr auto coefficients = [] {
        std::array<real, degree + 1> c{};  // 1 / k!
        double factorial = 1;
        for (int k = 0; k <= degree; factorial *= ++k) c[size_t(k)] = real(1 / factorial);
        return c;
    }();
    x = lowest > x ? lowest : x, x = highest < x ? highest : x;  // NaN stays
    real rounded = x * real(1.4426950408889634) + round_magic, n = rounded - round_magic;
    real r = (x - n * ln2_high) - n * ln2_low;
    real p = coefficients[degree];
    #pragma GCC unroll 16
    for (int k = degree - 1; k >= 0; k--) p = p * r + coefficients[size_t(k)];
    return p * std::bit_cast<real>((std::bit_cast<bits>(rounded) + bias) << mantissa);
}

// ----------------------------------------------------------------------------------------------------
// The matrix product
//
//     C(M,N) = A(M,K) B(K,N)   or   C += A B      A[i][k] = a[i*a_row + k*a_col], B alike, C row-major
//
// The one algorithm that every fast CPU library uses (Goto and van de Geijn 2008): keep a tile of C, TILE_M rows of two
// vectors, in registers, and read A and B so that they come from the nearest cache. A sum over k runs in order, one
// multiply-add a term, whatever the tile: so no bit of C depends on M, on N or on the threads.

// The sizes, with the bytes of AVX-512's FP32; AVX2's are a half or less, as its caches are:
constexpr int TILE_M = REGISTER_ROWS, TILE_N = 2 * LANES;  // fill the registers: fewest loads a multiply-add
constexpr int DEPTH = 256;  // k of a block: a tile reads 12 KiB of A and 32 of B, L1 has 48; C passes K/256 times
constexpr int GROUP_N = 8 * TILE_N;   // columns of B, 256 KiB of the L2 cache, that a tile of A meets before the next
constexpr int BLOCK_M = 12 * TILE_M;  // rows of A, 144 KiB, that stay in the L2 cache from one group to the next
constexpr size_t A_PANELS = size_t(BLOCK_M) * DEPTH;  // reals of A that a thread packs at a time
constexpr size_t B_PANELS = size_t(1) << 20;          // of B: a weight of C = 512 is packed whole
constexpr size_t PACKING = 12;                        // what packing a row costs, in multiplications of a row

struct Matrix {  // a view with free strides
    const real* data;
    size_t row, col;
    Matrix at(size_t i, size_t j) const { return {data + i * row + j * col, row, col}; }
    Matrix transposed() const { return {data, col, row}; }
};
inline Matrix row_major(const real* data, size_t stride) { return {data, stride, 1}; }

// How the tiles of an operand lie: tile t starts at data + t * next, and the vectors that it is read by are `stride`
// apart. B is read by rows of TILE_N columns, from packed panels or from a row-major matrix as it is; A by columns of
// TILE_M rows, from packed panels or a transposed matrix as it is, or, `by_rows`, from a row-major one as it is.
struct Tiles {
    const real* data;
    size_t next, stride;
    bool by_rows = false;
    Tiles from(int tile) const { return {data + tile * next, next, stride, by_rows}; }
    Tiles from_row(int k) const { return {data + k * stride, next, stride, by_rows}; }
};
inline Tiles a_tiles(const Matrix& m) { return {m.data, TILE_M * m.row, m.col == 1 ? m.row : m.col, m.col == 1}; }
inline Tiles packed(const real* panels, int width, int K) { return {panels, size_t(width) * K, size_t(width)}; }

// c (rows, vectors * LANES) += one tile of A times one of B; `first` starts from zero instead.
template <bool by_rows, int vectors, int rows>
void multiply_tile(int K, const real* a, size_t a_stride, const real* b, size_t b_stride, real* c, size_t c_row,
                   bool first) {
    vec sum[rows][vectors];
    #pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
        #pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) sum[i][v] = first ? vec{} : *(const vec*)(c + i * c_row + v * LANES);
    for (int k = 0; k < K; k++, b += b_stride) {
        vec bk[vectors];
        #pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) bk[v] = *(const vec*)(b + v * LANES);
        #pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            real aik = by_rows ? a[i * a_stride + k] : a[k * a_stride + i];
            #pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) sum[i][v] += aik * bk[v];
        }
    }
    #pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
        #pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) *(vec*)(c + i * c_row + v * LANES) = sum[i][v];
}

// The last rows of a matrix get a kernel of their number: tile_kernels[by_rows][vectors - 1][rows - 1].
using TileKernel = decltype(&multiply_tile<true, 1, 1>);
template <bool by_rows, int vectors>
constexpr auto kernels_of_rows = []<int... i>(std::integer_sequence<int, i...>) {
    return std::array<TileKernel, TILE_M>{multiply_tile<by_rows, vectors, i + 1>...};
}(std::make_integer_sequence<int, TILE_M>());
constexpr std::array<TileKernel, TILE_M> tile_kernels[2][2] = {{kernels_of_rows<false, 1>, kernels_of_rows<false, 2>},
                                                               {kernels_of_rows<true, 1>, kernels_of_rows<true, 2>}};

// C (M,N) = or += A (M,K) B (K,N), by one thread. Columns that are no whole vector go through a scratch tile; B has
// readable values behind them.
inline void multiply_block(int M, int N, int K, Tiles a, Tiles b, real* c, size_t c_row, bool first) {
    for (int i = 0; i < M; i += TILE_M)
        for (int j = 0; j < N; j += TILE_N) {
            int m = std::min(TILE_M, M - i), n = std::min(TILE_N, N - j), vectors = (n + LANES - 1) / LANES;
            TileKernel kernel = tile_kernels[a.by_rows][vectors - 1][m - 1];
            const real *ai = a.from(i / TILE_M).data, *bj = b.from(j / TILE_N).data;
            real* tile = c + size_t(i) * c_row + j;
            if (n == vectors * LANES) {
                kernel(K, ai, a.stride, bj, b.stride, tile, c_row, first);
                continue;
            }
            real edge[TILE_M * TILE_N];
            for (int y = 0; y < m && !first; y++) memcpy(edge + y * TILE_N, tile + y * c_row, n * sizeof(real));
            kernel(K, ai, a.stride, bj, b.stride, edge, TILE_N, first);
            for (int y = 0; y < m; y++) memcpy(tile + y * c_row, edge + y * TILE_N, n * sizeof(real));
        }
}

// Transposes a square of LANES x LANES, whose rows are in_row and out_row apart, in registers: zipping the upper half
// of the rows with the lower, log2(LANES) times, turns rows into columns.
template <int... lane>
inline void transpose_square(const real* in, size_t in_row, real* out, size_t out_row,
                             std::integer_sequence<int, lane...>) {
    vec rows[LANES], zipped[LANES];
    #pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) rows[i] = *(const vec*)(in + i * in_row);
    #pragma GCC unroll 8
    for (int pass = 1; pass < LANES; pass *= 2) {
        #pragma GCC unroll 16
        for (int i = 0; i < LANES; i += 2) {
            vec upper = rows[i / 2], lower = rows[(i + LANES) / 2];
            zipped[i] = vec{(lane % 2 ? lower : upper)[lane / 2]...};
            zipped[i + 1] = vec{(lane % 2 ? lower : upper)[(lane + LANES) / 2]...};
        }
        #pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) rows[i] = zipped[i];
    }
    #pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) *(vec*)(out + i * out_row) = rows[i];
}

// Copies `width` rows of m (or its columns, if given transposed) into a panel (K,width); rows that m lacks are zeros.
template <int width>
inline void pack_panel(const Matrix& m, int rows, int K, real* panel) {
    int k = 0;
    if (rows == width && m.row == 1) {
        for (; k < K; k++) memcpy(panel + k * width, m.data + size_t(k) * m.col, width * sizeof(real));
    } else if (rows == width && m.col == 1 && width % LANES == 0) {
        for (; k + LANES <= K; k += LANES)
            for (int i = 0; i < width; i += LANES)
                transpose_square(m.data + size_t(i) * m.row + k, m.row, panel + k * width + i, width,
                                 std::make_integer_sequence<int, LANES>());
    }
    for (; k < K; k++)
        for (int i = 0; i < width; i++)
            panel[k * width + i] = i < rows ? m.data[size_t(i) * m.row + size_t(k) * m.col] : real(0);
}

// Packs B (K,N) into panels of TILE_N columns, or A (M,K) into panels of TILE_M rows, by one thread. The last is filled
// up with zeros.
inline Tiles pack_b(const Matrix& b, int N, int K, real* panels) {
    for (int j = 0; j < N; j += TILE_N)
        pack_panel<TILE_N>(b.at(0, j).transposed(), std::min(TILE_N, N - j), K, panels + size_t(j) * K);
    return packed(panels, TILE_N, K);
}

inline Tiles pack_a(const Matrix& a, int M, int K, real* panels) {
    for (int i = 0; i < M; i += TILE_M)
        pack_panel<TILE_M>(a.at(i, 0), std::min(TILE_M, M - i), K, panels + size_t(i) * K);
    return packed(panels, TILE_M, K);
}

// A row-major B (K,N) as it lies, or packed into panels where its last columns are no whole vector.
inline Tiles b_tiles(const Matrix& b, int N, int K, real* panels) {
    return N % LANES == 0 ? Tiles{b.data, TILE_N, b.row} : pack_b(b, N, K, panels);
}

// Every thread's own memory, which grows outside of regions alone: inside one, missing memory would end the program.
struct ThreadScratch {
    Buffer<real> all;
    size_t each = 0;  // reals of a thread
};
inline ThreadScratch& thread_scratch() {
    static ThreadScratch scratch;
    return scratch;
}
inline void reserve_scratch(size_t n) {
    ThreadScratch& s = thread_scratch();
    n = std::max(s.each, round_up(n, 64 / sizeof(real)));  // no two threads in one cache line
    size_t reals = size_t(omp_get_max_threads()) * n;
    if (n > s.each || s.all.size() < reals) s.all = Buffer<real>(reals), s.each = n;
}
inline real* own_scratch() {
    return thread_scratch().all.data() + size_t(omp_get_thread_num()) * thread_scratch().each;
}

// Every thread's panels, which grow outside of regions alone.
inline Buffer<real>& thread_panels() {
    static Buffer<real> panels;
    return panels;
}
inline void reserve_panels() {
    size_t reals = size_t(omp_get_max_threads()) * (A_PANELS + B_PANELS);
    if (thread_panels().size() < reals) thread_panels() = Buffer<real>(reals);
}

struct NothingToFinish {
    void operator()(size_t, size_t, size_t, size_t) const {}
};

// The product by one thread, with its panels. A row-major A is read as it lies: a row is one stream, and TILE_M of them
// stay in the L1 cache. Of a transposed one each column would be a page of its own; it is packed where more than a few
// tiles read it.
template <class Finish>
void thread_product(size_t M, size_t N, size_t K, Matrix a, Matrix b, real* c, size_t c_row, bool accumulate,
                    real* panels, Finish finish) {
    for (size_t j = 0; j < N; j += B_PANELS / DEPTH) {
        size_t n = std::min(N - j, B_PANELS / DEPTH), columns = round_up(n, TILE_N);
        size_t deep = B_PANELS / columns / DEPTH * DEPTH;  // k that are packed at a time
        for (size_t k0 = 0; k0 < K; k0 += deep) {
            size_t k1 = std::min(K, k0 + deep);
            auto depth = [&](size_t k) { return int(std::min(size_t(DEPTH), k1 - k)); };
            auto b_panels = [&](size_t k) { return panels + A_PANELS + (k - k0) * columns; };
            for (size_t k = k0; k < k1; k += DEPTH) pack_b(b.at(k, j), int(n), depth(k), b_panels(k));
            for (size_t i = 0; i < M; i += BLOCK_M) {
                size_t m = std::min(M - i, size_t(BLOCK_M));
                for (size_t k = k0; k < k1; k += DEPTH) {
                    Tiles tiles = a_tiles(a.at(i, k));
                    if (!tiles.by_rows && n > 4 * TILE_N) tiles = pack_a(a.at(i, k), int(m), depth(k), panels);
                    for (size_t g = 0; g < n; g += GROUP_N)
                        multiply_block(int(m), int(std::min(n - g, size_t(GROUP_N))), depth(k), tiles,
                                       packed(b_panels(k) + g * depth(k), TILE_N, depth(k)), c + i * c_row + j + g,
                                       c_row, !accumulate && k == 0);
                }
                if (k1 == K) finish(i, j, m, n);
            }
        }
    }
}

// The product by all threads of the parallel region that calls it, or by one outside of any; c is whole when it
// returns. Each has a block of c of its own and packs what it reads for itself: one thread waits for the others once
// only, and between forward and backward, norms and products the same rows stay in one core's cache. finish(i, j, m, n)
// is called for every block of c, m rows from i and n columns from j, by the thread that has just finished it and still
// has it in its cache.
template <class Finish = NothingToFinish>
void team_product(size_t M, size_t N, size_t K, Matrix a, Matrix b, real* c, size_t c_row, bool accumulate,
                  Finish finish = {}) {
    if (!omp_in_parallel()) reserve_panels();
    size_t threads = std::min(size_t(omp_get_num_threads()), thread_panels().size() / (A_PANELS + B_PANELS));
    // The largest block's area is what it multiplies, its sides what it reads and packs.
    size_t height = 0, width = 0, least = SIZE_MAX;
    for (size_t across = 1; across <= threads; across++) {
        size_t down = threads / across, h = round_up((M + down - 1) / down, TILE_M),
               w = round_up((N + across - 1) / across, TILE_N), cost = h * w + PACKING * (h + w);
        if (cost < least) least = cost, height = h, width = w;
    }
    size_t thread = size_t(omp_get_thread_num()), across = (N + width - 1) / width;
    size_t i = thread / across * height, j = thread % across * width;
    if (thread < threads && i < M)
        thread_product(std::min(height, M - i), std::min(width, N - j), K, a.at(i, 0), b.at(0, j), c + i * c_row + j,
                       c_row, accumulate, thread_panels().data() + thread * (A_PANELS + B_PANELS),
                       [&](size_t y, size_t x, size_t m, size_t n) { finish(i + y, j + x, m, n); });
    #pragma omp barrier
}

inline void product(size_t M, size_t N, size_t K, Matrix a, Matrix b, real* c, size_t c_row, bool accumulate) {
    reserve_panels();
    #pragma omp parallel
    team_product(M, N, K, a, b, c, c_row, accumulate);
}

// Every thread multiplies for itself and counts the time in which a processor works for it, so that others on the
// machine do not slow the rate: beside four busy loops on two cores the time of products by the team gave 10 to 21
// GFLOP/s, alone 279 to 306; this 275 to 331, alone 332 to 345. ranks_here: on this machine. More threads than
// processors do not raise the rate.
inline MatrixRate product_rate(int ranks_here = 1) {
    constexpr size_t M = 512, N = 768, K = 256, TIMES = 15;
    reserve_panels();
    size_t most = size_t(omp_get_max_threads()), team = 0;
    Buffer<real> a(M * K), b(N * K), c(most * M * N);
    a.zero(), b.zero();
    std::vector<double> times(most * 2 * TIMES);
    #pragma omp parallel reduction(+ : team)
    {
        team++;
        size_t thread = size_t(omp_get_thread_num());
        double *worked = &times[thread * 2 * TIMES], *took = worked + TIMES;
        for (size_t i = 0; i < TIMES; i++) {
            double began = thread_seconds(), start = seconds();
            thread_product(M, N, K, row_major(a.data(), K), row_major(b.data(), K).transposed(),
                           c.data() + thread * M * N, N, SET, thread_panels().data() + thread * (A_PANELS + B_PANELS),
                           NothingToFinish());
            took[i] = seconds() - start, worked[i] = thread_seconds() - began;
        }
    }
    std::vector<MatrixRate> threads(team);
    for (size_t t = 0; t < team; t++) {
        auto first = times.begin() + ptrdiff_t(t * 2 * TIMES);
        threads[t] = MatrixRate::of(2.0 * M * N * K, {first, first + TIMES}, {first + TIMES, first + 2 * TIMES});
    }
    MatrixRate rate = MatrixRate::together(threads);
    double processors = std::min(double(omp_get_num_procs()),  // that this process may use
                                 double(sysconf(_SC_NPROCESSORS_ONLN)) / std::max(1, ranks_here)),
           scale = std::min(1.0, processors / double(team));
    rate.fastest *= scale, rate.median *= scale;
    rate.share = std::min(1.0, rate.share / scale);  // more threads than processors are no one else's work
    return rate;
}

// Lets numbers below the normal range (1.2e-38 in FP32) count as 0, in every thread that begins afterwards. A core
// takes a hundred cycles over each, and a gradient that dies over depth is full of them: Post-LN's steps at L = 64 took
// 6 times as long by step 1500. What they would add to a weight is far below its last bit.
inline void flush_subnormals() {
#if defined(__SSE__)
    __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | 0x8040);  // results to zero, operands as zero
#elif defined(__aarch64__)
    uint64_t control;
    asm volatile("mrs %0, fpcr" : "=r"(control));
    asm volatile("msr fpcr, %0" ::"r"(control | 1 << 24));
#endif
}

// Starts the program again with a limit on OpenMP's spinning, unless one is set. In GCC's OpenMP a thread that waits
// for the others spins for about a millisecond before it sleeps. On a core that another program wants too, that
// millisecond is taken from the very thread that it waits for: a step then takes not twice but a hundred times as long.
// The runtime reads the limit from the environment when it is loaded.
inline void limit_spinning(char** argv) {
    if (getenv("GOMP_SPINCOUNT") || getenv("OMP_WAIT_POLICY")) return;
    setenv("GOMP_SPINCOUNT", "1000", 1);
    execv("/proc/self/exe", argv);  // returns only where it fails, and then nothing but time is lost
}
