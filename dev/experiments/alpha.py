"""Which alpha? KEEL's weight of the shortcut over depth, on text and on lookups (hops.py), each at its best learning rate of a short sweep.

The paper has alpha = L for deep models and calls it a hyperparameter above 1 for small ones. A sweep has one seed; its best rate is run with the others.
"""

import math
from types import SimpleNamespace

import hops
from shared import COLOURS, Failure, diverged, final_loss, finished, pyplot, read_csv, save, seeds, staged, swept, training, write_csv

ALPHAS = {"1": lambda L: 1, "2": lambda L: 2, "sqrt L": math.sqrt, "L/2": lambda L: L / 2, "L": lambda L: L, "2 L": lambda L: 2 * L}
SIZES = {
    "tiny": dict(L=[4, 8], C=16, H=2, T=16, B=2, steps=10, warmup=4, lrs=[3e-3], start=[3e-3], m=2, K=2, hops_H=2, hops_B=2, hops_steps=10, hops_warmup=4, hops_lrs=[3e-3], hops_start=[3e-3], seeds=1, alphas=list(ALPHAS), tasks=["text", "hops"]),
    "paper": dict(L=[8, 16, 32, 64], C=64, H=2, T=64, B=8, steps=600, warmup=150, lrs=[1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2], start=[6e-3, 1.2e-2], m=64,
                  K=2, hops_H=4, hops_B=16, hops_steps=1000, hops_warmup=100, hops_lrs=[1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], hops_start=[4e-3], seeds=3, alphas=list(ALPHAS), tasks=["text", "hops"]),
    "gpu": dict(L=[16, 64, 256, 512], C=256, H=4, T=256, B=64, steps=3000, warmup=600, lrs=[1.5e-3, 3e-3, 6e-3, 1.2e-2], start=[3e-3, 6e-3], m=64,
                K=4, hops_H=8, hops_B=64, hops_steps=5000, hops_warmup=500, hops_lrs=[5e-4, 1e-3, 2e-3, 4e-3], hops_start=[2e-3], seeds=1, alphas=list(ALPHAS), tasks=["text", "hops"]),
}
MORE = "rates beside the best of these follow, until it has been tried on both sides, then the other seeds at the best"


def alphas(s, L):
    """{alpha: its names}, each once."""
    if unknown := [str(name) for name in s.alphas if name not in ALPHAS]:
        raise Failure(f"--set alphas: expected a list of {', '.join(ALPHAS)}, found {', '.join(unknown)}")
    found = {}
    for name in s.alphas:
        found.setdefault(float(f"{ALPHAS[name](L):.4g}"), []).append(name)
    return {alpha: found[alpha] for alpha in sorted(found)}


def run_of(c, task, L, alpha, lr, seed):
    s, flags = c.settings, ["-a", f"{alpha:g}"]
    name = f"alpha/{task}-L{L}-{alpha:g}-{lr:g}-{seed}"
    if task == "hops":
        return hops.hops_run(c, name, "keel", SimpleNamespace(L=L, C=s.C, H=s.hops_H, B=s.hops_B, K=s.K, m=s.m, steps=s.hops_steps, warmup=s.hops_warmup), lr, seed, flags)
    return training(c, name, "keel", SimpleNamespace(L=L, C=s.C, H=s.H, T=s.T, B=s.B, steps=s.steps, warmup=s.warmup), lr, seed=seed, flags=["-m", str(s.m), *flags], may_diverge=True)


def score(c, task, run):
    """Lower is better: the validation loss, or the share of answers that are wrong over the run's twenty validations, so that who learns sooner is better."""
    if task == "text":
        return final_loss(c, run)
    answers = [] if diverged(c, run) else [(int(r["count"]), float(r["accuracy"])) for r in read_csv(c.runs / run.name / "hops.csv")]
    return 1 - sum(n * a for n, a in answers) / sum(n for n, _ in answers) if answers else math.inf


