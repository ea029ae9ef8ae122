// bench_kernels: how fast each kernel of train_keel.cu runs, beside what the memory or the tensor cores of this GPU do
// in the same run.
//
// Each kernel is first checked against the CPU trainer's function, then timed at B*T = 16384 over buffers that together
// pass the L2 cache, and compared with a copy of the same bytes (bandwidth-bound kernels), a kernel that only reads
// them (the gradient's norm), or a large matrix product (attention; dev/bench/bench_sdpa.py has PyTorch's beside it).
// Attention is timed as the trainer runs it, and on a Hopper by mma.sync too, in rows that end with _mma. Medians of
// REPEATS timings of a row of launches. Prints a table, and with --csv FILE appends rows
// metric,value,unit,peer_value,ratio. --only REGEX: of all rows those whose names it is found in. --sdpa FILE: lines
// name,TFLOP/s of PyTorch's attention in this run, from dev/bench/bench_sdpa.py: FlashAttention-2's, and cuDNN's, whose
// names end with _cudnn. --small: shapes for a dry run, also on the CPU headers.
#include <omp.h>
#include <sys/mman.h>

#include <regex>

#include "keel/run.h"
namespace cpu {
#include "train_keel_cpu.cpp"
}
#include "train_keel.cu"

#include "dev/bench/bench.h"

namespace {

constexpr int REPEATS = 9;
Bench bench{"bench_kernels"};
std::map<std::string, double> sdpa;  // TFLOP/s of attention_forward_T1024_D64 and so on
std::regex only{""};                 // of all rows those whose names have it
int reported = 0;                    // rows

bool wanted(const std::string& row) { return std::regex_search(row, only); }
bool any_wanted(const std::vector<std::string>& rows) { return std::any_of(rows.begin(), rows.end(), wanted); }

// Median seconds of a launch. run(i) makes launch i, on the i-th set of buffers.
double median_seconds(Device& device, const std::function<void(int)>& run) {
    int launches = bench.small ? 2 : 20;
    cudaEvent_t start, end;
    CUDA(cudaEventCreate(&start));
    CUDA(cudaEventCreate(&end));
    for (int i = 0; i < launches; i++) run(i);
    std::vector<float> times(REPEATS);
    for (float& ms : times) {
        CUDA(cudaEventRecord(start, device.stream));
        for (int i = 0; i < launches; i++) run(i);
        CUDA(cudaEventRecord(end, device.stream));
        CUDA(cudaEventSynchronize(end));
        CUDA(cudaEventElapsedTime(&ms, start, end));
    }
    cudaEventDestroy(start), cudaEventDestroy(end);
    std::nth_element(times.begin(), times.begin() + REPEATS / 2, times.end());
    return double(times[REPEATS / 2]) * 1e-3 / launches;
}

__global__ void copy_kernel(float4* to, const float4* from, size_t n) {
    begin_kernel();
    size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) to[i] = from[i];
}

// Reads n float4, four on their way at a time, and writes nothing that it could leave out: the sum is never -1.
__global__ void read_kernel(float* never, const float4* from, size_t n) {
    begin_kernel();
    float sum = 0;
    size_t step = size_t(gridDim.x) * blockDim.x;
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += 4 * step) {
        float4 v[4] = {};
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (i + j * step < n) v[j] = from[i + j * step];
#pragma unroll
        for (int j = 0; j < 4; j++) sum += v[j].x * v[j].x + v[j].y * v[j].y + v[j].z * v[j].z + v[j].w * v[j].w;
    }
    if (sum == -1) *never = sum;
}

void check(const char* what, const std::vector<float>& expected, const std::vector<float>& found, double tolerance) {
    double error = relative_error(expected, found);
    if (error <= tolerance) return;
    print("WRONG: %s: relative L2 error %.3g beside the CPU, expected at most %.3g\n", what, error, tolerance);
    bench.bad++;
}
constexpr double TOLERANCE = BRANCH_BF16 ? 5e-3 : 1e-5;  // BF16 rounds to 2^-9

