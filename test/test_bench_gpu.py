"""The tools that measure the GPU trainer, without a GPU. Ends with `N passed, N failed, N skipped`."""

import contextlib
import csv
import functools
import io
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "dev")]

import bench_gpu
import idle
import predict

CPU = str(ROOT / "train_keel_cpu")
os.environ["OMP_NUM_THREADS"] = "1"  # other suites run beside


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


@functools.cache
def build(target):
    done = run("make", "--no-print-directory", "--always-make", target, MAKEFLAGS="")
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


# ---------------------------------------------------------------------------------------------------------
# Whole steps beside PyTorch's

def torch_python():
    done = run("dev/find_python.sh", "torch", "numpy")
    if done.returncode:
        raise Skip("whole steps beside PyTorch's: no Python with torch and numpy (Debian: python3-torch)")
    return done.stdout.strip()


def losses_and_norms(folder, data, *flags):
    """Of each step, from the CPU trainer and from PyTorch, [(loss, norm)]."""
    flags = ["-i", data, *flags, "-l", "1e-3", "-u", "2"]
    out = folder / "run"
    done = run(CPU, *flags, "-b", "2", "-v", "0", "-n", "0", "-s", "0", "-o", out)
    assert done.returncode == 0, done.stderr
    with open(out / "log.csv", newline="") as file:
        ours = [(float(row["loss"]), float(row["grad_norm"])) for row in csv.DictReader(file)]
    (out / "log.csv").unlink(), out.rmdir()
    done = run(torch_python(), "dev/bench_gpu_torch.py", *flags, "-b", "4", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return ours, [(float(m[1]), float(m[2])) for m in re.finditer(r"^step \d+ loss (\S+) norm (\S+)", done.stdout, re.M)]


def test_torch_trains_the_same_model(folder):
    """The fast PyTorch model has the trainer's loss and gradient norm in each step of more than an epoch: the same weights, batches, passes and updates."""
    text = folder / "text.txt"
    text.write_bytes((ROOT / "keel_common.h").read_bytes()[:700])  # 78 sequences to train on: the tenth step begins anew
    for norm, more in (("keel", []), ("hybridnorm", []), ("mixln", ["--seed", str(2**40 + 3)])):
        ours, theirs = losses_and_norms(folder, text, "--norm", norm, "-L", "6", "-C", "16", "-H", "2", "-t", "8", "-d", "64", "-x", "11", *more)
        assert len(ours) == len(theirs) == 11
        for a, b in zip(ours, theirs):
            near(a[0], b[0], 1e-4), near(a[1], b[1], 1e-4)


def test_torch_reads_shards(folder):
    """The same on a shard, with GPT-2's vocabulary padded as the trainer pads it, and with blocks that are computed again."""
    shard = folder / "pieces.bin"
    bench_gpu.data_file(50257)
    tokens = bench_gpu.shards.read_shard(str(bench_gpu.data_file(50257)), 300)
    shard.write_bytes(bench_gpu.shards.header_bytes(300) + bench_gpu.shards.little_endian(tokens).tobytes())
    ours, theirs = losses_and_norms(folder, shard, "--norm", "pre", "-L", "2", "-C", "4", "-H", "1", "-t", "8", "-d", "32", "-x", "2")
    for a, b in zip(ours, theirs):
        near(a[0], b[0], 1e-4), near(a[1], b[1], 1e-4)


def test_torch_draws_the_trainers_weights(folder):
    """Weights drawn by PyTorch's integers have every bit of the reference's, which are the trainer's."""
    code = """
import sys
sys.path[:0] = ["dev", "dev/reference"]
import numpy as np, torch, keel, bench_gpu_torch
for norm in ("keel", "deepnorm", "hybridnorm"):
    cfg = keel.keel_file.Config(5, 256, 4, 3, 15, norm)
    for seed in (1337, 2**63 + 2**31 + 5):
        theirs = keel.init_params(cfg, seed)
        for at_once in (64, 2000, 1 << 25):  # parts of a matrix, some matrices, all
            ours = bench_gpu_torch.initial_weights(cfg, seed, torch.device("cpu"), at_once)
            assert list(ours) == list(theirs)
            for name in ours:
                assert np.array_equal(ours[name].numpy(), theirs[name]), (norm, seed, at_once, name)
"""
    done = run(torch_python(), "-c", code)
    assert done.returncode == 0, done.stderr


TINY = {"tiny": predict.Row("keel", 4, 16, 2, 16, 64, 256), "other": predict.Row("pre", 2, 16, 2, 16, 32, 256)}


def bench(*arguments):
    """The benchmark's exit status and output, with the CPU trainer."""
    out = io.StringIO()
    os.environ["TRAINER"] = CPU
    with contextlib.redirect_stdout(out):
        status = bench_gpu.main(["--device", "cpu", "--modes", "eager", "--repeats", "1", "--steps", "5", *map(str, arguments)], TINY)
    return status, out.getvalue()


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_bench_adds_rows(folder):
    """The benchmark prints both sides and adds rows with its columns; what is in the file stays."""
    table = folder / "table.csv"
    status, out = bench("--csv", table, "--torch-python", torch_python())
    assert not status and "PyTorch's best: eager, micro-batch 4" in out, out
    before, rows = table.read_text(), read_rows(table)
    assert [r["metric"] for r in rows] == [f"{name}/{what}" for name in TINY for what in ("mfu", "vs_torch", "first_step", "matrix_rate")], rows
    for row in rows:
        if row["peer_value"]:
            near(float(row["value"]) / float(row["peer_value"]), float(row["ratio"]), 0.05)  # of figures that are rounded
        assert list(row) == bench_gpu.COLUMNS and row["date"] and row["commit"] and row["command"].startswith("dev/bench_gpu.sh"), row
    status, out = bench("--csv", table, "--rows", "other")  # and without PyTorch
    assert not status and "PyTorch    NOT MEASURED" in out, out
    assert table.read_text().startswith(before) and [r["peer_value"] for r in read_rows(table)[8:]] == [""] * 4, table.read_text()


def test_bench_refuses(folder):
    """Models that differ, rows that are unknown, files of other columns and steps that do not suffice are refused, and nothing is written."""
    table = folder / "table.csv"
    status, out = bench("--csv", table, "--rows", "tiny", "--torch-python", torch_python(), "--keel-flags=-a 2")
    assert status and "THE MODELS DIFFER" in out and not table.exists(), out
    status, out = bench("--csv", table, "--rows", "tiny", "--keel-flags=-b 3")  # the trainer's own error
    assert status and "NOT MEASURED: train_keel: " in out and "-d: expected a multiple" in out and not table.exists(), out
    table.write_text("metric,value\n")
    for arguments, words in ((("--csv", table), "expected the columns"), (("--rows", "tiny,none"), "found none"), (("--steps", "3"), "more than 3")):
        try:
            bench(*arguments)
        except bench_gpu.Failed as why:
            assert words in str(why), why
        else:
            raise AssertionError(arguments)
    assert table.read_text() == "metric,value\n"


def test_out_of_memory_is_a_row(folder):
    """Where PyTorch's best try runs out of memory, that is its row; where its last form does not start, the reason is printed."""
    table, python = folder / "table.csv", folder / "python"
    python.write_text(f"#!/bin/sh\nexit {bench_gpu.OUT_OF_MEMORY}\n")
    python.chmod(0o755)
    status, out = bench("--csv", table, "--rows", "tiny", "--torch-python", python)
    assert not status and "PyTorch: out of memory at its best try" in out and [r["peer_value"] for r in read_rows(table)] == ["out of memory"] * 3 + [""], out
    python.write_text("#!/bin/sh\necho some reason >&2\nexit 1\n")
    status, out = bench("--rows", "tiny", "--torch-python", python)
    assert not status and "PyTorch eager: NOT MEASURED: some reason" in out, out


def test_time_that_is_up(folder):
    """A program that outlasts its time is ended with all that it started, and told apart from one that failed."""
    done = bench_gpu.Process(["sh", "-c", "echo begun; sleep 60 & sleep 60"], bench_gpu.time.monotonic() + 1)
    assert done.timed_out and done.error == "its time was up" and done.lines[0][1] == "begun", vars(done)


def test_operations_are_the_trainers(folder):
    """MFU counts the operations that the trainer's own log counts."""
    done = run(CPU, "-i", ROOT / "keel_common.h", "-L", "8", "-C", "32", "-t", "32", "-b", "4", "-x", "3", "-v", "0", "-n", "0", "-s", "0", "-o", folder / "run")
    rate = float(re.search(r"(\d+) GFLOP/s", done.stdout)[1]) * 1e9
    for row in read_rows(folder / "run" / "log.csv"):
        mfu = predict.counted_operations(8, 32, 256, 32) * float(row["tokens_per_second"]) / rate
        assert abs(mfu - float(row["mfu"])) <= 0.5e-4 + 0.5e9 / rate * mfu, (mfu, row)  # what rounding of both leaves open


def test_predictions_are_the_documents(folder):
    """The kernels' operations and bytes add up to speed.md's, recomputation's to the plan's, and its tables are what predict.py prints."""
    total = lambda kernels, name: sum(getattr(k, name) for k in kernels)
    assert (total(predict.FORWARD, "bytes"), total(predict.BACKWARD, "bytes")) == (80, 146)
    assert (total(predict.FORWARD, "CC"), total(predict.BACKWARD, "CC"), total(predict.FORWARD, "TC"), total(predict.BACKWARD, "TC")) == (24, 48, 2, 7)
    assert total(predict.FORWARD + predict.BACKWARD, "weights") == 48 + 96
    assert [total(predict.again(level), "bytes") for level in ("none", "gelu", "layer", "32")] == [0, 28, 54, 80]
    # one block, one micro-step, a memory that costs nothing: 72 C^2 + 9 T C / 0.62 operations a token, and the head's
    floor, predicted = predict.step_seconds(2, 512, 256, 256, 1024, 4, "none", 1e12, 1e30)
    near(floor, 1024 * (72 * 512**2 + 9 * 256 * 512 / 0.62 + 6 * 256 * 512) / 1e12)
    assert predicted > floor
    for flags in ([], ["--products"]):
        done = run(sys.executable, "dev/predict.py", *flags)
        assert done.returncode == 0 and done.stdout in (ROOT / "dev/doc/speed.md").read_text(), done.stdout
    # arithmetic alone: FP8 halves the products' 72 C^2 operations a token; a memory alone: the epilogues save 8 C and 24 C bytes a token
    gains, _ = predict.product_gains(1024, 8192, 1024, 1e12, 1e30)
    near(gains["FP8 products alone"], 8192 * 36 * 1024**2 / 1e12)
    gains, _ = predict.product_gains(1024, 8192, 1024, 1e30, 1e12)
    for way, saved in (("GELU_AUX epilogue", 16 / 0.9 - 8), ("DGELU epilogue", 24 / 0.9 - 8)):
        near(gains[way], 8192 * saved * 1024 / 1e12 + predict.GAP)


def test_no_gpu_is_said(folder):
    """Without a GPU the commands say so in one line and exit 1."""
    if run("dev/cuda.sh", "trainer").stdout.strip() == "train_keel":
        raise Skip("what the tools say without a GPU: there is one")
    for command in ("dev/idle.sh", "dev/bench_gpu.sh", "dev/bench_kernels.sh", "dev/bench_products.sh"):
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
