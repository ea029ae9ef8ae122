#!/bin/sh
# Training speed beside PyTorch's, where a step's time goes and matrix products beside OpenBLAS's: about 20 minutes on an
# idle machine, and 10 more the first time, for torch.compile; flags: --help.
# Speed is shown, not tested: what is missing here is named, and the rest goes on.
root=$(dirname "$0")/../..
"$root/dev/tools/need.sh" libopenblas-dev
make --no-print-directory -s -C "$root" train_keel_cpu build/bench_matmul || exit 1
make --no-print-directory -s -C "$root" build/train_keel_cpu_g build/sample_cpu.so # without them no times by layer
python=$("$root/dev/tools/find_python.sh" sys) || exit 1
exec "$python" "$root/dev/bench/bench_cpu.py" --torch-python "$("$root/dev/tools/find_python.sh" torch numpy 2>/dev/null)" "$@"
