#!/usr/bin/env python3
"""Shows runs in TensorBoard or Weights & Biases while they train; the trainers know nothing of it.

    python3 dev/watch.py out/a out/b &              follows the runs' logs until it is interrupted
    tensorboard --logdir out                        shows them
    python3 dev/watch.py --wandb out/a              the same to W&B; WANDB_MODE=offline keeps it here

Every column of log.csv is a scalar, log/loss for example. Under depth/ are, from hops.csv, the accuracy at each number
of lookups and, from probe.csv (--probe), the decades by which the gradient shrinks from the last sub-layer down to
sub-layer 2 (KEEL's highway begins there), and pictures of gradients, gains and branches over depth.

A run that is resumed loses its rows after the checkpoint and writes others. TensorBoard is then told to forget what
came after it. W&B keeps all that it was ever sent: there the rows that changed come again, with their steps.
watch_tensorboard.json or watch_wandb.json says what was sent, so that another start goes on from there.
"""

import argparse
import array
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
import zlib
from pathlib import Path

CHUNK = 1 << 22  # bytes of a log read at a time
KEPT_STEPS = 512  # of a run's probed steps, for its pictures: more than they have columns to show them
DEPTH = ["rms_f", "rms_z", "shortcut_gain_to_top", "dx_norm", "grad_norm"]
LOGS = {"log.csv": ["loss"], "hops.csv": ["hops", "accuracy"], "probe.csv": ["sublayer", *DEPTH]}  # columns needed
PICTURES = {  # tag: title, value of columns
    "depth/dx_norm": ("gradient on the highway, ||dL/dx||", lambda p: p["dx_norm"]),
    "depth/grad_norm": ("gradient of the sub-layer's weights, its norm", lambda p: p["grad_norm"]),
    "depth/shortcut_gain_to_top": ("gain of the shortcut from here to the top", lambda p: p["shortcut_gain_to_top"]),
    "depth/branch_share": ("what the sub-layer adds, rms(F) / rms(z)", lambda p: p["rms_f"] / p["rms_z"])}


class WatchError(Exception):
    """What was expected, what was found and what to do, in one line for the user."""


class Log:
    """Follows one csv file: rows are added at its end, and a resume replaces it by another file."""

    def __init__(self, path):
        self.path, self.file, self.marks = path, None, []

    def open(self, marks=()):
        """From the start. marks: how far it was sent, [[bytes, their CRC-32, step], ...]; those that hold stay."""
        try:
            self.file = open(self.path, "rb", buffering=0)
        except FileNotFoundError:
            return
        self.columns, self.rest, self.end, self.crc, self.step = [], b"", 0, 0, 0
        self.marks, crc, at = [], 0, 0
        for mark in marks:
            while at < mark[0] and (block := self.file.read(min(CHUNK, mark[0] - at))):
                crc, at = zlib.crc32(block, crc), at + len(block)
            if [at, crc] != mark[:2]:
                break
            self.marks.append(mark)
        self.sent_end, _, self.sent_step = self.marks[-1] if self.marks else (0, 0, 0)
        self.file.seek(0)

    def mark(self):
        """What has been read up to here was taken. The older marks are, the farther apart they stand."""
        if self.end > (self.marks[-1][0] if self.marks else 0):
            self.marks.append([self.end, self.crc, self.step])
            if len(self.marks) > 256:
                del self.marks[1:-1:2]

    def replaced(self):
        try:
            there, ours = os.stat(self.path), os.fstat(self.file.fileno())
            return not os.path.samestat(there, ours) or there.st_size < self.file.tell()
        except (FileNotFoundError, AttributeError):  # removed, or not there yet
            return False

    def header(self, line):
        self.columns = line.decode(errors="replace").rstrip("\r").split(",")
        needed = ["step", *LOGS[self.path.name]]
        if self.columns[0] != "step" or not set(needed) <= set(self.columns):
            raise WatchError(f"{self.path}: expected a run's log with the columns {','.join(needed)}, found "
                             f"{line[:60].decode(errors='replace')!r}")

    def groups(self, stop, whole=lambda step, lines: True):
        """Yields (step, lines) for the rows of each step; those at the end of the file once whole() says so.

        Like the trainer, passes over what is no whole row: a killed run leaves half a line, a crashed machine zeros.
        """
        while self.file:
            block = self.file.read(CHUNK)
            self.rest += block
            lines = self.rest.split(b"\n")
            lines.pop()  # is not complete yet
            used = 0
            if not self.columns and (lines or len(self.rest) > 4096):
                self.header(self.rest[:4096].split(b"\n")[0])
                used = len(lines.pop(0)) + 1
                self.end, self.crc = used, zlib.crc32(self.rest[:used])
            by_step = itertools.groupby(lines, lambda line: line.partition(b",")[0])
            steps = [(step, list(rows)) for step, rows in by_step]
            for i, (step, rows) in enumerate(steps):
                good = step.isdigit() and int(step) >= self.step
                if good and i + 1 == len(steps) and not whole(int(step), rows):
                    break
                size = sum(map(len, rows)) + len(rows)
                self.end, self.crc = self.end + size, zlib.crc32(self.rest[used:used + size], self.crc)
                used += size
                if good:
                    self.step = int(step)
                    yield self.step, rows
                    self.mark()
            self.rest = self.rest[used:]
            if not block or stop.is_set():
                return

    def numbers(self, line):
        """{column: number} of a row, without empty cells and words; {} where it is not whole."""
        cells = line.rstrip(b"\r").split(b",")
        found = {}
        for name, cell in zip(self.columns[1:], cells[1:] if len(cells) == len(self.columns) else []):
            try:
                found[name] = float(cell)
            except ValueError:
                pass
        return found


