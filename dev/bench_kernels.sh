#!/bin/bash
# bench_kernels.sh: every kernel of train_keel.cu beside its yardstick, measured in one run on the GPU that is here; adds rows to
# dev/results/<GPU>.csv (h200.csv and so on). PyTorch's attention is beside ours where a Python with PyTorch 2.3 or later and CUDA is found ($PYTHON).
cd "$(dirname "$0")/.." || exit 1
if [ "$(dev/cuda.sh trainer)" != train_keel ]; then
    echo "bench_kernels needs an NVIDIA GPU, its driver and nvcc; build/bench_kernels_on_cpu --small shows that it works without" >&2
    exit 1
fi
make --no-print-directory build/bench_kernels || exit 1
file=$(dev/cuda.sh results)
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
peers=()
for python in "${PYTHON:-python3}" python3 /usr/bin/python3; do
    "$python" -c 'import torch.nn.attention; assert torch.cuda.is_available()' 2>/dev/null || continue
    "$python" dev/bench_sdpa.py >build/sdpa.csv && peers=(--sdpa build/sdpa.csv)
    break
done
[ ${#peers[@]} -gt 0 ] || echo "no Python with PyTorch 2.3 or later and CUDA: attention is compared with the large matrix product instead"
build/bench_kernels --csv "$file" --commit "$commit" --driver "$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -1)" "${peers[@]}" "$@"
