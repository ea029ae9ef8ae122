#!/usr/bin/env python3
"""Which kernels' code is byte for byte what it was at a commit, so that what a GPU has measured of them then still holds.

    dev/tools/same_kernels.py COMMIT [ARCH]     # 90a, an H100's, if not given

Compiles train_keel.cu as it is at COMMIT and as it lies here, in BF16, and prints a line a kernel: same, changed (other code,
or other parameters or template arguments), or gone.
"""

import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def output(*command, text=True, **more):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=text, **more)
    if done.returncode:
        error = done.stderr if text else done.stderr.decode()
        sys.exit(f"same_kernels.py: {Path(command[0]).name}: {error.strip().splitlines()[-1]}")
    return done.stdout


def kernels(nvcc, tree, arch, cubin):
    """{name: code} of train_keel.cu: each kernel is a section .text.NAME of the ELF file that nvcc makes."""
    output(nvcc, "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-gencode", f"arch=compute_{arch},code=sm_{arch}", "-cubin",
           "-o", cubin, "train_keel.cu", cwd=tree)
    data, code = cubin.read_bytes(), {}
    for line in output("readelf", "-SW", cubin).splitlines():
        words = line.partition("]")[2].split()
        if words and words[0].startswith(".text."):
            offset, size = int(words[3], 16), int(words[4], 16)
            code[words[0].removeprefix(".text.")] = data[offset:offset + size]
    names = output("c++filt", input="\n".join(code)).splitlines()
    return dict(zip((name.removeprefix("void ").partition("(")[0] for name in names), code.values()))


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    commit, arch = sys.argv[1], sys.argv[2] if len(sys.argv) == 3 else "90a"
    nvcc = output(ROOT / "dev/tools/cuda.sh", "nvcc", cwd=ROOT).strip()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        tarfile.open(fileobj=io.BytesIO(output("git", "archive", commit, text=False, cwd=ROOT))).extractall(tree)
        before = kernels(nvcc, tree, arch, Path(folder) / "before.cubin")
        now = kernels(nvcc, ROOT, arch, Path(folder) / "now.cubin")
    for name in sorted(before | now):
        print("gone   " if name not in now else "same   " if before.get(name) == now[name] else "changed", name)
    same = sum(before.get(name) == code for name, code in now.items())
    print(f"{same} of {len(now)} kernels are what they were at {commit}")


if __name__ == "__main__":
    main()