void report(const std::string& name, double seconds, double amount, const char* unit, double peer,
            const char* peer_name) {
    if (!wanted(name)) return;
    double scale = unit[0] == 'G' ? 1e9 : 1e12, value = amount / seconds / scale;
    print("%-40s %10.1f us %10.1f %-8s %10.1f %-18s ratio %.2f\n", name, seconds * 1e6, value, unit, peer, peer_name,
          value / peer);
    fflush(stdout);
    bench.add_row(name, value, unit, peer);
    reported++;
}

// GB/s of a copy that moves so many bytes, half of them in and half out.
double copy_rate(Device& device, size_t bytes) {
    size_t n = bytes / 32;
    Ring<float4> to(n, bench.sets_for(bytes)), from(n, bench.sets_for(bytes));
    CUDA(cudaMemsetAsync(from.all.data(), 0, from.all.size() * 16, device.stream));
    return double(n) * 32 / 1e9 / median_seconds(device, [&](int i) {
        launch(copy_kernel, ceil_div(n, 256), 256, 0, device.stream, to(i), from(i), n);
    });
}

void bandwidth(Device& device, const std::string& name, double bytes, const std::function<void(int)>& run) {
    if (!wanted(name)) return;
    double seconds = median_seconds(device, run);
    report(name, seconds, bytes, "GB/s", copy_rate(device, size_t(bytes)), "copy, GB/s");
}

void bench_highway(Device& device, int rows, int C) {
    std::string forward_row = format("highway_forward_C%d", C), backward_row = format("highway_backward_C%d", C),
                backward_and_u_row = format("highway_backward_and_u_C%d", C),
                norms_row = format("highway_norms_C%d", C);
    if (!any_wanted({forward_row, backward_row, backward_and_u_row, norms_row})) return;
    size_t n = size_t(rows) * size_t(C);
    double forward_bytes = double(n) * (8 + 2 * sizeof(branch_t)),
           backward_bytes = double(n) * (12 + 2 * sizeof(branch_t)), u_bytes = double(n) * (4 + sizeof(branch_t));
    size_t sets = bench.sets_for(size_t(forward_bytes));
    Ring<float> z0(n, sets), z1(n, sets), dz(n, sets), numbers(size_t(rows) * 4, sets), gains(size_t(C) * 4, 1),
        dgains(size_t(C) * 2, 1);
    Ring<branch_t> f(n, sets), u0(n, sets), u1(n, sets), df(n, sets);
    DeviceArray<float> partial(MAX_PARTIAL_BLOCKS * 2 * size_t(C));
    fill(device, z0, 1, 1), fill(device, f, 1, 2), fill(device, dz, 1, 3), fill(device, gains, 1, 4);
    CUDA(cudaMemsetAsync(dgains.all.data(), 0, dgains.all.size() * 4, device.stream));
    auto point = [&](int which, int i) {
        float* r = numbers(i) + size_t(which) * 2 * size_t(rows);
        const float* g = gains(0) + size_t(which) * 2 * size_t(C);
        return HighwayPoint{which ? z1(i) : z0(i), r, r + rows, g, g + C, which ? u1(i) : u0(i)};
    };
    float alpha = 64;
    for (size_t i = 0; i < sets; i++) highway_norms(device, point(0, int(i)), size_t(rows), C);
    auto forward = [&](int i) { highway_forward(device, point(1, i), point(0, i), f(i), alpha, size_t(rows), C); };
    auto backward = [&](int i, bool restore) {
        HighwayPoint before = point(0, i);
        if (!restore) before.u = nullptr;
        highway_backward(device, point(1, i), before, {dz(i), u1(i), df(i), nullptr, dgains(0), dgains(0) + C}, alpha,
                         false, size_t(rows), C, partial.data());
    };

    {  // beside the CPU: z, u, dz and the gains' gradients
        auto z = host(device, z0(0), n), fs = host(device, f(0), n), dzs = host(device, dz(0), n),
             g = host(device, gains(0), size_t(C) * 4);
        std::vector<float> x(n), zo(n), u(n), du(n), dx(n), dg(size_t(C) * 2),
            blocks(cpu::gain_blocks(size_t(rows)) * size_t(C));
        cpu::rmsnorm_forward(x.data(), z.data(), g.data(), size_t(rows), C);
        cpu::highway_forward(x.data(), zo.data(), fs.data(), g.data() + 2 * C, alpha, size_t(rows),
                             C);  // x is x_{l+1} now
        cpu::rmsnorm_forward(u.data(), x.data(), g.data() + 3 * C, size_t(rows), C);
        for (size_t i = 0; i < sets; i++) forward(int(i));
        check("highway_forward z", zo, host(device, z1(0), n), 1e-5);
        auto found_u = host(device, u1(0), n);
        check("highway_forward u", u, found_u, TOLERANCE);
        du = found_u;  // u serves as du
        cpu::rmsnorm_backward(du.data(), dg.data() + C, du.data(), x.data(), g.data() + 3 * C, size_t(rows), C,
                              blocks.data());
        dx = dzs;
        cpu::shortcut_backward(dx.data(), dx.data(), du.data(), alpha, n);
        cpu::rmsnorm_backward(dx.data(), dg.data(), dx.data(), zo.data(), g.data() + 2 * C, size_t(rows), C,
                              blocks.data());
        backward(0, true);
        check("highway_backward dz", dx, host(device, dz(0), n), 1e-5);
        check("highway_backward gains", dg, host(device, dgains(0), size_t(C) * 2), 1e-4);
    }
    bandwidth(device, forward_row, forward_bytes, forward);
    bandwidth(device, backward_row, backward_bytes, [&](int i) { backward(i, false); });
    bandwidth(device, backward_and_u_row, backward_bytes + u_bytes, [&](int i) { backward(i, true); });
    bandwidth(device, norms_row, u_bytes, [&](int i) { highway_norms(device, point(0, i), size_t(rows), C); });
}

