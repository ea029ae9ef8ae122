"""The tools that measure the GPU trainer, without a GPU. Ends with `N passed, N failed, N skipped`."""

import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "dev")]

import idle


class Skip(Exception):
    """What is not here."""


def run(*command, **environment):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})


def near(found, expected, tolerance=1e-9):
    assert abs(found - expected) <= tolerance * max(1, abs(expected)), (found, expected)


# ---------------------------------------------------------------------------------------------------------
# Idle time

def cupti_flags():
    done = run("dev/cuda.sh", "cupti")
    if done.returncode:
        raise Skip("the recording library: no CUPTI (the CUDA Toolkit)")
    return done.stdout.split()


def build(target):
    done = run("make", "--no-print-directory", target)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stdout + done.stderr
    return ROOT / target


def record(folder, **environment):
    """A trace of test/fake_cupti.cpp's steps by the recording library, as the driver would load it."""
    cupti_flags()
    library, fake = build("build/cupti_idle.so"), build("build/fake_cupti.so")
    trace = folder / "trace.csv"
    call = f"import ctypes; assert ctypes.CDLL({str(library)!r}).InitializeInjection() == 1"
    done = run(sys.executable, "-c", call, LD_PRELOAD=str(fake), KEEL_TRACE=str(trace), **environment)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return trace


def test_recorded_activities(folder):
    """The library writes down every kernel, copy and fill that CUPTI reports, and the analysis finds the idle time that was made up."""
    names, activities = idle.read_trace(record(folder))
    assert len(activities) == 28 and activities == sorted(activities), activities
    assert ("memory", "copy to the host") in names.values() and ("kernel", "adamw_kernel(float*)") in names.values(), names
    f = idle.analyse(names, activities, 2, 0.125)
    near(f["traced_step"], 100), near(f["kernels"], 20 + 60 + 32 + 6)
    near(f["traced_idle"], 0.07)  # 4 + 1 + 2 us; what overlaps counts once
    near(f["idle"], 1 - 118 / 125)
    near(f["boundary"], 5)
    rows = {name: (count, each) for _, name, count, each, _ in f["rows"]}
    assert rows["product<float, 2>"] == (1, 20) and rows["product<double, 2>"] == (1, 60) and rows["beside"] == (1, 32), rows
    assert [gap[2:] for gap in f["gaps"]] == [(0, 0), (1, 1), (2, 6), (0, 0), (0, 0)], f["gaps"]
    assert f["longest"] == [(2, "product<float, 2>", "product<double, 2>")] * 2, f["longest"]
    assert f["waits"] == 0 and idle.analyse(names, activities, 100)["waits"] == 1


def test_idle_prints(folder):
    """The command prints idle time beside its goal, with the step time of another run's log."""
    trace, log = record(folder), folder / "log.csv"
    log.write_text("step,ms\n1,9\n2,0.2\n3,0.12\n4,0.12\n")
    done = run(sys.executable, "dev/idle.py", trace, "--log", log, "--steps", "2")
    assert done.returncode == 0 and done.stdout.endswith("idle         1.67 % over 2 steps (goal: under 3 %, met)\n"), done.stdout + done.stderr
    assert "waits for the host            0 gaps" in done.stdout, done.stdout


def test_bad_traces_are_refused(folder):
    """A trace that is cut off, lost records, has no steps or holds something else is refused in one line."""
    whole = "# 0 kernel adamw_kernel(float*)\n0,1,2\n0,3,4\n0,5,6\n# dropped 0\n"
    for text, words in ((whole, ""), (whole[:-12], "did not end by itself"), (whole.replace("dropped 0", "dropped 7"), "7 activities were not recorded"),
                        (whole.replace("0,3,4", "0;3;4"), "line 3"), (whole.replace("adamw", "other"), "adamw_kernel"), ("1,2,3\n# dropped 0\n", "name for each id")):
        (folder / "trace").write_text(text)
        done = run(sys.executable, "dev/idle.py", folder / "trace")
        assert (done.returncode, len(done.stderr.splitlines())) == ((1, 1) if words else (0, 0)) and words in done.stderr, (text, done.stderr)
    done = run(sys.executable, "dev/idle.py", folder / "none")
    assert done.returncode == 1 and "none: expected a trace" in done.stderr, done.stderr


def test_dropped_records_are_told(folder):
    """Records that CUPTI dropped end in an error, not in a smaller sum."""
    try:
        idle.read_trace(record(folder, KEEL_FAKE_DROPS="3"))
    except idle.TraceError as error:
        assert "6 activities" in str(error), error  # three of each buffer
    else:
        raise AssertionError("no error")


def test_no_gpu_is_said(folder):
    """Without a GPU the commands say so in one line and exit 1."""
    if run("dev/cuda.sh", "trainer").stdout.strip() == "train_keel":
        raise Skip("what the tools say without a GPU: there is one")
    for command in ("dev/idle.sh", "dev/bench_gpu.sh"):
        done = run(command)
        assert done.returncode == 1 and "GPU" in done.stderr.splitlines()[-1] and not done.stdout, (command, done.stdout, done.stderr)


def main():
    passed = failed = skipped = 0
    for name, test in list(globals().items()):
        if not name.startswith("test_"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                test(Path(folder))
                passed += 1
            except Skip as why:
                skipped += 1
                print(f"SKIPPED: {why}")
            except Exception:
                failed += 1
                print(f"FAILED: {test.__doc__}")
                traceback.print_exc()
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
