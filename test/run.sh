#!/bin/bash
# Runs every suite and ends with a line that counts the test cases of all of them. Exit 1 if any failed. LONG=1 adds the CPU trainer's tests under
# the sanitizers and memcheck, and the fuzzers.
cd "$(dirname "$0")/.." || exit 1
# Two suites share the cores: a thread of OpenMP that waits must not spin, or each takes the cores from the other (2 minutes instead of 3 seconds).
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
passed=0 failed=0 skipped=0
logs=$(mktemp -d) log=$logs/log
trap 'rm -rf "$logs"' EXIT

# Takes the counts from a suite's last summary: doctest's "test cases: N | N passed | N failed", or "N passed, N failed[, N skipped]".
count() {
    local status=$1 line
    line=$(sed 's/\x1b\[[0-9;]*m//g' "$log" | grep -E 'test cases:|^[0-9]+ passed, [0-9]+ failed' | tail -1)
    local p f s
    p=$(grep -oE '[0-9]+ passed' <<<"$line" | grep -oE '[0-9]+')
    f=$(grep -oE '[0-9]+ failed' <<<"$line" | grep -oE '[0-9]+')
    s=$(grep -oE '[0-9]+ skipped' <<<"$line" | head -1 | grep -oE '[0-9]+')
    [ "$status" -ne 0 ] && [ "${f:-0}" -eq 0 ] && f=1  # it ended before it could count
    passed=$((passed + ${p:-0})) failed=$((failed + ${f:-0}))
    [[ $line == *"test cases"* ]] || skipped=$((skipped + ${s:-0}))
}
suite() {
    local start=$SECONDS
    echo "== $*"
    "$@" 2>&1 | tee "$log"
    count "${PIPESTATUS[0]}"
    echo "   $((SECONDS - start)) s"
}

if python=$(dev/tools/find_python.sh torch numpy 2>/dev/null); then
    suite "$python" dev/reference/make_dumps.py --check
    suite "$python" test/test_reference.py
else
    echo "SKIPPED: the dumps against PyTorch, and the reference: no Python with torch and numpy (Debian: python3-torch)"
    skipped=$((skipped + 2))
fi
if any_python=$(dev/tools/find_python.sh json 2>/dev/null); then
    suite "$any_python" test/test_data.py
else
    echo "SKIPPED: the data scripts, the GPU's benchmarks and the rehearsal of dev/card.sh: no Python"
    skipped=$((skipped + 3))
fi
# Suites that use little more than one core run beside the others, and are told and counted after them.
beside=(build/test_gpu_bf16_sanitized build/test_gpu_fp32_on_cpu build/test_cuda_on_cpu)
[ "$any_python" ] && beside+=("$any_python test/test_bench_gpu.py" "$any_python test/test_card.py")
if dev/tools/cuda.sh nvcc >/dev/null 2>&1; then
    beside+=("dev/tools/ptxas.sh --test")
else
    echo "SKIPPED: train_keel.cu under nvcc for sm_80, sm_90 and sm_100: no nvcc (the CUDA Toolkit)"
    skipped=$((skipped + 1))
fi
for i in "${!beside[@]}"; do
    start=$SECONDS
    ${beside[i]} >"$logs/$i" 2>&1
    echo $? $((SECONDS - start)) >"$logs/$i.status"
done &

suite dev/tools/format.sh --check
suite test/test_build.sh
suite build/test_run
suite build/test_faults
suite build/crash_test
suite build/test_cpu_fp32
suite build/test_cpu_fp64
suite build/test_gpu_bf16_on_cpu
if [ "$(dev/tools/mpi.sh compile)" ] && command -v mpirun >/dev/null; then
    suite build/test_ranks
    suite test/test_cluster.sh
    # shellcheck disable=SC2046
    suite env CUDA_ON_CPU_NCCL_TIMEOUT=5 $(dev/tools/mpi.sh mpirun 3) build/test_nccl  # a rank that does not come is given up soon
else
    echo "SKIPPED: several ranks: no MPI (Debian: libopenmpi-dev, openmpi-bin)"
    skipped=$((skipped + 3))
fi
if python=$(dev/tools/find_python.sh torch numpy matplotlib plotly 2>/dev/null || dev/tools/find_python.sh numpy matplotlib 2>/dev/null); then
    suite "$python" test/test_lesson.py
else
    echo "SKIPPED: the experiments and the lesson: no Python with numpy and matplotlib (Debian: python3-matplotlib)"
    skipped=$((skipped + 1))
fi

wait
for i in "${!beside[@]}"; do
    echo "== ${beside[i]}"
    cat "$logs/$i"
    read -r status took <"$logs/$i.status"
    cp "$logs/$i" "$log"
    count "$status"
    echo "   $took s"
done

if [ "$LONG" ]; then
    if dev/tools/need.sh clang-14 libclang-rt-14-dev libomp-14-dev valgrind >/dev/null 2>&1; then
        suite test/sanitize.sh
        suite test/fuzz/run.sh "${FUZZ_SECONDS:-60}"
    else
        echo "SKIPPED: the sanitizers and the fuzzers: no clang 14 or valgrind"
        skipped=$((skipped + 2))
    fi
fi
if [ "$(dev/tools/cuda.sh trainer 2>/dev/null)" = train_keel ] && make --no-print-directory -j2 build/test_gpu_bf16 build/test_gpu_fp32; then
    suite build/test_gpu_bf16
    suite build/test_gpu_fp32
else
    echo "SKIPPED: the kernels on a GPU, BF16 and FP32: no GPU that train_keel can use (they ran on the CPU)"
    skipped=$((skipped + 2))
fi

[ $skipped -gt 0 ] && tail=", $skipped skipped"
echo "$passed passed, $failed failed$tail"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
