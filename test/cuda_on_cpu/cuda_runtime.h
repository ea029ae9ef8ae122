// The CUDA runtime on the CPU: with this folder before the toolkit's in the include path, a C++ compiler builds a .cu
// file, and its kernels run on the CPU under rules as loose as the hardware's. README.md beside this file says how.
#pragma once

#include "device_functions.h"
#include "primitives.h"
#include "streams.h"
#include "types.h"

enum cudaDataType {
    CUDA_R_32F = 0,
    CUDA_R_64F = 1,
    CUDA_R_16F = 2,
    CUDA_R_16BF = 14,
    CUDA_R_32I = 10,
    CUDA_R_8F_E4M3 = 28,
    CUDA_R_8F_E5M2 = 29
};
using cudaDataType_t = cudaDataType;

// ----- errors

inline const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
#define CUDA_ON_CPU_CASE(name, value, text) \
    case name:                              \
        return #name;
        CUDA_ON_CPU_ERRORS(CUDA_ON_CPU_CASE)
#undef CUDA_ON_CPU_CASE
    }
    return "unrecognized error code";
}
inline const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
#define CUDA_ON_CPU_CASE(name, value, text) \
    case name:                              \
        return text;
        CUDA_ON_CPU_ERRORS(CUDA_ON_CPU_CASE)
#undef CUDA_ON_CPU_CASE
    }
    return "unrecognized error code";
}
inline cudaError_t cudaPeekAtLastError() {
    std::lock_guard lock(cuda_on_cpu::shared_state().mutex);
    return cuda_on_cpu::shared_state().sticky ? cuda_on_cpu::shared_state().sticky : cuda_on_cpu::last_error;
}
inline cudaError_t cudaGetLastError() {
    cudaError_t error = cudaPeekAtLastError();
    cuda_on_cpu::last_error = cudaSuccess;
    return error;
}

// ----- the device

