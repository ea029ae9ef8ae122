"""The trainers and the PyTorch reference read each other's files and agree. Ends with `N passed, N failed`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "dev"), str(ROOT / "dev" / "reference")]

import numpy as np
import torch

import data
import keel
import keel_file
import suite

CPU, FP64 = str(ROOT / "train_keel_cpu"), str(ROOT / "train_keel_cpu_fp64")
SMALL = ["-L", "6", "-C", "12", "-H", "3", "-t", "8", "-b", "2", "-r", "none"]


def run(*command):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


def succeed(*command):
    done = run(*command)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr}"
    return done.stdout


def test_check_confirms_dumps(folder):
    """What both builds dump, for every placement, is what PyTorch computes from the same parameters."""
    for norm in keel_file.NORMS:
        for binary in (CPU, FP64):
            succeed(binary, *SMALL, "--norm", norm, "--dump", folder / "d.bin")
            succeed(sys.executable, ROOT / "dev/reference/check.py", folder / "d.bin")


def test_check_finds_a_wrong_value(folder):
    """The reference's own check fails, and names the tensor, when one value of a dump is moved."""
    succeed(FP64, *SMALL, "--dump", folder / "d.bin")
    file = keel_file.read(folder / "d.bin")
    file.tensors["dfcw[3]"] = file.tensors["dfcw[3]"].copy()
    file.tensors["dfcw[3]"].flat[7] += 1e-6
    keel_file.write(folder / "d.bin", file)
    done = run(sys.executable, ROOT / "dev/reference/check.py", folder / "d.bin")
    assert done.returncode == 1, done.stdout
    assert [line for line in done.stdout.splitlines() if "fcw[3]" in line and "NOT OK" in line], done.stdout
    done = run(FP64, "--check", folder / "d.bin")
    assert done.returncode == 1 and done.stdout.count("NOT OK") == 1, done.stdout


def test_model_file_loads(folder):
    """PyTorch loads a trained model file and finds the loss that the trainer finds."""
    text = folder / "text.txt"
    text.write_bytes(bytes(1 + (i * i // 7) % 251 for i in range(4000)))
    succeed(CPU, *SMALL, "-i", text, "-x", "5", "-s", "0", "-o", folder / "run")
    model_path = folder / "run" / "model_00000005.bin"
    succeed(CPU, "-i", text, "-e", model_path, "-b", "2", "--dump", folder / "d.bin")
    dump = keel_file.read(folder / "d.bin")
    model = keel.from_file(model_path)
    tokens, targets = (torch.as_tensor(np.array(dump.tensors[name])).long() for name in ("tokens", "targets"))
    loss, expected = model.loss(tokens, targets).item(), float(dump.tensors["loss"].reshape(-1)[0])
    assert abs(loss / expected - 1) < 1e-5, (loss, expected)


def test_state_file_reads(folder):
    """The reader takes a training state apart into parameters and both moments."""
    text = folder / "text.txt"
    text.write_bytes(bytes(1 + (i * i // 7) % 251 for i in range(4000)))
    succeed(CPU, *SMALL, "-i", text, "-x", "3", "-s", "0", "-o", folder / "run")
    state = keel_file.read(folder / "run" / "state_00000003_00000.bin")
    model = keel_file.read(folder / "run" / "model_00000003.bin")
    for name, _ in keel_file.parameter_table(model.cfg):
        assert np.array_equal(state.tensors[name], model.tensors[name]), name
    assert "wte" in succeed(sys.executable, ROOT / "dev/keel_file.py", folder / "run" / "model_00000003.bin")


def test_globs_are_the_trainers(folder):
    """The reference and the experiments read the files of a name or a glob that the trainers read."""
    for name in "a [1].txt", "a 1.txt", "b [2]/c.txt":
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    (folder / "b [2]" / "empty.txt").touch()
    for glob, text in ("a [1].txt", "a [1].txt"), ("a ?.txt", "a 1.txt"), ("b [2]/*.txt", "b [2]/c.txt"):
        assert bytes(np.concatenate(data.read_text(str(folder / glob))).astype(np.uint8)).decode() == text


def test_tokenizer_file_is_printed(folder):
    """The reader prints a tokenizer's tokens, and of a model the checksum of its own."""
    succeed(sys.executable, ROOT / "data/tokenizer.py", "import", "bytes", "-o", folder / "tok.bin")
    printed = succeed(sys.executable, ROOT / "dev/keel_file.py", folder / "tok.bin").splitlines()
    assert printed[0].endswith(", V 257, 1 of them special, split 0") and "b'a'" in printed[2 + ord("a")], printed
    succeed(CPU, *SMALL, "--tokenizer", folder / "tok.bin", "-x", "1", "-s", "0", "-o", folder / "run")
    assert printed[0].split(",")[0] in succeed(sys.executable, ROOT / "dev/keel_file.py", folder / "run" / "model_00000001.bin")


def test_damage_is_refused(folder):
    """The reader refuses a file with a flipped bit, in one line."""
    succeed(CPU, *SMALL, "--dump", folder / "d.bin")
    succeed(sys.executable, ROOT / "data/tokenizer.py", "import", "bytes", "-o", folder / "tok.bin")
    for name, at in ("d.bin", 5000), ("tok.bin", 1100):
        raw = bytearray((folder / name).read_bytes())
        raw[at] ^= 1
        (folder / name).write_bytes(raw)
        done = run(sys.executable, ROOT / "dev/keel_file.py", folder / name)
        assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr


if __name__ == "__main__":
    sys.exit(suite.main(sys.modules[__name__]))
