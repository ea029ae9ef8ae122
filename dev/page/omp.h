// omp.h: OpenMP where there is one thread, as in a Web Worker. The pragmas of parallel regions are ignored there, those
// of vector loops are not (-fopenmp-simd); and <bit> of older emscriptens lacks std::bit_cast.
#pragma once

#include <bit>

inline int omp_get_max_threads() { return 1; }
inline int omp_get_num_procs() { return 1; }
inline int omp_get_num_threads() { return 1; }
inline int omp_get_thread_num() { return 0; }
inline int omp_in_parallel() { return 0; }
inline void omp_set_num_threads(int) {}

#ifndef __cpp_lib_bit_cast
namespace std {
template <class To, class From>
constexpr To bit_cast(const From& from) noexcept {
    return __builtin_bit_cast(To, from);
}
}  // namespace std
#endif
