#!/bin/bash
# compile.sh PROGRAM NEWER PACKAGES COMMAND: the recipe of every program that make builds. COMMAND, in which $(...) finds
# what this machine has, runs where NEWER names sources newer than PROGRAM, or where PROGRAM was built with something
# else than its stamp in build/stamps says: another command, compiler or CPU, or before there was MPI.
program=$1 newer=$2 packages=$3 command=$4
stamp=build/stamps/${program//\//_}
flags=${MAKEFLAGS%% *} flags=${flags##-*} flags=${flags##*=*}  # make's: -n says what it would do, -s does it silently

# The command as it is here, its compiler's version, and the macros of g++, which compiles nvcc's host code: they tell its
# version and what -march=native means.
built_with() {
    local words
    eval "words=($command)"
    echo "${words[*]}"
    "${words[0]}" --version
    g++ -march=native -dM -E -x c++ /dev/null | cksum
} 2>/dev/null

[ -z "$newer" ] && [ "$(built_with)" = "$(cat "$stamp" 2>/dev/null)" ] && exit 0
# shellcheck disable=SC2086
[[ $flags == *[nqt]* ]] || dev/tools/need.sh $packages || exit 1
with=$(built_with)
[[ $flags == *s* ]] || head -1 <<<"$with"
[[ $flags == *[nqt]* ]] && exit 0
mkdir -p build/stamps "$(dirname "$program")"
rm -f "$stamp"  # what is cut short has none
eval "$command" && echo "$with" >"$stamp"
