"""Whole training steps on the GPU that is here: tokens/s and MFU of train_keel beside PyTorch's, from one run (see
dev/bench/bench_gpu.sh).

train_keel, PyTorch (dev/bench/bench_gpu_torch.py) and, with --baseline, an older build of train_keel take turns. All train
the same model from the same weights on the same batches, which their first loss and gradient norm prove: where they
differ no figure is kept. A figure is the median over the turns of the median over the steps. Rates are held against a
large matrix product and a copy of the same run, the step's time against its floor (dev/bench/predict.py, dev/doc/speed.md),
figures against dev/bench/goals.csv.

PyTorch runs in the form of FORMS for the card's memory, or with --search, and where FORMS names none, in the quickest
of those that a short run of each finds. train_keel takes BF16 states where FP32 ones do not fit the card, and says so.

Data: the text of Python's own library, and for the large vocabulary its words, spaces and signs, each as an id below
50256 by its CRC-32: as frequent and as rare as in text, which is what costs time, though no tokenizer's ids. Both are
made in --data where they are not there.

Rows (dev/bench/results.py): metric is the model, a slash and what: mfu, vs_torch, vs_baseline, first_step, memory,
matrix_rate, copy_rate, floor. peer_value is PyTorch's, the baseline's or the floor; ratio is ours over it, of the floor
its share of our step. An empty peer_value: there was none; "out of memory": PyTorch's. They are written after each
model: to --csv as they are measured, with --keep to dev/results/<GPU>.csv too.
"""

import argparse
import contextlib
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
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "data")]
import predict
import results
import shards
from results import Failed, nvidia_smi


class Form(NamedTuple):
    """How PyTorch runs a model."""

    mode: str  # of dev/bench/bench_gpu_torch.py
    checkpoint: bool = False  # each block's forward pass again in the backward pass
    budget: float = 1  # of a block's activations, the share that is kept
    B: int = None  # sequences in a micro-batch; None: the largest that fits

    def __str__(self):
        return (self.mode + (", blocks computed again" if self.checkpoint else "") +
                (f", {self.budget:g} of the activations" if self.budget < 1 else "") +
                (f", micro-batch {self.B}" if self.B else ""))

    def flags(self):
        return ["--mode", self.mode, *["--checkpoint"] * self.checkpoint, *(["--budget", self.budget] if self.budget < 1 else []),
                *(["-b", self.B, "--or-less"] if self.B else [])]


# PyTorch's quickest form by the card's memory, {GiB at least: Form}, of an H100 (79.6) and an H200 (140). In bytes, its
# states take 16 a parameter. A compiled block keeps 38 C a token (Pre-LN: 34 C; 25 C with a budget of 0.9, 17 C of 0.5)
# and its weights in BF16, 2 a parameter.
# What PyTorch's allocator counted at most when these ran on a driver that computes nothing, of 83e9 and 148e9 bytes:
#   pre_L24_C768      64 sequences 30e9. 32, so that logits have fewer than 2^31 elements: beyond, indices take 64 bits.
#   keel_L1024_C256   8 sequences 48e9, 16 over 84e9; with 0.9 of the activations 16 take 60e9, and no product runs again.
#   keel_L512_C1024   with 0.5 of the activations 4 sequences take 77e9, 80 C^2 operations a token and block for 72;
#                     blocks computed again 16 take 72e9, 96 C^2 operations.
#   keel_L1024_C1024  104e9 of states, 2.6e9 a sequence (counted by hand): 8 take 125e9.
FORMS = {
    "pre_L24_C768": {75: Form("graphs", B=32), 135: Form("graphs", B=32)},
    "keel_L1024_C256": {75: Form("graphs", budget=0.9, B=16), 135: Form("graphs", B=16)},
    "keel_L512_C1024": {75: Form("graphs", budget=0.5, B=4), 135: Form("graphs", B=4)},
    "keel_L1024_C1024": {135: Form("graphs", True, B=8)},
}
SEARCHED = [Form("graphs"), Form("graphs", budget=0.5), Form("graphs", True), Form("compile"), Form("eager")]
TORCH_STATES = 16  # bytes a parameter: FP32 parameters, gradients and two moments
# train_keel's flags and bytes a parameter of its states, with the BF16 copy that the products read; the first that
# fits is taken.
STATES = [([], 18), (["--moments", "bf16"], 14), (["--moments", "bf16", "--grads", "bf16"], 12)]
STATES_SHARE = 0.95  # of the card's memory, that states may take
TRIALS = 0.55  # of a model's time, after which --search tries no further form
TOLERANCE = {"cuda": (1e-2, 5e-2), "cpu": (1e-4, 1e-4)}  # of the first loss and gradient norm, BF16 and FP32, relative
WARM = 3  # steps that do not count: single launches, recording, first replay
OUT_OF_MEMORY = 3  # dev/bench/bench_gpu_torch.py's exit status

