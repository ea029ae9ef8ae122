// cuBLASLt's matrix product on the CPU: a stream operation, checked as the library checks it, each sum over k in order.
#pragma once

#include <optional>

#include "cuda_fp8.h"
#include "cuda_runtime.h"

enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS = 0,
    CUBLAS_STATUS_NOT_INITIALIZED = 1,
    CUBLAS_STATUS_ALLOC_FAILED = 3,
    CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_ARCH_MISMATCH = 8,
    CUBLAS_STATUS_MAPPING_ERROR = 11,
    CUBLAS_STATUS_EXECUTION_FAILED = 13,
    CUBLAS_STATUS_INTERNAL_ERROR = 14,
    CUBLAS_STATUS_NOT_SUPPORTED = 15,
};
enum cublasOperation_t { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1, CUBLAS_OP_C = 2 };
enum cublasComputeType_t {
    CUBLAS_COMPUTE_32F = 68,
    CUBLAS_COMPUTE_32F_PEDANTIC = 69,
    CUBLAS_COMPUTE_32F_FAST_TF32 = 77
};
enum cublasLtPointerMode_t { CUBLASLT_POINTER_MODE_HOST = 0, CUBLASLT_POINTER_MODE_DEVICE = 1 };
// GELU_AUX: d = gelu(x), aux = x;  DGELU: d = x gelu'(aux), where x is the product in FP32.
enum cublasLtEpilogue_t {
    CUBLASLT_EPILOGUE_DEFAULT = 1,
    CUBLASLT_EPILOGUE_GELU_AUX = 32 | 128,
    CUBLASLT_EPILOGUE_DGELU = 64 | 128
};
enum cublasLtMatmulDescAttributes_t {
    CUBLASLT_MATMUL_DESC_COMPUTE_TYPE = 0,
    CUBLASLT_MATMUL_DESC_SCALE_TYPE = 1,
    CUBLASLT_MATMUL_DESC_POINTER_MODE = 2,
    CUBLASLT_MATMUL_DESC_TRANSA = 3,
    CUBLASLT_MATMUL_DESC_TRANSB = 4,
    CUBLASLT_MATMUL_DESC_EPILOGUE = 7,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER = 11,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD = 12,
    CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET = 15,
    CUBLASLT_MATMUL_DESC_A_SCALE_POINTER = 17,
    CUBLASLT_MATMUL_DESC_B_SCALE_POINTER = 18,
    CUBLASLT_MATMUL_DESC_FAST_ACCUM = 25,
};
enum cublasLtMatrixLayoutAttribute_t {
    CUBLASLT_MATRIX_LAYOUT_TYPE = 0,
    CUBLASLT_MATRIX_LAYOUT_ROWS = 2,
    CUBLASLT_MATRIX_LAYOUT_COLS = 3,
    CUBLASLT_MATRIX_LAYOUT_LD = 4,
    CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT = 5,
    CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET = 6,
};
enum cublasLtMatmulPreferenceAttributes_t {
    CUBLASLT_MATMUL_PREF_SEARCH_MODE = 0,
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
    CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8,
};

enum cublasLtReductionScheme_t {
    CUBLASLT_REDUCTION_SCHEME_NONE = 0,
    CUBLASLT_REDUCTION_SCHEME_INPLACE = 1,
    CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2,
    CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE = 4,
    CUBLASLT_REDUCTION_SCHEME_MASK = 7,
};

enum cublasLtMatmulAlgoConfigAttributes_t {
    CUBLASLT_ALGO_CONFIG_SPLITK_NUM = 2,
    CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME = 3,
};

