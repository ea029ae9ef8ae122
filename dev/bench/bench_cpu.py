"""Training speed on a CPU beside PyTorch's at its best, where a step's time goes, matrix products beside OpenBLAS's: see
dev/bench/bench_cpu.sh.

Who is compared takes turns, each in a process of its own: library threads that spin while idle would take cores from
the other. A figure is the median over the turns of the median within each; a ratio is the median of the turns' ratios,
each of two runs that followed one another, as a machine's speed may wander more than the ratios do. The fastest steps
say what the machine allows where its other users leave it alone.
"""

import argparse
import csv
import dataclasses
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import bench_cpu_layers

ROOT = Path(__file__).resolve().parents[2]
GOAL_PRODUCT = 0.8  # of OpenBLAS's rate
LIMIT = 400  # seconds a process: threads that spin on a busy machine may take a hundred times as long


@dataclasses.dataclass
class Size:
    name: str
    what: str
    L: int
    C: int
    H: int
    T: int
    B: int
    goal: float  # times PyTorch 2 at its best
    steps: int   # of a turn
    warm: int    # the first of them, which do not count
    V: int = 256

    def operations(self):
        """Of a step's matrix products but attention's"""
        return (36 * self.L * self.C ** 2 + 6 * self.V * self.C) * self.B * self.T


SIZES = [
    Size("L16 C256", "a small model", L=16, C=256, H=4, T=256, B=4, goal=1.5, steps=12, warm=2),
    Size("L64 C64", "the lesson's size", L=64, C=64, H=4, T=64, B=8, goal=2, steps=24, warm=2),
    Size("L12 C768", "GPT-2's width", L=12, C=768, H=12, T=512, B=4, goal=1.1, steps=4, warm=1),
]
# llm.c's README (github.com/karpathy/llm.c, "quick start (CPU)"): the five steps it prints, in ms; 12 blocks, B=4 T=64
LLM_C = [1452.121, 1288.673, 1369.394, 1290.761, 1323.779]
LLM_C_TOKENS, LLM_C_PARAMETERS = 4 * 64, 124439808

INSTALL = "`pip install torch numpy --index-url https://download.pytorch.org/whl/cpu`, then PYTHON=its/python or --torch-python"

# How PyTorch's OpenMP threads wait. They spin beside those of its BLAS: how long they should differs between builds and machines.
WAITS = [{}, {"GOMP_SPINCOUNT": "1000"}, {"OMP_WAIT_POLICY": "passive"}]


class Missing(Exception):
    """What cannot be measured here, and why."""


