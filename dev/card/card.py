"""What a GPU shows of train_keel in minutes: right or wrong, how fast, beside whom, and the logs to mend it by.

Stages (dev/card/stages.py) run in order of worth, each a process of its own with a limit of its own. What a stage finds is in
the folder of results the moment it exists. At a limit everything that the stage has started is ended, and the next one
begins. Nothing is built, installed or searched for there: `make card` does it beforehand; only a program that does not
start is built again in place.

Results go to $OUT, or build/card_out:
    h100.csv, h200.csv ...   rows of dev/results' columns (dev/bench/results.py), the GPU's name in the file's
    logs.tar.gz              what every command printed, a file each, named by stage
    table.txt                the table that is printed last
    torch_cache.tar.gz       PyTorch's compiled code, for the next call: --keep takes it to build/card
    lesson.tar.gz            the lesson's finished runs: --keep takes them to dev/results
"""

import argparse
import contextlib
import ctypes
import datetime
import hashlib
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "dev" / "bench")]
import bench_gpu
import results
from results import Failed
from stages import CARD, RECORDER, REHEARSAL, STAGES, TOGETHER, Work, end_tree, ended

LOG_BYTES = 400_000    # of a log that comes back: its end
MOST_BYTES = 16 << 20  # of a file that comes back
PACK_BYTES = 55 << 20  # of build/card
PROGRAMS = ["train_keel", "train_keel_fp32", "train_keel_cpu", "train_keel_cpu_fp64", "test_gpu_bf16", "test_gpu_fp32",
            "bench_kernels", "bench_products"]
CACHE = "torch_cache.tar.gz"


def become_subreaper():
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans below become children of this process


def unpack(tar, folder):
    with tarfile.open(tar) as file:
        file.extractall(folder)


# ---------------------------------------------------------------------------------------------------------
# A call