struct cublasLtContext {};
struct cublasLtMatmulDescOpaque_t {
    int32_t trans_a = CUBLAS_OP_N, trans_b = CUBLAS_OP_N;
    uint32_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    void* aux = nullptr;
    int64_t aux_ld = 0;
    const float *a_scale = nullptr, *b_scale = nullptr;  // on the device
    int8_t fast_accumulation = 0;
};
struct cublasLtMatrixLayoutOpaque_t {
    cudaDataType type;
    uint64_t rows, cols;
    int64_t ld;
    int32_t batch_count = 1;
    int64_t batch_stride = 0;
};
struct cublasLtMatmulPreferenceOpaque_t {
    uint64_t max_workspace = 0;
    uint32_t alignment[4] = {256, 256, 256, 256};
};
struct cublasLtMatmulAlgo_t {
    uint64_t data[8];
};  // here [0] a mark, [1] workspace, [2] slices of k, [3] how they are added
using cublasLtHandle_t = cublasLtContext*;
using cublasLtMatmulDesc_t = cublasLtMatmulDescOpaque_t*;
using cublasLtMatrixLayout_t = cublasLtMatrixLayoutOpaque_t*;
using cublasLtMatmulPreference_t = cublasLtMatmulPreferenceOpaque_t*;
struct cublasLtMatmulHeuristicResult_t {
    cublasLtMatmulAlgo_t algo;
    size_t workspaceSize;
    cublasStatus_t state;
    float wavesCount;
    int reserved[4];
};

inline const char* cublasLtGetStatusName(cublasStatus_t status) {
    switch (status) {
        case CUBLAS_STATUS_SUCCESS:
            return "CUBLAS_STATUS_SUCCESS";
        case CUBLAS_STATUS_NOT_INITIALIZED:
            return "CUBLAS_STATUS_NOT_INITIALIZED";
        case CUBLAS_STATUS_ALLOC_FAILED:
            return "CUBLAS_STATUS_ALLOC_FAILED";
        case CUBLAS_STATUS_INVALID_VALUE:
            return "CUBLAS_STATUS_INVALID_VALUE";
        case CUBLAS_STATUS_ARCH_MISMATCH:
            return "CUBLAS_STATUS_ARCH_MISMATCH";
        case CUBLAS_STATUS_MAPPING_ERROR:
            return "CUBLAS_STATUS_MAPPING_ERROR";
        case CUBLAS_STATUS_EXECUTION_FAILED:
            return "CUBLAS_STATUS_EXECUTION_FAILED";
        case CUBLAS_STATUS_INTERNAL_ERROR:
            return "CUBLAS_STATUS_INTERNAL_ERROR";
        case CUBLAS_STATUS_NOT_SUPPORTED:
            return "CUBLAS_STATUS_NOT_SUPPORTED";
    }
    return "unknown cublasStatus_t";
}
inline const char* cublasLtGetStatusString(cublasStatus_t status) { return cublasLtGetStatusName(status); }
inline const char* cublasGetStatusString(cublasStatus_t status) { return cublasLtGetStatusName(status); }
inline const char* cublasGetStatusName(cublasStatus_t status) { return cublasLtGetStatusName(status); }
inline size_t cublasLtGetVersion() { return 130100; }

namespace cuda_on_cpu {
// The first line of each call but cublasLtMatmul, which goes through api(): the status that it is to return at once.
inline cublasStatus_t fault_of_lt(const char* name) {
    std::lock_guard lock(shared_state().mutex);
    cudaError_t error = fault_of_call(name);
    return !error                               ? CUBLAS_STATUS_SUCCESS
           : error == cudaErrorMemoryAllocation ? CUBLAS_STATUS_ALLOC_FAILED
                                                : CUBLAS_STATUS_INTERNAL_ERROR;
}
}  // namespace cuda_on_cpu

inline cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
    if (cublasStatus_t fault = cuda_on_cpu::fault_of_lt(__func__)) return fault;
    return *handle = new cublasLtContext, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
    if (cublasStatus_t fault = cuda_on_cpu::fault_of_lt(__func__)) return fault;
    return delete handle, CUBLAS_STATUS_SUCCESS;
}

