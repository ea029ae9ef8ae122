#!/bin/bash
# profile_kernels.sh: what bounds the highway and attention kernels, by Nsight Compute: achieved bandwidth, tensor-core use, occupancy and the
# largest stall reasons of one launch of each, at bench_kernels' shapes, with the clocks as they are. Prints a table.
cd "$(dirname "$0")/../.." || exit 1
ncu=$(command -v ncu || ls /usr/local/cuda/bin/ncu 2>/dev/null) || { echo "profile_kernels needs Nsight Compute (ncu), which is not here" >&2; exit 1; }
if [ "$(dev/tools/cuda.sh trainer)" != train_keel ]; then
    echo "profile_kernels needs an NVIDIA GPU, its driver and nvcc" >&2
    exit 1
fi
make --no-print-directory build/bench_kernels || exit 1
metrics=gpu__time_duration.sum,dram__bytes.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active
metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active,l1tex__data_bank_conflicts_pipe_lsu.sum
for stall in long_scoreboard short_scoreboard barrier math_pipe_throttle mio_throttle wait not_selected lg_throttle; do
    metrics+=,smsp__average_warps_issue_stalled_${stall}_per_issue_active.ratio
done
# The second of each kernel's launches: the first finds cold caches and code that is being loaded.
"$ncu" --clock-control none --csv --page raw --metrics $metrics -k 'regex:highway_(forward|backward)|attention_(forward|backward)' --launch-skip 2 --launch-count 60 \
    build/bench_kernels 2>/dev/null | grep -v '^==' >build/profile.csv
"$(dev/tools/find_python.sh csv)" - build/profile.csv <<'PY'
import csv, sys
rows = [r for r in csv.DictReader(open(sys.argv[1])) if r.get("Kernel Name")]
seen = {}
for r in rows:
    seen[(r["Kernel Name"], r["Grid Size"], r["Block Size"])] = r  # the last of each
number = lambda r, key: float(next((v for k, v in r.items() if k.startswith(key)), "nan").replace(",", "") or "nan")
for (name, grid, block), r in seen.items():
    stalls = sorted(((number(r, k), k.split("stalled_")[1].split("_per_")[0]) for k in r if "issue_stalled" in k), reverse=True)
    print(f"{name.split('(')[0]:60} {grid:>14} {number(r, 'gpu__time_duration'):10.1f}  DRAM {number(r, 'dram__throughput'):5.1f} %  tensor {number(r, 'sm__inst_executed_pipe_tensor'):5.1f} %"
          f"  warps {number(r, 'sm__warps_active'):5.1f} %  stalls " + ", ".join(f"{k} {v:.2f}" for v, k in stalls[:3]))
PY