namespace cuda_on_cpu {
// As the driver does at its start: a tool's library, named in the environment, is loaded and told.
inline bool load_injected_library() {
    const char* path = getenv("CUDA_INJECTION64_PATH");
    void* library = path ? dlopen(path, RTLD_NOW) : nullptr;
    if (path && !library) fprintf(stderr, "CUDA on CPU: CUDA_INJECTION64_PATH: %s\n", dlerror());
    auto initialize = library ? reinterpret_cast<int (*)()>(dlsym(library, "InitializeInjection")) : nullptr;
    return initialize && initialize() == 1;
}
}  // namespace cuda_on_cpu
namespace cuda_on_cpu {
inline int current_device = 0;
inline int device_count() { return std::max(1, settings().devices); }
inline bool is_device(int device) { return device >= 0 && device < device_count(); }
}  // namespace cuda_on_cpu
inline cudaError_t cudaGetDeviceCount(int* count) {
    [[maybe_unused]] static const bool injected = cuda_on_cpu::load_injected_library();
    return cuda_on_cpu::api([&](auto&) { return *count = cuda_on_cpu::device_count(), cudaSuccess; });
}
inline cudaError_t cudaGetDevice(int* device) {
    return cuda_on_cpu::api([&](auto&) { return *device = cuda_on_cpu::current_device, cudaSuccess; });
}
inline cudaError_t cudaSetDevice(int device) {
    return cuda_on_cpu::api([&](auto&) {
        if (!cuda_on_cpu::is_device(device)) return cudaErrorInvalidDevice;
        return cuda_on_cpu::current_device = device, cudaSuccess;
    });
}
inline cudaError_t cudaDriverGetVersion(int* version) {
    return cuda_on_cpu::api([&](auto&) { return *version = CUDART_VERSION, cudaSuccess; }, true);
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
    return cuda_on_cpu::api([&](auto&) { return *version = CUDART_VERSION, cudaSuccess; }, true);
}
namespace cuda_on_cpu {
inline cudaDeviceProp device_properties(int device) {
    cudaDeviceProp p{};
    snprintf(p.name, sizeof p.name, "CUDA on CPU");
    snprintf(p.uuid.bytes, sizeof p.uuid.bytes, "%d", settings().devices ? device : int(getpid()));
    p.totalGlobalMem = memory().total;
    p.sharedMemPerBlock = shared_without_opt_in, p.sharedMemPerBlockOptin = shared_limit;
    p.sharedMemPerMultiprocessor = 228 << 10;
    p.regsPerBlock = p.regsPerMultiprocessor = 65536;
    p.warpSize = warpSize, p.maxThreadsPerBlock = int(max_threads);
    p.maxThreadsDim[0] = p.maxThreadsDim[1] = 1024, p.maxThreadsDim[2] = 64;
    p.maxGridSize[0] = 2147483647, p.maxGridSize[1] = p.maxGridSize[2] = 65535;
    p.major = 9, p.minor = 0, p.multiProcessorCount = 4;
    p.memoryBusWidth = 128, p.l2CacheSize = 4 << 20, p.maxThreadsPerMultiProcessor = 2048,
    p.maxBlocksPerMultiProcessor = 32;
    p.asyncEngineCount = 1, p.concurrentKernels = 1, p.unifiedAddressing = 1, p.streamPrioritiesSupported = 1;
    return p;
}
}  // namespace cuda_on_cpu
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
    return cuda_on_cpu::api([&](auto&) {
        if (!cuda_on_cpu::is_device(device)) return cudaErrorInvalidDevice;
        return *properties = cuda_on_cpu::device_properties(device), cudaSuccess;
    });
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    return cuda_on_cpu::api([&](auto&) {
        if (!cuda_on_cpu::is_device(device)) return cudaErrorInvalidDevice;
        cudaDeviceProp p = cuda_on_cpu::device_properties(device);
        switch (attribute) {
            case cudaDevAttrMaxThreadsPerBlock:
                *value = p.maxThreadsPerBlock;
                break;
            case cudaDevAttrMaxSharedMemoryPerBlock:
                *value = int(p.sharedMemPerBlock);
                break;
            case cudaDevAttrWarpSize:
                *value = p.warpSize;
                break;
            case cudaDevAttrClockRate:
                *value = 1000000;
                break;  // kHz; made up
            case cudaDevAttrMemoryClockRate:
                *value = 1000000;
                break;  // kHz; made up
            case cudaDevAttrGlobalMemoryBusWidth:
                *value = p.memoryBusWidth;
                break;
            case cudaDevAttrMultiProcessorCount:
                *value = p.multiProcessorCount;
                break;
            case cudaDevAttrL2CacheSize:
                *value = p.l2CacheSize;
                break;
            case cudaDevAttrMaxThreadsPerMultiProcessor:
                *value = p.maxThreadsPerMultiProcessor;
                break;
            case cudaDevAttrComputeCapabilityMajor:
                *value = p.major;
                break;
            case cudaDevAttrComputeCapabilityMinor:
                *value = p.minor;
                break;
            case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
                *value = int(p.sharedMemPerMultiprocessor);
                break;
            case cudaDevAttrMaxSharedMemoryPerBlockOptin:
                *value = int(p.sharedMemPerBlockOptin);
                break;
            default:
                return cudaErrorInvalidValue;
        }
        return cudaSuccess;
    });
}
inline cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    return cuda_on_cpu::api([&](auto&) {
        *total = cuda_on_cpu::memory().total, *free = *total - cuda_on_cpu::memory().used;
        return cudaSuccess;
    });
}
inline cudaError_t cudaDeviceSynchronize() {
    return cuda_on_cpu::api([](auto& s) {
        if (cudaError_t error = s.refuse_in_capture()) return error;
        return s.synchronise_all();
    });
}

// ----- memory

inline cudaError_t cudaMalloc(void** p, size_t bytes) {
    return cuda_on_cpu::api([&](auto& s) {
        *p = nullptr;
        if (cudaError_t error = s.refuse_in_capture(true)) return error;
        if (bytes == 0) return cudaSuccess;
        *p = cuda_on_cpu::memory().allocate(bytes);
        return *p ? cudaSuccess : cudaErrorMemoryAllocation;
    });
}
template <class T>
cudaError_t cudaMalloc(T** p, size_t bytes) {
    return cudaMalloc(reinterpret_cast<void**>(p), bytes);
}
inline cudaError_t cudaFree(void* p) {
    return cuda_on_cpu::api([&](auto& s) {
        if (!p) return cudaSuccess;
        if (cudaError_t error = s.refuse_in_capture(true)) return error;
        if (cudaError_t error = s.synchronise_all()) return error;
        return cuda_on_cpu::memory().release(p) ? cudaSuccess : cudaErrorInvalidValue;
    });
}
namespace cuda_on_cpu {
// name: of the call.
inline cudaError_t allocate_pinned(void** p, size_t bytes, const char* name) {
    return api([&](Streams& s) {
        *p = nullptr;
        if (cudaError_t error = s.refuse_in_capture(true)) return error;
        if (bytes == 0) return cudaSuccess;
        if (posix_memalign(p, 256, bytes)) return cudaErrorMemoryAllocation;
        memset(*p, settings().poison, bytes);
        memory().pinned[(char*)*p] = bytes;
        return cudaSuccess;
    }, false, name);
}
}  // namespace cuda_on_cpu
template <class T>
cudaError_t cudaHostAlloc(T** p, size_t bytes, unsigned) {
    return cuda_on_cpu::allocate_pinned(reinterpret_cast<void**>(p), bytes, __func__);
}
template <class T>
cudaError_t cudaMallocHost(T** p, size_t bytes, unsigned = cudaHostAllocDefault) {
    return cuda_on_cpu::allocate_pinned(reinterpret_cast<void**>(p), bytes, __func__);
}
inline cudaError_t cudaFreeHost(void* p) {
    return cuda_on_cpu::api([&](auto& s) {
        if (!p) return cudaSuccess;
        if (cudaError_t error = s.refuse_in_capture(true)) return error;
        if (cudaError_t error = s.synchronise_all()) return error;
        if (!cuda_on_cpu::memory().pinned.erase((char*)p)) return cudaErrorInvalidValue;
        free(p);
        return cudaSuccess;
    });
}

