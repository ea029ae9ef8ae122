#!/bin/bash
# dev/cluster's scripts on the CPU trainer: mpirun.sh as it is, slurm.sbatch with stand-ins for srun and scontrol. Ends with "N passed, N failed".
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

dev/cluster/network.sh 0.1 1 >"$folder/out"
expect "network.sh prints each port's traffic" has '^lo +sent +[0-9.]+ GB/s +received'

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
