"""Rows of what a GPU printed, dev/results/<GPU>.csv, and the goals that figures are held against, dev/bench/goals.csv.

A measured row has the columns of MEASURED: metric; value and unit of ours; peer_value of what it is compared with (""
where there is none); ratio, ours over the peer's. Kept rows have those of ABOUT too: commit, date, gpu, driver,
command, and kernels, a hash of train_keel's machine code, by which a figure stays valid where only comments or the
host's code changed ("" where it is not known). Rows are added, none is changed.
"""

import csv
import datetime
import functools
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "dev" / "results"
CARD = (ROOT / "build" / "card"
        )  # programs built for a machine that has no git and no compiler, with the commit and the hash of their kernels
MEASURED = ["metric", "value", "unit", "peer_value", "ratio"]
ABOUT = ["commit", "date", "gpu", "driver", "command", "kernels"]
COLUMNS = MEASURED + ABOUT


class Failed(Exception):
    """What was expected, what was found and what to do, in one line."""


# ---------------------------------------------------------------------------------------------------------
# The machine


def nvidia_smi(query):
    """The first GPU's answer to a query, or ""."""
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"],
                              capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else ""


def results_name(gpu):
    """The name of a GPU's file of results: h200 of "NVIDIA H200"."""
    found = re.search("h200|h100|a100|b200", gpu.lower())
    return found[0] if found else "gpu"


def kept_file(gpu):
    return FOLDER / f"{results_name(gpu)}.csv"


def git_commit():
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


@functools.cache
def machine():
    """Name and driver of the first GPU; asking takes a good part of a second."""
    return nvidia_smi("name") or "none", nvidia_smi("driver_version")


def about(command, commit=None, kernels=None):
    """The columns of ABOUT for rows that the command printed on this machine. Of the paths in it only those below the
    repository stay whole."""

    def word_of(name):
        return (CARD / name).read_text().strip() if (CARD / name).exists() else ""

    command = re.sub(r"(?<![\w.-])/[^\s'\"=,]*/", "", command.replace(f"{ROOT}/", ""))
    return [commit or word_of("commit") or git_commit(), f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
        *machine(), command, word_of("kernels") if kernels is None else kernels]


# ---------------------------------------------------------------------------------------------------------
# Rows


def check_header(path, columns):
    if path.exists() and (found := path.read_text().split("\n", 1)[0]) != ",".join(columns):
        raise Failed(f"{path}: expected the columns {','.join(columns)}, found {found[:80]!r}; give another file")


def measured(metric, value, unit, peer=None):
    """A measured row, its ratio where there is a peer."""
    return [metric, f"{value:.6g}", unit, *(["", ""] if peer is None else [f"{peer:.6g}", f"{value / peer:.6g}"])]


def append(path, rows, about=None):
    """Adds measured rows to a file, with the columns of ABOUT where they are given; on disk when this returns."""
    path, columns = Path(path), COLUMNS if about else MEASURED
    check_header(path, columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([columns] * fresh + [[*row, *(about or [])] for row in rows])
        file.flush()
        os.fsync(file.fileno())


def read(path):
    """A dict a row."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------------------------------
# Goals


class Goal(NamedTuple):
    column: str  # value or ratio
    sense: str  # least or most
    goal: float
    what: str  # its unit, and of what


def goals(path=ROOT / "dev" / "bench" / "goals.csv"):
    """{metric: Goal}"""
    return {row["metric"]: Goal(row["column"], row["sense"], float(row["goal"]), row["what"]) for row in read(path)}


def said(metric, value, ratio):
    """What to print beside a figure: its goal and whether it is met; "" where it has none or was not measured."""
    goal = goals().get(metric)
    found = {"value": value, "ratio": ratio}[goal.column] if goal else None
    if found in (None, ""):
        return ""
    met = float(found) >= goal.goal if goal.sense == "least" else float(found) <= goal.goal
    return f"goal {'at most ' if goal.sense == 'most' else ''}{goal.goal:g} {goal.what}, {'met' if met else 'missed'}"
