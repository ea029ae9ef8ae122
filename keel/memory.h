// keel/memory.h: what memory there is, the table of what a run takes, and the micro-batch that fits.
#pragma once

#include <sys/resource.h>

#include "../keel_common.h"

// Bytes that this process may still take: the least that the machine, its control group and its address space leave.
inline uint64_t available_memory() {
    uint64_t available = SIZE_MAX;
    auto number = [](const char* path, const char* key) {  // the number after key, or the first; -1: there is none
        FILE* f = fopen(path, "r");
        if (!f) return -1LL;
        char word[256];
        long long value = -1;
        if (!key) {
            if (fscanf(f, "%lld", &value) != 1) value = -1;
        } else {
            while (value < 0 && fscanf(f, "%255s", word) == 1)
                if (std::string(word) == key && fscanf(f, "%lld", &value) != 1) break;
        }
        fclose(f);
        return value;
    };
    if (long long kib = number("/proc/meminfo", "MemAvailable:"); kib >= 0)
        available = std::min(available, uint64_t(kib) * 1024);
    else  // macOS: all that there is
        available = std::min(available, uint64_t(sysconf(_SC_PHYS_PAGES)) * uint64_t(sysconf(_SC_PAGESIZE)));
    const char* groups[][3] = {
        {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"},
        {"/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes",
         "/sys/fs/cgroup/memory/memory.stat"}};
    for (auto& g : groups) {
        long long limit = number(g[0], nullptr), used = number(g[1], nullptr), cache = number(g[2], "inactive_file");
        if (limit < 0 || used < 0) continue;
        used = std::max(0LL, used - std::max(0LL, cache));  // page cache is given back on demand
        available = std::min(available, uint64_t(std::max(0LL, limit - used)));
    }
    struct rlimit limit;
    if (getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) {
        long long pages = number("/proc/self/statm", nullptr), taken = std::max(0LL, pages) * sysconf(_SC_PAGESIZE);
        available = std::min(available, uint64_t(std::max(0LL, (long long)limit.rlim_cur - taken)));
    }
    return available;
}

struct MemoryRow {
    std::string name;
    uint64_t bytes;  // of a need, which may be more than the machine can address
};

// advice: the flags that would make it fit.
inline void require_memory(uint64_t bytes, uint64_t available, const char* advice) {
    if (bytes > available)
        fail("memory: expected at least %s, found %s; use %s", bytes_text(double(bytes)), bytes_text(double(available)),
             advice);
}

inline uint64_t total_bytes(const std::vector<MemoryRow>& rows) {
    uint64_t sum = 0;
    for (const MemoryRow& row : rows) sum += row.bytes;
    return sum;
}

inline void print_memory_table(const std::vector<MemoryRow>& rows) {
    for (const MemoryRow& row : rows) print("  %-38s %12s\n", row.name, bytes_text(double(row.bytes)));
    print("  %-38s %12s\n", "in all", bytes_text(double(total_bytes(rows))));
}

// Chooses the micro-batch and the level of recomputation where B = 0 and `auto` leave them open: the pair of least cost
// that fits into `available` bytes, and in as few sub-layers as leave `unplanned` bytes for what no plan holds.
// most_tokens: the largest micro-batch to try, unless one sequence is longer. bytes(B, recompute), cost(B, recompute):
// the memory that a run takes, and its time a token in any unit.
template <class Bytes, class Cost>
void choose_micro_batch(RunConfig& run, uint64_t available, uint64_t unplanned, int64_t most_tokens, Bytes bytes,
                        Cost cost) {
    // -r K has K slots of activations and of z, 18 C bytes each in BF16, and L/K of z alone, 4 C: least at K =
    // sqrt(2L/9).
    int root = 2;
    while (9 * (root + 2) * (root + 2) <= 2 * run.model.L) root += 2;
    std::vector<Recompute> levels = {{0}, {-1, 0}, {1, 0}, {root}};
    if (run.recompute_chosen) levels = {run.recompute};
    std::vector<int> batches;
    int64_t sequences = run.rank_sequences();
    for (int64_t B = std::min<int64_t>(sequences, MAX_B); B >= 1; B--)
        if (sequences % B == 0 && (B * run.T <= most_tokens || B == 1)) batches.push_back(int(B));
    if (run.B) batches = {run.B};
    double best = INFINITY;
    RunConfig chosen = run;
    // Least bytes: of what is tried, of a micro-batch of 1, by any -r.
    uint64_t least = UINT64_MAX, least_of_one = UINT64_MAX, least_of_any = UINT64_MAX;
    for (int B : batches)
        for (Recompute level : levels) {
            if (level.first == 0) {  // still to be chosen
                int too_few = 0;
                level.first = run.model.L;
                while (level.first - too_few > 2) {
                    int middle = (too_few + level.first) / 4 * 2;
                    (bytes(B, {level.level, middle}) <= available - unplanned ? level.first : too_few) = middle;
                }
            }
            uint64_t needed = bytes(B, level);
            double c = cost(B, level);
            least = std::min(least, needed);
            if (needed > available || c >= best) continue;
            best = c, chosen.B = B, chosen.recompute = level;
        }
    if (best == INFINITY) {
        for (Recompute level : levels) least_of_one = std::min(least_of_one, bytes(1, {level.level}));
        for (Recompute level : {Recompute{1}, Recompute{root}})
            for (int B : batches) least_of_any = std::min(least_of_any, bytes(B, level));
        require_memory(least, available,
                       run.B > 1 && least_of_one <= available              ? "a smaller -b"
                       : run.recompute_chosen && least_of_any <= available ? "-r auto"
                                                                           : "a smaller -C, -L or -t");
    }
    run = chosen;
}

// Where the z and the activations of each sub-layer lie. Each kind has a buffer of slots, and a slot holds one
// sub-layer's. What is kept until the backward pass has a slot of its own; the rest shares slots.
struct ActivationSlots {
    size_t L, K;          // sub-layers; every K-th z is kept
    size_t count;         // slots of a sub-layer's activations, half of them attention's
    size_t shared = 0;    // the first sub-layers, which share two of them
    size_t shared_u = 0;  // the first sub-layers, which share a slot of u and one of GELU's output
    ActivationSlots(int L, Recompute r) : L(size_t(L)), K(r.segments() ? size_t(r.level) : 1), count(size_t(L)) {
        size_t first = size_t(std::min(L, r.first));
        if (r.segments()) count = std::min(K, count);
        if (r.level == -1) shared_u = first;
        if (r.level == 1) shared_u = count, shared = first, count -= shared ? shared - 2 : 0;
    }

    size_t kept_z() const { return (L + K - 1) / K + 1; }    // x_0 = "z_{-1}", every K-th z from there, z_{L-1}
    size_t segment_z() const { return std::min(K, L) - 1; }  // the z between two kept ones
    bool z_is_kept(int l) const { return size_t(l + 1) % K == 0 || size_t(l + 1) == L; }
    size_t z_slot(int l) const { return z_is_kept(l) ? (size_t(l + 1) + K - 1) / K : size_t(l + 1) % K - 1; }

    // The slot of sub-layer l; an attention's qkv, y and lse and a feed-forward's h are in slot of(l) / 2.
    size_t of(int l) const {
        if (!shared) return size_t(l) % count;
        return size_t(l) < shared ? size_t(l) % 2 : size_t(l) - shared + 2;
    }
    size_t u_count() const { return shared_u ? 1 + L - shared_u : count; }
    size_t gelu_count() const { return shared_u ? 1 + (L - shared_u) / 2 : count / 2; }
    size_t u_of(int l) const { return !shared_u ? of(l) : size_t(l) < shared_u ? 0 : 1 + size_t(l) - shared_u; }
    size_t gelu_of(int l) const { return u_of(l) / 2; }  // of a feed-forward
};
