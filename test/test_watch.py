"""dev/watch.py: python3 test/test_watch.py. Ends with `N passed, N failed[, N skipped]`.

What it has written is read by TensorBoard's own reader, and of W&B from the file of an offline run.
"""

import csv
import errno
import io
import logging
import math
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "test"))
sys.path.append(str(ROOT / "build" / "python"))

import suite

WATCH = ROOT / "dev" / "watch.py"
TRAINER = ROOT / "train_keel_cpu"
COLUMNS = "step,loss,val_loss,lr,grad_norm,ms,tokens_per_second,mfu,val_bits_per_byte"
PROBE = ("step,sublayer,kind,rms_x,rms_f,rms_z,shortcut_gain,shortcut_gain_to_top,dx_norm,df_norm,grad_norm,"
         "update_norm,same_x")
PICTURES = {"depth/dx_norm", "depth/grad_norm", "depth/shortcut_gain_to_top", "depth/branch_share"}
RATIO = "depth/log10_dx_norm_2_over_last"


def need(*modules):
    for module in modules:
        if subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode:
            raise suite.Skip(f"no {module} in {sys.executable} (pip install {module.split('.')[0]})")


def command(*words):
    return [sys.executable, str(WATCH), *map(str, words)]


def watch(*words, **environment):
    done = subprocess.run(command(*words), capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(folder, *words, says, before=None):
    environment = {**os.environ, **no_pictures(folder)}
    done = subprocess.run(command(*words), capture_output=True, text=True, env=environment, preexec_fn=before)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, (done.returncode, done.stderr)
    assert says in done.stderr, done.stderr


def no_pictures(folder):
    """An environment without matplotlib: drawing takes a second."""
    (folder / "none").mkdir(exist_ok=True)
    (folder / "none" / "matplotlib.py").write_text("raise ImportError('none')\n")
    return {"PYTHONPATH": f"{folder / 'none'}:{os.environ.get('PYTHONPATH', '')}"}


class Following:
    """watch.py in the background, twenty looks a second."""

    def __init__(self, *words, **environment):
        self.process = subprocess.Popen(command("--every", 0.05, *words), stdout=subprocess.PIPE, text=True,
                                        stderr=subprocess.PIPE, env={**os.environ, **environment})

    def __enter__(self):
        return self

    def __exit__(self, *what):
        self.process.kill()
        self.process.communicate()

    def end(self, number=signal.SIGINT):
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        assert self.process.returncode == 0 and "Traceback" not in err, (self.process.returncode, err)


def until(what, true, seconds=60):
    """Waits for what is to happen soon; a loaded machine takes longer."""
    end = time.time() + seconds
    while not true():
        assert time.time() < end, f"{what}: not within {seconds} s"
        time.sleep(0.05)


def read(folder):
    """{tag: [(step, value), ...]} of a run's folder, pictures as PNG, without what a restart has purged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it says what it purges
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for tag in events.Tags()["images"]:
        found[tag] = [(e.step, e.encoded_image_string) for e in events.Images(tag)]
    return found


def float32(text):
    value = float(text)
    return struct.unpack("f", struct.pack("f", value))[0] if abs(value) < 3.4e38 else value


def same(found, expected):
    """Points as text pairs, NaN being equal to itself."""
    found, expected = [[(s, repr(v)) for s, v in points] for points in (found, expected)]
    assert found == expected, f"{len(found)} points, expected {len(expected)}: {found[-3:]}, {expected[-3:]}"


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def equals_log(points, folder):
    """All columns of log.csv are there, each number once, and no other."""
    rows = table(folder / "log.csv")
    for column in rows[0].keys() - {"step"}:
        same(points.get("log/" + column, []), [(int(r["step"]), float32(r[column])) for r in rows if r[column]])


def equals_run(points, folder):
    equals_log(points, folder)
    rows = table(folder / "probe.csv")
    dx = {(int(r["step"]), int(r["sublayer"])): float(r["dx_norm"]) for r in rows}
    last = max(layer for _, layer in dx)
    steps = sorted({step for step, _ in dx})
    same(points[RATIO], [(s, float32(math.log10(dx[s, 2]) - math.log10(dx[s, last]))) for s in steps])


def row(step, loss=None):
    loss = loss or f"{3 + 1 / step:.9g}"
    val = f"{3.1 + step / 1000:.9g}" if step % 5 == 0 else ""
    return f"{step},{loss},{val},0.001,1.25,200.125,4200.5,0.1234,\n"


def probed(step, layers=8):
    return "".join(f"{step},{l},attention,1,{0.1 + l / 100:.6g},2,1,{0.9 ** (layers - l):.6g},"
                   f"{2.0 ** (l - layers) / step:.6g},1,{0.01 * (l + 1):.6g},1,0.5\n" for l in range(layers))


def write(folder, steps, probe_every=0, rows=row):
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / "log.csv", COLUMNS + "\n" + "".join(map(rows, range(1, steps + 1))))
    if probe_every:
        replace(folder / "probe.csv", PROBE + "\n" + "".join(map(probed, range(probe_every, steps + 1, probe_every))))
    return folder


def add(path, text):
    with open(path, "a") as file:
        file.write(text)


def replace(path, text):
    """As the trainer does at its start and on a resume."""
    path.with_suffix(".tmp").write_text(text)
    os.replace(path.with_suffix(".tmp"), path)


def test_a_run_is_converted(folder):
    """Every number of the three logs is in the event file; empty cells and rows that are not whole are no points."""
    need("tensorboard")
    run = write(folder / "run", 20, probe_every=4)
    add(run / "log.csv", row(21, "nan") + row(22, "inf") + row(23, "-inf") + row(24, "1e39") + "\0\0\0\n" + "25,1.5\n")
    add(run / "hops.csv", "step,hops,accuracy,count\n10,1,0.75,64\n10,2,0.125,64\n20,1,1,64\n20,2,0.25,64\n")
    watch("--once", run, **no_pictures(folder))
    points = read(run)
    text = (run / "log.csv").read_text().split("\0")[0]
    (run / "log.csv").write_text(text.replace("1e39", "inf"))  # beyond float32
    equals_run(points, run)
    assert len(points["log/val_loss"]) == 4 and "log/val_bits_per_byte" not in points, points.keys()
    same(points["depth/hops_1"], [(10, 0.75), (20, 1.0)])
    same(points["depth/hops_2"], [(10, 0.125), (20, 0.25)])


def test_pictures(folder):
    """What goes on over depth is a PNG of a sensible size for each quantity, drawn once for each state of the log."""
    need("tensorboard", "matplotlib.figure")
    from matplotlib import image
    run = write(folder / "run", 20, probe_every=4)
    add(run / "probe.csv", probed(24))  # its row in log.csv is not there yet
    watch("--once", run, **no_pictures(folder))
    watch("--once", run)
    points = read(run)
    for tag in PICTURES:
        (step, png), = points[tag]
        height, width, _ = image.imread(io.BytesIO(png)).shape
        assert step == 20 and 300 < height < width < 2000, (tag, step, width, height)


def test_rows_are_followed(folder):
    """Files and rows that come later are there within a look; half a line is waited for; a signal ends it cleanly."""
    need("tensorboard")
    run = folder / "run"
    run.mkdir()
    with Following(run, **no_pictures(folder)) as following:
        until("an event file", lambda: list(run.glob("events.*")))
        write(run, 3)
        until("three steps", lambda: len(read(run).get("log/loss", [])) == 3)
        add(run / "log.csv", row(4)[:9])
        replace(run / "probe.csv", PROBE + "\n" + probed(4)[:100])
        time.sleep(0.3)
        assert len(read(run)["log/loss"]) == 3, "half a line was taken for a row"
        add(run / "log.csv", row(4)[9:])
        add(run / "probe.csv", probed(4)[100:])
        until("the fourth step", lambda: len(read(run)["log/loss"]) == 4 and RATIO in read(run))
        following.end(signal.SIGTERM)
    equals_run(read(run), run)


def test_a_resume_replaces_rows(folder):
    """Of rows that a resumed trainer cuts and writes anew, TensorBoard's reader has the new ones alone."""
    need("tensorboard")
    run = write(folder / "run", 20, probe_every=4)
    with Following(run, **no_pictures(folder)) as following:
        until("all steps", lambda: len(read(run).get("log/loss", [])) == 20)
        lines = (run / "log.csv").read_text().splitlines(keepends=True)[:11]
        replace(run / "log.csv", "".join(lines) + row(11, "7.5") + row(12, "7.25"))
        replace(run / "probe.csv", PROBE + "\n" + probed(4) + probed(8) + probed(12))
        until("the new steps", lambda: read(run).get("log/loss", [])[10:] == [(11, 7.5), (12, 7.25)])
        following.end()
    equals_run(read(run), run)
    watch("--once", run, **no_pictures(folder))
    equals_run(read(run), run)


def test_the_trainer_is_killed_and_resumed(folder):
    """The real trainer is killed and goes on by -y, and watch.py starts again: there is what the logs hold, once."""
    need("tensorboard")
    if not TRAINER.exists():
        raise suite.Skip("no train_keel_cpu (make train_keel_cpu)")
    run = folder / "run"
    run.mkdir()
    train = [str(TRAINER), "-L", "8", "-C", "16", "-H", "2", "-t", "32", "-b", "2", "-x", "600", "-v", "50", "-n", "40",
             "--probe", "10", "-o", str(run), "-y"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    with Following(run, **no_pictures(folder)) as following:
        trainer = subprocess.Popen(train, **quiet)
        until("100 steps", lambda: (run / "log.csv").exists() and len(table(run / "log.csv")) > 100)
        trainer.kill()
        trainer.wait()
        killed = len(table(run / "log.csv"))
        until("the steps before", lambda: len(read(run).get("log/loss", [])) >= killed - 1)
        assert subprocess.run(train, **quiet).returncode == 0
        following.end()
    equals_run(read(run), run)
    assert len(table(run / "log.csv")) == 600 and killed < 600, killed


def test_several_runs(folder):
    """Runs of one name get names that tell them apart under --logdir, where no other run's events are overwritten."""
    need("tensorboard")
    runs = [write(folder / "a" / "run", 3), write(folder / "b" / "run", 5), write(folder / "c", 4)]
    out = watch("--once", "--logdir", folder / "tb", *runs, runs[0], **no_pictures(folder))
    assert out.splitlines()[-1] == f"tensorboard --logdir {(folder / 'tb').resolve()}", out
    for name, run in zip(["a/run", "b/run"], runs):
        equals_log(read(folder / "tb" / name), run)
    assert len(list((folder / "tb").rglob("events.*"))) == 3
    watch("--once", *runs, **no_pictures(folder))
    for run in runs:
        equals_log(read(run), run)


def test_bad_input(folder):
    """A folder that is missing, is a file, or holds no logs is one line and exit 1, and nothing is written."""
    need("tensorboard")
    good = write(folder / "good", 3)
    refused(folder, good, folder / "missing", says="expected a run's folder, found none")
    refused(folder, good, good / "log.csv", says="expected a run's folder, found a file")
    (folder / "bad").mkdir()
    refused(folder, "--once", good, folder / "bad", says="expected a run's log.csv, found none")
    for name, text in ("log.csv", "time,loss\n1,2\n"), ("log.csv", "\0" * 50), ("probe.csv", "step,norm\n"):
        (folder / "bad" / name).write_text(text)
        refused(folder, good, folder / "bad", says=f"{name}: expected a run's log with the columns step,")
        (folder / "bad" / name).unlink()
    assert [path.name for path in folder.glob("[gb]*/*")] == ["log.csv"]


def test_a_full_disk(folder):
    """A disk that is full, or a place that cannot be written, is one line and exit 1."""
    need("tensorboard")
    run = write(folder / "run", 2000)
    refused(folder, "--once", run, "--logdir", "/proc/none", says="/proc/none: could not be written")
    import resource

    def little_space():  # as a full disk: what is written ends early
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))

    refused(folder, "--once", run, says=os.strerror(errno.EFBIG), before=little_space)


