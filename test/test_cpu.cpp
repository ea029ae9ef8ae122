// Tests of train_keel_cpu.cpp and keel_common.h, built once in FP32 and once, with -DKEEL_FP64, in FP64.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <fstream>
#include <functional>
#include <map>
#include <numeric>
#include <sstream>

#include "train_keel_cpu.cpp"
#include "test/numbers.h"

namespace {

constexpr bool fp64 = sizeof(real) == 8;

std::vector<real> random_reals(size_t n, uint32_t seed, double scale = 1) {
    return random_numbers<real>(n, seed, scale);
}
double dot(const std::vector<real>& a, const std::vector<real>& b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); i++) sum += double(a[i]) * double(b[i]);
    return sum;
}
bool same_bits(const real* a, const real* b, size_t n) { return memcmp(a, b, n * sizeof(real)) == 0; }

std::vector<std::string> dump_files() {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator("test/dumps"))
        if (entry.path().extension() == ".bin") names.push_back(entry.path().string());
    std::sort(names.begin(), names.end());
    return names;
}

std::vector<std::map<std::string, std::string>> read_csv(const std::string& path) {
    std::ifstream file(path);
    REQUIRE_MESSAGE(file.good(), path);
    auto split = [](const std::string& line) {
        std::vector<std::string> cells;
        std::stringstream in(line);
        for (std::string cell; std::getline(in, cell, ',');) cells.push_back(cell);
        return cells;
    };
    std::string line;
    std::getline(file, line);
    auto names = split(line);
    std::vector<std::map<std::string, std::string>> rows;
    while (std::getline(file, line)) {
        auto cells = split(line);
        rows.emplace_back();
        for (size_t i = 0; i < std::min(names.size(), cells.size()); i++) rows.back()[names[i]] = cells[i];
    }
    return rows;
}

ModelConfig small_config(NormPlacement norm, int L = 6, int C = 12, int H = 3, int V = 13, int max_T = 9) {
    ModelConfig c;
    c.max_seq_len = max_T, c.V = V, c.L = L, c.H = H, c.C = C, c.norm = norm;
    c.alpha = placements[norm].alpha ? placements[norm].alpha(L) : 1;
    return c;
}

// A run of B sequences of T tokens a step.
RunConfig small_run(const ModelConfig& c, int B, int T) {
    RunConfig run;
    run.model = c, run.B = B, run.T = T, run.total_batch = int64_t(B) * T;
    return run;
}

// Gains that are not 1, so that a forgotten one shows.
void initialise_for_test(Model& model, uint64_t seed) {
    model.initialise(seed);
    for (const TensorInfo& t : model.layout.tensors)
        if (!t.decay)
            for (size_t i = 0; i < t.size(); i++)
                model.params[t.offset + i] =
                    real(0.5 + uniform24(philox(seed, uint32_t(t.offset + i), 1, 0, 79).word[0]));
}

// Central differences with h = 1e-4 along the gradient and along one random direction, relative to ||g||. The
// five-point form: the three-point one's truncation error, h^2 f'''/6, alone reaches 1.6e-6 in a small model of many
// Post-LN sub-layers.
void check_gradient(const std::string& what, real* x, const std::vector<real>& gradient,
                    const std::function<double()>& loss) {
    if (!fp64) return;
    double norm = std::sqrt(dot(gradient, gradient));
    REQUIRE_MESSAGE(norm > 0, what);
    std::vector<real> along = gradient, random = random_reals(gradient.size(), 4711);
    double length = std::sqrt(dot(random, random));
    for (size_t i = 0; i < along.size(); i++) along[i] /= real(norm), random[i] /= real(length);
    for (const auto& direction : {along, random}) {
        const double h = 1e-4;
        std::vector<real> start(x, x + gradient.size());
        auto moved = [&](double by) {
            for (size_t i = 0; i < start.size(); i++) x[i] = start[i] + real(by) * direction[i];
            return loss();
        };
        double measured = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h),
               computed = dot(gradient, direction);
        std::copy(start.begin(), start.end(), x);
        double error = std::fabs(measured - computed) / norm;
        CHECK_MESSAGE(error <= 1e-6,
                      what << ": error " << error << ", measured " << measured << ", computed " << computed);
    }
}

}  // namespace

