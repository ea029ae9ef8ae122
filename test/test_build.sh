#!/bin/bash
# What dev/tools/cuda.sh says on machines of every kind, by stand-ins for nvidia-smi and nvcc; what train_keel says
# without a GPU; what make builds again; what dev/tools/need.sh does where something is missing; the READMEs' lists of
# files; the script of the deepest model; the trainer on a CPU that lacks its instructions.
cd "$(dirname "$0")/.." || exit 1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
passed=0 failed=0 skipped=0
bin=$folder/bin
mkdir "$bin"
for tool in bash grep head sed dirname readlink ls; do ln -s "$(command -v $tool)" "$bin/$tool"; done

# nvidia_smi CAPABILITY CUDA; nvcc VERSION
nvidia_smi() {
    printf '#!/bin/bash\nif [[ $1 == --query-gpu=compute_cap ]]; then echo "%s"; else echo "| NVIDIA-SMI 1  Driver Version: 1  CUDA Version: %s |"; fi\n' "$1" "$2" >"$bin/nvidia-smi"
    chmod +x "$bin/nvidia-smi"
}
nvcc() { printf '#!/bin/bash\necho "Cuda compilation tools, release %s, V1"\n' "$1" >"$bin/nvcc" && chmod +x "$bin/nvcc"; }

# expect NAME COMMAND-OF-cuda.sh STDOUT WORDS-ON-STDERR
expect() {
    local out err
    out=$(PATH=$bin CUDA_HOME=$folder/none NVCC=${compiler:-nvcc} bash dev/tools/cuda.sh "$2" 2>"$folder/err")
    err=$(cat "$folder/err")
    if [ "$out" = "$3" ] && [[ $err == *$4* ]]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED: $1: expected '$3' and '$4', found '$out' and '$err'"
    fi
}

nvcc 13.0
expect "no driver: the CPU, and why" trainer train_keel_cpu "no NVIDIA GPU"
expect "no GPU: code for all" arch "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a -gencode arch=compute_100,code=[sm_100,compute_100]" ""
ARCH=90 expect "no GPU, code for a Hopper" arch "-gencode arch=compute_90a,code=sm_90a" ""
ARCH=80 expect "no GPU, code for another" arch "-gencode arch=compute_80,code=sm_80" ""
nvidia_smi 9.0 13.0
expect "a Hopper and a toolkit: the GPU" trainer train_keel ""
expect "a Hopper: code for it alone" arch "-gencode arch=compute_90a,code=sm_90a" ""
expect "the compiler is found" nvcc "$bin/nvcc" ""
nvidia_smi 7.5 13.0
expect "a Turing: the CPU, and why" trainer train_keel_cpu "compute capability 7.5"
nvidia_smi 9.0 12.4
expect "a driver too old for the toolkit: the CPU, and why" trainer train_keel_cpu "driver is for CUDA 12 and the toolkit is CUDA 13"
nvidia_smi "No devices were found" 13.0
expect "a driver without a GPU: the CPU" trainer train_keel_cpu "no NVIDIA GPU"

rm "$bin/nvcc"
nvidia_smi 9.0 13.0
expect "no nvcc: the CPU, and why" trainer train_keel_cpu "no nvcc"
expect "no nvcc: a sentence that names train_keel_cpu" nvcc "" "use train_keel_cpu"
expect "no toolkit: no CUPTI, in a sentence" cupti "" "expected the CUDA Toolkit's CUPTI"

