// keel/cublaslt.h: matrix products on the GPU, all by cuBLASLt, and --tune's table of its algorithms.
#pragma once

#include <cublasLt.h>

#include <functional>
#include <map>
#include <tuple>

#include "rate.h"
#include "sums.h"

inline void check(cublasStatus_t status, const char* what) {
    if (status == CUBLAS_STATUS_ALLOC_FAILED) check(cudaErrorMemoryAllocation, what);
    if (status != CUBLAS_STATUS_SUCCESS)
        fail("%s: expected a GPU that works, found %s; see the driver's log (dmesg), or use train_keel_cpu; a run goes "
             "on by -y",
             what, cublasLtGetStatusString(status));
}
// Whether cuBLASLt can do what it is asked. That it failed is no answer: a run would go on with other bits.
inline bool supported(cublasStatus_t status, const char* what) {
    for (auto no : {CUBLAS_STATUS_NOT_SUPPORTED, CUBLAS_STATUS_INVALID_VALUE, CUBLAS_STATUS_ARCH_MISMATCH})
        if (status == no) return false;
    check(status, what);
    return true;
}

constexpr size_t GEMM_WORKSPACE = 32 << 20;  // bytes, what NVIDIA recommends for Hopper

// What a product a b does to d: d = a b, d += a b, or d = (a b) gelu'(h) element by element, h (m,n) laid out as d.
enum class Epilogue { SET, ADD, DGELU };
constexpr const char* epilogue_names[] = {"set", "add", "dgelu"};  // in --tune's table

// How cuBLASLt computes the products of one shape; made at the first of them.
struct GemmPlan {
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t a, b, d;
    cublasLtMatmulAlgo_t algorithm;
    bool offered;  // false: this cuBLASLt has no algorithm, which is an error but for DGELU
};
// a transposed, b transposed; m, n, k; whether the result is FP32; what becomes of the product
using GemmKey = std::tuple<bool, bool, size_t, size_t, size_t, bool, Epilogue>;

// --tune FILE: the fastest of cuBLASLt's algorithms for each shape of product, as measured on this GPU with this
// cuBLASLt. Rows of other GPUs and versions stay in the file.
class TuningTable {
public:
    static constexpr const char* COLUMNS = "gpu,cublaslt,a_transposed,b_transposed,m,n,k,inputs,result,epilogue,"
                                           "first_us,best_us,algorithm";
    static constexpr int KEY_COLUMNS = 10;

    // writes: false on every rank but the first, which then needs no folder
    TuningTable(const std::string& path, std::string gpu, size_t version, bool writes = true)
        : path(path), writes(writes) {
        std::replace(gpu.begin(), gpu.end(), ',', ' ');
        machine = format("%s,%zu", gpu, version);
        namespace fs = std::filesystem;
        std::error_code error;
        if (!fs::exists(path, error)) {
            fs::path folder = fs::absolute(path, error).parent_path();
            if (writes && (!fs::is_directory(folder, error) || access(folder.c_str(), W_OK | X_OK) != 0))
                fail("--tune: expected a folder that can be written for %s, found '%s'; create it first", path, folder);
            return;
        }
        std::string text;
        FILE* file = fs::is_regular_file(path, error) ? fopen(path.c_str(), "re") : nullptr;
        if (!file)
            fail("--tune: %s cannot be read (%s); give another file", path,
                 fs::is_regular_file(path, error) ? errno_text() : "it is no file");
        for (int c; (c = getc(file)) != EOF && text.size() < (size_t(64) << 20);) text += char(c);
        bool cut = ferror(file);
        fclose(file);
        if (cut) fail("--tune: %s could not be read to its end; give another file", path);
        int line_number = 0;
        for (size_t at = 0; at < text.size();) {
            size_t end = std::min(text.find('\n', at), text.size());
            std::string line = text.substr(at, end - at);
            at = end + 1;
            if (++line_number == 1 && line != COLUMNS)
                fail("--tune: %s: expected the columns %s in its first line, found others; give another file", path,
                     COLUMNS);
            if (line_number > 1) parse(line, line_number);
        }
        if (line_number == 0)
            fail("--tune: %s: expected a table of an earlier run, found an empty file; remove it", path);
    }

