"""7. A task that needs depth: programs whose queries take 1 to K lookups (--train hops:K), over the number of sub-layers.

Accuracy at the answers, for each number of lookups: hops.csv of the trainer. What a sub-layer has looked up, only those above it can look up again. One block to
learn whose each value is and one for each lookup is a way to do it; as assignments can look up those before them, and all of them at once, fewer can do
for many lookups. Each placement at its best learning rate of a sweep.
KEEL's alpha = L is for deep models; the paper's footnote to eq. 8 has it tuned in small ones, so the small size, of 4 to 8 sub-layers, has one of its own.
"""

import math
from types import SimpleNamespace

from shared import COLOURS, LABELS, diverged, finished, pyplot, read_csv, save, seeds, staged, sweep, training, write_csv

SIZES = {
    "tiny": dict(K=2, L=[2, 4], C=16, H=2, B=2, alpha=2, lrs=[3e-3], start=[3e-3], steps=10, warmup=4, seeds=1, m=2, norms=["keel", "pre"]),
    # One rate: 4e-3 is the best of [2e-3, 4e-3, 8e-3] for both at L = 8 (dev/results/hops_lr)
    "small": dict(K=3, L=[4, 6, 8], C=64, H=4, B=16, alpha=3, lrs=[4e-3], start=[4e-3], steps=2500, warmup=200, seeds=1, m=32, norms=["keel", "pre"]),
    "gpu": dict(K=8, L=[8, 16, 32, 64, 128, 512], C=256, H=8, B=128, alpha=0, lrs=[5e-4, 1e-3, 2e-3, 4e-3, 8e-3], start=[2e-3, 4e-3], steps=20000, warmup=1000, seeds=1, m=32, norms=["keel", "pre"]),
}