namespace cuda_on_cpu {

// Both ends checked against the allocations; `kind` becomes what the pointers are.
inline cudaError_t check_copy(const void* to, const void* from, size_t bytes, cudaMemcpyKind& kind) {
    bool to_device = memory().containing(to), from_device = memory().containing(from);
    if ((to_device && !memory().contains(to, bytes)) || (from_device && !memory().contains(from, bytes)))
        return cudaErrorInvalidValue;
    cudaMemcpyKind found = to_device     ? from_device ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice
                           : from_device ? cudaMemcpyDeviceToHost
                                         : cudaMemcpyHostToHost;
    if (kind != cudaMemcpyDefault && kind != found) return cudaErrorInvalidValue;
    return kind = found, cudaSuccess;
}

}  // namespace cuda_on_cpu

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t stream = nullptr) {
    return cuda_on_cpu::api([&](cuda_on_cpu::Streams& s) {
        if (bytes == 0) return cudaSuccess;
        if (cudaError_t error = cuda_on_cpu::check_copy(to, from, bytes, kind)) return error;
        CUstream_st* in = s.get(stream);
        if (!in) return cudaErrorInvalidResourceHandle;
        auto& memory = cuda_on_cpu::memory();
        // Pageable memory is staged: read at once, and written before the call returns. A captured copy reads it at
        // each launch.
        if (!in->capture && kind == cudaMemcpyHostToDevice && !memory.is_pinned(from)) {
            std::vector<char> staged((const char*)from, (const char*)from + bytes);
            return s.enqueue(stream, cudaGraphNodeTypeMemcpy,
                             [to, staged = std::move(staged)] { memcpy(to, staged.data(), staged.size()); });
        }
        cudaError_t error = s.enqueue(stream, cudaGraphNodeTypeMemcpy, [=] { memmove(to, from, bytes); });
        if (!error && !in->capture &&
            (kind == cudaMemcpyHostToHost || (kind == cudaMemcpyDeviceToHost && !memory.is_pinned(to))))
            error = s.synchronise(in);
        return error;
    });
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    return cuda_on_cpu::api([&](cuda_on_cpu::Streams& s) {
        if (cudaError_t error = s.refuse_in_capture()) return error;
        if (bytes == 0) return cudaSuccess;
        if (cudaError_t error = cuda_on_cpu::check_copy(to, from, bytes, kind)) return error;
        cudaError_t error = s.enqueue(nullptr, cudaGraphNodeTypeMemcpy, [=] { memmove(to, from, bytes); });
        // Between two places on the device the host does not wait.
        return error || kind == cudaMemcpyDeviceToDevice ? error : s.synchronise(s.legacy());
    });
}
namespace cuda_on_cpu {
inline cudaError_t enqueue_memset(Streams& s, void* to, int value, size_t bytes, cudaStream_t stream) {
    if (bytes == 0) return cudaSuccess;
    if (!memory().contains(to, bytes)) return cudaErrorInvalidValue;
    return s.enqueue(stream, cudaGraphNodeTypeMemset, [=] { memset(to, value, bytes); });
}
}  // namespace cuda_on_cpu
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream = nullptr) {
    return cuda_on_cpu::api([&](auto& s) { return cuda_on_cpu::enqueue_memset(s, to, value, bytes, stream); });
}
// In the legacy stream, without a wait: work of a non-blocking stream may come first.
inline cudaError_t cudaMemset(void* to, int value, size_t bytes) {
    return cuda_on_cpu::api([&](auto& s) {
        cudaError_t error = s.refuse_in_capture();
        return error ? error : cuda_on_cpu::enqueue_memset(s, to, value, bytes, nullptr);
    });
}

