"""dev/card.sh rehearsed without a GPU: the real programs on the CPU headers (make rehearsal), stand-ins of nvidia-smi, compute-sanitizer and PyTorch
on CUDA (test/card), in a copy of the tree without .git, and with apt-get, git and sudo absent. Ends with `N passed, N failed`.
"""

import csv
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import suite

ROOT = Path(__file__).resolve().parents[1]
ABSENT = {"apt-get", "apt", "git", "sudo"}


def tree():
    """A copy of the tree as a card's machine gets it, and the PATH of that machine."""
    folder = Path(tempfile.mkdtemp(prefix="card_test_"))
    copy, bin = folder / "tree", folder / "bin"
    shutil.copytree(ROOT, copy, ignore=lambda at, names: [n for n in names if n in (".git", "build", "__pycache__")])
    shutil.copytree(ROOT / "build" / "rehearsal", copy / "build" / "rehearsal")  # what its links name
    bin.mkdir()
    for place in reversed(os.environ["PATH"].split(":")):
        for program in Path(place).glob("*") if place else []:
            if program.name not in ABSENT:
                (bin / program.name).unlink(missing_ok=True)
                (bin / program.name).symlink_to(program)
    return folder, copy, bin


FOLDER, TREE, BIN = tree()


def card(*arguments, out, **environment):
    begin = time.monotonic()
    done = subprocess.run(["dev/card.sh", *map(str, arguments)], cwd=TREE, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL,
                          env={**os.environ, "PATH": str(BIN), "OUT": str(out), "OMP_NUM_THREADS": "2", **environment})
    print(f"   dev/card.sh {' '.join(map(str, arguments))}: {time.monotonic() - begin:.0f} s", flush=True)
    return done


def rows(out):
    with open(out / "gpu.csv", newline="") as file:
        return list(csv.DictReader(file))


def values(out, metric):
    return [float(row["value"]) for row in rows(out) if row["metric"] == metric]


def logs(out):
    with tarfile.open(out / "logs.tar.gz") as tar:
        return {m.name: tar.extractfile(m).read().decode(errors="replace") for m in tar.getmembers()}


def replaced(name, script):
    """Puts a script where a program is. Returns the program."""
    path = TREE / "build" / "rehearsal" / name
    saved = path.with_suffix(".saved")
    if path.exists():  # some are built with LONG=1 alone
        path.rename(saved)
    path.write_text("#!/bin/bash\n[[ $1 == -h || $1 == --version ]] && exit 0\n" + script)
    path.chmod(0o755)
    return saved


def restore(saved):
    if saved.exists():
        saved.rename(saved.with_suffix(""))
    else:
        saved.with_suffix("").unlink()


@suite.long
def test_every_stage(folder):
    """The whole call, without arguments: every stage passes and prints its rows, the table is short and last; what was kept is not run again."""
    out = folder / "out"
    done = card("--rehearse", "--seconds", "900", out=out)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout[done.stdout.rindex("CUDA on CPU, driver"):], end="")
    lines = (out / "table.txt").read_text().splitlines()
    assert len(lines) <= 25 and done.stdout.rstrip().endswith(lines[-1]) and lines[-1].endswith("0 failed"), lines
    found = {row["metric"] for row in rows(out)}
    stages = re.findall(r"^== (\w+), at most", done.stdout, re.M)
    assert len(stages) == 10, stages
    expected = [
        "right/smoke", "right/bf16", "right/fp32", "right/compare", "right/bf16_memory", "right/fp32_memory",
        "main/tokens_per_second", "main/mfu", "main/first_step", "main/planned_memory", "main/same_bits", "tiny/mfu",
        "tiny/vs_torch", "other/vs_torch", "kernels/kernels", "products/products", "safe/memcheck_train_keel",
        "safe/kill_and_resume", "safe/curve_bf16", "safe/curve_fp32", "safe/curve_bf16_states", "max_lr/rows",
        "hops/rows", "long/rows", "deep/mfu"
    ] + [f"stage/{name}" for name in stages]
    assert not set(expected) - found, set(expected) - found
    for row in rows(out):
        assert row["unit"] != "ok" or row["value"] == "1", row
        assert row["gpu"] == "CUDA on CPU" and row["kernels"] == "rehearsal" and row["date"] and row["command"], row
        assert str(FOLDER) not in row["command"] and "/tmp/" not in row["command"], row
    assert len(found) > 100, found  # kernels and products print a row each
    assert len(list(out.iterdir())) <= 8 and all(path.is_file() and path.stat().st_size < 16 << 20
                                                 for path in out.iterdir()), list(out.iterdir())
    assert {"right-bf16-layers.log", "main-run1.log", "safe-resume.log"} <= set(logs(out)), list(logs(out))
    again = card("--rehearse", out=out)  # the same folder of results: nothing is left to do
    assert again.returncode == 0 and again.stdout.count("dev/results has it of these kernels") == 10, (again.stdout
                                                                                                       + again.stderr)
    kept = card("--keep", out, out=out)
    assert kept.returncode == 0 and f"{len(rows(out))} rows added" in kept.stdout, kept.stdout + kept.stderr
    again = card("--rehearse", out=folder / "other")  # and another call knows what was kept
    assert again.returncode == 0 and "right: dev/results has it" in again.stdout, again.stdout + again.stderr
    (TREE / "dev" / "results" / "gpu.csv").unlink()


