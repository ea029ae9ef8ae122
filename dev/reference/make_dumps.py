#!/usr/bin/env python3
"""Writes what the trainers' tests compare with, all of it computed in float64 by PyTorch's autograd:

    test/dumps/NAME.bin     debug states: every norm placement, odd shapes, gains that are not 1
    test/dumps/adamw.csv    ten AdamW steps on some of these batches
    test/dumps/probe.csv, probe_weights.csv   what --probe writes of two AdamW steps on some of these batches
    test/dumps/init.csv     CRC-32 of initialised tensors, to prove the same bits

    python3 dev/reference/make_dumps.py            writes them
    python3 dev/reference/make_dumps.py --check    makes them again elsewhere and compares

All random numbers are Philox's, so the inputs do not depend on NumPy's or PyTorch's version.
"""

import csv
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch

import keel
import keel_file
from keel_file import NORMS, Config, KeelFile

DUMPS = Path(__file__).resolve().parents[2] / "test" / "dumps"


def dump_configs():
    """name -> (Config, B, T). What each shape is for stands beside it."""
    dumps = {}
    for norm in NORMS:
        # Nothing a power of two, T < max T: the last rows of wpe get no gradient.
        dumps[f"{norm}_small"] = Config(7, 13, 4, 3, 12, norm), 2, 5
        # Heads of one channel, V just above 128, T = max T. HybridNorm's per-head norm of one channel would
        # leave only its sign, so D = 5 there; Mix-LN has two Post-LN blocks of eight from L = 16 on.
        H, C = (2, 10) if norm == "hybridnorm" else (7, 7)
        L = 16 if norm == "mixln" else 6
        dumps[f"{norm}_odd"] = Config(6, 131, L, H, C, norm), 1, 6
    dumps["keel_alpha"] = Config(4, 5, 4, 2, 8, "keel", 2.5), 2, 4  # -a
    dumps["deepnorm_alpha"] = Config(4, 5, 4, 2, 8, "deepnorm", 2.5), 2, 4
    dumps["keel_v128"] = Config(6, 128, 2, 2, 8, "keel"), 2, 6  # no padded rows
    dumps["keel_v256"] = Config(6, 256, 2, 2, 8, "keel"), 2, 6
    dumps["keel_t1"] = Config(3, 17, 2, 1, 6, "keel"), 3, 1  # one token: nothing to attend to but itself
    dumps["keel_long"] = Config(70, 17, 2, 2, 8, "keel"), 1, 67  # more than one tile of 64 keys
    return dumps


def write_dump(folder, name, cfg, B, T):
    seed = zlib.crc32(name.encode())
    params = keel.init_params(cfg, seed)
    for i, (tensor, p) in enumerate(params.items()):  # noise in all 53 bits, on streams the init does not use
        u = sum(keel.uniform(seed, 1000 + 2 * i + half, p.size).astype(np.float64) * 2.0 ** (-24 * half)
                for half in (0, 1)).reshape(p.shape)
        if p.ndim == 1:
            params[tensor] = 0.5 + u  # gains in [0.5, 1.5)
        else:
            params[tensor] = p + keel.init_bound(cfg, tensor, p.shape).astype(np.float64) * (2 * u - 1) / 4
    params["wte"][cfg.V:] = 0
    tokens, targets = ((keel.uniform(seed, stream, B * T) * np.float32(cfg.V)).astype(np.int32).reshape(B, T)
                       for stream in (1, 2))
    tokens[-1, -1] = tokens[0, 0]  # a row of wte that gets the gradient of two positions
    targets[0, 0] = cfg.V - 1  # the last word before the padding
    model = keel.KeelGPT(cfg, params)
    tensors = keel.debug_tensors(model, tokens, targets)
    keel_file.write(folder / f"{name}.bin", KeelFile(keel_file.DEBUG, cfg, tensors, keel_file.FP64, B, T))


# The clip lies among the gradient norms of each ten steps, so that it acts in some and not in others.
PEAK_LR, WARMUP, STEPS, WEIGHT_DECAY, CLIP = 1e-2, 3, 10, 0.01, 2.0
ADAMW_DUMPS = ["keel_small", "pre_small", "hybridnorm_small", "deepnorm_small"]


def write_adamw(folder):
    """Loss and gradient norm (before the clip) of step s are those of the parameters before its update."""
    with open(folder / "adamw.csv", "w", newline="") as f:
        out = csv.writer(f, lineterminator="\n")
        out.writerow(["dump", "step", "loss", "grad_norm", "lr", "peak_lr", "warmup", "steps", "weight_decay", "clip"])
        for dump in ADAMW_DUMPS:
            file = keel_file.read(folder / f"{dump}.bin")
            model = keel.from_file(folder / f"{dump}.bin")
            tokens, targets = (torch.from_numpy(np.array(file.tensors[k])).long() for k in ("tokens", "targets"))
            params = list(model.params.values())
            adamw = keel.AdamW(params, WEIGHT_DECAY, CLIP)
            for step in range(1, STEPS + 1):
                loss = model.loss(tokens, targets)
                lr = keel.learning_rate(step, STEPS, WARMUP, PEAK_LR)
                norm = adamw.step(torch.autograd.grad(loss, params), lr)
                out.writerow([dump, step] + ["%.17g" % v for v in (loss.item(), norm, lr, PEAK_LR)]
                             + [WARMUP, STEPS] + ["%.17g" % v for v in (WEIGHT_DECAY, CLIP)])


PROBE_DUMPS = ["keel_small", "pre_small", "post_small", "mixln_small", "hybridnorm_small"]


