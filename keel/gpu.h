// keel/gpu.h: the GPU's memory, launches of kernels, and graphs of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "launch.h"

#ifdef KEEL_FP32
using branch_t = float;
#else
using branch_t = __nv_bfloat16;
#endif
constexpr bool BRANCH_BF16 = sizeof(branch_t) == 2;
constexpr int WIDE = 16 / int(sizeof(branch_t));  // branch numbers in the 16 bytes that a thread loads at once

constexpr int WARP = 32;             // threads
constexpr unsigned ALL_LANES = ~0u;  // the mask of a whole warp

// An error is often found by a later call than the one whose work has failed. Memory that a run takes was there when it
// was planned, but for what the driver takes by itself.
inline void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // forgotten: some can go on without the memory
    if (error == cudaErrorMemoryAllocation)
        fail("%s: expected free memory on the GPU, found too little; end what else takes it (nvidia-smi), or use a "
             "smaller -b, -t, -C or -L, or -r layer; a run goes on by -y",
             what);
    fail("%s: expected a GPU that works, found \"%s\" (%s); see the driver's log (dmesg), or use train_keel_cpu; a run "
         "goes on by -y",
         what, cudaGetErrorString(error), cudaGetErrorName(error));
}
#define CUDA(call) check(call, #call)

// cudaMalloc's own alignment in bytes, at multiples of which buffers that share an allocation start.
constexpr size_t ALIGNMENT = 256;

// A buffer in the device's memory: an allocation of its own, or a piece of another's.
template <class T>
class DeviceArray {
public:
    DeviceArray() = default;
    // Takes the next n elements of an allocation at `free`, and moves `free` behind them.
    DeviceArray(char*& free, size_t n) : pointer(as_elements(free)), n(n), borrowed(true) {
        free += round_up(n * sizeof(T), ALIGNMENT);
    }
    explicit DeviceArray(size_t n) : n(n) {
        if (n == 0) return;
        cudaError_t error = cudaMalloc(&pointer, n * sizeof(T));
        if (error) check(error, format("cudaMalloc of %s", bytes_text(double(n * sizeof(T)))).c_str());
    }
    DeviceArray(DeviceArray&& a) noexcept
        : pointer(std::exchange(a.pointer, nullptr)), n(std::exchange(a.n, 0)), borrowed(a.borrowed) {}
    DeviceArray& operator=(DeviceArray&& a) noexcept {
        std::swap(pointer, a.pointer), std::swap(n, a.n), std::swap(borrowed, a.borrowed);
        return *this;
    }
    ~DeviceArray() {
        if (pointer && !borrowed) cudaFree(pointer);
    }
    T* data() const { return pointer; }
    size_t size() const { return n; }

private:
    static T* as_elements(char* bytes) { return static_cast<T*>(static_cast<void*>(bytes)); }
    T* pointer = nullptr;
    size_t n = 0;
    bool borrowed = false;  // from another array
};

// Makes buffers, each with its name and elements: `DeviceArray<T> x = table("x", n)`. Kinds: the table only counts, and
// the buffers stay empty; they are pieces of one allocation; each has one of its own.
class BufferTable {
public:
    enum Kind { COUNTED, TOGETHER, APART };
    struct Row {
        const char* name;
        size_t bytes;
        void* data;  // null: counted
    };
    std::vector<Row> rows;     // of the buffers that have elements
    DeviceArray<char> memory;  // the one allocation

    // bytes: of the one allocation, a multiple of ALIGNMENT for each buffer
    BufferTable(Kind kind, size_t bytes) : memory(kind == TOGETHER ? bytes : 0), kind(kind), free(memory.data()) {}

    struct Request {
        BufferTable& table;
        const char* name;
        size_t n;
        template <class T>
        operator DeviceArray<T>() const {
            if (n == 0) return {};
            DeviceArray<T> buffer;
            if (table.kind == TOGETHER) buffer = DeviceArray<T>(table.free, n);
            if (table.kind == APART) buffer = DeviceArray<T>(n);
            table.rows.push_back({name, n * sizeof(T), buffer.data()});
            return buffer;
        }
    };
    Request operator()(const char* name, size_t elements) { return {*this, name, elements}; }

private:
    Kind kind;
    char* free;
};

