#!/bin/bash
# ranks_overhead.sh [TRAINER [its flags]]: what a communicator costs a run that has nobody to talk to: steps alone beside steps through NCCL with one rank, at -z 0 and 2,
# five turns each, and the medians of tokens/s of the steps after the third. On a GPU; default ./train_keel -L 256.
cd "$(dirname "$0")/../.." || exit 1
trainer=${1:-./train_keel}
shift
flags=("$@")
[ $# -eq 0 ] && flags=(-L 256)
by=$("$trainer" -h | sed -n '1s/.*one rank or many, by \([A-Z]*\).*/\1/p')
if [ -z "$by" ]; then
    echo "ranks_overhead.sh: expected a build with ranks, found $("$trainer" -h | head -1)" >&2
    exit 1
fi
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
steps() { sed -n 's/^step \([0-9]*\)\/.* | \([0-9]*\) tokens\/s.*/\1 \2/p' "$1" | awk '$1 > 3 { print $2 }'; }
for ((turn = 0; turn < ${TURNS:-5}; turn++)); do
    "$trainer" "${flags[@]}" -x "${STEPS:-20}" -v 0 -s 0 -n 0 >"$logs/run" || exit 1
    steps "$logs/run" >>"$logs/alone"
    for zero in 0 2; do
        RANK=0 WORLD_SIZE=1 "$trainer" "${flags[@]}" -x "${STEPS:-20}" -v 0 -s 0 -n 0 -z $zero >"$logs/run" || exit 1
        steps "$logs/run" >>"$logs/$zero"
    done
done
median() { sort -n "$1" | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'; }
alone=$(median "$logs/alone")
printf '%-28s %12s %10s\n' "$(grep -h '^machine' "$logs/run" | sed 's/machine *//; s/,.*//')" "tokens/s" "less"
printf '%-28s %12s\n' "alone" "$alone"
for zero in 0 2; do
    one=$(median "$logs/$zero")
    awk -v name="one rank of $by, -z $zero" -v alone="$alone" -v one="$one" 'BEGIN { printf "%-28s %12d %9.1f%%\n", name, one, 100 * (1 - one / alone) }'
done
