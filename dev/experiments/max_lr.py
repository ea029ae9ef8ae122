"""2. The largest learning rate that a model bears: the protocol of the paper's Table 1.

The learning rate rises linearly from 0 to 5e-2 over the whole run, and the trainer stops it where the loss diverges, by the
paper's criteria (DivergenceDetector in keel/divergence.h). Reported is the learning rate at the last step before. The detector must
see a loss that stays up before it speaks; the step from which on it stayed up is found afterwards, in the log. A placement that
reaches 5e-2 with every seed gets a second, steeper ramp.
"""

import math
import re
from statistics import median

from shared import COLOURS, LABELS, NORMS, log, pyplot, read_csv, read_record, save, seeds, training, write_csv

# Table 1 of arXiv 2601.19895: 5000 steps to 5e-2, 4M tokens each, C = 1024.
PAPER = {"keel": (1.01e-2, 6.31e-3), "pre": (7.65e-3, 4.67e-3), "post": (3.0e-4, 2.8e-4), "deepnorm": (3.5e-4, 3.5e-4), "mixln": (8.6e-4, 3.5e-4), "hybridnorm": (4.9e-4, 3.5e-4)}

SIZES = {
    "tiny": dict(L=4, C=16, H=2, T=16, B=2, steps=10, tops=[5e-2, 4e-1], seeds=1, norms=["keel", "post"]),
    "small": dict(L=32, C=64, H=2, T=64, B=4, steps=600, tops=[5e-2, 4e-1], seeds=3, norms=list(PAPER)),
    "gpu": dict(L=64, C=256, H=4, T=256, B=64, steps=5000, tops=[5e-2, 4e-1], seeds=3, norms=NORMS),
}
PAPER_STEPS, PAPER_TOP = 5000, 5e-2


def run_of(c, norm, top, seed):
    s = c.settings
    return training(c, f"max_lr/{norm}-{top:g}-{seed}", norm, s, top, warmup=s.steps, seed=seed, flags=["--stop-on-divergence"], validate=False, may_diverge=True)


MORE = "who reaches the top of the first ramp takes the second, steeper one"


def survivors(c, norms, top):
    """Those of the placements whose runs all reached this ramp's top."""
    return [norm for norm in norms if not c.listing and all(read_record(c, run_of(c, norm, top, seed)).get("end") == "finished" for seed in seeds(c.settings))]


def finite(losses):
    """A step that was skipped because its loss is no number counts as the step before."""
    out = []
    for loss in losses:
        out.append(loss if math.isfinite(loss) else out[-1] if out else next((v for v in losses if math.isfinite(v)), 0.0))
    return out


def runs(c):
    norms = c.settings.norms
    for top in c.settings.tops:
        yield [run_of(c, norm, top, seed) for seed in seeds(c.settings) for norm in norms]
        norms = survivors(c, norms, top)


