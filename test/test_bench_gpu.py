"""The tools that measure the GPU trainer, without a GPU. Ends with `N passed, N failed, N skipped`."""

import argparse
import contextlib
import csv
import functools
import io
import os
import re
import signal
import subprocess
import sys
import unittest.mock
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "dev" / "bench")]

import bench_gpu
import idle
import predict
import results
import suite

CPU = str(ROOT / "train_keel_cpu")
DATA = ROOT / "build" / "bench_gpu"
os.environ["OMP_NUM_THREADS"] = "1"  # other suites run beside


def run(*command, **environment):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})


def near(found, expected, tolerance=1e-9):
    assert abs(found - expected) <= tolerance * max(1, abs(expected)), (found, expected)


# ---------------------------------------------------------------------------------------------------------
# Idle time

def cupti_flags():
    done = run("dev/tools/cuda.sh", "cupti")
    if done.returncode:
        raise suite.Skip("the recording library: no CUPTI (the CUDA Toolkit)")
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
    """The library writes down every kernel, copy and fill that CUPTI reports, and the analysis finds the idle time that
    was made up."""
    names, activities = idle.read_trace(record(folder))
    assert len(activities) == 28 and activities == sorted(activities), activities
    assert ("memory", "copy to the host") in names.values() and ("kernel", "adamw_kernel(float*)") in names.values(), names
    f = idle.analyse(names, activities, 2)
    near(f["step"], 100), near(f["kernels"], 20 + 60 + 32 + 6)  # more than the step's 100: one runs beside another
    near(f["idle"], 0.07)  # 4 + 1 + 2 us; what overlaps counts once
    near(f["boundary"], 5)
    rows = {name: (count, each) for _, name, count, each, _ in f["rows"]}
    assert rows["product<float, 2>"] == (1, 20) and rows["product<double, 2>"] == (1, 60) and rows["beside"] == (1, 32), rows
    assert [gap[2:] for gap in f["gaps"]] == [(0, 0), (1, 1), (2, 6), (0, 0), (0, 0)], f["gaps"]
    assert f["longest"] == [(2, "product<float, 2>", "product<double, 2>")] * 2, f["longest"]
    assert f["waits"] == 0 and idle.analyse(names, activities, 100)["waits"] == 1


def test_idle_prints(folder):
    """The command prints idle time beside its goal and the step beside one without recording, and writes both as
    rows."""
    trace, log, table = record(folder), folder / "log.csv", folder / "rows.csv"
    log.write_text("step,ms\n1,9\n2,0.2\n3,0.08\n4,0.08\n")
    done = run(
        sys.executable, "dev/bench/idle.py", trace, "--log", log, "--steps", "2", "--csv", table, "--model", "L1024_C256"
    )
    assert done.returncode == 0 and not done.stderr and "waits for the host            0 gaps" in done.stdout, (
        done.stdout + done.stderr
    )
    assert (
        "step         0.100 ms while recorded, 0.080 ms without; 7 activities, 0.118 ms in the sum of kernels\n"
        in done.stdout
    ), done.stdout
    assert done.stdout.endswith(
        "idle         7.00 % over 2 steps (goal at most 3 % of a traced step, missed)\n"
    ), done.stdout
    assert (
        table.read_text()
        == "metric,value,unit,peer_value,ratio\nidle_L1024_C256,7.00,%,,\nidle_step_L1024_C256,0.100,ms,0.080,1.250\n"
    )
    done = run(sys.executable, "dev/bench/idle.py", trace, "--steps", "2")
    assert done.stdout.endswith("idle         7.00 % over 2 steps\n"), done.stdout + done.stderr


