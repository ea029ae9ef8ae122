// NCCL's reduce-scatter, all-gather and all-reduce on the CPU, over MPI: stream operations that graphs record, each sum
// in rank order.
//
// A collective runs when its turn comes in the stream, and then waits for the other ranks, which must come to the same
// one: each tells the others which call of the host this is. A rank that does not come in time ends the wait with an
// asynchronous error, as a dead one does on a card.
#pragma once

#include <mpi.h>
#include <unistd.h>

#include "cuda_bf16.h"
#include "cuda_runtime.h"

#define NCCL_MAJOR 2
#define NCCL_MINOR 28
#define NCCL_UNIQUE_ID_BYTES 128

enum ncclResult_t {
    ncclSuccess = 0,
    ncclUnhandledCudaError = 1,
    ncclSystemError = 2,
    ncclInternalError = 3,
    ncclInvalidArgument = 4,
    ncclInvalidUsage = 5,
    ncclRemoteError = 6,
    ncclInProgress = 7
};
enum ncclDataType_t {
    ncclInt8 = 0,
    ncclChar = 0,
    ncclUint8 = 1,
    ncclInt32 = 2,
    ncclUint32 = 3,
    ncclInt64 = 4,
    ncclUint64 = 5,
    ncclFloat32 = 7,
    ncclFloat = 7,
    ncclFloat64 = 8,
    ncclDouble = 8,
    ncclBfloat16 = 9
};
enum ncclRedOp_t { ncclSum = 0 };
struct ncclUniqueId { char internal[NCCL_UNIQUE_ID_BYTES]; };
struct ncclConfig_t { int blocking, cgaClusterSize, minCTAs, maxCTAs; };  // nothing here follows from them
#define NCCL_CONFIG_INITIALIZER {1, 0, 0, 0}

struct ncclComm {
    MPI_Comm mpi = MPI_COMM_NULL;  // none: a single rank without MPI
    int rank = 0, ranks = 1;
    uint64_t calls = 0;  // collectives that the host has asked for
    ncclResult_t error = ncclSuccess;
    bool aborted = false;
};
typedef ncclComm* ncclComm_t;