# NCCL beside a toolkit, and MPI: found, and left out where that is asked.
mkdir -p "$folder/toolkit/bin" "$folder/toolkit/include" "$folder/toolkit/lib64"
cp "$(type -P true)" "$folder/toolkit/bin/nvcc"
touch "$folder/toolkit/include/nccl.h" "$folder/toolkit/lib64/libnccl.so"
found() {  # name, what is printed, what it must hold; "" nothing
    if [[ -n $3 && $2 == *"$3"* ]] || [[ -z $3 && -z $2 ]]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED: $1: expected '$3', found '$2'"
    fi
}
found "NCCL in the toolkit" "$(NVCC=$folder/toolkit/bin/nvcc dev/tools/cuda.sh nccl compile)" "-DKEEL_NCCL -isystem $folder/toolkit/include"
found "its library" "$(NVCC=$folder/toolkit/bin/nvcc dev/tools/cuda.sh nccl link)" "-L$folder/toolkit/lib64 -Xlinker -rpath,$folder/toolkit/lib64 -lnccl"
found "NCCL left out" "$(NCCL=0 NVCC=$folder/toolkit/bin/nvcc dev/tools/cuda.sh nccl compile)" ""
printf '#!/bin/bash\n[ "$1" = --showme:compile ] && echo "-I %s -pthread"\n[ "$1" = --showme:link ] && echo "-Wl,-rpath -Wl,/lib -lmpi"\n' "$folder/toolkit/include" >"$folder/mpicc"
chmod +x "$folder/mpicc"
touch "$folder/toolkit/include/mpi.h"
found "an MPI" "$(MPICC=$folder/mpicc dev/tools/mpi.sh compile nvcc)" "-DKEEL_MPI -DOMPI_SKIP_MPICXX -DMPICH_SKIP_MPICXX -isystem $folder/toolkit/include"
found "an MPI's libraries, for nvcc" "$(MPICC=$folder/mpicc dev/tools/mpi.sh link nvcc)" "-Xlinker -rpath -Xlinker /lib -lmpi"
found "MPI left out" "$(MPI=0 MPICC=$folder/mpicc dev/tools/mpi.sh compile)" ""
rm "$folder/toolkit/include/mpi.h"
sed -i "s|$folder/toolkit/include|$folder/none|" "$folder/mpicc"
found "an MPI whose header is not there" "$(MPICC=$folder/mpicc CXX="g++ -nostdinc" dev/tools/mpi.sh compile)" ""

if [ "$LONG" ] && dev/tools/cuda.sh nvcc >/dev/null 2>&1 && [ "$(dev/tools/cuda.sh trainer 2>/dev/null)" != train_keel ]; then
    # no optimisation: it will not run a kernel
    # shellcheck disable=SC2046
    "$(dev/tools/cuda.sh nvcc)" -std=c++20 -O0 -Xcicc -O0 -Xptxas -O0 --expt-relaxed-constexpr -arch=sm_90a -Xcompiler -Wall,-Wextra $(dev/tools/cuda.sh nccl compile) $(dev/tools/mpi.sh compile nvcc) -o "$folder/train_keel" \
        train_keel.cu -lcublasLt $(dev/tools/cuda.sh nccl link) $(dev/tools/mpi.sh link nvcc) $(dev/tools/cuda.sh rpath) ||
        failed=$((failed + 1))
    err=$("$folder/train_keel" -x 1 2>&1)
    status=$?
    if [ $status = 1 ] && [[ $err == "train_keel: expected an NVIDIA"*"use train_keel_cpu" ]]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED: train_keel without a GPU: exit $status, '$err'"
    fi
fi

if dev/tools/cuda.sh nvcc >/dev/null 2>&1; then  # which kernels' code a commit had already
    kernels=$folder/kernels
    mkdir -p "$kernels/dev/tools" && cp dev/tools/{same_kernels.py,cuda.sh} "$kernels/dev/tools"
    echo '__global__ void a_kernel(float* x) { x[0] = 1; } __global__ void b_kernel(float* x) { x[0] = 2; }' >"$kernels/train_keel.cu"
    git -C "$kernels" init -q && git -C "$kernels" add . && git -C "$kernels" -c user.name=test -c user.email=test commit -qm kernels
    sed -i 's/= 2/= 3/' "$kernels/train_keel.cu"
    found "kernels that are what they were" "$("$kernels/dev/tools/same_kernels.py" HEAD 2>&1)" "same    a_kernel
changed b_kernel
1 of 2 kernels are what they were at HEAD"
    found "a commit that is none" "$("$kernels/dev/tools/same_kernels.py" nowhere 2>&1)" "same_kernels.py: git: fatal: not a valid object name: nowhere"
fi

