"""What every experiment shares: runs that are never repeated, tables, the colour of each placement, figures.

An experiment is a module with
    SIZES             its settings for each size: tiny (the tests), small (a laptop, the lesson), gpu (the paper's depths)
    runs(c)           yields [Run], a stage after the other: every process that it needs
    collect(c)        writes its tables, from the folders of its runs
    draw(c)           writes its figure, from its tables alone
c, a Context, holds the settings and knows the folders.
"""

import csv
import importlib.util
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "dev"), str(ROOT / "dev" / "reference")]
SEED = 1337  # the trainers' default

# A colour for each placement, in every figure and on the lesson's page; readable on white and on near-black, and told apart
# by the colour-blind through their lightness. The four attempts of the road have KEEL's hue, from pale to full.
COLOURS = {"keel": "#1283b0", "pre": "#dd8f22", "post": "#cf3f3b", "deepnorm": "#5f9a3c", "mixln": "#8768c0", "hybridnorm": "#c76ba0", "scaledpost": "#8c7a5e",
           "attempt1": "#8c7a5e", "attempt2": "#cf3f3b", "attempt3": "#5f9a3c", "final": "#1283b0", "trainer": "#16384a"}
LABELS = {"keel": "KEEL", "pre": "Pre-LN", "post": "Post-LN", "deepnorm": "DeepNorm", "mixln": "Mix-LN", "hybridnorm": "HybridNorm", "scaledpost": "Scaled Post-LN"}
NORMS = list(LABELS)


class Failure(Exception):
    """What a user can mend, in one line."""


# ---------------------------------------------------------------------------------------------------------
# Settings and folders

@dataclass
class Context:
    size: str
    settings: SimpleNamespace
    runs: Path      # a folder for each run
    results: Path   # tables and figures
    binary: str     # the trainer
    data: str       # path or glob of the text
    jobs: int       # runs at a time
    threads: int    # of each
    every: dict = field(default_factory=dict)  # the settings of the other experiments, whose runs may be shared
    listing: bool = False  # only the commands are wanted, as if nothing had been run

    def of(self, experiment):
        return replace(self, settings=self.every[experiment])


def seeds(s):
    return [SEED + i for i in range(s.seeds)]


# ---------------------------------------------------------------------------------------------------------
# Runs

@dataclass
class Run:
    name: str                   # its folder, under the context's runs
    command: list               # all but -o and -y, where it resumes
    steps: int = 0              # that log.csv has at the end; 0: the command has no log and is whole when it exits with 0
    cost: float = 1.0           # of the whole run, in any one unit: for the time left
    seed: int = SEED
    keep_model: bool = False    # the last checkpoint's model stays
    may_diverge: bool = False   # a diverged end is a result
    resumes: bool = True        # takes -o and -y


def flops(L, C, T, tokens, steps, V=256):
    """Operations of a run (keel_common.h's flops_per_token), as its cost in GFLOP."""
    return (6 * (12 * C * C * L / 2 + V * C) + 6 * C * T * L / 2) * tokens * steps * 1e-9


def training(c, name, norm, s, lr, steps=None, warmup=None, seed=SEED, flags=(), validate=True, **more):
    """A run of the trainer with the settings' shape: L, C, H, T, B and, where they have one, total batch."""
    steps = steps or s.steps
    total = getattr(s, "d", s.T * s.B)
    shape = ["-L", s.L, "-C", s.C, "-H", s.H, "-t", s.T] + (["-b", s.B] if total == s.T * s.B else ["-d", total])
    command = [c.binary, "-i", c.data, *shape, "--norm", norm, "-l", f"{lr:g}", "-u", s.warmup if warmup is None else warmup, "-x", steps,
               "--seed", seed, "-v", steps if validate else 0, "-n", max(1, math.ceil(steps / 4)), "--keep", 1, "-s", 0, *flags]
    if "--train" in flags:  # other data than text
        at = command.index("-i")
        del command[at:at + 2]
    return Run(name, [str(word) for word in command], steps, flops(s.L, s.C, s.T, total, steps), seed, **more)


def record_path(c, run):
    return c.runs / (run.name + ".json")


def need_torch(experiment):
    """An experiment in PyTorch runs in the driver's own Python."""
    if not importlib.util.find_spec("torch"):
        raise Failure(f"{experiment}: expected PyTorch in {sys.executable}, found none; use a Python that has it, Debian's python3-torch for example")


def read_record(c, run):
    try:
        return json.loads(record_path(c, run).read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # torn by a crash: as if it had not been
        return {}


def write_record(c, run, record):
    path = record_path(c, run)
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)


def finished(c, run):
    """Whether the run is done, with this very command."""
    record = {} if c.listing else read_record(c, run)
    if record and record["command"] != run.command:
        raise Failure(f"{record_path(c, run)}: expected a run of\n  {shlex.join(run.command)}\nfound one of\n  {shlex.join(record['command'])}\n"
                      f"remove it and {c.runs / run.name}* to run it again, or choose another --runs folder")
    return record.get("end") in ("finished", "diverged")


