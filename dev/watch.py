#!/usr/bin/env python3
"""Shows runs in TensorBoard or Weights & Biases while they train; the trainers know nothing of it.

    python3 dev/watch.py out/a out/b &              follows the runs' logs until it is interrupted
    tensorboard --logdir out                        shows them
    python3 dev/watch.py --wandb out/a              the same to W&B; WANDB_MODE=offline keeps it here

Every column of log.csv is a scalar, log/loss for example. Under depth/ are, from hops.csv, the accuracy at each number
of lookups and, from probe.csv (--probe), the decades by which the gradient shrinks from the last sub-layer down to
sub-layer 2 (KEEL's highway begins there), and pictures of gradients, gains and branches over depth.

Each start, and each resume of a run, sends TensorBoard the logs anew from their first step, and has it forget what it
had before. To W&B each step goes once: watch_wandb.json, beside the run, says which were sent.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import secrets
import signal
import sys
import threading
import time
from pathlib import Path

try:
    import numpy as np
    from matplotlib import colormaps, colors, figure
except ImportError:  # there will be no pictures
    figure = None

KEPT_STEPS = 512  # of a run's probed steps, for its pictures: more than they have columns to show them
WIDTH, HEIGHT = 950, 500  # of a picture, in pixels
DEPTH = ["rms_f", "rms_z", "shortcut_gain_to_top", "dx_norm", "grad_norm"]
LOGS = {"log.csv": ["loss"], "hops.csv": ["hops", "accuracy"], "probe.csv": DEPTH}  # columns needed beside the step
PICTURES = {"depth/dx_norm": "gradient on the highway, ||dL/dx||",  # in the order of Depth.values()
            "depth/grad_norm": "gradient of the sub-layer's weights, its norm",
            "depth/shortcut_gain_to_top": "gain of the shortcut from here to the top",
            "depth/branch_share": "what the sub-layer adds, rms(F) / rms(z)"}


def fail(message):
    sys.exit(f"watch.py: {message}")


class Log:
    """Follows one csv file: rows are added at its end, and a resume replaces it by another file, header and all."""

    def __init__(self, path):
        self.path, self.file, self.step = path, None, -1

    def open(self):
        """Once it is there."""
        if self.file or not self.path.exists():
            return
        self.file = open(self.path, "rb")
        self.columns = self.file.readline().decode(errors="replace").rstrip("\r\n").split(",")
        needed = ["step", *LOGS[self.path.name]]
        if self.columns[0] != "step" or set(needed) - set(self.columns):
            fail(f"{self.path}: expected a run's log with the columns {','.join(needed)}, "
                 f"found {','.join(self.columns)[:60]!r}")

    def replaced(self):
        if not self.file or not self.path.exists():
            return False
        there, ours = os.stat(self.path), os.fstat(self.file.fileno())
        return not os.path.samestat(there, ours) or there.st_size < self.file.tell()

    def lines(self, last):
        """Yields (step, line) of new rows up to step `last`.

        Like the trainer, passes over what does not begin with a step: a crashed machine leaves zeros.
        """
        while (line := self.file.readline()).endswith(b"\n"):
            step = line.partition(b",")[0]
            if step.isdigit() and int(step) >= self.step:
                if int(step) > last:
                    break
                self.step = int(step)
                yield self.step, line
        self.file.seek(-len(line), os.SEEK_CUR)  # comes again, then whole

    def steps(self, last=math.inf):
        """Yields (step, lines) of the new steps up to `last`."""
        self.open()
        if self.file:
            for step, rows in itertools.groupby(self.lines(last), lambda row: row[0]):
                yield step, [line for _, line in rows]

    def numbers(self, line):
        """{column: number} of a row, without empty cells and words; {} where it is not whole."""
        cells = line.rstrip(b"\r\n").split(b",")
        found = {}
        for name, cell in zip(self.columns[1:], cells[1:] if len(cells) == len(self.columns) else []):
            with contextlib.suppress(ValueError):
                found[name] = float(cell)
        return found


class Depth:
    """What the pictures show of probe.csv: at most KEPT_STEPS probed steps, evenly spread, and the newest."""

    def __init__(self):
        self.kept, self.every, self.count, self.newest = {}, 1, 0, ()
        self.drawn_count, self.drawn_at = 0, -math.inf

    def add(self, step, log, lines):
        self.newest = step, log, lines
        if self.count % self.every == 0:
            self.kept[step] = self.values(log, lines)
        if len(self.kept) > KEPT_STEPS:
            self.kept, self.every = dict(list(self.kept.items())[::2]), 2 * self.every
        self.count += 1

    def values(self, log, lines):
        """(pictures, sub-layers)"""
        rows = [log.numbers(line) for line in lines]
        p = {name: np.array([row.get(name, np.nan) for row in rows]) for name in DEPTH}
        with np.errstate(all="ignore"):
            values = np.array([p["dx_norm"], p["grad_norm"], p["shortcut_gain_to_top"], p["rms_f"] / p["rms_z"]])
            return np.where(np.isfinite(values) & (values > 0), values, np.nan)  # the scale is logarithmic

    def due(self, last):
        """Where a picture would be 5 % wider, or is a quarter of an hour old; drawing takes time from the training."""
        age = time.monotonic() - self.drawn_at
        old = age > 30 and (self.count >= 1.05 * self.drawn_count or age > 900)
        return self.count > self.drawn_count and (old or last)

    def draw(self, run):
        """Yields (tag, PNG)."""
        self.drawn_count, self.drawn_at = self.count, time.monotonic()
        step, log, lines = self.newest
        shown = {**self.kept, step: self.values(log, lines)}
        for (tag, title), values in zip(PICTURES.items(), np.stack(list(shown.values()), axis=1)):
            if np.isfinite(values).any():
                yield tag, picture(f"{run}: {title}", np.array(list(shown)), values)


def picture(title, steps, values):
    """values (steps, layers) as colours over steps and sub-layers, and some steps as curves over the sub-layers."""
    layers = values.shape[1]
    low, high = np.nanpercentile(values, [1, 99])
    if high < 10 * low:  # what differs little is to look like that
        low, high = (low * high) ** 0.5 / 10 ** 0.5, (low * high) ** 0.5 * 10 ** 0.5
    width = (steps[-1] - steps[0]) / max(1, len(steps) - 1) or 1  # of a step's column, where they are even
    left, right = steps[0] - width / 2, steps[-1] + width / 2
    nearest = np.abs(np.linspace(left, right, 1001)[:, None] - steps).argmin(1)
    fig = figure.Figure(figsize=(WIDTH / 125, HEIGHT / 125), dpi=125, layout="constrained")
    heat, curves = fig.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [2, 1]})
    image = heat.imshow(values[nearest].T, norm=colors.LogNorm(low, high), aspect="auto", origin="lower",
                        extent=(left, right, -0.5, layers - 0.5), interpolation_stage="rgba",
                        interpolation="nearest" if layers < 150 else "hanning")  # without moire where pixels are fewer
    fig.colorbar(image, ax=heat, extend="both", pad=0.01)
    heat.set(xlabel="step", ylabel="sub-layer", facecolor="lightgrey")
    shown = sorted({round(i * (len(steps) - 1) / 4) for i in range(5)})
    for n, i in enumerate(shown):  # attention and feed-forward apart: they often differ more than neighbours do
        colour, label = colormaps["plasma"](0.9 - 0.9 * n / max(1, len(shown) - 1)), f"step {steps[i]}"
        curves.plot(values[i][::2], range(0, layers, 2), color=colour, lw=1.2, label=label)
        curves.plot(values[i][1::2], range(1, layers, 2), color=colour, lw=1.2, ls=(0, (2, 1.5)))
    curves.set(xscale="log",
               xlim=(min(low, np.nanmin(values[shown])) / 1.2, max(high, np.nanmax(values[shown])) * 1.2))
    curves.set_xlabel("attention, dashed feed-forward", fontsize=8)
    curves.grid(color="0.9")
    curves.legend(fontsize=8, frameon=False)
    fig.suptitle(title, fontsize=11)
    fig.savefig(png := io.BytesIO(), format="png")
    return png.getvalue()


class TensorBoard:
    def __init__(self, folder):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter
        self.Event, self.SessionLog, self.Summary = event_pb2.Event, event_pb2.SessionLog, summary_pb2.Summary
        # TensorBoard reads a folder's files in the order of their names; the last one may end in half a record.
        file = open(folder / f"events.out.tfevents.{time.time_ns()}.keel", "wb")
        self.records, self.flush, self.close = RecordWriter(file), file.flush, file.close
        self.write(0, file_version="brain.Event:2")

    def write(self, step, **what):
        self.records.write(self.Event(step=step, wall_time=time.time(), **what).SerializeToString())

    def restart(self):
        """Has TensorBoard forget all steps from 0 on. Of a folder's first START it takes no notice, nor need it."""
        self.write(0, session_log=self.SessionLog(status=self.SessionLog.START))

    def scalars(self, key, step, values):
        values = [self.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self.write(step, summary=self.Summary(value=values))

    def image(self, step, tag, png):
        image = self.Summary.Image(encoded_image_string=png, colorspace=4, width=WIDTH, height=HEIGHT)
        self.write(step, summary=self.Summary(value=[self.Summary.Value(tag=tag, image=image)]))


class WandB:
    def __init__(self, folder, name, project):
        import wandb
        self.Image, self.path = wandb.Image, folder / "watch_wandb.json"
        self.state = {"id": secrets.token_hex(4), "sent": {}}  # sent: the last step of each log and picture
        if self.path.exists():
            self.state = json.loads(self.path.read_text())
        try:
            self.run = wandb.init(project=project, id=self.state["id"], name=name, dir=folder, resume="allow",
                                  reinit="create_new", settings=wandb.Settings(console="off"))
        except wandb.Error as error:
            fail(f"W&B: {str(error).splitlines()[0]} (WANDB_MODE=offline needs no account)")
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")  # W&B's own step counts the calls

    def restart(self):
        """Nothing: a resumed trainer computes the lost steps again to the same bits, times aside; W&B has them."""

    def scalars(self, key, step, values):
        if step > self.state["sent"].get(key, -1):
            self.run.log({"step": step, **values})
            self.state["sent"][key] = step

    def image(self, step, tag, png):
        from PIL import Image
        self.scalars(tag, step, {tag: self.Image(Image.open(io.BytesIO(png)))})

    def flush(self):
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.state) + "\n")
        os.replace(temporary, self.path)

    def close(self):
        self.run.finish()