    // The algorithm of a shape, or null.
    const cublasLtMatmulAlgo_t* find(const GemmKey& shape) const {
        auto row = rows.find(key(shape));
        return row == rows.end() ? nullptr : &row->second.algorithm;
    }

    // Adds a row, and writes the file anew.
    void add(const GemmKey& shape, const cublasLtMatmulAlgo_t& algorithm, double first_us, double best_us) {
        rows[key(shape)] = {algorithm, format("%.2f,%.2f", first_us, best_us)};
        if (!writes) return;
        std::string text = std::string(COLUMNS) + "\n";
        for (const auto& [key, row] : rows) {
            text += key + "," + row.times + ",";
            for (uint64_t word : row.algorithm.data) text += format("%016llx", word);
            text += "\n";
        }
        FileWriter::replace(path, text);
    }

private:
    struct Row {
        cublasLtMatmulAlgo_t algorithm;
        std::string times;
    };
    std::string path, machine;
    bool writes;
    std::map<std::string, Row> rows;

    std::string key(const GemmKey& shape) const {
        auto [ta, tb, m, n, k, fp32_out, epilogue] = shape;
        return format("%s,%d,%d,%zu,%zu,%zu,%s,%s,%s", machine, ta, tb, m, n, k, BRANCH_BF16 ? "bf16" : "fp32",
                      fp32_out ? "fp32" : "bf16", epilogue_names[int(epilogue)]);
    }

    void parse(const std::string& line, int number) {
        std::vector<size_t> commas;
        for (size_t i = 0; i < line.size(); i++)
            if (line[i] == ',') commas.push_back(i);
        Row row{};
        bool good = commas.size() == KEY_COLUMNS + 2;
        std::string digits = good ? line.substr(commas.back() + 1) : "";
        good = good && digits.size() == 2 * sizeof row.algorithm &&
               digits.find_first_not_of("0123456789abcdef") == std::string::npos;
        if (!good)
            fail("--tune: %s, line %d: expected %d columns, the last of %zu hexadecimal digits, found others; remove "
                 "the line or the file",
                 path, number, KEY_COLUMNS + 3, 2 * sizeof row.algorithm);
        for (size_t i = 0; i < 8; i++) row.algorithm.data[i] = strtoull(digits.substr(16 * i, 16).c_str(), nullptr, 16);
        row.times = line.substr(commas[KEY_COLUMNS - 1] + 1, commas.back() - commas[KEY_COLUMNS - 1] - 1);
        rows[line.substr(0, commas[KEY_COLUMNS - 1])] = row;
    }
};

constexpr bool PLAIN = false, TRANSPOSED = true;  // how a product reads a factor

// What every layer needs to run: the stream, matrix products, and scratch memory that one layer after another uses.
class Device {
public:
    cudaStream_t stream = nullptr;
    DeviceArray<char> workspace;          // cuBLASLt's
    DeviceArray<double> partial_doubles;  // of add_sum

    static constexpr size_t BYTES = GEMM_WORKSPACE + MAX_PARTIAL_BLOCKS * sizeof(double);

    Device() : workspace(GEMM_WORKSPACE), partial_doubles(MAX_PARTIAL_BLOCKS) {
        CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        check(cublasLtCreate(&handle), "cublasLtCreate");
    }
    ~Device() {
        for (auto& [key, plan] : plans) destroy(plan);
        cublasLtDestroy(handle);
        cudaStreamDestroy(stream);
    }
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

    void synchronize() { CUDA(cudaStreamSynchronize(stream)); }
    template <class... T>
    void zero(const DeviceArray<T>&... arrays) {
        auto fill = [&](void* at, size_t bytes) {
            if (bytes) CUDA(cudaMemsetAsync(at, 0, bytes, stream));
        };
        (fill(arrays.data(), arrays.size() * sizeof(T)), ...);
    }
    // n random numbers in [-1, 1) to time a product on: zeros take less power and run faster.
    DeviceArray<branch_t> random_matrix(size_t n);
    template <class T>
    void copy(T* to, const T* from, size_t n) {
        CUDA(cudaMemcpyAsync(to, from, n * sizeof(T), cudaMemcpyDefault, stream));
    }

