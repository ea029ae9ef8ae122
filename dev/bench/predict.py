"""What a training step must take on a GPU and is predicted to take: the tables of dev/doc/speed.md.

    python3 dev/bench/predict.py [--card h100|h200]    whole models
    python3 dev/bench/predict.py --terms               what lies between the floor and the prediction
    python3 dev/bench/predict.py --changes             what changes to the step win
    python3 dev/bench/predict.py --products            ways of doing the matrix products
--matrix TFLOP/s and --copy TB/s replace the card's rates, --plan B,LEVEL the micro-batch and recomputation.

floor      no kernel is faster than its operations at the matrix rate or its bytes at the copy rate; kernels run one
           after another.
predicted  each kernel at the rate that its kind reached on an H100 one by one (dev/results/h100.csv), the highway's and the classifier's,
           which are new since, at a rate that speed.md has the reasons for; on top what a product adds to FP32 gradients, when its arithmetic is over, how it begins and ends, and 1 us between two kernels.
Both are of the micro-batch and the level of recomputation that the step runs with.
"""

import argparse
import functools
import heapq
import itertools
import math
from typing import NamedTuple

GAP = 1e-6  # seconds between two nodes of a graph
MULTIPROCESSORS = 132  # of an H100 and an H200
LARGE_PRODUCT = 798e12  # operations a second that an H100 reaches in one, in BF16
# A layer's product beside it, and the seconds that each one takes on top to begin and to end, cuBLASLt's kernels for
# split sums among them: fitted to an H100's twelve products of a block of 16384 rows, 1858 us at C = 1024 and 236 us at
# C = 256, where they are bound by memory. A large product, kept up as long, ran at 723e12 there.
PRODUCT, RAMP = 700e12 / LARGE_PRODUCT, 3.5e-6
# Attention, D = 64, T = 1024, as an H100 ran 256 heads, the last blocks taken off, and in the backward delta too: by
# wgmma 326e12 forward and 224e12 backward with them, by mma.sync, which runs 7 products of tiles in the backward where 5
# are counted, 207e12 and 156e12.
ATTENTION, ATTENTION_BACKWARD = 354e12 / LARGE_PRODUCT, 246e12 / LARGE_PRODUCT
MMA, MMA_BACKWARD = 213e12 / LARGE_PRODUCT, 164e12 * 7 / 5 / LARGE_PRODUCT
# Of a copy's rate, at C = 1024 and at C = 256. BY_MEMORY is the rest, products bound by memory among them: as good as the
# highway's forward was before its rows lay in registers. The OLD ones an H100 has measured, the others none yet.
BY_MEMORY, GELU = (0.85, 0.86), (0.99, 0.96)
HIGHWAY, HIGHWAY_BACKWARD = (0.90, 0.90), (0.85, 0.80)
OLD_HIGHWAY, OLD_HIGHWAY_BACKWARD, OLD_CLASSIFIER = (0.85, 0.86), (0.70, 0.62), (0.63, 0.63)
DELTA = (0.40, 0.40)  # delta without 16-byte loads, guessed: a warp loads 64 bytes
CLASSIFIER, ADAMW, NORM = (0.85, 0.85), (0.94, 0.94), (0.99, 0.99)
EMBEDDING = {256: (1.05, 1.05), 50257: (0.48, 0.48)}  # forward and backward
ROW_GROUP = 0.7e-6  # seconds for the 4 or 8 rows that a thread loads together and adds in turn: a latency
# The most frequent token's share of what bench_gpu.py trains on: text, words and signs. (Of GPT-2's tokens: 0.045.)
FREQUENT = {256: 0.29, 50257: 0.25}


class Blocks(NamedTuple):
    """Of attention: how many a multiprocessor holds, the rows of each, how long each kind takes over a tile, and how many
    blocks the heads of a group have."""
    held: int
    rows: int
    kinds: tuple = (1,)
    group: int = 512


class Kernel(NamedTuple):
    """Of a block (two sub-layers). Operations a token: CC * C^2 + TC * T * C, as executed."""
    name: str
    CC: float
    TC: float
    bytes: float  # a token, in units of C
    weights: float = 0  # bytes of weights, in units of C^2
    added: float = 0  # bytes of FP32 gradients read and written once the tile's arithmetic is over, in units of C^2
    of_matrix: float = PRODUCT  # share of the matrix rate
    of_copy: tuple = BY_MEMORY
    launches: int = 1
    blocks: Blocks | None = None


