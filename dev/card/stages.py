"""The stages of dev/card.sh: what each runs, what it finds right or wrong, and the rows it leaves.

A stage is a function of a Work, in a process of its own; dev/card/card.py ends it at its limit with all that it has started.
"""

import contextlib
import csv
import filecmp
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import results

ROOT = Path(__file__).resolve().parents[2]
DOWN = 5  # seconds between SIGTERM and SIGKILL
SANITIZER_SECONDS = 90  # of one sanitizer's run: a hundred reports with their stacks take minutes
RECORDER = "cupti_idle.so"
# Of a program that runs beside others: a thread that waits must not spin, or it takes the cores from them.
BESIDE = {"OMP_NUM_THREADS": str(max(1, min(4, os.cpu_count() // 4))), "OMP_WAIT_POLICY": "passive"}
SANITIZE = {**BESIDE, "KEEL_SANITIZE": "1"}  # train_keel: a buffer an allocation, no large product

# Models and numbers of steps: on a card ...
CARD = SimpleNamespace(
    programs="build/card",
    doctest="",
    small="-L 4 -C 64 -H 2 -t 72 -b 2 -d 288",
    norms="",
    main="-L 1024 -x 12",
    models="pre_L24_C768 keel_L1024_C256 keel_L512_C1024",
    beside="--steps 6 --repeats 1",
    bench="",
    attended="-L 64 -C 1024 -t 1024 -d 65536 -x 10",
    idle="--steps 3 -L 1024 -d 16384",  # 10 steps of 12812 nodes each recorded more than 40 s
    recorded={},
    killed="-L 16 -C 64 -t 64 -b 16 -x 400 -n 50",
    curve="-L 16 -C 64 -H 2 -t 64 -b 16 -x 300",
    sanitizers="memcheck racecheck initcheck synccheck",
    lesson="train_keel",
    max_lr="--gpu --set B=16 seeds=1 more=[]",
    hops="--gpu --set L=[8,16,32,64] B=64 steps=4000 lrs=[2e-3] start=[2e-3]",
    long="--gpu --set L=[512] equal=[] steps=200 warmup=50 lrs=[3e-3,6e-3] start=[3e-3,6e-3] pre_start=[3e-3,6e-3]",
    deep="-L 1024 -C 1024 -t 1024 -d 16384 -x 10")
# ... and in the rehearsal, with the kernels on the CPU.
_TINY = "-L 4 -C 64 -H 2 -t 32 -b 2"
REHEARSAL = SimpleNamespace(
    programs="build/rehearsal",
    doctest="-tc=*GELU*,Predictions*,Embedding*,AdamW*,*memory?table*",
    small=_TINY,
    norms="keel",
    main=f"{_TINY} -x 5",
    models="tiny other",
    beside="--steps 5 --repeats 1 --modes eager --model tiny=keel,4,64,2,32,128,256 --model other=pre,2,64,1,16,16,50257",
    bench="--small",
    attended="-L 4 -C 128 -H 2 -t 72 -b 2 -x 5",
    idle=f"--steps 2 {_TINY}",
    recorded={"LD_PRELOAD": str(ROOT / "build/rehearsal/fake_cupti.so")},
    killed=f"{_TINY} -x 24 -n 6",
    curve=f"{_TINY} -d 256 -x 10",
    sanitizers="memcheck racecheck",
    lesson="train_keel_fp32",
    max_lr="--tiny",
    hops="--tiny",
    long="--tiny",
    deep=f"{_TINY} -x 4")


# ---------------------------------------------------------------------------------------------------------
# Processes

def descendants(of):
    """Process ids below `of`: those that left its session too, and orphans, where `of` is their subreaper."""
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


def send(sign, pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, sign)


def end_tree(of):
    """Ends everything below a process, and what it starts meanwhile."""
    for _ in range(50):
        below = descendants(of)
        if not below:
            return
        send(signal.SIGKILL, below)
        time.sleep(0.1)


def ended(status):
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


class Done:
    """A command that has ended: status (None: its time was up), what it printed, seconds."""

    def __init__(self, status, text, seconds):
        self.status, self.text, self.seconds, self.ok = status, text, seconds, status == 0

    def find(self, pattern):
        return re.search(pattern, self.text, re.M)

    def why(self):
        """How it failed, in a line."""
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        return ("its time was up" if self.status is None else ended(self.status)) + (f": {lines[-1][:100]}" if lines else "")


def words(command):
    return shlex.split(command) if isinstance(command, str) else [str(word) for word in command]


# ---------------------------------------------------------------------------------------------------------
# A stage at work

class Work:
    """What a stage has at hand."""

    def __init__(self, session, stage, seconds, resume):
        self.session, self.stage, self.resume = session, stage, resume
        self.s, self.scratch = session.sizes, session.scratch
        self.deadline = time.monotonic() + seconds
        self.bad, self.note = [], ""
        self.train_keel, self.text = self.program("train_keel"), f"-i {self.s.programs}/text.txt"
        self.lock = threading.Lock()

    def left(self):
        return self.deadline - time.monotonic()

    def program(self, name):
        return f"{self.s.programs}/{name}"

    def start(self, command, log, env=None):
        return subprocess.Popen(words(command), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                env={**os.environ, **self.session.environment, **(env or {})}, start_new_session=True)

    def run(self, name, command, limit=math.inf, env=None):
        """Runs it, its output in the log of this name. At its limit it is ended, by SIGTERM first."""
        limit = min(limit, self.left() - 1)
        path, begin, status = self.session.logs / f"{self.stage}-{name}.log", time.monotonic(), None
        with open(path, "w") as log:
            print("$", *(f"{key}={value}" for key, value in (env or {}).items()), shlex.join(words(command)), file=log, flush=True)
            try:
                child = self.start(command, log, env) if limit > 0 else None
            except OSError as error:
                return Done(127, str(error), 0)
            try:
                status = child.wait(limit) if child else None
            except subprocess.TimeoutExpired:
                below = [child.pid, *descendants(child.pid)]
                for sign, seconds in ((signal.SIGTERM, DOWN), (signal.SIGKILL, DOWN)):
                    send(sign, below + descendants(child.pid))
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(seconds)
        text = re.sub(r"\x1b\[[0-9;]*m", "", path.read_text(errors="replace").split("\n", 1)[1])
        seconds = time.monotonic() - begin
        with open(path, "a") as log:
            print(f"\n[{'its time was up' if status is None else ended(status)}, {seconds:.1f} s]", file=log)
        return Done(status, text, seconds)

    def together(self, jobs, at_once=16):
        """What functions return that run at the same time, in their order."""
        with ThreadPoolExecutor(at_once) as pool:
            return [future.result() for future in [pool.submit(job) for job in jobs]]

    def rows(self, rows, command=None):
        with self.lock:
            self.session.add_rows(rows, command or f"dev/card.sh {self.stage}")

    def row(self, metric, value, unit, peer=None, command=None):
        self.rows([results.measured(metric, value, unit, peer)], command)

    def check(self, name, ok, why=""):
        """A row that says whether it was right. What was not makes the stage one that failed, at its end."""
        self.row(f"{self.stage}/{name}", int(bool(ok)), "ok")
        if not ok:
            with self.lock:
                self.bad.append(f"{name}: {why}")
        print(f"  {name}: {'ok' if ok else 'NOT OK: ' + why}", flush=True)
        return ok

    def benchmark(self, name, command, least, limit=math.inf, env=None):
        """Runs what writes measured rows to --csv FILE, `least` at least, and takes them in as they come. Returns them."""
        path, taken, stop = self.scratch / f"{name}.csv", [], threading.Event()

        def take():
            text = path.read_text() if path.exists() else ""
            rows = list(csv.reader(text[:text.rfind("\n") + 1].splitlines()))[1:]  # whole ones, without the header
            if rows[len(taken):]:
                self.rows(rows[len(taken):], shlex.join(words(command)))
                taken.extend(rows[len(taken):])

        def watch():
            while not stop.wait(0.5):
                take()

        watcher = threading.Thread(target=watch)
        watcher.start()
        done = self.run(name, [*words(command), "--csv", path], limit, env)
        stop.set(), watcher.join()
        take()
        self.check(name, done.ok and len(taken) >= least, f"{done.why()}; {len(taken)} rows")
        return taken


# ---------------------------------------------------------------------------------------------------------
# right

def sanitizer(tool):
    return f"{shutil.which('compute-sanitizer') or '/usr/local/cuda/bin/compute-sanitizer'} --tool {tool} --error-exitcode 9"


def sanitize(w, tool, build):
    """A tool's verdict on a short run. What it says of the libraries' kernels alone is told, and is no fault of ours."""
    command = f"{sanitizer(tool)} {w.program(build)} {w.s.small} {w.text} -x 3 -s 2 -g 4 -v 0"
    done = w.run(f"{tool}-{build}", command, SANITIZER_SECONDS, env=SANITIZE)
    named = set(re.findall(r"^=========.*?\bat (?:void )?([\w:]+)[<(].*\+0x", done.text, re.M))
    ours = set(re.findall(r"(\w+)\(", " ".join(re.findall(r"^__global__ void .*", (ROOT / "train_keel.cu").read_text(), re.M))))
    theirs = bool(named) and not named & ours
    if theirs:
        print(f"  {tool}, {build}: reports in kernels of libraries alone: {', '.join(sorted(named))[:200]}", flush=True)
    w.check(f"{tool}_{build}", done.ok and done.find("SUMMARY: 0") or theirs and done.status == 9, done.why())


def diagnose(w, name, command):
    """What failed once more: without overlapping launches, and under memcheck. The logs say what each found."""
    again, checked = w.together([
        lambda: w.run(f"{name}-no-overlap", command, 40, {"KEEL_OVERLAP": "0"}),
        lambda: w.run(f"{name}-memcheck", [*words(sanitizer("memcheck")), *words(command)], 60, SANITIZE)])
    print(f"    {name}: without overlapping launches {'right' if again.ok else 'wrong too'}; "
          f"memcheck: {'nothing' if checked.ok else checked.why()}", flush=True)


def listed(w, name, command):
    """What doctest lists, between its two rules."""
    text = w.run(name, command, 20).text.split("=" * 79)
    return [line.strip() for line in (text[1] if len(text) > 1 else "").splitlines() if line.strip()]


def failing_cases(done, names):
    """The test cases that failed, from the blocks of doctest's console; and the one that its time was up in."""
    found = []
    for block in re.split(r"^={20,}$", done.text, flags=re.M):
        case = re.search(r"^TEST CASE:\s+(.*)$", block, re.M)
        if case and re.search(r"\b(ERROR|CRASHED)\b", block):
            found.append(case[1].strip())
    if done.status is None:
        ended = set(re.findall(r"^[\d.]+ s: (.*)$", done.text, re.M))
        found += [name for name in names if name not in ended][:1]
    return list(dict.fromkeys(found))


def suites(w, build, names, limit, what):
    """Suites of a build's tests, a process each and all at once; the cases that fail are named and tried again."""
    program = w.program(f"test_gpu_{build}")
    commands = [[program, f"-ts={name}", *words(w.s.doctest)] for name in names]
    logs = [f"{what}-{name.replace(' ', '-')}" for name in names]
    ran = w.together([lambda log=log, command=command: w.run(log, [*command, "-d=true"], limit, BESIDE)
                      for log, command in zip(logs, commands)])
    counts = [done.find(r"test cases:\s*(\d+) \|\s*(\d+) passed \|\s*(\d+) failed") for done in ran]
    passed, failed = (sum(int(count[i]) for count in counts if count) for i in (2, 3))
    bad = [i for i, done in enumerate(ran) if not done.ok or not counts[i]]
    why = [f"{names[i]}: " + (f"{counts[i][3]} cases failed" if counts[i] else ran[i].why()) for i in bad]
    w.row(f"right/{what}_cases", passed, "cases passed", max(1, passed + failed))
    if w.check(what, not bad and passed > 0, "; ".join(why) or "no test case ran"):
        return
    for i in bad:
        if w.left() < 15:
            return
        cases = failing_cases(ran[i], listed(w, f"{logs[i]}-list", [*commands[i], "-ltc"]))
        print(f"  {what}, {names[i]}: failing: {'; '.join(cases) or 'no case by name'}", flush=True)
        # A comma would part two names, as a star or a question mark stands for others.
        tries = [(f"{logs[i]}-case{j}", [program, "-tc=" + case.replace(",", "?")]) for j, case in enumerate(cases[:6])]
        alone = w.together([lambda log=log, command=command: w.run(log, command, 30, BESIDE) for log, command in tries])
        for case, one in zip(cases, alone):
            print(f"    alone in a process {'right' if one.ok else 'wrong too'}: {case}", flush=True)
        for log, command in [at for at, one in zip(tries, alone) if not one.ok][:2]:
            diagnose(w, log, command)


def compare(w, limit):
    command = ["test/compare.sh", "--brief", "--programs", w.s.programs, "--jobs", max(2, os.cpu_count() // 4)]
    command = ["bash", *command, *(["--norms", w.s.norms] if w.s.norms else [])]
    done = w.run("compare", command, limit, BESIDE)
    count = done.find(r"^(\d+) passed, (\d+) failed")
    if count:
        w.row("right/compare_models", int(count[1]), "comparisons passed", int(count[1]) + int(count[2]))
    w.check("compare", done.ok, f"{count[2]} comparisons failed" if count else done.why())
    bad = re.findall(r"^(train_keel\S*) +(train_keel\S*) +(-.*?) +NOT (?:OK|DUMPED)", done.text, re.M)
    for i, (writer, reader, model) in enumerate(bad[:2]):
        program = w.program(reader if "cpu" in writer else writer)
        diagnose(w, f"compare{i}", f"{program} {model} -i keel_common.h -v 0 --dump {w.scratch}/dump{i}")


@contextlib.contextmanager
def torch_warming(w, spare):
    """PyTorch's compilation into its cache, a process a model, beside what is not timed and does not count memory; then for
    as long as more than `spare` seconds are left."""
    stop = threading.Event()

    def warm():
        torch = w.session.find_torch(stop)
        if not torch or stop.is_set():
            return
        children = []
        for model in w.s.models.split():
            with open(w.session.logs / f"{w.stage}-warm-{model}.log", "w") as log:
                command = ["nice", "-n", 19, sys.executable, "dev/bench/bench_gpu.py", "--warm", "--rows", model,
                           *words(w.s.beside), "--data", w.s.programs, "--torch-python", torch]
                children.append(w.start(command, log, {"TORCHINDUCTOR_COMPILE_THREADS": "4"}))
        while any([child.poll() is None for child in children]) and not stop.wait(0.2):
            pass
        if all([child.poll() == 0 for child in children]):
            (w.session.cache / "whole").touch()

    thread = threading.Thread(target=warm)
    if not w.session.torch_is_warm:
        thread.start()
    try:
        yield
    finally:
        if not w.session.torch_is_warm:
            thread.join(max(0, w.left() - spare))
            stop.set(), thread.join()
            end_tree(os.getpid())  # the tests of memory read what is free on the whole device
            w.session.save_cache()


def right(w):
    """A short run; the GPU suites in BF16 and FP32, CPU against GPU both ways; the tests of memory alone"""
    smoke = f"{w.train_keel} {w.s.small} {w.text} -x 3 -s 2 -g 4 -v 0"
    done = w.run("smoke", smoke, 60)
    losses = re.findall(r"^step \d+/3 \| loss (\S+)", done.text, re.M)
    if not w.check("smoke", done.ok and len(losses) == 3 and all(math.isfinite(float(loss)) for loss in losses), done.why()):
        diagnose(w, "smoke", smoke)
    beside = [name for name in listed(w, "suites", [w.program("test_gpu_bf16"), "-lts"]) if name != "alone"]
    limit = max(w.left() - 35, w.left() / 2)  # what is left is for cases that fail, and for the tests of memory
    with torch_warming(w, math.inf):
        w.together([lambda: suites(w, "bf16", beside, limit, "bf16"), lambda: suites(w, "fp32", beside, limit, "fp32"),
                    lambda: compare(w, limit), *[lambda build=build: sanitize(w, "memcheck", build) for build in
                                                 ("train_keel", "train_keel_fp32")]])
    for build in ("bf16", "fp32"):
        suites(w, build, ["alone"], 40, f"{build}_memory")
    w.note = "BF16, FP32, CPU against GPU, memory"


# ---------------------------------------------------------------------------------------------------------
# How fast

def read_log(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def bits(folder):
    """A run's losses and gradient norms, as its log has them: %.9g tells all numbers of FP32 apart."""
    return [(row["loss"], row["grad_norm"]) for row in read_log(folder)]


def timed_run(w, name, command):
    """A training run whose speed, share of the matrix rate and memory are rows. Returns (Done, its folder, tokens/s)."""
    folder, command = w.scratch / name, f"{command} {w.text} -v 0 -s 0 -n 0"
    done = w.run(name, f"{command} -o {folder}")
    if not w.check(name, done.ok, done.why()):
        return done, folder, 0
    counted = read_log(folder)[3:]  # single launches, recording, first replay
    rate = median(float(row["tokens_per_second"]) for row in counted)
    machine = done.find(r"^machine .* (\d+) GFLOP/s in matrix products")
    used = done.find(r"^memory +needs ([\d.]+) (\w+) of ([\d.]+) (\w+),")
    needs, of = (float(used[i]) * 1024.0**("B", "KiB", "MiB", "GiB").index(used[i + 1]) / 2**30 for i in (1, 3))
    for what, value, unit, peer in (("tokens_per_second", rate, "tokens/s", None),
                                    ("mfu", 100 * median(float(row["mfu"]) for row in counted), "%", None),
                                    ("first_step", float(done.find(r"^start-up +([\d.]+) s to")[1]), "s", None),
                                    ("matrix_rate", float(machine[1]) / 1e3, "TFLOP/s", None), ("planned_memory", needs, "GiB", of)):
        w.row(f"{w.stage}/{what}", value, unit, peer, command)
    print(re.sub(r"^(step|note).*\n", "", done.text, flags=re.M), flush=True)  # the memory table
    return done, folder, rate


def main_run(w):
    """./train_keel -L 1024, all else by default, on text; twice, and the same bits both times"""
    runs = [timed_run(w, f"run{turn}", f"{w.train_keel} {w.s.main}") for turn in (1, 2)]
    if all(done.ok for done, _, _ in runs):
        w.check("same_bits", bits(runs[0][1]) == bits(runs[1][1]), "losses and gradient norms of two runs differ")
    w.note = f"{runs[0][2]:.0f} and {runs[1][2]:.0f} tokens/s"


def deep(w):
    """L = 1024, C = 1024, 6.5e9 parameters; BF16 states where FP32's do not fit the card"""
    gib = float(results.nvidia_smi("memory.total") or 0) / 1024
    states = "" if gib > 130 else "--moments bf16 --grads bf16 -r 32"
    _, _, rate = timed_run(w, "deep", f"{w.train_keel} {w.s.deep} {states}")
    w.note = f"{rate:.0f} tokens/s, states in {'BF16' if states else 'FP32'}"


def beside(w):
    """Whole steps beside PyTorch's at its best: GPT-2's shape, L = 1024 C = 256, L = 512 C = 1024"""
    torch, baseline = w.session.find_torch(), Path(w.program("baseline")) / "train_keel"
    w.check("pytorch", torch or w.session.rehearsal, "no Python with PyTorch and CUDA was found")
    models = [name for name in w.s.models.split() if not (w.resume and w.session.have(f"{name}/vs_torch"))]
    for i, name in enumerate(models):
        share = (w.left() - 2) / (len(models) - i) - DOWN
        command = [sys.executable, "dev/bench/bench_gpu.py", "--rows", name, *words(w.s.beside), "--data", w.s.programs, "--seconds",
                   int(share), "--torch-python", torch, *(["--baseline", baseline] if baseline.exists() else [])]
        rows = w.benchmark(name, command, 4, share + DOWN, {"TRAINER": w.train_keel})
        if torch:
            w.check(f"{name}_peer", any(row[0] == f"{name}/vs_torch" and row[4] for row in rows), "PyTorch was not measured")
        w.session.save_cache()
    w.note = ", ".join(models)


def pytorchs_attention(w, torch, limit):
    """bench_kernels' flags for what PyTorch's attention reaches on this card now: FlashAttention-2's and cuDNN's rates."""
    if not torch:
        return []
    done, table = w.run("sdpa", [torch, "dev/bench/bench_sdpa.py"], limit), w.scratch / "sdpa.csv"
    table.write_text("".join(line + "\n" for line in done.text.splitlines() if re.fullmatch(r"attention_\w+,[\d.]+", line)))
    w.check("sdpa", done.ok and table.stat().st_size > 0, done.why())
    return ["--sdpa", table] if table.stat().st_size else []


def attention(w):
    """Only by name, the first thing to ask after a change of attention: its test cases in BF16, its rates beside PyTorch's"""
    timed, cases = 15, [w.program("test_gpu_bf16"), "-tc=*ttention*", "-d=true"]  # timed: seconds that ours take
    done, torch = w.together([lambda: w.run("cases", cases, 25, BESIDE),
                              lambda: w.session.find_torch(seconds=w.left() - timed - 10)])
    count = done.find(r"test cases:\s*(\d+) \|\s*(\d+) passed")
    why = "; ".join(failing_cases(done, [])) or done.why()
    if not w.check("cases", done.ok and count and int(count[2]) > 0, why):
        return  # no rate of what is wrong
    peers = pytorchs_attention(w, torch, w.left() - timed)
    w.benchmark("attention", [w.program("bench_kernels"), *words(w.s.bench), "--only", "attention", *peers], 8)
    command, rates = f"{w.train_keel} {w.s.attended}", {"0": [], "1": []}
    for turn, wgmma in enumerate("0110"):  # on a Hopper by mma.sync and by wgmma, in turns
        folder = w.scratch / f"steps{turn}"
        done = w.run(f"steps{turn}", f"{command} {w.text} -v 0 -s 0 -n 0 -o {folder}", env={"KEEL_WGMMA": wgmma})
        if w.check(f"steps{turn}", done.ok, done.why()):
            rates[wgmma].append(median(float(row["tokens_per_second"]) for row in read_log(folder)[3:]))
    if all(rates.values()):
        w.row("attention/steps_by_wgmma", max(rates["1"]), "tokens/s", max(rates["0"]), f"KEEL_WGMMA=1 {command}")
    w.note = f"{count[2]} test cases, rates, steps"


def kernels(w):
    """Each kernel beside a copy, a product and PyTorch's attention; how long the GPU waits at 1024 sub-layers"""
    peers = pytorchs_attention(w, w.session.find_torch(), 40)
    w.benchmark("kernels", [w.program("bench_kernels"), *words(w.s.bench), *peers], 20)
    if (ROOT / w.program(RECORDER)).exists():
        w.benchmark("idle", f"bash dev/bench/idle.sh {w.s.idle} {w.text}", 1,
                    env={"TRAINER": w.train_keel, "CUPTI_IDLE": w.program(RECORDER), **w.s.recorded})
    else:
        print("  idle: NOT MEASURED: there was no CUPTI where the programs were built", flush=True)
    w.note = "kernels, idle time"


def products(w):
    """Ways of doing the matrix products: --tune, GELU epilogues, FP8, slices of rows"""
    w.benchmark("products", f"{w.program('bench_products')} {w.s.bench}", 20)
    w.note = "ways of doing matrix products"


# ---------------------------------------------------------------------------------------------------------
# safe, and the lesson

def kill_and_resume(w):
    whole, cut = w.scratch / "whole", w.scratch / "cut"
    command = f"{w.train_keel} {w.s.killed} {w.text} -v 0 -s 0 -o"
    done = w.run("whole", f"{command} {whole}")
    if not w.check("whole", done.ok, done.why()):
        return
    with open(w.session.logs / f"{w.stage}-cut.log", "w") as log:
        child = w.start(f"{command} {cut}", log)
        while child.poll() is None and not list(cut.glob("state_*[0-9].bin")) and w.left() > 2:
            time.sleep(0.002)
        child.kill()
    if not w.check("killed", child.wait() == -signal.SIGKILL, "the run had ended before it could be killed"):
        return
    done, last = w.run("resume", f"{command} {cut} -y"), sorted(whole.glob("model_*.bin"))[-1].name
    same = done.ok and filecmp.cmp(whole / last, cut / last, False) and bits(whole) == bits(cut)
    w.check("kill_and_resume", same, "another model or log than a run's that was not killed" if done.ok else done.why())


def safe(w):
    """compute-sanitizer's four tools; kill -9 and a resume; learning curves beside the CPU's; meanwhile PyTorch compiles"""
    curves = {"cpu": "train_keel_cpu", "bf16": "train_keel", "fp32": "train_keel_fp32",
              "bf16_states": "train_keel --moments bf16 --grads bf16"}

    def curve(name):
        """The mean of the last tenth of its losses, or None."""
        done = w.run(f"curve-{name}", f"{w.program(curves[name])} {w.s.curve} {w.text} -s 0 -n 0 -v 0 -o {w.scratch / name}",
                     env=BESIDE)
        if w.check(f"curve_{name}_runs", done.ok, done.why()):
            losses = [float(loss) for loss, _ in bits(w.scratch / name)]
            return sum(losses[-(len(losses) // 10):]) / (len(losses) // 10)

    jobs = [lambda name=name: curve(name) for name in curves] + [lambda: kill_and_resume(w)]
    jobs += [lambda tool=tool, build=build: sanitize(w, tool, build)
             for tool in w.s.sanitizers.split() for build in ("train_keel", "train_keel_fp32")]
    with torch_warming(w, 15):
        cpu, *gpu = w.together(jobs, 6)[:len(curves)]
        for name, mean in zip(list(curves)[1:], gpu):
            if cpu and mean:
                w.check(f"curve_{name}", abs(mean - cpu) <= 0.02 * cpu, f"its last losses {mean:.4f}, the CPU's {cpu:.4f}")
                w.row(f"safe/curve_{name}_loss", mean, "nats", cpu)
    w.note = "sanitizers, kill -9, curves"


def lesson(w, experiment, flags):
    """Finished runs come back with the results, and are not run again."""
    runs = ROOT / f"{w.s.programs}_lesson"
    tables, kept = runs / "tables" / w.stage, results.FOLDER / f"lesson_{w.session.card}" / "runs.tar.gz"
    if kept.exists() and not runs.exists():
        with tarfile.open(kept) as tar:
            tar.extractall(runs)
    command = f"dev/experiments/run.py {experiment} {flags} --tables --binary {w.program(w.s.lesson)} {w.text}"
    try:
        done = w.run(w.stage, [sys.executable, *words(command), "--runs", runs, "--results", tables], w.left() - 2 * DOWN)
    finally:
        w.session.save_lesson(runs)
    if w.check("runs", done.ok, done.why()):
        w.row(f"{w.stage}/rows", len(results.read(tables / f"{experiment}.csv")), "rows", command=command)
    w.note = f"{done.seconds:.0f} s of {experiment}"


def max_lr(w):
    """The largest learning rate at L = 64, C = 256, seven placements"""
    lesson(w, "max_lr", w.s.max_lr)


def hops(w):
    """Programs of up to 8 lookups, over depth"""
    lesson(w, "hops", w.s.hops)


def long(w):
    """keel against pre at L = 512, as many tokens as four minutes hold"""
    lesson(w, "depth", w.s.long)


class Stage:
    """Its function, its limit and the least time that it is begun with, seconds; whether it runs only where it is named."""

    def __init__(self, function, limit, least, by_name=False):
        self.function, self.limit, self.least, self.by_name = function, limit, least, by_name


STAGES = {  # in order of worth
    "attention": Stage(attention, 90, 25, by_name=True),
    "right": Stage(right, 150, 60), "main": Stage(main_run, 60, 25), "safe": Stage(safe, 150, 50),
    "beside": Stage(beside, 300, 60), "kernels": Stage(kernels, 120, 40), "products": Stage(products, 60, 30),
    "max_lr": Stage(max_lr, 260, 45), "hops": Stage(hops, 180, 45), "long": Stage(long, 280, 60), "deep": Stage(deep, 100, 50)}
TOGETHER = {"lesson": ["max_lr", "hops", "long"]}
