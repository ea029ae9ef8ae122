#!/bin/bash
# deep_run.sh [MINUTES]: the paper's deepest model at its width, 1024 sub-layers and 1024 channels (6.4 billion parameters), on the GPU that is here and on real
# text. First keel and pre for 40 steps each at peak learning rates 3e-3 and 4.5e-3, where the paper saw Pre-LN become unstable; then keel for what is
# left of MINUTES (default 25). No checkpoint is written: one of this size takes 104 GB of disk. Loss curves are added to dev/results/deep_run.csv.
# TEXT: what to train on (default: the sources of the Python packages that are installed).  MODEL, STEPS, TRAINER: another model, number of steps, program.
cd "$(dirname "$0")/../.." || exit 1
minutes=${1:-25}
[[ $minutes =~ ^[1-9][0-9]*$ ]] || { echo "deep_run: expected minutes, found '$minutes'" >&2; exit 1; }
if [ -z "$TRAINER" ]; then
    [ "$(dev/tools/cuda.sh trainer)" = train_keel ] || { echo "deep_run needs an NVIDIA GPU, its driver and nvcc" >&2; exit 1; }
    make --no-print-directory -s train_keel || exit 1
fi
trainer=${TRAINER:-./train_keel} steps=${STEPS:-40}
read -ra model <<<"${MODEL:--L 1024 -C 1024 -t 1024 -d 16384}"
text=$TEXT
if [ -z "$text" ]; then
    folder=$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])') || exit 1
    text=build/deep_run.txt
    mkdir -p build
    find "$folder" -name '*.py' -size +1k | sort | xargs -d '\n' cat >$text
fi
[ "$(find "$text" -size +256k 2>/dev/null)" ] || { echo "deep_run: expected 256 KiB of text or more, found less in $text; name a file in TEXT" >&2; exit 1; }
results=${RESULTS:-dev/results/deep_run.csv} commit=$(git describe --always --dirty 2>/dev/null || echo unknown)
gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -1 | tr -d ,)
[ -e "$results" ] || echo "norm,peak_lr,step,loss,lr,grad_norm,ms,tokens_per_second,mfu,date,gpu,commit,command" >"$results"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
end=$((SECONDS + minutes * 60))

# one NORM LR STEPS WARMUP: a run until its steps or the time are over, its curve and its last lines
one() {
    local left=$((end - SECONDS)) run=("$trainer" -i "$text" "${model[@]}" --norm "$1" -l "$2" -x "$3" -u "$4" -s 0 -n 0 -v 0)
    [ $left -gt 20 ] || { echo "no time is left for $1 at $2"; return; }
    echo "== ${run[*]}"
    timeout -s TERM -k 60 $left "${run[@]}" -o "$work/$1-$2-$3" >"$work/out" 2>"$work/err"
    local status=$?
    grep -E '^(memory|machine|graphs|start-up)' "$work/out"
    grep -E '^step' "$work/out" | tail -2
    cat "$work/err"
    [ $status = 0 ] || [ $status = 124 ] || echo "ended with status $status"
    [ -e "$work/$1-$2-$3/log.csv" ] && tail -n +2 "$work/$1-$2-$3/log.csv" |
        awk -F, -v OFS=, -v norm="$1" -v lr="$2" -v rest="$(date -u +%F),$gpu,$commit,${run[*]//,/;}" '{ print norm, lr, $1, $2, $4, $5, $6, $7, $8, rest }' >>"$results"
}
for lr in 3e-3 4.5e-3; do
    for norm in keel pre; do one $norm $lr "$steps" $((steps / 4)); done
done
one keel 4.5e-3 "${LONG_STEPS:-100000}" "${LONG_WARMUP:-200}"
