// keel/divergence.h: sees from its losses that a run is failing.
#pragma once

#include "../keel_common.h"

// The three kinds of divergence that the paper's protocols count, found from the losses of the steps alone.
//
// Losses are averaged over windows of w steps, w = steps/40 from 10 to 200. Their noise s is what neighbouring steps
// differ by, a window's is s/sqrt(w). U is the unigram entropy of the data, the loss of knowing only how frequent each
// token is: a healthy run passes it within its first tens of steps, and a run whose deeper layers get no gradient stays
// there (Post-LN at L = 64: 3.17 for U = 3.16; a healthy run passes at step 30).
//
//     stagnation    ten windows after the warm-up, or twenty after the start, the means of the last five and of the
//                   five before are both at 0.98 U or above, and the former is lower by no more than 0.01 U and
//                   the noise of a window: a plateau that a healthy run has left by then
//     degradation   the same level, but still falling, after twice the warm-up and twenty windows: anomalously slow
//     instability   ten windows in a row above the lowest so far by 0.03 of it and four times their noise: a spike
//                   without a return
//
// Each kind is reported once a run.
class DivergenceDetector {
public:
    DivergenceDetector(int64_t steps, int64_t warmup, double unigram)
        : w(std::clamp<int64_t>(steps / 40, 10, 200)), warmup(warmup), unigram(unigram) {}

    // Takes the loss of the next step; one that is not finite does not count. Returns what it has found, or "".
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
        if (above >= 10 && !reported[0]) {
            reported[0] = true;
            return format("instability: the loss has been at %.3f or so since a spike %lld steps ago and does not "
                          "return to the %.3f before it; a smaller -l or a longer -u may help",
                          average(0, 5), above * w, lowest);
        }
        if (mean.size() < 10 || (step < warmup + 10 * w && mean.size() < 20) || unigram < 0.1) return "";
        double last = average(0, 5), earlier = average(5, 5);
        if (std::min(last, earlier) < 0.98 * unigram) return "";
        bool flat = last > earlier - 0.01 * unigram - noise;
        if (flat && !reported[1]) {
            reported[1] = true;
            return format("stagnation: the loss stays at %.3f, and knowing how frequent each token is gives %.3f; a "
                          "smaller -l or another --norm may help",
                          last, unigram);
        }
        if (!flat && !reported[2] && step >= 2 * warmup && mean.size() >= 20) {
            reported[2] = true;
            return format("degradation: the loss is %.3f after %lld steps, and knowing how frequent each token is "
                          "gives %.3f; another -l may help",
                          last, step, unigram);
        }
        return "";
    }

private:
    // The mean loss of `count` windows, without the last `skip`.
    double average(size_t skip, size_t count) const {
        double total = 0;
        for (size_t i = 0; i < count; i++) total += mean[mean.size() - 1 - skip - i];
        return total / double(count);
    }
    int64_t w, warmup, n = 0, above = 0;  // steps; above: windows in a row above the lowest
    double unigram, before = 0, sum = 0, squares = 0, lowest = 0;
    std::vector<double> mean;  // the loss of each whole window
    bool reported[3] = {};
};
