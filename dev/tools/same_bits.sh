#!/bin/bash
# same_bits.sh [REF]: shows that the working tree computes the very bits that git's REF [HEAD] does, for a change of the
# sources that is to change no result. It builds both in every kind that needs no GPU, REF in build/same_bits/COMMIT,
# trains tiny models of all placements with each, and compares byte for byte what they write: debug states,
# models, training states, tables without their columns of time, samples. A line a build; exit 1 if a file differs.
#   --binaries A B     compares the programs that two folders, or their build/, hold; builds nothing
#   --builds 'X Y'     these builds alone [all four]
#   --norms 'X Y'      these placements alone [all]
# What was written stays in build/same_bits/a (REF) and b. Two sides run at a time, of two threads each.
cd "$(dirname "$0")/../.." || exit 1
builds='train_keel_cpu train_keel_cpu_fp64 train_keel_on_cpu train_keel_fp32_on_cpu'
norms=$(sed -n 's/.*norm placement: \(.*\) \[keel\]$/\1/p' README.md | tr -d ,)  # as -h lists them
ref=HEAD folders=()
while [ $# -gt 0 ]; do
    case $1 in
        --binaries) folders=("$2" "$3") && shift 2 ;;
        --builds) builds=$2 && shift ;;
        --norms) norms=$2 && shift ;;
        -*) sed -n '2,9p' "$0" >&2; exit 2 ;;
        *) ref=$1 ;;
    esac
    shift
done
work=$PWD/build/same_bits
mkdir -p "$work"
mpirun=$(command -v mpirun >/dev/null && dev/tools/mpi.sh mpirun 2)
export OMP_NUM_THREADS=2 CUDA_ON_CPU_THREADS=2 OMP_WAIT_POLICY=passive
export CUDA_ON_CPU_PROTECT=0  # it catches faults, and takes a system call each time the device runs

# find_program FOLDER BUILD
find_program() {
    for at in "$1/$2" "$1/build/$2"; do [ -x "$at" ] && realpath "$at" && return; done
}

# train NAME FLAGS...: one run of $program, alone or by what $launch says, into the folder NAME
train() {
    local name=$1
    shift
    # shellcheck disable=SC2086
    if ! $launch "$program" -i ../../../text.txt --norm "$norm" $shape "$@" >"$name.out" 2>"$name.err"; then
        echo "$build, $norm, $name: $program failed: $(tail -1 "$name.err")" >>"$work/$side.failed"
    fi
    sed '/^--- sample/,/^---$/!d' "$name.out" >"$name.samples"
    [ -s "$name.samples" ] || rm "$name.samples"
    rm "$name.out" "$name.err"
}

# All runs of $program with $norm. The command lines and the folders' names are the same on both sides.
runs() {
    mkdir -p "$work/$side/$build/$norm" && cd "$work/$side/$build/$norm" || exit 1
    local r z shape launch='' steps='-x 3 -n 2 --keep 0' more='--probe 1 -v 3 -m 1 -s 3 -g 16' less='-v 0 -s 0'
    case $build in  # two micro-batches a step, of a shape that only FP32 may have where it may
        train_keel_cpu*) shape='-L 8 -C 24 -H 3 -t 15 -d 60' ;;
        train_keel_on_cpu) shape='-L 8 -C 64 -H 2 -t 16 -d 64' ;;
        *) shape='-L 8 -C 36 -H 3 -t 15 -d 60' ;;
    esac
    train dump -b 2 --dump debug_state
    # shellcheck disable=SC2086
    {
        train r_none -b 2 -o r_none $steps -r none $more
        [ -d r_none ] && cp -r r_none resumed && rm -f resumed/*_00000003*
        train resumed -b 2 -o resumed $steps -r none $more -y
        for r in gelu layer 4; do train "r_$r" -b 2 -o "r_$r" $steps -r $r $less; done
        [[ $build == *on_cpu ]] && train bf16_states -b 2 -o bf16_states $steps $less --moments bf16 --grads bf16
        [ "$mpirun" ] && for z in 0 1 2; do
            OMP_NUM_THREADS=1 launch=$mpirun train "zero_$z" -b 1 -o "zero_$z" $steps $less -z $z
        done
    }
    for log in */log.csv; do  # its other columns are time
        [ -f "$log" ] && cut -d, -f1-5 "$log" >"$log.cut" && mv "$log.cut" "$log"
    done
}

if [ ${#folders[@]} = 0 ]; then
    commit=$(git rev-parse --verify --short "$ref^{commit}") || exit 1
    if [ ! -d "$work/$commit" ]; then
        rm -rf "$work/new" && mkdir "$work/new" && git archive "$commit" | tar -x -C "$work/new" || exit 1
        mv "$work/new" "$work/$commit"
    fi
    folders=("$work/$commit" .)
    possible=''
    for build in $builds; do
        [[ $build == *on_cpu ]] && target=build/$build || target=$build
        # An older Makefile lets g++ choose, by what it inlines, where a*b + c of a kernel is rounded once.
        [[ $build == *on_cpu ]] && options=(CXXFLAGS='-O1 -march=native -ffp-contract=off') || options=()
        if ! make --no-print-directory -C "$work/$commit" "$target" "${options[@]}"; then
            echo "SKIPPED: $build: $ref does not build here"
        elif make --no-print-directory "$target" "${options[@]}"; then
            possible="$possible $build"
        else
            exit 1
        fi
    done
    builds=$possible
    echo "a: $(git log -1 --format='%h %s' "$commit")    b: the working tree"
fi

cp LICENSE "$work/text.txt"
rm -rf "$work/a" "$work/b" "$work"/*.failed
compared=0 different=0
for build in $builds; do
    a=$(find_program "${folders[0]}" "$build") b=$(find_program "${folders[1]}" "$build")
    if [ ! "$a" ] || [ ! "$b" ]; then
        echo "SKIPPED: $build: expected it in both folders, ${folders[*]}"
        continue
    fi
    for norm in $norms; do
        (side=a program=$a && runs) &
        (side=b program=$b && runs) &
        wait
    done
    same=0 differ=''
    for file in $(cd "$work" && for side in a b; do (cd $side/"$build" && find . -type f); done | sort -u); do
        cmp -s "$work/a/$build/$file" "$work/b/$build/$file" && same=$((same + 1)) || differ="$differ ${file#./}"
    done
    count=$(wc -w <<<"$differ")
    [ "$count" = 0 ] && verdict='' || verdict=", $count differ:"
    echo "$build: $(wc -w <<<"$norms") placements, $same files identical$verdict"
    for file in $differ; do echo "    $file"; done
    compared=$((compared + same)) different=$((different + count))
done
cat "$work"/*.failed 2>/dev/null && exit 1
[ $different = 0 ] && [ $compared -gt 0 ]
