// Hopper's warpgroup products (wgmma of BF16, sm_90a) and stmatrix, by the PTX ISA 8.0, section "Asynchronous
// Warpgroup Level Matrix Multiply-Accumulate Instructions". d (64,N) (+)= a (64,16) b (16,N) by four warps, behind
// their backs: from its issue to a wait, d's registers are not theirs, nor is the shared memory of a and b to change.
//
// Operands in shared memory are written by cp_async_16 and stmatrix_x4 alone, in chunks of 16 bytes. Each chunk's state
// is known, and what the asynchronous proxy sees of it: what it held at the last fence_proxy_async of its writer.
#pragma once

#include <deque>

#include "primitives.h"

// Which index of an operand in shared memory has its neighbours beside each other: k, or m of a and n of b.
enum Major { K_MAJOR = 0, MN_MAJOR = 1 };

namespace cuda_on_cpu {

// ----- Layouts

// The i-th number of a thread's d, as it lies in its registers, and likewise the i-th of its a.
struct Place { int row, column; };
inline Place place_in_fragment(int thread, int i) {
    return {thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, i / 4 * 8 + thread % 4 * 2 + i % 2};
}

// A descriptor's fields, in bytes.
inline uint32_t descriptor_start(uint64_t d) { return uint32_t(d & 0x3fff) << 4; }
inline uint32_t descriptor_leading(uint64_t d) { return uint32_t(d >> 16 & 0x3fff) << 4; }
inline uint32_t descriptor_stride(uint64_t d) { return uint32_t(d >> 32 & 0x3fff) << 4; }

// Where element (mn, k) lies in shared memory. Rows of 128 bytes, 64 numbers, whose eight chunks of 16 bytes are
// permuted by the row's index modulo 8. A K-major tile has a row for each mn and uses 32 bytes of it; an MN-major tile
// has a row for each k and each 64 mn.
inline uint32_t tile_address(uint64_t d, Major major, int mn, int k) {
    uint32_t m = uint32_t(mn), in = uint32_t(k);
    uint32_t address =
        descriptor_start(d) +
        (major == K_MAJOR ? m / 8 * descriptor_stride(d) + m % 8 * 128 + in * 2
                          : m / 64 * descriptor_leading(d) + in / 8 * descriptor_stride(d) + in % 8 * 128 + m % 64 * 2);
    return address ^ (address >> 3 & 0x70);
}

// What is wrong with a descriptor of `size` rows or columns, or "".
inline std::string descriptor_fault(uint64_t d, Major major, int size) {
    const char* modes[] = {"no swizzle", "", "64 bytes", "32 bytes"};
    if (d >> 62 != 1) return formatted("expected 128-byte swizzle (1 << 62), found %s", modes[d >> 62]);
    if (uint64_t other = d & 0x3fffc000c000c000u)
        return formatted("expected zeros in bits 14-15, 30-31 and 46-61, which no field of this layout has, found "
                         "0x%016llx",
                         (unsigned long long)other);
    uint32_t start = descriptor_start(d), leading = descriptor_leading(d), stride = descriptor_stride(d);
    if (major == K_MAJOR ? start % 1024 & ~96u : start % 1024)
        return formatted("expected a start at a multiple of 1024 bytes%s, found %u",
                         major == K_MAJOR ? ", or 32, 64 or 96 after one" : "", start);
    if ((major == MN_MAJOR || size > 8) && (stride == 0 || stride % 1024))
        return formatted("expected a stride of a multiple of 1024 bytes, found %u", stride);
    if (major == MN_MAJOR && size > 64 && (leading == 0 || leading % 1024))
        return formatted("expected a leading offset of a multiple of 1024 bytes, found %u", leading);
    return "";
}

// ----- State

enum ChunkState : uint32_t { never, copying, unfenced, fenced };
struct Chunk {
    uint32_t writer : 10;
    uint32_t listed : 1;  // among its writer's chunks to fence
    uint32_t state : 2;
    uint32_t readers : 19;  // products that not all of their threads have waited for
};

// A register array as it was at the last wgmma_fence that named it.
struct NamedRegisters {
    const char* at;
    size_t bytes;
    bool valid;
    std::vector<char> value;
};
// A fragment of a that a product has used, until a wgmma_wait names it.
struct Fragment {
    const uint32_t* at;
    uint32_t value[4];
    int line;
};
struct ProductThread {
    uint32_t issued, waited;  // products
    uint32_t commits, history, lines;
    std::vector<uint32_t> groups;  // not waited for: products before the commit
    std::vector<NamedRegisters> named;
    std::vector<Fragment> fragments;
    std::vector<uint16_t> to_fence;  // chunks
};

// A warpgroup's d in flight. `held`: the thread's registers are poison, their value is here. 0xFF would stay the same
// in arithmetic, so for it that is a signalling NaN, which any arithmetic makes a quiet one.
struct Accumulator {
    int n, stride;  // columns, and those of a row here
    int holders = 0;
    bool held[128] = {};
    float* registers[128];
    uint32_t last[128];  // product
    std::vector<float> value;
};

// What is the same for all threads that issue it.
struct WgmmaKey {
    int line, n;
    bool a_in_registers, add;
    Major a_major, b_major;
    uint64_t a, b;
    uint32_t commits, history;
    bool operator==(const WgmmaKey&) const = default;
};
struct Wgmma {
    WgmmaKey key;
    int issued, waited;  // by so many threads
    int lanes[4];        // of each warp that have issued it ...
    uint32_t lines[4];   // ... after the fences, commits and waits of these lines
    Accumulator* sum;
    int a_chunks, chunks;
    uint16_t chunk[128 + 512];  // of a, then of b: for mn, for k, or the other way round
    const uint32_t* a_registers[128];
    uint32_t a[128][4];
};
struct Warpgroup {
    std::deque<std::unique_ptr<Wgmma>> flight;
    std::vector<std::unique_ptr<Wgmma>> spare;
    uint32_t first, issued, executed;  // of all products: flight[0], those that all threads have issued, those done
    std::vector<std::unique_ptr<Accumulator>> sums;
    std::vector<unsigned> parked;  // threads that wait until all have issued
};

struct Products {
    std::vector<Chunk> chunks;
    std::vector<char> seen;  // by the asynchronous proxy
    ProductThread threads[max_threads];
    Warpgroup groups[max_threads / 128];
    alignas(64) float a[64][16], b[16][256];
};

inline Products& products(Worker& w) {
    if (w.products_used) return *w.products;
    if (!w.products) w.products = std::make_shared<Products>();
    w.products_used = true;
    Products& p = *w.products;
    p.chunks.assign((w.shared_bytes + 15) / 16, Chunk{0, 0, never, 0});
    p.seen.resize(p.chunks.size() * 16);
    for (unsigned i = 0; i < w.threads; i++) {
        ProductThread& t = p.threads[i];
        t.issued = t.waited = t.commits = t.history = t.lines = 0;
        t.groups.clear(), t.to_fence.clear(), t.fragments.clear();
        for (NamedRegisters& named : t.named) named.valid = false;
    }
    for (unsigned i = 0; i * 128 < w.threads; i++) {
        Warpgroup& g = p.groups[i];
        for (auto& product : g.flight) g.spare.push_back(std::move(product));
        g.flight.clear(), g.parked.clear();
        for (auto& sum : g.sums) sum->holders = 0, std::fill(sum->held, sum->held + 128, false);
        g.first = g.issued = g.executed = 0;
    }
    return p;
}
inline ProductThread& product_thread(Worker& w) { return products(w).threads[w.current->index]; }
inline Warpgroup& warpgroup(Worker& w) { return products(w).groups[w.current->index / 128]; }

inline bool overlap(const void* a, size_t a_bytes, const void* b, size_t b_bytes) {
    return (const char*)a < (const char*)b + b_bytes && (const char*)b < (const char*)a + a_bytes;
}
inline bool within(const void* part, size_t part_bytes, const void* whole, size_t bytes) {
    return part >= whole && (const char*)part + part_bytes <= (const char*)whole + bytes;
}
inline size_t accumulator_bytes(int n) { return size_t(n) * 2; }  // a thread's

// ----- Writes to shared memory

inline uint32_t chunk_of(Worker& w, const void* p) { return uint32_t((const char*)p - w.shared) / 16; }

// The line of the product that may still read the chunk.
inline int line_of_reader(Worker& w, uint32_t chunk) {
    for (unsigned i = 0; i * 128 < w.threads; i++)
        for (auto& product : products(w).groups[i].flight)
            if (std::count(product->chunk, product->chunk + product->chunks, chunk)) return product->key.line;
    return 0;
}
inline void note_write(Worker& w, const char* what, const void* p) {
    uint32_t index = chunk_of(w, p), me = w.current->index;
    Chunk& chunk = products(w).chunks[index];
    if (chunk.readers)
        w.misuse(formatted("%s: expected shared memory that no product in flight reads, found offset %u, which the "
                           "wgmma of line %d reads until all its warps have waited for it",
                           what, index * 16, line_of_reader(w, index)));
    if (chunk.writer != me) chunk.writer = me, chunk.listed = 0;
    chunk.state = copying;
}
inline void note_written(Worker& w, unsigned thread, const void* p) {
    Products& all = products(w);
    uint32_t index = chunk_of(w, p);
    Chunk& chunk = all.chunks[index];
    chunk.state = unfenced;
    if (chunk.listed && chunk.writer == thread) return;
    chunk.writer = thread, chunk.listed = 1;
    all.threads[thread].to_fence.push_back(uint16_t(index));
}

struct StmatrixOperands {
    __nv_bfloat16* row;
    const uint32_t* r;
    unsigned thread;
};
inline void store_matrices(Worker& w, Warp& warp) {
    auto operands = [&](int lane) -> StmatrixOperands& { return *static_cast<StmatrixOperands*>(warp.operands[lane]); };
    for (int i = 0; i < 32; i++) {
        uint32_t row[4];
        for (int pair = 0; pair < 4; pair++) row[pair] = operands(i % 8 * 4 + pair).r[i / 8];
        memcpy(operands(i).row, row, 16);
        note_written(w, operands(i).thread, operands(i).row);
    }
}

// ----- Products

inline std::string described(const WgmmaKey& k) {
    return formatted("line %d, N = %d, a 0x%llx, b 0x%llx, after %u commits", k.line, k.n, (unsigned long long)k.a,
                     (unsigned long long)k.b, k.commits);
}

// Why the asynchronous proxy does not see what the chunk holds.
inline std::string chunk_fault(Worker& w, uint32_t index) {
    Products& p = products(w);
    Chunk chunk = p.chunks[index];
    std::string found = formatted("expected operands that cp_async_16 or stmatrix_x4 has written and fence_proxy_async "
                                  "has shown to the asynchronous proxy, found offset %u ",
                                  index * 16);
    if (chunk.state == never) return found + "never written";
    return found +
           (chunk.state == copying ? "not yet waited for by cp_async_wait" : "written without fence_proxy_async") +
           ", by thread " + text(w.fibers[chunk.writer]->thread);
}

// Lists an operand's chunks and counts the product among their readers. "" or what is wrong.
inline std::string read_operand(Worker& w, Wgmma& product, uint64_t d, Major major, int size) {
    if (std::string fault = descriptor_fault(d, major, size); !fault.empty()) return fault;
    Products& p = products(w);
    int outer = major == K_MAJOR ? size : 16, inner = (major == K_MAJOR ? 16 : size) / 8;
    for (int i = 0; i < outer; i++)
        for (int j = 0; j < inner; j++) {
            uint32_t at = major == K_MAJOR ? tile_address(d, major, i, j * 8) : tile_address(d, major, j * 8, i);
            if (at + 16 > w.shared_bytes)
                return formatted("expected a tile inside the block's %zu bytes of shared memory, found a chunk at "
                                 "offset %u",
                                 w.shared_bytes, at);
            if (p.chunks[at / 16].state != fenced) return chunk_fault(w, at / 16);
            p.chunks[at / 16].readers++;
            product.chunk[product.chunks++] = uint16_t(at / 16);
        }
    return "";
}

// The chunks' numbers, to (mn, k) or (k, mn). "" or what is wrong.
inline std::string gather(Worker& w, const uint16_t* chunk, Major major, int size, float* to, int mn_step, int k_step) {
    Products& p = products(w);
    int outer = major == K_MAJOR ? size : 16, inner = (major == K_MAJOR ? 16 : size) / 8;
    int outer_step = major == K_MAJOR ? mn_step : k_step, step = major == K_MAJOR ? k_step : mn_step;
    for (int i = 0; i < outer; i++)
        for (int j = 0; j < inner; j++) {
            uint32_t index = *chunk++;
            if (p.chunks[index].state != fenced) return chunk_fault(w, index);
            const char* seen = p.seen.data() + index * 16;
            if (memcmp(seen, w.shared + index * 16, 16))
                return formatted("expected operands that cp_async_16 and stmatrix_x4 alone write, found offset %u "
                                 "written otherwise",
                                 index * 16);
            uint16_t numbers[8];
            memcpy(numbers, seen, 16);
            float* at = to + i * outer_step + j * 8 * step;
            for (int e = 0; e < 8; e++) at[e * step] = std::bit_cast<float>(uint32_t(numbers[e]) << 16);
        }
    return "";
}

// sum (64,n) += a (64,16) b (16,n): every sum in order of k. Not seen by sanitizers, which make it 20 times slower.
__attribute__((no_sanitize("address", "undefined"))) inline void multiply(const float (*a)[16], const float (*b)[256],
                                                                          float* sum, int stride) {
    typedef float Columns __attribute__((vector_size(64)));  // 16
    for (int column = 0; column < stride; column += 16)
        for (int row = 0; row < 64; row += 4) {
            Columns s[4], bk;
            for (int i = 0; i < 4; i++) memcpy(&s[i], sum + (row + i) * stride + column, sizeof bk);
            for (int k = 0; k < 16; k++) {
                memcpy(&bk, &b[k][column], sizeof bk);
                for (int i = 0; i < 4; i++) s[i] += a[row + i][k] * bk;
            }
            for (int i = 0; i < 4; i++) memcpy(sum + (row + i) * stride + column, &s[i], sizeof bk);
        }
}

// The warpgroup's next product. Called between threads too, so it does not throw.
inline void execute_next(Worker& w, Warpgroup& g) {
    Products& p = products(w);
    Wgmma& product = *g.flight[g.executed++ - g.first];
    const WgmmaKey& key = product.key;
    w.work.operations += 2 * 64 * 16 * uint64_t(key.n);
    std::string fault;
    if (key.a_in_registers) {
        for (int thread = 0; thread < 128; thread++)
            for (int i = 0; i < 8; i++) {
                Place at = place_in_fragment(thread, i);
                uint32_t pair = product.a[thread][i / 2];
                p.a[at.row][at.column] = i % 2 ? high_bf16(pair) : low_bf16(pair);
            }
    } else {
        fault = gather(w, product.chunk, key.a_major, 64, p.a[0], 16, 1);
    }
    if (fault.empty()) fault = gather(w, product.chunk + product.a_chunks, key.b_major, key.n, p.b[0], 1, 256);
    if (!fault.empty()) {
        const Fiber& first = *w.fibers[size_t(&g - p.groups) * 128];
        return w.fail(w.place(first) + formatted(": wgmma (line %d): ", key.line) + fault);
    }
    Accumulator& sum = *product.sum;
    if (!key.add) std::fill(sum.value.begin(), sum.value.end(), 0.f);
    multiply(p.a, p.b, sum.value.data(), sum.stride);
}

// One of a random warpgroup, and later another one.
inline void Worker::run_due_product() {
    unsigned groups = (threads + 127) / 128, from = random.below(groups);
    for (unsigned i = 0; i < groups; i++)
        if (Warpgroup& g = products->groups[(from + i) % groups]; g.executed < g.issued) {
            product_due = 1 + random.below(256);
            return execute_next(*this, g);
        }
}

// The thread's registers, to or from the warpgroup's accumulator.
template <bool to_registers>
void move_accumulator(Accumulator& sum, unsigned thread) {
    Place first = place_in_fragment(int(thread), 0);
    float *registers = sum.registers[thread], *value = &sum.value[size_t(first.row * sum.stride + first.column)];
    for (int i = 0; i < sum.n / 8; i++, registers += 4, value += 8)
        for (int half = 0; half < 2; half++) {
            float *at = registers + 2 * half, *in = value + half * 8 * sum.stride;
            to_registers ? memcpy(at, in, 8) : memcpy(in, at, 8);
        }
}
inline uint32_t poison_in_flight() { return settings().poison == 0xFF ? 0xFFBFFFFF : 0x01010101u * settings().poison; }
inline bool is_poison(const float* p, size_t bytes) {
    uint32_t poison = poison_in_flight();
    return !memcmp(p, &poison, 4) && !memcmp(p, p + 1, bytes - 4);
}

inline void expect_fenced(Worker& w, const char* what, int line, const void* registers, size_t bytes) {
    const char* found = "no wgmma_fence that names it since it landed or came to be";
    for (const NamedRegisters& named : product_thread(w).named) {
        if (!named.valid || !within(registers, bytes, named.at, named.bytes)) continue;
        if (!memcmp(registers, named.value.data() + ((const char*)registers - named.at), bytes)) return;
        found = "that it has changed since the last wgmma_fence that names it";
    }
    w.misuse(formatted("wgmma (line %d): expected %s as a wgmma_fence has named it, found %s", line, what, found));
}

// The thread's part of a product. It goes on at once: that all threads issue the same is checked, and that they do
// before a wait.
inline void issue_product(WgmmaKey key, float* d, const uint32_t* a) {
    Worker& w = device();
    auto wrong = [&](const std::string& what) { w.misuse(formatted("wgmma (line %d): ", key.line) + what); };
    if (settings().ptx < 90) wrong(formatted("expected code built for 9.0a, found %d", settings().ptx));
    unsigned thread = w.current->index % 128;
    if (unsigned first = w.current->index - thread; w.threads < first + 128)
        wrong(formatted("expected a warpgroup of 128 threads, found %u", w.threads - first));
    ProductThread& t = product_thread(w);
    Warpgroup& g = warpgroup(w);
    key.commits = t.commits, key.history = t.history;

    size_t bytes = accumulator_bytes(key.n);
    Accumulator* chain = nullptr;
    for (auto& sum : g.sums)
        if (sum->held[thread] && overlap(d, bytes, sum->registers[thread], accumulator_bytes(sum->n))) {
            if (sum->registers[thread] != d || sum->n != key.n)
                wrong(formatted("expected registers in flight to be used by products of the same shape, found N = %d "
                                "after N = %d",
                                key.n, sum->n));
            chain = sum.get();
        }
    if (!chain) expect_fenced(w, "d", key.line, d, bytes);
    else if (!is_poison(d, 16)) wrong("expected d untouched until a wgmma_wait names it, found it written");
    if (a) expect_fenced(w, "a", key.line, a, 16);

    if (t.issued - g.first == g.flight.size()) {
        if (g.spare.empty()) g.spare.push_back(std::make_unique<Wgmma>());
        g.flight.push_back(std::move(g.spare.back()));
        g.spare.pop_back();
        Wgmma& product = *g.flight.back();
        product.key = key, product.issued = product.waited = product.chunks = 0, product.sum = chain;
        std::fill(product.lanes, product.lanes + 4, 0);
        std::string fault = key.a_in_registers ? "" : read_operand(w, product, key.a, key.a_major, 64);
        if (!fault.empty()) wrong("a: " + fault);
        product.a_chunks = product.chunks;
        fault = read_operand(w, product, key.b, key.b_major, key.n);
        if (!fault.empty()) wrong("b: " + fault);
        for (auto& sum : g.sums)
            if (!product.sum && sum->holders == 0) product.sum = sum.get();
        if (!product.sum) product.sum = g.sums.emplace_back(std::make_unique<Accumulator>()).get();
        if (!chain) {
            product.sum->n = key.n, product.sum->stride = int(round_up(size_t(key.n), 16));
            product.sum->value.assign(size_t(64 * product.sum->stride), 0.f);
        }
    }
    Wgmma& product = *g.flight[t.issued - g.first];
    if (product.key != key)
        wrong("expected the threads of a warpgroup to issue the same products after the same fences, commits and "
              "waits, found (" +
              described(product.key) + ") by another one and here (" + described(key) + ")" +
              (product.key.history != key.history ? ", and other fences, commits or waits before" : ""));
    if (unsigned warp = thread / 32; product.lanes[warp]++ == 0) product.lines[warp] = t.lines;
    else if (product.lines[warp] != t.lines)
        wrong("expected the lanes of a warp to have come by the same wgmma_fence, wgmma_commit and wgmma_wait, found "
              "some by those of other lines");
    Accumulator& sum = *product.sum;
    if (chain ? chain != &sum : sum.held[thread])
        wrong("expected the threads of a warpgroup to issue products of the same registers");
    if (!chain) {
        sum.registers[thread] = d, sum.held[thread] = true, sum.holders++;
        move_accumulator<false>(sum, thread);
        std::fill_n(reinterpret_cast<uint32_t*>(d), bytes / 4, poison_in_flight());
    }
    product.a_registers[thread] = a;
    if (a) {
        memcpy(product.a[thread], a, 16);
        auto used = std::find_if(t.fragments.begin(), t.fragments.end(), [a](Fragment& f) { return f.at == a; });
        if (used == t.fragments.end()) used = t.fragments.insert(used, Fragment{});
        *used = {a, {a[0], a[1], a[2], a[3]}, key.line};
    }
    sum.last[thread] = t.issued++;
    if (++product.issued < 128) return;
    g.issued++;
    for (unsigned parked : std::exchange(g.parked, {})) w.make_ready(*w.fibers[parked]);
    // It runs at once, or after so many switches, or when it is waited for.
    uint32_t when = w.random.below(4);
    while (when == 0 && !w.abandoned && g.executed < g.issued) execute_next(w, g);
    if (w.abandoned) throw Abandoned{};
    if (when && !w.product_due) w.product_due = 1 + w.random.below(when == 1 ? 8 : 512);
}

inline void note_step(ProductThread& t, uint32_t what, int line) {
    t.history = t.history * 31 + what, t.lines = t.lines * 31 + uint32_t(line);
}

inline void name_registers(ProductThread& t, const void* p, size_t bytes) {
    for (Fragment& f : t.fragments)
        if (overlap(f.at, 16, p, bytes) && memcmp(f.at, f.value, 16))
            device().misuse(formatted("wgmma_fence: expected a of the wgmma of line %d unchanged until a wgmma_wait "
                                      "names it, found it changed",
                                      f.line));
    NamedRegisters* to = nullptr;
    for (NamedRegisters& named : t.named) {
        if (named.valid && overlap(named.at, named.bytes, p, bytes)) named.valid = false;
        if (!named.valid && (!to || named.bytes == bytes)) to = &named;
    }
    if (!to) to = &t.named.emplace_back();
    to->at = (const char*)p, to->bytes = bytes, to->valid = true;
    to->value.assign(to->at, to->at + bytes);
}

inline void wait_for_products(uint32_t newest, int line) {
    Worker& w = device();
    ProductThread& t = product_thread(w);
    Warpgroup& g = warpgroup(w);
    note_step(t, 1000 + newest, line);
    if (t.issued != (t.groups.empty() ? t.waited : t.groups.back()))
        w.misuse(formatted("wgmma_wait<%u>: expected a wgmma_commit after the wgmma of line %d, found none", newest,
                           g.flight[t.issued - 1 - g.first]->key.line));
    if (t.groups.size() <= newest) return;
    auto end = t.groups.end() - std::ptrdiff_t(newest);
    uint32_t until = end[-1];
    t.groups.erase(t.groups.begin(), end);
    if (g.issued < until) {
        Fiber& self = *w.current;
        self.mask = ~0u, self.line = g.flight[until - 1 - g.first]->key.line;
        while (g.issued < until) {
            self.wait = Wait::wgmma, g.parked.push_back(self.index);
            w.run_others();
        }
    }
    while (g.executed < until) {
        execute_next(w, g);
        if (w.abandoned) throw Abandoned{};
    }
    for (unsigned thread = w.current->index % 128; t.waited < until; t.waited++) {
        Wgmma& product = *g.flight[t.waited - g.first];
        product.waited++;
        if (const uint32_t* a = product.a_registers[thread]; a && memcmp(a, product.a[thread], 16))
            w.misuse(formatted("wgmma_wait<%u>: expected a of the wgmma of line %d unchanged until this wait, found it "
                               "changed",
                               newest, product.key.line));
    }
    Products& p = products(w);
    for (; !g.flight.empty() && g.flight.front()->waited == 128; g.first++) {
        Wgmma& done = *g.flight.front();
        for (int i = 0; i < done.chunks; i++) p.chunks[done.chunk[i]].readers--;
        g.spare.push_back(std::move(g.flight.front()));
        g.flight.pop_front();
    }
}
// Accumulators land where a wait names them after their last product. Others stay poison.
inline void land(const void* p, size_t bytes) {
    Worker& w = device();
    ProductThread& t = product_thread(w);
    Warpgroup& g = warpgroup(w);
    unsigned thread = w.current->index % 128;
    auto in_flight = [&](const char* what, uint32_t product) {
        if (product >= t.waited)
            w.misuse(formatted("wgmma_wait: expected registers that no product uses any more, found the %s of the "
                               "wgmma of line %d, in flight",
                               what, g.flight[product - g.first]->key.line));
    };
    for (uint32_t i = t.waited; i < t.issued; i++)
        if (const uint32_t* a = g.flight[i - g.first]->a_registers[thread]; a && overlap(a, 16, p, bytes))
            in_flight("a", i);
    std::erase_if(t.fragments, [=](Fragment& f) { return overlap(f.at, 16, p, bytes); });
    for (auto& sum : g.sums) {
        float* d = sum->registers[thread];
        size_t whole = accumulator_bytes(sum->n);
        if (!sum->held[thread] || !overlap(d, whole, p, bytes)) continue;
        in_flight("d", sum->last[thread]);
        if (!within(d, whole, p, bytes)) w.misuse("wgmma_wait: expected all registers of an accumulator, found a part");
        if (!is_poison(d, whole))
            w.misuse("wgmma_wait: expected d untouched until a wgmma_wait names it, found it written");
        move_accumulator<true>(*sum, thread);
        sum->held[thread] = false, sum->holders--;
        for (NamedRegisters& named : t.named)
            if (overlap(named.at, named.bytes, d, whole)) named.valid = false;
    }
}

inline std::string Worker::unfinished_products(const Fiber& fiber) {
    ProductThread& t = products->threads[fiber.index];
    Warpgroup& g = products->groups[fiber.index / 128];
    if (t.issued != t.waited)
        return formatted("expected a wgmma_commit and a wgmma_wait for every wgmma, found that of line %d never waited "
                         "for at the thread's end",
                         g.flight[t.waited - g.first]->key.line);
    for (auto& sum : g.sums)
        if (sum->held[fiber.index % 128])
            return "expected a wgmma_wait that names each accumulator, found one never named at the thread's end";
    return "";
}

}  // namespace cuda_on_cpu

