"""7. A task that needs depth: programs whose queries take 1 to K lookups (--train hops:K), over the number of sub-layers.

Accuracy at the answers, for each number of lookups: hops.csv of the trainer. One attention sub-layer to learn whose each value is and one for each
lookup is a way to do it, so K lookups ask for K + 1 blocks, unless a model finds a shorter way. Each placement at its best learning rate of a sweep.
KEEL's alpha = L is for deep models; the paper's footnote to eq. 8 has it tuned in small ones, so the small size, of 2 to 8 sub-layers, has one of its own.
"""

import re
from types import SimpleNamespace

from shared import COLOURS, LABELS, finished, pyplot, read_csv, save, seeds, staged, sweep, training, write_csv

SIZES = {
    "tiny": dict(K=2, L=[2, 4], C=16, H=2, B=2, alpha=2, lrs=[3e-3], start=[3e-3], steps=10, warmup=4, seeds=1, m=2, norms=["keel", "pre"]),
    # One rate: 4e-3 is the best of [2e-3, 4e-3, 8e-3] for both at L = 8 (dev/results/hops_lr.csv)
    "small": dict(K=3, L=[2, 4, 6, 8], C=64, H=4, B=16, alpha=3, lrs=[4e-3], start=[4e-3], steps=2500, warmup=200, seeds=1, m=32, norms=["keel", "pre"]),
    "gpu": dict(K=8, L=[8, 16, 32, 64, 128, 512], C=256, H=8, B=128, alpha=0, lrs=[5e-4, 1e-3, 2e-3, 4e-3, 8e-3], start=[2e-3, 4e-3], steps=20000, warmup=1000, seeds=1, m=32, norms=["keel", "pre"]),
}


def run_of(c, norm, L, lr, seed):
    s = c.settings
    length = 24 * s.K + 4  # of a program, K > 1 (HopPrograms in keel_common.h); the trainer finds it itself, here it is for the time left
    shape = SimpleNamespace(L=L, C=s.C, H=s.H, T=length - 1, B=s.B, warmup=s.warmup)
    flags = ["--train", f"hops:{s.K}", "-m", str(s.m)] + (["-a", f"{s.alpha:g}"] if norm == "keel" and s.alpha else [])  # 0: L
    run = training(c, f"hops/{norm}-L{L}-{lr:g}-{seed}", norm, shape, lr, steps=s.steps, seed=seed, flags=flags, may_diverge=True)
    at = run.command.index("-v")  # accuracy over training: twenty points
    run.command[at + 1] = str(max(1, s.steps // 20))
    at = run.command.index("-t")
    del run.command[at:at + 2]
    return run


def rates(c, norm, L):
    s = c.settings

    def error(lr):
        mine = [run_of(c, norm, L, lr, seed) for seed in seeds(s)]
        return 1 - accuracy([row for run in mine for row in rows_of(c, norm, L, lr, run)], norm, L, "all") if all(finished(c, run) for run in mine) else None
    return sweep(s.lrs, s.start, error)


def runs(c):
    s = c.settings
    return staged(lambda: [run_of(c, norm, L, lr, seed) for L in sorted(s.L, reverse=True) for norm in s.norms for lr in rates(c, norm, L) for seed in seeds(s)])


def rows_of(c, norm, L, lr, run):
    # The trainer says beside each accuracy what a guess gets
    chance = float(re.search(r"by chance ([0-9.]+) %", (c.runs / f"{run.name}.txt").read_text())[1]) / 100
    return [{"norm": norm, "L": L, "K": c.settings.K, "lr": f"{lr:g}", "seed": run.seed, **row, "chance": f"{chance:g}"} for row in read_csv(c.runs / run.name / "hops.csv")]


def collect(c):
    s = c.settings
    write_csv(c.results / "hops.csv", [row for norm in s.norms for L in s.L for lr in rates(c, norm, L) for seed in seeds(s) for row in rows_of(c, norm, L, lr, run_of(c, norm, L, lr, seed))])


def best(rows):
    """The rows of each placement and depth at its best learning rate: most answers right at the end."""
    kept = []
    for norm, L in dict.fromkeys((r["norm"], int(r["L"])) for r in rows):
        mine = [r for r in rows if r["norm"] == norm and int(r["L"]) == L]
        lr = max(dict.fromkeys(r["lr"] for r in mine), key=lambda lr: accuracy([r for r in mine if r["lr"] == lr], norm, L, "all"))
        kept += [r for r in mine if r["lr"] == lr]
    return kept


def accuracy(rows, norm, L, hops, step=None):
    """Over all answers that take so many lookups (or "all") and all seeds, at a step or at the end."""
    mine = [r for r in rows if r["norm"] == norm and int(r["L"]) == L and hops in (r["hops"], "all")]
    step = step or max(int(r["step"]) for r in mine)
    counted = [(int(r["count"]), float(r["accuracy"])) for r in mine if int(r["step"]) == step]
    return sum(n * a for n, a in counted) / max(1, sum(n for n, _ in counted))


def draw(c):
    plt = pyplot()
    rows = best(read_csv(c.results / "hops.csv"))
    norms, depths, hops = list(dict.fromkeys(r["norm"] for r in rows)), sorted({int(r["L"]) for r in rows}), sorted({r["hops"] for r in rows}, key=int)
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), gridspec_kw={"wspace": 0.22})
    for norm in norms:
        for L, style in zip(depths, (":", "--", "-", "-.", (0, (5, 1)))):
            steps = sorted({int(r["step"]) for r in rows if r["norm"] == norm and int(r["L"]) == L})
            axes[0].plot(steps, [accuracy(rows, norm, L, "all", step) for step in steps], linestyle=style, color=COLOURS[norm], label=f"{LABELS[norm]} L = {L}")
            axes[1].plot(range(len(hops)), [accuracy(rows, norm, L, h) for h in hops], marker="o", linestyle=style, color=COLOURS[norm])
    axes[0].set(xlabel="step", title=f"Answers right, all of hops:{rows[0]['K']}", ylim=(0, 1.03))
    axes[1].set(title="At the end, by lookups needed", ylim=(0, 1.03), xlabel="lookups")
    axes[1].set_xticks(range(len(hops)), hops)
    for axis in axes:
        axis.axhline(float(rows[0]["chance"]), color="#8a9099", lw=1, ls=":")
    axes[0].legend(fontsize=8)
    save(plt, figure, c.results / "hops.png")
