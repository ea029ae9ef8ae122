// Stands in for libcupti, by LD_PRELOAD, where there is no GPU: gives dev/bench/cupti_idle.cpp the records of four
// made-up steps. Each takes 100 us:
//   0-4 idle, 4-5 copy to the device, 5-6 idle, 6-26 a product, 26-28 idle, 28-88 a product of another type, 60-92 a
//   kernel beside it, 92-98 adamw_kernel, 98-99 copy to the host, 99-100 fill.
// The first step has a gap of 1000 us more. KEEL_FAKE_DROPS: how many records CUPTI says that it dropped.
#include <cupti.h>

#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

CUpti_BuffersCallbackRequestFunc want_buffer = nullptr;
CUpti_BuffersCallbackCompleteFunc take_buffer = nullptr;
bool enabled[CUPTI_ACTIVITY_KIND_COUNT] = {};

struct Buffer {
    uint8_t* start = nullptr;
    size_t size = 0, used = 0, most = 0;
    Buffer() { want_buffer(&start, &size, &most); }
    template <class T>
    void add(CUpti_ActivityKind kind, uint64_t begin, uint64_t end, void (*fill)(T&)) {
        if (!enabled[kind]) return;
        T record{};
        record.kind = kind, record.start = begin, record.end = end;
        fill(record);
        std::memcpy(start + used, &record, sizeof record);
        used += sizeof record;
    }
    void deliver() { take_buffer(nullptr, 0, start, size, used); }
};

size_t size_of(const CUpti_Activity* record) {
    return record->kind == CUPTI_ACTIVITY_KIND_MEMCPY   ? sizeof(CUpti_ActivityMemcpy6)
           : record->kind == CUPTI_ACTIVITY_KIND_MEMSET ? sizeof(CUpti_ActivityMemset4)
                                                        : sizeof(CUpti_ActivityKernel10);
}

}  // namespace

extern "C" {
CUptiResult cuptiActivityRegisterCallbacks(CUpti_BuffersCallbackRequestFunc request,
                                           CUpti_BuffersCallbackCompleteFunc complete) {
    want_buffer = request, take_buffer = complete;
    return CUPTI_SUCCESS;
}
CUptiResult cuptiActivityEnable(CUpti_ActivityKind kind) {
    enabled[kind] = true;
    return CUPTI_SUCCESS;
}
CUptiResult cuptiActivityGetNextRecord(uint8_t* buffer, size_t valid, CUpti_Activity** record) {
    auto* next = *record ? reinterpret_cast<uint8_t*>(*record) + size_of(*record) : buffer;
    if (next >= buffer + valid) return CUPTI_ERROR_MAX_LIMIT_REACHED;
    *record = reinterpret_cast<CUpti_Activity*>(next);
    return CUPTI_SUCCESS;
}
CUptiResult cuptiActivityGetNumDroppedRecords(CUcontext, uint32_t, size_t* dropped) {
    const char* drops = getenv("KEEL_FAKE_DROPS");
    *dropped = drops ? size_t(atoi(drops)) : 0;
    return CUPTI_SUCCESS;
}
CUptiResult cuptiGetResultString(CUptiResult, const char** text) {
    *text = "made up";
    return CUPTI_SUCCESS;
}
CUptiResult cuptiActivityFlushAll(uint32_t) {
    Buffer kernels, memory;  // two buffers, so that records do not come in the order of time
    using Kernel = CUpti_ActivityKernel10;
    for (uint64_t step = 0; step < 4; step++) {
        uint64_t t = 1000000 + step * 100000 + (step ? 1000000 : 0);
        auto kernel = [&](uint64_t begin, uint64_t end, void (*fill)(Kernel&)) {
            kernels.add<Kernel>(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, t + begin * 1000, t + end * 1000, fill);
        };
        memory.add<CUpti_ActivityMemcpy6>(CUPTI_ACTIVITY_KIND_MEMCPY, t + 4000, t + 5000,
                                          [](auto& r) { r.copyKind = CUPTI_ACTIVITY_MEMCPY_KIND_HTOD; });
        kernel(6, 26, [](Kernel& r) { r.name = "_Z7productIfLi2EEvPT_i"; });
        kernel(28, 88, [](Kernel& r) { r.name = "_Z7productIdLi2EEvPT_i"; });
        kernel(60, 92, [](Kernel& r) { r.name = "_ZN12_GLOBAL__N_16besideEPf"; });
        kernel(92, 98, [](Kernel& r) { r.name = "_Z12adamw_kernelPf"; });
        memory.add<CUpti_ActivityMemcpy6>(CUPTI_ACTIVITY_KIND_MEMCPY, t + 98000, t + 99000,
                                          [](auto& r) { r.copyKind = CUPTI_ACTIVITY_MEMCPY_KIND_DTOH; });
        memory.add<CUpti_ActivityMemset4>(CUPTI_ACTIVITY_KIND_MEMSET, t + 99000, t + 100000, [](auto&) {});
    }
    memory.deliver(), kernels.deliver();
    return CUPTI_SUCCESS;
}
}
