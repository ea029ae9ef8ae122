#!/bin/bash
# gpu_check.sh: all that a machine with an NVIDIA GPU can show of train_keel, in under 8 minutes, ending with a table of what passed.
#     builds, the tests of every kernel in BF16 and FP32, CPU against GPU, matrix products done in other ways,
#     compute-sanitizer's four tools on a small run, the default 1024-layer model for 20 steps, 300 steps on text beside the CPU's, and how long the GPU waits in a step.
# The tests need doctest; where it is not installed, name the folder that has doctest/doctest.h: CPATH=folder dev/gpu_check.sh
# TEXT: what to train on (default: the trainer's own sources).  Logs stay in build/gpu_check.
cd "$(dirname "$0")/.." || exit 1
if [ "$(dev/cuda.sh trainer)" != train_keel ]; then
    echo "gpu_check needs an NVIDIA GPU, its driver and nvcc; without them, make test runs the kernels on the CPU" >&2
    exit 1
fi
logs=build/gpu_check
mkdir -p $logs
passed=0 failed=0 table=
text=()
[ "$TEXT" ] && text=(-i "$TEXT")

# row NAME LOG COMMAND...: runs it, keeps what it printed, adds a row to the table with the last line, or a line that $shows finds.
row() {
    local name=$1 log=$logs/$2 start=$SECONDS status=ok note
    shift 2
    echo "== $name: $*"
    timeout "${limit:-240}" "$@" >"$log" 2>&1 || status="NOT OK ($?)"
    note=$(sed 's/\x1b\[[0-9;]*m//g' "$log" | grep -E "${shows:-.}" | tail -1 | cut -c1-110)
    [ "$status" = ok ] || tail -25 "$log"
    table+=$(printf '%-34s %-12s %4d s  %s' "$name" "$status" $((SECONDS - start)) "$note")$'\n'
    if [ "$status" = ok ]; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
}

echo "date       $(date -u '+%Y-%m-%d %H:%M UTC')"
echo "GPU        $(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | head -1)"
echo "toolkit    $("$(dev/cuda.sh nvcc)" --version | grep release)"
echo "commit     $(git rev-parse --short HEAD 2>/dev/null || echo unknown)$(git diff --quiet HEAD 2>/dev/null || echo ' with changes')"
echo "command    dev/gpu_check.sh"

row "build" build.log make --no-print-directory -j"$(nproc)" train_keel train_keel_fp32 train_keel_cpu train_keel_cpu_fp64 build/test_gpu_bf16 build/test_gpu_fp32 build/bench_products
shows='test cases:' row "tests, BF16" test_bf16.log build/test_gpu_bf16
shows='test cases:' row "tests, FP32" test_fp32.log build/test_gpu_fp32
shows='passed,' row "CPU against GPU" compare.log dev/compare.sh
# Which of the other ways of doing a product this cuBLASLt offers, and that their numbers are right.
row "ways of doing matrix products" products.log build/bench_products --small

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
small=(-L 4 -C 64 -H 2 -t 72 -b 2 -d 288 -x 3 -s 2 -g 4 -v 0 "${text[@]}")
if [ "$sanitizer" ]; then
    for tool in memcheck racecheck initcheck synccheck; do
        for build in train_keel train_keel_fp32; do
            shows='SUMMARY' row "compute-sanitizer $tool, $build" $tool-$build.log "$sanitizer" --tool $tool --error-exitcode 9 ./$build "${small[@]}"
        done
    done
else
    table+=$(printf '%-34s %-12s' "compute-sanitizer" "not found")$'\n'
fi

shows='^step 20/' row "train_keel -L 1024, 20 steps" l1024.log ./train_keel -L 1024 -x 20 -s 0 "${text[@]}"
echo "first lines and memory table of train_keel -L 1024:"
head -60 $logs/l1024.log

# The same 300 steps on the CPU and on the GPU; the means of the last 30 losses must agree to 2 %.
curve=(-L 16 -C 64 -H 2 -t 64 -b 16 -x 300 -s 0 -n 0 "${text[@]}")
rm -rf $logs/curve_* $logs/tune.csv
for trainer in train_keel_cpu train_keel train_keel_fp32; do
    row "300 steps, $trainer" curve-$trainer.log ./$trainer "${curve[@]}" -o $logs/curve_$trainer
done
end() { tail -30 $logs/curve_"$1"/log.csv | awk -F, '{ sum += $2 } END { printf "%.4f", sum / NR }'; }
same_curve() {
    local cpu gpu
    cpu=$(end train_keel_cpu) gpu=$(end "$1")
    echo "mean of the last 30 losses: CPU $cpu, $1 $gpu"
    awk -v a="$cpu" -v b="$gpu" 'BEGIN { d = a - b; if (d < 0) d = -d; exit !(a > 0 && d <= 0.02 * a) }'
}
export -f same_curve end
export logs
row "curve beside the CPU's, BF16" same_bf16.log bash -c 'same_curve train_keel'
row "300 steps, BF16 states, --tune" curve-states.log ./train_keel "${curve[@]}" --moments bf16 --grads bf16 --tune $logs/tune.csv -o $logs/curve_states
row "curve beside the CPU's, BF16 states" same_states.log bash -c 'same_curve states'
row "curve beside the CPU's, FP32" same_fp32.log bash -c 'same_curve train_keel_fp32'

# What the default of dev/idle.sh takes 100 steps for; 20 are enough to see a wait.
shows='^idle  ' row "idle time, 20 steps" idle.log dev/idle.sh --steps 20
grep -E 'step boundary|waits for the host|^step ' $logs/idle.log

if ./train_keel -h | head -1 | grep -q NCCL; then
    TURNS=2 shows='^one rank of NCCL, -z 2' row "one rank through NCCL, overhead" overhead.log dev/ranks_overhead.sh
    cat $logs/overhead.log
else
    table+=$(printf '%-34s %-12s' "one rank through NCCL" "not built with it")$'\n'
fi

echo
echo "$table"
echo "in all $SECONDS s"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