# Programs are built again when what they are built with has changed, and only then: two rules of the Makefile, for g++
# and nvcc, with compilers that only touch what they are asked for and an mpicc that comes later.
tree=$folder/tree compilers=$folder/compilers
mkdir -p "$tree/dev/tools" "$compilers"
cp Makefile "$tree" && cp dev/tools/{compile,need,mpi,cuda}.sh "$tree/dev/tools"
touch "$tree"/{train_keel_cpu.cpp,train_keel.cu,keel_common.h}
cat >"$compilers/g++" <<'END'
#!/bin/bash
[ "$1" = --version ] && cat version
while [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2" && echo "$2" >>compiled; shift; done
[ ! -e broken ]
END
cp "$compilers/g++" "$compilers/nvcc"
chmod +x "$compilers"/*
# builds NAME PROGRAMS ARGUMENTS-OF-make...: which of the two are compiled, in one line
builds() {
    : >"$tree/compiled"
    env -i PATH="$compilers:$PATH" NVCC="$compilers/nvcc" MPICC="$compilers/mpicc" \
        make -C "$tree" "${@:3}" train_keel_cpu train_keel >"$folder/out" 2>&1
    check "$1" "$2" "$(xargs <"$tree/compiled")"
}
check() {  # name, expected, found
    if [ "$2" = "$3" ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED: $1: expected '$2', found '$3'"
    fi
}
both="train_keel_cpu train_keel"
builds "a first time" "$both"
builds "nothing changed" ""
builds "another g++ flag" train_keel_cpu CXXFLAGS=-O1
builds "without that flag again" train_keel_cpu
builds "another nvcc flag" train_keel NVCCFLAGS=-lineinfo
builds "without Hopper's kernels" train_keel NO_WGMMA=1
builds "without that flag again" train_keel
builds "make -n" "" -n CXXFLAGS=-O1
check "make -n says what it would do" 1 "$(grep -c '^g++.* -O1 .* -o train_keel_cpu' "$folder/out")"
builds "nothing changed since make -n" ""
printf '#!/bin/bash\necho "-I/mpi"\n' >"$compilers/mpicc" && chmod +x "$compilers/mpicc"
builds "MPI has come" "$both"
builds "nothing changed with MPI" ""
builds "MPI is not wanted" "$both" MPI=0
builds "MPI is wanted again" "$both"
echo 2 >"$tree/version"
builds "another version of the compilers" "$both"
touch "$tree/broken"
builds "a compiler that fails" train_keel_cpu CXXFLAGS=-O1
rm "$tree/broken"
builds "after one that failed" train_keel_cpu CXXFLAGS=-O1
sleep 0.1
touch "$tree/train_keel.cu"
builds "a newer source" train_keel CXXFLAGS=-O1
check "make alone lists the targets" 1 "$(env -i PATH="$PATH" make -C "$tree" | grep -c '^  make train ')"

# dev/tools/need.sh on machines where the doctest header is missing: needs NAME USER-ID APT-GET STATUS WORDS, all at once, for
# some wait. apt-get is a line of bash; sudo is never run; a network that does not answer is given up long before the 100 s of its stand-in.
needs() {
    local machine=$folder/need/$1 start=$SECONDS out status
    mkdir -p "$machine"
    for tool in sh bash cat grep mktemp rm sleep; do ln -s "$(command -v $tool)" "$machine/$tool"; done
    printf '#!/bin/bash\necho %s\n' "$2" >"$machine/id"
    printf '#!/bin/bash\n>>%q\n' "$machine/ran sudo" >"$machine/sudo"
    [ "$3" ] && printf '#!/bin/bash\n%s\n' "$3" >"$machine/apt-get"
    chmod +x "$machine"/*
    out=$(PATH=$machine CXX=none sh dev/tools/need.sh doctest-dev 2>&1)
    status=$?
    if [ $status != "$4" ] || [[ $out != *"$5"* ]] || [ -e "$machine/ran sudo" ] ||
        { [ $status != 0 ] && [ $((SECONDS - start)) -gt 60 ]; }; then
        echo "expected $4, '$5', found $status, '$out' after $((SECONDS - start)) s"
    fi >"$machine/failed"
}
install="apt-get install -y --no-install-recommends doctest-dev"
failed_to="missing: doctest-dev, and apt-get could not install it:"
# shellcheck disable=SC2016
slow='[ "$1" = update ] && echo "Get:1 http://server"; sleep 6; echo "$*" >>"${0%/*}/asked"'
# shellcheck disable=SC2016
full='[ "$1" = update ] && echo "Hit:1 http://server" || { echo "E: no space"; exit 1; }'
needs "a network that does not answer" 0 'exec sleep 100' 1 "$failed_to no server answered" &
needs "one that fails slowly" 0 'echo "Ign:1 http://server"; exec sleep 100' 1 "$failed_to no server answered" &
needs "one that refuses" 0 'echo "Err:1 http://server"; echo "E: refused"; exit 100' 1 "$failed_to E: refused" &
needs "another apt-get at work" 0 'echo "E: Could not get lock" >&2; exit 100' 1 "$failed_to E: Could not" &
needs "a slow network" 0 "$slow" 0 "installing doctest-dev" &
needs "an installation that fails" 0 "$full" 1 "$failed_to E: no space" &
needs "not root" 1000 'echo "$*" >>"${0%/*}/asked"' 1 "sudo $install" &
needs "no apt-get" 0 "" 1 "missing: doctest-dev. Install what" &
# shellcheck disable=SC2046
wait $(jobs -p)
for machine in "$folder"/need/*; do
    check "need.sh, ${machine##*/}" "" "$(cat "$machine/failed")"
