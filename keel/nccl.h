// keel/nccl.h: what travels between the GPUs of a run.
//
// One communicator and one stream of its own, beside the stream that computes; events fork and join them, in a graph as
// outside one. All ranks make the same calls in the same order. NCCL's sums depend on the number of ranks and the
// network's shape alone, so each run of a machine has the same bits.

#pragma once

#include "gpu.h"
#include "ranks.h"
#ifdef KEEL_NCCL
#include <nccl.h>

inline void check(ncclResult_t result, const char* what) {
    if (result != ncclSuccess) fail("%s: %s; NCCL_DEBUG=INFO says more", what, ncclGetErrorString(result));
}
#define NCCL(call) check(call, #call)

class Communicator {
public:
    struct UniqueId {  // what rank 0 gives all
        ncclUniqueId id{};
        explicit UniqueId(bool first) {
            if (first) NCCL(ncclGetUniqueId(&id));
        }
    };
    // Multiprocessors that NCCL's kernels take at most, and that products leave them while gradients are on their way.
    static constexpr int MULTIPROCESSORS = 16;

    const size_t rank, ranks;
    cudaStream_t stream = nullptr;
    size_t bytes_sent =
        0;  // by this rank, as a ring sends them, of what has been asked for so far: a graph's launches are not counted

    Communicator(const Launch& launch, const UniqueId& unique_id)
        : rank(size_t(launch.rank)), ranks(size_t(launch.ranks)) {
        int devices = 0;
        CUDA(cudaGetDeviceCount(&devices));
        CUDA(cudaSetDevice(launch.local_rank % devices));  // a launcher may also show each process its own GPU alone
        setenv("NCCL_ALGO", "Ring",
               0);  // every collective alike, whatever its size: the order of its sums is the ring's
        ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
        config.maxCTAs = MULTIPROCESSORS;
        NCCL(ncclCommInitRankConfig(&comm, launch.ranks, unique_id.id, launch.rank, &config));
        CUDA(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking,
                                          -5));  // the highest there is: what it waits for is the network
        for (cudaEvent_t* event : {&forked, &joined}) CUDA(cudaEventCreateWithFlags(event, cudaEventDisableTiming));
    }
    ~Communicator() {
        if (comm) ncclCommDestroy(comm);
        cudaEventDestroy(forked), cudaEventDestroy(joined);
        cudaStreamDestroy(stream);
    }
    Communicator(const Communicator&) = delete;
    Communicator& operator=(const Communicator&) = delete;

    // What is on its way is given up, as this rank ends by an error.
    void abort() {
        if (comm) ncclCommAbort(std::exchange(comm, nullptr));
    }

    // What comes next on our stream follows all that is on the other; and the reverse.
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
    // bucket (ranks, shard): each rank's shard to all
    template <class T>
    void all_gather(T* bucket, size_t shard) {
        NCCL(ncclAllGather(bucket + rank * shard, bucket, shard * sizeof(T), ncclInt8, comm, stream));
        bytes_sent += (ranks - 1) * shard * sizeof(T);
    }

    // Waits for the event, and sees meanwhile whether the network still works.
    void wait(cudaEvent_t event) {
        for (int queries = 1;; queries++) {
            cudaError_t state = cudaEventQuery(event);
            if (state == cudaSuccess) return;
            if (state != cudaErrorNotReady) check(state, "a step of this rank");
            if (queries % 64) continue;
            ncclResult_t error = ncclSuccess;
            NCCL(ncclCommGetAsyncError(comm, &error));
            if (error != ncclSuccess && error != ncclInProgress) check(error, "NCCL, between this rank and others");
            std::this_thread::yield();
        }
    }

    // all (ranks, bytes) on the host from mine (bytes) of each rank
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
using Communicator = NoCommunicator;
#endif
