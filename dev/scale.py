#!/usr/bin/env python3
"""What several ranks cost: bytes sent per step and rank, seconds of them against those of the computation, and memory per rank.

  scale.py               prints the tables of dev/doc/scale.md
  scale.py --check FILE  compares them with those that the file holds; exit 1 where they differ
  scale.py --bytes ...   prints the bytes that a rank sends in a step of a run with these flags, which test/test_ranks.cpp holds against the bytes counted
"""
import argparse
import math
import sys

# The machine of the tables: a node of eight H200, NVLink inside, one 400 Gb/s port a GPU outside. Rates are NVIDIA's, bytes a second and direction of each GPU.
GPUS = 8                   # of a node
MATRIX_RATE = 989e12       # operations a second, BF16, dense
UTILISATION = 0.5          # of it, that a step reaches; an assumption, as no GPU has run this code
NVLINK = 450e9
NETWORK = 50e9             # 400 Gb/s
REACHED = 0.8              # of the links' rates, that a ring of large messages reaches; an assumption
SHARE = 24                 # bytes of StepShare (keel_common.h)
GPT2 = 50257


class Model:
    """The shape, and what keel_common.h's ParameterLayout makes of it (--norm keel)."""

    def __init__(self, layers, channels, heads, seq_len, vocabulary):
        self.L, self.C, self.H, self.T, self.V = layers, channels, heads, seq_len, vocabulary
        self.Vp = math.ceil(vocabulary / 128) * 128
        gains = 2 * layers - 1                       # an inner and an outer norm each, but for sub-layer 0's outer
        self.outer = (self.Vp + seq_len) * channels + gains * channels
        self.block = 12 * channels * channels        # the matrices of a block
        self.blocks = layers // 2
        self.count = self.outer + self.blocks * self.block

    def shards(self, ranks):
        """Elements that a rank owns of unit 0 and of each block, padding included."""
        return [math.ceil(math.ceil(n / ranks) / 128) * 128 for n in (self.outer, self.block)]

    def operations(self):
        """Of a token: forward 2, backward 4 a weight, causal attention counted once."""
        return 6 * (self.blocks * self.block + self.Vp * self.C) + 6 * self.C * self.T * self.blocks


def bytes_sent(model, ranks, zero, micro_steps, weight_bytes):
    """By a rank in a step. A ring's reduce-scatter or all-gather of N shards sends N - 1 of them."""
    outer, block = model.shards(ranks)
    shard = outer + model.blocks * block
    reduced = micro_steps * 4 * shard
    gathered = 4 * shard if zero == 0 else 4 * outer + weight_bytes * model.blocks * block
    return (ranks - 1) * (reduced + gathered + SHARE)


def memory(model, ranks, zero):
    """Bytes of a rank in the BF16 build, without activations: FP32 weights, gradients and moments, BF16 weights."""
    outer, block = model.shards(ranks)
    size, shard = ranks * (outer + model.blocks * block), outer + model.blocks * block
    states = 12 * size if zero == 0 else 12 * shard + 4 * ranks * outer   # masters, two moments; unit 0 is whole in FP32 everywhere
    gradients = 4 * size if zero < 2 else 4 * ranks * (outer + 2 * block)
    return states + gradients + 2 * size + 4 * shard + 4 * max(outer, block)  # BF16 weights, gradients of the rank's part, what a reduce-scatter brings


# The depth of the paper's deepest models, at three widths.
MODELS = [("3B", Model(1024, 704, 11, 4096, GPT2)), ("6.4B", Model(1024, 1024, 16, 4096, GPT2)), ("30B", Model(1024, 2176, 34, 4096, GPT2))]


def gib(n):
    return f"{n / 2**30:,.1f}"


def ring_rate(ranks):
    """Bytes a second that a rank sends in a ring over all of them: the slowest link's."""
    return REACHED * (NVLINK if ranks <= GPUS else NETWORK)


def table(head, rows):
    widths = [max(len(str(r[i])) for r in [head] + rows) for i in range(len(head))]
    line = lambda cells: "| " + " | ".join(str(c).rjust(w) if i else str(c).ljust(w) for i, (c, w) in enumerate(zip(cells, widths))) + " |"
    return "\n".join([line(head), "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"] + [line(r) for r in rows])


