"""Writes the lesson: one HTML page with text, formulas beside the lines of code that do them, and interactive figures. It needs no network.

    python3 dev/experiments/lesson.py --results build/experiments/small --out build/lesson.html

The code is taken from the sources as they are, by anchors; an anchor that is gone, or there twice, ends the build with its name.
"""

import argparse
import html
import json
import math
import re
import shlex
import sys
from pathlib import Path

import depth
import highway
import hops
import max_lr
import redundancy
import report
import road
from markup import code_html, extract, fill, mathml, write_page
from run import LESSON
from shared import COLOURS, LABELS, NORMS, Failure, read_csv, smooth

HERE = Path(__file__).resolve().parent / "lesson"


# ---------------------------------------------------------------------------------------------------------
# Code, from the sources

FORWARD = "void sublayer_forward(real* x"
CPU, COMMON = "train_keel_cpu.cpp", "keel_common.h"
# name: formula, words, file, function's anchor, line's anchor, lines
CODE = {
    "norm_in": (r"u_l = \Norm(x_l)", "what the branch reads, where the placement has an inner norm", CPU, FORWARD, "if (norm.norm_in)", 1),
    "sum": (r"z_l = α_l x_l + F_l(u_l)", "the sum of shortcut and branch", CPU, "void highway_forward(", "zi[c] = alpha", 1),
    "norm_out": (r"x_{l+1} = \Norm(z_l)", "where the placement has an outer norm; else the sum itself", CPU, "void highway_forward(", "if (gamma)", 2),
    "norm_backward": (r"\d x = r (g * \d y - x̂ \mean(g * \d y * x̂))", "through a norm: r is 1/rms; the second term takes away what would only change the length", CPU, "inline void rmsnorm_row_backward(", "for (int c = 0; c < C; c++) {", 5),
    "shortcut": (r"\d x_l = α_l \d z_l + \d u_l", "down the shortcut, and what comes back from the branch", CPU, "void shortcut_backward(", "dx[i] = alpha", 1),
    "alpha": (r"α_l = L", "KEEL’s row in the table of placements", COMMON, "inline const PlacementRow placements", '{.name = "keel"', 5),
    "inner": (r"x_{l+1} = \Norm(α x_l + F_l(\Norm(x_l)))", "the whole backward pass of a KEEL sub-layer, top to bottom", CPU, "// dx_l in dx, in place of dx_{l+1}:", "dz_l = norm_out", 3),
    "fp32": (r"z_l, u_l", "the GPU trainer: branch_t is BF16; what lies on the highway is float", "train_keel.cu", "struct HighwayPoint {", "struct HighwayPoint {", 7),
}


def pair(name):
    formula, words, file, function, first, lines = CODE[name]
    number, text = extract(file, function, first, lines)
    return (f'<div class="pair"><div class="formula">{mathml(formula)}<small>{html.escape(words)}</small></div>'
            f'<div class="source"><small>{file}, line {number}</small><pre><code>{code_html(text)}</code></pre></div></div>')


# ---------------------------------------------------------------------------------------------------------
# Figures: a title, a place to draw and a caption. What is drawn stands in lesson/figures.js.

FIGURES = {
    # name: title, controls (placements, one placement, slider), caption
    "shortcut": ("The shortcut’s gain, from each sub-layer up to the last", "many", "slider", "Product of α γ / rms(z) over the sub-layers above. A placement without an outer norm has 1 there, and Mix-LN has one in its first quarter only."),
    "flow": ("Norm of the gradient at every sub-layer", "many", "slider", "‖dL/dx‖ over all tokens of the step, before clipping. Sub-layer 0 is next to the embedding, so the gradient flows from right to left."),
    "heat": ("The gradient over depth and training", "one", None, "log₁₀ ‖dL/dx‖; steps are not evenly spaced."),
    "loss": ("Training loss", "many", None, "Running mean over a twentieth of the run."),
    "alpha": ("What α keeps of the gradient", None, "slider", "From the formula, with rms F = rms x = 1."),
    "road": ("The four steps, in PyTorch, and their twins in the trainer", None, None, "Running mean. Dotted: the C++ trainer, from the same initial bits on the same batches."),
    "highway": ("What rounding does to all that the sub-layers add", None, None, "Relative error against FP32; mean over seeds."),
    "maxlr": ("The learning rate from which on a model gains no more, and breaks", None, None, "Disc: until here the loss gains; square: until here it returns to its lowest, at the top where that never ends; mean, lowest and highest of the seeds. Open: the paper’s Table 1, 64 layers of 1024 channels."),
    "ramp": ("The loss while the learning rate rises", None, None, "Means over a fiftieth of the ramp, one seed."),
    "depth": ("Deeper, at one width", None, None, "Validation loss at each depth’s best learning rate."),
    "wide": ("Deeper or wider, at one size", None, None, "As many parameters in the sub-layers of each shape."),
    "redundancy": ("Perplexity lost by removing one sub-layer", "one", None, "Full colour: attention; pale: feed-forward. One scale for all, logarithmic away from 0."),
    "hops": ("Answers right at the end", "one", None, "By the lookups that a query takes and the sub-layers that the model has."),
    "learning": ("Answers right over training, in the deepest model", None, None, "Grey: the best guess without a lookup."),
}

