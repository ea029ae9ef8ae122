// cupti_idle: a library that the CUDA driver loads into a program (CUDA_INJECTION64_PATH) and that writes down when
// each kernel, copy and fill ran on the GPU, those inside CUDA graphs too. dev/bench/idle.sh builds it, loads it into
// train_keel and reads what it wrote with dev/bench/idle.py.
//
// KEEL_TRACE names the file: a line "# ID KIND NAME" for each name when it is first seen, lines ID,START,END in
// nanoseconds, and at the end
// "# dropped N", the records that CUPTI had no room for. CUPTI hands over records buffer by buffer, not in the order of
// time. Recording slows launches down, not kernels: a step's time comes from a run without it.
#include <cupti.h>
#include <cxxabi.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

namespace {

// The records' types of CUDA 12.4 to 13. What is read of them stands at the same place in all.
#if CUPTI_API_VERSION >= 130000
using Kernel = CUpti_ActivityKernel10;
#else
using Kernel = CUpti_ActivityKernel9;
#endif
#if CUPTI_API_VERSION >= 26  // CUDA 12.8
using Copy = CUpti_ActivityMemcpy6;
#else
using Copy = CUpti_ActivityMemcpy5;
#endif
using Fill = CUpti_ActivityMemset4;

constexpr size_t BUFFER_BYTES = size_t(8) << 20;

std::mutex lock;  // CUPTI calls from threads of its own
FILE* trace = nullptr;
std::map<std::string, int> ids;
size_t dropped = 0;

bool worked(CUptiResult result, const char* what) {
    if (result == CUPTI_SUCCESS) return true;
    const char* text = "unknown error";
    cuptiGetResultString(result, &text);
    fprintf(stderr, "cupti_idle: %s: expected success, found %s; nothing more is recorded\n", what, text);
    return false;
}

std::string readable(const char* symbol) {
    int status = 0;
    char* text = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
    std::string name = status == 0 ? text : symbol;
    free(text);
    return name;
}

// `symbol` is what tells two names apart.
void record(const char* kind, const char* symbol, unsigned long long start, unsigned long long end) {
    if (start == 0 && end == 0) {  // CUPTI could not take the time
        dropped++;
        return;
    }
    auto [at, fresh] = ids.try_emplace(symbol, int(ids.size()));
    if (fresh) fprintf(trace, "# %d %s %s\n", at->second, kind, readable(symbol).c_str());
    fprintf(trace, "%d,%llu,%llu\n", at->second, start, end);
}

const char* copy_name(unsigned kind) {
    switch (kind) {
        case CUPTI_ACTIVITY_MEMCPY_KIND_HTOD:
            return "copy to the device";
        case CUPTI_ACTIVITY_MEMCPY_KIND_DTOH:
            return "copy to the host";
        case CUPTI_ACTIVITY_MEMCPY_KIND_DTOD:
            return "copy on the device";
        default:
            return "copy";
    }
}

void CUPTIAPI want_buffer(uint8_t** buffer, size_t* size, size_t* most_records) {
    *buffer = static_cast<uint8_t*>(aligned_alloc(8, BUFFER_BYTES));
    *size = *buffer ? BUFFER_BYTES : 0;
    *most_records = 0;  // as many as fit
}

void CUPTIAPI take_buffer(CUcontext context, uint32_t stream, uint8_t* buffer, size_t, size_t valid) {
    std::lock_guard<std::mutex> guard(lock);
    CUpti_Activity* activity = nullptr;
    while (trace && valid > 0 && cuptiActivityGetNextRecord(buffer, valid, &activity) == CUPTI_SUCCESS) {
        if (activity->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL || activity->kind == CUPTI_ACTIVITY_KIND_KERNEL) {
            auto* kernel = reinterpret_cast<const Kernel*>(activity);
            record("kernel", kernel->name, kernel->start, kernel->end);
        } else if (activity->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
            auto* copy = reinterpret_cast<const Copy*>(activity);
            record("memory", copy_name(copy->copyKind), copy->start, copy->end);
        } else if (activity->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
            auto* fill = reinterpret_cast<const Fill*>(activity);
            record("memory", "fill", fill->start, fill->end);
        }
    }
    size_t lost = 0;
    if (cuptiActivityGetNumDroppedRecords(context, stream, &lost) == CUPTI_SUCCESS) dropped += lost;
    free(buffer);
}

void finish() {
    worked(cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED), "the last records");
    std::lock_guard<std::mutex> guard(lock);
    fprintf(trace, "# dropped %zu\n", dropped);
    if (ferror(trace) | fclose(trace)) fprintf(stderr, "cupti_idle: the trace could not be written whole\n");
    trace = nullptr;
}

}  // namespace

// The driver calls this when the program initialises CUDA.
extern "C" __attribute__((visibility("default"))) int InitializeInjection() {
    const char* path = getenv("KEEL_TRACE");
    if (trace) return 1;
    if (!path || !(trace = fopen(path, "w"))) {
        fprintf(stderr,
                "cupti_idle: expected KEEL_TRACE to name a file that can be written, found %s; nothing is recorded\n",
                path ? path : "none");
        return 1;
    }
    bool ready = worked(cuptiActivityRegisterCallbacks(want_buffer, take_buffer), "CUPTI");
    for (CUpti_ActivityKind kind :
         {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, CUPTI_ACTIVITY_KIND_MEMCPY, CUPTI_ACTIVITY_KIND_MEMSET})
        ready = ready && worked(cuptiActivityEnable(kind), "CUPTI's record of activities");
    if (ready) {
        atexit(finish);
    } else {
        fclose(trace), trace = nullptr;
        remove(path);
    }
    return 1;  // the program goes on either way
}
