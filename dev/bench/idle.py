"""How much of a training step the GPU waits: reads the trace that dev/bench/cupti_idle.cpp wrote and prints idle time, gaps and a table of kernels.

    python3 dev/bench/idle.py TRACE [--log LOG.CSV] [--steps 100] [--csv FILE --model L1024_C256]

A step is the time from the end of one launch of adamw_kernel, the last of a step, to the end of the next; the last --steps steps count.
    idle            1 - (time in which a kernel, copy or fill ran) / (step time), both from the trace; what overlaps
                    counts once. It is the time in which the GPU had nothing that had begun: launches that come too
                    late, a host that is waited for. It is not the time in which multiprocessors or tensor cores stand
                    still: a kernel of a Hopper that has begun and waits for the one before it counts as running, so
                    that with overlapping launches idle tells less than the gaps between kernels without them would.
    step            beside LOG.CSV's, of a run without recording, where it is given: what recording cost
    sum of kernels  each kernel's time by itself; where launches overlap it may exceed the step
    gaps            the time between activities in which nothing ran, by length; the longest, and what ran before and after it
    step boundary   from the end of adamw_kernel to the first kernel of the next step, less copies and fills: where a wait for the host shows
Rows of --csv (dev/bench/results.py's columns MEASURED): idle_<model>, in %; idle_step_<model>, the traced step beside the one
without recording.
dev/bench/idle.sh makes both runs.
"""

import argparse
import csv
import sys
from pathlib import Path
from statistics import median

import results

LAST_OF_A_STEP = "adamw_kernel"
GAPS = [1, 2, 5, 20, float("inf")]  # microseconds, upper ends
HOST_WAIT = 20  # microseconds: no two nodes of a graph are so far apart, a host that is waited for is


class TraceError(Exception):
    """What was expected, what was found and what to do, in one line."""


def read_trace(path):
    """Returns {id: (kind, name)} and [(start, end, id)] in nanoseconds, in the order of time."""
    names, activities, dropped = {}, [], None
    try:
        with open(path) as file:
            for number, line in enumerate(file, 1):
                try:
                    if line[0] != "#":
                        name, start, end = line.split(",")
                        activities.append((int(start), int(end), int(name)))
                    elif line.startswith("# dropped "):
                        dropped = int(line[len("# dropped "):])
                    else:
                        _, at, kind, name = line.rstrip("\n").split(" ", 3)
                        names[int(at)] = (kind, name)
                except ValueError:
                    raise TraceError(
                        f"{path}: line {number}: expected id,start,end or '# id kind name', found {line.strip()[:60]!r}; record it again"
                    ) from None
    except OSError as error:
        raise TraceError(
            f"{path}: expected a trace of dev/bench/cupti_idle.cpp, found: {error.strerror}; did the recording library start?"
        ) from None
    if dropped is None:
        raise TraceError(
            f"{path}: expected '# dropped N' at its end, found none: the program did not end by itself; record it again"
        )
    if dropped:
        raise TraceError(
            f"{path}: {dropped} activities were not recorded, so no sum would be right; record fewer steps")
    unknown = {i for _, _, i in activities} - set(names)
    if unknown:
        raise TraceError(f"{path}: expected a name for each id, found none for {sorted(unknown)[:3]}; record it again")
    return names, sorted(activities)


def short(name):
    """A kernel's name without its return type and arguments: gemm<128, 2> of void ns::gemm<128, 2>(float*)."""
    depth, end = 0, len(name)
    for i, c in enumerate(name):
        if c == "<":
            depth += 1
        elif c == ">":
            depth -= 1
        elif c == "(" and depth == 0 and i > 0 and not name.startswith("(anonymous namespace)", i):
            end = i
            break
    name = name[:end].replace("(anonymous namespace)::", "")
    return name[len("void "):] if name.startswith("void ") else name


def cut_into_steps(names, activities, steps):
    """The last `steps` steps: each a list of activities from just after one adamw_kernel to the next, that one included, and its start."""
    ends = [i for i, (_, _, name) in enumerate(activities) if LAST_OF_A_STEP in names[name][1]]
    if len(ends) < 2:
        raise TraceError(
            f"expected two or more steps, each ended by one {LAST_OF_A_STEP}, found {len(ends)} launches of it; record more steps"
        )
    cuts = list(zip(ends, ends[1:]))[-steps:]
    return [(activities[a][1], activities[a + 1:b + 1]) for a, b in cuts]


def measure_step(start, activities, names):
    """Nanoseconds of one step: its length, the sum of kernels, the time in which anything ran, the boundary's idle time, and its gaps as
    (length, id before or None at the step's boundary, id after)."""
    covered, busy, kernels, boundary, gaps = start, 0, 0, None, []
    before = None
    for begin, end, name in activities:
        is_kernel = names[name][0] == "kernel"
        if begin > covered:
            gaps.append((begin - covered, None if boundary is None else before, name))
        if is_kernel:
            kernels += end - begin
            if boundary is None:
                boundary = sum(length for length, _, _ in gaps)
        if end > covered:
            busy += end - max(begin, covered)
            covered, before = end, name
    return {"length": covered - start, "kernels": kernels, "busy": busy, "boundary": boundary, "gaps": gaps}