def test_idle_runs_prebuilt_programs(folder):
    """dev/bench/idle.sh runs the trainer and the recording library that it is given, once as they are and once recorded."""
    trace, trainer, library = record(folder), folder / "trainer", folder / "cupti_idle.so"
    library.touch()
    trainer.write_text(f"""#!/bin/sh
[ "$1 $2 $3 $4" = "-L 6 -x 7" ] && echo "model      keel, L 6 sub-layers, C 64, H 1, T 16"
[ "$CUDA_INJECTION64_PATH" = {library} ] && cp {trace} "$KEEL_TRACE"
while [ "$1" ]; do [ "$1" = -o ] && mkdir -p "$2" && printf 'step,ms\\n1,0.1\\n' >"$2/log.csv"; shift; done
""")
    trainer.chmod(0o755)
    table = folder / "rows.csv"
    for once in ([], ["--once"]):
        command = ["dev/bench/idle.sh", "--steps", "2", *once, "-L", "6", "--csv", table]
        done = run(*command, TRAINER=str(trainer), CUPTI_IDLE=str(library))
        assert done.returncode == 0 and not done.stderr and "idle         7.00 %" in done.stdout, (
            done.stdout + done.stderr
        )
    assert table.read_text().splitlines()[1:] == [
        "idle_L6_C64,7.00,%,,",
        "idle_step_L6_C64,0.100,ms,0.100,1.000",
        "idle_L6_C64,7.00,%,,",
        "idle_step_L6_C64,0.100,ms,,",
    ], table.read_text()


def test_bad_traces_are_refused(folder):
    """A trace that is cut off, lost records, has no steps or holds something else is refused in one line."""
    whole = "# 0 kernel adamw_kernel(float*)\n0,1,2\n0,3,4\n0,5,6\n# dropped 0\n"
    for text, words in ((whole, ""), (whole[:-12], "did not end by itself"), (whole.replace("dropped 0", "dropped 7"), "7 activities were not recorded"),
                        (whole.replace("0,3,4", "0;3;4"), "line 3"), (whole.replace("adamw", "other"), "adamw_kernel"), ("1,2,3\n# dropped 0\n", "name for each id")):
        (folder / "trace").write_text(text)
        done = run(sys.executable, "dev/bench/idle.py", folder / "trace")
        assert (done.returncode, len(done.stderr.splitlines())) == ((1, 1) if words else (0, 0)) and words in done.stderr, (text, done.stderr)
    done = run(sys.executable, "dev/bench/idle.py", folder / "none")
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
# Rows and goals

def test_rows_are_kept(folder):
    """Rows are added with the columns that they have; a file of other columns is refused and stays."""
    table, about = folder / "of" / "h100.csv", results.about("x", "commit", "kernels")
    results.append(table, [["a", "1", "%", "", ""], ["b,c", "2", "ms", "4", "0.5"]], about)
    before = table.read_text()
    results.append(table, [["a", "3", "%", "", ""]], about)
    assert table.read_text().startswith(before) and [
        (r["metric"], r["value"], r["kernels"]) for r in results.read(table)
    ] == [("a", "1", "kernels"), ("b,c", "2", "kernels"), ("a", "3", "kernels")], table.read_text()
    whole = table.read_text()
    try:
        results.append(table, [["a", "3", "%", "", ""]])
    except results.Failed as why:
        assert (
            "expected the columns metric,value,unit,peer_value,ratio, found" in str(why)
            and len(str(why).splitlines()) == 1
        ), why
    else:
        raise AssertionError("no error")
    assert table.read_text() == whole
    assert (
        len(about) == len(results.ABOUT)
        and (about[0], about[5]) == ("commit", "kernels")
        and results.about("x")[0] not in ("", None)
    ), about
    for gpu, name in (
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L4", "gpu"),
        ("", "gpu"),
    ):
        assert results.results_name(gpu) == name, gpu


def test_commands_hold_no_machines_paths(folder):
    """A row's command keeps paths below the repository and of others their last part."""
    for command, expected in (
        (
            f"TRAINER={ROOT}/build/card/train_keel dev/bench/bench_gpu.sh --data build/card",
            "TRAINER=build/card/train_keel dev/bench/bench_gpu.sh --data build/card",
        ),
        (
            "a --baseline /home/me/old-one/train_keel --csv=/tmp/x.csv ../b/c",
            "a --baseline train_keel --csv=x.csv ../b/c",
        ),
        ("a '/x y/b' -d 65536", "a '/x y/b' -d 65536"),
    ):
        assert results.about(command)[4] == expected, results.about(command)[4]