void bench_gelu(Device& device, int rows, int C) {
    std::string forward_row = format("gelu_forward_C%d", C), backward_row = format("gelu_backward_C%d", C);
    if (!any_wanted({forward_row, backward_row})) return;
    size_t n = size_t(rows) * 4 * size_t(C), sets = bench.sets_for(n * 2 * sizeof(branch_t));
    Ring<branch_t> h(n, sets), out(n, sets);
    fill(device, h, 3, 1), fill(device, out, 1, 2);
    auto hs = host(device, h(0), n), dh = host(device, out(0), n);
    std::vector<float> expected(n);
    cpu::gelu_backward(dh.data(), hs.data(), n);
    gelu_backward(device, out(0), h(0), n);
    check("gelu_backward", dh, host(device, out(0), n), TOLERANCE);
    cpu::gelu_forward(expected.data(), hs.data(), n);
    gelu_forward(device, out(0), h(0), n);
    check("gelu_forward", expected, host(device, out(0), n), TOLERANCE);
    bandwidth(device, forward_row, double(n) * 2 * sizeof(branch_t),
              [&](int i) { gelu_forward(device, out(i), h(i), n); });
    bandwidth(device, backward_row, double(n) * 3 * sizeof(branch_t),
              [&](int i) { gelu_backward(device, out(i), h(i), n); });
}

