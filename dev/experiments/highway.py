"""6. Why the highway is FP32: what the sub-layers add to the stream, computed on a BF16 highway, against FP32's, over depth.

What they add is x_L - x_2 (KEEL's first two sub-layers have no alpha). On a BF16 highway x and z are rounded to BF16 wherever they are made, and the rest is
FP32; beside it the opposite, which is what the GPU trainer does: an FP32 highway with BF16 branches. New models, in PyTorch, no training.
"""

import sys

from shared import COLOURS, Run, need_torch, pyplot, read_csv, save, write_csv

SIZES = {
    "tiny": dict(L=[4, 8], C=16, H=2, T=16, B=1, seeds=1),
    "small": dict(L=[8, 16, 32, 64, 128, 256, 512, 1024], C=64, H=2, T=64, B=1, seeds=3),
    "gpu": dict(L=[8, 16, 32, 64, 128, 256, 512, 1024], C=256, H=4, T=256, B=1, seeds=2),
}
WAYS = {"highway": "BF16 highway, FP32 branches", "branch": "FP32 highway, BF16 branches"}


def run_of(c):
    s = c.settings
    command = [sys.executable, "dev/experiments/highway_measure.py", "-i", c.data, "-C", s.C, "-H", s.H, "-t", s.T, "-b", s.B, "--seeds", s.seeds, "-L", *s.L, "-o", c.runs / "highway" / "measured.csv"]
    return Run("highway/all", [str(word) for word in command], cost=sum(s.L) * s.C ** 2 * s.T * s.seeds * 1e-6, resumes=False)


def runs(c):
    need_torch("highway")
    yield [run_of(c)]


def collect(c):
    write_csv(c.results / "highway.csv", read_csv(c.runs / "highway" / "measured.csv"))


def draw(c):
    plt = pyplot()
    rows = read_csv(c.results / "highway.csv")
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), gridspec_kw={"wspace": 0.25})
    for way, colour in (("highway", COLOURS["post"]), ("branch", COLOURS["keel"])):
        for axis, column in zip(axes, ("error", "cosine")):
            depths = sorted({int(r["L"]) for r in rows})
            values = [[float(r[column]) for r in rows if r["rounded"] == way and int(r["L"]) == L] for L in depths]
            axis.plot(depths, [sum(v) / len(v) for v in values], "o-", color=colour, label=WAYS[way])
    for axis, title in zip(axes, ("Error of what the sub-layers add to the stream", "Cosine with FP32's")):
        axis.set(xscale="log", xlabel="sub-layers L", title=title)
        axis.set_xticks(depths, [str(L) for L in depths])
        axis.minorticks_off()
    axes[0].set(yscale="log")
    axes[0].set_yticks([1e-3, 1e-2, 1e-1, 1], ["0.1 %", "1 %", "10 %", "100 %"])
    axes[0].legend()
    save(plt, figure, c.results / "highway.png")
