// Tests of nccl.h over MPI, each rank a process: CUDA_ON_CPU_NCCL_TIMEOUT=5 mpirun -np N build/test_nccl, N from 2 on.
// Exit 0 if all is well.
#include <nccl.h>

#include <cstdarg>

namespace {

int failed = 0, rank = 0, ranks = 0;

void expect(bool good, const char* what) {
    if (good) return;
    failed++;
    printf("FAILED on rank %d: %s\n", rank, what);
}
#define CHECK(condition) expect(condition, #condition)

template <class T>
std::vector<T> from_device(const T* p, size_t n) {
    std::vector<T> host(n);
    CHECK(cudaMemcpy(host.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess);
    return host;
}
template <class T>
T* to_device(const std::vector<T>& host) {
    T* p = nullptr;
    CHECK(cudaMalloc((void**)&p, host.size() * sizeof(T)) == cudaSuccess);
    CHECK(cudaMemcpy(p, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice) == cudaSuccess);
    return p;
}
float value(int r, size_t i) { return float(r + 1) * 0.1f + float(i) * 0.001f; }

}  // namespace

int main(int argc, char** argv) {
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank), MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    ncclUniqueId id{};
    if (rank == 0) CHECK(ncclGetUniqueId(&id) == ncclSuccess);
    MPI_Bcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD);
    ncclComm_t comm = nullptr;
    CHECK(ncclCommInitRank(&comm, ranks, id, rank) == ncclSuccess);
    cudaStream_t stream, side;
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking);

    constexpr size_t n = 37;
    size_t N = size_t(ranks);
    std::vector<float> mine(n * N);
    for (size_t i = 0; i < mine.size(); i++) mine[i] = value(rank, i);
    float *data = to_device(mine), *part = to_device(std::vector<float>(n)),
          *all = to_device(std::vector<float>(n * N)), *sum = to_device(std::vector<float>(n * N));

    // As a trainer does it: forked to a side stream and joined, recorded once, run three times.
    cudaEvent_t forked, joined;
    cudaEventCreateWithFlags(&forked, cudaEventDisableTiming),
        cudaEventCreateWithFlags(&joined, cudaEventDisableTiming);
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed);
    cudaEventRecord(forked, stream), cudaStreamWaitEvent(side, forked, 0);
    CHECK(ncclReduceScatter(data, part, n, ncclFloat32, ncclSum, comm, side) == ncclSuccess);
    CHECK(ncclAllGather(part, all, n, ncclFloat32, comm, side) == ncclSuccess);
    CHECK(ncclAllReduce(data, sum, n * N, ncclFloat32, ncclSum, comm, side) == ncclSuccess);
    cudaEventRecord(joined, side), cudaStreamWaitEvent(stream, joined, 0);
    CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
    CHECK(cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess);
    for (int turn = 0; turn < 3; turn++) CHECK(cudaGraphLaunch(exec, stream) == cudaSuccess);
    CHECK(cudaStreamSynchronize(stream) == cudaSuccess);
    std::vector<float> expected(n * N);
    for (size_t i = 0; i < expected.size(); i++)
        for (int r = 0; r < ranks; r++) expected[i] += value(r, i);  // in rank order: equal bits
    CHECK(from_device(all, n * N) == expected);
    CHECK(from_device(sum, n * N) == expected);
    CHECK(cuda_on_cpu::nccl_bytes_sent == 3 * (N - 1) * (n + n + n * N) * sizeof(float));

    // BF16, in place
    __nv_bfloat16* halves = to_device(std::vector<__nv_bfloat16>(4 * N, __nv_bfloat16(float(rank))));
    CHECK(ncclAllGather(halves + 4 * size_t(rank), halves, 4, ncclBfloat16, comm, stream) == ncclSuccess);
    CHECK(cudaStreamSynchronize(stream) == cudaSuccess);
    for (size_t i = 0; i < 4 * N; i++) CHECK(float(from_device(halves, 4 * N)[i]) == float(i / 4));

    // Memory that is not the device's is refused.
    CHECK(ncclAllGather(mine.data(), all, n, ncclFloat32, comm, stream) == ncclUnhandledCudaError);
    cuda_on_cpu::clear_misuse();
    comm->calls = 100;

    // Ranks that run different collectives are told.
    CHECK(ncclAllGather(part, all, rank == 0 ? n : n - 1, ncclFloat32, comm, stream) == ncclSuccess);
    cudaStreamSynchronize(stream);
    CHECK(cuda_on_cpu::last_misuse().find("NCCL: rank") != std::string::npos || comm->error != ncclSuccess);
    cuda_on_cpu::clear_misuse();
    MPI_Barrier(MPI_COMM_WORLD);

    // A rank that does not come: an asynchronous error, not a hang.
    comm->error = ncclSuccess, comm->calls = 200;
    if (rank != 0) {
        ncclResult_t error = ncclSuccess;
        CHECK(ncclAllGather(part, all, n, ncclFloat32, comm, stream) == ncclSuccess);
        CHECK(cudaStreamSynchronize(stream) == cudaSuccess);
        CHECK(ncclCommGetAsyncError(comm, &error) == ncclSuccess);
        CHECK(error == ncclRemoteError);
    }
    MPI_Barrier(MPI_COMM_WORLD);
    if (rank == 0) {  // late: what the others have sent is there
        CHECK(ncclAllGather(part, all, n, ncclFloat32, comm, stream) == ncclSuccess);
        CHECK(cudaStreamSynchronize(stream) == cudaSuccess);
        CHECK(comm->error == ncclSuccess);
    }
    int failures = 0;
    MPI_Reduce(&failed, &failures, 1, MPI_INT, MPI_SUM, 0, MPI_COMM_WORLD);
    if (rank == 0) printf("nccl.h over MPI, %d ranks\n%d passed, %d failed\n", ranks, failures == 0, failures != 0);
    MPI_Finalize();
    return failures != 0;
}