def output(command, threads, environment={}):
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads), **environment}
    try:
        done = subprocess.run([str(c) for c in command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except (OSError, subprocess.TimeoutExpired) as why:
        raise Missing(str(why))
    if done.returncode != 0:
        raise Missing(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"{command[0]} failed")
    return done.stdout.splitlines()


def progress(text):
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------
# One turn of each

def train(size, threads, program, steps, environment={}):
    """Milliseconds of each step, and what the trainer printed"""
    with tempfile.TemporaryDirectory() as folder:
        log = output([program, "-i", "keel_common.h", "-L", size.L, "-C", size.C, "-H", size.H, "-t", size.T, "-b", size.B,
                      "-x", steps, "-o", folder + "/run", "-v", 0, "-n", 0, "-s", 0], threads, environment)
        with open(folder + "/run/log.csv", newline="") as file:
            return [float(row["ms"]) for row in csv.DictReader(file)], "\n".join(log)


class PyTorch:
    """A form is a dict of bench_cpu_torch.py's choices and of how its threads wait."""

    def __init__(self, python, threads):
        if not python:
            raise Missing(f"no Python with torch and numpy found: {INSTALL}")
        self.python, self.threads = python, threads
        self.version, text = output([python, "dev/bench/bench_cpu_torch.py"], threads)
        self.choices = json.loads(text)
        self.installed = {**{key: values[0] for key, values in self.choices.items()}, "wait": {}}

    def is_2(self):
        return int(self.version.split(".")[0]) >= 2

    def words(self, form):
        names = {"eager": "eager", "blocks": "torch.compile of blocks", "whole": "torch.compile of the whole loss"}
        wait = " ".join(f"{k}={v}" for k, v in form["wait"].items()) or "threads wait as installed"
        return f"{names[form['form']]}, norm {form['norm']}, AdamW {form['adamw']}, weights {form['weights']}, {wait}"

    def step_times(self, size, form, steps):
        choice = {**dataclasses.asdict(size), **form, "steps": steps, "threads": self.threads}
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(ROOT / "build/torch_cache")}  # a turn does not compile again
        lines = output([self.python, "dev/bench/bench_cpu_torch.py", json.dumps(choice)], self.threads, {**cache, **form["wait"]})
        return [float(ms) for ms in lines]

    def fastest(self, size):
        """By each form's best step of half a turn, one choice after another, from the best so far; then the best three once more."""
        found = {}  # words -> (milliseconds, form)
        best = lambda count=1: sorted(found.values(), key=lambda f: f[0])[:count]

        def attempt(again=False, **changes):
            form = {**(best()[0][1] if found else self.installed), **changes}
            words = self.words(form)
            if any(value not in self.choices.get(key, [value]) for key, value in form.items()) or (words in found and not again):
                return
            try:
                ms = min(self.step_times(size, form, size.steps // 2 + 1)[size.warm:])
            except Missing as why:
                print(f"  not measured: {words}: {why}")
                return
            progress(f"  {ms:8.1f} ms  {words}")
            found[words] = min((ms, form), found.get(words, (ms, form)), key=lambda f: f[0])

        attempt(wait=WAITS[1], adamw=self.choices["adamw"][-1])
        attempt(weights="(in,out)")
        attempt(norm="formula")
        for form in ("blocks", "whole"):  # they fuse the formula themselves
            for weights in self.choices["weights"]:
                attempt(form=form, norm="formula", weights=weights)
        for wait in WAITS:
            attempt(wait=wait)
        for adamw in self.choices["adamw"]:
            attempt(adamw=adamw)
        for _, form in best(3):  # the machine may have been slow just then
            attempt(again=True, **form)
        if not found:
            raise Missing("none of its forms ran")
        return best()[0][1]


def product_turn(library, threads, environment={}):
    """The library's name, and GFLOP/s by (form, M, N, K)"""
    name, *lines = output(["build/bench_matmul", library], threads, environment)
    rows = [line.split(",") for line in lines]
    return name, {(form, int(m), int(n), int(k)): float(rate) for form, m, n, k, rate in rows}


def measure(peers, rounds):
    """Takes turns. peers: name -> function of no arguments; returns name -> list of its results."""
    results = {name: [] for name in peers}
    for turn in range(rounds):
        progress(f"  turn {turn + 1} of {rounds}: {', '.join(peers)}")
        for name, run in peers.items():
            results[name].append(run())
    return results


# ---------------------------------------------------------------------------------------------------------
# The parts of the report. rows: metric, value, unit, peer's value or None, ratio or None

def training(size, threads, pytorch, rounds, rows):
    print(f"\nA training step (forward, backward, clip, AdamW), {size.name}, {size.what}: "
          f"L={size.L} C={size.C} H={size.H} T={size.T} B={size.B} V={size.V}; {rounds} turns each")
    rate = lambda ms: size.B * size.T * 1e3 / ms
    forms = {}
    if pytorch:
        progress(f"looking for PyTorch's fastest form, {size.name}")
        try:
            best = pytorch.fastest(size)
            forms = {"PyTorch, its best": best} if best == pytorch.installed else \
                    {"PyTorch, its best": best, "PyTorch, as installed": pytorch.installed}
        except Missing as why:
            print(f"  PyTorch NOT MEASURED: {why}")
    names = list(forms)
    peers = {name: lambda form=form: pytorch.step_times(size, form, size.steps)[size.warm:] for name, form in forms.items()}
    peers["KEEL"] = lambda: train(size, threads, "./train_keel_cpu", size.steps)[0][size.warm:]
    results = measure({name: peers[name] for name in [*names[:1], "KEEL", *names[1:]]}, rounds)  # ours runs next to either
    fastest = {name: min(map(min, turns)) for name, turns in results.items()}  # milliseconds
    results = {name: [rate(median(turn)) for turn in turns] for name, turns in results.items()}
    mine = results["KEEL"]
    for name in ["KEEL", *names]:
        rates = results[name]
        text = f"  {name:24}{median(rates):8.0f} tokens/s  ({min(rates):.0f} to {max(rates):.0f}), fastest step {fastest[name]:7.1f} ms, " \
               f"{size.operations() / fastest[name] * 1e-6:4.0f} GFLOP/s of products"
        if name != "KEEL":
            ratios = [a / b for a, b in zip(mine, rates)]
            text += f"   KEEL / it: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), of the fastest steps " \
                    f"{fastest[name] / fastest['KEEL']:.2f}"
            rows.append((f"{size.name}, step / {name}", median(mine), "tokens/s", median(rates), median(ratios)))
        print(text)
        if name != "KEEL":
            print(f"  {'':4}{pytorch.words(forms[name])}")
    if forms:
        least = min(row[-1] for row in rows[-len(forms):])  # the form as installed may be the faster one after all
        verdict = "met" if least >= size.goal else "missed"
        print(f"  goal {size.goal} times PyTorch 2's best: " +
              (verdict if pytorch.is_2() else f"not decided, as this is PyTorch {pytorch.version}"))
    else:
        rows.append((f"{size.name}, step", median(mine), "tokens/s", None, None))
    sys.stdout.flush()


def total_rate(rates):
    """Of all products together: operations over time"""
    operations = {key: key[1] * key[2] * key[3] for key in rates}
    return sum(operations.values()) / sum(operations[key] / rates[key] for key in rates)


def products(threads, avx512, rounds, rows):
    peers, first = {"KEEL": lambda: product_turn("ours", threads)[1]}, {}
    try:
        for extra in [{}] + [{"OPENBLAS_CORETYPE": "SkylakeX"}] * avx512:
            name, rates = product_turn("openblas", threads, extra)
            first.setdefault(name, (rates, extra))
    except Missing as why:
        print(f"\nOpenBLAS   NOT MEASURED: {why}")
    totals = {name: total_rate(rates) for name, (rates, _) in first.items()}
    slow = {name for name in totals if totals[name] < max(totals.values()) / 2}
    for name, (_, extra) in first.items():
        if name not in slow:
            peers[name] = lambda extra=extra: product_turn("openblas", threads, extra)[1]
    results = measure(peers, rounds)
    middle = {name: {key: median(turn[key] for turn in turns) for key in turns[0]} for name, turns in results.items()}
    ours = middle.pop("KEEL")
    best = {key: max(rates[key] for rates in middle.values()) for key in ours} if middle else {}
    print("\nMatrix products of a layer y = x W^T, x (M,K), W (N,K), in GFLOP/s: KEEL, OpenBLAS's better kernel, ratio")
    forms = list(dict.fromkeys(key[0] for key in ours))
    print(f"  {'M':>4}{'N':>6}{'K':>6}" + "".join(f"{form:>28}" for form in forms))
    for shape in dict.fromkeys(key[1:] for key in ours):
        cells = ""
        for form in forms:
            key = (form, *shape)
            cells += f"{ours[key]:14.0f}" + (f"{best[key]:8.0f}{ours[key] / best[key]:6.2f}" if best else " " * 14)
            rows.append((f"product {form} M={shape[0]} N={shape[1]} K={shape[2]}", ours[key], "GFLOP/s", best.get(key), None))
        print("  {:4}{:6}{:6}".format(*shape) + cells)
    print(f"  all: KEEL {total_rate(ours):.0f}" + "".join(f", {name} {total_rate(rates):.0f}" for name, rates in middle.items()) +
          (f", ratio {total_rate(ours) / total_rate(best):.2f}" if best else ""))
    rows.append(("products together", total_rate(ours), "GFLOP/s", total_rate(best) if best else None, None))
    for name in slow:
        chosen = "which was asked for" if first[name][1] else "OpenBLAS's own choice"
        print(f"  left out of the turns, less than half as fast: {name}, {chosen}, {totals[name]:.0f}")
    if best:
        key = min(ours, key=lambda key: ours[key] / best[key])
        print(f"  lowest ratio {ours[key] / best[key]:.2f}: {key[0]} M={key[1]} N={key[2]} K={key[3]} (goal: {GOAL_PRODUCT})")
    sys.stdout.flush()


def layers(size, threads):
    try:
        bench_cpu_layers.table(size, lambda program, steps, environment: train(size, threads, program, steps, environment))
    except (Missing, OSError, StopIteration, subprocess.CalledProcessError) as why:
        print(f"\nWhere the time goes, {size.name}: NOT MEASURED: {why}")


# ---------------------------------------------------------------------------------------------------------
# The run

def cpu_model():
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.*)$", text, re.M)
    return (found.group(1) if found else platform.processor() or platform.machine()), "avx512f" in text


def first_line(command):
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, IndexError):
        return "unknown"


def write_csv(path, rows):
    commit, date = first_line(["git", "describe", "--always", "--dirty"]), datetime.date.today().isoformat()
    new = not os.path.exists(path)
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["metric", "value", "unit", "peer_value", "ratio", "commit", "date"])
        for metric, value, unit, peer, ratio in rows:
            ratio = ratio or (value / peer if peer else None)
            shown = [f"{peer:.2f}", f"{ratio:.3f}"] if peer else ["", ""]
            writer.writerow([metric, f"{value:.2f}", unit, *shown, commit, date])