// An address in the block's shared memory, as PTX has it.
inline uint32_t shared_address(const void* p) {
    cuda_on_cpu::expect_shared("shared_address", p, 1);
    return uint32_t((const char*)p - cuda_on_cpu::device().shared);
}

template <int N, Major A, Major B>
void wgmma(float (&d)[N / 8][4], uint64_t a, uint64_t b, bool add, CUDA_ON_CPU_LINE) {
    static_assert(N % 8 == 0 && 8 <= N && N <= 256);
    cuda_on_cpu::issue_product({line, N, false, add, A, B, a, b, 0, 0}, d[0], nullptr);
}
template <int N, Major B>
void wgmma(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool add, CUDA_ON_CPU_LINE) {
    static_assert(N % 8 == 0 && 8 <= N && N <= 256);
    cuda_on_cpu::issue_product({line, N, true, add, K_MAJOR, B, 0, b, 0, 0}, d[0], a);
}

// An array of registers, at most four of which a fence or wait names.
struct Registers {
    const void* at = nullptr;
    size_t bytes = 0;
    Registers() = default;
    template <class T, size_t N>
    Registers(T (&r)[N]) : at(r), bytes(sizeof r) {}
};

// Orders the named registers' accesses by this thread before the products that follow.
inline void wgmma_fence(Registers a = {}, Registers b = {}, Registers c = {}, Registers d = {}, CUDA_ON_CPU_LINE) {
    cuda_on_cpu::ProductThread& t = cuda_on_cpu::product_thread(cuda_on_cpu::device());
    cuda_on_cpu::note_step(t, 2000 + (a.at != nullptr) + (b.at != nullptr) + (c.at != nullptr) + (d.at != nullptr),
                           line);
    for (Registers r : {a, b, c, d})
        if (r.at) cuda_on_cpu::name_registers(t, r.at, r.bytes);
}
inline void wgmma_commit(CUDA_ON_CPU_LINE) {
    cuda_on_cpu::ProductThread& t = cuda_on_cpu::product_thread(cuda_on_cpu::device());
    cuda_on_cpu::note_step(t, 3000, line);
    t.commits++, t.groups.push_back(t.issued);
}
// Waits for all groups but the N newest. Names the accumulators that are read from here on, and the fragments of a
// that may be overwritten.
template <int N>
void wgmma_wait(Registers a = {}, Registers b = {}, Registers c = {}, Registers d = {}, CUDA_ON_CPU_LINE) {
    static_assert(N >= 0);
    cuda_on_cpu::wait_for_products(N, line);
    for (Registers r : {a, b, c, d})
        if (r.at) cuda_on_cpu::land(r.at, r.bytes);
}