def analyse(names, activities, steps):
    """A dict of figures in microseconds."""
    cut = cut_into_steps(names, activities, steps)
    measured = [measure_step(start, part, names) for start, part in cut]
    middle = lambda what: median(m[what] for m in measured) / 1e3
    out = {"steps": len(cut), "step": middle("length"), "kernels": middle("kernels"), "boundary": middle("boundary"),
           "boundary_most": max(m["boundary"] for m in measured) / 1e3, "activities": median(len(part) for _, part in cut),
           "idle": 1 - sum(m["busy"] for m in measured) / sum(m["length"] for m in measured)}

    inside = [g for m in measured for g in m["gaps"] if g[1] is not None]
    out["longest"] = [(length / 1e3, short(names[a][1]), short(names[b][1]))
                      for length, a, b in sorted(inside, key=lambda g: g[0], reverse=True)[:3]]
    out["gaps"], least = [], 0
    for most in GAPS:
        lengths = [g[0] / 1e3 for m in measured for g in m["gaps"] if least <= g[0] / 1e3 < most]
        out["gaps"].append((least, most, len(lengths) / len(cut), sum(lengths) / len(cut)))
        least = most
    out["waits"] = sum(g[0] / 1e3 >= HOST_WAIT for m in measured for g in m["gaps"])

    totals = {}
    for _, part in cut:
        for begin, end, name in part:
            count, time = totals.get(name, (0, 0))
            totals[name] = (count + 1, time + end - begin)
    rows = {}  # of one short name there may be several, that differ in their arguments
    for i, (count, time) in totals.items():
        key = (names[i][0], short(names[i][1]))
        had = rows.get(key, (0, 0))
        rows[key] = (had[0] + count, had[1] + time)
    out["rows"] = sorted(((kind, name, count / len(cut), time / count / 1e3, time / len(cut) / 1e3 / out["step"])
                          for (kind, name), (count, time) in rows.items()), key=lambda row: -row[4])
    return out


def step_milliseconds(path, steps):
    """The median of log.csv's last `steps` steps."""
    try:
        with open(path, newline="") as file:
            times = [float(row["ms"]) for row in csv.DictReader(file)]
    except (OSError, KeyError, ValueError) as error:
        raise TraceError(f"{path}: expected a run's log.csv, found: {error}") from None
    if not times:
        raise TraceError(f"{path}: expected steps, found none")
    return median(times[-steps:])


def print_figures(f, logged_ms, metric):
    print(f"{'share':>7} {'a step':>9} {'us each':>10}  kernel, copy or fill")
    for kind, name, count, each, share in f["rows"]:
        print(
            f"{100 * share:6.2f}% {count:9.1f} {each:10.2f}  {name[:110]}{'' if kind == 'kernel' else ' (no kernel)'}")
    print(f"\ngaps of a step, mean of {f['steps']} steps:")
    for least, most, count, total in f["gaps"]:
        print(
            f"  {f'{least} to {most} us' if most != float('inf') else f'{least} us and more':>15}  {count:9.1f}  {total:10.1f} us in all"
        )
    for length, before, after in f["longest"]:
        print(f"  longest inside a step  {length:8.2f} us, between {before[:60]} and {after[:60]}")
    print(f"  step boundary          {f['boundary']:8.2f} us idle, at most {f['boundary_most']:.2f}: "
          f"from the end of {LAST_OF_A_STEP} to the next step's first kernel")
    print(f"  waits for the host     {f['waits']:8d} gaps of {HOST_WAIT} us or more in {f['steps']} steps\n")
    print(f"step         {f['step'] / 1e3:.3f} ms while recorded"
          + (f", {logged_ms:.3f} ms without" if logged_ms else "")
          + f"; {f['activities']:.0f} activities, {f['kernels'] / 1e3:.3f} ms in the sum of kernels")
    goal = results.said(metric, 100 * f["idle"], None)
    print(f"idle         {100 * f['idle']:.2f} % over {f['steps']} steps" + (f" ({goal})" if goal else ""))


def rows(f, logged_ms, model):
    """Of dev/bench/results.py's columns MEASURED."""
    traced_ms = f["step"] / 1e3
    yield [f"idle_{model}", f"{100 * f['idle']:.2f}", "%", "", ""]
    peer = [f"{logged_ms:.3f}", f"{traced_ms / logged_ms:.3f}"] if logged_ms else ["", ""]
    yield [f"idle_step_{model}", f"{traced_ms:.3f}", "ms", *peer]


def main():
    parser = argparse.ArgumentParser(prog="dev/bench/idle.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("trace", metavar="TRACE")
    parser.add_argument("--log", metavar="LOG.CSV", help="the log of a run without recording")
    parser.add_argument("--steps", type=int, default=100, help="the last steps, which count [%(default)s]")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="add the figures to this file")
    parser.add_argument("--model", default="model", metavar="NAME",
                        help="what the rows' metrics end in, such as L1024_C256")
    a = parser.parse_args()
    figures = analyse(*read_trace(a.trace), a.steps)
    logged_ms = step_milliseconds(a.log, a.steps) if a.log else None
    print_figures(figures, logged_ms, f"idle_{a.model}")
    if a.csv:
        results.append(a.csv, rows(figures, logged_ms, a.model))


if __name__ == "__main__":
    try:
        main()
    except (TraceError, results.Failed) as error:
        sys.exit(f"idle: {error}")