namespace cuda_on_cpu {

inline std::atomic<size_t> nccl_bytes_sent = 0, nccl_collectives = 0;

inline double nccl_seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
// Seconds that a collective waits for the other ranks.
inline double nccl_timeout() {
    static const double seconds = getenv("CUDA_ON_CPU_NCCL_TIMEOUT") ? atof(getenv("CUDA_ON_CPU_NCCL_TIMEOUT")) : 120;
    return seconds;
}

inline size_t nccl_type_bytes(ncclDataType_t type) {
    switch (type) {
        case ncclInt8:
        case ncclUint8:
            return 1;
        case ncclBfloat16:
            return 2;
        case ncclInt32:
        case ncclUint32:
        case ncclFloat32:
            return 4;
        case ncclInt64:
        case ncclUint64:
        case ncclFloat64:
            return 8;
    }
    return 0;
}

// What the ranks must agree on. Aligned as it travels before the data.
struct NcclCall {
    uint64_t number, kind, type, count;
    bool operator==(const NcclCall&) const = default;
};

// Sends out(r) to every other rank r and fills in(r) from it, bytes each. False if one does not come, or comes with
// another call.
template <class Out, class In>
bool nccl_exchange(ncclComm& comm, const NcclCall& call, size_t bytes, Out out, In in) {
    if (comm.aborted || comm.error) return false;
    nccl_collectives++;
    if (comm.ranks == 1) return true;
    size_t whole = sizeof(NcclCall) + bytes, others = size_t(comm.ranks) - 1;
    std::vector<char> sent(whole * others), received(whole * others);
    std::vector<MPI_Request> requests(2 * others, MPI_REQUEST_NULL);
    auto peer = [&](size_t i) { return int((size_t(comm.rank) + 1 + i) % size_t(comm.ranks)); };
    if (whole > size_t(INT32_MAX)) {
        report_misuse("nccl.h on the CPU: expected at most 2 GiB of a rank, found more", true);
        return false;
    }
    for (size_t i = 0; i < others; i++) {
        memcpy(&sent[i * whole], &call, sizeof call);
        memcpy(&sent[i * whole + sizeof call], out(peer(i)), bytes);
        MPI_Irecv(&received[i * whole], int(whole), MPI_BYTE, peer(i), 0, comm.mpi, &requests[2 * i]);
        MPI_Isend(&sent[i * whole], int(whole), MPI_BYTE, peer(i), 0, comm.mpi, &requests[2 * i + 1]);
    }
    int done = 0;
    double until = nccl_seconds() + nccl_timeout();
    for (int turns = 0; !done; turns++) {
        if (MPI_Testall(int(requests.size()), requests.data(), &done, MPI_STATUSES_IGNORE) != MPI_SUCCESS ||
            comm.aborted || (!done && nccl_seconds() > until)) {
            comm.error = ncclRemoteError;
            // What MPI still has of these buffers is never to be touched again.
            new std::vector<char>(std::move(sent)), new std::vector<char>(std::move(received)),
                new std::vector<MPI_Request>(std::move(requests));
            return false;
        }
        if (!done && turns > 100) usleep(50);
    }
    for (size_t i = 0; i < others; i++) {
        NcclCall theirs;
        memcpy(&theirs, &received[i * whole], sizeof theirs);
        if (!(theirs == call)) {
            char text[400];
            snprintf(text, sizeof text,
                     "NCCL: rank %d runs collective %llu (kind %llu, %llu elements of type %llu), and rank %d "
                     "collective %llu (kind %llu, %llu of type %llu)",
                     comm.rank, (unsigned long long)call.number, (unsigned long long)call.kind,
                     (unsigned long long)call.count, (unsigned long long)call.type, peer(i),
                     (unsigned long long)theirs.number, (unsigned long long)theirs.kind,
                     (unsigned long long)theirs.count, (unsigned long long)theirs.type);
            report_misuse(text, true);
            return false;
        }
        memcpy(in(peer(i)), &received[i * whole + sizeof call], bytes);
    }
    nccl_bytes_sent += bytes * others;
    return true;
}

// out (count) = the sum over the ranks, in their order, of parts (ranks, count)
template <class T>
void nccl_add(T* out, const std::vector<char>& parts, size_t ranks, size_t count) {
    const T* from = reinterpret_cast<const T*>(parts.data());
    for (size_t i = 0; i < count; i++) {
        if constexpr (sizeof(T) == 2) {
            float sum = 0;
            for (size_t r = 0; r < ranks; r++) sum += float(from[r * count + i]);
            out[i] = T(sum);
        } else {
            T sum = from[i];
            for (size_t r = 1; r < ranks; r++) sum += from[r * count + i];
            out[i] = sum;
        }
    }
}
inline void nccl_add(void* out, const std::vector<char>& parts, size_t ranks, size_t count, ncclDataType_t type) {
    if (type == ncclFloat32) nccl_add(static_cast<float*>(out), parts, ranks, count);
    else if (type == ncclFloat64) nccl_add(static_cast<double*>(out), parts, ranks, count);
    else if (type == ncclBfloat16) nccl_add(static_cast<__nv_bfloat16*>(out), parts, ranks, count);
    else nccl_add(static_cast<int32_t*>(out), parts, ranks, count);
}

template <class Body>
ncclResult_t nccl_enqueue(ncclComm_t comm, const char* name, const void* send, size_t send_bytes, void* receive,
                          size_t receive_bytes, cudaStream_t stream, Body body) {
    if (!comm || !send || !receive) return ncclInvalidArgument;
    cudaError_t error = api([&](Streams& s) {
        for (auto [pointer, bytes] : {std::pair<const void*, size_t>{send, send_bytes}, {receive, receive_bytes}})
            if (!memory().contains(pointer, bytes)) {
                report_misuse(std::string(name) + ": expected its buffers inside one device allocation each, found one "
                                                  "outside",
                              true);
                return cudaErrorInvalidValue;
            }
        return s.enqueue(stream, cudaGraphNodeTypeKernel, std::move(body));
    }, false, name);
    return error ? ncclUnhandledCudaError : ncclSuccess;
}

struct NcclTrace {
    ~NcclTrace() {
        if (nccl_collectives && settings().trace)
            printf("nccl: %zu bytes sent in %zu collectives\n", size_t(nccl_bytes_sent), size_t(nccl_collectives));
    }
};
inline NcclTrace nccl_trace;

}  // namespace cuda_on_cpu

inline const char* ncclGetErrorString(ncclResult_t result) {
    const char* texts[] = {"no error",
                           "unhandled cuda error",
                           "unhandled system error",
                           "internal error",
                           "invalid argument",
                           "invalid usage",
                           "remote process exited or there was a network error",
                           "NCCL operation in progress"};
    return result >= 0 && result <= 7 ? texts[result] : "unknown result code";
}
inline const char* ncclGetLastError(ncclComm_t) { return ""; }
inline ncclResult_t ncclGetVersion(int* version) {
    return *version = NCCL_MAJOR * 10000 + NCCL_MINOR * 100, ncclSuccess;
}
inline ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "nccl.h on the CPU, %d", int(getpid()));
    return ncclSuccess;
}
inline ncclResult_t ncclCommInitRank(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank) {
    int started = 0, mpi_ranks = 0, mpi_rank = 0;
    if (ranks < 1 || rank < 0 || rank >= ranks || strncmp(id.internal, "nccl.h on the CPU", 17) != 0)
        return ncclInvalidArgument;
    *comm = new ncclComm;
    (*comm)->rank = rank, (*comm)->ranks = ranks;
    if (ranks == 1) return ncclSuccess;
    MPI_Initialized(&started);
    if (!started) return ncclSystemError;
    MPI_Comm_size(MPI_COMM_WORLD, &mpi_ranks), MPI_Comm_rank(MPI_COMM_WORLD, &mpi_rank);
    if (mpi_ranks != ranks || mpi_rank != rank) return ncclInvalidUsage;
    MPI_Comm_dup(MPI_COMM_WORLD, &(*comm)->mpi);
    MPI_Comm_set_errhandler((*comm)->mpi, MPI_ERRORS_RETURN);
    return ncclSuccess;
}
inline ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank, ncclConfig_t*) {
    return ncclCommInitRank(comm, ranks, id, rank);
}
inline ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
    return *error = comm->error, ncclSuccess;
}
inline ncclResult_t ncclCommAbort(ncclComm_t comm) {
    return comm->aborted = true, ncclSuccess;
}  // what is queued may still look at it
inline ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    if (comm->mpi != MPI_COMM_NULL) MPI_Comm_free(&comm->mpi);
    delete comm;
    return ncclSuccess;
}

