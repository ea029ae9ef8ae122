// keel_common.h: what train_keel.cu and train_keel_cpu.cpp share; nothing in it computes on tensors.
//
// In order: errors and small tools, random numbers, the norm placements, the parameter table, files, the command line,
// a run and its defaults, the comparison of two debug states. Each fact stands here once, as a row of a table: a
// norm placement, a parameter tensor, a flag. Allocation, file order, initialisation, dumps, comparison and the
// optimizer walk these tables. What happens around a training step is in keel/, whose files include this one.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <limits>
#include <memory>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

static_assert(std::endian::native == std::endian::little, "the file formats are little-endian");
static_assert(sizeof(off_t) == 8, "files of more than 2 GiB: build with -D_FILE_OFFSET_BITS=64");

// The program's version, for -h and CHANGELOG.md; the files have one of their own (H_VERSION).
inline constexpr const char* KEEL_VERSION = "0.9.0";

// ----------------------------------------------------------------------------------------------------
// Errors and small tools

// An error that the user can mend. Its message is one line: what was expected, what was found, what to do.
struct Error : std::runtime_error { using std::runtime_error::runtime_error; };

// Training data that vanished or changed while the run was reading it; the weights are still those of the last step.
struct DataError : Error { using Error::Error; };

// A file that is there and may be whole, but this process cannot read it: nothing may be put in its place.
struct UnreadableError : Error { using Error::Error; };

// A printf pattern that the compiler checks against its arguments' types; %s takes a std::string or a path as well.
template <class... Arguments>
struct Pattern {
    const char* text;

    consteval Pattern(const char* pattern) : text(pattern) {
        if constexpr (sizeof...(Arguments) > 0) {
            const char* at = pattern;
            (check<Arguments>(at), ...);
            if (find_conversion(at)) throw "the pattern has more conversions than there are arguments";
        }
    }

private:
    static consteval bool find_conversion(const char*& at) {  // moves `at` behind the next %
        for (; *at; at++)
            if (*at == '%' && *++at != '%') return true;
        return false;
    }
    template <class T>
    static consteval void check(const char*& at) {
        if (!find_conversion(at)) throw "the pattern has fewer conversions than there are arguments";
        auto one_of = [&](const char* set) {
            while (*set && *set != *at) set++;
            return *set != 0;
        };
        while (one_of("-+ #.0123456789")) at++;
        const char* length = at;
        while (one_of("lz")) at++;
        bool text = std::is_convertible_v<const T&, std::string>, number = std::is_integral_v<T> || std::is_enum_v<T>;
        if (text ? !one_of("s") : number ? !one_of("diuxc") : !one_of("efg")) throw "a conversion of another type";
        size_t bytes = at == length       ? sizeof(int)
                       : *length == 'z'   ? sizeof(size_t)
                       : at - length == 2 ? sizeof(long long)
                                          : sizeof(long);
        if (number && std::max(sizeof(T), sizeof(int)) != bytes) throw "a whole number of another size";
        at++;
    }
};
template <class T>
T printable(T value) {
    return value;
}
inline const char* printable(const std::string& text) { return text.c_str(); }
inline const char* printable(const std::filesystem::path& path) { return path.c_str(); }

// format("%s has %d layers", name, L). An object, as std::format would be found beside a function.
inline constexpr struct {
    template <class... Arguments>
    std::string operator()(Pattern<std::type_identity_t<Arguments>...> pattern, const Arguments&... arguments) const {
        if constexpr (sizeof...(Arguments) == 0) {
            return pattern.text;
        } else {
            std::string text(size_t(std::max(snprintf(nullptr, 0, pattern.text, printable(arguments)...), 0)), '\0');
            snprintf(text.data(), text.size() + 1, pattern.text, printable(arguments)...);
            return text;
        }
    }
} format;
template <class... Arguments>
void print(Pattern<std::type_identity_t<Arguments>...> pattern, const Arguments&... arguments) {
    fputs(format(pattern, arguments...).c_str(), stdout);
}
// fail("-L: expected an even number, found %d; ...", L)
template <class... Arguments>
[[noreturn]] void fail(Pattern<std::type_identity_t<Arguments>...> pattern, const Arguments&... arguments) {
    throw Error(format(pattern, arguments...));
}

inline void warn(const std::string& text) {
    fflush(stdout);
    fprintf(stderr, "warning: %s\n", text.c_str());
}

inline double seconds() {
    using clock = std::chrono::steady_clock;
    return std::chrono::duration<double>(clock::now().time_since_epoch()).count();
}

inline constexpr bool SET = false, ADD = true;  // a matrix product replaces what is there, or adds to it