class Run:
    """Takes what is new in a run's logs to its sink."""

    def __init__(self, folder, name, sink):
        self.folder, self.name, self.sink = folder, name, sink
        self.restart()

    def restart(self):
        """All logs from their start."""
        self.logs = [Log(self.folder / name) for name in LOGS]
        self.depth, self.layers = Depth(), 0
        self.sink.restart()

    def poll(self, last=False):
        if any(log.replaced() for log in self.logs):
            self.restart()
        log, hops, probe = self.logs
        for step, lines in log.steps():
            self.sink.scalars("log.csv", step, {f"log/{name}": value for name, value in log.numbers(lines[0]).items()})
        # A step's row in log.csv is written after its rows in the others: up to there they are whole.
        for step, lines in hops.steps(log.step):
            rows = [row for row in map(hops.numbers, lines) if row]
            self.sink.scalars("hops.csv", step, {f"depth/hops_{row['hops']:.0f}": row["accuracy"] for row in rows})
        for step, lines in probe.steps(log.step):
            self.layers = self.layers or len(lines)
            if len(lines) != self.layers:
                continue  # a crashed machine has lost rows
            if figure:
                self.depth.add(step, probe, lines)
            low, high = (probe.numbers(lines[l]).get("dx_norm", math.nan) for l in (min(2, self.layers - 1), -1))
            if low > 0 and high > 0:
                decades = math.log10(low) - math.log10(high)
                self.sink.scalars("probe.csv", step, {"depth/log10_dx_norm_2_over_last": decades})
        if self.depth.due(last):
            for tag, png in self.depth.draw(self.name):
                self.sink.image(probe.step, tag, png)
        self.sink.flush()