def test_goals(folder):
    """A goal is a least or a most of a figure or of its ratio, and nothing is said of what has none or was not
    measured."""
    for metric, value, ratio, end in (
        ("keel_L512_C1024/mfu", 56, 0.1, "matrix rate, met"),
        ("keel_L512_C1024/mfu", "54.99", 9, ", missed"),
        ("keel_L512_C1024/vs_torch", 1, 1.25, "goal 1.25 of PyTorch's tokens/s at its best, met"),
        ("idle_L1024_C256", 3.5, None, "goal at most 3 % of a traced step, missed"),
        ("idle_L1024_C256", 2, None, ", met"),
        ("keel_L512_C1024/vs_torch", 1, None, ""),
        ("adamw", 1, "", ""),
        ("none", 1, 1, ""),
    ):
        said = results.said(metric, value, ratio)
        assert said.endswith(end) and bool(said) == bool(end), (metric, said)


def test_goals_name_what_tools_print(folder):
    """Each goal is of a metric that bench_gpu.py, idle.sh or bench_kernels.cu prints, and each of bench_kernels.cu's
    can be read from its source."""
    source = (ROOT / "dev" / "bench" / "bench_kernels.cu").read_text()
    names = set(
        re.findall(r'(?:format\(|bandwidth\(device, |report\(|report_attention\()"(\w+[%\w]*)"', source)
    )  # some with %d, %s
    patterns = [re.compile(re.sub("%[ds]", r"\\w+", name) + r"(_T\d+_D\d+)?$") for name in names]
    for metric, goal in results.goals().items():
        model, _, what = metric.partition("/")
        assert goal.column in ("value", "ratio") and goal.sense in ("least", "most") and goal.goal > 0 and goal.what, (
            metric,
            goal,
        )
        if model == "main":  # dev/card/card.py's run of train_keel -L 1024
            assert what in ("tokens_per_second", "mfu", "first_step"), metric
        elif what:
            printed = "mfu vs_torch vs_baseline first_step memory floor".split()
            assert model in predict.ROWS and what in printed, metric
        elif not re.fullmatch(r"idle(_step)?_L\d+_C\d+", metric):
            assert any(pattern.match(metric) for pattern in patterns), (metric, names)


# ---------------------------------------------------------------------------------------------------------
# Whole steps beside PyTorch's

