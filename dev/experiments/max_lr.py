"""2. The largest learning rate that a model bears: the protocol of the paper's Table 1, on its ramp.

The learning rate rises linearly from 0 to 5e-2 over 5000 steps, and no run is stopped on the way. The rule that reads a ramp was written
down, with the curves of RECORDED that it was tried on, before the first ramp of the table; `judge` is the whole of it. One thing was changed while
those ran: a run that stagnates no longer counts as one that holds to the end.

A window is a fiftieth of the ramp, a level the mean of five windows, the noise what neighbouring means differ by beyond chance, U the loss of knowing
only how frequent each byte is. The three criteria of the paper's section on Table 1:
    stagnation    no level is 2 % below U: nothing but the frequencies has been learnt. Until the last window that was 3 % and the noise below the plateau,
                  which is the median window of the second half; where none was, until the plateau was reached, to a five-hundredth of the ramp
    degradation   no level of the last fifth of the ramp is 1 % below the levels before. The loss gains until the first level within 1 % of the lowest
    instability   the last five windows or more lie above the lowest one by 3 % of it and four times the noise: the loss does not return. Until then it holds
So a ramp has two answers: the learning rate from which on it gains no more, and the one from which on it is broken. A healthy run of
as many steps gains more than 1 % in its last fifth: that is what makes the second criterion one.
"""

import math
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[2] / "data"))
from shards import glob_argument  # noqa: E402
from shared import COLOURS, LABELS, NORMS, log, pyplot, read_csv, save, seeds, training, write_csv

# Table 1 of arXiv 2601.19895, 64 layers: 5000 steps to 5e-2, 4M tokens each, C = 1024.
PAPER = {"keel": 1.01e-2, "pre": 7.65e-3, "post": 3.0e-4, "deepnorm": 3.5e-4, "mixln": 8.6e-4, "hybridnorm": 4.9e-4}
TOP = 5e-2

SIZES = {  # more: [L, B] of further ramps, of KEEL and Pre-LN, one seed
    "tiny": dict(L=4, C=16, H=2, T=16, B=2, steps=100, seeds=1, norms=["keel", "post"], more=[[6, 2]]),
    "small": dict(L=64, C=64, H=2, T=64, B=4, steps=5000, seeds=1, norms=["keel", "pre", "post", "deepnorm"], more=[]),
    "paper": dict(L=64, C=64, H=2, T=64, B=4, steps=5000, seeds=3, norms=NORMS, more=[[64, 16], [128, 4]]),
    "gpu": dict(L=64, C=256, H=4, T=256, B=64, steps=5000, seeds=3, norms=NORMS, more=[[512, 64]]),
}
# What the rule was tried on, with another seed than the table's: (placement, learning rate, steps of warm-up and of the run, what it must find).
# A ramp to 3e-3 and a cosine from there are healthy where a gradient arrives; without one nothing but frequencies is learnt; a ramp to 0.4 breaks every model.
RECORDED = [*((norm, 3e-3, 5000, 5000, "none") for norm in ("keel", "pre", "deepnorm")), *((norm, 3e-3, 250, 5000, "none") for norm in ("keel", "pre")),
            *((norm, 3e-3, 250, 5000, "stagnation") for norm in ("post", "mixln", "hybridnorm")), *((norm, 4e-1, 2000, 2000, "broken") for norm in ("keel", "pre"))]
RECORDED_SEED = 1


def run_of(c, norm, L, B, seed):
    s = c.settings
    shape = SimpleNamespace(L=L, C=s.C, H=s.H, T=s.T, B=B)
    return training(c, f"max_lr/{norm}-L{L}-B{B}-{seed}", norm, shape, TOP, steps=s.steps, warmup=s.steps, seed=seed, validate=False, may_diverge=True)


def recorded_run(c, norm, lr, warmup, steps):
    return training(c, f"max_lr/recorded-{norm}-{lr:g}-{warmup}", norm, c.settings, lr, steps=steps, warmup=warmup, seed=RECORDED_SEED, validate=False, may_diverge=True)


def ramps(s):
    """(placement, L, B, seed) of each ramp."""
    return [*((norm, s.L, s.B, seed) for seed in seeds(s) for norm in s.norms),
            *((norm, L, B, seeds(s)[0]) for L, B in s.more for norm in s.norms if norm in ("keel", "pre"))]


