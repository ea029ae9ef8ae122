// keel/hops.h: training data that are made as they are read, to measure what depth is for.
#pragma once

#include "folder.h"

// ----------------------------------------------------------------------------------------------------
// --train hops:K: programs made on the fly, whose queries take 1 to K lookups to answer
//
//     bfb;kak;fkf;...;2bk;1ka;3ba;...         b is f, k is a, f is k: two lookups from b lead to k
//
// A program has 2K + 1 variables, the first letters of the alphabet. Each is assigned another one, such that all of
// them make one cycle, drawn anew for each program. An assignment is a name, its value, and the name again; assignments
// come in random order, so that a lookup leads back or forth in the text. Queries follow, no two alike: a number of
// lookups, 1 to K, a name, and the answer. h lookups forwards are 2K + 1 - h backwards, which are more, so no query
// can be answered by fewer; but a query after the first may be shortened by an answer before it. Those after the first
// are there to be learnt from, and only the first of a program is measured.
//
// The loss is that of all characters, as for any text. The assignments cannot be foreseen, so most of it is entropy
// that no model removes. The name stands twice because a lookup needs two abilities at once, a value that knows whose
// it is and a query that finds the value, and neither alone lowers the loss; foreseeing the second name teaches the
// first. Without it ("kf;...;2bk;") 77 % of one lookup and none of two are right after 2500 steps of hops:2 (-L 8 -C 64
// -H 4 -b 16 -u 200 -l 6e-3), with it all of both from step 1000 on. A query says how many lookups it takes and its
// answer is a name, so that h lookups are one more than the h - 1 of another query. Where chains of names end in a
// digit and only the digit is asked for, two lookups are still at chance after 2500 steps.
struct HopPrograms {
    int hops = 0;  // K, one digit of a program; 0: the data are files

    struct Answer {
        int position, hops;  // the answer is the target at `position`, which holds the name, and takes `hops` lookups
    };

    int variables() const { return 2 * hops + 1; }
    int queries() const { return std::min(4 * hops, hops * variables()); }
    // The characters of one program, its end of line included.
    int length() const { return 4 * (variables() + queries()); }
    // The accuracy at the first query without a lookup: every other name is as likely.
    double chance() const { return 1.0 / (variables() - 1); }

    // Fills row (n) with sequence s: as many whole programs as fit, then ends of line. The characters are a function of
    // (seed, s, validation) alone: training and validation draw from counters that differ in the top bit of their third
    // word. answers gets the first answer of each program.
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
        // A random order of [0, size), of which only the first `count` places are shuffled.
        auto permutation = [&](int size, int count) {
            std::vector<int> order(static_cast<size_t>(size));
            for (int i = 0; i < size; i++) order[size_t(i)] = i;
            for (int i = 0; i < count; i++) std::swap(order[size_t(i)], order[size_t(i + below(size - i))]);
            return order;
        };
        int at = 0;
        while (at + length() <= n) {
            // The variable at place i of the cycle has the letter letter[i], and its value is the name at place i + 1.
            std::vector<int> letter = permutation(variables(), variables());
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
            fail("-i: expected hops:K with K from 1 to %d, found '%s'; a file of that name is ./%s", MAX_HOPS, word,
                 word);
        return k;
    }

    // The answers that are measured in validation sequence s, of T + 1 characters.
    std::vector<Answer> answers(uint64_t seed, uint64_t s, int T) const {
        std::vector<Answer> found;
        std::vector<int> row(size_t(T) + 1);
        sequence(seed, s, true, T + 1, row.data(), &found);
        return found;
    }
};

// How many queries of each number of lookups a validation has measured, and how many of them were answered right. Index
// 0 counts all together.
struct HopAccuracy {
    HopPrograms programs;
    std::vector<int64_t> count, right;
    explicit HopAccuracy(HopPrograms programs)
        : programs(programs), count(size_t(programs.hops) + 1), right(count.size()) {}

    void add(const HopPrograms::Answer& answer, bool is_right) {
        for (int h : {0, answer.hops}) count[size_t(h)]++, right[size_t(h)] += is_right;
    }
    double accuracy(size_t h) const { return count[h] ? double(right[h]) / double(count[h]) : NAN; }

    void print() const {
        ::print("hops       ");
        for (size_t h = 1; h < count.size(); h++) ::print("| %zu: %.1f %% ", h, 100 * accuracy(h));
        ::print("| all: %.1f %% of %lld | by chance %.1f %%\n", 100 * accuracy(0), count[0], 100 * programs.chance());
    }
    static constexpr const char* COLUMNS = "step,hops,accuracy,count";
    void write(CsvLog& csv, int64_t step) const {
        for (size_t h = 1; h < count.size(); h++)
            csv.row(format("%lld,%zu,%.6g,%lld", step, h, count[h] ? accuracy(h) : 0, count[h]));
    }
};
