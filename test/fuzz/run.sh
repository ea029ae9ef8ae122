#!/bin/bash
# run.sh [SECONDS]: runs each fuzz target for so long, two at a time, and ends with a table and "N passed, N failed". What a target finds
# stays in build/fuzz_findings; it becomes a test case.
cd "$(dirname "$0")/../.." || exit 1
seconds=${1:-60}
targets=(model state debug tokenizer data log command_line)
mkdir -p build/fuzz_findings
export ASAN_OPTIONS=malloc_context_size=0:quarantine_size_mb=8  # half as fast again; to see where a block came from, run the target on its finding
one() {
    corpus=$(mktemp -d)
    build/fuzz_"$1" -max_total_time="$2" -max_len=600 -timeout=5 -rss_limit_mb=2048 -print_final_stats=1 -verbosity=1 -artifact_prefix=build/fuzz_findings/"$1"_ "$corpus" >build/fuzz_"$1".log 2>&1
    echo $? >build/fuzz_"$1".status
    rm -rf "$corpus"
}
export -f one
printf '%s\n' "${targets[@]}" | xargs -P 2 -I{} bash -c "one {} $seconds"
passed=0 failed=0 all=0
printf '%-14s %12s %10s  %s\n' target executions per_second findings
for target in "${targets[@]}"; do
    n=$(sed -n 's/^stat::number_of_executed_units: *//p' build/fuzz_"$target".log)
    rate=$(sed -n 's/^stat::average_exec_per_sec: *//p' build/fuzz_"$target".log)
    found=0
    if [ "$(cat build/fuzz_"$target".status)" = 0 ] && [ "${n:-0}" -gt 0 ]; then
        passed=$((passed + 1))
    else
        found=1 failed=$((failed + 1))
        grep -E 'ERROR|SUMMARY|runtime error' build/fuzz_"$target".log | head -3
    fi
    all=$((all + ${n:-0}))
    printf '%-14s %12s %10s  %s\n' "$target" "${n:-?}" "${rate:-?}" "$found"
done
echo "$all executions in all"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
