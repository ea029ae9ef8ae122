// keel_common.h: what train_keel.cu and train_keel_cpu.cpp share, and neither computes on tensors with.
//
// In order: errors and small tools, random numbers, the norm placements, the parameter table, files, data, the
// command line, the optimizer's schedule and the defaults, the output folder, the memory table, the comparison of two
// debug states, sampling, and the run around a training step, a template over what a trainer computes. Each fact stands
// here once, as a row of a table: a norm placement, a parameter tensor, a flag. Allocation, file order, initialisation,
// dumps, comparison and the optimizer walk them.
#pragma once

#include <fcntl.h>
#include <glob.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>
#ifdef KEEL_MPI
#include <mpi.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <functional>
#include <future>
#include <limits>
#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

static_assert(std::endian::native == std::endian::little, "the file formats are little-endian");

// ----------------------------------------------------------------------------------------------------
// Errors and small tools

// What a user can mend. The message is one line: what was expected, what was found, what to do.
struct Error : std::runtime_error { using std::runtime_error::runtime_error; };

// Training data that went away or changed while the run was reading it. The weights are still those of the step before.
struct DataError : Error { using Error::Error; };

[[gnu::format(printf, 1, 2)]] inline std::string format(const char* pattern, ...) {
    va_list args, again;
    va_start(args, pattern);
    va_copy(again, args);
    int length = vsnprintf(nullptr, 0, pattern, args);
    va_end(args);
    std::string text(size_t(std::max(length, 0)), '\0');
    vsnprintf(text.data(), text.size() + 1, pattern, again);
    va_end(again);
    return text;
}

// fail("-L: expected an even number, found %d; ...", L)
template <class... Args>
[[noreturn]] inline void fail(const char* pattern, Args... args) {
    if constexpr (sizeof...(Args) == 0) throw Error(pattern);
    else throw Error(format(pattern, args...));
}

inline double seconds() {
    using clock = std::chrono::steady_clock;
    return std::chrono::duration<double>(clock::now().time_since_epoch()).count();
}

// Seconds since the process was started, to the kernel's clock tick of 10 ms; 0 where the kernel does not say.
inline double seconds_since_launch() {
    FILE* file = fopen("/proc/self/stat", "re");
    if (!file) return 0;
    char text[2048] = {};
    size_t got = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    const char* field = got ? strrchr(text, ')') : nullptr;  // the program's name, field 2, may hold spaces
    for (int i = 2; field && i < 22; i++) field = strchr(field + 1, ' ');
    timespec now;
    if (!field || clock_gettime(CLOCK_BOOTTIME, &now) != 0) return 0;
    return std::max(0.0, double(now.tv_sec) + double(now.tv_nsec) * 1e-9 - atof(field) / double(sysconf(_SC_CLK_TCK)));
}

inline size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline std::string errno_text() { return strerror(errno); }

// "3.2 GiB"
inline std::string bytes_text(double bytes) {
    const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    int u = 0;
    while (bytes >= 1024 && u < 4) bytes /= 1024, u++;
    return format(u == 0 ? "%.0f %s" : "%.1f %s", bytes, units[u]);
}

// "1h02m", "3m20s", "12s"
inline std::string duration_text(double s) {
    long n = long(s + 0.5);
    if (n >= 86400) return format("%ldd%02ldh", n / 86400, n % 86400 / 3600);
    if (n >= 3600) return format("%ldh%02ldm", n / 3600, n % 3600 / 60);
    if (n >= 60) return format("%ldm%02lds", n / 60, n % 60);
    return format("%lds", n);
}

// "1.62 M"
inline std::string count_text(double n) {
    const char* units[] = {"", " K", " M", " B", " T"};
    int u = 0;
    while (n >= 1000 && u < 4) n /= 1000, u++;
    return format(u == 0 ? "%.0f%s" : "%.2f%s", n, units[u]);
}

// CRC-32 of zlib and PNG (reflected polynomial 0xEDB88320), eight bytes a turn: table[k][b] is the CRC of byte b
// followed by k zero bytes, so that the eight bytes of a word can be looked up independently ("slicing by 8").
inline uint32_t crc32(const void* data, size_t bytes, uint32_t crc = 0) {
    static const auto table = [] {
        std::array<std::array<uint32_t, 256>, 8> t{};
        for (uint32_t b = 0; b < 256; b++) {
            uint32_t c = b;
            for (int bit = 0; bit < 8; bit++) c = (c >> 1) ^ (c & 1 ? 0xEDB88320u : 0);
            t[0][b] = c;
        }
        for (int k = 1; k < 8; k++)
            for (int b = 0; b < 256; b++) t[k][b] = (t[k - 1][b] >> 8) ^ t[0][t[k - 1][b] & 255];
        return t;
    }();
    const unsigned char* p = static_cast<const unsigned char*>(data);
    crc = ~crc;
    for (; bytes >= 8; bytes -= 8, p += 8) {
        uint32_t lo, hi;
        memcpy(&lo, p, 4);
        memcpy(&hi, p + 4, 4);
        lo ^= crc;
        crc = table[7][lo & 255] ^ table[6][lo >> 8 & 255] ^ table[5][lo >> 16 & 255] ^ table[4][lo >> 24] ^
              table[3][hi & 255] ^ table[2][hi >> 8 & 255] ^ table[1][hi >> 16 & 255] ^ table[0][hi >> 24];
    }
    for (; bytes > 0; bytes--, p++) crc = (crc >> 8) ^ table[0][(crc ^ *p) & 255];
    return ~crc;
}

// The CRC of two stretches of bytes, from the CRC of each: n bytes more multiply a CRC, as a polynomial over GF(2)
// whose highest bit is the constant term, by x^(8n) modulo the CRC's own polynomial.
inline uint32_t crc32_combine(uint32_t first, uint32_t second, size_t bytes_of_second) {
    auto product = [](uint32_t a, uint32_t b) {
        uint32_t p = 0;
        for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
            if (a & bit) p ^= b;
            b = (b >> 1) ^ (b & 1 ? 0xEDB88320u : 0);
        }
        return p;
    };
    uint32_t power = 1u << 31, square = 1u << 23;  // x^0, x^8
    for (size_t n = bytes_of_second; n; n >>= 1, square = product(square, square))
        if (n & 1) power = product(power, square);
    return product(power, first) ^ second;
}

// The same CRC by several threads where there are enough bytes: each takes a piece, then the pieces are combined in
// order.
inline uint32_t crc32_parallel(const void* data, size_t bytes, uint32_t crc = 0) {
    constexpr size_t least_piece = size_t(2) << 20;
    size_t pieces = std::min<size_t>({bytes / least_piece, std::max(1u, std::thread::hardware_concurrency()), 16});
    if (pieces < 2) return crc32(data, bytes, crc);
    const char* from = static_cast<const char*>(data);
    size_t piece = bytes / pieces;
    std::vector<uint32_t> sums(pieces);
    std::vector<std::thread> threads;
    auto take = [&](size_t i) { sums[i] = crc32(from + i * piece, i + 1 < pieces ? piece : bytes - i * piece); };
    size_t started = 1;  // the first piece is ours
    try {
        for (threads.reserve(pieces); started < pieces; started++) threads.emplace_back(take, started);
    } catch (const std::system_error&) {  // no more threads: what is left is ours too
    }
    take(0);
    for (size_t i = started; i < pieces; i++) take(i);
    for (std::thread& thread : threads) thread.join();
    for (size_t i = 0; i < pieces; i++) crc = crc32_combine(crc, sums[i], i + 1 < pieces ? piece : bytes - i * piece);
    return crc;
}

// ----------------------------------------------------------------------------------------------------
// Random numbers: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
//
// A block cipher of a counter: number i of a stream needs no number before it, so every weight and every
// sample is a function of (seed, index), whatever the thread, rank or device that draws it.

struct Philox { uint32_t word[4]; };

constexpr Philox philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
        uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
        c0 = n0, c1 = uint32_t(p1), c2 = n2, c3 = uint32_t(p0);
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// What the last counter word separates: one seed serves weights, data order and sampling, and no number twice.
enum PhiloxStream : uint32_t {
    STREAM_WEIGHTS = 0,
    STREAM_DATA = 1,
    STREAM_SAMPLE = 2,
    STREAM_GRADIENTS = 3,
    STREAM_MOMENTS = 4,
    STREAM_PROGRAMS = 5
};

// Uniform in [0, 1) with 24 bits: exact in FP32.
constexpr float uniform24(uint32_t word) { return float(word >> 8) * 0x1p-24f; }

// ----------------------------------------------------------------------------------------------------
// The model's shape and the norm placements
//
//     x_0     = sqrt(C) * (wte[token] + wpe[position])
//     u_l     = norm_in  ? RMSNorm(x_l; gamma_in_l)  : x_l
//     z_l     = alpha_l * x_l + F_l(u_l)            F_l: attention for even l, feed-forward for odd l
//     x_{l+1} = norm_out ? RMSNorm(z_l; gamma_out_l) : z_l
//     logits  = (norm_final ? RMSNorm(x_L; gamma_final) : x_L) @ wte^T

enum NormPlacement : int32_t { KEEL, PRE, POST, DEEPNORM, MIXLN, HYBRIDNORM, SCALEDPOST, NUM_PLACEMENTS };

// One sub-layer's place in the formulas above. norm_qkv: a per-head RMSNorm of q, k and v (attention only).
struct SublayerNorm {
    float alpha;
    bool norm_in, norm_out, norm_qkv;
};

inline bool is_attention(int l) { return l % 2 == 0; }

struct PlacementRow {
    const char* name;
    bool norm_final;
    float (*alpha)(int L);                            // the default alpha; null where the placement has none
    SublayerNorm (*sublayer)(int l, int L, float a);  // a: the alpha in force
    const char* source;
};

inline const PlacementRow placements[NUM_PLACEMENTS] = {
    // The first attention has neither alpha nor outer norm, the first feed-forward no alpha (section 3.1).
    {"keel", false, [](int L) { return float(L); },
     [](int l, int, float a) { return SublayerNorm{l < 2 ? 1.0f : a, true, l > 0, false}; },
     "Chen and Wei 2026, arXiv 2601.19895, eq. 8"},
    {"pre", true, nullptr, [](int, int, float) { return SublayerNorm{1, true, false, false}; }, "Xiong et al. 2020"},
    {"post", false, nullptr, [](int, int, float) { return SublayerNorm{1, false, true, false}; },
     "Vaswani et al. 2017"},
    {"deepnorm", false, [](int L) { return float(std::sqrt(std::sqrt(double(L)))); },
     [](int, int, float a) { return SublayerNorm{a, false, true, false}; }, "Wang et al. 2022"},
    // Post-LN for the first quarter of the depth, Pre-LN after.
    {"mixln", true, nullptr,
     [](int l, int L, float) {
    bool post = l / 2 < std::max(1, L / 8);
    return SublayerNorm{1, !post, post, false};
}, "Li et al. 2024"},
    // y = MHA(x) + x with normed q, k, v;  x' = FFN(Norm(y)) + Norm(y): the norm after attention serves both.
    {"hybridnorm", true, nullptr,
     [](int l, int, float) { return SublayerNorm{1, false, is_attention(l), is_attention(l)}; }, "Zhuo et al. 2025"},
    {"scaledpost", false, [](int L) { return float(L); },
     [](int, int, float a) { return SublayerNorm{a, false, true, false}; }, "the KEEL paper's attempt 1, eq. 24"},
};

inline std::string placement_names() {
    std::string names;
    for (const PlacementRow& row : placements) names += (names.empty() ? "" : ", ") + std::string(row.name);
    return names;
}

inline NormPlacement placement_by_name(const std::string& name) {
    for (int p = 0; p < NUM_PLACEMENTS; p++)
        if (name == placements[p].name) return NormPlacement(p);
    fail("--norm: expected one of %s, found '%s'", placement_names().c_str(), name.c_str());
}

struct ModelConfig {
    int max_seq_len = 0;  // rows of wpe, the longest T
    int V = 0;            // vocabulary
    int L = 0;            // sub-layers; L/2 attention and L/2 feed-forward
    int H = 0;            // heads
    int C = 0;            // channels
    NormPlacement norm = KEEL;
    float alpha = 1;  // 1 where the placement has none

    int Vp() const { return int(round_up(size_t(V), 128)); }  // V padded, the rows of wte
    int D() const { return C / H; }                           // channels of a head
    bool norm_final() const { return placements[norm].norm_final; }
    SublayerNorm sublayer(int l) const { return placements[norm].sublayer(l, L, alpha); }
};

// Floating-point operations of one training step a token: forward 2, backward 4 a weight, and causal attention
// counted once (half of the T x T products); recomputation is not counted.
inline double flops_per_token(const ModelConfig& c, int T) {
    return 6.0 * (12.0 * c.C * c.C * (c.L / 2) + double(c.Vp()) * c.C) + 6.0 * c.C * double(T) * (c.L / 2);
}

// ----------------------------------------------------------------------------------------------------
// The parameter table
//
// A matrix is (out, in), row-major. qkvw's rows are q, then k, then v, with head h at h*D.

enum Tensor {
    WTE,
    WPE,
    GAMMA_IN,
    QKVW,
    GAMMA_Q,
    GAMMA_K,
    GAMMA_V,
    ATTPROJW,
    FCW,
    FCPROJW,
    GAMMA_OUT,
    GAMMA_FINAL,
    NUM_TENSORS
};
enum TensorPlace { BEFORE_BLOCKS, EVERY_SUBLAYER, ATTENTION, FEED_FORWARD, AFTER_BLOCKS };

struct TensorRow {
    const char* name;
    TensorPlace place;
    int (*rows)(const ModelConfig&);
    int (*cols)(const ModelConfig&);
    // Initialised uniform with variance 1/fan_in (bound sqrt(3/fan_in)) and decayed; 0: a gain, starts as 1, no decay.
    int (*fan_in)(const ModelConfig&);
    bool (*exists)(const ModelConfig&, const SublayerNorm&);
};

namespace table {  // the words that the table's rows are written in
using Config = const ModelConfig&;
using Norm = const SublayerNorm&;
inline int one(Config) { return 1; }
inline int none(Config) { return 0; }
inline int C(Config c) { return c.C; }
inline int C3(Config c) { return 3 * c.C; }
inline int C4(Config c) { return 4 * c.C; }
inline int D(Config c) { return c.D(); }
inline int Vp(Config c) { return c.Vp(); }
inline int max_T(Config c) { return c.max_seq_len; }
inline bool always(Config, Norm) { return true; }
inline bool norm_in(Config, Norm s) { return s.norm_in; }
inline bool norm_out(Config, Norm s) { return s.norm_out; }
inline bool norm_qkv(Config, Norm s) { return s.norm_qkv; }
inline bool norm_final(Config c, Norm) { return c.norm_final(); }
}  // namespace table

inline const TensorRow tensor_rows[NUM_TENSORS] = {
    // name         place           rows          cols      fan_in       exists where
    {"wte", BEFORE_BLOCKS, table::Vp, table::C, table::C, table::always},
    {"wpe", BEFORE_BLOCKS, table::max_T, table::C, table::C, table::always},
    {"gamma_in", EVERY_SUBLAYER, table::one, table::C, table::none, table::norm_in},
    {"qkvw", ATTENTION, table::C3, table::C, table::C, table::always},
    {"gamma_q", ATTENTION, table::one, table::D, table::none, table::norm_qkv},
    {"gamma_k", ATTENTION, table::one, table::D, table::none, table::norm_qkv},
    {"gamma_v", ATTENTION, table::one, table::D, table::none, table::norm_qkv},
    {"attprojw", ATTENTION, table::C, table::C, table::C, table::always},
    {"fcw", FEED_FORWARD, table::C4, table::C, table::C, table::always},
    {"fcprojw", FEED_FORWARD, table::C, table::C4, table::C4, table::always},
    {"gamma_out", EVERY_SUBLAYER, table::one, table::C, table::none, table::norm_out},
    {"gamma_final", AFTER_BLOCKS, table::one, table::C, table::none, table::norm_final},
};

// One tensor of a model: its row of the table with the shape filled in.
struct TensorInfo {
    Tensor id;
    int layer;         // sub-layer; -1 outside the blocks
    std::string name;  // "qkvw[6]"
    size_t rows, cols;
    size_t offset;       // first element in memory
    size_t file_offset;  // first element in the parameter order, that of every file
    float bound;         // weights start uniform in [-bound, bound); 0: a gain, starts as 1
    float bound_tail;    // the same from row tail_row on (DeepNorm scales V alone of q, k and v)
    size_t tail_row;
    size_t used_rows;  // rows after these are padding, always zero (wte's)
    bool decay;
    size_t size() const { return rows * cols; }
};

// What ranks reduce, gather and divide among themselves as one: a stretch of memory of ranks * shard elements, of which
// rank r owns [r * shard, (r+1) * shard). Padding, at its end, is in memory only, never in a file.
struct Unit {
    size_t first;        // first element in memory
    size_t shard;        // elements that each rank owns
    size_t shard_first;  // where a rank's part starts in its arrays of all that it owns
    size_t count;        // elements of tensors; the rest is padding
};
inline size_t shard_elements(size_t count, int ranks) {
    return round_up((count + size_t(ranks) - 1) / size_t(ranks), 128);
}

// A part of a tensor that a rank owns.
struct Stretch {
    size_t tensor;         // its index in the parameter order
    size_t first, count;   // elements [first, first + count) of the tensor
    size_t memory, shard;  // where the first of them is in memory, and in the arrays of what the rank owns
};

// Where the parameters are. The parameter order is that of every file. It is also that of memory, unless the memory is
// cut for ranks: then unit 0 holds the embeddings and all gains, which every rank reads in FP32, and unit 1 + m the
// matrices of block m, its attention and its feed-forward, whose gradients are whole at the same moment of the backward
// pass.
struct ParameterLayout {
    std::vector<TensorInfo> tensors;  // in the parameter order
    size_t count = 0;                 // elements in all
    size_t size = 0;                  // the same in memory, padding included
    size_t shard_size = 0;            // elements that each rank owns, padding included
    int ranks = 1;                    // that the memory is cut for
    std::vector<Unit> units;
    static constexpr size_t absent = SIZE_MAX;

    // cut_for: how many ranks; 0: not cut, in file order.
    explicit ParameterLayout(const ModelConfig& c, int cut_for = 0)
        : ranks(std::max(1, cut_for)), index(size_t(c.L) + 1) {
        for (auto& row : index) row.fill(absent);
        add_place(c, BEFORE_BLOCKS, -1);
        for (int l = 0; l < c.L; l++) add_place(c, is_attention(l) ? ATTENTION : FEED_FORWARD, l);
        add_place(c, AFTER_BLOCKS, -1);
        if (cut_for > 0) cut(c);
        else units = {{0, count, 0, count}}, size = shard_size = count;
    }

    // Where a tensor starts, or `absent` where the placement does not have it.
    size_t offset(Tensor id, int layer = -1) const { return index[size_t(layer + 1)][id]; }

    // The unit that a tensor is in.
    size_t unit_of(const TensorInfo& t) const {
        return units.size() > 1 && in_block_unit(t) ? 1 + size_t(t.layer) / 2 : 0;
    }

    // What rank r owns, in the parameter order: at most one stretch of each tensor.
    std::vector<Stretch> stretches(int rank) const {
        std::vector<Stretch> owned;
        for (size_t i = 0; i < tensors.size(); i++) {
            const TensorInfo& t = tensors[i];
            const Unit& u = units[unit_of(t)];
            size_t begin = u.first + size_t(rank) * u.shard, from = std::max(begin, t.offset),
                   to = std::min(begin + u.shard, t.offset + t.size());
            if (from < to) owned.push_back({i, from - t.offset, to - from, from, u.shard_first + (from - begin)});
        }
        return owned;
    }
    // The same where memory holds those of two blocks at a time, by turns: of gradients at -z 2.
    ParameterLayout with_two_blocks() const {
        ParameterLayout l = *this;
        size_t block = units[1].shard * size_t(ranks);
        for (size_t u = 1; u < units.size(); u++) l.units[u].first = units[1].first + (u - 1) % 2 * block;
        for (TensorInfo& t : l.tensors) {
            size_t u = unit_of(t);
            l.index[size_t(t.layer + 1)][t.id] = t.offset = t.offset - units[u].first + l.units[u].first;
        }
        l.size = units[1].first + std::min<size_t>(units.size() - 1, 2) * block;
        return l;
    }

    size_t owned_count(int rank) const {
        size_t n = 0;
        for (const Stretch& s : stretches(rank)) n += s.count;
        return n;
    }

private:
    std::vector<std::array<size_t, NUM_TENSORS>> index;  // [layer + 1][tensor] -> offset

    static bool in_block_unit(const TensorInfo& t) { return t.layer >= 0 && t.decay; }

    void cut(const ModelConfig& c) {
        units.assign(1 + size_t(c.L) / 2, Unit{});
        for (const TensorInfo& t : tensors) units[unit_of(t)].count += t.size();
        for (Unit& u : units) {
            u.first = size, u.shard_first = shard_size, u.shard = shard_elements(u.count, ranks);
            size += u.shard * size_t(ranks), shard_size += u.shard;
        }
        std::vector<size_t> next;
        for (const Unit& u : units) next.push_back(u.first);
        for (TensorInfo& t : tensors) {
            size_t& at = next[unit_of(t)];
            t.offset = index[size_t(t.layer + 1)][t.id] = at;
            at += t.size();
        }
    }

    void add_place(const ModelConfig& c, TensorPlace place, int l) {
        for (int t = 0; t < NUM_TENSORS; t++) {
            const TensorRow& row = tensor_rows[t];
            SublayerNorm norm = l >= 0 ? c.sublayer(l) : SublayerNorm{};
            bool here = row.place == place || (l >= 0 && row.place == EVERY_SUBLAYER);
            if (!here || !row.exists(c, norm)) continue;
            TensorInfo info{};
            info.id = Tensor(t);
            info.layer = l;
            info.name = l >= 0 ? format("%s[%d]", row.name, l) : row.name;
            info.rows = size_t(row.rows(c)), info.cols = size_t(row.cols(c));
            info.offset = info.file_offset = count;
            info.used_rows = t == WTE ? size_t(c.V) : info.rows;
            info.tail_row = info.rows;
            int fan_in = row.fan_in(c);
            info.decay = fan_in > 0;
            if (fan_in > 0) {
                // DeepNorm as the KEEL paper states it: V, the output projection and both feed-forward matrices
                // times L^-0.25, whatever -a says of alpha.
                double bound = std::sqrt(3.0 / fan_in), scaled = bound / std::sqrt(std::sqrt(double(c.L)));
                bool all = c.norm == DEEPNORM && (t == ATTPROJW || t == FCW || t == FCPROJW);
                info.bound = float(all ? scaled : bound);
                info.bound_tail = float(scaled);
                if (c.norm == DEEPNORM && t == QKVW) info.tail_row = 2 * size_t(c.C);
            }
            index[size_t(l + 1)][t] = count;
            count += info.size();
            tensors.push_back(info);
        }
    }
};

// The initial values of rows [first, last) of one tensor: key = seed, counter = (e/4, index of the tensor), word e mod
// 4 for element e, then bound * (2u - 1). Both factors are exact in FP32 and the product is rounded once, so the same
// bits come out on every machine; uniform rather than normal because it needs no log and no cosine.
template <class Real>
void initialise_tensor(Real* out, const TensorInfo& t, size_t tensor_index, uint64_t seed, size_t first, size_t last) {
    Philox block{};
    size_t block_index = SIZE_MAX;
    for (size_t row = first; row < last; row++) {
        float bound = row < t.tail_row ? t.bound : t.bound_tail;
        for (size_t col = 0; col < t.cols; col++) {
            size_t e = row * t.cols + col;
            if (t.bound == 0 || row >= t.used_rows) {
                out[e] = t.bound == 0 ? Real(1) : Real(0);
                continue;
            }
            if (e / 4 != block_index) {
                block_index = e / 4;
                block = philox(seed, uint32_t(block_index), uint32_t(block_index >> 32), uint32_t(tensor_index),
                               STREAM_WEIGHTS);
            }
            out[e] = Real(bound * (2.0f * uniform24(block.word[e % 4]) - 1.0f));
        }
    }
}

