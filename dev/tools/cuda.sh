#!/bin/bash
# What this machine has for train_keel.
#   cuda.sh nvcc     prints the CUDA compiler's path, or says what is missing
#   cuda.sh arch     prints nvcc's flags for the GPU that is here, or else for sm_$ARCH where that is set, or for sm_80, sm_90a, sm_100 and PTX
#                    for later ones; Hopper's code, 9.0 or 90, is sm_90a, which has wgmma and runs on every GPU of compute capability 9.0
#   cuda.sh trainer  prints the best trainer that this machine can build and run, and on stderr why it is not train_keel
#   cuda.sh nccl compile|link   prints the flags for NCCL, -DKEEL_NCCL among them, or nothing where it is not there or NCCL=0 is set
#   cuda.sh rpath    prints the linker's flag for the folder of the toolkit's libraries, so that programs find them at run time
#   cuda.sh cupti    prints a C++ compiler's flags for CUPTI, the toolkit's library that records when kernels run, or says that it is missing
# NVCC, if set, is the compiler; CUDA_HOME the toolkit's folder, if it is not /usr/local/cuda.

find_nvcc() {
    for nvcc in "${NVCC:-nvcc}" "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc"; do
        command -v "$nvcc" 2>/dev/null && return 0
    done
    return 1
}

# "9.0" of the first GPU, or nothing.
capability() { nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | grep -E '^[0-9]+\.[0-9]+$'; }

case $1 in
    nvcc)
        find_nvcc && exit 0
        echo "train_keel needs the CUDA Toolkit's nvcc, which is not here; install the CUDA Toolkit (12.4 or later) or set NVCC, or use train_keel_cpu" >&2
        exit 1 ;;
    arch)
        if found=$(capability) || found=$ARCH && [ "$found" ]; then
            arch=${found/./}
            [ "$arch" = 90 ] && arch=90a
            echo "-gencode arch=compute_$arch,code=sm_$arch"
        else
            echo "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a -gencode arch=compute_100,code=[sm_100,compute_100]"
        fi ;;
    nccl)
        # NCCL_HOME: its folder, where it is neither the toolkit's nor the system's
        [ "$NCCL" = 0 ] && exit 0
        nvcc=$(find_nvcc) || exit 0
        toolkit=$(cd "$(dirname "$(readlink -f "$nvcc")")/.." && pwd)
        for home in "$NCCL_HOME" "$toolkit" /usr /usr/local; do
            [ -n "$home" ] && [ -f "$home/include/nccl.h" ] || continue
            for lib in "$home/lib64" "$home/lib" "$home/lib/$(uname -m)-linux-gnu"; do
                ls "$lib"/libnccl.so* >/dev/null 2>&1 || continue
                case $2 in
                    compile) echo "-DKEEL_NCCL -isystem $home/include" ;;
                    link) echo "-L$lib -Xlinker -rpath,$lib -lnccl" ;;
                esac
                exit 0
            done
        done ;;
    rpath)
        nvcc=$(find_nvcc) && lib=$(cd "$(dirname "$(readlink -f "$nvcc")")/../lib64" 2>/dev/null && pwd) && echo "-Xlinker -rpath,$lib" ;;
    cupti)
        if nvcc=$(find_nvcc); then
            home=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
            for include in "$home/extras/CUPTI/include" "$home/include"; do
                for lib in "$home/extras/CUPTI/lib64" "$home/lib64"; do
                    if [ -e "$include/cupti.h" ] && [ -e "$lib/libcupti.so" ]; then
                        echo "-isystem $include -isystem $home/include -L$lib -Wl,-rpath,$lib -lcupti"
                        exit 0
                    fi
                done
            done
        fi
        echo "expected the CUDA Toolkit's CUPTI (cupti.h and libcupti.so), which is not here; install it (it is a part of the CUDA Toolkit) or set NVCC" >&2
        exit 1 ;;
    trainer)
        if ! found=$(capability); then
            echo "no NVIDIA GPU with a working driver here: taking train_keel_cpu" >&2
        elif [ "${found%.*}" -lt 8 ]; then
            echo "the GPU has compute capability $found and train_keel needs 8.0: taking train_keel_cpu" >&2
        elif ! nvcc=$(find_nvcc); then
            echo "there is a GPU but no nvcc (the CUDA Toolkit's compiler): taking train_keel_cpu" >&2
        else
            # The driver must know the toolkit's major version of CUDA.
            driver=$(nvidia-smi 2>/dev/null | grep -oE 'CUDA Version: *[0-9]+' | grep -oE '[0-9]+$')
            toolkit=$("$nvcc" --version | grep -oE 'release [0-9]+' | grep -oE '[0-9]+$')
            if [ -n "$driver" ] && [ -n "$toolkit" ] && [ "$driver" -lt "$toolkit" ]; then
                echo "the NVIDIA driver is for CUDA $driver and the toolkit is CUDA $toolkit, update the driver: taking train_keel_cpu" >&2
            else
                echo train_keel
                exit 0
            fi
        fi
        echo train_keel_cpu ;;
    *) sed -n '2,9p' "$0" >&2; exit 2 ;;
esac
