#!/bin/bash
# card.sh: all that an NVIDIA GPU can show of train_keel, in minutes: dev/card/card.py says what and how; card.sh --help its flags.
#     make card                    here, where nvcc is: builds everything that runs there into build/card
#     dev/card.sh right main       there, where the GPU is: right or wrong, and the 1024-layer model; at most 240 s
#     dev/card.sh                  there: what dev/results does not have yet of this GPU and these kernels, for 470 s
#     dev/card.sh --keep FOLDER    here: takes what came back from there into dev/results
cd "$(dirname "$0")/.." || exit 1
python=$(dev/tools/find_python.sh csv tarfile) || exit 1
exec "$python" dev/card/card.py "$@"
