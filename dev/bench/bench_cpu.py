"""Training speed beside PyTorch's, matrix products beside OpenBLAS's: one table, from one run (see dev/bench/bench_cpu.sh).

Who is compared takes turns, each in a process of its own: library threads that spin while idle would take cores from
the other. A figure is the median over the turns of the median within each.
"""

import argparse
import csv
import datetime
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
L, C, H, T, B, V = 16, 256, 4, 256, 4, 256
STEPS, WARM = 8, 2  # a turn of training; its first WARM steps do not count
GOAL_TRAINING, GOAL_PRODUCT = 2.5, 0.8  # times PyTorch 1.13 eager; of OpenBLAS's rate


# ---------------------------------------------------------------------------------------------------------
# PyTorch's side, in a process of its own: the reference model (dev/reference/keel.py), where it is written for reading
# rather than speed put into PyTorch's fastest form

def train_in_pytorch(threads, foreach, steps):
    """Prints the version, then the milliseconds of each step."""
    import math
    import time

    import torch
    import torch.nn.functional as F
    sys.path.insert(0, str(ROOT / "dev" / "reference"))
    import keel
    from keel_file import Config

    torch.set_num_threads(threads)
    torch.manual_seed(1)
    cfg = Config(max_T=T, V=V, L=L, H=H, C=C)
    model = keel.KeelGPT(cfg, keel.init_params(cfg, 1337), dtype=torch.float32, sdpa=hasattr(F, "scaled_dot_product_attention"))
    if not hasattr(F, "scaled_dot_product_attention"):
        future = torch.full((T, T), -math.inf).triu(1)  # made once
        model.attention = lambda q, k, v: (q @ k.transpose(-2, -1) * cfg.D ** -0.5 + future).softmax(-1) @ v
    if hasattr(F, "rms_norm"):
        keel.rmsnorm = lambda x, gamma: F.rms_norm(x, gamma.shape, gamma, keel.RMS_EPS)

    params = list(model.params.values())
    groups = [{"params": [p for p in params if p.dim() == 2], "weight_decay": 0.01},
              {"params": [p for p in params if p.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-12, foreach=foreach)
    print(f"PyTorch {torch.__version__}")
    for _ in range(steps):
        start = time.perf_counter()
        text = torch.randint(V, (B, T + 1))
        optimizer.zero_grad(set_to_none=True)
        model.loss(text[:, :-1], text[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        print((time.perf_counter() - start) * 1e3)


if __name__ == "__main__" and sys.argv[1:2] == ["--pytorch"]:
    train_in_pytorch(int(sys.argv[2]), sys.argv[3] == "1", int(sys.argv[4]))
    sys.exit()


# ---------------------------------------------------------------------------------------------------------
# One turn of each. `environment` is what to add to ours.

class Missing(Exception):
    """What cannot be measured here, and why."""


def output(command, threads, environment={}):
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads), **environment}
    done = subprocess.run([str(c) for c in command], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise Missing(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"{command[0]} failed")
    return done.stdout.splitlines()


def tokens_per_second(milliseconds):
    return B * T * 1e3 / median(milliseconds[WARM:])


def keel_turn(threads):
    with tempfile.TemporaryDirectory() as folder:
        output(["./train_keel_cpu", "-L", L, "-C", C, "-H", H, "-t", T, "-b", B, "-x", STEPS, "-o", folder + "/run",
                "-v", 0, "-n", 0, "-s", 0], threads)
        with open(folder + "/run/log.csv", newline="") as file:
            return tokens_per_second([float(row["ms"]) for row in csv.DictReader(file)])


def pytorch_turn(python, threads, foreach, environment, steps=STEPS):
    version, *milliseconds = output([python, "dev/bench/bench_cpu.py", "--pytorch", threads, int(foreach), steps],
                                    threads, environment)
    return version, [float(ms) for ms in milliseconds]


def fastest_pytorch(python, threads):
    """PyTorch's OpenMP threads spin beside those of its BLAS: how long they should differs between builds and machines,
    as does foreach. Returns the version and the fastest (foreach, environment), by each one's best step."""
    def best_step(foreach, environment):
        version, milliseconds = pytorch_turn(python, threads, foreach, environment, WARM + 3)
        return min(milliseconds[WARM:]), version

    waits = [{}, {"GOMP_SPINCOUNT": "1000"}, {"OMP_WAIT_POLICY": "passive"}]
    tried = [(*best_step(True, wait), True, wait) for wait in waits]
    fastest = min(tried, key=lambda t: t[0])
    _, version, foreach, wait = min(fastest, (*best_step(False, fastest[3]), False, fastest[3]), key=lambda t: t[0])
    return version, foreach, wait


def product_turn(library, threads, environment={}):
    """The library's name, and GFLOP/s by (form, N, K)"""
    name, *lines = output(["build/bench_matmul", library], threads, environment)
    rows = [line.split(",") for line in lines]
    return name, {(form, int(n), int(k)): float(rate) for form, n, k, rate in rows}


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


def total_rate(rates):
    """Of all products together: operations over time"""
    operations = {key: key[1] * key[2] for key in rates}  # times 2 * 1024
    return sum(operations.values()) / sum(operations[key] / rates[key] for key in rates)


def measure(peers, rounds):
    """Takes turns. peers: name -> function of no arguments; returns name -> list of its results."""
    results = {name: [] for name in peers}
    for turn in range(rounds):
        print(f"turn {turn + 1} of {rounds}", file=sys.stderr, flush=True)
        for name, run in peers.items():
            results[name].append(run())
    return results


def main():
    parser = argparse.ArgumentParser(prog="dev/bench/bench_cpu.sh", description=__doc__.split("\n\n")[0])
    parser.add_argument("--csv", metavar="FILE", help="append the figures to this file")
    parser.add_argument("--rounds", type=int, default=5, help="turns each [%(default)s]")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "0").split(",")[0])
                        or len(os.sched_getaffinity(0)), help="[OMP_NUM_THREADS, or all cores]")
    parser.add_argument("--torch-python", default="", help="a Python with torch [found by dev/tools/find_python.sh]")
    arguments = parser.parse_args()
    threads = arguments.threads

    cpu, avx512 = cpu_model()
    busy = os.getloadavg()[0]
    print(f"CPU        {cpu}, {threads} threads, compiler {first_line([os.environ.get('CXX') or 'g++', '--version'])}")
    print(f"load       {busy:.1f} before the start" + ("  <- THE MACHINE IS BUSY: figures are low and ratios unsure" if busy > 0.5 else ""))
    peers = {"keel": lambda: keel_turn(threads), "product": lambda: product_turn("ours", threads)[1]}

    pytorch = {}  # as installed and, where that is faster, with its threads told how to wait
    try:
        if not arguments.torch_python:
            raise Missing("no Python with torch and numpy found; install them (Debian: python3-torch, python3-numpy) or set PYTHON")
        version, foreach, wait = fastest_pytorch(arguments.torch_python, threads)
        print(f"PyTorch    {version.split()[1]} eager, foreach={foreach}")
        for environment in [{}] + [wait] * bool(wait):
            words = " ".join(f"{k}={v}" for k, v in environment.items()) or "as installed"
            pytorch[f"PyTorch, {words}"] = lambda environment=environment: tokens_per_second(
                pytorch_turn(arguments.torch_python, threads, foreach, environment, STEPS if environment else WARM + 3)[1])
    except Missing as why:
        print(f"PyTorch    NOT MEASURED: {why}")
    try:
        name, _ = product_turn("openblas", threads)
        kernels = {name: {}}
        if avx512:
            kernels.setdefault(product_turn("openblas", threads, {"OPENBLAS_CORETYPE": "SkylakeX"})[0], {"OPENBLAS_CORETYPE": "SkylakeX"})
        print(f"OpenBLAS   {', '.join(kernels)}; the first by its own choice")
        for name, extra in kernels.items():
            peers[name] = lambda extra=extra: product_turn("openblas", threads, extra)[1]
    except Missing as why:
        kernels = {}
        print(f"OpenBLAS   NOT MEASURED: {why}")
    sys.stdout.flush()

    results = measure({**peers, **pytorch}, arguments.rounds)

    rows = []  # metric, value, unit, peer's value or None
    middle = lambda name: {key: median(turn[key] for turn in results[name]) for key in results[name][0]}
    ours, theirs = middle("product"), [middle(name) for name in kernels]
    best = {key: max(rates[key] for rates in theirs) for key in ours} if theirs else None

    print(f"\nA training step (forward, backward, clip, AdamW): L={L} C={C} H={H} T={T} B={B} V={V}; {arguments.rounds} turns each")
    value = median(results["keel"])
    for name in ["keel", *pytorch]:
        rate, label = median(results[name]), "KEEL" if name == "keel" else name
        ratio = f"   ratio {value / rate:.2f} (goal: {GOAL_TRAINING} times PyTorch 1.13)" if name in pytorch else ""
        print(f"  {label:36}{rate:7.0f} tokens/s  ({min(results[name]):.0f} to {max(results[name]):.0f}){ratio}")
        if name in pytorch or not pytorch:
            rows.append((f"training step / {name}" if pytorch else "training step", value, "tokens/s", rate if pytorch else None))

    columns = [name.split()[-1] for name in kernels]
    print("\nMatrix products of a layer y = x W^T, 1024 rows of x, W (N,K), in GFLOP/s; ratio to the better OpenBLAS kernel")
    print(f"  {'':10}{'N':>6}{'K':>6}{'KEEL':>10}" + "".join(f"{c:>12}" for c in columns) + f"{'ratio':>8}")

    def line(label, n, k, mine, others, ceiling):
        ratio = f"{mine / ceiling:8.2f}" if ceiling else ""
        print(f"  {label:10}{n:>6}{k:>6}{mine:10.1f}" + "".join(f"{o:12.1f}" for o in others) + ratio)

    for key in sorted(ours, key=lambda key: list(dict.fromkeys(k[0] for k in ours)).index(key[0])):
        form, n, k = key
        ceiling = best[key] if best else None
        line(form, n, k, ours[key], [rates[key] for rates in theirs], ceiling)
        rows.append((f"product {form} N={n} K={k}", ours[key], "GFLOP/s", ceiling))
    ceiling = total_rate(best) if best else None
    line("all", "", "", total_rate(ours), [total_rate(rates) for rates in theirs], ceiling)
    rows.append(("products together", total_rate(ours), "GFLOP/s", ceiling))
    if best:
        key = min(ours, key=lambda key: ours[key] / best[key])
        print(f"  lowest ratio {ours[key] / best[key]:.2f}: {key[0]} N={key[1]} K={key[2]} (goal: {GOAL_PRODUCT})")

    if arguments.csv:
        commit, date = first_line(["git", "describe", "--always", "--dirty"]), datetime.date.today().isoformat()
        new = not os.path.exists(arguments.csv)
        with open(arguments.csv, "a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["metric", "value", "unit", "peer_value", "ratio", "commit", "date"])
            for metric, value, unit, peer in rows:
                writer.writerow([metric, f"{value:.2f}", unit, f"{peer:.2f}" if peer else "", f"{value / peer:.3f}" if peer else "", commit, date])


if __name__ == "__main__":
    try:
        main()
    except Missing as why:  # our own side: nothing to show
        sys.exit(f"bench_cpu: {why}")
