#!/bin/bash
# What dev/cuda.sh says on machines of every kind, by stand-ins for nvidia-smi and nvcc; and what train_keel says without a GPU.
cd "$(dirname "$0")/.." || exit 1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
passed=0 failed=0
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
    out=$(PATH=$bin CUDA_HOME=$folder/none NVCC=${compiler:-nvcc} bash dev/cuda.sh "$2" 2>"$folder/err")
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
expect "no GPU: code for all" arch "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 -gencode arch=compute_100,code=[sm_100,compute_100]" ""
nvidia_smi 9.0 13.0
expect "a Hopper and a toolkit: the GPU" trainer train_keel ""
expect "a Hopper: code for it alone" arch "-gencode arch=compute_90,code=sm_90" ""
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
expect "results of a GPU of no known name" results dev/results/gpu.csv ""
printf '#!/bin/bash\necho "NVIDIA H200"\n' >"$bin/nvidia-smi"
expect "results of an H200" results dev/results/h200.csv ""

if dev/cuda.sh nvcc >/dev/null 2>&1 && [ "$(dev/cuda.sh trainer 2>/dev/null)" != train_keel ]; then
    # no optimisation: it will not run a kernel
    # shellcheck disable=SC2046
    "$(dev/cuda.sh nvcc)" -std=c++20 -O0 -Xcicc -O0 -Xptxas -O0 --expt-relaxed-constexpr -arch=sm_90 -Xcompiler -Wall,-Wextra $(dev/cuda.sh nccl compile) $(dev/mpi.sh compile nvcc) -o "$folder/train_keel" \
        train_keel.cu -lcublasLt $(dev/cuda.sh nccl link) $(dev/mpi.sh link nvcc) $(dev/cuda.sh rpath) ||
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

# The script of the deepest model, on the CPU trainer and a small one: a curve for each of its five runs.
head -c 300000 keel_common.h train_keel.cu train_keel_cpu.cpp >"$folder/text"
if RESULTS=$folder/deep.csv TEXT=$folder/text TRAINER=./train_keel_cpu MODEL="-L 4 -C 16 -t 16 -b 2" STEPS=4 LONG_STEPS=6 LONG_WARMUP=2 dev/deep_run.sh 5 >"$folder/out" 2>&1 &&
    [ "$(cut -d, -f1,2 "$folder/deep.csv" | sort | uniq -c | tr -s ' ' | tr '\n' ';')" = " 4 keel,3e-3; 10 keel,4.5e-3; 1 norm,peak_lr; 4 pre,3e-3; 4 pre,4.5e-3;" ]; then
    passed=$((passed + 1))
else
    failed=$((failed + 1))
    echo "FAILED: dev/deep_run.sh: $(cat "$folder/out" "$folder/deep.csv")"
fi
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