def torch_python():
    done = run("dev/tools/find_python.sh", "torch", "numpy")
    if done.returncode:
        raise suite.Skip("whole steps beside PyTorch's: no Python with torch and numpy (Debian: python3-torch)")
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
    done = run(torch_python(), "dev/bench/bench_gpu_torch.py", *flags, "-b", "4", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return ours, [(float(m[1]), float(m[2])) for m in re.finditer(r"^step \d+ loss (\S+) norm (\S+)", done.stdout, re.M)]


def test_torch_trains_the_same_model(folder):
    """The fast PyTorch model has the trainer's loss and gradient norm in each step of more than an epoch: the same
    weights, batches, passes and updates."""
    text = folder / "text.txt"
    text.write_bytes((ROOT / "keel_common.h").read_bytes()[:700])  # 78 sequences to train on: the tenth step begins anew
    for norm, more in (("keel", []), ("hybridnorm", []), ("mixln", ["--seed", str(2**40 + 3)])):
        ours, theirs = losses_and_norms(folder, text, "--norm", norm, "-L", "6", "-C", "16", "-H", "2", "-t", "8", "-d", "64", "-x", "11", *more)
        assert len(ours) == len(theirs) == 11
        for a, b in zip(ours, theirs):
            near(a[0], b[0], 1e-4), near(a[1], b[1], 1e-4)


def test_torch_reads_shards(folder):
    """The same on a shard, with GPT-2's vocabulary padded as the trainer pads it, and with blocks that are computed
    again."""
    shard = folder / "pieces.bin"
    DATA.mkdir(parents=True, exist_ok=True)
    tokens = bench_gpu.shards.read_shard(str(bench_gpu.data_file(50257, DATA)), 300)
    shard.write_bytes(bench_gpu.shards.header_bytes(300, "H") + bench_gpu.shards.little_endian(tokens).tobytes())
    ours, theirs = losses_and_norms(folder, shard, "--norm", "pre", "-L", "2", "-C", "4", "-H", "1", "-t", "8", "-d", "32", "-x", "2")
    for a, b in zip(ours, theirs):
        near(a[0], b[0], 1e-4), near(a[1], b[1], 1e-4)


def test_torch_draws_the_trainers_weights(folder):
    """Weights drawn by PyTorch's integers have every bit of the reference's, which are the trainer's."""
    code = """
import sys
sys.path[:0] = ["dev/bench", "dev/reference"]
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


def test_torch_takes_alpha(folder):
    """With -a a shallow model has a deep one's alpha, as the trainer's with the same flag."""
    text = folder / "text.txt"
    text.write_bytes((ROOT / "keel_common.h").read_bytes()[:700])
    ours, theirs = losses_and_norms(
        folder, text, "--norm", "keel", "-L", "4", "-a", "1024", "-C", "16", "-H", "2", "-t", "8", "-d", "64", "-x", "2"
    )
    near(ours[0][0], theirs[0][0], 1e-4), near(ours[0][1], theirs[0][1], 1e-4)


def test_torch_falls_back_to_less(folder):
    """A micro-batch that does not fit is followed by the next smaller one where the flag allows it; warming trains
    nothing."""
    code = """
import sys
sys.path[:0] = ["dev/bench"]
import torch, bench_gpu_torch
fits, tried = int(sys.argv.pop(1)), []
def train(a, B, device, branch):
    tried.append(B)
    if B > fits:
        raise RuntimeError("CUDA out of memory")
bench_gpu_torch.train = train
torch.cuda.is_available = lambda: True
try:
    bench_gpu_torch.main()
except SystemExit as end:
    tried.append(f"exit {end.code}")
print(tried)
"""
    flags = ["-i", "x.bin", "-L", "4", "-C", "16", "-H", "2", "-t", "16", "-d", "192"]
    for fits, more, expected in (
        (2, ["-b", "8", "--or-less"], [6, 4, 3, 2]),
        (2, ["-b", "4"], [4, "exit 3"]),
        (0, ["-b", "2", "--or-less"], [2, 1, "exit 3"]),
        (3, [], [12, 6, 4, 3]),
    ):
        done = run(torch_python(), "-c", code, fits, *flags, *more)
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == str(expected), (
            expected,
            done.stdout,
            done.stderr,
        )
    text = folder / "text.txt"
    text.write_bytes((ROOT / "keel_common.h").read_bytes()[:700])
    flags = ["-L", "4", "-a", "64", "-C", "16", "-H", "2", "-t", "8", "-d", "64", "-b", "2"]
    done = run(torch_python(), "dev/bench/bench_gpu_torch.py", "-i", text, *flags, "--device", "cpu", "--warm")
    assert (
        done.returncode == 0 and re.search(r"^warm, .+: [\d.]+ s$", done.stdout, re.M) and "step" not in done.stdout
    ), (done.stdout + done.stderr)


TINY = {"tiny": predict.Row("keel", 4, 16, 2, 16, 64, 256), "other": predict.Row("pre", 2, 16, 2, 16, 32, 256)}


def bench(*arguments):
    """The benchmark's exit status and output, with the CPU trainer."""
    out = io.StringIO()
    os.environ["TRAINER"] = CPU
    with contextlib.redirect_stdout(out):
        status = bench_gpu.main(["--device", "cpu", "--modes", "eager", "--repeats", "1", "--steps", "5", *map(str, arguments)], TINY)
    return status, out.getvalue()


def with_card(**replaced):
    """The benchmark's view of the card, for a while: nvidia_smi's answers by query, FORMS, FOLDER."""
    stack = contextlib.ExitStack()
    answers = replaced.pop("smi", {})
    for module in (bench_gpu, results):
        stack.enter_context(unittest.mock.patch.object(module, "nvidia_smi", lambda query: answers.get(query, "")))
    results.machine.cache_clear()
    stack.callback(results.machine.cache_clear)
    for name, value in replaced.items():
        stack.enter_context(unittest.mock.patch.object(results if name == "FOLDER" else bench_gpu, name, value))
    return stack


H100 = {"memory.total": "81559", "name": "NVIDIA H100 80GB HBM3", "driver_version": "1.2"}


def test_bench_adds_rows(folder):
    """The benchmark prints both sides and adds rows as measured, and with --keep whole ones to the card's file; what is
    in a file stays."""
    table = folder / "table.csv"
    status, out = bench("--csv", table, "--torch-python", torch_python())
    assert not status and "PyTorch eager, micro-batch 4: " in out and "\n  PyTorch: eager, micro-batch 4;" in out, out
    before, rows = table.read_text(), results.read(table)
    assert [r["metric"] for r in rows] == [f"{name}/{what}" for name in TINY for what in ("mfu", "vs_torch", "first_step", "matrix_rate")], rows
    for row in rows:
        if row["peer_value"]:
            near(float(row["value"]) / float(row["peer_value"]), float(row["ratio"]), 0.05)  # of figures that are rounded
        assert list(row) == results.MEASURED, row
    with with_card(smi=H100, FOLDER=folder):
        status, out = bench("--csv", table, "--rows", "other", "--keep")  # and without PyTorch
    assert not status and "PyTorch    NOT MEASURED" in out and "NVIDIA H100 80GB HBM3, 80 GiB, driver 1.2" in out, out
    assert (
        table.read_text().startswith(before) and [r["peer_value"] for r in results.read(table)[8:]] == [""] * 4
    ), table.read_text()
    kept = results.read(folder / "h100.csv")
    assert [list(r.values())[:5] for r in kept] == [list(r.values()) for r in results.read(table)[8:]], kept
    assert all(
        list(r) == results.COLUMNS
        and r["date"]
        and r["commit"]
        and r["command"] == "dev/bench/bench_gpu.sh --rows other --repeats 1 --steps 5 --modes eager"
        for r in kept
    ), kept


def test_baseline_takes_turns(folder):
    """An older build runs beside ours, its tokens/s are the peer of a row, and one that trains another model is
    refused."""
    table, old = folder / "table.csv", folder / "old"
    old.write_text(f'#!/bin/sh\nexec {CPU} "$@" $MORE\n')
    old.chmod(0o755)
    status, out = bench("--csv", table, "--model", "mine=pre,2,16,2,16,32,256", "--rows", "mine", "--baseline", old)
    assert not status and "mine/vs_baseline" in table.read_text(), out
    status, out = bench("--csv", table, "--rows", "tiny", "--baseline", old)
    rows = {r["metric"]: r for r in results.read(table)}
    assert (
        not status
        and "  baseline: " in out
        and rows["tiny/vs_baseline"]["unit"] == "tokens/s"
        and float(rows["tiny/vs_baseline"]["ratio"]) > 0
    ), out
    assert rows["tiny/vs_baseline"]["value"] == rows["tiny/vs_torch"]["value"], rows
    before = table.read_text()
    status, out = bench(
        "--rows", "tiny", "--baseline", "/none", "--torch-python", torch_python()
    )  # the other peer still has its turn
    assert not status and "baseline: NOT MEASURED" in out and "PyTorch eager, micro-batch 4" in out, out
    old.write_text(old.read_text().replace("$MORE", "-a 2"))
    status, out = bench("--csv", table, "--rows", "tiny", "--baseline", old)
    assert status and "THE MODELS DIFFER" in out and "baseline's is" in out and table.read_text() == before, out


def test_forms_follow_the_card(folder):
    """PyTorch's form, ours and the states are those that the card's memory has room for, and what cannot fit is not
    tried."""
    for gib in (79.6, 139.8):
        for name, row in predict.ROWS.items():
            form = bench_gpu.named_form(name, gib)
            if not form:
                assert bench_gpu.TORCH_STATES * predict.parameters(row.L, row.C, row.V, row.T) > gib * 2**30, (
                    name,
                    gib,
                )
                continue
            kept = row.L / 2 * row.C * (4 if form.checkpoint else {1: 38, 0.9: 25, 0.5: 17}[form.budget]) + 8 * row.V
            states = (16 if form.checkpoint else 18) * predict.parameters(row.L, row.C, row.V, row.T)
            assert row.total_batch // row.T % form.B == 0 and states + kept * form.B * row.T <= 0.95 * gib * 2**30, (
                name,
                gib,
                form,
            )
    assert bench_gpu.named_form("pre_L24_C768", 40) is None and bench_gpu.named_form("pre_L24_C768", None) is None
    flags = lambda name, gib, more="": bench_gpu.states_flags(
        predict.ROWS[name], argparse.Namespace(keel_flags=more), gib
    )
    assert (
        flags("keel_L1024_C1024", 79.6) == ["--moments", "bf16", "--grads", "bf16"]
        and flags("keel_L1024_C1024", 79.6, "--moments bf16") == []
    )
    assert flags("keel_L1024_C1024", 139.8) == flags("keel_L512_C1024", 79.6) == flags("keel_L1024_C1024", None) == []

    python, said = folder / "python", folder / "said"
    python.write_text(f'#!/bin/sh\necho "$@" >>{said}\nexit {bench_gpu.OUT_OF_MEMORY}\n')
    python.chmod(0o755)
    forms = {"tiny": {75: bench_gpu.Form("graphs", True, B=2)}}
    with with_card(smi=H100, FORMS=forms):
        status, out = bench("--rows", "tiny", "--torch-python", python)
        assert (
            not status and "PyTorch graphs, blocks computed again, micro-batch 2: NOT MEASURED: out of memory" in out
        ), out
        assert (
            len(said.read_text().splitlines()) == 1
            and "--mode graphs --checkpoint -b 2 --or-less --device cpu" in said.read_text()
        ), said.read_text()
        said.unlink()
        bench("--rows", "tiny", "--torch-python", python, "--search")
        assert [line.split("--mode ")[1] for line in said.read_text().splitlines()] == [
            "eager --device cpu"
        ], said.read_text()
        said.unlink()
        status, out = bench("--rows", "tiny,other", "--torch-python", python, "--warm")
        assert (
            "-L 4 " in said.read_text()
            and "-a 4 --warm" in said.read_text()
            and said.read_text().endswith("--warm\n")
        ), said.read_text()
        assert "other: no form of PyTorch is known" in out and len(said.read_text().splitlines()) == 1, out
        said.unlink()
    with with_card(smi={"memory.total": "1"}, TORCH_STATES=10**6):
        status, out = bench("--rows", "tiny", "--torch-python", python)
        assert "PyTorch: out of memory, not tried" in out and not said.exists(), out


