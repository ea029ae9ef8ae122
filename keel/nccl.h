// keel/nccl.h: what travels between the GPUs of a run.
//
// One communicator has a stream of its own beside the stream that computes; events fork and join the two, inside a
// graph and outside. All ranks make the same calls in the same order. NCCL's sums depend only on the number of ranks
// and the network's shape, so that every run on the same machines has the same bits.
#pragma once

#include "cublaslt.h"
#include "ranks.h"
#ifdef KEEL_NCCL
#include <nccl.h>

inline void check(ncclResult_t result, const char* what) {
    if (result != ncclSuccess)
        fail("%s: expected ranks that reach each other, found: %s; run again with NCCL_DEBUG=INFO, which says more",
             what, ncclGetErrorString(result));
}
#define NCCL(call) check(call, #call)

class Communicator {
public:
    struct UniqueId {  // the communicator's id, which rank 0 makes for all
        ncclUniqueId id{};
        explicit UniqueId(bool first) {
            if (first) NCCL(ncclGetUniqueId(&id));
        }
    };
    static constexpr const char* NAME = "NCCL";
    static std::string device() {  // no two ranks may have the same
        std::string uuid;
        for (char byte : gpu_properties().uuid.bytes) uuid += format("%02x", byte & 0xff);
        return "the GPU of UUID " + uuid;
    }
    // Multiprocessors that NCCL's kernels may take, and that products leave to them while gradients are on their way.
    static constexpr int MULTIPROCESSORS = 16;

    const size_t rank, ranks;
    cudaStream_t stream = nullptr;
    size_t bytes_sent = 0;  // by this rank's calls so far, as a ring sends them; a graph's replays are not counted

    Communicator(const Launch& launch, const UniqueId& unique_id)
        : rank(size_t(launch.rank)), ranks(size_t(launch.ranks)) {
        setenv("NCCL_ALGO", "Ring", 0);  // whatever a message's size: the ring fixes the order of its sums
        ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
        config.maxCTAs = MULTIPROCESSORS;
        NCCL(ncclCommInitRankConfig(&comm, launch.ranks, unique_id.id, launch.rank, &config));
        // -5 is the highest priority: this stream waits for the network, not for multiprocessors.
        CUDA(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, -5));
        for (cudaEvent_t* event : {&forked, &joined}) CUDA(cudaEventCreateWithFlags(event, cudaEventDisableTiming));
    }
    ~Communicator() {
        if (comm) ncclCommDestroy(comm);
        cudaEventDestroy(forked), cudaEventDestroy(joined);
        cudaStreamDestroy(stream);
    }
    Communicator(const Communicator&) = delete;
    Communicator& operator=(const Communicator&) = delete;

    // fork: what comes next on the communicator's stream waits for all that `from` holds; join is the reverse.
    void fork(cudaStream_t from) {
        CUDA(cudaEventRecord(forked, from));
        CUDA(cudaStreamWaitEvent(stream, forked, 0));
    }
    void join(cudaStream_t to) {
        CUDA(cudaEventRecord(joined, stream));
        CUDA(cudaStreamWaitEvent(to, joined, 0));
    }

    // sum (shard) = this rank's shard of bucket (ranks, shard), added up over the ranks
    void reduce_scatter(float* sum, const float* bucket, size_t shard) {
        NCCL(ncclReduceScatter(bucket, sum, shard, ncclFloat32, ncclSum, comm, stream));
        bytes_sent += (ranks - 1) * shard * sizeof(float);
    }
    // bucket (ranks, shard): every rank's own shard goes to all
    template <class T>
    void all_gather(T* bucket, size_t shard) {
        NCCL(ncclAllGather(bucket + rank * shard, bucket, shard * sizeof(T), ncclInt8, comm, stream));
        bytes_sent += (ranks - 1) * shard * sizeof(T);
    }

    // Waits for the event, and looks meanwhile whether the network still works.
    void wait(cudaEvent_t event) {
        for (int queries = 1;; queries++) {
            cudaError_t state = cudaEventQuery(event);
            if (state == cudaSuccess) return;
            if (state != cudaErrorNotReady) check(state, "cudaEventQuery, a step of this rank");
            if (queries % 64) continue;
            ncclResult_t error = ncclSuccess;
            NCCL(ncclCommGetAsyncError(comm, &error));
            if (error != ncclSuccess && error != ncclInProgress) check(error, "NCCL, between this rank and others");
            std::this_thread::yield();
        }
    }

    // all (ranks, bytes) = mine (bytes) of every rank, in rank order, on the host
    void gather(const void* mine, void* all, size_t bytes) {
        if (host.size() < ranks * bytes)
            host = PinnedArray<char>(ranks * bytes), memory = DeviceArray<char>(ranks * bytes);
        memcpy(host.data(), mine, bytes);
        CUDA(cudaMemcpyAsync(memory.data() + rank * bytes, host.data(), bytes, cudaMemcpyDefault, stream));
        NCCL(ncclAllGather(memory.data() + rank * bytes, memory.data(), bytes, ncclInt8, comm, stream));
        CUDA(cudaMemcpyAsync(host.data(), memory.data(), ranks * bytes, cudaMemcpyDefault, stream));
        CUDA(cudaEventRecord(joined, stream));
        wait(joined);
        memcpy(all, host.data(), ranks * bytes);
    }

private:
    ncclComm_t comm = nullptr;
    cudaEvent_t forked = nullptr, joined = nullptr;
    PinnedArray<char> host;
    DeviceArray<char> memory;
};
#else
// Without NCCL a run is of one rank, which has no communicator: nobody calls these.
struct Communicator : NoCommunicator {
    using NoCommunicator::NoCommunicator;
    static constexpr const char* NAME = nullptr;
    static constexpr int MULTIPROCESSORS = 0;
    size_t rank = 0, ranks = 1, bytes_sent = 0;
    cudaStream_t stream = nullptr;
    void fork(cudaStream_t) {}
    void join(cudaStream_t) {}
    void reduce_scatter(float*, const float*, size_t) {}
    template <class T>
    void all_gather(T*, size_t) {}
    void wait(cudaEvent_t) {}
};
#endif

// While gradients travel NCCL's kernels are at work too: a product over all multiprocessors would wait for them. And
// all ranks run the algorithms that rank 0 has measured.
inline void share_products(Device& device, Communicator& communicator) {
    int all = gpu_properties().multiProcessorCount;
    if (communicator.ranks > 1 && all >= 4 * Communicator::MULTIPROCESSORS)
        device.product_multiprocessors = all - Communicator::MULTIPROCESSORS;
    device.agree = [&communicator](cublasLtMatmulAlgo_t& algorithm) {
        std::vector<char> of_all(communicator.ranks * sizeof algorithm);
        communicator.gather(&algorithm, of_all.data(), sizeof algorithm);
        memcpy(&algorithm, of_all.data(), sizeof algorithm);
    };
}