def tables():
    memory_rows = [[name, f"{m.count / 1e9:.2f}"] + [gib(memory(m, ranks, zero)) for ranks in (8, 64, 1024) for zero in (0, 1, 2)] for name, m in MODELS]
    yield table(["model", "parameters, 1e9"] + [f"{ranks} ranks, -z {zero}" for ranks in (8, 64, 1024) for zero in (0, 1, 2)], memory_rows)

    rows = []
    for name, m in MODELS:
        for ranks in (8, 64, 1024):
            rate = ring_rate(ranks)
            reduce_seconds = bytes_sent(m, ranks, 1, 1, 2) - bytes_sent(m, ranks, 1, 0, 2)
            gather_seconds = bytes_sent(m, ranks, 1, 0, 2)
            # tokens of a micro-batch whose backward pass, two thirds of its operations, takes as long as its reduce-scatter
            token_seconds = m.operations() / (MATRIX_RATE * UTILISATION)
            hide_reduce = reduce_seconds / rate / (2 / 3 * token_seconds)
            hide_gather = gather_seconds / rate / (1 / 3 * token_seconds)
            tokens = max(hide_reduce, hide_gather)
            rows.append([name, ranks, gib(bytes_sent(m, ranks, 0, 1, 2)), gib(bytes_sent(m, ranks, 1, 1, 2)), f"{reduce_seconds / rate * 1e3:,.0f}", f"{gather_seconds / rate * 1e3:,.0f}",
                         f"{8192 * token_seconds * 1e3:,.0f}", f"{hide_reduce:,.0f}", f"{hide_gather:,.0f}", f"{tokens * ranks / 1e6:,.1f}"])
    yield table(["model", "ranks", "GiB, -z 0", "GiB, -z 1 or 2", "reduce, ms", "gather, ms", "8192 tokens, ms", "tokens that hide reduce", "tokens that hide gather", "total batch, 1e6"], rows)

    rows = []
    for name, m in MODELS:
        for stages in (2, 4, 8):
            for ranks in (1024,):
                data_ranks = ranks // stages
                token_seconds = m.operations() / (MATRIX_RATE * UTILISATION) / stages
                # each data-parallel ring carries a stage's parameters alone, a ring a stage
                reduce = 4 * m.count / stages * (data_ranks - 1) / data_ranks / ring_rate(ranks)
                batch = 4e6                                     # tokens, the paper's
                per_pipe = batch / data_ranks                   # tokens of one pipeline a step
                micro = max(1, round(per_pipe / m.T))           # micro-batches of one sequence
                compute = per_pipe * token_seconds
                bubble = compute * (stages - 1) / micro
                alone = batch / ranks * token_seconds * stages  # data parallel over all ranks
                exposed = max(0.0, 4 * m.count / ring_rate(ranks) - 2 / 3 * alone)
                pipe_exposed = max(0.0, reduce - 2 / 3 * compute / micro)
                rows.append([name, stages, micro, f"{(alone + exposed) * 1e3:,.0f}", f"{(compute + bubble + pipe_exposed) * 1e3:,.0f}", f"{2 * 4 * m.C * m.T * micro / 2**20:,.0f}"])
    yield table(["model", "stages", "micro-batches", "step without, ms", "step with, ms", "MiB sent a stage"], rows)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", metavar="FILE")
    p.add_argument("--bytes", action="store_true")
    for flag, name in (("-L", "layers"), ("-C", "channels"), ("-H", "heads"), ("-t", "seq_len"), ("-V", "vocabulary"), ("-b", "batch"), ("-d", "total_batch"), ("-z", "zero")):
        p.add_argument(flag, dest=name, type=int, default=0)
    p.add_argument("--ranks", type=int, default=1)
    p.add_argument("--weights", choices=["fp32", "bf16"], default="bf16")
    a = p.parse_args()
    if a.bytes:
        model = Model(a.layers, a.channels, a.heads, a.seq_len, a.vocabulary)
        print(bytes_sent(model, a.ranks, a.zero, a.total_batch // (a.batch * a.seq_len * a.ranks), 2 if a.weights == "bf16" else 4))
    elif a.check:
        text = open(a.check).read()
        missing = [t for t in tables() if t not in text]
        print(f"{3 - len(missing)} passed, {len(missing)} failed")
        sys.exit(bool(missing))
    else:
        print("\n\n".join(tables()))


if __name__ == "__main__":
    main()
