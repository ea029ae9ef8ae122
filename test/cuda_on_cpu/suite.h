// What the suites of these headers share: launches, device arrays, the misuse that a launch leads to.
#pragma once

#include <cuda_runtime.h>
#include <doctest/doctest.h>

#include <string>
#include <vector>

using cuda_on_cpu::settings;

#define CHECK_OK(call) CHECK_MESSAGE((call) == cudaSuccess, cudaGetErrorString(cudaPeekAtLastError()))

template <class... Expected, class... Actual>
cudaError_t launch(void (*kernel)(Expected...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Actual... actual) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes, config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, actual...);
}

template <class T>
struct Device {
    T* p = nullptr;
    size_t n;
    explicit Device(size_t n) : n(n) { REQUIRE(cudaMalloc(&p, n * sizeof(T)) == cudaSuccess); }
    explicit Device(const std::vector<T>& values) : Device(values.size()) {
        CHECK_OK(cudaMemcpy(p, values.data(), n * sizeof(T), cudaMemcpyHostToDevice));
    }
    Device(const Device&) = delete;
    ~Device() { cudaFree(p); }
    std::vector<T> read() const {
        std::vector<T> values(n);
        CHECK_OK(cudaMemcpy(values.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
        return values;
    }
};

// What misuse the launch leads to, by the time the device is synchronised. Forgets it.
template <class Launch>
std::string misuse_of(Launch&& launch) {
    cuda_on_cpu::clear_misuse();
    launch();
    bool failed = cudaDeviceSynchronize() == cudaErrorLaunchFailure;
    std::string message = cuda_on_cpu::last_misuse();
    CHECK(failed == !message.empty());
    if (failed) CHECK(cudaDeviceSynchronize() == cudaErrorLaunchFailure);  // sticky
    cuda_on_cpu::clear_misuse();
    CHECK_OK(cudaDeviceSynchronize());
    return message;
}
inline void CHECK_HAS(const std::string& message, const std::string& part) {
    CHECK_MESSAGE(message.find(part) != std::string::npos, "expected: ", part, "\nfound: ", message);
}

struct WithSeed {
    uint64_t before = settings().seed;
    explicit WithSeed(uint64_t seed) { settings().seed = seed; }
    ~WithSeed() { settings().seed = before; }
};
