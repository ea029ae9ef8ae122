// keel/rate.h: the rate of matrix products that every step is compared with, and how sure it is.
#pragma once

#include <time.h>

#include <numeric>

#include "../keel_common.h"

// Seconds for which a processor has worked for the calling thread; 0 where the system does not count them.
inline double thread_seconds() {
    timespec t = {};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return double(t.tv_sec) + double(t.tv_nsec) * 1e-9;
}

// Operations a second of large matrix products.
struct MatrixRate {
    double fastest = 0, median = 0;
    double share = 1;  // of the time in which they were measured, how much the processors worked for them

    // From several products of so many operations each: for how many seconds a processor worked for each, and how long
    // each took. What others do on the machine lengthens the second alone. The first is 0 where a system counts in
    // ticks longer than a product, or not at all.
    static MatrixRate of(double operations, std::vector<double> worked, std::vector<double> took) {
        auto sum = [](const std::vector<double>& x) { return std::accumulate(x.begin(), x.end(), 0.0); };
        MatrixRate rate;
        if (*std::min_element(worked.begin(), worked.end()) <= 0) worked = took;
        rate.share = std::min(1.0, sum(worked) / sum(took));
        std::sort(worked.begin(), worked.end());
        rate.fastest = operations / worked[0], rate.median = operations / worked[worked.size() / 2];
        return rate;
    }

    // Of threads or ranks that work beside each other.
    static MatrixRate together(const std::vector<MatrixRate>& all) {
        MatrixRate sum{.share = 0};
        for (const MatrixRate& r : all)
            sum.fastest += r.fastest, sum.median += r.median, sum.share += r.share / double(all.size());
        return sum;
    }

    // What makes the rate, or the steps' shares of it, unsure; empty where nothing does.
    std::string doubt() const {
        std::string text;
        if (share < 0.8)  // not for the one slice of 4 ms, of some 20, that a daemon takes
            text = format("the machine is busy: its threads had %.0f %% of their processors, so steps will be slow",
                          100 * share);
        if (median < 0.8 * fastest)
            text += format("%sproducts ran at %.0f (median) to %.0f GFLOP/s, of which the fastest counts",
                           text.empty() ? "" : "; ", median * 1e-9, fastest * 1e-9);
        return text;
    }
};
