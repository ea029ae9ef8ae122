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
            ("micro-batch, sequences", 12, "i"), ("sequence length", 13, "i"), ("weight decay", 26, "d"),
            ("gradient clip", 28, "d"), ("seed", 30, "Q"), ("ranks", 34, "i"), ("tokens of training data", 32, "q"),
            ("tokens of validation data", 40, "q")]
PRINTED = {"i": ",", "q": ",", "Q": "", "d": ".15g"}  # type: how it is printed
HOPS_WORD = 48


def is_number(cell):
    try:
        return cell == "" or float(cell) is not None
    except (TypeError, ValueError):  # a cell too few or too many
        return False


def read_rows(path, last_step):
    """The rows of a CSV file up to a step; none where there is no such file. What a crash has cut or zeroed is passed over."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8", errors="replace") as f:
        rows = csv.DictReader((line.replace("\0", "") for line in f), quoting=csv.QUOTE_NONE)
        return [row for row in rows if all(is_number(cell) for name, cell in row.items() if name != "kind")
                and row.get("step", "").isdecimal() and row.get("sublayer", "0").isdecimal() and int(row["step"]) <= last_step]


def thinned(rows, most=ROWS):
    """At most so many of them, evenly, the first and the last among them."""
    return [rows[i] for i in sorted({round(i) for i in np.linspace(0, len(rows) - 1, min(most, len(rows)))})]


def table(head, rows):
    line = lambda cells: "| " + " | ".join(str(cell) for cell in cells) + " |\n"
    return line(head) + line(["---"] * len(head)) + "".join(map(line, rows)) + "\n"


def rounded(columns, rows):
    """The columns of rows of a CSV file, measured values to 5 digits."""
    short = lambda column, cell: f"{float(cell):.5g}" if cell and column not in ("step", "sublayer", "kind") else cell
    return [[short(c, row.get(c, "")) for c in columns] for row in rows]


def settings(model_path, file):
    state = model_path.with_name(model_path.name.replace("model_", "state_").replace(".bin", "_00000.bin"))
    try:
        header = open(state, "rb").read(keel_file.HEADER_BYTES)
        _, found = keel_file.parse_header(header, state)
    except (OSError, keel_file.FileError):
        return []
    if state == model_path or found.kind != keel_file.STATE or found.cfg != file.cfg or found.step != file.step:
        return []
    word = lambda at, type: struct.unpack_from("<" + type, header, 4 * at)[0]
    rows = [(name, f"{word(at, type):{PRINTED[type]}}") for name, at, type in SETTINGS]
    return rows + ([("training data", f"hops:{word(HOPS_WORD, 'i')}, programs without end")] if word(HOPS_WORD, "i") else [])


def draw(folder, log, probe):
    """curve.png of the losses and, of a run with --probe, gradient.png over depth. Without matplotlib there are none."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return

    def save(name, axis, **labels):
        axis.set(**labels)
        axis.grid(alpha=0.3)
        axis.legend()
        axis.figure.savefig(folder / name, dpi=120)
        plt.close(axis.figure)

    if len(log) > 1:
        axis = plt.subplots(figsize=(7, 3.5), layout="constrained")[1]
        for column, label, style in (("loss", "training", {"lw": 0.8}), ("val_loss", "validation", {"marker": "o", "ms": 3})):
            if points := [(int(row["step"]), float(row[column])) for row in log if row.get(column)]:
                axis.plot(*zip(*points), label=label, **style)
        save("curve.png", axis, xlabel="step", ylabel="loss, nats a token")
    probe = [row for row in probe if row.get("dx_norm")]
    if any(float(row["dx_norm"]) > 0 for row in probe):
        axis = plt.subplots(figsize=(7, 3.5), layout="constrained")[1]
        steps = thinned(sorted({int(row["step"]) for row in probe}), 6)
        for i, step in enumerate(steps):
            points = [(int(row["sublayer"]), float(row["dx_norm"])) for row in probe if int(row["step"]) == step]
            axis.semilogy(*zip(*points), color=plt.cm.viridis(0.9 * i / len(steps)), label=f"step {step}")
        save("gradient.png", axis, xlabel="sub-layer l", ylabel="norm of dL/dx_l")


