#!/bin/bash
# idle.sh [--steps N] [--once] [--csv FILE] [train_keel's flags]: how much of a training step the GPU waits, and what
# each kernel takes, from a run of N + 5 steps (default 100) that validates, saves and samples nothing, in which CUPTI
# records every kernel, copy and fill (dev/bench/cupti_idle.cpp). dev/bench/idle.py says what its figures mean. The trace stays in
# build/idle. Without flags: -L 1024 -C 256 -t 1024 -b 32.
# Before it comes the same run without recording, beside which recording's cost is printed; --once leaves that out.
# TRAINER and CUPTI_IDLE name a train_keel and a cupti_idle.so that are there; else make builds them.
cd "$(dirname "$0")/../.." || exit 1
steps=100 once= csv=() flags=()
while [ $# -gt 0 ]; do
    case $1 in
        --steps) steps=$2; shift ;;
        --csv) csv=(--csv "$2"); shift ;;
        --once) once=1 ;;
        *) flags+=("$1") ;;
    esac
    shift
done
[[ $steps =~ ^[1-9][0-9]*$ ]] || { echo "idle: --steps: expected a number of steps, found '$steps'" >&2; exit 1; }
[ ${#flags[@]} -gt 0 ] || flags=(-L 1024 -C 256 -t 1024 -b 32)
if [ ! "$TRAINER" ] && [ "$(dev/tools/cuda.sh trainer)" != train_keel ]; then
    echo "idle needs an NVIDIA GPU, its driver and nvcc" >&2
    exit 1
fi
python=$(dev/tools/find_python.sh csv) || exit 1
[ "$TRAINER" ] || make --no-print-directory -s train_keel || exit 1
[ "$CUPTI_IDLE" ] || make --no-print-directory -s build/cupti_idle.so || exit 1
folder=build/idle
rm -rf $folder
mkdir -p $folder
run=("${TRAINER:-./train_keel}" "${flags[@]}" -x $((steps + 5)) -v 0 -n 0 -s 0)
echo "command    ${run[*]}"
echo "date       $(date -u '+%Y-%m-%d %H:%M') UTC"
log=()
if [ ! "$once" ]; then
    "${run[@]}" -o $folder/run >$folder/run.txt || exit 1
    log=(--log $folder/run/log.csv)
fi
library=$(realpath "${CUPTI_IDLE:-build/cupti_idle.so}")
KEEL_TRACE=$folder/trace.csv CUDA_INJECTION64_PATH=$library "${run[@]}" >$folder/traced.txt || exit 1
grep -hE '^(model|memory|machine|graphs)' $folder/traced.txt
model=$(sed -nE 's/^model .* L ([0-9]+) sub-layers, C ([0-9]+),.*/L\1_C\2/p' $folder/traced.txt)
"$python" dev/bench/idle.py $folder/trace.csv "${log[@]}" --steps "$steps" --model "$model" "${csv[@]}"
