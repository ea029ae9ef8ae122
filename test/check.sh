# check.sh: for suites that run programs, which source it: check WHAT COMMAND... runs one and counts, $folder is theirs, and the end prints "N passed, N
# failed" and is 1 where one has failed.
passed=0 failed=0
folder=$(mktemp -d)
finish() {
    rm -rf "$folder"
    echo "$passed passed, $failed failed"
    [ "$failed" -eq 0 ] || exit 1
}
trap finish EXIT
check() {
    local what=$1 start=$SECONDS
    shift
    if "$@" >"$folder/log" 2>&1; then
        passed=$((passed + 1))
        printf '%-44s right%s (%d s)\n' "$what" "$(grep -oE '[0-9]+ passed' "$folder/log" | head -1 | sed 's/^/, test cases: /')" $((SECONDS - start))
    else
        failed=$((failed + 1))
        printf '%-44s FAILED\n' "$what"
        grep -vE '^(step|checkpoint) ' "$folder/log" | tail -60
    fi
}
