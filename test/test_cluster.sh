#!/bin/bash
# dev/cluster's scripts on the CPU trainer: mpirun.sh as it is, slurm.sbatch with stand-ins for srun and scontrol, local.sh with stand-ins for ranks, whose real ones
# test_ranks.cpp has. Ends with "N passed, N failed".
cd "$(dirname "$0")/.." || exit 1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
passed=0 failed=0
export OMP_NUM_THREADS=1 RESTART_SECONDS=0 MPIRUN_FLAGS="--allow-run-as-root --oversubscribe"
for ((i = 0; i < 400; i++)); do echo "line $i of $((i * i % 97)), "; done >"$folder/text"
words=(./train_keel_cpu -i "$folder/text" -L 4 -C 8 -H 2 -t 8 -b 1 -d 16 -v 0 -s 0 -n 20 -u 0)

expect() {  # what, condition as a command
    local what=$1
    shift
    if "$@"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED: $what"
        tail -5 "$folder/out"
    fi
}
steps() { tail -1 "$folder/$1/log.csv" 2>/dev/null | cut -d, -f1; }
has() { grep -qE "$1" "$folder/out"; }
lacks() { ! has "$1"; }
finished() { [ "$(steps "$1")" = "$2" ] && [ -f "$folder/$1/model_$(printf %08d "$2").bin" ]; }
# Of the run in $folder/NAME, the processes of its ranks; waits until it has a checkpoint.
ranks_of() {
    for ((i = 0; i < 6000; i++)); do
        compgen -G "$folder/$1/model_*.bin" >/dev/null && break  # any: the first is soon one too many to keep
        sleep 0.05
    done
    for pid in $(pgrep -f -- "-o $folder/$1"); do
        [[ $(readlink "/proc/$pid/exe") == */train_keel_cpu ]] && echo "$pid"
    done
}

# A rank is killed once: the run starts again and ends.
dev/cluster/mpirun.sh 2 "${words[@]}" -x 200000 -o "$folder/killed" >"$folder/out" 2>&1 &
script=$!
pids=($(ranks_of killed))
kill -9 "${pids[1]}"
for ((i = 0; i < 6000; i++)); do
    sed -n '/^resuming /,$p' "$folder/out" | grep -q '^step ' && break  # it listens to signals then
    sleep 0.05
done
expect "mpirun.sh starts again when a rank is killed" has 'a rank was lost, starting again \(1\)'
expect "it says which rank" has 'rank 0: rank 1 \(process [0-9]+ on .*\) has died|rank 1: rank 0 \(process'
expect "and goes on from its checkpoint" has 'resuming .*of 2 ranks'
pids=($(ranks_of killed))
kill "${pids[0]}"
wait $script
expect "a signal to one rank ends it all, exit 0" test $? = 0
expect "with the step told" has '^stopping   after step'

# mpirun itself would kill its ranks a second after a signal.
dev/cluster/mpirun.sh 2 "${words[@]}" -x 200000 -o "$folder/ended" >"$folder/out" 2>&1 &
script=$!
pids=($(ranks_of ended))
kill $script
wait $script
expect "mpirun.sh ends a run at SIGTERM, exit 0" test $? = 0
expect "with the step told" has '^stopping   after step'
expect "no rank goes on" test -z "$(pgrep -f -- "-o $folder/ended")"

dev/cluster/mpirun.sh 2 "${words[@]}" -x 30 -q -o "$folder/mistake" >"$folder/out" 2>&1
expect "a mistake is not repeated" test $? != 0
expect "but told" has "unknown flag"
expect "once" lacks 'starting again'

