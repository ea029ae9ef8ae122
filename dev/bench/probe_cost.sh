#!/bin/bash
# What --probe 10 costs: medians of the milliseconds of probed steps and of the others, from one run's log.csv.
#     dev/bench/probe_cost.sh [TRAINER [FLAGS...]]       ./train_keel_cpu -L 64 -x 100 by default
cd "$(dirname "$0")/../.." || exit 1
trainer=${1:-./train_keel_cpu}
shift
[ $# -gt 0 ] || set -- -L 64 -x 100
[ -x "$trainer" ] || { echo "expected a trainer, found none at $trainer; build it by make ${trainer##*/}" >&2; exit 1; }
out=$(mktemp -d) && trap 'rm -rf "$out"' EXIT
"$trainer" -v 0 -n 0 -s 0 --probe 10 -o "$out/run" "$@" >"$out/log" || { tail -3 "$out/log"; exit 1; }
grep -E '^(model|training|machine)' "$out/log"
# The first step also touches all memory for the first time.
awk -F, 'NR > 2 { print ($1 % 10 == 0 ? "probed" : "plain"), $6 }' "$out/run/log.csv" | sort -k1,1 -k2,2n | awk '
    { n[$1]++; ms[$1, n[$1]] = $2 }
    END {
        for (kind in n) median[kind] = (ms[kind, int((n[kind] + 1) / 2)] + ms[kind, int(n[kind] / 2) + 1]) / 2
        more = median["probed"] - median["plain"]
        printf "plain %.1f ms, probed %.1f ms (%d and %d steps): --probe 10 costs %.1f %% of a step\n", median["plain"], median["probed"], n["plain"], n["probed"], 100 * more / 10 / median["plain"]
    }'
