// bfloat16: the upper half of a float, rounded to nearest, ties to even.
#pragma once

#include <bit>

#include "types.h"

struct __nv_bfloat16_raw { unsigned short x; };

namespace cuda_on_cpu {

inline unsigned short bf16_bits(float value) {
    uint32_t bits = std::bit_cast<uint32_t>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // the one NaN that the toolkit makes
    return (unsigned short)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
inline float bf16_value(unsigned short bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }

}  // namespace cuda_on_cpu

struct alignas(2) __nv_bfloat16 {
    unsigned short bits;

    __nv_bfloat16() = default;
    __nv_bfloat16(const __nv_bfloat16_raw& raw) : bits(raw.x) {}
    explicit __nv_bfloat16(float value) : bits(cuda_on_cpu::bf16_bits(value)) {}
    // As the toolkit does it: by way of float.
    explicit __nv_bfloat16(double value) : bits(cuda_on_cpu::bf16_bits(float(value))) {}
    explicit __nv_bfloat16(int value) : bits(cuda_on_cpu::bf16_bits(float(value))) {}
    operator float() const { return cuda_on_cpu::bf16_value(bits); }
    operator __nv_bfloat16_raw() const { return {bits}; }
    __nv_bfloat16& operator=(float value) { return bits = cuda_on_cpu::bf16_bits(value), *this; }
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;

    __nv_bfloat162() = default;
    __nv_bfloat162(const __nv_bfloat16& x, const __nv_bfloat16& y) : x(x), y(y) {}
};
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

inline __nv_bfloat16 __float2bfloat16(float value) { return __nv_bfloat16(value); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16(value); }
inline float __bfloat162float(__nv_bfloat16 value) { return cuda_on_cpu::bf16_value(value.bits); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return __nv_bfloat16_raw{bits}; }
inline __nv_bfloat162 make_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return __floats2bfloat162_rn(v.x, v.y); }
inline __nv_bfloat162 __float2bfloat162_rn(float v) { return __floats2bfloat162_rn(v, v); }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
inline float __low2float(__nv_bfloat162 v) { return __bfloat162float(v.x); }
inline float __high2float(__nv_bfloat162 v) { return __bfloat162float(v.y); }
