#!/bin/bash
# run.sh: runs every suite, as many at a time as there are cores, and ends with a line that counts the test cases of all of them. Exit 1 if any failed.
# LONG=1, which every suite reads, adds full shapes and repetitions, the programs of other compilers, the CPU trainer's tests under the sanitizers
# and memcheck, and the fuzzers.
cd "$(dirname "$0")/.." || exit 1
. test/jobs.sh
# Suites share the cores: a thread of OpenMP that waits must not spin, or each takes the cores from the other (2 minutes instead of 3 seconds).
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
# Where .ci/run puts Python packages that no suite must have.
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD/build/python"
passed=0 failed=0 skipped=0 failed_suites=()

# Takes the counts from a suite's last summary: doctest's "test cases: N | N passed | N failed", or "N passed, N failed[, N skipped]".
count() {
    local log=$1 status=$2 line
    line=$(sed 's/\x1b\[[0-9;]*m//g' "$log" | grep -E 'test cases:|^[0-9]+ passed, [0-9]+ failed' | tail -1)
    local p f s
    p=$(grep -oE '[0-9]+ passed' <<<"$line" | grep -oE '[0-9]+')
    f=$(grep -oE '[0-9]+ failed' <<<"$line" | grep -oE '[0-9]+')
    s=$(grep -oE '[0-9]+ skipped' <<<"$line" | head -1 | grep -oE '[0-9]+')
    [ "$status" -ne 0 ] && [ "${f:-0}" -eq 0 ] && f=1  # it ended before it could count
    passed=$((passed + ${p:-0})) failed=$((failed + ${f:-0}))
    [[ $line == *"test cases"* ]] || skipped=$((skipped + ${s:-0}))
    [ "${f:-0}" -eq 0 ]
}
ended() {
    local name=${job_names[$1]}
    echo "== $name"
    cat "$logs/$1"
    if count "$logs/$1" "$2"; then
        echo "$progress $name passed in $3 s, $(time_left)"
    else
        failed_suites+=("$name")
        echo "$progress $name FAILED in $3 s, $(time_left)"
    fi
}
# suite SECONDS COMMAND...: seconds on a core of its own, roughly; with LONG=1 the second of two. Named by what is run.
suite() {
    local seconds=$1
    shift
    [ "$LONG" ] && seconds=${seconds#*/}
    job "${seconds%/*}" "$(sed -E 's|^(env )?\S*python\S* \|^env .* ||' <<<"$*")" "$@"
}
skip() {  # how many suites, and why
    echo "SKIPPED: $2"
    skipped=$((skipped + $1))
}

if python=$(dev/tools/find_python.sh torch numpy 2>/dev/null); then
    suite 6 "$python" dev/reference/make_dumps.py --check
    suite 25 "$python" test/test_reference.py
else
    skip 2 "the dumps against PyTorch, and the reference: no Python with torch and numpy (Debian: python3-torch)"
fi
# dev/hf and dev/watch.py, with the packages that .ci/run has put into build/hf before those of build/python.
hf_packages=$PWD/build/hf:$PYTHONPATH
if python=$(PYTHONPATH=$hf_packages dev/tools/find_python.sh torch transformers 2>/dev/null); then
    suite 55/65 env PYTHONPATH="$hf_packages" "$python" test/test_hf.py
    suite 25 env PYTHONPATH="$hf_packages" "$python" test/test_lm_eval.py
    suite 25 env PYTHONPATH="$hf_packages" "$python" test/test_watch.py
else
    skip 3 "exported models, lm-evaluation-harness and dev/watch.py: no Python with torch and transformers (test/hf_packages.txt)"
fi
if any_python=$(dev/tools/find_python.sh json 2>/dev/null); then
    suite 35 "$any_python" test/test_data.py
    suite 35/150 "$(dev/tools/find_python.sh tiktoken tokenizers 2>/dev/null || echo "$any_python")" test/test_tokenizer.py
    suite 60 "$any_python" test/test_bench_gpu.py
    suite 50/200 "$any_python" test/test_card.py
else
    skip 4 "the data scripts, the encoder beside others, the GPU's benchmarks and the rehearsal of dev/card.sh: no Python"
fi
suite 10 dev/tools/format.sh --check
suite 25 test/test_build.sh
suite 60 build/test_run
suite 5/15 build/test_faults
suite 10 build/test_folder
suite 60/220 build/crash_test
suite 45 env LONG= build/test_device_faults  # LONG=1 fails thousands of calls, in half an hour
suite 4/90 build/test_tokenizer
suite 5 build/test_cpu_fp32
suite 8 build/test_cpu_fp64
suite 65/130 build/test_gpu_bf16_on_cpu
suite 60/130 build/test_gpu_fp32_on_cpu
suite 2 build/test_cuda_on_cpu
suite 5 build/test_wgmma
if [ "$(dev/tools/mpi.sh compile)" ] && command -v mpirun >/dev/null; then
    suite 60/80 build/test_ranks
    suite 15 test/test_cluster.sh
    # shellcheck disable=SC2046
    suite 5 env CUDA_ON_CPU_NCCL_TIMEOUT=5 $(dev/tools/mpi.sh mpirun 3) build/test_nccl  # a rank that does not come is given up soon
else
    skip 3 "several ranks: no MPI (Debian: libopenmpi-dev, openmpi-bin)"
fi
if python=$(dev/tools/find_python.sh torch numpy matplotlib plotly 2>/dev/null || dev/tools/find_python.sh numpy matplotlib 2>/dev/null); then
    suite 45 "$python" test/test_lesson.py
else
    skip 1 "the experiments and the lesson: no Python with numpy and matplotlib (Debian: python3-matplotlib)"
fi
[ "$any_python" ] && suite 70 "$(dev/tools/find_python.sh playwright 2>/dev/null || echo "$any_python")" test/test_page.py
if [ "$LONG" ]; then
    suite 600 env LONG= build/test_gpu_bf16_sanitized  # at the leaner shapes
    if dev/tools/cuda.sh nvcc >/dev/null 2>&1; then
        suite 200 dev/tools/ptxas.sh --test
    else
        skip 1 "train_keel.cu under nvcc for sm_80, sm_90a and sm_100: no nvcc (the CUDA Toolkit)"
    fi
    if dev/tools/need.sh clang-14 libclang-rt-14-dev libomp-14-dev valgrind >/dev/null 2>&1; then
        suite 200 test/sanitize.sh
        suite 120 test/fuzz/run.sh "${FUZZ_SECONDS:-60}"
    else
        skip 2 "the sanitizers and the fuzzers: no clang 14 or valgrind"
    fi
    if dev/tools/need.sh g++-multilib >/dev/null 2>&1; then
        suite 20 test/test_32bit.sh
    else
        skip 1 "a 32-bit build beside a 64-bit one: no g++-multilib"
    fi
    if dev/tools/need.sh clang-14 libstdc++-12-dev-arm64-cross binutils-aarch64-linux-gnu qemu-user-static >/dev/null 2>&1; then
        suite 110 test/test_arm64.sh
    else
        skip 1 "the CPU trainer for ARM, under qemu: no libstdc++-12-dev-arm64-cross or qemu-user-static"
    fi
fi
run_jobs ended

# On a GPU nothing may run beside the tests of its memory.
if [ "$(dev/tools/cuda.sh trainer 2>/dev/null)" = train_keel ] && test/build.sh build/test_gpu_bf16 build/test_gpu_fp32; then
    for build in bf16 fp32; do
        echo "== build/test_gpu_$build"
        "build/test_gpu_$build" 2>&1 | tee "$logs/card"
        count "$logs/card" "${PIPESTATUS[0]}" || failed_suites+=("build/test_gpu_$build")
    done
else
    skip 2 "the kernels on a GPU, BF16 and FP32: no GPU that train_keel can use (they ran on the CPU)"
fi

[ ${#failed_suites[@]} -gt 0 ] && printf 'FAILED: %s\n' "${failed_suites[@]}"
[ $skipped -gt 0 ] && tail=", $skipped skipped"
echo "$passed passed, $failed failed$tail"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
