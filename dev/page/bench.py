"""`make bench_page`: the page's steps a second in a headless Chromium beside those of the native trainer on one core with vectors of the same 16 bytes,
in turns, with the medians' ratio; then the time from opening the page to its first step, and its memory.

    python3 dev/page/bench.py [--rounds 7] [--steps 150] [-L 32] [-C 32] [-t 64] [-b 4]

The goals: 0.8 of the native trainer, and a first step within a second.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "test")]

import browser

NATIVE = ROOT / "build/train_keel_cpu_sse2"
WARM = 20  # steps before the clock starts: WebAssembly's code is made faster while it runs


def native(flags, steps, tokens):
    done = subprocess.run([NATIVE, *flags, "-x", str(steps), "-s", "0", "-v", "0", "-n", "0", "-i", str(ROOT / "train_keel.cu")], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    rates = [float(rate) for rate in re.findall(r"\| (\d+) tokens/s \|", done.stdout)][WARM:]
    return statistics.harmonic_mean(rates) / tokens


def page(chromium, address, steps):
    opened, errors, _ = browser.open_page(chromium, ROOT / "build/page.html", 1400, address=address)
    browser.wait(opened, "racers.length && racers.every(r => r.step === 1)")
    first = opened.evaluate("Math.max(...racers.map(r => r.times[0]))")
    opened.evaluate(f"run({steps})")
    while not opened.evaluate(f"racers.every(r => r.step === {steps})"):
        time.sleep(0.3)  # the question takes time from the page
    drawings = opened.evaluate("drawings.count")
    speed = opened.evaluate(f"(t => ({steps} - {WARM}) * 1000 / (t.at(-1) - t[{WARM} - 1]))(racers[0].times)") if steps > WARM else 0
    seconds = opened.evaluate("performance.now()") / 1000
    memory = opened.evaluate("[racers.reduce((sum, r) => sum + r.memory, 0), performance.memory.usedJSHeapSize]")
    assert not errors, errors
    opened.close()
    return speed, first / 1000, memory, drawings / seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=150)
    for short, default in (("L", 32), ("C", 32), ("t", 64), ("b", 4)):
        parser.add_argument(f"-{short}", type=int, default=default)
    o = parser.parse_args()
    flags = f"--norm keel -L {o.L} -C {o.C} -H {max(1, o.C // 16)} -t {o.t} -b {o.b} -l 0.005 -u 10".split()
    with browser.chromium() as chromium:
        address = f"#norms=keel&L={o.L}&C={o.C}&T={o.t}&B={o.b}&steps={o.steps}&every=0"
        ours, theirs, drawn = [], [], []
        for _ in range(o.rounds):
            theirs.append(native(flags, o.steps, o.t * o.b))
            speed, _, memory, rate = page(chromium, address, o.steps)
            ours.append(speed), drawn.append(rate)
        starts = [page(chromium, "", 1)[1] for _ in range(o.rounds)]
        both = page(chromium, "", 50)[2]
    middle = statistics.median
    print(f"L {o.L}, C {o.C}, T {o.t}, B {o.b}, keel; medians of {o.rounds} rounds in turns; load {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores, chromium {chromium.version}")
    print(f"native, one core, 16-byte vectors   {middle(theirs):6.1f} steps/s ({min(theirs):.1f} to {max(theirs):.1f})")
    print(f"the page, probing and drawing       {middle(ours):6.1f} steps/s ({min(ours):.1f} to {max(ours):.1f}); {middle(drawn):.0f} drawings/s")
    print(f"ratio                               {middle(ours) / middle(theirs):6.2f}, goal 0.80")
    print(f"from opening to the first step      {middle(starts):6.2f} s ({min(starts):.2f} to {max(starts):.2f}), goal 1.00: two models of 64 sub-layers")
    print(f"memory                              {memory[0] / 2**20:6.0f} MiB of WebAssembly, {memory[1] / 2**20:.0f} of JavaScript; two models of 64: {both[0] / 2**20:.0f} and {both[1] / 2**20:.0f}")


if __name__ == "__main__":
    main()
