#!/bin/bash
# local.sh RANKS TRAINER [its flags]: starts a run of several ranks on this machine alone, a GPU each, without MPI or Slurm.
#
#   dev/cluster/local.sh 8 ./train_keel -i 'data/fineweb_edu_10BT/*_train_*.bin' -L 1024 -z 2 -o run
#
# When a rank ends by an error all end, and the first one's exit status is this script's. SIGTERM, SIGINT, SIGUSR1, SIGUSR2 and SIGHUP go to each rank once. Rank R takes the
# R-th of the GPUs that CUDA_VISIBLE_DEVICES shows, or of all. The CPU trainer's ranks talk by MPI, which local.sh does not start: dev/cluster/mpirun.sh does.
here=$(cd "$(dirname "$0")" && pwd)
if [ "$1" = -h ] || [ "$1" = --help ]; then
    sed -n '2,7p' "$0"
    exit 0
fi
if ! [[ $1 =~ ^[1-9][0-9]*$ ]] || [ $# -lt 2 ]; then
    sed -n '2,7p' "$0" >&2
    exit 2
fi
count=$1
shift
# shellcheck source=dev/cluster/environment.sh
. "$here/environment.sh"
# What a launcher that this script runs under has said of this one process.
for name in $(compgen -e | grep -E '^(OMPI_COMM_|PMI_|PMIX_|MPI_LOCAL|TORCHELASTIC_|SLURM_(PROCID|LOCALID|STEP_)|KEEL_RENDEZVOUS$|MASTER_)'); do
    unset "$name"
done

folder=$(mktemp -d) || exit 1
trap 'rm -rf "$folder"' EXIT
export WORLD_SIZE=$count LOCAL_WORLD_SIZE=$count MASTER_ADDR=127.0.0.1 KEEL_RENDEZVOUS=$folder/rank_0
# Ranks die with this script, even where it is killed. This shell's own messages of jobs go nowhere, the ranks' to 3.
with_us=()
command -v setpriv >/dev/null && with_us=(setpriv --pdeathsig KILL --)
exec 3>&2 2>/dev/null
# A process group for each: a terminal's ^C comes here alone, and goes on to them from here.
set -m
ranks=() passed=
pass() {
    passed=$1
    for pid in "${ranks[@]}"; do kill -"$1" -- -"$pid"; done
}
for signal in TERM INT USR1 USR2 HUP; do trap "pass $signal" "$signal"; done
for ((rank = 0; rank < count; rank++)); do
    RANK=$rank LOCAL_RANK=$rank "${with_us[@]}" "$@" </dev/null 2>&3 3>&- &
    ranks[rank]=$!
done

failure=0
while [ ${#ranks[@]} -gt 0 ]; do
    wait -n "${ranks[@]}"  # or a signal has come
    for rank in "${!ranks[@]}"; do
        pid=${ranks[rank]}
        kill -0 "$pid" && continue
        wait "$pid"
        status=$?
        unset "ranks[rank]"
        if [ $status -ne 0 ] && [ $failure -eq 0 ]; then
            failure=$status
            if [ -z "$passed" ]; then
                [ $status -gt 128 ] && how="was ended by signal $((status - 128))" || how="ended with status $status"
                echo "local.sh: rank $rank (process $pid) $how; all end" >&3
            fi
            # They end by themselves, and say why; what does not is made to.
            { sleep 1; kill -TERM -- "${ranks[@]/#/-}"; sleep 5; kill -KILL -- "${ranks[@]/#/-}"; } &
            reaper=$!
        fi
    done
done
[ -n "$reaper" ] && kill -KILL -- -"$reaper"
exit $failure