    bool wgmma = wants_wgmma();           // whether attention runs by wgmma where its heads allow, or as on every GPU
    int product_multiprocessors = 0;      // how many of the GPU's a product may use; 0: all
    std::unique_ptr<TuningTable> tuning;  // --tune's table; null without
    // With several ranks: replaces the algorithm that this rank has measured by rank 0's. Every rank calls it for the
    // same products in the same order: only the first step measures, and nothing is planned before it.
    std::function<void(cublasLtMatmulAlgo_t&)> agree;

    // While a Tuning with `on` lives, products of shapes that the table lacks are measured.
    struct Tuning {
        Device& device;
        Tuning(Device& device, bool on) : device(device) { device.measuring = on && device.tuning; }
        ~Tuning() { device.measuring = false; }
        Tuning(const Tuning&) = delete;
        Tuning& operator=(const Tuning&) = delete;
    };
    // Bytes of scratch that measuring a product (m,n,k) takes: a, b, d, DGELU's h and the buffer that flushes the L2.
    static size_t tuning_bytes(size_t m, size_t n, size_t k, bool fp32_out, Epilogue epilogue) {
        size_t h = epilogue == Epilogue::DGELU ? m * n : 0;
        return (m * k + k * n + h) * sizeof(branch_t) + m * n * (fp32_out ? 4 : sizeof(branch_t)) + twice_l2();
    }

    // ----- Matrix products, all by cuBLASLt, whose matrices are column-major: d (m,n) = a (m,k) b (k,n), or d += a b.
    // The same memory read row-major is the transposed matrix, so that out (rows,N) = in W^T is out^T (N,rows) = W
    // in^T.
    template <class Out>
    void product(Out* d, const branch_t* a, bool a_transposed, const branch_t* b, bool b_transposed, size_t m, size_t n,
                 size_t k, bool accumulate) {
        Epilogue epilogue = accumulate ? Epilogue::ADD : Epilogue::SET;
        if (!accumulate) clear_for_sanitizer(d, m * n);
        const GemmPlan& plan = gemm_plan({a_transposed, b_transposed, m, n, k, sizeof(Out) == 4, epilogue});
        multiply(plan, plan.algorithm, d, a, b, epilogue);
    }
    // d = a b gelu'(h), h (m,n); false, and nothing done, where this cuBLASLt does not offer it for the shape or the
    // GPU is not known to gain by it.
    bool product_dgelu(branch_t* d, const branch_t* a, bool a_transposed, const branch_t* b, bool b_transposed,
                       const branch_t* h, size_t m, size_t n, size_t k) {
        if (!dgelu_gains()) return false;
        const GemmPlan& plan = gemm_plan({a_transposed, b_transposed, m, n, k, false, Epilogue::DGELU}, h);
        if (!plan.offered) return false;
        clear_for_sanitizer(d, m * n);
        multiply(plan, plan.algorithm, d, a, b, Epilogue::DGELU, h);
        return true;
    }

    // Compute capability 9.0, the only one with wgmma, in a build that has kernels with it (make NO_WGMMA=1: without).
    static bool has_wgmma() {
#ifdef KEEL_NO_WGMMA
        return false;
#else
        static const cudaDeviceProp p = gpu_properties();
        return BRANCH_BF16 && p.major == 9 && p.minor == 0;
#endif
    }
    // KEEL_WGMMA=0 in the environment has attention run as on every GPU, to measure it.
    static bool wants_wgmma() {
        const char* wanted = getenv("KEEL_WGMMA");
        return has_wgmma() && !(wanted && std::string(wanted) == "0");
    }

    // Compute capability 9.0 and 10.x: elsewhere others found GELU in epilogues slower than in kernels (llm.c, pull
    // request 653, on an RTX 4090; SGLang, 34350, forward on an RTX 5090).
    static bool dgelu_gains() {
        static const int major = gpu_properties().major;
        return major == 9 || major == 10;
    }

