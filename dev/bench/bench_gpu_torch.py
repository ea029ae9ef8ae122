"""PyTorch's side of dev/bench/bench_gpu.py: the reference model (dev/reference/keel.py) in the form that PyTorch runs fastest.

    python3 dev/bench/bench_gpu_torch.py -i DATA --norm keel -L 512 -C 1024 -H 16 -t 1024 -d 65536 --mode graphs
    python3 dev/bench/bench_gpu_torch.py --yardsticks          rate of a large BF16 product and of a copy

The same model, weights, batches and steps as train_keel's with the same flags, so its losses are the trainer's but for rounding:
FP32 parameters, gradients, moments and highway; branches and head in BF16 (the casts that torch.autocast would insert, written out);
fused attention, cuDNN's or FlashAttention's, whichever is quicker at the model's shape; vocabulary rows padded; fused
AdamW; the gradients of micro-batches added up in FP32.
--mode    eager; compile: torch.compile of each block, of the embedding and of the head; graphs: these, and a micro-step as one CUDA graph
--budget  of a compiled block's activations: what is cheapest is computed again in the backward pass (torch.compile's own choice)
--checkpoint    each block's forward pass again in the backward pass (torch.utils.checkpoint), so that only x is kept between blocks
--warm    no training: compiles what a run of --mode with this -b and --checkpoint compiles, for either attention, into
          the caches of TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR, and ends. Depth does not matter but for alpha:
          -L 4 -a 1024 compiles what -L 1024 runs.
Prints a line a step; a step that waits for its loss, as train_keel's does.
"""

import argparse
import gc
import math
import statistics
import sys
import time
from pathlib import Path

start = time.perf_counter()
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "dev" / "reference"), str(ROOT / "data")]
import keel
import shards
from keel_file import FINAL_NORM, NORMS, Config, parameter_table, sub_layer

STREAM_DATA = 1  # keel_common.h's PhiloxStream
OUT_OF_MEMORY = 3  # exit status


# ---------------------------------------------------------------------------------------------------------
# The trainer's weights and batches, bit for bit

def philox4x32_10(block, stream, seed):
    """keel.philox4x32_10 in int64 that holds uint32: the words of counter (block, stream, 0), for blocks (1,n) and
    streams (k,1) (4,k,n)."""
    mask = 0xFFFFFFFF

    def multiply(a, b):  # high and low word of a product of 64 bits, which int64 does not hold
        low, high = a * (b & 0xFFFF), a * (b >> 16)
        return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & mask

    c0, c1, c2, c3 = block & mask, block >> 32, stream, torch.zeros_like(stream)
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        (h0, l0), (h1, l1) = multiply(c0, 0xD2511F53), multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return torch.stack([c0, c1, c2, c3])


