// Runs the blocks of a grid, a block's threads as fibers: a thread runs until a barrier, a warp collective or its end,
// and the next one to run is drawn at random.
#pragma once

#include <boost/context/detail/fcontext.hpp>
#include <condition_variable>
#include <functional>
#include <numeric>
#include <vector>

#include "device_memory.h"

inline constinit thread_local uint3 threadIdx{0, 0, 0}, blockIdx{0, 0, 0};
inline constinit thread_local dim3 blockDim{1, 1, 1}, gridDim{1, 1, 1};
constexpr int warpSize = 32;

namespace cuda_on_cpu {

using boost::context::detail::fcontext_t;
using boost::context::detail::jump_fcontext;
using boost::context::detail::make_fcontext;
using boost::context::detail::transfer_t;

constexpr unsigned max_threads = 1024;
constexpr size_t shared_without_opt_in = 48 << 10, shared_limit = 227 << 10, shared_canary = 512,
                 shared_alignment = 1024;  // of the largest swizzle pattern
#ifdef CUDA_ON_CPU_ASAN
constexpr size_t stack_bytes = 256 << 10;
#else
constexpr size_t stack_bytes = 64 << 10;
#endif
constexpr size_t stack_guard = 64 << 10;  // no single page: a frame may be larger, and step over it

// Where a thread may wait. The aligned ones must be the same instruction for the whole warp, so the same source line.
enum class Wait : uint8_t { running, ended, syncthreads, syncwarp, shuffle, vote, mma, ldmatrix, stmatrix, wgmma };
inline const char* wait_name(Wait wait) {
    const char* names[] = {"runs",   "ended",       "__syncthreads", "__syncwarp",  "a shuffle",
                           "a vote", "mma_16x8x16", "ldmatrix_x4",   "stmatrix_x4", "wgmma_wait for a wgmma"};
    return names[int(wait)];
}

struct Launch {
    const void* function;
    dim3 grid, block;
    size_t shared_bytes;
    bool overlaps;  // may start before the kernel before it has ended: each thread must wait for that one
    std::function<void()> body;
};

struct AsyncCopy {
    void* to;
    const void* from;  // null: zeros
    unsigned group;
};

struct Fiber {
    fcontext_t context = nullptr;
    uint3 thread{0, 0, 0};
    unsigned index = 0;
    bool started = false;
    Wait wait = Wait::running;
    int line = 0;
    unsigned mask = 0;
    std::vector<AsyncCopy> copies;  // issued, not landed
    unsigned groups_committed = 0;
    bool waited = false;    // for the kernel before
    char* stack = nullptr;  // the guard, below the stack
    const void* bottom = nullptr;
    size_t size = 0;
    void* fake_stack = nullptr;  // ASan's
};

// Lanes that wait for each other. Groups of disjoint masks may be pending in one warp at once.
struct Group {
    unsigned mask, arrived;
    Wait wait;
    int line;
};
struct Warp {
    unsigned exists = 0, ended = 0;
    int pending = 0;
    Group groups[32];
    uint64_t value[32];
    unsigned source[32];
    void* operands[32];
};

struct Products;  // of warpgroups, in flight, and what they may read: wgmma.h

struct Abandoned {};  // thrown into the fibers of a block that is given up, so that their stacks unwind

// One OS thread's fibers and the block that they run.
struct Worker {
    Fiber home;  // the OS thread's own stack
    Fiber* current = &home;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Warp> warps;
    uint16_t ready[max_threads];
    uint32_t ready_count = 0;
    Random random;

    const Launch* launch = nullptr;
    std::atomic<bool>* failed = nullptr;
    unsigned threads = 0, live = 0;
    bool abandoned = false;
    unsigned at_barrier = 0;
    int barrier_line = 0;
    int barrier_sum = 0, barrier_result = 0;
    Work work;  // of the block
    std::vector<char> shared_block;
    char* shared = nullptr;
    size_t shared_bytes = 0;
    dim3 shape{0, 0, 0};
    std::shared_ptr<Products> products;
    bool products_used = false;  // by this block
    uint32_t product_due = 0;    // in so many switches the next product runs; 0: none is scheduled

    Worker() = default;
    Worker(const Worker&) = delete;
    ~Worker() {
        ASAN_UNPOISON_MEMORY_REGION(shared_block.data(), shared_block.size());
        for (auto& fiber : fibers) {
            ASAN_UNPOISON_MEMORY_REGION(fiber->stack, stack_guard + stack_bytes);
            munmap(fiber->stack, stack_guard + stack_bytes);
        }
    }

