"""Prints the tables of all experiments that are there in Markdown, beside the paper's numbers where it has them: those of dev/doc/lesson.md.

    python3 dev/experiments/report.py dev/results/lesson
"""

import math
import sys
from pathlib import Path

import alpha
import depth
import highway
import hops
import max_lr
import redundancy
import road
from shared import LABELS, Failure, read_csv


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


def geometric(values):
    return math.exp(sum(map(math.log, values)) / len(values)) if min(values) > 0 else 0.0


def gradient_table(folder):
    rows = read_csv(folder / "gradient_seeds.csv")
    steps = sorted({int(r["step"]) for r in rows})
    top = max(int(r["sublayer"]) for r in read_csv(folder / "gradient.csv"))
    shown = [s for s in (1, 10, 20, 50, steps[-1]) if s in steps]
    out = []
    for norm in dict.fromkeys(r["norm"] for r in rows):
        def ratio(step):
            values = [float(r["dx_low"]) / float(r["dx_top"]) for r in of(rows, norm=norm, step=step)]
            return f"{geometric(values):.2g}{between(min(values), max(values), '.2g')}"
        gains = [float(r["shortcut"]) for r in of(rows, norm=norm, step=steps[0])]
        val = [float(r["val_loss"]) for r in of(rows, norm=norm, step=steps[-1])]
        out.append([LABELS[norm], *map(ratio, shown), f"{geometric(gains):.2g}{between(min(gains), max(gains), '.2g')}", f"{sum(val) / len(val):.3f}{between(min(val), max(val), '.3f')}"])
    return table([f"‖dL/dx‖ at sub-layer 2 over that at {top}{seeds_text(rows)}", *(f"step {s}" if s > 1 else "new model" for s in shown), "shortcut's gain, 2 to top, new model", "val loss"], out)


def rate(values):
    """A learning rate of several ramps; one that reached the top only bounds it."""
    text = [f"{v:.3g}" if v < max_lr.TOP else f"≥ {max_lr.TOP:g}" for v in (sum(values) / len(values), min(values), max(values))]
    return ("≥ " if max(values) >= max_lr.TOP > min(values) else "") + text[0] + (f" ({text[1]} to {text[2]})" if min(values) != max(values) else "")


def max_lr_table(folder):
    rows = read_csv(folder / "max_lr.csv")
    out = []
    for norm, mine in max_lr.of_table(rows).items():
        low = [float(r["lowest_loss"]) for r in mine]
        out.append([LABELS[norm], rate([float(r["gains_until"]) for r in mine]), rate([float(r["holds_until"]) for r in mine]), ", ".join(dict.fromkeys(r["kind"] for r in mine)),
                    f"{sum(low) / len(low):.2f}", f"{max_lr.PAPER[norm]:.3g}" if norm in max_lr.PAPER else ""])
    for (L, tokens), found in max_lr.others(rows):
        for norm, row in found.items():
            out.append([f"{LABELS[norm]}, L = {L}, {tokens} tokens", rate([float(row["gains_until"])]), rate([float(row["holds_until"])]), row["kind"], f"{float(row['lowest_loss']):.2f}", ""])
    return table([f"L = {rows[0]['L']}, {rows[0]['tokens']} tokens a step, 0 to {max_lr.TOP:g} in {rows[0]['steps']} steps{seeds_text(rows)}", "gains until", "holds until", "criterion", "lowest loss", "paper, L = 64"], out)


def max_lr_recorded_table(folder):
    out = []
    for r in read_csv(folder / "max_lr_recorded.csv"):
        end = round(float(r["holds_until"]) / float(r["lr"]) * int(r["steps"]))  # the rate is of a ramp, which not all of these are
        out.append([LABELS[r["norm"]], f"{r['lr']}, {r['warmup']}, {r['steps']}", r["expected"], r["kind"] + (f", broken from step {end} on" if end < int(r["steps"]) else ""), r["lowest_loss"]])
    return table(["what the rule was tried on", "learning rate, warm-up, steps", "must be", "is", "lowest loss"], out)


def order_table(folder):
    rows = read_csv(folder / "order.csv")
    out = []
    for change in dict.fromkeys(r["change"] for r in rows):
        for norm in dict.fromkeys(r["norm"] for r in rows):
            mine = of(rows, change=change, norm=norm)
            if mine:
                low = [float(r["lowest_loss"]) for r in mine]
                out.append([f"{LABELS[norm]}, {change}", *(rate([float(r[k]) for r in mine]) for k in ("gains_until", "holds_until")), ", ".join(dict.fromkeys(r["kind"] for r in mine)), f"{sum(low) / len(low):.2f}"])
    return table(["the same ramp" + seeds_text(rows), "gains until", "holds until", "criterion", "lowest loss"], out)


