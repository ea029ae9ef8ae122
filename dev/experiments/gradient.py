"""1. Gradient flow: the norm of dL/dx at every sub-layer, at every step, for all norm placements.

The same model, data and learning rate for each, and --probe 1: the trainer writes a row for each sub-layer and step. Step 1's
gradient is that of the new model. What is kept is `kept_steps`, dense at the beginning where it happens.
"""

import math

from shared import COLOURS, LABELS, NORMS, final_loss, log, pyplot, read_csv, save, seeds, smooth, training, write_csv

SIZES = {
    "tiny": dict(L=4, C=16, H=2, T=16, B=2, lr=3e-3, steps=10, warmup=4, seeds=1, norms=NORMS),
    "small": dict(L=64, C=64, H=2, T=64, B=8, lr=3e-3, steps=200, warmup=50, seeds=1, norms=NORMS),
    "gpu": dict(L=512, C=256, H=4, T=256, B=32, lr=3e-3, steps=2000, warmup=400, seeds=1, norms=NORMS),
}
SCHEDULE = [1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 40, 50, 60, 75, 100, 125, 150, 200, 300, 400, 500, 750, 1000, 1500, 2000, 3000, 5000, 10000]
COLUMNS = {"dx_norm": "dx", "shortcut_gain_to_top": "shortcut", "grad_norm": "grad", "rms_x": "rms_x", "rms_f": "rms_f"}


def kept_steps(steps):
    return [s for s in SCHEDULE if s < steps] + [steps]


def run_of(c, norm, seed):
    # The model of the end stays: the redundancy experiment takes it apart.
    return training(c, f"gradient/{norm}-{seed}", norm, c.settings, c.settings.lr, seed=seed, flags=["--probe", "1"], keep_model=True)


def runs(c):
    yield [run_of(c, norm, seed) for seed in seeds(c.settings) for norm in c.settings.norms]


def collect(c):
    """The first seed's gradients and losses; of every seed what the table shows."""
    s, rows, curves, ends = c.settings, [], [], []
    kept, ladder = set(kept_steps(s.steps)), (min(2, s.L - 2), s.L - 1)
    for seed in seeds(s):
        for norm in s.norms:
            run = run_of(c, norm, seed)
            probe = [r for r in read_csv(c.runs / run.name / "probe.csv") if int(r["step"]) in kept]
            steps, losses, val = log(c, run)
            if seed == seeds(s)[0]:
                rows += [{"norm": norm, "step": r["step"], "sublayer": r["sublayer"], **{short: f"{float(r[long]):.4g}" for long, short in COLUMNS.items()}} for r in probe]
                curves += [{"norm": norm, "step": step, "loss": f"{loss:.4f}", "val_loss": "" if math.isnan(v) else f"{v:.4f}"} for step, loss, v in zip(steps, losses, val)]
            for step in sorted(kept):
                low, high = (next(r for r in probe if (int(r["step"]), int(r["sublayer"])) == (step, l)) for l in ladder)
                ends.append({"norm": norm, "seed": seed, "step": step, "dx_low": f"{float(low['dx_norm']):.4g}", "dx_top": f"{float(high['dx_norm']):.4g}",
                             "shortcut": f"{float(low['shortcut_gain_to_top']):.4g}", "val_loss": f"{final_loss(c, run):.4f}" if step == s.steps else ""})
    write_csv(c.results / "gradient.csv", rows)
    write_csv(c.results / "gradient_loss.csv", curves)
    write_csv(c.results / "gradient_seeds.csv", ends)


def by_norm(rows):
    found = {}
    for row in rows:
        found.setdefault(row["norm"], []).append(row)
    return found


def draw(c):
    plt = pyplot()
    tables, curves = by_norm(read_csv(c.results / "gradient.csv")), by_norm(read_csv(c.results / "gradient_loss.csv"))
    steps = sorted({int(r["step"]) for rows in tables.values() for r in rows})
    later = min(steps, key=lambda s: abs(s - steps[-1] / 4))
    figure, axes = plt.subplots(1, 3, figsize=(13.5, 4.2), gridspec_kw={"wspace": 0.28})
    for axis, step, title in ((axes[0], steps[0], "the new model"), (axes[1], later, f"step {later}")):
        for norm, rows in tables.items():
            points = [(int(r["sublayer"]), float(r["dx"])) for r in rows if int(r["step"]) == step]
            axis.plot(*zip(*points), color=COLOURS[norm], label=LABELS[norm], lw=2.4 if norm in ("keel", "post") else 1.4)
        axis.set(yscale="log", xlabel="sub-layer (0 is next to the embedding)", title=f"Gradient norm ‖dL/dx‖, {title}")
    low, high = (f(a.get_ylim()[i] for a in axes[:2]) for i, f in ((0, min), (1, max)))
    for axis in axes[:2]:
        axis.set_ylim(max(low, 1e-20), high)
    for norm, rows in curves.items():
        smoothed = smooth([float(r["loss"]) for r in rows], max(1, len(rows) // 20))
        axes[2].plot([int(r["step"]) for r in rows], smoothed, color=COLOURS[norm], lw=2.4 if norm in ("keel", "post") else 1.4)
    axes[2].set(xlabel="step", title="Training loss, running mean (nats)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=7, bbox_to_anchor=(0.5, -0.09))
    save(plt, figure, c.results / "gradient.png")
