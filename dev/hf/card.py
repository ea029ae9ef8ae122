"""The model card that export.py writes: what the model is, how it was trained, its curve and what --probe measured.

All is read from the files of the run, as far as they lie beside the model: log.csv, probe.csv and the header of the training state.
"""

import csv
import math
import struct

import numpy as np

import keel_file

ROWS = 16  # of the tables of curve and depth, at most

# A training state's settings: name, the word of the header and its type (enum HeaderWord in keel_common.h).
SETTINGS = [("steps planned", 20, "q"), ("warm-up steps", 22, "q"), ("peak learning rate", 24, "d"), ("tokens a step", 18, "q"),
            ("micro-batch, sequences", 12, "i"), ("sequence length", 13, "i"), ("weight decay", 26, "d"), ("gradient clip", 28, "d"),
            ("seed", 30, "Q"), ("ranks", 34, "i"), ("tokens of training data", 32, "q"), ("tokens of validation data", 40, "q")]
HOPS_WORD = 48


def read_rows(path, last_step):
    """The rows of a CSV file up to a step; none where there is no such file. Of a line that was cut off, what there is."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8", errors="replace") as f:
        rows = csv.DictReader((line.replace("\0", "") for line in f), quoting=csv.QUOTE_NONE)
        return [row for row in rows if row.get("step", "").isdecimal() and int(row["step"]) <= last_step]


def number(cell):
    """NaN where a cell has none."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan


def thinned(rows):
    """At most ROWS of them, evenly, the first and the last among them."""
    return [rows[i] for i in sorted({round(i) for i in np.linspace(0, len(rows) - 1, min(ROWS, len(rows)))})]


def table(head, rows):
    line = lambda cells: "| " + " | ".join(str(cell) for cell in cells) + " |\n"
    return line(head) + line(["---"] * len(head)) + "".join(map(line, rows)) + "\n"


def settings(model_path, file):
    state = model_path.with_name(model_path.name.replace("model_", "state_").replace(".bin", "_00000.bin"))
    try:
        header = open(state, "rb").read(keel_file.HEADER_BYTES)
        _, found = keel_file.parse_header(header, state)
    except (OSError, keel_file.FileError):
        return []
    if state == model_path or found.kind != keel_file.STATE or found.cfg != file.cfg or found.step != file.step:
        return []
    rows = [(name, f"{struct.unpack_from('<' + kind, header, 4 * word)[0]:.15g}") for name, word, kind in SETTINGS]
    hops, = struct.unpack_from("<i", header, 4 * HOPS_WORD)
    return rows + ([("training data", f"hops:{hops}, programs without end")] if hops else [])


def draw(folder, log, probe, shape):
    """curve.png, and probe.png of a run with --probe; returns their names. Without matplotlib there are none."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        from matplotlib.colors import LogNorm
    except ImportError:
        return []
    drawn = []
    if len(log) > 1:
        figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
        for column, style in (("loss", {"lw": 0.8}), ("val_loss", {"marker": "o", "ms": 3})):
            points = [(int(row["step"]), number(row[column])) for row in log if row.get(column)]
            if points:
                axis.plot(*zip(*points), label=column, **style)
        axis.set(xlabel="step", ylabel="nats a token")
        axis.legend()
        figure.savefig(folder / "curve.png", dpi=120)
        drawn.append("curve.png")
        plt.close(figure)
    steps = sorted({int(row["step"]) for row in probe})
    if len(steps) > 1:
        values = np.full((shape.L, len(steps)), np.nan)
        for row in probe:
            if (l := number(row.get("sublayer"))) in range(shape.L):
                values[int(l), steps.index(int(row["step"]))] = number(row.get("dx_norm"))
        values[~(np.isfinite(values) & (values > 0))] = np.nan  # a logarithm shows them
        if not np.isnan(values).all():
            figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
            mesh = axis.pcolormesh(steps, range(shape.L), values, norm=LogNorm(), shading="nearest")
            axis.set(xlabel="step", ylabel="sub-layer", title="norm of dL/dx at each sub-layer")
            figure.colorbar(mesh, ax=axis)
            figure.savefig(folder / "probe.png", dpi=120)
            drawn.append("probe.png")
            plt.close(figure)
    return drawn


def write(folder, model_path, file, tok, name):
    """README.md and its figures, into folder, which will have this name."""
    cfg = file.cfg
    parameters = sum(math.prod(shape) for _, shape in keel_file.parameter_table(cfg))
    log, probe = (read_rows(model_path.parent / name, file.step) for name in ("log.csv", "probe.csv"))
    figures = draw(folder, log, probe, cfg)
    text = f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [keel, deep-transformer, {cfg.norm}]
---
# {name}, step {file.step}

A GPT of {cfg.L} sub-layers with the norm placement `{cfg.norm}`, trained by the KEEL trainer ("Post-LayerNorm Is Back", arXiv 2601.19895:
x' = Norm(alpha x + F(Norm(x))), alpha = L). Its weights are those of `{model_path.name}`, to the bit.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100, do_sample=True, temperature=0.8, top_k=40)[0]))
```

Cast to BF16, by `dtype=torch.bfloat16` (`torch_dtype=` before transformers 4.56), the branches alone are computed in it: the highway x and all norms stay FP32.
There is no dropout, and text longer than {cfg.max_T} tokens has no positions.

## The model

"""
    text += table(("", ""), [
        ("sub-layers L, half of them attention", cfg.L), ("channels C", cfg.C), ("heads", cfg.H), ("norm placement", cfg.norm),
        ("alpha", f"{cfg.alpha:.9g}"), ("longest text, tokens", cfg.max_T), ("vocabulary", cfg.V),
        ("tokenizer", "a byte is a token" if tok.split == 0 else f"byte-level BPE, CRC-32 {tok.crc:08x}"),
        ("parameters", f"{parameters:,}"), ("stored as", keel_file.TYPES[file.type]),
        ("trained with branches in", "BF16" if file.branch_bf16 else keel_file.TYPES[file.type].upper())])
    if rows := settings(model_path, file):
        text += "## The run\n\nAdamW, betas 0.9 and 0.95; linear warm-up, then cosine to 1e-7.\n\n" + table(("setting", ""), rows)
    if log:
        columns = [c for c in ("step", "loss", "val_loss", "val_bits_per_byte", "lr", "grad_norm") if any(row.get(c) for row in log)]
        shown = thinned([row for row in log if row.get("val_loss")]) or thinned(log)
        text += "## The curve\n\n" + table(columns, [[row.get(c) or "" for c in columns] for row in shown])
    if probe:
        last = [row for row in probe if row["step"] == probe[-1]["step"]]
        columns = ["sublayer", "kind", "rms_x", "rms_f", "shortcut_gain", "shortcut_gain_to_top", "dx_norm", "grad_norm", "update_norm"]
        text += (f"## Over depth, at step {probe[-1]['step']}\n\nrms of the highway and of the branch; the shortcut's gain, of one sub-layer and "
                 "from it to the top; norms of dL/dx, of the weights' gradients and of their update.\n\n"
                 + table(columns, [[row.get(c) or "" for c in columns] for row in thinned(last)]))
    text += "".join(f"![{figure[:-4]}]({figure})\n" for figure in figures)
    (folder / "README.md").write_text(text, encoding="utf-8")
