// The layouts of warpgroup products as CUTLASS publishes them, in its algebra of shapes and strides
// (cute/atom/mma_traits_sm90_gmma.hpp, make_gmma_desc and CLayout_64xN, ALayout_64x16): a second derivation, for tests.
#pragma once

#include <cstdint>
#include <vector>

namespace wgmma_layouts {

struct Mode { int64_t shape, stride; };
using Modes = std::vector<Mode>;

// A coordinate's index: its digits, the first mode's changing fastest, each times its stride. The last has no bound.
inline int64_t index(const Modes& modes, int64_t coordinate) {
    int64_t sum = 0;
    for (size_t i = 0; i < modes.size(); i++) {
        bool last = i + 1 == modes.size();
        sum += (last ? coordinate : coordinate % modes[i].shape) * modes[i].stride;
        coordinate /= modes[i].shape;
    }
    return sum;
}

// (thread, value) -> row + 64 column: ((4,8,4),(2,2,N/8)):((128,1,16),(64,8,512)), and (2,2,2) for a
inline int64_t fragment(int64_t thread, int64_t value) {
    return index({{4, 128}, {8, 1}, {4, 16}}, thread) + index({{2, 64}, {2, 8}, {32, 512}}, value);
}

constexpr int64_t T = 8;  // BF16 numbers in 16 bytes

// Swizzle<3,4,3>: three bits, from bit 4 on, are flipped by those three above.
inline int64_t swizzled(int64_t address) { return address ^ ((address & (int64_t(7) << 7)) >> 3); }

// (mn, k) -> byte; offsets in bytes.
//     K-major   Swizzle<3,4,3> o ((8,m),(T,2k)):((8T,SBO),(1,T))
//     MN-major  Swizzle<3,4,3> o ((T,8,m),(8,k)):((1,T,LBO),(8T,SBO))
inline int64_t k_major(int64_t start, int64_t stride, int64_t mn, int64_t k) {
    return swizzled(start + 2 * (index({{8, 8 * T}, {0x10000, stride / 2}}, mn) + index({{T, 1}, {2, T}}, k)));
}
inline int64_t mn_major(int64_t start, int64_t leading, int64_t stride, int64_t mn, int64_t k) {
    return swizzled(start + 2 * (index({{T, 1}, {8, T}, {0x10000, leading / 2}}, mn) +
                                 index({{8, 8 * T}, {0x10000, stride / 2}}, k)));
}

}  // namespace wgmma_layouts