def test_bench_refuses(folder):
    """Models that differ, rows that are unknown, files of other columns and steps that do not suffice are refused, and
    nothing is written."""
    table = folder / "table.csv"
    status, out = bench("--csv", table, "--rows", "tiny", "--torch-python", torch_python(), "--keel-flags=-a 2")
    assert status and "THE MODELS DIFFER" in out and not table.exists(), out
    status, out = bench("--csv", table, "--rows", "tiny", "--keel-flags=-b 3")  # the trainer's own error
    assert (
        status and "NOT MEASURED: train_keel_cpu: " in out and "-d: expected a multiple" in out and not table.exists()
    ), out
    table.write_text("metric,value\n")
    for arguments, words in (
        (("--csv", table), "expected the columns"),
        (("--rows", "tiny,none"), "found none"),
        (("--steps", "3"), "more than 3"),
        (("--model", "a=keel,4"), "expected NAME=NORM,L,C"),
    ):
        try:
            bench(*arguments)
        except bench_gpu.Failed as why:
            assert words in str(why), why
        else:
            raise AssertionError(arguments)
    assert table.read_text() == "metric,value\n"


def test_out_of_memory_is_a_row(folder):
    """Where PyTorch's best try runs out of memory, that is its row; where its last form does not start, the reason is
    printed."""
    table, python = folder / "table.csv", folder / "python"
    python.write_text(f"#!/bin/sh\nexit {bench_gpu.OUT_OF_MEMORY}\n")
    python.chmod(0o755)
    status, out = bench("--csv", table, "--rows", "tiny", "--torch-python", python)
    assert (
        not status
        and "PyTorch: out of memory" in out
        and [r["peer_value"] for r in results.read(table)] == ["out of memory"] * 3 + [""]
    ), out
    python.write_text("#!/bin/sh\necho some reason >&2\nexit 1\n")
    status, out = bench("--rows", "tiny", "--torch-python", python)
    assert not status and "PyTorch eager: NOT MEASURED: some reason" in out, out


