"""PyTorch's attention at bench_kernels' shapes: causal scaled_dot_product_attention in BF16, B*T = 16384, C = 1024.

Prints name,TFLOP/s, forward and backward: the bare name is FlashAttention's, which dev/bench/bench_kernels.cu --sdpa holds
ours against; with _cudnn behind it, cuDNN's. FlashAttention's backward is the deterministic one, as ours always is;
cuDNN has none. Operations as flash attention counts them: two products forward and five backward, half of the scores masked. Medians of 9 timings
of 20 launches over buffers that together pass the L2 cache.
"""

import statistics
import sys

try:
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError as error:
    sys.exit(f"bench_sdpa needs PyTorch 2.3 or later with CUDA: {error}")
if not torch.cuda.is_available():
    sys.exit("bench_sdpa needs a GPU that PyTorch can use, found none")

LAUNCHES, REPEATS, CHANNELS, ROWS = 20, 9, 1024, 16384


def median_seconds(run):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for repeat in range(REPEATS + 1):  # the first warms up
        start.record()
        for i in range(LAUNCHES):
            run(i)
        end.record()
        end.synchronize()
        if repeat:
            times.append(start.elapsed_time(end) * 1e-3 / LAUNCHES)
    return statistics.median(times)


def measure(T, D, backend):
    B, H = ROWS // T, CHANNELS // D
    sets = [[torch.randn(B, H, T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)] for _ in range(2)]
    gradient = torch.randn(B, H, T, D, device="cuda", dtype=torch.bfloat16)
    flops = 2.0 * B * T * T * CHANNELS
    with sdpa_kernel(backend):
        def attention(i):
            return F.scaled_dot_product_attention(*sets[i % 2], is_causal=True)

        with torch.no_grad():
            forward = median_seconds(attention)
        outputs = [attention(i) for i in range(2)]
        backward = median_seconds(lambda i: torch.autograd.grad(outputs[i % 2], sets[i % 2], gradient, retain_graph=True))
    return flops / forward / 1e12, 2.5 * flops / backward / 1e12


torch.utils.deterministic.fill_uninitialized_memory = False  # else each torch.empty is filled with NaN
print(f"PyTorch {torch.__version__}, {torch.cuda.get_device_name()}", file=sys.stderr)
for T in (1024, 4096):
    for D in (64, 128):
        for backend, suffix in ((SDPBackend.FLASH_ATTENTION, ""), (SDPBackend.CUDNN_ATTENTION, "_cudnn")):
            torch.use_deterministic_algorithms(backend == SDPBackend.FLASH_ATTENTION)
            try:
                forward, backward = measure(T, D, backend)
            except RuntimeError as error:
                print(f"T {T} D {D}{suffix}: {str(error).splitlines()[0]}", file=sys.stderr)
                continue
            print(f"attention_forward_T{T}_D{D}{suffix},{forward:.1f}")
            print(f"attention_backward_T{T}_D{D}{suffix},{backward:.1f}", flush=True)