# ---------------------------------------------------------------------------------------------------------
# Processes


class Process:
    """A program that ran: what it printed with the seconds since its start, its exit status, and how much GPU memory
    was in use at most, GiB. When its time is up, or ours is, it ends with all that it started: PyTorch's compiler has
    processes of its own."""

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
        # A signal that ends us waits until the program is there to be ended with us.
        take_signals = lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            child = subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=subprocess.PIPE,
                                     stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=take_signals)
        except OSError as error:
            take_signals()
            raise Failed(f"{command[0]}: {error.strerror}") from None
        errors = []

        def end_all():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)

        threads = [threading.Thread(target=watch_memory), threading.Thread(target=lambda: errors.extend(child.stderr))]
        stop = threading.Timer(max(1, deadline - begin), end_all)
        try:
            take_signals()
            for thread in threads + [stop]:
                thread.start()
            for line in child.stdout:
                self.lines.append((time.monotonic() - begin, line.rstrip("\n")))
            self.status = child.wait()
            self.timed_out = not stop.is_alive()
        finally:
            stop.cancel(), running.clear()
            end_all()
        for thread in threads:
            thread.join()
        self.error = ("its time was up"
                      if self.timed_out else errors[-1].strip() if errors else f"exit status {self.status}")

    def find(self, pattern):
        """(seconds, match) of the first line that has the pattern."""
        for seconds, line in self.lines:
            if match := re.search(pattern, line):
                return seconds, match
        raise Failed(
            f"expected a line with {pattern!r}, found none; the last: {self.lines[-1][1] if self.lines else 'nothing'}")


class Turn:
    """What one run of either side gave: milliseconds of its counted steps, first loss and gradient norm, seconds to the
    end of step 1, memory."""

    def __init__(self, ms, loss, norm, first_step, memory):
        self.ms, self.loss, self.norm, self.first_step, self.memory = median(ms[WARM:]), loss, norm, first_step, memory