def test_steps_before_the_time_was_up_count(folder):
    """Where PyTorch's time is up after enough steps, those are its figure."""
    python = folder / "python"
    python.write_text("#!/bin/sh\necho 'attention A 1.00 ms, B 2.00 ms: A'\necho 'batch 2, ready 1 s'\n"
                      "for i in 1 2 3 4 5; do echo \"step $i loss 2.5 norm 1.5 ms ${i}0\"; done\nsleep 60\n")
    python.chmod(0o755)
    a = argparse.Namespace(torch_python=python, data=DATA, device="cpu")
    turn = bench_gpu.torch_turn(TINY["tiny"], a, bench_gpu.Form("eager", False), 9, bench_gpu.time.monotonic() + 5)
    assert (turn.ms, turn.loss, turn.B, turn.attention) == (45, 2.5, 2, "attention A 1.00 ms, B 2.00 ms: A"), vars(turn)


def test_time_that_is_up(folder):
    """A program that outlasts its time, or the benchmark that is told to end, ends all that it started."""
    done = bench_gpu.Process(["sh", "-c", "echo begun; sleep 600 & sleep 600"], bench_gpu.time.monotonic() + 5)
    assert done.timed_out and done.error == "its time was up" and done.lines[0][1] == "begun", vars(done)
    trainer, pid = folder / "trainer", folder / "pid"
    trainer.write_text(f"#!/bin/sh\nsleep 600 &\necho $! >{pid}\nwait\n")
    trainer.chmod(0o755)
    state = lambda: run("ps", "-o", "stat=", "-p", pid.read_text().strip()).stdout.strip()
    child = subprocess.Popen(
        [sys.executable, "dev/bench/bench_gpu.py", "--rows", "keel_L1024_C256"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "TRAINER": str(trainer)},
    )
    while not (pid.exists() and pid.read_text().endswith("\n")) and child.poll() is None:
        bench_gpu.time.sleep(0.02)
    child.terminate()
    assert child.wait(300) == 143, child.returncode
    end = bench_gpu.time.monotonic() + 60
    while state() not in ("", "Z") and bench_gpu.time.monotonic() < end:  # gone, or dead and not yet waited for
        bench_gpu.time.sleep(0.02)
    assert state() in ("", "Z"), state()