    // Of 15 large products in the branch's type. The fastest counts, for an H100's clocks, just begun, gave a median of
    // 704 or of 778 TFLOP/s. The matrices are as large as the GPU and the memory that is left allow.
    MatrixRate matrix_rate() {
        size_t n = 256;
        while (n < 8192 && n < size_t(gpu_properties().multiProcessorCount) * 64) n *= 2;
        size_t free = 0, total = 0;
        CUDA(cudaMemGetInfo(&free, &total));
        while (n > 256 && 4 * n * n * sizeof(branch_t) > free) n /= 2;
        if (sanitized) n = 256;  // a sanitizer would take minutes for the large one
        DeviceArray<branch_t> a = random_matrix(n * n), b = random_matrix(n * n), out(n * n);
        std::vector<double> times;  // seconds
        Stopwatch watch(stream);
        for (int i = 0; i < 32; i++)  // 50 ms on a large GPU, in which the clocks rise
            product(out.data(), b.data(), TRANSPOSED, a.data(), PLAIN, n, n, n, SET);
        for (int i = 0; i < 15; i++) {
            watch.start();
            product(out.data(), b.data(), TRANSPOSED, a.data(), PLAIN, n, n, n, SET);
            times.push_back(watch.stop() * 1e-3);
        }
        return MatrixRate::of(2.0 * double(n) * double(n) * double(n), times, times);
    }

private:
    cublasLtHandle_t handle = nullptr;
    std::map<GemmKey, GemmPlan> plans;
    bool measuring = false;
    bool sanitized = getenv("KEEL_SANITIZE");

    // compute-sanitizer's initcheck took what a product had written on an H100 for unwritten: it seems not to see a
    // Hopper's bulk copies (nor does it in Dao-AILab/flash-attention, issue 1813).
    template <class Out>
    void clear_for_sanitizer(Out* d, size_t count) {
        if (sanitized) CUDA(cudaMemsetAsync(d, 0, count * sizeof(Out), stream));
    }

    void multiply(const GemmPlan& plan, const cublasLtMatmulAlgo_t& algorithm, void* d, const branch_t* a,
                  const branch_t* b, Epilogue epilogue, const branch_t* h = nullptr) {
        float one = 1, beta = epilogue == Epilogue::ADD ? 1 : 0;
        if (epilogue == Epilogue::DGELU)  // the one argument that lies in the description
            set(plan, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, h);
        check(cublasLtMatmul(handle, plan.operation, &one, a, plan.a, b, plan.b, &beta, d, plan.d, d, plan.d,
                             &algorithm, workspace.data(), workspace.size(), stream),
              "cublasLtMatmul");
    }

    template <class Value>
    static void set(const GemmPlan& plan, cublasLtMatmulDescAttributes_t which, const Value& value) {
        cublasStatus_t status = cublasLtMatmulDescSetAttribute(plan.operation, which, &value, sizeof value);
        check(status, "cublasLtMatmulDescSetAttribute");
    }