def hops_run(c, name, norm, s, lr, seed, flags=()):
    """s: L, C, H, B, steps, warm-up, K lookups, m validation batches"""
    length = 24 * s.K + 4  # of a program, K > 1 (HopPrograms in keel/hops.h); the trainer finds it itself, here it is for the time left
    shape = SimpleNamespace(L=s.L, C=s.C, H=s.H, T=length - 1, B=s.B, warmup=s.warmup)
    run = training(c, name, norm, shape, lr, steps=s.steps, seed=seed, flags=["--train", f"hops:{s.K}", "-m", str(s.m), *flags], may_diverge=True)
    at = run.command.index("-v")  # accuracy over training: twenty points
    run.command[at + 1] = str(max(1, s.steps // 20))
    at = run.command.index("-t")
    del run.command[at:at + 2]
    return run


def run_of(c, norm, L, lr, seed):
    flags = ["-a", f"{c.settings.alpha:g}"] if norm == "keel" and c.settings.alpha else []  # 0: L
    return hops_run(c, f"hops/{norm}-L{L}-{lr:g}-{seed}", norm, SimpleNamespace(**{**vars(c.settings), "L": L}), lr, seed, flags)


MORE = "rates beside the best of these follow, until it has been tried on both sides"


def rates(c, norm, L):
    s = c.settings

    def error(lr):
        mine = [run_of(c, norm, L, lr, seed) for seed in seeds(s)]
        if not all(finished(c, run) for run in mine):
            return None
        rows = [row for run in mine for row in rows_of(c, norm, L, lr, run)]
        return math.inf if any(diverged(c, run) for run in mine) else 1 - accuracy(rows, norm, L, "all")
    return sweep(s.lrs, s.start, error)


def runs(c):
    s = c.settings
    return staged(lambda: [run_of(c, norm, L, lr, seed) for L in sorted(s.L, reverse=True) for norm in s.norms for lr in rates(c, norm, L) for seed in seeds(s)])


def rows_of(c, norm, L, lr, run):
    """Of hops.csv, with the accuracy of a guess: any other of the program's 2K + 1 names. A diverged run has rows up to its last validation."""
    path, K = c.runs / run.name / "hops.csv", c.settings.K
    found = read_csv(path) if path.exists() or not diverged(c, run) else []
    return [{"norm": norm, "L": L, "K": K, "lr": f"{lr:g}", "seed": run.seed, "end": "diverged" if diverged(c, run) else "finished", **row, "chance": f"{1 / (2 * K):g}"} for row in found]


def collect(c):
    s = c.settings
    write_csv(c.results / "hops.csv", [row for norm in s.norms for L in s.L for lr in rates(c, norm, L) for seed in seeds(s) for row in rows_of(c, norm, L, lr, run_of(c, norm, L, lr, seed))])


def best(rows):
    """The rows of each placement and depth at its best learning rate: most answers right at the end, of those at which no seed diverged, if there is one."""
    kept = []
    for norm, L in dict.fromkeys((r["norm"], int(r["L"])) for r in rows):
        at = {}
        for r in rows:
            if r["norm"] == norm and int(r["L"]) == L:
                at.setdefault(float(r["lr"]), []).append(r)
        kept += at[max(at, key=lambda lr: (all(r["end"] == "finished" for r in at[lr]), accuracy(at[lr], norm, L, "all"), -lr))]
    return kept


def accuracy(rows, norm, L, hops, step=None):
    """Over all answers that take so many lookups (or "all") and all seeds, at a step or at the end; NaN where there are none."""
    mine = [r for r in rows if r["norm"] == norm and int(r["L"]) == L and hops in (r["hops"], "all")]
    step = step or max((int(r["step"]) for r in mine), default=0)
    counted = [(int(r["count"]), float(r["accuracy"])) for r in mine if int(r["step"]) == step]
    answers = sum(n for n, _ in counted)
    return sum(n * a for n, a in counted) / answers if answers else math.nan


def draw(c):
    plt = pyplot()
    rows = best(read_csv(c.results / "hops.csv"))
    norms, depths, hops = list(dict.fromkeys(r["norm"] for r in rows)), sorted({int(r["L"]) for r in rows}), sorted({r["hops"] for r in rows}, key=int)
    figure, axes = plt.subplots(1, len(norms) + 1, figsize=(4 * len(norms) + 5, 3.8), gridspec_kw={"wspace": 0.25, "width_ratios": [*([1] * len(norms)), 1.5]})
    for axis, norm in zip(axes, norms):
        cells = [[accuracy(rows, norm, L, h) for h in hops] for L in depths]
        axis.imshow(cells, cmap="Blues", vmin=0, vmax=1.25, aspect="auto", origin="lower")
        for y, line in enumerate(cells):
            for x, value in enumerate(line):
                if not math.isnan(value):
                    axis.text(x, y, f"{100 * value:.0f} %", ha="center", va="center", fontsize=9, color="white" if value > 0.7 else "#1d232b")
        axis.set(title=f"{LABELS[norm]}: answers right", xlabel="lookups needed", ylabel="sub-layers L" if norm == norms[0] else "")
        axis.set_xticks(range(len(hops)), hops)
        axis.set_yticks(range(len(depths)), [str(L) for L in depths])
        axis.grid(False)
        steps = sorted({int(r["step"]) for r in rows})
        for h in hops:
            axes[-1].plot(steps, [accuracy(rows, norm, depths[-1], h, step) for step in steps], color=COLOURS[norm], alpha=1 - 0.7 * (int(h) - 1) / max(1, len(hops) - 1), label=f"{LABELS[norm]}, {h} lookup{'s' * (h != '1')}")
    axes[-1].axhline(float(rows[0]["chance"]), color="#8a9099", lw=1, ls=":")
    axes[-1].set(xlabel="step", title=f"Answers right at L = {depths[-1]}; dotted: guesses", ylim=(0, 1.03))
    axes[-1].set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    if len(hops) < 5:
        axes[-1].legend(fontsize=8)
    save(plt, figure, c.results / "hops.png")
