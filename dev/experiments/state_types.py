#!/usr/bin/env python3
"""What BF16 moments and gradients cost: loss curves beside FP32 states, the same seeds and data, at L = 64 on real text.

    dev/experiments/state_types.py                      on the GPU that is here, by ./train_keel
    dev/experiments/state_types.py --trainer build/train_keel_on_cpu --steps 150 --batch 128 --micro-batch 1      its kernels on the CPU, hours

Writes a row a step to --out and prints, for each type of states, the loss over the last fifth of the run and how far it is from FP32's with the
same seed. What another seed changes is printed beside it: a difference below that is none that a user could see.
"""
import argparse, csv, os, statistics, subprocess, sys, tempfile

TYPES = {"fp32": [], "moments": ["--moments", "bf16"], "grads": ["--grads", "bf16"], "both": ["--moments", "bf16", "--grads", "bf16"]}


def run(args, types, seed):
    """Losses of the steps."""
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "run")
        command = [args.trainer, "-i", args.train, "-L", str(args.layers), "-C", str(args.channels), "-t", str(args.seq_len), "-b", str(args.micro_batch), "-d", str(args.batch),
                   "-x", str(args.steps), "--seed", str(seed), "-s", "0", "-v", "0", "-n", "0", "-o", out] + TYPES[types]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
        with open(os.path.join(out, "log.csv")) as log:
            return [float(row["loss"]) for row in csv.DictReader(log)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", default="./train_keel")
    parser.add_argument("--train", default="/usr/lib/python3.11/*.py", help="text; default: the sources of Python's standard library")
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=8, help="sequences; each adds to the gradients once")
    parser.add_argument("--batch", type=int, default=1024, help="tokens a step")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1338, 1339])
    parser.add_argument("--out", default="dev/results/state_types.csv")
    args = parser.parse_args()
    if os.path.exists(args.out):
        sys.exit(f"--out: expected a new file, found {args.out}; move it away or give another name")
    runs = {}
    for seed in args.seeds:
        for types in TYPES:
            runs[types, seed] = run(args, types, seed)
            print(f"seed {seed}  {types:8} loss {statistics.mean(runs[types, seed][-max(1, args.steps // 5):]):.4f}", flush=True)
    with open(args.out + ".tmp", "w", newline="") as out:
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow(["states", "seed", "step", "loss"])
        for (types, seed), losses in runs.items():
            rows.writerows([types, seed, step + 1, f"{loss:.6g}"] for step, loss in enumerate(losses))
    os.rename(args.out + ".tmp", args.out)

    last = {key: statistics.mean(losses[-max(1, args.steps // 5):]) for key, losses in runs.items()}
    spread = statistics.pstdev(last["fp32", seed] for seed in args.seeds) if len(args.seeds) > 1 else float("nan")
    print(f"\nmean loss of the last fifth of {args.steps} steps, {len(args.seeds)} seeds; FP32's own spread over seeds {spread:.4f}")
    print("| BF16 | loss | less FP32's, mean | least | most |\n|---|---|---|---|---|")
    for types in TYPES:
        differences = [last[types, seed] - last["fp32", seed] for seed in args.seeds]
        print(f"| {types if types != 'fp32' else 'none'} | {statistics.mean(last[types, seed] for seed in args.seeds):.4f} | {statistics.mean(differences):+.4f} | "
              f"{min(differences):+.4f} | {max(differences):+.4f} |")


if __name__ == "__main__":
    main()