// ----------------------------------------------------------------------------------------------------
// --train hops:K: programs made on the fly, whose queries take 1 to K lookups to answer
//
//     bfb;kak;fkf;...;2bk;1ka;3ba;...         b is f, k is a, f is k: two lookups from b lead to k
//
// A program has 2K + 1 variables, the first letters of the alphabet, each of which is assigned another one, so that all
// of them make one cycle, drawn anew for each program. An assignment is name, what it is, and the name again; they come
// in random order, so that a lookup leads back or forth. Then queries, no two alike: a number of lookups, 1 to K, a
// name, and the answer follows. K + 1 lookups backwards are no shorter than K forwards, so no query of h lookups can be
// answered by fewer; but one after the first may be shortened by an answer before it. They are there to be learnt from,
// and only the first of a program is measured.
//
// The loss is that of all characters, as for any text: what an assignment says cannot be foreseen, so most of it is
// entropy that no model removes. Why the name stands twice: a lookup needs two things at once, that a value knows whose
// it is and that a query finds it, and neither alone lowers the loss. Foreseeing the second name teaches the first.
// Without it ("kf;...;2bk;") 77 % of one lookup and none of two are right after 2500 steps of hops:2 (-L 8 -C 64 -H 4
// -b 16 -u 200 -l 6e-3), with it all of both from step 1000 on. Why a query says how many lookups it takes, and its
// answer is a name: each number of lookups is then a step on from the one before, which is asked as well. Where chains
// of names end in a digit that alone is asked for, two lookups are still at chance after 2500 steps.
struct HopPrograms {
    static constexpr int MAX_HOPS = 9;  // a digit says how many
    int hops = 0;                       // K; 0: the data are files

    struct Answer {
        int position, hops;  // the answer is the target of this position, that of the name, and takes so many lookups
    };

    int variables() const { return 2 * hops + 1; }
    int queries() const { return std::min(4 * hops, hops * variables()); }
    // The characters of one program, its end of line included.
    int length() const { return 4 * (variables() + queries()); }
    // The accuracy at the first query without a lookup: every other name is as likely.
    double chance() const { return 1.0 / (variables() - 1); }

    // Characters row[0..n) of sequence s: as many whole programs as fit, and ends of line. A function of (seed, s,
    // validation) alone: training and validation draw from counters that differ in the top bit of their third word.
    // answers gets the first of each program.
    void sequence(uint64_t seed, uint64_t s, bool validation, int n, int* row,
                  std::vector<Answer>* answers = nullptr) const {
        Philox block{};
        uint32_t drawn = 0;
        auto below = [&](int bound) {  // uniform in [0, bound), but for a bias of bound / 2^32
            if (drawn % 4 == 0)
                block = philox(seed, uint32_t(s), uint32_t(s >> 32), drawn / 4 | uint32_t(validation) << 31,
                               STREAM_PROGRAMS);
            return int(uint64_t(block.word[drawn++ % 4]) * uint64_t(bound) >> 32);
        };
        // The first `count` places of a random permutation of [0, size).
        auto permutation = [&](int size, int count) {
            std::vector<int> order(static_cast<size_t>(size));
            for (int i = 0; i < size; i++) order[size_t(i)] = i;
            for (int i = 0; i < count; i++) std::swap(order[size_t(i)], order[size_t(i + below(size - i))]);
            return order;
        };
        int at = 0;
        while (at + length() <= n) {
            std::vector<int> letter =
                permutation(variables(), variables());  // of place i of the cycle: name(i) is name(i + 1)
            auto name = [&](int place) { return 'a' + letter[size_t(place % variables())]; };
            auto put = [&](std::initializer_list<int> characters) {
                for (int c : characters) row[at++] = c;
            };
            for (int i : permutation(variables(), variables())) put({name(i), name(i + 1), name(i), ';'});
            std::vector<int> asked = permutation(hops * variables(), queries());  // place * K + lookups - 1
            if (answers) answers->push_back({at + 1, asked[0] % hops + 1});
            for (int q = 0; q < queries(); q++) {
                int place = asked[size_t(q)] / hops, lookups = asked[size_t(q)] % hops + 1;
                put({'0' + lookups, name(place), name(place + lookups), q + 1 < queries() ? ';' : '\n'});
            }
        }
        while (at < n) row[at++] = '\n';
    }

    // "hops:8" -> 8; 0 where the word is a path.
    static int parse(const std::string& word) {
        if (!word.starts_with("hops:")) return 0;
        std::string number = word.substr(5);
        int k = !number.empty() && number.size() < 4 && number.find_first_not_of("0123456789") == std::string::npos
                    ? atoi(number.c_str())
                    : 0;
        if (k < 1 || k > MAX_HOPS)
            fail("-i: expected hops:K with K from 1 to %d, found '%s'; a file of that name is ./%s", MAX_HOPS,
                 word.c_str(), word.c_str());
        return k;
    }
};

// ----------------------------------------------------------------------------------------------------
// Files
//
// Every file is a header of 256 int32, a body of reals and tokens, and the CRC-32 of all bytes before it.

enum FileKind { FILE_MODEL = 1, FILE_STATE = 2, FILE_DEBUG = 3 };
enum RealType { REAL_FP32 = 0, REAL_BF16 = 1, REAL_FP64 = 2 };

inline const char* kind_name(int kind) {
    const char* names[] = {"?", "model", "training state", "debug state"};
    return kind >= 1 && kind <= 3 ? names[kind] : names[0];
}
inline size_t real_size(int type) { return type == REAL_FP64 ? 8 : type == REAL_FP32 ? 4 : 2; }
template <class Real>
constexpr RealType real_type = sizeof(Real) == 8 ? REAL_FP64 : REAL_FP32;

// The words of the header. A training state holds beside the model all that a bit-exact resume needs.
enum HeaderWord {
    H_MAGIC = 0,    // the bytes 'K','E','E','L'
    H_VERSION = 1,  // 1
    H_KIND = 2,     // FileKind
    H_TYPE = 3,     // RealType of the stored reals
    H_MAX_T = 4,
    H_V = 5,
    H_VP = 6,
    H_L = 7,
    H_H = 8,
    H_C = 9,
    H_NORM = 10,   // NormPlacement
    H_ALPHA = 11,  // bits of the FP32 alpha, 1 where there is none
    H_B = 12,
    H_T = 13,            // debug state: the batch; training state: micro-batch (sequences) and sequence length
    H_STEP = 14,         // int64, steps finished
    H_BRANCH_BF16 = 16,  // 1: the branch was computed in BF16
    // from here on: training state only
    H_RECOMPUTE = 17,     // 0 none, -1 gelu, 1 layer, K: every K-th z is kept
    H_TOTAL_BATCH = 18,   // int64, tokens a step
    H_STEPS = 20,         // int64, length of the schedule
    H_WARMUP = 22,        // int64, steps
    H_LR = 24,            // double
    H_WEIGHT_DECAY = 26,  // double
    H_CLIP = 28,          // double
    H_SEED = 30,          // uint64
    H_TRAIN_TOKENS = 32,  // int64, tokens of the training split: a resume on other data is refused
    H_RANKS = 34,
    H_RANK = 35,         // the file is of rank H_RANK of H_RANKS: it has what that rank owns
    H_VAL_EVERY = 36,    // int64, steps; this and the next two decide what the log's val_loss is
    H_VAL_BATCHES = 38,  // int64
    H_VAL_TOKENS = 40,   // int64, tokens of the validation split
    H_SKIPPED = 42,  // int64, steps so far that updated nothing, as their loss or gradient was not finite: AdamW's bias
                     // corrections count the others
    H_SKIPPED_IN_ROW = 44,  // int64, of them the last ones without a finite step between
    H_MOMENTS_BF16 = 46,
    H_GRADS_BF16 = 47,  // 1: --moments bf16, --grads bf16
    H_HOPS = 48,        // K of --train hops:K; 0: the data are files
};

struct FileHeader {
    std::array<int32_t, 256> word{};

    template <class T>
    T get(HeaderWord w) const {
        T value;
        memcpy(&value, &word[w], sizeof value);
        return value;
    }
    template <class T>
    void set(HeaderWord w, T value) {
        memcpy(&word[w], &value, sizeof value);
    }

    ModelConfig model() const {
        ModelConfig c;
        c.max_seq_len = word[H_MAX_T], c.V = word[H_V], c.L = word[H_L], c.H = word[H_H], c.C = word[H_C];
        c.norm = NormPlacement(word[H_NORM]);
        c.alpha = get<float>(H_ALPHA);
        return c;
    }
};

inline FileHeader make_header(FileKind kind, RealType type, const ModelConfig& c, int64_t step,
                              bool branch_bf16 = false) {
    FileHeader h;
    memcpy(&h.word[H_MAGIC], "KEEL", 4);
    h.word[H_VERSION] = 1, h.word[H_KIND] = kind, h.word[H_TYPE] = type;
    h.word[H_MAX_T] = c.max_seq_len, h.word[H_V] = c.V, h.word[H_VP] = c.Vp();
    h.word[H_L] = c.L, h.word[H_H] = c.H, h.word[H_C] = c.C;
    h.word[H_NORM] = c.norm;
    h.set(H_ALPHA, c.alpha);
    h.set(H_STEP, step);
    h.word[H_BRANCH_BF16] = branch_bf16;
    return h;
}

// Bounds that keep every product of two dimensions inside int and every tensor's size inside size_t.
inline constexpr int MAX_L = 1 << 17, MAX_C = 1 << 17, MAX_V = 1 << 24, MAX_T = 1 << 24, MAX_B = 1 << 20,
                     MAX_RANKS = 1 << 16;

// Empty if the shape is one that both trainers can hold, else what is wrong with it.
inline std::string config_fault(const ModelConfig& c) {
    if (c.L < 2 || c.L % 2 || c.L > MAX_L) return format("L (-L) must be even, from 2 to %d, and is %d", MAX_L, c.L);
    if (c.C < 1 || c.C > MAX_C) return format("C (-C) must be from 1 to %d and is %d", MAX_C, c.C);
    if (c.H < 1 || c.C % c.H) return format("H (-H) must divide C = %d and is %d", c.C, c.H);
    if (c.V < 1 || c.V > MAX_V) return format("V must be from 1 to %d and is %d", MAX_V, c.V);
    if (c.max_seq_len < 1 || c.max_seq_len > MAX_T)
        return format("T (-t) must be from 1 to %d and is %d", MAX_T, c.max_seq_len);
    if (c.norm < 0 || c.norm >= NUM_PLACEMENTS)
        return format("the norm placement must be from 0 to %d and is %d", NUM_PLACEMENTS - 1, int(c.norm));
    if (!(c.alpha > 0) || !std::isfinite(c.alpha)) return format("alpha (-a) must be above 0 and is %g", c.alpha);
    return "";
}

// The largest numbers of a run, in flags and in files alike: a product of two of them that the program takes stays
// inside an int64.
inline constexpr double MAX_STEPS = 1e15, MAX_TOTAL_BATCH = 1e12, MAX_VAL_BATCHES = 1e9, MAX_RATE = 1e9,
                        MAX_CLIP = 1e30;

// Empty if the words of a training state are those of a run that can be, else what is wrong with them. A CRC only tells
// of accidents: whoever makes a file makes its CRC too.
inline std::string state_fault(const FileHeader& h) {
    ModelConfig c = h.model();
    int B = h.word[H_B], T = h.word[H_T], level = h.word[H_RECOMPUTE];
    if (B < 1 || B > MAX_B) return format("B must be from 1 to %d and is %d", MAX_B, B);
    if (T < 1 || T > c.max_seq_len) return format("T must be from 1 to %d and is %d", c.max_seq_len, T);
    if (level < -1 || level > MAX_L || (level > 1 && level % 2))
        return format("the level of recomputation must be -1, 0, 1 or even and is %d", level);
    int ranks = h.word[H_RANKS], rank = h.word[H_RANK];
    if (ranks < 1 || ranks > MAX_RANKS || rank < 0 || rank >= ranks)
        return format("it must be of a rank of 1 to %d ranks and is of rank %d of %d", MAX_RANKS, rank, ranks);
    int64_t total = h.get<int64_t>(H_TOTAL_BATCH), multiple = int64_t(B) * T * ranks;
    if (total < 1 || double(total) > MAX_TOTAL_BATCH || total / T > INT_MAX || total % multiple)
        return format("the total batch must be a multiple of %lld and is %lld", (long long)multiple, (long long)total);
    struct {
        HeaderWord word;
        const char* name;
        double least, most;
    } integers[] = {{H_STEP, "the step", 0, MAX_STEPS},
                    {H_STEPS, "the number of steps", 0, MAX_STEPS},
                    {H_WARMUP, "the warm-up", 0, MAX_STEPS},
                    {H_TRAIN_TOKENS, "the number of training tokens", 0, 9e18},
                    {H_VAL_TOKENS, "the number of validation tokens", 0, 9e18},
                    {H_VAL_EVERY, "the steps between validations", 0, 9e18},
                    {H_VAL_BATCHES, "the number of validation batches", 1, MAX_VAL_BATCHES},
                    {H_SKIPPED, "the number of skipped steps", 0, double(h.get<int64_t>(H_STEP))},
                    {H_SKIPPED_IN_ROW, "the number of steps skipped in a row", 0, double(h.get<int64_t>(H_SKIPPED))}};
    for (const auto& row : integers)
        if (int64_t n = h.get<int64_t>(row.word); double(n) < row.least || double(n) > row.most)
            return format("%s must be from %.0f to %.0f and is %lld", row.name, row.least, row.most, (long long)n);
    struct {
        HeaderWord word;
        const char* name;
        double most;
    } reals[] = {{H_LR, "the learning rate", MAX_RATE},
                 {H_WEIGHT_DECAY, "the weight decay", MAX_RATE},
                 {H_CLIP, "the clip", MAX_CLIP}};
    for (const auto& row : reals)
        if (double x = h.get<double>(row.word); !(x >= 0 && x <= row.most))
            return format("%s must be from 0 to %g and is %g", row.name, row.most, x);
    if (h.word[H_HOPS] < 0 || h.word[H_HOPS] > HopPrograms::MAX_HOPS)
        return format("the hops of its data must be from 0 to %d and are %d", HopPrograms::MAX_HOPS, h.word[H_HOPS]);
    for (HeaderWord word : {H_MOMENTS_BF16, H_GRADS_BF16})
        if (h.word[word] != 0 && h.word[word] != 1)
            return format("word %d must be 0 or 1 and is %d", int(word), h.word[word]);
    return "";
}

// Elements of a model's parameters in sub-layers [first, last), without the table of its tensors: nothing is allocated
// on the word of a file. -1: what stands outside the blocks.
inline size_t parameter_count(const ModelConfig& c, int first, int last, bool matrices_only = false) {
    size_t count = 0;
    for (int l = first; l < last; l++) {
        SublayerNorm norm = l >= 0 ? c.sublayer(l) : SublayerNorm{};
        TensorPlace place = l < 0 ? BEFORE_BLOCKS : is_attention(l) ? ATTENTION : FEED_FORWARD;
        for (const TensorRow& row : tensor_rows) {
            bool here = row.place == place || row.place == (l < 0 ? AFTER_BLOCKS : EVERY_SUBLAYER);
            if (here && row.exists(c, norm) && (!matrices_only || row.fan_in(c) > 0))
                count += size_t(row.rows(c)) * size_t(row.cols(c));
        }
    }
    return count;
}
inline size_t parameter_count(const ModelConfig& c) { return parameter_count(c, -1, c.L); }

// Of them, what one of several ranks owns: ParameterLayout(c, ranks).owned_count(rank). The matrices of all blocks are
// alike.
inline size_t owned_parameter_count(const ModelConfig& c, int ranks, int rank) {
    size_t blocks = size_t(c.L) / 2, block = parameter_count(c, 0, 2, true), owned = 0;
    ranks = std::max(1, ranks);
    for (auto [count, units] : {std::pair{parameter_count(c) - blocks * block, size_t(1)}, std::pair{block, blocks}}) {
        size_t shard = shard_elements(count, ranks), before = std::min(count, size_t(rank) * shard);
        owned += units * std::min(shard, count - before);
    }
    return owned;
}

// Bytes of a file with this header, the CRC included. 0 where B and T cannot be, or no file is as long.
inline size_t expected_file_size(const FileHeader& h) {
    ModelConfig c = h.model();
    size_t reals = h.word[H_KIND] == FILE_STATE ? 3 * owned_parameter_count(c, h.word[H_RANKS], h.word[H_RANK])
                                                : parameter_count(c),
           ints = 0;
    if (h.word[H_KIND] == FILE_DEBUG) {
        if (h.word[H_B] < 1 || h.word[H_B] > MAX_B || h.word[H_T] < 1 || h.word[H_T] > c.max_seq_len) return 0;
        size_t rows = size_t(h.word[H_B]) * size_t(h.word[H_T]);
        if (double(rows) * (double(c.V) + 2 * (double(c.L) + 1) * double(c.C)) > 1e18) return 0;
        reals = 2 * reals + 1 + rows * size_t(c.V) + 2 * (size_t(c.L) + 1) * rows * size_t(c.C);
        ints = 2 * rows;
    }
    return sizeof(FileHeader) + reals * real_size(h.word[H_TYPE]) + ints * 4 + 4;
}

// Reads one of our files. The constructor checks the header and the file's size against each other, so that nothing is
// allocated on the word of a broken file; finish() checks the CRC of everything read.
class FileReader {
public:
    FileHeader header;
    std::string path;

    FileReader(const std::string& path, FileKind kind) : path(path) {
        int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe must not make us wait
        if (fd >= 0) file.reset(fdopen(fd, "rb"));
        struct stat st;
        if (!file || fstat(fd, &st) != 0)
            fail("%s: cannot be read (%s); expected a %s file", path.c_str(), errno_text().c_str(), kind_name(kind));
        if (!S_ISREG(st.st_mode)) fail("%s: expected a %s file, found no regular file", path.c_str(), kind_name(kind));
        size_t size = size_t(st.st_size);
        if (size < sizeof header + 4)
            fail("%s: expected a %s file of at least %zu bytes, found %zu; it is cut short or another file",
                 path.c_str(), kind_name(kind), sizeof header + 4, size);
        read(&header, sizeof header);
        const auto& w = header.word;
        if (memcmp(&w[H_MAGIC], "KEEL", 4) != 0)
            fail("%s: expected the bytes KEEL at its start, found others; give a file that a KEEL trainer wrote",
                 path.c_str());
        if (w[H_VERSION] != 1)
            fail("%s: expected file version 1, found %d; use the trainer that wrote it", path.c_str(), w[H_VERSION]);
        if (w[H_KIND] != kind)
            fail("%s: expected a %s (kind %d), found a %s (kind %d); give the other file", path.c_str(),
                 kind_name(kind), int(kind), kind_name(w[H_KIND]), w[H_KIND]);
        if (w[H_TYPE] < 0 || w[H_TYPE] > 2)
            fail("%s: expected reals of type 0, 1 or 2, found %d; the file is damaged", path.c_str(), w[H_TYPE]);
        ModelConfig c = header.model();
        std::string fault = config_fault(c);
        if (fault.empty() && w[H_VP] != c.Vp()) fault = format("Vp must be %d and is %d", c.Vp(), w[H_VP]);
        // A model of this shape has at least L*C*C parameters: refuse before they are counted sub-layer by sub-layer.
        if (fault.empty() && double(c.L) * c.C * c.C > double(size)) fault = "its shape needs more bytes than it has";
        if (fault.empty() && kind == FILE_STATE) fault = state_fault(header);
        if (int64_t step = header.get<int64_t>(H_STEP); fault.empty() && (step < 0 || double(step) > MAX_STEPS))
            fault = format("its step must be from 0 to %.0f and is %lld", MAX_STEPS, (long long)step);
        if (!fault.empty()) fail("%s: %s; the file is damaged", path.c_str(), fault.c_str());
        size_t expected = expected_file_size(header);
        if (size != expected)
            fail("%s: expected %zu bytes from its header, found %zu; the file is cut short or damaged", path.c_str(),
                 expected, size);
    }

    void read(void* out, size_t bytes) {
        if (fread(out, 1, bytes, file.get()) != bytes)
            fail("%s: could not be read to its end (%s)", path.c_str(),
                 ferror(file.get()) ? errno_text().c_str() : "it shrank");
        crc = crc32_parallel(out, bytes, crc);
    }

    // n reals, widened or rounded from the file's type to ours.
    template <class Real>
    void read_reals(Real* out, size_t n) {
        int type = header.word[H_TYPE];
        if (type == real_type<Real>) return read(out, n * sizeof(Real));
        size_t most = std::min(n, size_t(1) << 16);
        std::vector<char> chunk(real_size(type) * most);
        for (size_t done = 0; done < n;) {
            size_t m = std::min(n - done, most);
            read(chunk.data(), m * real_size(type));
            for (size_t i = 0; i < m; i++) {
                const char* p = chunk.data() + i * real_size(type);
                if (type == REAL_FP64) {
                    double v;
                    memcpy(&v, p, 8);
                    out[done + i] = Real(v);
                } else if (type == REAL_FP32) {
                    float v;
                    memcpy(&v, p, 4);
                    out[done + i] = Real(v);
                } else {  // BF16 is the upper half of an FP32
                    uint16_t bits;
                    memcpy(&bits, p, 2);
                    out[done + i] = Real(std::bit_cast<float>(uint32_t(bits) << 16));
                }
            }
            done += m;
        }
    }

    // Reads what is left of the body and compares the CRC.
    void finish() {
        size_t left = expected_file_size(header) - 4 - size_t(ftello(file.get()));
        std::vector<char> chunk(std::min(left, size_t(8) << 20));
        while (left > 0) {
            size_t n = std::min(left, chunk.size());
            read(chunk.data(), n);
            left -= n;
        }
        uint32_t stored, computed = crc;
        read(&stored, 4);
        if (stored != computed)
            fail("%s: expected CRC-32 %08x, found %08x; the file is damaged, use another copy", path.c_str(), stored,
                 computed);
    }

private:
    struct Close {
        void operator()(FILE* f) const { fclose(f); }
    };
    std::unique_ptr<FILE, Close> file;
    uint32_t crc = 0;
};

// After a rename: the folder's entry reaches the disk too.
inline void sync_folder(const std::string& file_path) {
    std::string folder = std::filesystem::path(file_path).parent_path().string();
    int fd = open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return;  // not every file system lets a folder be opened; the rename itself has succeeded
    bool failed =
        fsync(fd) != 0 && errno != EINVAL && errno != ENOTSUP;  // these two: the file system has nothing to sync
    std::string why = errno_text();
    close(fd);
    if (failed)
        fail("%s: its folder could not be written (%s); see to the disk, what was there before is untouched",
             file_path.c_str(), why.c_str());
}

// A small file as a whole: who reads it finds the old text or the new. turn: what to do if it cannot be written.
inline void replace_file(const std::string& path, const std::string& text, const char* turn) {
    std::string temporary = path + ".tmp";
    FILE* out = fopen(temporary.c_str(), "we");
    bool good =
        out && fwrite(text.data(), 1, text.size(), out) == text.size() && fflush(out) == 0 && fsync(fileno(out)) == 0;
    std::string why = errno_text();
    if (out) fclose(out);
    if (!good) unlink(temporary.c_str());
    if (!good || rename(temporary.c_str(), path.c_str()) != 0)
        fail("%s: could not be written (%s); %s", path.c_str(), good ? errno_text().c_str() : why.c_str(), turn);
    sync_folder(path);
}

// Writes beside the target and renames when everything is on the disk: whoever finds the file finds it whole.
class FileWriter {
public:
    explicit FileWriter(const std::string& path) : path(path), temporary(path + ".tmp") {
        file = fopen(temporary.c_str(), "wbe");
        if (!file) fail("%s: cannot be written (%s); choose another folder", path.c_str(), errno_text().c_str());
    }
    ~FileWriter() {
        if (!file) return;
        fclose(file);
        unlink(temporary.c_str());
    }
    FileWriter(const FileWriter&) = delete;
    FileWriter& operator=(const FileWriter&) = delete;

    void write(const void* data, size_t bytes) {
        if (fwrite(data, 1, bytes, file) != bytes) fail_write();
        crc = crc32_parallel(data, bytes, crc);
    }
    template <class T>
    void write(std::span<const T> values) {
        write(values.data(), values.size_bytes());
    }

    void commit() {
        uint32_t sum = crc;
        write(&sum, 4);
        if (fflush(file) != 0 || fsync(fileno(file)) != 0) fail_write();
        fclose(file);
        file = nullptr;
        if (rename(temporary.c_str(), path.c_str()) != 0) {
            std::string why = errno_text();
            unlink(temporary.c_str());
            fail("%s: cannot be renamed into place (%s)", path.c_str(), why.c_str());
        }
        sync_folder(path);
    }

private:
    [[noreturn]] void fail_write() {
        fail("%s: could not be written (%s); free some space, what was there before is untouched", path.c_str(),
             errno_text().c_str());
    }
    std::string path, temporary;
    FILE* file = nullptr;
    uint32_t crc = 0;
};

