#!/usr/bin/env python3
"""Why a gradient shrinks from sub-layer to sub-layer, measured in PyTorch on the models of a run (dev/doc/keel.md explains the columns):

    ./train_keel_cpu --norm post -L 64 -C 64 -H 2 -t 64 -b 16 -u 100 -l 3e-3 -s 0 -v 0 -n 10 --keep 0 -o out/post -i '/usr/lib/python3.11/*.py'
    python3 dev/reference/collapse.py out/post '/usr/lib/python3.11/*.py' 0 10 20 50 200

Means over the sub-layers from 8 on, by kind. Step 0 is the initialisation (seed 1337) that the run began with.
"""

import sys
from pathlib import Path

import numpy as np
import torch

import keel
import keel_file
from data import glob_argument

SEED, B, FIRST = 1337, 8, 8


def cosine(a, b):
    return ((a * b).sum() / (a.norm() * b.norm())).item()


def sublayers(model, tokens, targets):
    """The loss, and of each sub-layer what forward and backward do to lengths."""
    branches = []
    logits, xs = model.forward(tokens, branches)
    fs, zs = zip(*branches)
    loss = keel.cross_entropy(logits, targets)
    grads = torch.autograd.grad(loss, xs + list(fs))
    dxs, dzs = grads[:model.cfg.L + 1], grads[model.cfg.L + 1:]  # dL/dF = dL/dz
    rows = []
    for l, (f, z) in enumerate(branches):
        alpha = keel_file.sub_layer(model.cfg, l).alpha
        shortcut, branch = alpha * dzs[l], dxs[l] - alpha * dzs[l]
        rows.append({
            "same": keel.same(xs[l]), "s_f": (f.norm() / (alpha * xs[l].norm())).item(), "cos_f": cosine(xs[l], f),
            "s_b": (branch.norm() / shortcut.norm()).item(), "cos_b": cosine(shortcut, branch),
            "shortcut": (shortcut.norm() / dxs[l + 1].norm()).item(), "all": (dxs[l].norm() / dxs[l + 1].norm()).item()})
    return loss.item(), rows


def main(folder, data_glob, *steps):
    data = np.frombuffer(b"".join(Path(f).read_bytes() for f in glob_argument(data_glob)), np.uint8).astype(np.int64)
    files = sorted(Path(folder).glob("model_*.bin"))
    if len(data) == 0 or not files or not steps:
        sys.exit(f"expected text in {data_glob}, models in {folder} and steps, found {len(data)} bytes, {len(files)} models and {len(steps)} steps")
    cfg = keel_file.read(files[0]).cfg
    T = cfg.max_T
    starts = np.random.default_rng(1).integers(0, len(data) - T, B)
    tokens, targets = (torch.from_numpy(np.stack([data[s + shift:s + shift + T] for s in starts])) for shift in (0, 1))
    columns = ["same", "s_f", "cos_f", "s_b", "cos_b", "shortcut", "all"]
    print(f"{'step':>5} {'loss':>6}  {'kind':12}" + "".join(f"{c:>9}" for c in columns))
    for step in map(int, steps):
        model = keel.from_file(Path(folder) / f"model_{step:08d}.bin") if step else keel.KeelGPT(cfg, keel.init_params(cfg, SEED))
        loss, rows = sublayers(model, tokens, targets)
        for kind, of_kind in (("attention", rows[FIRST::2]), ("feed-forward", rows[FIRST + 1::2])):
            means = [np.exp(np.mean(np.log([r[c] for r in of_kind]))) if c in ("shortcut", "all") else np.mean([r[c] for r in of_kind]) for c in columns]
            print(f"{step:5d} {loss:6.3f}  {kind:12}" + "".join(f"{m:9.4f}" for m in means))


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
