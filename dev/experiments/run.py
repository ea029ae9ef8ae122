"""The lesson's experiments: each one command, small on a CPU by default, the paper's depths with --gpu.

    python3 dev/experiments/run.py gradient                  one experiment; several names, or all
    python3 dev/experiments/run.py gradient --list           its commands, nothing run
    python3 dev/experiments/run.py max_lr --paper            the paper's own ramp, three seeds: an hour on two cores
    python3 dev/experiments/run.py depth --gpu               by train_keel, on a GPU
    python3 dev/experiments/run.py gradient --set L=1024 C=512 steps=4000 --runs out/deep --results out/deep

A finished run is never repeated and an interrupted one goes on from its last checkpoint: start the same command again. Each
experiment ends with its tables (csv) and figure (PNG) in --results.
"""

import argparse
import ast
import os
import shlex
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import alpha
import depth
import gradient
import highway
import hops
import max_lr
import order
import redundancy
import road
from shared import ROOT, Context, Failure, Pool, relative, write_runs

sys.path.append(str(ROOT / "dev" / "bench"))
import predict

LESSON = {"gradient": gradient, "max_lr": max_lr, "depth": depth, "redundancy": redundancy, "road": road, "highway": highway, "hops": hops}
EXPERIMENTS = {**LESSON, "order": order, "alpha": alpha}


def parse_settings(pairs, defaults):
    """--set KEY=VALUE: a number, or a list such as L=[8,16]. Returns the keys that some experiment knows."""
    settings = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        known = {k for d in defaults.values() for k in d}
        if not equals or key not in known:
            raise Failure(f"--set: expected KEY=VALUE with a key of {', '.join(sorted(known))}, found '{pair}'")
        try:
            settings[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise Failure(f"--set {key}: expected a number or a list such as [8,16], found '{text}'") from None
    return settings


def context(o, names):
    size = "tiny" if o.tiny else "gpu" if o.gpu else "paper" if o.paper else "small"
    for name in names:
        if size not in EXPERIMENTS[name].SIZES:
            raise Failure(f"--{size}: expected an experiment of {', '.join(n for n, e in EXPERIMENTS.items() if size in e.SIZES)}, found '{name}'")
    defaults = {name: dict(e.SIZES[size]) for name, e in EXPERIMENTS.items() if size in e.SIZES}
    given = parse_settings(o.set, {name: defaults[name] for name in names})
    for name, values in defaults.items():  # of all: an experiment may use another's runs
        for key, value in given.items():
            if key not in values:
                continue
            if isinstance(values[key], list) and not isinstance(value, list):
                value = [value]
            if isinstance(values[key], list) != isinstance(value, list):
                if name not in names:
                    continue
                raise Failure(f"--set {key}: expected one number, found a list")
            values[key] = value
    every = {name: SimpleNamespace(**values) for name, values in defaults.items()}
    binary = o.binary or ("./train_keel" if o.gpu else "./train_keel_cpu")
    cores = len(os.sched_getaffinity(0))
    jobs = o.jobs or (1 if o.gpu else max(1, min(cores, 8)))
    default = Path("build/experiments") / size
    runs, results = (Path(os.path.abspath(given or default)) for given in (o.runs, o.results))
    return Context(size, every[names[0]], runs, results, binary, o.data or sysconfig.get_paths()["stdlib"] + "/*.py", jobs, max(1, cores // jobs), every)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"{', '.join(EXPERIMENTS)}; all: the lesson's, which are the first {len(LESSON)}")
    parser.add_argument("--gpu", action="store_true", help="the paper's depths, by train_keel")
    parser.add_argument("--paper", action="store_true", help="on a CPU, in hours: the paper's ramp and what a claim needs seeds for")
    parser.add_argument("--tiny", action="store_true", help="a few steps of a tiny model: the tests")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="other settings than the size's, such as L=256 C=128 steps=1000 seeds=3")
    parser.add_argument("-i", "--data", help="text file or quoted glob, or llm.c's shards [the sources of Python's standard library]")
    parser.add_argument("--runs", help="folder for the runs [build/experiments/SIZE]")
    parser.add_argument("--results", help="folder for tables and figures [build/experiments/SIZE]")
    parser.add_argument("--jobs", type=int, help="runs at a time [one a core; with --gpu 1]")
    parser.add_argument("--binary", help="the trainer [./train_keel_cpu; with --gpu ./train_keel]")
    parser.add_argument("--list", action="store_true", help="only print the commands that are known before anything has run")
    parser.add_argument("--draw", action="store_true", help="only draw the figures again, from the tables in --results")
    parser.add_argument("--tables", action="store_true", help="no figures: no matplotlib is needed; --draw draws them elsewhere")
    o = parser.parse_args()
    names = list(LESSON) if "all" in o.names else o.names
    for name in names:
        if name not in EXPERIMENTS:
            raise Failure(f"expected an experiment of {', '.join(EXPERIMENTS)}, or all; found '{name}'")
    c = context(o, names)
    if o.draw:
        for name in names:
            EXPERIMENTS[name].draw(c.of(name))
            print(f"wrote {relative(str(c.results / name))}.png")
        return
    if o.list:
        c.listing = True
        for name in names:
            listed = [run for stage in EXPERIMENTS[name].runs(c.of(name)) for run in stage]
            for run in listed:
                print(shlex.join(relative(word) for word in run.command))
            if o.gpu and (trained := [run for run in listed if {"-b", "-L", "-x"} <= set(run.command)]):
                hours = sum(predict.run_seconds(run.command, predict.CARDS["h100"]) for run in trained) / 3600
                print(f"{name}: {len(trained)} of these runs are predicted to take {hours:.2g} hours on an H100 (dev/bench/predict.py)", file=sys.stderr)
            if hasattr(EXPERIMENTS[name], "MORE"):
                print(f"{name}: {EXPERIMENTS[name].MORE}", file=sys.stderr)
        return
    if not (ROOT / c.binary).exists():
        raise Failure(f"{c.binary}: expected the trainer, found no such file; build it: make {Path(c.binary).name}")
    # The first stage of all experiments together, then what depends on how those ended.
    stages = {name: EXPERIMENTS[name].runs(c.of(name)) for name in names}
    while stages:
        now = {name: next(stages[name], None) for name in stages}
        stages = {name: stages[name] for name, runs in now.items() if runs is not None}
        batch = [run for runs in now.values() for run in runs or []]
        if batch:
            Pool(c, batch).go()
    for name in names:
        EXPERIMENTS[name].collect(c.of(name))
        write_runs(c, name, [run for stage in EXPERIMENTS[name].runs(c.of(name)) for run in stage])  # asked anew, so in one order however they came to be
        if not o.tables:
            EXPERIMENTS[name].draw(c.of(name))
        print(f"wrote {relative(str(c.results / name))}.csv, {'' if o.tables else '.png '}and _runs.csv", flush=True)


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"run.py: {failure}")
