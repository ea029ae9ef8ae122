#!/bin/bash
# compilers.sh [COMPILER...]: builds the CPU trainer with each compiler, by default every g++ and clang++ of this PATH,
# trains 20 steps and prints a table: warnings, the loss at step 20, and the largest relative difference of any step's
# loss from the first compiler's. A compiler is a command, such as 'clang++-15 -L/opt/omp'. Exit 1 where one fails or
# warns, or losses differ by more than 1e-5: compilers order sums and fuse multiply-adds differently.
cd "$(dirname "$0")/../.." || exit 1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [ $# = 0 ]; then
    mapfile -t found < <(compgen -c | grep -xE '(g|clang)\+\+(-[0-9]+)?' | sort -uV)
    for compiler in "${found[@]}"; do  # g++ and g++-12 may be one
        path=$(readlink -f "$(type -P "$compiler")")
        [[ " $seen " == *" $path "* ]] || set -- "$@" "$compiler"
        seen+=" $path"
    done
fi
failed=0
printf '%-12s %-12s %8s %9s  %s\n' compiler version warnings "loss 20" difference
for compiler; do
    name=${compiler%% *}
    version=$($compiler -dumpfullversion -dumpversion 2>/dev/null) warnings=- loss=- difference="did not build"
    if make -B -s MPI=0 CXX="$compiler" build/train_keel_cpu_other >"$folder/log" 2>&1; then
        difference="did not run"
        warnings=$(grep -c '^[^ ]*:[0-9]*:[0-9]*: warning:' "$folder/log")  # of the sources, not of the machine's name
        rm -rf "$folder/run"
        if build/train_keel_cpu_other -i README.md -L 8 -C 64 -t 64 -d 512 -x 20 -v 0 -n 0 -s 0 -o "$folder/run" >>"$folder/log" 2>&1; then
            cut -d, -f1,2 "$folder/run/log.csv" >"$folder/losses"
            [ -e "$folder/first" ] || cp "$folder/losses" "$folder/first"
            read -r loss difference < <(paste -d, "$folder/losses" "$folder/first" | awk -F, '
                NR > 1 { d = $2 > $4 ? $2 / $4 - 1 : $4 / $2 - 1; if (d > most) most = d; loss = $2 }
                END { printf "%.5f %.1e", loss, most }')
        fi
    fi
    printf '%-12s %-12s %8s %9s  %s\n' "${name##*/}" "$version" "$warnings" "$loss" "$difference"
    if [ "$warnings" != 0 ] || ! awk -v d="$difference" 'BEGIN { exit !(d ~ /^[0-9]/ && d <= 1e-5) }'; then
        failed=1
        tail -5 "$folder/log" >&2
    fi
done
exit $failed
