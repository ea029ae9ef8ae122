// bench_matmul.cpp: GFLOP/s of the trainer's matrix product, or of OpenBLAS's sgemm, on the products of the training
// step.
//
//     build/bench_matmul ours|openblas
//
// One library a process: each keeps its threads spinning after a product, which would take cores from the other.
// For the same reason OpenBLAS is loaded only when asked for; that also lets this file build where there is none.
// Prints the library, then a line a product: form, M, N, K, GFLOP/s. dev/bench/bench_cpu.py runs it in turns and
// compares.

#include "train_keel_cpu.cpp"

#include <dlfcn.h>

namespace {

constexpr size_t SHAPES[][3] = {{1024, 256, 256},  {1024, 768, 256},   {1024, 1024, 256}, {1024, 256, 1024},
                                {1024, 768, 1024}, {1024, 1024, 1024}, {2048, 768, 768},  {2048, 2304, 768},
                                {2048, 3072, 768}, {2048, 768, 3072}};  // M rows of x, the tokens B*T; W (N,K)
constexpr double SECONDS_A_PRODUCT = 0.04;

// The three products of a layer y = x W^T with x (M,K), W (N,K), y (M,N)
enum Form { FORWARD, BACKWARD_X, BACKWARD_W };
constexpr const char* FORM_NAMES[] = {"x W^T", "dy W", "+= dy^T x"};

// CBLAS by hand, as its header is not there without the development package
using Sgemm = void (*)(int order, int a_order, int b_order, int m, int n, int k, float alpha, const float* a, int a_row,
                       const float* b, int b_row, float beta, float* c, int c_row);
constexpr int ROW_MAJOR = 101, AS_IS = 111, TRANSPOSED = 112;

struct OpenBlas {
    Sgemm sgemm = nullptr;
    std::string name;
};

OpenBlas load_openblas(int threads) {
    void* library = dlopen("libopenblas.so.0", RTLD_NOW);
    if (!library) library = dlopen("libopenblas.so", RTLD_NOW);
    if (!library) fail("expected libopenblas.so, found none; install it (Debian: libopenblas-dev)");
    auto find = [&](const char* symbol) {
        void* address = dlsym(library, symbol);
        if (!address)
            fail("libopenblas.so: expected the symbol %s, found none; install another build of OpenBLAS", symbol);
        return address;
    };
    reinterpret_cast<void (*)(int)>(find("openblas_set_num_threads"))(threads);
    auto text = [&](const char* symbol) { return std::string(reinterpret_cast<const char* (*)()>(find(symbol))()); };
    std::string config = text("openblas_get_config");  // "OpenBLAS 0.3.21 NO_LAPACKE ..."
    size_t version_end = config.find(' ', config.find(' ') + 1);
    return {reinterpret_cast<Sgemm>(find("cblas_sgemm")),
            config.substr(0, version_end) + " " + text("openblas_get_corename")};
}

void multiply(Sgemm sgemm, Form form, size_t M, size_t N, size_t K, const float* x, const float* w, const float* y,
              float* c) {
    int m = int(M), n = int(N), k = int(K);
    switch (form) {
        case FORWARD:
            if (sgemm) sgemm(ROW_MAJOR, AS_IS, TRANSPOSED, m, n, k, 1, x, k, w, k, 0, c, n);
            else product(M, N, K, row_major(x, K), row_major(w, K).transposed(), c, N, false);
            break;
        case BACKWARD_X:
            if (sgemm) sgemm(ROW_MAJOR, AS_IS, AS_IS, m, k, n, 1, y, n, w, k, 0, c, k);
            else product(M, K, N, row_major(y, N), row_major(w, K), c, K, false);
            break;
        case BACKWARD_W:
            if (sgemm) sgemm(ROW_MAJOR, TRANSPOSED, AS_IS, n, k, m, 1, y, n, x, k, 1, c, k);
            else product(N, K, M, row_major(y, N).transposed(), row_major(x, K), c, K, true);
            break;
    }
}

Buffer<float> random_matrix(size_t n, uint32_t seed) {
    Buffer<float> out(n);
    for (size_t i = 0; i < n; i++) {
        seed = seed * 1664525 + 1013904223;
        out[i] = float(seed >> 8) * 0x1p-23f - 1;
    }
    return out;
}

void bench(Sgemm sgemm) {
    for (auto [M, N, K] : SHAPES) {
        Buffer<float> x = random_matrix(M * K, 1), w = random_matrix(N * K, 2), y = random_matrix(M * N, 3);
        Buffer<float> c(std::max({M * N, M * K, N * K}));
        for (Form form : {FORWARD, BACKWARD_X, BACKWARD_W}) {
            std::fill_n(c.data(), c.size(), 0.0f);  // not zero(), whose OpenMP threads would spin beside OpenBLAS
            std::vector<double> times;
            multiply(sgemm, form, M, N, K, x.data(), w.data(), y.data(), c.data());  // warms caches and threads
            for (double begin = seconds(); seconds() - begin < SECONDS_A_PRODUCT || times.size() < 5;) {
                double start = seconds();
                multiply(sgemm, form, M, N, K, x.data(), w.data(), y.data(), c.data());
                times.push_back(seconds() - start);
            }
            std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
            printf("%s,%zu,%zu,%zu,%.2f\n", FORM_NAMES[form], M, N, K,
                   2e-9 * double(M * N * K) / times[times.size() / 2]);
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    std::string library = argc == 2 ? argv[1] : "";
    try {
        if (library != "ours" && library != "openblas") fail("expected `%s ours` or `%s openblas`", argv[0], argv[0]);
        OpenBlas blas;
        if (library == "openblas") blas = load_openblas(omp_get_max_threads());
        printf("%s\n", blas.sgemm ? blas.name.c_str() : "KEEL");
        bench(blas.sgemm);
    } catch (const Error& e) {
        fprintf(stderr, "bench_matmul: %s\n", e.what());
        return 1;
    }
    return 0;
}
