"""Trains one model for each norm placement, depth, learning rate and seed, and prints a table of where each ends.

    python3 dev/experiments/sweep.py -i 'text/*.py' --layers 16 64 256 --lrs 3e-3 6e-3 1e-2 --out results.csv

A row of the csv that is already there is not run again, so an interrupted sweep goes on where it stopped. What ends a run:
train, the mean loss of the last tenth of the steps, and val, the loss on text that was never trained on. Further flags
of the trainer go after `--`.
"""

import argparse
import csv
import itertools
import os
import subprocess
import sys
import tempfile
import time

COLUMNS = ["norm", "L", "lr", "seed", "steps", "train_loss", "val_loss", "seconds"]


def read_rows(path):
    if not os.path.exists(path):
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def run_one(arguments, norm, layers, lr, seed):
    with tempfile.TemporaryDirectory() as folder:
        command = [arguments.binary, "-i", arguments.data, "-L", str(layers), "--norm", norm, "-l", f"{lr:g}",
                   "--seed", str(seed), "-x", str(arguments.steps), "-o", folder + "/run",
                   "-v", str(arguments.steps), "-n", "0", "-s", "0", *arguments.rest]
        start = time.time()
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            sys.exit(f"sweep.py: {' '.join(command)}\n{done.stderr.strip()}")
        log = read_rows(folder + "/run/log.csv")
        tail = [float(row["loss"]) for row in log[-max(1, len(log) // 10):]]
        return {"norm": norm, "L": layers, "lr": f"{lr:g}", "seed": seed, "steps": arguments.steps,
                "train_loss": f"{sum(tail) / len(tail):.4f}", "val_loss": f"{float(log[-1]['val_loss']):.4f}",
                "seconds": f"{time.time() - start:.0f}"}


def print_table(rows):
    """A line for each placement and depth, a column for each learning rate; several seeds: mean and spread."""
    lrs = sorted({float(row["lr"]) for row in rows})
    print("\nvalidation loss".ljust(24) + "".join(f"{lr:>15g}" for lr in lrs))
    for norm, layers in sorted({(row["norm"], int(row["L"])) for row in rows}):
        line = f"{norm} L={layers}".ljust(23)
        for lr in lrs:
            values = [float(row["val_loss"]) for row in rows
                      if (row["norm"], int(row["L"]), float(row["lr"])) == (norm, layers, lr)]
            mean = sum(values) / len(values) if values else None
            text = "" if not values else f"{mean:.3f}"
            if len(values) > 1:
                text += f" ±{(max(values) - min(values)) / 2:.3f}"
            line += f"{text:>15}"
        print(line)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-i", "--data", required=True, help="text file or quoted glob")
    parser.add_argument("--norms", nargs="+", default=["keel"])
    parser.add_argument("--layers", nargs="+", type=int, default=[16, 64, 256])
    parser.add_argument("--lrs", nargs="+", type=float, default=[3e-3, 6e-3, 1e-2, 1.5e-2, 2e-2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1337])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--binary", default="./train_keel_cpu")
    parser.add_argument("--out", required=True, help="csv file, made or continued")
    parser.add_argument("rest", nargs="*", help="flags of the trainer, after --")
    arguments = parser.parse_args()
    os.makedirs(os.path.dirname(arguments.out) or ".", exist_ok=True)
    runs = list(itertools.product(arguments.norms, arguments.layers, arguments.lrs, arguments.seeds))
    for number, (norm, layers, lr, seed) in enumerate(runs, 1):
        rows = read_rows(arguments.out)
        key = (norm, str(layers), f"{lr:g}", str(seed), str(arguments.steps))
        if any(tuple(row[c] for c in COLUMNS[:5]) == key for row in rows):
            continue
        row = run_one(arguments, norm, layers, lr, seed)
        new = not os.path.exists(arguments.out)
        with open(arguments.out, "a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(f"{number}/{len(runs)}", " ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    print_table(read_rows(arguments.out))


if __name__ == "__main__":
    main()