def last_step(path):
    """The step of a log's last whole row, 0 where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 4096))
            lines = file.read().split(b"\n")[:-1]
        return int(lines[-1].split(b",")[0])
    except (OSError, IndexError, ValueError):
        return 0


class Pool:
    """Runs what is not finished, some at a time, with a line for each end and, on a terminal, one for what is going on."""

    def __init__(self, c, runs):
        self.c = c
        unique = {run.name: run for run in runs}  # experiments may share a run
        self.all = list(unique.values())
        self.todo = [run for run in self.all if not finished(c, run)]
        self.total = sum(run.cost for run in self.todo)
        self.done_cost = 0.0
        self.begun = {}    # name: cost that an earlier, interrupted start of the run has paid
        self.active = {}   # name: (run, process)
        self.failure = None
        self.stopping = False
        self.lock = threading.Lock()
        self.start = time.time()

    def progress(self, run):
        return run.cost * min(1.0, last_step(self.c.runs / run.name / "log.csv") / run.steps) if run.steps else 0.0

    def left(self):
        with self.lock:
            active = [run for run, _ in self.active.values()]
        paid = sum(self.progress(run) - self.begun.get(run.name, 0.0) for run in active)
        spent = self.done_cost + paid
        remaining = self.total - self.done_cost - sum(self.progress(run) for run in active)
        elapsed = time.time() - self.start
        if spent <= 0 or elapsed < 2:
            return "?"
        return duration(max(0.0, remaining) * elapsed / spent)

    def execute(self, run):
        c = self.c
        folder = c.runs / run.name
        folder.parent.mkdir(parents=True, exist_ok=True)
        record = read_record(c, run)
        command = list(run.command)
        if run.resumes:
            if "-e" in command and any(folder.glob("state_*.bin")):  # begun: it goes on from its state
                at = command.index("-e")
                del command[at:at + 2]
            command += ["-o", str(folder), *([] if "-e" in command else ["-y"])]
        environment = dict(os.environ, OMP_NUM_THREADS=str(c.threads))
        environment.setdefault("OMP_WAIT_POLICY", "passive")
        with open(f"{folder}.txt", "ab") as out, open(f"{folder}.err", "wb") as err:
            begin = time.time()
            process = subprocess.Popen(command, stdout=out, stderr=err, cwd=ROOT, env=environment, start_new_session=True)
            with self.lock:
                self.active[run.name] = (run, process)
                self.begun[run.name] = self.progress(run)
                if self.stopping:
                    process.terminate()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        message = Path(f"{folder}.err").read_text(errors="replace").strip()
        step = last_step(folder / "log.csv")
        record = {"command": run.command, "end": "interrupted", "step": step, "seed": run.seed, "message": message,
                  "cpu_seconds": round(record.get("cpu_seconds", 0) + usage.ru_utime + usage.ru_stime, 1),
                  "seconds": round(record.get("seconds", 0) + time.time() - begin, 1)}
        diverged = "(--stop-on-divergence)" in message or "(--max-skips)" in message
        if process.returncode == 0 and step >= run.steps:
            record["end"] = "finished"
        elif diverged and run.may_diverge:
            record["end"] = "diverged"
        with self.lock:
            del self.active[run.name]
            write_record(c, run, record)
            if record["end"] == "interrupted":
                if not self.stopping and not self.failure:
                    self.failure = f"{shlex.join(command)}\n{message or 'ended with status %d' % process.returncode}"
                return
            self.done_cost += run.cost - self.begun[run.name]
            self.total -= self.begun[run.name]
            remove_checkpoints(folder, run.keep_model)
        number = sum(read_record(c, r).get("end") in ("finished", "diverged") for r in self.all)
        note = f"diverged at step {step}" if record["end"] == "diverged" else f"{step} steps" if run.steps else "done"
        print("\r\033[K" if sys.stdout.isatty() else "", end="")
        print(f"{number}/{len(self.all)}  {run.name:<40} {note:<24} {record['seconds']:>7.0f} s, {record['cpu_seconds']:.0f} s of CPU; {self.left()} left", flush=True)

    def worker(self):
        while True:
            with self.lock:
                if not self.todo or self.stopping or self.failure:
                    return
                run = self.todo.pop(0)
            try:
                self.execute(run)
            except Exception as e:  # shown by whoever waits
                self.failure = self.failure or f"{run.name}: {e}"

    def stop(self):
        """Asks each run to end its step and write a checkpoint: the same command goes on from there."""
        with self.lock:
            self.stopping = True
            for _, process in self.active.values():
                process.terminate()

    def go(self):
        if len(self.todo) < len(self.all):
            print(f"{len(self.all) - len(self.todo)} of {len(self.all)} runs are there already", flush=True)
        threads = [threading.Thread(target=self.worker, daemon=True) for _ in range(self.c.jobs)]
        old = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                time.sleep(0.2)
                if sys.stdout.isatty():
                    with self.lock:
                        now = [f"{run.name} {last_step(self.c.runs / run.name / 'log.csv')}/{run.steps}" for run, _ in self.active.values()]
                    print(f"\r\033[K{'   '.join(now)}   {self.left()} left", end="", flush=True)
        except KeyboardInterrupt:
            self.stop()
            for thread in threads:
                thread.join()
            raise Failure("interrupted; what is finished stays, and the same command goes on") from None
        finally:
            signal.signal(signal.SIGTERM, old)
            if sys.stdout.isatty():
                print("\r\033[K", end="")
        if self.failure:
            self.stop()
            raise Failure(self.failure)


def remove_checkpoints(folder, keep_model):
    for path in folder.glob("state_*.bin"):
        path.unlink()
    if not keep_model:
        for path in folder.glob("model_*.bin"):
            path.unlink()


def duration(seconds):
    n = int(seconds + 0.5)
    return f"{n // 3600}h{n % 3600 // 60:02d}m" if n >= 3600 else f"{n // 60}m{n % 60:02d}s" if n >= 60 else f"{n}s"


def sweep(grid, start, score):
    """The learning rates to run: those of `start`, then the grid's next ones until the best has been tried on both sides, or is the grid's first or last.
    score(rate): lower is better, None while its runs are not finished. Called again when they are, it returns more, or the same when the sweep is at its end."""
    grid = sorted(grid)
    tried = [rate for rate in start if rate in grid] or grid[max(0, len(grid) // 2 - 1):len(grid) // 2 + 1]
    while True:
        scores = {rate: score(rate) for rate in tried}
        if None in scores.values():
            return tried
        at = grid.index(min(tried, key=lambda rate: (scores[rate], rate)))  # where all diverge, on to lower ones
        beside = [rate for rate in grid[max(0, at - 1):at + 2] if rate not in tried]
        if not beside:
            return sorted(tried)
        tried += beside


def swept(grid, start, score):
    """The rates of a sweep so far, and the best one, None until the sweep has ended."""
    scores = {rate: score(rate) for rate in sweep(grid, start, score)}
    return list(scores), None if None in scores.values() else min(scores, key=lambda rate: (scores[rate], rate))


def staged(runs_now):
    """The stages of an experiment that sweeps: what runs_now() asks for beyond what was asked for before, until that is nothing."""
    asked = set()
    while new := [run for run in runs_now() if run.name not in asked]:
        asked |= {run.name for run in new}
        yield new


# ---------------------------------------------------------------------------------------------------------
# Tables

def read_csv(path):
    """A list of rows, dicts of text."""
    try:
        with open(path, newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        raise Failure(f"{path}: expected a table, found none; run the experiment first: python3 dev/experiments/run.py {Path(path).stem.split('_')[0]}") from None


def write_csv(path, rows, columns=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".csv.tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns or list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def write_runs(c, experiment, runs):
    """EXPERIMENT_runs.csv: the command, seed and end of each run."""
    rows = []
    for run in runs:
        record = read_record(c, run)
        rows.append({"run": run.name, "seed": run.seed, "end": record["end"], "steps": record["step"], "cpu_seconds": record["cpu_seconds"],
                     "seconds": record["seconds"], "command": shlex.join(relative(word) for word in run.command)})
    write_csv(c.results / f"{experiment}_runs.csv", rows)


def relative(word):
    """Without the path of this checkout."""
    return word.replace(str(ROOT) + "/", "")


def log(c, run):
    """Columns step, loss and val_loss of a run's log, as lists; val_loss has NaN where none was measured."""
    rows = read_csv(c.runs / run.name / "log.csv")
    return ([int(r["step"]) for r in rows], [float(r["loss"] or "nan") for r in rows], [float(r["val_loss"] or "nan") for r in rows])


