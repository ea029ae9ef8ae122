"""3. Depth: KEEL against Pre-LN at equal tokens, each at its best learning rate of a sweep; and deeper against wider at equal parameters.

Shapes (L, C) with one C are the first question; shapes with one L C^2, so with as many parameters in their sub-layers, the second.
Every shape trains on the same tokens with each learning rate. A sweep begins with two and goes on until the best has been tried on both sides.
All seeds run at all rates; with sweep_seeds=1 the first seed finds the best one and the others run there.
"""

import itertools
import math
from types import SimpleNamespace

from shared import COLOURS, LABELS, final_loss, finished, log, pyplot, read_csv, save, seeds, staged, swept, training, write_csv

SIZES = {
    "tiny": dict(L=[2, 4], C=16, H=2, T=16, B=2, steps=10, warmup=4, lrs=[3e-3, 1e-2], start=[3e-3], pre_start=[3e-3], equal=[[8, 8], [2, 16]], seeds=1, sweep_seeds=0, m=4, norms=["keel", "pre"]),
    "small": dict(L=[8, 16, 64], C=64, H=2, T=64, B=8, steps=300, warmup=75, lrs=[7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2], start=[6e-3, 1.2e-2], pre_start=[3e-3, 6e-3], equal=[[64, 32], [16, 64], [4, 128]],
                  seeds=1, sweep_seeds=0, m=64, norms=["keel", "pre"]),
    "gpu": dict(L=[64, 128, 512, 1024], C=256, H=4, T=256, B=128, steps=5000, warmup=1000, lrs=[1e-3, 1.5e-3, 2e-3, 3e-3, 4.5e-3, 6e-3, 9e-3, 1.35e-2, 2e-2], start=[4.5e-3, 6e-3], pre_start=[3e-3, 4.5e-3],
                equal=[[512, 256], [128, 512], [32, 1024]], seeds=1, sweep_seeds=0, m=64, norms=["keel", "pre"]),
}


def shapes(s):
    """[(L, C)], each once, those of both questions."""
    return list(dict.fromkeys([(L, s.C) for L in s.L] + [tuple(shape) for shape in s.equal]))