// One batch and everything that one forward and backward pass makes of it.
template <class Real>
struct DebugState {
    FileHeader header;
    std::vector<Real> params;          // in parameter order
    std::vector<int> tokens, targets;  // (B,T)
    Real loss = 0;
    std::vector<Real> logits;  // (B,T,V)
    std::vector<Real> x;       // (L+1,B,T,C)
    std::vector<Real> grads;   // in parameter order
    std::vector<Real> dx;      // (L+1,B,T,C)

    void write(const std::string& path) const {
        FileWriter out(path);
        out.write(&header, sizeof header);
        out.write(std::span<const Real>(params));
        out.write(std::span<const int>(tokens));
        out.write(std::span<const int>(targets));
        out.write(&loss, sizeof loss);
        for (auto* v : {&logits, &x, &grads, &dx}) out.write(std::span<const Real>(*v));
        out.commit();
    }

    static DebugState read(const std::string& path) {
        FileReader in(path, FILE_DEBUG);
        DebugState s;
        s.header = in.header;
        ModelConfig c = in.header.model();
        size_t rows = size_t(in.header.word[H_B]) * size_t(in.header.word[H_T]);
        size_t stream = (size_t(c.L) + 1) * rows * size_t(c.C);
        auto reals = [&](std::vector<Real>& v, size_t n) { v.resize(n), in.read_reals(v.data(), n); };
        auto ints = [&](std::vector<int>& v) { v.resize(rows), in.read(v.data(), rows * 4); };
        size_t count = ParameterLayout(c).count;
        reals(s.params, count);
        ints(s.tokens), ints(s.targets);
        in.read_reals(&s.loss, 1);
        reals(s.logits, rows * size_t(c.V));
        reals(s.x, stream), reals(s.grads, count), reals(s.dx, stream);
        in.finish();
        for (const auto* list : {&s.tokens, &s.targets})
            for (int token : *list)
                if (token < 0 || token >= c.V)
                    fail("%s: expected tokens from 0 to %d, found %d; the file is damaged", path.c_str(), c.V - 1,
                         token);
        return s;
    }
};

// Bytes of one in the host's memory, tokens aside.
template <class Real>
size_t debug_state_bytes(const ModelConfig& c, int64_t B, int T) {
    return sizeof(Real) *
           (2 * ParameterLayout(c).count + size_t(B) * size_t(T) * (2 * size_t(c.L + 1) * size_t(c.C) + size_t(c.V)));
}

// ----------------------------------------------------------------------------------------------------
// Data: text files (a byte is a token, V = 256) or llm.c's token shards (.bin)
//
// All files of a glob, in the order of their names, are one long row of tokens. Files are opened for each read and not
// kept open, so that ten thousand of them, or a terabyte, cost neither memory nor file descriptors.

inline constexpr int SHARD_MAGIC = 20240520, SHARD_VERSION = 1, GPT2_VOCABULARY = 50257;

struct TokenFile {
    std::string path;
    size_t first = 0, count = 0;  // its tokens are [first, first + count) of the row
    dev_t device = 0;
    ino_t inode = 0;
};

class TokenSource {
public:
    std::string pattern;
    std::vector<TokenFile> files;
    bool shards = false;  // uint16 tokens behind a header, else bytes
    size_t count = 0;     // tokens in all

    TokenSource() = default;

    // paths: files; a single one may be a glob.
    TokenSource(const std::vector<std::string>& paths, const char* flag) {
        pattern = paths.size() == 1 ? paths[0] : format("%zu files", paths.size());
        std::vector<std::string> names = paths;
        if (paths.size() == 1 && paths[0].find_first_of("*?[") != std::string::npos) {
            glob_t matches{};
            names.clear();
            if (::glob(paths[0].c_str(), 0, nullptr, &matches) == 0)
                names.assign(matches.gl_pathv, matches.gl_pathv + matches.gl_pathc);
            globfree(&matches);
            if (names.empty()) fail("%s: the glob '%s' matches no file; correct it", flag, paths[0].c_str());
        }
        for (const std::string& name : names) add(name, flag);
        if (count == 0) fail("%s: expected text or token shards in '%s', found nothing", flag, pattern.c_str());
    }

    // Tokens [first, first + n) of the row, each checked against V.
    void read(size_t first, size_t n, int V, int* out) const {
        auto file = std::upper_bound(files.begin(), files.end(), first,
                                     [](size_t at, const TokenFile& f) { return at < f.first + f.count; });
        while (n > 0) {
            size_t m = std::min(n, file->first + file->count - first);
            read_from(*file, first - file->first, m, V, out);
            first += m, out += m, n -= m;
            ++file;
        }
    }

    bool same_file(const TokenSource& other) const {
        for (const TokenFile& a : files)
            for (const TokenFile& b : other.files)
                if (a.device == b.device && a.inode == b.inode) return true;
        return false;
    }

private:
    static int open_file(const std::string& path) {
        int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe must not make us wait
        if (fd < 0)
            throw DataError(format("%s: cannot be read (%s); expected a text file or a .bin shard", path.c_str(),
                                   errno_text().c_str()));
        return fd;
    }

    void add(const std::string& path, const char* flag) {
        int fd = open_file(path);
        struct stat st{};
        int32_t header[256] = {};
        bool shard = path.ends_with(".bin");
        bool readable = fstat(fd, &st) == 0 && S_ISREG(st.st_mode);
        bool whole_header = shard && pread(fd, header, sizeof header, 0) == ssize_t(sizeof header);
        close(fd);
        size_t size = size_t(st.st_size);
        if (!readable) fail("%s: expected a file, found something else; name files or a quoted glob", path.c_str());
        if (size == 0) fail("%s: the file is empty; leave it out of %s", path.c_str(), flag);
        if (!files.empty() && shard != shards)
            fail("%s: expected %s like the files before it, found %s; train on one kind", path.c_str(),
                 shards ? "a .bin shard" : "text", shard ? "a .bin shard" : "text");
        shards = shard;
        TokenFile file{path, count, size, st.st_dev, st.st_ino};
        if (shard) {
            if (!whole_header || header[0] != SHARD_MAGIC || header[1] != SHARD_VERSION)
                fail("%s: expected a token shard (magic %d, version %d), found %d, %d; see data/shards.py",
                     path.c_str(), SHARD_MAGIC, SHARD_VERSION, header[0], header[1]);
            size_t found = (size - sizeof header) / 2;
            if (header[2] < 0 || size != sizeof header + 2 * size_t(header[2]))
                fail("%s: expected %d tokens from its header, found %zu; fetch the shard again", path.c_str(),
                     header[2], found);
            file.count = found;
            if (found == 0) return;
        }
        files.push_back(file);
        count += file.count;
    }

    void read_from(const TokenFile& file, size_t first, size_t n, int V, int* out) const {
        size_t width = shards ? 2 : 1, offset = (shards ? 1024 : 0) + first * width;
        std::vector<unsigned char> bytes(n * width);
        int fd = open_file(file.path);
        size_t done = 0;
        while (done < bytes.size()) {
            ssize_t got = pread(fd, bytes.data() + done, bytes.size() - done, off_t(offset + done));
            if (got < 0 && errno == EINTR) continue;
            if (got <= 0) break;
            done += size_t(got);
        }
        close(fd);
        if (done < bytes.size())
            throw DataError(format(
                "%s: expected %zu tokens as at the start of the run, found fewer; the file has been cut, restore it",
                file.path.c_str(), file.count));
        for (size_t i = 0; i < n; i++) {
            out[i] = shards ? bytes[2 * i] | bytes[2 * i + 1] << 8 : bytes[i];
            if (out[i] >= V)
                fail(
                    "%s: expected tokens below the model's V = %d, found %d at token %zu; use other data or another "
                    "model",
                    file.path.c_str(), V, out[i], first + i);
        }
    }
};

// Deals the sequences of programs, or of a stretch of tokens [start, start + count). An epoch cuts the stretch into n =
// (count-1)/T sequences of T inputs (targets are one further on) and shuffles them; the fewer than T tokens that do not
// fill a sequence are others in every epoch. Sequence s is a function of (seed, s) alone: a resume needs no state of
// the loader, and any rank can read any part of any batch.
class Loader {
public:
    Loader(const TokenSource& source, size_t start, size_t count, int T, int V, uint64_t seed, bool shuffle)
        : source(&source), start(start), T(size_t(T)), V(V), seed(seed), shuffle(shuffle) {
        sequences = count > size_t(T) ? (count - 1) / size_t(T) : 0;
        spare = sequences ? count - 1 - sequences * size_t(T) : 0;
        half_bits = 1;
        while ((uint64_t(1) << (2 * half_bits)) < sequences) half_bits++;
    }

    // Sequences of programs: they never end.
    Loader(HopPrograms programs, int T, uint64_t seed, bool training)
        : T(size_t(T)), sequences(SIZE_MAX), seed(seed), shuffle(training), programs(programs) {}

    size_t sequences_per_epoch() const { return sequences; }
    const HopPrograms& hop_programs() const { return programs; }

    // First token of sequence s, counted from the start of training.
    size_t position(uint64_t s) const {
        uint64_t epoch = s / sequences, i = s % sequences;
        if (!shuffle) return start + size_t(i) * T;
        size_t shift =
            philox(seed, uint32_t(epoch), uint32_t(epoch >> 32), 0xFFFFFFFFu, STREAM_DATA).word[0] % (spare + 1);
        return start + shift + size_t(permuted(i, epoch)) * T;
    }

    // Where the answers of sequence s are, for programs.
    std::vector<HopPrograms::Answer> answers(uint64_t s) const {
        std::vector<HopPrograms::Answer> found;
        std::vector<int> row(T + 1);
        programs.sequence(seed, s, !shuffle, int(T + 1), row.data(), &found);
        return found;
    }

    // Sequences s .. s+B-1 as tokens (B,T) and targets (B,T).
    void batch(uint64_t s, int B, int* tokens, int* targets) const {
        std::vector<int> row(T + 1);
        for (int b = 0; b < B; b++) {
            if (programs.hops) programs.sequence(seed, s + uint64_t(b), !shuffle, int(T + 1), row.data());
            else source->read(position(s + uint64_t(b)), T + 1, V, row.data());
            std::copy(row.begin(), row.end() - 1, tokens + size_t(b) * T);
            std::copy(row.begin() + 1, row.end(), targets + size_t(b) * T);
        }
    }

private:
    const TokenSource* source = nullptr;
    size_t start = 0, T, sequences = 0, spare = 0;
    int V = 0, half_bits = 0;
    uint64_t seed;
    bool shuffle;  // training: programs of training, or files in random order
    HopPrograms programs;

    // A permutation of [0, sequences) without a table: a Feistel network is a bijection of 2*half_bits bits, whatever
    // its round function; what falls outside is sent through again until it lands inside (Black and Rogaway 2002,
    // "cycle walking").
    uint64_t permuted(uint64_t i, uint64_t epoch) const {
        const uint64_t mask = (uint64_t(1) << half_bits) - 1;
        do {
            uint64_t left = i >> half_bits, right = i & mask;
            for (uint32_t round = 0; round < 6; round++) {
                uint32_t f = philox(seed ^ (epoch >> 32), uint32_t(right), uint32_t(epoch), round, STREAM_DATA).word[0];
                std::swap(left, right);
                right = (right ^ f) & mask;
            }
            i = left << half_bits | right;
        } while (i >= sequences);
        return i;
    }
};

// ----------------------------------------------------------------------------------------------------
// The command line: one row a flag, from which parsing, -h and the README's table come

struct Options {
    std::vector<std::string> train, val;  // default: the trainer's own sources; their last tenth
    std::string out, init, prompt = "\n", dump, check, ablate, recompute = "auto";
    std::string norm = "keel", tune, moments = "fp32", grads = "fp32";
    int64_t layers = 64, channels = 0, heads = 0, seq_len = 0, batch = 0, total_batch = 0, warmup = 0, steps = 400;
    double alpha = 0, lr = 0, weight_decay = 0.01, clip = 1.0;
    int64_t seed = 1337, val_every = 100, val_batches = 16, checkpoint_every = 1000, sample_every = 200;
    int64_t sample_tokens = 256, top_k = 40, zero = 0, probe = 0, keep = 3, max_skips = 10;
    double temperature = 0.8;
    bool resume = false, stop_on_divergence = false, help = false;
    std::set<std::string> given;  // long names of the flags on the command line
    bool has(const char* long_name) const { return given.count(long_name) > 0; }
};

struct Flag {
    const char *short_name, *long_name, *argument, *fallback, *help;
    std::variant<std::string Options::*, std::vector<std::string> Options::*, int64_t Options::*, double Options::*,
                 bool Options::*>
        member;
    double least = 0, most = 9e18;  // of a number
};

inline const Flag flags[] = {
    {"-i", "--train", "PATH|GLOB", "own sources",
     "training data: text (a byte is a token), llm.c .bin shards, or hops:K, programs without end", &Options::train},
    {"-j", "--val", "PATH|GLOB", "last tenth", "validation data; by default the last tenth of -i, never trained on",
     &Options::val},
    {"-o", "--out", "DIR", "none", "folder for log.csv and checkpoints; without it nothing is written", &Options::out},
    {"-e", "--init", "FILE", "none",
     "start from this model file; with --prompt and no -i, -o or -x, only sample from it", &Options::init},
    {"-L", "--layers", "N", "64", "sub-layers, even: N/2 attention and N/2 feed-forward; chooses all that is not given",
     &Options::layers, 2, MAX_L},
    {"-C", "--channels", "N", "by -L", "width of the highway", &Options::channels, 1, MAX_C},
    {"-H", "--heads", "N", "by -C", "attention heads; divides -C", &Options::heads, 1, MAX_C},
    {"-t", "--seq-len", "N", "by -C", "sequence length T, tokens", &Options::seq_len, 1, MAX_T},
    {"-b", "--batch", "N", "by memory", "micro-batch B of a rank, sequences", &Options::batch, 1, MAX_B},
    {"-d", "--total-batch", "TOKENS", "by -C",
     "tokens a step, of all ranks, a multiple of B*T*ranks; B*T*ranks where only -b is given", &Options::total_batch, 1,
     MAX_TOTAL_BATCH},
    {"", "--norm", "NAME", "keel", "norm placement: keel, pre, post, deepnorm, mixln, hybridnorm, scaledpost",
     &Options::norm},
    {"-a", "--alpha", "A", "by --norm", "weight of the shortcut, where the placement has one (keel: L)",
     &Options::alpha, 1e-30, 1e30},
    {"-l", "--lr", "X", "by -L", "peak learning rate", &Options::lr, 0, MAX_RATE},
    {"-u", "--warmup", "N", "steps/4", "steps of linear warm-up, at most 2500 by default; then cosine to 1e-7",
     &Options::warmup, 0, MAX_STEPS},
    {"-x", "--steps", "N", "400", "optimizer steps", &Options::steps, 0, MAX_STEPS},
    {"-c", "--weight-decay", "X", "0.01", "AdamW's weight decay, on matrices and embeddings", &Options::weight_decay, 0,
     MAX_RATE},
    {"", "--clip", "X", "1", "largest global gradient norm; 0: no clipping", &Options::clip, 0, MAX_CLIP},
    {"", "--seed", "N", "1337", "of weights, data order and samples", &Options::seed, 0},
    {"-v", "--val-every", "N", "100", "steps between validations; 0: never, not even at the end", &Options::val_every,
     0},
    {"-m", "--val-batches", "N", "16", "validation batches of -d tokens, at most one pass over the validation data",
     &Options::val_batches, 1, MAX_VAL_BATCHES},
    {"-n", "--checkpoint-every", "N", "1000", "steps between checkpoints in -o; 0: never, not even at the end",
     &Options::checkpoint_every, 0},
    {"", "--keep", "N", "3", "checkpoints to keep in -o, the newest; 0: all", &Options::keep, 0},
    {"-y", "--resume", "", "off", "go on from the newest whole checkpoint in -o; start fresh where there is none",
     &Options::resume},
    {"", "--max-skips", "N", "10",
     "steps in a row that update nothing, their loss or gradient not finite, before the run stops", &Options::max_skips,
     1},
    {"", "--stop-on-divergence", "", "off",
     "stop where the loss has diverged, not only warn: stagnation, instability, degradation",
     &Options::stop_on_divergence},
    {"-r", "--recompute", "LEVEL", "auto",
     "what the backward pass computes again to save memory: none, gelu, layer, an even K, auto", &Options::recompute},
    {"-z", "--zero", "N", "0",
     "what several ranks divide: 0 the batch, 1 AdamW's states and master weights too, 2 and gradients", &Options::zero,
     0, 2},
    {"", "--moments", "TYPE", "fp32", "GPU: how AdamW's moments are kept, fp32 or bf16 with stochastic rounding",
     &Options::moments},
    {"", "--grads", "TYPE", "fp32",
     "GPU: how the gradients of the blocks' matrices are kept, fp32 or bf16 with stochastic rounding", &Options::grads},
    {"", "--tune", "FILE", "none",
     "GPU: measure cuBLASLt's algorithms for each shape of product; this table is read, and what it lacks added",
     &Options::tune},
    {"-s", "--sample-every", "N", "200", "steps between samples of text; 0: never, not even at the end",
     &Options::sample_every, 0},
    {"-g", "--sample-tokens", "N", "256", "tokens a sample", &Options::sample_tokens, 1, 1e9},
    {"", "--prompt", "TEXT", "a newline", "what samples start with; for V other than 256, token ids such as 15496,995",
     &Options::prompt},
    {"", "--temperature", "X", "0.8", "of the samples; 0: always the likeliest token", &Options::temperature, 0, 1e9},
    {"", "--top-k", "N", "40", "sample from the N likeliest tokens; 0: from all", &Options::top_k, 0, MAX_V},
    {"", "--probe", "N", "0",
     "every N steps, rms, shortcut gains and gradients of each sub-layer in probe.csv, norms of each tensor in "
     "probe_weights.csv",
     &Options::probe, 0},
    {"", "--ablate", "l|all", "none",
     "only evaluate -e with sub-layer l, or each in turn, removed: ablate.csv in -o, or printed", &Options::ablate},
    {"", "--dump", "FILE", "none", "write a debug state of one forward and backward pass, and stop", &Options::dump},
    {"", "--check", "FILE", "none", "compare a debug state with this build, tensor by tensor, and stop",
     &Options::check},
    {"-h", "--help", "", "", "this list", &Options::help},
};

inline std::string help_text(const char* program, const std::string& ranks) {
    std::string text = format("usage: %s [flags]    (this build runs on %s)\n\n", program, ranks.c_str());
    for (const Flag& f : flags) {
        std::string left = format("  %-3s %s %s", f.short_name, f.long_name, f.argument);
        std::string tail = f.fallback[0] ? format(" [%s]", f.fallback) : "";
        text += format("%-31s %s%s\n", left.c_str(), f.help, tail.c_str());
    }
    return text;
}

inline int64_t parse_integer(const char* flag, const std::string& text, double least, double most) {
    char* end = nullptr;
    errno = 0;
    long long value = strtoll(text.c_str(), &end, 10);
    if (text.empty() || *end || isspace((unsigned char)text[0]))
        fail("%s: expected a whole number, found '%s'", flag, text.c_str());
    if (errno || double(value) < least || double(value) > most)
        fail("%s: expected a whole number from %.0f to %.0f, found %s", flag, least, most, text.c_str());
    return value;
}

inline double parse_real(const char* flag, const std::string& text, double least, double most) {
    char* end = nullptr;
    double value = strtod(text.c_str(), &end);
    if (text.empty() || *end || isspace((unsigned char)text[0]) || !std::isfinite(value))
        fail("%s: expected a number, found '%s'", flag, text.c_str());
    if (value < least || value > most)
        fail("%s: expected a number from %g to %g, found %s", flag, least, most, text.c_str());
    return value;
}

inline Options parse_command_line(int argc, const char* const* argv) {
    Options o;
    for (int i = 1; i < argc; i++) {
        std::string word = argv[i], value;
        bool has_value = false;
        if (size_t eq = word.find('='); word.starts_with("--") && eq != std::string::npos)
            value = word.substr(eq + 1), word = word.substr(0, eq), has_value = true;
        const Flag* flag = nullptr;
        for (const Flag& f : flags)
            if (!word.empty() && (word == f.short_name || word == f.long_name)) flag = &f;
        if (!flag && !word.starts_with("-"))
            fail("expected a flag, found '%s'; quote a glob so that the shell does not expand it: -i '*.txt'",
                 word.c_str());
        if (!flag) fail("unknown flag '%s'; -h lists the flags", word.c_str());
        if (!o.given.insert(flag->long_name).second) fail("%s: given twice; give it once", word.c_str());
        if (auto* member = std::get_if<bool Options::*>(&flag->member)) {
            if (has_value) fail("%s: takes no value, found '%s'", word.c_str(), value.c_str());
            o.*(*member) = true;
            continue;
        }
        if (!has_value) {
            if (i + 1 >= argc) fail("%s: expected %s after it, found nothing", word.c_str(), flag->argument);
            value = argv[++i];
            for (const Flag& f : flags)
                if (!value.empty() && (value == f.short_name || value == f.long_name))
                    fail("%s: expected %s after it, found the flag %s; a value like that is given as %s=%s",
                         word.c_str(), flag->argument, value.c_str(), flag->long_name, value.c_str());
        }
        if (auto* text = std::get_if<std::string Options::*>(&flag->member)) {
            if (value.empty()) fail("%s: expected %s, found an empty word", word.c_str(), flag->argument);
            o.*(*text) = value;
        } else if (auto* list = std::get_if<std::vector<std::string> Options::*>(&flag->member)) {
            if (value.empty()) fail("%s: expected %s, found an empty word", word.c_str(), flag->argument);
            o.*(*list) = {value};
        } else if (auto* integer = std::get_if<int64_t Options::*>(&flag->member)) {
            o.*(*integer) = parse_integer(word.c_str(), value, flag->least, flag->most);
        } else if (auto* real = std::get_if<double Options::*>(&flag->member)) {
            o.*(*real) = parse_real(word.c_str(), value, flag->least, flag->most);
        }
    }
    if (o.resume && o.out.empty()) fail("-y: expected the run's folder with -o, found none; add -o DIR");
    if (o.resume && !o.init.empty()) fail("-y: goes on from -o, and -e starts from another file; give one of the two");
    if (o.probe > 0 && o.out.empty()) fail("--probe: expected a folder for probe.csv, found none; add -o DIR");
    if (!o.dump.empty() && (o.resume || o.probe > 0))
        fail("--dump: trains nothing, and %s asks for a run; leave it out, and dump a saved model with -e",
             o.resume ? "-y" : "--probe");
    if (!o.ablate.empty()) {
        if (o.init.empty()) fail("--ablate: expected a model with -e, found none; add -e FILE");
        for (const char* other : {"--resume", "--probe", "--dump", "--check", "--prompt", "--steps"})
            if (o.has(other))
                fail("--ablate: evaluates and trains nothing, and %s asks for something else; give one of the two",
                     other);
        if (o.ablate != "all") parse_integer("--ablate", o.ablate, 0, MAX_L - 1);
    }
    if (!o.dump.empty() && !o.check.empty()) fail("--dump and --check: expected one of the two, found both");
    for (auto [flag, type] : {std::pair{"--moments", o.moments}, {"--grads", o.grads}})
        if (type != "fp32" && type != "bf16") fail("%s: expected fp32 or bf16, found '%s'", flag, type.c_str());
    return o;
}

// What the backward pass computes again: none keeps everything; gelu drops u and GELU's output; layer keeps only z; a
// number K keeps every K-th z. Stored in a training state as 0, -1, 1 and K.
struct Recompute {
    int level = 0;
    bool segments() const { return level >= 2; }
    bool keeps_cheap() const { return level == 0 || segments(); }  // u and GELU's output stay until their backward
    std::string name() const {
        return level == 0 ? "none" : level == -1 ? "gelu" : level == 1 ? "layer" : format("%d", level);
    }
    static Recompute parse(const std::string& text) {
        if (text == "none") return {0};
        if (text == "gelu") return {-1};
        if (text == "layer") return {1};
        int64_t k = text.find_first_not_of("0123456789") == std::string::npos ? parse_integer("-r", text, 2, MAX_L) : 0;
        if (k < 2 || k % 2)
            fail("-r: expected none, gelu, layer, auto or an even number of sub-layers, found '%s'", text.c_str());
        return {int(k)};
    }
};

// How the GPU trainer keeps what the optimizer works on; each is 4 bytes a parameter in FP32, 2 in BF16 with stochastic
// rounding.
struct StateTypes { bool moments_bf16 = false, grads_bf16 = false; };

