#!/bin/bash
# The CPU trainer's tests under the sanitizers, and a run with checkpoints, a signal and a resume under valgrind's memcheck. Ends with
# "N passed, N failed".
cd "$(dirname "$0")/.." || exit 1
export KEEL_TEST_SMALL=1 OMP_NUM_THREADS=2
. test/check.sh
echo "leak:libomp.so" >"$folder/leaks"  # what the runtime keeps to its end
export LSAN_OPTIONS="suppressions=$folder/leaks:print_suppressions=0"
for suite in test_cpu test_faults test_tokenizer; do
    [ $suite != test_tokenizer ] || export LONG=  # at the leaner sizes
    check "ASan and UBSan, $suite" build/${suite}_asan
    # archer tells TSan of OpenMP's barriers; it cannot see into the runtime itself, which was built without it.
    OMP_TOOL_LIBRARIES=$(ls /usr/lib/llvm-14/lib/libarcher.so /usr/lib/*/libarcher.so 2>/dev/null | head -1) \
        TSAN_OPTIONS="ignore_noninstrumented_modules=1" check "TSan, $suite" build/${suite}_tsan
done
memcheck() {
    GOMP_SPINCOUNT=1 valgrind --quiet --error-exitcode=9 --leak-check=full --errors-for-leak-kinds=definite build/train_keel_cpu_valgrind -i keel_common.h \
        -L 4 -C 8 -H 2 -t 8 -b 2 -n 2 -v 4 -s 4 -g 4 --keep 2 -y -o "$folder/run" "$@"
}
check "memcheck, a run" memcheck -x 6
check "memcheck, its resume" memcheck -x 8