// A buffer in page-locked host memory, to and from which the device copies by itself.
template <class T>
class PinnedArray {
public:
    PinnedArray() = default;
    explicit PinnedArray(size_t n) : n(n) {
        cudaError_t error = cudaMallocHost((void**)&pointer, n * sizeof(T));
        if (error == cudaErrorMemoryAllocation)
            fail("cudaMallocHost: expected %s of page-locked memory on the host, found less; end what else takes it, "
                 "or allow more (ulimit -l, a container's limit)",
                 bytes_text(double(n * sizeof(T))));
        check(error, "cudaMallocHost");
    }
    PinnedArray(PinnedArray&& a) noexcept : pointer(std::exchange(a.pointer, nullptr)), n(std::exchange(a.n, 0)) {}
    PinnedArray& operator=(PinnedArray&& a) noexcept {
        std::swap(pointer, a.pointer), std::swap(n, a.n);
        return *this;
    }
    ~PinnedArray() { cudaFreeHost(pointer); }
    T* data() const { return pointer; }
    size_t size() const { return n; }
    T& operator[](size_t i) const { return pointer[i]; }

private:
    T* pointer = nullptr;
    size_t n = 0;
};

// Whether a kernel may start before the one before it has ended: it hides the microsecond or two between two kernels,
// which thousands of small ones add up to. The code is asked, not the card: what was built for compute capability 8.0
// alone runs on later cards too, but does not wait. KEEL_OVERLAP=0 in the environment turns it off, to measure it.
inline bool may_overlap(const void* kernel) {
    if (const char* wanted = getenv("KEEL_OVERLAP"); wanted && std::string(wanted) == "0") return false;
    cudaFuncAttributes code;
    CUDA(cudaFuncGetAttributes(&code, kernel));
    return code.ptxVersion >= 90;  // not binaryVersion: of PTX for 8.0 the driver makes a binary for 9.0
}
inline bool launches_overlap(const void* first_kernel) {
    static const bool overlap = may_overlap(first_kernel);  // all kernels of a program are built alike
    return overlap;
}

// Lets a kernel's blocks have so much shared memory: more than 48 KiB must be asked for.
template <class... Parameters>
void allow_shared(void (*kernel)(Parameters...), size_t bytes) {
    if (bytes > 48 << 10) CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
}
// Blocks of a kernel that the GPU holds at once.
template <class... Parameters>
size_t resident_blocks(void (*kernel)(Parameters...), unsigned block, size_t shared_bytes) {
    int blocks = 0, multiprocessors = 0;
    allow_shared(kernel, shared_bytes);
    CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, int(block), shared_bytes));
    CUDA(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
    return size_t(blocks) * size_t(multiprocessors);
}

// Blocks, most often x alone. A GPU starts them in this order, x first; only speed may depend on it.
struct Grid {
    size_t x, y, z;
    Grid(size_t x, size_t y = 1, size_t z = 1) : x(x), y(y), z(z) {}
};

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...) and the check for its error. The kernel calls
// begin_kernel() before it touches global memory.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), Grid grid, unsigned block, size_t shared_bytes, cudaStream_t stream,
            Arguments... arguments) {
    if (grid.x > size_t(INT_MAX) || std::max(grid.y, grid.z) > 65535)
        fail("a kernel needs %zu x %zu x %zu blocks, more than a grid has; use a smaller -b", grid.x, grid.y, grid.z);
    allow_shared(kernel, shared_bytes);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(grid.x), unsigned(grid.y), unsigned(grid.z)), config.blockDim = dim3(block),
    config.dynamicSmemBytes = shared_bytes, config.stream = stream;
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization,
    overlap.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &overlap, config.numAttrs = launches_overlap(reinterpret_cast<const void*>(kernel)) ? 1 : 0;
    CUDA(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}