class Depth:
    """What the pictures show of probe.csv: at most KEPT_STEPS probed steps, evenly spread, and the newest."""

    def __init__(self):
        self.steps, self.values, self.newest = [], [], (0, [])
        self.layers, self.count, self.every = 0, 0, 1
        self.undrawn, self.drawn_count, self.drawn_at = False, 0, -math.inf

    def add(self, log, step, lines):
        """Notes the rows of a step. Returns scalars."""
        if len(lines) > self.layers:
            self.__init__()
            self.layers = len(lines)
        low = min(2, self.layers - 1)
        first, last = log.numbers(lines[min(low, len(lines) - 1)]), log.numbers(lines[-1])
        if (first.get("sublayer"), last.get("sublayer")) != (low, self.layers - 1):
            return {}  # rows were lost
        if self.count and (self.count - 1) % self.every == 0:
            self.keep(log)
        self.newest, self.count = (step, lines), self.count + 1
        ratio = first.get("dx_norm", math.nan) / (last.get("dx_norm") or math.nan)
        return {f"depth/log10_dx_norm_{low}_over_last": math.log10(ratio)} if ratio > 0 else {}

    def keep(self, log):
        step, lines = self.newest
        rows = [log.numbers(line) for line in lines]
        self.steps.append(step)
        self.values.append({name: array.array("d", (row.get(name, math.nan) for row in rows)) for name in DEPTH})
        if len(self.steps) > KEPT_STEPS:
            self.steps, self.values, self.every = self.steps[::2], self.values[::2], 2 * self.every

    def due(self):
        """A picture that is 5 % wider, or a quarter of an hour old; drawing takes time from the training."""
        age = time.monotonic() - self.drawn_at
        return self.undrawn and age > 30 and (self.count >= 1.05 * self.drawn_count or age > 900)

    def draw(self, log, run):
        """Yields (tag, PNG)."""
        import numpy as np
        self.undrawn, self.drawn_count, self.drawn_at = False, self.count, time.monotonic()
        kept = list(self.steps), list(self.values), self.every
        self.keep(log)
        steps, probed = np.array(self.steps), self.values
        self.steps, self.values, self.every = kept
        for tag, (title, value) in PICTURES.items():
            with np.errstate(all="ignore"):
                values = np.array([value({name: np.array(row) for name, row in p.items()}) for p in probed])
            values = np.where(np.isfinite(values) & (values > 0), values, np.nan)
            if np.isfinite(values).any():
                yield tag, picture(np, f"{run}: {title}", steps, values)


def picture(np, title, steps, values):
    """values (steps, layers) as colours over steps and sub-layers, and some steps as curves over the sub-layers."""
    from matplotlib import colormaps, colors, figure
    layers = values.shape[1]
    low, high = np.nanpercentile(values, [1, 99])
    if high < 10 * low:  # what differs little is to look like that
        low, high = (low * high) ** 0.5 / 10 ** 0.5, (low * high) ** 0.5 * 10 ** 0.5
    width = (steps[-1] - steps[0]) / max(1, len(steps) - 1) or 1  # of a step's column, where they are even
    left, right = steps[0] - width / 2, steps[-1] + width / 2
    nearest = np.abs(np.linspace(left, right, 1001)[:, None] - steps).argmin(1)
    fig = figure.Figure(figsize=(7.6, 4), dpi=125, layout="constrained")
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
    curves.set(xscale="log", xlabel="attention, dashed feed-forward",
               xlim=(min(low, np.nanmin(values[shown])) / 1.2, max(high, np.nanmax(values[shown])) * 1.2))
    curves.xaxis.label.set_size(8)
    curves.grid(color="0.9")
    curves.legend(fontsize=8, frameon=False)
    fig.suptitle(title, fontsize=11)
    png = io.BytesIO()
    fig.savefig(png, format="png")
    return png.getvalue()