def flags(row, steps, folder):
    """Of both programs."""
    model = ["--norm", row.norm, "-L", row.L, "-C", row.C, "-H", row.H, "-t", row.T, "-d", row.total_batch]
    return ["-i", data_file(row.V, folder), *model, "-x", steps, "-l", 1e-3, "-u", max(1, steps // 2), "--seed", 1337]


def keel_turn(program, row, a, extra, deadline):
    """A Turn with the plan (B, recompute) and the matrix rate, operations a second, that train_keel printed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [program, *flags(row, a.steps, a.data), *extra, "-v", 0, "-n", 0, "-s", 0, "-o", folder + "/run"]
        done = Process(command, deadline)
        if done.status:
            raise Failed(f"{Path(program).name}: {done.error}")
        log = results.read(folder + "/run/log.csv")
    turn = Turn([float(r["ms"]) for r in log], float(log[0]["loss"]), float(log[0]["grad_norm"]),
                float(done.find(r"^start-up +([\d.]+) s")[1][1]), done.peak)
    plan = done.find(r"^memory .*micro-batch (\d+), recompute (.+):$")[1]
    turn.plan = int(plan[1]), plan[2]
    turn.matrix_rate = float(done.find(r"^machine .* (\d+) GFLOP/s in matrix products")[1][1]) * 1e9
    return turn


def torch_process(row, steps, a, form, more, deadline):
    command = [a.torch_python, "dev/bench/bench_gpu_torch.py", *flags(row, steps, a.data), *form.flags()]
    return Process([*command, "--device", a.device, *more], deadline)


def torch_turn(row, a, form, steps, deadline):
    """A Turn with the micro-batch and the attention that it ran with; None where no micro-batch fits. Where the time is
    up, the steps till then."""
    done = torch_process(row, steps, a, form, [], deadline)
    if done.status == OUT_OF_MEMORY:
        return None
    steps_done = [re.match(r"step \d+ loss (\S+) norm (\S+) ms (\S+)", line) for _, line in done.lines]
    steps_done = [[float(x) for x in m.groups()] for m in steps_done if m]
    if done.status and not (done.timed_out and len(steps_done) > WARM):
        raise Failed(done.error)
    in_vain = max((seconds for seconds, line in done.lines if "does not fit" in line),
                  default=0)  # larger micro-batches
    turn = Turn([ms for _, _, ms in steps_done], *steps_done[0][:2], done.find("^step 1 ")[0] - in_vain, done.peak)
    turn.B = int(done.find(r"^batch (\d+), ready")[1][1])
    turn.attention = ([line for _, line in done.lines if line.startswith("attention ")] or [""])[-1]
    return turn


def warm(row, a, form, deadline):
    """Fills the caches of PyTorch's compiler with what the form compiles; they do not depend on the depth, but for
    alpha."""
    alpha = ["-a", row.L] if row.norm == "keel" else []
    return torch_process(row._replace(L=4), 1, a, form, [*alpha, "--warm"], deadline)


# ---------------------------------------------------------------------------------------------------------
# Data


def data_file(V, folder):
    """Python's library as text, or its pieces as a shard; made where it is not there."""
    folder = Path(folder)
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
        shards.write_whole(str(shard), shards.header_bytes(len(tokens), "H") + shards.little_endian(tokens).tobytes())
    return shard


# ---------------------------------------------------------------------------------------------------------
# A model's row


class Differ(Failed):
    """Two sides that do not train the same model: none of their figures counts."""


def check_agreement(ours, theirs, whose, tolerance):
    for what, a, b, most in (("loss", ours.loss, theirs.loss, tolerance[0]), ("gradient norm", ours.norm, theirs.norm,
                                                                              tolerance[1])):
        if not abs(a - b) <= most * abs(b):
            raise Differ(f"THE MODELS DIFFER: the first {what} is {a:.6g} and {whose} is {b:.6g}, "
                         f"expected them within {most:g}: no figure is kept")


def middle(turns, name):
    values = [getattr(turn, name) for turn in turns if getattr(turn, name) is not None]
    return median(values) if values else None


class Result:
    """The figures of one model."""

    def __init__(self, name, row, ours, theirs, baseline, form, rates, out_of_memory):
        self.name, self.row, self.form, self.out_of_memory = name, row, form, out_of_memory
        self.matrix_rate, self.plan = middle(ours, "matrix_rate"), ours[0].plan
        self.operations = predict.counted_operations(row.L, row.C, row.V, row.T)
        self.ms, self.their_ms, self.baseline_ms = middle(ours, "ms"), middle(theirs, "ms"), middle(baseline, "ms")
        self.ours, self.theirs = ours, theirs
        self.floor = self.predicted = None
        self.their_matrix_rate, self.copy_rate = rates
        if self.copy_rate:
            seconds = predict.step_seconds(row.L, row.C, row.V, row.T, row.total_batch, *self.plan, self.matrix_rate,
                                           self.copy_rate)
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
        if self.baseline_ms:
            out.append(("vs_baseline", self.rate(self.ms), "tokens/s", self.rate(self.baseline_ms)))
        for what, unit in (("first_step", "s"), ("memory", "GiB")):
            if (value := middle(self.ours, what)) is not None:
                out.append((what, value, unit, middle(self.theirs, what)))
        out.append(("matrix_rate", self.matrix_rate / 1e12, "TFLOP/s",
                    self.their_matrix_rate / 1e12 if self.their_matrix_rate else None))
        if self.copy_rate:
            out.append(("copy_rate", self.copy_rate / 1e9, "GB/s", None))
        out = [(what, value, unit, peer, value / peer if peer else None) for what, value, unit, peer in out]
        if self.floor:
            out.append(("floor", self.ms, "ms", self.floor, self.floor / self.ms))
        return out

    def rows(self):
        """Of dev/bench/results.py's columns MEASURED."""
        for what, value, unit, peer, ratio in self.metrics():
            no_peer = ("out of memory"
                       if self.out_of_memory and what in ("mfu", "vs_torch", "first_step", "memory") else "")
            ratio_text = f"{ratio:.3f}" if ratio else ""
            yield [f"{self.name}/{what}", f"{value:.2f}", unit, f"{peer:.2f}" if peer else no_peer, ratio_text]

    def print(self):
        print(
            f"\n{self.name}: {self.row.total_batch} tokens a step, micro-batch {self.plan[0]}, recompute {self.plan[1]}"
        )
        print(f"  {'':26}{'train_keel':>12}{'its peer':>12}{'ratio':>8}")
        for what, value, unit, peer, ratio in self.metrics():
            label = {
                "mfu": "MFU, %", "vs_torch": "tokens/s, PyTorch's", "vs_baseline": "tokens/s, the baseline's",
                "first_step": "process start to step 1, s", "memory": "memory in use, GiB", "matrix_rate":
                "matrix product, TFLOP/s", "copy_rate": "copy, GB/s", "floor": "a step and its floor, ms"
            }[what]
            more = f"  predicted {self.predicted:.1f} ms" if what == "floor" else ""
            goal = results.said(f"{self.name}/{what}", value, ratio)
            print(f"  {label:26}{value:12.1f}" + (f"{peer:12.1f}{ratio:8.2f}" if peer else f"{'-':>12}{'':8}") + more
                  + (f"  {goal}" if goal else ""))
        if self.out_of_memory:
            print("  PyTorch: out of memory")
        if self.theirs:
            print(f"  PyTorch: {self.form}; {self.theirs[0].attention}")


def card_gib():
    """The GPU's memory, or None without one."""
    mib = nvidia_smi("memory.total")
    return int(mib) / 1024 if mib.isdigit() else None


def states_flags(row, a, gib):
    """train_keel's flags for the types of its states that fit the card."""
    if not gib or re.search("--(moments|grads)", a.keel_flags):
        return []
    gib_of = lambda bytes_each: bytes_each * predict.parameters(row.L, row.C, row.V, row.T) / 2**30
    return next((flags for flags, bytes_each in STATES if gib_of(bytes_each) <= STATES_SHARE * gib), STATES[-1][0])


def named_form(name, gib):
    """FORMS' for a card of so much memory, or None."""
    fits = [least for least in FORMS.get(name, {}) if gib and least <= gib]
    return FORMS[name][max(fits)] if fits else None


def search(row, a, deadline):
    """PyTorch's fastest form, found by a short run of each; None where none runs. And whether memory was short for
    one."""
    begin, best, best_ms, short = time.monotonic(), None, None, False
    for form in SEARCHED:
        if form.mode not in a.modes.split(","):
            continue
        if time.monotonic() - begin > TRIALS * (deadline - begin):
            print(f"  PyTorch {form}: not tried, for want of time", flush=True)
            continue
        try:
            turn = torch_turn(row, a, form, WARM + 2, deadline)
        except Failed as why:
            print(f"  PyTorch {form}: NOT MEASURED: {why}", flush=True)
            continue
        print(f"  PyTorch {form}: " + (f"{turn.ms:.1f} ms a step, micro-batch {turn.B}" if turn else "out of memory"),
              flush=True)
        short = short or turn is None
        if turn and (best is None or turn.ms < best_ms):
            best, best_ms = form._replace(B=turn.B), turn.ms
    return best, short


def choose_form(name, row, a, gib, deadline):
    """PyTorch's form, or None, and whether there is none for want of memory."""
    if not a.torch_python:
        return None, False
    states = TORCH_STATES * predict.parameters(row.L, row.C, row.V, row.T) / 2**30
    if gib and states > gib:
        print(f"  PyTorch: out of memory, not tried: its states alone take {states:.0f} GiB, the card has {gib:.0f}",
              flush=True)
        return None, True
    if not a.search and (form := named_form(name, gib)):
        return form, False
    form, short = search(row, a, deadline)
    return form, short and not form


def measure(name, row, a, states, gib, deadline, rates):
    """A Result. train_keel, the baseline and PyTorch take turns; a peer that fails gives up its further turns."""
    ours, theirs, baseline = [], [], []
    keel_flags = [*states, *shlex.split(a.keel_flags)]
    form, out_of_memory = choose_form(name, row, a, gib, deadline)
    peers = ["baseline"] * bool(a.baseline) + ["PyTorch"] * bool(form)

    def take_turn(peer):
        nonlocal form, out_of_memory
        if peer == "baseline":
            turn, turns, said = keel_turn(a.baseline, row, a, keel_flags, deadline), baseline, "baseline"
        else:
            turn, turns = torch_turn(row, a, form, a.steps, deadline), theirs
            if turn is None:
                out_of_memory = not theirs
                raise Failed("out of memory")
            form = form._replace(B=turn.B)
            said = f"PyTorch {form}"
        print(f"  {said}: {turn.ms:.1f} ms a step, first step after {turn.first_step:.1f} s", flush=True)
        check_agreement(ours[-1], turn, f"{peer}'s", TOLERANCE[a.device])
        turns.append(turn)

    for turn in range(a.repeats):
        if ours and time.monotonic() > deadline:
            print(f"  the time is up after {turn} of {a.repeats} turns", flush=True)
            break
        try:
            ours.append(keel_turn(os.environ.get("TRAINER", "./train_keel"), row, a, keel_flags, deadline))
        except Failed as why:
            if not ours:
                raise
            print(f"  turn {turn + 1} of {a.repeats}: NOT MEASURED: {why}", flush=True)
            break
        print(f"  train_keel: {ours[-1].ms:.1f} ms a step, first step after {ours[-1].first_step:.1f} s", flush=True)
        for peer in list(peers):
            try:
                take_turn(peer)
            except Differ:
                raise
            except Failed as why:
                print(f"  {f'PyTorch {form}' if peer == 'PyTorch' else peer}: NOT MEASURED: {why}", flush=True)
                peers.remove(peer)
                if peer == "PyTorch" and form.mode == "graphs" and not theirs and not out_of_memory:
                    form = form._replace(mode="compile")  # a graph that cannot be recorded is no reason to have no peer
                    peers.append(peer)
    return Result(name, row, ours, theirs, baseline, form, rates, out_of_memory)


def yardsticks(python, deadline):
    """Operations a second of PyTorch's large product and bytes a second of a copy."""
    done = Process([python, "dev/bench/bench_gpu_torch.py", "--yardsticks"], deadline)
    if done.status:
        raise Failed(done.error)
    return tuple(float(done.find(rf"^{name} (\S+)")[1][1]) for name in ("matrix_rate", "copy_rate"))


def parse_model(text):
    """(name, Row) of --model's value."""
    name, _, values = text.partition("=")
    try:
        norm, *numbers = values.split(",")
        return name, predict.Row(norm, *map(int, numbers))
    except (TypeError, ValueError):
        raise Failed(f"--model: expected NAME=NORM,L,C,H,T,TOKENS,V, found {text!r}") from None


def print_header(a, command, gib):
    """The run's, with PyTorch's yardsticks, which it returns."""
    now = datetime.datetime.now(datetime.timezone.utc)
    commit, _, gpu, driver, *_ = results.about(command)
    print(f"date       {now:%Y-%m-%d %H:%M} UTC, commit {commit}\nGPU        {gpu}"
          + (f", {gib:.0f} GiB, driver {driver}" if gib else ""))
    print(f"command    {command}", flush=True)
    if not a.torch_python:
        print("PyTorch    NOT MEASURED: no Python with PyTorch 2 and CUDA found; set PYTHON")
    elif a.device == "cuda":
        try:
            rates = yardsticks(a.torch_python, time.monotonic() + a.seconds)
            print(f"PyTorch    its matrix product {rates[0] / 1e12:.1f} TFLOP/s, its copy {rates[1] / 1e9:.0f} GB/s",
                  flush=True)
            return rates
        except Failed as why:
            print(f"PyTorch    its yardsticks: NOT MEASURED: {why}")
    return None, None


def main(arguments, rows=predict.ROWS):
    parser = argparse.ArgumentParser(prog="dev/bench/bench_gpu.sh", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--rows", default=",".join(rows), metavar="NAME,...", help="models [%(default)s]")
    add("--model", action="append", default=[], metavar="NAME=NORM,L,C,H,T,TOKENS,V",
        help="a further model, of so many tokens a step, for --rows")
    add("--quick", action="store_true", help="one turn of 6 steps")
    add("--repeats", type=int, default=3, help="turns each [%(default)s]")
    add("--steps", type=int, default=10, help=f"steps a turn, of which the first {WARM} do not count [%(default)s]")
    add("--search", action="store_true",
        help="find PyTorch's fastest form instead of taking the one known for this card")
    add("--modes", default="graphs,compile,eager", help="PyTorch's forms to search among [%(default)s]")
    add("--keel-flags", default="", metavar="FLAGS", help="further flags of train_keel, such as '--tune FILE'")
    add("--baseline", metavar="PROGRAM", help="an older train_keel, which takes turns too")
    add("--seconds", type=float, default=570,
        help="when they are over no further turn begins and the one that runs is ended [%(default)s]")
    add("--data", type=Path, default=ROOT / "build" / "bench_gpu", metavar="FOLDER",
        help="of text.txt and pieces_train_000001.bin")
    add("--csv", type=Path, help="add the figures to this file")
    add("--keep", action="store_true", help="add them to dev/results/<GPU>.csv, with commit, date and machine")
    add("--torch-python", default="", help="a Python with PyTorch and CUDA")
    add("--device", default="cuda", choices=["cuda", "cpu"], help="of PyTorch [%(default)s]")
    add("--warm", action="store_true", help="measure nothing: fill the caches of PyTorch's compiler for these models")
    a = parser.parse_args(arguments)
    rows = {**rows, **dict(map(parse_model, a.model))}
    if a.quick:
        a.repeats, a.steps = 1, 6
    names = a.rows.split(",")
    unknown = [name for name in names if name not in rows]
    if unknown:
        raise Failed(f"--rows: expected some of {', '.join(rows)}, found {unknown[0]}")
    if a.steps <= WARM or a.repeats < 1:
        raise Failed(
            f"expected --steps of more than {WARM} and --repeats of 1 or more, found {a.steps} and {a.repeats}")
    if a.csv:
        results.check_header(a.csv, results.MEASURED)
    if a.keep:
        results.check_header(results.kept_file(nvidia_smi("name")), results.COLUMNS)
    a.data = a.data.resolve()  # programs run in the repository's root
    a.data.mkdir(parents=True, exist_ok=True)
    gib, deadline, failed = card_gib(), time.monotonic() + a.seconds, False

    def command_of(name, more=()):
        turns = ["--quick"] if a.quick else ["--repeats", str(a.repeats), "--steps", str(a.steps)]
        said = ["dev/bench/bench_gpu.sh", "--rows", name, *turns]
        said += ["--search"] * a.search
        for flag, value in (("--modes", a.modes), ("--keel-flags", " ".join([*more, a.keel_flags]).strip()),
                            ("--baseline", a.baseline)):
            if value and value != parser.get_default(flag[2:].replace("-", "_")):
                said += [flag, shlex.quote(value)]
        return " ".join(said)

    if a.warm:
        for name in names:
            if not (form := named_form(name, gib)):
                print(f"{name}: no form of PyTorch is known for this card: nothing to compile")
                continue
            done = warm(rows[name], a, form, deadline)
            failed = failed or done.status != 0
            print(
                "\n".join(f"{name}: {line}" for _, line in done.lines) +
                (f"\n{name}: {done.error}" if done.status else ""), flush=True)
        return failed

    rates = print_header(a, command_of(a.rows), gib)
    for i, name in enumerate(names):
        if time.monotonic() > deadline:
            print(f"\n{name}: NOT MEASURED: the {a.seconds:g} seconds are over; give --rows {name} or more --seconds")
            failed = True
            continue
        print(f"\n{name}", flush=True)
        states = states_flags(rows[name], a, gib)
        if states:
            print(f"  train_keel: with FP32 states this model does not fit {gib:.0f} GiB: {' '.join(states)}",
                  flush=True)
        try:
            share = (deadline - time.monotonic()) / (len(names) - i)  # of the time that is left
            result = measure(name, rows[name], a, states, gib, time.monotonic() + share, rates)
        except Failed as why:
            print(f"{name}: NOT MEASURED: {why}", flush=True)
            failed = True
            continue
        result.print()
        sys.stdout.flush()
        if a.csv:
            results.append(a.csv, result.rows())
        if a.keep:
            results.append(results.kept_file(nvidia_smi("name")), result.rows(), results.about(command_of(name,
                                                                                                          states)))
    return failed


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what runs is ended too
    try:
        sys.exit(main(sys.argv[1:]))
    except Failed as why:
        sys.exit(f"bench_gpu: {why}")