namespace cuda_on_cpu {

template <class T>
cublasStatus_t read_attribute(T& to, const void* from, size_t bytes) {
    if (!from || bytes != sizeof to) return CUBLAS_STATUS_INVALID_VALUE;
    return memcpy(&to, from, bytes), CUBLAS_STATUS_SUCCESS;
}
// An attribute that has one supported value.
inline cublasStatus_t expect_attribute(int32_t expected, const void* from, size_t bytes) {
    int32_t found;
    if (cublasStatus_t status = read_attribute(found, from, bytes)) return status;
    return found == expected ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

}  // namespace cuda_on_cpu

inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* desc, cublasComputeType_t compute,
                                               cudaDataType_t scale) {
    if (cublasStatus_t fault = cuda_on_cpu::fault_of_lt(__func__)) return fault;
    *desc = nullptr;
    if (compute != CUBLAS_COMPUTE_32F && compute != CUBLAS_COMPUTE_32F_PEDANTIC &&
        compute != CUBLAS_COMPUTE_32F_FAST_TF32)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (scale != CUDA_R_32F) return CUBLAS_STATUS_NOT_SUPPORTED;
    return *desc = new cublasLtMatmulDescOpaque_t, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) {
    if (cublasStatus_t fault = cuda_on_cpu::fault_of_lt(__func__)) return fault;
    return delete desc, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                                     cublasLtMatmulDescAttributes_t attribute, const void* value,
                                                     size_t bytes) {
    if (cublasStatus_t fault = cuda_on_cpu::fault_of_lt(__func__)) return fault;
    switch (attribute) {
        case CUBLASLT_MATMUL_DESC_TRANSA:
            return cuda_on_cpu::read_attribute(desc->trans_a, value, bytes);
        case CUBLASLT_MATMUL_DESC_TRANSB:
            return cuda_on_cpu::read_attribute(desc->trans_b, value, bytes);
        case CUBLASLT_MATMUL_DESC_EPILOGUE: {
            uint32_t wanted;
            if (cublasStatus_t status = cuda_on_cpu::read_attribute(wanted, value, bytes)) return status;
            if (wanted != CUBLASLT_EPILOGUE_DEFAULT && wanted != CUBLASLT_EPILOGUE_GELU_AUX &&
                wanted != CUBLASLT_EPILOGUE_DGELU)
                return CUBLAS_STATUS_NOT_SUPPORTED;
            return desc->epilogue = wanted, CUBLAS_STATUS_SUCCESS;
        }
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER:
            return cuda_on_cpu::read_attribute(desc->aux, value, bytes);
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD:
            return cuda_on_cpu::read_attribute(desc->aux_ld, value, bytes);
        case CUBLASLT_MATMUL_DESC_A_SCALE_POINTER:
            return cuda_on_cpu::read_attribute(desc->a_scale, value, bytes);
        case CUBLASLT_MATMUL_DESC_B_SCALE_POINTER:
            return cuda_on_cpu::read_attribute(desc->b_scale, value, bytes);
        case CUBLASLT_MATMUL_DESC_FAST_ACCUM:
            return cuda_on_cpu::read_attribute(desc->fast_accumulation, value,
                                               bytes);  // sums here are in FP32 with either
        case CUBLASLT_MATMUL_DESC_POINTER_MODE:
            return cuda_on_cpu::expect_attribute(CUBLASLT_POINTER_MODE_HOST, value, bytes);
        case CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET:
            return CUBLAS_STATUS_SUCCESS;
        default:
            return CUBLAS_STATUS_INVALID_VALUE;
    }
}

inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type, uint64_t rows,
                                                 uint64_t cols, int64_t ld) {
    if (cublasStatus_t fault = cuda_on_cpu::fault_of_lt(__func__)) return fault;
    return *layout = new cublasLtMatrixLayoutOpaque_t{type, rows, cols, ld}, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    if (cublasStatus_t fault = cuda_on_cpu::fault_of_lt(__func__)) return fault;
    return delete layout, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                       cublasLtMatrixLayoutAttribute_t attribute, const void* value,
                                                       size_t bytes) {
    if (cublasStatus_t fault = cuda_on_cpu::fault_of_lt(__func__)) return fault;
    switch (attribute) {
        case CUBLASLT_MATRIX_LAYOUT_TYPE:
            return cuda_on_cpu::read_attribute(layout->type, value, bytes);
        case CUBLASLT_MATRIX_LAYOUT_ROWS:
            return cuda_on_cpu::read_attribute(layout->rows, value, bytes);
        case CUBLASLT_MATRIX_LAYOUT_COLS:
            return cuda_on_cpu::read_attribute(layout->cols, value, bytes);
        case CUBLASLT_MATRIX_LAYOUT_LD:
            return cuda_on_cpu::read_attribute(layout->ld, value, bytes);
        case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT:
            return cuda_on_cpu::read_attribute(layout->batch_count, value, bytes);
        case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET:
            return cuda_on_cpu::read_attribute(layout->batch_stride, value, bytes);
        default:
            return CUBLAS_STATUS_INVALID_VALUE;
    }
}

inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
    if (cublasStatus_t fault = cuda_on_cpu::fault_of_lt(__func__)) return fault;
    return *preference = new cublasLtMatmulPreferenceOpaque_t, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    if (cublasStatus_t fault = cuda_on_cpu::fault_of_lt(__func__)) return fault;
    return delete preference, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                           cublasLtMatmulPreferenceAttributes_t attribute,
                                                           const void* value, size_t bytes) {
    if (cublasStatus_t fault = cuda_on_cpu::fault_of_lt(__func__)) return fault;
    switch (attribute) {
        case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES:
            return cuda_on_cpu::read_attribute(preference->max_workspace, value, bytes);
        case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES:
        case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES:
        case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES:
        case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES:
            return cuda_on_cpu::read_attribute(preference
                                                   ->alignment[attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES],
                                               value, bytes);
        case CUBLASLT_MATMUL_PREF_SEARCH_MODE:
        case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK:
            return CUBLAS_STATUS_SUCCESS;  // the algorithms here split nothing unless they are told to
        default:
            return CUBLAS_STATUS_INVALID_VALUE;
    }
}

inline cublasStatus_t cublasLtMatmulAlgoConfigSetAttribute(cublasLtMatmulAlgo_t* algo,
                                                           cublasLtMatmulAlgoConfigAttributes_t attribute,
                                                           const void* value, size_t bytes) {
    if (cublasStatus_t fault = cuda_on_cpu::fault_of_lt(__func__)) return fault;
    uint32_t number;
    if (!algo || cuda_on_cpu::read_attribute(number, value, bytes)) return CUBLAS_STATUS_INVALID_VALUE;
    if (attribute != CUBLASLT_ALGO_CONFIG_SPLITK_NUM && attribute != CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME)
        return CUBLAS_STATUS_INVALID_VALUE;
    return algo->data[attribute] = number, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(const cublasLtMatmulAlgo_t* algo,
                                                           cublasLtMatmulAlgoConfigAttributes_t attribute, void* value,
                                                           size_t bytes, size_t* written) {
    if (cublasStatus_t fault = cuda_on_cpu::fault_of_lt(__func__)) return fault;
    if (!algo || !value || bytes != sizeof(uint32_t)) return CUBLAS_STATUS_INVALID_VALUE;
    if (attribute != CUBLASLT_ALGO_CONFIG_SPLITK_NUM && attribute != CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME)
        return CUBLAS_STATUS_INVALID_VALUE;
    uint32_t number = uint32_t(algo->data[attribute]);
    memcpy(value, &number, sizeof number);
    if (written) *written = sizeof number;
    return CUBLAS_STATUS_SUCCESS;
}

namespace cuda_on_cpu {

using Layout = cublasLtMatrixLayoutOpaque_t;

inline bool is_fp8(cudaDataType type) { return type == CUDA_R_8F_E4M3 || type == CUDA_R_8F_E5M2; }
inline size_t element_bytes(cudaDataType type) { return is_fp8(type) ? 1 : type == CUDA_R_16BF ? 2 : 4; }
inline size_t alignment_bytes(cudaDataType type) { return type == CUDA_R_32F ? 4 : 16; }  // of tensor cores' operands

// gelu(h) and its derivative, the tanh form.
inline float gelu(float h) { return 0.5f * h * (1 + tanhf(0.79788456f * (h + 0.044715f * h * h * h))); }
inline float gelu_slope(float h) {
    float t = tanhf(0.79788456f * (h + 0.044715f * h * h * h));
    return 0.5f * (1 + t) + 0.5f * h * (1 - t * t) * 0.79788456f * (1 + 3 * 0.044715f * h * h);
}

// One problem, D = alpha op(A) op(B) + beta C, column-major: op(A) (m,k), op(B) (k,n), C and D (m,n).
struct Product {
    Layout a, b, c, d;
    bool trans_a, trans_b;
    size_t m, n, k, slices;  // slices: of k
    float alpha, beta;
    const void *A, *B, *C;
    void* D;
    cublasLtMatmulDescOpaque_t desc;
};

// What the library refuses before it looks at any pointer.
inline cublasStatus_t check_layouts(const cublasLtMatmulDescOpaque_t* desc, const Layout* a, const Layout* b,
                                    const Layout* c, const Layout* d) {
    if (!desc || !a || !b || !c || !d) return CUBLAS_STATUS_INVALID_VALUE;
    for (const Layout* l : {a, b, c, d}) {
        if (l->rows == 0 || l->cols == 0 || l->ld < int64_t(l->rows) || l->batch_count < 1)
            return CUBLAS_STATUS_INVALID_VALUE;
        if (l->type != CUDA_R_32F && l->type != CUDA_R_16BF && !is_fp8(l->type)) return CUBLAS_STATUS_NOT_SUPPORTED;
        if (l->batch_count != a->batch_count) return CUBLAS_STATUS_INVALID_VALUE;
    }
    uint64_t m = desc->trans_a ? a->cols : a->rows, k = desc->trans_a ? a->rows : a->cols;
    uint64_t other_k = desc->trans_b ? b->cols : b->rows, n = desc->trans_b ? b->rows : b->cols;
    if (k != other_k || d->rows != m || d->cols != n || c->rows != m || c->cols != n)
        return CUBLAS_STATUS_INVALID_VALUE;
    bool fp8 = is_fp8(a->type);
    if (is_fp8(b->type) != fp8 || (!fp8 && a->type != b->type)) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (c->type != d->type || is_fp8(d->type) || (a->type == CUDA_R_32F && d->type != CUDA_R_32F))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    // Hopper's FP8 products: a transposed, b not, at most one of them in e5m2.
    if (fp8 && (!desc->trans_a || desc->trans_b || (a->type == CUDA_R_8F_E5M2 && b->type == CUDA_R_8F_E5M2)))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (!fp8 && (desc->a_scale || desc->b_scale || desc->fast_accumulation)) return CUBLAS_STATUS_INVALID_VALUE;
    // Other BF16 and FP8 matrices have no tensor-core kernel.
    for (const Layout* l : {a, b, c, d})
        if (l->type != CUDA_R_32F && size_t(l->ld) * element_bytes(l->type) % 16) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (desc->epilogue != CUBLASLT_EPILOGUE_DEFAULT) {
        if (!settings().epilogues) return CUBLAS_STATUS_NOT_SUPPORTED;
        if (desc->aux_ld < int64_t(m) || desc->aux_ld % 8) return CUBLAS_STATUS_INVALID_VALUE;
        if (a->batch_count > 1) return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    return CUBLAS_STATUS_SUCCESS;
}

#ifdef __AVX__
constexpr size_t tile_m = 16, tile_n = 6;  // 12 accumulators of 8 floats, of 16 registers
#else
constexpr size_t tile_m = 8, tile_n = 4;  // 8 accumulators of 4 floats, kept as pairs
#endif

// Element (i, k) of op(X), where `along` is the distance between neighbours in i, `across` in k, for i < count; zeros
// after. Panel layout: (k, width).
inline void pack_panel(float* panel, const void* x, cudaDataType type, size_t along, size_t across, size_t count,
                       size_t width, size_t K) {
    auto copy = [&](auto&& at) {
        if (along == 1) {
            for (size_t k = 0; k < K; k++) {
                for (size_t i = 0; i < count; i++) panel[k * width + i] = at(i + k * across);
                for (size_t i = count; i < width; i++) panel[k * width + i] = 0;
            }
        } else {
            for (size_t i = 0; i < width; i++)
                for (size_t k = 0; k < K; k++) panel[k * width + i] = i < count ? at(i * along + k * across) : 0;
        }
    };
    if (is_fp8(type)) {
        static const std::vector<float> tables = [] {  // e4m3's 256 values, then e5m2's
            std::vector<float> all;
            for (int i = 0; i < 256; i++) all.push_back(E4M3::value((unsigned char)i));
            for (int i = 0; i < 256; i++) all.push_back(E5M2::value((unsigned char)i));
            return all;
        }();
        const unsigned char* values = static_cast<const unsigned char*>(x);
        const float* table = &tables[type == CUDA_R_8F_E5M2 ? 256 : 0];
        copy([values, table](size_t i) { return table[values[i]]; });
    } else if (type == CUDA_R_16BF) {
        const unsigned short* values = static_cast<const unsigned short*>(x);
        copy([values](size_t i) { return bf16_value(values[i]); });
    } else {
        const float* values = static_cast<const float*>(x);
        copy([values](size_t i) { return values[i]; });
    }
}

// sums (n, m) = a (k, m) b (k, n), k in order.
inline void multiply_panels(const float* a, const float* b, size_t K, float (&sums)[tile_n][tile_m]) {
    typedef float Vector __attribute__((vector_size(32)));
    Vector sum[tile_n][tile_m / 8] = {};
    for (size_t k = 0; k < K; k++, a += tile_m, b += tile_n) {
        Vector column[tile_m / 8];
        memcpy(column, a, sizeof column);
#pragma GCC unroll 8
        for (size_t j = 0; j < tile_n; j++)
#pragma GCC unroll 2
            for (size_t i = 0; i < tile_m / 8; i++) sum[j][i] += column[i] * b[j];
    }
    memcpy(sums, sum, sizeof sum);
}

// Bytes of workspace that an algorithm takes for a result (m,n), or none where there is no such algorithm: sums of
// slices of k are kept in FP32.
inline std::optional<size_t> workspace_of(const cublasLtMatmulAlgo_t& algo, uint64_t m, uint64_t n, uint64_t k) {
    uint64_t slices = algo.data[2];
    if (algo.data[0] != 0x6b63 || slices < 1 || slices > k) return {};
    if ((slices > 1) != (algo.data[3] == CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE)) return {};
    return size_t(algo.data[1] + (slices > 1 ? slices * m * n * sizeof(float) : 0));
}

inline void run_product(const Product& p) {
    size_t panels_m = (p.m + tile_m - 1) / tile_m, panels_n = (p.n + tile_n - 1) / tile_n;
    static std::vector<float> a, b;  // one product runs at a time
    if (a.size() < panels_m * tile_m * p.k) a.resize(panels_m * tile_m * p.k);
    if (b.size() < panels_n * tile_n * p.k) b.resize(panels_n * tile_n * p.k);
    bool alone = p.m * p.n * p.k < 100000;
    size_t lda = size_t(p.a.ld), ldb = size_t(p.b.ld), ldc = size_t(p.c.ld), ldd = size_t(p.d.ld);
    float alpha = p.alpha * (p.desc.a_scale ? *p.desc.a_scale : 1) * (p.desc.b_scale ? *p.desc.b_scale : 1);
    auto load = [&](const void* from, size_t i) {
        return p.d.type == CUDA_R_16BF ? bf16_value(((const unsigned short*)from)[i]) : ((const float*)from)[i];
    };
    auto store = [&](void* to, size_t i, float value) {
        if (p.d.type == CUDA_R_16BF) ((unsigned short*)to)[i] = bf16_bits(value);
        else ((float*)to)[i] = value;
    };
    pool().run(panels_m + panels_n, [&](size_t i) {
        if (i < panels_m) {
            size_t first = i * tile_m, along = p.trans_a ? lda : 1, across = p.trans_a ? 1 : lda;
            pack_panel(&a[first * p.k], (const char*)p.A + first * along * element_bytes(p.a.type), p.a.type, along,
                       across, std::min(tile_m, p.m - first), tile_m, p.k);
        } else {
            size_t first = (i - panels_m) * tile_n, along = p.trans_b ? 1 : ldb, across = p.trans_b ? ldb : 1;
            pack_panel(&b[first * p.k], (const char*)p.B + first * along * element_bytes(p.b.type), p.b.type, along,
                       across, std::min(tile_n, p.n - first), tile_n, p.k);
        }
    }, alone);
    pool().run(panels_n, [&](size_t panel) {
        size_t column = panel * tile_n;
        for (size_t row = 0; row < p.m; row += tile_m) {
            alignas(32) float sums[tile_n][tile_m] = {}, slice[tile_n][tile_m];
            for (size_t i = 0; i < p.slices; i++) {
                size_t first = p.k * i / p.slices, count = p.k * (i + 1) / p.slices - first;
                multiply_panels(&a[row * p.k + first * tile_m], &b[column * p.k + first * tile_n], count, slice);
                for (size_t j = 0; j < tile_n; j++)
                    for (size_t l = 0; l < tile_m; l++) sums[j][l] = i ? sums[j][l] + slice[j][l] : slice[j][l];
            }
            for (size_t j = 0; j < std::min(tile_n, p.n - column); j++)
                for (size_t i = 0; i < std::min(tile_m, p.m - row); i++) {
                    float value = alpha * sums[j][i];
                    if (p.beta != 0) value += p.beta * load(p.C, (column + j) * ldc + row + i);
                    size_t aux = (column + j) * size_t(p.desc.aux_ld) + row + i;
                    if (p.desc.epilogue == CUBLASLT_EPILOGUE_GELU_AUX)
                        store(p.desc.aux, aux, value), value = gelu(value);
                    if (p.desc.epilogue == CUBLASLT_EPILOGUE_DGELU) value *= gelu_slope(load(p.desc.aux, aux));
                    store(p.D, (column + j) * ldd + row + i, value);
                }
        }
    }, alone);
}

}  // namespace cuda_on_cpu

// As many results as were asked for, up to three, which differ in the workspace that they need. All compute the same
// bits.
inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                                     cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                                     cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                                     cublasLtMatmulPreference_t preference, int requested,
                                                     cublasLtMatmulHeuristicResult_t results[], int* found) {
    if (cublasStatus_t fault = cuda_on_cpu::fault_of_lt(__func__)) return fault;
    *found = 0;
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (!preference || requested < 1 || !results) return CUBLAS_STATUS_INVALID_VALUE;
    if (cublasStatus_t status = cuda_on_cpu::check_layouts(desc, a, b, c, d)) return status;
    const cublasLtMatrixLayoutOpaque_t* layouts[] = {a, b, c, d};
    for (int i = 0; i < 4; i++)
        if (preference->alignment[i] < cuda_on_cpu::alignment_bytes(layouts[i]->type))
            return CUBLAS_STATUS_NOT_SUPPORTED;
    for (size_t workspace : {size_t(1) << 20, size_t(0), size_t(1) << 16}) {
        if (*found == requested) break;
        if (workspace > preference->max_workspace) continue;
        cublasLtMatmulHeuristicResult_t result{};
        result.algo.data[0] = 0x6b63, result.algo.data[1] = workspace, result.algo.data[2] = 1;
        result.workspaceSize = workspace, result.state = CUBLAS_STATUS_SUCCESS;
        result.wavesCount = float(((d->rows + 127) / 128) * ((d->cols + 127) / 128)) / 4;  // of multiprocessors
        results[(*found)++] = result;
    }
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              const cublasLtMatmulAlgo_t* algo,
                                              cublasLtMatmulHeuristicResult_t* result) {
    if (cublasStatus_t fault = cuda_on_cpu::fault_of_lt(__func__)) return fault;
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (!algo || !result) return CUBLAS_STATUS_INVALID_VALUE;
    if (cublasStatus_t status = cuda_on_cpu::check_layouts(desc, a, b, c, d)) return status;
    std::optional<size_t> workspace =
        cuda_on_cpu::workspace_of(*algo, d->rows, d->cols, desc->trans_a ? a->rows : a->cols);
    if (!workspace) return CUBLAS_STATUS_INVALID_VALUE;
    *result = {};
    result->algo = *algo, result->workspaceSize = *workspace, result->state = CUBLAS_STATUS_SUCCESS,
    result->wavesCount = 1;
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void* alpha,
                                     const void* A, cublasLtMatrixLayout_t a, const void* B, cublasLtMatrixLayout_t b,
                                     const void* beta, const void* C, cublasLtMatrixLayout_t c, void* D,
                                     cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t* algo, void* workspace,
                                     size_t workspace_bytes, cudaStream_t stream) {
    using namespace cuda_on_cpu;
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (!alpha || !beta || !A || !B || !C || !D) return CUBLAS_STATUS_INVALID_VALUE;
    if (cublasStatus_t status = check_layouts(desc, a, b, c, d)) return status;
    const std::pair<const void*, const Layout*> matrices[] = {{A, a}, {B, b}, {C, c}, {D, d}};
    for (auto [pointer, layout] : matrices)
        if (reinterpret_cast<uintptr_t>(pointer) % alignment_bytes(layout->type)) return CUBLAS_STATUS_NOT_SUPPORTED;
    bool has_aux = desc->epilogue != CUBLASLT_EPILOGUE_DEFAULT;
    if (has_aux && !desc->aux) return CUBLAS_STATUS_INVALID_VALUE;
    if (has_aux && reinterpret_cast<uintptr_t>(desc->aux) % 16) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (C == D && (c->ld != d->ld || c->type != d->type)) return CUBLAS_STATUS_INVALID_VALUE;
    uint64_t k = desc->trans_a ? a->rows : a->cols;
    std::optional<size_t> workspace_wanted = algo ? workspace_of(*algo, d->rows, d->cols, k) : 0;
    if (!workspace_wanted) return CUBLAS_STATUS_INVALID_VALUE;
    size_t needed = *workspace_wanted;
    if (needed > workspace_bytes || (needed && !workspace)) return CUBLAS_STATUS_INVALID_VALUE;
    if (needed && reinterpret_cast<uintptr_t>(workspace) % 16) return CUBLAS_STATUS_INVALID_VALUE;

    Product product{*a,
                    *b,
                    *c,
                    *d,
                    desc->trans_a != 0,
                    desc->trans_b != 0,
                    d->rows,
                    d->cols,
                    k,
                    algo ? size_t(algo->data[2]) : 1,
                    *static_cast<const float*>(alpha),
                    *static_cast<const float*>(beta),
                    A,
                    B,
                    C,
                    D,
                    *desc};
    cudaError_t error = api([&](Streams& s) {
        // The real library would fault later; here the call says which matrix it is.
        const char* names[] = {"A", "B", "C", "D"};
        for (int i = 0; i < 4; i++) {
            const Layout& l = *matrices[i].second;
            size_t elements = size_t(l.batch_count - 1) * size_t(l.batch_stride) + (l.cols - 1) * size_t(l.ld) + l.rows;
            if ((i == 2 && product.beta == 0) || memory().contains(matrices[i].first, elements * element_bytes(l.type)))
                continue;
            report_misuse(formatted("cublasLtMatmul: expected %s's %zu bytes inside one device allocation, found them "
                                    "outside",
                                    names[i], elements * element_bytes(l.type)),
                          true);
            return cudaErrorInvalidValue;
        }
        size_t aux_bytes = ((d->cols - 1) * size_t(desc->aux_ld) + d->rows) * element_bytes(d->type);
        if (has_aux && !memory().contains(desc->aux, aux_bytes)) {
            report_misuse(formatted("cublasLtMatmul: expected the epilogue's %zu auxiliary bytes inside one device "
                                    "allocation, found them outside",
                                    aux_bytes),
                          true);
            return cudaErrorInvalidValue;
        }
        for (const float* scale : {desc->a_scale, desc->b_scale})
            if (scale && !memory().contains(scale, sizeof *scale)) {
                report_misuse("cublasLtMatmul: expected A's and B's scales in device memory, found one outside", true);
                return cudaErrorInvalidValue;
            }
        if (needed && !memory().contains(workspace, needed)) {
            report_misuse(formatted("cublasLtMatmul: expected a workspace of %zu bytes inside one device allocation, "
                                    "found it outside",
                                    needed),
                          true);
            return cudaErrorInvalidValue;
        }
        return s.enqueue(stream, cudaGraphNodeTypeKernel, [product, workspace, needed] {
            if (needed) memset(workspace, settings().poison, needed);  // whatever else lies there is lost
            Product one = product;
            for (int i = 0; i < product.a.batch_count; i++) {
                run_product(one);
                auto advance = [](auto*& pointer, const Layout& l) {
                    pointer = (char*)pointer + size_t(l.batch_stride) * element_bytes(l.type);
                };
                advance(one.A, one.a), advance(one.B, one.b), advance(one.C, one.c), advance(one.D, one.d);
            }
        });
    });
    return error ? CUBLAS_STATUS_EXECUTION_FAILED : CUBLAS_STATUS_SUCCESS;
}