    std::string place(const Fiber& fiber) const {
        return "kernel " + kernel_name(launch->function) + ", block " + text(blockIdx) + ", thread " +
               text(fiber.thread);
    }

    // The first misuse of a launch is told; the block is given up.
    void fail(const std::string& message) {
        abandoned = true;
        if (!failed->exchange(true)) report_misuse(message, true);
    }
    [[noreturn]] void misuse(const std::string& what) {
        fail(place(*current) + ": " + what);
        throw Abandoned{};
    }

    // Forced inline, with its callers up to the kernel: after a switch the CPU predicts every return wrong, so there
    // must be none.
    __forceinline__ void switch_to(Fiber& next) {
        Fiber& self = *current;
        current = &next;
        threadIdx = next.thread;
#ifdef CUDA_ON_CPU_ASAN
        __sanitizer_start_switch_fiber(&self.fake_stack, next.bottom, next.size);
#endif
        transfer_t from = jump_fcontext(next.context, &self);
        arrive(self, from);
    }
    __forceinline__ void arrive([[maybe_unused]] Fiber& self, transfer_t from) {
        Fiber& before = *static_cast<Fiber*>(from.data);
        before.context = from.fctx;
#ifdef CUDA_ON_CPU_ASAN
        // The stack that was left is learnt here: nobody else tells where the OS thread's own lies.
        __sanitizer_finish_switch_fiber(self.fake_stack, &before.bottom, &before.size);
#endif
    }

    void run_due_product();
    std::string unfinished_products(const Fiber& fiber);  // "" if there are none

    __forceinline__ Fiber& draw() {
        if (product_due && --product_due == 0) run_due_product();
        if (ready_count == 0 || abandoned) return home;
        uint32_t i = random.below(ready_count);
        uint16_t index = ready[i];
        ready[i] = ready[--ready_count];
        return *fibers[index];
    }
    __forceinline__ void make_ready(Fiber& fiber) {
        fiber.wait = Wait::running;
        ready[ready_count++] = uint16_t(fiber.index);
    }
    __forceinline__ void run_others() {
        Fiber& next = draw();
        if (&next != current) switch_to(next);
        if (abandoned) throw Abandoned{};
    }
    // Lets others run first, or not. A block that waits for another one's is not to wait for one that has failed.
    void yield() {
        if (failed->load(std::memory_order_relaxed)) abandoned = true;
        make_ready(*current);
        run_others();
    }

    // Every thread of the block brings a number; all get the sum.
    __forceinline__ int barrier(int number, int line) {
        Fiber& self = *current;
        if (at_barrier == 0) barrier_line = line, barrier_sum = 0;
        else if (line != barrier_line)
            misuse(formatted("expected every thread of the block at the __syncthreads of line %d, found this one at "
                             "line %d",
                             barrier_line, line));
        barrier_sum += number;
        self.wait = Wait::syncthreads, self.line = line;
        if (++at_barrier == threads) {
            barrier_result = barrier_sum, at_barrier = 0, work.barriers++;
            for (unsigned i = 0; i < threads; i++) make_ready(*fibers[i]);
        }
        run_others();
        return barrier_result;
    }

    // The lanes of mask meet; the last to arrive calls complete(warp) for all.
    template <class Complete>
    __forceinline__ void collective(Wait wait, unsigned mask, int line, Complete&& complete) {
        Fiber& self = *current;
        Warp& warp = warps[self.index / 32];
        unsigned bit = 1u << self.index % 32;
        Group* group = nullptr;
        if (warp.pending == 1 && mask & bit && warp.groups[0].mask == mask && warp.groups[0].wait == wait &&
            (wait < Wait::mma || warp.groups[0].line == line))
            group = &warp.groups[0];
        else group = &join(warp, wait, mask, line, bit);
        group->arrived |= bit;
        if (group->arrived == (group->mask & warp.exists)) {
            complete(warp);
            unsigned released = group->arrived;
            *group = warp.groups[--warp.pending];
            for (; released; released &= released - 1)
                make_ready(*fibers[self.index / 32 * 32 + unsigned(__builtin_ctz(released))]);
        } else {
            self.wait = wait, self.line = line, self.mask = mask;
        }
        run_others();
    }