def write(folder, model_path, file, tok, name):
    """README.md and its figures, into folder, which will have this name."""
    cfg = file.cfg
    parameters = sum(math.prod(shape) for _, shape in keel_file.parameter_table(cfg))
    log, probe = (read_rows(model_path.parent / name, file.step) for name in ("log.csv", "probe.csv"))
    draw(folder, log, probe)
    figure = lambda file, what: f"![{what}]({file})\n\n" if (folder / file).exists() else ""
    validated, loss = [row for row in log if row.get("val_loss")], ""
    if validated:
        loss = ": validation loss {} nats a token at step {}".format(*rounded(["val_loss", "step"], validated[-1:])[0])
    text = f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [{', '.join(dict.fromkeys(("keel", "deep-transformer", cfg.norm)))}]
---
# {name}

A GPT of {cfg.L} sub-layers, attention and feed-forward in turn, and {parameters:,} parameters, after {file.step:,} steps{loss}.
It continues text, and was not taught to follow instructions.

Its norm placement is `{cfg.norm}`; `placements.py` has what each sub-layer runs. The KEEL trainer, which made it, is named
after the placement x' = Norm(alpha x + F(Norm(x))), alpha = L, of
[Post-LayerNorm Is Back: Stable, ExpressivE, and Deep](https://arxiv.org/abs/2601.19895).

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = {name!r}  # this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
inputs = tokenizer("Once", return_tensors="pt")
output = model.generate(**inputs, max_length={min(cfg.max_T, 200)}, do_sample=True, temperature=0.8, top_k=40)
print(tokenizer.decode(output[0]))
```

It needs transformers 4.45 or later. In BF16, by `dtype=torch.bfloat16` (`torch_dtype` before transformers 4.56), only the
branches F and the head are computed: the highway x and all norms stay FP32. Its positions are learnt, so that prompt and answer
together have at most {cfg.max_T:,} tokens.

## The model

"""
    text += table(("property", "value"), [
        ("sub-layers L, half of them attention", cfg.L), ("channels C", cfg.C), ("heads", cfg.H), ("norm placement", cfg.norm),
        ("alpha", f"{cfg.alpha:.9g}"), ("positions", cfg.max_T), ("vocabulary", cfg.V),
        ("tokenizer", "a byte is a token" if tok.split == 0 else f"byte-level BPE, CRC-32 {tok.crc:08x}"),
        ("weights", f"{keel_file.TYPES[file.type].upper()}, those of `{model_path.name}` to the bit"),
        ("trained with branches in", "BF16" if file.branch_bf16 else keel_file.TYPES[file.type].upper())])
    if rows := settings(model_path, file):
        text += ("## The run\n\nAdamW, betas 0.9 and 0.95; linear warm-up, then cosine to 1e-7.\n\n"
                 + table(("setting", "value"), rows))
    if log:
        columns = [c for c in ("step", "loss", "val_loss", "val_bits_per_byte", "lr", "grad_norm")
                   if any(row.get(c) for row in log)]
        text += ("## The curve\n\n" + figure("curve.png", "training and validation loss at each step")
                 + table(columns, rounded(columns, thinned(validated or log))))
    if probe:
        last = [row for row in probe if row["step"] == probe[-1]["step"]]
        columns = ["sublayer", "kind", "rms_x", "rms_f", "shortcut_gain", "shortcut_gain_to_top", "dx_norm", "grad_norm",
                   "update_norm"]
        text += ("## Over depth\n\n" + figure("gradient.png", "norm of the loss's gradient at each sub-layer, at several steps")
                 + f"At step {last[0]['step']}: rms of the highway x and of the branch F; what the shortcut multiplies a gradient "
                 "by in this sub-layer, and in all from it to the top; norms of dL/dx, of the weights' gradients and of their "
                 "update.\n\n"
                 + table(columns, rounded(columns, thinned(last))))
    (folder / "README.md").write_text(text, encoding="utf-8")