def write_probe(folder):
    with open(folder / "probe.csv", "w", newline="") as f, open(folder / "probe_weights.csv", "w", newline="") as g:
        sublayers, weights = (csv.writer(file, lineterminator="\n") for file in (f, g))
        for dump in PROBE_DUMPS:
            file = keel_file.read(folder / f"{dump}.bin")
            model = keel.from_file(folder / f"{dump}.bin")
            tokens, targets = (torch.from_numpy(np.array(file.tensors[k])).long() for k in ("tokens", "targets"))
            adamw = keel.AdamW(model.params.values(), WEIGHT_DECAY, CLIP)
            for step in (1, 2):
                rows, grads = keel.probe(model, tokens, targets)
                before = [p.detach().clone() for p in model.params.values()]
                adamw.step(grads, keel.learning_rate(step, STEPS, 0, PEAK_LR))
                if f.tell() == 0:
                    sublayers.writerow(["dump", "step", "peak_lr", "sublayer", *rows[0]])
                    weights.writerow(["dump", "step", "peak_lr", "tensor", "weight_norm", "grad_norm", "update_norm"])
                start = [dump, step, "%.17g" % PEAK_LR]
                for l, row in enumerate(rows):
                    sublayers.writerow(start + [l] + ["%.17g" % v for v in row.values()])
                for (name, p), old, grad in zip(model.params.items(), before, grads):
                    weights.writerow(start + [name] + ["%.17g" % v.norm().item() for v in (old, grad, p.detach() - old)])


def write_init(folder):
    configs = [(Config(7, 13, 4, 3, 12, "keel"), 1337), (Config(7, 13, 4, 3, 12, "deepnorm"), 1337),
               (Config(64, 256, 6, 2, 64, "keel"), 0x123456789ABCDEF0),  # the key's high word in use
               (Config(64, 256, 6, 2, 64, "deepnorm", 2.5), 0x123456789ABCDEF0)]  # -a leaves the init as it is
    with open(folder / "init.csv", "w", newline="") as f:
        out = csv.writer(f, lineterminator="\n")
        out.writerow(["norm", "alpha", "L", "H", "C", "V", "max_T", "seed", "tensor", "crc32"])  # crc32: 8 hex digits
        for cfg, seed in configs:
            for name, p in keel.init_params(cfg, seed).items():
                if name in ("wte", "wpe") or name[-3:] in ("[0]", "[3]"):
                    out.writerow([cfg.norm, "%.9g" % cfg.alpha, cfg.L, cfg.H, cfg.C, cfg.V, cfg.max_T, seed, name,
                                  "%08x" % zlib.crc32(p.astype("<f4").tobytes())])


def write_all(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, (cfg, B, T) in dump_configs().items():
        write_dump(folder, name, cfg, B, T)
    write_adamw(folder)
    write_probe(folder)
    write_init(folder)


# ---------------------------------------------------------------------------------------------------------
# --check

def compare_bin(a, b):
    """None, or what differs. 1e-12: a few thousand roundings of 1e-16 may add up differently elsewhere."""
    a, b = keel_file.read(a), keel_file.read(b)
    if not np.array_equal(a.header, b.header):
        return f"header ints {np.flatnonzero(a.header != b.header).tolist()} differ"
    for name, x in a.tensors.items():
        y = b.tensors[name]
        error = float(np.any(x != y)) if x.dtype.kind == "i" else keel.relative_error(x, y)
        if not error <= 1e-12:
            return f"{name}: relative L2 {error:.2g} > 1e-12"


def compare_csv(a, b):
    """None, or what differs. What is measured to 1e-11, since ten steps amplify roundings; the rest literally."""
    rows_a, rows_b = (list(csv.reader(open(p))) for p in (a, b))
    if len(rows_a) != len(rows_b):
        return f"{len(rows_a)} rows, expected {len(rows_b)}"
    if rows_a[0] != rows_b[0]:
        return f"columns {rows_a[0]}, expected {rows_b[0]}"
    for i, (row_a, row_b) in enumerate(zip(rows_a, rows_b)):
        for column, x, y in zip(rows_a[0], row_a, row_b):
            measured = i > 0 and (column in ("loss", "lr", "same_x") or column.startswith(("rms_", "shortcut_")) or column.endswith("_norm"))
            if x != y and not (measured and abs(float(x) - float(y)) <= 1e-11 * abs(float(y))):
                return f"line {i + 1}, {column}: {x}, expected {y}"


def check():
    passed = failed = 0
    with tempfile.TemporaryDirectory() as temp:
        temp = Path(temp)
        write_all(temp)
        names = {p.name for folder in (temp, DUMPS) for p in folder.iterdir()}
        for name in sorted(names):
            committed, made = DUMPS / name, temp / name
            try:
                if not committed.exists():
                    problem = "missing; run make_dumps.py"
                elif not made.exists():
                    problem = "make_dumps.py does not make it; remove it"
                else:
                    problem = (compare_csv if name.endswith(".csv") else compare_bin)(committed, made)
            except keel_file.FileError as e:
                problem = str(e)
            print(f"{'FAIL' if problem else 'ok':<5} {name}" + (f": {problem}" if problem else ""))
            passed, failed = passed + (not problem), failed + bool(problem)
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(check())
    if sys.argv[1:]:
        sys.exit("usage: python3 dev/reference/make_dumps.py [--check]")
    write_all(DUMPS)
    files = sorted(DUMPS.iterdir())
    print(f"{len(files)} files, {sum(p.stat().st_size for p in files) / 2 ** 20:.2f} MiB in {DUMPS}")
