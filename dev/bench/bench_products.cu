// bench_products: which way of doing the matrix products of a sub-layer is the fastest, and what each would win of a
// training step.
//
// Per shape (C, rows = B*T), each way beside the one that the trainer takes:
//     --tune's algorithm and the heuristic's first; GELU in cuBLASLt's epilogues and in kernels; dW added by the
//     product (beta = 1), by a kernel, or not at all; FP8 alone and with the kernels that make its operands; where C is
//     small, dW in slices of rows, q, k and v apart, and two products on two streams.
// A way's numbers are first held against the trainer's (relative L2 error of a sample), then all are timed by turns,
// each as a graph of launches over buffers that together pass the L2 cache; medians of REPEATS. From the second part
// on, every product has the fastest of cuBLASLt's CANDIDATES algorithms, so that no way wins by a luckier heuristic.
// Rates count the product's operations, whatever else the way does. A way that cuBLASLt refuses is printed as "not
// offered" with its status. Shares of a step are of the time of a block (attention and feed-forward) in a micro-step of
// the trainer, measured here too: what a model of many blocks does almost all of the time. Prints tables, and with
// --csv FILE appends rows metric,value,unit,peer_value,ratio; a gain's ratio is tokens/s with it over tokens/s without.
// --small: shapes for a dry run, also on the CPU headers.
#include <cuda_fp8.h>

#include "keel/run.h"
#include "train_keel.cu"

#include "dev/bench/bench.h"

namespace {

static_assert(BRANCH_BF16, "the FP32 build has no choice of products");
constexpr int REPEATS = 9, CANDIDATES = 16;
constexpr double BF16_TOLERANCE = 1e-2,
                 FP8_TOLERANCE = 6e-2;  // BF16 rounds to 2^-9; e4m3 to 2^-4, e5m2 to 2^-3, of random signs
constexpr double NOISE = 2;             // per cent; below it nothing is said to win
Bench bench{"bench_products"};

// ----- Kernels that FP8 and sliced products would need

struct AmaxShared { float warp[THREADS / WARP]; };

// amax = max(amax, |x|) of n numbers, as a float's bits, which for numbers that are not negative are in the numbers'
// order.  2 bytes a number
__global__ void amax_kernel(unsigned* amax, const branch_t* x, size_t n) {
    begin_kernel();
    float largest = 0;
    each_in_flight(int(blockIdx.x * blockDim.x + threadIdx.x), int(n / WIDE), int(gridDim.x * blockDim.x),
                   [&](int i) { return load<WIDE>(x + size_t(i) * WIDE); }, [&](int, const Pack<branch_t, WIDE>& v) {
        for (int i = 0; i < WIDE; i++) largest = fmaxf(largest, fabsf(float(v[i])));
    });
    AmaxShared& s = shared<AmaxShared>();
    largest = warp_max(largest);
    if (threadIdx.x % WARP == 0) s.warp[threadIdx.x / WARP] = largest;
    __syncthreads();
    if (threadIdx.x / WARP > 0) return;
    largest = warp_max(threadIdx.x < blockDim.x / WARP ? s.warp[threadIdx.x] : 0);
    if (threadIdx.x == 0) atomicMax(amax, __float_as_uint(largest));
}

constexpr int CAST_ROWS = 128, CAST_COLUMNS = 64;  // a block's tile: 4 rows of 8 columns a thread
struct CastShared {
    uint32_t words[CAST_COLUMNS][CAST_ROWS / 4 + 1];  // four rows of a column; one more, against bank conflicts
};
template <class F8>
constexpr float LARGEST_FP8 = std::is_same_v<F8, __nv_fp8_e4m3> ? 448 : 57344;

// x (rows,columns) in FP8, scaled so that amax becomes the largest number there is, and the same transposed
// (columns,rows). scale: what takes the products back.  4 bytes an element
template <class F8>
__global__ void cast_transpose_kernel(F8* out, F8* transposed, float* scale, const branch_t* x, const unsigned* amax,
                                      int rows, int columns) {
    begin_kernel();
    float largest = __uint_as_float(*amax), factor = largest > 0 ? LARGEST_FP8<F8> / largest : 1;
    if (blockIdx.x == 0 && threadIdx.x == 0) *scale = 1 / factor;
    int first_row = int(blockIdx.x) / (columns / CAST_COLUMNS) * CAST_ROWS,
        first_column = int(blockIdx.x) % (columns / CAST_COLUMNS) * CAST_COLUMNS;
    int group = int(threadIdx.x) / 8, column = int(threadIdx.x) % 8 * 8;
    size_t at = size_t(first_row + group * 4) * columns + first_column + column;
    Pack<branch_t, WIDE> v[4];
#pragma unroll
    for (int j = 0; j < 4; j++) v[j] = load<WIDE>(x + at + size_t(j) * columns);
    uint32_t words[8] = {};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        Pack<F8, 8> cast;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            cast[i] = F8(float(v[j][i]) * factor);
            words[i] |= uint32_t(cast[i].__x) << 8 * j;
        }
        store(out + at + size_t(j) * columns, cast);
    }
    CastShared& s = shared<CastShared>();
#pragma unroll
    for (int i = 0; i < 8; i++) s.words[column + i][group] = words[i];
    __syncthreads();
    for (int c = int(threadIdx.x) / WARP; c < CAST_COLUMNS; c += THREADS / WARP)
        as_vector<uint32_t>(transposed + size_t(first_column + c) * rows + first_row)[threadIdx.x % WARP] =
            s.words[c][threadIdx.x % WARP];
}

// g += the sum of parts (slices,n), in order.  4 (slices + 2) bytes an element
__global__ void add_slices_kernel(float* g, const float* parts, size_t n, int slices) {
    begin_kernel();
    size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (at >= n) return;
    Pack<float, 4> sum = load<4>(g + at);
#pragma unroll 8
    for (int s = 0; s < slices; s++) {
        Pack<float, 4> part = load<4>(parts + size_t(s) * n + at);
        for (int i = 0; i < 4; i++) sum[i] += part[i];
    }
    store(g + at, sum);
}

// ----- Timing

// A stream with what runs on it.
struct Lane {
    cudaStream_t stream;
    void* workspace;
};

struct Lab {
    Device device;  // the trainer's own products, without a table
    Device beside;  // its stream and workspace are those of the second of two products at once
    cublasLtHandle_t handle = nullptr;
    cudaEvent_t forked = nullptr, joined = nullptr;
    int capability;

