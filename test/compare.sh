#!/bin/bash
# compare.sh: CPU against GPU, tensor by tensor. For a few models a debug state is dumped by one trainer and checked by
# the other, both ways, in BF16 and in FP32; prints each --check's table and, at the end, a line for each. Exit 1 if any
# row of any table is not ok. Without a GPU, train_keel.cu's kernels run on the CPU (test/cuda_on_cpu).
#   --brief            leaves out the tables of what is right
#   --programs FOLDER  takes the four trainers that are there under their names; without, make builds them
#   --jobs N           comparisons at a time [1]
#   --norms 'A B ...'  these placements alone [all]
cd "$(dirname "$0")/.." || exit 1
brief='' programs='' jobs=1
norms=$(sed -n 's/.*norm placement: \(.*\) \[keel\]$/\1/p' README.md | tr -d ,)  # as -h lists them
while [ $# -gt 0 ]; do
    case $1 in
        --brief) brief=1 ;;
        --programs) programs=$2 && shift ;;
        --jobs) jobs=$2 && shift ;;
        --norms) norms=$2 && shift ;;
        *) sed -n '2,8p' "$0" >&2; exit 2 ;;
    esac
    shift
done
declare -A path
for name in train_keel train_keel_fp32 train_keel_cpu train_keel_cpu_fp64; do path[$name]=${programs:-.}/$name; done
if [ ! "$programs" ]; then
    if [ "$(dev/tools/cuda.sh trainer 2>/dev/null)" = train_keel ]; then
        echo "GPU        $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1)"
    else
        path[train_keel]=build/train_keel_on_cpu path[train_keel_fp32]=build/train_keel_fp32_on_cpu
        echo "GPU        none: train_keel.cu's kernels run on the CPU"
    fi
    make --no-print-directory -j2 "${path[@]#./}" || exit 1
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
count=0

# compare WRITER READER FLAGS...: leaves its table in $folder/N and its line of the summary in $folder/N.line
compare() {
    local writer=$1 reader=$2 at=$folder/$((++count))
    shift 2
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done
    {
        local status=ok table='' worst
        if ! "${path[$writer]}" --dump "$at.dump" -i keel_common.h "$@" >"$at.out" 2>&1; then
            table=$(cat "$at.out") status="NOT DUMPED"
        elif ! table=$("${path[$reader]}" --check "$at.dump" 2>&1); then
            status="NOT OK"
        fi
        rm -f "$at.dump"
        {
            echo "== $writer --dump, $reader --check: $*"
            [ "$brief" ] && [ "$status" = ok ] || echo "$table"
        } >"$at"
        # the row whose error is nearest to its tolerance
        worst=$(awk '$NF == "ok" || $NF == "OK" {
                         for (i = 2; i <= NF; i++) if ($i ~ /^[0-9.]+e[-+][0-9]+$/) { e = $i; break }
                         t = $NF == "OK" ? $(NF - 2) : $(NF - 1)
                         if (e / t >= most) { most = e / t; row = $1 ($2 ~ /^[(]/ ? "" : " " $2) " " e " of " t }
                     } END { print row }' <<<"$table")
        printf '%-20s %-20s %-44s %-10s %s\n' "$writer" "$reader" "$*" "$status" "$worst" >"$at.line"
    } &
}

# BF16 branches beside FP64; FP32 beside FP32, at shapes that only that build takes too
for norm in $norms; do
    compare train_keel train_keel_cpu_fp64 --norm "$norm" -L 16 -C 64 -H 2 -t 40 -b 2
    compare train_keel_cpu_fp64 train_keel --norm "$norm" -L 16 -C 64 -H 2 -t 40 -b 2
    compare train_keel_fp32 train_keel_cpu --norm "$norm" -L 8 -C 36 -H 3 -t 21 -b 3
    compare train_keel_cpu train_keel_fp32 --norm "$norm" -L 8 -C 36 -H 3 -t 21 -b 3
done
compare train_keel_cpu_fp64 train_keel -L 64 -C 64 -H 2 -t 32 -b 1
compare train_keel train_keel_cpu -L 64 -C 64 -H 2 -t 32 -b 1
compare train_keel_cpu train_keel -L 4 -C 256 -H 2 -t 130 -b 1
for KEEL_WGMMA in 0 1; do  # what a Hopper has kernels of its own for, and as on every GPU
    export KEEL_WGMMA
    compare train_keel train_keel_cpu_fp64 -L 4 -C 128 -H 2 -t 300 -b 2
    compare train_keel_cpu train_keel -L 4 -C 128 -H 1 -t 200 -b 2 --norm hybridnorm
done
wait

for ((i = 1; i <= count; i++)); do cat "$folder/$i"; done
printf '\n%-20s %-20s %-44s %-10s %s\n' "dumped by" "checked by" model "" "nearest to its tolerance"
for ((i = 1; i <= count; i++)); do cat "$folder/$i.line"; done | tee "$folder/lines"
passed=$(grep -c ' ok  ' "$folder/lines")
echo
echo "$passed passed, $((count - passed)) failed"
[ "$passed" -eq "$count" ]
