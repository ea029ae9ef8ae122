// keel/mpi.h: what travels between the ranks of the CPU trainer.
//
// Each rank sends every other rank that one's shard and adds what it receives in rank order: the same bits in every
// run, whatever the network does. A rank sends (N-1)/N of a bucket's bytes, as in a ring. MPI is polled rather than
// waited for: a call that waits for a dead rank would hang, and the lifeline (keel/ranks.h) tells that one has died.
#pragma once

#include "matmul.h"
#include "ranks.h"

class Communicator {
public:
    struct UniqueId {  // MPI needs none
        explicit UniqueId(bool) {}
    };
    static std::string device() { return ""; }
    Communicator(const Launch& launch, const UniqueId&) : rank(size_t(launch.rank)), ranks(size_t(launch.ranks)) {}

    // all (ranks, bytes) = mine (bytes) of every rank, in rank order
    void gather(const void* mine, void* all, size_t bytes) {
        char* to = static_cast<char*>(all);
        if (mine != to + rank * bytes) memcpy(to + rank * bytes, mine, bytes);
        exchange([&](size_t) { return static_cast<const char*>(mine); }, [&](size_t r) { return to + r * bytes; },
                 bytes);
    }

    // bucket (ranks, shard): every rank's own shard goes to all
    void all_gather(real* bucket, size_t shard) { gather(bucket + rank * shard, bucket, shard * sizeof(real)); }

    // sum (shard) += this rank's shard of bucket (ranks, shard), added up over the ranks in their order
    void reduce_scatter(real* sum, const real* bucket, size_t shard) {
        if (received.size() < ranks * shard) received = Buffer<real>(ranks * shard);
        exchange([&](size_t r) { return reinterpret_cast<const char*>(bucket + r * shard); },
                 [&](size_t r) { return reinterpret_cast<char*>(received.data() + r * shard); }, shard * sizeof(real));
        #pragma omp parallel for simd schedule(static)
        for (index_t i = 0; i < index_t(shard); i++) {
            real total = 0;
            for (size_t r = 0; r < ranks; r++)
                total += r == rank ? bucket[rank * shard + size_t(i)] : received[r * shard + size_t(i)];
            sum[i] += total;
        }
    }

    size_t bytes_sent() const { return sent; }

    // Bytes of `received` for the largest reduce_scatter.
    static size_t bytes(const ParameterLayout& layout) {
        size_t largest = 0;
        for (const Bucket& b : layout.buckets) largest = std::max(largest, b.shard * size_t(layout.ranks));
        return largest * sizeof(real);
    }

private:
    size_t rank, ranks, sent = 0;
    Buffer<real> received;
    std::vector<MPI_Request> requests;

    template <class From, class To>
    void exchange(From from, To to, size_t bytes) {
        constexpr size_t most = size_t(1) << 30;  // bytes of a message, as MPI counts in int
        requests.clear();
        for (size_t distance = 1; distance < ranks; distance++) {
            size_t next = (rank + distance) % ranks, before = (rank + ranks - distance) % ranks;
            for (size_t at = 0; at < bytes; at += most) {
                int n = int(std::min(most, bytes - at));
                MPI_Request* in = &requests.emplace_back();
                check_mpi(MPI_Irecv(to(before) + at, n, MPI_BYTE, int(before), 0, MPI_COMM_WORLD, in), "MPI_Irecv");
                MPI_Request* out = &requests.emplace_back();
                check_mpi(MPI_Isend(from(next) + at, n, MPI_BYTE, int(next), 0, MPI_COMM_WORLD, out), "MPI_Isend");
            }
            sent += bytes;
        }
        for (int done = requests.empty(), tests = 0; !done; tests++) {
            check_mpi(MPI_Testall(int(requests.size()), requests.data(), &done, MPI_STATUSES_IGNORE), "MPI_Testall");
            if (!done && tests > 100) usleep(50);  // microseconds in which the awaited rank may have the core
        }
    }
};