    Lab() {
        check(cublasLtCreate(&handle), "cublasLtCreate");
        for (cudaEvent_t* event : {&forked, &joined}) CUDA(cudaEventCreateWithFlags(event, cudaEventDisableTiming));
        cudaDeviceProp p = gpu_properties();
        capability = 10 * p.major + p.minor;
    }
    ~Lab() {
        cudaEventDestroy(forked), cudaEventDestroy(joined);
        cublasLtDestroy(handle);
    }
    Lab(const Lab&) = delete;
    Lab& operator=(const Lab&) = delete;

    Lane lane() const { return {device.stream, device.workspace.data()}; }
    Lane second() const { return {beside.stream, beside.workspace.data()}; }

    // a() on the stream of a lane beside b() on the other's.
    template <class A, class B>
    void at_once(A a, B b) {
        CUDA(cudaEventRecord(forked, device.stream));
        CUDA(cudaStreamWaitEvent(beside.stream, forked, 0));
        a(lane()), b(second());
        CUDA(cudaEventRecord(joined, beside.stream));
        CUDA(cudaStreamWaitEvent(device.stream, joined, 0));
    }
};

// A run of launches, whose i-th is on the i-th set of buffers.
struct Way {
    std::function<void(int)> run;
    cudaStream_t stream;
};

// Median seconds of a launch of each way.
std::vector<double> side_by_side(const std::vector<Way>& ways, int launches) {
    std::vector<Graph> graphs(ways.size());
    std::vector<std::unique_ptr<Stopwatch>> watches;
    for (size_t w = 0; w < ways.size(); w++) {
        ways[w].run(0);  // what a first launch loads is no part of a graph
        CUDA(cudaStreamSynchronize(ways[w].stream));
        graphs[w].record(ways[w].stream, [&] {
            for (int i = 0; i < launches; i++) ways[w].run(i);
        });
        watches.push_back(std::make_unique<Stopwatch>(ways[w].stream));
    }
    std::vector<std::vector<float>> times(ways.size());
    for (int round = -1; round < (bench.small ? 1 : REPEATS); round++)  // -1: warm-up
        for (size_t w = 0; w < ways.size(); w++) {
            watches[w]->start();
            CUDA(cudaGraphLaunch(graphs[w].launches, ways[w].stream));
            float ms = watches[w]->stop();
            if (round >= 0) times[w].push_back(ms);
        }
    std::vector<double> seconds;
    for (auto& of_one : times) seconds.push_back(double(median(of_one)) * 1e-3 / launches);
    return seconds;
}
int usual_launches() { return bench.small ? 1 : 20; }

struct Variant {
    std::string name;  // in the table and, with its words joined, in a row's metric
    std::function<void(int)> run;
    std::function<std::vector<float>()> result;  // of run(0)
    double tolerance = BF16_TOLERANCE;
    std::string refused = {};       // why there is no such way here
    bool may_be_inexact = false;    // out of tolerance it is refused, but nothing is wrong
    cudaStream_t stream = nullptr;  // null: the lab's
};
std::string joined(std::string words) {
    std::replace(words.begin(), words.end(), ' ', '_');
    words.erase(std::remove_if(words.begin(), words.end(),
                               [](char c) { return c == ',' || c == '\'' || c == '(' || c == ')'; }),
                words.end());
    return words;
}

// Seconds of each variant, infinite where it was refused. The first is the trainer's way. operations: of the products.
std::vector<double> compare(Lab& lab, const std::string& name, double operations, std::vector<Variant> variants) {
    std::vector<float> expected = variants[0].result();
    std::vector<Way> ways;
    std::vector<double> errors;
    for (Variant& v : variants) {
        double error = 0;
        if (v.refused.empty() && &v != &variants[0]) {
            error = relative_error(expected, v.result());
            if (!(error <= v.tolerance)) {
                v.refused = format("%s: relative L2 error %.3g, expected at most %.3g",
                                   v.may_be_inexact ? "too inexact" : "WRONG", error, v.tolerance);
                bench.bad += !v.may_be_inexact;
            }
        }
        errors.push_back(error);
        if (v.refused.empty()) ways.push_back({v.run, v.stream ? v.stream : lab.device.stream});
    }
    std::vector<double> measured = side_by_side(ways, usual_launches()), seconds;
    print("%s\n", name);
    size_t best = 0;
    for (size_t i = 0, timed = 0; i < variants.size(); i++) {
        const Variant& v = variants[i];
        if (!v.refused.empty()) {
            print("    %-44s %s\n", v.name, v.refused);
            seconds.push_back(INFINITY);
            continue;
        }
        seconds.push_back(measured[timed++]);
        double rate = operations / seconds[i] / 1e12, peer = operations / seconds[0] / 1e12;
        print("    %-44s %9.1f us %8.1f TFLOP/s  ratio %.3f", v.name, seconds[i] * 1e6, rate, rate / peer);
        if (i > 0) print("  error %.2g", errors[i]);
        print("\n");
        bench.add_row(joined(name + " " + v.name), rate, "TFLOP/s", peer);
        if (seconds[i] < seconds[best]) best = i;
    }
    if (seconds[best] > seconds[0] * (1 - NOISE / 100)) best = 0;
    print("    %s: %s\n", best ? "wins" : "stays", variants[best].name);
    fflush(stdout);
    return seconds;
}

// What of a block's time is won, as tokens/s of a model of many blocks.
void report_gain(const std::string& name, double won, double block) {
    if (!std::isfinite(won)) {
        print("%-62s not offered\n", name);
        return;
    }
    double gain = 100 * won / (block - won);
    print("%-62s %8.1f us of %9.1f, %+6.2f %% of tokens/s\n", name, won * 1e6, block * 1e6, gain);
    bench.add_row(joined(name), 100 + gain, "% of tokens/s", 100);
}

// At most a million elements of a result, in stretches from its start to its end.
template <class T>
std::vector<float> sample(Device& device, const T* from, size_t n) {
    constexpr size_t STRETCH = 1 << 15, STRETCHES = 32;
    CUDA(cudaDeviceSynchronize());
    if (n <= STRETCH * STRETCHES) return host(device, from, n);
    std::vector<float> values;
    for (size_t i = 0; i < STRETCHES; i++) {
        std::vector<float> stretch = host(device, from + (n - STRETCH) / (STRETCHES - 1) * i, STRETCH);
        values.insert(values.end(), stretch.begin(), stretch.end());
    }
    return values;
}

