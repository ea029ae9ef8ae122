"""Writes the page that trains in the browser: one HTML file that needs no network, with the trainer as WebAssembly and the sources that it trains on.

    python3 dev/page/build.py --trainer build/page/trainer --out build/page.html

--trainer names emscripten's two files, TRAINER.js and TRAINER.wasm; `make page` builds them. Needs the standard library alone.
"""

import argparse
import base64
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "experiments")]

import placements
from markup import extract, fill, mathml, write_page
from shared import COLOURS, LABELS, ROOT, Failure

# A line of its own for each, beside its colour.
DASHES = {"keel": [], "post": [], "pre": [8, 3], "deepnorm": [3, 3], "mixln": [9, 3, 2, 3], "hybridnorm": [5, 5], "scaledpost": [13, 4]}

CPU = "train_keel_cpu.cpp"
BACKWARD = "// dx_l in dx, in place of dx_{l+1}:"
# name: formula, words, file, function's anchor, line's anchor
FORMULAS = {
    "embedding": (r"x_0 = \sqrt{C} (w_{token} + p_{position})", "where the highway begins", CPU, "void embedding_forward(", "out[c] = scale"),
    "norm_in": (r"u_l = \Norm(x_l)", "what the branch reads, where the placement has an inner norm", CPU, "void sublayer_forward(real* x", "if (norm.norm_in)"),
    "sum": (r"z_l = α_l x_l + F_l(u_l)", "the shortcut, weighed, and the branch", CPU, "void highway_forward(", "zi[c] = alpha"),
    "norm_out": (r"x_{l+1} = \Norm(z_l)", "the outer norm, where there is one", CPU, "void highway_forward(", "if (gamma)"),
    "alpha": (r"α_l = L", "KEEL’s row in the table of placements", "keel_common.h", "inline const PlacementRow placements", '{.name = "keel"'),
    "shortcut": (r"\d x_l = α_l \d z_l + \d u_l", "the gradient down the shortcut and out of the branch", CPU, "void shortcut_backward(", "dx[i] = alpha"),
    "estimate": (r"2^{-L/2}", "what Post-LN’s shortcut keeps where F is as long as x (the paper’s eq. 14 and 15)", CPU, BACKWARD, "The line of dz_l is where Post-LN dies"),
    "limit": (r"(\frac{α}{\sqrt{α^2 + 1}})^L → 1", "what KEEL’s keeps (eq. 18 and 19)", CPU, BACKWARD, "-> 1 (eq. 18-19)"),
    "factor": (r"\frac{α_l γ_l}{\rms(z_l)}", "one factor of the shortcut’s product, as it is measured", "keel/probe.h", "Adds the shortcut gains of one micro-batch", "double gain ="),
    "same": (r"\frac{‖\mean x_l‖^2}{\mean ‖x_l‖^2}", "how alike all positions are", "keel/probe.h", "sublayer_figures(const RunConfig& run", ".same_x = "),
    "attention": (r"p = e^{q k / \sqrt{D} - s}", "attention’s weights, with s the log of their sum", CPU, "void attention_forward(", "row[i] = exponential("),
}


def sources():
    """{name: text} of what the trainers train on by default."""
    files = [ROOT / "keel_common.h", ROOT / "train_keel.cu", ROOT / CPU, *sorted((ROOT / "keel").glob("*.h"))]
    return {str(file.relative_to(ROOT)): file.read_text() for file in files}


def link(name):
    """The button that opens a formula's line."""
    _, _, file, function, first = FORMULAS[name]
    line, _ = extract(file, function, first)
    return f'<button type="button" class="text" data-file="{file}" data-line="{line}">{file}:{line}</button>'


def formulas():
    return "".join(f"<tr><td>{mathml(FORMULAS[name][0])}</td><td>{FORMULAS[name][1]}</td><td>{link(name)}</td></tr>" for name in FORMULAS)


def build(trainer):
    def text(name, folder=HERE):
        return (folder / name).read_text().replace("</script", r"<\/script")
    weighed = [norm for norm in LABELS if placements.default_alpha(norm, 64) != 1]
    data = {"norms": list(LABELS), "labels": LABELS, "colours": {norm: COLOURS[norm] for norm in LABELS}, "dashes": DASHES, "alpha": weighed,
            "files": sources(), "links": {name: link(name) for name in FORMULAS}, "wasm": base64.b64encode(trainer.with_suffix(".wasm").read_bytes()).decode()}
    return fill((HERE / "page.html").read_text(), {
        "style": lambda _: (HERE.parent / "experiments/lesson/style.css").read_text() + (HERE / "page.css").read_text(),
        "formulas": lambda _: formulas(), "line": link,
        "data": lambda _: json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("</", r"<\/"),
        "worker": lambda _: text(trainer.with_suffix(".js").name, trainer.parent) + text("worker.js"),
        "script": lambda _: text("charts.js") + text("tour.js") + text("page.js"),
    })


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    o = parser.parse_args()
    write_page(o.out, build(o.trainer))


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"build.py: {failure}")
