"""5. The road to KEEL: the paper's attempts 1 to 3 beside the final form (its eq. 24 to 28), and Pre-LN, which attempt 1 stays behind.

All four are trained by train_torch.py in PyTorch on the trainers' batches from the trainers' initial bits. Attempt 1 and the final form are
placements of the trainers too, which train them beside as a cross-check: step by step the losses must agree to FP32's rounding.
"""

import sys

from shared import COLOURS, Run, final_loss, flops, log, need_torch, pyplot, read_csv, save, seeds, smooth, training, write_csv

SIZES = {
    "tiny": dict(L=4, C=16, H=2, T=16, B=2, lr=9e-3, steps=10, warmup=4, m=4, seeds=1, probe=5),
    "small": dict(L=32, C=64, H=2, T=64, B=8, lr=9e-3, steps=200, warmup=50, m=16, seeds=1, probe=10),
    "gpu": dict(L=64, C=256, H=4, T=256, B=32, lr=9e-3, steps=1000, warmup=200, m=16, seeds=1, probe=50),
}
FORMULAS = {"attempt1": "Norm(αx + F(x))", "attempt2": "Norm(αx + F(βx))", "attempt3": "Norm(αx + F(β Norm(x)))", "final": "Norm(αx + F(Norm(x)))"}
NAMES = {"attempt1": "attempt 1", "attempt2": "attempt 2", "attempt3": "attempt 3", "final": "KEEL"}
TWINS = {"attempt1": "scaledpost", "final": "keel"}  # the placements of the trainers


def torch_run(c, form, seed):
    s = c.settings
    # With the driver's own Python. A PyTorch step costs about twice a trainer's.
    command = [sys.executable, "dev/experiments/train_torch.py", "--form", form, "-i", c.data, "-L", s.L, "-C", s.C, "-H", s.H, "-t", s.T, "-b", s.B, "-l", f"{s.lr:g}",
               "-u", s.warmup, "-x", s.steps, "-m", s.m, "-P", s.probe, "-n", max(1, s.steps // 4), "--seed", seed, *(["--device", "cuda"] if c.size == "gpu" else [])]
    return Run(f"road/{form}-{seed}", [str(word) for word in command], s.steps, 2 * flops(s.L, s.C, s.T, s.T * s.B, s.steps), seed)


def trainer_run(c, norm, seed):
    return training(c, f"road/trainer-{norm}-{seed}", norm, c.settings, c.settings.lr, seed=seed, flags=["-m", str(c.settings.m)])


def runs(c):
    need_torch("road")
    yield [run for seed in seeds(c.settings) for run in [torch_run(c, form, seed) for form in FORMULAS] + [trainer_run(c, norm, seed) for norm in ("pre", *TWINS.values())]]


def collect(c):
    """A row a form and seed; the curves are the first seed's."""
    rows, flow, table = [], [], []
    for seed in seeds(c.settings):
        losses, first = {}, seed == seeds(c.settings)[0]
        for name in [*FORMULAS, "pre", *TWINS.values()]:
            run = torch_run(c, name, seed) if name in FORMULAS else trainer_run(c, name, seed)
            label = name if name in FORMULAS else f"trainer-{name}"
            steps, losses[name], _ = log(c, run)
            if first:
                rows += [{"form": label, "step": step, "loss": f"{loss:.6f}"} for step, loss in zip(steps, losses[name])]
            if first and name in FORMULAS:
                flow += [{"form": name, "step": r["step"], "sublayer": r["sublayer"], "dx": f"{float(r['dx_norm']):.4g}"} for r in read_csv(c.runs / run.name / "probe.csv")]
            tail = losses[name][-max(1, len(losses[name]) // 10):]
            table.append({"form": label, "formula": FORMULAS.get(name, ""), "seed": seed, "train_loss": f"{sum(tail) / len(tail):.4f}", "val_loss": f"{final_loss(c, run):.4f}", "twin_difference": ""})
        for form, norm in TWINS.items():  # over the first tenth, before rounding has had time to grow
            n = max(1, len(losses[form]) // 10)
            difference = max(abs(a - b) / b for a, b in zip(losses[form][:n], losses[norm][:n]))
            next(r for r in table if (r["form"], r["seed"]) == (form, seed))["twin_difference"] = f"{difference:.2g}"
    write_csv(c.results / "road.csv", table)
    write_csv(c.results / "road_loss.csv", rows)
    write_csv(c.results / "road_gradient.csv", flow)


def draw(c):
    plt = pyplot()
    rows, flow = read_csv(c.results / "road_loss.csv"), read_csv(c.results / "road_gradient.csv")
    figure, axes = plt.subplots(1, 3, figsize=(13.5, 4), gridspec_kw={"wspace": 0.25})
    forms = dict.fromkeys(r["form"] for r in rows)
    for form in forms:
        values = [float(r["loss"]) for r in rows if r["form"] == form]
        values = smooth(values, max(1, len(values) // 10))
        if form in FORMULAS:
            axes[0].plot(range(1, len(values) + 1), values, color=COLOURS[form], label=f"{NAMES[form]}: {FORMULAS[form]}")
        elif form == "trainer-pre":
            axes[0].plot(range(1, len(values) + 1), values, color=COLOURS["pre"], label="Pre-LN (trainer)", lw=1.4)
        else:
            axes[0].plot(range(1, len(values) + 1), values, ":", color=COLOURS["trainer"], lw=1.2, label="the trainer's own" if form == "trainer-keel" else None)
    axes[0].set(title="Training loss, running mean (nats)", xlabel="step")
    axes[0].legend(fontsize=8)
    low = min(min(line.get_ydata()) for line in axes[0].get_lines())
    axes[0].set_ylim(low - 0.1, low + 1.9)
    steps = sorted({int(r["step"]) for r in flow})
    for axis, step in ((axes[1], steps[0]), (axes[2], min(steps, key=lambda s: abs(s - steps[-1] / 2)))):
        for form in FORMULAS:
            axis.plot(*zip(*[(int(r["sublayer"]), float(r["dx"])) for r in flow if r["form"] == form and int(r["step"]) == step]), color=COLOURS[form])
        axis.set(yscale="log", xlabel="sub-layer", title=f"‖dL/dx‖, step {step}")
    values = [float(r["dx"]) for r in flow]
    for axis in axes[1:]:  # one scale, at least two decades
        axis.set_ylim(min(min(values) / 1.3, max(values) / 100), max(values) * 1.3)
    save(plt, figure, c.results / "road.png")