// Shows the thread's writes to shared memory so far to the asynchronous proxy.
inline void fence_proxy_async() {
    using namespace cuda_on_cpu;
    Worker& w = device();
    Products& p = products(w);
    for (uint16_t index : p.threads[w.current->index].to_fence) {
        Chunk& chunk = p.chunks[index];
        if (chunk.writer != w.current->index) continue;
        chunk.listed = 0;
        if (chunk.state != unfenced) continue;
        chunk.state = fenced;
        memcpy(p.seen.data() + index * 16, w.shared + index * 16, 16);
    }
    p.threads[w.current->index].to_fence.clear();
}

// Four 8x8 matrices of BF16 to shared memory: the mirror image of ldmatrix_x4.
__forceinline__ void stmatrix_x4(__nv_bfloat16* row, const uint32_t (&r)[4], CUDA_ON_CPU_LINE) {
    using namespace cuda_on_cpu;
    expect_aligned("stmatrix_x4", row, 16);
    expect_shared("stmatrix_x4", row, 16);
    Worker& w = device();
    note_write(w, "stmatrix_x4", row);
    StmatrixOperands mine{row, r, w.current->index};
    w.warps[w.current->index / 32].operands[w.current->index % 32] = &mine;
    w.collective(Wait::stmatrix, ~0u, line, [&w](Warp& warp) { store_matrices(w, warp); });
}