void bench_classifier(Device& device, int rows, int V) {
    std::string row = format("classifier_V%d", V), loss_row = format("classifier_loss_V%d", V);
    if (!any_wanted({row, loss_row})) return;
    size_t Vp = round_up(size_t(V), 128), n = size_t(rows) * Vp, sets = bench.sets_for(n * 2 * sizeof(branch_t));
    Ring<branch_t> logits(n, sets);
    Ring<float> losses(size_t(rows), 1);
    Ring<int> targets(size_t(rows), 1);
    std::vector<int> target(static_cast<size_t>(rows));
    for (size_t i = 0; i < target.size(); i++) target[i] = int(philox(1, uint32_t(i), 0, 0, 9).word[0] % uint32_t(V));
    device.copy(targets(0), target.data(), target.size());
    fill(device, logits, 8, 1);
    auto expected = host(device, logits(0), n);
    std::vector<float> loss(target.size()), lse(target.size());
    float scale = 1.0f / float(rows);
    cpu::cross_entropy_forward(loss.data(), lse.data(), expected.data(), target.data(), size_t(rows), V, int(Vp));
    cpu::cross_entropy_backward(expected.data(), lse.data(), target.data(), size_t(rows), V, int(Vp), scale);
    for (size_t i = 0; i < size_t(rows); i++) std::fill(&expected[i * Vp + size_t(V)], &expected[i * Vp] + Vp, 0.0f);
    cross_entropy(device, losses(0), logits(0), targets(0), size_t(rows), V, int(Vp), true, scale);
    check("cross_entropy losses", loss, host(device, losses(0), size_t(rows)), 1e-5);
    check("cross_entropy dlogits", expected, host(device, logits(0), n), TOLERANCE);
    bandwidth(device, row, double(n) * 2 * sizeof(branch_t), [&](int i) {
        cross_entropy(device, losses(0), logits(i), targets(0), size_t(rows), V, int(Vp), true, scale);
    });
    bandwidth(device, loss_row, double(n) * sizeof(branch_t), [&](int i) {
        cross_entropy(device, losses(0), logits(i), targets(0), size_t(rows), V, int(Vp), false, scale);
    });
}

// The optimizer on a real model's tensors.
void bench_optimizer(Device& device, const ModelConfig& c) {
    if (!any_wanted({"adamw", "gradient_norm"})) return;
    ParameterLayout layout(c);
    size_t n = layout.count;
    std::vector<UpdateChunk> work = update_chunks(layout, GradientLayout(layout, c.L, false));
    DeviceArray<UpdateChunk> chunks(work.size());
    device.copy(chunks.data(), work.data(), work.size());
    Ring<float> p(n, 1), g(n, 1), m(n, 1), v(n, 1);
    Ring<branch_t> matrices(n, 1);
    fill(device, p, 1, 1), fill(device, g, 1, 2), fill(device, m, 1, 3);
    CUDA(cudaMemsetAsync(v.all.data(), 0, v.all.size() * 4, device.stream));
    DeviceArray<StepState> state(1);
    DeviceArray<StepSettings> settings(1);
    DeviceArray<UpdateCounts> updates(1);
    StepSettings s{1e-3, 0.01, 1, 0, 1, 0, 0};
    device.copy(settings.data(), &s, 1);
    device.zero(state), device.zero(updates);
    add_sum<true>(device, &state.data()->grad_squares, g(0), n);
    launch(prepare_update_kernel, 1, 1, 0, device.stream, state.data(), settings.data(), updates.data(), nullptr, 0);
    StepState found;
    device.copy(&found, state.data(), 1);
    auto gs = host(device, g(0), n);
    check("gradient norm", {float(std::sqrt(cpu::sum_of_squares(gs.data(), n)))}, {float(found.norm)}, 1e-6);
    branch_t* copy = BRANCH_BF16 ? matrices(0) : nullptr;
    auto update = [&](int) {
        launch(adamw_kernel<float>, work.size(), THREADS, 0, device.stream, p(0), nullptr, copy, g(0), nullptr, m(0),
               v(0), chunks.data(), settings.data(), state.data(), updates.data());
    };
    bandwidth(device, "adamw", double(n) * (32 + (BRANCH_BF16 ? 2 : 0)), update);

    double norm = median_seconds(device, [&](int) { add_sum<true>(device, &state.data()->grad_squares, g(0), n); });
    size_t fours = n / 4;
    unsigned blocks = unsigned(std::min<size_t>(ceil_div(fours, 1024), 4096));
    double read = median_seconds(device, [&](int) {
        launch(read_kernel, blocks, 256, 0, device.stream, m(0), reinterpret_cast<const float4*>(g(0)), fours);
    });
    report("gradient_norm", norm, double(n) * 4, "GB/s", double(fours) * 16 / read / 1e9, "read only, GB/s");
}

