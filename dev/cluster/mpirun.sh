#!/bin/bash
# mpirun.sh RANKS [-H HOST:SLOTS,...] TRAINER [its flags]: starts a run of several ranks with Open MPI, on this machine or on the hosts named. Where it ends because a
# rank or a machine was lost, it is started again, up to RESTARTS times (default 20): -y, which it adds, goes on from the last whole checkpoint.
# SIGTERM, SIGINT (^C), SIGUSR1 or SIGUSR2: the ranks finish their step, write a checkpoint, exit 0.
#
#   dev/cluster/mpirun.sh 8 ./train_keel -i 'data/fineweb_edu_10BT/*_train_*.bin' -L 1024 -z 2 -o /shared/run
#   dev/cluster/mpirun.sh 16 -H node1:8,node2:8 ./train_keel -i 'data/*.bin' -L 1024 -z 2 -o /shared/run
#
# The folder of -o, the data and the trainer must be at the same path on all hosts, -o on a file system that they share.
here=$(cd "$(dirname "$0")" && pwd)
ranks=$1
shift
hosts=()
[ "$1" = -H ] && hosts=(-H "$2") && shift 2
if ! [[ $ranks =~ ^[1-9][0-9]*$ ]] || [ $# -eq 0 ]; then
    sed -n '2,9p' "$0" >&2
    exit 2
fi
# shellcheck source=dev/cluster/environment.sh
. "$here/environment.sh"
exported=()
for name in $(compgen -e | grep -E '^(NCCL_|OMP_|MASTER_|KEEL_)'); do exported+=(-x "$name"); done
case " $* " in *" -o "* | *" --out"*) set -- "$@" -y ;; esac

log=$(mktemp)
trap 'rm -f "$log"' EXIT
for ((restart = 0; restart <= ${RESTARTS:-20}; restart++)); do
    # A rank is bound to no single core, as it has threads; the lifeline ends the others when one dies, and says which.
    # mpirun would kill the ranks a second after a SIGTERM or SIGINT of its own; SIGUSR1 it hands on. In a session of its own it gets no ^C.
    # shellcheck disable=SC2086
    setsid mpirun -np "$ranks" "${hosts[@]}" --bind-to none "${exported[@]}" $MPIRUN_FLAGS "$@" 2> >(trap '' INT; exec tee "$log" >&2) &
    mpirun=$!
    trap 'told=1; kill -USR1 $mpirun' TERM INT USR1 USR2
    while
        told=
        wait $mpirun
        status=$?
        [ -n "$told" ] && [ $status -gt 128 ]  # a signal has ended the wait alone
    do :; done
    [ $status -eq 0 ] && exit 0
    # What a user has to mend would only come again.
    grep -qE 'has died|no sign of life|NCCL' "$log" || exit $status
    echo "mpirun.sh: a rank was lost, starting again ($((restart + 1)))" >&2
    sleep "${RESTART_SECONDS:-10}"
done
exit 1