// Everything that decides a run's numbers.
struct RunConfig {
    ModelConfig model;
    int T = 0;                // sequence length, at most model.max_seq_len
    int B = 0;                // micro-batch, sequences; 0: still to be chosen by memory
    int64_t total_batch = 0;  // tokens a step
    int64_t steps = 0, warmup = 0;
    double lr = 0, weight_decay = 0, clip = 0;
    uint64_t seed = 0;
    int64_t val_every = 0, val_batches = 0;
    bool recompute_chosen = false;
    Recompute recompute;
    StateTypes types;
    std::string tune;         // --tune's table, which decides how products are summed; "": none
    int ranks = 0, rank = 0;  // of the run, and which of them this process is; 0: alone, started by no launcher
    int zero = 0;             // the ZeRO level
    // So far, not settings: steps that updated nothing, and how many of them are the last ones. AdamW's bias
    // corrections count the others.
    int64_t skipped = 0, skipped_in_row = 0;

    int64_t batch_sequences() const { return total_batch / T; }
    int64_t rank_sequences() const { return batch_sequences() / std::max(1, ranks); }
    int accumulation() const { return int(rank_sequences() / B); }
    // The first sequence of this rank's part of a micro-step: micro-batches go around the ranks, so that the ranks
    // together read the batch of one.
    uint64_t sequence(int64_t step, int micro) const {
        return uint64_t(step - 1) * uint64_t(batch_sequences()) +
               (uint64_t(micro) * uint64_t(std::max(1, ranks)) + uint64_t(rank)) * uint64_t(B);
    }
};

// How a run's memory is shared out among its ranks; 0 ranks: alone.
struct Sharing {
    int ranks = 0, rank = 0, zero = 0;
    Sharing() = default;
    explicit Sharing(const RunConfig& run) : ranks(run.ranks), rank(run.rank), zero(run.zero) {}
    bool states() const { return ranks > 0 && zero >= 1; }     // moments, and masters, of what the rank owns alone
    bool gradients() const { return ranks > 0 && zero >= 2; }  // gradients of two blocks at a time
    ParameterLayout grad_layout(const ParameterLayout& layout) const {
        return gradients() ? layout.with_two_blocks() : layout;
    }
};

// Step s = 1..S: linear warm-up over W steps to the peak, then a cosine that reaches 1e-7 at step S (or the peak if
// that is less).
inline double learning_rate(const RunConfig& run, int64_t s) {
    double least = std::min(1e-7, run.lr);
    if (s <= run.warmup) return run.lr * double(s) / double(run.warmup);
    if (s >= run.steps) return least;
    double progress = double(s - run.warmup) / double(run.steps - run.warmup);
    return least + (run.lr - least) * (1 + std::cos(M_PI * progress)) / 2;
}

// AdamW's (Loshchilov and Hutter 2019). KEEL's branch gradients shrink as 1/alpha: their RMS is 3e-6 at L = 1024, and
// the usual epsilon of 1e-8 would slow them.
inline constexpr double BETA1 = 0.9, BETA2 = 0.95, ADAM_EPSILON = 1e-12;

// ----------------------------------------------------------------------------------------------------
// One dial: what -L chooses when nothing else is given, the same on every machine
//
// Width follows depth as C = L/4, rounded up to a multiple of 64; context and batch follow width. So up to 256
// sub-layers the default is a model that a laptop trains in minutes (C = 64, T = 64, 1024 tokens a step), and -L 1024
// is one for a GPU (C = 256, T = 1024, 65536 tokens a step).

inline int default_channels(int L) { return int(std::max<size_t>(64, round_up(size_t(L) / 4, 64))); }

// Heads of 64 channels, or of 32 where the model is as narrow as that; any width has at least one.
inline int default_heads(int C) {
    for (int D : {64, 32})
        if (C % D == 0 && C / D >= 2) return C / D;
    return 1;
}

inline int default_seq_len(int C) {
    double ratio = C / 64.0;
    return int(std::clamp(64.0 * std::floor(ratio * ratio), 64.0, 1024.0));
}

inline int64_t default_total_batch(int C, int T) { return int64_t(T) * 16 * std::max(1, C / 64); }

// Peak learning rate of keel: 9e-3 * min(1, (128/L)^(1/3)), close to the paper's 9e-3 to L = 128, 6e-3 at 512
// and 4.5e-3 at 1024, found there with batches of 4M tokens. It holds for the default's 1024 tokens too. Validation
// loss after 400 steps, C = 64, T = 64, sources of Python's standard library, one seed (dev/results/lr_sweep.csv;
// dev/experiments/sweep.py runs it):
//
//     peak LR   3e-3    6e-3   7.1e-3   9e-3    1e-2   1.5e-2   2e-2    3e-2
//     L = 16    2.133   1.997           1.963   1.975   1.971   2.011   2.048
//     L = 64    2.133   2.006           1.975   1.975   2.018   2.017   2.157
//     L = 256   2.136   2.042   2.029           2.043   2.065
//
// The optimum is flat, about a factor of two wide; smaller batches were expected to want less, and do not down to 1024
// tokens.
inline double default_lr(const ModelConfig& c) { return 9e-3 * std::min(1.0, std::cbrt(128.0 / c.L)); }

inline std::string folder_of_program() {
    std::error_code ignored;
    return std::filesystem::read_symlink("/proc/self/exe", ignored).parent_path().string();
}

inline TokenSource open_training_data(const Options& o) {
    if (!o.train.empty()) return TokenSource(o.train, "-i");
    std::vector<std::string> own;
    for (const char* name : {"keel_common.h", "train_keel.cu", "train_keel_cpu.cpp"}) {
        std::string path = folder_of_program() + "/" + name;
        if (access(path.c_str(), R_OK) == 0) own.push_back(path);
    }
    if (own.empty())
        fail("-i: expected training data, found none, nor the trainer's own sources beside it; give -i PATH");
    TokenSource source(own, "-i");
    source.pattern = "the trainer's own sources";
    return source;
}

// Training and validation data: programs, two sources, or one source that is cut at nine tenths.
struct DataSplit {
    HopPrograms programs;
    TokenSource train, val;
    size_t train_count = 0, val_start = 0, val_count = 0;  // 0 for programs

    explicit DataSplit(const Options& o) : programs{o.train.size() == 1 ? HopPrograms::parse(o.train[0]) : 0} {
        if (programs.hops) {
            if (!o.val.empty())
                fail("-j: expected none with -i %s, whose validation programs are its own, found '%s'; leave it out",
                     o.train[0].c_str(), o.val[0].c_str());
            train.pattern = o.train[0];
            return;
        }
        train = open_training_data(o);
        if (o.val.empty()) {
            val = train;
            val_start = train_count = train.count - train.count / 10;
            val_count = train.count / 10;
            return;
        }
        val = TokenSource(o.val, "-j");
        if (val.shards != train.shards)
            fail("-j: expected %s like -i, found %s", train.shards ? "shards" : "text", val.shards ? "shards" : "text");
        if (val.same_file(train)) fail("-j: a file is in -i as well; validate on data that training never sees");
        train_count = train.count, val_count = val.count;
    }
    int natural_vocabulary() const { return train.shards ? GPT2_VOCABULARY : 256; }
    int natural_seq_len() const { return programs.hops ? programs.length() - 1 : 0; }  // 0: any

    Loader loader(const RunConfig& run, bool training) const {
        if (programs.hops) return Loader(programs, run.T, run.seed, training);
        return training ? Loader(train, 0, train_count, run.T, run.model.V, run.seed, true)
                        : Loader(val, val_start, val_count, run.T, run.model.V, run.seed, false);
    }

    // Every token against V, before anything is written; beyond 2^27 tokens (seconds of reading), as they are read.
    void check_tokens(int V) const {
        if (programs.hops && V <= 'z')
            fail("-i: expected a model of V above %d for %s, found V = %d; use another model", int('z'),
                 train.pattern.c_str(), V);
        if (programs.hops) return;
        for (const TokenSource* source : {&train, &val}) {
            if (!source->shards && V >= 256) continue;
            std::vector<int> chunk(1 << 16);
            size_t n = std::min(source->count, size_t(1) << 27);
            for (size_t at = 0; at < n; at += chunk.size())
                source->read(at, std::min(chunk.size(), n - at), V, chunk.data());
        }
    }

    // Nats a token: the loss of a model that knows of the training data how frequent each token is, and nothing more.
    // From its first 2^22.
    double unigram_entropy(int V) const {
        size_t n = programs.hops ? size_t(1) << 18 : std::min(train_count, size_t(1) << 22);
        std::vector<size_t> counts(static_cast<size_t>(V));
        std::vector<int> chunk(1 << 16);
        for (size_t at = 0; at < n; at += chunk.size()) {
            size_t m = std::min(chunk.size(), n - at);
            if (programs.hops) programs.sequence(0, at, false, int(m), chunk.data());
            else train.read(at, m, V, chunk.data());
            for (size_t i = 0; i < m; i++) counts[size_t(chunk[i])]++;
        }
        double sum = 0;
        for (size_t count : counts)
            if (count) sum -= double(count) * std::log(double(count) / double(n));
        return sum / double(n);
    }
    void check_lengths(const RunConfig& run) const {
        if (programs.hops && run.T < natural_seq_len())
            fail("-t: expected at least %d, a whole program of -i %s, found %d; give a larger -t or fewer hops",
                 natural_seq_len(), train.pattern.c_str(), run.T);
        if (programs.hops) return;
        size_t need = size_t(run.total_batch) + 1;
        if ((train_count - 1) / size_t(run.T) < size_t(run.batch_sequences()))
            fail(
                "-i: expected at least %zu tokens to train on, one batch of -d %lld and a target, found %zu; give more "
                "data or a smaller -d",
                need, (long long)run.total_batch, train_count);
    }
    void check_validation(const RunConfig& run) const {
        if (!programs.hops && val_count < size_t(run.T) + 1)
            fail(
                "-j: expected at least T + 1 = %d tokens to validate on, found %zu; give more data, a smaller -t, or "
                "-v 0",
                run.T + 1, val_count);
    }
};

// ----------------------------------------------------------------------------------------------------
// What a run is: flags over the file it starts from, over the defaults of -L

// init: header of the model file of -e or of the state that -y goes on from, or null.
// V: the data's vocabulary, or 0 where there is no data (sampling alone). data_T: the sequence length that the data
// asks for, or 0. ranks, rank: as in RunConfig.
inline RunConfig resolve_run(const Options& o, const FileHeader* init, int V, int data_T = 0, int ranks = 0,
                             int rank = 0) {
    RunConfig run;
    run.ranks = ranks, run.rank = rank, run.zero = int(o.zero);
    ModelConfig& m = run.model;
    bool resume = init && init->word[H_KIND] == FILE_STATE;
    if (init) {
        m = init->model();
        auto differs = [&](const char* name, double asked, double stored) {
            if (o.has(name) && asked != stored)
                fail("%s: expected %g as in the %s, found %g; leave it out", name, stored,
                     resume ? "checkpoint" : "model of -e", asked);
        };
        differs("--layers", double(o.layers), m.L);
        differs("--channels", double(o.channels), m.C);
        differs("--heads", double(o.heads), m.H);
        differs("--alpha", double(float(o.alpha)), double(m.alpha));
        if (o.has("--norm") && placement_by_name(o.norm) != m.norm)
            fail("--norm: expected %s as in the %s, found %s; leave it out", placements[m.norm].name,
                 resume ? "checkpoint" : "model of -e", o.norm.c_str());
        if (o.seq_len > m.max_seq_len)
            fail("-t: expected at most %d, the longest sequence of the model, found %lld", m.max_seq_len,
                 (long long)o.seq_len);
    } else {
        m.L = int(o.layers);
        if (m.L % 2) fail("-L: expected an even number of sub-layers, found %d; try %d", m.L, m.L + 1);
        m.norm = placement_by_name(o.norm);
        m.C = o.channels ? int(o.channels) : default_channels(m.L);
        m.H = o.heads ? int(o.heads) : default_heads(m.C);
        if (m.C % m.H) fail("-H: expected a divisor of C = %d, found %d", m.C, m.H);
        m.max_seq_len = o.seq_len ? int(o.seq_len) : data_T ? data_T : default_seq_len(m.C);
        m.V = V;
        const PlacementRow& row = placements[m.norm];
        if (o.has("--alpha") && !row.alpha) fail("-a: %s has no alpha; leave it out or use --norm keel", row.name);
        m.alpha = o.has("--alpha") ? float(o.alpha) : row.alpha ? row.alpha(m.L) : 1.0f;
        if (std::string fault = config_fault(m); !fault.empty()) fail("%s", fault.c_str());
    }

    // A resume takes from the checkpoint what the command line does not say; anything else starts from the defaults.
    auto choose = [&](const char* name, auto asked, HeaderWord stored, auto fallback) {
        using Value = decltype(fallback);
        return o.has(name) ? Value(asked) : resume ? init->get<Value>(stored) : fallback;
    };
    run.T = o.seq_len ? int(o.seq_len) : resume ? init->word[H_T] : m.max_seq_len;
    run.B = o.batch ? int(o.batch) : resume ? init->word[H_B] : 0;
    int64_t share = int64_t(run.T) * std::max(1, ranks);  // the least that -d can be: a sequence for each rank
    run.total_batch = o.total_batch ? o.total_batch
                      : resume      ? init->get<int64_t>(H_TOTAL_BATCH)
                      : o.batch     ? o.batch * share
                                    : int64_t(round_up(size_t(default_total_batch(m.C, run.T)), size_t(share)));
    // Other ranks than those of the checkpoint, and its micro-batch does not fit them: it is chosen anew.
    if (resume && !o.batch && init->word[H_RANKS] != std::max(1, ranks) && run.total_batch % (run.B * share)) run.B = 0;
    if (run.total_batch % (std::max(run.B, 1) * share))
        fail("-d: expected a multiple of %lld tokens (%sT%s), found %lld", (long long)(std::max(run.B, 1) * share),
             run.B ? "B*" : "", ranks > 1 ? " times the ranks" : "", (long long)run.total_batch);
    if (run.batch_sequences() > INT_MAX)
        fail("-d: expected at most %d sequences of -t tokens, found %lld; give a smaller -d or a larger -t", INT_MAX,
             (long long)run.batch_sequences());
    run.steps = choose("--steps", o.steps, H_STEPS, o.steps);
    run.warmup = choose("--warmup", o.warmup, H_WARMUP, std::min<int64_t>(2500, run.steps / 4));
    run.lr = choose("--lr", o.lr, H_LR, default_lr(m));
    run.weight_decay = choose("--weight-decay", o.weight_decay, H_WEIGHT_DECAY, o.weight_decay);
    run.clip = choose("--clip", o.clip, H_CLIP, o.clip);
    run.seed = uint64_t(choose("--seed", o.seed, H_SEED, o.seed));
    run.val_every = choose("--val-every", o.val_every, H_VAL_EVERY, o.val_every);
    run.val_batches = choose("--val-batches", o.val_batches, H_VAL_BATCHES, o.val_batches);
    if (run.steps > 0 && run.warmup > run.steps)
        fail("-u: expected at most the %lld steps of -x, found %lld; give fewer", (long long)run.steps,
             (long long)run.warmup);
    if (resume) run.skipped = init->get<int64_t>(H_SKIPPED), run.skipped_in_row = init->get<int64_t>(H_SKIPPED_IN_ROW);
    run.recompute_chosen = o.recompute != "auto" || resume;
    if (o.recompute != "auto") run.recompute = Recompute::parse(o.recompute);
    else if (resume) run.recompute = {init->word[H_RECOMPUTE]};
    run.types.moments_bf16 = o.has("--moments") || !resume ? o.moments == "bf16" : init->word[H_MOMENTS_BF16] != 0;
    run.types.grads_bf16 = o.has("--grads") || !resume ? o.grads == "bf16" : init->word[H_GRADS_BF16] != 0;
    run.tune = o.tune;
    return run;
}

inline FileHeader state_header(RealType type, bool branch_bf16, const RunConfig& run, int64_t step,
                               const DataSplit& data) {
    FileHeader h = make_header(FILE_STATE, type, run.model, step, branch_bf16);
    h.word[H_B] = run.B, h.word[H_T] = run.T, h.word[H_RECOMPUTE] = run.recompute.level;
    h.set(H_TOTAL_BATCH, run.total_batch), h.set(H_STEPS, run.steps), h.set(H_WARMUP, run.warmup);
    h.set(H_LR, run.lr), h.set(H_WEIGHT_DECAY, run.weight_decay), h.set(H_CLIP, run.clip), h.set(H_SEED, run.seed);
    h.set(H_TRAIN_TOKENS, int64_t(data.train_count)), h.set(H_VAL_TOKENS, int64_t(data.val_count));
    h.set(H_VAL_EVERY, run.val_every), h.set(H_VAL_BATCHES, run.val_batches);
    h.set(H_SKIPPED, run.skipped), h.set(H_SKIPPED_IN_ROW, run.skipped_in_row);
    h.word[H_MOMENTS_BF16] = run.types.moments_bf16, h.word[H_GRADS_BF16] = run.types.grads_bf16;
    h.word[H_RANKS] = std::max(1, run.ranks), h.word[H_RANK] = run.rank;
    h.word[H_HOPS] = data.programs.hops;
    return h;
}

// -y: a run goes on bit for bit only in the numbers that it began in.
inline void check_same_build(const FileHeader& state, RealType type, bool branch_bf16) {
    auto numbers = [](int type, bool bf16) { return format("type %d%s", type, bf16 ? " with a branch in BF16" : ""); };
    if (state.word[H_TYPE] != type || (state.word[H_BRANCH_BF16] != 0) != branch_bf16)
        fail(
            "-y: expected a checkpoint of reals of %s, found %s; resume with the build that wrote it, or start from "
            "its model by -e",
            numbers(type, branch_bf16).c_str(), numbers(state.word[H_TYPE], state.word[H_BRANCH_BF16] != 0).c_str());
}

// ----------------------------------------------------------------------------------------------------
// Ranks: the processes of one run, on one machine or many
//
// Who they are comes from the launcher's environment. What they compute travels by MPI or NCCL (each trainer's
// Communicator); that all of them are still there, and why one is not, by the lifeline below: a transport that waits
// for a dead rank would wait for ever.

// This process among those that mpirun, srun or another launcher has started.
struct Launch {
    int rank = 0, ranks = 0;              // ranks 0: no launcher
    int local_rank = 0, local_ranks = 0;  // of those on this machine; local_ranks 0: not known
    std::string launcher;

    static Launch from_environment() {
        static const struct {
            const char *launcher, *rank, *ranks, *local_rank, *local_ranks;
        } launchers[] = {
            {"mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
             "OMPI_COMM_WORLD_LOCAL_SIZE"},
            {"mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"},
            // Set by srun for its step; SLURM_NTASKS is set in a batch script as well, which is one process.
            {"srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"},
            {"RANK and WORLD_SIZE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"},
        };
        for (const auto& row : launchers) {
            if (!getenv(row.rank) || !getenv(row.ranks)) continue;
            Launch l;
            l.launcher = row.launcher;
            l.ranks = int(parse(row.ranks, 1, MAX_RANKS)), l.rank = int(parse(row.rank, 0, l.ranks - 1));
            if (getenv(row.local_rank)) l.local_rank = int(parse(row.local_rank, 0, MAX_RANKS));
            if (const char* text = getenv(row.local_ranks); text && !text[strspn(text, "0123456789")])
                l.local_ranks = atoi(text);  // Slurm's may be a list
            return l;
        }
        return {};
    }
    std::string name() const {  // "process 1234 on node7"
        char host[128] = "?";
        gethostname(host, sizeof host - 1);
        return format("process %d on %s", int(getpid()), host);
    }

private:
    static int64_t parse(const char* name, int64_t least, int64_t most) {
        char* end = nullptr;
        const char* text = getenv(name);
        long long value = strtoll(text, &end, 10);
        if (!*text || *end || value < least || value > most)
            fail("%s: expected a number from %lld to %lld in the environment, found '%s'; see to the launcher", name,
                 (long long)least, (long long)most, text);
        return value;
    }
};

#ifdef KEEL_MPI
inline void check_mpi(int error, const char* what) {
    if (error == MPI_SUCCESS) return;
    char text[MPI_MAX_ERROR_STRING] = "";
    int length = 0;
    MPI_Error_string(error, text, &length);
    fail("%s: %s", what, text);
}

// MPI from here to the end of the scope. Left by an error it is not closed: MPI_Finalize would wait for the others.
struct MpiSession {
    explicit MpiSession(const Launch& launch) {
        int provided, ranks = 0, rank = 0;
        MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided);
        MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
        MPI_Comm_size(MPI_COMM_WORLD, &ranks), MPI_Comm_rank(MPI_COMM_WORLD, &rank);
        if (ranks != launch.ranks || rank != launch.rank)
            fail(
                "MPI: expected rank %d of %d as %s says, found rank %d of %d; launch with the mpirun of the MPI that "
                "this was built with, or srun --mpi=pmix",
                launch.rank, launch.ranks, launch.launcher.c_str(), rank, ranks);
    }
    ~MpiSession() {
        if (!std::uncaught_exceptions()) MPI_Finalize();
    }
    MpiSession(const MpiSession&) = delete;
    MpiSession& operator=(const MpiSession&) = delete;

    // Whether the launcher speaks MPI's language: srun does with --mpi=pmix or pmi2 alone.
    static bool offered() { return getenv("OMPI_COMM_WORLD_SIZE") || getenv("PMI_SIZE") || getenv("PMIX_RANK"); }
};
#endif

// A connection between rank 0 and each other rank, over TCP, with a thread at each end. The kernel closes a process's
// connections when it ends, however it ends: so rank 0 sees at once that a rank has died, tells the others which, and
// all end. Of a machine that falls silent it is told by heartbeats. A rank that ends by an error says why before. None
// waits for a step that cannot be finished.
class Lifeline {
public:
    static constexpr double START = 120;  // seconds until all must be there
    static inline double silence =
        20;  // seconds until a rank is given up; ten signs of life are due in them. Not const: a test makes it smaller

    // `exchange` gives all ranks rank 0's "host:port", where MPI can; else it comes from the environment. gift: bytes
    // of rank 0's for all (NCCL's id).
    Lifeline(const Launch& launch, const std::function<void(std::string&)>& exchange, std::span<char> gift)
        : launch(launch) {
        if (launch.ranks > 1) launch.rank == 0 ? gather_ranks(exchange, gift) : find_rank_0(exchange, gift);
        if (launch.ranks > 1) thread = std::thread([this] { watch(); });
    }
    ~Lifeline() { close_all(std::uncaught_exceptions() > 0); }
    Lifeline(const Lifeline&) = delete;
    Lifeline& operator=(const Lifeline&) = delete;

    // This rank ends by an error. Rank 0 prints the text, of whichever rank comes first; the others end with it. To be
    // followed by the process's end.
    void fail_all(const std::string& program, const std::string& text) {
        if (launch.rank == 0) {
            end_with(program + ": " + text, ERROR, text, false);
            return;
        }
        for (Peer& peer : peers)
            send_message(peer, ERROR, format("rank %d (%s): %s", launch.rank, launch.name().c_str(), text.c_str()));
        failing = true;
        for (int i = 0; i < 300 && !rank_0_gone; i++) usleep(10000);  // it prints, then goes; where it does not, we do
        if (!rank_0_gone) fprintf(stderr, "%s: rank %d: %s\n", program.c_str(), launch.rank, text.c_str());
    }

private:
    enum Kind : uint8_t { HELLO, ALIVE, ERROR, DEATH, GOODBYE };
    struct MessageHead {
        uint32_t magic = 0x4c45454b;  // "KEEL"
        Kind kind{};
        uint32_t rank = 0, ranks = 0, bytes = 0;
    };
    struct Peer {
        int fd = -1, rank = -1;
        std::string name;      // "process 1234 on node7"
        double heard = 0;      // when it last gave a sign of life
        bool left = false;     // with a goodbye
        std::string received;  // bytes of a message that is not whole yet
    };
    Launch launch;
    std::vector<Peer> peers;  // of rank 0: all others; of another: rank 0
    std::thread thread;
    std::mutex sending;
    std::atomic<bool> stop = false, ended = false, failing = false, rank_0_gone = false;

    void send_message(Peer& peer, Kind kind, const std::string& text) {
        MessageHead head;
        head.kind = kind, head.rank = uint32_t(launch.rank), head.ranks = uint32_t(launch.ranks),
        head.bytes = uint32_t(text.size());
        std::string bytes(reinterpret_cast<const char*>(&head), sizeof head);
        bytes += text;
        std::lock_guard lock(sending);
        if (peer.fd >= 0 && send(peer.fd, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT) < 0) {
        }  // that it is gone is seen where we read
    }

