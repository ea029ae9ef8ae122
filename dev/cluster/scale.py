#!/usr/bin/env python3
"""What several ranks cost: bytes sent per step and rank, seconds of them against those of the computation, and memory per rank.

  scale.py               prints the tables of dev/doc/scale.md
  scale.py --check FILE  compares them with those that the file holds; exit 1 where they differ
  scale.py --memory ...  prints the bytes of memory that a rank needs, activations aside, held against the trainer's table by the same test
  scale.py --bytes ...   prints the bytes that a rank sends in a step of a run with these flags, which test/test_ranks.cpp holds against the bytes counted
"""
import argparse
import math
import sys

# The machine of the tables: nodes of eight H200, NVLink between their GPUs, a 400 Gb/s port for each. Bytes a second and direction of a GPU are NVIDIA's
# and the port's; matrix and memory rates those of dev/doc/speed.md, measured elsewhere. REACHED and HOP are assumptions: no GPU has run this.
GPUS = 8                   # of a node
MATRIX_RATE = 790e12       # operations a second, BF16
MEMORY_RATE = 4.3e12       # bytes a second
NVLINK = 450e9
NETWORK = 50e9
REACHED = 0.8              # of a link's rate, that a ring reaches with large messages
HOP = 2.3e-6               # seconds from one rank to the next: seven hops of eight inside a node (1.5 us), one between two (8 us)
SHARE = 24                 # bytes of StepShare (keel/trainer.h)
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
        """Elements that a rank owns of bucket 0 and of each block, padding included."""
        return [math.ceil(math.ceil(n / ranks) / 128) * 128 for n in (self.outer, self.block)]

    def token_seconds(self):
        """Of forward and backward: products at the matrix rate and the kernels' 202 C bytes a block (speed.md), one after the other. Nothing is computed again."""
        operations = 6 * (self.blocks * self.block + self.Vp * self.C) + 6 * self.C * self.T * self.blocks
        return operations / MATRIX_RATE + 202 * self.C * self.blocks / MEMORY_RATE


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
    # FP32 weights and two moments; from -z 1 on all ranks have bucket 0 in FP32, and each its part of the rest
    states = 12 * size if zero == 0 else 4 * ranks * outer + 4 * (shard - outer) + 8 * shard
    gradients = 4 * size if zero < 2 else 4 * ranks * (outer + 2 * block)
    return states + gradients + 2 * size + 4 * shard + 4 * max(outer, block)  # BF16 weights, gradients of the rank's part, what a reduce-scatter brings


# The depth of the paper's deepest models, at three widths.
MODELS = [("3B", Model(1024, 704, 11, 4096, GPT2)), ("6.4B", Model(1024, 1024, 16, 4096, GPT2)), ("30B", Model(1024, 2176, 34, 4096, GPT2))]


def gib(n):
    return f"{n / 2**30:,.1f}"


def seconds(ranks, sent, collectives):
    """Of ring collectives in which a rank sends so many bytes in all. A ring passes each node's ports once, and there are as many rings as ports: so
    a node's ports together carry what one of its GPUs sends."""
    rate = REACHED * (NVLINK if ranks <= GPUS else min(NVLINK, GPUS * NETWORK))
    return sent / rate + collectives * (ranks - 1) * HOP


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
            buckets, token = 1 + m.blocks, m.token_seconds()
            reduced = bytes_sent(m, ranks, 1, 1, 2) - bytes_sent(m, ranks, 1, 0, 2)  # of a micro-step
            gathered = bytes_sent(m, ranks, 1, 0, 2)                                 # of a step
            reduce, gather, hops = seconds(ranks, reduced, buckets), seconds(ranks, gathered, buckets), seconds(ranks, 0, buckets)
            hide_reduce, hide_gather = reduce / (2 / 3 * token), gather / (1 / 3 * token)
            rows.append([name, ranks, gib(reduced), gib(gathered), f"{reduce * 1e3:,.0f}", f"{gather * 1e3:,.0f}", f"{hops * 1e3:,.0f}", f"{4096 * token * 1e3:,.0f}",
                         f"{hide_reduce:,.0f}", f"{hide_gather:,.0f}", f"{max(hide_reduce, hide_gather) * ranks / 1e6:,.2f}"])
    yield table(["model", "ranks", "reduce, GiB", "gather, GiB", "reduce, ms", "gather, ms", "of these hops, ms", "4096 tokens, ms", "tokens that hide reduce", "that hide gather",
                 "batch of all, 1e6"], rows)

    # A batch of 4M tokens (the paper's) on 1024 ranks; micro-batches of one sequence; with stages, gradients reduced once a step, after the last backward pass
    # of each block, and 1F1B's bubble of stages - 1 micro-batches.
    rows, ranks, batch = [], 1024, 2**22
    for name, m in MODELS:
        for blocks_a_bucket in (1, 16):
            row = [name, blocks_a_bucket]
            for stages in (1, 2, 4, 8):
                data_ranks, collectives = ranks // stages, 1 + m.blocks // stages // blocks_a_bucket
                micro_batches = batch // data_ranks // m.T
                micro = m.T * m.token_seconds() / stages
                exposed_reduce = max(0.0, seconds(data_ranks, 4 * m.count / stages, collectives) - 2 / 3 * micro)
                exposed_gather = max(0.0, seconds(data_ranks, 2 * m.count / stages, collectives) - 1 / 3 * micro)
                row.append(f"{((micro_batches + stages - 1) * micro + exposed_reduce + exposed_gather) * 1e3:,.0f}")
            rows.append(row)
    yield table(["model", "blocks a bucket", "no stages, ms a step", "2 stages", "4 stages", "8 stages"], rows)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", metavar="FILE")
    p.add_argument("--bytes", action="store_true")
    p.add_argument("--memory", action="store_true")
    for flag, name in (("-L", "layers"), ("-C", "channels"), ("-H", "heads"), ("-t", "seq_len"), ("-V", "vocabulary"), ("-b", "batch"), ("-d", "total_batch"), ("-z", "zero")):
        p.add_argument(flag, dest=name, type=int, default=0)
    p.add_argument("--ranks", type=int, default=1)
    p.add_argument("--weights", choices=["fp32", "bf16"], default="bf16")
    a = p.parse_args()
    if a.bytes:
        model = Model(a.layers, a.channels, a.heads, a.seq_len, a.vocabulary)
        print(bytes_sent(model, a.ranks, a.zero, a.total_batch // (a.batch * a.seq_len * a.ranks), 2 if a.weights == "bf16" else 4))
    elif a.memory:
        print(memory(Model(a.layers, a.channels, a.heads, a.seq_len, a.vocabulary), a.ranks, a.zero))
    elif a.check:
        text = open(a.check).read()
        missing = [t for t in tables() if t not in text]
        print(f"{3 - len(missing)} passed, {len(missing)} failed")
        sys.exit(bool(missing))
    else:
        print("\n\n".join(tables()))


if __name__ == "__main__":
    main()
