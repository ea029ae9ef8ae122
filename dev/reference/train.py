#!/usr/bin/env python3
"""Trains the PyTorch model on the bytes of text files and prints the loss of every step.

    python3 dev/reference/train.py -L 32 -C 64 -x 400 --norm post

Same flags as the trainers. Batches are random chunks of the text, not the trainers' order, so that loss
curves agree in shape and level, not step by step.
"""

import argparse
import glob
import sys
import time
from pathlib import Path

import numpy as np
import torch

import keel
from keel_file import NORMS, Config

ROOT = Path(__file__).resolve().parents[2]


def main():
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    a.add_argument("-i", "--train", metavar="PATH|GLOB", help="text; None: the trainers' own sources")
    a.add_argument("-e", "--init", metavar="FILE", help="start from a model file; its shape and norm then hold")
    a.add_argument("-L", "--layers", type=int, default=32, help="sub-layers")
    a.add_argument("-C", "--channels", type=int, default=64)
    a.add_argument("-H", "--heads", type=int, default=2)
    a.add_argument("-t", "--seq-len", type=int, default=64)
    a.add_argument("-b", "--batch", type=int, default=16, help="sequences a step")
    a.add_argument("--norm", choices=NORMS, default="keel")
    a.add_argument("-a", "--alpha", type=float, help="None: the placement's own")
    a.add_argument("-l", "--lr", type=float, default=3e-3, help="peak")
    a.add_argument("-u", "--warmup", type=int, default=100, help="steps")
    a.add_argument("-x", "--steps", type=int, default=400)
    a.add_argument("-c", "--weight-decay", type=float, default=0.01)
    a.add_argument("--clip", type=float, default=1.0)
    a.add_argument("--seed", type=int, default=1337)
    a.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    o = a.parse_args()

    files = sorted(glob.glob(o.train)) if o.train else sorted(
        str(p) for pattern in ("*.h", "*.cpp", "*.cu") for p in ROOT.glob(pattern))
    text = b"".join(Path(f).read_bytes() for f in files)
    data = torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64))

    dtype = getattr(torch, o.dtype)
    if o.init:
        model = keel.from_file(o.init, dtype=dtype)
    else:
        cfg = Config(o.seq_len, 256, o.layers, o.heads, o.channels, o.norm, o.alpha)
        if cfg.L % 2 or cfg.C % cfg.H:
            sys.exit(f"expected an even -L and -C a multiple of -H, found -L {cfg.L} -C {cfg.C} -H {cfg.H}")
        model = keel.KeelGPT(cfg, keel.init_params(cfg, o.seed), dtype=dtype)
    cfg = model.cfg
    if cfg.V < 256 or cfg.max_T < o.seq_len:
        sys.exit(f"expected a model of at least 256 words and -t {o.seq_len}, found V {cfg.V}, max T {cfg.max_T}")
    if len(data) <= o.seq_len:
        sys.exit(f"expected more than {o.seq_len} bytes of text, found {len(data)} in {files}; give another -i")

    params = list(model.params.values())
    adamw = keel.AdamW(params, o.weight_decay, o.clip)
    rng = np.random.default_rng(o.seed)
    print(f"{cfg}, {sum(p.numel() for p in params)} parameters, {len(data)} bytes of text")
    for step in range(1, o.steps + 1):
        start = time.time()
        at = torch.from_numpy(rng.integers(0, len(data) - o.seq_len, (o.batch, 1))) + torch.arange(o.seq_len)
        loss = model.loss(data[at], data[at + 1])  # each (B,T)
        lr = keel.learning_rate(step, o.steps, o.warmup, o.lr)
        norm = adamw.step(torch.autograd.grad(loss, params), lr)
        ms = 1000 * (time.time() - start)
        print(f"step {step:5d}  loss {loss.item():.6f}  lr {lr:.3e}  grad norm {norm:.4f}  {ms:.0f} ms", flush=True)


if __name__ == "__main__":
    main()