def test_hang_fail_die(folder):
    """A stage that hangs (it is stopped, and has a child that left its session and is deaf to SIGTERM), one whose program
    hangs, one that fails and one that dies are cut off and named; the others' rows come back, and nothing lives on."""
    out, mark = folder / "out", f"{61000 + os.getpid() % 999}.25"
    sleeps = f"trap '' TERM\nsetsid bash -c \"trap '' TERM; sleep {mark}\" &\n"
    scripts = {"bench_kernels": f"{sleeps}kill -STOP $PPID\nsleep {mark}\n", "bench_products": f"{sleeps}sleep {mark}\n",
               "test_gpu_fp32": "echo a test is wrong >&2\nexit 3\n", "train_keel_fp32": "kill -9 $PPID\nsleep 5\n"}
    said = ""
    # Only what hangs has a limit of its own: a busy machine is given its time.
    for programs, names in (["bench_kernels", "bench_products"], ["--limit", 12, "kernels", "products"]), (["test_gpu_fp32"], ["right", "deep"]), (
            ["train_keel_fp32"], ["safe"]):
        saved = [replaced(name, scripts[name]) for name in programs]
        try:
            done = card("--rehearse", *names, out=out)
        finally:
            for path in saved:
                restore(path)
        assert done.returncode == 1, done.stdout + done.stderr
        said += done.stdout
    for line in ("kernels: CUT OFF after \\d+ s: its 12 s were over", "products: (NOT OK|CUT OFF) ", "right: NOT OK .*a test is wrong",
                 "deep: ok", "safe: DIED .*SIGKILL"):
        assert re.search(f"^== {line}", said, re.M), (line, said)
    stages = {name: values(out, f"stage/{name}") for name in ("kernels", "products", "right", "safe", "deep")}
    assert stages == {"kernels": [0], "products": [0], "right": [0], "safe": [0], "deep": [1]}, stages
    assert values(out, "deep/mfu") and values(out, "right/bf16") == [1], rows(out)
    left = subprocess.run(["pgrep", "-f", f"sleep {mark}"], capture_output=True, text=True).stdout.split()
    assert not left, left


def test_attention(folder):
    """The stage of attention alone has its test cases and its rows: the trainer's choice, beside cuDNN's too, and mma.sync's. Where a case is
    wrong nothing is timed."""
    def stage(out, program="", script=""):
        saved = replaced(program, script) if program else None
        try:
            return card("--rehearse", "attention", out=out)
        finally:
            if saved:
                restore(saved)

    lines = "metric,value,unit,peer_value,ratio\\n" + "attention_x,1,TFLOP/s,1,1\\n" * 8
    stand_in = f'[[ "$*" == *"--only attention"*--csv* ]] && printf "{lines}" >"${{@: -1}}"\n'
    done = stage(folder / "out", *(() if suite.LONG else ("bench_kernels", stand_in)))  # LONG=1 builds it
    assert done.returncode == 0 and "== attention: ok" in done.stdout, done.stdout + done.stderr
    found = {row["metric"] for row in rows(folder / "out")}
    assert {"attention/cases", "attention/attention", "attention/steps_by_wgmma", "stage/attention"} <= found, found
    if suite.LONG and "attention/sdpa" in found:  # there is a PyTorch
        names = {f"attention_{way}_T{T}_D{D}" for way in ("forward", "backward") for T in (64, 256) for D in (64, 128)}
        assert {name + end for name in names for end in ("", "_mma", "_vs_cudnn")} <= found, found
    done = stage(folder / "wrong", "test_gpu_bf16", "echo a test is wrong >&2\nexit 3\n")
    assert done.returncode == 1 and "cases: NOT OK: exit status 3: a test is wrong" in done.stdout, done.stdout
    found = {row["metric"] for row in rows(folder / "wrong")}
    assert found == {"attention/cases", "stage/attention"}, found


