#!/bin/sh
# Training speed beside PyTorch's and matrix products beside OpenBLAS's, 2-3 minutes on an idle machine; flags: --help.
# Speed is shown, not tested: what is missing here is named, and the rest goes on. `make bench_cpu` builds the trainer first.
root=$(dirname "$0")/../..
"$root/dev/tools/need.sh" libopenblas-dev
make --no-print-directory -s -C "$root" build/bench_matmul || exit 1
python=$("$root/dev/tools/find_python.sh" sys) || exit 1
exec "$python" "$root/dev/bench/bench_cpu.py" --torch-python "$("$root/dev/tools/find_python.sh" torch numpy 2>/dev/null)" "$@"