    static size_t twice_l2() {
        int bytes = 0;
        CUDA(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, 0));
        return 2 * size_t(bytes);
    }

    // A shape's algorithm is the first that cuBLASLt's heuristic names, or the same with its sum split (split_sum), on
    // every run; with --tune it is the table's. h, for DGELU: the heuristic looks at its alignment, which all h share.
    const GemmPlan& gemm_plan(const GemmKey& key, const branch_t* h = nullptr) {
        if (auto found = plans.find(key); found != plans.end()) return found->second;
        auto [ta, tb, m, n, k, fp32_out, epilogue] = key;
        cudaDataType in_type = BRANCH_BF16 ? CUDA_R_16BF : CUDA_R_32F, out_type = fp32_out ? CUDA_R_32F : CUDA_R_16BF;
        GemmPlan plan{};
        cublasOperation_t op_a = ta ? CUBLAS_OP_T : CUBLAS_OP_N, op_b = tb ? CUBLAS_OP_T : CUBLAS_OP_N;
        check(cublasLtMatmulDescCreate(&plan.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescCreate");
        set(plan, CUBLASLT_MATMUL_DESC_TRANSA, op_a);
        set(plan, CUBLASLT_MATMUL_DESC_TRANSB, op_b);
        if (int32_t most = product_multiprocessors; most > 0) set(plan, CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET, most);
        if (epilogue == Epilogue::DGELU) {
            set(plan, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_DGELU);
            set(plan, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, int64_t(m));
            set(plan, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, h);
        }
        auto layout = [](cublasLtMatrixLayout_t* l, cudaDataType type, size_t rows, size_t cols) {
            check(cublasLtMatrixLayoutCreate(l, type, rows, cols, int64_t(rows)), "cublasLtMatrixLayoutCreate");
        };
        layout(&plan.a, in_type, ta ? k : m, ta ? m : k);
        layout(&plan.b, in_type, tb ? n : k, tb ? k : n);
        layout(&plan.d, out_type, m, n);
        cublasLtMatmulPreference_t preference = nullptr;
        check(cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
        auto prefer = [&](cublasLtMatmulPreferenceAttributes_t which, const auto& value) {
            cublasStatus_t status = cublasLtMatmulPreferenceSetAttribute(preference, which, &value, sizeof value);
            check(status, "cublasLtMatmulPreferenceSetAttribute");
        };
        prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, GEMM_WORKSPACE);
        // A product that is split along k adds its partial sums in FP32, never in BF16.
        uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
        prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, schemes);
        // A tensor starts where the one before it ends: every size is a multiple of 8 elements in BF16, of one in FP32.
        uint32_t alignment = BRANCH_BF16 ? 16 : 4;  // bytes
        for (auto which : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                           CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
            prefer(which, alignment);
        cublasLtMatmulHeuristicResult_t results[1 + MOST_CANDIDATES] = {};  // the first place is kept for split_sum's
        int found = 0;
        cublasStatus_t status =
            cublasLtMatmulAlgoGetHeuristic(handle, plan.operation, plan.a, plan.b, plan.d, plan.d, preference,
                                           measuring ? MOST_CANDIDATES : 1, results + 1, &found);
        cublasLtMatmulPreferenceDestroy(preference);
        const cublasLtMatmulAlgo_t* tuned = tuning ? tuning->find(key) : nullptr;
        try {
            plan.offered = supported(status, "cublasLtMatmulAlgoGetHeuristic") && found > 0;
            if (!plan.offered && epilogue == Epilogue::DGELU) return plans[key] = plan;
            if (!plan.offered)
                fail("cuBLASLt: expected an algorithm for a product of %zu x %zu x %zu, found none (%s); use another "
                     "-C or the FP32 build",
                     m, n, k, cublasLtGetStatusString(status));
            std::span candidates(results + 1, size_t(found));
            bool weight_gradient = !ta && tb;
            if (weight_gradient && split_sum(plan, results[0].algo, results[1], k))
                candidates = {results, size_t(found) + 1};
            plan.algorithm = candidates[0].algo;
            if (tuned && usable(plan, *tuned)) plan.algorithm = *tuned;
            else if (measuring) plan.algorithm = fastest(plan, key, candidates);
            if (measuring && agree) agree(plan.algorithm);
        } catch (...) {  // no memory for the scratch matrices, or no disk for the table
            destroy(plan);
            throw;
        }
        return plans[key] = plan;
    }

    static void destroy(const GemmPlan& plan) {
        cublasLtMatmulDescDestroy(plan.operation);
        for (auto layout : {plan.a, plan.b, plan.d}) cublasLtMatrixLayoutDestroy(layout);
    }

    bool usable(const GemmPlan& plan, const cublasLtMatmulAlgo_t& algorithm) {
        cublasLtMatmulHeuristicResult_t result{};
        return supported(cublasLtMatmulAlgoCheck(handle, plan.operation, plan.a, plan.b, plan.d, plan.d, &algorithm,
                                                 &result),
                         "cublasLtMatmulAlgoCheck") &&
               result.workspaceSize <= GEMM_WORKSPACE;
    }

    // A dW at small C has few tiles and a long sum, over rows, and leaves most of the GPU idle. Where `first` fills at
    // most half of the GPU and does not split its sum, makes `split`: the same algorithm on 2 to MOST_SLICES slices of
    // k, whose FP32 results cuBLASLt adds up in order. False where there is none. A slice is a multiple of WHOLE_STEPS,
    // as split products are reported to have lost what was left over (facebookexperimental/triton, pull request 2767).
    static constexpr size_t MOST_SLICES = 16, LEAST_SLICE = 512 /* of k */, WHOLE_STEPS = 128;
    bool split_sum(const GemmPlan& plan, cublasLtMatmulAlgo_t& split, const cublasLtMatmulHeuristicResult_t& first,
                   size_t k) {
        float waves = first.wavesCount;  // how often the algorithm fills the GPU
        int32_t already = 1;
        size_t written = 0, most = waves > 0 ? size_t(std::min(1 / waves, float(MOST_SLICES))) : 1;
        supported(cublasLtMatmulAlgoConfigGetAttribute(&first.algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &already,
                                                       sizeof already, &written),
                  "cublasLtMatmulAlgoConfigGetAttribute");
        if (already > 1) return false;
        auto set = [&](cublasLtMatmulAlgoConfigAttributes_t which, const auto& value) {
            cublasStatus_t status = cublasLtMatmulAlgoConfigSetAttribute(&split, which, &value, sizeof value);
            return supported(status, "cublasLtMatmulAlgoConfigSetAttribute");
        };
        for (size_t slices = std::bit_floor(std::min(most, k / LEAST_SLICE)); slices > 1; slices /= 2) {
            if (k % (slices * WHOLE_STEPS)) continue;
            split = first.algo;
            int32_t count = int32_t(slices);
            uint32_t scheme = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
            if (set(CUBLASLT_ALGO_CONFIG_SPLITK_NUM, count) && set(CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, scheme) &&
                usable(plan, split))
                return true;
        }
        return false;
    }

    // The algorithm of least median time, in rounds over all of them, on scratch matrices of random numbers with the
    // product's own epilogue; before each product the L2 is filled with something else. The first candidate, which runs
    // without --tune, stays unless another takes 2 % less: that much is noise.
    static constexpr int MOST_CANDIDATES = 16, ROUNDS = 7;
    cublasLtMatmulAlgo_t fastest(const GemmPlan& plan, const GemmKey& key,
                                 std::span<const cublasLtMatmulHeuristicResult_t> candidates) {
        auto [ta, tb, m, n, k, fp32_out, epilogue] = key;
        DeviceArray<branch_t> a = random_matrix(m * k), b = random_matrix(k * n), h;
        if (epilogue == Epilogue::DGELU) h = random_matrix(m * n);
        DeviceArray<char> d(m * n * (fp32_out ? 4 : sizeof(branch_t))), other(twice_l2());
        zero(d);
        Stopwatch watch(stream);
        std::vector<std::vector<float>> times(candidates.size());  // milliseconds
        for (int round = -1; round < ROUNDS; round++)              // -1: warm-up
            for (size_t i = 0; i < candidates.size(); i++) {
                zero(other);
                watch.start();
                multiply(plan, candidates[i].algo, d.data(), a.data(), b.data(), epilogue, h.data());
                float ms = watch.stop();
                if (round >= 0) times[i].push_back(ms);
            }
        size_t best = 0;
        std::vector<float> medians;
        for (auto& of_one : times) medians.push_back(median(of_one));
        for (size_t i = 1; i < medians.size(); i++)
            if (medians[i] < medians[best]) best = i;
        if (medians[best] > 0.98f * medians[0]) best = 0;
        print("tuned      %5zu x %6zu x %6zu%s%s, %s, %s: %.1f us, the first of %zu algorithms %.1f us (%.1f %% "
              "less)\n",
              m, n, k, ta ? ", a^T" : "", tb ? ", b^T" : "", fp32_out ? "into FP32" : "into BF16",
              epilogue_names[int(epilogue)], medians[best] * 1e3, candidates.size(), medians[0] * 1e3,
              100 * (1 - medians[best] / medians[0]));
        tuning->add(key, candidates[best].algo, medians[0] * 1e3, medians[best] * 1e3);
        return candidates[best].algo;
    }
};
