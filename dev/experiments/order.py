"""What makes the order of KEEL and Pre-LN on the paper's ramp (max_lr.py): the same ramp with one thing changed at a time.

    as it is     the trainers' model and initial bits; PyTorch's ramps are the trainers' to rounding, which a ramp of 5000 steps makes a seed of
    alpha        KEEL with alpha = 8 and 16 in place of 64, by the trainer
    usual        started as GPTs usually are: every matrix normal with deviation 0.02, a head of its own, the embedding not scaled
    apart        a warm-up of its own, 1000 steps at 3e-3, before the ramp begins at 0
"""

import sys

import max_lr
from shared import COLOURS, LABELS, Run, flops, need_torch, pyplot, read_csv, save, seeds, training, write_csv
from types import SimpleNamespace

SIZES = {
    "tiny": dict(L=4, C=16, H=2, T=16, B=2, steps=100, apart=20, alphas=[2], seeds=1),
    "paper": dict(L=64, C=64, H=2, T=64, B=4, steps=5000, apart=1000, alphas=[8, 16], seeds=1),
}
# name: (label, form of train_torch.py, flags)
CHANGES = {"torch": "as it is, in PyTorch", "usual": "usual start", "apart": "warm-up apart"}
FORMS = {"keel": "final", "pre": "pre"}


def torch_run(c, norm, change, seed):
    s = c.settings
    apart = s.apart if change == "apart" else 0
    command = [sys.executable, "dev/experiments/train_torch.py", "--form", FORMS[norm], "-i", c.data, "-L", s.L, "-C", s.C, "-H", s.H, "-t", s.T, "-b", s.B, "-l", f"{max_lr.TOP:g}",
               "-u", s.steps, "-x", s.steps + apart, "-P", s.steps, "-m", 1, "-n", max(1, s.steps // 10), "--seed", seed]
    command += ["--usual"] if change == "usual" else ["--apart", apart] if apart else []
    return Run(f"order/{norm}-{change}-{seed}", [str(word) for word in command], s.steps + apart, 3 * flops(s.L, s.C, s.T, s.T * s.B, s.steps), seed)


def alpha_run(c, alpha, seed):
    s = c.settings
    return training(c, f"order/keel-alpha{alpha}-{seed}", "keel", s, max_lr.TOP, warmup=s.steps, seed=seed, flags=["-a", f"{alpha:g}"], validate=False, may_diverge=True)


def variants(c):
    """(placement, what is changed, run)"""
    s = c.settings
    for seed in seeds(s):
        yield from (("keel", f"alpha = {alpha:g}", alpha_run(c, alpha, seed)) for alpha in s.alphas)
        yield from ((norm, CHANGES[change], torch_run(c, norm, change, seed)) for change in reversed(CHANGES) for norm in FORMS)


def runs(c):
    need_torch("order")
    yield [run for _, _, run in variants(c)]


def collect(c):
    s, rows, curves, unigram = c.settings, [], {}, max_lr.unigram_of(c.data)
    for norm, change, run in variants(c):
        curves[f"{norm}, {change}, {run.seed}"] = fine = max_lr.fine_means(c, run, s.steps)
        rows.append({"norm": norm, "change": change, "seed": run.seed, "L": s.L, "tokens": s.B * s.T, "steps": s.steps, **max_lr.answer(fine, max_lr.TOP, unigram)})
    write_csv(c.results / "order.csv", rows)
    max_lr.write_curves(c.results / "order_loss.csv", curves)


def draw(c):
    plt = pyplot()
    rows, losses = read_csv(c.results / "order.csv"), read_csv(c.results / "order_loss.csv")
    changes = list(dict.fromkeys(r["change"] for r in rows))
    figure, axes = plt.subplots(1, len(changes), figsize=(3.4 * len(changes), 3.6), sharey=True, squeeze=False, gridspec_kw={"wspace": 0.08})
    for axis, change in zip(axes[0], changes):
        for row in (r for r in rows if r["change"] == change):
            points = max_lr.levels_of(max_lr.curve(losses, f"{row['norm']}, {change}, {row['seed']}"))
            axis.plot([max_lr.TOP * share for share, _ in points], [m for _, m in points], color=COLOURS[row["norm"]], label=LABELS[row["norm"]])
        axis.set(title=change, xlabel="learning rate, rising", ylim=(None, 4.2))
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("loss (nats)")
    save(plt, figure, c.results / "order.png")