class Session:
    """What the stages of a call share: the GPU, the folder of results, a scratch folder."""

    def __init__(self, sizes, rehearsal):
        self.sizes, self.rehearsal, self.programs = sizes, rehearsal, ROOT / sizes.programs
        with contextlib.suppress(OSError):
            self.device = open("/dev/nvidia0")  # which keeps the driver up, as a server's persistence daemon does
        self.gpu, self.driver = results.machine()
        if self.gpu == "none":
            raise Failed("expected an NVIDIA GPU that nvidia-smi names, found none; dev/card.sh --rehearse needs none")
        self.out = Path(os.environ.get("OUT") or f"{self.programs}_out")
        self.out.mkdir(parents=True, exist_ok=True)
        self.card = results.results_name(self.gpu)
        self.file = self.out / f"{self.card}.csv"
        self.commit, self.kernels = ((self.programs / name).read_text().strip() for name in ("commit", "kernels"))
        self.scratch = Path(tempfile.mkdtemp(prefix="card_"))
        self.logs = self.scratch / "logs"
        # PyTorch's caches name files by their whole path: the same folder in every call.
        self.cache = (self.scratch if rehearsal else Path(tempfile.gettempdir())) / "keel_torch_cache"
        self.logs.mkdir(), self.cache.mkdir(exist_ok=True)
        for program in PROGRAMS:
            with contextlib.suppress(OSError):
                (self.programs / program).chmod(0o755)
        self.environment = {"TORCHINDUCTOR_CACHE_DIR": f"{self.cache}/inductor", "TRITON_CACHE_DIR": f"{self.cache}/triton"}
        self.environment["PYTHONUNBUFFERED"] = "1"
        if (self.programs / CACHE).exists():
            unpack(self.programs / CACHE, self.cache)
        self.torch_is_warm = (self.cache / "whole").exists()  # else it was cut off, or some of it failed

    def find_torch(self, stop=None, seconds=120):
        """A Python whose PyTorch can use the GPU, or "". From a cold disk PyTorch may take a minute to start, so it is
        looked for once."""
        if "TORCH_PYTHON" in os.environ:
            return os.environ["TORCH_PYTHON"]
        code = "import numpy, torch; assert torch.cuda.is_available() and hasattr(torch, 'compile')"
        found = self.scratch / "torch_python"
        if found.exists():
            return found.read_text()
        end = time.monotonic() + seconds
        for python in dict.fromkeys([os.environ.get("PYTHON") or "python3", "/usr/bin/python3"]):
            with contextlib.suppress(OSError), subprocess.Popen([python, "-c", code], stderr=subprocess.DEVNULL) as child:
                while child.poll() is None and time.monotonic() < end and not (stop and stop.is_set()):
                    time.sleep(0.1)
                child.kill()
                if child.wait() == 0:
                    found.write_text(python)
                    return python
        return ""

    def add_rows(self, rows, command):
        results.append(self.file, rows, results.about(command, self.commit, self.kernels))

    def have(self, metric):
        """Whether dev/results or this folder has it of this GPU and these kernels: of a stage, that it was right, of a
        figure, with its peer."""
        rows = [row for path in (results.kept_file(self.gpu), self.file) if path.exists() for row in results.read(path)]
        rows = [row for row in rows if row["metric"] == metric and row["kernels"] == self.kernels]
        return any(row["value"] == "1" if row["unit"] == "ok" else row["ratio"] for row in rows)

    def save(self, name, folder, wanted=lambda path: True):
        """A folder as a tar among the results, whole or not at all."""
        temporary = self.out / f"{name}.tmp"
        with tarfile.open(temporary, "w:gz", compresslevel=1) as tar:
            for path in sorted(folder.rglob("*")):
                if path.is_file() and wanted(path):
                    tar.add(path, path.relative_to(folder))
        if temporary.stat().st_size < MOST_BYTES:
            return os.replace(temporary, self.out / name)
        temporary.unlink()
        print(f"  {name}: over {MOST_BYTES >> 20} MiB, it stays behind", flush=True)

    def save_logs(self):
        for path in self.logs.glob("*.log"):
            if path.stat().st_size > LOG_BYTES:
                path.write_bytes(b"[only its end]\n" + path.read_bytes()[-LOG_BYTES:])
        self.save("logs.tar.gz", self.logs)

    def save_cache(self):
        if any(self.cache.rglob("*")):
            self.save(CACHE, self.cache)

    def save_lesson(self, runs):
        """Tables and finished runs, without checkpoints: a run that was cut off begins anew."""
        def wanted(path):
            experiment, name, *_ = path.relative_to(runs).parts
            record = runs / experiment / (re.sub(r"\.(json|txt|err)$", "", name) + ".json")
            done = record.exists() and re.search('"end": "(finished|diverged)"', record.read_text())
            return experiment == "tables" or done and path.suffix != ".bin"
        if runs.exists():
            self.save("lesson.tar.gz", runs, wanted)

    def start_programs(self):
        """Tries each program. One that does not start is given the toolkit's libraries, and then built here. Returns
        {program: why} of those that do not start."""
        def why_not(name):
            path = self.programs / name
            load = [sys.executable, "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])", path]
            command = load if name == RECORDER else [path, "--version" if name.startswith("test") else "-h"]
            try:
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60,
                                      env={**os.environ, **self.environment})
            except (OSError, subprocess.TimeoutExpired) as error:
                return str(error)
            if done.returncode == 0:
                return ""
            if name.startswith("bench") and 0 < done.returncode < 126 and "GLIBC" not in done.stderr:
                return ""  # they know no -h
            return (done.stderr.strip().splitlines() or [ended(done.returncode)])[-1]

        def those_that_do_not(names):
            with ThreadPoolExecutor(8) as pool:
                return {name: why for name, why in zip(names, pool.map(why_not, names)) if why}

        bad = those_that_do_not(PROGRAMS + [RECORDER] * (self.programs / RECORDER).exists())
        if bad and not self.rehearsal:
            places = ("usr/local/cuda*/lib64", "usr/local/cuda*/extras/CUPTI/lib64", "opt/*/.venv/lib/python3*/*/nvidia/*/lib")
            libraries = [str(path) for place in places for path in Path("/").glob(place)]
            self.environment["LD_LIBRARY_PATH"] = ":".join(filter(None, [os.environ.get("LD_LIBRARY_PATH"), *libraries]))
            bad = those_that_do_not(bad)
        if bad and not self.rehearsal:
            for name, why in bad.items():
                print(f"{name} does not start ({why}): it is built here", flush=True)
                (self.programs / name).unlink(missing_ok=True)
            make = ["make", f"-j{os.cpu_count()}", *(f"{self.sizes.programs}/{name}" for name in bad)]
            with contextlib.suppress(OSError, subprocess.TimeoutExpired), open(self.logs / "build.log", "w") as log:
                environment = {**os.environ, "CPATH": self.sizes.programs}  # has doctest
                subprocess.run(make, cwd=ROOT, stdout=log, stderr=log, timeout=120, env=environment)
            bad = those_that_do_not(bad)
        return bad

    def run_stage(self, name, seconds, resume):
        """Runs a stage in a process of its own. Returns (outcome, seconds, note)."""
        begin, note, status = time.monotonic(), self.scratch / f"{name}.note", None
        print(f"\n== {name}, at most {seconds:.0f} s", flush=True)
        pid = os.fork()
        if pid == 0:
            self.work(name, seconds, resume, note)
        while status is None and time.monotonic() < begin + seconds:
            time.sleep(0.05)
            done, code = os.waitpid(pid, os.WNOHANG)
            status = os.waitstatus_to_exitcode(code) if done else None
        end_tree(os.getpid())
        end = time.monotonic() + 5
        with contextlib.suppress(ChildProcessError):  # the stage itself and orphans, but for what the driver still holds
            while time.monotonic() < end:
                os.waitpid(-1, os.WNOHANG)
                time.sleep(0.01)
        took, said = time.monotonic() - begin, note.read_text() if note.exists() else ""
        outcome = {0: "ok", 1: "NOT OK", None: "CUT OFF"}.get(status, "DIED")
        if outcome in ("CUT OFF", "DIED"):
            said = f"its {seconds:.0f} s were over" if status is None else ended(status)
        self.add_rows([results.measured(f"stage/{name}", int(status == 0), "ok")], f"dev/card.sh {name}")
        print(f"== {name}: {outcome} after {took:.0f} s{': ' + said if said else ''}", flush=True)
        with contextlib.suppress(OSError, tarfile.TarError):
            self.save_logs()
        return outcome, took, said

    def work(self, name, seconds, resume, note):
        """The stage's process, which ends here: exit status 0 if all was right, 1 with a note if not."""
        status = 2
        try:
            become_subreaper()
            work = Work(self, name, seconds, resume)
            try:
                STAGES[name].function(work)
            except Failed as why:
                work.bad.append(str(why))
            except Exception as error:
                traceback.print_exc(file=sys.stdout)
                work.bad.append(f"{type(error).__name__}: {error}".splitlines()[0])
            note.write_text("; ".join(work.bad) or work.note)
            status = 1 if work.bad else 0
        finally:
            sys.stdout.flush()
            os._exit(status)

    def table(self, outcomes, seconds):
        """At most 25 lines: the stages, then the figures, those with a goal first, then those of whole runs."""
        now = datetime.datetime.now(datetime.timezone.utc)
        lines = [f"{self.gpu}, driver {self.driver}, {now:%Y-%m-%d %H:%M} UTC, commit {self.commit}, kernels {self.kernels}"]
        lines += [f"{name:10} {outcome:9} {took:4.0f} s  {note[:90]}" for name, (outcome, took, note) in outcomes.items()]
        rows = {row["metric"]: row for row in (results.read(self.file) if self.file.exists() else []) if row["unit"] != "ok"}
        told = [(results.said(row["metric"], row["value"], row["ratio"]), row) for row in rows.values()]
        told.sort(key=lambda pair: (not pair[0], "/" not in pair[1]["metric"]))
        for said, row in told[:23 - len(lines)]:
            peer = f"{row['peer_value']:>12} {row['ratio']:>8}"
            lines.append(f"{row['metric'][:40]:40} {row['value']:>10} {row['unit'][:12]:12} {peer}  {said}".rstrip())
        good = sum(outcome == "ok" for outcome, _, _ in outcomes.values())
        lines.append(f"in all {seconds:.0f} s; {len(rows)} figures in {self.file.name}")
        return lines + [f"{good} passed, {len(outcomes) - good} failed"]