    // Waits for one message; false if the connection ends or nothing comes in time.
    static bool receive_message(Peer& peer, MessageHead& head, std::string& text, double until) {
        while (!take_message(peer, head, text)) {
            pollfd p{peer.fd, POLLIN, 0};
            double left = until - seconds();
            if (left <= 0 || poll(&p, 1, int(left * 1000) + 1) < 0 || !read_bytes(peer)) return false;
        }
        return true;
    }
    static bool read_bytes(Peer& peer) {  // what is there; false at the connection's end
        char bytes[4096];
        ssize_t n = recv(peer.fd, bytes, sizeof bytes, MSG_DONTWAIT);
        if (n > 0) peer.received.append(bytes, size_t(n)), peer.heard = seconds();
        return n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR));
    }
    static bool take_message(Peer& peer, MessageHead& head, std::string& text) {
        if (peer.received.size() < sizeof head) return false;
        memcpy(&head, peer.received.data(), sizeof head);
        if (head.magic != MessageHead().magic || head.bytes > (1u << 20))
            fail("a rank's connection: expected a KEEL trainer at its other end, found another program");
        if (peer.received.size() < sizeof head + head.bytes) return false;
        text = peer.received.substr(sizeof head, head.bytes);
        peer.received.erase(0, sizeof head + head.bytes);
        return true;
    }

    // Where rank 0 listens, from the environment: a shared file that rank 0 writes, MASTER_ADDR and MASTER_PORT, or the
    // first node of Slurm's step with a port of the job's number.
    std::string fixed_address() const {
        if (const char* host = getenv("MASTER_ADDR"))
            return format("%s:%s", host, getenv("MASTER_PORT") ? getenv("MASTER_PORT") : "29400");
        if (const char* nodes = getenv("SLURM_STEP_NODELIST")) {  // "node[017-020,031]"
            std::string list = nodes, first = list.substr(0, list.find_first_of("[,"));
            if (size_t open = list.find('['); open != std::string::npos && open == first.size())
                first += list.substr(open + 1, list.find_first_of("-,]", open) - open - 1);
            long job = getenv("SLURM_JOB_ID") ? atol(getenv("SLURM_JOB_ID")) : 0,
                 step = getenv("SLURM_STEP_ID") ? atol(getenv("SLURM_STEP_ID")) : 0;
            return format("%s:%ld", first.c_str(), 20000 + (job * 17 + step) % 20000);
        }
        fail(
            "ranks: expected to be told where rank 0 is, found none of MPI, KEEL_RENDEZVOUS (a file that all ranks "
            "see), MASTER_ADDR, SLURM_STEP_NODELIST; set one");
    }

    void gather_ranks(const std::function<void(std::string&)>& exchange, std::span<char> gift) {
        const char* file = getenv("KEEL_RENDEZVOUS");
        std::string address = exchange || file ? "" : fixed_address();
        int listener = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1, off = 0;
        bool v6 = listener >= 0;
        if (!v6) listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        if (v6) setsockopt(listener, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
        uint16_t port = address.empty() ? 0 : uint16_t(atoi(address.substr(address.rfind(':') + 1).c_str()));
        sockaddr_in6 a6{};
        sockaddr_in a4{};
        a6.sin6_family = AF_INET6, a6.sin6_port = htons(port), a6.sin6_addr = in6addr_any;
        a4.sin_family = AF_INET, a4.sin_port = htons(port), a4.sin_addr.s_addr = htonl(INADDR_ANY);
        if (bind(listener, v6 ? reinterpret_cast<sockaddr*>(&a6) : reinterpret_cast<sockaddr*>(&a4),
                 v6 ? sizeof a6 : sizeof a4) != 0 ||
            listen(listener, SOMAXCONN) != 0)
            fail("ranks: rank 0 cannot listen on port %d (%s); set MASTER_PORT to another", int(port), strerror(errno));
        if (address.empty()) {
            socklen_t size = v6 ? sizeof a6 : sizeof a4;
            getsockname(listener, v6 ? reinterpret_cast<sockaddr*>(&a6) : reinterpret_cast<sockaddr*>(&a4), &size);
            char host[256] = "127.0.0.1";
            if (const char* given = getenv("MASTER_ADDR")) snprintf(host, sizeof host, "%s", given);
            else if (launch.local_ranks != launch.ranks) gethostname(host, sizeof host - 1);
            address = format("%s:%d", host, int(ntohs(v6 ? a6.sin6_port : a4.sin_port)));
            if (exchange) exchange(address);
            if (!exchange) write_rendezvous(file, address);
        }
        peers.resize(size_t(launch.ranks) - 1);
        double until = seconds() + START;
        for (int connected = 0; connected < launch.ranks - 1;) {
            pollfd p{listener, POLLIN, 0};
            if (seconds() > until)
                fail("ranks: expected %d within %.0f s, found %d; see to the machines of the others", launch.ranks,
                     START, connected + 1);
            if (poll(&p, 1, 500) <= 0) continue;
            Peer peer;
            peer.fd = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
            MessageHead head;
            if (peer.fd < 0 || !receive_message(peer, head, peer.name, seconds() + 10) || head.kind != HELLO ||
                head.ranks != uint32_t(launch.ranks) || head.rank == 0 || head.rank >= head.ranks ||
                peers[head.rank - 1].fd >= 0) {
                if (peer.fd >= 0) close(peer.fd);  // none of ours
                continue;
            }
            peer.rank = int(head.rank);
            setsockopt(peer.fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
            send_message(peer, HELLO, std::string(gift.data(), gift.size()) + launch.name());
            peers[head.rank - 1] = std::move(peer);
            connected++;
        }
        close(listener);
        if (file && !exchange) unlink(file);
    }

    static void write_rendezvous(const char* file, const std::string& address) {
        std::string temporary = std::string(file) + ".tmp";
        FILE* out = fopen(temporary.c_str(), "we");
        bool good = out && fprintf(out, "%s\n", address.c_str()) > 0;
        if (out) good = fclose(out) == 0 && good;
        if (!good || rename(temporary.c_str(), file) != 0)
            fail("KEEL_RENDEZVOUS: %s cannot be written (%s); name a file in a folder that all ranks see", file,
                 strerror(errno));
    }

    void find_rank_0(const std::function<void(std::string&)>& exchange, std::span<char> gift) {
        const char* file = getenv("KEEL_RENDEZVOUS");
        std::string address;
        if (exchange) exchange(address);
        else if (!file) address = fixed_address();
        Peer peer;
        peer.rank = 0;
        for (double until = seconds() + START;;) {
            if (!exchange && file) {  // read anew each time: an earlier run may have left one
                char text[300] = "";
                if (FILE* in = fopen(file, "re")) {
                    if (fscanf(in, "%299s", text) != 1) *text = 0;
                    fclose(in);
                }
                address = text;
            }
            MessageHead head;
            std::string given;
            if (!address.empty() && connect_to(peer, address)) {
                send_message(peer, HELLO, launch.name());
                if (receive_message(peer, head, given, seconds() + START) && head.kind == HELLO &&
                    given.size() >= gift.size()) {
                    std::copy_n(given.begin(), gift.size(), gift.begin());
                    peer.name = given.substr(gift.size());
                    break;
                }
                close(peer.fd), peer.fd = -1, peer.received.clear();
            }
            if (seconds() > until)
                fail("ranks: expected rank 0 at %s within %.0f s, found nobody; see to the network, or set MASTER_ADDR",
                     address.empty() ? file : address.c_str(), START);
            usleep(200000);
        }
        peers.push_back(std::move(peer));
    }
    static bool connect_to(Peer& peer, const std::string& address) {
        size_t colon = address.rfind(':');
        addrinfo hints{}, *found = nullptr;
        hints.ai_socktype = SOCK_STREAM;
        if (getaddrinfo(address.substr(0, colon).c_str(), address.substr(colon + 1).c_str(), &hints, &found) != 0)
            return false;
        for (addrinfo* a = found; a && peer.fd < 0; a = a->ai_next) {
            int fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol), on = 1;
            if (fd < 0) continue;
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
            if (connect(fd, a->ai_addr, a->ai_addrlen) == 0) peer.fd = fd;
            else close(fd);
        }
        freeaddrinfo(found);
        return peer.fd >= 0;
    }

    void watch() {
        double now = seconds(), beat = 0;
        for (Peer& peer : peers) peer.heard = now;
        while (!stop) {
            std::vector<pollfd> polled;
            for (Peer& peer : peers) polled.push_back({peer.left ? -1 : peer.fd, POLLIN, 0});
            poll(polled.data(), nfds_t(polled.size()), 100);
            double before = std::exchange(now, seconds());
            if (now - before > silence / 2)  // it is we who were stopped
                for (Peer& peer : peers) peer.heard = now;
            for (size_t i = 0; i < peers.size() && !stop; i++)
                if (!peers[i].left) attend(peers[i], polled[i].revents != 0, now);
            if (now - beat < silence / 10) continue;
            beat = now;
            for (Peer& peer : peers) send_message(peer, ALIVE, "");
        }
    }

    void attend(Peer& peer, bool readable, double now) {
        bool open = !readable || read_bytes(peer);
        MessageHead head;
        std::string text;
        try {
            while (take_message(peer, head, text)) {
                if (head.kind == GOODBYE) peer.left = true;
                if (head.kind == ERROR || head.kind == DEATH)
                    end_with(launch.rank == 0 || head.kind == DEATH ? text : "", ERROR, text, true);
            }
        } catch (const Error&) {
            open = false;
        }
        if (peer.left || stop) return;
        if (!open && launch.rank != 0) rank_0_gone = true;
        if (failing) return;  // we know why
        if (open && now - peer.heard < silence) return;
        std::string how = format(open ? "has given no sign of life for %.0f s" : "has died", silence);
        text = format("rank %d (%s) %s; all ranks end, and -y goes on from the last whole checkpoint", peer.rank,
                      peer.name.c_str(), how.c_str());
        end_with(text, DEATH, text, true);
    }

    // Prints why, once, tells the others where this is rank 0, and ends the process if asked to.
    void end_with(const std::string& ours, Kind kind, const std::string& for_others, bool exit_now) {
        if (ended.exchange(true)) {
            if (exit_now) stop = true;
            return;
        }
        // Before the others know: when the first of them ends, a launcher may end us.
        if (!ours.empty())
            fprintf(stderr, "%s%s\n", exit_now ? format("rank %d: ", launch.rank).c_str() : "", ours.c_str());
        if (launch.rank == 0)
            for (Peer& peer : peers) send_message(peer, kind, for_others);
        if (launch.rank == 0) usleep(200000);  // the others read before our end becomes theirs
        if (exit_now) _exit(1);
    }

    void close_all(bool by_error) {
        if (!by_error)
            for (Peer& peer : peers) send_message(peer, GOODBYE, "");
        stop = true;
        if (thread.joinable()) thread.join();
        for (Peer& peer : peers) close(peer.fd);
    }
};

// Of a build that has one rank.
struct NoCommunicator {
    struct Gift {
        explicit Gift(bool) {}
    };
    NoCommunicator(const Launch&, const Gift&) {}
    void gather(const void*, void*, size_t) {}
};

// What the ranks of a run tell each other beside tensors: a few bytes of each, to all. Alone, all of it is a copy.
class Ranks {
public:
    using Gather =
        std::function<void(const void* mine, void* all, size_t bytes)>;  // all: the bytes of each rank, in rank order

    Ranks() = default;
    Ranks(const Launch& launch, Gather gather) : launch(launch), gather_bytes(std::move(gather)) {}

    explicit operator bool() const { return launch.ranks > 0; }  // started by a launcher, be it as one
    int rank() const { return launch.rank; }
    int count() const { return std::max(1, launch.ranks); }

    template <class T>
    std::vector<T> gather(const T& mine) const {
        std::vector<T> all(size_t(count()), mine);
        if (gather_bytes) gather_bytes(&mine, all.data(), sizeof mine);
        return all;
    }
    void broadcast(void* data, size_t bytes) const {  // rank 0's
        if (!gather_bytes) return;
        std::vector<char> all(bytes * size_t(count()));
        gather_bytes(data, all.data(), bytes);
        std::copy_n(all.begin(), bytes, static_cast<char*>(data));
    }
    bool all(bool mine) const {
        bool every = true;
        for (char c : gather(char(mine))) every = every && c;
        return every;
    }
    void barrier() const { all(true); }
    double sum(double mine) const {  // in rank order
        double total = 0;
        for (double x : gather(mine)) total += x;
        return total;
    }

private:
    Launch launch;
    Gather gather_bytes;
};

// ----------------------------------------------------------------------------------------------------
// The output folder: model_00001000.bin, state_00001000_00000.bin, log.csv, probe.csv, probe_weights.csv, hops.csv,
// ablate.csv

inline std::string model_path(const std::string& folder, int64_t step) {
    return format("%s/model_%08lld.bin", folder.c_str(), (long long)step);
}
inline std::string state_path(const std::string& folder, int64_t step, int rank = 0) {
    return format("%s/state_%08lld_%05d.bin", folder.c_str(), (long long)step, rank);
}

// The files in a folder whose name fits the pattern, "state_%lld_00000.bin%n", with their step, from the newest on.
inline std::vector<std::pair<long long, std::string>> files_by_step(const std::string& folder, const char* pattern) {
    std::vector<std::pair<long long, std::string>> found;
    std::error_code ignored;
    for (const auto& entry : std::filesystem::directory_iterator(folder, ignored)) {
        long long step;
        int end = 0;
        std::string name = entry.path().filename().string();
        if (sscanf(name.c_str(), pattern, &step, &end) == 1 && size_t(end) == name.size())
            found.push_back({step, entry.path().string()});
    }
    std::sort(found.rbegin(), found.rend());
    return found;
}
inline constexpr const char *STATE_PATTERN = "state_%lld_00000.bin%n", *ANY_STATE_PATTERN = "state_%lld_%*5[0-9].bin%n",
                            *MODEL_PATTERN = "model_%lld.bin%n";

// --keep: removes all but the newest checkpoints up to this step. Later ones are not this run's: a resume passed them
// over.
inline void remove_old_checkpoints(const std::string& folder, int64_t step, int64_t keep) {
    if (keep == 0) return;
    for (auto [counted, removed] :
         {std::pair{STATE_PATTERN, ANY_STATE_PATTERN}, std::pair{MODEL_PATTERN, MODEL_PATTERN}}) {
        int64_t seen = 0;
        long long oldest = 0;  // that stays
        for (const auto& file : files_by_step(folder, counted))
            if (file.first <= step && ++seen == keep) oldest = file.first;
        for (const auto& [file_step, path] : files_by_step(folder, removed))
            if (file_step < oldest) unlink(path.c_str());
    }
}

// What a killed run left half-written.
inline void remove_unfinished_files(const std::string& folder) {
    for (const char* pattern : {"state_%lld_%*5[0-9].bin.tmp%n", "model_%lld.bin.tmp%n"})
        for (const auto& file : files_by_step(folder, pattern)) unlink(file.second.c_str());
}

// The training states of a checkpoint, a file a rank.
struct StateFiles {
    std::string folder;
    int64_t step = -1;  // -1: none
    int ranks = 0;      // that wrote it
    explicit operator bool() const { return step >= 0; }
    std::string path(int rank) const { return state_path(folder, step, rank); }

    // One of the files, which must be of this checkpoint: `first` is the header of rank 0's.
    FileReader open(int rank, const FileHeader& first) const {
        FileReader in(path(rank), FILE_STATE);
        FileHeader expected = first;
        expected.word[H_RANK] = rank;
        if (in.header.word != expected.word)
            fail("%s: expected rank %d of the checkpoint of %s, found another's", path(rank).c_str(), rank,
                 path(0).c_str());
        return in;
    }
    // Of a file that is not there, its path; "" where all are.
    std::string missing() const {
        for (int r = 0; r < ranks; r++)
            if (access(path(r).c_str(), F_OK) != 0) return path(r);
        return "";
    }
};

// Removes states that a killed run left without those of its other ranks, of later steps than this one.
inline void remove_incomplete_states(const std::string& folder, int64_t after) {
    for (const auto& [step, path] : files_by_step(folder, ANY_STATE_PATTERN)) {
        if (step <= after) continue;
        bool incomplete = access(state_path(folder, step).c_str(), F_OK) != 0;
        try {
            if (!incomplete)
                incomplete =
                    !StateFiles{folder, step, FileReader(state_path(folder, step), FILE_STATE).header.word[H_RANKS]}
                         .missing()
                         .empty();
        } catch (const Error&) {  // damaged: to be seen, not to be removed
        }
        if (incomplete) unlink(path.c_str());
    }
}

// The newest checkpoint in the folder whose states are all whole, or none where there is none at all. What is passed
// over is named on stderr. Of several ranks each reads a part of the files, and all come to the same answer.
template <class Ranks>
StateFiles newest_states(const std::string& folder, Ranks& ranks) {
    std::vector<std::pair<long long, std::string>> found;
    if (ranks.rank() == 0) found = files_by_step(folder, STATE_PATTERN);
    int damaged = 0;
    for (size_t i = 0;; i++) {
        struct {
            int64_t step;
            int32_t ranks, damaged;
        } candidate = {-1, 0, damaged};
        if (ranks.rank() == 0 && i < found.size()) {
            candidate = {found[i].first, 0, damaged};
            try {
                candidate.ranks = FileReader(found[i].second, FILE_STATE).header.word[H_RANKS];
                if (std::string path = StateFiles{folder, candidate.step, candidate.ranks}.missing(); !path.empty()) {
                    candidate.ranks = 0;
                    fprintf(stderr, "skipping a checkpoint: expected the file %s, found none\n", path.c_str());
                }
            } catch (const Error& e) {
                damaged++;
                fprintf(stderr, "skipping a checkpoint: %s\n", e.what());
            }
        }
        ranks.broadcast(&candidate, sizeof candidate);
        StateFiles states{folder, candidate.step, candidate.ranks};
        if (!states) {
            if (candidate.damaged > 0)
                fail(
                    "-y: expected a whole checkpoint in %s, found %d, all damaged; restore one, or move the folder "
                    "away to start fresh",
                    folder.c_str(), candidate.damaged);
            return states;
        }
        int whole = candidate.ranks > 0;
        try {
            for (int r = ranks.rank(); whole && r < states.ranks; r += ranks.count()) {
                FileHeader first = FileReader(states.path(0), FILE_STATE).header;
                states.open(r, first).finish();
            }
        } catch (const Error& e) {
            whole = 0;
            fprintf(stderr, "skipping a checkpoint: %s\n", e.what());
        }
        if (ranks.all(whole)) return states;
        damaged += candidate.ranks > 0;
    }
}

// Before anything is written: the folder can be made and written, and no other run is in it.
inline void check_output_folder(const std::string& folder, bool resume) {
    namespace fs = std::filesystem;
    std::error_code error;
    if (fs::exists(folder, error) && !fs::is_directory(folder, error))
        fail("-o: expected a folder, found the file %s; give another name", folder.c_str());
    if (fs::exists(folder, error) && !resume)
        for (const auto& entry : fs::directory_iterator(folder, error)) {
            std::string name = entry.path().filename().string();
            if (name == "log.csv" || name.starts_with("state_") || name.starts_with("model_"))
                fail("-o: %s holds a run (%s); go on with it by -y, or give another folder", folder.c_str(),
                     name.c_str());
        }
    // The nearest folder that exists is the one that must be writable.
    fs::path probe = fs::absolute(folder);
    while (!fs::exists(probe, error) && probe.has_parent_path() && probe != probe.parent_path())
        probe = probe.parent_path();
    if (!fs::is_directory(probe, error))
        fail("-o: expected a folder, found the file %s; give another name", probe.c_str());
    if (access(probe.c_str(), W_OK | X_OK) != 0)
        fail("-o: %s cannot be written (%s); give a folder that can", probe.c_str(), errno_text().c_str());
}

// Before --dump computes anything: its file can be written, and replaces nothing but an older dump.
inline void check_dump_target(const std::string& path) {
    namespace fs = std::filesystem;
    std::error_code error;
    fs::path folder = fs::absolute(path).parent_path();
    if (!fs::is_directory(folder, error) || access(folder.c_str(), W_OK | X_OK) != 0)
        fail("--dump: expected a folder that can be written, found %s; create it first", folder.c_str());
    if (fs::exists(path + ".tmp", error))
        fail("--dump: expected no file %s.tmp, which it writes first; move it away or give another name", path.c_str());
    if (!fs::exists(path, error)) return;
    int32_t word[3] = {};
    FILE* file = fs::is_regular_file(path, error) ? fopen(path.c_str(), "rb") : nullptr;
    bool older_dump =
        file && fread(word, 4, 3, file) == 3 && memcmp(word, "KEEL", 4) == 0 && word[H_KIND] == FILE_DEBUG;
    if (file) fclose(file);
    if (!older_dump)
        fail("--dump: expected a new file or an older dump, found something else in %s; give another name",
             path.c_str());
}

// -y where no checkpoint is: a fresh start, unless models show that a run has been here whose states are gone.
inline void check_fresh_resume(const std::string& folder) {
    std::error_code ignored;
    for (const auto& entry : std::filesystem::directory_iterator(folder, ignored))
        if (std::string name = entry.path().filename().string(); name.starts_with("model_") && !name.ends_with(".tmp"))
            fail(
                "-y: expected a training state in %s, found only models such as %s; start from one by -e in another -o",
                folder.c_str(), name.c_str());
    printf("starting   fresh, as there is no checkpoint in %s\n", folder.c_str());
}

// Makes the folder and those above it, each on the disk before the next.
inline void create_output_folder(const std::string& folder) {
    std::filesystem::path path;
    for (const auto& part : std::filesystem::path(folder)) {
        path /= part;
        if (mkdir(path.c_str(), 0777) == 0)
            sync_folder(path.has_filename() ? path.string() : path.parent_path().string());
        else if (std::error_code error; !std::filesystem::is_directory(path, error))
            fail("-o: %s cannot be created (%s); give another folder", folder.c_str(), errno_text().c_str());
    }
}

// One run in a folder at a time. The lock is the kernel's, on a file that names its holder: it ends with the process,
// however that ends, and the file that a killed run leaves stands in nobody's way.
class FolderLock {
public:
    FolderLock() = default;
    explicit FolderLock(const std::string& folder) : path(folder + "/lock") {
        for (;;) {
            fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NONBLOCK, 0666);
            if (fd < 0)
                fail("-o: %s cannot be written (%s); give a folder that can", folder.c_str(), errno_text().c_str());
            if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
                if (errno != EWOULDBLOCK) {
                    printf("note       %s cannot be locked (%s): see that no other run writes there\n", folder.c_str(),
                           errno_text().c_str());
                    return;
                }
                char holder[256] = {};
                if (pread(fd, holder, sizeof holder - 1, 0) <= 0) snprintf(holder, sizeof holder, "another run");
                close(fd);
                fail("-o: %s is in use by %s; wait for it, end it, or give another folder", folder.c_str(), holder);
            }
            struct stat ours, there;  // the holder before us may have removed the file between our open and our lock
            if (fstat(fd, &ours) == 0 && stat(path.c_str(), &there) == 0 && ours.st_ino == there.st_ino &&
                ours.st_dev == there.st_dev)
                break;
            close(fd);
        }
        char host[128] = "?";
        gethostname(host, sizeof host - 1);
        std::string text = format("process %d on %s", int(getpid()), host);
        if (ftruncate(fd, 0) != 0 || pwrite(fd, text.data(), text.size(), 0) != ssize_t(text.size())) {
        }  // on a full disk it is a lock without a name
    }
    ~FolderLock() {
        if (fd < 0) return;
        unlink(path.c_str());
        close(fd);
    }
    FolderLock(FolderLock&& other) noexcept : path(other.path), fd(std::exchange(other.fd, -1)) {}
    FolderLock& operator=(FolderLock&& other) noexcept {
        std::swap(path, other.path), std::swap(fd, other.fd);
        return *this;
    }
    explicit operator bool() const { return fd >= 0; }

private:
    std::string path;
    int fd = -1;
};

// The rows of a csv file of ours up to a step: whole lines that start with a step in order. Anything else in it is
// dropped: a killed run leaves half a line, a crashed machine leaves zeros.
template <class Row>
void read_csv_rows(const std::string& path, int64_t last_step, Row row) {
    int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    struct stat st;
    FILE* file = fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode) ? fdopen(fd, "r") : nullptr;
    if (!file) {
        if (fd >= 0) close(fd);
        return;
    }
    char* line = nullptr;
    size_t capacity = 0;
    ssize_t length;
    int64_t before = 0;
    while ((length = getline(&line, &capacity, file)) > 0) {
        if (line[length - 1] != '\n' || size_t(length) != strlen(line) || !isdigit((unsigned char)line[0])) continue;
        int64_t step = atoll(line);
        if (step < before || step > last_step) continue;
        before = step;
        row(step, std::string(line, size_t(length)));
    }
    free(line);
    fclose(file);
}