LEGENDS = ("road", "highway", "ramp", "depth", "wide", "learning")


def figure(name):
    title, chips, slider, caption = FIGURES[name]
    out = [f'<div class="figure" id="figure-{name}"><p class="title">{title}</p>']
    if slider:
        out.append(f'<div class="controls slider" id="slider-{name}"></div>')
    if chips:
        out.append(f'<div class="controls" id="controls-{name}"{" data-many" if chips == "many" else ""}></div>')
    if name in LEGENDS:
        out.append(f'<div class="legend" id="legend-{name}"></div>')
    out.append(f'<div class="plot" id="plot-{name}" role="img" aria-label="{html.escape(title)}"></div><p class="caption">{caption}</p></div>')
    return "".join(out)


# ---------------------------------------------------------------------------------------------------------
# Numbers, tables and sentences, from the results

def superscript(x):
    """1.2e-10 as HTML"""
    if not math.isfinite(x):
        return "no number"
    if x == 0 or 0.01 <= abs(x) < 10000:
        return f"{x:.3g}"
    mantissa, exponent = f"{x:.1e}".split("e")
    return f"{mantissa}·10<sup>{int(exponent)}</sup>".replace("-", "−")


def dot(norm):
    return f'<span class="dot" style="background:{COLOURS[norm]}"></span>{LABELS[norm]}'


def html_table(columns, rows, numbers=()):
    def cells(tag, values):
        return "".join(f"<{tag}{' class=number' if i in numbers else ''}>{v}</{tag}>" for i, v in enumerate(values))
    return f"<table><thead><tr>{cells('th', columns)}</tr></thead><tbody>" + "".join(f"<tr>{cells('td', row)}</tr>" for row in rows) + "</tbody></table>"


def command_flags(command):
    """{flag: value} of a trainer's command line"""
    words = shlex.split(command)
    return {words[i]: words[i + 1] for i in range(1, len(words) - 1) if words[i].startswith("-")}