WGMMA_BLOCKS, WGMMA_BACKWARD_BLOCKS = Blocks(5, 64), Blocks(1, 128, group=256)
MMA_BLOCKS = Blocks(2, 128)
MMA_BACKWARD_BLOCKS = Blocks(2, 128, (16, 10))  # dk and dv, dq: 512 and 320 cycles of shared memory (speed.md)
FORWARD = [
    Kernel("product qkv", 6, 0, 8, 6),
    Kernel("attention", 0, 2, 8, of_matrix=ATTENTION, blocks=WGMMA_BLOCKS),
    Kernel("product attproj", 2, 0, 4, 2),
    Kernel("highway forward, twice", 0, 0, 24, of_copy=HIGHWAY, launches=2),
    Kernel("product fc", 8, 0, 10, 8),
    Kernel("GELU", 0, 0, 16, of_copy=GELU),
    Kernel("product fcproj", 8, 0, 10, 8),
]
BACKWARD = [
    Kernel("products fcproj", 16, 0, 28, 8, 32, launches=2),
    Kernel("products fc", 16, 0, 20, 8, 32, launches=2),
    Kernel("products attproj", 4, 0, 8, 2, 8, launches=2),
    Kernel("attention, delta", 0, 0, 4),
    Kernel("attention, dq, dk and dv", 0, 5, 14, of_matrix=ATTENTION_BACKWARD, blocks=WGMMA_BACKWARD_BLOCKS),
    Kernel("products qkv", 12, 0, 16, 6, 24, launches=2),
    Kernel("highway backward, twice", 0, 0, 32, of_copy=HIGHWAY_BACKWARD, launches=4),
]
# What a level of recomputation runs again: u, which the highway's backward then reads and writes on its way (6 bytes an
# element), and GELU; then the branches up to their last products; then z itself, the whole forward pass.
U_AGAIN = Kernel("u again, twice", 0, 0, 12, of_copy=HIGHWAY_BACKWARD, launches=0)
AGAIN = {
    "none": [],
    "gelu": [U_AGAIN] + [k for k in FORWARD if k.name == "GELU"],
    "layer": [U_AGAIN] + [k for k in FORWARD if k.name in ("product qkv", "attention", "product fc", "GELU")],
    "K": FORWARD,
}
# Changes, and for those of a kernel what stands in the list without them; step_terms knows the others. `order` came
# before wgmma, and is told of mma.sync.
CHANGES = {
    "DGELU": [Kernel("products fcproj", 16, 0, 20, 8, 32, launches=2), Kernel("GELU, backward", 0, 0, 24, of_copy=GELU)],
    "chunk": [],
    "embedding": [],
    "delta": [Kernel("attention, delta", 0, 0, 4, of_copy=DELTA)],
    "wgmma": [Kernel("attention", 0, 2, 8, of_matrix=MMA, blocks=MMA_BLOCKS),
              Kernel("attention, dq, dk and dv", 0, 7, 14, of_matrix=MMA_BACKWARD, blocks=MMA_BACKWARD_BLOCKS)],
    "order": [Kernel("attention, dq, dk and dv", 0, 7, 22, of_matrix=MMA_BACKWARD, launches=2, blocks=MMA_BLOCKS)],
    "gain blocks": [],
    "registers": [Kernel("highway forward, twice", 0, 0, 24, of_copy=OLD_HIGHWAY, launches=2),
                  Kernel("highway backward, twice", 0, 0, 32, of_copy=OLD_HIGHWAY_BACKWARD, launches=2)],
    "classifier": [],
    "split": [],
}


def again(recompute):
    """(kernel, share of the blocks) of a level as train_keel prints it: none, gelu, layer or a number K, or gelu or layer
    in so many of all sub-layers, the others being at the level before."""
    level, _, part = recompute.partition(" in ")
    first, _, of = part.removesuffix(" sub-layers").partition(" of ")
    share = int(first) / int(of) if part else 1
    kernels = [(k, share) for k in AGAIN["K" if level.isdigit() else level]]
    return kernels + [(k, 1 - share) for k in AGAIN["gelu" if level == "layer" else "none"] if share < 1]