// A csv file that a resumed run continues: rows of later steps than the checkpoint's are dropped first.
class CsvLog {
public:
    CsvLog() = default;  // drops its rows: of the ranks that have no files
    CsvLog(const std::string& path, const std::string& columns, int64_t resume_step) : path(path) {
        std::string kept = columns + "\n";
        if (resume_step >= 0) read_csv_rows(path, resume_step, [&](int64_t, const std::string& line) { kept += line; });
        replace_file(path, kept, "free some space or give another -o");  // on the disk: rows from now on go to the new
                                                                         // file, no crash may bring the old one back
        file.reset(fopen(path.c_str(), "ae"));
        if (!file) fail("%s: could not be written (%s)", path.c_str(), errno_text().c_str());
    }
    void row(const std::string& text) {
        if (!file) return;
        if (fprintf(file.get(), "%s\n", text.c_str()) < 0 || fflush(file.get()) != 0)
            fail("%s: could not be written (%s); free some space and go on by -y", path.c_str(), errno_text().c_str());
    }
    // May be called while another thread adds rows: what was there before the call is on the disk after it.
    void sync() {
        if (fsync(fileno(file.get())) != 0 && errno != EINVAL)
            fail("%s: could not be written (%s); free some space and go on by -y", path.c_str(), errno_text().c_str());
    }

private:
    struct Close {
        void operator()(FILE* f) const { fclose(f); }
    };
    std::string path;
    std::unique_ptr<FILE, Close> file;
};

// ----------------------------------------------------------------------------------------------------
// Memory: a table of what will be allocated, printed and held against what there is before anything is