class Lesson:
    def __init__(self, results):
        self.results = results
        self.t = {name: read_csv(results / f"{name}.csv") for name in (*LESSON, "gradient_loss", "gradient_seeds", "max_lr_loss", "road_loss")}
        self.runs = {name: read_csv(results / f"{name}_runs.csv") for name in LESSON}
        for name, needed in (("gradient", {"keel", "post"}), ("depth", {"keel", "pre"})):
            found = {r["norm"] for r in self.t[name]}
            if not needed <= found:
                raise Failure(f"{results / name}.csv: expected the placements {', '.join(sorted(needed))}, found {', '.join(sorted(found))}; run {name} with them")
        self.values, self.tables = {}, {}
        self.data = {"colours": COLOURS, "labels": LABELS}
        for part in (self.gradient, self.placements, self.road, self.highway, self.max_lr, self.depth, self.redundancy, self.hops, self.provenance):
            part()

    @staticmethod
    def mean(values):
        values = list(map(float, values))
        return sum(values) / len(values)

    @staticmethod
    def over_seeds(rows):
        n = len({r["seed"] for r in rows})
        return f", mean of {n} seeds" if n > 1 else ", one seed"

    def report(self, name, numbers=()):
        """A table of report.py as HTML; numbers: the columns that are."""
        columns, rows = report.TABLES[name](self.results)
        names = {LABELS[n]: dot(n) for n in LABELS}
        return html_table(columns, [[names.get(v, html.escape(str(v))) for v in row] for row in rows], numbers)

    def gradient(self):
        rows = self.t["gradient"]
        norms = list(dict.fromkeys(r["norm"] for r in rows))
        steps = sorted({int(r["step"]) for r in rows})
        L = 1 + max(int(r["sublayer"]) for r in rows)
        cells = {(r["norm"], int(r["step"]), int(r["sublayer"])): r for r in rows}

        def column(name):
            return {norm: [[float(cells[norm, s, l][name]) for l in range(L)] for s in steps] for norm in norms}
        dx = column("dx")
        losses = {norm: [float(r["loss"]) for r in self.t["gradient_loss"] if r["norm"] == norm] for norm in norms}
        ends = [r for r in self.t["gradient_seeds"] if r["val_loss"]]
        val = {norm: self.mean(r["val_loss"] for r in ends if r["norm"] == norm) for norm in norms}
        total = len(losses[norms[0]])
        self.data.update(norms=norms, gradient={"L": L, "steps": steps, "dx": dx, "shortcut": column("shortcut")},
                         loss={norm: [round(v, 4) for v in smooth(losses[norm], max(1, total // 20))] for norm in norms})
        flags = command_flags(self.runs["gradient"][0]["command"])
        self.values["settings"] = (f"{L} sub-layers, {flags['-C']} channels, bytes of text, {int(flags['-t']) * int(flags['-b'])} tokens a step, "
                                   f"{total} steps, one learning rate ({flags['-l']}) for all")
        self.values["two_to_minus"] = f"2<sup>−32</sup> = {superscript(2.0 ** -32)}"
        middle = min(range(len(steps)), key=lambda i: abs(steps[i] - 50))
        low = 2 if L > 2 else 0

        def at(norm, i):
            return superscript(dx[norm][i][low])
        gain = self.data["gradient"]["shortcut"]
        rms_f, rms_x = column("rms_f")["post"], column("rms_x")["post"]

        def grown(i):
            return sorted(f / x for f, x in zip(rms_f[i], rms_x[i]))[L // 2]

        def factor(i):
            """By which Post-LN's gradient changes at each sub-layer, from the last down to the lowest that has one"""
            first = next((l for l in range(low, L - 1) if dx["post"][i][l] > 0), L - 2)
            return (dx["post"][i][first] / dx["post"][i][L - 1]) ** (1 / (L - 1 - first))
        smaller = " (F is smaller than x there, and each factor nearer to 1)" if grown(0) < 1 else ""
        self.values["shortcut_words"] = (f"From sub-layer {low} to the top Post-LN’s is {superscript(gain['post'][0][low])} in the new model{smaller} and "
                                         f"{superscript(gain['post'][middle][low])} at step {steps[middle]}; KEEL’s is {superscript(gain['keel'][0][low])} and {superscript(gain['keel'][middle][low])}, with the norm in place. "
                                         "Pre-LN has no norm on its shortcut: its gain is 1, and what it pays is a stream that grows with depth, beside which late sub-layers weigh less.")
        ratios = [norm for norm in norms if dx[norm][middle][low] < 1e-3 * dx[norm][middle][L - 1]]
        dead = ", ".join(LABELS[n] for n in ratios) or "no placement"
        self.values["flow_words"] = (
            f"In the new model sub-layer {low} gets {at('post', 0)} in Post-LN and {at('keel', 0)} in KEEL. By step {steps[middle]} it is {at('post', middle)} against {at('keel', middle)}. "
            + (f"In between Post-LN’s F has grown from {grown(0):.2f} of x’s size to {grown(middle):.2f} (median over sub-layers), so that each norm divides by more, and what the branches carry back no longer makes up for it. "
               if grown(middle) > grown(0) and factor(middle) < factor(0) else "")
            + f"Over {L - 1 - low} sub-layers its gradient changes by a factor of {factor(0):.2f} at each in the new model, and of {factor(middle):.2f} at step {steps[middle]}. "
            f"At that step the gradient at sub-layer {low} is less than a thousandth of that at the top in: {dead}.")
        stuck = [LABELS[n] for n in norms if val[n] > min(val.values()) + 0.5]
        best = min(val, key=val.get)
        order = ", ".join(f"{LABELS[n]} {val[n]:.2f}" for n in sorted(val, key=val.get))
        self.values["loss_words"] = (f"Validation loss after {total} steps{self.over_seeds(ends)}: {order}. " + (f"More than half a nat behind: {', '.join(stuck)}. " if stuck else "")
                                     + f"The best at this one learning rate is {LABELS[best]}; what KEEL gains by bearing a higher one comes below.")

    def placements(self):
        from keel_file import Config, sub_layer
        rows = []
        for norm in NORMS:
            cfg = Config(64, 256, 64, 2, 64, norm)
            layers = [sub_layer(cfg, l) for l in range(64)]

            def describe(part):
                out, start = [], 0
                values = [part(s) for s in layers]
                if values[2:] == values[2:4] * 31 and values[2] != values[3]:
                    return f"{values[2]}, {values[3]} in turn"
                for l in range(1, 65):
                    if l == 64 or values[l] != values[start]:
                        out.append((start, l - 1, values[start]))
                        start = l
                return "; ".join(v if (a, b) == (0, 63) else f"{v} ({a})" if a == b else f"{v} ({a} to {b})" for a, b, v in out)
            rows.append([dot(norm), describe(lambda s: f"{s.alpha:.3g}"), describe(lambda s: "yes" if s.norm_in else "no"), describe(lambda s: "yes" if s.norm_out else "no")])
        self.tables["placements"] = html_table(["placement, L = 64", "α", "norm before F", "norm after the sum"], rows)

    def road(self):
        rows, table = self.t["road_loss"], self.t["road"]
        curves, values = [], []
        for form in dict.fromkeys(r["form"] for r in rows):
            loss = [float(r["loss"]) for r in rows if r["form"] == form]
            loss = [round(v, 4) for v in smooth(loss, max(1, len(loss) // 10))]
            values.append(loss)
            if form in road.FORMULAS:
                curves.append({"name": road.NAMES[form], "loss": loss, "colour": COLOURS[form], "dash": "solid"})
            else:
                norm = form.removeprefix("trainer-")
                curves.append({"name": LABELS[norm] + " (trainer)", "loss": loss, "colour": COLOURS[norm] if norm == "pre" else "#8a9099", "dash": "solid" if norm == "pre" else "dot"})
        low = min(min(v) for v in values)
        self.data["road"], self.data["road_range"] = curves, [round(low - 0.1, 2), round(low + 1.9, 2)]
        by = {r["form"]: {what: f"{self.mean(t[what] for t in table if t['form'] == r['form']):.4f}" for what in ("train_loss", "val_loss")} for r in table}
        maths = {"attempt1": r"\Norm(αx + F(x))", "attempt2": r"\Norm(αx + F(βx))", "attempt3": r"\Norm(αx + F(β\Norm(x)))", "final": r"\Norm(αx + F(\Norm(x)))"}
        words = {"attempt1": "the outer norm alone", "attempt2": "a learnable scale β of what the branch reads", "attempt3": "an inner norm, scaled", "final": "β is in the inner norm’s gain"}
        out = [[road.NAMES[f], mathml(maths[f]), words[f], by[f]["train_loss"], by[f]["val_loss"]] for f in road.FORMULAS]
        out.append(["Pre-LN", mathml(r"x + F(\Norm(x))"), "for comparison, by the trainer", by["trainer-pre"]["train_loss"], by["trainer-pre"]["val_loss"]])
        self.tables["road"] = html_table(["", "x′", "", "train loss", "validation"], out, (3, 4))
        val = {f: float(by[f]["val_loss"]) for f in by}
        twins = ", ".join(f"{road.NAMES[f]} to {superscript(max(float(t['twin_difference']) for t in table if t['form'] == f))}" for f in road.TWINS)
        order = " &lt; ".join(f"{name} {v:.3f}" for v, name in sorted([(val[f], road.NAMES[f]) for f in road.FORMULAS] + [(val["trainer-pre"], "Pre-LN")]))
        flags = command_flags(self.runs["road"][0]["command"])
        self.values["road_words"] = (f"{flags['-L']} sub-layers, {flags['-x']} steps, learning rate {flags['-l']}{self.over_seeds(table)}. Validation losses: {order}. Over the first tenth of the steps the C++ trainer’s losses agree with "
                                     f"PyTorch’s in {twins} (relative).")

    def highway(self):
        rows = self.t["highway"]
        depths = sorted({int(r["L"]) for r in rows})

        def mean(way, L, column):
            values = [float(r[column]) for r in rows if r["rounded"] == way and int(r["L"]) == L]
            return sum(values) / len(values)
        self.data["highway"] = [{"name": highway.WAYS[way], "colour": colour, "L": depths, "error": [mean(way, L, "error") for L in depths]} for way, colour in (("highway", "post"), ("branch", "keel"))]
        L = depths[-1]
        self.values["highway_words"] = (f"At {L} sub-layers a BF16 highway is off by {100 * mean('highway', L, 'error'):.0f} % (cosine {mean('highway', L, 'cosine'):.2f}); BF16 branches on an FP32 highway by "
                                        f"{100 * mean('branch', L, 'error'):.2g} %.")

    def max_lr(self):
        rows, losses = self.t["max_lr"], self.t["max_lr_loss"]
        found = max_lr.of_table(rows)

        def over(mine, what):
            values = [float(r[what]) for r in mine]
            return {"mean": sum(values) / len(values), "lowest": min(values), "highest": max(values)}
        self.data["maxlr"] = [{"norm": n, "gains": over(mine, "gains_until"), "holds": over(mine, "holds_until"), "paper": max_lr.PAPER.get(n)} for n, mine in found.items()]
        ramps = {n: max_lr.levels_of(max_lr.curve(losses, max_lr.column(mine[0]))) for n, mine in found.items()}
        self.data["ramp"] = [{"norm": n, "lr": [round(max_lr.TOP * share, 6) for share, _ in points], "loss": [round(m, 4) for _, m in points]} for n, points in ramps.items()]
        low = min(min(run["loss"]) for run in self.data["ramp"])
        self.data["ramp_range"] = [round(low - 0.1, 2), round(low + 1.8, 2)]
        seeds = len({r["seed"] for r in rows})
        self.values["maxlr_settings"] = f"from 0 to {max_lr.TOP:g} in {rows[0]['steps']} steps, L = {rows[0]['L']}, {rows[0]['tokens']} tokens a step, {seeds} seed{'s' * (seeds > 1)}"
        self.tables["maxlr"] = self.report("max_lr", (1, 2, 4, 5))
        words = []
        dead = [LABELS[n] for n, mine in found.items() if all(r["kind"] == "stagnation" for r in mine)]
        if dead:
            words.append(f"{', '.join(dead)}: with every seed the loss stops at what the frequencies of the bytes give, and never leaves it.")
        if {"keel", "pre"} <= found.keys():
            for what, verb in (("gains_until", "goes on gaining"), ("holds_until", "holds")):
                keel, pre = (over(found[n], what) for n in ("keel", "pre"))
                if min(keel["mean"], pre["mean"]) >= max_lr.TOP:
                    words.append("Neither KEEL nor Pre-LN breaks before the end of the ramp.")
                    continue
                apart = keel["lowest"] > pre["highest"] or pre["lowest"] > keel["highest"]
                verdict = "as in the paper" if keel["mean"] > pre["mean"] else "unlike the paper" if keel["mean"] < pre["mean"] else "the same"
                words.append(f"KEEL {verb} until {keel['mean']:.3g}, Pre-LN until {pre['mean']:.3g}: {verdict}" + (", and apart by more than the seeds are." if apart and seeds > 1 else "." if seeds == 1 else ", but no further apart than the seeds are."))
        for (L, tokens), shape in max_lr.others(rows):
            def until(value):
                return f"until {float(value):.3g}" if float(value) < max_lr.TOP else "to the end"
            ends = "; ".join(f"{LABELS[n]} gains {until(row['gains_until'])} and holds {until(row['holds_until'])}" for n, row in shape.items())
            words.append(f"With L = {L} and {tokens} tokens a step, one seed: {ends}.")
        if seeds == 1:
            words.append("One seed says little: <code>run.py max_lr --paper</code> takes three of all placements, and dev/doc/lesson.md has what came out.")
        self.values["maxlr_words"] = " ".join(words)

    def depth(self):
        rows = self.t["depth"]
        found, (deep, equal) = depth.best(rows), depth.questions(rows)
        norms = list(dict.fromkeys(r["norm"] for r in rows))

        def curve(norm, shapes, name):
            return {"norm": norm, "x": [name(a) for a in shapes], "loss": [found[norm, *a][1] for a in shapes], "lr": [f"{found[norm, *a][0]:g}" for a in shapes]}
        self.data["depth"] = [curve(n, deep, lambda a: str(a[0])) for n in norms]
        self.data["wide"] = [curve(n, equal, lambda a: f"{a[0]} × {a[1]}") for n in norms]
        seeds = len({r["seed"] for r in rows})
        sweeps = "; ".join(f"{LABELS[n]} {', '.join(f'{lr:g}' for lr in sorted({float(r['lr']) for r in rows if r['norm'] == n}))}" for n in norms)
        tokens = f"{int(rows[0]['tokens']):,}".replace(",", " ")
        self.values["depth_lrs"] = f"a sweep of learning rates ({sweeps}; {tokens} tokens, {seeds} seed{'s' * (seeds > 1)})"
        self.tables["depth"] = self.report("depth")
        words = []
        if len(equal) > 1:
            words.append("Of the shapes of one size, " + " and ".join(f"{LABELS[n]} does best as {a[0]} × {a[1]}" for n in norms for a in [min(equal, key=lambda s: found[n, *s][1])]) + ".")
        for top in deep[-1:]:
            difference = found["pre", *top][1] - found["keel", *top][1]
            if math.isfinite(difference) and difference:
                apart = found["keel", *top][3] < found["pre", *top][2] or found["pre", *top][3] < found["keel", *top][2]
                words.append(f"At L = {top[0]} KEEL is {abs(difference):.3f} {'below' if difference > 0 else 'above'} Pre-LN" + ("." if seeds == 1 else ", with every seed." if apart else ", no more than the seeds are apart."))
        if len(deep) > 1:
            bests = {n: min(deep, key=lambda s: found[n, *s][1])[0] for n in norms}
            words.append("The deepest is best in " + " and ".join(LABELS[n] for n in norms if bests[n] == deep[-1][0]) + "." if deep[-1][0] in bests.values() else
                         "The deepest is best in neither: " + ", ".join(f"{LABELS[n]} does best at L = {bests[n]}" for n in norms) + ". These runs are short, and a deeper model has more to learn.")
        self.values["depth_words"] = " ".join(words)

    def redundancy(self):
        rows = self.t["redundancy"]
        norms = list(dict.fromkeys(r["norm"] for r in rows))
        lost = {n: redundancy.mean_lost(rows, n)[1] for n in norms}
        flat = [v for values in lost.values() for v in values]
        self.data["redundancy"] = {"norms": norms, "lost": {n: [float(f"{v:.4g}") for v in lost[n]] for n in norms}, "range": [1.3 * min(-0.005, *flat), 1.3 * max(0.01, *flat)]}
        self.tables["redundancy"] = self.report("redundancy")
        live = [l for l, v in enumerate(lost["post"]) if abs(v) > 1e-2] if "post" in lost else []
        self.values["redundancy_words"] = ((f"In Post-LN no sub-layer below {live[0]} changes the perplexity by a hundredth: taken out one by one, they are not missed. " if live and live[0] > 0 else "")
                                           + "In the paper the first layers are critical in every model, and KEEL’s shallow ones are worth more than Pre-LN’s.")
        n = len(lost[norms[0]])
        if {"keel", "pre"} <= lost.keys() and n >= 16:
            keel, pre = (sum(lost[norm][2:n // 4]) / (n // 4 - 2) for norm in ("keel", "pre"))
            self.values["redundancy_words"] += f" Here a sub-layer of the first quarter, 0 and 1 aside, is worth {keel:.2g} in KEEL and {pre:.2g} in Pre-LN: {'as' if keel > pre else 'not as'} in the paper."

    def hops(self):
        rows = hops.best(self.t["hops"])
        K, norms, depths = int(rows[0]["K"]), list(dict.fromkeys(r["norm"] for r in rows)), sorted({int(r["L"]) for r in rows})
        numbers = [str(k) for k in range(1, K + 1)]
        chance, validated = float(rows[0]["chance"]), sorted({int(r["step"]) for r in rows})
        self.data["hops"] = {"norms": norms, "L": depths, "lookups": numbers, "chance": chance, "steps": validated,
                             "end": {n: [[round(hops.accuracy(rows, n, L, k), 4) for k in numbers] for L in depths] for n in norms},
                             "training": {n: [[round(hops.accuracy(rows, n, depths[-1], k, step), 4) for step in validated] for k in numbers] for n in norms}}
        self.values["hops_task"] = (f"A program such as <code>bfb;kak;fkf;…;2bk;</code> says that b is f, k is a and f is k, and asks what two lookups from b lead to: f, then k. Every program is drawn anew, "
                                    f"and its first query, whose answer is measured, takes as many lookups as it says, by no shorter way. What a sub-layer looks up, only those above it can look up again. Here queries take 1 to {K} lookups (<code>--train hops:{K}</code>).")
        steps = max(int(r["step"]) for r in rows)

        def learnt(n, L):
            """The most lookups such that all up to it are answered right nine times in ten"""
            return next((k for k in range(K) if hops.accuracy(rows, n, L, numbers[k]) < 0.9), K)
        ends = "; ".join(f"{LABELS[n]} " + ", ".join(f"{learnt(n, L)} at L = {L}" for L in depths) for n in norms)
        alpha = next((flags["-a"] for run in self.runs["hops"] if "-a" in (flags := command_flags(run["command"]))), None)
        self.tables["hops"] = self.report("hops", range(1, K + 3))
        self.values["hops_words"] = (f"After {steps} steps nine in ten answers are right up to so many lookups: {ends}. A guess is right in {100 * chance:.0f} %" + (f", and one that knows both neighbours not to be the answer in {100 / (2 * K - 2):.0f} %." if K > 1 else ".")
                                     + (f" KEEL has α = {alpha} here: α = L is for deep models, and in small ones the paper tunes it." if alpha else ""))

    def provenance(self):
        seconds = sum(float(r["cpu_seconds"]) for name in self.runs for r in self.runs[name] if not (name == "redundancy" and r["run"].startswith("gradient/")))
        count = len({r["run"] for rows in self.runs.values() for r in rows})
        self.values["provenance"] = (f"This page is made of {count} runs, {seconds / 60:.0f} minutes of CPU time in all. Their commands and seeds are in the <code>_runs.csv</code> beside each table. "
                                     f"Data: <code>{html.escape(command_flags(self.runs['gradient'][0]['command'])['-i'])}</code>.")
        titles = {"gradient": "the gradient’s flow", "max_lr": "the largest learning rate", "depth": "depth and width", "redundancy": "one sub-layer less", "road": "the road to KEEL", "highway": "the BF16 highway", "hops": "lookups"}
        self.tables["commands"] = html_table(["", "small, on a CPU", "the paper’s depths, on a GPU"], [
            [titles[name], f"<code>python3 dev/experiments/run.py {name}</code>", f"<code>python3 dev/experiments/run.py {name} --gpu</code>"] for name in LESSON])


# ---------------------------------------------------------------------------------------------------------
# The page

def finite(value):
    """What is no number becomes null, which the figures leave out."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def build(results):
    import plotly.offline
    lesson = Lesson(results)
    page = (HERE / "page.html").read_text()
    sections = re.findall(r'<section id="(\w+)">\s*<h2>(.*?)</h2>', page)
    fixed = {
        "style": lambda _: (HERE / "style.css").read_text(), "script": lambda _: (HERE / "figures.js").read_text(), "plotly": lambda _: plotly.offline.get_plotlyjs().replace("</script", r"<\/script"),
        "data": lambda _: json.dumps(finite(lesson.data), separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("</", r"<\/"),
        "contents": lambda _: "".join(f'<a href="#{name}">{title}</a>' for name, title in sections),
        "math": lambda source: mathml(source), "display": lambda source: f'<span class="display">{mathml(source, True)}</span>', "pair": pair, "figure": figure,
        "value": lambda name: lesson.values[name], "table": lambda name: lesson.tables[name],
    }

    return fill(page, fixed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder with the tables of all experiments")
    parser.add_argument("--out", type=Path, required=True)
    o = parser.parse_args()
    write_page(o.out, build(o.results))


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"lesson.py: {failure}")
