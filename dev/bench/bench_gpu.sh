#!/bin/bash
# bench_gpu.sh: whole training steps of train_keel beside PyTorch's on the GPU that is here; adds rows to
# dev/results/<GPU>.csv (h200.csv and so on). dev/bench/bench_gpu.py says what is measured and how; flags: --help. All rows
# may take longer than its --seconds: name some with --rows, or take --quick.
cd "$(dirname "$0")/../.." || exit 1
python=$(dev/tools/find_python.sh csv) || exit 1
if [ "$(dev/tools/cuda.sh trainer 2>/dev/null)" != train_keel ]; then
    [[ " $* " == *" --help "* || " $* " == *" -h "* ]] && exec "$python" dev/bench/bench_gpu.py --help
    echo "bench_gpu needs an NVIDIA GPU, its driver and nvcc" >&2
    exit 1
fi
make --no-print-directory -s train_keel || exit 1
torch=
for candidate in "${PYTHON:-python3}" python3 /usr/bin/python3; do
    "$candidate" -c 'import numpy, torch; assert torch.cuda.is_available() and hasattr(torch, "compile")' 2>/dev/null && torch=$candidate && break
done
exec "$python" dev/bench/bench_gpu.py --keep --torch-python "$torch" "$@"
