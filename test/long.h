// LONG=1 in the environment: full shapes and repetitions, where leaner ones show the same in less time.
#pragma once

#include <cstdlib>

inline bool long_tests() {
#ifdef __CUDACC__  // a card, which has the time
    return true;
#else
    const char* value = std::getenv("LONG");
    return value && *value;
#endif
}
// How many, or how large.
template <class T>
T lean(T without, T with_long) {
    return long_tests() ? with_long : without;
}
