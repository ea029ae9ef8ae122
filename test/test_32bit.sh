#!/bin/bash
# The CPU trainer with addresses of 32 bits: its tests under UBSan; then runs of several placements beside a 64-bit build of the same vectors. The files
# of both are the same byte for byte, and each goes on from and samples from the other's. Ends with "N passed, N failed".
cd "$(dirname "$0")/.." || exit 1
export KEEL_TEST_SMALL=1 OMP_NUM_THREADS=2 LONG=
. test/check.sh
# run BITS FOLDER STEPS FLAGS...; -m asks for 2^32 sequences, of which there are fewer
run() {
    local bits=$1 out=$2 steps=$3
    shift 3
    "build/train_keel_cpu_${bits}bit" -i README.md --norm "$norm" -L 6 -C 32 -t 16 -b 4 -d 128 -n 2 -v 2 -m 536870912 -s 0 -o "$folder/$out" -x "$steps" "$@"
}
sample() {
    "build/train_keel_cpu_$1bit" -e "$folder/$2/model_00000006.bin" --prompt KEEL -g 20
}
# Checkpoints, and the log without its columns of time
same_run() {
    local file
    for file in "$folder/$1"/*.bin; do cmp "$file" "$folder/$2/${file##*/}" || return 1; done
    cmp <(cut -d, -f1-5,9 "$folder/$1/log.csv") <(cut -d, -f1-5,9 "$folder/$2/log.csv")
}
is_refused() {
    ! build/train_keel_cpu_32bit -i README.md -o "$folder/refused" "$@" 2>"$folder/why" >/dev/null &&
        cat "$folder/why" && grep -q 'memory: expected at least' "$folder/why" && [ ! -e "$folder/refused" ]
}

check "test_cpu" build/test_cpu_32bit
for norm in keel deepnorm hybridnorm; do
    for bits in 32 64; do check "$norm, a run of $bits bits" run $bits $norm$bits 4; done
    check "$norm: the same files" same_run ${norm}32 ${norm}64
    cp -r "$folder/${norm}32" "$folder/${norm}32_64" && cp -r "$folder/${norm}64" "$folder/${norm}64_32"
    for run in 64:${norm}64 64:${norm}32_64 32:${norm}64_32; do check "$norm, -y ${run/:/ bits, }" run ${run%:*} ${run#*:} 6 -y; done
    check "$norm: a run of 32 bits, resumed by 64" same_run ${norm}64 ${norm}32_64
    check "$norm: a run of 64 bits, resumed by 32" same_run ${norm}64 ${norm}64_32
    check "$norm: the same samples" cmp <(sample 32 ${norm}64 2>&1) <(sample 64 ${norm}64_32 2>&1)
done
check "more parameters than addresses" is_refused -L 1024 -C 1024 -t 64 -d 64
check "activations of more bytes than addresses" is_refused -L 64 -C 512 -t 64 -b 256 -r none
