"""4. Layer redundancy, the paper's appendix A: remove one sub-layer at a time from a trained model, measure the perplexity lost.

The models are those that the gradient experiment has trained; --ablate all of the trainer sets F_l = 0 and leaves the shortcut and its norms.
"""

import gradient
from shared import COLOURS, LABELS, Run, flops, pyplot, read_csv, save, write_csv

SIZES = {
    "tiny": dict(norms=["keel", "post"], m=2),
    "small": dict(norms=["keel", "pre", "post"], m=8),
    "gpu": dict(norms=["keel", "pre", "deepnorm", "post"], m=16),
}


def run_of(c, norm):
    g = c.of("gradient").settings
    name = f"redundancy/{norm}"
    model = c.runs / "gradient" / norm / f"model_{g.steps:08d}.bin"
    command = [c.binary, "-i", c.data, "-e", model, "--ablate", "all", "-b", g.B, "-m", c.settings.m, "-o", c.runs / name]
    # A forward pass is a third of a step.
    return Run(name, [str(word) for word in command], cost=flops(g.L, g.C, g.T, g.T * g.B, (g.L + 1) * c.settings.m / 3), resumes=False)


def runs(c):
    g = c.of("gradient")
    yield [gradient.run_of(g, norm) for norm in c.settings.norms]
    yield [run_of(c, norm) for norm in c.settings.norms]


def collect(c):
    rows = []
    for norm in c.settings.norms:
        for row in read_csv(c.runs / "redundancy" / norm / "ablate.csv"):
            rows.append({"norm": norm, **row})
    write_csv(c.results / "redundancy.csv", rows)


def draw(c):
    plt = pyplot()
    rows = read_csv(c.results / "redundancy.csv")
    norms = list(dict.fromkeys(r["norm"] for r in rows))
    figure, axes = plt.subplots(1, len(norms), figsize=(4.6 * len(norms), 3.8), sharey=True, squeeze=False, gridspec_kw={"wspace": 0.08})
    for axis, norm in zip(axes[0], norms):
        mine = [r for r in rows if r["norm"] == norm]
        whole = next(float(r["perplexity"]) for r in mine if int(r["sublayer"]) < 0)
        points = [(int(r["sublayer"]), float(r["perplexity_lost"])) for r in mine if int(r["sublayer"]) >= 0]
        axis.bar(*zip(*points), width=0.9, color=[COLOURS[norm] if l % 2 == 0 else COLOURS[norm] + "99" for l, _ in points])
        axis.set(yscale="symlog", xlabel="sub-layer removed", title=f"{LABELS[norm]}, perplexity {whole:.3g} when whole")
        axis.set_yscale("symlog", linthresh=0.01)
    axes[0][0].set_ylabel("perplexity lost")
    save(plt, figure, c.results / "redundancy.png")