def test_operations_are_the_trainers(folder):
    """MFU counts the operations that the trainer's own log counts."""
    done = run(CPU, "-i", ROOT / "keel_common.h", "-L", "8", "-C", "32", "-t", "32", "-b", "4", "-x", "3", "-v", "0", "-n", "0", "-s", "0", "-o", folder / "run")
    rate = float(re.search(r"(\d+) GFLOP/s", done.stdout)[1]) * 1e9
    for row in results.read(folder / "run" / "log.csv"):
        mfu = predict.counted_operations(8, 32, 256, 32) * float(row["tokens_per_second"]) / rate
        assert abs(mfu - float(row["mfu"])) <= 0.5e-4 + 0.5e9 / rate * mfu, (mfu, row)  # what rounding of both leaves open


def test_predictions_are_the_documents(folder):
    """The kernels' operations and bytes add up to speed.md's, recomputation's to the plan's, and its tables are what
    predict.py prints."""
    total = lambda kernels, name: sum(getattr(k, name) for k in kernels)
    assert (total(predict.FORWARD, "bytes"), total(predict.BACKWARD, "bytes")) == (80, 122)
    assert (total(predict.FORWARD, "launches"), total(predict.BACKWARD, "launches")) == (8, 14)
    assert (total(predict.FORWARD, "CC"), total(predict.BACKWARD, "CC"), total(predict.FORWARD, "TC"), total(predict.BACKWARD, "TC")) == (24, 48, 2, 5)
    assert (total(predict.FORWARD + predict.BACKWARD, "weights"), total(predict.BACKWARD, "added")) == (48, 96)
    for level, bytes in (("none", 0), ("gelu", 28), ("layer", 54), ("32", 80), ("gelu in 2 of 8 sub-layers", 7),
                         ("layer in 4 of 8 sub-layers", 41)):
        assert sum(k.bytes * share for k, share in predict.again(level)) == bytes, level
    # without GELU's backward in an epilogue, and with dq apart from dk and dv: 226 C bytes in 24 kernels
    names = {k.name for change in ("DGELU", "order") for k in predict.CHANGES[change]}
    older = [k for k in predict.BACKWARD if k.name not in names] + predict.CHANGES["DGELU"] + predict.CHANGES["order"]
    assert (total(older, "bytes"), total(older, "launches"), total(older, "CC"), total(older, "TC")) == (146, 16, 48, 7)
    # one block, one micro-step, a memory that costs nothing: 72 C^2 + 7 T C operations a token, and the head's
    step = 2, 512, 256, 256, 1024, 4, "none", 1e12
    floor, predicted = predict.step_seconds(*step, 1e30)
    near(floor, 1024 * (72 * 512**2 + 7 * 256 * 512 + 6 * 256 * 512) / 1e12)
    assert predicted > floor
    for change in predict.CHANGES:  # whatever the model, no change costs
        for card in predict.CARDS.values():
            for name, plan in card.plans.items():
                row = predict.ROWS[name]
                step = row.L, row.C, row.V, row.T, row.total_batch, *plan, card.matrix * 1e12, card.copy * 1e12
                assert predict.step_seconds(*step, without=[change])[1] >= predict.step_seconds(*step)[1], (change, name)
    # the head of GPT-2's shape: 1334 rows of logits at a time, or as many whole tiles as 2^28 elements hold
    assert [predict.head_chunks(32768, 50304, without)[0] for without in (["chunk"], [])] == [25, 7]
    assert predict.head_chunks(2048, 50304, []) == (1, 2048) and predict.head_chunks(100, 256, []) == (1, 100)
    # blocks for places: 341 for 264 at C = 768, 1024 for 396 at C = 256, 264 for 264 at C = 1024
    for C, blocks, places, waves in ((768, 341, 264, 2), (256, 1024, 396, 3), (1024, 264, 264, 1)):
        near(predict.wave_factor(32768, C), (waves * places / blocks + 1) / 2)
    # blocks of 8 lengths for 264 places: 256 end with the longest, alone; 512 of both kinds fill them
    near(predict.tail_factor(32, 1024, predict.MMA_BLOCKS, False), (8 * 264 / 1152 + 12 * 132 / 1152) / 2)
    assert predict.tail_factor(32, 1024, predict.MMA_BACKWARD_BLOCKS) < 1.15 and predict.tail_factor(64, 1024, predict.MMA_BLOCKS) < 1.05
    assert predict.tail_factor(1536, 1024, predict.MMA_BLOCKS, False) < 1.05
    # by wgmma: 16 blocks of 1 to 16 tiles a head, 8.5 on average; of 8 heads 128 for 660 places end with the longest, or,
    # as each of 128 multiprocessors has one, take a fifth of that
    near(predict.tail_factor(8, 1024, predict.WGMMA_BLOCKS), (16 * 660 + 16 / 5 * 660) / (2 * 8 * 16 * 8.5))
    # 256 heads ran at 326 and 224 TFLOP/s of an H100, delta (27 us of 383) within the backward
    for rate, blocks, least, most in ((predict.ATTENTION, predict.WGMMA_BLOCKS, 325, 327),
                                      (predict.ATTENTION_BACKWARD, predict.WGMMA_BACKWARD_BLOCKS, 241, 243)):
        assert least < rate * predict.LARGE_PRODUCT / predict.tail_factor(256, 1024, blocks) * 1e-12 < most, rate
    for flags in ([], ["--card", "h200"], ["--terms"], ["--changes"], ["--products"]):
        done = run(sys.executable, "dev/bench/predict.py", *flags)
        assert done.returncode == 0 and done.stdout in (ROOT / "dev/doc/speed.md").read_text(), done.stdout
    # arithmetic alone: FP8 halves the products' 72 C^2 operations a token; a memory alone: an epilogue moves 8 C bytes a
    # token where the kernel moves 16 C or 24 C
    gains, _ = predict.product_gains(1024, 8192, 1024, 1e12, 1e30)
    near(gains["FP8 products alone"], 8192 * 36 * 1024**2 / 1e12 / predict.PRODUCT)
    gains, _ = predict.product_gains(1024, 8192, 1024, 1e30, 1e12)
    for way, sign, kernel in (("GELU_AUX epilogue", 1, 16), ("GELU's backward as a kernel", -1, 24)):
        won = 8192 * 1024 / 1e12 * (kernel / predict.GELU[0] - 8 / predict.BY_MEMORY[0])
        near(gains[way], sign * (won + predict.GAP))


def test_no_gpu_is_said(folder):
    """Without a GPU the commands say so in one line and exit 1."""
    if run("dev/tools/cuda.sh", "trainer").stdout.strip() == "train_keel":
        raise suite.Skip("what the tools say without a GPU: there is one")
    for command in ("dev/bench/idle.sh", "dev/bench/bench_gpu.sh"):
        done = run(command, TRAINER="")
        assert done.returncode == 1 and "GPU" in done.stderr.splitlines()[-1] and not done.stdout, (command, done.stdout, done.stderr)


if __name__ == "__main__":
    sys.exit(suite.main(sys.modules[__name__]))
