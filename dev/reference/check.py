"""Compares a debug state with what PyTorch computes in float64 from its parameters and tokens, as the trainers' --check does.

    python3 dev/reference/check.py FILE

Prints a row per tensor (one per x[l] and dx[l]) and exits 1 unless all are within their tolerance.
"""

import sys

import numpy as np

import keel
import keel_file
from keel_file import parameter_table


def tolerance(file, name):
    """Of the file's type: the reference itself is exact to float64. HybridNorm's q, k and v gains sum few terms."""
    if file.branch_bf16 or file.type == keel_file.BF16:
        return 1e-1 if name.startswith(("d gamma_q", "d gamma_k", "d gamma_v")) else 3e-2
    return 1e-10 if file.type == keel_file.FP64 else 1e-4


def rows(file, ours):
    """(name, file's tensor, our tensor) in the order in which a step computes them."""
    L = file.cfg.L
    yield from ((f"x[{l}]", file.tensors["x"][l], ours["x"][l]) for l in range(L + 1))
    yield from ((name, file.tensors[name], ours[name]) for name in ("logits", "loss"))
    yield from ((f"dx[{l}]", file.tensors["dx"][l], ours["dx"][l]) for l in range(L, -1, -1))
    for name, _ in parameter_table(file.cfg):
        yield "d " + name, file.tensors["d" + name], ours["d" + name]


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: python3 dev/reference/check.py FILE")
    try:
        file = keel_file.read(sys.argv[1])
        if file.kind != keel_file.DEBUG:
            raise keel_file.FileError(f"{sys.argv[1]}: expected a debug state; write one with --dump")
    except keel_file.FileError as error:
        sys.exit(str(error))
    model = keel.KeelGPT(file.cfg, {name: file.tensors[name] for name, _ in parameter_table(file.cfg)})
    ours = keel.debug_tensors(model, file.tensors["tokens"], file.tensors["targets"])
    print(f"{'tensor':<16} {'shape':<18} {'rel L2 error':>12} {'worst at':>10} {'tolerance':>10}  ok")
    bad = 0
    for name, theirs, mine in rows(file, ours):
        theirs, mine = (np.asarray(a, np.float64).reshape(-1) for a in (theirs, mine))
        difference = np.abs(theirs - mine)
        with np.errstate(divide="ignore", invalid="ignore"):
            error = 0.0 if not difference.any() else np.linalg.norm(difference) / np.linalg.norm(theirs)
        ok = error <= tolerance(file, name)  # false for NaN
        bad += not ok
        print(f"{name:<16} {str(np.shape(file.tensors.get(name, mine))):<18} {error:12.3e} {difference.argmax():>10} "
              f"{tolerance(file, name):10.0e}  {'ok' if ok else 'NOT OK'}")
    print(f"{bad} tensors past their tolerance" if bad else "all tensors within their tolerance")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