def watch(arguments):
    folders = list(dict.fromkeys(Path(out).resolve() for out in arguments.out))
    for folder in folders:
        if not folder.is_dir():
            fail(f"{folder}: expected a run's folder, found {'a file' if folder.exists() else 'none'}")
        if arguments.once and not (folder / "log.csv").exists():
            fail(f"{folder}: expected a run's log.csv, found none")
        for name in LOGS:
            Log(folder / name).open()  # checks it
    root, runs = os.path.commonpath([folder.parent for folder in folders]), []
    for folder in folders:
        name = os.path.relpath(folder, root)
        place = Path(arguments.logdir or root).resolve() / name
        place.mkdir(parents=True, exist_ok=True)
        sink = WandB(place, name, arguments.project) if arguments.wandb else TensorBoard(place)
        runs.append(Run(folder, name, sink))
    if not figure:
        print("note: no pictures of the depth without matplotlib: pip install matplotlib", flush=True)
    if not arguments.wandb:
        print(f"tensorboard --logdir {arguments.logdir or os.path.commonpath(folders)}", flush=True)

    stop = threading.Event()

    def end(number, frame):
        signal.signal(number, signal.SIG_DFL)  # a second signal ends it at once
        stop.set()

    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, end)
    while not (arguments.once or stop.is_set()):
        for run in runs:
            run.poll()
        stop.wait(arguments.every)
    for run in runs:
        run.poll(last=True)
        run.sink.close()


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="+", metavar="OUT", help="the folder of a run, the trainer's -o")
    parser.add_argument("--logdir", metavar="DIR", help="the files go to DIR/RUN [the run's own folder]")
    parser.add_argument("--every", type=float, default=5, metavar="SECONDS", help="between looks at the logs [5]")
    parser.add_argument("--once", action="store_true", help="converts what there is and ends")
    parser.add_argument("--wandb", action="store_true", help="to Weights & Biases, not to TensorBoard")
    parser.add_argument("--project", default="keel", help="of W&B [keel]")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        watch(parse_arguments())
    except ImportError as error:
        fail(f"{error}, in {sys.executable}: pip install tensorboard matplotlib (for --wandb: wandb matplotlib)")
    except OSError as error:
        fail(f"{error.filename or 'event file'}: could not be written or read ({error.strerror})")
