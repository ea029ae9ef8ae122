"""What a GPU shows of train_keel in minutes: right or wrong, how fast, beside whom, and the logs to mend it by.

Stages run in order of worth, each a process of its own with a limit of its own. What a stage finds is in the folder of
results the moment it exists: a row of the GPU's csv, a log. At a limit everything the stage has started is ended, and
the next one begins. Nothing is built, installed or searched for there: `make card` does it beforehand; only a program
that does not start is built again in place.

Results go to $OUT, or build/card_out:
    h100.csv, h200.csv ...   rows of dev/results' columns (dev/results.py), the GPU's name in the file's
    logs.tar.gz              what every command printed, a file each, named by stage
    table.txt                the table that is printed last
    torch_cache.tar.gz       PyTorch's compiled code, for the next call: --keep moves it to build/card
    lesson.tar.gz            the lesson's runs, finished ones; --keep moves them to dev/results
"""

import argparse
import contextlib
import csv
import ctypes
import datetime
import filecmp
import hashlib
import math
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "dev")]
import bench_gpu
import results

LOG_BYTES = 400_000   # of a log that comes back: its end
MOST_BYTES = 16 << 20  # of a file that comes back
PACK_BYTES = 55 << 20  # that build/card may have, stripped
DOWN = 5              # seconds between SIGTERM and SIGKILL
PROGRAMS = ["train_keel", "train_keel_fp32", "train_keel_cpu", "train_keel_cpu_fp64", "test_gpu_bf16", "test_gpu_fp32", "bench_kernels",
            "bench_products"]
SANITIZERS = ["memcheck", "racecheck", "initcheck", "synccheck"]
CACHE = "torch_cache.tar.gz"  # PyTorch's compiled code

# Models and numbers of steps: on a card, and in the rehearsal with the kernels on the CPU.
CARD = SimpleNamespace(
    programs="build/card", data="build/card", doctest=[], norms=None, main=["-L", 1024, "-x", 12], steps=12,
    beside=["pre_L24_C768", "keel_L1024_C256", "keel_L512_C1024"], beside_flags=["--steps", 6, "--repeats", 1], bench=[],
    idle=["-L", 1024, "-C", 256, "-t", 1024, "-b", 32], idle_steps=10, idle_environment={},
    small=["-L", 4, "-C", 64, "-H", 2, "-t", 72, "-b", 2, "-d", 288], killed=["-L", 16, "-C", 64, "-t", 64, "-b", 16, "-x", 400, "-n", 50],
    curve=["-L", 16, "-C", 64, "-H", 2, "-t", 64, "-b", 16, "-x", 300], curve_rows=30, sanitizers=SANITIZERS,
    lesson="train_keel", deep=["-L", 1024, "-C", 1024, "-t", 1024, "-d", 16384, "-x", 10],
    max_lr=["--gpu", "--set", "B=16", "seeds=1"],
    hops=["--gpu", "--set", "L=[8,16,32,64]", "B=64", "steps=4000", "lrs=[2e-3]", "start=[2e-3]"],
    long=["--gpu", "--set", "L=[512]", "equal=[]", "steps=320", "warmup=80", "lrs=[3e-3,6e-3]", "start=[3e-3,6e-3]",
          "pre_start=[3e-3,6e-3]"])
_TINY = ["-L", 4, "-C", 64, "-H", 2, "-t", 32, "-b", 2]
REHEARSAL = SimpleNamespace(
    programs="build/rehearsal", data="build/rehearsal", doctest=["-sf=*", "-tc=GELU*,Predictions*,Embedding*,AdamW*,*memory table*"], norms="keel",
    main=[*_TINY, "-x", 5], steps=5,
    beside=["tiny", "other"], beside_flags=["--steps", 5, "--repeats", 1, "--model", "tiny=keel,4,64,2,32,128,256", "--model",
                                           "other=pre,2,64,1,16,16,50257"], bench=["--small"],
    idle=_TINY, idle_steps=2, idle_environment={"LD_PRELOAD": str(ROOT / "build/rehearsal/fake_cupti.so")}, small=_TINY, killed=[*_TINY, "-x", 24, "-n", 6],
    curve=[*_TINY, "-d", 256, "-x", 10], curve_rows=3, sanitizers=["memcheck", "racecheck"],
    lesson="train_keel_fp32", deep=[*_TINY, "-x", 4], max_lr=["--tiny"], hops=["--tiny"], long=["--tiny"])


# ---------------------------------------------------------------------------------------------------------
# Processes

