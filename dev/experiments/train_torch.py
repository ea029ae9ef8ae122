"""Trains in PyTorch, with the trainers' initial bits, data order, schedule and optimizer, what they have no placement for: the paper's steps to KEEL (its eq. 24 to 28).

    python3 dev/experiments/train_torch.py --form attempt2 -i 'text/*.py' -L 32 -o out/attempt2

    attempt1   x' = Norm(alpha x + F(x))                   the placement scaledpost
    attempt2   x' = Norm(alpha x + F(beta x))              beta: a learnable scalar of each sub-layer, 1 at first
    attempt3   x' = Norm(alpha x + F(beta Norm(x)))
    final      x' = Norm(alpha x + F(Norm(x)))             the placement keel: beta is in the inner norm's gain
    pre        x' = x + F(Norm(x))

--usual starts as GPTs usually do: every matrix normal with a deviation of 0.02, a head of its own, the embedding not scaled.
attempt3 and final have section 3.1's exceptions at the first two sub-layers. Writes log.csv and, every --probe steps, the norm of dL/dx at each
sub-layer into probe.csv, with the trainers' columns; -y goes on from the last snapshot. attempt1, final and pre train the trainers' own models.
"""

import argparse
import csv
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import shared  # finds the reference
import torch

import keel
from data import Loader, read_text
from keel_file import Config

FORMS = {"attempt1": ("scaledpost", False), "attempt2": ("scaledpost", True), "attempt3": ("keel", True), "final": ("keel", False), "pre": ("pre", False)}
LOG = ["step", "loss", "val_loss", "lr", "grad_norm", "ms"]
PROBE = ["step", "sublayer", "dx_norm", "grad_norm"]


class Model(keel.KeelGPT):
    def __init__(self, form, cfg, seed, device="cpu", usual=False):
        params = keel.init_params(cfg, seed)
        if usual:
            normal = np.random.default_rng(seed).normal
            params["head"] = params["wte"]
            params = {name: normal(0, 0.02, p.shape).astype(np.float32) if p.ndim == 2 else p for name, p in params.items()}
        super().__init__(cfg, params, dtype=torch.float32, device=device)
        self.has_beta, self.usual = FORMS[form][1], usual
        if self.has_beta:  # a tensor of no dimensions, so that AdamW does not decay it
            self.params.update({f"beta[{l}]": torch.ones((), device=device, requires_grad=True) for l in range(cfg.L)})

    def branch_input(self, x, l, s):
        u = super().branch_input(x, l, s)
        return self.params[f"beta[{l}]"] * u if self.has_beta else u

    def embedding(self, tokens):
        return self.params["wte"][tokens] + self.params["wpe"][:tokens.shape[1]] if self.usual else super().embedding(tokens)

    def head(self, x):
        return torch.nn.functional.linear(x, self.params["head"][:self.cfg.V]) if self.usual else super().head(x)


def rows_until(path, step):
    """The rows of a log that a resume at `step` keeps."""
    return [row for row in shared.read_csv(path) if int(row["step"]) <= step]


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--form", choices=FORMS, required=True)
    a.add_argument("-i", "--train", required=True, metavar="PATH|GLOB")
    a.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    for short, name, kind, default in (("-L", "layers", int, 32), ("-C", "channels", int, 64), ("-H", "heads", int, 2), ("-t", "seq-len", int, 64), ("-b", "batch", int, 8),
                                       ("-x", "steps", int, 200), ("-u", "warmup", int, 50), ("-l", "lr", float, 3e-3), ("-m", "val-batches", int, 16),
                                       ("-n", "checkpoint-every", int, 50), ("-P", "probe", int, 10)):
        a.add_argument(short, "--" + name, type=kind, default=default)
    a.add_argument("--usual", action="store_true")
    a.add_argument("--device", default="cpu", help="cuda: on a GPU, in FP32")
    a.add_argument("--seed", type=int, default=shared.SEED)
    a.add_argument("-y", "--resume", action="store_true")
    o = a.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    try:
        train_text, val_text = read_text(o.train)
    except FileNotFoundError as e:
        sys.exit(f"train_torch.py: {e}")
    train, val = Loader(train_text, o.seq_len, o.seed, True), Loader(val_text, o.seq_len, o.seed, False)

    cfg = Config(o.seq_len, 256, o.layers, o.heads, o.channels, FORMS[o.form][0])
    model = Model(o.form, cfg, o.seed, o.device, o.usual)
    params = list(model.params.values())
    adamw = keel.AdamW(params)
    step, snapshot = 0, o.out / "snapshot.pt"
    o.out.mkdir(parents=True, exist_ok=True)
    logs = {"log.csv": (LOG, []), "probe.csv": (PROBE, [])}
    if o.resume and snapshot.exists():
        saved = torch.load(snapshot, map_location=o.device, weights_only=True)
        step, adamw.t = saved["step"], saved["step"]
        with torch.no_grad():
            for mine, theirs in zip((*params, *adamw.m, *adamw.v), saved["tensors"]):
                mine.copy_(theirs)
        logs = {name: (columns, rows_until(o.out / name, step)) for name, (columns, _) in logs.items()}
    elif any((o.out / name).exists() for name in logs) and not o.resume:
        sys.exit(f"train_torch.py: -o: expected an empty folder, found a run in {o.out}; choose another or go on with -y")

    files = {}
    for name, (columns, rows) in logs.items():
        files[name] = open(o.out / name, "w", newline="")
        writer = csv.DictWriter(files[name], columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

    def row(name, *values):
        files[name].write(",".join(str(v) if isinstance(v, (int, str)) else f"{v:.9g}" for v in values) + "\n")
        files[name].flush()

    def save():
        for file in files.values():
            os.fsync(file.fileno())
        torch.save({"step": step, "tensors": [*params, *adamw.m, *adamw.v]}, str(snapshot) + ".tmp")
        os.replace(str(snapshot) + ".tmp", snapshot)

    asked = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.append(True))

    def tensors(s, loader):
        return (torch.from_numpy(t.copy()).to(o.device) for t in loader.batch(s, o.batch))

    while step < o.steps and not asked:
        step += 1
        start = time.time()
        tokens, targets = tensors((step - 1) * o.batch, train)
        logits, xs = model.forward(tokens)
        loss = keel.cross_entropy(logits, targets)
        grads = torch.autograd.grad(loss, params + xs)
        lr = keel.learning_rate(step, o.steps, o.warmup, o.lr)
        norm = adamw.step(grads[:len(params)], lr)
        if step % o.probe == 0 or step == 1:
            layer = [0.0] * o.layers
            for name, g in zip(model.params, grads):
                if "[" in name:
                    layer[int(name.split("[")[1][:-1])] += g.square().sum().item()
            for l in range(o.layers):
                row("probe.csv", step, l, grads[len(params) + l].norm().item(), math.sqrt(layer[l]))
        val_loss = ""
        if step == o.steps:
            with torch.no_grad():
                batches = min(o.val_batches, val.sequences // o.batch)
                val_loss = sum(model.loss(*tensors(i * o.batch, val)).item() for i in range(batches)) / batches
        row("log.csv", step, loss.item(), val_loss, lr, norm, 1000 * (time.time() - start))
        if step % o.checkpoint_every == 0:
            save()
    if asked and step > 0:
        save()


if __name__ == "__main__":
    main()