class Sink:
    """Where a run's numbers go, and a file of what was sent there: the logs' marks, and what else it has to know."""

    def __init__(self, folder, run):
        kind = type(self).__name__.lower()
        self.folder, self.path = folder, folder / f"watch_{kind}.json"
        try:
            self.sent = json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):  # none, or torn by a crash
            self.sent = {"run": os.path.relpath(run, folder), "marks": {}}
        if self.sent["run"] != os.path.relpath(run, folder):
            raise WatchError(f"{self.path}: expected what was sent of {run}, found that of {self.sent['run']}; "
                             "give another --logdir")

    def marks(self, name):
        return self.sent["marks"].get(name, [])

    def save(self, marks):
        if marks != self.sent["marks"]:
            self.sent["marks"] = json.loads(json.dumps(marks))
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.sent) + "\n")
            os.replace(temporary, self.path)


class TensorBoard(Sink):
    def __init__(self, folder, run):
        super().__init__(folder, run)
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter
        self.Event, self.SessionLog, self.Summary = event_pb2.Event, event_pb2.SessionLog, summary_pb2.Summary
        self.pending = io.BytesIO()
        self.records = RecordWriter(self.pending)
        # A file of its own, for the last one may end in half a record: TensorBoard reads them in the order of names.
        old = sorted(path.name for path in folder.glob("events.out.tfevents.*.keel"))
        if not old:
            self.sent["marks"] = {}
        stamp = max(int(time.time()), int(old[-1].split(".")[3]) + 1 if old else 0)
        self.file = open(folder / f"events.out.tfevents.{stamp:010d}.keel", "wb", buffering=0)
        self.write(0, time.time(), file_version="brain.Event:2")
        if not old:  # of the first START TensorBoard takes no notice
            self.write(0, time.time(), session_log=self.SessionLog(status=self.SessionLog.START))

    def restart(self, logs):
        """Has TensorBoard forget all from the first step on that is not, in all logs, as it was sent."""
        self.since = min((log.sent_step for log in logs if log.file), default=-1) + 1
        self.write(self.since, time.time(), session_log=self.SessionLog(status=self.SessionLog.START))

    def wants(self, log):
        return log.step >= self.since

    def write(self, step, wall, **what):
        self.records.write(self.Event(step=step, wall_time=wall, **what).SerializeToString())

    def scalars(self, step, wall, values):
        values = [self.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self.write(step, wall, summary=self.Summary(value=values))
        if self.pending.tell() > CHUNK:
            self.flush(self.sent["marks"])

    def image(self, step, wall, tag, png):
        shape = {"width": int.from_bytes(png[16:20], "big"), "height": int.from_bytes(png[20:24], "big")}
        image = self.Summary.Image(encoded_image_string=png, colorspace=3, **shape)
        self.write(step, wall, summary=self.Summary(value=[self.Summary.Value(tag=tag, image=image)]))

    def flush(self, marks):
        data = memoryview(self.pending.getvalue())
        while data:
            data = data[self.file.write(data):]
        self.pending.seek(0), self.pending.truncate()
        self.save(marks)

    def close(self):
        self.file.close()


class WandB(Sink):
    def __init__(self, folder, run, name, project):
        super().__init__(folder, run)
        import wandb
        self.wandb = wandb
        number = self.sent.setdefault("id", secrets.token_hex(4))
        try:
            self.run = wandb.init(project=project, id=number, name=name, dir=folder, resume="allow",
                                  reinit="create_new", settings=wandb.Settings(console="off"))
        except wandb.Error as error:
            raise WatchError(f"W&B: {str(error).splitlines()[0]} (WANDB_MODE=offline needs no account)") from None
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")  # W&B's own step never goes back

    def restart(self, logs):
        pass

    def wants(self, log):
        return log.end > log.sent_end

    def scalars(self, step, wall, values):
        self.run.log({"step": step, **values})

    def image(self, step, wall, tag, png):
        from PIL import Image
        self.run.log({"step": step, tag: self.wandb.Image(Image.open(io.BytesIO(png)))})

    def flush(self, marks):
        self.save(marks)

    def close(self):
        self.run.finish()


class Run:
    """Takes what is new in a run's logs to its sink."""

    def __init__(self, folder, name, sink, pictures):
        self.folder, self.name, self.sink, self.pictures = folder, name, sink, pictures
        self.logs = {name: Log(folder / name) for name in LOGS}
        self.restart()

    def restart(self):
        """All logs from their start."""
        self.depth, self.walls, self.wall = Depth(), {}, None
        for name, log in self.logs.items():
            log.open(self.sink.marks(name))
        self.sink.restart(self.logs.values())

    def poll(self, stop, last=False):
        if any(log.replaced() for log in self.logs.values()):
            self.restart()
        for log in self.logs.values():
            if not log.file:
                log.open()
        log, hops, probe = self.logs.values()
        if log.file and self.wall is None:
            # Steps follow each other without the pauses between them, and the newest row is of now.
            times = Log(log.path)
            times.open()
            taken = sum(times.numbers(rows[0]).get("ms", 0) for _, rows in times.groups(stop))
            self.wall = os.stat(log.path).st_mtime - taken / 1000
        for step, rows in log.groups(stop):
            values = log.numbers(rows[0])
            self.wall += values.get("ms", 0) / 1000
            self.walls[step] = self.wall
            self.scalars(log, step, {f"log/{column}": value for column, value in values.items()})
        for step, rows in hops.groups(stop):
            found = [row for row in map(hops.numbers, rows) if len(row) > 1]
            self.scalars(hops, step, {f"depth/hops_{row['hops']:.0f}": row["accuracy"] for row in found})
        # The row in log.csv is written when those in probe.csv are.
        for step, rows in probe.groups(stop, lambda step, rows: step <= log.step):
            self.scalars(probe, step, self.depth.add(probe, step, rows))
            self.depth.undrawn |= self.pictures and self.sink.wants(probe)
        if self.depth.count and (self.depth.due() or last and self.depth.undrawn):
            for tag, png in self.depth.draw(probe, self.name):
                self.sink.image(probe.step, self.walls.get(probe.step, time.time()), tag, png)
        self.sink.flush({name: log.marks for name, log in self.logs.items()})

    def scalars(self, log, step, values):
        if values and self.sink.wants(log):
            self.sink.scalars(step, self.walls.get(step, time.time()), values)


def distinct_names(folders):
    """Of each folder as many of its last parts as tell it from the others."""
    for count in itertools.count(1):
        names = ["/".join(folder.parts[-count:]).strip("/") for folder in folders]
        if len(set(names)) == len(folders):
            return names


def importable(module):
    try:
        __import__(module)
        return True
    except ImportError:
        return False


def watch(arguments):
    stop = threading.Event()
    folders = list(dict.fromkeys(Path(out).resolve() for out in arguments.out))
    for folder in folders:
        if not folder.is_dir():
            raise WatchError(f"{folder}: expected a run's folder, found {'a file' if folder.exists() else 'none'}")
        if arguments.once and not (folder / "log.csv").exists():
            raise WatchError(f"{folder}: expected a run's log.csv, found none")
        for log in (Log(folder / name) for name in LOGS):
            log.open()
            next(log.groups(stop), None)  # its header is checked
    needed = "wandb" if arguments.wandb else "tensorboard"
    if not importable(needed):
        raise WatchError(f"expected {needed} in {sys.executable}, found none: pip install {needed} matplotlib")
    pictures = importable("matplotlib.figure") and (not arguments.wandb or importable("PIL"))
    if not pictures:
        print("note: no pictures of the depth without matplotlib: pip install matplotlib", flush=True)

    names, logdir = distinct_names(folders), arguments.logdir and Path(arguments.logdir).resolve()
    places = [logdir / name if logdir else folder for folder, name in zip(folders, names)]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        if not os.access(place, os.W_OK | os.X_OK):
            raise WatchError(f"{place}: expected a folder that can be written, found one that cannot; give a --logdir")
    if arguments.wandb:
        sinks = [WandB(*which, arguments.project) for which in zip(places, folders, names)]
    else:
        sinks = [TensorBoard(*which) for which in zip(places, folders)]
        print(f"tensorboard --logdir {logdir or os.path.commonpath(folders)}", flush=True)

    def end(number, frame):
        signal.signal(number, signal.SIG_DFL)  # a second signal ends it at once
        stop.set()

    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, end)
    runs = [Run(*which, pictures) for which in zip(folders, names, sinks)]
    while not stop.is_set() and not arguments.once:
        for run in runs:
            run.poll(stop)
        stop.wait(arguments.every)
    for run in runs:
        run.poll(stop, last=True)
        run.sink.close()


def seconds(text):
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="+", metavar="OUT", help="the folder of a run, the trainer's -o")
    parser.add_argument("--logdir", metavar="DIR", help="the files go to DIR/RUN [the run's own folder]")
    parser.add_argument("--every", type=seconds, default=5, metavar="SECONDS", help="between looks at the logs [5]")
    parser.add_argument("--once", action="store_true", help="converts what there is and ends")
    parser.add_argument("--wandb", action="store_true", help="to Weights & Biases, not to TensorBoard")
    parser.add_argument("--project", default="keel", help="of W&B [keel]")
    try:
        watch(parser.parse_args())
    except WatchError as error:
        sys.exit(f"watch.py: {error}")
    except OSError as error:
        sys.exit(f"watch.py: {error.filename or 'event file'}: could not be written or read ({error.strerror})")


if __name__ == "__main__":
    main()
