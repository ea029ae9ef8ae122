#!/bin/bash
# bench_products.sh: ways of doing the matrix products of a sub-layer beside the trainer's, measured in one run on the GPU that is here, and what each would
# win of a step; adds rows to dev/results/<GPU>.csv (h200.csv and so on). dev/doc/speed.md, "Matrix products", says by which rule one is taken.
cd "$(dirname "$0")/.." || exit 1
if [ "$(dev/cuda.sh trainer)" != train_keel ]; then
    echo "bench_products needs an NVIDIA GPU, its driver and nvcc; build/bench_products_on_cpu --small shows that it works without" >&2
    exit 1
fi
make --no-print-directory build/bench_products || exit 1
build/bench_products --csv "$(dev/cuda.sh results)" --commit "$(git rev-parse --short HEAD 2>/dev/null || echo unknown)" \
    --driver "$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -1)" "$@"