def diverged(c, run):
    return read_record(c, run)["end"] == "diverged"


def final_loss(c, run):
    """Of the run's last validation; infinite where the run diverged or the loss is no number."""
    if diverged(c, run):
        return math.inf
    found = [r["val_loss"] for r in read_csv(c.runs / run.name / "log.csv") if r["val_loss"]]
    if not found:
        raise Failure(f"{c.runs / run.name}: expected a validation loss in log.csv, found none")
    return float(found[-1]) if math.isfinite(float(found[-1])) else math.inf


def smooth(values, width):
    """The mean over the last `width` values up to each."""
    out, total = [], 0.0
    for i, v in enumerate(values):
        total += v - (values[i - width] if i >= width else 0.0)
        out.append(total / min(i + 1, width))
    return out


# ---------------------------------------------------------------------------------------------------------
# Figures

def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({
        "figure.dpi": 100, "savefig.dpi": 160, "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#8a9099", "axes.labelcolor": "#333a44", "axes.titlecolor": "#1d232b",
        "xtick.color": "#5a626d", "ytick.color": "#5a626d", "axes.grid": True, "grid.color": "#e4e7eb", "grid.linewidth": 0.7, "axes.axisbelow": True,
        "legend.frameon": False, "lines.linewidth": 1.8, "figure.facecolor": "white", "svg.hashsalt": "keel"})
    return plt


def save(plt, figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