void bench_embedding(Device& device, int B, int T, int C, int V) {
    std::string forward_row = format("embedding_forward_C%d_V%d", C, V),
                backward_row = format("embedding_backward_C%d_V%d", C, V);
    if (!any_wanted({forward_row, backward_row})) return;
    size_t rows = size_t(B) * size_t(T), n = rows * size_t(C), sets = bench.sets_for(n * 12);
    Ring<float> x(n, sets), wte(size_t(V) * size_t(C), 1), wpe(size_t(T) * size_t(C), 1), dwte(wte.n, 1),
        dwpe(wpe.n, 1), sums(n, 1);
    fill(device, x, 1, 1), fill(device, wte, 1, 2), fill(device, wpe, 1, 3);
    std::vector<int> batch_host(TokenBatch::size(rows)), count;
    TokenBatch on_host(batch_host.data(), rows);
    // As in text: a quarter are spaces, as in the bytes of source code (0.24 of this trainer's, 0.15 of Shakespeare's);
    // the k-th most frequent of the others has a share of about 1/k (Zipf's law).
    for (size_t i = 0; i < rows; i++) {
        Philox draw = philox(1, uint32_t(i), 0, 0, 9);
        double u = draw.word[0] * 0x1p-32;
        on_host.tokens[i] = draw.word[1] % 4 == 0 ? 0 : int(std::pow(double(V), u)) % V, on_host.targets[i] = 0;
    }
    on_host.sort(rows, V, count);
    Ring<int> batch_device(batch_host.size(), 1);
    device.copy(batch_device(0), batch_host.data(), batch_host.size());
    CUDA(cudaMemsetAsync(dwte.all.data(), 0, dwte.all.size() * 4, device.stream));
    CUDA(cudaMemsetAsync(dwpe.all.data(), 0, dwpe.all.size() * 4, device.stream));
    TokenBatch batch(batch_device(0), rows);
    auto dx = host(device, x(0), n);
    std::vector<float> dte(size_t(V) * size_t(C)), dpe(size_t(T) * size_t(C)), expected(n);
    auto te = host(device, wte(0), dte.size()), pe = host(device, wpe(0), dpe.size());
    cpu::embedding_backward(dte.data(), dpe.data(), dx.data(), on_host.tokens, B, T, C);
    embedding_backward(device, dwte(0), dwpe(0), sums(0), x(0), batch, B, T, C, V);
    check("embedding_backward wte", dte, host(device, dwte(0), dte.size()), 1e-5);
    check("embedding_backward wpe", dpe, host(device, dwpe(0), dpe.size()), 1e-5);
    cpu::embedding_forward(expected.data(), on_host.tokens, te.data(), pe.data(), B, T, C, 0);
    bandwidth(device, backward_row, double(n) * 8,
              [&](int i) { embedding_backward(device, dwte(0), dwpe(0), sums(0), x(i), batch, B, T, C, V); });
    bandwidth(device, forward_row, double(n) * 8,
              [&](int i) { embedding_forward(device, x(i), batch.tokens, wte(0), wpe(0), B, T, C, 0); });
    embedding_forward(device, x(0), batch.tokens, wte(0), wpe(0), B, T, C, 0);
    check("embedding_forward", expected, host(device, x(0), n), 1e-6);
}