    // All that can be wrong with a lane's arrival, and the group that it joins.
    Group& join(Warp& warp, Wait wait, unsigned mask, int line, unsigned bit) {
        auto wrong = [&](const std::string& what) { misuse(operation(wait, line, mask) + ": " + what); };
        if (!(mask & bit))
            wrong(formatted("expected the calling lane in its own mask, found lane %d outside it", __builtin_ctz(bit)));
        if (wait >= Wait::mma && warp.exists != ~0u)
            wrong(formatted("expected a warp of 32 lanes, found %d", __builtin_popcount(warp.exists)));
        if (mask & warp.ended) wrong(ended_lanes(mask & warp.ended));
        for (int i = 0; i < warp.pending; i++) {
            Group& other = warp.groups[i];
            auto meets = [&] {
                return formatted("lanes 0x%08x at ", other.arrived) + operation(other.wait, other.line, other.mask);
            };
            if (other.mask == mask && other.wait == wait && (wait < Wait::mma || other.line == line)) return other;
            if (other.mask == mask) wrong("expected all lanes of the mask at the same operation, found " + meets());
            if (other.mask & bit && mask & other.arrived)
                wrong("expected the same mask from all its lanes, found " + meets());
        }
        warp.groups[warp.pending] = {mask, 0, wait, line};
        return warp.groups[warp.pending++];
    }
    static std::string operation(Wait wait, int line, unsigned mask) {
        return formatted("%s (line %d, mask 0x%08x)", wait_name(wait), line, mask);
    }
    static std::string ended_lanes(unsigned lanes) {
        return formatted("expected all lanes of the mask, found that lanes 0x%08x ended", lanes);
    }

    void end_thread() {
        Fiber& self = *current;
        self.wait = Wait::ended;
        live--;
        if (abandoned) return;
        Warp& warp = warps[self.index / 32];
        unsigned bit = 1u << self.index % 32;
        warp.ended |= bit;
        for (int i = 0; i < warp.pending; i++) {
            Group& group = warp.groups[i];
            if (group.mask & bit)
                return fail(place(*fibers[self.index / 32 * 32 + unsigned(__builtin_ctz(group.arrived))]) + ": " +
                            operation(group.wait, group.line, group.mask) + ": " + ended_lanes(bit));
        }
        if (launch->overlaps && !self.waited)
            return fail(place(self) + ": expected wait_for_predecessor() in each thread of a launch that may overlap "
                                      "the one before, found a thread that ended without");
        if (products_used)
            if (std::string unfinished = unfinished_products(self); !unfinished.empty())
                return fail(place(self) + ": " + unfinished);
        if (!self.copies.empty())
            fail(place(self) + formatted(": expected a cp_async_wait for every cp_async_16, found %zu never waited for "
                                         "at the thread's end",
                                         self.copies.size()));
    }

    // A fiber serves thread after thread, block after block; home jumps into it for the first time.
    static void fiber_main(transfer_t from);