// receive (count) = this rank's part, of send (ranks, count), of the sum over the ranks
inline ncclResult_t ncclReduceScatter(const void* send, void* receive, size_t count, ncclDataType_t type, ncclRedOp_t,
                                      ncclComm_t comm, cudaStream_t stream) {
    using namespace cuda_on_cpu;
    if (!comm) return ncclInvalidArgument;
    size_t bytes = count * nccl_type_bytes(type), ranks = size_t(comm->ranks), rank = size_t(comm->rank);
    if (type != ncclFloat32 && type != ncclFloat64 && type != ncclBfloat16 && type != ncclInt32)
        return ncclInvalidArgument;
    NcclCall call{comm->calls++, 1, uint64_t(type), count};
    return nccl_enqueue(comm, "ncclReduceScatter", send, bytes * ranks, receive, bytes, stream, [=] {
        std::vector<char> whole(bytes * ranks), parts(bytes * ranks);
        memcpy(whole.data(), send, whole.size());
        memset(receive, settings().poison, bytes);
        memcpy(&parts[rank * bytes], &whole[rank * bytes], bytes);
        if (nccl_exchange(*comm, call, bytes, [&](int r) { return &whole[size_t(r) * bytes]; },
                          [&](int r) { return &parts[size_t(r) * bytes]; }))
            nccl_add(receive, parts, ranks, count, type);
    });
}

// receive (ranks, count) = send (count) of each rank; send may be its place in receive
inline ncclResult_t ncclAllGather(const void* send, void* receive, size_t count, ncclDataType_t type, ncclComm_t comm,
                                  cudaStream_t stream) {
    using namespace cuda_on_cpu;
    if (!comm) return ncclInvalidArgument;
    size_t bytes = count * nccl_type_bytes(type), ranks = size_t(comm->ranks), rank = size_t(comm->rank);
    NcclCall call{comm->calls++, 2, uint64_t(type), count};
    return nccl_enqueue(comm, "ncclAllGather", send, bytes, receive, bytes * ranks, stream, [=] {
        std::vector<char> mine(bytes), all(bytes * ranks);
        memcpy(mine.data(), send, bytes);
        memset(receive, settings().poison, bytes * ranks);
        memcpy(&all[rank * bytes], mine.data(), bytes);
        if (nccl_exchange(*comm, call, bytes, [&](int) { return mine.data(); },
                          [&](int r) { return &all[size_t(r) * bytes]; }))
            memcpy(receive, all.data(), all.size());
    });
}

// receive (count) = the sum over the ranks of send (count)
inline ncclResult_t ncclAllReduce(const void* send, void* receive, size_t count, ncclDataType_t type, ncclRedOp_t,
                                  ncclComm_t comm, cudaStream_t stream) {
    using namespace cuda_on_cpu;
    if (!comm) return ncclInvalidArgument;
    if (type != ncclFloat32 && type != ncclFloat64 && type != ncclBfloat16 && type != ncclInt32)
        return ncclInvalidArgument;
    size_t bytes = count * nccl_type_bytes(type), ranks = size_t(comm->ranks), rank = size_t(comm->rank);
    NcclCall call{comm->calls++, 3, uint64_t(type), count};
    return nccl_enqueue(comm, "ncclAllReduce", send, bytes, receive, bytes, stream, [=] {
        std::vector<char> mine(bytes), parts(bytes * ranks);
        memcpy(mine.data(), send, bytes);
        memset(receive, settings().poison, bytes);
        memcpy(&parts[rank * bytes], mine.data(), bytes);
        if (nccl_exchange(*comm, call, bytes, [&](int) { return mine.data(); },
                          [&](int r) { return &parts[size_t(r) * bytes]; }))
            nccl_add(receive, parts, ranks, count, type);
    });
}