def run_of(c, norm, L, C, lr, seed):
    s = c.settings
    shape = SimpleNamespace(L=L, C=C, H=max(1, C * s.H // s.C), T=s.T, B=s.B, steps=s.steps, warmup=s.warmup)
    return training(c, f"depth/{norm}-L{L}-C{C}-{lr:g}-{seed}", norm, shape, lr, seed=seed, flags=["-m", str(s.m)], may_diverge=True)


MORE = "rates beside the best of these follow, until it has been tried on both sides"


def rates(c, norm, L, C):
    """{rate: its seeds} of the sweep so far: Pre-LN's best lie lower, so its sweep begins there."""
    s, first = c.settings, seeds(c.settings)[:c.settings.sweep_seeds or None]

    def loss(lr):
        mine = [run_of(c, norm, L, C, lr, seed) for seed in first]
        return sum(final_loss(c, run) for run in mine) / len(mine) if all(finished(c, run) for run in mine) else None
    tried, best = swept(s.lrs, s.pre_start if norm == "pre" else s.start, loss)
    return {lr: seeds(s) if lr == best else first for lr in tried}


def runs(c):
    s = c.settings
    return staged(lambda: [run_of(c, norm, L, C, lr, seed) for L, C in sorted(shapes(s), key=lambda shape: -shape[0] * shape[1] ** 2)
                           for norm in s.norms for lr, its in rates(c, norm, L, C).items() for seed in its])


def collect(c):
    s, rows = c.settings, []
    for L, C in shapes(s):
        for norm in s.norms:
            for lr, its in rates(c, norm, L, C).items():
                for seed in its:
                    run = run_of(c, norm, L, C, lr, seed)
                    _, losses, _ = log(c, run)
                    tail = losses[-max(1, len(losses) // 10):]
                    rows.append({"norm": norm, "L": L, "C": C, "lr": f"{lr:g}", "seed": seed, "tokens": s.T * s.B * s.steps, "parameters": 6 * C * C * L,
                                 "train_loss": f"{sum(tail) / len(tail):.4f}", "val_loss": f"{final_loss(c, run):.4f}"})
    write_csv(c.results / "depth.csv", rows)


def best(rows):
    """(norm, L, C): (lr, mean validation loss over the seeds, lowest, highest) at the best learning rate of those that have all seeds."""
    found = {}
    for norm, L, C in dict.fromkeys((r["norm"], int(r["L"]), int(r["C"])) for r in rows):
        mine = [r for r in rows if (r["norm"], int(r["L"]), int(r["C"])) == (norm, L, C)]
        at = {lr: [float(r["val_loss"]) for r in mine if r["lr"] == lr] for lr in dict.fromkeys(r["lr"] for r in mine)}
        most = max(map(len, at.values()))
        mean, lr = min((sum(values) / most, float(lr)) for lr, values in at.items() if len(values) == most)
        values = at[f"{lr:g}"]
        found[norm, L, C] = (lr, mean, min(values), max(values))
    return found


def questions(rows):
    """The shapes of each question: those of the width that most depths have, and those of the L C^2 that most widths have."""
    all_shapes = list(dict.fromkeys((int(r["L"]), int(r["C"])) for r in rows))
    width = max(all_shapes, key=lambda a: sum(b[1] == a[1] for b in all_shapes))[1]
    size = max(all_shapes, key=lambda a: len({b[1] for b in all_shapes if b[0] * b[1] ** 2 == a[0] * a[1] ** 2}))
    size = size[0] * size[1] ** 2
    return sorted(a for a in all_shapes if a[1] == width), sorted((a for a in all_shapes if a[0] * a[1] ** 2 == size), key=lambda a: -a[0])


def draw(c):
    plt = pyplot()
    rows = read_csv(c.results / "depth.csv")
    found, (deep, equal) = best(rows), questions(rows)
    norms = list(dict.fromkeys(r["norm"] for r in rows))
    panels = 3 if len(equal) > 1 else 2  # shapes of one size are the third
    figure, axes = plt.subplots(1, panels, figsize=(4.5 * panels, 4), gridspec_kw={"wspace": 0.25})
    lrs = sorted({float(r["lr"]) for r in rows})

    def means(axis, norm, x, shapes):  # and the range of the seeds
        _, mean, low, high = zip(*(found[norm, *a] for a in shapes))
        axis.errorbar(x, mean, [[m - v for m, v in zip(mean, low)], [v - m for m, v in zip(mean, high)]], fmt="o-", color=COLOURS[norm], capsize=3, elinewidth=1, label=LABELS[norm])

    for norm in norms:
        colour = COLOURS[norm]
        right = norm == "pre"  # of the other, so that neither range hides
        means(axes[0], norm, [L * (1.06 if right else 1) for L, _ in deep], deep)
        for a in deep:
            axes[0].annotate(f"{found[norm, *a][0]:g}", (a[0] * (1.06 if right else 1), found[norm, *a][1]), xytext=(6 if right else -6, 5 if right else -7), textcoords="offset points", ha="left" if right else "right", va="center", fontsize=8, color=colour)
        for a, style in zip(deep, itertools.cycle(("o:", "s--", "D-", "^-."))):
            found_at = [[float(r["val_loss"]) for r in rows if (r["norm"], int(r["L"]), int(r["C"]), float(r["lr"])) == (norm, *a, lr)] for lr in lrs]
            points = [(lr, sum(v) / len(v)) for lr, v in zip(lrs, found_at) if v and math.isfinite(sum(v))]
            if points:
                axes[1].plot(*zip(*points), style, color=colour, ms=4, lw=1.4, label=f"{LABELS[norm]} L = {a[0]}")
        if panels == 3:
            means(axes[2], norm, [i + (0.06 if right else 0) for i in range(len(equal))], equal)
    axes[0].set(xscale="log", xlabel=f"sub-layers L, of {deep[0][1]} channels", title="Validation loss, range of seeds")
    axes[0].set_xticks([L for L, _ in deep], [str(L) for L, _ in deep])
    axes[0].minorticks_off()
    axes[0].margins(x=0.2)
    axes[1].set(xscale="log", xlabel="peak learning rate", title="The sweep")
    axes[1].set_xticks(lrs, [f"{lr:g}" for lr in lrs])
    axes[1].minorticks_off()
    axes[1].legend(fontsize=8)
    if panels == 3:
        axes[2].set(title=f"Deeper or wider, {6 * equal[0][0] * equal[0][1] ** 2 / 1e6:.2g} M parameters")
        axes[2].set_xticks(range(len(equal)), [f"L = {L}\nC = {C}" for L, C in equal])
    axes[0].legend()
    save(plt, figure, c.results / "depth.png")