    void grow(unsigned count) {
        while (fibers.size() < count) {
            auto fiber = std::make_unique<Fiber>();
            fiber->stack = (char*)mmap(nullptr, stack_guard + stack_bytes, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
            if (fiber->stack == MAP_FAILED)
                fprintf(stderr, "CUDA on CPU: no memory for the stacks of the threads\n"), abort();
            mprotect(fiber->stack, stack_guard, PROT_NONE);
            fiber->index = unsigned(fibers.size());
            // Stacks that begin at the same offset in a page would fight for the same few cache lines.
            fiber->bottom = fiber->stack + stack_guard, fiber->size = stack_bytes - fiber->index * 320 % 8192;
            fiber->context = make_fcontext(fiber->stack + stack_guard + fiber->size, fiber->size, fiber_main);
            fibers.push_back(std::move(fiber));
        }
    }

    void prepare_shared(size_t bytes) {
        size_t whole = shared_alignment + shared_canary + bytes + shared_canary;
        if (!shared || bytes != shared_bytes) {
            ASAN_UNPOISON_MEMORY_REGION(shared_block.data(), shared_block.size());
            if (shared_block.size() != whole) std::vector<char>(whole).swap(shared_block);
            shared = (char*)round_up(size_t(shared_block.data()) + shared_canary, shared_alignment),
            shared_bytes = bytes;
            memset(shared - shared_canary, canary, shared_canary);
            memset(shared + bytes, canary, shared_canary);
            ASAN_POISON_MEMORY_REGION(shared - shared_canary, shared_canary);
            ASAN_POISON_MEMORY_REGION(shared + bytes, shared_canary);
        }
        memset(shared, settings().poison, bytes);
    }
    void check_shared() {
        size_t before = damaged_at(shared - shared_canary, shared_canary),
               after = damaged_at(shared + shared_bytes, shared_canary);
        if (before == shared_canary && after == shared_canary) return;
        std::string where = before != shared_canary ? formatted("%zu bytes before it", shared_canary - before)
                                                    : formatted("at offset %zu", shared_bytes + after);
        fail("kernel " + kernel_name(launch->function) + ", block " + text(blockIdx) +
             formatted(": expected writes inside the block's %zu bytes of shared memory, found one ", shared_bytes) +
             where);
        shared = nullptr;
    }

    // Nobody can run, not all have ended: says who waits where.
    void explain_deadlock() {
        std::map<std::string, std::pair<unsigned, const Fiber*>> waiters;
        bool barrier = false, product = false;
        const Fiber* example = nullptr;
        for (unsigned i = 0; i < threads; i++) {
            const Fiber& f = *fibers[i];
            if (f.wait == Wait::syncthreads) barrier = true;
            if (f.wait == Wait::wgmma) product = true;
            if (f.wait != Wait::ended && (!example || (f.wait == Wait::syncthreads && example->wait != f.wait)))
                example = &f;
            std::string key = f.wait == Wait::ended         ? "ended"
                              : f.wait == Wait::syncthreads ? formatted("at __syncthreads (line %d)", f.line)
                                                            : "at " + operation(f.wait, f.line, f.mask);
            auto& entry = waiters[key];
            if (entry.first++ == 0) entry.second = &f;
        }
        std::string found;
        for (auto& [key, entry] : waiters)
            found +=
                formatted("%s%u %s, the first of them thread ", found.empty() ? "" : "; ", entry.first, key.c_str()) +
                text(entry.second->thread);
        fail(place(*example) +
             (barrier ? formatted(": deadlock: expected all %u threads of the block at __syncthreads, found ", threads)
              : product ? std::string(": deadlock: expected all 128 threads of the warpgroup to issue the wgmma that "
                                      "is waited for, found ")
                        : std::string(": deadlock: expected all lanes of the mask at the warp's operation, found ")) +
             found);
    }

    void run_block(const Launch& what, uint64_t launch_number, size_t block, std::atomic<bool>& launch_failed) {
        launch = &what, failed = &launch_failed;
        gridDim = what.grid, blockDim = what.block;
        unsigned x = unsigned(block % what.grid.x);
        size_t rest = block / what.grid.x;
        blockIdx = {x, unsigned(rest % what.grid.y), unsigned(rest / what.grid.y)};
        threads = live = what.block.x * what.block.y * what.block.z;
        grow(threads);
        abandoned = false, at_barrier = 0, ready_count = 0, products_used = false, product_due = 0;
        random.start(settings().seed, launch_number, block);
        prepare_shared(what.shared_bytes);
        warps.resize((max_threads + 31) / 32);
        for (unsigned i = 0; i < (threads + 31) / 32; i++)
            warps[i].exists = threads - i * 32 >= 32 ? ~0u : (1u << (threads - i * 32)) - 1, warps[i].ended = 0,
            warps[i].pending = 0;
        bool same_shape = shape.x == what.block.x && shape.y == what.block.y && shape.z == what.block.z;
        shape = what.block;
        for (unsigned i = 0; i < threads; i++) {
            Fiber& fiber = *fibers[i];
            if (!same_shape) fiber.thread = {i % shape.x, i / shape.x % shape.y, i / shape.x / shape.y};
            fiber.started = fiber.waited = false, fiber.groups_committed = 0, fiber.copies.clear();
            make_ready(fiber);
        }
        switch_to(draw());
        if (live && !abandoned) explain_deadlock();
        for (unsigned i = 0; live && i < threads; i++) {
            Fiber& fiber = *fibers[i];
            if (!fiber.started) continue;
            if (fiber.wait != Wait::ended) switch_to(fiber);  // it throws Abandoned, ends, and comes back
        }
        if (!abandoned) check_shared();
        else shared = nullptr;
        launch = nullptr;
    }
};

inline Worker& this_worker() {
    static thread_local std::unique_ptr<Worker> own = std::make_unique<Worker>();
    return *own;
}
inline constinit thread_local Worker* worker = nullptr;  // set while a grid runs here

inline void Worker::fiber_main(transfer_t from) {
    Worker& w = *worker;
    Fiber& self = *w.current;
    w.arrive(self, from);
    for (;;) {
        self.started = true;
        try {
            w.launch->body();
        } catch (const Abandoned&) {}
        w.end_thread();
        w.switch_to(w.draw());
    }
}

inline Worker& device() {
    if (worker && worker->current != &worker->home) return *worker;
    fprintf(stderr, "CUDA on CPU: a device function was called outside a kernel\n");
    abort();
}

// OS threads that wait for work. The caller works too, and never waits for a helper that came too late to find any.
class Pool {
    struct Job {
        size_t count;
        const std::function<void(size_t)>* work;
        std::atomic<size_t> next{0};
        int places;
    };
    std::mutex mutex;
    std::condition_variable wake, left;
    std::vector<std::thread> helpers;
    Job* job = nullptr;
    uint64_t generation = 0;
    int inside = 0;
    bool stop = false;

