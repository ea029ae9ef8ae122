"""Whole training steps on the GPU that is here: tokens/s and MFU of train_keel beside PyTorch's, from one run (see dev/bench_gpu.sh).

For each model PyTorch's forms are tried (with a CUDA graph, torch.compile, eager; dev/bench_gpu_torch.py) and the fastest takes turns with
train_keel. Both train the same model from the same weights on the same batches, which their first loss and gradient norm prove. A figure is the
median over the turns of the median over the steps. Rates are held against a large matrix product and a copy of the same run, the step's
time against its floor (dev/predict.py, dev/doc/speed.md).

Data: the text of Python's own library, and for the large vocabulary its words, spaces and signs, each as an id below 50256 by its CRC-32:
as frequent and as rare as in text, which is what costs time, though no tokenizer's ids. Both are made in build/bench_gpu.

Rows are added to dev/results/<GPU>.csv, none is ever changed. Its columns: metric (model, a slash, what: mfu, vs_torch, first_step, memory,
floor, matrix_rate, copy_rate), value and unit of ours, peer_value of PyTorch's best or of the floor, ratio (ours over the peer's; of the floor: its
share of our step), commit, date, gpu, driver, command. An empty peer_value: there was none; "out of memory": PyTorch's best try at that model.
dev/bench_kernels.sh adds rows of the same columns.
"""

import argparse
import csv
import datetime
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import zlib
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "dev"), str(ROOT / "data")]
import predict
import shards

COLUMNS = ["metric", "value", "unit", "peer_value", "ratio", "commit", "date", "gpu", "driver", "command"]
GOALS = {"keel_L512_C1024": {"mfu": 0.50, "vs_torch": 1.25}, "pre_L24_C768": {"mfu": 0.50, "vs_torch": 1.1},
         "keel_L1024_C256": {"vs_torch": 1.4, "floor": 0.75}, "keel_L1024_C1024": {"mfu": 0.40}}
# PyTorch's forms that are tried: mode and whether blocks are computed again in the backward pass, for what fits no other way or in larger micro-batches.
FORMS = [("graphs", False), ("compile", False), ("eager", False)]
FORMS_OF = {"keel_L512_C1024": [("graphs", False), ("graphs", True), ("compile", False), ("eager", False)], "keel_L1024_C1024": [("graphs", True), ("compile", True)]}
TRIALS = 0.55  # of a model's time, after which no further form is tried
TOLERANCE = {"cuda": (1e-2, 5e-2), "cpu": (1e-4, 1e-4)}  # of the first loss and gradient norm, BF16 and FP32, relative
WARM = 3  # steps that do not count: single launches, recording, first replay
OUT_OF_MEMORY = 3  # dev/bench_gpu_torch.py's exit status


class Failed(Exception):
    """What could not be measured, and why, in one line."""


# ---------------------------------------------------------------------------------------------------------
# Processes

def nvidia_smi(query):
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else ""


class Process:
    """A program that ran: what it printed with the seconds since its start, its exit status, and how much GPU memory was in use at most, GiB."""

    def __init__(self, command, deadline):
        self.lines, self.peak, running = [], None, threading.Event()
        running.set()

        def watch_memory():
            while running.is_set():
                used = nvidia_smi("memory.used")
                if not used.isdigit():
                    return
                self.peak = max(self.peak or 0, int(used) / 1024)
                time.sleep(0.5)

        begin = time.monotonic()
        child = subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        errors = []
        threads = [threading.Thread(target=watch_memory), threading.Thread(target=lambda: errors.extend(child.stderr))]
        stop = threading.Timer(max(1, deadline - begin), lambda: os.killpg(child.pid, signal.SIGKILL))  # PyTorch's compiler has processes of its own
        for thread in threads + [stop]:
            thread.start()
        for line in child.stdout:
            self.lines.append((time.monotonic() - begin, line.rstrip("\n")))
        self.status = child.wait()
        self.timed_out = not stop.is_alive()
        stop.cancel(), running.clear()
        for thread in threads:
            thread.join()
        self.error = "its time was up" if self.timed_out else errors[-1].strip() if errors else f"exit status {self.status}"

    def find(self, pattern):
        """(seconds, match) of the first line that has the pattern."""
        for seconds, line in self.lines:
            if match := re.search(pattern, line):
                return seconds, match
        raise Failed(f"expected a line with {pattern!r}, found none; the last: {self.lines[-1][1] if self.lines else 'nothing'}")