// By wgmma where the GPU has it, and then by mma.sync too, in rows that end with _mma; elsewhere by mma.sync alone.
void bench_attention(Device& device, int B, int T, int C, int D, double matrix_rate) {
    std::string forward_row = format("attention_forward_T%d_D%d", T, D),
                backward_row = format("attention_backward_T%d_D%d", T, D);
    const char *cudnn = "_vs_cudnn", *mma = "_mma";
    if (!any_wanted({forward_row + cudnn, forward_row + mma, backward_row + cudnn, backward_row + mma})) return;
    int H = C / D;
    size_t n = size_t(B) * size_t(T) * size_t(C), numbers = size_t(B) * size_t(T) * size_t(H),
           sets = bench.sets_for(n * 8 * sizeof(branch_t));
    Ring<branch_t> qkv(3 * n, sets), dqkv(3 * n, sets), y(n, sets), dy(n, sets);
    Ring<float> lse(numbers, sets), delta(numbers, 1);
    DeviceArray<float> scratch(attention_scratch(B, T, C, H));
    fill(device, qkv, 2, 1), fill(device, dy, 1, 2);
    auto forward = [&](int i, int sequences) {
        attention_forward(device, y(i), lse(i), qkv(i), sequences, T, C, H, 0);
    };
    auto backward = [&](int i, int sequences) {
        attention_backward(device, dqkv(i), delta(0), dy(i), qkv(i), y(i), lse(i), sequences, T, C, H, scratch.data());
    };
    size_t one = size_t(T) * size_t(C);  // one sequence on the CPU
    std::vector<float> expected_y(one), expected_lse(size_t(T) * size_t(H)), expected_dqkv(3 * one);
    {
        auto q = host(device, qkv(0), 3 * one), d = host(device, dy(0), one);
        cpu::attention_forward(expected_y.data(), expected_lse.data(), q.data(), 1, T, C, H, 0);
        cpu::attention_backward(expected_dqkv.data(), d.data(), q.data(), expected_y.data(), expected_lse.data(), 1, T,
                                C, H);
    }
    auto compare = [&](const std::string& which) {
        CUDA(cudaMemsetAsync(y(0), 0xff, one * sizeof(branch_t), device.stream));  // NaN, not another twin's results
        CUDA(cudaMemsetAsync(dqkv(0), 0xff, 3 * one * sizeof(branch_t), device.stream));
        forward(0, 1), backward(0, 1);
        check((forward_row + which).c_str(), expected_y, host(device, y(0), one), TOLERANCE);
        check((backward_row + which).c_str(), expected_dqkv, host(device, dqkv(0), 3 * one),
              2 * TOLERANCE);  // p and ds are rounded on the way
    };
    // Beside PyTorch's FlashAttention-2 where it has run, the first beside its cuDNN too; else, under a name
    // of its own, beside the large product.
    auto time = [&](const std::string& row, const std::string& which, double flops, const auto& run) {
        if (!any_wanted({row + which, row + cudnn})) return;
        double seconds = median_seconds(device, [&](int i) { run(i, B); });
        if (auto peer = sdpa.find(row); peer != sdpa.end())
            report(row + which, seconds, flops, "TFLOP/s", peer->second, "SDPA, TFLOP/s");
        else report(row + which + "_of_matrix", seconds, flops, "TFLOP/s", matrix_rate / 1e12, "matrix, TFLOP/s");
        if (auto peer = sdpa.find(row + "_cudnn"); peer != sdpa.end() && which.empty())
            report(row + cudnn, seconds, flops, "TFLOP/s", peer->second, "cuDNN, TFLOP/s");
    };
    double flops = 2.0 * B * T * double(T) * C;  // forward: two products, half of the scores
    auto measure = [&](const std::string& which) {
        compare(which);
        for (size_t i = 0; i < sets; i++) forward(int(i), B);
        time(forward_row, which, flops, forward);
        time(backward_row, which, 2.5 * flops, backward);  // five products
    };
    device.wgmma = Device::has_wgmma();
    measure("");
    if (device.wgmma) {
        device.wgmma = false;
        measure(mma);
    }
    device.wgmma = Device::wants_wgmma();
}

