#!/bin/bash
# ptxas.sh [--test]: compiles train_keel.cu, BF16 and FP32, for sm_80, sm_90a and sm_100 and prints for each kernel its registers, stack and spills
# (bytes a thread), the threads and shared memory (bytes) of a block as the trainer launches it at C = 1024, which the CUDA-on-CPU
# headers tell (- where those runs do not launch it), and for sm_90a how many wgmma its code has (HGMMA in SASS). Exit 1 for a warning (one says
# that ptxas makes wgmma wait for each other), a spill, a kernel named *_hopper_kernel without wgmma, or from Hopper on a kernel that touches global
# memory before it waits for the one before.  --test prints only what is wrong and a line that counts.
cd "$(dirname "$0")/../.." || exit 1
nvcc=$(dev/tools/cuda.sh nvcc) || exit 1
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
archs="80 90a 100"
compile() {  # arch, build
    mkdir "$logs/$1-$2"
    "$nvcc" -std=c++20 -O3 --expt-relaxed-constexpr -Xcompiler -Wall,-Wextra -Xptxas -v,-warn-spills -gencode arch=compute_$1,code=sm_$1 -DKEEL_"$2" $ranks -cubin \
        --keep --keep-dir "$logs/$1-$2" -o "$logs/$1-$2.cubin" train_keel.cu >"$logs/$1-$2.log" 2>&1 || echo "error: nvcc failed" >>"$logs/$1-$2.log"
    [ "$1" = 80 ] || waits "$1" "$logs/$1-$2"/*.ptx >>"$logs/$1-$2.log"
    [ "$1" != 90a ] || wgmmas "$logs/$1-$2.cubin" "$logs/$1-$2"/*.ptx >"$logs/$1-$2.wgmmas"
}
# Launches overlap, and the CPU headers see no access before the wait: here each kernel's code is read. What is Hopper's alone has none elsewhere.
waits() {
    awk -v arch="$1" '
         function ended() { if (name && !started) print "error: " name ": no wait, or no launch_dependents behind it" }
         /\.entry/ { ended(); name = arch != "90a" && /_hopper_kernel/ ? "" : $0; waited = started = 0 }
         /griddepcontrol\.wait/ { waited = 1 }
         /griddepcontrol\.launch_dependents/ { started = waited }
         /(^|[ \t])(ld|st|atom|red)\./ && !/\.(param|shared|local|const)/ || /(^|[ \t])cp\..*\.global/ {
             if (name && !waited) { print "error: " name ": " $0 " before it waits"; waited = 1 } }
         END { ended() }' "$2"
}
# Lines "COUNT KERNEL" of a cubin's SASS, or where there is no disassembler of the PTX that it is from.
wgmmas() {
    case $disassembler in
        *cuobjdump) "$disassembler" -sass "$1" ;;
        *nvdisasm) "$disassembler" -c "$1" ;;
        *) cat "$2" ;;
    esac | awk '/Function : / { kernel = $NF }
                /^\.text\./ { kernel = substr($1, 7); sub(/:$/, "", kernel) }
                /\.entry/ { kernel = $NF; sub(/\(.*/, "", kernel) }
                kernel { count[kernel] += /HGMMA|wgmma\.mma_async/ }
                END { for (kernel in count) print count[kernel], kernel }' | c++filt
}
export -f compile waits wgmmas
disassembler=$(for tool in cuobjdump nvdisasm; do command -v $tool || command -v "$(dirname "$nvcc")/$tool"; done | head -1)
ranks=$(dev/tools/cuda.sh nccl compile)  # with the kernels of several ranks
[ "$ranks" ] && ranks="$ranks $(dev/tools/mpi.sh compile nvcc)"
export nvcc logs ranks disassembler
for build in BF16 FP32; do for arch in $archs; do echo "$arch $build"; done; done | xargs -P "$(nproc)" -L 1 bash -c 'compile $0 $1'

passed=0 failed=0
declare -A launch wgmma
plain() { sed -E 's/^void //; s/\(.*//'; }
if [ "$1" != --test ] && make --no-print-directory build/train_keel_on_cpu build/train_keel_fp32_on_cpu >/dev/null; then
    for run in "BF16 build/train_keel_on_cpu -H 64" "BF16 build/train_keel_on_cpu -H 32 --norm hybridnorm" "BF16 build/train_keel_on_cpu -H 16" \
               "BF16 build/train_keel_on_cpu -H 8 -s 1 -g 1" "FP32 build/train_keel_fp32_on_cpu -H 16 --norm hybridnorm -s 1 -g 1"; do
        read -r build command <<<"$run"
        while read -r _ threads shared name; do
            name=$(plain <<<"$name")
            [ "$name" ] && launch["$build $name"]="$threads $shared"
        done < <(CUDA_ON_CPU_TRACE=1 $command -i keel_common.h -L 2 -C 1024 -t 64 -b 1 -x 1 -v 1 -m 1 2>&1 | sed '1,/shared bytes/d')
    done
fi
while read -r count name; do wgmma[$(plain <<<"$name")]=$count; done <"$logs/90a-BF16.wgmmas"
if grep -q '_hopper_kernel' train_keel.cu; then
    [ "$disassembler" ] || echo "wgmma is looked for in PTX: no cuobjdump or nvdisasm here, which tell SASS's HGMMA"
    hopper=0
    for name in "${!wgmma[@]}"; do
        [[ $name == *_hopper_kernel* ]] || continue
        hopper=1
        [ "${wgmma[$name]}" -gt 0 ] || echo "error: $name has no wgmma" >>"$logs/90a-BF16.log"
    done
    [ $hopper = 1 ] || echo "error: no *_hopper_kernel, which the source has" >>"$logs/90a-BF16.log"
fi
[ "$1" = --test ] || printf '%-5s %-7s %9s %6s %7s %8s %8s %5s  %s\n' build arch registers stack spills threads shared wgmma kernel
for build in BF16 FP32; do
    for arch in $archs; do
        log=$logs/$arch-$build.log
        rows=$(awk '/Compiling entry function/ { split($0, part, "\x27"); name = part[2] }
                    /bytes stack frame/ { stack = $1; spills = $5 + $9 }
                    /Used [0-9]+ registers/ { registers = $0; sub(/.*Used /, "", registers); sub(/ .*/, "", registers)
                        print registers, stack, spills, name }' "$log" | c++filt)
        while read -r registers stack spills name; do
            if [ "$1" != --test ]; then
                plain_name=$(plain <<<"$name")
                read -r threads dynamic <<<"${launch["$build $plain_name"]:-- -}"
                count=-
                [ $build-$arch = BF16-90a ] && count=${wgmma[$plain_name]:--}
                printf '%-5s sm_%-4s %9s %6s %7s %8s %8s %5s  %s\n' $build $arch "$registers" "$stack" "$spills" "$threads" "$dynamic" "$count" "$plain_name"
            fi
            [ "$spills" = 0 ] || echo "spill: $build sm_$arch $name: $spills bytes"
        done <<<"$rows"
        if [ -n "$rows" ] && ! grep -iE 'warning|error' "$log" && awk '$3 != 0 { bad = 1 } END { exit bad }' <<<"$rows"; then
            passed=$((passed + 1))
        else
            failed=$((failed + 1))
            echo "failed: train_keel.cu, $build, sm_$arch"
        fi
    done
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