// ----- streams and events

namespace cuda_on_cpu {
inline cudaError_t create_stream(cudaStream_t* stream, unsigned flags, const char* name) {
    return api([&](Streams& s) {
        s.all.push_back(std::make_unique<CUstream_st>());
        s.all.back()->flags = flags;
        *stream = s.all.back().get();
        return cudaSuccess;
    }, false, name);
}
inline cudaError_t create_event(cudaEvent_t* event, unsigned flags, const char* name) {
    return api([&](auto&) {
        *event = new CUevent_st;
        (*event)->flags = flags;
        return cudaSuccess;
    }, false, name);
}
}  // namespace cuda_on_cpu
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    return cuda_on_cpu::create_stream(stream, flags, __func__);
}
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) {
    return cuda_on_cpu::create_stream(stream, cudaStreamDefault, __func__);
}
inline cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
    return cuda_on_cpu::create_stream(stream, flags, __func__);
}
inline cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    return cuda_on_cpu::api([&](auto&) { return *least = 0, *greatest = -5, cudaSuccess; });
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    return cuda_on_cpu::api([&](auto& s) {
        CUstream_st* found = s.get(stream);
        if (!found || found == s.legacy()) return cudaErrorInvalidResourceHandle;
        if (found->capture) found->capture->invalid = true, found->capture = nullptr;
        found->destroyed = true;  // its work still runs
        s.sweep();
        return cudaSuccess;
    }, true);
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    return cuda_on_cpu::api([&](auto& s) {
        if (cudaError_t error = s.refuse_in_capture()) return error;
        CUstream_st* found = s.get(stream);
        return found ? s.synchronise(found) : cudaErrorInvalidResourceHandle;
    });
}
// Each query lets the device do one thing, so that polling ends.
inline cudaError_t cudaStreamQuery(cudaStream_t stream) {
    return cuda_on_cpu::api([&](auto& s) {
        if (cudaError_t error = s.refuse_in_capture()) return error;
        CUstream_st* found = s.get(stream);
        if (!found) return cudaErrorInvalidResourceHandle;
        if (!found->queue.empty()) s.run_some();
        return found->queue.empty() ? cudaSuccess : cudaErrorNotReady;
    });
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned = 0) {
    return cuda_on_cpu::api([&](auto& s) { return s.wait(stream, event); });
}
inline cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
    return cuda_on_cpu::api([&](auto& s) { return s.enqueue(stream, cudaGraphNodeTypeHost, [=] { function(data); }); });
}

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
    return cuda_on_cpu::create_event(event, flags, __func__);
}
inline cudaError_t cudaEventCreate(cudaEvent_t* event) {
    return cuda_on_cpu::create_event(event, cudaEventDefault, __func__);
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
    return cuda_on_cpu::api([&](auto&) {
        delete event;
        return cudaSuccess;
    }, true);
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr) {
    return cuda_on_cpu::api([&](auto& s) { return s.record(event, stream); });
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    return cuda_on_cpu::api([&](auto& s) {
        if (event->captured) return s.refuse_in_capture(), cudaErrorCapturedEvent;
        auto state = event->state;
        return s.run_until([state] { return state->completed >= state->recorded; });
    });
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
    return cuda_on_cpu::api([&](auto& s) {
        if (event->captured) return s.refuse_in_capture(), cudaErrorCapturedEvent;
        if (event->state->completed < event->state->recorded) s.run_some();
        return event->state->completed < event->state->recorded ? cudaErrorNotReady : cudaSuccess;
    });
}
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
    return cuda_on_cpu::api([&](auto&) {
        if (!start->state->recorded || !end->state->recorded || (start->flags | end->flags) & cudaEventDisableTiming)
            return cudaErrorInvalidResourceHandle;
        if (start->state->completed < start->state->recorded || end->state->completed < end->state->recorded)
            return cudaErrorNotReady;
        *milliseconds = std::chrono::duration<float, std::milli>(end->state->time - start->state->time).count();
        return cudaSuccess;
    });
}

// ----- graphs

inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    return cuda_on_cpu::api([&](auto& s) { return s.begin_capture(stream, mode); });
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    return cuda_on_cpu::api([&](auto& s) { return s.end_capture(stream, graph); });
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    return cuda_on_cpu::api([&](auto& s) {
        CUstream_st* found = s.get(stream);
        if (!found) return cudaErrorInvalidResourceHandle;
        *status = !found->capture           ? cudaStreamCaptureStatusNone
                  : found->capture->invalid ? cudaStreamCaptureStatusInvalidated
                                            : cudaStreamCaptureStatusActive;
        return cudaSuccess;
    });
}
inline cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
    return cuda_on_cpu::api([&](auto&) {
        if (nodes)
            for (size_t i = 0; i < *count; i++) nodes[i] = i < graph->nodes.size() ? graph->nodes[i].get() : nullptr;
        *count = nodes ? std::min(*count, graph->nodes.size()) : graph->nodes.size();
        return cudaSuccess;
    });
}
inline cudaError_t cudaGraphNodeGetType(cudaGraphNode_t node, cudaGraphNodeType* type) {
    return cuda_on_cpu::api([&](auto&) { return *type = node->type, cudaSuccess; });
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long = 0) {
    return cuda_on_cpu::api([&](auto& s) { return graph ? s.instantiate(exec, graph) : cudaErrorInvalidValue; });
}
inline cudaError_t cudaGraphUpload(cudaGraphExec_t exec, cudaStream_t) {
    return cuda_on_cpu::api([&](auto&) { return exec ? cudaSuccess : cudaErrorInvalidValue; });
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    return cuda_on_cpu::api([&](auto& s) { return s.launch_graph(exec, stream); });
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    return cuda_on_cpu::api([&](auto&) {
        delete graph;
        return cudaSuccess;
    }, true);
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    return cuda_on_cpu::api([&](auto& s) {
        if (!exec) return cudaErrorInvalidValue;
        exec->destroyed = true;  // launches under way still run
        s.sweep();
        return cudaSuccess;
    }, true);
}

// ----- kernels

namespace cuda_on_cpu {

inline std::map<const void*, size_t>& shared_opt_ins() {
    static std::map<const void*, size_t> bytes;
    return bytes;
}
inline size_t shared_allowed(const void* function) {
    auto at = shared_opt_ins().find(function);
    return at == shared_opt_ins().end() ? shared_without_opt_in : std::max(shared_without_opt_in, at->second);
}

inline cudaError_t refuse_launch(const void* function, const std::string& why, cudaError_t error) {
    report_misuse("launch of kernel " + kernel_name(function) + ": " + why, false);
    return error;
}
inline cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* function) {
    dim3 g = config.gridDim, b = config.blockDim;
    size_t threads = size_t(b.x) * b.y * b.z;
    if (threads == 0 || threads > max_threads || b.x > max_threads || b.y > max_threads || b.z > 64)
        return refuse_launch(function, "expected a block of 1 to 1024 threads, z up to 64, found " + text(b),
                             cudaErrorInvalidConfiguration);
    if (g.x == 0 || g.y == 0 || g.z == 0 || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535)
        return refuse_launch(function, "expected a grid of 1 to (2^31-1,65535,65535) blocks, found " + text(g),
                             cudaErrorInvalidConfiguration);
    if (config.dynamicSmemBytes > shared_allowed(function))
        return refuse_launch(function,
                             formatted("expected up to %zu bytes of shared memory, found %zu; cudaFuncSetAttribute "
                                       "allows up to %zu",
                                       shared_allowed(function), config.dynamicSmemBytes, shared_limit),
                             cudaErrorInvalidValue);
    for (unsigned i = 0; i < config.numAttrs; i++)
        if (config.attrs[i].id == cudaLaunchAttributeClusterDimension ||
            config.attrs[i].id == cudaLaunchAttributeCooperative)
            return refuse_launch(function, "clusters and cooperative launches are not supported",
                                 cudaErrorNotSupported);
    return cudaSuccess;
}

inline bool may_overlap(const cudaLaunchConfig_t& config) {
    for (unsigned i = 0; i < config.numAttrs; i++)
        if (config.attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization &&
            config.attrs[i].val.programmaticStreamSerializationAllowed)
            return true;
    return false;
}