def call(a, sizes):
    begun = time.monotonic()
    become_subreaper()
    session, outcomes = Session(sizes, a.rehearse), {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(124))  # a call that is cut off leaves what it has
    named = [part for name in a.stages for part in TOGETHER.get(name, [name])]
    seconds = a.seconds or (sum(STAGES[name].limit for name in named) + 25 if named else 470)
    try:
        missing = session.start_programs()
        print(f"{session.gpu}, driver {session.driver}; results in {session.out}", flush=True)
        for name, why in missing.items():
            print(f"{name} cannot run here: {why}", flush=True)
        for name in named or [name for name, stage in STAGES.items() if not stage.by_name]:
            if not named and session.have(f"stage/{name}"):
                print(f"{name}: dev/results has it of these kernels", flush=True)
                continue
            stage, left = STAGES[name], seconds - (time.monotonic() - begun) - 3
            if left < min(stage.least, a.limit or stage.limit):
                outcomes[name] = "not begun", 0, f"{max(0, left):.0f} s are left, it wants {stage.least}"
                continue
            if not named and name not in ("right", "safe") and not session.have("stage/right"):
                continue  # no rate counts before that
            outcomes[name] = session.run_stage(name, min(a.limit or stage.limit, left), not named)
        if not session.have("stage/right"):
            print("\nright has not passed on this GPU with these kernels: until it has, no rate counts", flush=True)
    finally:
        end_tree(os.getpid())
        lines = session.table(outcomes, time.monotonic() - begun)
        (session.out / "table.txt").write_text("\n".join(lines) + "\n")
        print("", *lines, sep="\n", flush=True)
        with contextlib.suppress(OSError, tarfile.TarError):
            session.save_logs()
        shutil.rmtree(session.scratch, ignore_errors=True)
    return any(outcome not in ("ok", "not begun") for outcome, _, _ in outcomes.values())