def padded(V):
    return (V + 127) // 128 * 128


def parameters(L, C, V, T):
    return 6 * C * C * L + (padded(V) + T) * C  # gains aside


def counted_operations(L, C, V, T):
    """Of a token, as MFU counts them: causal attention once, recomputation not."""
    return 6 * (12 * C * C * (L // 2) + padded(V) * C) + 6 * C * T * (L // 2)


def head_chunks(rows, Vp, without):
    """(chunks, rows that its tiles of 128 compute) of the classifier's rows."""
    if "chunk" in without:
        chunk = min(rows, max(16, 2**26 // Vp))
        return math.ceil(rows / chunk), rows // chunk * padded(chunk) + padded(rows % chunk)
    most = max(128, 2**28 // Vp // 128 * 128)
    chunk = min(rows, padded(math.ceil(rows / math.ceil(rows / most))))
    return math.ceil(rows / chunk), rows  # whole tiles but for the last


def wave_factor(rows, C):
    """How much longer highway_backward takes with blocks by C alone, where the GPU has not as many places."""
    warps = max(1, min(8, (112 << 10) // (16 * C)))
    places = MULTIPROCESSORS * min((227 << 10) // (warps * 16 * C + 1024), 65536 // (80 * 32 * warps))
    waves = min(math.ceil(rows / warps), max(264, min(1024, 2**18 // C))) / places
    # The last wave takes as long as a full one, or its share of one: the mean, as its blocks, alone on a
    # multiprocessor, are bound by latency.
    return (math.ceil(waves) / waves + 1) / 2 if waves > 1 else 1


def last_end(blocks, places, shared):
    """When the last block ends, beside an even share of the work for all places: a multiprocessor holds so many blocks.
    shared: fewer of them are faster, as they share what it does in a time."""
    queue, held, ends = iter(blocks), [[] for _ in range(MULTIPROCESSORS)], []

    def refill(now, i):
        held[i] += itertools.islice(queue, 1)
        if held[i]:
            heapq.heappush(ends, (now + min(held[i]) * (len(held[i]) / places if shared else 1), i))

    for _ in range(places - 1):
        for of_one in held:
            of_one += itertools.islice(queue, 1)
    for i in range(MULTIPROCESSORS):
        refill(0, i)
    while ends:
        now, i = heapq.heappop(ends)
        least = min(held[i])
        held[i] = [n - least for n in held[i]]
        held[i].remove(0)
        refill(now, i)
    return now * places * MULTIPROCESSORS / sum(blocks)


@functools.cache
def tail_factor(heads, T, blocks, ordered=True):
    """How much longer attention takes than its work: a block takes as long as it meets tiles, 1 to T / rows, and the last
    ones leave places empty. ordered: heads in groups, of each the longest first."""
    tiles = math.ceil(T / blocks.rows)
    group = min(heads, max(1, blocks.group // (len(blocks.kinds) * tiles))) if ordered else 1
    while heads % group:
        group -= 1
    work = [n * kind for _ in range(heads // group) for n in range(tiles, 0, -1) for kind in blocks.kinds for _ in range(group)]
    # Blocks with places empty beside them: as slow as in company, or the faster for it.
    return (last_end(work, blocks.held, False) + last_end(work, blocks.held, True)) / 2


def split_seconds(rows, C, matrix_rate, copy_rate, without):
    """Of a block's dW (N,K): its partial sums where cuBLASLt splits the sum over rows, or what an empty GPU costs."""
    seconds = 0
    for N, K in ((3 * C, C), (C, C), (4 * C, C), (C, 4 * C)):
        tiles = math.ceil(N / 128) * math.ceil(K / 128)
        if 2 * tiles >= MULTIPROCESSORS:
            continue
        if "split" in without:
            seconds += 2 * rows * N * K / (PRODUCT * matrix_rate) * (MULTIPROCESSORS / tiles - 1)
        else:  # FP32, written and read, under 20 MB: in the L2, at twice the rate of a copy
            slices = 2 ** int(math.log2(max(1, min(16, MULTIPROCESSORS // tiles, rows // 512))))
            seconds += slices * N * K * 8 / (2 * copy_rate)
    return seconds


FLOOR, PRODUCTS, ATTENTIONS, MEMORY, ADDED, WAITS = TERMS = (
    "the floor", "products at 700 of 798 TFLOP/s, 3.5 us to begin and end", "attention at 354 and 246 TFLOP/s, with its last blocks",
    "kernels bound by memory at 0.48 to 1.05 of a copy", "FP32 gradients, partial sums of dW", "1 us a kernel")


def step_terms(L, C, V, T, total_batch, B, recompute, matrix_rate, copy_rate, without=()):
    """{term: seconds} of a step of total_batch tokens in micro-batches of B sequences: the floor, and what comes on top
    in the prediction. Rates in operations and bytes a second. without: changes that are not made."""
    rows, micro_steps, Vp = B * T, total_batch // (B * T), padded(V)
    terms = dict.fromkeys(TERMS, 0.0)

    def add(times, term, operations, bytes, added=0, of_matrix=PRODUCT, of_copy=BY_MEMORY, launches=1, longer=1, once=0):
        """operations: as many as take the floor's time at the matrix rate. once: the floor's bytes, where fewer."""
        least = max(operations / matrix_rate, (once or bytes + added) / copy_rate)
        main = longer * max(operations / (of_matrix * matrix_rate), bytes / (of_copy[C < 512] * copy_rate))
        main += launches * RAMP if term == PRODUCTS else 0
        parts = {FLOOR: least, ADDED: added / copy_rate, WAITS: launches * GAP, term: main - least}
        for name, seconds in parts.items():
            terms[name] += times * seconds

    kernels = {k.name: k for k in FORWARD + BACKWARD + [k for change in without for k in CHANGES[change]]}
    for k, share in [(k, 1) for k in kernels.values()] + [(kernels.get(k.name, k), share) for k, share in again(recompute)]:
        term = ATTENTIONS if k.TC else PRODUCTS if k.CC else MEMORY
        operations = rows * (k.CC * C * C + k.TC * T * C)
        longer = wave_factor(rows, C) if "gain blocks" in without and k.of_copy == HIGHWAY_BACKWARD else 1
        if k.blocks:  # heads of 64 channels
            longer = tail_factor(B * C // 64, T, k.blocks, "order" not in without)
        add(micro_steps * (L // 2) * share, term, operations, rows * k.bytes * C + k.weights * C * C, k.added * C * C,
            k.of_matrix, k.of_copy, k.launches, longer)
    terms[ADDED] += micro_steps * (L // 2) * split_seconds(rows, C, matrix_rate, copy_rate, without)
    # The head: logits are written, turned into their gradient in place and read twice; of each chunk two products read
    # wte and the third adds to its FP32 gradient.
    chunks, computed = head_chunks(rows, Vp, without)
    activations = rows * (6 * Vp + 6 * C)
    add(micro_steps, PRODUCTS, (4 * computed + 2 * rows) * Vp * C, activations + chunks * 4 * Vp * C,
        chunks * 8 * Vp * C, launches=3 * chunks, once=activations + 12 * Vp * C)
    add(micro_steps, MEMORY, 0, rows * 4 * Vp, of_copy=OLD_CLASSIFIER if "classifier" in without else CLASSIFIER, launches=chunks)
    add(micro_steps, MEMORY, 0, rows * 16 * C, of_copy=EMBEDDING[256 if V == 256 else 50257], launches=3 if "embedding" in without else 4)
    in_turn = FREQUENT.get(V, 0.05) * rows  # one block adds up all of them, or 64 and then the sums of such chunks
    groups = in_turn / 4 if "embedding" in without else (64 + in_turn / 64) / 8
    terms[MEMORY] += micro_steps * groups * ROW_GROUP
    add(1, MEMORY, 0, 34 * parameters(L, C, V, T), of_copy=ADAMW)
    add(1, MEMORY, 0, 4 * parameters(L, C, V, T), of_copy=NORM)
    return terms


def step_seconds(*step, without=()):
    """(floor, predicted) of step_terms' step."""
    terms = step_terms(*step, without=without)
    return terms[FLOOR], sum(terms.values())


def product_gains(C, rows, T, matrix_rate, copy_rate):
    """{way: seconds of a block that it wins}, as dev/bench/bench_products.cu does them, and a block's seconds."""
    one, two = (step_seconds(L, C, 256, T, rows, rows // T, "none", matrix_rate, copy_rate)[1] for L in (2, 4))
    block = two - one - 12 * C * C * (34 / ADAMW[0] + 4 / NORM[0]) / copy_rate

    def product(operations, bytes, rate=matrix_rate):
        return max(operations / (PRODUCT * rate), bytes / (BY_MEMORY[C < 512] * copy_rate))

    def kernel(bytes, launches=1):  # bound by memory, as GELU's
        return bytes / copy_rate / GELU[C < 512] + launches * GAP

    hidden, bytes, operations = rows * 4 * C, 2 * (rows * 5 * C + 4 * C * C), 8 * rows * C * C  # of fc and of fcproj
    # The epilogue writes, or reads, the hidden layer once more; the kernel reads and writes it.
    epilogue = product(operations, bytes + 2 * hidden) - product(operations, bytes)
    gains = {"GELU_AUX epilogue": kernel(4 * hidden) - epilogue,
             "GELU's backward as a kernel": epilogue - kernel(6 * hidden)}
    unadded = rounded = alone = casts = amaxes = chunks = 0.0
    for K, N in ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)):
        operations, inputs, outputs, matrix = 2 * rows * K * N, rows * K, rows * N, K * N
        dW, din = product(operations, 2 * (inputs + outputs)), product(operations, 2 * (inputs + outputs + matrix))
        unadded += 4 * matrix / copy_rate
        rounded += 4 * matrix / copy_rate - kernel(8 * matrix)
        alone += dW + 2 * din - sum(product(operations, bytes, 2 * matrix_rate) for bytes in (
            inputs + matrix + 2 * outputs, outputs + matrix + 2 * inputs, inputs + outputs))
        casts += kernel(4 * (inputs + outputs + matrix), 3)
        amaxes += kernel(2 * (inputs + outputs + matrix), 4)
        chunks += dW + din - product(2 * operations, 2 * (2 * inputs + outputs + matrix))  # dout is read once
    gains |= {"--grads bf16": rounded, "if dW were not added": unadded,
              "FP8 with amax and casts": alone - casts - amaxes, "FP8 with casts": alone - casts,
              "FP8 products alone": alone, "dW and din in chunks of rows": chunks}
    return gains, block


def run_seconds(command, card):
    """Of a whole run of ./train_keel on bytes, from its command line; its micro-batch is the total batch."""
    flags = dict(zip(command, command[1:]))
    L, C, B, steps = (int(flags[f]) for f in ("-L", "-C", "-b", "-x"))
    T = int(flags["-t"]) if "-t" in flags else 24 * int(flags["--train"].removeprefix("hops:")) + 3  # a program's length
    return steps * step_seconds(L, C, 256, T, B * T, B, "none", card.matrix * 1e12, card.copy * 1e12)[1]


class Row(NamedTuple):
    """A model that dev/bench/bench_gpu.py measures."""
    norm: str
    L: int
    C: int
    H: int
    T: int
    total_batch: int  # tokens
    V: int  # of the data: 256 bytes of text, 50257 shards


ROWS = {
    "keel_L512_C1024": Row("keel", 512, 1024, 16, 1024, 65536, 50257),
    "pre_L24_C768": Row("pre", 24, 768, 12, 1024, 524288, 50257),
    "keel_L1024_C256": Row("keel", 1024, 256, 4, 1024, 65536, 256),
    "keel_L1024_C1024": Row("keel", 1024, 1024, 16, 1024, 65536, 50257),
}


class Card(NamedTuple):
    name: str
    matrix: float  # TFLOP/s of a large BF16 product
    copy: float  # TB/s, read and written
    plans: dict  # micro-batch and recomputation that train_keel's plan takes in the card's memory


CARDS = {
    "h100": Card("H100, 78 GiB", 798, 3.0, {
        "keel_L512_C1024": (4, "layer in 110 of 512 sub-layers"), "pre_L24_C768": (128, "none"),
        "keel_L1024_C256": (16, "gelu in 138 of 1024 sub-layers")}),
    "h200": Card("H200, 139 GiB", 790, 4.3, {
        "keel_L512_C1024": (8, "none"), "pre_L24_C768": (256, "none"),
        "keel_L1024_C256": (32, "gelu in 348 of 1024 sub-layers"),
        "keel_L1024_C1024": (32, "14")}),
}


# Each table's rows, the first of them its head.


def steps(card):
    """(name, step_terms' arguments, MFU in % of so many seconds) of each model that fits the card."""
    for name, plan in card.plans.items():
        row = ROWS[name]
        operations = counted_operations(row.L, row.C, row.V, row.T) * row.total_batch
        yield (name, (row.L, row.C, row.V, row.T, row.total_batch, *plan, card.matrix * 1e12, card.copy * 1e12),
               lambda seconds, operations=operations: 100 * operations / (seconds * card.matrix * 1e12))


def models(card):
    yield (card.name, "tokens a step", "micro-batch, recompute", "floor, ms", "predicted, ms", "floor / predicted",
           "predicted tokens/s", "its MFU")
    for name, step, mfu in steps(card):
        (floor, predicted), tokens = step_seconds(*step), step[4]
        yield (f"`{name}`", f"{tokens}", f"{step[5]}, {step[6]}", f"{floor * 1e3:.0f}", f"{predicted * 1e3:.0f}",
               f"{floor / predicted:.2f}", f"{tokens / predicted:.0f}", f"{mfu(predicted):.1f} %")


def terms(card):
    sums = [[mfu(seconds) for seconds in itertools.accumulate(step_terms(*step).values())]
            for _, step, mfu in steps(card)]
    yield card.name, *(f"`{name}`" for name in card.plans)
    yield from ((term, *(f"{mfu:.1f} %" for mfu in row)) for term, row in zip(TERMS, zip(*sums)))


def changes(card):
    *sure, unsure = CHANGES
    yield f"tokens/s won, {card.name}", *sure, unsure, f"all but {unsure}", "MFU"
    for name, step, mfu in steps(card):
        without = lambda *changes: step_seconds(*step, without=changes)[1]
        won = lambda *changes, of=(): f"{100 * (without(*of, *changes) / without(*of) - 1):+.1f} %"
        yield (f"`{name}`", *(won(c, of=["wgmma"] if c == "order" else ()) for c in sure), f"0 to {won(unsure)}",
               won(*sure), f"{mfu(without(*sure)):.1f} -> {mfu(without()):.1f} %")


def products(card):
    shapes = ((1024, 8192), (768, 32768), (256, 32768), (256, 65536))
    columns = [product_gains(C, rows, 1024, card.matrix * 1e12, card.copy * 1e12) for C, rows in shapes]
    yield "tokens/s won", *(f"C = {C}, {rows} rows" for C, rows in shapes)
    yield "a block, us", *(f"{block * 1e6:.0f}" for _, block in columns)
    for way in columns[0][0]:
        yield way, *(f"{100 * gains[way] / (block - gains[way]):+.1f} %" for gains, block in columns)


def main():
    parser = argparse.ArgumentParser(prog="dev/bench/predict.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--card", choices=CARDS, default="h100", help="whose rates and memory [%(default)s]")
    parser.add_argument("--matrix", type=float, metavar="TFLOP/s", help="rate of a large BF16 product")
    parser.add_argument("--copy", type=float, metavar="TB/s", help="bytes read and written by a copy")
    for table, text in ((terms, "what lies between the floor and the prediction"),
                        (changes, "what each change to the step wins"),
                        (products, "ways of doing the matrix products")):
        parser.add_argument(f"--{table.__name__}", dest="table", action="store_const", const=table, default=models,
                            help=text + ", instead of whole models")
    parser.add_argument("--plan", metavar="B,LEVEL", help="micro-batch and recomputation of all models, instead of train_keel's own")
    a = parser.parse_args()
    card = CARDS[a.card]
    if a.plan:
        B, level = a.plan.split(",")
        card = card._replace(plans=dict.fromkeys(card.plans, (int(B), level)))
    card = card._replace(matrix=a.matrix or card.matrix, copy=a.copy or card.copy)
    for i, row in enumerate(a.table(card)):
        print("| " + " | ".join(row) + " |" + ("\n|" + "---|" * len(row) if i == 0 else ""))


if __name__ == "__main__":
    main()