@suite.long
def test_failing_cases_are_named(folder):
    """Where a suite fails, the cases are named and tried again: alone, without overlapping launches, under memcheck. The fault is real: a device
    with too little memory."""
    out = folder / "out"
    done = card("--rehearse", "right", out=out, CUDA_ON_CPU_MEMORY="40")
    assert done.returncode == 1 and re.search(r"^right +NOT OK", done.stdout, re.M), done.stdout + done.stderr
    named = re.search(r"^  bf16, [\w ]+: failing: (.+)$", done.stdout, re.M)
    assert named and named[1] != "no case by name", done.stdout
    assert re.search(r"alone in a process wrong too", done.stdout) and re.search(
        r"without overlapping launches wrong too; memcheck: exit status 9", done.stdout), done.stdout
    assert any(name.endswith("-memcheck.log") for name in logs(out)), list(logs(out))


def test_a_call_that_is_cut_off(folder):
    """A call that is ended from outside leaves its rows, logs and table."""
    out = folder / "out"
    child = subprocess.Popen(["dev/card.sh", "--rehearse", "main", "safe"], cwd=TREE, stdout=subprocess.PIPE, text=True,
                             env={**os.environ, "PATH": str(BIN), "OUT": str(out)})
    while not (out / "gpu.csv").exists() or not values(out, "stage/main"):
        assert child.poll() is None
        time.sleep(0.1)
    child.terminate()
    said = child.communicate(timeout=600)[0]
    assert (child.returncode == 124 and "main" in (out / "table.txt").read_text() and values(out, "main/mfu")
            and logs(out)), said


def test_what_is_refused(folder):
    """Unknown stages, no GPU, no programs, and a folder without results are refused in a line."""
    for arguments, words in ((["--rehearse",
                               "left"], "found left"), (["right"], "expected"), (["--keep", folder], "expected a csv")):
        done = card(*arguments, out=folder / "out")
        assert done.returncode == 1 and words in done.stderr and len(done.stderr.splitlines()) == 1, (arguments,
                                                                                                      done.stderr)


@suite.long
def test_make_card(folder):
    """make card builds everything for sm_90a without a warning, under 55 MiB; the kernels' hash is that of the machine code."""
    done = subprocess.run(["dev/tools/cuda.sh", "nvcc"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise suite.Skip("make card: no nvcc (the CUDA Toolkit)")
    nvcc = done.stdout.strip()
    done = subprocess.run(["make", "--no-print-directory", "card"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "MAKEFLAGS": ""})
    assert done.returncode == 0 and "warning" not in done.stdout + done.stderr, done.stdout + done.stderr
    print("\n".join(line for line in done.stdout.splitlines() if "MiB" in line))
    files = {str(path.relative_to(ROOT / "build/card")) for path in (ROOT / "build/card").rglob("*")}
    sys.path[:0] = [str(ROOT / "dev" / "card")]
    import card as module

    assert set(module.PROGRAMS) | {"text.txt", "pieces_train_000001.bin", "commit", "kernels"} <= files, files
    code = "__global__ void k(float* x) {{ x[threadIdx.x] {} 2; }}\n{}int main() {{ k<<<1, 1>>>(nullptr); }}\n"
    hashes = []
    for i, (sign, comment) in enumerate((("+=", ""), ("+=", "// a comment\nint host() { return 1; }\n"), ("*=", ""))):
        source = folder / f"s{i}.cu"
        source.write_text(code.format(sign, comment))
        subprocess.run(
            [nvcc, "-gencode", "arch=compute_90a,code=sm_90a", "--no-compress", "-o", folder / "program", source],
            check=True)
        hashes.append(module.machine_code(folder / "program"))
    assert hashes[0] == hashes[1] != hashes[2], hashes


if __name__ == "__main__":
    try:
        sys.exit(suite.main(sys.modules[__name__]))
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)
