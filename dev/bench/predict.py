"""What a training step must take on a GPU: the operations and bytes of dev/doc/speed.md over a matrix rate and a copy rate.

    python3 dev/bench/predict.py [--matrix TFLOP/s] [--copy TB/s]      prints the table of whole models in speed.md
    python3 dev/bench/predict.py --products                            prints its table of ways of doing the matrix products

floor      each kernel's time is its operations at the matrix rate or its bytes at the copy rate, whichever is longer; kernels run one after
           another. Attention's matrix rate is 0.62 of the products': the most that mma.sync reaches of wgmma's.
predicted  the same with each kernel at the share of its bound that speed.md predicts for it, and 1 us between two kernels.
Both are of the level of recomputation and the micro-batch that the step ran with. dev/bench/bench_gpu.py holds measured steps against the floor.
"""

import argparse
from typing import NamedTuple

MMA_SYNC = 0.62  # of the products' rate
GAP = 1e-6  # seconds between two nodes of a graph


class Kernel(NamedTuple):
    """Per token of a block (two sub-layers): operations a * C^2 + b * T * C, bytes in units of C. Per block: bytes of weights in units of C^2."""
    name: str
    CC: float  # a
    TC: float  # b: as executed
    bytes: float
    weights: float
    share: tuple  # of its bound that is predicted at C = 1024 and at C = 256
    launches: int = 1
    counted: float = None  # b as MFU counts it; None: as executed


PRODUCT, HIGHWAY, HIGHWAY_BACKWARD, ATTENTION, ATTENTION_BACKWARD = (1, 1), (0.90, 0.80), (0.82, 0.74), (0.85, 0.85), (0.75, 0.75)
FORWARD = [
    Kernel("product qkv", 6, 0, 8, 6, PRODUCT),
    Kernel("attention", 0, 2, 8, 0, ATTENTION),
    Kernel("product attproj", 2, 0, 4, 2, PRODUCT),
    Kernel("highway forward, twice", 0, 0, 24, 0, HIGHWAY, 2),
    Kernel("product fc", 8, 0, 10, 8, PRODUCT),
    Kernel("GELU", 0, 0, 16, 0, HIGHWAY),
    Kernel("product fcproj", 8, 0, 10, 8, PRODUCT),
]
# A product's backward reads BF16 weights (2 bytes) and reads and writes FP32 gradients (8).
BACKWARD = [
    Kernel("products fcproj", 16, 0, 20, 8 + 32, PRODUCT, 2),
    Kernel("GELU", 0, 0, 24, 0, HIGHWAY),
    Kernel("products fc", 16, 0, 20, 8 + 32, PRODUCT, 2),
    Kernel("products attproj", 4, 0, 8, 2 + 8, PRODUCT, 2),
    Kernel("attention, delta", 0, 0, 4, 0, HIGHWAY),
    Kernel("attention, dk and dv, dq", 0, 7, 22, 0, ATTENTION_BACKWARD, 2, 5),
    Kernel("products qkv", 12, 0, 16, 6 + 24, PRODUCT, 2),
    Kernel("highway backward, twice", 0, 0, 32, 0, HIGHWAY_BACKWARD, 2),
]
# What a level of recomputation runs again: u, which the highway's backward then reads and writes on its way (6 bytes an element), and GELU;
# then the branches up to their last products; then z itself, the whole forward pass.
U_AGAIN = Kernel("u again, twice", 0, 0, 12, 0, HIGHWAY_BACKWARD, 0)
AGAIN = {
    "none": [],
    "gelu": [U_AGAIN] + [k for k in FORWARD if k.name == "GELU"],
    "layer": [U_AGAIN] + [k for k in FORWARD if k.name in ("product qkv", "attention", "product fc", "GELU")],
    "K": FORWARD,
}


def again(recompute):
    """Kernels of a level as train_keel prints it: none, gelu, layer or a number K."""
    return AGAIN["K" if recompute.isdigit() else recompute]


def parameters(L, C, V, T):
    Vp = (V + 127) // 128 * 128
    return 6 * C * C * L + (Vp + T) * C  # gains aside