template <class N>
N round_up(N n, std::type_identity_t<N> multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

inline std::string errno_text() { return strerror(errno); }

// What helps where the system has refused a file with the error code e.
inline const char* errno_advice(int e) {
    return e == ENOSPC || e == EDQUOT                ? "free some space"
           : e == EFBIG                              ? "raise the limit of file sizes (ulimit -f)"
           : e == EMFILE || e == ENFILE              ? "raise the limit of open files (ulimit -n)"
           : e == ENOMEM                             ? "free some memory, or raise its limit (ulimit -v)"
           : e == EACCES || e == EPERM || e == EROFS ? "see to its permissions, or give another name"
           : e == ENOENT                             ? "see that its folder is there"
                                                     : "see to the disk, or give another name";
}
// "could not be written (No space left on device); free some space"
inline std::string write_fault(int e) { return format("could not be written (%s); %s", strerror(e), errno_advice(e)); }

// A path as a shell reads it back: 'my text.txt'
inline std::string quoted(const std::string& path) {
    if (path.find_first_of(" \t\n'\"\\$`*?[]()<>|&;!#~{}") == path.npos) return path;
    std::string text = "'";
    for (char c : path) text += c == '\'' ? "'\\''" : std::string(1, c);
    return text + "'";
}

// "process 1234 on node7"
inline std::string process_name() {
    char host[128] = "?";
    gethostname(host, sizeof host - 1);
    return format("process %d on %s", int(getpid()), host);
}

// "3.2 GiB"
inline std::string bytes_text(double bytes) {
    const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    int u = 0;
    while (bytes >= 1024 && u < 4) bytes /= 1024, u++;
    return u == 0 ? format("%.0f B", bytes) : format("%.1f %s", bytes, units[u]);
}

// "1h02m", "3m20s", "12s"
inline std::string duration_text(double s) {
    int64_t n = int64_t(s + 0.5);
    if (n >= 86400) return format("%lldd%02lldh", n / 86400, n % 86400 / 3600);
    if (n >= 3600) return format("%lldh%02lldm", n / 3600, n % 3600 / 60);
    if (n >= 60) return format("%lldm%02llds", n / 60, n % 60);
    return format("%llds", n);
}

// "1.62 M"
inline std::string count_text(double n) {
    const char* units[] = {"", " K", " M", " B", " T"};
    int u = 0;
    while (n >= 1000 && u < 4) n /= 1000, u++;
    return u == 0 ? format("%.0f", n) : format("%.2f%s", n, units[u]);
}

// CRC-32 of zlib and PNG (reflected polynomial 0xEDB88320), eight bytes at a time: table[k][b] is the CRC of byte b
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

// The CRC of two byte sequences joined, from the CRC of each: appending n bytes multiplies a CRC, read as a polynomial
// over GF(2) whose highest bit is the constant term, by x^(8n) modulo the CRC's own polynomial.
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

// crc32 by several threads where there are enough bytes: each takes a piece, and their CRCs are combined in order.
inline uint32_t crc32_parallel(const void* data, size_t bytes, uint32_t crc = 0) {
    constexpr size_t least_piece = size_t(2) << 20;  // bytes
    size_t pieces = std::min<size_t>({bytes / least_piece, std::max(1u, std::thread::hardware_concurrency()), 16});
    if (pieces < 2) return crc32(data, bytes, crc);
    const char* from = static_cast<const char*>(data);
    size_t piece = bytes / pieces;
    std::vector<uint32_t> sums(pieces);
    std::vector<std::thread> threads;
    auto take = [&](size_t i) { sums[i] = crc32(from + i * piece, i + 1 < pieces ? piece : bytes - i * piece); };
    size_t started = 1;  // this thread takes the first piece
    try {
        for (threads.reserve(pieces); started < pieces; started++) threads.emplace_back(take, started);
    } catch (const std::exception&) {  // no more threads or memory: this one takes the other pieces too
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

// The last word of the counter: it lets one seed serve every purpose below without drawing a number twice.
// clang-format off
enum PhiloxStream : uint32_t {
    STREAM_WEIGHTS = 0, STREAM_DATA = 1, STREAM_SAMPLE = 2,
    STREAM_GRADIENTS = 3, STREAM_MOMENTS = 4, STREAM_PROGRAMS = 5
};
// clang-format on

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
    float alpha = 1;
    bool norm_in = false, norm_out = false, norm_qkv = false;
};

inline bool is_attention(int l) { return l % 2 == 0; }

struct PlacementRow {
    const char *name, *source;
    bool norm_final;
    float (*alpha)(int L);                                // the default alpha; null where the placement has none
    SublayerNorm (*sublayer)(int l, int L, float alpha);  // alpha: the model's, by default or by -a
};

// clang-format off
// A new row goes to the end: a file names its placement by the number of its row (CONTRIBUTING.md).
inline const PlacementRow placements[NUM_PLACEMENTS] = {
    // The exceptions of section 3.1: sub-layer 0 has neither alpha nor outer norm, sub-layer 1 no alpha. From sub-layer
    // 2 on the inner norm changes nothing in a new model, whose x_l has an rms of 1: its gain is what is learnt.
    {.name = "keel", .source = "Chen and Wei 2026, arXiv 2601.19895, eq. 8", .norm_final = false,
     .alpha = [](int L) { return float(L); },
     .sublayer = [](int l, int, float alpha) -> SublayerNorm {
         return {.alpha = l < 2 ? 1 : alpha, .norm_in = true, .norm_out = l > 0};
     }},
    {.name = "pre", .source = "Xiong et al. 2020", .norm_final = true,
     .alpha = nullptr,
     .sublayer = [](int, int, float) -> SublayerNorm { return {.norm_in = true}; }},
    {.name = "post", .source = "Vaswani et al. 2017", .norm_final = false,
     .alpha = nullptr,
     .sublayer = [](int, int, float) -> SublayerNorm { return {.norm_out = true}; }},
    {.name = "deepnorm", .source = "Wang et al. 2022", .norm_final = false,
     .alpha = [](int L) { return float(std::sqrt(std::sqrt(double(L)))); },
     .sublayer = [](int, int, float alpha) -> SublayerNorm { return {.alpha = alpha, .norm_out = true}; }},
    // Post-LN for the first quarter of the depth, Pre-LN after.
    {.name = "mixln", .source = "Li et al. 2024", .norm_final = true,
     .alpha = nullptr,
     .sublayer = [](int l, int L, float) -> SublayerNorm {
         bool post = l / 2 < std::max(1, L / 8);
         return {.norm_in = !post, .norm_out = post};
     }},
    // y = MHA(x) + x with normed q, k, v;  x' = FFN(Norm(y)) + Norm(y): the norm after attention serves both.
    {.name = "hybridnorm", .source = "Zhuo et al. 2025", .norm_final = true,
     .alpha = nullptr,
     .sublayer = [](int l, int, float) -> SublayerNorm {
         return {.norm_out = is_attention(l), .norm_qkv = is_attention(l)};
     }},
    {.name = "scaledpost", .source = "the KEEL paper's attempt 1, eq. 24", .norm_final = false,
     .alpha = [](int L) { return float(L); },
     .sublayer = [](int, int, float alpha) -> SublayerNorm { return {.alpha = alpha, .norm_out = true}; }},
};
// clang-format on

// "keel, pre, post"
template <class Row, size_t n>
std::string names_of(const Row (&rows)[n]) {
    std::string names;
    for (const Row& row : rows) names += (names.empty() ? "" : ", ") + std::string(row.name);
    return names;
}

inline NormPlacement placement_by_name(const std::string& name) {
    for (int p = 0; p < NUM_PLACEMENTS; p++)
        if (name == placements[p].name) return NormPlacement(p);
    fail("--norm: expected one of %s, found '%s'", names_of(placements), name);
}

struct ModelConfig {
    int max_seq_len = 0;  // rows of wpe, the longest T
    int V = 0;            // vocabulary
    int L = 0;            // sub-layers; L/2 attention and L/2 feed-forward
    int H = 0;            // heads
    int C = 0;            // channels
    NormPlacement norm = KEEL;
    float alpha = 1;         // 1 where the placement has none
    uint32_t tokenizer = 0;  // the CRC-32 of the file that says what its tokens mean; 0: bytes, or not known

    int Vp() const { return int(round_up(size_t(V), 128)); }  // V padded, the rows of wte
    int D() const { return C / H; }                           // channels of a head
    bool norm_final() const { return placements[norm].norm_final; }
    SublayerNorm sublayer(int l) const { return placements[norm].sublayer(l, L, alpha); }
};

// Floating-point operations of a training step per token: for each weight 2 forward and 4 backward, and of attention's
// T x T products the causal half; recomputation is not counted.
inline double flops_per_token(const ModelConfig& c, int T) {
    return 6.0 * (12.0 * c.C * c.C * (c.L / 2) + double(c.Vp()) * c.C) + 6.0 * c.C * double(T) * (c.L / 2);
}

// ----------------------------------------------------------------------------------------------------
// The parameter table
//
// A matrix is (out, in), row-major. qkvw's rows are those of q, then k, then v; in each, head h starts at row h*D.

// clang-format off
enum Tensor {
    WTE, WPE, GAMMA_IN, QKVW, GAMMA_Q, GAMMA_K, GAMMA_V, ATTPROJW, FCW, FCPROJW, GAMMA_OUT, GAMMA_FINAL, NUM_TENSORS
};
// clang-format on
enum TensorPlace { BEFORE_BLOCKS, EVERY_SUBLAYER, ATTENTION, FEED_FORWARD, AFTER_BLOCKS };

struct TensorRow {
    const char* name;
    TensorPlace place;
    int (*rows)(const ModelConfig&);
    int (*cols)(const ModelConfig&);
    // A matrix starts uniform with variance 1/fan_in (bound sqrt(3/fan_in)) and decays; 0: a gain starts as 1.
    int (*fan_in)(const ModelConfig&);
    bool (*exists)(const ModelConfig&, const SublayerNorm&);
};

namespace table {  // the functions that the rows of the table name
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

// clang-format off
inline const TensorRow tensor_rows[NUM_TENSORS] = {
    // name         place           rows          cols       fan_in       exists where
    {"wte",         BEFORE_BLOCKS,  table::Vp,    table::C,  table::C,    table::always},
    {"wpe",         BEFORE_BLOCKS,  table::max_T, table::C,  table::C,    table::always},
    {"gamma_in",    EVERY_SUBLAYER, table::one,   table::C,  table::none, table::norm_in},
    {"qkvw",        ATTENTION,      table::C3,    table::C,  table::C,    table::always},
    {"gamma_q",     ATTENTION,      table::one,   table::D,  table::none, table::norm_qkv},
    {"gamma_k",     ATTENTION,      table::one,   table::D,  table::none, table::norm_qkv},
    {"gamma_v",     ATTENTION,      table::one,   table::D,  table::none, table::norm_qkv},
    {"attprojw",    ATTENTION,      table::C,     table::C,  table::C,    table::always},
    {"fcw",         FEED_FORWARD,   table::C4,    table::C,  table::C,    table::always},
    {"fcprojw",     FEED_FORWARD,   table::C,     table::C4, table::C4,   table::always},
    {"gamma_out",   EVERY_SUBLAYER, table::one,   table::C,  table::none, table::norm_out},
    {"gamma_final", AFTER_BLOCKS,   table::one,   table::C,  table::none, table::norm_final},
};
// clang-format on

// One tensor of a model: its row of the table with the model's shape filled in.
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
    size_t used_rows;  // the rows after these are padding and always zero (only wte has any)
    bool decay;
    size_t size() const { return rows * cols; }
};

// Parameters that the ranks of a run reduce, gather and divide among themselves in one call: ranks * shard elements
// of memory, of which rank r owns [r * shard, (r+1) * shard). The padding at a bucket's end is in no file.
struct Bucket {
    size_t first;        // first element in memory
    size_t shard;        // elements that each rank owns
    size_t shard_first;  // where a rank's shard starts in the arrays that hold its shards of all buckets
    size_t count;        // elements of tensors; the rest is padding
};
inline uint64_t shard_elements(uint64_t count, int ranks) {
    return round_up((count + uint64_t(ranks) - 1) / uint64_t(ranks), 128);
}

// The elements of one tensor that one rank owns.
struct ShardRange {
    size_t tensor;         // its index in the parameter order
    size_t first, count;   // elements [first, first + count) of the tensor
    size_t memory, shard;  // where the first of them is in memory, and in the arrays of what the rank owns
};

// Where the parameters are. The parameter order is that of every file. It is also that of memory, unless ranks share
// the parameters: then bucket 0 holds the embeddings and all gains, which every rank reads in FP32, and bucket 1 + m
// the matrices of block m, its attention and its feed-forward, whose gradients are complete at the same moment of the
// backward pass.
struct ParameterLayout {
    std::vector<TensorInfo> tensors;  // in the parameter order
    size_t count = 0;                 // elements in all
    size_t size = 0;                  // the same in memory, padding included
    size_t shard_size = 0;            // elements that each rank owns, padding included
    int ranks = 1;                    // that share the parameters
    std::vector<Bucket> buckets;
    static constexpr size_t absent = SIZE_MAX;

    // sharing_ranks: how many ranks share the parameters, in buckets; 0: none do, and memory is in file order.
    explicit ParameterLayout(const ModelConfig& c, int sharing_ranks = 0)
        : ranks(std::max(1, sharing_ranks)), index(size_t(c.L) + 1) {
        for (auto& row : index) row.fill(absent);
        add_place(c, BEFORE_BLOCKS, -1);
        for (int l = 0; l < c.L; l++) add_place(c, is_attention(l) ? ATTENTION : FEED_FORWARD, l);
        add_place(c, AFTER_BLOCKS, -1);
        if (sharing_ranks > 0) divide_into_buckets(c);
        else buckets = {{0, count, 0, count}}, size = shard_size = count;
    }

    // Where a tensor starts, or `absent` where the placement does not have it.
    size_t offset(Tensor id, int layer = -1) const { return index[size_t(layer + 1)][id]; }

    static size_t block_bucket(int l) { return 1 + size_t(l) / 2; }  // of the block that sub-layer l is in
    size_t bucket_of(const TensorInfo& t) const {
        return buckets.size() > 1 && t.layer >= 0 && t.decay ? block_bucket(t.layer) : 0;
    }

    // The ranges that a rank owns, in the parameter order: at most one of each tensor. A single rank owns all tensors.
    std::vector<ShardRange> owned(int rank) const {
        std::vector<ShardRange> ranges;
        for (size_t i = 0; i < tensors.size(); i++) {
            const TensorInfo& t = tensors[i];
            const Bucket& b = buckets[bucket_of(t)];
            size_t begin = b.first + size_t(rank) * b.shard, from = std::max(begin, t.offset);
            size_t to = std::min(begin + b.shard, t.offset + t.size());
            if (from < to) ranges.push_back({i, from - t.offset, to - from, from, b.shard_first + (from - begin)});
        }
        return ranges;
    }
    size_t owned_count(int rank) const {
        size_t n = 0;
        for (const ShardRange& r : owned(rank)) n += r.count;
        return n;
    }

    // The gradients' layout at -z 2: memory holds two blocks at a time, and block m + 2 takes the place of block m.
    ParameterLayout with_two_blocks() const {
        ParameterLayout l = *this;
        size_t block = buckets[1].shard * size_t(ranks);
        for (size_t b = 1; b < buckets.size(); b++) l.buckets[b].first = buckets[1].first + (b - 1) % 2 * block;
        for (TensorInfo& t : l.tensors) {
            t.offset = t.offset - buckets[bucket_of(t)].first + l.buckets[bucket_of(t)].first;
            l.index[size_t(t.layer + 1)][t.id] = t.offset;
        }
        l.size = buckets[1].first + std::min<size_t>(buckets.size() - 1, 2) * block;
        return l;
    }

private:
    std::vector<std::array<size_t, NUM_TENSORS>> index;  // [layer + 1][tensor] -> offset

    void divide_into_buckets(const ModelConfig& c) {
        buckets.assign(1 + size_t(c.L) / 2, Bucket{});
        for (const TensorInfo& t : tensors) buckets[bucket_of(t)].count += t.size();
        std::vector<size_t> next;
        for (Bucket& b : buckets) {
            b.first = size, b.shard_first = shard_size, b.shard = shard_elements(b.count, ranks);
            size += b.shard * size_t(ranks), shard_size += b.shard;
            next.push_back(b.first);
        }
        for (TensorInfo& t : tensors) {
            t.offset = index[size_t(t.layer + 1)][t.id] = next[bucket_of(t)];
            next[bucket_of(t)] += t.size();
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
            // Parameters, gradients and two moments, in FP32 at least. Addresses of 32 bits end before some models do.
            double bytes = 4.0 * sizeof(float) * (double(count) + double(info.rows) * double(info.cols));
            if (bytes > double(SIZE_MAX))
                fail("memory: expected at least %s, found a build that can address %s; use a smaller -C, -L or -t",
                     bytes_text(bytes), bytes_text(double(SIZE_MAX)));
            index[size_t(l + 1)][t] = count;
            count += info.size();
            tensors.push_back(info);
        }
    }
};

// Pointers to the parameters of sub-layer l, or to their gradients: w[QKVW], null where the placement has no such
// tensor. l = -1: the tensors outside the blocks.
template <class T>
struct SublayerTensors {
    T* tensor[NUM_TENSORS];
    SublayerTensors(T* base, const ParameterLayout& layout, int l) {
        for (int t = 0; t < NUM_TENSORS; t++) {
            size_t at = layout.offset(Tensor(t), l);
            tensor[t] = at == ParameterLayout::absent ? nullptr : base + at;
        }
    }
    T* operator[](Tensor t) const { return tensor[t]; }
};

// The initial values of rows [first, last) of one tensor: key = seed, counter = (e/4, index of the tensor), word e mod
// 4 for element e, then bound * (2u - 1). Both factors are exact in FP32 and the product is rounded once, so the same
// bits come out on every machine; uniform rather than normal because it needs no log and no cosine.
template <class Real>
void initialise_tensor(Real* out, const TensorInfo& t, size_t tensor_index, uint64_t seed, size_t first, size_t last) {
    Philox block{};
    uint64_t block_index = UINT64_MAX;
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
// Files
//
// Every file is a header of 256 int32, a body of reals and tokens, and the CRC-32 of all bytes before it.

inline constexpr int FILE_VERSION = 1;  // what makes a new one: dev/doc/files.md
enum FileKind { FILE_MODEL = 1, FILE_STATE = 2, FILE_DEBUG = 3, FILE_TOKENIZER = 4 };
enum RealType { REAL_FP32 = 0, REAL_BF16 = 1, REAL_FP64 = 2 };

inline const char* kind_name(int kind) {
    const char* names[] = {"?", "model", "training state", "debug state", "tokenizer"};
    return names[kind > 0 && kind < int(std::size(names)) ? kind : 0];
}
inline size_t real_size(int type) { return type == REAL_FP64 ? 8 : type == REAL_FP32 ? 4 : 2; }
template <class Real>
constexpr RealType real_type = sizeof(Real) == 8 ? REAL_FP64 : REAL_FP32;

// The words of the header. A training state holds beside the model all that a bit-exact resume needs.
// clang-format off
enum HeaderWord {
    H_MAGIC = 0,            // the bytes 'K','E','E','L'
    H_VERSION = 1,          // 1
    H_KIND = 2,             // FileKind
    H_TYPE = 3,             // RealType of the stored reals
    H_MAX_T = 4,
    H_V = 5,
    H_VP = 6,
    H_L = 7,
    H_H = 8,
    H_C = 9,
    H_NORM = 10,            // NormPlacement
    H_ALPHA = 11,           // bits of the FP32 alpha, 1 where there is none
    H_B = 12,               // sequences of the batch (debug state) or of the micro-batch (training state)
    H_T = 13,               // sequence length, of the same two kinds of file
    H_STEP = 14,            // int64, steps finished
    H_BRANCH_BF16 = 16,     // 1: the branch was computed in BF16
    // from here on: training state only
    H_RECOMPUTE = 17,       // 0 none, -1 gelu, 1 layer, K: every K-th z is kept
    H_TOTAL_BATCH = 18,     // int64, tokens a step
    H_STEPS = 20,           // int64, length of the schedule
    H_WARMUP = 22,          // int64, steps
    H_LR = 24,              // double
    H_WEIGHT_DECAY = 26,    // double
    H_CLIP = 28,            // double
    H_SEED = 30,            // uint64
    H_TRAIN_TOKENS = 32,    // int64, tokens of the training split: a resume on other data is refused
    H_RANKS = 34,
    H_RANK = 35,            // the file holds what rank H_RANK of H_RANKS owns
    H_VAL_EVERY = 36,       // int64, steps; this and the next two decide the log's val_loss
    H_VAL_BATCHES = 38,     // int64
    H_VAL_TOKENS = 40,      // int64, tokens of the validation split
    H_SKIPPED = 42,         // int64, steps that updated nothing, as their loss or gradient was not finite: AdamW's
                            // bias corrections count only the others
    H_SKIPPED_IN_ROW = 44,  // int64, how many steps were skipped since the last finite one
    H_MOMENTS_BF16 = 46,    // 1: --moments bf16
    H_GRADS_BF16 = 47,      // 1: --grads bf16
    H_HOPS = 48,            // K of --train hops:K; 0: the data are files
    H_TRAIN_SUM = 50,       // uint32, checksum of the training tokens (keel/data.h); this and the next two are 0
                            // in files of versions that had none
    H_VAL_SUM = 51,         // uint32, of the validation tokens
    H_HISTORY = 52,         // uint32, CRC-32 of the loss and gradient norm of every step so far: the files of one
                            // checkpoint's ranks have the same
    H_SCHEDULE = 54,        // int64, row of `schedules`
    H_FINAL_LR = 56,        // double
    H_DECAY_STEPS = 58,     // int64
    H_SKIP_LOSS = 60,       // double
    H_SKIP_GRAD = 62,       // double
    H_RECENT = 64,          // RecentSteps: four doubles and the next
    H_RECENT_COUNT = 72,    // int64
    H_ATTENTION = 74,       // GPU: 1 by mma.sync, 2 by wgmma; 0: not said
    H_TUNED = 75,           // GPU: 1 where a table of --tune decides how products are summed
    H_OUTLIER = 76,         // 1: the last step was skipped as an outlier; its loss was finite, so the weights are sound
    // of all kinds that have a model
    H_TOKENIZER = 49,       // uint32, CRC-32 of the tokenizer's file; 0: bytes, or a vocabulary that is not known
    // of a tokenizer, which has H_V and none of the others
    H_SPLIT = 7,            // Split, in keel/tokenizer.h
    H_SPECIALS = 8,         // how many of the V entries, the last ones, are special tokens
};
// clang-format on

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
        c.tokenizer = get<uint32_t>(H_TOKENIZER);
        return c;
    }
};

inline FileHeader make_header(FileKind kind, RealType type, const ModelConfig& c, int64_t step,
                              bool branch_bf16 = false) {
    FileHeader h;
    memcpy(&h.word[H_MAGIC], "KEEL", 4);
    h.word[H_VERSION] = FILE_VERSION, h.word[H_KIND] = kind, h.word[H_TYPE] = type;
    h.word[H_MAX_T] = c.max_seq_len, h.word[H_V] = c.V, h.word[H_VP] = c.Vp();
    h.word[H_L] = c.L, h.word[H_H] = c.H, h.word[H_C] = c.C;
    h.word[H_NORM] = c.norm;
    h.set(H_ALPHA, c.alpha);
    h.set(H_TOKENIZER, c.tokenizer);
    h.set(H_STEP, step);
    h.word[H_BRANCH_BF16] = branch_bf16;
    return h;
}

// Bounds that keep 4*C and Vp inside int, and B*T*ranks and every tensor's size inside int64_t.
inline constexpr int MAX_L = 1 << 17, MAX_C = 1 << 17, MAX_V = 1 << 24, MAX_T = 1 << 24, MAX_B = 1 << 20,
                     MAX_RANKS = 1 << 16;

// What is wrong with a model's shape; empty if both trainers can hold it.
inline std::string config_fault(const ModelConfig& c) {
    if (c.L < 2 || c.L % 2 || c.L > MAX_L) return format("L (-L) must be even, from 2 to %d, and is %d", MAX_L, c.L);
    if (c.C < 1 || c.C > MAX_C) return format("C (-C) must be from 1 to %d and is %d", MAX_C, c.C);
    if (c.H < 1 || c.C % c.H) return format("H (-H) must divide C = %d and is %d", c.C, c.H);
    if (c.V < 1 || c.V > MAX_V) return format("V must be from 1 to %d and is %d", MAX_V, c.V);
    if (c.max_seq_len < 1 || c.max_seq_len > MAX_T)
        return format("T (-t) must be from 1 to %d and is %d", MAX_T, c.max_seq_len);
    if (c.norm < 0 || c.norm >= NUM_PLACEMENTS)
        return format("the norm placement must be from 0 to %d and is %d", NUM_PLACEMENTS - 1, int(c.norm));
    // The squares of alpha x, added up over a row, must stay finite; those of x_0 are at most 12 (its bound is 2
    // sqrt(3)).
    if (double most = std::sqrt(std::numeric_limits<float>::max() / (12.0 * c.C)); !(c.alpha > 0 && c.alpha <= most))
        return format("alpha (-a) must be above 0 and at most %g, as alpha^2 C has to stay finite, and is %g", most,
                      c.alpha);
    return "";
}

// The largest numbers of a run, in flags and in files alike: any product that the program forms of them stays inside
// int64_t.
inline constexpr int MAX_HOPS = 9;  // of --train hops:K (keel/hops.h)
inline constexpr double MAX_STEPS = 1e15, MAX_TOTAL_BATCH = 1e12, MAX_VAL_BATCHES = 1e9, MAX_RATE = 1e9,
                        MAX_CLIP = 1e30;

// What is wrong with B and T of a debug or training state, and with the words of a training state; empty if a run can
// have them.
inline std::string batch_fault(const FileHeader& h) {
    int B = h.word[H_B], T = h.word[H_T], max_T = h.word[H_MAX_T];
    if (B < 1 || B > MAX_B) return format("B must be from 1 to %d and is %d", MAX_B, B);
    if (T < 1 || T > max_T) return format("T must be from 1 to %d and is %d", max_T, T);
    return "";
}
inline std::string state_fault(const FileHeader& h);

// Number of a model's parameters in sub-layers [first, last), where -1 is what stands outside the blocks. It needs no
// ParameterLayout, as nothing may be allocated on the word of a broken file.
inline uint64_t parameter_count(const ModelConfig& c, int first, int last, bool matrices_only = false) {
    uint64_t count = 0;
    for (int l = first; l < last; l++) {
        SublayerNorm norm = l >= 0 ? c.sublayer(l) : SublayerNorm{};
        TensorPlace place = l < 0 ? BEFORE_BLOCKS : is_attention(l) ? ATTENTION : FEED_FORWARD;
        for (const TensorRow& row : tensor_rows) {
            bool here = row.place == place || row.place == (l < 0 ? AFTER_BLOCKS : EVERY_SUBLAYER);
            if (here && row.exists(c, norm) && (!matrices_only || row.fan_in(c) > 0))
                count += uint64_t(row.rows(c)) * uint64_t(row.cols(c));
        }
    }
    return count;
}
inline uint64_t parameter_count(const ModelConfig& c) { return parameter_count(c, -1, c.L); }

// ParameterLayout(c, ranks).owned_count(rank) without the layout: the matrices of all blocks have the same shapes.
inline uint64_t owned_parameter_count(const ModelConfig& c, int ranks, int rank) {
    uint64_t blocks = uint64_t(c.L) / 2, block = parameter_count(c, 0, 2, true), owned = 0;
    ranks = std::max(1, ranks);
    for (auto [count, buckets] : {std::pair{parameter_count(c) - blocks * block, uint64_t(1)}, {block, blocks}}) {
        uint64_t shard = shard_elements(count, ranks), before = std::min(count, uint64_t(rank) * shard);
        owned += buckets * std::min(shard, count - before);
    }
    return owned;
}

// Bytes of a file with this header, the CRC included; 0 where no file can be that long.
inline uint64_t expected_file_size(const FileHeader& h) {
    ModelConfig c = h.model();
    uint64_t reals = h.word[H_KIND] == FILE_STATE ? 3 * owned_parameter_count(c, h.word[H_RANKS], h.word[H_RANK])
                                                  : parameter_count(c),
             ints = 0;
    if (h.word[H_KIND] == FILE_DEBUG) {
        uint64_t rows = uint64_t(h.word[H_B]) * uint64_t(h.word[H_T]);
        if (double(rows) * (double(c.V) + 2 * (double(c.L) + 1) * double(c.C)) > 1e18) return 0;
        reals = 2 * reals + 1 + rows * uint64_t(c.V) + 2 * (uint64_t(c.L) + 1) * rows * uint64_t(c.C);
        ints = 2 * rows;
    }
    return sizeof(FileHeader) + reals * real_size(h.word[H_TYPE]) + ints * 4 + 4;
}

struct CloseFile {
    void operator()(FILE* file) const { fclose(file); }
};

// Whether nothing has this name, not even a link that leads nowhere.
inline bool is_absent(const std::string& path) {
    struct stat st;
    return lstat(path.c_str(), &st) != 0 && (errno == ENOENT || errno == ENOTDIR);
}

// Reads one of our files. The constructor checks the header and the file's size against each other, so that nothing is
// allocated on the word of a broken file; finish() checks the CRC of everything read.
class FileReader {
public:
    FileHeader header;
    std::string path;
    uint64_t body_bytes = 0;  // between the header and the CRC

    FileReader(const std::string& path, FileKind kind) : path(path) {
        int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // opening a pipe must not wait for its writer
        if (fd >= 0) file.reset(fdopen(fd, "rb"));
        struct stat st;
        if (!file || fstat(fd, &st) != 0) {
            std::string text =
                format("%s: cannot be read (%s); expected a %s file", path, errno_text(), kind_name(kind));
            int e = errno;
            if (is_absent(path)) throw Error(text);
            throw UnreadableError(text + "; " + (e == ENOENT ? "it is a link that leads nowhere" : errno_advice(e)));
        }
        if (!S_ISREG(st.st_mode))
            throw UnreadableError(format("%s: expected a %s file, found no regular file; move it away", path,
                                         kind_name(kind)));
        uint64_t size = uint64_t(st.st_size);
        if (size < sizeof header + 4)
            fail("%s: expected a %s file of at least %zu bytes, found %llu; it is cut short or another file", path,
                 kind_name(kind), sizeof header + 4, size);
        read(&header, sizeof header);
        const auto& w = header.word;
        if (memcmp(&w[H_MAGIC], "KEEL", 4) != 0)
            fail("%s: expected the bytes KEEL at its start, found others; %s", path,
                 kind == FILE_TOKENIZER ? "python3 data/tokenizer.py import makes a tokenizer of those of others"
                                        : "give a file that a KEEL trainer wrote");
        if (w[H_VERSION] != FILE_VERSION)
            throw UnreadableError(format("%s: expected file version %d, found %d; use the trainer that wrote it", path,
                                         FILE_VERSION, w[H_VERSION]));
        if (w[H_KIND] != kind)
            fail("%s: expected a %s (kind %d), found a %s (kind %d); give the other file", path, kind_name(kind),
                 int(kind), kind_name(w[H_KIND]), w[H_KIND]);
        body_bytes = size - sizeof header - 4;
        if (kind == FILE_TOKENIZER) return;  // keel/tokenizer.h looks at the rest
        if (w[H_TYPE] < 0 || w[H_TYPE] > 2)
            fail("%s: expected reals of type 0, 1 or 2, found %d; the file is damaged", path, w[H_TYPE]);
        ModelConfig c = header.model();
        std::string fault = config_fault(c);
        if (fault.empty() && w[H_VP] != c.Vp()) fault = format("Vp must be %d and is %d", c.Vp(), w[H_VP]);
        // A model of this shape has at least L*C*C parameters: refuse before they are counted sub-layer by sub-layer.
        if (fault.empty() && double(c.L) * c.C * c.C > double(size)) fault = "its shape needs more bytes than it has";
        if (fault.empty() && kind == FILE_STATE) fault = state_fault(header);
        if (fault.empty() && kind == FILE_DEBUG) fault = batch_fault(header);
        if (int64_t step = header.get<int64_t>(H_STEP); fault.empty() && (step < 0 || double(step) > MAX_STEPS))
            fault = format("its step must be from 0 to %.0f and is %lld", MAX_STEPS, step);
        if (!fault.empty()) fail("%s: %s; the file is damaged", path, fault);
        uint64_t expected = expected_file_size(header);
        if (size != expected)
            fail("%s: expected %llu bytes from its header, found %llu; the file is cut short or damaged", path,
                 expected, size);
    }

    void read(void* out, size_t bytes) {
        if (fread(out, 1, bytes, file.get()) != bytes)
            fail("%s: could not be read to its end (%s)", path, ferror(file.get()) ? errno_text() : "it shrank");
        crc = crc32_parallel(out, bytes, crc);
    }

    // Reads n reals, widened or rounded from the file's type to Real.
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

    // Reads what is left of the body, compares the CRC and returns it.
    uint32_t finish() {
        uint64_t left = sizeof header + body_bytes - uint64_t(ftello(file.get()));
        std::vector<char> chunk(std::min<uint64_t>(left, 8 << 20));
        while (left > 0) {
            size_t n = std::min<uint64_t>(left, chunk.size());
            read(chunk.data(), n);
            left -= n;
        }
        uint32_t stored, computed = crc;
        read(&stored, 4);
        if (stored != computed)
            fail("%s: expected CRC-32 %08x, found %08x; the file is damaged, use another copy", path, stored, computed);
        return stored;
    }

private:
    std::unique_ptr<FILE, CloseFile> file;
    uint32_t crc = 0;
};

// Flushes the folder of a file just renamed: without it a crash could undo the rename.
inline void sync_folder(const std::string& file_path) {
    std::string folder = std::filesystem::path(file_path).parent_path().string();
    int fd = open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return;  // not every file system lets a folder be opened; the rename itself has succeeded
    // EINVAL and ENOTSUP say that this file system does not flush folders.
    bool failed = fsync(fd) != 0 && errno != EINVAL && errno != ENOTSUP;
    std::string why = errno_text();
    close(fd);
    if (failed)
        fail("%s: its folder could not be written (%s); see to the disk, what was there before is untouched", file_path,
             why);
}

// Writes one of our files beside its target and renames it once everything is on the disk: the target is always whole.
class FileWriter {
public:
    explicit FileWriter(const std::string& path) : path(path), temporary(path + ".tmp") {
        // What lies there is a killed run's, or a link that leads elsewhere, or a pipe that would be waited for.
        if (unlink(temporary.c_str()) == 0 || errno == ENOENT) file = fopen(temporary.c_str(), "wbxe");
        if (!file) fail("%s: %s", temporary, write_fault(errno));
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
        finish();
    }

    // Replaces a small file that has no CRC: a reader finds all of the old text or all of the new.
    static void replace(const std::string& path, const std::string& text) {
        FileWriter out(path);
        out.write(text.data(), text.size());
        out.finish();
    }

private:
    [[noreturn]] void fail_write() { fail("%s: %s; what was there before is untouched", path, write_fault(errno)); }
    void finish() {
        if (fflush(file) != 0 || fsync(fileno(file)) != 0) fail_write();
        fclose(std::exchange(file, nullptr));
        if (rename(temporary.c_str(), path.c_str()) != 0) {
            int e = errno;
            unlink(temporary.c_str());
            fail("%s: %s", path, write_fault(e));
        }
        sync_folder(path);
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
                    fail("%s: expected tokens from 0 to %d, found %d; the file is damaged", path, c.V - 1, token);
        return s;
    }
};

// Bytes of a DebugState in the host's memory, tokens aside.
template <class Real>
uint64_t debug_state_bytes(const ModelConfig& c, int64_t B, int T) {
    uint64_t row = 2 * uint64_t(c.L + 1) * uint64_t(c.C) + uint64_t(c.V);
    return sizeof(Real) * (2 * parameter_count(c) + uint64_t(B) * uint64_t(T) * row);
}

// ----------------------------------------------------------------------------------------------------
// The command line: one row a flag, from which parsing, -h and the README's table come

// What decides a run's numbers beside its model and its batch. A training state holds these settings, and a resume
// takes from it those that the command line does not give.
struct Settings {
    int64_t steps = 400, warmup = 0, schedule = 0, decay_steps = 0;
    double lr = 0, final_lr = 0, weight_decay = 0.01, clip = 1.0, skip_loss = 0, skip_grad = 0;
    int64_t seed = 1337, val_every = 100, val_batches = 16;
};

// Mean and variance of the loss and the gradient norm of recent steps, to see an outlier by. The first 64 have equal
// weights; from then on older ones lose 1/64 of theirs with each step (West 1979's update): a mean as old as that of
// the last 128 steps.
struct RecentSteps {
    static constexpr int64_t ENOUGH = 128;  // steps, from which on one can be an outlier
    struct Moments { double mean, variance; } loss, grad;
    int64_t count;  // finite steps so far

    // Takes a step whose numbers are finite; false if it is to be skipped: enough steps are known, and its loss or norm
    // is above the mean by more than so many standard deviations (0: any number).
    constexpr bool add(double new_loss, double norm, double skip_loss, double skip_grad) {
        bool usual = join(loss, new_loss, skip_loss);
        usual = join(grad, norm, skip_grad) && usual;
        count++;
        return usual;
    }

private:
    // An outlier's weight falls with the square of its distance, so that one leaves the mean and variance nearly as
    // they were, while a loss that stays at a new level becomes the mean.
    constexpr bool join(Moments& m, double x, double z) const {
        double d = x - m.mean, limit = z * z * m.variance, weight = 1 / double(count < 64 ? count + 1 : 64);
        bool outlier = z > 0 && count >= ENOUGH && d > 0 && limit > 0 && d * d > limit;
        if (outlier) weight *= limit / (d * d);
        m.mean += weight * d;
        m.variance = (1 - weight) * (m.variance + weight * d * d);
        return !outlier;
    }
};

// How the learning rate falls. start: the last step at the peak; left(range, p): what is left of the range between peak
// and final rate when the fraction p of the steps after it is done. wsd, "warm-up, stable, decay", is Hu et al. 2024's;
// that 1 - sqrt is the best way down, Haegele et al. 2024's.
struct Schedule {
    const char* name;
    int64_t (*start)(const Settings&);
    double (*left)(double range, double p);
};
inline int64_t at_warmup(const Settings& s) { return s.warmup; }
inline int64_t at_decay(const Settings& s) {
    return std::max(s.warmup, s.steps - (s.decay_steps ? s.decay_steps : std::max<int64_t>(1, s.steps / 5)));
}
inline int64_t at_end(const Settings& s) { return s.steps; }
// clang-format off
enum { COSINE, LINEAR, WSD, CONSTANT, NUM_SCHEDULES };
inline const Schedule schedules[NUM_SCHEDULES] = {
    {"cosine",   at_warmup, [](double range, double p) { return range * (1 + std::cos(M_PI * p)) / 2; }},
    {"linear",   at_warmup, [](double range, double p) { return range * (1 - p); }},
    {"wsd",      at_decay,  [](double range, double p) { return range * (1 - std::sqrt(p)); }},
    {"constant", at_end,    [](double range, double)   { return range; }},
};
// clang-format on

// The learning rate of step s = 1..S: linear warm-up over W steps to the peak, then down to the final rate at step S.
inline double learning_rate(const Settings& run, int64_t s) {
    if (s <= run.warmup) return run.lr * double(s) / double(run.warmup);
    const Schedule& schedule = schedules[run.schedule];
    int64_t start = schedule.start(run);
    if (s <= start) return run.lr;
    double least = run.final_lr > 0 ? run.final_lr * run.lr : std::min(1e-7, run.lr);
    if (s >= run.steps) return least;
    return least + schedule.left(run.lr - least, double(s - start) / double(run.steps - start));
}

struct Options : Settings {
    std::vector<std::string> train, val;  // default: the trainer's own sources; their last tenth
    std::string out, init, prompt = "\n", dump, check, ablate, recompute = "auto";
    std::string norm = "keel", tune, moments = "fp32", grads = "fp32", tokenizer;
    int64_t layers = 64, channels = 0, heads = 0, seq_len = 0, batch = 0, total_batch = 0;
    int64_t checkpoint_every = 1000, sample_every = 200;
    int64_t sample_tokens = 256, top_k = 40, zero = 0, probe = 0, keep = 3, max_skips = 10;
    double alpha = 0, temperature = 0.8;
    bool resume = false, stop_on_divergence = false, special = false, help = false;
    std::set<std::string> given;  // long names of the flags on the command line
    bool has(const char* long_name) const { return given.count(long_name) > 0; }
    bool only_samples() const {
        return has("--init") && has("--prompt") && !has("--train") && !has("--out") && !has("--steps");
    }
};

struct Flag {
    const char *short_name, *long_name, *argument;
    const char* fallback;  // the default as -h shows it; null: the member's initial value
    const char* help;
    std::variant<std::string Options::*, std::vector<std::string> Options::*, int64_t Options::*, double Options::*,
                 bool Options::*>
        member;
    double least = 0, most = 9e18;   // the bounds of a number
    HeaderWord stored_in = H_MAGIC;  // where a training state holds a setting; H_MAGIC: it is none
    bool is_setting() const { return stored_in != H_MAGIC; }
    bool is_schedule() const { return stored_in == H_SCHEDULE; }  // given by name
    std::string text(int64_t value) const { return is_schedule() ? schedules[value].name : format("%lld", value); }
    bool is_path() const { return argument == std::string_view("FILE") || argument == std::string_view("DIR"); }
};

inline const Flag flags[] = {
    {"-i", "--train", "PATH|GLOB", "own sources",
     "training data: text, llm.c .bin shards, or hops:K, programs without end", &Options::train},
    {"-j", "--val", "PATH|GLOB", "last tenth", "validation data; by default the last tenth of -i, never trained on",
     &Options::val},
    {"", "--tokenizer", "FILE", "beside -e, -i",
     "the vocabulary of text, prompts and samples, made by data/tokenizer.py; where there is none a byte is a token",
     &Options::tokenizer},
    {"-o", "--out", "DIR", "none", "folder for log.csv and checkpoints; without it nothing is written", &Options::out},
    {"-e", "--init", "FILE", "none",
     "start from this model file; with --prompt and no -i, -o or -x, only sample from it", &Options::init},
    {"-L", "--layers", "N", nullptr,
     "sub-layers, even: N/2 attention and N/2 feed-forward; chooses all that is not given", &Options::layers, 2, MAX_L},
    {"-C", "--channels", "N", "by -L", "width of the highway", &Options::channels, 1, MAX_C},
    {"-H", "--heads", "N", "by -C",
     "attention heads; divides -C; a Hopper runs those of 64 and 128 channels by wgmma, unless KEEL_WGMMA=0",
     &Options::heads, 1, MAX_C},
    {"-t", "--seq-len", "N", "by -C", "sequence length T, tokens", &Options::seq_len, 1, MAX_T},
    {"-b", "--batch", "N", "by memory", "micro-batch B of a rank, sequences", &Options::batch, 1, MAX_B},
    {"-d", "--total-batch", "TOKENS", "by -C",
     "tokens a step, of all ranks, a multiple of B*T*ranks; B*T*ranks where only -b is given", &Options::total_batch, 1,
     MAX_TOTAL_BATCH},
    {"", "--norm", "NAME", nullptr, "norm placement: ", &Options::norm},  // help_text adds the names
    {"-a", "--alpha", "A", "by --norm", "weight of the shortcut, where the placement has one (keel: L)",
     &Options::alpha, 1e-30, 1e19},
    {"-l", "--lr", "X", "by -L", "peak learning rate", &Options::lr, 0, MAX_RATE, H_LR},
    {"-u", "--warmup", "N", "steps/4", "steps of linear warm-up, at most 2500 by default; then --schedule",
     &Options::warmup, 0, MAX_STEPS, H_WARMUP},
    {"", "--schedule", "NAME", nullptr,
     "how the rate goes on after the warm-up: ",  // help_text adds the names
     &Options::schedule, 0, NUM_SCHEDULES - 1, H_SCHEDULE},
    {"", "--final-lr", "X", nullptr, "the last step's learning rate, as a fraction of the peak; 0: 1e-7 itself",
     &Options::final_lr, 0, 1, H_FINAL_LR},
    {"", "--decay-steps", "N", "steps/5", "last steps, in which wsd falls from the peak by 1 - sqrt",
     &Options::decay_steps, 0, MAX_STEPS, H_DECAY_STEPS},
    {"-x", "--steps", "N", nullptr, "optimizer steps", &Options::steps, 0, MAX_STEPS, H_STEPS},
    {"-c", "--weight-decay", "X", nullptr, "AdamW's weight decay, on matrices and embeddings", &Options::weight_decay,
     0, MAX_RATE, H_WEIGHT_DECAY},
    {"", "--clip", "X", nullptr, "largest global gradient norm; 0: no clipping", &Options::clip, 0, MAX_CLIP, H_CLIP},
    {"", "--skip-loss", "Z", nullptr,
     "skip a step whose loss is Z standard deviations above the mean of the last 128 or so; 0: none",
     &Options::skip_loss, 0, 1e9, H_SKIP_LOSS},
    {"", "--skip-grad", "Z", nullptr, "the same of the gradient norm, before it is clipped; 0: none",
     &Options::skip_grad, 0, 1e9, H_SKIP_GRAD},
    {"", "--seed", "N", nullptr, "of weights, data order and samples", &Options::seed, 0, 9e18, H_SEED},
    {"-v", "--val-every", "N", nullptr, "steps between validations; 0: never, not even at the end", &Options::val_every,
     0, 9e18, H_VAL_EVERY},
    {"-m", "--val-batches", "N", nullptr, "validation batches of -d tokens, at most one pass over the validation data",
     &Options::val_batches, 1, MAX_VAL_BATCHES, H_VAL_BATCHES},
    {"-n", "--checkpoint-every", "N", nullptr, "steps between checkpoints in -o; 0: never, not even at the end",
     &Options::checkpoint_every, 0},
    {"", "--keep", "N", nullptr, "checkpoints to keep in -o, the newest; 0: all", &Options::keep, 0},
    {"-y", "--resume", "", nullptr, "go on from the newest whole checkpoint in -o; start fresh where there is none",
     &Options::resume},
    {"", "--max-skips", "N", nullptr,
     "steps in a row that update nothing, their loss or gradient not finite or an outlier, before the run stops",
     &Options::max_skips, 1},
    {"", "--stop-on-divergence", "", nullptr,
     "stop where the loss has diverged, not only warn: stagnation, instability, degradation",
     &Options::stop_on_divergence},
    {"-r", "--recompute", "LEVEL", nullptr,
     "what the backward pass computes again to save memory: none, gelu, layer, an even K, auto", &Options::recompute},
    {"-z", "--zero", "N", nullptr,
     "what several ranks divide: 0 the batch, 1 AdamW's states and master weights too, 2 and gradients", &Options::zero,
     0, 2},
    {"", "--moments", "TYPE", nullptr, "GPU: how AdamW's moments are kept, fp32 or bf16 with stochastic rounding",
     &Options::moments},
    {"", "--grads", "TYPE", nullptr,
     "GPU: how the gradients of the blocks' matrices are kept, fp32 or bf16 with stochastic rounding", &Options::grads},
    {"", "--tune", "FILE", "none",
     "GPU: measure cuBLASLt's algorithms for each shape of product; this table is read, and what it lacks added",
     &Options::tune},
    {"-s", "--sample-every", "N", nullptr, "steps between samples of text; 0: never, not even at the end",
     &Options::sample_every, 0},
    {"-g", "--sample-tokens", "N", nullptr, "tokens a sample", &Options::sample_tokens, 1, 1e9},
    {"", "--prompt", "TEXT", "a new text",
     "what samples start with; for shards without --tokenizer, token ids such as 15496,995", &Options::prompt},
    {"", "--special", "", nullptr, "special tokens in --prompt, such as <|endoftext|>, are those tokens, not text",
     &Options::special},
    {"", "--temperature", "X", nullptr, "of the samples; 0: always the likeliest token", &Options::temperature, 0, 1e9},
    {"", "--top-k", "N", nullptr, "sample from the N likeliest tokens; 0: from all", &Options::top_k, 0, MAX_V},
    {"", "--probe", "N", nullptr,
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

// The default of a flag, as -h shows it.
inline std::string default_text(const Flag& f) {
    if (f.fallback) return f.fallback;
    const Options o;
    if (auto* text = std::get_if<std::string Options::*>(&f.member)) return o.*(*text);
    if (auto* integer = std::get_if<int64_t Options::*>(&f.member)) return f.text(o.*(*integer));
    if (auto* real = std::get_if<double Options::*>(&f.member)) return format("%g", o.*(*real));
    return "off";
}

inline std::string help_text(const char* program, const std::string& ranks) {
    std::string text =
        format("usage: %s [flags]    (KEEL trainer %s; this build runs on %s)\n\n", program, KEEL_VERSION, ranks);
    for (const Flag& f : flags) {
        std::string help = f.help;
        help += f.long_name == std::string("--norm") ? names_of(placements)
                : f.is_schedule()                    ? names_of(schedules)
                                                     : "";
        std::string fallback = default_text(f), tail = fallback.empty() ? "" : format(" [%s]", fallback);
        text += format("%-31s %s%s\n", format("  %-3s %s %s", f.short_name, f.long_name, f.argument), help, tail);
    }
    return text;
}

inline int64_t parse_integer(const char* flag, const std::string& text, double least, double most) {
    char* end = nullptr;
    errno = 0;
    long long value = strtoll(text.c_str(), &end, 10);
    if (text.empty() || *end || isspace((unsigned char)text[0]))
        fail("%s: expected a whole number, found '%s'", flag, text);
    if (errno || double(value) < least || double(value) > most)
        fail("%s: expected a whole number from %.0f to %.0f, found %s", flag, least, most, text);
    return value;
}

inline double parse_real(const char* flag, const std::string& text, double least, double most) {
    char* end = nullptr;
    double value = strtod(text.c_str(), &end);
    if (text.empty() || *end || isspace((unsigned char)text[0]) || !std::isfinite(value))
        fail("%s: expected a number, found '%s'", flag, text);
    if (value < least || value > most) fail("%s: expected a number from %g to %g, found %s", flag, least, most, text);
    return value;
}

inline int64_t parse_schedule(const std::string& name) {
    for (const Schedule& s : schedules)
        if (name == s.name) return &s - schedules;
    fail("--schedule: expected one of %s, found '%s'", names_of(schedules), name);
}

// What the program does instead of training where a flag asks for it, and the other flags that it then uses.
struct Mode {
    const char *flag, *does;
    std::vector<std::string_view> uses;
};
inline const Mode modes[] = {
    {"--check", "takes all from the debug state", {}},
    {"--dump",
     "makes one pass over one batch",
     {"--train", "--val", "--tokenizer", "--init", "--layers", "--channels", "--heads", "--seq-len", "--batch",
      "--total-batch", "--norm", "--alpha", "--seed", "--recompute", "--grads", "--tune"}},
    {"--ablate",
     "only evaluates a model",
     {"--train", "--val", "--tokenizer", "--out", "--init", "--layers", "--channels", "--heads", "--seq-len", "--batch",
      "--total-batch", "--norm", "--alpha", "--seed", "--val-batches", "--recompute", "--tune"}},
    {"--prompt",
     "with -e, and no -i, -o or -x, only samples",
     {"--tokenizer", "--init", "--layers", "--channels", "--heads", "--seq-len", "--norm", "--alpha", "--seed",
      "--sample-tokens", "--special", "--temperature", "--top-k", "--tune"}},
};

// Fails where a flag is given that what the others ask for does not use.
inline void check_mode(const Options& o) {
    for (const Mode& mode : modes) {
        if (!o.has(mode.flag) || (mode.flag == std::string("--prompt") && !o.only_samples())) continue;
        for (const std::string& flag : o.given)
            if (flag != mode.flag && std::find(mode.uses.begin(), mode.uses.end(), flag) == mode.uses.end())
                fail("%s: %s, and does not use %s; leave one of the two out", mode.flag, mode.does, flag);
        return;
    }
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
            fail("expected a flag, found '%s'; quote a glob so that the shell does not expand it, -i '*.txt', and a "
                 "name with blanks",
                 word);
        if (!flag) fail("unknown flag '%s'; -h lists the flags", word);
        if (!o.given.insert(flag->long_name).second) fail("%s: given twice; give it once", word);
        if (auto* member = std::get_if<bool Options::*>(&flag->member)) {
            if (has_value) fail("%s: takes no value, found '%s'", word, value);
            o.*(*member) = true;
            continue;
        }
        if (!has_value) {
            if (i + 1 >= argc) fail("%s: expected %s after it, found nothing", word, flag->argument);
            value = argv[++i];
            for (const Flag& f : flags)
                if (!value.empty() && (value == f.short_name || value == f.long_name))
                    fail("%s: expected %s after it, found the flag %s; a value like that is given as %s=%s", word,
                         flag->argument, value, flag->long_name, value);
        }
        if (flag->is_schedule()) o.schedule = parse_schedule(value);
        else if (auto* integer = std::get_if<int64_t Options::*>(&flag->member))
            o.*(*integer) = parse_integer(word.c_str(), value, flag->least, flag->most);
        else if (auto* real = std::get_if<double Options::*>(&flag->member))
            o.*(*real) = parse_real(word.c_str(), value, flag->least, flag->most);
        else if (value.empty()) fail("%s: expected %s, found an empty word", word, flag->argument);
        else if (auto* text = std::get_if<std::string Options::*>(&flag->member)) o.*(*text) = value;
        else if (auto* list = std::get_if<std::vector<std::string> Options::*>(&flag->member)) o.*(*list) = {value};
    }
    if (o.help) return o;
    if (!o.ablate.empty() && o.init.empty()) fail("--ablate: expected a model with -e, found none; add -e FILE");
    check_mode(o);
    if (o.resume && o.out.empty()) fail("-y: expected the run's folder with -o, found none; add -o DIR");
    if (o.resume && !o.init.empty()) fail("-y: goes on from -o, and -e starts from another file; give one of the two");
    if (o.probe > 0 && o.out.empty()) fail("--probe: expected a folder for probe.csv, found none; add -o DIR");
    if (!o.ablate.empty() && o.ablate != "all") parse_integer("--ablate", o.ablate, 0, MAX_L - 1);
    for (auto [flag, type] : {std::pair{"--moments", o.moments}, {"--grads", o.grads}})
        if (type != "fp32" && type != "bf16") fail("%s: expected fp32 or bf16, found '%s'", flag, type);
    return o;
}

// The CRC does not spare these checks: it tells of accidents only, as whoever forges a file forges its CRC too.
inline std::string state_fault(const FileHeader& h) {
    if (std::string fault = batch_fault(h); !fault.empty()) return fault;
    int B = h.word[H_B], T = h.word[H_T], level = h.word[H_RECOMPUTE];
    if (level < -1 || level > MAX_L || (level > 1 && level % 2))
        return format("the level of recomputation must be -1, 0, 1 or even and is %d", level);
    int ranks = h.word[H_RANKS], rank = h.word[H_RANK];
    if (ranks < 1 || ranks > MAX_RANKS || rank < 0 || rank >= ranks)
        return format("it must be of a rank of 1 to %d ranks and is of rank %d of %d", MAX_RANKS, rank, ranks);
    int64_t total = h.get<int64_t>(H_TOTAL_BATCH), multiple = int64_t(B) * T * ranks;
    if (total < 1 || double(total) > MAX_TOTAL_BATCH || total / T > INT_MAX || total % multiple)
        return format("the total batch must be a multiple of %lld and is %lld", multiple, total);
    for (const Flag& f : flags) {
        if (!f.is_setting()) continue;
        bool integer = std::holds_alternative<int64_t Options::*>(f.member);
        double x = integer ? double(h.get<int64_t>(f.stored_in)) : h.get<double>(f.stored_in);
        if (x >= f.least && x <= f.most) continue;
        return integer ? format("%s must be from %.0f to %.0f and is %lld", f.long_name, f.least, f.most,
                                h.get<int64_t>(f.stored_in))
                       : format("%s must be from %g to %g and is %g", f.long_name, f.least, f.most, x);
    }
    struct {
        HeaderWord word;
        const char* name;
        double most;
    } counts[] = {{H_STEP, "the step", MAX_STEPS},
                  {H_TRAIN_TOKENS, "the number of training tokens", 9e18},
                  {H_VAL_TOKENS, "the number of validation tokens", 9e18},
                  {H_SKIPPED, "the number of skipped steps", double(h.get<int64_t>(H_STEP))},
                  {H_RECENT_COUNT, "the number of recent steps", double(h.get<int64_t>(H_STEP))},
                  {H_SKIPPED_IN_ROW, "the number of steps skipped in a row", double(h.get<int64_t>(H_SKIPPED))}};
    for (const auto& row : counts)
        if (int64_t n = h.get<int64_t>(row.word); n < 0 || double(n) > row.most)
            return format("%s must be from 0 to %.0f and is %lld", row.name, row.most, n);
    auto [loss, grad, count] = h.get<RecentSteps>(H_RECENT);
    for (auto [mean, variance] : {loss, grad})
        if (!std::isfinite(mean) || !std::isfinite(variance) || variance < 0)
            return "the mean and variance of its recent steps must be finite";
    if (h.word[H_HOPS] < 0 || h.word[H_HOPS] > MAX_HOPS)
        return format("the hops of its data must be from 0 to %d and are %d", MAX_HOPS, h.word[H_HOPS]);
    for (auto [word, most] :
         {std::pair{H_MOMENTS_BF16, 1}, {H_GRADS_BF16, 1}, {H_ATTENTION, 2}, {H_TUNED, 1}, {H_OUTLIER, 1}})
        if (h.word[word] < 0 || h.word[word] > most)
            return format("word %d must be from 0 to %d and is %d", int(word), most, h.word[word]);
    return "";
}

// What the backward pass computes again. none: nothing; gelu: u and GELU's output; layer: all but z; an even number K:
// all but every K-th z. A training state holds the level as 0, -1, 1 or K. All have the same bits.
// gelu and layer may hold for the first sub-layers alone, where the others are at the level before: -r auto takes as
// few as the memory asks for (first = 0: still to be chosen).
struct Recompute {
    int level = 0, first = MAX_L;
    bool drops_u(int l) const { return level == 1 || (level == -1 && l < first); }  // u and GELU's output
    bool drops_all(int l) const { return level == 1 && l < first; }                 // all of a branch's activations
    bool segments() const { return level >= 2; }  // all but every K-th z, K sub-layers at a time
    bool may_be_partial() const { return level == -1 || level == 1; }
    Recompute level_before() const { return {level == 1 ? -1 : 0}; }
    std::string name(int L = 0) const {
        std::string text = level == 0 ? "none" : level == -1 ? "gelu" : level == 1 ? "layer" : format("%d", level);
        return text + (may_be_partial() && first < L ? format(" in %d of %d sub-layers", first, L) : "");
    }
    static Recompute parse(const std::string& text) {
        if (text == "none") return {0};
        if (text == "gelu") return {-1};
        if (text == "layer") return {1};
        bool number = text.find_first_not_of("0123456789") == std::string::npos;
        int64_t k = number ? parse_integer("-r", text, 2, MAX_L) : 0;
        if (k < 2 || k % 2)
            fail("-r: expected none, gelu, layer, auto or an even number of sub-layers, found '%s'", text);
        return {int(k)};
    }
};

// The types of AdamW's two moments and of the gradients in the GPU trainer: each takes 4 bytes a parameter in FP32, or
// 2 in BF16 with stochastic rounding.
struct StateTypes { bool moments_bf16 = false, grads_bf16 = false; };

// Everything that decides a run's numbers.
struct RunConfig : Settings {
    ModelConfig model;
    int T = 0;                      // sequence length, at most model.max_seq_len
    int B = 0;                      // micro-batch, sequences; 0: still to be chosen by memory
    int64_t total_batch = 0;        // tokens a step
    bool recompute_chosen = false;  // false: recompute, too, is still to be chosen by memory
    Recompute recompute;
    StateTypes types;
    std::string tune;         // --tune's table, which decides how products are summed; "": none
    int attention = 0;        // as H_ATTENTION
    int ranks = 0, rank = 0;  // ranks of the run, 0 where it is alone; which of them this process is
    int zero = 0;             // the ZeRO level
    // Not settings but counts: the steps so far that updated nothing, and how many of them came last, in a row. AdamW's
    // bias corrections count only the other steps.
    int64_t skipped = 0, skipped_in_row = 0;
    bool outlier = false;  // as H_OUTLIER
    RecentSteps recent{};
    uint32_t history = 0;  // H_HISTORY

    int64_t batch_sequences() const { return total_batch / T; }
    int64_t rank_sequences() const { return batch_sequences() / std::max(1, ranks); }
    int accumulation() const { return int(rank_sequences() / B); }
    // The first sequence of this rank's micro-batch: the ranks take micro-batches in rotation, so that together they
    // read the batch that a single rank would.
    uint64_t sequence(int64_t step, int micro) const {
        return uint64_t(step - 1) * uint64_t(batch_sequences()) +
               (uint64_t(micro) * uint64_t(std::max(1, ranks)) + uint64_t(rank)) * uint64_t(B);
    }
};

// How the ranks of a run divide its memory among them; ranks 0: it is alone.
struct Sharing {
    int ranks = 0, rank = 0, zero = 0;
    Sharing() = default;
    explicit Sharing(const RunConfig& run) : ranks(run.ranks), rank(run.rank), zero(run.zero) {}
    bool states() const { return ranks > 0 && zero >= 1; }     // moments and master weights only of what the rank owns
    bool gradients() const { return ranks > 0 && zero >= 2; }  // gradients only of two blocks at a time
    ParameterLayout grad_layout(const ParameterLayout& layout) const {
        return gradients() ? layout.with_two_blocks() : layout;
    }
};

// AdamW's constants (Loshchilov and Hutter 2019). KEEL's branch gradients shrink as 1/alpha: their RMS is 3e-6 at L =
// 1024, and the usual epsilon of 1e-8 would slow them.
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
// loss after 400 steps, C = 64, T = 64, sources of Python's standard library, mean of three seeds at L = 64 and one
// seed elsewhere (dev/results/lr_sweep.csv; dev/experiments/sweep.py runs it):
//
//     peak LR   3e-3    6e-3   7.1e-3   9e-3    1e-2   1.5e-2   2e-2    3e-2
//     L = 16    2.133   1.997           1.963   1.975   1.971   2.011   2.048
//     L = 64    2.111   1.984           1.962   1.956           2.016
//     L = 256   2.136   2.042   2.029           2.043   2.065
//
// The optimum is flat, about a factor of two wide. A smaller batch was expected to want a lower rate; down to 1024
// tokens it does not.
inline double default_lr(const ModelConfig& c) { return 9e-3 * std::min(1.0, std::cbrt(128.0 / c.L)); }

// ----------------------------------------------------------------------------------------------------
// What a run is: flags over the file it starts from, over the defaults of -L

// Writes the settings of a run into the words of its training state.
inline void store_settings(FileHeader& h, const Settings& settings) {
    Options o;
    static_cast<Settings&>(o) = settings;
    for (const Flag& f : flags) {
        if (!f.is_setting()) continue;
        if (auto* integer = std::get_if<int64_t Options::*>(&f.member)) h.set(f.stored_in, o.*(*integer));
        if (auto* real = std::get_if<double Options::*>(&f.member)) h.set(f.stored_in, o.*(*real));
    }
}
// Reads them back, except those that the command line gives.
inline void restore_settings(Settings& settings, Options o, const FileHeader& state) {
    for (const Flag& f : flags) {
        if (!f.is_setting() || o.has(f.long_name)) continue;
        if (auto* integer = std::get_if<int64_t Options::*>(&f.member)) o.*(*integer) = state.get<int64_t>(f.stored_in);
        if (auto* real = std::get_if<double Options::*>(&f.member)) o.*(*real) = state.get<double>(f.stored_in);
    }
    settings = o;
}

// What the tokens of the data are: their number, and the CRC-32 of the tokenizer's file, 0 where there is none.
struct Vocabulary {
    int V;
    uint32_t tokenizer = 0;
};

// The model of a run. init: the header of -e's model file or of the state that -y goes on from, or null; its V is the
// model's. data_T: the sequence length that the data asks for, or 0.
inline ModelConfig resolve_model(const Options& o, const FileHeader* init, Vocabulary vocabulary, int data_T) {
    ModelConfig m;
    if (init) {
        m = init->model();
        const char* source = init->word[H_KIND] == FILE_STATE ? "checkpoint" : "model of -e";
        auto differs = [&](const char* name, double asked, double stored) {
            if (o.has(name) && asked != stored)
                fail("%s: expected %g as in the %s, found %g; leave it out", name, stored, source, asked);
        };
        differs("--layers", double(o.layers), m.L);
        differs("--channels", double(o.channels), m.C);
        differs("--heads", double(o.heads), m.H);
        differs("--alpha", double(float(o.alpha)), double(m.alpha));
        if (o.has("--norm") && placement_by_name(o.norm) != m.norm)
            fail("--norm: expected %s as in the %s, found %s; leave it out", placements[m.norm].name, source, o.norm);
        if (o.seq_len > m.max_seq_len)
            fail("-t: expected at most %d, the longest sequence of the model, found %lld", m.max_seq_len, o.seq_len);
        if (vocabulary.tokenizer) m.tokenizer = vocabulary.tokenizer;
        return m;
    }
    m.L = int(o.layers);
    if (m.L % 2) fail("-L: expected an even number of sub-layers, found %d; try %d", m.L, m.L + 1);
    m.norm = placement_by_name(o.norm);
    m.C = o.channels ? int(o.channels) : default_channels(m.L);
    m.H = o.heads ? int(o.heads) : default_heads(m.C);
    if (m.C % m.H) fail("-H: expected a divisor of C = %d, found %d", m.C, m.H);
    m.max_seq_len = o.seq_len ? int(o.seq_len) : data_T ? data_T : default_seq_len(m.C);
    m.V = vocabulary.V, m.tokenizer = vocabulary.tokenizer;
    const PlacementRow& row = placements[m.norm];
    if (o.has("--alpha") && !row.alpha) fail("-a: %s has no alpha; leave it out or use --norm keel", row.name);
    m.alpha = o.has("--alpha") ? float(o.alpha) : row.alpha ? row.alpha(m.L) : 1.0f;
    if (std::string fault = config_fault(m); !fault.empty()) fail("%s", fault);
    return m;
}

// A run. init, vocabulary and data_T: as above, with V 0 where there is no data (sampling alone). ranks, rank: as in
// RunConfig.
inline RunConfig resolve_run(const Options& o, const FileHeader* init, Vocabulary vocabulary, int data_T = 0,
                             int ranks = 0, int rank = 0) {
    RunConfig run;
    run.model = resolve_model(o, init, vocabulary, data_T);
    run.ranks = ranks, run.rank = rank, run.zero = int(o.zero);
    const ModelConfig& m = run.model;
    bool resume = init && init->word[H_KIND] == FILE_STATE;
    run.T = o.seq_len ? int(o.seq_len) : resume ? init->word[H_T] : m.max_seq_len;
    run.B = o.batch ? int(o.batch) : resume ? init->word[H_B] : 0;
    auto same_order = [&](const char* flag, int64_t asked, int64_t stored) {
        if (o.has(flag) && asked != stored)
            fail("%s: expected %lld as in the checkpoint, found %lld, with which the data would come in another order; "
                 "leave it out, or start a run from its model by -e",
                 flag, stored, asked);
    };
    if (resume) {
        same_order("--seq-len", o.seq_len, init->word[H_T]);
        same_order("--total-batch", o.total_batch, init->get<int64_t>(H_TOTAL_BATCH));
        same_order("--seed", o.seed, init->get<int64_t>(H_SEED));
    }
    int64_t least = int64_t(run.T) * std::max(1, ranks);  // tokens of the smallest -d: a sequence for each rank
    run.total_batch = o.total_batch ? o.total_batch
                      : resume      ? init->get<int64_t>(H_TOTAL_BATCH)
                      : o.batch     ? o.batch * least
                                    : round_up(default_total_batch(m.C, run.T), least);
    // Where the checkpoint's micro-batch does not fit another number of ranks, it is chosen anew.
    if (resume && !o.batch && init->word[H_RANKS] != std::max(1, ranks) && run.total_batch % (run.B * least)) run.B = 0;
    const char* kept = resume && !o.total_batch ? " as in the checkpoint" : "";
    if (run.total_batch % (std::max(run.B, 1) * least))
        fail("%s: expected a multiple of %lld tokens (%sT%s) as total batch, found %lld%s",
             *kept && o.batch ? "-b" : "-d", std::max(run.B, 1) * least, run.B ? "B*" : "",
             ranks > 1 ? " times the ranks" : "", run.total_batch, kept);
    if (run.batch_sequences() > INT_MAX)
        fail("-d: expected at most %d sequences of -t tokens, found %lld; give a smaller -d or a larger -t", INT_MAX,
             run.batch_sequences());
    static_cast<Settings&>(run) = o;
    if (resume) restore_settings(run, o, *init);
    if (!resume && !o.has("--warmup")) run.warmup = std::min<int64_t>(2500, run.steps / 4);
    if (!resume && !o.has("--lr")) run.lr = default_lr(m);
    if (o.has("--decay-steps") && run.schedule != WSD)
        fail("--decay-steps: expected --schedule wsd, found %s; leave one of the two out",
             schedules[run.schedule].name);
    if (o.has("--final-lr") && run.schedule == CONSTANT)
        fail("--final-lr: expected a --schedule that falls, found constant; leave one of the two out");
    if (int64_t done = resume ? init->get<int64_t>(H_STEP) : 0; run.steps < done)
        fail("-x: expected at least the %lld steps that the checkpoint has, found %lld; give more", done, run.steps);
    if (run.steps > 0 && run.warmup > run.steps && !o.has("--warmup"))
        fail("-x: expected at least the %lld steps of warm-up of the checkpoint, found %lld; give more, or -u too",
             run.warmup, run.steps);
    if (run.steps > 0 && run.warmup > run.steps)
        fail("-u: expected at most the %lld steps of -x, found %lld; give fewer", run.steps, run.warmup);
    if (resume) run.skipped = init->get<int64_t>(H_SKIPPED), run.skipped_in_row = init->get<int64_t>(H_SKIPPED_IN_ROW);
    if (resume) run.history = init->get<uint32_t>(H_HISTORY), run.recent = init->get<RecentSteps>(H_RECENT);
    if (resume) run.outlier = init->word[H_OUTLIER];
    run.recompute_chosen = o.recompute != "auto" || resume;
    if (o.recompute != "auto") run.recompute = Recompute::parse(o.recompute);
    else if (resume) run.recompute = {init->word[H_RECOMPUTE], 0};
    run.types.moments_bf16 = o.has("--moments") || !resume ? o.moments == "bf16" : init->word[H_MOMENTS_BF16] != 0;
    run.types.grads_bf16 = o.has("--grads") || !resume ? o.grads == "bf16" : init->word[H_GRADS_BF16] != 0;
    run.tune = o.tune;
    return run;
}

// ----------------------------------------------------------------------------------------------------
// Comparing two debug states (--check)

// The largest relative L2 error of a right computation, for the coarsest of the types involved: 1e-10 in FP64, 1e-4 in
// FP32 (a right one stays under 1e-5), 3e-2 with a BF16 branch, 1e-1 for hybridnorm's q, k and v gains there, whose
// gradients sum few and nearly cancelling terms. From L = 64 on, the placements whose highway must be FP32 are held to
// what a BF16 highway fails.
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

// A row for each tensor; x and dx have one for each sub-layer's input and one for the last one's output.
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
    print("%-16s %-18s %12s %10s %24s %24s %10s  %s\n", "tensor", "shape", "rel L2 error", "worst at", "file", "ours",
          "tolerance", "ok");
    size_t bad = 0;
    for (const CheckRow& r : rows) {
        print("%-16s %-18s %12.3e %10zu %24.16g %24.16g %10.0e  %s\n", r.name, r.shape, r.error, r.worst, r.worst_file,
              r.worst_ours, r.tolerance, r.ok() ? "ok" : "NOT OK");
        bad += !r.ok();
    }
    print("%zu of %zu tensors within their tolerance\n", rows.size() - bad, rows.size());
    return bad == 0;
}
