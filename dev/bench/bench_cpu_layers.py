"""Where the time of a training step goes, by layer: samples of the real program's main thread (dev/bench/sample_cpu.cpp),
without a line of instrumentation in it. For dev/bench/bench_cpu.py, which prints the table."""

import bisect
import collections
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM, LIBRARY = ROOT / "build/train_keel_cpu_g", ROOT / "build/sample_cpu.so"

# The innermost function of a sample that is named here has it; (forward|backward) goes into the row's name.
# A function that several layers share, such as rmsnorm_row_forward, is not named: its caller is.
MULTIPLY, PACK = "products: multiplying", "products: packing"
ROWS = [
    (r"\b(?:multiply_block|multiply_tile|(?:team_)?product)\b", MULTIPLY),
    (r"\bpack_\w+", PACK),
    (r"\battention_(forward|backward)\b", "attention"),
    (r"\bgelu_\w*(forward|backward)", "GELU"),
    (r"\b(?:rmsnorm|qkv_norm)_(forward|backward)\b", "RMSNorm"),
    (r"\bhighway_\w*(forward|backward)", "highway"),
    (r"\bshortcut_(backward)\b", "shortcut"),
    (r"\bcross_entropy_(forward|backward)\b", "cross-entropy"),
    (r"\bembedding_(forward|backward)\b", "embedding"),
    (r"\badamw_\w+", "AdamW"),
    (r"\bgradient_norm\b|\btensor_squares\b|\bsum_of_squares\b", "gradient norm"),
]
WHOLE = r"\battention_(?:forward|backward)\b"  # all that runs inside these is theirs, small products too
STEP = r"\bTrainer::step\b"  # samples outside of it are the start's
# Which weight a product is of: what the source's line of the call names, with its multiply-adds a token in a forward pass.
WEIGHT = r"\b(QKVW|ATTPROJW|FCW|FCPROJW|wte)\b"
ELEMENTS = {"qkvw": (3, 0), "attprojw": (1, 0), "fcw": (4, 0), "fcprojw": (4, 0), "wte": (0, 1)}  # times C^2, times V C


@lru_cache(None)
def source_line(place):
    path, _, number = place.partition(":")
    try:  # a call may go on in the next line
        return " ".join(Path(path).read_text().splitlines()[int(number.split()[0]) - 1:][:2])
    except (OSError, ValueError):
        return ""


def resolve(samples, regions):
    """Each sample as [(function, file:line)], innermost first; of a library only its name."""
    starts = [first for first, _, _ in regions]
    base = next(first for first, _, path in regions if path == str(PROGRAM))

    def owner(address):
        first, end, path = regions[bisect.bisect(starts, address) - 1]
        return path if first <= address < end else "?"

    # A caller's address is that of the instruction after the call.
    samples = [[at - (i > 0) for i, at in enumerate(sample)] for sample in samples]
    own = sorted({at for sample in samples for at in sample if owner(at) == str(PROGRAM)})
    text = subprocess.run(["addr2line", "-a", "-f", "-i", "-C", "-e", PROGRAM], text=True, capture_output=True, check=True,
                          input="\n".join(f"{at - base:x}" for at in own)).stdout
    frames, current = {}, None
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith("0x"):
            current = frames.setdefault(base + int(line, 16), [])
        else:
            current.append((line, next(lines)))
    library = lambda at: [(f"[{Path(owner(at)).name}]", "")]
    return [[frame for at in sample for frame in (frames[at] if at in frames else library(at))] for sample in samples]


def named(function):
    for pattern, row in ROWS:
        found = re.search(pattern, function.partition("(")[0])
        if found:
            return f"{row}, {found[1]}" if found.lastindex else row
    return None