def descendants(of):
    """Process ids below `of`, those that left its session or lost their parent too, as this process is their subreaper."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            text = stat.read_text()
            state, parent = text[text.rindex(")") + 2:].split()[:2]
            if state != "Z":
                parents[int(stat.parent.name)] = int(parent)
    found, at = [], {of}
    while at:
        at = {pid for pid, parent in parents.items() if parent in at}
        found += at
    return found


def become_subreaper():
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans below become children of this process


def end_tree(of):
    """Ends everything below a process, and what it starts meanwhile."""
    for _ in range(50):
        below = descendants(of)
        if not below:
            return
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def ended(status):
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


class Done:
    """A command that has ended: status (None: its time was up), what it printed, seconds."""

    def __init__(self, command, status, text, seconds):
        self.command, self.status, self.text, self.seconds, self.ok = command, status, text, seconds, status == 0

    def find(self, pattern):
        return re.search(pattern, self.text, re.M)

    def why(self):
        """How it failed, in a line."""
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        how = "its time was up" if self.status is None else ended(self.status)
        return how + (": " + lines[-1][:100] if lines else "")


Failed = results.Failed


def measured(metric, value, unit, peer=None, ratio=None):
    """A row as dev/results.py has them."""
    ratio = ratio or (value / peer if peer else None)
    return [metric, f"{value:.6g}", unit, *("" if v is None else f"{v:.6g}" for v in (peer, ratio))]


# ---------------------------------------------------------------------------------------------------------
# A stage at work

class Work:
    """What a stage has at hand; lives in the stage's process."""

    def __init__(self, session, stage, seconds, resume):
        self.session, self.stage, self.resume = session, stage, resume
        self.s, self.programs, self.scratch = session.sizes, Path(session.sizes.programs), session.scratch
        self.deadline = time.monotonic() + seconds
        self.bad, self.note = [], ""
        self.text = ["-i", f"{self.s.data}/text.txt"]
        self.lock = threading.Lock()

    def left(self):
        return self.deadline - time.monotonic()

    def program(self, name):
        return str(self.programs / name)

    def run(self, name, command, limit=None, env=None):
        """Runs it, its output in the log of this name. A limit of its own cuts it off, SIGTERM first."""
        command = [str(word) for word in command]
        limit = min(limit or 1e9, self.left() - 1)
        log = self.session.logs / f"{self.stage}-{name}.log"
        begin = time.monotonic()
        with open(log, "w") as out:
            said = " ".join(f"{k}={v}" for k, v in (env or {}).items())
            out.write(f"$ {said + ' ' if said else ''}{shlex.join(command)}\n")
            out.flush()
            if limit <= 0:
                out.write("not begun: its time was up\n")
                return Done(command, None, "", 0)
            try:
                child = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                         env={**os.environ, **self.session.environment, **(env or {})}, start_new_session=True)
            except OSError as error:
                out.write(f"{error}\n")
                return Done(command, 127, str(error), 0)
            status = None
            try:
                status = child.wait(limit)
            except subprocess.TimeoutExpired:
                below = [child.pid, *descendants(child.pid)]
                for sign, seconds in ((signal.SIGTERM, DOWN), (signal.SIGKILL, 10)):
                    for pid in below + descendants(child.pid):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, sign)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(seconds)
        seconds = time.monotonic() - begin
        with open(log, "a") as out:
            out.write(f"\n[{'ended: its time was up' if status is None else f'exit status {status}'}, {seconds:.1f} s]\n")
        text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace").split("\n", 1)[1].rsplit("\n[", 1)[0])
        return Done(command, status, text, seconds)

    def together(self, *jobs, at_once=8):
        """The results of functions that run at the same time, in their order."""
        with ThreadPoolExecutor(at_once) as pool:
            return [future.result() for future in [pool.submit(job) for job in jobs]]

    def row(self, metric, value, unit, peer=None, ratio=None, command=None):
        self.rows([measured(metric, value, unit, peer, ratio)], command)

    def rows(self, rows, command=None):
        with self.lock:
            self.session.add_rows(rows, command or f"dev/card.sh {self.stage}")

    def check(self, name, ok, why="", command=None):
        """A row that says whether it was right; what was not ends the stage as failed, at its end."""
        self.row(f"{self.stage}/{name}", int(bool(ok)), "ok", command=command)
        if not ok:
            with self.lock:
                self.bad.append(f"{name}: {why}" if why else name)
        print(f"  {name}: {'ok' if ok else 'NOT OK: ' + why}", flush=True)
        return ok

    def have(self, metric):
        """Whether an earlier call has this figure of these kernels; never where the stage was asked for by name."""
        return self.resume and self.session.have(metric)

    def benchmark(self, name, command, metrics, env=None, limit=None):
        """Runs what writes measured rows to --csv FILE, and takes them in as they come."""
        path = self.scratch / f"{name}.csv"
        path.unlink(missing_ok=True)
        seen, stop = 0, threading.Event()

        def take():
            nonlocal seen
            lines = path.read_text() if path.exists() else ""
            rows = list(csv.reader(lines[:lines.rfind("\n") + 1].splitlines()))[1:]  # whole ones, without the header
            if rows[seen:]:
                self.rows(rows[seen:], shlex.join(str(w) for w in command))
            seen = len(rows)

        def watch():
            while not stop.wait(0.5):
                take()
        watcher = threading.Thread(target=watch)
        watcher.start()
        done = self.run(name, [*command, "--csv", path], limit, env)
        stop.set(), watcher.join()
        take()
        self.check(name, done.ok and seen >= metrics, done.why() if not done.ok else f"expected {metrics} rows or more, found {seen}")
        return done


# ---------------------------------------------------------------------------------------------------------
# The stages

def training(done):
    """(losses and gradient norms as printed in log.csv, milliseconds) of the run whose folder is `done`."""
    with open(done / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [(row["loss"], row["grad_norm"]) for row in rows], [float(row["ms"]) for row in rows]


def memory_row(w, done, command):
    """What the run's memory table says that it needs, and of how much."""
    used = done.find(r"^memory +needs ([\d.]+) (\w+) of ([\d.]+) (\w+),")
    gib = lambda number, unit: float(number) * 1024.0 ** ("B", "KiB", "MiB", "GiB").index(unit) / 2**30
    w.row(f"{w.stage}/memory", gib(used[1], used[2]), "GiB", gib(used[3], used[4]), command=command)


def same_to_cpu(w, name, found, expected, most=0.02):
    mean = lambda path: sum(float(loss) for loss, _ in training(path)[0][-w.s.curve_rows:]) / w.s.curve_rows
    a, b = mean(found), mean(expected)
    w.check(name, abs(a - b) <= most * b, f"mean of the last {w.s.curve_rows} losses {a:.4f}, the CPU's {b:.4f}")


def failing_cases(done, names):
    """The test cases of a doctest suite that failed, from its console's blocks; and the one it was in when its time was up."""
    found = []
    for block in re.split(r"^={20,}$", done.text, flags=re.M):
        if re.search(r"\b(ERROR|FATAL ERROR|CRASHED)\b", block) and (case := re.search(r"^TEST CASE:\s+(.*)$", block, re.M)):
            found.append(case[1].strip())
    if done.status is None:
        ended = set(re.findall(r"^[\d.]+ s: (.*)$", done.text, re.M))
        found += [name for name in names if name not in ended][:1]
    return list(dict.fromkeys(found))


def only(case):
    return "-tc=" + case.replace(",", "?")  # a comma would part two names


def sanitizer():
    return shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


def diagnose(w, name, command):
    """What failed again: without overlapping launches, then under memcheck. The logs say what each found; a line of each is told."""
    again, checked = w.together(lambda: w.run(f"{name}-no-overlap", command, 40, {"KEEL_OVERLAP": "0"}),
                                lambda: w.run(f"{name}-memcheck", [sanitizer(), "--tool", "memcheck", "--error-exitcode", 9, *command], 60))
    print(f"    {name}: without overlapping launches {'right' if again.ok else 'wrong too'}; memcheck: "
          f"{'nothing' if checked.ok else checked.why()}", flush=True)


def suite(w, build, more, limit, name):
    command = [w.program(f"test_gpu_{build}"), *w.s.doctest, *more]
    done = w.run(name, [*command, "-d=true"], limit)
    count = done.find(r"test cases:\s*(\d+) \|\s*(\d+) passed \|\s*(\d+) failed")
    ok = done.ok and count is not None and int(count[2]) > 0
    w.check(name, ok, f"{count[3]} of {count[1]} cases failed" if count and int(count[3]) else done.why())
    if count:
        w.row(f"right/{name}_cases", int(count[2]), "cases passed", int(count[1]))
    if ok or w.left() < 15:
        return
    listed = [line.strip() for line in w.run(f"{name}-list", [*command, "-ltc"], 20).text.splitlines()]
    cases = failing_cases(done, listed)
    print(f"  {name}: failing: {'; '.join(cases) or 'no case by name'}", flush=True)
    alone = w.together(*(lambda i=i, case=case: w.run(f"{name}-case{i}", [command[0], only(case), *more], 30) for i, case in enumerate(cases[:6])))
    for case, one in zip(cases, alone):
        print(f"    alone in a process {'right' if one.ok else 'wrong too'}: {case}", flush=True)
    for i in [i for i, one in enumerate(alone) if not one.ok][:2]:
        diagnose(w, f"{name}-case{i}", [command[0], only(cases[i]), *more])


def right(w):
    """A short run; the GPU suites in both types, CPU against GPU and, beside them, PyTorch's compilation; then the tests of memory alone."""
    smoke = [w.program("train_keel"), *w.s.small, *w.text, "-x", 3, "-s", 2, "-g", 4, "-v", 0]
    done = w.run("smoke", smoke, 30)
    losses = [float(loss) for loss in re.findall(r"^step \d+/3 \| loss (\S+)", done.text, re.M)]
    if not w.check("smoke", done.ok and len(losses) == 3 and all(map(math.isfinite, losses)), done.why()):
        diagnose(w, "smoke", smoke)

    def compare():
        done = w.run("compare", ["dev/compare.sh", "--brief", "--programs", w.s.programs, "--jobs", max(2, os.cpu_count() // 4),
                                 *(["--norms", w.s.norms] if w.s.norms else [])], 90)
        count = done.find(r"^(\d+) passed, (\d+) failed")
        w.check("compare", done.ok and count is not None, f"{count[2]} comparisons failed" if count else done.why())
        if count:
            w.row("right/compare_models", int(count[1]), "comparisons passed", int(count[1]) + int(count[2]))
        for i, bad in enumerate(re.findall(r"^(train_keel\S*) +(train_keel\S*) +(-.*?) +NOT (?:OK|DUMPED)", done.text, re.M)[:2]):
            build = next(name for name in bad[:2] if "cpu" not in name)
            diagnose(w, f"compare{i}", [w.program(build), *shlex.split(bad[2]), "-i", "keel_common.h", "-v", 0, "--dump", w.scratch / f"dump{i}"])

    stop = threading.Event()
    warm = threading.Thread(target=warm_torch, args=(w, stop))
    warm.start()
    w.together(lambda: suite(w, "bf16", ["-tse=alone"], 90, "bf16"), lambda: suite(w, "fp32", ["-tse=alone"], 90, "fp32"), compare)
    stop.set()  # the tests of memory read what is free on the whole device
    warm.join()
    for build in ("bf16", "fp32"):
        suite(w, build, ["-ts=alone"], 40, f"{build}_memory")
    w.note = "BF16, FP32, CPU against GPU, memory"


def warm_torch(w, stop):
    """PyTorch's compilation into the cache, for as long as nothing else is timed or counts memory."""
    if not w.session.torch:
        return
    child = subprocess.Popen([sys.executable, "dev/bench_gpu.py", "--warm", "--rows", ",".join(w.s.beside), *map(str, w.s.beside_flags),
                              "--data", w.s.data, "--torch-python", w.session.torch], cwd=ROOT, stdin=subprocess.DEVNULL,
                             stdout=open(w.session.logs / f"{w.stage}-warm.log", "w"), stderr=subprocess.STDOUT, start_new_session=True,
                             env={**os.environ, **w.session.environment})
    while child.poll() is None and not stop.wait(0.2):
        pass
    for pid in [child.pid, *descendants(child.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    child.wait()
    w.session.save_cache()


def main_run(w):
    """The headline: ./train_keel -L 1024, all else by default, on text. Twice, and the same bits both times."""
    runs = []
    for turn in (1, 2):
        folder = w.scratch / f"main{turn}"
        command = [w.program("train_keel"), *w.s.main, *w.text, "-v", 0, "-s", 0, "-n", 0]
        done = w.run(f"run{turn}", [*command, "-o", folder])
        if not w.check(f"run{turn}", done.ok, done.why()):
            return
        said = shlex.join(map(str, command))
        losses, ms = training(folder)
        tokens = int(done.find(r"^training .* steps of (\d+) tokens")[1])
        rate = float(done.find(r"^machine .* (\d+) GFLOP/s in matrix products")[1])
        first = float(done.find(r"^start-up +([\d.]+) s to the end of the first step")[1])
        share = [float(row["mfu"] or "nan") for row in csv.DictReader(open(folder / "log.csv"))]
        runs.append((losses, median(ms[3:])))
        w.row("main/tokens_per_second", tokens / runs[-1][1] * 1e3, "tokens/s", command=said)
        w.row("main/mfu", 100 * median(share[3:]), "%", command=said)
        w.row("main/first_step", first, "s", command=said)
        if turn == 1:
            w.row("main/matrix_rate", rate / 1e3, "TFLOP/s", command=said)
            memory_row(w, done, said)
            print(re.sub(r"^(step|note).*\n", "", done.text, flags=re.M), flush=True)  # the memory table
    w.check("same_bits", runs[0][0] == runs[1][0], "losses and gradient norms of two runs differ")
    w.note = f"{tokens / median(ms for _, ms in runs) * 1e3:.0f} tokens/s, first step after {first:.1f} s"


def beside(w):
    """Whole steps beside PyTorch's at its best, a model after another, each with its share of the time."""
    todo = [name for name in w.s.beside if not w.have(f"{name}/vs_torch")]
    for i, name in enumerate(todo):
        baseline = w.programs / "baseline" / "train_keel"
        w.benchmark(name, [sys.executable, "dev/bench_gpu.py", "--rows", name, *w.s.beside_flags, "--data", w.s.data, "--seconds",
                           int((w.left() - 2) / (len(todo) - i)), "--torch-python", w.session.torch or "",
                           *(["--baseline", baseline] if baseline.exists() else [])],
                    4, {"TRAINER": w.program("train_keel")}, (w.left() - 2) / (len(todo) - i) + DOWN)
        w.session.save_cache()
    w.note = ", ".join(todo)


def kernels(w):
    """Every kernel beside a copy, a product and PyTorch's attention; then how long the GPU waits at 1024 sub-layers."""
    peers = []
    if w.session.torch:
        done = w.run("sdpa", [w.session.torch, "dev/bench_sdpa.py"], 40)
        table = w.scratch / "sdpa.csv"
        table.write_text("".join(line + "\n" for line in done.text.splitlines() if re.fullmatch(r"attention_\w+,[\d.]+", line)))
        if w.check("sdpa", done.ok and table.stat().st_size > 0, done.why()):
            peers = ["--sdpa", table]
    w.benchmark("kernels", [w.program("bench_kernels"), *w.s.bench, *peers], 20)
    if not (w.programs / "cupti_idle.so").exists():
        print("  idle: not measured: no CUPTI where the programs were built", flush=True)
        return
    w.benchmark("idle", ["dev/idle.sh", "--steps", w.s.idle_steps, *w.s.idle, *w.text], 1,
                {"TRAINER": w.program("train_keel"), "CUPTI_IDLE": w.program("cupti_idle.so"), **w.s.idle_environment})
    w.note = "kernels, idle time"


def products(w):
    """Ways of doing the matrix products: --tune, GELU epilogues, FP8, small C."""
    w.benchmark("products", [w.program("bench_products"), *w.s.bench], 20)
    w.note = "ways of doing matrix products"


def safe(w):
    """compute-sanitizer's tools; kill -9 and a resume; learning curves beside the CPU's, with BF16 states too."""
    def sanitize(tool, build):
        done = w.run(f"{tool}-{build}", [sanitizer(), "--tool", tool, "--error-exitcode", 9, w.program(build), *w.s.small, *w.text, "-x", 3, "-s", 2,
                                         "-g", 4, "-v", 0])
        w.check(f"{tool}_{build}", done.ok and done.find("SUMMARY: 0"), done.why())

    def killed():
        whole, cut = w.scratch / "whole", w.scratch / "cut"
        command = [w.program("train_keel"), *w.s.killed, *w.text, "-v", 0, "-s", 0, "-o"]
        done = w.run("whole", [*command, whole])
        if not w.check("whole", done.ok, done.why()):
            return
        with open(w.session.logs / f"{w.stage}-cut.log", "w") as log:
            child = subprocess.Popen([str(word) for word in [*command, cut]], cwd=ROOT, stdout=log, stderr=log,
                                     env={**os.environ, **w.session.environment})
        while child.poll() is None and not list(cut.glob("state_*[0-9].bin")) and w.left() > 2:
            time.sleep(0.002)
        child.kill()
        was_cut = child.wait() == -signal.SIGKILL
        done = w.run("resume", [*command, cut, "-y"])
        last = sorted(whole.glob("model_*.bin"))[-1].name
        same = done.ok and (cut / last).exists() and filecmp.cmp(whole / last, cut / last, False) and training(whole)[0] == training(cut)[0]
        w.check("kill_and_resume", same and was_cut, done.why() if not done.ok else "another model or log than a run's that was not killed"
                if was_cut else "the run had ended before it could be killed")

    curves = {"cpu": ("train_keel_cpu", []), "bf16": ("train_keel", []), "fp32": ("train_keel_fp32", []),
              "bf16_states": ("train_keel", ["--moments", "bf16", "--grads", "bf16"])}

    def curve(name):
        build, flags = curves[name]
        return w.run(f"curve-{name}", [w.program(build), *w.s.curve, *flags, *w.text, "-s", 0, "-n", 0, "-v", 0, "-o", w.scratch / name]).ok

    jobs = [lambda name=name: curve(name) for name in curves] + [killed]
    jobs += [lambda t=t, b=b: sanitize(t, b) for t in w.s.sanitizers for b in ("train_keel", "train_keel_fp32")]
    ran = w.together(*jobs, at_once=6)
    for name, ok in zip(list(curves)[1:], ran[1:]):
        if w.check(f"curve_{name}_runs", ok and ran[0]):
            same_to_cpu(w, f"curve_{name}", w.scratch / name, w.scratch / "cpu")
    w.note = "sanitizers, kill -9, curves"


def lesson(experiment, flags, name):
    """An experiment of the lesson at a size that this call can hold. Finished runs come back, and are not run again."""
    def stage(w):
        runs = ROOT / f"{w.s.programs}_lesson"
        kept = ROOT / "dev" / "results" / f"lesson_{w.session.card}" / "runs.tar.gz"
        if kept.exists() and not runs.exists():
            with tarfile.open(kept) as tar:
                tar.extractall(runs)
        try:
            done = w.run(name, [sys.executable, "dev/experiments/run.py", experiment, *flags(w.s), "--tables", "--binary", w.program(w.s.lesson), "-i",
                                f"{w.s.data}/text.txt", "--runs", runs, "--results", runs / "tables" / name], w.left() - 2 * DOWN)
        finally:
            w.session.save_lesson(runs)
        if w.check(name, done.ok, done.why()):
            w.row(f"lesson/{name}", len(list(csv.DictReader(open(runs / "tables" / name / f"{experiment}.csv")))), "rows",
                  command=f"dev/experiments/run.py {experiment} {shlex.join(map(str, flags(w.s)))}")
        w.note = f"{done.seconds:.0f} s of {experiment}"
    return stage


def deep(w):
    """The paper's deepest model at its width, 6.5e9 parameters. States in BF16 where FP32's 16 bytes a parameter do not fit."""
    memory = float(results.nvidia_smi("memory.total") or 0) / 1024  # GiB
    states = [] if memory > 130 else ["--moments", "bf16", "--grads", "bf16", "-r", 32]
    command = [w.program("train_keel"), *w.s.deep, *states, *w.text, "-v", 0, "-s", 0, "-n", 0]
    done = w.run("deep", [*command, "-o", w.scratch / "deep"])
    if not w.check("deep", done.ok, done.why()):
        return
    said, rows = shlex.join(map(str, command)), list(csv.DictReader(open(w.scratch / "deep" / "log.csv")))[3:]
    w.row("deep/mfu", 100 * median(float(row["mfu"]) for row in rows), "%", command=said)
    w.row("deep/tokens_per_second", median(float(row["tokens_per_second"]) for row in rows), "tokens/s", command=said)
    memory_row(w, done, said)
    w.note = f"{len(rows)} steps counted"


class Stage:
    """Its function, its limit and the least time that it is begun with, seconds."""

    def __init__(self, function, limit, least):
        self.function, self.limit, self.least = function, limit, least


STAGES = {  # in order of worth
    "right": Stage(right, 150, 60), "main": Stage(main_run, 40, 25), "beside": Stage(beside, 300, 60), "kernels": Stage(kernels, 90, 40),
    "products": Stage(products, 60, 30), "safe": Stage(safe, 120, 50),
    "max_lr": Stage(lesson("max_lr", lambda s: s.max_lr, "max_lr"), 200, 45),
    "hops": Stage(lesson("hops", lambda s: s.hops, "hops"), 180, 45),
    "long": Stage(lesson("depth", lambda s: s.long, "long"), 280, 60),
    "deep": Stage(deep, 100, 50)}
TOGETHER = {"lesson": ["max_lr", "hops", "long"]}


# ---------------------------------------------------------------------------------------------------------
# A call

class Session:
    def __init__(self, sizes, rehearsal):
        self.sizes, self.rehearsal = sizes, rehearsal
        self.out = Path(os.environ.get("OUT") or ROOT / ("build/rehearsal_out" if rehearsal else "build/card_out"))
        self.out.mkdir(parents=True, exist_ok=True)
        self.scratch = Path(tempfile.mkdtemp(prefix="card_"))
        self.logs = self.scratch / "logs"
        self.logs.mkdir()
        self.gpu, self.driver = results.nvidia_smi("name"), results.nvidia_smi("driver_version")
        if not self.gpu:
            raise Failed("expected an NVIDIA GPU that nvidia-smi names, found none; dev/card.sh --rehearse runs it all without one")
        self.card = results.results_name(self.gpu)
        self.file = self.out / f"{self.card}.csv"
        self.commit, self.kernels = ((ROOT / sizes.programs / name).read_text().strip() for name in ("commit", "kernels"))
        cache = self.scratch / "torch_cache"
        self.environment = {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton"), "PYTHONUNBUFFERED": "1"}
        self.cache, kept = cache, ROOT / sizes.programs / CACHE
        cache.mkdir()
        if kept.exists():
            with tarfile.open(kept) as tar:
                tar.extractall(cache)
        self.torch = os.environ.get("TORCH_PYTHON")  # a Python whose PyTorch can use the GPU

    def find_torch(self):
        code = "import numpy, torch; assert torch.cuda.is_available() and hasattr(torch, 'compile')"
        for python in dict.fromkeys([os.environ.get("PYTHON") or "python3", "python3", "/usr/bin/python3"]):
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                if self.torch is None and subprocess.run([python, "-c", code], capture_output=True, timeout=60).returncode == 0:
                    self.torch = python

    def add_rows(self, rows, command):
        results.append(self.file, rows, results.about(command, self.commit, self.kernels))

    def have(self, metric):
        """Whether a row of these kernels is committed, or in this folder of results; of a stage, one that says it was right."""
        for path in (results.kept_file(self.gpu), self.file):
            for row in results.read(path) if path.exists() else []:
                if row["metric"] == metric and row["kernels"] == self.kernels and (row["unit"] != "ok" or float(row["value"]) == 1):
                    return True
        return False

    def save(self, name, folder, keep=lambda path: True):
        """A folder as a tar in the results, whole or not at all."""
        temporary = self.out / (name + ".tmp")
        with tarfile.open(temporary, "w:gz") as tar:
            for path in sorted(folder.rglob("*")):
                if path.is_file() and keep(path):
                    tar.add(path, path.relative_to(folder))
        if temporary.stat().st_size < MOST_BYTES:
            os.replace(temporary, self.out / name)
        else:
            temporary.unlink()
            print(f"  {name}: over {MOST_BYTES >> 20} MiB, left there", flush=True)

    def save_logs(self):
        for path in self.logs.glob("*.log"):
            if path.stat().st_size > LOG_BYTES:
                end = path.read_bytes()[-LOG_BYTES:]
                path.write_bytes(b"[only its end]\n" + end)
        self.save("logs.tar.gz", self.logs)

    def save_cache(self):
        self.save(CACHE, self.cache)

    def save_lesson(self, runs):
        """Finished runs and tables, without checkpoints: what was cut off begins anew."""
        def whole(path):
            experiment, name, *_ = path.relative_to(runs).parts
            record = runs / experiment / (re.sub(r"\.(json|txt|err)$", "", name) + ".json")
            return experiment == "tables" or path.suffix != ".bin" and record.exists() and re.search('"end": "(finished|diverged)"', record.read_text())
        if runs.exists():
            self.save("lesson.tar.gz", runs, whole)

    def start_programs(self):
        """Tries each program; one that does not start gets the toolkit's libraries, and if that does not help is built here. Returns what is wrong."""
        def starts(name):
            flag = "--version" if name.startswith("test") else "-h"
            try:
                done = subprocess.run([self.sizes.programs + "/" + name, flag], cwd=ROOT, capture_output=True, text=True, timeout=60,
                                      env={**os.environ, **self.environment})
            except (OSError, subprocess.TimeoutExpired) as error:
                return str(error)
            return "" if 0 <= done.returncode < 126 else (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        with ThreadPoolExecutor(8) as pool:
            bad = {name: why for name, why in zip(PROGRAMS, pool.map(starts, PROGRAMS)) if why}
        if bad:
            folders = [str(p.parent) for base in ("/usr/local", "/opt") for p in Path(base).glob("**/libcublasLt.so.1*")][:2]
            self.environment["LD_LIBRARY_PATH"] = ":".join(folders)
            bad = {name: why for name in bad if (why := starts(name))}
        for name, why in bad.items():
            print(f"{name} does not start ({why}): building it here", flush=True)
        if bad and not self.rehearsal:
            for name in bad:
                (ROOT / self.sizes.programs / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                done = subprocess.run(["make", f"-j{os.cpu_count()}", *(f"{self.sizes.programs}/{name}" for name in bad)], cwd=ROOT,
                                      capture_output=True, text=True, timeout=120, env={**os.environ, "CPATH": self.sizes.programs})
                (self.logs / "build.log").write_text(done.stdout + done.stderr)
            bad = {name: why for name in bad if (why := starts(name))}
        return bad

    def run_stage(self, name, seconds, resume):
        """Runs a stage in a process of its own. Returns (status, seconds, note)."""
        begin, note = time.monotonic(), self.scratch / f"{name}.note"
        print(f"\n== {name}, at most {seconds:.0f} s", flush=True)
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            status = 2
            try:
                become_subreaper()
                work = Work(self, name, seconds, resume)
                try:
                    STAGES[name].function(work)
                except Failed as why:
                    work.bad.append(str(why))
                except Exception as error:
                    traceback.print_exc(file=sys.stdout)
                    (self.logs / f"{name}-error.log").write_text(traceback.format_exc())
                    work.bad.append(f"{type(error).__name__}: {error}".splitlines()[0])
                note.write_text("; ".join(work.bad) or work.note)
                status = 1 if work.bad else 0
            finally:
                sys.stdout.flush()
                os._exit(status)
        status = None
        while status is None and time.monotonic() < begin + seconds:
            with contextlib.suppress(InterruptedError):
                time.sleep(0.05)
            done, code = os.waitpid(pid, os.WNOHANG)
            status = os.waitstatus_to_exitcode(code) if done else None
        end_tree(os.getpid())
        if status is None:
            os.waitpid(pid, 0)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # orphans
                pass
        said = note.read_text() if note.exists() else ""
        took = time.monotonic() - begin
        outcome, said = {0: ("ok", said), 1: ("NOT OK", said), None: ("CUT OFF", f"its {seconds:.0f} s were over")}.get(
            status, ("DIED", ended(status or 0)))
        self.add_rows([measured(f"stage/{name}", int(status == 0), "ok")], f"dev/card.sh {name}")
        print(f"== {name}: {outcome} after {took:.0f} s{': ' + said if said else ''}", flush=True)
        with contextlib.suppress(OSError, tarfile.TarError):
            self.save_logs()
        return outcome, took, said

    def table(self, outcomes, begun):
        """At most 25 lines: the stages, then the figures that have a goal or a peer."""
        lines = [f"{self.gpu}, driver {self.driver}, {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC, commit "
                 f"{self.commit}, kernels {self.kernels}"]
        lines += [f"{name:10} {outcome:9} {took:4.0f} s  {note[:90]}" for name, (outcome, took, note) in outcomes.items()]
        rows = [row for row in (results.read(self.file) if self.file.exists() else []) if row["unit"] != "ok"]
        rows = list({row["metric"]: row for row in rows}.values())[-400:]
        told = [(results.said(row["metric"], row["value"], row["ratio"]), row) for row in rows]
        told = sorted(told, key=lambda pair: (not pair[0], "/" not in pair[1]["metric"]))  # with a goal first, then of whole runs
        for said, row in told[:max(0, 23 - len(lines))]:
            peer = f"{row['peer_value']:>12} {row['ratio']:>7}" if row["peer_value"] else " " * 20
            lines.append(f"{row['metric'][:44]:44} {row['value']:>12} {row['unit']:10} {peer} {said}".rstrip())
        good = sum(outcome == "ok" for outcome, _, _ in outcomes.values())
        lines.append(f"in all {time.monotonic() - begun:.0f} s; {len(rows)} figures in {self.file.name}")
        lines.append(f"{good} passed, {len(outcomes) - good} failed")
        return lines


def call(a, sizes):
    begun = time.monotonic()
    become_subreaper()
    session = Session(sizes, a.rehearse)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(124))  # a call that is cut off leaves what it has
    named = [part for name in a.stages for part in TOGETHER.get(name, [name])]
    outcomes = {}
    try:
        with ThreadPoolExecutor(1) as pool:  # starting PyTorch takes seconds
            torch = pool.submit(session.find_torch)
            missing = session.start_programs()
            torch.result()
        print(f"{session.gpu}, driver {session.driver}; PyTorch: {session.torch or 'none with CUDA'}; results in {session.out}", flush=True)
        for name, why in missing.items():
            print(f"{name} cannot run here: {why}", flush=True)
        seconds = a.seconds or (sum(STAGES[name].limit for name in named) + 50 if named else 470)
        for name in named or STAGES:
            if not named and session.have(f"stage/{name}"):
                print(f"{name}: dev/results has it of these kernels", flush=True)
                continue
            stage, left = STAGES[name], seconds - (time.monotonic() - begun) - 3
            if left < min(stage.least, stage.limit):
                outcomes[name] = "not begun", 0, f"{max(0, left):.0f} s are left, it wants {stage.least}"
                continue
            outcomes[name] = session.run_stage(name, min(a.limit or stage.limit, left), not named)
        if not session.have("stage/right"):
            print("\nright has not passed on this GPU with these kernels: until it has, no rate counts", flush=True)
    finally:
        end_tree(os.getpid())
        if session.gpu:
            lines = session.table(outcomes, begun)
            (session.out / "table.txt").write_text("\n".join(lines) + "\n")
            print("\n" + "\n".join(lines), flush=True)
            with contextlib.suppress(OSError, tarfile.TarError):
                session.save_logs()
        shutil.rmtree(session.scratch, ignore_errors=True)
    return any(outcome not in ("ok", "not begun") for outcome, _, _ in outcomes.values())


# ---------------------------------------------------------------------------------------------------------
# Before and after

def machine_code(path):
    """A hash of the SASS in a program that was linked with uncompressed device code: names and bytes of all kernels' code sections. The
    same whatever comments, line numbers or host code are."""
    data, found = Path(path).read_bytes(), []
    for at in (m.start() for m in re.finditer(rb"\x7fELF\x02\x01", data)):
        if at == 0 or struct.unpack_from("<H", data, at + 18)[0] != 190:  # EM_CUDA
            continue
        sections, size, count, names = struct.unpack_from("<Q", data, at + 40)[0], *struct.unpack_from("<HHH", data, at + 58)
        headers = [struct.unpack_from("<IIQQQQ", data, at + sections + i * size) for i in range(count)]
        strings = at + headers[names][4]
        for name, _, _, _, offset, length in headers:
            text = data[strings + name:data.index(b"\0", strings + name)]
            if text.startswith(b".text."):
                found.append(text + b"\0" + data[at + offset:at + offset + length])
    if not found:
        raise Failed(f"{path}: expected uncompressed code of kernels, found none; build it by make card")
    return hashlib.sha256(b"\0".join(sorted(found))).hexdigest()[:12]


def say(*command, **more):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, **more).stdout.strip()


def pack_rehearsal():
    """The programs on the CPU headers under the card's names, and data."""
    folder = ROOT / REHEARSAL.programs
    folder.mkdir(parents=True, exist_ok=True)
    for name in PROGRAMS + ["cupti_idle.so", "fake_cupti.so"]:
        built = ROOT / name if "_cpu" in name else ROOT / "build" / (name if name.endswith(".so") else f"{name}_on_cpu")
        (folder / name).unlink(missing_ok=True)
        if built.exists():
            (folder / name).symlink_to(built)
    for name, text in (("commit", "rehearsal"), ("kernels", "rehearsal")):
        (folder / name).write_text(text + "\n")
    for V in (256, 50257):
        bench_gpu.data_file(V, folder)


def pack(baseline):
    """What make card adds to the programs: data, the commit's name, the hash of the kernels, doctest's header; then what it all takes."""
    folder = ROOT / CARD.programs
    for name in PROGRAMS + ["cupti_idle.so"]:
        if (folder / name).exists():
            say("strip", "--strip-unneeded", str(folder / name))
    commit = results.git_commit()
    (folder / "commit").write_text(commit + "\n")
    (folder / "kernels").write_text(machine_code(folder / "train_keel") + "\n")
    for V in (256, 50257):
        bench_gpu.data_file(V, folder)
    for include in (Path("/usr/include/doctest/doctest.h"), Path("/usr/local/include/doctest/doctest.h")):
        if include.exists():  # for a test program that must be built there
            (folder / "doctest").mkdir(exist_ok=True)
            shutil.copy(include, folder / "doctest")
    shutil.rmtree(folder / "baseline", ignore_errors=True)
    if baseline:
        (folder / "baseline").mkdir()
        with tempfile.TemporaryDirectory() as tree:
            subprocess.run(f"git archive {shlex.quote(baseline)} | tar -x -C {shlex.quote(tree)}", shell=True, cwd=ROOT, check=True)
            nvcc, arch = say("dev/cuda.sh", "nvcc"), say("dev/cuda.sh", "arch", env={**os.environ, "ARCH": "90"})
            say(nvcc, "-std=c++20", "--expt-relaxed-constexpr", *arch.split(), f"-I{tree}", "-o", str(folder / "baseline" / "train_keel"),
                f"{tree}/train_keel.cu", "-lcublasLt", *say("dev/cuda.sh", "rpath").split(), "-Xlinker", "-s")
        (folder / "baseline" / "commit").write_text(say("git", "rev-parse", "--short", baseline) + "\n")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in files)
    for path in files:
        print(f"{path.stat().st_size / 2**20:8.2f} MiB  {path.relative_to(ROOT)}")
    print(f"{total / 2**20:8.2f} MiB  in all, of {PACK_BYTES >> 20}; commit {commit}, kernels {(folder / 'kernels').read_text().strip()}")
    if total > PACK_BYTES:
        raise Failed(f"expected at most {PACK_BYTES >> 20} MiB in {CARD.programs}, found {total / 2**20:.1f}")


def keep(folder):
    """Takes what came back from a card into dev/results: its rows, the lesson's runs; and PyTorch's compiled code to build/card."""
    folder, kept = Path(folder), results.FOLDER
    tables = [path for path in folder.glob("*.csv")]
    if not tables:
        raise Failed(f"--keep: expected a csv of results in {folder}, found none")
    for path in tables:
        target, rows = kept / path.name, results.read(path)
        had = {tuple(row.values()) for row in results.read(target)} if target.exists() else set()
        fresh = [list(row.values()) for row in rows if tuple(row.values()) not in had]
        for row in fresh:
            results.append(target, [row[:len(results.MEASURED)]], row[len(results.MEASURED):])
        print(f"{target.relative_to(ROOT)}: {len(fresh)} rows added, {len(rows) - len(fresh)} were there")
        if (folder / "lesson.tar.gz").exists():
            lesson_folder = kept / f"lesson_{path.stem}"
            lesson_folder.mkdir(exist_ok=True)
            shutil.copy(folder / "lesson.tar.gz", lesson_folder / "runs.tar.gz")
            with tarfile.open(folder / "lesson.tar.gz") as tar:
                for member in tar.getmembers():
                    if member.name.startswith("tables/") and member.name.endswith((".csv", ".png")):
                        member.name = Path(member.name).name
                        tar.extract(member, lesson_folder)
            print(f"{lesson_folder.relative_to(ROOT)}: the lesson's runs and tables")
    if (folder / CACHE).exists() and (ROOT / CARD.programs).exists():
        shutil.copy(folder / CACHE, ROOT / CARD.programs / CACHE)
        print(f"{CARD.programs}/{CACHE}: PyTorch's compiled code, for the next call")


def main():
    parser = argparse.ArgumentParser(prog="dev/card.sh", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__, epilog=
                                     "stages, in order of worth:\n" + "\n".join(
                                         f"  {name:9} {stage.limit:4} s  {(stage.function.__doc__ or lesson.__doc__).splitlines()[0]}"
                                         for name, stage in STAGES.items()) + "\n  lesson: " + ", ".join(TOGETHER["lesson"]))
    add = parser.add_argument
    add("stages", nargs="*", metavar="STAGE", help="stages to run; without, those that dev/results does not have yet of this GPU and these kernels")
    add("--seconds", type=float, help="of the whole call, after which no stage runs on [470; with STAGEs their limits and 50]")
    add("--limit", type=float, help="of each stage, instead of its own")
    add("--rehearse", action="store_true", help="all of it without a GPU: the programs of make rehearsal, small models")
    add("--keep", metavar="FOLDER", help="take the results in FOLDER into dev/results")
    add("--pack", action="store_true", help=argparse.SUPPRESS)  # the second half of make card
    add("--baseline", default="", help=argparse.SUPPRESS)
    a = parser.parse_args()
    unknown = [name for name in a.stages if name not in STAGES and name not in TOGETHER]
    if unknown:
        raise Failed(f"expected stages of {', '.join(STAGES)} or lesson, found {unknown[0]}")
    if a.pack:
        return pack_rehearsal() if a.rehearse else pack(a.baseline)
    if a.keep:
        return keep(a.keep)
    if a.rehearse:  # stand-ins of nvidia-smi, compute-sanitizer and PyTorch on CUDA
        stand_ins = ROOT / "test" / "card"
        os.environ["PATH"] = f"{stand_ins}:{os.environ['PATH']}"
        os.environ["TORCH_PYTHON"] = str(stand_ins / "torch") if subprocess.run([stand_ins / "torch", "--here"]).returncode == 0 else ""
    sizes = REHEARSAL if a.rehearse else CARD
    if not (ROOT / sizes.programs / "kernels").exists():
        raise Failed(f"expected {sizes.programs}, found none; make {'rehearsal' if a.rehearse else 'card'} builds it")
    return call(a, sizes)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Failed, results.Failed) as why:
        sys.exit(f"card: {why}")
