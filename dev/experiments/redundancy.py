"""4. Layer redundancy, the paper's appendix A: remove one sub-layer at a time from a trained model, measure the perplexity lost.

The models are those that the gradient experiment has trained; --ablate all of the trainer sets F_l = 0 and leaves the shortcut and its norms.
"""

import gradient
from shared import COLOURS, LABELS, Run, flops, pyplot, read_csv, save, seeds, write_csv

SIZES = {
    "tiny": dict(norms=["keel", "post"], m=2),
    "small": dict(norms=["keel", "pre", "post"], m=8),
    "gpu": dict(norms=["keel", "pre", "deepnorm", "post"], m=16),
}


def run_of(c, norm, seed):
    g = c.of("gradient").settings
    name = f"redundancy/{norm}-{seed}"
    model = c.runs / gradient.run_of(c.of("gradient"), norm, seed).name / f"model_{g.steps:08d}.bin"
    command = [c.binary, "-i", c.data, "-e", model, "--ablate", "all", "-b", g.B, "-m", c.settings.m, "-o", c.runs / name]
    # A forward pass is a third of a step.
    return Run(name, [str(word) for word in command], cost=flops(g.L, g.C, g.T, g.T * g.B, (g.L + 1) * c.settings.m / 3), seed=seed, resumes=False)


def runs(c):
    g = c.of("gradient")
    models = [(norm, seed) for seed in seeds(g.settings) for norm in c.settings.norms]
    yield [gradient.run_of(g, *model) for model in models]
    yield [run_of(c, *model) for model in models]


def collect(c):
    rows = [{"norm": norm, "seed": seed, **row} for norm in c.settings.norms for seed in seeds(c.of("gradient").settings)
            for row in read_csv(c.runs / run_of(c, norm, seed).name / "ablate.csv")]
    write_csv(c.results / "redundancy.csv", rows)


def lost(rows, norm):
    """(perplexity of the whole model, [perplexity lost without each sub-layer]) of each seed."""
    found = []
    for seed in dict.fromkeys(r["seed"] for r in rows if r["norm"] == norm):
        mine = [r for r in rows if (r["norm"], r["seed"]) == (norm, seed)]
        found.append((next(float(r["perplexity"]) for r in mine if int(r["sublayer"]) < 0), [float(r["perplexity_lost"]) for r in mine if int(r["sublayer"]) >= 0]))
    return found


def mean_lost(rows, norm):
    """The same, means over the seeds."""
    whole, each = zip(*lost(rows, norm))
    return sum(whole) / len(whole), [sum(values) / len(values) for values in zip(*each)]


def draw(c):
    plt = pyplot()
    rows = read_csv(c.results / "redundancy.csv")
    norms = list(dict.fromkeys(r["norm"] for r in rows))
    figure, axes = plt.subplots(1, len(norms), figsize=(4.6 * len(norms), 3.8), sharey=True, squeeze=False, gridspec_kw={"wspace": 0.08})
    for axis, norm in zip(axes[0], norms):
        whole, points = mean_lost(rows, norm)
        axis.bar(range(len(points)), points, width=0.9, color=[COLOURS[norm] if l % 2 == 0 else COLOURS[norm] + "99" for l in range(len(points))])
        axis.set(yscale="symlog", xlabel="sub-layer removed", title=f"{LABELS[norm]}, perplexity {whole:.3g} when whole")
        axis.set_yscale("symlog", linthresh=0.01)
    axes[0][0].set_ylabel("perplexity lost")
    save(plt, figure, c.results / "redundancy.png")
