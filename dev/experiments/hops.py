"""7. A task that needs depth: programs whose queries take 1 to K lookups (--train hops:K), over the number of sub-layers.

Accuracy at the answers, for each number of lookups: hops.csv of the trainer. An attention sub-layer can do one lookup, so each more asks for one more block.
"""

import re
from types import SimpleNamespace

from shared import COLOURS, LABELS, pyplot, read_csv, save, seeds, training, write_csv

SIZES = {
    "tiny": dict(K=2, L=[2, 4], C=16, H=2, B=2, lr=3e-3, steps=10, warmup=4, seeds=1, m=2, norms=["keel", "pre"]),
    "small": dict(K=2, L=[4, 8, 16], C=64, H=4, B=16, lr=3e-3, steps=800, warmup=100, seeds=1, m=16, norms=["keel", "pre"]),
    "gpu": dict(K=8, L=[16, 32, 64, 128, 512], C=256, H=4, B=128, lr=3e-3, steps=20000, warmup=1000, seeds=1, m=32, norms=["keel", "pre"]),
}
NOMINAL_T = 16  # tokens of a program for each lookup and for its queries, about: for the time left alone. The trainer chooses T


def run_of(c, norm, L, seed):
    s = c.settings
    shape = SimpleNamespace(L=L, C=s.C, H=s.H, T=NOMINAL_T * (s.K + 1), B=s.B, warmup=s.warmup)
    flags = ["--train", f"hops:{s.K}", "-m", str(s.m)]
    run = training(c, f"hops/{norm}-L{L}-{seed}", norm, shape, s.lr, steps=s.steps, seed=seed, flags=flags, may_diverge=True)
    at = run.command.index("-v")  # accuracy over training: twenty points
    run.command[at + 1] = str(max(1, s.steps // 20))
    at = run.command.index("-t")
    del run.command[at:at + 2]
    return run


def runs(c):
    yield [run_of(c, norm, L, seed) for L in sorted(c.settings.L, reverse=True) for norm in c.settings.norms for seed in seeds(c.settings)]


def collect(c):
    s, rows = c.settings, []
    for norm in s.norms:
        for L in s.L:
            for seed in seeds(s):
                run = run_of(c, norm, L, seed)
                # The trainer says beside each accuracy what a guess gets
                chance = float(re.search(r"by chance ([0-9.]+) %", (c.runs / f"{run.name}.txt").read_text())[1]) / 100
                for row in read_csv(c.runs / run.name / "hops.csv"):
                    rows.append({"norm": norm, "L": L, "K": s.K, "seed": seed, **row, "chance": f"{chance:g}"})
    write_csv(c.results / "hops.csv", rows)


def accuracy(rows, norm, L, hops, step=None):
    """Over all answers that take so many lookups (or "all") and all seeds, at a step or at the end."""
    mine = [r for r in rows if r["norm"] == norm and int(r["L"]) == L and hops in (r["hops"], "all")]
    step = step or max(int(r["step"]) for r in mine)
    counted = [(int(r["count"]), float(r["accuracy"])) for r in mine if int(r["step"]) == step]
    return sum(n * a for n, a in counted) / max(1, sum(n for n, _ in counted))


def draw(c):
    plt = pyplot()
    rows = read_csv(c.results / "hops.csv")
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