# ---------------------------------------------------------------------------------------------------------
# Before and after

def machine_code(path):
    """A hash of the SASS in a program whose device code was linked uncompressed: names and bytes of its kernels' code
    sections, the same whatever comments, line numbers and host code are."""
    data, found = Path(path).read_bytes(), []
    for at in (match.start() for match in re.finditer(rb"\x7fELF\x02\x01", data)):
        if struct.unpack_from("<H", data, at + 18)[0] != 190:  # EM_CUDA: a cubin
            continue
        sections, (size, count, names) = struct.unpack_from("<Q", data, at + 40)[0], struct.unpack_from("<HHH", data, at + 58)
        headers = [struct.unpack_from("<IIQQQQ", data, at + sections + i * size) for i in range(count)]
        for name, _, _, _, offset, length in headers:
            start = at + headers[names][4] + name
            text = data[start:data.index(b"\0", start)]
            if text.startswith(b".text."):
                found.append(text + b"\0" + data[at + offset:at + offset + length])
    if not found:
        raise Failed(f"{path}: expected uncompressed code of kernels, found none; build it by make card")
    return hashlib.sha256(b"\0".join(sorted(found))).hexdigest()[:12]


def said_by(*command, **more):
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, **more).stdout.strip()


def write_data(folder, commit, kernels):
    (folder / "commit").write_text(commit + "\n"), (folder / "kernels").write_text(kernels + "\n")
    for V in (256, 50257):
        bench_gpu.data_file(V, folder)


def pack_rehearsal():
    """The programs on the CPU headers under the card's names, and data."""
    folder = ROOT / REHEARSAL.programs
    folder.mkdir(parents=True, exist_ok=True)
    for name in PROGRAMS + [RECORDER, "fake_cupti.so"]:
        built = ROOT / (name if "_cpu" in name else f"build/{name}" if name.endswith(".so") else f"build/{name}_on_cpu")
        (folder / name).unlink(missing_ok=True)
        if built.exists():
            (folder / name).symlink_to(built)
    write_data(folder, "rehearsal", "rehearsal")


def pack(baseline):
    """What make card adds to the programs: data, the commit's name, the hash of the kernels, doctest's header, an older
    trainer; then what it all takes."""
    folder = ROOT / CARD.programs
    for name in PROGRAMS + [RECORDER]:
        if (folder / name).exists():
            said_by("strip", "--strip-unneeded", str(folder / name))
    write_data(folder, results.git_commit(), machine_code(folder / "train_keel"))
    for header in (Path("/usr/include/doctest/doctest.h"), Path("/usr/local/include/doctest/doctest.h")):
        if header.exists():  # for a test program that must be built there
            (folder / "doctest").mkdir(exist_ok=True)
            shutil.copy(header, folder / "doctest")
    shutil.rmtree(folder / "baseline", ignore_errors=True)
    if baseline:
        (folder / "baseline").mkdir()
        with tempfile.TemporaryDirectory() as tree:
            said_by("sh", "-c", f"git archive {shlex.quote(baseline)} | tar -x -C {shlex.quote(tree)}")
            nvcc, rpath = said_by("dev/tools/cuda.sh", "nvcc"), said_by("dev/tools/cuda.sh", "rpath").split()
            arch = said_by("dev/tools/cuda.sh", "arch", env={**os.environ, "ARCH": "90"}).split()
            said_by(nvcc, "-std=c++20", "--expt-relaxed-constexpr", *arch, f"-I{tree}", "-o", str(folder / "baseline/train_keel"),
                    f"{tree}/train_keel.cu", "-lcublasLt", *rpath, "-Xlinker", "-s")
        (folder / "baseline" / "commit").write_text(said_by("git", "rev-parse", "--short", baseline) + "\n")
    files = {path: path.stat().st_size / 2**20 for path in sorted(folder.rglob("*")) if path.is_file()}
    for path, size in files.items():
        print(f"{size:8.2f} MiB  {path.relative_to(ROOT)}")
    words = [(folder / name).read_text().strip() for name in ("commit", "kernels")]
    print(f"{sum(files.values()):8.2f} MiB  in all, of {PACK_BYTES >> 20}; commit {words[0]}, kernels {words[1]}")
    if sum(files.values()) * 2**20 > PACK_BYTES:
        raise Failed(f"expected at most {PACK_BYTES >> 20} MiB in {CARD.programs}, found more")