def initial_weights(cfg, seed, device, at_once=1 << 25):
    """keel.init_params on the device, where billions are drawn in a second or two: matrices of one shape together,
    `at_once` numbers at a time."""
    table = parameter_table(cfg)
    params = {name: torch.ones(shape, device=device) for name, shape in table}
    for shape in {shape for _, shape in table if len(shape) == 2}:
        members = [(index, name) for index, (name, s) in enumerate(table) if s == shape]
        count, per = shape[0] * shape[1], max(1, at_once // (shape[0] * shape[1]))
        blocks = (count + 3) // 4
        for first in range(0, len(members), per):
            part = members[first:first + per]
            stream = torch.tensor([index for index, _ in part], device=device)[:, None]
            for at in range(0, blocks, at_once // 4):
                n = min(at_once // 4, blocks - at)
                words = philox4x32_10(torch.arange(at, at + n, device=device)[None], stream, seed)
                u = (words >> 8).float().permute(1, 2, 0).reshape(len(part), 4 * n) * 2.0 ** -24
                for (_, name), row in zip(part, u):
                    params[name].view(-1)[4 * at:4 * (at + n)] = row[:count - 4 * at]
    for name, p in params.items():
        if p.dim() == 2:
            p.mul_(2).sub_(1).mul_(torch.from_numpy(keel.init_bound(cfg, name, p.shape)).to(device))
    params["wte"][cfg.V:] = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return params


class Batches:
    """The trainer's order of sequences (Loader in keel_common.h): chunks of T tokens, permuted by a Feistel network,
    each epoch shifted."""

    def __init__(self, path, T, seed):
        if path.endswith(".bin"):
            tokens = np.frombuffer(shards.read_shard(path), np.uint16)
        else:
            tokens = np.fromfile(path, np.uint8)
        self.tokens = torch.from_numpy(tokens[:len(tokens) - len(tokens) // 10].astype(np.int64))  # the last tenth is for validation
        self.T, self.seed = T, seed
        self.sequences = (len(self.tokens) - 1) // T
        self.spare = len(self.tokens) - 1 - self.sequences * T
        self.half_bits = 1
        while 1 << 2 * self.half_bits < self.sequences:
            self.half_bits += 1

    def philox(self, c0, c1, c2, seed):
        c0 = np.atleast_1d(np.asarray(c0, np.uint64))
        return keel.philox4x32_10((c0, np.full_like(c0, c1), np.full_like(c0, c2), np.full_like(c0, STREAM_DATA)),
                                  (seed & 0xFFFFFFFF, seed >> 32))[0].astype(np.int64)

    def permuted(self, i, epoch):
        mask, i = (1 << self.half_bits) - 1, np.array(i, np.int64)
        todo = np.ones(i.shape, bool)
        while todo.any():
            left, right = i[todo] >> self.half_bits, i[todo] & mask
            for turn in range(6):
                left, right = right, (left ^ self.philox(right, epoch & 0xFFFFFFFF, turn, self.seed ^ (epoch >> 32))) & mask
            i[todo] = left << self.half_bits | right
            todo &= i >= self.sequences
        return i

    def positions(self, first, count):
        """First tokens of sequences first .. first + count - 1."""
        s = np.arange(first, first + count)
        out = np.empty(count, np.int64)
        for epoch in range(first // self.sequences, (first + count - 1) // self.sequences + 1):
            shift = int(self.philox(epoch & 0xFFFFFFFF, epoch >> 32, 0xFFFFFFFF, self.seed)[0]) % (self.spare + 1)
            of_it = s // self.sequences == epoch
            out[of_it] = shift + self.permuted(s[of_it] % self.sequences, epoch) * self.T
        return out

    def batch(self, first, count):
        """Tokens and targets, each (count, T)."""
        at = torch.from_numpy(self.positions(first, count))[:, None] + torch.arange(self.T + 1)
        text = self.tokens[at]
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()


# ---------------------------------------------------------------------------------------------------------
# Attention

# Causal, of q, k, v (B,H,T,D). Operators by their names, not scaled_dot_product_attention under sdpa_kernel(): the
# cache of compiled code does not see which backend a context outside the compiled function chose, so that it would give
# one backend's code to the other, and a context inside it passes the cache by.
FUSED = {
    "cuDNN": lambda q, k, v: torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True)[0],
    "FlashAttention": lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0],
}


def usual_attention():
    """(name, function) where there is nothing to choose from: without a GPU or in an old PyTorch."""
    if not hasattr(F, "scaled_dot_product_attention"):
        return "the reference's", keel.attention
    return "scaled_dot_product_attention", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)


def split_heads(qkv, H):
    """q, k, v (B,H,T,D) as views of qkv (B,T,3C)."""
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    return [i.view(B, T, H, C // H).transpose(1, 2) for i in qkv.split(C, dim=-1)]


def graph_of(run, times=1):
    """A CUDA graph of so many runs, after two that let libraries take what they take once."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.empty_cache()  # for the graph's own pool
    with torch.cuda.graph(graph, stream=side):
        for _ in range(times):
            run()
    return graph


def seconds_of(run, repeats=15):
    """The median of its times, after 0.2 s in which the clocks rise."""
    until, times = time.perf_counter() + 0.2, []
    while time.perf_counter() < until:
        run()
        torch.cuda.synchronize()
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def attention_milliseconds(attention, B, H, T, D, launches=10):
    """Of a forward and a backward pass in BF16 over q, k, v that lie in memory as the model's, in a graph, as launching
    them takes longer than small ones run; None where the backend refuses them."""
    q, k, v = (
        i.detach().requires_grad_()
        for i in split_heads(torch.randn(B, T, 3 * H * D, device="cuda", dtype=torch.bfloat16), H)
    )
    gradient = torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    try:
        graph = graph_of(lambda: torch.autograd.grad(attention(q, k, v), (q, k, v), gradient), launches)
        return 1e3 * seconds_of(graph.replay, 5) / launches
    except RuntimeError as error:
        if short_of_memory(error):
            raise
        return None


def short_of_memory(error):
    """In a graph's recording too little memory shows as a recording that failed, on its way from the first error."""
    while error is not None:
        if "out of memory" in str(error):
            return True
        error = error.__context__
    return False


def fastest_attention(B, H, T, D):
    """(name, function) of the fused attention that is quicker on this GPU."""
    found = {name: attention_milliseconds(function, B, H, T, D) for name, function in FUSED.items()
             if hasattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention")}
    found = {name: ms for name, ms in found.items() if ms is not None}
    torch.cuda.empty_cache()
    if not found:
        return usual_attention()
    best = min(found, key=found.get)
    print(f"attention {', '.join(f'{name} {ms:.2f} ms' for name, ms in found.items())}: {best}", flush=True)
    return best, FUSED[best]


# ---------------------------------------------------------------------------------------------------------
# The model, as functions of tensors: blocks with the same placement share one compiled function

def make_block(cfg, m, branch, attention, rmsnorm):
    """Block m (sub-layers 2m and 2m + 1) as a function of x (B,T,C) and its parameters, a dict without the index of the
    sub-layer."""
    H, placements = cfg.H, (sub_layer(cfg, 2 * m), sub_layer(cfg, 2 * m + 1))

    def linear(x, w):
        return F.linear(x, w.to(branch))

    def attention_branch(u, w, norm_qkv):
        B, T, C = u.shape
        q, k, v = split_heads(linear(u, w["qkvw"]), H)
        if norm_qkv:
            q, k, v = (rmsnorm(i.float(), w["gamma_" + name]).to(branch) for name, i in zip("qkv", (q, k, v)))
        return linear(attention(q, k, v).transpose(1, 2).reshape(B, T, C), w["attprojw"])

    def feed_forward_branch(u, w):
        return linear(F.gelu(linear(u, w["fcw"]), approximate="tanh"), w["fcprojw"])

    def block(x, w):
        for i, s in enumerate(placements):
            u = (rmsnorm(x, w[f"gamma_in{i}"]) if s.norm_in else x).to(branch)
            f = attention_branch(u, w, s.norm_qkv) if i == 0 else feed_forward_branch(u, w)
            z = s.alpha * x + f.float()
            x = rmsnorm(z, w[f"gamma_out{i}"]) if s.norm_out else z
        return x

    return block


class Model:
    def __init__(self, cfg, params, attention, branch, compiled, with_checkpoint):
        self.cfg, self.params = cfg, params
        for p in params.values():
            p.requires_grad_()
        if compiled:  # alpha is a constant of each placement's code, not a number that a kernel is given, of which a cache may keep an old one
            from torch import _dynamo
            _dynamo.config.specialize_float = True
        compiled_form = (lambda function: torch.compile(function, dynamic=False)) if compiled else lambda function: function
        fused = not compiled and hasattr(F, "rms_norm")
        rmsnorm = (lambda x, gamma: F.rms_norm(x, gamma.shape, gamma, keel.RMS_EPS)) if fused else keel.rmsnorm
        functions, self.blocks = {}, []
        for m in range(cfg.L // 2):
            placement = (sub_layer(cfg, 2 * m), sub_layer(cfg, 2 * m + 1))
            if placement not in functions:
                functions[placement] = compiled_form(make_block(cfg, m, branch, attention, rmsnorm))
            weights = {}
            for l in (2 * m, 2 * m + 1):
                for name in (n for n in ("gamma_in", "qkvw", "gamma_q", "gamma_k", "gamma_v", "attprojw", "gamma_out", "fcw", "fcprojw") if f"{n}[{l}]" in params):
                    weights[name + (str(l % 2) if name in ("gamma_in", "gamma_out") else "")] = params[f"{name}[{l}]"]
            self.blocks.append((functions[placement], weights))
        self.checkpoint = with_checkpoint

        def embed(tokens, wte, wpe):
            return math.sqrt(cfg.C) * (F.embedding(tokens, wte) + wpe[:tokens.shape[1]])

        def head(x, targets, wte, gamma):
            if gamma is not None:
                x = rmsnorm(x, gamma)
            logits = F.linear(x.to(branch), wte.to(branch))[..., :cfg.V].float()  # the product runs on padded rows, which are no words
            return F.cross_entropy(logits.reshape(-1, cfg.V), targets.reshape(-1))

        self.embed, self.head = compiled_form(embed), compiled_form(head)

    def loss(self, tokens, targets):
        p = self.params
        x = self.embed(tokens, p["wte"], p["wpe"])
        for block, weights in self.blocks:
            if self.checkpoint:
                x = checkpoint(block, x, weights, use_reentrant=False, preserve_rng_state=False)  # nothing in it is random
            else:
                x = block(x, weights)
        return self.head(x, targets, p["wte"], p["gamma_final"] if self.cfg.norm in FINAL_NORM else None)


class MicroStep:
    """Adds the gradients of a micro-batch, and its loss to `total`, all over the number of micro-batches; as a CUDA
    graph where asked for."""

    def __init__(self, model, B, T, micro_steps, device, graph):
        self.model, self.scale, self.graph = model, 1 / micro_steps, None
        self.tokens, self.targets = (torch.zeros((B, T), dtype=torch.long, device=device) for _ in range(2))
        self.total = torch.zeros((), device=device)
        for p in model.params.values():  # in place from here on: a graph adds where it was told to
            p.grad = torch.zeros_like(p)
        # All gradients at once are added in a few launches; where they are a good part of the memory, each when it is there.
        params = list(model.params.values())
        at_once = device.type == "cuda" and 4 * sum(p.numel() for p in params) < 0.1 * torch.cuda.mem_get_info()[1]
        self.params = params if at_once else None
        if graph:
            self.graph = graph_of(self.run)
            self.reset()

    def run(self):
        loss = self.model.loss(self.tokens, self.targets) * self.scale
        if self.params:
            torch._foreach_add_([p.grad for p in self.params], torch.autograd.grad(loss, self.params))
        else:
            loss.backward()
        self.total += loss.detach()

    def reset(self):
        self.total.zero_()
        torch._foreach_zero_([p.grad for p in self.model.params.values()])

    def __call__(self, tokens, targets):
        self.tokens.copy_(tokens, non_blocking=True), self.targets.copy_(targets, non_blocking=True)
        self.graph.replay() if self.graph else self.run()


# ---------------------------------------------------------------------------------------------------------
# The run

def model_config(a):
    return Config(a.seq_len, 50257 if a.train.endswith(".bin") else 256, a.layers, a.heads, a.channels, a.norm, a.alpha)


def warm(a, B, device, branch):
    """One forward and backward pass of each kind of block, of the embedding and of the head, with each attention that a
    run may choose."""
    cfg = model_config(a)
    for name, attention in FUSED.items() if device.type == "cuda" else [usual_attention()]:
        begin = time.perf_counter()
        try:
            model = Model(cfg, initial_weights(cfg, a.seed, device), attention, branch, a.mode != "eager", a.checkpoint)
            MicroStep(model, B, a.seq_len, 1, device, False).run()
        except RuntimeError as error:  # a backend that refuses the shape is none that a run will choose
            print(f"warm, {name}: {str(error).splitlines()[0]}", flush=True)
            continue
        print(f"warm, {name}: {time.perf_counter() - begin:.1f} s", flush=True)


def train(a, B, device, branch):
    cfg = model_config(a)
    on_gpu, sequences = device.type == "cuda", a.total_batch // a.seq_len
    attention = fastest_attention(B, cfg.H, a.seq_len, cfg.D)[1] if on_gpu else usual_attention()[1]
    params = initial_weights(cfg, a.seed, device)
    model = Model(cfg, params, attention, branch, a.mode != "eager", a.checkpoint)
    groups = [{"params": [p for p in params.values() if p.dim() == 2], "weight_decay": 0.01},  # the trainer's defaults
              {"params": [p for p in params.values() if p.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=a.lr, betas=(0.9, 0.95), eps=1e-12, **({"fused": True} if on_gpu else {}))
    if on_gpu:  # now, so that a micro-batch that leaves no room for them is found before its compilation
        for p in params.values():
            optimizer.state[p] = {"step": torch.zeros((), device=device), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    batches = Batches(a.train, a.seq_len, a.seed)
    host = batches.batch(0, a.steps * sequences)
    if on_gpu:
        host = [t.pin_memory() for t in host]
    micro_step = MicroStep(model, B, a.seq_len, sequences // B, device, a.mode == "graphs")
    print(f"batch {B}, ready {time.perf_counter() - start:.1f} s after the start", flush=True)

    for step in range(1, a.steps + 1):
        begin = time.perf_counter()
        for i in range((step - 1) * sequences, step * sequences, B):
            micro_step(host[0][i:i + B], host[1][i:i + B])
        norm = torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = keel.learning_rate(step, a.steps, a.warmup, a.lr)
        optimizer.step()
        loss, norm = micro_step.total.item(), norm.item()
        micro_step.reset()
        print(f"step {step} loss {loss:.9g} norm {norm:.9g} ms {(time.perf_counter() - begin) * 1e3:.3f}", flush=True)


def yardsticks():
    """The rates of a large product and of a copy over buffers that pass the L2 cache."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    print(f"matrix_rate {2 * n ** 3 / seconds_of(lambda: torch.mm(a, b.T, out=out)):.6g}")
    source = torch.randn(1 << 28, device="cuda")  # 1 GiB
    to = torch.empty_like(source)
    print(f"copy_rate {2 * 4 * source.numel() / seconds_of(lambda: to.copy_(source)):.6g}")


def main():
    parser = argparse.ArgumentParser(prog="dev/bench/bench_gpu_torch.py", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--yardsticks", action="store_true")
    add("-i", "--train", metavar="PATH", help="text or a .bin shard")
    add("--norm", choices=NORMS, default="keel")
    add("-L", "--layers", type=int)
    add("-C", "--channels", type=int)
    add("-H", "--heads", type=int)
    add("-t", "--seq-len", type=int)
    add("-a", "--alpha", type=float, help="[the placement's own]")
    add("-b", "--batch", type=int, help="sequences in a micro-batch [the largest that fits]")
    add("--or-less", action="store_true", help="where -b does not fit, the next smaller micro-batches are tried")
    add("--warm", action="store_true", help="compile into the caches and end")
    add("-d", "--total-batch", type=int, help="tokens a step")
    add("-x", "--steps", type=int, default=8)
    add("-l", "--lr", type=float, default=1e-3)
    add("-u", "--warmup", type=int, default=4)
    add("--seed", type=int, default=1337)
    add("--mode", choices=["eager", "compile", "graphs"], default="eager")
    add("--checkpoint", action="store_true")
    add("--budget", type=float, default=1.0, help="share of a block's activations that is kept; the rest is recomputed")
    add("--device", default="cuda", help="cpu: in FP32, for comparing [%(default)s]")
    a = parser.parse_args()
    if a.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_gpu_torch: expected a GPU that PyTorch can use, found none")
    if a.mode != "eager" and not hasattr(torch, "compile"):
        sys.exit(f"bench_gpu_torch: --mode {a.mode}: expected PyTorch 2.0 or later, found {torch.__version__}; use --mode eager")
    if a.mode == "graphs" and a.device == "cpu":
        sys.exit("bench_gpu_torch: --mode graphs: expected a GPU, found --device cpu; use --mode compile")
    if a.budget < 1:
        from torch._functorch import config as functorch
        functorch.activation_memory_budget = a.budget
    print(f"PyTorch {torch.__version__}", flush=True)
    if a.yardsticks:
        return yardsticks()
    device, branch = torch.device(a.device), torch.bfloat16 if a.device == "cuda" else torch.float32
    sequences = a.total_batch // a.seq_len
    # At most 32768 tokens at a time where none is named: what is wider is no faster.
    tries = [B for B in range(a.batch or max(1, 32768 // a.seq_len), 0, -1) if sequences % B == 0]
    if a.batch and not a.or_less:
        tries = [a.batch]
    if a.warm:
        return warm(a, tries[0], device, branch)
    for B in tries:
        try:
            return train(a, B, device, branch)
        except RuntimeError as error:
            if a.device == "cpu" or not short_of_memory(error):
                raise
            print(f"batch {B} does not fit: {str(error).splitlines()[0]}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        if hasattr(torch, "_dynamo"):
            torch._dynamo.reset()
    sys.exit(OUT_OF_MEMORY)


if __name__ == "__main__":
    main()