# Slurm: srun starts two ranks, scontrol notes what it is asked.
mkdir "$folder/bin"
cat >"$folder/bin/srun" <<END
#!/bin/bash
while [[ \$1 == --* ]]; do shift; done
exec $(dev/tools/mpi.sh mpirun 2) "\$@"
END
printf '#!/bin/bash\necho "$@" >>%s/requeued\n' "$folder" >"$folder/bin/scontrol"
chmod +x "$folder"/bin/*
job() { PATH=$folder/bin:$PATH SLURM_JOB_ID=7 SLURM_SUBMIT_DIR=$PWD exec bash dev/cluster/slurm.sbatch "$@"; }
asked() { [ "$(cat "$folder/requeued" 2>/dev/null)" = "$1" ]; }

(job "${words[@]}" -x 200000 -o "$folder/slurm") >"$folder/out" 2>&1 &
script=$!
kill -USR1 $(ranks_of slurm)
wait $script
expect "at its time limit the job's step is finished and its checkpoint written, exit 0" test $? = 0
expect "and the job goes back into the queue" asked "requeue 7"
rm -f "$folder/requeued"
at=$(steps slurm)
(job "${words[@]}" -x $((at + 3)) -o "$folder/slurm") >"$folder/out" 2>&1
expect "from where it goes on and ends" finished slurm $((at + 3))
expect "for good" asked ""

(job "${words[@]}" -x 200000 -o "$folder/lost") >"$folder/out" 2>&1 &
script=$!
pids=($(ranks_of lost))
kill -9 "${pids[0]}"
wait $script
expect "a lost rank is an error" test $? != 0
expect "and puts the job back into the queue" asked "requeue 7"
rm -f "$folder/requeued"
(job "${words[@]}" -q -o "$folder/wrong") >"$folder/out" 2>&1
expect "a mistake does not" asked ""

# local.sh: each stand-in says who it is, notes the signals that come, and ends as its rank is told.
cat >"$folder/rank" <<'END'
#!/bin/bash
for signal in TERM INT USR1 USR2 HUP; do trap "echo rank $RANK: $signal" "$signal"; done
trap 'exit 0' ALRM $END
echo "rank $RANK of $WORLD_SIZE, $LOCAL_RANK of $LOCAL_WORLD_SIZE here, $MASTER_ADDR, $(dirname "$KEEL_RENDEZVOUS" | xargs test -w && echo a folder)"
[ "$RANK" = "$BAD" ] && { sleep 0.2; eval "$FATE"; }
while [ -n "$WAIT" ]; do sleep 0.05; done
END
chmod +x "$folder/rank"
lines() { [ "$(grep -c "$1" "$folder/out")" = "$2" ]; }
local_run() {  # variables, then the number of ranks: in the background, until all stand
    local ranks=${*: -1}
    : >"$folder/out"
    # A group of its own, and signals at their defaults, as a terminal's command has.
    (set -m; env --default-signal "${@:1:$#-1}" dev/cluster/local.sh "$ranks" "$folder/rank" >"$folder/out" 2>&1 & echo $! >"$folder/pid"; wait $!; echo $? >"$folder/status") 2>/dev/null &  # not bash's own "Killed"
    script=$!
    for ((i = 0; i < 600; i++)); do
        lines '^rank . of' "$ranks" && break
        sleep 0.05
    done
    pid=$(cat "$folder/pid")
}
standing() { pgrep -f "bash $folder/ran[k]" >/dev/null; }
ends() {  # with that status, and nothing is left
    wait $script
    for ((i = 0; i < 200; i++)); do standing || break; sleep 0.05; done
    [ "$(cat "$folder/status")" = "$1" ] && ! standing
}

local_run WAIT= RANK=7 MASTER_ADDR=elsewhere 2
expect "local.sh ends with 0 when all have" ends 0
expect "having told each rank who it is and where they meet" lines '^rank [01] of 2, [01] of 2 here, 127.0.0.1, a folder$' 2
local_run WAIT=1 END=TERM BAD=2 FATE='exit 7' 3
expect "a rank's error ends all, with its status" ends 7
expect "which is told" has 'local.sh: rank 2 \(process [0-9]+\) ended with status 7; all end'
local_run WAIT=1 3
for signal in USR1 USR2 TERM HUP; do
    kill -$signal "$pid"
    for ((i = 0; i < 200; i++)); do lines ": $signal" 3 && break; sleep 0.05; done
done
kill -INT -- -"$pid"  # as a terminal's ^C, to the whole process group
for ((i = 0; i < 200; i++)); do lines ': INT' 3 && break; sleep 0.05; done
sleep 0.2
for signal in USR1 USR2 TERM HUP INT; do expect "SIG$signal comes to each rank once" lines ": $signal" 3; done
pkill -ALRM -f "bash $folder/ran[k]"
expect "ranks that end well after a signal are no error" ends 0
local_run WAIT=1 3
kill -9 "$pid"
expect "killed itself, it leaves no ranks behind" ends 137
# LONG=1: with one beside it that does not end by SIGTERM
local_run WAIT=1 END="$([ -n "$LONG" ] || echo TERM)" BAD=0 FATE='kill -9 $$' 2
expect "a rank that is killed is told by its signal, and ends all" ends 137
expect "with the signal told" has 'rank 0 \(process [0-9]+\) was ended by signal 9'
dev/cluster/local.sh 2 "${words[@]}" -x 2 -o "$folder/local" >"$folder/out" 2>&1
expect "the CPU trainer's ranks want mpirun" test $? = 1
expect "and say so, once" lines 'launch with the mpirun of the MPI' 1
dev/cluster/local.sh 1 "${words[@]}" -x 2 -o "$folder/local" >"$folder/out" 2>&1
expect "one rank is a run alone" finished local 2

dev/cluster/network.sh 0.1 1 >"$folder/out"
expect "network.sh prints each port's traffic" has '^lo +sent +[0-9.]+ GB/s +received'

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
