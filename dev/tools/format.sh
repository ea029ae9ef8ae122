#!/bin/bash
# format.sh [--check]: formats all C++ and CUDA that git tracks, by the version of clang-format that .clang-format's first
# line names: the one on PATH, or else the one that pip puts into build/python. --check changes nothing: it names the
# files that are not formatted and ends with "N passed, N failed", files; exit 1 if any failed.
cd "$(dirname "$0")/../.." || exit 1
version=$(sed -n '1s/^# clang-format \([0-9.]*[0-9]\).*/\1/p' .clang-format)

# cannot WHY: a check is skipped, formatting fails
cannot() {
    [ "$check" ] || { echo "format: $1" >&2; exit 1; }
    printf 'SKIPPED: the format of the sources: %s\n0 passed, 0 failed, 1 skipped\n' "$1"
    exit 0
}
is_that_version() { "$formatter" --version 2>/dev/null | grep -qE "version ${version//./\\.}( |$)"; }
find_formatter() {
    local python
    for formatter in clang-format build/python/clang_format/data/bin/clang-format; do is_that_version && return; done
    python=$(dev/tools/find_python.sh pip 2>/dev/null) || return 1
    # No second try: a machine without a network must not wait long.
    PIP_ROOT_USER_ACTION=ignore "$python" -m pip install --quiet --retries 0 --timeout 10 --target build/python "clang-format==$version" >&2
    is_that_version
}

case $* in
    --check) check=1 ;;
    "") check= ;;
    *) sed -n '2,4p' "$0" >&2; exit 2 ;;
esac
mapfile -t files < <(git ls-files '*.h' '*.cpp' '*.cu' 2>/dev/null)
[ ${#files[@]} -gt 0 ] || cannot "no git, or no clone, that would name the files"
find_formatter || cannot "no clang-format $version, and pip could not install it"
[ "$check" ] || exec "$formatter" -i "${files[@]}"

said=$("$formatter" --dry-run -Werror "${files[@]}" 2>&1)
status=$?
mapfile -t bad < <(sed -n 's/^\([^:]*\):[0-9]*:[0-9]*: error.*/\1/p' <<<"$said" | sort -u)
[ $status -eq 0 ] || [ ${#bad[@]} -gt 0 ] || { echo "$said" >&2; exit 1; }
for file in "${bad[@]}"; do echo "FAILED: $file is not formatted: make format"; done
echo "$((${#files[@]} - ${#bad[@]})) passed, ${#bad[@]} failed"
[ ${#bad[@]} -eq 0 ]
