// The two FP8 formats of the OCP specification: e4m3 (to 448, no infinity) and e5m2 (to 57344). What is too large
// becomes the largest number.
#pragma once

#include <algorithm>
#include <cmath>

#include "types.h"

using __nv_fp8_storage_t = unsigned char;

namespace cuda_on_cpu {

// One sign bit, E of the exponent, M of the mantissa; the exponent's bias is 2^(E-1) - 1.
template <int E, int M>
struct Fp8Format {
    static constexpr int bias = (1 << (E - 1)) - 1, nan = 0x7f;
    static constexpr int largest = E == 4 ? 0x7e : 0x7b;  // e4m3 ends below its only NaN, e5m2 below infinity

    // Rounded to nearest, ties to even: q units of the last place that the value's exponent gives it, or that subnormal
    // numbers have.
    static unsigned char bits(float value) {
        if (std::isnan(value)) return nan;
        int sign = std::signbit(value) ? 0x80 : 0;
        if (std::isinf(value)) return (unsigned char)(sign | largest);
        int exponent = value == 0 ? 1 - bias : std::max(std::ilogb(value), 1 - bias);
        int q = int(std::nearbyint(std::ldexp(std::fabs(value), M - exponent)));
        // The leading bit of a normal number adds one to the exponent's field, as does a q that was rounded up to the
        // next power of two.
        return (unsigned char)(sign | std::min(((std::min(exponent, bias + 2) + bias - 1) << M) + q, int(largest)));
    }
    static float value(unsigned char bits) {
        int magnitude = bits & 0x7f, exponent = magnitude >> M, mantissa = magnitude & ((1 << M) - 1);
        float value = magnitude > largest ? E == 5 && magnitude == largest + 1 ? INFINITY : NAN
                      : exponent == 0     ? std::ldexp(float(mantissa), 1 - bias - M)
                                          : std::ldexp(float(mantissa + (1 << M)), exponent - bias - M);
        return bits & 0x80 ? -value : value;
    }
};
using E4M3 = Fp8Format<4, 3>;
using E5M2 = Fp8Format<5, 2>;

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_FP8(name, format)                                               \
    struct name {                                                                   \
        __nv_fp8_storage_t __x;                                                     \
        name() = default;                                                           \
        explicit name(float value) : __x(cuda_on_cpu::format::bits(value)) {}       \
        explicit operator float() const { return cuda_on_cpu::format::value(__x); } \
    };
CUDA_ON_CPU_FP8(__nv_fp8_e4m3, E4M3)
CUDA_ON_CPU_FP8(__nv_fp8_e5m2, E5M2)
#undef CUDA_ON_CPU_FP8