def window(steps):
    """Steps that the detector averages over (keel/divergence.h)."""
    return min(200, max(10, steps // 40))


def last_healthy_step(message, losses, steps, step):
    """(kind, step) of the last step before divergence. The run was stopped at `step`.

    instability     the detector's own: before the spike from which the loss did not return
    a plateau       at the median of the last ten windows. If the loss had been 3 % below it, as the median of five windows: the last window that was;
                    else the first window that is as low as the plateau, since when nothing has been learnt
    """
    spike = re.search(r"instability: .* since a spike (\d+) steps ago", message)
    if spike:
        return "instability", step - int(spike[1])
    skipped = re.search(r"the last of (\d+) skipped in a row", message)
    if skipped:
        return "not finite", step - int(skipped[1])
    kind = re.search("stagnation|degradation", message)[0]
    w, means = window(steps), window_means(losses, steps)
    noise = math.sqrt(sum((b - a) ** 2 / 2 for a, b in zip(losses, losses[1:])) / (len(losses) - 1) / w)
    level = median(means[-10:])
    fives = [i for i in range(4, len(means)) if median(means[i - 4:i + 1]) < 0.97 * level]
    last = max(i for i in range(fives[-1] + 1) if means[i] < 0.97 * level) if fives else next(i for i, m in enumerate(means) if m <= level + noise)
    return kind, (last + 1) * w


def collect(c):
    s, rows, curves = c.settings, [], []
    norms = s.norms
    for top in s.tops:
        for norm in norms:
            for seed in seeds(s):
                run = run_of(c, norm, top, seed)
                record = read_record(c, run)
                losses = finite(log(c, run)[1])
                kind, last = ("none", s.steps) if record["end"] == "finished" else last_healthy_step(record["message"], losses, s.steps, record["step"])
                rows.append({"norm": norm, "L": s.L, "top": f"{top:g}", "steps": s.steps, "seed": seed, "divergence": kind, "last_healthy_step": last,
                             "max_lr": f"{top * last / s.steps:.3g}", "lowest_loss": f"{min(window_means(losses, s.steps)):.4f}"})
                if seed == seeds(s)[0]:
                    for i, mean in enumerate(window_means(losses, s.steps)):
                        curves.append({"norm": norm, "top": f"{top:g}", "step": (i + 1) * window(s.steps), "lr": f"{top * (i + 1) * window(s.steps) / s.steps:.4g}", "loss": f"{mean:.4f}"})
        norms = survivors(c, norms, top)
    write_csv(c.results / "max_lr.csv", rows)
    write_csv(c.results / "max_lr_loss.csv", curves, ["norm", "top", "step", "lr", "loss"])


def window_means(losses, steps):
    w = window(steps)
    return [sum(losses[i:i + w]) / w for i in range(0, len(losses) - w + 1, w)] or [sum(losses) / len(losses)]


def outcome(rows):
    """norm: (max_lr of each seed, whether it only bounds it from below), from its last ramp."""
    found = {}
    for norm in dict.fromkeys(r["norm"] for r in rows):
        mine = [r for r in rows if r["norm"] == norm]
        last = [r for r in mine if r["top"] == mine[-1]["top"]]
        found[norm] = [float(r["max_lr"]) for r in last], any(r["divergence"] == "none" for r in last)
    return found


def draw(c):
    plt = pyplot()
    rows = read_csv(c.results / "max_lr.csv")
    found = outcome(rows)
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), gridspec_kw={"width_ratios": [1.25, 1], "wspace": 0.25})
    for i, (norm, (values, bound)) in enumerate(found.items()):
        mean = sum(values) / len(values)
        axes[0].errorbar(i, mean, [[mean - min(values)], [max(values) - mean]], fmt="o", ms=10, color=COLOURS[norm], ecolor="#5a626d", capsize=3, elinewidth=1.2)
        axes[0].annotate(("≥ " if bound else "") + f"{mean:.2g}", (i, mean), xytext=(10, -3), textcoords="offset points", fontsize=8.5, color="#333a44")
        if norm in PAPER:
            axes[0].plot([i, i], [PAPER[norm][0], mean], color="#d5d9de", zorder=0, lw=1.5)
            axes[0].plot(i, PAPER[norm][0], "o", ms=9, mfc="white", mec=COLOURS[norm], mew=2)
            axes[0].annotate(f"{PAPER[norm][0]:.2g}", (i, PAPER[norm][0]), xytext=(10, -3), textcoords="offset points", fontsize=8.5, color="#5a626d")
    axes[0].set_xticks(range(len(found)), [LABELS[n].replace(" ", "\n") for n in found], fontsize=9)
    axes[0].set(yscale="log", title=f"Largest learning rate; full: here, L = {rows[0]['L']}, open: the paper, L = 64", xlim=(-0.5, len(found) - 0.2))
    axes[0].grid(axis="x", visible=False)
    for norm in found:
        mine = [r for r in read_csv(c.results / "max_lr_loss.csv") if r["norm"] == norm and r["top"] == rows[0]["top"]]
        axes[1].plot([float(r["lr"]) for r in mine], [float(r["loss"]) for r in mine], color=COLOURS[norm], label=LABELS[norm], lw=2.4 if norm in ("keel", "post") else 1.4)
    axes[1].set(xlabel="learning rate, rising", title="Loss on the ramp (nats)", ylim=(None, 4.2))
    axes[1].legend(fontsize=8, ncol=2)
    save(plt, figure, c.results / "max_lr.png")