def test_without_tensorboard(folder):
    """A Python without TensorBoard is told what to install, and without matplotlib there are scalars and a note."""
    run = write(folder / "run", 8, probe_every=4)
    (folder / "tensorboard.py").write_text("raise ImportError('none')\n")
    done = subprocess.run(command("--once", run), capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(folder)})
    assert done.returncode == 1 and "pip install tensorboard matplotlib" in done.stderr, done.stderr
    need("tensorboard")
    assert "pip install matplotlib\n" in watch("--once", run, **no_pictures(folder))
    points = read(run)
    equals_run(points, run)
    assert not PICTURES & points.keys()


def wandb_history(folder):
    """[(run id, {key: JSON})] of all offline runs there, from their files: LevelDB's log format after 7 bytes."""
    from wandb.proto import wandb_internal_pb2
    found = []
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        data, at, whole = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if at % 32768 > 32768 - 7:  # a block's end has no room for a record
                at += 32768 - at % 32768
                continue
            _, length, kind = struct.unpack_from("<IHB", data, at)
            whole += data[at + 7:at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # a whole record, or a last part
                record = wandb_internal_pb2.Record.FromString(whole)
                whole = b""
                if record.HasField("history"):
                    items = record.history.item
                    found.append((path.stem[4:], {i.key or i.nested_key[0]: i.value_json for i in items}))
    return found


def test_wandb_offline(folder):
    """W&B gets each step once, as one run, also where watch.py starts again and where the run is resumed."""
    need("wandb", "PIL", "matplotlib.figure")
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CACHE_DIR": str(folder / "cache"),
               "WANDB_CONFIG_DIR": str(folder / "config"), "WANDB_DATA_DIR": str(folder / "data")}
    run = write(folder / "run", 10, probe_every=5)
    watch("--wandb", "--once", run, **offline, **no_pictures(folder))
    with Following("--wandb", run, **offline) as following:
        def sent(step):
            return f'"log.csv": {step},' in (run / "watch_wandb.json").read_text()

        add(run / "log.csv", row(11, "nan") + row(12))
        until("the added rows", lambda: sent(12))
        write(run, 11, probe_every=5)
        add(run / "log.csv", row(12) + row(13))
        until("the row after the resume", lambda: sent(13))
        following.end()
    history = wandb_history(run)
    losses = [(int(h["step"]), float(h["log/loss"])) for _, h in history if "log/loss" in h]
    same(losses, [(step, math.nan if step == 11 else float(f"{3 + 1 / step:.9g}")) for step in range(1, 14)])
    assert sum(RATIO in h for _, h in history) == 2 and sum("depth/dx_norm" in h for _, h in history) == 1
    assert len({name for name, _ in history}) == 1, "more than one run id"


if __name__ == "__main__":
    sys.exit(suite.main(sys.modules[__name__]))
