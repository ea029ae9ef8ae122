#!/bin/bash
# build.sh PROGRAM...: has make build the tests' programs, as many at a time as there are cores, and says how far it is. Exit 1 if one cannot be built.
cd "$(dirname "$0")/.." || exit 1
. test/jobs.sh
seconds() {  # on a core of 2024
    case $1 in
        *test_gpu*sanitized) echo 150 ;;
        *test_gpu*) echo 60 ;;
        *) echo 20 ;;
    esac
}
failed=()
built() {
    local name=${job_names[$1]}
    if [ "$2" != 0 ]; then
        failed+=("$name")
        cat "$logs/$1"
        echo "$progress $name FAILED to build"
    elif [ -s "$logs/$1" ]; then
        cat "$logs/$1"
        echo "$progress built $name in $3 s, $(time_left)"
    fi
}
for program in "$@"; do job "$(seconds "$program")" "$program" "${MAKE:-make}" --no-print-directory "$program"; done
run_jobs built
[ ${#failed[@]} = 0 ] || { echo "not built: ${failed[*]}"; exit 1; }