// A pointer argument that is no device pointer would fault on a card. Small numbers may be offsets from null that
// nobody uses.
template <class T>
bool is_host_pointer(T argument) {
    if constexpr (std::is_pointer_v<T> && !std::is_function_v<std::remove_pointer_t<T>>) {
        const char* p = (const char*)argument;
        if (uintptr_t(p) >> 32 == 0 || memory().is_pinned(p)) return false;
        const Allocation* a = DeviceMemory::find(memory().live, p);
        return !a || p < a->data || p > a->data + a->bytes;
    }
    return false;
}

}  // namespace cuda_on_cpu

template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... actual) {
    static_assert((std::is_trivially_copyable_v<std::decay_t<Expected>> && ...), "kernel arguments are copied byte by "
                                                                                 "byte");
    static_assert((!std::is_reference_v<Expected> && ...), "kernel arguments are passed by value");
    return cuda_on_cpu::api([&](auto& s) {
        const void* function = reinterpret_cast<const void*>(kernel);
        if (cudaError_t error = cuda_on_cpu::check_launch(*config, function)) return error;
        std::tuple<std::decay_t<Expected>...> arguments = [](Expected... converted) {
            return std::tuple<std::decay_t<Expected>...>(converted...);
        }(std::forward<Actual>(actual)...);
        int host_pointer = std::apply([](auto... argument) {
            int position = 0, found = 0;
            ((++position, found = !found && cuda_on_cpu::is_host_pointer(argument) ? position : found), ...);
            return found;
        }, arguments);
        if (host_pointer) {
            cuda_on_cpu::report_misuse("launch of kernel " + cuda_on_cpu::kernel_name(function) +
                                           cuda_on_cpu::formatted(": expected argument %d to point into device or "
                                                                  "pinned memory, found that it does not",
                                                                  host_pointer),
                                       true);
            return cudaErrorIllegalAddress;
        }
        auto launch = std::make_shared<cuda_on_cpu::Launch>(cuda_on_cpu::Launch{
            function, config->gridDim, config->blockDim, config->dynamicSmemBytes, cuda_on_cpu::may_overlap(*config),
            [kernel, arguments] { std::apply(kernel, arguments); }});
        return s.enqueue(config->stream, cudaGraphNodeTypeKernel, [launch] { cuda_on_cpu::run_grid(*launch); });
    }, false, __func__);
}

inline cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
    return cuda_on_cpu::api([&](auto&) {
        if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
        if (value < 0 || size_t(value) > cuda_on_cpu::shared_limit) return cudaErrorInvalidValue;
        cuda_on_cpu::shared_opt_ins()[function] = size_t(value);
        return cudaSuccess;
    });
}
template <class... Arguments>
cudaError_t cudaFuncSetAttribute(void (*function)(Arguments...), cudaFuncAttribute attribute, int value) {
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(function), attribute, value);
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
    return cuda_on_cpu::api([&](auto&) {
        *attributes = {};
        attributes->maxThreadsPerBlock = int(cuda_on_cpu::max_threads), attributes->numRegs = 32;
        attributes->ptxVersion = cuda_on_cpu::settings().ptx, attributes->binaryVersion = 90;  // this card's
        attributes->maxDynamicSharedSizeBytes = int(cuda_on_cpu::shared_allowed(function));
        return cudaSuccess;
    });
}
template <class... Arguments>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*function)(Arguments...)) {
    return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(function));
}
// The mangled name, as the toolkit gives it.
inline cudaError_t cudaFuncGetName(const char** name, const void* function) {
    return cuda_on_cpu::api([&](auto&) {
        static std::map<const void*, std::string> names;
        auto [at, is_new] = names.try_emplace(function);
        if (is_new) at->second = cuda_on_cpu::symbol_of(function);
        *name = at->second.c_str();
        return cudaSuccess;
    });
}
// By threads and shared memory; registers do not exist here.
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int block_size,
                                                                 size_t shared_bytes) {
    return cuda_on_cpu::api([&](auto&) {
        if (block_size < 1 || block_size > int(cuda_on_cpu::max_threads) || shared_bytes > cuda_on_cpu::shared_limit)
            return cudaErrorInvalidValue;
        if (shared_bytes > cuda_on_cpu::shared_allowed(function)) return *blocks = 0, cudaSuccess;
        *blocks = std::min({32, 2048 / int(cuda_on_cpu::round_up(size_t(block_size), 32)),
                            int((228 << 10) / (shared_bytes + 1024))});
        return cudaSuccess;
    });
}
template <class... Arguments>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*function)(Arguments...), int block_size,
                                                          size_t shared_bytes) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, reinterpret_cast<const void*>(function), block_size,
                                                         shared_bytes);
}