// ----------------------------------------------------------------------------------------------------
TEST_SUITE("tools") {
    TEST_CASE("Philox4x32-10 gives the published vectors of Random123") {
        struct {
            uint32_t counter[4];
            uint64_t key;
            uint32_t expected[4];
        } vectors[] = {
            {{0, 0, 0, 0}, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
            {{~0u, ~0u, ~0u, ~0u}, ~uint64_t(0), {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
            {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
             0x299f31d0a4093822,
             {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
        };
        for (const auto& v : vectors) {
            Philox p = philox(v.key, v.counter[0], v.counter[1], v.counter[2], v.counter[3]);
            for (int i = 0; i < 4; i++) CHECK(p.word[i] == v.expected[i]);
        }
    }

    TEST_CASE("The CRC-32 is zlib's: check value of '123456789', any split, any alignment") {
        CHECK(crc32("123456789", 9) == 0xCBF43926u);
        std::string text(1000, 'x');
        for (size_t i = 0; i < text.size(); i++) text[i] = char(i * 37);
        uint32_t whole = crc32(text.data(), text.size());
        for (size_t cut : {1, 7, 8, 9, 333, 999})
            CHECK(crc32(text.data() + cut, text.size() - cut, crc32(text.data(), cut)) == whole);
    }

    TEST_CASE("The exponential is right to 1.5 units in the last place, and at its ends") {
        double worst = 0, lowest = fp64 ? -707 : -86.9, highest = fp64 ? 709 : 88;
        for (int i = 0; i <= 200000; i++) {
            real x = real(lowest + (highest - lowest) * i / 200000);
            long double exact = expl((long double)x);
            real ulp = std::nextafter(real(exact), std::numeric_limits<real>::infinity()) - real(exact);
            worst = std::max(worst, double(fabsl((long double)exponential(x) - exact) / (long double)ulp));
        }
        CHECK_MESSAGE(worst <= 1.5, "worst error " << worst << " ulp");
        CHECK(exponential(0) == 1);
        CHECK(exponential(-std::numeric_limits<real>::infinity()) == 0);
        CHECK(exponential(real(1e30)) == std::numeric_limits<real>::infinity());
        CHECK(std::isnan(exponential(std::numeric_limits<real>::quiet_NaN())));
    }

    TEST_CASE("The learning rate warms up linearly, peaks at W and ends at 1e-7 on a cosine") {
        RunConfig run;
        run.lr = 1e-2, run.warmup = 10, run.steps = 110;
        CHECK(learning_rate(run, 1) == doctest::Approx(1e-3));
        CHECK(learning_rate(run, 10) == doctest::Approx(1e-2));
        CHECK(learning_rate(run, 60) == doctest::Approx(0.5 * (1e-2 + 1e-7)));
        CHECK(learning_rate(run, 110) == doctest::Approx(1e-7));
        run.warmup = 0;
        CHECK(learning_rate(run, 1) < 1e-2);
    }
}

// ----------------------------------------------------------------------------------------------------
TEST_SUITE("tables") {
    TEST_CASE("Each norm placement's rows are those of the definition") {
        auto row = [](NormPlacement norm, int L, int l) {
            SublayerNorm s = small_config(norm, L).sublayer(l);
            return format("%g%s%s%s", double(s.alpha), s.norm_in ? " in" : "", s.norm_out ? " out" : "",
                          s.norm_qkv ? " qkv" : "");
        };
        CHECK(row(KEEL, 64, 0) == "1 in");
        CHECK(row(KEEL, 64, 1) == "1 in out");
        CHECK(row(KEEL, 64, 2) == "64 in out");
        CHECK(row(KEEL, 64, 63) == "64 in out");
        CHECK(row(PRE, 64, 0) == "1 in");
        CHECK(row(PRE, 64, 63) == "1 in");
        CHECK(row(POST, 64, 0) == "1 out");
        CHECK(row(POST, 64, 63) == "1 out");
        CHECK(row(DEEPNORM, 16, 0) == "2 out");
        CHECK(row(DEEPNORM, 16, 15) == "2 out");
        CHECK(row(SCALEDPOST, 64, 0) == "64 out");
        CHECK(row(HYBRIDNORM, 64, 0) == "1 out qkv");
        CHECK(row(HYBRIDNORM, 64, 1) == "1");
        // Mix-LN at L = 64: 8 of 32 blocks, so sub-layers 0..15
        CHECK(row(MIXLN, 64, 15) == "1 out");
        CHECK(row(MIXLN, 64, 16) == "1 in");
        CHECK(row(MIXLN, 4, 1) == "1 out");
        CHECK(row(MIXLN, 4, 2) == "1 in");
        std::string final_norms;
        for (const PlacementRow& p : placements) final_norms += p.norm_final ? '1' : '0';
        CHECK(final_norms == "0100110");
    }

    TEST_CASE("Parameters stand in the documented order, a gain that is not used does not exist") {
        auto names = [](NormPlacement norm) {
            std::string all;
            for (const TensorInfo& t : ParameterLayout(small_config(norm, 4)).tensors) all += t.name + " ";
            return all;
        };
        CHECK(names(KEEL) == "wte wpe gamma_in[0] qkvw[0] attprojw[0] gamma_in[1] fcw[1] fcprojw[1] gamma_out[1] "
                             "gamma_in[2] qkvw[2] "
                             "attprojw[2] gamma_out[2] gamma_in[3] fcw[3] fcprojw[3] gamma_out[3] ");
        CHECK(names(HYBRIDNORM) == "wte wpe qkvw[0] gamma_q[0] gamma_k[0] gamma_v[0] attprojw[0] gamma_out[0] fcw[1] "
                                   "fcprojw[1] qkvw[2] gamma_q[2] gamma_k[2] gamma_v[2] attprojw[2] gamma_out[2] "
                                   "fcw[3] fcprojw[3] gamma_final ");
        CHECK(names(POST) == "wte wpe qkvw[0] attprojw[0] gamma_out[0] fcw[1] fcprojw[1] gamma_out[1] qkvw[2] "
                             "attprojw[2] gamma_out[2] fcw[3] fcprojw[3] gamma_out[3] ");
    }

    TEST_CASE("Initial weights have the bits of the reference's, in every build") {
        for (auto& row : read_csv("test/dumps/init.csv")) {
            ModelConfig c = small_config(placement_by_name(row["norm"]), std::stoi(row["L"]), std::stoi(row["C"]),
                                         std::stoi(row["H"]), std::stoi(row["V"]), std::stoi(row["max_T"]));
            c.alpha = std::stof(row["alpha"]);
            ParameterLayout layout(c);
            bool found = false;
            for (size_t i = 0; i < layout.tensors.size(); i++) {
                const TensorInfo& t = layout.tensors[i];
                if (t.name != row["tensor"]) continue;
                std::vector<real> values(t.size());
                initialise_tensor(values.data(), t, i, std::stoull(row["seed"]), 0, t.rows);
                std::vector<float> floats(values.begin(), values.end());
                CHECK_MESSAGE(format("%08x", crc32(floats.data(), floats.size() * 4)) == row["crc32"],
                              row["norm"] << " " << t.name);
                found = true;
            }
            CHECK_MESSAGE(found, row["tensor"]);
        }
    }

    TEST_CASE("Initial weights have variance 1/fan_in and stay inside their bound") {
        ModelConfig c = small_config(DEEPNORM, 16, 64, 2, 256, 64);
        Model model(c, 1, 1, {0});
        model.initialise(5);
        for (const TensorInfo& t : model.layout.tensors) {
            if (!t.decay) continue;
            double largest = 0;
            for (size_t i = 0; i < t.tail_row * t.cols; i++)
                largest = std::max(largest, std::fabs(double(model.params[t.offset + i])));
            double variance =
                sum_of_squares(model.params.data() + t.offset, t.tail_row * t.cols) / double(t.tail_row * t.cols);
            CHECK(largest <= t.bound);
            // the variance of n uniform numbers scatters by sqrt(0.8/n), here under 1.5 %
            CHECK_MESSAGE(variance * 3 / (t.bound * t.bound) == doctest::Approx(1).epsilon(0.06), t.name);
        }
        const TensorInfo& qkvw = model.layout.tensors[2];
        double v_rows = sum_of_squares(model.params.data() + qkvw.offset + 2 * 64 * 64, 64 * 64) / (64 * 64);
        CHECK(v_rows == doctest::Approx(1.0 / 64 / 4).epsilon(0.06));  // L^-0.25 = 1/2 on V alone
    }

    TEST_CASE("-L alone chooses a whole: width L/4 from 64 on, and -L 1024 is the GPU's default model") {
        Options o;
        o.layers = 1024;
        RunConfig run = resolve_run(o, nullptr, {256});
        CHECK(run.model.C == 256);
        CHECK(run.model.H == 4);
        CHECK(run.T == 1024);
        CHECK(run.total_batch == 65536);
        CHECK(run.model.alpha == 1024.0f);
        for (int L : {2, 16, 64, 128, 256, 512, 2048}) {
            o.layers = L;
            run = resolve_run(o, nullptr, {256});
            CHECK(run.model.C % 64 == 0);
            CHECK(run.model.C % run.model.H == 0);
            CHECK(run.total_batch % run.T == 0);
        }
    }

    TEST_CASE("The learning rate warms up and falls by each schedule to its final rate") {
        Settings s;
        s.steps = 100, s.warmup = 20, s.lr = 0.01;
        auto rates = [&](int64_t schedule, double final_lr, int64_t decay_steps) {
            s.schedule = schedule, s.final_lr = final_lr, s.decay_steps = decay_steps;
            return std::vector{learning_rate(s, 5),  learning_rate(s, 20), learning_rate(s, 40),
                               learning_rate(s, 60), learning_rate(s, 90), learning_rate(s, 100)};
        };
        auto close = [](const std::vector<double>& found, const std::vector<double>& expected) {
            for (size_t i = 0; i < found.size(); i++) CHECK(found[i] == doctest::Approx(expected[i]).epsilon(1e-12));
        };
        double c = (1 + std::sqrt(0.5)) / 2;  // of the cosine, at a quarter
        double e = (1 - std::cos(M_PI / 8)) / 2;
        close(rates(COSINE, 0.1, 0), {0.0025, 0.01, 0.001 + 0.009 * c, 0.0055, 0.001 + 0.009 * e, 0.001});
        close(rates(LINEAR, 0.1, 0), {0.0025, 0.01, 0.00775, 0.0055, 0.002125, 0.001});
        close(rates(WSD, 0.1, 0), {0.0025, 0.01, 0.01, 0.01, 0.001 + 0.009 * (1 - std::sqrt(0.5)), 0.001});
        close(rates(WSD, 0, 80), {0.0025, 0.01, 1e-7 + (0.01 - 1e-7) / 2, 1e-7 + (0.01 - 1e-7) * (1 - std::sqrt(0.5)),
                                  1e-7 + (0.01 - 1e-7) * (1 - std::sqrt(0.875)), 1e-7});
        close(rates(WSD, 1, 1000), {0.0025, 0.01, 0.01, 0.01, 0.01, 0.01});  // the decay starts after the warm-up
        close(rates(CONSTANT, 0, 0), {0.0025, 0.01, 0.01, 0.01, 0.01, 0.01});
        CHECK(rates(COSINE, 0, 0).back() == 1e-7);
        s.lr = 0;
        CHECK(rates(COSINE, 0, 0).back() == 0);
    }

    TEST_CASE("An outlier lies so many standard deviations above the mean of recent steps, and moves it little") {
        std::vector<double> losses;
        RecentSteps recent{};
        double sum = 0, squares = 0;
        for (uint32_t i = 0; i < 64; i++) {
            losses.push_back(3 + 0.1 * uniform24(philox(1, i, 0, 0, 0).word[0]));
            recent.add(i == 5 ? 1e9 : losses[i], losses[i], 0, 0);
            sum += losses[i], squares += losses[i] * losses[i];
        }
        double n = double(losses.size()), mean = sum / n, sd = std::sqrt(squares / n - mean * mean);
        CHECK(recent.grad.mean == doctest::Approx(mean).epsilon(1e-12));
        CHECK(recent.grad.variance == doctest::Approx(sd * sd).epsilon(1e-9));
        CHECK(recent.loss.mean > 1e6);
        recent.loss = recent.grad;
        CHECK(recent.add(1e9, mean, 4, 4));  // too early to tell
        recent.loss = recent.grad, recent.count = RecentSteps::ENOUGH, mean = recent.grad.mean;
        sd = std::sqrt(recent.grad.variance);
        for (double z : {-9.0, 3.9, 4.1}) {
            RecentSteps by_loss = recent, by_grad = recent, not_asked = recent;
            CHECK(by_loss.add(mean + z * sd, mean, 4, 0) == (z < 4));
            CHECK(by_grad.add(mean, mean + z * sd, 0, 4) == (z < 4));
            CHECK(not_asked.add(mean + z * sd, mean + z * sd, 0, 0));
        }
        RecentSteps after = recent;
        CHECK(!after.add(1e6, 1e6, 4, 4));
        CHECK(std::fabs(after.loss.mean - mean) < 0.1 * sd);
        CHECK(after.loss.variance == doctest::Approx(sd * sd).epsilon(0.15));
        int skipped = 0;
        while (!after.add(mean + 6 * sd, mean, 4, 0)) skipped++;  // a new level, not a spike
        CHECK(skipped > 1);
        CHECK(skipped < 50);
        RecentSteps flat{};
        for (int i = 0; i < 300; i++) CHECK(flat.add(2, 2, 1e-6, 1e-6));
    }

    TEST_CASE("Bytes and tokens beyond 2^32 are counted, and what a build cannot address is refused") {
        ModelConfig c = small_config(KEEL, 64, 512, 8, 256, 4096);
        double z = 65.0 * 64 * 4096 * 512 * sizeof(real);  // of a micro-batch of 64 sequences
        CHECK(double(Model::bytes(c, ParameterLayout(c), 64, 4096, {0})) > z);
        CHECK(double(debug_state_bytes<real>(c, 64, 4096)) > 2 * z);
        CHECK(double(TokenGenerator::bytes(c, 1 << 22)) > 32.0 * (1 << 22) * 3 * 512 * sizeof(real));

        c = small_config(PRE, 1024, 1024, 8, 256, 1024);
        uint64_t count = 1024 * (12 * uint64_t(512) * 1024 + 256 + 1024 + 1024 + 1);
        CHECK(parameter_count(c) == count);
        CHECK(expected_file_size(make_header(FILE_MODEL, REAL_FP32, c, 0)) == 1024 + 4 * count + 4);
        std::string refused = SIZE_MAX < count ? "memory: expected at least 4" : "";
        CHECK(error_of([&] { ParameterLayout layout(c); }).substr(0, 27) == refused);

        std::array flags{"train", "-L", "2", "-C", "131072", "-t", "16777216"};
        CHECK(resolve_run(parse_command_line(int(flags.size()), flags.data()), nullptr, {256}).total_batch ==
              int64_t(1) << 39);
    }
}

// ----------------------------------------------------------------------------------------------------
TEST_SUITE("matrix product") {
    TEST_CASE("All three forms agree with the definition at odd and at blocked shapes") {
        struct {
            int M, N, K;
        } shapes[] = {{1, 1, 1}, {7, 5, 3}, {13, 33, 257}, {145, 65, 300}, {64, 2100, 20}, {300, 64, 513}};
        for (auto [m_, n_, k_] : shapes) {  // copies: clang 14 lets no lambda, as of CHECK, hold a binding
            auto M = m_, N = n_, K = k_;
            auto a = random_reals(size_t(M * K), 1), b = random_reals(size_t(K * N), 2),
                 start = random_reals(size_t(M * N), 3);
            std::vector<real> at(a.size()), bt(b.size());
            for (int i = 0; i < M; i++)
                for (int k = 0; k < K; k++) at[size_t(k * M + i)] = a[size_t(i * K + k)];
            for (int k = 0; k < K; k++)
                for (int j = 0; j < N; j++) bt[size_t(j * K + k)] = b[size_t(k * N + j)];
            Matrix forms_a[] = {row_major(a.data(), size_t(K)), row_major(at.data(), size_t(M)).transposed()};
            Matrix forms_b[] = {row_major(b.data(), size_t(N)), row_major(bt.data(), size_t(K)).transposed()};
            for (bool accumulate : {false, true}) {
                std::vector<real> expected(start.size());
                for (int i = 0; i < M; i++)
                    for (int j = 0; j < N; j++) {
                        double sum = accumulate ? double(start[size_t(i * N + j)]) : 0;
                        for (int k = 0; k < K; k++) sum += double(a[size_t(i * K + k)]) * double(b[size_t(k * N + j)]);
                        expected[size_t(i * N + j)] = real(sum);
                    }
                for (auto& fa : forms_a)
                    for (auto& fb : forms_b) {
                        std::vector<real> c = start, small = start;
                        product(size_t(M), size_t(N), size_t(K), fa, fb, c.data(), size_t(N), accumulate);
                        double error = relative_error(expected, c);
                        CHECK_MESSAGE(error < (fp64 ? 1e-14 : 2e-6), M << "x" << N << "x" << K << " error " << error);
                        std::vector<real> panels(size_t(N + TILE_N) * size_t(K));
                        Tiles tiles = fb.col == 1 ? b_tiles(fb, N, K, panels.data()) : pack_b(fb, N, K, panels.data());
                        multiply_block(M, N, K, a_tiles(fa), tiles, small.data(), size_t(N), !accumulate);
                        CHECK_MESSAGE(same_bits(small.data(), c.data(), c.size()),
                                      "one thread against all: " << M << "x" << N << "x" << K);
                    }
            }
        }
    }

    TEST_CASE("A row of the result has the same bits whatever stands beside it, and for any number of threads") {
        int M = 200, N = 150, K = 600, before = omp_get_max_threads();
        auto a = random_reals(size_t(M * K), 1), b = random_reals(size_t(K * N), 2);
        std::vector<real> c(size_t(M * N)), again(c.size());
        product(size_t(M), size_t(N), size_t(K), row_major(a.data(), size_t(K)), row_major(b.data(), size_t(N)),
                c.data(), size_t(N), false);
        for (int threads : {1, 2, 3, 7, 16}) {
            omp_set_num_threads(threads);
            product(size_t(M), size_t(N), size_t(K), row_major(a.data(), size_t(K)), row_major(b.data(), size_t(N)),
                    again.data(), size_t(N), false);
            CHECK_MESSAGE(same_bits(c.data(), again.data(), c.size()), threads << " threads");
        }
        omp_set_num_threads(before);
        product(1, size_t(N), size_t(K), row_major(&a[size_t(57 * K)], size_t(K)), row_major(b.data(), size_t(N)),
                again.data(), size_t(N), false);
        CHECK(same_bits(&c[size_t(57 * N)], again.data(), size_t(N)));
    }
}

// ----------------------------------------------------------------------------------------------------
TEST_SUITE("matrix rate") {
    TEST_CASE("The rate is of the fastest product's working time, and what makes it unsure is said") {
        MatrixRate alone = MatrixRate::of(1e9, {0.012, 0.010, 0.011}, {0.012, 0.010, 0.011});
        CHECK(alone.fastest == doctest::Approx(100e9));
        CHECK(alone.median == doctest::Approx(1e9 / 0.011));
        CHECK(alone.share == 1);
        CHECK(alone.doubt() == "");

        MatrixRate busy = MatrixRate::of(1e9, {0.012, 0.010, 0.011}, {0.012, 0.050, 0.031});
        CHECK(busy.fastest == alone.fastest);
        CHECK(busy.doubt() == "the machine is busy: its threads had 35 % of their processors, so steps will be slow");
        MatrixRate uneven = MatrixRate::of(1e9, {0.020, 0.010, 0.018}, {0.020, 0.010, 0.018});
        CHECK(uneven.doubt() == "products ran at 56 (median) to 100 GFLOP/s, of which the fastest counts");

        // A system that counts in ticks longer than a product: 0 or a whole tick.
        MatrixRate ticks = MatrixRate::of(1e9, {0, 0.010, 0}, {0.005, 0.004, 0.004});
        CHECK(ticks.fastest == doctest::Approx(250e9));
        CHECK(ticks.share == 1);

        MatrixRate both = MatrixRate::together({alone, uneven});
        CHECK(both.fastest == doctest::Approx(200e9));
        CHECK(both.median == doctest::Approx(alone.median + uneven.median));
        CHECK(MatrixRate::together({alone, busy}).share == doctest::Approx((1 + 0.033 / 0.093) / 2));
    }

    TEST_CASE("More threads or ranks than processors do not raise the machine's rate") {
        int threads = omp_get_max_threads(), processors = omp_get_num_procs();  // that this process may use
        int online = int(sysconf(_SC_NPROCESSORS_ONLN)), ranks = 4 * online;
        omp_set_num_threads(processors);
        double rate = product_rate().fastest, of_a_rank = product_rate(ranks).fastest;
        omp_set_num_threads(4 * processors);
        double crowded = product_rate().fastest;
        omp_set_num_threads(threads);
        INFO(rate << " operations a second, of " << ranks << " ranks: " << of_a_rank
                  << ", of 4 threads each: " << crowded);
        CHECK(crowded < 2 * rate);  // 4 times without the limit; processors that share a core halve the other
        CHECK(of_a_rank * ranks < 2 * rate / processors * online);
    }
}

TEST_SUITE("layers") {
    TEST_CASE("Embedding: central differences, and tokens that occur twice") {
        int B = 2, T = 5, C = 6, V = 7;
        auto wte = random_reals(size_t(V * C), 1), wpe = random_reals(size_t(T * C), 2),
             w = random_reals(size_t(B * T * C), 3);
        std::vector<int> tokens = {1, 1, 3, 6, 1, 0, 3, 3, 5, 1};
        std::vector<real> x(w.size()), dwte(wte.size()), dwpe(wpe.size());
        auto loss = [&] {
            embedding_forward(x.data(), tokens.data(), wte.data(), wpe.data(), B, T, C, 0);
            return dot(x, w);
        };
        loss();
        CHECK(x[size_t(C) + 2] ==
              doctest::Approx(double(std::sqrt(real(C)) * (wte[size_t(C) + 2] + wpe[size_t(C) + 2]))));
        embedding_backward(dwte.data(), dwpe.data(), w.data(), tokens.data(), B, T, C);
        check_gradient("wte", wte.data(), dwte, loss);
        check_gradient("wpe", wpe.data(), dwpe, loss);
    }

    TEST_CASE("RMSNorm: central differences, rows of one channel and gain blocks that do not fill") {
        for (auto [rows_, C_] : {std::pair<size_t, int>{3, 1}, {1, 33}, {75, 10}}) {
            auto rows = rows_;
            auto C = C_;
            auto x = random_reals(rows * size_t(C), 1), g = random_reals(size_t(C), 2), w = random_reals(x.size(), 3);
            std::vector<real> y(x.size()), dx(x.size()), dg(g.size()),
                partial(gain_blocks(rows) * size_t(C), real(NAN));
            auto loss = [&] {
                rmsnorm_forward(y.data(), x.data(), g.data(), rows, C);
                return dot(y, w);
            };
            loss();
            rmsnorm_backward(dx.data(), dg.data(), w.data(), x.data(), g.data(), rows, C, partial.data());
            if (C > 1) check_gradient("x", x.data(), dx, loss);  // of one channel the norm keeps the sign alone
            check_gradient("gamma", g.data(), dg, loss);
            auto in_place = w;
            std::vector<real> dg2(g.size());
            rmsnorm_backward(in_place.data(), dg2.data(), in_place.data(), x.data(), g.data(), rows, C, partial.data());
            CHECK(same_bits(in_place.data(), dx.data(), dx.size()));
        }
    }

    TEST_CASE("HybridNorm's per-head norms of q, k and v: central differences") {
        size_t rows = 37;
        int H = 2, D = 5;
        auto x = random_reals(rows * 30, 1), w = random_reals(x.size(), 3), gq = random_reals(5, 4),
             gk = random_reals(5, 5), gv = random_reals(5, 6);
        const real* const g[] = {gq.data(), gk.data(), gv.data()};
        std::vector<real> y(x.size()), dq(5), dk(5), dv(5), partial(gain_blocks(rows) * 15, real(NAN));
        real* const dg[] = {dq.data(), dk.data(), dv.data()};
        auto loss = [&] {
            qkv_norm_forward(y.data(), x.data(), g, rows, H, D);
            return dot(y, w);
        };
        loss();
        auto dx = w;
        qkv_norm_backward(dx.data(), dg, x.data(), g, rows, H, D, partial.data());
        check_gradient("qkv", x.data(), dx, loss);
        check_gradient("gamma_q", gq.data(), dq, loss);
        check_gradient("gamma_k", gk.data(), dk, loss);
        check_gradient("gamma_v", gv.data(), dv, loss);
    }

    TEST_CASE("Matmul: central differences, and a gradient that adds to what is there") {
        size_t rows = 19;
        int K = 7, N = 35;
        auto x = random_reals(rows * size_t(K), 1), w = random_reals(size_t(N * K), 2),
             weight = random_reals(rows * size_t(N), 3);
        std::vector<real> y(weight.size()), dx(x.size()), dw(w.size());
        auto loss = [&] {
            matmul_forward(y.data(), x.data(), w.data(), rows, K, N);
            return dot(y, weight);
        };
        matmul_backward(dx.data(), dw.data(), weight.data(), x.data(), w.data(), rows, K, N);
        check_gradient("input", x.data(), dx, loss);
        check_gradient("weight", w.data(), dw, loss);
        auto once = dw;
        matmul_backward(dx.data(), dw.data(), weight.data(), x.data(), w.data(), rows, K, N);
        for (real& value : once) value *= 2;
        CHECK(relative_error(once, dw) < (fp64 ? 1e-15 : 1e-6));
    }

    TEST_CASE("Attention agrees with softmax(q k^T / sqrt(D)) v written out, across tiles and for one channel a head") {
        struct {
            int B, T, C, H;
        } shapes[] = {{2, 5, 6, 2}, {1, 64, 8, 1}, {1, 65, 6, 3}, {2, 150, 6, 6}, {1, 1, 4, 1}};
        for (auto [b_, t_, c_, h_] : shapes) {
            auto B = b_, T = t_, C = c_, H = h_;
            int D = C / H;
            auto qkv = random_reals(size_t(B * T * 3 * C), 1, 3);
            std::vector<real> y(size_t(B * T * C)), lse(size_t(B * T * H)), expected(y.size());
            attention_forward(y.data(), lse.data(), qkv.data(), B, T, C, H, 0);
            for (int b = 0; b < B; b++)
                for (int h = 0; h < H; h++)
                    for (int t = 0; t < T; t++) {
                        auto at = [&](int part, int time, int d) {
                            return double(qkv[size_t(((b * T + time) * 3 + part) * C + h * D + d)]);
                        };
                        std::vector<double> p;
                        double sum = 0;
                        for (int j = 0; j <= t; j++) {
                            double s = 0;
                            for (int d = 0; d < D; d++) s += at(0, t, d) * at(1, j, d);
                            p.push_back(std::exp(s / std::sqrt(double(D)))), sum += p.back();
                        }
                        for (int d = 0; d < D; d++) {
                            double value = 0;
                            for (int j = 0; j <= t; j++) value += p[size_t(j)] / sum * at(2, j, d);
                            expected[size_t((b * T + t) * C + h * D + d)] = real(value);
                        }
                        CHECK(double(lse[size_t((b * T + t) * H + h)]) ==
                              doctest::Approx(std::log(sum)).epsilon(fp64 ? 1e-12 : 1e-5));
                    }
            double error = relative_error(expected, y);
            CHECK_MESSAGE(error < (fp64 ? 1e-14 : 2e-6), "T " << T << " error " << error);
        }
    }

    TEST_CASE("Attention: central differences of q, k and v, across tiles and for one channel a head") {
        struct { int B, T, C, H; } shapes[] = {{2, 5, 6, 2}, {1, 70, 6, 3}, {1, 9, 3, 3}, {1, 130, 4, 1}};
        for (auto [b_, t_, c_, h_] : shapes) {
            auto B = b_, T = t_, C = c_, H = h_;
            auto qkv = random_reals(size_t(B * T * 3 * C), 1), w = random_reals(size_t(B * T * C), 2);
            std::vector<real> y(w.size()), lse(size_t(B * T * H)), dqkv(qkv.size(), real(NAN));
            auto loss = [&] {
                attention_forward(y.data(), lse.data(), qkv.data(), B, T, C, H, 0);
                return dot(y, w);
            };
            loss();
            attention_backward(dqkv.data(), w.data(), qkv.data(), y.data(), lse.data(), B, T, C, H);
            check_gradient("qkv", qkv.data(), dqkv, loss);
            // q alone, as its gradient is smaller than v's
            std::vector<real> q_only = dqkv;
            for (size_t i = 0; i < q_only.size(); i++)
                if (i % size_t(3 * C) >= size_t(2 * C)) q_only[i] = 0;
            if (fp64 && T > 1) {
                double norm = std::sqrt(dot(q_only, q_only));
                auto start = qkv;
                auto moved = [&](double by) {
                    for (size_t i = 0; i < qkv.size(); i++) qkv[i] = start[i] + real(by / norm) * q_only[i];
                    return loss();
                };
                double measured = (moved(1e-4) - moved(-1e-4)) / 2e-4;
                CHECK(std::fabs(measured - norm) / norm < 1e-6);
            }
        }
    }

    TEST_CASE("GELU: central differences, and the tanh form's values") {
        auto h = random_reals(101, 1, 6), w = random_reals(101, 2);
        std::vector<real> y(101);
        auto loss = [&] {
            gelu_forward(y.data(), h.data(), 101);
            return dot(y, w);
        };
        loss();
        for (size_t i = 0; i < 101; i++) {
            double v = double(h[i]),
                   exact = 0.5 * v * (1 + std::tanh(std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
            CHECK(double(y[i]) == doctest::Approx(exact).epsilon(fp64 ? 1e-12 : 1e-5));
        }
        auto dh = w;
        gelu_backward(dh.data(), h.data(), 101);
        check_gradient("h", h.data(), dh, loss);
        std::vector<real> far = {real(-1e4), real(1e4)}, out(2);
        gelu_forward(out.data(), far.data(), 2);
        CHECK(out[0] == 0);
        CHECK(out[1] == real(1e4));
    }

    TEST_CASE("Cross entropy: central differences; padded columns are neither read nor written") {
        size_t rows = 5;
        int V = 11, Vp = 128;
        auto logits = random_reals(rows * size_t(Vp), 1, 5);
        for (size_t i = 0; i < rows; i++) std::fill(&logits[i * 128 + 11], &logits[i * 128] + 128, real(NAN));
        std::vector<int> targets = {0, 10, 3, 3, 7};
        std::vector<real> losses(rows), lse(rows);
        auto loss = [&] {
            cross_entropy_forward(losses.data(), lse.data(), logits.data(), targets.data(), rows, V, Vp);
            return 0.25 * std::accumulate(losses.begin(), losses.end(), 0.0);
        };
        loss();
        auto dlogits = logits;
        cross_entropy_backward(dlogits.data(), lse.data(), targets.data(), rows, V, Vp, real(0.25));
        for (size_t i = 0; i < rows; i++) {
            std::vector<real> row(&dlogits[i * 128], &dlogits[i * 128] + 11);
            CHECK(std::fabs(std::accumulate(row.begin(), row.end(), 0.0)) < (fp64 ? 1e-15 : 1e-6));
            check_gradient("logits", &logits[i * 128], row, loss);
            CHECK(std::isnan(dlogits[i * 128 + 11]));
        }
    }

    TEST_CASE("The highway: z, its norm, and the shortcut's gradient") {
        size_t rows = 4;
        int C = 6;
        auto x0 = random_reals(24, 1), f = random_reals(24, 2), g = random_reals(6, 3), w = random_reals(24, 4);
        std::vector<real> z(24), x(24), dg(6), partial(6);
        auto loss = [&] {
            x = x0;
            highway_forward(x.data(), z.data(), f.data(), g.data(), real(2.5), rows, C);
            return dot(x, w);
        };
        loss();
        auto dz = w;
        rmsnorm_backward(dz.data(), dg.data(), dz.data(), z.data(), g.data(), rows, C, partial.data());
        check_gradient("f", f.data(), dz, loss);
        check_gradient("gamma", g.data(), dg, loss);
        std::vector<real> none(24, 0);
        shortcut_backward(dz.data(), dz.data(), none.data(), real(2.5), 24);
        check_gradient("x", x0.data(), dz, loss);
    }
}

// ----------------------------------------------------------------------------------------------------
TEST_SUITE("model") {
    TEST_CASE("Every tensor's gradient agrees with central differences, in all placements") {
        if (!fp64) return;
        for (int p = 0; p < NUM_PLACEMENTS; p++) {
            ModelConfig c = small_config(NormPlacement(p), p == MIXLN ? 16 : 6);
            int B = 2, T = 7;
            Model model(c, B, T, {0});
            initialise_for_test(model, 3);
            auto tokens = random_tokens(14, c.V, 1), targets = random_tokens(14, c.V, 2);
            model.forward_backward(tokens.data(), targets.data(), B, real(1.0 / 14));
            for (const TensorInfo& t : model.layout.tensors) {
                std::vector<real> gradient(model.grads.data() + t.offset, model.grads.data() + t.offset + t.size());
                check_gradient(std::string(placements[p].name) + " " + t.name, model.params.data() + t.offset, gradient,
                               [&] { return model.evaluate(tokens.data(), targets.data(), B) / 14; });
            }
        }
    }

    TEST_CASE("Forward and backward agree with PyTorch's float64 autograd, tensor by tensor, in every dump") {
        auto files = dump_files();
        REQUIRE(files.size() >= 14);
        std::set<int> seen;
        for (const std::string& path : files) {
            DebugState<real> file = DebugState<real>::read(path), ours;
            int B = file.header.word[H_B], T = file.header.word[H_T];
            seen.insert(file.header.word[H_NORM]);
            Trainer trainer(small_run(file.header.model(), B, T));
            std::copy(file.params.begin(), file.params.end(), trainer.model.params.data());
            ours.tokens = file.tokens, ours.targets = file.targets;
            trainer.debug_pass(ours, B, T);
            for (const CheckRow& row : compare_debug_states(file, ours)) {
                CHECK_MESSAGE(row.ok(),
                              path << " " << row.name << ": error " << row.error << ", allowed " << row.tolerance);
                // what a right computation stays under, well inside the tolerance
                CHECK_MESSAGE(row.error <= (fp64 ? 1e-12 : 1e-5), path << " " << row.name << ": error " << row.error);
            }
        }
        CHECK(seen.size() == NUM_PLACEMENTS);
    }

    TEST_CASE("Ten AdamW steps give PyTorch's losses and gradient norms") {
        std::unique_ptr<Model> model;
        DebugState<real> state;
        std::string current;
        double worst = 0;
        size_t rows_seen = 0;
        for (auto& row : read_csv("test/dumps/adamw.csv")) {
            if (row["dump"] != current) {
                current = row["dump"];
                state = DebugState<real>::read("test/dumps/" + current + ".bin");
                model = std::make_unique<Model>(state.header.model(), state.header.word[H_B], state.header.word[H_T],
                                                Recompute{0});
                std::copy(state.params.begin(), state.params.end(), model->params.data());
            }
            RunConfig run;
            run.lr = std::stod(row["peak_lr"]), run.warmup = std::stoll(row["warmup"]),
            run.steps = std::stoll(row["steps"]);
            run.weight_decay = std::stod(row["weight_decay"]), run.clip = std::stod(row["clip"]);
            double tokens = double(state.tokens.size());
            double loss =
                model->forward_backward(state.tokens.data(), state.targets.data(), model->B, real(1 / tokens)) / tokens;
            double norm = gradient_norm(*model);
            adamw_update(*model, run, std::stoll(row["step"]), norm);
            CHECK(learning_rate(run, std::stoll(row["step"])) == doctest::Approx(std::stod(row["lr"])).epsilon(1e-13));
            double error = std::max(std::fabs(loss / std::stod(row["loss"]) - 1),
                                    std::fabs(norm / std::stod(row["grad_norm"]) - 1) / 10);
            worst = std::max(worst, error), rows_seen++;
            CHECK_MESSAGE(error <= (fp64 ? 1e-10 : 1e-5), current << " step " << row["step"] << ": loss " << loss
                                                                  << " for " << row["loss"] << ", norm " << norm
                                                                  << " for " << row["grad_norm"]);
        }
        CHECK(rows_seen == 40);
        MESSAGE("largest relative error of a loss: " << worst);
    }

    TEST_CASE("The probe's figures are PyTorch's: rms, same_x, the shortcut's gains, gradients of x and F, and norms "
              "of every tensor, in two steps of AdamW") {
        std::unique_ptr<Model> model;
        DebugState<real> state;
        std::unique_ptr<StepProbe> probe;
        std::vector<SublayerFigures> figures;
        std::string current;
        double worst = 0;
        size_t rows_seen = 0;
        for (const char* file : {"probe.csv", "probe_weights.csv"})
            for (auto& row : read_csv(std::string("test/dumps/") + file)) {
                if (std::string at = file + row["dump"] + row["step"]; at != current) {
                    if (row["step"] == "1") {
                        state = DebugState<real>::read("test/dumps/" + row["dump"] + ".bin");
                        // A level that runs the forward pass again: it must not be probed twice.
                        model = std::make_unique<Model>(state.header.model(), state.header.word[H_B],
                                                        state.header.word[H_T], Recompute{2});
                        std::copy(state.params.begin(), state.params.end(), model->params.data());
                    }
                    current = at;
                    RunConfig run;
                    run.lr = std::stod(row["peak_lr"]), run.warmup = 0, run.steps = 10, run.weight_decay = 0.01,
                    run.clip = 2, run.model = model->config, run.total_batch = int64_t(state.tokens.size());
                    probe = std::make_unique<StepProbe>(model->config);
                    model->probe = probe.get();
                    model->forward_backward(state.tokens.data(), state.targets.data(), model->B,
                                            real(1.0 / double(state.tokens.size())));
                    model->probe_parameters(0);
                    adamw_update(*model, run, std::stoll(row["step"]), gradient_norm(*model));
                    figures = sublayer_figures(run, model->layout, *probe);
                }
                auto compare = [&](const char* column, double found) {
                    double error = std::fabs(found / std::stod(row[column]) - 1);
                    worst = std::max(worst, error);
                    // PyTorch's figures have 17 digits. Adam divides by the root of the second moment: an element whose
                    // gradient is as small as its rounding moves by the same as any other.
                    CHECK_MESSAGE(error <= (fp64                                   ? 1e-9
                                            : std::string(column) == "update_norm" ? 1e-3
                                                                                   : 1e-4),
                                  file << " " << row["dump"] << " step " << row["step"] << " sub-layer "
                                       << row["sublayer"] << " " << row["tensor"] << " " << column << ": " << found
                                       << " for " << row[column]);
                };
                rows_seen++;
                if (std::string(file) == "probe.csv") {
                    const SublayerFigures& f = figures.at(size_t(std::stoi(row["sublayer"])));
                    compare("rms_x", f.rms_x), compare("rms_f", f.rms_f), compare("rms_z", f.rms_z);
                    compare("shortcut_gain", f.shortcut_gain), compare("shortcut_gain_to_top", f.shortcut_gain_to_top);
                    compare("dx_norm", f.dx_norm), compare("df_norm", f.df_norm), compare("same_x", f.same_x);
                } else {
                    const auto& tensors = model->layout.tensors;
                    auto found = std::find_if(tensors.begin(), tensors.end(),
                                              [&](const TensorInfo& t) { return t.name == row["tensor"]; });
                    REQUIRE(found != tensors.end());
                    size_t i = size_t(found - tensors.begin());
                    compare("weight_norm", std::sqrt(probe->weights[i])),
                        compare("grad_norm", std::sqrt(probe->gradients[i])),
                        compare("update_norm", std::sqrt(probe->updates[i]));
                }
            }
        CHECK(rows_seen > 100);
        MESSAGE("largest relative error: " << worst);
    }

    TEST_CASE("Every level of recomputation gives the bits of none, in all placements") {
        for (int p = 0; p < NUM_PLACEMENTS; p++) {
            ModelConfig c = small_config(NormPlacement(p), 10, 16, 2);
            auto tokens = random_tokens(18, c.V, 1), targets = random_tokens(18, c.V, 2);
            std::vector<real> expected;
            for (Recompute level :
                 {Recompute{0}, Recompute{-1}, Recompute{-1, 2}, Recompute{-1, 8}, Recompute{1}, Recompute{1, 2},
                  Recompute{1, 6}, Recompute{2}, Recompute{4}, Recompute{6}, Recompute{10}, Recompute{64}}) {
                Model model(c, 2, 9, level);
                // poisoned, so that a buffer that is read before it is written shows
                for (const auto& row : Model::plan(c, model.layout, 2, 9, level))
                    if (row.buffer != &Model::params && row.buffer != &Model::grads)
                        std::fill((model.*row.buffer).data(), (model.*row.buffer).data() + row.elements, real(NAN));
                initialise_for_test(model, 3);
                model.forward_backward(tokens.data(), targets.data(), 2, real(1.0 / 18));
                if (expected.empty()) expected.assign(model.grads.data(), model.grads.data() + model.grads.size());
                CHECK_MESSAGE(same_bits(expected.data(), model.grads.data(), expected.size()),
                              placements[p].name << " -r " << level.name(10));
            }
        }
    }

    TEST_CASE("Gradients and updates have the same bits for any number of threads") {
        int before = omp_get_max_threads();
        std::vector<real> expected;
        for (int threads : {1, 2, 3, 8}) {
            omp_set_num_threads(threads);
            ModelConfig c = small_config(KEEL, 6, 48, 3, 300, 40);
            Model model(c, 3, 37, {0});
            initialise_for_test(model, 3);
            auto tokens = random_tokens(111, c.V, 1), targets = random_tokens(111, c.V, 2);
            RunConfig run;
            run.lr = 1e-2, run.warmup = 1, run.steps = 5, run.clip = 0.1;
            for (int s = 1; s <= 2; s++) {
                model.forward_backward(tokens.data(), targets.data(), 3, real(1.0 / 111));
                adamw_update(model, run, s, gradient_norm(model));
            }
            if (expected.empty()) expected.assign(model.params.data(), model.params.data() + model.params.size());
            CHECK_MESSAGE(same_bits(expected.data(), model.params.data(), expected.size()), threads << " threads");
        }
        omp_set_num_threads(before);
    }

    TEST_CASE("Two micro-batches give the gradient of one batch; a smaller one than B works") {
        ModelConfig c = small_config(KEEL);
        auto tokens = random_tokens(36, c.V, 1), targets = random_tokens(36, c.V, 2);
        Model whole(c, 4, 9, {0}), parts(c, 3, 9, {0});
        initialise_for_test(whole, 3), initialise_for_test(parts, 3);
        double one = whole.forward_backward(tokens.data(), targets.data(), 4, real(1.0 / 36));
        double two = parts.forward_backward(tokens.data(), targets.data(), 3, real(1.0 / 36)) +
                     parts.forward_backward(tokens.data() + 27, targets.data() + 27, 1, real(1.0 / 36));
        CHECK(one == doctest::Approx(two).epsilon(1e-14));
        std::vector<real> a(whole.grads.data(), whole.grads.data() + whole.grads.size()),
            b(parts.grads.data(), parts.grads.data() + parts.grads.size());
        CHECK(relative_error(a, b) < (fp64 ? 1e-14 : 1e-5));
    }

    TEST_CASE("A vocabulary of many chunks of logits gives the loss of the rows one by one") {
        ModelConfig c = small_config(PRE, 2, 4, 1, 300001, 100);
        REQUIRE(Model::head_rows(c, 100) < 100);
        Model model(c, 1, 100, {0});
        model.initialise(1);
        auto tokens = random_tokens(100, c.V, 1), targets = random_tokens(100, c.V, 2);
        double loss = model.forward_backward(tokens.data(), targets.data(), 1, real(0.01));
        double by_hand = 0;
        const real* x = model.final_norm_forward(100);  // x_0 after the backward; made again below
        model.forward(tokens.data(), 1);
        x = model.final_norm_forward(100);
        for (size_t i = 0; i < 100; i += 9) {
            double sum = 0, target = 0;
            for (int v = 0; v < c.V; v++) {
                double logit = 0;
                for (size_t k = 0; k < 4; k++) logit += double(x[i * 4 + k]) * double(model.params[size_t(v) * 4 + k]);
                sum += std::exp(logit);
                if (v == targets[i]) target = logit;
            }
            CHECK(double(model.losses[i]) == doctest::Approx(std::log(sum) - target).epsilon(1e-5));
            by_hand += std::log(sum) - target;
        }
        CHECK(loss / 100 == doctest::Approx(by_hand / 12).epsilon(0.2));
        // the gradients of a softmax sum to zero over the vocabulary, so those of wte do but for its input part
        CHECK(gradient_norm(model) > 0);
    }

    TEST_CASE("Post-LN's shortcut shrinks as 2^(-L/2) in all, KEEL's keeps its size: the paper's eq. 14-19, measured "
              "at initialisation") {
        auto measure = [](NormPlacement norm, int L, int from) {
            ModelConfig c = small_config(norm, L, 64, 2, 256, 64);
            Model model(c, 4, 64, {0});
            model.initialise(1337);
            auto tokens = random_tokens(256, 256, 1), targets = random_tokens(256, 256, 2);
            StepProbe probe(c);
            model.probe = &probe;
            model.forward_backward(tokens.data(), targets.data(), 4, real(1.0 / 256));
            return probe.sublayers[size_t(from)].shortcut_to_top / 256;  // gains are 1
        };
        // C = 64, on text, in the design's measurement: 2.8e-2 at L = 16, 1.9e-7 at L = 64; keel 0.996. Other tokens,
        // same order.
        double post16 = measure(POST, 16, 0), post64 = measure(POST, 64, 0), keel64 = measure(KEEL, 64, 2),
               keel256 = measure(KEEL, 256, 2);
        INFO("post L=16 " << post16 << ", post L=64 " << post64 << ", keel L=64 " << keel64 << ", keel L=256 "
                          << keel256);
        CHECK(post16 < 1e-1);
        CHECK(post64 < 1e-5);
        CHECK(std::fabs(keel64 - 1) < 0.01);
        CHECK(std::fabs(keel256 - 1) < 0.01);
        MESSAGE("product of the shortcut's gains: post L=16 " << post16 << ", post L=64 " << post64 << ", keel L=64 "
                                                              << keel64 << ", keel L=256 " << keel256);
    }
}

// ----------------------------------------------------------------------------------------------------
TEST_SUITE("sampling") {
    TEST_CASE("The KV cache gives the logits of the full forward pass bit for bit, fed in any pieces, in all "
              "placements") {
        for (int p = 0; p < NUM_PLACEMENTS; p++) {
            int T = 75;  // more than one tile of keys
            ModelConfig c = small_config(NormPlacement(p), 6, 12, 3, 13, T);
            Model model(c, 1, T, {0});
            initialise_for_test(model, 3);
            auto tokens = random_tokens(size_t(T), c.V, 1);
            DebugState<real> full;
            model.forward_backward(tokens.data(), tokens.data(), 1, 1, &full);
            TokenGenerator generator(model, T);
            int at = 0;
            for (int piece : {1, 1, 7, 1, 60, 1, 1, 3}) {
                const real* logits = generator.feed(tokens.data() + at, piece);
                at += piece;
                CHECK_MESSAGE(same_bits(logits, &full.logits[size_t((at - 1) * c.V)], size_t(c.V)),
                              placements[p].name << " after " << at << " tokens");
            }
            REQUIRE(at == T);
        }
    }

    TEST_CASE("Temperature 0 takes the likeliest token, top-k none but the k likeliest, and the rest follows the "
              "softmax") {
        std::vector<real> logits = {real(0.5), 2, real(-1), 2, 1};
        CHECK(sample_token(logits.data(), 5, 0, 0, 0.99) == 1);
        std::map<int, int> counts;
        const int n = 20000;
        for (int i = 0; i < n; i++) counts[sample_token(logits.data(), 5, 1, 2, (i + 0.5) / n)]++;
        CHECK(counts.size() == 2);
        CHECK(counts[1] == n / 2);
        CHECK(counts[3] == n / 2);
        for (double temperature : {0.5, 1.0, 3.0}) {
            counts.clear();
            double sum = 0;
            for (real l : logits) sum += std::exp(double(l) / temperature);
            for (int i = 0; i < n; i++) counts[sample_token(logits.data(), 5, temperature, 0, (i + 0.5) / n)]++;
            for (int v = 0; v < 5; v++)
                CHECK(std::fabs(counts[v] - n * std::exp(double(logits[size_t(v)]) / temperature) / sum) <= 1);
        }
        CHECK(sample_token(logits.data(), 5, 1, 1, 0.999) == 1);
    }

    TEST_CASE("Prompts are bytes for a byte vocabulary and ids for others") {
        const Tokenizer bytes;
        auto tokens = [](const char* prompt, const Tokenizer* tokenizer, int V) {
            return prompt_tokens(parse_command_line(3, std::array{"train", "--prompt", prompt}.data()), tokenizer, V);
        };
        CHECK(tokens("ab\n", &bytes, 256) == std::vector<int>{'a', 'b', '\n'});
        CHECK(prompt_tokens({}, &bytes, 256) == std::vector<int>{'\n'});
        CHECK(tokens("15496,995", nullptr, 50257) == std::vector<int>{15496, 995});
        CHECK(prompt_tokens({}, nullptr, 50257) == std::vector<int>{50256});
        CHECK(error_of([&] { tokens("50257", nullptr, 50257); }).find("from 0 to 50256") != std::string::npos);
        CHECK(error_of([&] { tokens("hello", nullptr, 50257); }).find("token ids such as") != std::string::npos);
    }
}

// ----------------------------------------------------------------------------------------------------
TEST_SUITE("data") {
    std::string numbered_text(size_t n) {  // position i can be told from its four bytes
        std::string text;
        for (size_t i = 0; text.size() < n; i++)
            text += format("%c%c%c", char(1 + i % 127), char(1 + i / 127), char(200 + i % 50));
        return text.substr(0, n);
    }

    TEST_CASE("An epoch deals each sequence once, all tokens but fewer than T, and none of the validation split") {
        TemporaryFolder folder;
        Options o;
        o.train = {folder.write("text", numbered_text(1003))};
        DataSplit data(o);
        CHECK(data.train_count == 903);
        CHECK(data.val_start == 903);
        CHECK(data.val_count == 100);
        for (int T : {1, 7, 64}) {
            Loader loader(data.train, 0, data.train_count, T, 256, 42, true);
            size_t n = loader.sequences_per_epoch();
            CHECK(n == 902 / size_t(T));
            std::set<std::vector<size_t>> orders;
            for (uint64_t epoch = 0; epoch < 5; epoch++) {
                std::vector<int> seen(903);
                std::vector<size_t> order;
                for (uint64_t s = 0; s < n; s++) {
                    size_t at = loader.position(epoch * n + s);
                    order.push_back(at);
                    for (size_t i = at; i < at + size_t(T); i++) seen.at(i)++;
                }
                CHECK(*std::max_element(seen.begin(), seen.end()) == 1);
                CHECK(std::count(seen.begin(), seen.end(), 1) == long(n * size_t(T)));
                orders.insert(order);
            }
            CHECK(orders.size() == 5);  // every epoch in another order
        }
    }

    TEST_CASE("A batch is a function of seed and number alone; targets are the tokens one further on") {
        TemporaryFolder folder;
        std::string text = numbered_text(5000);
        TokenSource source({folder.write("text", text)}, "-i");
        Loader a(source, 0, 4500, 16, 256, 1, true), b(source, 0, 4500, 16, 256, 1, true),
            other(source, 0, 4500, 16, 256, 2, true);
        std::vector<int> tokens(64), targets(64), again(64), ignored(64);
        for (uint64_t s : {uint64_t(0), uint64_t(1000), uint64_t(3), uint64_t(1) << 40}) {
            a.batch(s, 4, tokens.data(), targets.data());
            for (uint64_t i = 0; i < 4; i++) b.batch(s + 3 - i, 1, again.data() + 16 * (3 - i), ignored.data());
            CHECK(tokens == again);
            for (size_t i = 0; i < 64; i++) {
                size_t at = a.position(s + i / 16) + i % 16;
                REQUIRE(tokens[i] == int((unsigned char)text[at]));
                REQUIRE(targets[i] == int((unsigned char)text[at + 1]));
            }
            other.batch(s, 4, again.data(), ignored.data());
            CHECK(tokens != again);
        }
    }

    // An interpreter of the programs of hops:K that shares nothing with what makes them. Returns the lookups of each
    // query, by the position of its answer.
    std::map<size_t, int> interpret(const std::string& text, int K) {
        std::map<size_t, int> lookups;
        std::map<char, char> value;
        std::set<std::string> asked;
        for (size_t at = 0; at < text.size();) {
            if (text[at] == '\n') {
                value.clear(), asked.clear(), at++;
            } else if (isdigit(text[at])) {
                int n = text[at] - '0';
                REQUIRE((n >= 1 && n <= K));
                char c = text[at + 1];
                std::set<char> seen = {c};
                for (int i = 0; i < n; i++) {
                    REQUIRE(value.count(c));
                    c = value[c];
                    REQUIRE(seen.insert(c).second);  // no way round leads to the answer sooner
                }
                REQUIRE(text[at + 2] == c);
                int back = 0;
                for (char b = c; b != text[at + 1]; b = value[b]) back++;
                REQUIRE(back > n);
                lookups[at + 2] = n;
                REQUIRE(asked.insert(text.substr(at, 2)).second);
                at += 3;
                REQUIRE((text[at] == ';' || text[at] == '\n'));
                at += text[at] == ';';
            } else {
                REQUIRE(isalpha(text[at]));
                REQUIRE(isalpha(text[at + 1]));
                REQUIRE(text[at + 2] == text[at]);
                REQUIRE(text[at + 3] == ';');
                REQUIRE(asked.empty());
                REQUIRE(!value.count(text[at]));
                value[text[at]] = text[at + 1];
                at += 4;
            }
        }
        return lookups;
    }

    TEST_CASE("Programs of hops:K answer their queries right, by as many lookups as they say and no fewer, each number "
              "of lookups as often as any other") {
        for (int K : {1, 3, 8, MAX_HOPS}) {
            HopPrograms programs{K};
            std::map<int, int> count;
            int total = 0, forward = 0, assignments = 0, sequences = 400;
            for (int whole : {1, 3}) {
                int n = whole * programs.length() + 7;
                std::vector<int> row(static_cast<size_t>(n));
                for (uint64_t s = 0; s < uint64_t(sequences); s++) {
                    std::vector<HopPrograms::Answer> answers;
                    programs.sequence(5, s, false, n, row.data(), &answers);
                    std::string text(row.begin(), row.end());
                    std::map<size_t, int> lookups = interpret(text, K);
                    CHECK(text.substr(text.size() - 8) == std::string(8, '\n'));
                    REQUIRE(answers.size() == size_t(whole));
                    REQUIRE(lookups.size() == size_t(whole * programs.queries()));
                    for (auto answer : answers) {
                        auto found = lookups.find(size_t(answer.position + 1));
                        REQUIRE(found != lookups.end());
                        REQUIRE(found->second == answer.hops);
                        REQUIRE(text[size_t(answer.position - 3)] ==
                                text[size_t(answer.position - 5)]);  // an assignment is before it
                        count[answer.hops]++, total++;
                    }
                    for (int v = 0; v < programs.variables();
                         v++) {  // what the first program's assignments name is assigned later
                        size_t at = size_t(4 * v), named = text.find(text.substr(at + 1, 1));
                        while (named % 4 != 0) named = text.find(text.substr(at + 1, 1), named + 1);
                        forward += named > at, assignments++;
                    }
                }
            }
            for (int h = 1; h <= K; h++)  // five standard deviations
                CHECK_MESSAGE(std::fabs(count[h] - double(total) / K) < 5 * std::sqrt(double(total) / K) + 1e-9,
                              "hops:" << K << ", " << h << " lookups: " << count[h] << " of " << total);
            CHECK_MESSAGE(std::fabs(forward - assignments / 2.0) <= 5 * std::sqrt(assignments / 4.0),
                          "hops:" << K << ": " << forward << " of " << assignments
                                  << " name a variable that is assigned later");
        }
    }

    TEST_CASE("A sequence of programs is a function of seed and number alone; no program of validation is one of "
              "training") {
        HopPrograms programs{3};
        int T = programs.length() - 1;
        auto loader = [&](int64_t seed, bool training) {
            RunConfig run;
            run.T = T, run.seed = seed;
            return DataSplit(parse_command_line(3, std::array{"train", "-i", "hops:3"}.data())).loader(run, training);
        };
        Loader a = loader(1, true), b = loader(1, true), other = loader(2, true), val = loader(1, false);
        CHECK(a.sequences_per_epoch() == UINT64_MAX);
        std::set<std::vector<int>> seen;
        size_t size = size_t(2 * T), drawn = 0;
        std::vector<int> tokens(size), targets(size), again(size), ignored(size);
        for (uint64_t s : {uint64_t(0), uint64_t(2), uint64_t(1) << 40, uint64_t(1) << 63}) {
            a.batch(s, 2, tokens.data(), targets.data());
            for (uint64_t i : {1, 0}) b.batch(s + i, 1, again.data() + i * uint64_t(T), ignored.data());
            CHECK(tokens == again);
            for (size_t i = 0; i < size; i++)
                if (i % size_t(T) + 1 < size_t(T)) REQUIRE(targets[i] == tokens[i + 1]);
            for (Loader* loader : {&a, &other, &val}) {
                loader->batch(s, 2, again.data(), ignored.data());
                for (int i : {0, 1}) seen.insert({again.begin() + i * T, again.begin() + (i + 1) * T}), drawn++;
            }
        }
        for (uint64_t s = 10; s < 2000; s++)
            for (Loader* loader : {&a, &val})
                loader->batch(s, 1, again.data(), ignored.data()), seen.insert({again.begin(), again.begin() + T}),
                    drawn++;
        CHECK(seen.size() == drawn);
    }

    TEST_CASE("Ablating a sub-layer gives bit for bit the loss of a model whose branch ends in a matrix of zeros, and "
              "predictions are those of the logits") {
        for (int p = 0; p < NUM_PLACEMENTS; p++) {
            ModelConfig c = small_config(NormPlacement(p), 6, 12, 3);
            auto tokens = random_tokens(18, c.V, 1), targets = random_tokens(18, c.V, 2);
            std::vector<int> predictions(18);
            for (int l = 0; l < c.L; l++) {
                Model model(c, 2, 9, {0});
                initialise_for_test(model, 3);
                double whole = model.evaluate(tokens.data(), targets.data(), 2, predictions.data());
                model.ablated = l;
                double ablated = model.evaluate(tokens.data(), targets.data(), 2);
                model.ablated = -1;
                SublayerTensors<real> w = model.weights(l);
                std::fill_n(w[is_attention(l) ? ATTPROJW : FCPROJW],
                            size_t(c.C) * size_t(c.C) * (is_attention(l) ? 1 : 4), real(0));
                CHECK_MESSAGE(model.evaluate(tokens.data(), targets.data(), 2) == ablated,
                              placements[p].name << " sub-layer " << l);
                CHECK(whole != ablated);
            }
            Model model(c, 2, 9, {0});
            initialise_for_test(model, 3);
            DebugState<real> state;
            model.forward_backward(tokens.data(), targets.data(), 2, 1, &state);
            for (size_t i = 0; i < 18; i++) {
                const real* row = &state.logits[i * size_t(c.V)];
                CHECK(predictions[i] == std::max_element(row, row + c.V) - row);
            }
        }
    }

    TEST_CASE("Files of a glob are one row of tokens in the order of their names; shards are read as llm.c writes "
              "them") {
        TemporaryFolder folder;
        folder.write("b.txt", "world"), folder.write("a.txt", "hello "), folder.write("c.txt", "!");
        TokenSource source({folder.path + "/*.txt"}, "-i");
        std::vector<int> all(12);
        source.read(0, 12, 256, all.data());
        CHECK(std::string(all.begin(), all.end()) == "hello world!");
        source.read(4, 4, 256, all.data());
        CHECK(std::string(all.begin(), all.begin() + 4) == "o wo");

        auto shard = [&](const std::string& name, std::vector<uint16_t> tokens, int magic = 20240520, int count = -1) {
            std::vector<int32_t> header(256);
            header[0] = magic, header[1] = 1, header[2] = count < 0 ? int(tokens.size()) : count;
            std::string bytes((char*)header.data(), 1024);
            bytes.append((char*)tokens.data(), tokens.size() * 2);
            return folder.write(name, bytes);
        };
        shard("x_0.bin", {1, 50256, 300}), shard("x_1.bin", {}), shard("x_2.bin", {7, 65535});
        TokenSource shards({folder.path + "/x_*.bin"}, "-i");
        CHECK(shards.count == 5);
        std::vector<int> ids(5);
        shards.read(0, 5, 65536, ids.data());
        CHECK(ids == std::vector<int>{1, 50256, 300, 7, 65535});
        CHECK(error_of([&] {
            shards.read(0, 5, 50257, ids.data());
        }).find("below the model's V = 50257, found 65535 at token 1") != std::string::npos);
        CHECK(error_of([&] { TokenSource s({shard("bad.bin", {1, 2}, 1)}, "-i"); }).find("expected a token shard") !=
              std::string::npos);
        CHECK(error_of([&] {
            TokenSource s({shard("short.bin", {1, 2}, 20240520, 3)}, "-i");
        }).find("expected 3 tokens") != std::string::npos);
        CHECK(error_of([&] { TokenSource s({folder.path + "/none*"}, "-i"); }).find("matches no file") !=
              std::string::npos);
        CHECK(error_of([&] { TokenSource s({folder.path + "/missing"}, "-i"); }).find("cannot be read") !=
              std::string::npos);
        CHECK(error_of([&] {
            TokenSource s({folder.path + "/a.txt", folder.path + "/x_0.bin"}, "-i");
        }).find("train on one kind") != std::string::npos);
    }

    TEST_CASE("Of more than 2^32 tokens each is read where it is, and every build shuffles and sums them alike") {
        TemporaryFolder folder;
        std::string path = folder.write("text", numbered_text(1 << 16));
        const uint64_t at = (uint64_t(1) << 32) + 12345;
        std::filesystem::resize_file(path, at + 1000);  // with a hole, which takes no disk
        std::fstream(path, std::ios::in | std::ios::out | std::ios::binary).seekp(std::streamoff(at)) << "far away";
        TokenSource source({path}, "-i");
        CHECK(source.count == at + 1000);
        std::vector<int> tokens(8);
        source.read(at, 8, 256, tokens.data());
        CHECK(std::string(tokens.begin(), tokens.end()) == "far away");
        Loader in_order(source, 0, source.count, 64, 256, 42, false),
            shuffled(source, 0, source.count, 64, 256, 42, true);
        uint64_t n = in_order.sequences_per_epoch();
        CHECK(n == (at + 999) / 64);
        CHECK(in_order.position(n - 1) == (n - 1) * 64);
        CHECK(shuffled.position(5) == 3447968864);
        CHECK(shuffled.position(n + 7) == 1374284241);
        CHECK(source.checksum(0, source.count) == 2390360580);
        CHECK(source.checksum(0, uint64_t(100) << 20) == 3001654787);
    }

    TEST_CASE("A file that is cut during the run is an error, not a crash") {
        TemporaryFolder folder;
        std::string path = folder.write("text", numbered_text(1000));
        TokenSource source({path}, "-i");
        std::filesystem::resize_file(path, 500);
        std::vector<int> tokens(1000);
        CHECK(error_of([&] { source.read(0, 1000, 256, tokens.data()); }).find("has been cut") != std::string::npos);
    }
}

// ----------------------------------------------------------------------------------------------------
TEST_SUITE("files") {
    TEST_CASE("A model file has the documented bytes: header, parameters, CRC-32") {
        TemporaryFolder folder;
        ModelConfig c = small_config(DEEPNORM, 4);
        Trainer trainer(small_run(c, 1, 1));
        Model& model = trainer.model;
        initialise_for_test(model, 9);
        std::string path = folder.path + "/model.bin";
        write_model(path, trainer, (int64_t(1) << 33) + 5);
        std::ifstream in(path, std::ios::binary);
        std::string bytes((std::istreambuf_iterator<char>(in)), {});
        REQUIRE(bytes.size() == 1024 + model.params.size() * sizeof(real) + 4);
        CHECK(bytes.substr(0, 4) == "KEEL");
        int32_t word[256];
        memcpy(word, bytes.data(), 1024);
        std::vector<int32_t> expected = {word[0], 1,  1,   fp64 ? 2 : 0,
                                         9,       13, 128, 4,
                                         3,       12, 3,   std::bit_cast<int32_t>(float(std::pow(4.0, 0.25))),
                                         0,       0,  5,   2,
                                         0};
        CHECK(std::vector<int32_t>(word, word + 17) == expected);
        for (int i = 17; i < 256; i++) CHECK(word[i] == 0);
        CHECK(memcmp(bytes.data() + 1024, model.params.data(), model.params.size() * sizeof(real)) == 0);
        uint32_t stored;
        memcpy(&stored, bytes.data() + bytes.size() - 4, 4);
        uint32_t crc = ~0u;  // bit by bit, from the definition
        for (size_t i = 0; i + 4 < bytes.size(); i++) {
            crc ^= (unsigned char)bytes[i];
            for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
        }
        CHECK(stored == ~crc);
        CHECK_FALSE(std::filesystem::exists(path + ".tmp"));
    }

    TEST_CASE("Any flipped bit in a model file is noticed, and any cut") {
        TemporaryFolder folder;
        ModelConfig c = small_config(KEEL, 2, 4, 2, 3, 2);
        Trainer trainer(small_run(c, 1, 1));
        trainer.initialise(1);
        std::string path = folder.path + "/model.bin";
        write_model(path, trainer, 1);
        std::ifstream in(path, std::ios::binary);
        std::string bytes((std::istreambuf_iterator<char>(in)), {});
        auto load = [&](const std::string& content) {
            std::string bad = folder.write("bad.bin", content);
            return error_of([&] {
                FileReader reader(bad, FILE_MODEL);
                Trainer t(small_run(reader.header.model(), 1, 1));
                load_parameters(t, reader), reader.finish();
            });
        };
        CHECK(load(bytes) == "");
        for (size_t at = 0; at < bytes.size(); at += at < 80 ? 1 : 61) {
            std::string bad = bytes;
            bad[at] = char(bad[at] ^ (1 << at % 8));
            CHECK_MESSAGE(load(bad) != "", "byte " << at);
        }
        for (size_t size : {size_t(0), size_t(3), size_t(1023), size_t(1027), size_t(1028), bytes.size() - 1})
            CHECK(load(bytes.substr(0, size)) != "");
        CHECK(load(bytes + "x") != "");
    }

    TEST_CASE("BF16, FP32 and FP64 files are read into this build's type") {
        TemporaryFolder folder;
        ModelConfig c = small_config(KEEL, 2, 4, 2, 3, 2);
        size_t n = ParameterLayout(c).count;
        for (RealType type : {REAL_FP32, REAL_BF16, REAL_FP64}) {
            std::string path = folder.path + "/m.bin";
            FileHeader h = make_header(FILE_MODEL, type, c, 0);
            FileWriter out(path);
            out.write(&h, sizeof h);
            for (size_t i = 0; i < n; i++) {
                float value = float(i % 128) * 0.5f;  // exact in BF16
                double wide = value;
                uint16_t half = uint16_t(std::bit_cast<uint32_t>(value) >> 16);
                out.write(type == REAL_FP32   ? (void*)&value
                          : type == REAL_FP64 ? (void*)&wide
                                              : (void*)&half,
                          real_size(type));
            }
            out.commit();
            FileReader in(path, FILE_MODEL);
            std::vector<real> values(n);
            in.read_reals(values.data(), n);
            in.finish();
            for (size_t i = 0; i < n; i++) REQUIRE(values[i] == real(i % 128) * real(0.5));
        }
    }

    TEST_CASE("A comparison fails for an error past its tolerance, for NaN, and names the worst element") {
        std::vector<real> file = {1, 2, 3, 4}, ours = file;
        CHECK(compare_tensor("t", "", file.data(), ours.data(), 4, 0).ok());
        ours[2] = real(3.001);
        CheckRow row = compare_tensor("t", "", file.data(), ours.data(), 4, 1e-4);
        CHECK_FALSE(row.ok());
        CHECK(row.worst == 2);
        CHECK(row.error == doctest::Approx(0.001 / std::sqrt(30.0)).epsilon(1e-3));
        ours[1] = real(NAN);
        row = compare_tensor("t", "", file.data(), ours.data(), 4, 1);
        CHECK_FALSE(row.ok());
        CHECK(row.worst == 1);
        std::vector<real> zero(4);
        CHECK(compare_tensor("t", "", zero.data(), zero.data(), 4, 0).ok());
        CHECK_FALSE(compare_tensor("t", "", zero.data(), file.data(), 4, 1).ok());
    }
}
