"""Prints the tables of all experiments that are there in Markdown, beside the paper's numbers where it has them: those of dev/doc/lesson.md.

    python3 dev/experiments/report.py dev/results/lesson
"""

import sys
from pathlib import Path

import depth
import highway
import hops
import max_lr
import road
from shared import LABELS, Failure, read_csv, spread


def table(columns, rows):
    """What each experiment's function returns; Markdown is made of it here, HTML in lesson.py."""
    return columns, rows


def markdown(columns, rows):
    return "\n".join(["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"] + ["| " + " | ".join(str(v) for v in row) + " |" for row in rows])


def of(rows, **wanted):
    return [r for r in rows if all(r[k] == str(v) for k, v in wanted.items())]


def between(low, high, form):
    """' (low to high)', of several seeds; nothing where they are one."""
    low, high = format(low, form), format(high, form)
    return f" ({low} to {high})" if low != high else ""


def seeds_text(rows):
    n = len({r["seed"] for r in rows})
    return f" (mean and range of {n} seeds)" if n > 1 else ""


def gradient_table(folder):
    rows, losses = read_csv(folder / "gradient.csv"), read_csv(folder / "gradient_loss.csv")
    steps = sorted({int(r["step"]) for r in rows})
    top = max(int(r["sublayer"]) for r in rows)
    shown = [s for s in (1, 10, 20, 50, steps[-1]) if s in steps]
    out = []
    for norm in dict.fromkeys(r["norm"] for r in rows):
        at = {(int(r["step"]), int(r["sublayer"])): r for r in of(rows, norm=norm)}
        val = next(float(r["val_loss"]) for r in losses if r["norm"] == norm and r["val_loss"])
        out.append([LABELS[norm], *(f"{float(at[s, 2]['dx']):.1e} / {float(at[s, top]['dx']):.1e}" for s in shown), f"{float(at[1, 2]['shortcut']):.2g}", f"{val:.3f}"])
    return table(["‖dL/dx‖ at sub-layer 2 / " + str(top), *(f"step {s}" if s > 1 else "new model" for s in shown), "shortcut's gain, 2 to top, new model", "val loss"], out)


def max_lr_table(folder):
    rows = read_csv(folder / "max_lr.csv")
    out = []
    for norm, (values, bound) in max_lr.outcome(rows).items():
        last = [r for r in of(rows, norm=norm) if r["top"] == of(rows, norm=norm)[-1]["top"]]
        paper = max_lr.PAPER.get(norm)
        out.append([LABELS[norm], ("at least " if bound else "") + spread(values), ", ".join(r["last_healthy_step"] for r in last) + f" of {last[0]['steps']} to {last[0]['top']}",
                    ", ".join(dict.fromkeys(r["divergence"] for r in last)), f"{paper[0]:.3g} (step {round(paper[0] / max_lr.PAPER_TOP * max_lr.PAPER_STEPS)} of {max_lr.PAPER_STEPS} to {max_lr.PAPER_TOP})" if paper else ""])
    return table([f"L = {rows[0]['L']}", "largest LR, mean (range over seeds)", "last healthy step of each seed", "how it ended", "paper, L = 64"], out)


def depth_table(folder):
    rows = read_csv(folder / "depth.csv")
    found, (deep, equal) = depth.best(rows), depth.questions(rows)
    norms = list(dict.fromkeys(r["norm"] for r in rows))
    out = []
    for L, C in dict.fromkeys([*deep, *equal]):
        out.append([f"{L} x {C}", f"{6 * L * C * C / 1e6:.2f} M", *(f"{found[n, L, C][1]:.3f}{between(*found[n, L, C][2:], '.3f')} at {found[n, L, C][0]:g}" for n in norms)])
    return table(["L x C", "parameters in sub-layers", *(LABELS[n] + ": val loss at best LR" + seeds_text(rows) for n in norms)], out)


def redundancy_table(folder):
    rows, out = read_csv(folder / "redundancy.csv"), []
    for norm in dict.fromkeys(r["norm"] for r in rows):
        mine = of(rows, norm=norm)
        lost = [float(r["perplexity_lost"]) for r in mine if int(r["sublayer"]) >= 0]
        n = len(lost)
        quarters = [f"{sum(part) / len(part):.2g}" if part else "" for part in (lost[2:n // 4], lost[n // 4:n // 2], lost[n // 2:3 * n // 4], lost[3 * n // 4:])]
        whole = next(float(r["perplexity"]) for r in mine if int(r["sublayer"]) < 0)
        out.append([LABELS[norm], f"{whole:.2f}", f"{lost[0]:.2g}, {lost[1]:.2g}", *quarters, sum(v > 1e-3 * whole for v in lost)])
    return table(["perplexity", "whole", "lost without sub-layer 0, 1", "mean of the rest of the first quarter", "second quarter", "third", "last", f"of {n} sub-layers worth 0.1 %"], out)


def road_table(folder):
    rows = read_csv(folder / "road.csv")
    names = {**{f: f"{road.NAMES[f]}, PyTorch" for f in road.FORMULAS}, "trainer-pre": "Pre-LN, trainer", "trainer-scaledpost": "attempt 1, trainer", "trainer-keel": "KEEL, trainer"}
    return table(["", "x'", "train loss", "val loss", "largest relative difference from its twin, first tenth of the steps"], [[names[r["form"]], r["formula"], r["train_loss"], r["val_loss"], r["twin_difference"]] for r in rows])


def highway_table(folder):
    rows = read_csv(folder / "highway.csv")
    depths = sorted({int(r["L"]) for r in rows})

    def cell(way, L):
        mine = of(rows, rounded=way, L=L)
        return f"{100 * sum(float(r['error']) for r in mine) / len(mine):.2g} %, {sum(float(r['cosine']) for r in mine) / len(mine):.3f}"
    return table(["error, cosine of x_L - x_2", *(f"L = {L}" for L in depths)], [[highway.WAYS[way], *(cell(way, L) for L in depths)] for way in highway.WAYS])


def hops_table(folder):
    rows = hops.best(read_csv(folder / "hops.csv"))
    numbers = sorted({r["hops"] for r in rows}, key=int)

    def cell(norm, L, h):
        seeds = [100 * hops.accuracy(of(rows, seed=seed), norm, L, h) for seed in dict.fromkeys(r["seed"] for r in rows)]
        return f"{100 * hops.accuracy(rows, norm, L, h):.0f} %{between(min(seeds), max(seeds), '.0f')}"
    out = [[f"{LABELS[n]} L = {L}", next(r["lr"] for r in of(rows, norm=n, L=L)), *(cell(n, L, h) for h in (*numbers, "all"))]
           for n in dict.fromkeys(r["norm"] for r in rows) for L in sorted({int(r["L"]) for r in rows})]
    return table([f"hops:{rows[0]['K']}, answers right at the end, by lookups needed" + seeds_text(rows), "LR", *numbers, "all"], out)


TABLES = {"gradient": gradient_table, "max_lr": max_lr_table, "depth": depth_table, "redundancy": redundancy_table, "road": road_table, "highway": highway_table, "hops": hops_table}


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: report.py FOLDER, the --results of run.py")
    folder = Path(sys.argv[1])
    found = [name for name in TABLES if (folder / f"{name}.csv").exists()]
    if not found:
        raise Failure(f"{folder}: expected tables such as gradient.csv, found none; give the --results of run.py")
    for name in found:
        print(f"{name}\n\n{markdown(*TABLES[name](folder))}\n")


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"report.py: {failure}")
