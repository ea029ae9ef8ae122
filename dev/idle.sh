#!/bin/bash
# idle.sh [--steps N] [--once] [train_keel's flags]: how much of a training step the GPU waits, and what each kernel takes. Two runs of N + 5 steps (default
# 100) that validate, save and sample nothing: one as it is, whose step time counts, and one in which CUPTI records every kernel, copy and
# fill (dev/cupti_idle.cpp); dev/idle.py compares them and says what its figures mean. The trace stays in build/idle.
# Without flags: -L 1024 -C 256 -t 1024 -b 32.  --once: only the second run, whose step time counts, in half the time.
cd "$(dirname "$0")/.." || exit 1
steps=100 once=
while [[ $1 == --steps || $1 == --once ]]; do
    if [ "$1" = --once ]; then once=1; else steps=$2; shift; fi
    shift
done
[[ $steps =~ ^[1-9][0-9]*$ ]] || { echo "idle: --steps: expected a number of steps, found '$steps'" >&2; exit 1; }
[ $# -gt 0 ] || set -- -L 1024 -C 256 -t 1024 -b 32
if [ "$(dev/cuda.sh trainer)" != train_keel ]; then
    echo "idle needs an NVIDIA GPU, its driver and nvcc" >&2
    exit 1
fi
python=$(dev/find_python.sh csv) || exit 1
make --no-print-directory -s train_keel build/cupti_idle.so || exit 1
folder=build/idle
rm -rf $folder
mkdir -p $folder
run=(./train_keel "$@" -x $((steps + 5)) -v 0 -n 0 -s 0)
echo "command    ${run[*]}"
echo "GPU        $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1), commit $(git describe --always --dirty 2>/dev/null || echo unknown)"
echo "date       $(date -u '+%Y-%m-%d %H:%M') UTC"
log=()
if [ ! "$once" ]; then
    "${run[@]}" -o $folder/run >$folder/run.txt || exit 1
    log=(--log $folder/run/log.csv)
fi
KEEL_TRACE=$folder/trace.csv CUDA_INJECTION64_PATH=$PWD/build/cupti_idle.so "${run[@]}" >$folder/traced.txt || exit 1
grep -hE '^(memory|machine|graphs)' $folder/traced.txt
"$python" dev/idle.py $folder/trace.csv "${log[@]}" --steps "$steps"