class Turn:
    """What one run of either side gave: milliseconds of its counted steps, first loss and gradient norm, seconds to the end of step 1, memory."""

    def __init__(self, ms, loss, norm, first_step, memory):
        self.ms, self.loss, self.norm, self.first_step, self.memory = median(ms[WARM:]), loss, norm, first_step, memory


def flags(row, steps):
    return ["-i", data_file(row.V), "--norm", row.norm, "-L", row.L, "-C", row.C, "-H", row.H, "-t", row.T, "-d", row.total_batch, "-x", steps,
            "-l", 1e-3, "-u", max(1, steps // 2), "--seed", 1337]


def keel_turn(row, steps, extra, deadline):
    """A Turn with the plan (B, recompute) and the matrix rate, operations a second, that train_keel printed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [os.environ.get("TRAINER", "./train_keel"), *flags(row, steps), *extra, "-v", 0, "-n", 0, "-s", 0, "-o", folder + "/run"]
        done = Process(command, deadline)
        if done.status:
            raise Failed(f"train_keel: {done.error}")
        with open(folder + "/run/log.csv", newline="") as file:
            log = list(csv.DictReader(file))
    turn = Turn([float(r["ms"]) for r in log], float(log[0]["loss"]), float(log[0]["grad_norm"]), done.find(r"^step 1/")[0], done.peak)
    plan = done.find(r"^memory .*micro-batch (\d+), recompute (\w+)")[1]
    turn.plan = int(plan[1]), plan[2]
    turn.matrix_rate = float(done.find(r"^machine .* (\d+) GFLOP/s in matrix products")[1][1]) * 1e9
    return turn


def torch_turn(python, row, steps, form, B, device, deadline):
    """A Turn with the micro-batch; B None: the largest that fits. None where none does."""
    mode, checkpoint = form
    command = [python, "dev/bench_gpu_torch.py", *flags(row, steps), "--mode", mode, "--device", device]
    done = Process(command + ["--checkpoint"] * checkpoint + (["-b", B] if B else []), deadline)
    if done.status == OUT_OF_MEMORY:
        return None
    if done.status:
        raise Failed(done.error)
    steps_done = [re.match(r"step \d+ loss (\S+) norm (\S+) ms (\S+)", line) for _, line in done.lines]
    steps_done = [[float(x) for x in m.groups()] for m in steps_done if m]
    in_vain = max((seconds for seconds, line in done.lines if "does not fit" in line), default=0)  # larger micro-batches
    turn = Turn([ms for _, _, ms in steps_done], *steps_done[0][:2], done.find("^step 1 ")[0] - in_vain, done.peak)
    turn.B = int(done.find(r"^batch (\d+), ready")[1][1])
    return turn


# ---------------------------------------------------------------------------------------------------------
# Data

def data_file(V):
    """Python's library as text, or its pieces as a shard; made where it is not there."""
    folder = ROOT / "build" / "bench_gpu"
    text, shard = folder / "text.txt", folder / "pieces_train_000001.bin"
    folder.mkdir(parents=True, exist_ok=True)
    if not text.exists():
        sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        shards.write_whole(str(text), b"".join(path.read_bytes() for path in sources))
    if V == 256:
        return text
    if not shard.exists():
        pieces = re.findall(rb"\w+|\s+|[^\w\s]", text.read_bytes())
        tokens = shards.array.array("H", (zlib.crc32(piece) % 50256 for piece in pieces))
        shards.write_whole(str(shard), shards.header_bytes(len(tokens)) + shards.little_endian(tokens).tobytes())
    return shard


# ---------------------------------------------------------------------------------------------------------
# A model's row

def check_agreement(ours, theirs, tolerance):
    for what, a, b, most in (("loss", ours.loss, theirs.loss, tolerance[0]), ("gradient norm", ours.norm, theirs.norm, tolerance[1])):
        if not abs(a - b) <= most * abs(b):
            raise Failed(f"THE MODELS DIFFER: the first {what} is {a:.6g} and PyTorch's is {b:.6g}, expected them within {most:g}: no figure is kept")


def middle(turns, name):
    values = [getattr(turn, name) for turn in turns if getattr(turn, name) is not None]
    return median(values) if values else None


class Result:
    """The figures of one model."""

    def __init__(self, name, row, ours, theirs, form, rates, out_of_memory):
        self.name, self.row, self.form, self.out_of_memory = name, row, form, out_of_memory
        self.matrix_rate, self.plan = middle(ours, "matrix_rate"), ours[0].plan
        self.operations = predict.counted_operations(row.L, row.C, row.V, row.T)
        self.ms, self.their_ms = middle(ours, "ms"), middle(theirs, "ms") if theirs else None
        self.ours, self.theirs = ours, theirs
        self.floor = self.predicted = None
        self.their_matrix_rate, self.copy_rate = rates
        if self.copy_rate:
            seconds = predict.step_seconds(row.L, row.C, row.V, row.T, row.total_batch, *self.plan, self.matrix_rate, self.copy_rate)
            self.floor, self.predicted = (1e3 * s for s in seconds)

    def rate(self, ms):
        return self.row.total_batch / ms * 1e3

    def mfu(self, ms):
        return self.operations * self.rate(ms) / self.matrix_rate

    def metrics(self):
        """(what, value, unit, the peer's value or None, ratio or None)"""
        theirs = self.their_ms
        out = [("mfu", 100 * self.mfu(self.ms), "%", 100 * self.mfu(theirs) if theirs else None),
               ("vs_torch", self.rate(self.ms), "tokens/s", self.rate(theirs) if theirs else None)]
        for what, unit in (("first_step", "s"), ("memory", "GiB")):
            if (value := middle(self.ours, what)) is not None:
                out.append((what, value, unit, middle(self.theirs, what) if theirs else None))
        out.append(("matrix_rate", self.matrix_rate / 1e12, "TFLOP/s", self.their_matrix_rate / 1e12 if self.their_matrix_rate else None))
        if self.copy_rate:
            out.append(("copy_rate", self.copy_rate / 1e9, "GB/s", None))
        out = [(what, value, unit, peer, value / peer if peer else None) for what, value, unit, peer in out]
        if self.floor:
            out.append(("floor", self.ms, "ms", self.floor, self.floor / self.ms))
        return out

    def print(self):
        goals = GOALS.get(self.name, {})
        said = lambda what, value: f"  goal {goals[what]:g}, {'met' if value >= goals[what] else 'missed'}" if what in goals else ""
        print(f"\n{self.name}: {self.row.total_batch} tokens a step, micro-batch {self.plan[0]}, recompute {self.plan[1]}")
        print(f"  {'':26}{'train_keel':>12}{'PyTorch':>12}{'ratio':>8}")
        for what, value, unit, peer, ratio in self.metrics():
            label = {"mfu": "MFU", "vs_torch": "tokens/s", "first_step": "process start to step 1, s", "memory": "memory in use, GiB",
                     "matrix_rate": "matrix product, TFLOP/s", "copy_rate": "copy, GB/s"}.get(what)
            goal = said(what, value / 100 if what == "mfu" else ratio or 0)
            if what == "floor":
                print(f"  {'a step, ms':26}{value:12.1f}{'':12}{ratio:8.2f}  of it the floor of {peer:.1f} ms (predicted {self.predicted:.1f} ms){goal}")
            else:
                print(f"  {label:26}{value:12.1f}" + (f"{peer:12.1f}{ratio:8.2f}" if peer else f"{'-':>12}{'':8}") + goal)
        if self.out_of_memory:
            print("  PyTorch: out of memory at its best try")
        if self.form:
            print(f"  PyTorch's best: {form_text(self.form)}, micro-batch {self.theirs[0].B}")


def form_text(form):
    return form[0] + (", blocks computed again" if form[1] else "")


def best_of_torch(name, row, a, deadline):
    """(form, its Turn) of PyTorch's fastest form, or (None, None); and whether memory was short for one. A short run of each."""
    begin, best, short = time.monotonic(), (None, None), False
    for form in FORMS_OF.get(name, FORMS):
        if form[0] not in a.modes.split(",") or (a.quick and form[0] == "eager"):
            continue
        said = f"  PyTorch {form_text(form)}: "
        if time.monotonic() - begin > TRIALS * (deadline - begin):
            print(said + "not tried, for want of time", flush=True)
            continue
        try:
            turn = torch_turn(a.torch_python, row, a.steps if a.repeats == 1 else WARM + 2, form, None, a.device, deadline)
        except Failed as why:
            print(said + f"NOT MEASURED: {why}", flush=True)
            continue
        print(said + (f"{turn.ms:.1f} ms a step, micro-batch {turn.B}, first step after {turn.first_step:.1f} s" if turn else "out of memory"),
              flush=True)
        short = short or turn is None
        if turn and (best[1] is None or turn.ms < best[1].ms):
            best = form, turn
    return *best, short


def measure(name, row, a, deadline, rates):
    """A Result. train_keel once, then PyTorch's forms, then the best of them and train_keel in turns."""
    ours, theirs, form, trial, short = [], [], None, None, False
    for turn in range(a.repeats):
        if ours and time.monotonic() > deadline:
            print(f"  the time is up after {turn} of {a.repeats} turns", flush=True)
            break
        try:
            ours.append(keel_turn(row, a.steps, shlex.split(a.keel_flags), deadline))
            print(f"  train_keel: {ours[-1].ms:.1f} ms a step, first step after {ours[-1].first_step:.1f} s", flush=True)
            if turn == 0 and a.torch_python:
                form, trial, short = best_of_torch(name, row, a, deadline)
            if trial:
                check_agreement(ours[-1], trial, TOLERANCE[a.device])
                if a.repeats > 1 and (again := torch_turn(a.torch_python, row, a.steps, form, trial.B, a.device, deadline)):
                    theirs.append(again)
        except Failed as why:
            if not ours or "DIFFER" in str(why):
                raise
            print(f"  turn {turn + 1} of {a.repeats} failed: {why}", flush=True)
            break
    if trial and not theirs:
        theirs = [trial]
    return Result(name, row, ours, theirs, form, rates, short and not trial)


def append_rows(path, result, about):
    fresh = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(COLUMNS)
        for what, value, unit, peer, ratio in result.metrics():
            peer_text = f"{peer:.2f}" if peer else "out of memory" if result.out_of_memory and what in ("mfu", "vs_torch", "first_step", "memory") else ""
            writer.writerow([f"{result.name}/{what}", f"{value:.2f}", unit, peer_text, f"{ratio:.3f}" if ratio else "", *about])


def check_header(path):
    if path.exists() and (found := path.read_text().split("\n", 1)[0]) != ",".join(COLUMNS):
        raise Failed(f"{path}: expected the columns {','.join(COLUMNS)}, found {found[:80]!r}; give another --csv")


def yardsticks(python, deadline):
    """Operations a second of PyTorch's large product and bytes a second of a copy."""
    done = Process([python, "dev/bench_gpu_torch.py", "--yardsticks"], deadline)
    if done.status:
        raise Failed(done.error)
    return tuple(float(done.find(rf"^{name} (\S+)")[1][1]) for name in ("matrix_rate", "copy_rate"))


def first_line(command):
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, IndexError):
        return "unknown"


def main(arguments, rows=predict.ROWS):
    parser = argparse.ArgumentParser(prog="dev/bench_gpu.sh", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--rows", default=",".join(rows), metavar="NAME,...", help="models [%(default)s]")
    add("--quick", action="store_true", help="one turn of 6 steps, without PyTorch's eager form")
    add("--repeats", type=int, default=3, help="turns each [%(default)s]")
    add("--steps", type=int, default=10, help=f"steps a turn, of which the first {WARM} do not count [%(default)s]")
    add("--modes", default="graphs,compile,eager", help="PyTorch's forms to try [%(default)s]")
    add("--keel-flags", default="", metavar="FLAGS", help="further flags of train_keel, such as '--tune FILE'")
    add("--minutes", type=float, default=9.5, help="when they are over no further turn begins and the one that runs is ended [%(default)s]")
    add("--csv", type=Path, help="add the figures to this file")
    add("--torch-python", default="", help="a Python with PyTorch and CUDA")
    add("--device", default="cuda", choices=["cuda", "cpu"], help="of PyTorch [%(default)s]")
    a = parser.parse_args(arguments)
    if a.quick:
        a.repeats, a.steps = 1, 6
    unknown = [name for name in a.rows.split(",") if name not in rows]
    if unknown:
        raise Failed(f"--rows: expected some of {', '.join(rows)}, found {unknown[0]}")
    if a.steps <= WARM or a.repeats < 1:
        raise Failed(f"expected --steps of more than {WARM} and --repeats of 1 or more, found {a.steps} and {a.repeats}")
    if a.csv:
        check_header(a.csv)

    deadline = time.monotonic() + 60 * a.minutes
    gpu, driver, commit = nvidia_smi("name") or "none", nvidia_smi("driver_version"), first_line(["git", "describe", "--always", "--dirty"])
    now = datetime.datetime.now(datetime.timezone.utc)
    said = ["--quick"] if a.quick else ["--repeats", str(a.repeats), "--steps", str(a.steps)]
    for flag, value in (("--modes", a.modes), ("--keel-flags", a.keel_flags)):
        if value != parser.get_default(flag[2:].replace("-", "_")):
            said += [flag, shlex.quote(value)]
    command = " ".join(["dev/bench_gpu.sh", "--rows", a.rows, *said])
    print(f"date       {now:%Y-%m-%d %H:%M} UTC, commit {commit}\nGPU        {gpu}, driver {driver}\ncommand    {command}")
    rates = None, None
    if not a.torch_python:
        print("PyTorch    NOT MEASURED: no Python with PyTorch 2 and CUDA found; set PYTHON")
    elif a.device == "cuda":
        try:
            rates = yardsticks(a.torch_python, deadline)
            version = first_line([a.torch_python, "-c", "import torch; print(torch.__version__)"])
            print(f"PyTorch    {version}; its matrix product {rates[0] / 1e12:.1f} TFLOP/s, its copy {rates[1] / 1e9:.0f} GB/s")
        except Failed as why:
            print(f"PyTorch    its yardsticks: NOT MEASURED: {why}")
    sys.stdout.flush()

    failed = False
    names = a.rows.split(",")
    for i, name in enumerate(names):
        if time.monotonic() > deadline:
            print(f"\n{name}: NOT MEASURED: the {a.minutes:g} minutes are over; give --rows {name} or more --minutes")
            failed = True
            continue
        print(f"\n{name}", flush=True)
        try:
            share = (deadline - time.monotonic()) / (len(names) - i)  # of the time that is left
            result = measure(name, rows[name], a, time.monotonic() + share, rates)
        except Failed as why:
            print(f"{name}: NOT MEASURED: {why}", flush=True)
            failed = True
            continue
        result.print()
        if a.csv:
            append_rows(a.csv, result, [commit, f"{now:%Y-%m-%d}", gpu, driver, command])
    return failed


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Failed as why:
        sys.exit(f"bench_gpu: {why}")