def rates(c, task, L, alpha):
    """Of the first seed's sweep so far; and its best rate, None until it has ended."""
    s, lrs, start = c.settings, *((c.settings.hops_lrs, c.settings.hops_start) if task == "hops" else (c.settings.lrs, c.settings.start))

    def of(lr):
        run = run_of(c, task, L, alpha, lr, seeds(s)[0])
        return score(c, task, run) if finished(c, run) else None
    return swept(lrs, start, of)


def wanted(c):
    """(task, L, alpha, lr, run) of all that is asked for by now."""
    s = c.settings
    for task in s.tasks:
        for L in sorted(s.L, reverse=True):
            for alpha in alphas(s, L):
                tried, best = rates(c, task, L, alpha)
                for lr in tried:
                    for seed in seeds(s) if lr == best else seeds(s)[:1]:
                        yield task, L, alpha, lr, run_of(c, task, L, alpha, lr, seed)


def runs(c):
    return staged(lambda: [run for *_, run in wanted(c)])


def collect(c):
    """A table a task, so that each can be run and kept apart."""
    rows = [{"task": task, "L": L, "alpha": f"{alpha:g}", "is": " = ".join(alphas(c.settings, L)[alpha]), "lr": f"{lr:g}", "seed": run.seed, "steps": run.steps, "score": f"{score(c, task, run):.4f}"}
            for task, L, alpha, lr, run in wanted(c)]
    for task in c.settings.tasks:
        write_csv(c.results / f"alpha_{task}.csv", [r for r in rows if r["task"] == task])


def best(rows):
    """(L, alpha): (its names, lr, scores of the seeds) at the best learning rate."""
    found = {}
    for L, alpha in dict.fromkeys((int(r["L"]), float(r["alpha"])) for r in rows):
        mine = [r for r in rows if (int(r["L"]), float(r["alpha"])) == (L, alpha)]
        first = [r for r in mine if r["seed"] == mine[0]["seed"]]
        lr = min(first, key=lambda r: (float(r["score"]), float(r["lr"])))["lr"]
        found[L, alpha] = (mine[0]["is"], float(lr), [float(r["score"]) for r in mine if r["lr"] == lr])
    return found


def tables(results):
    return {task: read_csv(results / f"alpha_{task}.csv") for task in ("text", "hops") if (results / f"alpha_{task}.csv").exists()}


def draw(c):
    plt = pyplot()
    found = {task: best(rows) for task, rows in tables(c.results).items()}
    figure, axes = plt.subplots(1, len(found), figsize=(5.5 * len(found), 4), squeeze=False, gridspec_kw={"wspace": 0.2})
    for axis, (task, points) in zip(axes[0], found.items()):
        depths = sorted({L for L, _ in points})
        for L, colour in zip(depths, (COLOURS[n] for n in ("post", "pre", "deepnorm", "keel"))):
            x = [alpha for depth, alpha in points if depth == L]
            values = [[v if task == "text" else 1 - v for v in points[L, alpha][2]] for alpha in x]
            mean = [sum(v) / len(v) for v in values]
            axis.errorbar(x, mean, [[m - min(v) for m, v in zip(mean, values)], [max(v) - m for m, v in zip(mean, values)]], fmt="o-", color=colour, capsize=3, elinewidth=1, label=f"L = {L}")
            axis.plot([a for a in x if a == L], [m for a, m in zip(x, mean) if a == L], "o", ms=11, mfc="none", mec=colour, mew=1.6)
        axis.set(xscale="log", xlabel="alpha; circled: alpha = L", title="Validation loss on text (nats)" if task == "text" else "Answers right over the run, lookups")
        if task == "text":  # models that have learnt the frequencies of bytes alone are above
            lowest = min(v for _, _, values in points.values() for v in values)
            axis.set_ylim(lowest - 0.01, lowest + 0.22)
        axis.legend(fontsize=8)
    save(plt, figure, c.results / "alpha.png")
