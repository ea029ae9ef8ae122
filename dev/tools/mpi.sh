#!/bin/bash
# What this machine has for runs of several ranks. Prints nothing where it is not there, or where MPI=0 is set: the build then has one rank.
#   mpi.sh compile [nvcc|on_cpu]   compiler flags for MPI, -DKEEL_MPI among them; on_cpu: also to take test/cuda_on_cpu/nccl.h, which needs MPI
#   mpi.sh link [nvcc]      linker flags for MPI
#   mpi.sh mpirun N         how to start N ranks here, also as root and on fewer cores than ranks (for tests)
# MPICC, if set, is MPI's C compiler; CXX the compiler that must find its header.

flags() {  # compile or link, of Open MPI, or of MPICH and its kin, whose wrapper prints a whole command
    "$mpicc" "--showme:$1" 2>/dev/null || "$mpicc" "-$1_info" 2>/dev/null | cut -d' ' -f2-
}
for_nvcc() {  # it hands to g++ what it does not know itself
    local word out=
    for word in $1; do
        case $word in
            -Wl,*) out="$out -Xlinker ${word#-Wl,}" ;;
            -pthread | -f* | -O* | -g | -W*) ;;
            *) out="$out $word" ;;
        esac
    done
    echo "$out"
}

[ "$MPI" = 0 ] && exit 0
mpicc=$(command -v "${MPICC:-mpicc}") || exit 0
case $1 in
    compile) text="-DKEEL_MPI -DOMPI_SKIP_MPICXX -DMPICH_SKIP_MPICXX $(flags compile | sed -E 's/(^| )-I */\1-isystem /g')" ;;
    link) text=$(flags link) ;;
    mpirun)
        mpirun --version 2>/dev/null | grep -q 'Open MPI' && echo "mpirun --allow-run-as-root --oversubscribe -np $2" || echo "mpirun -np $2"
        exit 0 ;;
    *) sed -n '2,6p' "$0" >&2; exit 2 ;;
esac
# shellcheck disable=SC2086
echo '#include <mpi.h>' | ${CXX:-g++} $(flags compile) -x c++ -E - >/dev/null 2>&1 || exit 0
[ "$2" = nvcc ] && text=$(for_nvcc "$text")
[ "$2" = on_cpu ] && text="$text -DKEEL_NCCL"
echo $text