// Bytes of shared memory that a block can have: 227 KiB on Hopper, 163 on A100, 99 on the cards for desktops.
inline int shared_limit() {
    static const int bytes = [] {
        int value = 0;
        CUDA(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
        return value;
    }();
    return bytes;
}
inline size_t ceil_div(size_t n, size_t d) { return (n + d - 1) / d; }
constexpr unsigned THREADS = 256;  // of a block, for kernels that need no other number

// Launches at least `threads` threads of a kernel that uses no shared memory.
template <class... Parameters, class... Arguments>
void launch_threads(void (*kernel)(Parameters...), size_t threads, cudaStream_t stream, Arguments... arguments) {
    launch(kernel, ceil_div(threads, THREADS), THREADS, 0, stream, arguments...);
}

// A point in the work of a stream, with its time only as an Event<cudaEventDefault>.
template <unsigned FLAGS = cudaEventDisableTiming>
class Event {
public:
    Event() { CUDA(cudaEventCreateWithFlags(&event, FLAGS)); }
    ~Event() { cudaEventDestroy(event); }
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    operator cudaEvent_t() const { return event; }

private:
    cudaEvent_t event = nullptr;
};

// Milliseconds between two points of a stream.
class Stopwatch {
public:
    explicit Stopwatch(cudaStream_t stream) : stream(stream) {}
    void start() { CUDA(cudaEventRecord(begin, stream)); }
    float stop() {
        float ms = 0;
        CUDA(cudaEventRecord(end, stream));
        CUDA(cudaEventSynchronize(end));
        CUDA(cudaEventElapsedTime(&ms, begin, end));
        return ms;
    }

private:
    cudaStream_t stream;
    Event<cudaEventDefault> begin, end;
};
inline float median(std::vector<float>& values) {
    std::nth_element(values.begin(), values.begin() + std::ptrdiff_t(values.size() / 2), values.end());
    return values[values.size() / 2];
}

// Launches recorded once and repeated at the cost of one.
struct Graph {
    cudaGraphExec_t launches = nullptr;
    size_t nodes = 0, bytes = 0;  // bytes of the device's memory that it takes

    template <class Action>
    void record(cudaStream_t stream, Action action) {
        cudaGraph_t graph = nullptr;
        // Relaxed, so that action may ask the driver for more than launches: a kernel's attributes, a heuristic.
        CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
        try {
            action();
        } catch (...) {
            if (cudaStreamEndCapture(stream, &graph) == cudaSuccess) cudaGraphDestroy(graph);
            throw;
        }
        CUDA(cudaStreamEndCapture(stream, &graph));
        CUDA(cudaGraphGetNodes(graph, nullptr, &nodes));
        size_t before = 0, after = 0, total = 0;
        CUDA(cudaMemGetInfo(&before, &total));
        CUDA(cudaGraphInstantiate(&launches, graph, 0));
        CUDA(cudaGraphDestroy(graph));
        CUDA(cudaGraphUpload(launches, stream));  // now, rather than before its first launch
        CUDA(cudaMemGetInfo(&after, &total));
        bytes = before > after ? before - after : 0;
    }
    Graph() = default;
    ~Graph() {
        if (launches) cudaGraphExecDestroy(launches);
    }
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;
};

inline cudaDeviceProp gpu_properties() {
    cudaDeviceProp p;
    int device = 0;
    CUDA(cudaGetDevice(&device));
    CUDA(cudaGetDeviceProperties(&p, device));
    return p;
}

inline void require_gpu(const Launch& launch) {
    int devices = 0, driver = 0, runtime = 0;
    cudaError_t error = cudaGetDeviceCount(&devices);
    cudaDriverGetVersion(&driver), cudaRuntimeGetVersion(&runtime);
    if (error == cudaErrorInsufficientDriver && driver > 0)
        fail("expected an NVIDIA driver for CUDA %d.%d, found one for %d.%d; update it, or use train_keel_cpu",
             runtime / 1000, runtime % 1000 / 10, driver / 1000, driver % 1000 / 10);
    if (error != cudaSuccess || devices == 0)
        fail("expected an NVIDIA GPU, found none (%s); use train_keel_cpu", error == cudaSuccess ? "no device"
                                                                            : driver == 0 ? "no driver"
                                                                                          : cudaGetErrorString(error));
    // Before the start below, which takes memory of the GPU that is set: of the first where none is.
    if (launch.ranks > 1) CUDA(cudaSetDevice(launch.device(devices)));
    CUDA(cudaFree(nullptr));  // the driver's start, a good part of a second
    cudaDeviceProp p = gpu_properties();
    if (p.major < 8)
        fail("expected a GPU of compute capability 8.0 or later, found %s with %d.%d; use train_keel_cpu", p.name,
             p.major, p.minor);
}

// Bytes that a run may take: the reserve is for the kernels' code and the matrices that matrix_rate multiplies (384
// MiB, 768 in FP32).
inline size_t available_gpu_memory() {
    size_t free = 0, total = 0, reserve = size_t(1) << 30;
    CUDA(cudaMemGetInfo(&free, &total));
    return free > reserve ? free - reserve : 0;
}
