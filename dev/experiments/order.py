"""What makes the order of KEEL and Pre-LN on the paper's ramp (max_lr.py): the same ramp with one thing changed at a time.

    as it is     the trainers' model and initial bits, trained by PyTorch: to rounding the trainers' ramp, so after 5000 steps another seed of it
    alpha        KEEL with alpha = 8 and 16 in place of 64
    usual        started as GPTs usually are: every matrix normal with deviation 0.02, a head of its own, the embedding not scaled; in PyTorch
    apart        from a model that has had a warm-up and a cosine of 1000 steps at 3e-3, so that the ramp is no warm-up
"""

import sys

import max_lr
from shared import COLOURS, LABELS, Run, flops, need_torch, pyplot, read_csv, save, seeds, training, write_csv

SIZES = {
    "tiny": dict(L=4, C=16, H=2, T=16, B=2, steps=100, apart=20, alphas=[2], seeds=1, changes=["torch", "usual", "alpha", "apart"]),
    "paper": dict(L=64, C=64, H=2, T=64, B=4, steps=5000, apart=1000, alphas=[8, 16], seeds=1, changes=["torch", "usual", "alpha", "apart"]),
}
FORMS = {"keel": "final", "pre": "pre"}  # train_torch.py's
IN_PYTORCH = {"torch": ("as it is, in PyTorch", []), "usual": ("usual start", ["--usual"])}
APART_LR = 3e-3


def torch_run(c, norm, change, seed):
    s = c.settings
    command = [sys.executable, "dev/experiments/train_torch.py", "--form", FORMS[norm], "-i", c.data, "-L", s.L, "-C", s.C, "-H", s.H, "-t", s.T, "-b", s.B, "-l", f"{max_lr.TOP:g}",
               "-u", s.steps, "-x", s.steps, "-P", s.steps, "-m", 1, "-n", max(1, s.steps // 10), "--seed", seed, *IN_PYTORCH[change][1]]
    return Run(f"order/{norm}-{change}-{seed}", [str(word) for word in command], s.steps, 3 * flops(s.L, s.C, s.T, s.T * s.B, s.steps), seed)


def ramp(c, norm, name, seed, flags, data_seed=None):
    s = c.settings
    return training(c, f"order/{norm}-{name}-{seed}", norm, s, max_lr.TOP, warmup=s.steps, seed=data_seed or seed, flags=flags, validate=False, may_diverge=True)


def warm_run(c, norm, seed):
    s = c.settings
    return training(c, f"order/{norm}-warm-{seed}", norm, s, APART_LR, steps=s.apart, warmup=s.apart // 4, seed=seed, validate=False, keep_model=True)


def apart_run(c, norm, seed):
    """On other batches than the warm-up's."""
    model = c.runs / warm_run(c, norm, seed).name / f"model_{c.settings.apart:08d}.bin"
    return ramp(c, norm, "apart", seed, ["-e", model], seed + 1000)


def variants(c):
    """(placement, what is changed, seed, run)"""
    for seed in seeds(c.settings):
        for change in c.settings.changes:
            if change == "alpha":
                yield from (("keel", f"alpha = {alpha:g}", seed, ramp(c, "keel", f"alpha{alpha:g}", seed, ["-a", f"{alpha:g}"])) for alpha in c.settings.alphas)
            elif change == "apart":
                yield from ((norm, "warm-up apart", seed, apart_run(c, norm, seed)) for norm in FORMS)
            else:
                yield from ((norm, IN_PYTORCH[change][0], seed, torch_run(c, norm, change, seed)) for norm in FORMS)


def runs(c):
    need_torch("order")
    yield [warm_run(c, norm, seed) for seed in seeds(c.settings) for norm in FORMS if "apart" in c.settings.changes]
    yield [run for *_, run in variants(c)]


def column(row):
    """The name of a ramp's column in order_loss.csv."""
    return f"{row['norm']}, {row['change']}, {row['seed']}"


def collect(c):
    s, rows, curves, unigram = c.settings, [], {}, max_lr.unigram_of(c.data)
    for norm, change, seed, run in variants(c):
        fine = max_lr.fine_means(c, run, s.steps)
        rows.append({"norm": norm, "change": change, "seed": seed, "L": s.L, "tokens": s.B * s.T, "steps": s.steps, **max_lr.answer(fine, max_lr.TOP, unigram)})
        curves[column(rows[-1])] = fine
    write_csv(c.results / "order.csv", rows)
    max_lr.write_curves(c.results / "order_loss.csv", curves)


def draw(c):
    plt = pyplot()
    rows, losses = read_csv(c.results / "order.csv"), read_csv(c.results / "order_loss.csv")
    changes = list(dict.fromkeys(r["change"] for r in rows))
    figure, axes = plt.subplots(1, len(changes), figsize=(3.4 * len(changes), 3.6), sharey=True, squeeze=False, gridspec_kw={"wspace": 0.08})
    for axis, change in zip(axes[0], changes):
        for row in (r for r in rows if r["change"] == change):
            points = max_lr.levels_of(max_lr.curve(losses, column(row)))
            axis.plot([max_lr.TOP * share for share, _ in points], [m for _, m in points], color=COLOURS[row["norm"]], label=LABELS[row["norm"]])
        axis.set(title=change, xlabel="learning rate, rising", ylim=(None, 4.2))
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("loss (nats)")
    save(plt, figure, c.results / "order.png")
