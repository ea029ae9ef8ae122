#!/bin/bash
# ptxas.sh [--test]: compiles train_keel.cu, BF16 and FP32, for sm_80, sm_90 and sm_100 and prints for each kernel its registers, the shared
# memory that it declares itself (what a launch adds is in launch()'s arguments), and its spills, in bytes a thread. Exit 1 for a warning or a spill.
# --test prints only what is wrong and a line that counts.
cd "$(dirname "$0")/.." || exit 1
nvcc=$(dev/cuda.sh nvcc) || exit 1
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
archs="80 90 100"
compile() {  # arch, build
    "$nvcc" -std=c++20 -O3 --expt-relaxed-constexpr -Xcompiler -Wall,-Wextra -Xptxas -v,-warn-spills -gencode arch=compute_$1,code=sm_$1 -DKEEL_"$2" -cubin \
        -o "$logs/$1-$2.cubin" train_keel.cu >"$logs/$1-$2.log" 2>&1 || echo "error: nvcc failed" >>"$logs/$1-$2.log"
}
export -f compile
export nvcc logs
for build in BF16 FP32; do for arch in $archs; do echo "$arch $build"; done; done | xargs -P "$(nproc)" -L 1 bash -c 'compile $0 $1'

passed=0 failed=0
[ "$1" = --test ] || printf '%-5s %-7s %9s %7s %7s %7s  %s\n' build arch registers shared stack spills kernel
for build in BF16 FP32; do
    for arch in $archs; do
        log=$logs/$arch-$build.log
        rows=$(awk '/Compiling entry function/ { split($0, part, "\x27"); name = part[2] }
                    /bytes stack frame/ { stack = $1; spills = $5 + $9 }
                    /Used [0-9]+ registers/ { shared = 0; registers = $0; sub(/.*Used /, "", registers); sub(/ .*/, "", registers)
                        if (match($0, /[0-9]+ bytes smem/)) shared = substr($0, RSTART, RLENGTH) + 0
                        print registers, shared, stack, spills, name }' "$log" | c++filt)
        while read -r registers shared stack spills name; do
            [ "$1" = --test ] || printf '%-5s sm_%-4s %9s %7s %7s %7s  %s\n' $build $arch "$registers" "$shared" "$stack" "$spills" "$(sed -E 's/^void //; s/\(.*//' <<<"$name")"
            [ "$spills" = 0 ] || echo "spill: $build sm_$arch $name: $spills bytes"
        done <<<"$rows"
        if [ -n "$rows" ] && ! grep -iE 'warning|error' "$log" && awk '$4 != 0 { bad = 1 } END { exit bad }' <<<"$rows"; then
            passed=$((passed + 1))
        else
            failed=$((failed + 1))
            echo "failed: train_keel.cu, $build, sm_$arch"
        fi
    done
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
