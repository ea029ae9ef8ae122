#!/bin/bash
# compare.sh: CPU against GPU, tensor by tensor. For a few models a debug state is dumped by one trainer and checked by the other, both
# ways, in BF16 and in FP32; prints each --check's table and, at the end, a line for each. Exit 1 if any row of any table is not ok.
# Without a GPU, train_keel.cu's kernels run on the CPU (test/cuda_on_cpu).  --brief leaves out the tables of what is right.
cd "$(dirname "$0")/.." || exit 1
if [ "$(dev/cuda.sh trainer 2>/dev/null)" = train_keel ]; then
    bf16=train_keel fp32=train_keel_fp32
    echo "GPU        $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1)"
else
    bf16=build/train_keel_on_cpu fp32=build/train_keel_fp32_on_cpu
    echo "GPU        none: train_keel.cu's kernels run on the CPU"
fi
make --no-print-directory -j2 train_keel_cpu train_keel_cpu_fp64 $bf16 $fp32 || exit 1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
passed=0 failed=0 summary=

compare() {  # writer, reader, the model's flags...
    local writer=$1 reader=$2 status=ok table worst
    shift 2
    if ! "./$writer" --dump "$folder/dump" -v 0 -i keel_common.h "$@" >"$folder/out" 2>&1; then
        cat "$folder/out"
        status="NOT DUMPED"
    elif ! table=$("./$reader" --check "$folder/dump" 2>&1); then
        status="NOT OK"
    fi
    echo "== $writer --dump, $reader --check: $*"
    [ "$brief" ] && [ "$status" = ok ] || echo "$table"
    # the row whose error is nearest to its tolerance
    worst=$(awk '$NF == "ok" || $NF == "OK" { for (i = 2; i <= NF; i++) if ($i ~ /^[0-9.]+e[-+][0-9]+$/) { e = $i; break }
                 t = $NF == "OK" ? $(NF - 2) : $(NF - 1); if (e / t >= most) { most = e / t; row = $1 ($2 ~ /^[(]/ ? "" : " " $2) " " e " of " t } } END { print row }' <<<"$table")
    summary+=$(printf '%-28s %-28s %-44s %-6s %s' "$writer" "$reader" "$*" "$status" "$worst")$'\n'
    if [ "$status" = ok ]; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
    rm -f "$folder/dump"
}
[ "$1" = --brief ] && brief=1

# BF16 branches beside FP64; FP32 beside FP32, at shapes that only that build takes too
for norm in keel pre post deepnorm mixln hybridnorm scaledpost; do
    compare $bf16 train_keel_cpu_fp64 --norm $norm -L 16 -C 64 -H 2 -t 40 -b 2
    compare train_keel_cpu_fp64 $bf16 --norm $norm -L 16 -C 64 -H 2 -t 40 -b 2
    compare $fp32 train_keel_cpu --norm $norm -L 8 -C 36 -H 3 -t 21 -b 3
    compare train_keel_cpu $fp32 --norm $norm -L 8 -C 36 -H 3 -t 21 -b 3
done
compare train_keel_cpu_fp64 $bf16 -L 64 -C 64 -H 2 -t 32 -b 1
compare $bf16 train_keel_cpu -L 64 -C 64 -H 2 -t 32 -b 1
compare train_keel_cpu $bf16 -L 4 -C 256 -H 2 -t 130 -b 1

echo
printf '%-28s %-28s %-44s %-6s %s\n' "dumped by" "checked by" model "" "nearest to its tolerance"
echo "$summary"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
