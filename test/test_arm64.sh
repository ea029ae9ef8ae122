#!/bin/bash
# The CPU trainer for ARM's 64 bits, whose vectors are NEON's, under qemu and on one thread: its tests, then a run whose losses are those of this
# machine's trainer to 1e-5. Ends with "N passed, N failed".
cd "$(dirname "$0")/.." || exit 1
export KEEL_TEST_SMALL=1 LONG= GOMP_SPINCOUNT=1  # set, or the trainer would start itself, and find qemu
. test/check.sh
emulated() { qemu-aarch64-static -L /usr/aarch64-linux-gnu "$@"; }
train() {  # TRAINER... FOLDER
    "${@:1:$#-1}" -i README.md -L 4 -C 32 -t 32 -d 64 -x 20 -v 0 -n 0 -s 0 -o "$folder/${*: -1}"
}
same_losses() {
    paste -d, <(cut -d, -f2 "$folder/arm/log.csv") <(cut -d, -f2 "$folder/here/log.csv") |
        awk -F, 'NR > 1 { print; steps++; d = $1 / $2 - 1; if (!(d < 1e-5 && d > -1e-5)) bad = 1 } END { exit bad || steps != 20 }'
}

check "test_cpu" emulated build/test_cpu_arm64
check "a run" train emulated build/train_keel_cpu_arm64 arm
check "the same run here" train ./train_keel_cpu here
check "the same losses" same_losses