def main():
    parser = argparse.ArgumentParser(prog="dev/bench/bench_cpu.sh", description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=[size.name for size in SIZES], help="this one alone [all]")
    parser.add_argument("--rounds", type=int, default=5, help="turns each [%(default)s]")
    parser.add_argument("--layers-only", action="store_true", help="only where a step's time goes")
    parser.add_argument("--csv", metavar="FILE", help="append the figures to this file")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "0").split(",")[0])
                        or len(os.sched_getaffinity(0)), help="[OMP_NUM_THREADS, or all cores]")
    parser.add_argument("--torch-python", default="", help="a Python with torch [found by dev/tools/find_python.sh]")
    arguments = parser.parse_args()
    threads, rows = arguments.threads, []
    sizes = [size for size in SIZES if arguments.size in (None, size.name)]

    cpu, avx512 = cpu_model()
    busy = os.getloadavg()[0]
    print(f"CPU        {cpu}, {threads} threads, compiler {first_line([os.environ.get('CXX') or 'g++', '--version'])}")
    warning = "  <- THE MACHINE IS BUSY: figures are low and ratios unsure" if busy > 0.5 else ""
    print(f"load       {busy:.1f} before the start{warning}")
    if not arguments.layers_only:
        pytorch = None
        try:
            pytorch = PyTorch(arguments.torch_python, threads)
            print(f"PyTorch    {pytorch.version}" + ("" if pytorch.is_2() else f"; the goals are for 2.x: {INSTALL}"))
        except Missing as why:
            print(f"PyTorch    NOT MEASURED: {why}")
        for size in sizes:
            training(size, threads, pytorch, arguments.rounds, rows)
        ms = median(LLM_C)
        rate = 6 * LLM_C_PARAMETERS * LLM_C_TOKENS / ms * 1e-6
        print("\nPublished, not measured here: llm.c's train_gpt2 on 8 threads of a MacBook Pro M3 Max, GPT-2 124M, B=4 T=64: "
              f"{ms:.0f} ms a step,\n  {LLM_C_TOKENS * 1e3 / ms:.0f} tokens/s, {rate:.0f} GFLOP/s at 6 operations a parameter "
              "and token (llm.c's README, quick start (CPU))")
    for size in sizes:
        layers(size, threads)
    if not arguments.layers_only:
        products(threads, avx512, arguments.rounds, rows)
        if arguments.csv:
            write_csv(arguments.csv, rows)


if __name__ == "__main__":
    try:
        main()
    except Missing as why:  # our own side: nothing to show
        sys.exit(f"bench_cpu: {why}")