// Bytes that this process may still take: of the machine, of its control group, of its address space.
inline size_t available_memory() {
    size_t available = SIZE_MAX;
    auto number = [](const char* path, const char* key) {  // -1 where there is none
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
    if (long long kib = number("/proc/meminfo", "MemAvailable:"); kib >= 0) available = size_t(kib) * 1024;
    const char* groups[][3] = {
        {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"},
        {"/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes",
         "/sys/fs/cgroup/memory/memory.stat"}};
    for (auto& g : groups) {
        long long limit = number(g[0], nullptr), used = number(g[1], nullptr), cache = number(g[2], "inactive_file");
        if (limit < 0 || used < 0) continue;
        used = std::max(0LL, used - std::max(0LL, cache));  // page cache is given back on demand
        available = std::min(available, size_t(std::max(0LL, limit - used)));
    }
    struct rlimit limit;
    if (getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) {
        long long pages = number("/proc/self/statm", nullptr), taken = std::max(0LL, pages) * sysconf(_SC_PAGESIZE);
        available = std::min(available, size_t(std::max(0LL, (long long)limit.rlim_cur - taken)));
    }
    return available;
}

struct MemoryRow {
    std::string name;
    size_t bytes;
};

// turn: the flags that would make it fit.
inline void require_memory(size_t bytes, size_t available, const char* turn) {
    if (bytes > available)
        fail("memory: expected at least %s, found %s; use %s", bytes_text(double(bytes)).c_str(),
             bytes_text(double(available)).c_str(), turn);
}

inline size_t total_bytes(const std::vector<MemoryRow>& rows) {
    size_t sum = 0;
    for (const MemoryRow& row : rows) sum += row.bytes;
    return sum;
}

inline void print_memory_table(const std::vector<MemoryRow>& rows) {
    for (const MemoryRow& row : rows) printf("  %-38s %12s\n", row.name.c_str(), bytes_text(double(row.bytes)).c_str());
    printf("  %-38s %12s\n", "in all", bytes_text(double(total_bytes(rows))).c_str());
}

// The same for the disk: bytes that may still be written to a folder, or to the nearest one above it that exists;
// SIZE_MAX where the file system does not say.
inline size_t free_space(const std::string& folder) {
    std::filesystem::path path = std::filesystem::absolute(folder);
    struct statvfs fs;
    while (statvfs(path.c_str(), &fs) != 0) {
        if (path == path.parent_path()) return SIZE_MAX;
        path = path.parent_path();
    }
    return fs.f_blocks ? size_t(fs.f_bavail) * size_t(fs.f_frsize) : SIZE_MAX;
}

// A checkpoint's two files.
inline size_t checkpoint_bytes(const ModelConfig& c, RealType type) {
    return expected_file_size(make_header(FILE_STATE, type, c, 0)) +
           expected_file_size(make_header(FILE_MODEL, type, c, 0));
}

// Empty if a checkpoint fits beside those that are there, which stay until it is whole.
inline std::string space_fault(const std::string& folder, size_t bytes) {
    size_t free = free_space(folder);
    if (free >= bytes) return "";
    return format(
        "disk: expected at least %s free in %s for a checkpoint, found %s; free some space, or give another -o or -n 0",
        bytes_text(double(bytes)).c_str(), folder.c_str(), bytes_text(double(free)).c_str());
}

// ----------------------------------------------------------------------------------------------------
// Comparing two debug states (--check)

// The largest relative L2 error of a right computation, for the coarsest of the types involved: 1e-10 in FP64, 1e-4 in
// FP32 (a right one stays under 1e-5); with a BF16 branch 3e-2, where the q, k and v gains of hybridnorm sum few and
// nearly cancelling terms. From L = 64 on, the placements whose highway must be FP32 are held to what a BF16 highway
// fails.
inline double check_tolerance(const ModelConfig& c, const std::string& tensor, int type, bool branch_bf16) {
    if (type == REAL_BF16 || branch_bf16) {
        bool fp32_highway = c.L >= 64 && (c.norm == KEEL || c.norm == DEEPNORM || c.norm == SCALEDPOST);
        if (fp32_highway && tensor.starts_with("x[")) return 5e-3;
        if (fp32_highway && tensor.starts_with("dx[")) return 1e-2;
        for (const char* gain : {"d gamma_q", "d gamma_k", "d gamma_v"})
            if (tensor.starts_with(gain)) return 1e-1;
        return 3e-2;
    }
    return type == REAL_FP64 ? 1e-10 : 1e-4;
}

struct CheckRow {
    std::string name, shape;
    double error;  // ||file - ours|| / ||file||; 0 where both are all zero
    size_t worst;  // the element that differs most
    double worst_file, worst_ours;
    double tolerance;
    bool ok() const { return error <= tolerance; }  // false for NaN
};

template <class Real>
CheckRow compare_tensor(const std::string& name, const std::string& shape, const Real* file, const Real* ours, size_t n,
                        double tolerance) {
    double difference = 0, norm = 0, largest = -1;
    CheckRow row{name, shape, 0, 0, 0, 0, tolerance};
    for (size_t i = 0; i < n; i++) {
        double d = double(file[i]) - double(ours[i]);
        difference += d * d, norm += double(file[i]) * double(file[i]);
        if (std::fabs(d) > largest || std::isnan(d)) {
            if (!std::isnan(largest)) row.worst = i;
            largest = std::fabs(d);
        }
    }
    if (n > 0) row.worst_file = double(file[row.worst]), row.worst_ours = double(ours[row.worst]);
    row.error = difference == 0 ? 0 : std::sqrt(difference / norm);
    return row;
}

// A row per tensor; x and dx have one for each sub-layer's input and for what the last gives.
template <class Real>
std::vector<CheckRow> compare_debug_states(const DebugState<Real>& file, const DebugState<Real>& ours) {
    std::vector<CheckRow> rows;
    ModelConfig c = file.header.model();
    size_t B = size_t(file.header.word[H_B]), T = size_t(file.header.word[H_T]), C = size_t(c.C), stream = B * T * C;
    bool bf16 = file.header.word[H_BRANCH_BF16] || ours.header.word[H_BRANCH_BF16];
    int type = file.header.word[H_TYPE] == REAL_FP64 && ours.header.word[H_TYPE] == REAL_FP64 ? REAL_FP64 : REAL_FP32;
    auto add = [&](const std::string& name, const std::string& shape, const Real* a, const Real* b, size_t n) {
        rows.push_back(compare_tensor(name, shape, a, b, n, check_tolerance(c, name, type, bf16)));
    };
    std::string stream_shape = format("(%zu,%zu,%zu)", B, T, C);
    for (int l = 0; l <= c.L; l++)
        add(format("x[%d]", l), stream_shape, &file.x[size_t(l) * stream], &ours.x[size_t(l) * stream], stream);
    add("logits", format("(%zu,%zu,%d)", B, T, c.V), file.logits.data(), ours.logits.data(), file.logits.size());
    add("loss", "()", &file.loss, &ours.loss, 1);
    for (int l = c.L; l >= 0; l--)
        add(format("dx[%d]", l), stream_shape, &file.dx[size_t(l) * stream], &ours.dx[size_t(l) * stream], stream);
    for (const TensorInfo& t : ParameterLayout(c).tensors)
        add("d " + t.name, t.rows == 1 ? format("(%zu)", t.cols) : format("(%zu,%zu)", t.rows, t.cols),
            &file.grads[t.file_offset], &ours.grads[t.file_offset], t.size());
    return rows;
}

// Prints the table; true if every row is within its tolerance.
inline bool print_check_table(const std::vector<CheckRow>& rows) {
    printf("%-16s %-18s %12s %10s %24s %24s %10s  %s\n", "tensor", "shape", "rel L2 error", "worst at", "file", "ours",
           "tolerance", "ok");
    size_t bad = 0;
    for (const CheckRow& r : rows) {
        printf("%-16s %-18s %12.3e %10zu %24.16g %24.16g %10.0e  %s\n", r.name.c_str(), r.shape.c_str(), r.error,
               r.worst, r.worst_file, r.worst_ours, r.tolerance, r.ok() ? "ok" : "NOT OK");
        bad += !r.ok();
    }
    printf("%zu of %zu tensors within their tolerance\n", rows.size() - bad, rows.size());
    return bad == 0;
}

// ----------------------------------------------------------------------------------------------------
// What run_trainer asks of a Trainer
//
// All that is not the computation of a step stands below, once. What computes is a type Trainer of each trainer's file:
//
//     struct Trainer {
//         using Real = float;                         // of its files and debug states
//         using HostArray = Buffer<float>;            // HostArray(n): n Reals at data() in the host's memory, where
//         snapshot is fast static constexpr bool branch_bf16 = false;  // header word 16 static constexpr bool on_host
//         = true;       // available_memory is the host's; the flags of the GPU alone are refused static constexpr int
//         steps_in_flight = 1;   // steps that may have been started and not finished
//
//         // What carries tensors between the ranks of a run; constructed in each of them. ranks_by: its library, or
//         null where this build has
//         // one rank only, which ranks_needs would change.
//         static constexpr const char *ranks_by = "MPI", *ranks_needs = "MPI (mpicc)";
//         static constexpr bool probes_ranks = true;  // --probe works on several
//         struct Communicator {
//             struct Gift;                            // bytes of rank 0's that all need: made by a Gift(true), empty
//             as a Gift(false) Communicator(const Launch& launch, const Gift& gift); void gather(const void* mine,
//             void* all, size_t bytes);                 // for Ranks
//         };
//
//         // Before a Trainer is made. What a user can mend throws an Error.
//         static void require_machine();                      // throws where there is nothing to compute on
//         static void check_model(const ModelConfig& c);      // throws where this build cannot run the shape
//         static size_t available_memory();                   // bytes of the memory that the three below count
//         static void choose_memory_plan(RunConfig& run, size_t available);           // fills B and recompute where
//         still open; throws where nothing fits static std::vector<MemoryRow> memory_rows(const RunConfig& run); //
//         what a Trainer of this run takes
//         // What else it takes, with its name for the table: samples and probe, or the debug states of --dump (one)
//         and --check
//         // (two) where they lie in that memory. B may still be 0.
//         static MemoryRow memory_beside(const RunConfig& run, const Options& o);
//         static size_t sampling_bytes(const ModelConfig& c, int window);             // a Trainer of B = T = 1,
//         recompute 1, and its Generator
//
//         // Uses the model, B, T, recompute, ranks and the optimizer's settings; parameters not yet set, moments zero.
//         communicator: null alone. explicit Trainer(const RunConfig& run, Communicator* communicator); const
//         ModelConfig& config(); const ParameterLayout& layout();
//
//         RunConfig run;                              // the constructor's; the run counts its skipped steps here
//
//         // Parameters and moments, in the order and type of a file's body. Reading ends where they end: the caller
//         finishes the file. void initialise(uint64_t seed); void read_parameters(FileReader& in); void
//         read_moments(FileReader& in); void write_parameters(FileWriter& out); void write_moments(FileWriter& out);
//         void snapshot(Real* out);                   // copies parameters, first moments, second moments: 3 *
//         layout().count reals size_t step_bytes;                          // of several ranks: sent by this one in the
//         first step void gather_weights();                      // of several ranks, by each: what evaluate and a
//         Generator read is whole
//         // Of several ranks, all of them called by every rank: a snapshot of what this one owns, stretches of
//         parameters, then of the first, then of the
//         // second moments, followed, on rank 0, by all parameters in their order. store takes n elements from the
//         first-th on of a stretch of section
//         // 0, 1 or 2, and stored() follows when all are there.
//         void snapshot_owned(Real* out);
//         void store(int section, const Stretch& stretch, size_t first, size_t n, const Real* values);
//         void stored();
//
//         // Sum of the losses of b <= B sequences, (b,T). predictions, if given, gets the likeliest token after each,
//         (b,T); of equals the lower. double evaluate(const int* tokens, const int* targets, int b, int* predictions =
//         nullptr); void ablate(int l);                         // evaluate leaves out the branch of sub-layer l: F_l =
//         0, z_l = alpha_l x_l; -1: none
//         // One step: start gives it to the trainer, finish waits for the oldest one started and not yet finished.
//         Steps come in order, and what
//         // comes between two of them finds none in flight. probe: null where the step is not probed. flags: RankFlags
//         of this rank. Of several
//         // ranks, finish throws a DataError on all where one's data could not be read.
//         void start(const Loader& data, int64_t step, ProbeLog* probe, unsigned flags);  // step 1, 2, ...
//         StepResult finish();
//         void debug_pass(DebugState<Real>& s, int B, int T);                         // s.tokens, s.targets given;
//         fills the rest double matrix_rate();                       // operations a second of a large matrix product,
//         measured std::string machine_name();                 // "2 threads"
//
//         // Feeds tokens and keeps what attention needs of them; feed returns the logits (V) after the last, on the
//         host. struct Generator {
//             Generator(Trainer& trainer, int window);
//             const Real* feed(const int* tokens, int n);
//             void clear();
//             int size() const;                       // tokens fed since the start or clear
//         };
//     };

// Mean loss over the step's tokens, and norm of the gradient before it is clipped. Where either is not finite, nothing
// has been updated and the gradients are zero for the next step. A DataError from its start, too, has left parameters
// and moments alone.
struct StepResult {
    double loss, norm;
    unsigned any = 0, all = 0;  // the RankFlags that any of the ranks, and that all of them, gave to the step
};

// What a rank tells the others with each step's numbers, so that all act on it at the same step.
enum RankFlag : unsigned {
    STOP_ASKED = 1,  // by a signal
    DATA_LOST = 2,   // its part of the batch could not be read: the step updates nothing
    STATE_WRITTEN = 4,
    MODEL_WRITTEN = 8,  // its part of a checkpoint's states, of its model, is on the disk
};

// What ranks add up, in rank order, at the end of a step.
struct StepShare {
    double loss_sum = 0, grad_squares = 0;  // over its targets; over the gradients that it owns
    uint64_t flags = 0;
};

// After a step with DATA_LOST: the same DataError on all ranks, that of the first whose data could not be read. mine:
// "" where they could.
template <class Communicator>
[[noreturn]] void throw_lost_data(Communicator& communicator, const RunConfig& run, const std::string& mine) {
    struct { char text[512]; } ours{};
    if (!mine.empty()) snprintf(ours.text, sizeof ours.text, "rank %d: %s", run.rank, mine.c_str());
    std::vector<decltype(ours)> all(size_t(run.ranks));
    communicator.gather(&ours, all.data(), sizeof ours);
    size_t first = 0;
    while (first + 1 < all.size() && !*all[first].text) first++;
    throw DataError(all[first].text);
}

// ----------------------------------------------------------------------------------------------------
// Divergence: the three kinds that the paper's protocols count, from the losses of the steps alone
//
// Losses are averaged over windows of w steps, w = steps/40 from 10 to 200. Their noise s is what neighbouring steps
// differ by, a window's is s/sqrt(w). U is the unigram entropy of the data, the loss of knowing only how frequent each
// token is: a healthy run passes it within its first tens of steps, and a run whose deeper layers get no gradient stays
// there (Post-LN at L = 64: 3.17 for U = 3.16; a healthy one passes at step 30).
//
//     stagnation    ten windows at 0.98 U or above, after the warm-up or twenty windows, and the last five no lower
//     than the five before by
//                   more than 0.01 U and their noise: a plateau where a healthy run is not any more
//     degradation   the same level after twice the warm-up and twenty windows, still falling: anomalously slow
//     instability   ten windows in a row above the lowest so far by 0.03 of it and four times their noise: a spike
//     without a return
//
// Each kind is told once a run.
class DivergenceDetector {
public:
    DivergenceDetector(int64_t steps, int64_t warmup, double unigram)
        : w(std::clamp<int64_t>(steps / 40, 10, 200)), warmup(warmup), unigram(unigram) {}

    // Of the next step, in order; a loss that is not finite does not count. Returns what has been found, or "".
    std::string add(int64_t step, double loss) {
        if (!std::isfinite(loss)) return "";
        if (n > 0) squares += (loss - before) * (loss - before) / 2;
        before = loss, n++, sum += loss;
        if (n % w) return "";
        mean.push_back(sum / double(w));
        sum = 0;
        if (mean.size() == 1 || mean.back() < lowest) lowest = mean.back();
        double noise = std::sqrt(squares / double(n) / double(w));  // of a window's mean
        above = mean.back() > lowest + 0.03 * std::fabs(lowest) + 4 * noise ? above + 1 : 0;
        if (above >= 10 && !told[0]) {
            told[0] = true;
            return format(
                "instability: the loss has been at %.3f or so since a spike %lld steps ago and does not return to the "
                "%.3f before it; a smaller -l or a longer -u may help",
                average(0, 5), (long long)(above * w), lowest);
        }
        if (mean.size() < 10 || (step < warmup + 10 * w && mean.size() < 20) || unigram < 0.1) return "";
        double last = average(0, 5), earlier = average(5, 5);
        if (std::min(last, earlier) < 0.98 * unigram) return "";
        bool flat = last > earlier - 0.01 * unigram - noise;
        if (flat && !told[1]) {
            told[1] = true;
            return format(
                "stagnation: the loss stays at %.3f, and knowing how frequent each token is gives %.3f; a smaller -l "
                "or another --norm may help",
                last, unigram);
        }
        if (!flat && !told[2] && step >= 2 * warmup && mean.size() >= 20) {
            told[2] = true;
            return format(
                "degradation: the loss is %.3f after %lld steps, and knowing how frequent each token is gives %.3f; "
                "another -l may help",
                last, (long long)step, unigram);
        }
        return "";
    }

private:
    // of `count` windows, skipping the last `skip`
    double average(size_t skip, size_t count) const {
        double total = 0;
        for (size_t i = 0; i < count; i++) total += mean[mean.size() - 1 - skip - i];
        return total / double(count);
    }
    int64_t w, warmup, n = 0, above = 0;
    double unigram, before = 0, sum = 0, squares = 0, lowest = 0;
    std::vector<double> mean;  // of each whole window
    bool told[3] = {};
};

// ----------------------------------------------------------------------------------------------------
// The probe: of a probed step, a row for each sub-layer in probe.csv and one for each parameter tensor in
// probe_weights.csv
//
// Without its branch, sub-layer l is the map x_l -> RMSNorm(alpha x_l + F; gamma) with F held fixed. Its Jacobian at
// one row is
//
//     diag(gamma_l) (alpha_l / rms(z_l)) (I - zh zh^T / C),   zh = z_l / rms(z_l)
//
// The last factor takes away the one direction of C that would only change z's length; what is left is the diagonal
// matrix whose entries alpha gamma / rms(z) the paper's eq. 14-19 estimate, with rms(z) = sqrt(alpha^2 + 1). Here
// rms(z) is each row's own and gamma each channel's own:
//
//     shortcut_gain         mean over rows of ||A_l||_F / sqrt(C),              A_l = diag(alpha_l gamma_l / rms(z_l)),
//     alpha_l I without an outer norm shortcut_gain_to_top  mean over rows of ||A_{L-1} ... A_l||_F / sqrt(C)
//
// The product is taken row by row and channel by channel, and averaged after: the product of the averages is another
// number. A product of diagonal matrices with entries a_i g_c has the norm |prod a_i| ||prod g_c||, so that rows and
// channels are multiplied up apart.

// Of one sub-layer, summed over the micro-batches of a step.
struct SublayerProbe {
    double x = 0, f = 0, z = 0;  // sums of squares of x_l, F(u_l) and z_l
    double shortcut = 0,
           shortcut_to_top =
               0;           // sums over rows of alpha_l / rms(z_l), and of its product over the sub-layers from l on
    double dx = 0, df = 0;  // sums of squares of dL/dx_l and dL/dF_l
};

struct StepProbe {
    std::vector<SublayerProbe> sublayers;  // (L)
    std::vector<double> gamma,
        gamma_to_top;  // (L) rms over channels of gamma_out_l, and of its product over the sub-layers from l on
    std::vector<double> weights, gradients,
        updates;  // sums of squares of each tensor: before the update, before the clip, of what the update adds

    explicit StepProbe(const ModelConfig& c) : sublayers(size_t(c.L)) {}

    // Of one micro-batch. r: 1 / rms(z_l) of each row, (L,rows); not read where no norm follows.
    template <class Real>
    void add_shortcuts(const ModelConfig& c, const Real* r, size_t rows) {
        std::vector<double> to_top(rows, 1.0);
        for (int l = c.L - 1; l >= 0; l--) {
            SublayerNorm norm = c.sublayer(l);
            double sum = 0, sum_to_top = 0;
            for (size_t i = 0; i < rows; i++) {
                double gain = double(norm.alpha) * (norm.norm_out ? double(r[size_t(l) * rows + i]) : 1);
                to_top[i] *= gain, sum += gain, sum_to_top += to_top[i];
            }
            sublayers[size_t(l)].shortcut += sum, sublayers[size_t(l)].shortcut_to_top += sum_to_top;
        }
    }

    // The sums of several ranks, each of its sequences and, of gradients and updates, of the parameters that it owns;
    // in rank order. gather(mine, all, bytes) gives each rank what all have.
    template <class Gather>
    void add_ranks(int ranks, Gather gather) {
        std::vector<double> mine(sublayers.size() * sizeof(SublayerProbe) / sizeof(double) + gradients.size() +
                                 updates.size());
        auto exchange = [&](auto copy) {  // copy(values, where they are in a rank's row, elements)
            size_t at = 0, n = sublayers.size() * sizeof(SublayerProbe) / sizeof(double);
            copy(reinterpret_cast<double*>(sublayers.data()), at, n), at += n;
            copy(gradients.data(), at, gradients.size()), at += gradients.size();
            copy(updates.data(), at, updates.size());
        };
        exchange([&](double* values, size_t at, size_t n) { std::copy_n(values, n, mine.data() + at); });
        std::vector<double> all(mine.size() * size_t(ranks));
        gather(mine.data(), all.data(), mine.size() * sizeof(double));
        exchange([&](double* values, size_t at, size_t n) {
            for (size_t i = 0; i < n; i++) {
                values[i] = 0;
                for (int r = 0; r < ranks; r++) values[i] += all[size_t(r) * mine.size() + at + i];
            }
        });
    }

    // gamma_of(l): gamma_out_l (C) as the forward pass read it, null where there is none.
    template <class GammaOf>
    void set_gains(const ModelConfig& c, GammaOf gamma_of) {
        std::vector<double> product(size_t(c.C), 1.0);
        gamma.assign(size_t(c.L), 1), gamma_to_top.assign(size_t(c.L), 1);
        for (int l = c.L - 1; l >= 0; l--) {
            double sum = 0, sum_to_top = 0;
            const auto* g = gamma_of(l);
            for (size_t k = 0; k < product.size(); k++) {
                double gain = g ? double(g[k]) : 1;
                product[k] *= gain, sum += gain * gain, sum_to_top += product[k] * product[k];
            }
            gamma[size_t(l)] = std::sqrt(sum / c.C), gamma_to_top[size_t(l)] = std::sqrt(sum_to_top / c.C);
        }
    }
};

struct ProbeLog {
    ProbeLog() = default;  // drops its rows: of the ranks that have no files
    static constexpr const char* COLUMNS =
        "step,sublayer,kind,rms_x,rms_f,rms_z,shortcut_gain,shortcut_gain_to_top,dx_norm,df_norm,grad_norm,update_norm";
    static constexpr const char* WEIGHT_COLUMNS =
        "step,sublayer,tensor,weight_norm,grad_norm,update_norm";  // sublayer -1: outside the blocks
    CsvLog sublayers, weights;
    ProbeLog(const std::string& folder, int64_t resume_step)
        : sublayers(folder + "/probe.csv", COLUMNS, resume_step),
          weights(folder + "/probe_weights.csv", WEIGHT_COLUMNS, resume_step) {}
};

// rms over rows and channels, norms over all elements; grad_norm and update_norm of a sub-layer over all its tensors.
inline void write_probe(ProbeLog& log, const RunConfig& run, const ParameterLayout& layout, int64_t step,
                        const StepProbe& probe) {
    double rows = double(run.total_batch), elements = rows * run.model.C;
    std::vector<double> gradients(size_t(run.model.L)), updates(gradients.size());
    for (size_t i = 0; i < layout.tensors.size(); i++)
        if (int l = layout.tensors[i].layer; l >= 0)
            gradients[size_t(l)] += probe.gradients[i], updates[size_t(l)] += probe.updates[i];
    for (size_t l = 0; l < gradients.size(); l++) {
        const SublayerProbe& p = probe.sublayers[l];
        log.sublayers.row(format("%lld,%zu,%s,%.6g,%.6g,%.6g,%.6g,%.6g,%.6g,%.6g,%.6g,%.6g", (long long)step, l,
                                 is_attention(int(l)) ? "attention" : "feed-forward", std::sqrt(p.x / elements),
                                 std::sqrt(p.f / elements), std::sqrt(p.z / elements),
                                 probe.gamma[l] * p.shortcut / rows, probe.gamma_to_top[l] * p.shortcut_to_top / rows,
                                 std::sqrt(p.dx), std::sqrt(p.df), std::sqrt(gradients[l]), std::sqrt(updates[l])));
    }
    for (size_t i = 0; i < layout.tensors.size(); i++)
        log.weights.row(format("%lld,%d,%s,%.6g,%.6g,%.6g", (long long)step, layout.tensors[i].layer,
                               tensor_rows[layout.tensors[i].id].name, std::sqrt(probe.weights[i]),
                               std::sqrt(probe.gradients[i]), std::sqrt(probe.updates[i])));
}

// ----------------------------------------------------------------------------------------------------
// Sampling

// One token from logits (V): the likeliest for temperature 0, else from softmax(logits / temperature) over the top_k
// likeliest (0: over all; of equals the lower token counts as likelier). uniform in [0, 1).
template <class Real>
int sample_token(const Real* logits, int V, double temperature, int top_k, double uniform) {
    std::vector<int> order(static_cast<size_t>(V));
    for (int v = 0; v < V; v++) order[size_t(v)] = v;
    auto likelier = [&](int a, int b) { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); };
    if (temperature == 0) return *std::min_element(order.begin(), order.end(), likelier);
    if (top_k > 0 && top_k < V) {
        std::nth_element(order.begin(), order.begin() + top_k - 1, order.end(), likelier);
        order.resize(size_t(top_k));
        std::sort(order.begin(), order.end());
    }
    double largest = -INFINITY, sum = 0;
    for (int v : order) largest = std::max(largest, double(logits[v]));
    std::vector<double> p;
    for (int v : order) p.push_back(std::exp((double(logits[v]) - largest) / temperature)), sum += p.back();
    double left = uniform * sum;
    for (size_t i = 0; i < p.size(); i++)
        if ((left -= p[i]) < 0) return order[i];
    return order[size_t(std::max_element(p.begin(), p.end()) - p.begin())];
}

// The prompt as tokens: bytes where V = 256, else ids separated by commas.
inline std::vector<int> prompt_tokens(const std::string& prompt, bool given, int V) {
    std::vector<int> tokens;
    if (V == 256) {
        for (unsigned char c : prompt) tokens.push_back(c);
        return tokens;
    }
    if (!given) return {V - 1};  // GPT-2's <|endoftext|> is its last token
    for (size_t at = 0; at <= prompt.size();) {
        size_t comma = std::min(prompt.find(',', at), prompt.size());
        tokens.push_back(int(parse_integer("--prompt", prompt.substr(at, comma - at), 0, V - 1)));
        at = comma + 1;
    }
    return tokens;
}

inline void print_token(int token, int V) {
    if (V != 256) printf("%d ", token);
    else putchar(token == '\n' || token == '\t' || token >= 32 ? token : '.');
}

// Prints the prompt and count more tokens. When the window is full, the second half of the text goes on in a new one.
template <class Trainer>
void print_sample(Trainer& trainer, const Options& o, int window, uint64_t seed, int64_t step) {
    int V = trainer.config().V;
    std::vector<int> text = prompt_tokens(o.prompt, o.has("--prompt"), V);
    typename Trainer::Generator generator(trainer, window);
    printf("--- sample%s\n", step > 0 ? format(" at step %lld", (long long)step).c_str() : "");
    for (int token : text) print_token(token, V);
    size_t fed = text.size() > size_t(window) ? text.size() - size_t(window) : 0;
    for (int64_t i = 0; i < o.sample_tokens; i++) {
        if (generator.size() + int(text.size() - fed) > window) {
            generator.clear();
            fed = text.size() - size_t(std::max(1, window / 2));
        }
        const auto* logits = generator.feed(text.data() + fed, int(text.size() - fed));
        fed = text.size();
        Philox draw = philox(seed, uint32_t(i), uint32_t(step), uint32_t(uint64_t(step) >> 32), STREAM_SAMPLE);
        text.push_back(sample_token(logits, V, o.temperature, int(o.top_k), draw.word[0] * 0x1p-32));
        print_token(text.back(), V);
        fflush(stdout);
    }
    printf("\n---\n");
}

// ----------------------------------------------------------------------------------------------------
// The run: everything around the training step

template <class Trainer>
void write_model(const std::string& path, Trainer& trainer, int64_t step) {
    FileWriter out(path);
    FileHeader header =
        make_header(FILE_MODEL, real_type<typename Trainer::Real>, trainer.config(), step, Trainer::branch_bf16);
    out.write(&header, sizeof header);
    trainer.write_parameters(out);
    out.commit();
}

template <class Trainer>
void write_state(const std::string& path, Trainer& trainer, const RunConfig& run, int64_t step, const DataSplit& data) {
    FileWriter out(path);
    FileHeader header = state_header(real_type<typename Trainer::Real>, Trainer::branch_bf16, run, step, data);
    out.write(&header, sizeof header);
    trainer.write_parameters(out);
    trainer.write_moments(out);
    out.commit();
}

// Checkpoints of a run: the state first, then its model, as a resume writes a model that is missing. Where the host's
// memory holds a snapshot of parameters and moments, training stalls for that copy only, and a thread writes the files
// beside it. One write at a time: the next waits for it, and so does the run's end. An error in it is thrown by the
// next call.
//
// Of several ranks each writes its own state, always from a snapshot. When all states are on the disk, which the ranks
// tell each other with a step's numbers, rank 0 writes the model, and when it has, the checkpoint counts. All ranks
// make the same calls.
template <class Trainer>
class CheckpointWriter {
public:
    using Real = typename Trainer::Real;

    CheckpointWriter(Trainer& trainer, const DataSplit& data, const std::string& folder, int64_t keep, bool background,
                     std::vector<CsvLog*> logs, const Ranks& ranks = {})
        : trainer(trainer), data(data), folder(folder), keep(keep), logs(std::move(logs)), ranks(ranks),
          owned(ranks ? trainer.layout().owned_count(ranks.rank()) : 0) {
        if (!background && !ranks) return;
        try {
            snapshot = typename Trainer::HostArray(snapshot_count(trainer.layout(), ranks));
        } catch (
            const Error& e) {  // free memory is not always memory that can be had, such as pinned memory in a container
            if (ranks) throw;
            printf("note       training waits while a checkpoint is written: no snapshot (%s)\n", e.what());
            return;
        }
        take_snapshot();  // touches its pages, which would stall the first checkpoint
    }
    ~CheckpointWriter() {
        if (thread.joinable()) thread.join();
    }

    // Reals of a snapshot: what is written, and of several ranks the model on rank 0.
    static size_t snapshot_count(const ParameterLayout& layout, const Ranks& ranks) {
        return ranks ? 3 * layout.owned_count(ranks.rank()) + (ranks.rank() == 0 ? layout.count : 0) : 3 * layout.count;
    }

    // Where steps are being skipped, nothing is removed for the new checkpoint: it may hold what cannot be trained.
    void write(int64_t step) {
        wait();
        double start = seconds();
        job = {step,
               trainer.run.skipped_in_row > 0 ? 0 : keep,
               0,
               0,
               state_header(real_type<Real>, Trainer::branch_bf16, trainer.run, step, data),
               make_header(FILE_MODEL, real_type<Real>, trainer.config(), step, Trainer::branch_bf16)};
        error = nullptr;
        if (snapshot.size()) {
            take_snapshot();
            job.stalled = seconds() - start;
            if (start_writing(ranks ? STATE : STATE_AND_MODEL)) return;
        }
        write_files(STATE_AND_MODEL);
        job.stalled = seconds() - start;
        finish();
    }

    // Of several ranks: the model of a checkpoint whose states are all there.
    void write_model(int64_t step) {
        job = {step, 0,  0,
               0,    {}, make_header(FILE_MODEL, real_type<Real>, trainer.config(), step, Trainer::branch_bf16)};
        take_snapshot();
        if (ranks.rank() == 0) write_files(MODEL);
        if (error) std::rethrow_exception(std::exchange(error, nullptr));
    }

    // Between steps: says what has been written, or throws why it could not be. all: the RankFlags that all ranks gave
    // to the step.
    void poll(unsigned all = 0) {
        if (phase != NOTHING && done.load(std::memory_order_acquire) && (!ranks || error || (all & flag_of_phase())))
            advance();
    }
    void wait() {
        while (phase != NOTHING) {
            if (thread.joinable()) thread.join();
            if (error) std::rethrow_exception(std::exchange(error, nullptr));
            ranks.barrier();
            advance();
        }
    }
    unsigned flags() const { return phase != NOTHING && done.load(std::memory_order_acquire) ? flag_of_phase() : 0u; }
    int64_t last_step() const { return last; }  // of the newest that is whole and on the disk; -1: none

private:
    enum Phase { NOTHING, STATE, MODEL, STATE_AND_MODEL };
    struct Job {
        int64_t step, keep;
        double stalled, written;  // seconds
        FileHeader state, model;
    };

    unsigned flag_of_phase() const { return phase == STATE ? STATE_WRITTEN : MODEL_WRITTEN; }

    void take_snapshot() {
        if (ranks) trainer.snapshot_owned(snapshot.data());
        else trainer.snapshot(snapshot.data());
    }

    // False where there are no more threads, and the caller must write.
    bool start_writing(Phase what) {
        phase = what, done = false;
        try {
            thread = std::thread([this, what] { write_files(what); });
            return true;
        } catch (const std::system_error&) {
            if (!ranks) return phase = NOTHING, false;
            write_files(what);
            return true;
        }
    }

    void write_files(Phase what) {
        double start = seconds();
        try {
            for (CsvLog* log : logs) log->sync();  // no checkpoint is ahead of its log
            for (bool state : {true, false}) {
                if (what != STATE_AND_MODEL && state != (what == STATE)) continue;
                if (!state && ranks.rank() != 0) continue;
                FileWriter out(state ? state_path(folder, job.step, ranks.rank()) : model_path(folder, job.step));
                out.write(state ? &job.state : &job.model, sizeof(FileHeader));
                if (ranks) {
                    out.write(snapshot.data() + (state ? 0 : 3 * owned),
                              (state ? 3 * owned : trainer.layout().count) * sizeof(Real));
                } else if (phase != NOTHING) {  // in a thread, from the snapshot
                    out.write(snapshot.data(), (state ? 3 : 1) * trainer.layout().count * sizeof(Real));
                } else {
                    trainer.write_parameters(out);
                    if (state) trainer.write_moments(out);
                }
                out.commit();
            }
            if (!ranks) remove_old_checkpoints(folder, job.step, job.keep);
        } catch (...) {
            error = std::current_exception();
        }
        job.written += seconds() - start;
        done.store(true, std::memory_order_release);
    }

    void advance() {
        if (thread.joinable()) thread.join();
        if (phase == STATE && !error) {
            start_writing(MODEL);
            return;
        }
        finish();
    }

    void finish() {
        phase = NOTHING;
        if (error) std::rethrow_exception(std::exchange(error, nullptr));
        last = job.step;
        if (ranks && ranks.rank() == 0) remove_old_checkpoints(folder, job.step, job.keep);
        printf("checkpoint | %s | training stalled for %.1f ms, written in %.0f ms\n",
               state_path(folder, job.step).c_str(), job.stalled * 1e3, job.written * 1e3);
    }

    Trainer& trainer;
    const DataSplit& data;
    std::string folder;
    int64_t keep, last = -1;
    std::vector<CsvLog*> logs;
    Ranks ranks;
    size_t owned;                          // reals of the parameters that this rank owns
    typename Trainer::HostArray snapshot;  // empty: checkpoints are written while training waits
    Job job{};
    Phase phase = NOTHING;
    std::exception_ptr error;
    std::atomic<bool> done = false;
    std::thread thread;
};

// Takes what this rank owns from a checkpoint of any number of ranks.
template <class Trainer>
void read_states(Trainer& trainer, const StateFiles& files) {
    using Real = typename Trainer::Real;
    const ParameterLayout& ours = trainer.layout();
    FileHeader first = FileReader(files.path(0), FILE_STATE).header;
    ParameterLayout theirs(first.model(), files.ranks);
    std::vector<Stretch> own(ours.tensors.size());  // of each tensor
    for (const Stretch& s : ours.stretches(trainer.run.rank)) own[s.tensor] = s;
    std::vector<Real> chunk;
    for (int rank = 0; rank < files.ranks; rank++) {
        std::vector<Stretch> stored = theirs.stretches(rank);
        auto overlaps = [&](const Stretch& s) {
            const Stretch& o = own[s.tensor];
            return std::max(s.first, o.first) < std::min(s.first + s.count, o.first + o.count);
        };
        if (std::none_of(stored.begin(), stored.end(), overlaps)) continue;
        FileReader in = files.open(rank, first);
        for (int section = 0; section < 3; section++)
            for (const Stretch& s : stored)
                for (size_t at = s.first, end = s.first + s.count; at < end; at += chunk.size()) {
                    chunk.resize(std::min(end - at, size_t(4) << 20));
                    in.read_reals(chunk.data(), chunk.size());
                    const Stretch& o = own[s.tensor];
                    size_t from = std::max(at, o.first), to = std::min(at + chunk.size(), o.first + o.count);
                    if (from < to) trainer.store(section, o, from - o.first, to - from, chunk.data() + (from - at));
                }
        in.finish();
    }
    trainer.stored();
}

// SIGTERM, SIGINT and SIGUSR1 ask a run to finish its step, write a checkpoint and end with 0: a scheduler can take the
// machine back. A second one ends it at once. Two within 50 ms are one: some programs send it to a process and to its
// group.
class StopSignals {
public:
    // To the end of the process: one that comes when the run has just ended must not turn its exit status.
    static void watch() {
        struct sigaction action = {};
        action.sa_handler = handle;
        action.sa_flags = SA_RESTART;
        for (int number : {SIGTERM, SIGINT, SIGUSR1}) sigaction(number, &action, nullptr);
    }
    static bool asked() { return first_at != 0; }

private:
    static inline std::atomic<int64_t> first_at = 0;  // nanoseconds; 0: none has come

    static void handle(int number) {
        timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        int64_t at = int64_t(now.tv_sec) * 1000000000 + now.tv_nsec, first = 0;
        if (first_at.compare_exchange_strong(first, at) || at - first < 50000000) return;
        signal(number, SIG_DFL);
        raise(number);
    }
};

// For programs: how many queries of each number of lookups there were, and how many were answered right. Index 0 is for
// all together.
struct HopAccuracy {
    std::vector<int64_t> count, right;
    explicit HopAccuracy(int hops) : count(size_t(hops) + 1), right(count.size()) {}

    void add(const HopPrograms::Answer& answer, bool is_right) {
        for (int h : {0, answer.hops}) count[size_t(h)]++, right[size_t(h)] += is_right;
    }
    double accuracy(size_t h) const { return count[h] ? double(right[h]) / double(count[h]) : NAN; }

    void print() const {
        printf("hops       ");
        for (size_t h = 1; h < count.size(); h++) printf("| %zu: %.1f %% ", h, 100 * accuracy(h));
        printf("| all: %.1f %% of %lld | by chance %.1f %%\n", 100 * accuracy(0), (long long)count[0],
               100 * HopPrograms{int(count.size()) - 1}.chance());
    }
    static constexpr const char* COLUMNS = "step,hops,accuracy,count";
    void write(CsvLog& csv, int64_t step) const {
        for (size_t h = 1; h < count.size(); h++)
            csv.row(format("%lld,%zu,%.6g,%lld", (long long)step, h, count[h] ? accuracy(h) : 0, (long long)count[h]));
    }
};

// From the process's start to the end of the first step, and where the time went.
class StartClock {
public:
    StartClock() : last(seconds()) { add("program", seconds_since_launch()); }
    void mark(const char* name) {
        double now = seconds();
        add(name, now - last);
        last = now;
    }
    void print() const { printf("start-up   %.2f s to the end of the first step: %s\n", total, text.c_str()); }

private:
    double last, total = 0;
    std::string text;
    void add(const char* name, double time) {
        total += time;
        text += format("%s%s %.2f", text.empty() ? "" : ", ", name, time);
    }
};

// The mean loss over the first -m batches of the validation data, in order. Micro-batches go around the ranks.
template <class Trainer>
double validate(Trainer& trainer, const Loader& loader, const RunConfig& run, const Ranks& ranks = {},
                HopAccuracy* hops = nullptr) {
    size_t sequences = std::min(size_t(run.val_batches) * size_t(run.batch_sequences()), loader.sequences_per_epoch());
    std::vector<int> tokens(size_t(run.B) * size_t(run.T)), targets(tokens.size()),
        predictions(hops ? tokens.size() : 0);
    double sum = 0;
    for (size_t s = size_t(ranks.rank()) * size_t(run.B); s < sequences; s += size_t(ranks.count()) * size_t(run.B)) {
        int b = int(std::min(size_t(run.B), sequences - s));
        loader.batch(s, b, tokens.data(), targets.data());
        sum += trainer.evaluate(tokens.data(), targets.data(), b, hops ? predictions.data() : nullptr);
        for (int i = 0; hops && i < b; i++)
            for (const HopPrograms::Answer& answer : loader.answers(s + uint64_t(i))) {
                size_t at = size_t(i) * size_t(run.T) + size_t(answer.position);
                hops->add(answer, predictions[at] == targets[at]);
            }
    }
    for (std::vector<int64_t>* counts : {hops ? &hops->count : nullptr, hops ? &hops->right : nullptr})
        for (size_t h = 0; counts && h < counts->size(); h++) (*counts)[h] = int64_t(ranks.sum(double((*counts)[h])));
    return ranks.sum(sum) / (double(sequences) * run.T);
}

// For the log: a NaN has no sign that means anything.
inline std::string number_text(double x) { return std::isnan(x) ? "nan" : format("%.9g", x); }

inline void print_run(const RunConfig& run, const ParameterLayout& layout, const DataSplit* data) {
    const ModelConfig& m = run.model;
    printf("model      %s, L %d sub-layers, C %d, H %d, T %d, V %d", placements[m.norm].name, m.L, m.C, m.H, run.T,
           m.V);
    if (placements[m.norm].alpha) printf(", alpha %g", double(m.alpha));
    printf("; %s parameters; %s\n", count_text(double(layout.count)).c_str(), placements[m.norm].source);
    if (!data) return;
    if (const HopPrograms& p = data->programs; p.hops)
        printf(
            "data       %s: programs without end, %d variables, %d queries of 1 to %d lookups; %d whole ones of %d "
            "characters a sequence\n",
            data->train.pattern.c_str(), p.variables(), p.queries(), p.hops, (run.T + 1) / p.length(), p.length());
    else
        printf("data       %s: %s tokens to train on, %s to validate on\n", data->train.pattern.c_str(),
               count_text(double(data->train_count)).c_str(), count_text(double(data->val_count)).c_str());
    if (run.ranks > 0) printf("ranks      %d, -z %d\n", run.ranks, run.zero);
    printf(
        "training   %lld steps of %lld tokens (%s%d x %d x %d), peak LR %g, warm-up %lld, weight decay %g, clip %g, "
        "seed %llu\n",
        (long long)run.steps, (long long)run.total_batch, run.ranks > 1 ? format("%d x ", run.ranks).c_str() : "",
        run.accumulation(), run.B, run.T, run.lr, (long long)run.warmup, run.weight_decay, run.clip,
        (unsigned long long)run.seed);
}

// --check: 0 if every tensor of the file is what this build computes from its parameters and tokens.
template <class Trainer>
int check_debug_state(const Options& o) {
    using Real = typename Trainer::Real;
    const char* turn = "a dump of a smaller -b, -t or -L";
    FileHeader header = FileReader(o.check, FILE_DEBUG).header;
    RunConfig run;
    run.model = header.model(), run.B = header.word[H_B], run.T = header.word[H_T];
    run.total_batch = int64_t(run.B) * run.T, run.recompute_chosen = true;
    Trainer::check_model(run.model);
    require_memory(Trainer::memory_beside(run, o).bytes + total_bytes(Trainer::memory_rows(run)),
                   Trainer::available_memory(), turn);
    require_memory(2 * debug_state_bytes<Real>(run.model, run.B, run.T), available_memory(), turn);
    DebugState<Real> file = DebugState<Real>::read(o.check), ours;
    Trainer trainer(run);
    FileReader again(o.check, FILE_DEBUG);  // the parameters are what a debug state starts with, as a model does
    trainer.read_parameters(again);
    ours.tokens = file.tokens, ours.targets = file.targets;
    trainer.debug_pass(ours, run.B, run.T);
    return print_check_table(compare_debug_states(file, ours)) ? 0 : 1;
}

// Sampling alone: -e model.bin --prompt TEXT
template <class Trainer>
int run_sampling(const Options& o, FileReader& file) {
    RunConfig run = resolve_run(o, &file.header, 0);
    Trainer::check_model(run.model);
    prompt_tokens(o.prompt, true, run.model.V);
    require_memory(Trainer::sampling_bytes(run.model, run.T), Trainer::available_memory(),
                   "a smaller -t or a larger machine");
    RunConfig least = run;  // nothing is trained: the least memory for activations
    least.B = least.T = 1, least.total_batch = 1, least.recompute = {1}, least.recompute_chosen = true;
    Trainer trainer(least);
    trainer.read_parameters(file);
    file.finish();
    print_run(run, trainer.layout(), nullptr);
    print_sample(trainer, o, run.T, run.seed, file.header.get<int64_t>(H_STEP));
    return 0;
}

// --ablate: the validation loss with the branch of one sub-layer removed, F_l = 0 and so z_l = alpha_l x_l before its
// norm; for one, or each in turn.
template <class Trainer>
int run_ablation(const Options& o, Trainer& trainer, const Loader& val) {
    const RunConfig& run = trainer.run;
    std::unique_ptr<CsvLog> csv;
    const char* columns = "sublayer,kind,val_loss,perplexity,perplexity_lost";
    if (!o.out.empty()) {
        create_output_folder(o.out);
        csv = std::make_unique<CsvLog>(o.out + "/ablate.csv", columns, -1);
    }
    printf("%s\n", columns);
    double whole = 0;
    auto evaluate = [&](int l, const char* kind) {
        trainer.ablate(l);
        double loss = validate(trainer, val, run), perplexity = std::exp(loss);
        if (l < 0) whole = perplexity;
        std::string row = format("%d,%s,%s,%s,%s", l, kind, number_text(loss).c_str(), number_text(perplexity).c_str(),
                                 number_text(perplexity - whole).c_str());
        printf("%s\n", row.c_str());
        if (csv) csv->row(row);
    };
    evaluate(-1, "whole model");
    int first = o.ablate == "all" ? 0 : atoi(o.ablate.c_str()), last = o.ablate == "all" ? run.model.L - 1 : first;
    for (int l = first; l <= last; l++) evaluate(l, is_attention(l) ? "attention" : "feed-forward");
    return 0;
}

// The ranks of a run, held together: by the lifeline, by what carries tensors, by MPI where this build has it.
template <class Trainer>
struct RankSession {
    Launch launch;
#ifdef KEEL_MPI
    std::unique_ptr<MpiSession> mpi;
#endif
    std::unique_ptr<Lifeline> lifeline;
    std::unique_ptr<typename Trainer::Communicator> communicator;  // null: alone

    void start() {
        if (launch.ranks == 0) return;
        if (!Trainer::ranks_by) {
            if (launch.ranks > 1)
                fail("%s: this build has one rank, found %d started; install %s and build again, or start one",
                     launch.launcher.c_str(), launch.ranks, Trainer::ranks_needs);
            launch = {};
            return;
        }
        using Gift = typename Trainer::Communicator::Gift;
        std::function<void(std::string&)> exchange;
#ifdef KEEL_MPI
        if (MpiSession::offered() || std::string(Trainer::ranks_by) == "MPI") {
            mpi = std::make_unique<MpiSession>(launch);
            exchange = [](std::string& address) {
                char text[300] = "";
                snprintf(text, sizeof text, "%s", address.c_str());
                check_mpi(MPI_Bcast(text, sizeof text, MPI_CHAR, 0, MPI_COMM_WORLD), "MPI_Bcast");
                address = text;
            };
        }
#endif
        Gift gift(launch.rank == 0);
        lifeline = std::make_unique<Lifeline>(launch, exchange, std::span(reinterpret_cast<char*>(&gift), sizeof gift));
        communicator = std::make_unique<typename Trainer::Communicator>(launch, gift);
    }
    Ranks ranks() const {
        if (!communicator) return {};
        return {launch,
                [c = communicator.get()](const void* mine, void* all, size_t bytes) { c->gather(mine, all, bytes); }};
    }
};

// While an error ends a rank, nothing may wait for ever: what a device still has to do may wait for ranks that are
// gone.
struct EndByAlarm {
    bool armed;
    int exceptions = std::uncaught_exceptions();
    ~EndByAlarm() {
        if (armed && std::uncaught_exceptions() > exceptions) signal(SIGALRM, SIG_DFL), alarm(20);
    }
};

template <class Trainer>
int run_trainer(int argc, const char* const* argv, RankSession<Trainer>& session) {
    using Real = typename Trainer::Real;
    StartClock clock;
    Options o = parse_command_line(argc, argv);
    if (o.help) {
        printf("%s", help_text(argv[0], Trainer::ranks_by ? format("one rank or many, by %s", Trainer::ranks_by)
                                                          : format("one rank, as %s was not there when it was built",
                                                                   Trainer::ranks_needs))
                         .c_str());
        return 0;
    }
    for (const char* flag : {"--tune", "--moments", "--grads"})
        if (Trainer::on_host && o.has(flag)) fail("%s: is for the GPU trainer, train_keel; leave it out", flag);
    Trainer::require_machine();
    session.start();
    const Ranks ranks = session.ranks();
    const bool first_rank = ranks.rank() == 0;
    if (o.zero > 0 && !ranks)
        fail("-z: expected 0, found %d; this run has one rank, and ZeRO shards over several", int(o.zero));
    if (ranks && o.probe > 0 && !Trainer::probes_ranks)
        fail("--probe: expected a run started alone, found one started by %s; leave it out, or use train_keel_cpu",
             session.launch.launcher.c_str());
    bool alone = !o.check.empty() || !o.dump.empty() || !o.ablate.empty();  // what one rank does
    if (ranks.count() > 1 && alone)
        fail("--dump, --check and --ablate: expected one rank, found %d; start one", ranks.count());
    clock.mark("device");
    if (!o.check.empty()) return check_debug_state<Trainer>(o);
    if (!o.dump.empty()) check_dump_target(o.dump);

    // What there is to start from, and the data. Nothing is written before all of it is known to be sound.
    StateFiles resume_from;
    FolderLock lock;
    if (!o.out.empty() && o.dump.empty()) {
        if (first_rank)
            check_output_folder(o.out, o.resume || !o.ablate.empty());  // the model of an ablation may be in it
        if (first_rank && std::filesystem::is_directory(o.out)) lock = FolderLock(o.out);
        if (o.resume) resume_from = newest_states(o.out, ranks);
        if (first_rank && o.resume && !resume_from) check_fresh_resume(o.out);
    }
    std::unique_ptr<FileReader> init;
    if (!o.init.empty()) init = std::make_unique<FileReader>(o.init, FILE_MODEL);
    if (resume_from) init = std::make_unique<FileReader>(resume_from.path(0), FILE_STATE);
    if (init && o.has("--prompt") && !o.has("--train") && !o.has("--out") && !o.has("--steps") && o.dump.empty()) {
        if (ranks.count() > 1) fail("--prompt: expected one rank to sample on, found %d; start one", ranks.count());
        return run_sampling<Trainer>(o, *init);
    }
    if (resume_from) check_same_build(init->header, real_type<Real>, Trainer::branch_bf16);
    DataSplit data(o);
    if (resume_from && init->header.word[H_HOPS] != data.programs.hops) {
        auto kind = [](int hops) { return hops ? format("hops:%d", hops) : std::string("files"); };
        fail("-i: expected %s as in the checkpoint, found %s; give the same data",
             kind(init->header.word[H_HOPS]).c_str(), kind(data.programs.hops).c_str());
    }
    RunConfig run = resolve_run(o, init ? &init->header : nullptr, data.natural_vocabulary(), data.natural_seq_len(),
                                !alone && ranks ? ranks.count() : 0, ranks.rank());
    const ModelConfig& config = run.model;
    Trainer::check_model(config);
    if (Trainer::on_host && (run.types.moments_bf16 || run.types.grads_bf16))
        fail(
            "-y: expected a checkpoint with FP32 moments and gradients, found BF16 ones; resume with train_keel_fp32, "
            "or start from its model by -e");
    if (!o.ablate.empty() && o.ablate != "all") parse_integer("--ablate", o.ablate, 0, config.L - 1);
    if (o.ablate.empty() || data.programs.hops) data.check_lengths(run);
    // Every token is looked at beside what the device does until the first step; the answer is waited for before
    // anything is written.
    auto look_at_tokens = [&data, V = config.V] {
        data.check_tokens(V);
        return data.unigram_entropy(V);
    };
    std::future<double> unigram_entropy;
    try {
        unigram_entropy = std::async(std::launch::async, look_at_tokens);
    } catch (const std::system_error&) {  // no more threads
        unigram_entropy = std::async(std::launch::deferred, look_at_tokens);
    }
    if ((run.val_every > 0 || !o.ablate.empty()) && o.dump.empty()) data.check_validation(run);
    if (resume_from && size_t(init->header.get<int64_t>(H_TRAIN_TOKENS)) != data.train_count)
        fail("-i: expected the %lld training tokens of the checkpoint, found %zu; give the same data",
             (long long)init->header.get<int64_t>(H_TRAIN_TOKENS), data.train_count);
    if (resume_from && run.val_every > 0 && size_t(init->header.get<int64_t>(H_VAL_TOKENS)) != data.val_count)
        fail("-j: expected the %lld validation tokens of the checkpoint, found %zu; give the same data",
             (long long)init->header.get<int64_t>(H_VAL_TOKENS), data.val_count);
    if (o.sample_every > 0) prompt_tokens(o.prompt, o.has("--prompt"), config.V);
    // Nothing is worse to find than ranks that train on different data or models.
    FileHeader same = state_header(real_type<Real>, Trainer::branch_bf16, run, run.zero, data);
    same.word[H_RANK] = 0;
    std::vector<uint32_t> sums = ranks.gather(crc32(&same, sizeof same));
    for (size_t r = 0; r < sums.size(); r++)
        if (sums[r] != sums[0])
            fail(
                "ranks: expected the same flags, files and data on all, found others on rank %zu than on rank 0; start "
                "all alike",
                r);

    // Memory: planned, shown and compared with what there is before any of it is taken.
    MemoryRow beside = Trainer::memory_beside(run, o);
    size_t available = Trainer::available_memory();
    if (ranks && Trainer::on_host && session.launch.local_ranks > 1)
        available /= size_t(session.launch.local_ranks);                                    // they share the machine's
    for (size_t others : ranks.gather(available)) available = std::min(available, others);  // all choose the same
    Trainer::choose_memory_plan(run, available > beside.bytes ? available - beside.bytes : 0);
    if (!o.dump.empty())
        require_memory(debug_state_bytes<Real>(config, run.B, run.T), available_memory(), "a smaller -b, -t or -L");
    std::vector<MemoryRow> memory = Trainer::memory_rows(run);
    memory.push_back(beside);
    bool checkpoints_wanted = !o.out.empty() && o.dump.empty() && o.ablate.empty() && o.checkpoint_every > 0,
         background = false;
    if (std::string fault = checkpoints_wanted ? space_fault(o.out, checkpoint_bytes(config, real_type<Real>)) : "";
        !fault.empty())
        fail("%s", fault.c_str());
    size_t snapshot_bytes =
               CheckpointWriter<Trainer>::snapshot_count(ParameterLayout(config, run.ranks), ranks) * sizeof(Real),
           host_left = ::available_memory();
    if (checkpoints_wanted) {
        size_t with_thread = snapshot_bytes + (size_t(8) << 20);  // the stack of the thread that writes
        if (Trainer::on_host) host_left -= std::min(host_left, total_bytes(memory));
        background = with_thread <= host_left || ranks;
        if (background && Trainer::on_host) memory.push_back({"snapshot for checkpoints", with_thread});
    }
    print_run(run, ParameterLayout(config), &data);
    printf("memory     needs %s of %s, micro-batch %d, recompute %s:\n",
           bytes_text(double(total_bytes(memory))).c_str(), bytes_text(double(available)).c_str(), run.B,
           run.recompute.name().c_str());
    print_memory_table(memory);
    if (checkpoints_wanted && !background)
        printf(
            "note       a snapshot of %s does not fit into the %s of memory left: training waits while a checkpoint is "
            "written\n",
            bytes_text(double(snapshot_bytes)).c_str(), bytes_text(double(host_left)).c_str());
    else if (checkpoints_wanted && !Trainer::on_host)
        printf("  %-38s %12s\n", "snapshot for checkpoints, on the host", bytes_text(double(snapshot_bytes)).c_str());
    if (size_t disk = (size_t(o.keep) + 1) * checkpoint_bytes(config, real_type<Real>);
        checkpoints_wanted && o.keep > 0 && o.keep < 1000 && free_space(o.out) < disk)
        printf("note       %s is free in %s, and --keep %lld checkpoints with the next beside them take %s\n",
               bytes_text(double(free_space(o.out))).c_str(), o.out.c_str(), (long long)o.keep,
               bytes_text(double(disk)).c_str());
    fflush(stdout);
    clock.mark("data");

    Trainer trainer(run, session.communicator.get());
    EndByAlarm unwinding{bool(ranks)};
    clock.mark("memory");
    int64_t step = 0;
    if (resume_from && (ranks || resume_from.ranks > 1)) {
        read_states(trainer, resume_from);
    } else if (init) {
        trainer.read_parameters(*init);
        if (resume_from) trainer.read_moments(*init);
        init->finish();
    } else {
        trainer.initialise(run.seed);
    }
    if (resume_from) {
        step = init->header.get<int64_t>(H_STEP);
        printf("resuming   %s%s\n", resume_from.path(0).c_str(),
               resume_from.ranks > 1 || ranks.count() > 1 ? format(", of %d ranks", resume_from.ranks).c_str() : "");
        if (init->header.word[H_B] != run.B && !o.batch)
            printf("note       the checkpoint's micro-batch of %d does not fit %d ranks and -d %lld: taking %d\n",
                   init->header.word[H_B], ranks.count(), (long long)run.total_batch, run.B);
    }

    clock.mark("weights");
    double data_entropy = unigram_entropy.get();
    clock.mark("tokens");

    Loader train = data.loader(run, true), val = data.loader(run, false);
    if (!o.ablate.empty()) return run_ablation(o, trainer, val);

    if (!o.dump.empty()) {
        DebugState<Real> debug;
        debug.tokens.resize(size_t(run.B) * size_t(run.T)), debug.targets.resize(debug.tokens.size());
        train.batch(0, run.B, debug.tokens.data(), debug.targets.data());
        trainer.debug_pass(debug, run.B, run.T);
        debug.write(o.dump);
        printf("wrote      %s, loss %.9g\n", o.dump.c_str(), double(debug.loss));
        return 0;
    }

    // The detector takes up where the log of a resumed run ends.
    DivergenceDetector divergence(run.steps, run.warmup, data_entropy);
    if (resume_from)
        read_csv_rows(o.out + "/log.csv", step, [&](int64_t row_step, const std::string& line) {
            divergence.add(row_step, atof(line.c_str() + std::min(line.size(), line.find(',') + 1)));
        });

    std::unique_ptr<CsvLog> log, hops_log;
    std::unique_ptr<ProbeLog> probe_log;
    if (!o.out.empty() && first_rank) {
        create_output_folder(o.out);
        if (!lock) {  // the folder is new, or was a moment ago
            lock = FolderLock(o.out);
            check_output_folder(o.out, o.resume && resume_from);
        }
        remove_unfinished_files(o.out);
        remove_incomplete_states(o.out, step);
        int64_t kept = resume_from ? step : -1;
        log = std::make_unique<CsvLog>(o.out + "/log.csv", "step,loss,val_loss,lr,grad_norm,ms,tokens_per_second,mfu",
                                       kept);
        if (o.probe > 0) probe_log = std::make_unique<ProbeLog>(o.out, kept);
        if (data.programs.hops) hops_log = std::make_unique<CsvLog>(o.out + "/hops.csv", HopAccuracy::COLUMNS, kept);
    } else if (o.probe > 0) {
        probe_log = std::make_unique<ProbeLog>();
    }
    // A run that was killed between a checkpoint's two files has the state, and the model is in it.
    ranks.barrier();  // the folder is there
    if (!o.out.empty() && access(o.out.c_str(), W_OK) != 0)
        fail(
            "-o: expected the folder %s of rank 0 on all ranks, found none that can be written (%s); give one that all "
            "share",
            o.out.c_str(), errno_text().c_str());
    std::unique_ptr<CheckpointWriter<Trainer>> checkpoints;
    if (checkpoints_wanted) {
        std::vector<CsvLog*> logs;
        if (first_rank) logs.push_back(log.get());
        if (first_rank && probe_log) logs.push_back(&probe_log->sublayers), logs.push_back(&probe_log->weights);
        if (hops_log) logs.push_back(hops_log.get());
        checkpoints =
            std::make_unique<CheckpointWriter<Trainer>>(trainer, data, o.out, o.keep, background, logs, ranks);
        bool no_model = resume_from && first_rank && !std::filesystem::exists(model_path(o.out, step));
        if (ranks && !ranks.all(!no_model)) checkpoints->write_model(step);
    }
    if (!ranks && log && resume_from && !std::filesystem::exists(model_path(o.out, step)))
        write_model(model_path(o.out, step), trainer, step);
    StopSignals::watch();
    double rate = first_rank ? trainer.matrix_rate() : 1;  // the others print nothing
    printf("machine    %s, %.0f GFLOP/s in matrix products\n", trainer.machine_name().c_str(), rate * 1e-9);
    if (!init)
        printf("note       the first loss is not ln V = %.2f: the tied head sees each input token's own embedding\n",
               std::log(double(config.V)));

    clock.mark("folder, rate");

    // Of several ranks, what a step has told all of them.
    bool told_to_stop = false;
    auto stop_asked = [&] { return ranks ? told_to_stop : StopSignals::asked(); };
    auto due_at = [&](int64_t s, int64_t every) { return every > 0 && (s % every == 0 || s == run.steps); };
    auto due = [&](int64_t every) { return due_at(step, every); };
    auto validation_due = [&]() -> std::string {  // the loss as text, empty where none is measured
        if (!due(run.val_every)) return "";
        if (ranks) trainer.gather_weights();
        HopAccuracy hops(data.programs.hops);
        double val_loss = validate(trainer, val, run, ranks, data.programs.hops ? &hops : nullptr);
        printf("validation | loss %.4f | perplexity %.3f\n", val_loss, std::exp(val_loss));
        if (data.programs.hops) hops.print();
        if (hops_log) hops.write(*hops_log, step);
        return number_text(val_loss);
    };
    int64_t known_good = -1,
            newest =
                resume_from ? step : -1;  // steps of checkpoints: of one from which a finite step was made, of the last
    // Where the disk has no room for a checkpoint, training goes on and the next step tries again; the run's end may
    // not.
    bool overdue = false;
    auto checkpoint = [&] {
        if (!checkpoints || newest == step) return;
        std::string fault = space_fault(o.out, checkpoint_bytes(config, real_type<Real>));
        if (ranks.all(fault.empty())) fault = "";
        else if (fault.empty()) fault = "disk: expected more space, found less on another rank";
        if (!fault.empty() && (step >= run.steps || stop_asked()))
            fail("step %lld: %s", (long long)step, fault.c_str());
        if (!fault.empty() && !overdue && first_rank)
            fprintf(stderr, "warning: the checkpoint of step %lld is put off: %s\n", (long long)step, fault.c_str());
        overdue = !fault.empty();
        if (!overdue) checkpoints->write(step), newest = step;
    };
    auto sample_due = [&] {
        if (ranks && due(o.sample_every)) trainer.gather_weights();
        if (due(o.sample_every) && !stop_asked() && first_rank) print_sample(trainer, o, run.T, run.seed, step);
        fflush(stdout);
    };
    auto probing = [&](int64_t s) { return o.probe > 0 && s % o.probe == 0; };
    // Nothing but the next step comes after this one: the trainer can have that before this one's result is known.
    auto goes_straight_on = [&](int64_t s) {
        return !overdue && !due_at(s, run.val_every) && !(checkpoints && due_at(s, o.checkpoint_every)) &&
               !due_at(s, o.sample_every) && !probing(s) && !probing(s + 1);
    };
    if (step >= run.steps && resume_from)
        printf("the run has its %lld steps; -x with a larger number goes on\n", (long long)run.steps);
    if (run.steps == 0) {
        validation_due();
        checkpoint();
        sample_due();
    }

    double spent = 0, steps_here = 0, ended = 0;
    int64_t started = step;         // steps that the trainer has been given; those after `step` are in flight
    std::array<double, 2> began{};  // when, by turns
    static_assert(Trainer::steps_in_flight <= 2);
    std::exception_ptr data_error;
    while (started > step || (step < run.steps && !stop_asked())) {
        while (!data_error && started < run.steps && !stop_asked() &&
               (started == step || (started < step + Trainer::steps_in_flight && goes_straight_on(started)))) {
            began[size_t(started % 2)] = seconds();
            try {
                unsigned flags = (StopSignals::asked() ? STOP_ASKED : 0u) | (checkpoints ? checkpoints->flags() : 0u);
                trainer.start(train, started + 1, probing(started + 1) ? probe_log.get() : nullptr, flags);
                started++;
            } catch (const DataError&) {  // the steps in flight have theirs
                data_error = std::current_exception();
            }
        }
        if (started == step) {
            if (!data_error) break;
            if (step > 0) checkpoint();
            if (checkpoints) checkpoints->wait();
            std::rethrow_exception(data_error);
        }
        StepResult result;
        try {
            result = trainer.finish();
        } catch (const DataError&) {  // of any rank: it and the steps after it have updated nothing
            data_error = std::current_exception(), started = step;
            continue;
        }
        told_to_stop = result.any & STOP_ASKED;
        double now = seconds(), elapsed = now - std::max(ended, began[size_t(step % 2)]);
        ended = now, step++;
        double loss = result.loss, norm = result.norm;
        bool skipped = !std::isfinite(loss) || !std::isfinite(norm);
        trainer.run.skipped += skipped;
        trainer.run.skipped_in_row = skipped ? trainer.run.skipped_in_row + 1 : 0;
        if (!skipped) known_good = newest;

        double tokens_per_second = double(run.total_batch) / elapsed;
        double mfu = flops_per_token(config, run.T) * tokens_per_second / rate;
        spent += elapsed, steps_here++;
        if (steps_here == 1) clock.mark("first step"), clock.print();
        if (steps_here == 1 && ranks) printf("network    %zu bytes sent by rank 0 in a step\n", trainer.step_bytes);
        printf(
            "step %lld/%lld | loss %.4f | grad norm %.3g | lr %.2e | %.0f ms | %.0f tokens/s | %.0f %% of matrix rate "
            "| %s left\n",
            (long long)step, (long long)run.steps, loss, norm, learning_rate(run, step), elapsed * 1e3,
            tokens_per_second, 100 * mfu, duration_text(spent / steps_here * double(run.steps - step)).c_str());
        if (skipped)
            printf(
                "skipped    step %lld, whose loss or gradient is not finite: nothing is updated; %lld in a row, %lld "
                "in all\n",
                (long long)step, (long long)trainer.run.skipped_in_row, (long long)trainer.run.skipped);
        std::string val_text = validation_due();
        if (log)
            log->row(format("%lld,%s,%s,%.9g,%s,%.3f,%.1f,%.4f", (long long)step, number_text(loss).c_str(),
                            val_text.c_str(), learning_rate(run, step), number_text(norm).c_str(), elapsed * 1e3,
                            tokens_per_second, mfu));
        if (trainer.run.skipped_in_row >= o.max_skips) {
            if (checkpoints) checkpoints->wait();
            if (known_good < 0 || !std::filesystem::exists(state_path(o.out, known_good))) known_good = newest;
            std::string turn = !checkpoints || newest < 0
                                   ? "there is no checkpoint: start again with a smaller -l"
                                   : format("the last good checkpoint is %s: %sgo on from it by -y with a smaller -l",
                                            state_path(o.out, known_good).c_str(),
                                            known_good < newest ? "remove the newer ones and " : "");
            fail(
                "step %lld: expected a finite loss and gradient norm, found %g and %g, the last of %lld skipped in a "
                "row (--max-skips); %s",
                (long long)step, loss, norm, (long long)trainer.run.skipped_in_row, turn.c_str());
        }
        if (std::string kind = divergence.add(step, loss); !kind.empty()) {
            fflush(stdout);
            fprintf(stderr, "warning: %s\n", kind.c_str());
            if (o.stop_on_divergence) {
                if (checkpoints) checkpoints->wait();
                fail(
                    "step %lld: expected a loss that goes down, found it diverged (--stop-on-divergence); use a "
                    "smaller -l or a longer -u",
                    (long long)step);
            }
        }
        if (checkpoints) checkpoints->poll(result.all);
        // While steps are skipped the parameters stay those of the last checkpoint or go bad: only the run's end is
        // worth one.
        if ((overdue || due(o.checkpoint_every)) && (!skipped || step == run.steps)) checkpoint();
        sample_due();
    }
    if (stop_asked() && step < run.steps) {
        if (step > 0) checkpoint();
        printf("stopping   after step %lld, as a signal asked\n", (long long)step);
    }
    if (checkpoints) checkpoints->wait();
    if (trainer.run.skipped > 0)
        printf("skipped    %lld of %lld steps, whose loss or gradient was not finite\n", (long long)trainer.run.skipped,
               (long long)step);
    return 0;
}

// The program: what a user can mend is one line on stderr and exit status 1.
template <class Trainer>
int trainer_main(int argc, char** argv) {
    setvbuf(stdout, nullptr, _IOLBF, 0);
    std::string program = std::filesystem::path(argv[0]).filename().string(), text;
    RankSession<Trainer> session;
    try {
        session.launch = Launch::from_environment();
        if (session.launch.rank > 0 && !freopen("/dev/null", "w", stdout)) {}  // rank 0 speaks for all
        return run_trainer<Trainer>(argc, argv, session);
    } catch (const Error& e) {
        text = e.what();
    } catch (const std::bad_alloc&) {
        text = "out of memory; use a smaller -b, -t, -C or -L, or -r layer";
    }
    fflush(stdout);
    if (session.lifeline) session.lifeline->fail_all(program, text);
    else if (session.launch.rank == 0) fprintf(stderr, "%s: %s\n", program.c_str(), text.c_str());
    if (session.launch.ranks > 1) _exit(1);  // nothing is left that may wait for the others
    return 1;
}