    static void take_part(Job& job) {
        for (size_t i; (i = job.next++) < job.count;) (*job.work)(i);
    }
    void help() {
        std::unique_lock lock(mutex);
        for (uint64_t seen = 0;;) {
            wake.wait(lock, [&] { return stop || (job && generation != seen); });
            if (stop) return;
            seen = generation;
            if (job->places-- <= 0) continue;
            Job& mine = *job;
            inside++;
            lock.unlock();
            install_fault_handler();
            take_part(mine);
            lock.lock();
            if (--inside == 0) left.notify_all();
        }
    }

public:
    ~Pool() {
        {
            std::lock_guard lock(mutex);
            stop = true;
        }
        wake.notify_all();
        for (std::thread& helper : helpers) helper.join();
    }
    // work(0) ... work(count - 1), in any order, on up to settings().threads OS threads.
    void run(size_t count, const std::function<void(size_t)>& work, bool alone = false) {
        int helping = std::min<int>(settings().threads - 1, int(std::min<size_t>(count, 1024)) - 1);
        if (helping <= 0 || alone) {
            for (size_t i = 0; i < count; i++) work(i);
            return;
        }
        Job mine{count, &work, 0, helping};
        {
            std::lock_guard lock(mutex);
            while (int(helpers.size()) < helping) helpers.emplace_back([this] { help(); });
            job = &mine, generation++;
        }
        wake.notify_all();
        take_part(mine);
        std::unique_lock lock(mutex);
        job = nullptr;
        left.wait(lock, [&] { return inside == 0; });
    }
};
inline Pool& pool() {
    static Pool instance;
    return instance;
}

inline std::string place_of_worker(const void* fault) {
    if (!worker || !worker->launch) return "";
    const Fiber& fiber = *worker->current;
    bool overflow = fiber.stack && fault >= fiber.stack && fault < fiber.stack + stack_guard;
    return worker->place(fiber) + (overflow ? formatted(", whose stack of %zu KiB is full", stack_bytes >> 10) : "");
}

// All blocks, in random order.
inline void run_grid(const Launch& launch) {
    Shared& shared = shared_state();
    Random& random = shared.random();
    uint64_t number = shared.launches++;
    Launches& launches = shared.launched[launch.function];
    launches.count++, launches.threads = std::max(launches.threads, launch.block.x * launch.block.y * launch.block.z);
    launches.shared_bytes = std::max(launches.shared_bytes, launch.shared_bytes);
    size_t blocks = size_t(launch.grid.x) * launch.grid.y * launch.grid.z;
    std::vector<uint32_t> order(blocks);
    std::iota(order.begin(), order.end(), 0u);
    for (size_t i = blocks; i > 1; i--) std::swap(order[i - 1], order[random.below(uint32_t(i))]);
    std::atomic<bool> failed{false};
    std::mutex adding;
    size_t work = blocks * launch.block.x * launch.block.y * launch.block.z;
    pool().run(blocks, [&](size_t i) {
        if (failed) return;
        current_place = place_of_worker;
        worker = &this_worker();
        worker->work = {};
        worker->run_block(launch, number, order[i], failed);
        {
            std::lock_guard lock(adding);
            launches.work += worker->work;
        }
        worker = nullptr;
    }, work < 256);
}

}  // namespace cuda_on_cpu