def counted_operations(L, C, V, T):
    """Of a token, as MFU counts them: causal attention once, recomputation not."""
    Vp = (V + 127) // 128 * 128
    return 6 * (12 * C * C * (L // 2) + Vp * C) + 6 * C * T * (L // 2)


def least_seconds(kernel, rows, C, T, matrix_rate, copy_rate):
    operations, bytes = rows * (kernel.CC * C * C + kernel.TC * T * C), rows * kernel.bytes * C + kernel.weights * C * C
    return max(operations / (matrix_rate * (MMA_SYNC if kernel.TC else 1)), bytes / copy_rate)


def step_seconds(L, C, V, T, total_batch, B, recompute, matrix_rate, copy_rate):
    """(floor, predicted) of a step of total_batch tokens in micro-batches of B sequences. Rates in operations and bytes a second."""
    rows, micro_steps, Vp = B * T, total_batch // (B * T), (V + 127) // 128 * 128
    wide = 0 if C >= 512 else 1
    floor = predicted = 0.0

    def add_least(times, least, share, launches):
        nonlocal floor, predicted
        floor += times * least
        predicted += times * (least / share + launches * GAP)

    def add(times, operations, bytes, share, launches):
        add_least(times, max(operations / matrix_rate, bytes / copy_rate), share, launches)

    for kernel in FORWARD + BACKWARD + again(recompute):
        add_least(micro_steps * (L // 2), least_seconds(kernel, rows, C, T, matrix_rate, copy_rate), kernel.share[wide], kernel.launches)
    # The head: logits are written, turned into their gradient in place and read twice; three products with wte, whose FP32 gradient is added to.
    add(micro_steps, rows * 6 * Vp * C, rows * (6 * Vp + 8 * C) + 12 * Vp * C, 1, 3)
    add(micro_steps, 0, rows * 4 * Vp, 0.82, 1)
    add(micro_steps, 0, rows * 16 * C, 0.8, 2)  # embedding, forward and backward
    add(1, 0, 34 * parameters(L, C, V, T), 0.92, 1)  # AdamW
    add(1, 0, 4 * parameters(L, C, V, T), 0.9, 1)  # norm
    return floor, predicted


def product_gains(C, rows, T, matrix_rate, copy_rate):
    """{way: seconds of a block that it wins}, as dev/bench/bench_products.cu measures them, and the predicted seconds of a block."""
    wide = 0 if C >= 512 else 1
    block = sum(least_seconds(k, rows, C, T, matrix_rate, copy_rate) / k.share[wide] + k.launches * GAP for k in FORWARD + BACKWARD)

    def product(operations, bytes, rate=matrix_rate):
        return max(operations / rate, bytes / copy_rate)

    def kernel(bytes, launches=1):  # bound by memory, as the highway's
        return bytes / copy_rate / HIGHWAY[wide] + launches * GAP

    hidden, narrow, weights, operations = rows * 4 * C, rows * C, 4 * C * C, 8 * rows * C * C  # of fc and of fcproj
    bytes = 2 * (hidden + narrow + weights)
    gains = {  # the epilogue writes, or reads, the hidden layer once more; the kernel reads and writes it
        "GELU_AUX epilogue": product(operations, bytes) + kernel(4 * hidden) - product(operations, bytes + 2 * hidden),
        "DGELU epilogue": product(operations, bytes) + kernel(6 * hidden) - product(operations, bytes + 2 * hidden),
    }
    gains["both epilogues"] = sum(gains.values())
    unadded = rounded = alone = casts = amaxes = chunks = 0.0
    for K, N in ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)):
        operations, inputs, outputs, matrix = 2 * rows * K * N, rows * K, rows * N, K * N
        added, once = product(operations, 2 * (inputs + outputs) + 8 * matrix), product(operations, 2 * (inputs + outputs) + 4 * matrix)
        unadded += added - once
        rounded += added - once - kernel(8 * matrix)
        bf16 = 2 * product(operations, 2 * (inputs + outputs + matrix)) + added  # forward, din; dW
        fp8 = (product(operations, inputs + matrix + 2 * outputs, 2 * matrix_rate) + product(operations, outputs + matrix + 2 * inputs, 2 * matrix_rate)
               + product(operations, inputs + outputs + 8 * matrix, 2 * matrix_rate))
        alone += bf16 - fp8
        casts += kernel(4 * (inputs + outputs + matrix), 3)
        amaxes += kernel(2 * (inputs + outputs + matrix), 4)
        din = product(operations, 2 * (inputs + outputs + matrix))
        chunks += added + din - max(2 * operations / matrix_rate, (2 * (2 * inputs + outputs + matrix) + 8 * matrix) / copy_rate)  # dout read once
    gains |= {"--grads bf16": rounded, "if dW were not added": unadded, "FP8 with amax and casts": alone - casts - amaxes, "FP8 with casts": alone - casts,
              "FP8 products alone": alone, "dW and din in chunks of rows": chunks}
    return gains, block


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
PLANS = {"keel_L512_C1024": (8, "none"), "pre_L24_C768": (32, "none"), "keel_L1024_C256": (16, "none"), "keel_L1024_C1024": (4, "layer")}  # that fit into 139 GiB


def main():
    parser = argparse.ArgumentParser(prog="dev/bench/predict.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--matrix", type=float, default=790, metavar="TFLOP/s", help="rate of a large BF16 product [%(default)s]")
    parser.add_argument("--copy", type=float, default=4.3, metavar="TB/s", help="bytes read and written by a copy [%(default)s]")
    parser.add_argument("--products", action="store_true", help="ways of doing the matrix products instead of whole models")
    a = parser.parse_args()
    if a.products:
        shapes = ((1024, 8192), (768, 32768), (256, 32768), (256, 65536))
        columns = [product_gains(C, rows, 1024, a.matrix * 1e12, a.copy * 1e12) for C, rows in shapes]
        print("| tokens/s won | " + " | ".join(f"C = {C}, {rows} rows" for C, rows in shapes) + " |\n|---|" + "---|" * len(shapes))
        print("| a block, us | " + " | ".join(f"{block * 1e6:.0f}" for _, block in columns) + " |")
        for way in columns[0][0]:
            print(f"| {way} | " + " | ".join(f"{100 * gains[way] / (block - gains[way]):+.1f} %" for gains, block in columns) + " |")
        return
    print("| model | tokens a step | micro-batch, recompute | floor, ms | predicted, ms | predicted tokens/s | its MFU |\n|---|---|---|---|---|---|---|")
    for name, row in ROWS.items():
        B, recompute = PLANS[name]
        floor, predicted = step_seconds(row.L, row.C, row.V, row.T, row.total_batch, B, recompute, a.matrix * 1e12, a.copy * 1e12)
        rate = row.total_batch / predicted
        mfu = counted_operations(row.L, row.C, row.V, row.T) * rate / (a.matrix * 1e12)
        print(f"| `{name}` | {row.total_batch} | {B}, {recompute} | {floor * 1e3:.0f} | {predicted * 1e3:.0f} | {rate:.0f} | {100 * mfu:.0f} % |")


if __name__ == "__main__":
    main()