// ----- Products by cuBLASLt's own interface, column-major as it has them: d (m,n) = op(a) (m,k) op(b) (k,n), or added
// to d

struct Problem {
    bool a_transposed, b_transposed;
    size_t m, n, k;
    cudaDataType d_type = CUDA_R_16BF;
    bool accumulate = false;
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    cudaDataType a_type = CUDA_R_16BF, b_type = CUDA_R_16BF;
    bool fast_accumulation = false;  // FP8
    size_t d_ld = 0;                 // 0: m
    int batch = 1;
    size_t a_stride = 0, b_stride = 0, d_stride = 0;  // elements from one of the batch to the next
};
struct Operands {
    void* d;
    const void *a, *b;
    void* aux = nullptr;                                 // h (n,m), the epilogue's
    const float *a_scale = nullptr, *b_scale = nullptr;  // of FP8
};

class Product {
public:
    std::string refused;  // cuBLASLt's status where it does not offer this

    Product(Lab& lab, const Problem& p, std::function<Operands(int)> operands)
        : lab(lab), problem(p), operands(std::move(operands)) {
        set("cublasLtMatmulDescCreate", cublasLtMatmulDescCreate(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
        attribute(CUBLASLT_MATMUL_DESC_TRANSA, p.a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N, "transpose");
        attribute(CUBLASLT_MATMUL_DESC_TRANSB, p.b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N, "transpose");
        if (p.epilogue != CUBLASLT_EPILOGUE_DEFAULT) {
            attribute(CUBLASLT_MATMUL_DESC_EPILOGUE, uint32_t(p.epilogue), "epilogue");
            attribute(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, int64_t(p.m), "epilogue's leading dimension");
        }
        if (p.a_type != CUDA_R_16BF)
            attribute(CUBLASLT_MATMUL_DESC_FAST_ACCUM, int8_t(p.fast_accumulation), "fast accumulation");
        point_to(this->operands(0));
        layout(&a, p.a_type, p.a_transposed ? p.k : p.m, p.a_transposed ? p.m : p.k, 0, p.a_stride);
        layout(&b, p.b_type, p.b_transposed ? p.n : p.k, p.b_transposed ? p.k : p.n, 0, p.b_stride);
        layout(&d, p.d_type, p.m, p.n, p.d_ld, p.d_stride);
        if (refused.empty()) choose();
    }
    ~Product() {
        for (auto l : {a, b, d})
            if (l) cublasLtMatrixLayoutDestroy(l);
        if (operation) cublasLtMatmulDescDestroy(operation);
    }
    Product(const Product&) = delete;
    Product& operator=(const Product&) = delete;

    void run(int i, const Lane& lane) { check(launch(i, lane, algorithm), "cublasLtMatmul"); }
    void operator()(int i) { run(i, lab.lane()); }

private:
    Lab& lab;
    Problem problem;
    std::function<Operands(int)> operands;
    cublasLtMatmulDesc_t operation = nullptr;
    cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;
    cublasLtMatmulAlgo_t algorithm{};

    void set(const char* what, cublasStatus_t status) {
        if (status != CUBLAS_STATUS_SUCCESS && refused.empty())
            refused = format("not offered (%s: %s)", what, cublasLtGetStatusString(status));
    }
    template <class T>
    void attribute(cublasLtMatmulDescAttributes_t which, T value, const char* what) {
        if (operation) set(what, cublasLtMatmulDescSetAttribute(operation, which, &value, sizeof value));
    }
    void layout(cublasLtMatrixLayout_t* l, cudaDataType type, size_t rows, size_t columns, size_t ld, size_t stride) {
        set("layout", cublasLtMatrixLayoutCreate(l, type, rows, columns, int64_t(ld ? ld : rows)));
        if (problem.batch == 1) return;
        int32_t batch = problem.batch;
        int64_t offset = int64_t(stride);
        set("batch", cublasLtMatrixLayoutSetAttribute(*l, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch, sizeof batch));
        set("stride",
            cublasLtMatrixLayoutSetAttribute(*l, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &offset, sizeof offset));
    }
    void point_to(const Operands& o) {
        if (problem.epilogue != CUBLASLT_EPILOGUE_DEFAULT)
            attribute(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, o.aux, "epilogue's matrix");
        if (problem.a_type == CUDA_R_16BF) return;
        attribute(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, o.a_scale, "a's scale");
        attribute(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, o.b_scale, "b's scale");
    }
    cublasStatus_t launch(int i, const Lane& lane, const cublasLtMatmulAlgo_t& with) {
        Operands o = operands(i);
        float one = 1, beta = problem.accumulate ? 1 : 0;
        point_to(o);
        return cublasLtMatmul(lab.handle, operation, &one, o.a, a, o.b, b, &beta, o.d, d, o.d, d, &with, lane.workspace,
                              GEMM_WORKSPACE, lane.stream);
    }

    // The fastest of the heuristic's candidates, within the trainer's limits: its workspace, its alignment, sums of
    // split products in FP32.
    void choose() {
        cublasLtMatmulPreference_t preference;
        check(cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
        size_t bytes = GEMM_WORKSPACE;
        uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
        check(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes,
                                                   sizeof bytes),
              "workspace");
        check(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes,
                                                   sizeof schemes),
              "reduction");
        uint32_t alignment = 16;  // bytes
        for (auto which : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                           CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
            check(cublasLtMatmulPreferenceSetAttribute(preference, which, &alignment, sizeof alignment), "alignment");
        cublasLtMatmulHeuristicResult_t results[CANDIDATES] = {};
        int found = 0;
        cublasStatus_t status =
            cublasLtMatmulAlgoGetHeuristic(lab.handle, operation, a, b, d, d, preference, CANDIDATES, results, &found);
        cublasLtMatmulPreferenceDestroy(preference);
        if (status == CUBLAS_STATUS_SUCCESS && found == 0) status = CUBLAS_STATUS_NOT_SUPPORTED;
        set("cublasLtMatmulAlgoGetHeuristic", status);
        if (!refused.empty()) return;
        Stopwatch watch(lab.device.stream);
        float least = INFINITY;
        for (int c = 0; c < found; c++) {
            status = launch(0, lab.lane(), results[c].algo);
            if (status != CUBLAS_STATUS_SUCCESS) continue;
            std::vector<float> times(bench.small ? 1 : 5);
            for (float& ms : times) {
                watch.start();
                for (int i = 0; i < (bench.small ? 1 : 4); i++)
                    check(launch(i, lab.lane(), results[c].algo), "cublasLtMatmul");
                ms = watch.stop();
            }
            if (float ms = median(times); ms < least) least = ms, algorithm = results[c].algo;
        }
        if (std::isinf(least)) set("cublasLtMatmul", status);
    }
};

// ----- The products of a layer out (rows,N) = in (rows,K) W^T, W (N,K)

struct Layer {
    const char* name;
    size_t K, N, rows;
    double operations() const { return 2.0 * double(rows) * double(K) * double(N); }  // of each of its three products
    std::string shape() const { return format("R%zu", rows); }
};
std::vector<Layer> block_layers(size_t C, size_t rows) {
    return {{"qkv", C, 3 * C, rows}, {"attproj", C, C, rows}, {"fc", C, 4 * C, rows}, {"fcproj", 4 * C, C, rows}};
}

struct Buffers {
    size_t sets;
    Ring<branch_t> in, out, w, dout, din;
    Ring<float> dw;
    Buffers(Lab& lab, const Layer& l)
        : sets(bench.sets_for((l.K + l.N) * l.rows * sizeof(branch_t))), in(l.rows * l.K, sets),
          out(l.rows * l.N, sets), w(l.K * l.N, sets), dout(l.rows * l.N, sets), din(l.rows * l.K, sets),
          dw(l.K * l.N, sets) {
        fill(lab.device, in, 1, 1), fill(lab.device, w, std::sqrt(3.0f / float(l.K)), 2), fill(lab.device, dout, 1, 3);
        lab.device.zero(dw.all);
    }
    Operands forward(int i) const { return {out(i), w(i), in(i)}; }
    Operands to_din(int i) const { return {din(i), w(i), dout(i)}; }
    Operands to_dw(int i) const { return {dw(i), in(i), dout(i)}; }
};
Problem forward_problem(const Layer& l) { return {true, false, l.N, l.rows, l.K}; }  // out^T (N,rows) = W in^T
Problem din_problem(const Layer& l) { return {false, false, l.K, l.rows, l.N}; }     // din^T (K,rows) = W^T dout^T
Problem dw_problem(const Layer& l, bool accumulate) {
    return {false, true, l.K, l.N, l.rows, CUDA_R_32F, accumulate};
}  // dW^T (K,N) = in^T dout

// dW after run(0) on zeros.
std::vector<float> dw_result(Lab& lab, const Buffers& x, const Layer& l, const std::function<void(int)>& run) {
    lab.device.zero(x.dw.all);
    lab.device.synchronize();
    run(0);
    return sample(lab.device, x.dw(0), l.K * l.N);
}

// ----- The measurements; each returns what it would win of a block, in seconds

// The trainer's own products, with --tune and without.
double bench_tuning(Lab& lab, Device& tuned, const std::string& shape, const std::vector<Layer>& layers,
                    size_t layers_of_block) {
    double won = 0;
    for (size_t at = 0; at < layers.size(); at++) {
        const Layer& l = layers[at];
        Buffers x(lab, l);
        auto measure = [&](const char* part, auto run, auto result) {
            auto variant = [&](const char* name, Device& device) {
                auto launch_on = [&device, run](int i) { run(device, i); };
                return Variant{
                    name,           launch_on, [&device, launch_on, result] { return result(device, launch_on); },
                    BF16_TOLERANCE, {},        false,
                    device.stream};
            };
            {
                Device::Tuning measuring(tuned, true);
                run(tuned, 0);
                tuned.synchronize();
            }
            std::vector<double> seconds =
                compare(lab, format("tune %s %s %s %s", l.name, part, shape, l.shape()), l.operations(),
                        {variant("first of the heuristic", lab.device), variant("tuned", tuned)});
            if (at < layers_of_block) won += seconds[0] - seconds[1];
        };
        auto of = [&](auto* from, size_t n) {
            return [from, n](Device& device, const std::function<void(int)>& run) {
                return run(0), sample(device, from, n);
            };
        };
        measure("forward", [&](Device& device, int i) {
            matmul_forward(device, x.out(i), x.in(i), x.w(i), l.rows, l.K, l.N);
        }, of(x.out(0), l.rows * l.N));
        measure("dW", [&](Device& device, int i) {
            device.product(x.dw(i), x.in(i), false, x.dout(i), true, l.K, l.N, l.rows, true);
        }, [&](Device&, const std::function<void(int)>& run) { return dw_result(lab, x, l, run); });
        measure("din", [&](Device& device, int i) {
            device.product(x.din(i), x.w(i), false, x.dout(i), false, l.K, l.rows, l.N, false);
        }, of(x.din(0), l.rows * l.K));
    }
    return won;
}

struct GeluGains { double epilogue, kernel; };  // GELU_AUX forward; a kernel backward
// GELU on the product's FP32 sums as they leave the tensor cores, and in a kernel that reads the rounded product: the
// trainer has the kernel forward, and backward the epilogue wherever cuBLASLt offers it.
GeluGains bench_gelu(Lab& lab, const std::string& shape, const std::vector<Layer>& layers) {
    const Layer &fc = layers[2], &fcproj = layers[3];
    size_t hidden = fc.rows * fc.N;
    GeluGains won{};
    {
        Buffers x(lab, fc);
        Ring<branch_t> gelu(hidden, x.sets);
        Product plain(lab, forward_problem(fc), [&](int i) { return x.forward(i); });
        Problem p = forward_problem(fc);
        p.epilogue = CUBLASLT_EPILOGUE_GELU_AUX;
        Product epilogue(lab, p, [&](int i) { return Operands{gelu(i), x.w(i), x.in(i), x.out(i)}; });
        auto with_kernel = [&](int i) { plain(i), gelu_forward(lab.device, gelu(i), x.out(i), hidden); };
        auto both = [&](const std::function<void(int)>& run) {  // h and gelu(h), which are of one size
            run(0);
            std::vector<float> h = sample(lab.device, x.out(0), hidden), g = sample(lab.device, gelu(0), hidden);
            h.insert(h.end(), g.begin(), g.end());
            return h;
        };
        std::vector<double> seconds =
            compare(lab, format("GELU fc forward %s %s", shape, fc.shape()), fc.operations(),
                    {{"product, gelu_forward", with_kernel, [&] { return both(with_kernel); }},
                     {"GELU_AUX epilogue", std::ref(epilogue), [&] { return both(std::ref(epilogue)); }, BF16_TOLERANCE,
                      epilogue.refused}});
        won.epilogue = seconds[0] - seconds[1];
    }
    Buffers x(lab, fcproj);  // din is dh
    Ring<branch_t> h(hidden, x.sets);
    fill(lab.device, h, 3, 4);
    Product plain(lab, din_problem(fcproj), [&](int i) { return x.to_din(i); });
    Problem p = din_problem(fcproj);
    p.epilogue = CUBLASLT_EPILOGUE_DGELU;
    Product epilogue(lab, p, [&](int i) { return Operands{x.din(i), x.w(i), x.dout(i), h(i)}; });
    auto with_kernel = [&](int i) { plain(i), gelu_backward(lab.device, x.din(i), h(i), hidden); };
    auto dh = [&](const std::function<void(int)>& run) { return run(0), sample(lab.device, x.din(0), hidden); };
    std::vector<Variant> ways = {{"DGELU epilogue", std::ref(epilogue), [&] { return dh(std::ref(epilogue)); },
                                  BF16_TOLERANCE, epilogue.refused},
                                 {"product, gelu_backward", with_kernel, [&] { return dh(with_kernel); }}};
    bool by_kernel = !epilogue.refused.empty() || !Device::dgelu_gains();
    if (by_kernel) std::swap(ways[0], ways[1]);  // the first is the trainer's
    std::vector<double> seconds =
        compare(lab, format("GELU fcproj din %s %s", shape, fcproj.shape()), fcproj.operations(), std::move(ways));
    won.kernel = by_kernel ? 0 : seconds[0] - seconds[1];
    return won;
}

struct AccumulationGains {
    double bf16 = 0, none = 0;  // of --grads bf16, and if nothing had to be added
};
AccumulationGains bench_accumulation(Lab& lab, const std::string& shape, const std::vector<Layer>& layers,
                                     size_t layers_of_block) {
    AccumulationGains won;
    DeviceArray<StepSettings> settings(1);
    DeviceArray<UpdateCounts> updates(1);
    DeviceArray<int> micro_batch(1);
    lab.device.zero(settings), lab.device.zero(updates), lab.device.zero(micro_batch);
    for (size_t at = 0; at < layers.size(); at++) {
        const Layer& l = layers[at];
        Buffers x(lab, l);
        size_t n = l.K * l.N;
        Ring<__nv_bfloat16> g(n, x.sets);
        Product added(lab, dw_problem(l, true), [&](int i) { return x.to_dw(i); });
        Product set(lab, dw_problem(l, false), [&](int i) { return x.to_dw(i); });
        auto rounded = [&](int i) {
            set(i);
            launch(add_rounded_kernel<4>, ceil_div(n / 4, THREADS), THREADS, 0, lab.device.stream, g(i), x.dw(i), n, 0,
                   RoundingState{settings.data(), updates.data(), micro_batch.data()});
        };
        std::vector<double> seconds =
            compare(lab, format("accumulate %s dW %s %s", l.name, shape, l.shape()), l.operations(),
                    {{"beta 1, FP32", std::ref(added), [&] { return dw_result(lab, x, l, std::ref(added)); }},
                     {"beta 0, add_rounded to BF16", rounded,
                      [&] {
            lab.device.zero(g.all);
            rounded(0);
            return sample(lab.device, g(0), n);
        }},
                     {"beta 0, nothing added", std::ref(set), [&] { return dw_result(lab, x, l, std::ref(set)); }}});
        if (at < layers_of_block) won.bf16 += seconds[0] - seconds[1], won.none += seconds[0] - seconds[2];
    }
    return won;
}

struct Fp8Gains {
    double alone = 0, cast = 0,
           quantised = 0;  // products alone; with casts by an earlier step's amax; with amax of the same numbers
};
Fp8Gains bench_fp8(Lab& lab, const std::string& shape, const std::vector<Layer>& layers) {
    using Weight = __nv_fp8_e4m3;  // and activations
    using Gradient = __nv_fp8_e5m2;
    Fp8Gains won;
    for (const Layer& l : layers) {
        Buffers x(lab, l);
        Product forward(lab, forward_problem(l), [&](int i) { return x.forward(i); });
        Product din(lab, din_problem(l), [&](int i) { return x.to_din(i); });
        Product dw(lab, dw_problem(l, true), [&](int i) { return x.to_dw(i); });

        // Each matrix twice, as the tensor cores want their operands with k innermost.
        Ring<Weight> in(l.rows * l.K, x.sets), in_t(l.rows * l.K, x.sets), w(l.K * l.N, x.sets), w_t(l.K * l.N, x.sets);
        Ring<Gradient> dout(l.rows * l.N, x.sets), dout_t(l.rows * l.N, x.sets);
        enum { IN, W, DOUT, MATRICES };
        DeviceArray<unsigned> amax(MATRICES);
        DeviceArray<float> scale(MATRICES);
        auto find_amax = [&](int which, const branch_t* from, size_t n) {
            launch(amax_kernel, std::min<size_t>(ceil_div(n / WIDE, THREADS * IN_FLIGHT), 1056), THREADS,
                   sizeof(AmaxShared), lab.device.stream, amax.data() + which, from, n);
        };
        auto cast = [&](int which, auto* to, auto* to_t, const branch_t* from, size_t rows, size_t columns) {
            launch(cast_transpose_kernel<std::remove_pointer_t<decltype(to)>>,
                   rows / CAST_ROWS * (columns / CAST_COLUMNS), THREADS, sizeof(CastShared), lab.device.stream, to,
                   to_t, scale.data() + which, from, amax.data() + which, int(rows), int(columns));
        };
        auto find_all = [&](int i) {
            lab.device.zero(amax);
            find_amax(IN, x.in(i), l.rows * l.K), find_amax(W, x.w(i), l.N * l.K),
                find_amax(DOUT, x.dout(i), l.rows * l.N);
        };
        auto cast_all = [&](int i) {
            cast(IN, in(i), in_t(i), x.in(i), l.rows, l.K), cast(W, w(i), w_t(i), x.w(i), l.N, l.K),
                cast(DOUT, dout(i), dout_t(i), x.dout(i), l.rows, l.N);
        };
        for (size_t i = 0; i < x.sets; i++) find_all(int(i)), cast_all(int(i));

        // What no one may ask for here is not asked for.
        std::string unable = lab.capability >= 89 ? ""
                                                  : format("not offered (compute capability %d.%d, FP8 needs 8.9)",
                                                           lab.capability / 10, lab.capability % 10);
        auto problem = [&](size_t m, size_t n, size_t k, bool gradient, bool into_dw, bool fast) {
            Problem p{true, false, m, n, k, into_dw ? CUDA_R_32F : CUDA_R_16BF, into_dw};
            p.a_type = CUDA_R_8F_E4M3, p.b_type = gradient ? CUDA_R_8F_E5M2 : CUDA_R_8F_E4M3,
            p.fast_accumulation = fast;
            return p;
        };
        auto measure = [&](const char* part, Product& plain, auto make,
                           const std::function<std::vector<float>(const std::function<void(int)>&)>& result) {
            std::unique_ptr<Product> ways[2];
            std::vector<Variant> variants = {{"BF16", std::ref(plain), [&] { return result(std::ref(plain)); }}};
            for (bool fast : {false, true}) {
                auto& way = ways[fast];
                if (unable.empty()) way = make(fast);
                variants.push_back({fast ? "FP8, fast accumulation" : "FP8", [&way](int i) { (*way)(i); }, [&] {
                    return result(std::ref(*way));
                }, FP8_TOLERANCE, way ? way->refused : unable, fast});
            }
            std::vector<double> seconds = compare(lab, format("FP8 %s %s %s %s", l.name, part, shape, l.shape()),
                                                  l.operations(), std::move(variants));
            bool fast = seconds[2] < seconds[1];
            won.alone += seconds[0] - seconds[fast ? 2 : 1];
            return std::isfinite(seconds[fast ? 2 : 1]) ? std::move(ways[fast]) : nullptr;
        };
        auto out_of = [&](const branch_t* from, size_t n) {
            return [&lab, from, n](const std::function<void(int)>& run) { return run(0), sample(lab.device, from, n); };
        };
        auto forward8 = measure("forward", forward, [&](bool fast) {
            return std::make_unique<Product>(lab, problem(l.N, l.rows, l.K, false, false, fast), [&](int i) {
                return Operands{x.out(i), w(i), in(i), nullptr, scale.data() + W, scale.data() + IN};
            });
        }, out_of(x.out(0), l.rows * l.N));
        auto din8 = measure("din", din, [&](bool fast) {
            return std::make_unique<Product>(lab, problem(l.K, l.rows, l.N, true, false, fast), [&](int i) {
                return Operands{x.din(i), w_t(i), dout(i), nullptr, scale.data() + W, scale.data() + DOUT};
            });
        }, out_of(x.din(0), l.rows * l.K));
        auto dw8 = measure("dW", dw, [&](bool fast) {
            return std::make_unique<Product>(lab, problem(l.K, l.N, l.rows, true, true, fast), [&](int i) {
                return Operands{x.dw(i), in_t(i), dout_t(i), nullptr, scale.data() + IN, scale.data() + DOUT};
            });
        }, [&](const std::function<void(int)>& run) { return dw_result(lab, x, l, run); });

        // All three, with what makes their operands.
        auto bf16_run = [&](int i) { forward(i), din(i), dw(i); };
        auto cast_run = [&](int i) { cast_all(i), (*forward8)(i), (*din8)(i), (*dw8)(i); };
        auto quantised_run = [&](int i) { find_all(i), cast_run(i); };
        auto all = [&](const std::function<void(int)>& run) {
            std::vector<float> values = dw_result(lab, x, l, run);
            double rms[] = {std::sqrt(double(l.rows)) / 3, std::sqrt(1.0 / 3),
                            std::sqrt(double(l.N) / (3 * double(l.K)))};  // of random factors
            for (float& v : values) v /= float(rms[0]);
            int part = 1;
            for (auto [from, n] : {std::pair{x.out(0), l.rows * l.N}, {x.din(0), l.rows * l.K}}) {
                for (float v : sample(lab.device, from, n)) values.push_back(v / float(rms[part]));
                part++;
            }
            return values;
        };
        std::string missing =
            unable.empty() && !(forward8 && din8 && dw8) ? "not offered (one of its products is not)" : unable;
        std::vector<double> seconds =
            compare(lab, format("FP8 %s with its casts %s %s", l.name, shape, l.shape()), 3 * l.operations(),
                    {{"BF16", bf16_run, [&] { return all(bf16_run); }},
                     {"FP8, cast and transposed", cast_run, [&] { return all(cast_run); }, FP8_TOLERANCE, missing},
                     {"FP8, amax, cast and transposed", quantised_run, [&] { return all(quantised_run); },
                      FP8_TOLERANCE, missing}});
        won.cast += seconds[0] - seconds[1], won.quantised += seconds[0] - seconds[2];

        // Are the kernels themselves as fast as they can be? Beside a copy of as many bytes.
        double amax_bytes = 2.0 * double(l.rows * l.N), cast_bytes = 2 * amax_bytes;
        size_t copied = l.rows * l.N * 2;
        std::vector<double> kernels =
            side_by_side({{[&](int i) { find_amax(DOUT, x.dout(i), l.rows * l.N); }, lab.device.stream},
                          {[&](int i) { cast(DOUT, dout(i), dout_t(i), x.dout(i), l.rows, l.N); }, lab.device.stream},
                          {[&](int i) {
            CUDA(cudaMemcpyAsync(x.out(i), x.dout(i), copied, cudaMemcpyDeviceToDevice, lab.device.stream));
        }, lab.device.stream}},
                         usual_launches());
        double copy_rate = 2 * double(copied) / kernels[2];
        for (auto [name, bytes, seconds_of] :
             {std::tuple{"amax", amax_bytes, kernels[0]}, {"cast and transpose", cast_bytes, kernels[1]}}) {
            print("    %-44s %9.1f us %8.1f GB/s, a copy %.1f, ratio %.2f\n", name, seconds_of * 1e6,
                  bytes / seconds_of / 1e9, copy_rate / 1e9, bytes / seconds_of / copy_rate);
            bench.add_row(joined(format("FP8 %s %s %s %s", l.name, name, shape, l.shape())), bytes / seconds_of / 1e9,
                          "GB/s", copy_rate / 1e9);
        }
    }
    return won;
}

struct SmallGains { double slices = 0, chunks = 0, qkv = 0, beside = 0, pairs = 0; };
// What may win where a product's result has too few tiles for all multiprocessors, and its operands are most of its
// time.
SmallGains bench_small(Lab& lab, const std::string& shape, const std::vector<Layer>& layers) {
    SmallGains won;
    auto best_of = [](const std::vector<double>& seconds) {
        return seconds[0] - *std::min_element(seconds.begin(), seconds.end());
    };
    std::vector<std::unique_ptr<Buffers>> buffers;
    std::vector<std::unique_ptr<Product>> dws;
    for (const Layer& l : layers) {
        buffers.push_back(std::make_unique<Buffers>(lab, l));
        const Buffers& x = *buffers.back();
        dws.push_back(std::make_unique<Product>(lab, dw_problem(l, true), [&x](int i) { return x.to_dw(i); }));
        Product &dw = *dws.back(), din(lab, din_problem(l), [&](int i) { return x.to_din(i); });
        size_t n = l.K * l.N;

        constexpr size_t MOST_SLICES = 32;
        DeviceArray<float> parts(MOST_SLICES * n);
        std::vector<std::unique_ptr<Product>> sliced;
        auto trainers = [&](int i) {
            lab.device.product(x.dw(i), x.in(i), PLAIN, x.dout(i), TRANSPOSED, l.K, l.N, l.rows, ADD);
        };
        std::vector<Variant> variants = {
            {"the trainer's, split where it fills little", trainers, [&] { return dw_result(lab, x, l, trainers); }},
            {"one product, split as cuBLASLt likes", std::ref(dw), [&] { return dw_result(lab, x, l, std::ref(dw)); }}};
        for (size_t slices : {size_t(4), size_t(8), size_t(16), MOST_SLICES}) {
            Problem p{false, true, l.K, l.N, l.rows / slices, CUDA_R_32F};
            p.batch = int(slices), p.a_stride = l.rows / slices * l.K, p.b_stride = l.rows / slices * l.N,
            p.d_stride = n;
            sliced.push_back(std::make_unique<Product>(lab, p, [&](int i) {
                return Operands{parts.data(), x.in(i), x.dout(i)};
            }));
            Product& batch = *sliced.back();
            auto run = [&, slices](int i) {
                batch(i);
                launch(add_slices_kernel, ceil_div(n / 4, THREADS), THREADS, 0, lab.device.stream, x.dw(i),
                       parts.data(), n, int(slices));
            };
            variants.push_back({format("%zu slices of rows, then their sum", slices), run,
                                [&, run] { return dw_result(lab, x, l, run); }, BF16_TOLERANCE, batch.refused});
        }
        won.slices += best_of(compare(lab, format("small %s dW %s %s", l.name, shape, l.shape()), l.operations(),
                                      std::move(variants)));

        // dW and din read the same dout. By chunks of rows the second finds it in the L2 cache; at once they share the
        // multiprocessors.
        auto backward = [&](int i) { dw(i), din(i); };
        auto at_once = [&](int i) {
            lab.at_once([&](const Lane& lane) { dw.run(i, lane); }, [&](const Lane& lane) { din.run(i, lane); });
        };
        auto result = [&](const std::function<void(int)>& run) {
            std::vector<float> values = dw_result(lab, x, l, run);
            for (float& v : values) v /= std::sqrt(float(l.rows)) / 3;
            for (float v : sample(lab.device, x.din(0), l.rows * l.K))
                values.push_back(v / std::sqrt(float(l.N) / (3 * float(l.K))));
            return values;
        };
        variants = {{"dW, then din", backward, [&] { return result(backward); }},
                    {"dW beside din, two streams", at_once, [&] { return result(at_once); }}};
        std::vector<std::unique_ptr<Product>> chunked;
        for (size_t chunks : {size_t(2), size_t(4), size_t(8)}) {
            Layer part = l;
            part.rows = l.rows / chunks;
            // Operands of chunk c of set i: number i * chunks + c.
            auto rows_of = [&x, part, chunks](int i, size_t columns) {
                return size_t(i) % chunks * part.rows * columns;
            };
            chunked.push_back(std::make_unique<Product>(lab, dw_problem(part, true),
                                                        [&x, rows_of, part, chunks](int i) {
                int set = i / int(chunks);
                return Operands{x.dw(set), x.in(set) + rows_of(i, part.K), x.dout(set) + rows_of(i, part.N)};
            }));
            Product& dw_part = *chunked.back();
            chunked.push_back(std::make_unique<Product>(lab, din_problem(part), [&x, rows_of, part, chunks](int i) {
                int set = i / int(chunks);
                return Operands{x.din(set) + rows_of(i, part.K), x.w(set), x.dout(set) + rows_of(i, part.N)};
            }));
            Product& din_part = *chunked.back();
            auto run = [&, chunks](int i) {
                for (int c = 0; c < int(chunks); c++) dw_part(i * int(chunks) + c), din_part(i * int(chunks) + c);
            };
            variants.push_back({format("%zu chunks of rows, dW then din of each", chunks), run, [&, run] {
                return result(run);
            }, BF16_TOLERANCE, dw_part.refused.empty() ? din_part.refused : dw_part.refused});
        }
        std::vector<double> seconds = compare(lab, format("small %s backward %s %s", l.name, shape, l.shape()),
                                              2 * l.operations(), std::move(variants));
        won.beside += seconds[0] - std::min(seconds[0], seconds[1]);
        won.chunks += seconds[0] - std::min(seconds[0], *std::min_element(seconds.begin() + 2, seconds.end()));
    }

    {  // q, k and v: rows of one matrix, columns of one result
        const Layer& l = layers[0];
        const Buffers& x = *buffers[0];
        size_t C = l.K;
        Product whole(lab, forward_problem(l), [&](int i) { return x.forward(i); });
        Problem p{true, false, C, l.rows, C};
        p.d_ld = 3 * C;
        Product third(lab, p, [&](int i) {
            return Operands{x.out(i / 3) + size_t(i % 3) * C, x.w(i / 3) + size_t(i % 3) * C * C, x.in(i / 3)};
        });
        p.batch = 3, p.a_stride = C * C, p.d_stride = C;
        Product batch(lab, p, [&](int i) { return x.forward(i); });
        auto three = [&](int i) {
            for (int j = 0; j < 3; j++) third(3 * i + j);
        };
        auto out = [&](const std::function<void(int)>& run) {
            CUDA(cudaMemsetAsync(x.out(0), 0, l.rows * l.N * sizeof(branch_t), lab.device.stream));
            return run(0), sample(lab.device, x.out(0), l.rows * l.N);
        };
        won.qkv = best_of(compare(lab, format("small qkv forward %s %s", shape, l.shape()), l.operations(),
                                  {{"one product of 3 C", std::ref(whole), [&] { return out(std::ref(whole)); }},
                                   {"three of C", three, [&] { return out(three); }, BF16_TOLERANCE, third.refused},
                                   {"a batch of three", std::ref(batch), [&] { return out(std::ref(batch)); },
                                    BF16_TOLERANCE, batch.refused}}));
    }

    for (size_t at : {size_t(0), size_t(2)}) {  // the two dW of a sub-layer
        const Layer &l = layers[at], &other = layers[at + 1];
        Product &a = *dws[at], &b = *dws[at + 1];
        auto in_turn = [&](int i) { a(i), b(i); };
        auto at_once = [&](int i) {
            lab.at_once([&](const Lane& lane) { a.run(i, lane); }, [&](const Lane& lane) { b.run(i, lane); });
        };
        auto result = [&](const std::function<void(int)>& run) {
            lab.device.zero(buffers[at + 1]->dw.all);
            std::vector<float> values = dw_result(lab, *buffers[at], l, run),
                               second = sample(lab.device, buffers[at + 1]->dw(0), other.K * other.N);
            values.insert(values.end(), second.begin(), second.end());
            return values;
        };
        won.pairs += best_of(compare(lab, format("small %s and %s dW %s %s", l.name, other.name, shape, l.shape()),
                                     l.operations() + other.operations(),
                                     {{"one after another", in_turn, [&] { return result(in_turn); }},
                                      {"on two streams", at_once, [&] { return result(at_once); }}}));
    }
    return won;
}

// Seconds of a block in the trainer's micro-step, as one graph: the difference between models of three blocks and of
// one.
double block_seconds(int C, size_t rows) {
    ModelConfig c;
    int T = bench.small ? 64 : 1024;
    c.C = C, c.H = C / 64, c.V = 256, c.max_seq_len = T;
    std::unique_ptr<Model> models[2];
    std::vector<Way> ways;
    for (int i = 0; i < 2; i++) {
        c.L = i ? 6 : 2, c.alpha = float(c.L);
        models[i] = std::make_unique<Model>(c, int(rows) / T, T, Recompute{0});
        Model& model = *models[i];
        model.initialise(1);
        ways.push_back({[&model, rows, T](int) { model.forward_backward(int(rows) / T, 1 / float(rows)); },
                        model.device.stream});
    }
    std::vector<double> seconds = side_by_side(ways, 1);
    return (seconds[1] - seconds[0]) / 2;
}

int run(int argc, char** argv) {
    for (int i = 1; i < argc; i++)
        if (!bench.takes_flag(argc, argv, i)) fail("expected --small or --csv FILE, found '%s'", argv[i]);
    bench.begin();
    Lab lab;
    cudaDeviceProp p = gpu_properties();
    if (bench.small) print("a dry run: results are compared, times and gains say nothing\n");
    print("%s; L2 %.0f MiB; cuBLASLt %zu\n", p.name, double(p.l2CacheSize) / (1 << 20), size_t(cublasLtGetVersion()));

    struct Folder {  // of a table that nobody reads later
        char path[64] = "/tmp/bench_products_XXXXXX";
        Folder() {
            if (!mkdtemp(path))
                fail("expected to make a folder in /tmp, found that it cannot be (%s); free some space there",
                     errno_text());
        }
        ~Folder() {
            std::error_code error;
            std::filesystem::remove_all(path, error);
        }
    } folder;
    Device tuned;
    tuned.tuning = std::make_unique<TuningTable>(std::string(folder.path) + "/table.csv", p.name, cublasLtGetVersion());

    ModelConfig c;
    c.V = bench.small ? 384 : 50257;
    std::vector<std::pair<int, size_t>> shapes = {{1024, 8192}, {256, 32768}, {256, 65536}, {768, 32768}};
    if (bench.small) shapes = {{128, 128}};
    for (auto [C, rows] : shapes) {
        std::vector<Layer> layers = block_layers(size_t(C), rows), and_head = layers;
        c.C = C;
        and_head.push_back({"head", size_t(C), size_t(c.Vp()), bench.small ? rows : Model::head_rows(c, rows)});
        std::string shape = format("C%d", C), at = format("%s R%zu", shape, rows);
        print("\n== C = %d, %zu rows\n", C, rows);
        double block = block_seconds(C, rows);
        double tuning = bench_tuning(lab, tuned, shape, and_head, layers.size());
        GeluGains gelu = bench_gelu(lab, shape, layers);
        AccumulationGains added = bench_accumulation(lab, shape, and_head, layers.size());
        Fp8Gains fp8 = bench_fp8(lab, shape, layers);
        SmallGains few;
        if (C <= 256) few = bench_small(lab, shape, layers);

        print("-- What of a block's %.1f us each would win, %s\n", block * 1e6, at);
        bench.add_row(joined("block " + at), block * 1e6, "us", block * 1e6);
        report_gain("gain --tune " + at, tuning, block);
        report_gain("gain GELU_AUX epilogue " + at, gelu.epilogue, block);
        report_gain("gain GELU's backward as a kernel " + at, gelu.kernel, block);
        report_gain("gain --grads bf16 " + at, added.bf16, block);
        report_gain("gain if dW were not added " + at, added.none, block);
        report_gain("gain FP8 with amax and casts " + at, fp8.quantised, block);
        report_gain("gain FP8 with casts " + at, fp8.cast, block);
        report_gain("gain FP8 products alone " + at, fp8.alone, block);
        if (C > 256) continue;
        report_gain("gain dW in slices of rows " + at, few.slices, block);
        report_gain("gain dW and din in chunks of rows " + at, few.chunks, block);
        report_gain("gain dW beside din " + at, few.beside, block);
        report_gain("gain the two dW of a sub-layer at once " + at, few.pairs, block);
        report_gain("gain q k v apart " + at, few.qkv, block);
    }
    print("\n%s\n", bench.bad ? format("%d results differ from the trainer's", bench.bad)
                              : "every result agrees with the trainer's");
    return bench.bad ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) { return bench_main(bench, run, argc, argv); }