def runs(c):
    if c.size == "paper":
        yield [recorded_run(c, *run) for *run, _ in RECORDED]
    yield [run_of(c, *ramp) for ramp in ramps(c.settings)]


class Ramp(NamedTuple):
    """What judge finds. Shares of the ramp; 1 where that never happens."""
    kind: str      # the criterion that is met first: stagnation, degradation, instability, or none
    gains: float   # until here the loss gains
    holds: float   # until here it returns to its lowest, as instability has it; a run that stagnates has nothing to return to
    lowest: float  # window


def judge(fine, unigram):
    """fine: the mean loss of each five-hundredth of a ramp, infinite where the run was over. unigram: U above."""
    mean = lambda values: sum(values) / len(values)
    windows = [mean(fine[i:i + 10]) for i in range(0, len(fine) - 9, 10)]
    levels = [mean(windows[i:i + 5]) for i in range(len(windows) - 4)]
    # A normal number lies within 0.6745 deviations in half of all cases. The median, so that spikes are no noise.
    noise = median(abs(a - b) for a, b in zip(fine, fine[1:]) if math.isfinite(a + b)) / (0.6745 * math.sqrt(2)) / math.sqrt(10)  # of a window's mean
    lowest = min(windows)
    last = max(i for i, m in enumerate(windows) if m <= 1.03 * lowest + 4 * noise) + 1
    holds = last / len(windows) if last <= len(windows) - 5 else 1.0
    if min(levels) >= 0.98 * unigram:
        plateau = median(windows[len(windows) // 2:])
        below = [i for i, m in enumerate(windows) if m < 0.97 * plateau - noise]
        reached = next(i for i, m in enumerate(fine) if m <= max(plateau + noise, min(fine)))
        dead = (below[-1] + 1) / len(windows) if below else (reached + 1) / len(fine)
        return Ramp("stagnation", dead, dead, lowest)
    gain = next(i for i, level in enumerate(levels) if level <= 1.01 * min(levels))
    gains = (gain + 2.5) / len(windows) if gain + 5 <= 0.8 * len(windows) else 1.0  # the middle of the level
    kind = "none" if gains == holds == 1 else "degradation" if gains <= holds else "instability"
    return Ramp(kind, gains, holds, lowest)


def unigram_of(data):
    """The entropy of the bytes of training text, in nats; infinite for data that are no text, whose runs then never stagnate."""
    files = glob_argument(data)
    if any(path.endswith(".bin") or not Path(path).is_file() for path in files):
        return math.inf
    text = b"".join(Path(path).read_bytes() for path in files)
    counts = Counter(text[:len(text) - len(text) // 10]).values()
    return math.log(sum(counts)) - sum(n * math.log(n) for n in counts) / sum(counts)


def finite(losses):
    """A step that was skipped because its loss is no number counts as the step before."""
    out = []
    for loss in losses:
        out.append(loss if math.isfinite(loss) else out[-1] if out else next((v for v in losses if math.isfinite(v)), 0.0))
    return out


def fine_means(c, run, steps):
    """Of the ramp, which is the run's last `steps`."""
    losses = finite(log(c, run)[1])[run.steps - steps:]
    n = max(1, steps // 500)
    return [sum(losses[i:i + n]) / n if i + n <= len(losses) else math.inf for i in range(0, steps - n + 1, n)]


def write_curves(path, curves):
    """A column a ramp, a row a five-hundredth of it; "inf" where the run was over."""
    write_csv(path, [{"of_ramp": i + 1, **{k: f"{v[i]:.3f}" if i < len(v) else "" for k, v in curves.items()}} for i in range(max(map(len, curves.values())))])


def collect(c):
    s = c.settings
    tables(c, "max_lr", [({"norm": norm, "L": L, "tokens": B * s.T, "seed": seed, "steps": s.steps}, TOP, run_of(c, norm, L, B, seed), {}) for norm, L, B, seed in ramps(s)])
    if c.size == "paper":
        collect_recorded(c)


def collect_recorded(c):
    tables(c, "max_lr_recorded", [({"norm": norm, "lr": f"{lr:g}", "warmup": warmup, "steps": steps, "seed": RECORDED_SEED}, lr, recorded_run(c, norm, lr, warmup, steps), {"expected": expected})
                                  for norm, lr, warmup, steps, expected in RECORDED])


def tables(c, name, found):
    """NAME.csv, an answer a ramp, and NAME_loss.csv. found: columns before the answer, top, run, columns after it."""
    rows, curves, unigram = [], {}, unigram_of(c.data)
    for row, top, run, more in found:
        curves[column(row)] = fine = fine_means(c, run, run.steps)
        rows.append({**row, **answer(fine, top, unigram), **more})
    write_csv(c.results / f"{name}.csv", rows)
    write_curves(c.results / f"{name}_loss.csv", curves)


def column(row):
    """The name of a ramp's column in the table of losses."""
    return "-".join(row[k] if k == "norm" else f"{k}{row[k]}" for k in ("norm", "L", "tokens", "lr", "warmup", "seed") if k in row)


def answer(fine, top, unigram):
    ramp = judge(fine, unigram)
    return {"unigram": f"{unigram:.3f}", "kind": ramp.kind, "gains_until": f"{top * ramp.gains:.3g}", "holds_until": f"{top * ramp.holds:.3g}", "lowest_loss": f"{ramp.lowest:.3f}"}


def curve(table, name):
    """A column of write_curves."""
    return [float(row[name]) for row in table if row[name]]


def of_table(rows):
    """placement: its rows, of the shape that the table is about."""
    mine = [r for r in rows if (r["L"], r["tokens"]) == (rows[0]["L"], rows[0]["tokens"])]
    return {norm: [r for r in mine if r["norm"] == norm] for norm in dict.fromkeys(r["norm"] for r in mine)}


def others(rows):
    """[(L, tokens), {placement: row}] of the further shapes."""
    more = [r for r in rows if (r["L"], r["tokens"]) != (rows[0]["L"], rows[0]["tokens"])]
    return [(shape, {r["norm"]: r for r in found}) for shape, found in groupby(more, lambda r: (int(r["L"]), int(r["tokens"])))]


def levels_of(fine):
    """(share of the ramp, mean loss) of each window, those of a run that was over left out."""
    return [((i + 10) / len(fine), m) for i in range(0, len(fine) - 9, 10) if math.isfinite(m := sum(fine[i:i + 10]) / 10)]


def draw(c):
    plt = pyplot()
    rows, losses = read_csv(c.results / "max_lr.csv"), read_csv(c.results / "max_lr_loss.csv")
    found = of_table(rows)
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), gridspec_kw={"width_ratios": [1.25, 1], "wspace": 0.2})
    for i, (norm, mine) in enumerate(found.items()):
        for dx, what, marker in ((-0.12, "gains_until", "o"), (0.12, "holds_until", "s")):
            values = [float(r[what]) for r in mine]
            mean = sum(values) / len(values)
            axes[0].errorbar(i + dx, mean, [[mean - min(values)], [max(values) - mean]], fmt=marker, ms=8, color=COLOURS[norm], ecolor="#5a626d", capsize=3, elinewidth=1.2, alpha=1 if marker == "o" else 0.55)
        if norm in PAPER:
            axes[0].plot(i, PAPER[norm], "o", ms=9, mfc="white", mec=COLOURS[norm], mew=2)
    axes[0].set_xticks(range(len(found)), [LABELS[n].replace(" ", "\n") for n in found], fontsize=9)
    axes[0].set(yscale="log", title="Gains until (●), holds until (■); ○ the paper", xlim=(-0.5, len(found) - 0.5))
    axes[0].grid(axis="x", visible=False)
    for norm, mine in found.items():
        for row in mine:
            points = levels_of(curve(losses, column(row)))
            axes[1].plot([TOP * share for share, _ in points], [m for _, m in points], color=COLOURS[norm], label=LABELS[norm] if row is mine[0] else None, lw=1.6 if row is mine[0] else 0.7)
    axes[1].set(xlabel="learning rate, rising", title="Loss on the ramp, every seed (nats)", ylim=(None, 4.2))
    axes[1].legend(fontsize=8, ncol=2)
    save(plt, figure, c.results / "max_lr.png")