def classify(chain):
    """(row, weight of its product or None)"""
    names = [function for function, _ in chain]
    whole = next((name for name in names if re.search(WHOLE, name)), None)
    row = named(whole) if whole else next(filter(None, map(named, names)), None)
    weight = None
    if row in (MULTIPLY, PACK):
        weight = next((m[1].lower() for _, place in chain if (m := re.search(WEIGHT, source_line(place)))), "other")
        if weight != "wte":  # the head does both in one function
            backward = any(re.search(r"(?<!forward_)backward", name.partition("(")[0]) for name in names)
            weight += ", backward" if backward else ", forward"
    if names[0].startswith(("[libgomp", "[libomp")):
        row = "waiting for threads, " + ("products" if weight else "the rest")
    return row, weight


def table(size, run):
    """Prints it. run(program, steps, environment): trains and returns (milliseconds a step, the log's text)."""
    samples_file = ROOT / "build/cpu_samples.txt"
    samples_file.unlink(missing_ok=True)
    # with a limit on spinning the trainer does not start itself again
    ms, log = run(PROGRAM, size.steps, {"LD_PRELOAD": str(LIBRARY), "KEEL_SAMPLES": str(samples_file), "GOMP_SPINCOUNT": "1000"})
    text, _, maps = samples_file.read_text().partition("maps\n")
    regions = []
    for line in maps.splitlines():
        span, *_, path = line.split()
        regions.append((*(int(at, 16) for at in span.split("-")), path))
    samples = [[int(at, 16) for at in line.split()] for line in text.splitlines()]
    chains = [chain for chain in resolve(samples, regions) if any(re.search(STEP, f) for f, _ in chain)]
    chains = chains[round(len(chains) * sum(ms[:size.warm]) / sum(ms)):]  # the first steps are not counted
    if not chains:
        print(f"{size.name}: no sample lies in {STEP}")
        return
    ms = sum(ms[size.warm:]) / (len(ms) - size.warm)  # a step
    each = ms / len(chains)
    rows, weights, others = collections.Counter(), collections.Counter(), collections.Counter()
    for chain in chains:
        row, weight = classify(chain)
        rows[row or "other"] += each
        if weight:
            weights[weight] += each
        if not row:
            own = next((name for name, _ in chain if name[0] != "[" and "std::" not in name), "?")  # not memcpy, but who called it
            others[re.sub(r"\(.*", "", own)] += each
    print(f"\nWhere the time goes, {size.name}: {ms:.1f} ms a step, {len(chains)} samples of the main thread, 1 ms apart")
    for row, time in sorted(rows.items(), key=lambda r: (r[0] == "other", -r[1])):
        biggest = ": " + ", ".join(f"{name} {t:.1f}" for name, t in others.most_common(4)) if row == "other" else ""
        print(f"  {row:34}{time:9.1f} ms{100 * time / ms:7.1f} %{biggest}")
    elements = lambda weight: sum(n * m for n, m in zip(ELEMENTS.get(weight, (0, 0)), (size.C ** 2 * size.L // 2, size.V * size.C)))
    print("  products by weight, with their packing and waiting; other: the source's line names none")
    for weight, time in weights.most_common():
        name, _, way = weight.partition(", ")
        operations = 2 * {"forward": 1, "backward": 2}.get(way, 3) * elements(name) * size.B * size.T
        rate = f"{operations / time * 1e-6:9.0f} GFLOP/s" if operations else ""
        print(f"    {weight:32}{time:9.1f} ms{100 * time / ms:7.1f} %{rate}")
    operations = sum(6 * elements(name) for name in ELEMENTS) * size.B * size.T
    alone = re.search(r"(\S+) GFLOP/s in matrix products", log)
    print(f"    {'all':32}{sum(weights.values()):9.1f} ms{100 * sum(weights.values()) / ms:7.1f} %"
          f"{operations / max(sum(weights.values()), 1e-9) * 1e-6:9.0f} GFLOP/s; a large product alone at the start of the run: "
          f"{alone[1] if alone else '?'}")
    sys.stdout.flush()