def alpha_table(folder):
    out, depths = [], []
    for task, rows in alpha.tables(folder).items():
        found = alpha.best(rows)
        depths = sorted({L for L, _ in found})
        at = {(L, name): found[L, a] for L, a in found for name in found[L, a][0].split(" = ")}
        for name in (name for name in alpha.ALPHAS if (depths[0], name) in at):
            cells = []
            for L in depths:
                _, lr, values = at[L, name]
                values, form, unit = (values, ".3f", "") if task == "text" else ([100 * (1 - v) for v in values], ".0f", " %")
                cells.append(f"{sum(values) / len(values):{form}}{unit}{between(min(values), max(values), form)} at {lr:g}")
            out.append([f"{task}, alpha = {name}", *cells])
    return table(["KEEL: loss on text, answers right over the run on lookups, at best LR", *(f"L = {L}" for L in depths)], out)


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
        found = redundancy.lost(rows, norm)
        n = len(found[0][1])

        def over_seeds(part, form=".2g"):
            values = [part(whole, lost) for whole, lost in found]
            return f"{sum(values) / len(values):{form}}{between(min(values), max(values), form)}"

        def quarter(a, b):
            return over_seeds(lambda whole, lost: sum(lost[a:b]) / (b - a)) if b > a else ""
        out.append([LABELS[norm], over_seeds(lambda whole, lost: whole, ".2f"), over_seeds(lambda whole, lost: lost[0]), over_seeds(lambda whole, lost: lost[1]),
                    *(quarter(a, b) for a, b in ((2, n // 4), (n // 4, n // 2), (n // 2, 3 * n // 4), (3 * n // 4, n))), over_seeds(lambda whole, lost: sum(v > 1e-3 * whole for v in lost), ".0f")])
    return table(["perplexity" + seeds_text(rows), "whole", "lost without sub-layer 0", "without 1", "mean of the rest of the first quarter", "second quarter", "third", "last", f"of {n} sub-layers worth 0.1 %"], out)


def road_table(folder):
    rows, out = read_csv(folder / "road.csv"), []
    names = {**{f: f"{road.NAMES[f]}, PyTorch" for f in road.FORMULAS}, "trainer-pre": "Pre-LN, trainer", "trainer-scaledpost": "attempt 1, trainer", "trainer-keel": "KEEL, trainer"}
    for form in dict.fromkeys(r["form"] for r in rows):
        mine = of(rows, form=form)
        train, val = ([float(r[k]) for r in mine] for k in ("train_loss", "val_loss"))
        out.append([names[form], mine[0]["formula"], *(f"{sum(v) / len(v):.4f}{between(min(v), max(v), '.4f')}" for v in (train, val)), max((r["twin_difference"] for r in mine), key=lambda d: float(d or 0))])
    return table(["", "x'" + seeds_text(rows), "train loss", "val loss", "largest relative difference from its twin, first tenth of the steps"], out)


def highway_table(folder):
    rows = read_csv(folder / "highway.csv")
    depths = sorted({int(r["L"]) for r in rows})

    def cell(way, L):
        mine = of(rows, rounded=way, L=L)
        return f"{100 * sum(float(r['error']) for r in mine) / len(mine):.2g} %, {sum(float(r['cosine']) for r in mine) / len(mine):.3f}"
    return table(["error, cosine of x_L - x_2", *(f"L = {L}" for L in depths)], [[highway.WAYS[way], *(cell(way, L) for L in depths)] for way in highway.WAYS])


def hops_table(folder):
    """Each placement at its best learning rate over depth, or at every one of a single depth."""
    rows = read_csv(folder / "hops.csv")
    rows, numbers = hops.best(rows) if len({r["L"] for r in rows}) > 1 else rows, sorted({r["hops"] for r in rows}, key=int)

    def cell(mine, norm, L, h):
        seeds = [100 * hops.accuracy(of(mine, seed=seed), norm, L, h) for seed in dict.fromkeys(r["seed"] for r in mine)]
        return f"{100 * hops.accuracy(mine, norm, L, h):.0f} %{between(min(seeds), max(seeds), '.0f')}"
    lines = sorted({(int(r["L"]), float(r["lr"]), r["norm"]) for r in rows}, key=lambda line: ([r["norm"] for r in rows].index(line[2]), line))
    out = [[f"{LABELS[n]} L = {L}", f"{lr:g}", *(cell([r for r in of(rows, norm=n, L=L) if float(r["lr"]) == lr], n, L, h) for h in (*numbers, "all"))] for L, lr, n in lines]
    return table([f"hops:{rows[0]['K']}, answers right at the end, by lookups needed" + seeds_text(rows), "LR", *numbers, "all"], out)


def lr_sweep_table(folder):
    """Of the models of 64 sub-layers, which have several seeds: training and validation loss, and the latter's range."""
    rows = of(read_csv(folder / "lr_sweep.csv"), L=64)
    lrs = sorted({r["lr"] for r in rows}, key=float)

    def cell(mine):
        train, val = ([float(r[which]) for r in mine] for which in ("train_loss", "val_loss"))
        return f"{sum(train) / len(train):.2f} / {sum(val) / len(val):.2f}{between(min(val), max(val), '.2f')}" if mine else ""
    return table(["train / val loss at peak LR" + seeds_text(rows), *lrs], [[LABELS[n], *(cell(of(rows, norm=n, lr=lr)) for lr in lrs)] for n in dict.fromkeys(r["norm"] for r in rows)])


TABLES = {"gradient": gradient_table, "max_lr": max_lr_table, "max_lr_recorded": max_lr_recorded_table, "order": order_table, "alpha": alpha_table, "depth": depth_table, "redundancy": redundancy_table, "road": road_table, "highway": highway_table, "hops": hops_table, "lr_sweep": lr_sweep_table}


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: report.py FOLDER, the --results of run.py")
    folder = Path(sys.argv[1])
    found = [name for name in TABLES if any((folder / f"{name}{task}.csv").exists() for task in ("", "_text", "_hops"))]
    if not found:
        raise Failure(f"{folder}: expected tables such as gradient.csv, found none; give the --results of run.py")
    for name in found:
        print(f"{name}\n\n{markdown(*TABLES[name](folder))}\n")


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"report.py: {failure}")