done
asked=$(grep -o "^install.*doctest-dev" "$folder/need/a slow network/asked")
check "a slow network is waited for" "$install" "apt-get $asked"
check "apt-get is not run for others than root" no "$([ -e "$folder/need/not root/asked" ] && echo yes || echo no)"

# A clang without OpenMP, or none: what is missing is named by its version.
machine="$folder/need/not root"
printf '#!/bin/bash\ncase $* in *-dumpversion) echo 17.0.6 ;; *--version) echo Debian clang ;; *) [ -e "${0%%/*}/omp.h" ] ;; esac\n' >"$machine/clang++-17"
chmod +x "$machine/clang++-17"
missing() { PATH=$machine CXX=$1 sh dev/tools/need.sh g++ 2>&1 | sed -n 's/^missing: \(.*\)\. Run this.*/\1/p'; }
check "a clang without OpenMP" "libomp-17-dev" "$(missing "clang++-17 -O2")"
touch "$machine/omp.h"
check "a clang with OpenMP" "" "$(missing clang++-17)"
check "no such clang" "clang-18 libomp-18-dev" "$(missing /opt/clang++-18)"
check "no clang" "clang libomp-dev" "$(missing clang++)"
check "no such g++" "g++-14" "$(missing g++-14)"

# Built for this CPU and run on another, the trainer says so; where this one has no more than the other, there is nothing to say.
if ! command -v qemu-x86_64-static >/dev/null || ! grep -q avx /proc/cpuinfo; then
    echo "SKIPPED: the trainer on an older CPU: no qemu-user-static, or a CPU without AVX"
    skipped=1
else
    said=$(qemu-x86_64-static -cpu Nehalem ./train_keel_cpu -h 2>&1 | grep -v TCG)
    found "an older CPU" "$said" "expected the kind of CPU that this program was compiled for, found one that lacks"
    check "an older CPU, in one line" 1 "$(wc -l <<<"$said")"
fi

# The README of a folder names each of its files, by itself or by a folder, and nothing that is not there.
for at in dev dev/cluster test; do
    found=$(
        cd "$at" || exit 1
        named=$(sed -n 's/^| `\([^` ]*[./][^` ]*\).*/\1/p' README.md)
        for name in $named; do [ -e "$name" ] || echo "named, not there: $name"; done
        find . -type f -not -path '*/__pycache__/*' -not -path ./README.md -printf '%P\n' | while IFS= read -r file; do
            for name in $named; do
                [ "$file" = "$name" ] || [[ $name == */ && $file == "$name"* ]] && continue 2
            done
            echo "there, not named: $file"
        done
    )
    check "the files of $at and its README" "" "$found"
done

# Each row of dev/doc/reports.md names a test that is there; the title may stand in its file as several string literals.
missing=$(
    sed -n 's/^| .* | `\(test[a-z0-9_]*\.[a-z]*\|crash_test\.cpp\): \(.*\)` |$/\1 \2/p' dev/doc/reports.md | while read -r file title; do
        tr -s ' \n' ' ' <"test/$file" | sed 's/" "//g' | grep -qF -- "$title" || echo "$file: $title"
    done
    grep '^| ' dev/doc/reports.md | grep -v '^| report ' | grep -v '` |$'
)
check "the tests named in dev/doc/reports.md" "" "$missing"

# The script of the deepest model, on the CPU trainer and a small one: a curve for each of its five runs.
head -c 300000 keel_common.h train_keel.cu train_keel_cpu.cpp >"$folder/text"
if RESULTS=$folder/deep.csv TEXT=$folder/text TRAINER=./train_keel_cpu MODEL="-L 4 -C 16 -t 16 -b 2" STEPS=4 LONG_STEPS=6 LONG_WARMUP=2 dev/experiments/deep_run.sh 5 >"$folder/out" 2>&1 &&
    [ "$(cut -d, -f1,2 "$folder/deep.csv" | sort | uniq -c | tr -s ' ' | tr '\n' ';')" = " 4 keel,3e-3; 10 keel,4.5e-3; 1 norm,peak_lr; 4 pre,3e-3; 4 pre,4.5e-3;" ]; then
    passed=$((passed + 1))
else
    failed=$((failed + 1))
    echo "FAILED: dev/experiments/deep_run.sh: $(cat "$folder/out" "$folder/deep.csv")"
fi
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
