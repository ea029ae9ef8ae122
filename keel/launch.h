// keel/launch.h: who this process is among the ranks of a run, as the launcher's environment says, and how long it
// waits for the others.
#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>

#include "../keel_common.h"

// The start's limits, in seconds. Tests make them smaller.
struct StartLimits {
    static inline double all = 120;     // until all ranks must have connected
    static inline double patience = 5;  // until rank 0 says that it waits, and the others after twice as long
    static inline double rank_0 = 3;    // in which rank 0 says what all have in common, and its end ends the others
};

// This process among those that mpirun, srun or another launcher has started.
struct Launch {
    int rank = 0, ranks = 0;               // ranks 0: alone
    int local_rank = -1, local_ranks = 0;  // among the ranks on this machine; local_rank -1, local_ranks 0: not known
    std::string launcher;                  // "": none
    std::string rank_variable, ranks_variable;  // of the environment, which have said so
    std::string warning;                        // where the environment speaks of ranks that no launcher has started

    // Several launchers' variables may be there. The first with more than one rank counts: mpirun under srun has
    // srun's of its daemon beside it, and a shell of srun or mpirun is one process, in which another may start more.
    static Launch from_environment() {
        static const struct Row {  // the variables' names; mark: one that has to be there as well
            const char *launcher, *mark, *rank, *ranks, *local_rank, *local_ranks;
        } launchers[] = {
            // On a node where srun or mpirun has started torchrun, which has started this.
            {"torchrun", "TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"},
            {"mpirun", nullptr, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
             "OMPI_COMM_WORLD_LOCAL_SIZE"},
            {"mpirun", nullptr, "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"},
            // Set by srun for its step; SLURM_NTASKS is set in a batch script as well, which is one process.
            {"srun", nullptr, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"},
            {"RANK and WORLD_SIZE", nullptr, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"},
        };
        Launch l;
        for (const Row& row : launchers) {
            if ((row.mark && !getenv(row.mark)) || !getenv(row.rank) || !getenv(row.ranks)) continue;
            int ranks = int(parse(row.ranks, 1, MAX_RANKS, row.rank));
            if (l.ranks > 0 && ranks == 1) continue;
            l.launcher = row.launcher, l.rank_variable = row.rank, l.ranks_variable = row.ranks;
            l.ranks = ranks, l.rank = int(parse(row.rank, 0, l.ranks - 1, row.ranks));
            if (l.ranks > 1) break;
        }
        // On this machine: by the same launcher, or by another that says the same (srun --mpi=pmi2), or by hand.
        for (const Row& row : launchers) {
            bool same = getenv(row.rank) && getenv(row.ranks) && atoi(getenv(row.rank)) == l.rank &&
                        atoi(getenv(row.ranks)) == l.ranks;
            if (l.ranks == 0 || (!same && &row != std::end(launchers) - 1)) continue;
            if (l.local_rank < 0 && getenv(row.local_rank))
                l.local_rank = int(parse(row.local_rank, 0, MAX_RANKS, row.local_ranks));
            // Slurm's may be a list; 2(x3) is two on each of three nodes.
            if (const char* text = getenv(row.local_ranks); same && l.local_ranks == 0 && text && !strchr(text, ','))
                l.local_ranks = atoi(text);
        }
        for (const Row& row : launchers) {
            const char *rank = getenv(row.rank), *ranks = getenv(row.ranks);
            if (ranks && !rank && atoi(ranks) > 1)
                l.warning = format("%s=%s is set without %s", row.ranks, ranks, row.rank);
            if (rank && !ranks && atoi(rank) > 0)
                l.warning = format("%s=%s is set without %s", row.rank, rank, row.ranks);
        }
        if (const char* tasks = getenv("SLURM_NTASKS"); tasks && atoi(tasks) > 1)
            l.warning = format("SLURM_NTASKS=%s is set, and srun has not started this", tasks);
        if (l.ranks > 0) l.warning = "";
        return l;
    }

    // What to do where the variables are those of a launcher that has long ended.
    std::string if_stale() const {
        return format("where no launcher has started this, unset %s %s", rank_variable, ranks_variable);
    }

    // Prints an error while no lifeline connects the ranks. One that all have, such as a wrong flag, rank 0 prints, and
    // its end has the launcher end the others meanwhile. A rank that fails alone, or has no launcher, prints its own.
    void say(const std::string& program, const std::string& error) const {
        if (rank > 0) usleep(useconds_t(StartLimits::rank_0 * 1e6));
        if (rank > 0) fprintf(stderr, "%s: rank %d: %s\n", program.c_str(), rank, error.c_str());
        else fprintf(stderr, "%s: %s\n", program.c_str(), error.c_str());
    }

    // Which of the GPUs that this process sees is its own. A launcher may show each process its own alone.
    int device(int devices) const {
        if (devices == 1) return 0;
        if (local_rank < 0)
            fail("ranks: expected to be told which of the %d GPUs here is rank %d's, found no LOCAL_RANK; set it, or "
                 "show each rank its own by CUDA_VISIBLE_DEVICES",
                 devices, rank);
        if (local_rank >= devices)
            fail("ranks: expected at most %d on this machine, one for each GPU, found local rank %d (rank %d); start "
                 "fewer, or show each its own by CUDA_VISIBLE_DEVICES",
                 devices, local_rank, rank);
        return local_rank;
    }

    // The number of a variable of the environment; `other` belongs to it.
    static int64_t parse(const char* name, int64_t least, int64_t most, const char* other) {
        char* end = nullptr;
        const char* text = getenv(name);
        long long value = strtoll(text, &end, 10);
        if (!*text || *end || value < least || value > most)
            fail("%s: expected a number from %lld to %lld in the environment, found '%s'; see to the launcher, or "
                 "where none has started this, unset %s %s",
                 name, least, most, text, name, other);
        return value;
    }
};

// Says once on stderr what a start waits for that takes long, as the launcher's variables may be leftovers and nobody
// may come; and ends the process where the wait has no end of its own, as MPI's and connect()'s.
class StartWatch {
public:
    StartWatch(const Launch& launch, std::function<std::string()> awaited)
        : thread([this, launch, awaited = std::move(awaited)] {
              using duration = std::chrono::duration<double>;
              std::unique_lock lock(mutex);
              double patience = StartLimits::patience * (launch.rank == 0 ? 1 : 2), most = StartLimits::all + 15;
              auto ended = [this] { return done; };
              if (changed.wait_for(lock, duration(patience), ended)) return;
              std::string why =
                  format("%s=%d in the environment says; %s", launch.ranks_variable, launch.ranks, launch.if_stale());
              fprintf(stderr, "rank %d: waiting for %s, as %s\n", launch.rank, awaited().c_str(), why.c_str());
              if (changed.wait_for(lock, duration(most - patience), ended)) return;
              fprintf(stderr, "rank %d: expected %s within %.0f s, found it still awaited; see to the launcher\n",
                      launch.rank, awaited().c_str(), most);
              _exit(1);
          }) {}
    ~StartWatch() {
        {
            std::lock_guard lock(mutex);
            done = true;
        }
        changed.notify_one(), thread.join();
    }
    StartWatch(const StartWatch&) = delete;
    StartWatch& operator=(const StartWatch&) = delete;

private:
    std::mutex mutex;
    std::condition_variable changed;
    bool done = false;
    std::thread thread;
};