void bench_products(Device& device, int rows, int C, double matrix_rate) {
    for (auto [name, K, N] : {std::tuple<const char*, int, int>{"qkv", C, 3 * C},
                              {"attproj", C, C},
                              {"fc", C, 4 * C},
                              {"fcproj", 4 * C, C}}) {
        std::string forward_row = format("product_%s_C%d", name, C),
                    backward_row = format("product_%s_backward_C%d", name, C);
        if (!any_wanted({forward_row, backward_row})) continue;
        size_t k = size_t(K), n = size_t(N), r = size_t(rows), sets = bench.sets_for((k + n) * r * sizeof(branch_t));
        Ring<branch_t> in(r * k, sets), out(r * n, sets), w(k * n, 1);
        Ring<float> dw(k * n, 1);
        fill(device, in, 1, 1), fill(device, w, 1, 2), fill(device, out, 1, 3);
        double operations = 2.0 * double(r) * double(k) * double(n);
        double forward = median_seconds(device, [&](int i) { matmul_forward(device, out(i), in(i), w(0), r, k, n); });
        report(forward_row, forward, operations, "TFLOP/s", matrix_rate / 1e12, "matrix, TFLOP/s");
        double backward = median_seconds(device, [&](int i) {
            matmul_backward(device, in(i), {dw(0), nullptr, nullptr, 0, {}}, out(i), in(i), w(0), r, k, n);
        });
        report(backward_row, backward, 2 * operations, "TFLOP/s", matrix_rate / 1e12, "matrix, TFLOP/s");
    }
}

// Lines of name,TFLOP/s
void read_sdpa(const std::string& path) {
    std::ifstream in(path);
    for (std::string line; std::getline(in, line);)
        if (size_t comma = line.find(','); comma != std::string::npos)
            sdpa[line.substr(0, comma)] = std::atof(line.c_str() + comma + 1);
    if (sdpa.empty()) fail("--sdpa: expected lines of name,TFLOP/s in %s, found none", path);
}

void read_only(const std::string& regex) try { only = regex; } catch (const std::regex_error& error) {
    fail("--only: expected a regular expression, found '%s' (%s)", regex, error.what());
}

int run(int argc, char** argv) {
    for (int i = 1; i < argc; i++) {
        if (bench.takes_flag(argc, argv, i)) continue;
        if (std::string(argv[i]) == "--sdpa" && i + 1 < argc) read_sdpa(argv[++i]);
        else if (std::string(argv[i]) == "--only" && i + 1 < argc) read_only(argv[++i]);
        else fail("expected --small, --csv FILE, --sdpa FILE or --only REGEX, found '%s'", argv[i]);
    }
    bench.begin();
    RunConfig tiny;
    tiny.model.max_seq_len = 1, tiny.model.V = 256, tiny.model.L = 2, tiny.model.H = 1, tiny.model.C = 64;
    tiny.B = tiny.T = 1, tiny.total_batch = 1;
    Trainer trainer(tiny);  // for its device and its matrix rate
    Device& device = trainer.model.device;
    cudaDeviceProp p = gpu_properties();
    bool small = bench.small;
    double rate = trainer.matrix_rate();
    print("%s; L2 %.0f MiB; %s build; matrix products %.1f TFLOP/s\n", p.name, double(p.l2CacheSize) / (1 << 20),
          BRANCH_BF16 ? "BF16" : "FP32", rate / 1e12);
    int rows = small ? 192 : 16384;
    for (int C : {1024, 256}) {
        int channels = small ? C / 4 : C;
        bench_highway(device, rows, channels);
        bench_gelu(device, rows, channels);
    }
    bench_classifier(device, small ? 24 : 4096, small ? 1000 : 50257);
    ModelConfig c;
    c.L = small ? 4 : 24, c.C = small ? 64 : 1024, c.H = c.C / 64, c.V = small ? 256 : 50257,
    c.max_seq_len = small ? 64 : 1024, c.alpha = float(c.L);
    bench_optimizer(device, c);
    for (int V : {256, 50257})
        bench_embedding(device, small ? 3 : 16, small ? 64 : 1024, small ? 64 : 1024, small ? V / 50 + 7 : V);
    for (int T : {1024, 4096})
        for (int D : {64, 128})
            bench_attention(device, small ? 1 : 16384 / T, small ? T / 16 : T, small ? 128 : 1024, D, rate);
    for (int C : {1024, 256}) bench_products(device, rows, small ? C / 4 : C, rate);
    if (!reported) fail("--only: expected what is in a row's name, such as attention or C1024, found no such row");
    print("%s\n",
          bench.bad ? format("%d results differ from the CPU's", bench.bad) : "every result agrees with the CPU's");
    return bench.bad ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) { return bench_main(bench, run, argc, argv); }