def keep(folder):
    """Takes what came back from a card into dev/results: rows, the lesson's runs; PyTorch's compiled code to build/card."""
    tables = sorted(folder.glob("*.csv"))
    if not tables:
        raise Failed(f"--keep: expected a csv of results in {folder}, found none")
    for path in tables:
        target, rows = results.FOLDER / path.name, [list(row.values()) for row in results.read(path)]
        had = [list(row.values()) for row in results.read(target)] if target.exists() else []
        fresh = [row for row in rows if row not in had]
        for row in fresh:
            results.append(target, [row[:len(results.MEASURED)]], row[len(results.MEASURED):])
        print(f"{target.relative_to(ROOT)}: {len(fresh)} rows added, {len(rows) - len(fresh)} were there")
    if (folder / "lesson.tar.gz").exists():
        target = results.FOLDER / f"lesson_{tables[0].stem}"
        target.mkdir(exist_ok=True)
        shutil.copy(folder / "lesson.tar.gz", target / "runs.tar.gz")
        with tempfile.TemporaryDirectory() as scratch:
            unpack(folder / "lesson.tar.gz", scratch)
            for table in Path(scratch).glob("tables/*/*.csv"):
                shutil.copy(table, target)
        print(f"{target.relative_to(ROOT)}: the lesson's runs and tables")
    if (folder / CACHE).exists() and (ROOT / CARD.programs).exists():
        shutil.copy(folder / CACHE, ROOT / CARD.programs)
        print(f"{CARD.programs}/{CACHE}: PyTorch's compiled code, for the next call")


def main():
    stages = "\n".join(f"  {name:9} {stage.limit:4} s  {stage.function.__doc__}" for name, stage in STAGES.items())
    parser = argparse.ArgumentParser(prog="dev/card.sh", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
                                     epilog=f"stages, in order of worth:\n{stages}\n  lesson: {', '.join(TOGETHER['lesson'])}")
    add = parser.add_argument
    add("stages", nargs="*", metavar="STAGE", help="without: those that dev/results does not have of this GPU and these kernels")
    add("--seconds", type=float, help="of the whole call, after which no stage runs on [470; with STAGEs their limits and 25]")
    add("--limit", type=float, help="of each stage, seconds, instead of its own")
    add("--rehearse", action="store_true", help="all of it without a GPU: the programs of make rehearsal, small models")
    add("--keep", metavar="FOLDER", type=Path, help="take the results in FOLDER into dev/results")
    add("--pack", action="store_true", help=argparse.SUPPRESS)  # the second half of make card and make rehearsal
    add("--baseline", default="", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if unknown := [name for name in a.stages if name not in STAGES and name not in TOGETHER]:
        raise Failed(f"expected stages of {', '.join(STAGES)} or lesson, found {unknown[0]}")
    if a.pack:
        return pack_rehearsal() if a.rehearse else pack(a.baseline)
    if a.keep:
        return keep(a.keep)
    if a.rehearse:  # stand-ins of nvidia-smi, compute-sanitizer and PyTorch on CUDA
        stand_ins = ROOT / "test" / "card"
        os.environ["PATH"] = f"{stand_ins}:{os.environ['PATH']}"
        there = subprocess.run([stand_ins / "torch", "--here"]).returncode == 0
        os.environ["TORCH_PYTHON"] = "test/card/torch" if there else ""
    sizes = REHEARSAL if a.rehearse else CARD
    if not (ROOT / sizes.programs / "kernels").exists():
        raise Failed(f"expected {sizes.programs}, found none; make {'rehearsal' if a.rehearse else 'card'} builds it")
    return call(a, sizes)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as why:
        sys.exit(f"card: {why}")
