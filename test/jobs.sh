# shellcheck shell=bash
# jobs.sh, to be sourced: runs jobs beside each other, as many as there are cores, those that take longest first.
#   job SECONDS NAME COMMAND...  adds one; SECONDS, roughly what it takes here, order the jobs and tell the time left
#   run_jobs REPORT              runs them all; REPORT INDEX STATUS SECONDS is called as each ends, its output in $logs/INDEX
logs=$(mktemp -d)
trap 'end_jobs; rm -rf "$logs"' EXIT
trap 'exit 130' INT TERM HUP
cores=$(nproc)
job_seconds=() job_names=() job_commands=()
declare -A job_pid job_begin

job() {
    job_seconds+=("$1") job_names+=("$2")
    shift 2
    job_commands+=("$(printf '%q ' "$@")")
}
start_job() {
    job_begin[$1]=$SECONDS
    set -m  # a process group of its own, with the signals of a program that is started in the foreground
    (
        eval "${job_commands[$1]}" >"$logs/$1" 2>&1
        echo $? >"$logs/$1.ending" && mv "$logs/$1.ending" "$logs/$1.status"
    ) </dev/null &
    job_pid[$1]=$!
    set +m
}
end_jobs() {
    local pid
    for pid in "${job_pid[@]}"; do kill -- "-$pid" 2>/dev/null; done
}
# The time that the other jobs take at the rate of those so far; of a job that runs, the time it has had counts as done.
time_left() {
    local i spent done=0 open=0 elapsed=$((SECONDS - jobs_begin)) left longest=0
    for i in "${!job_names[@]}"; do
        spent=0
        [ "${job_begin[$i]}" ] && spent=$((SECONDS - job_begin[$i]))
        [ -e "$logs/$i.status" ] || [ "$spent" -gt "${job_seconds[i]}" ] && spent=${job_seconds[i]}
        left=$((job_seconds[i] - spent)) done=$((done + spent)) open=$((open + left))
        [ $left -gt $longest ] && longest=$left
    done
    left=$((elapsed > 5 && done > 0 ? open * elapsed / done : open / cores))
    [ $left -lt $longest ] && left=$longest
    if [ $left -ge 90 ]; then echo "about $(((left + 30) / 60))m left"; else echo "about ${left}s left"; fi
}
run_jobs() {
    local report=$1 order next=0 ended=0 i told=$SECONDS names
    local -A running=()
    jobs_begin=$SECONDS
    mapfile -t order < <(for i in "${!job_names[@]}"; do echo "${job_seconds[i]} $i"; done | sort -rn | cut -d' ' -f2)
    while [ $ended -lt ${#job_names[@]} ]; do
        while [ ${#running[@]} -lt "$cores" ] && [ $next -lt ${#order[@]} ]; do
            start_job "${order[next]}"
            running[${order[next]}]=1 next=$((next + 1))
        done
        sleep 0.2
        for i in "${!running[@]}"; do
            if [ ! -e "$logs/$i.status" ]; then
                kill -0 "${job_pid[$i]}" 2>/dev/null || [ -e "$logs/$i.status" ] || echo 137 >"$logs/$i.status"  # killed
                [ -e "$logs/$i.status" ] || continue
            fi
            wait "${job_pid[$i]}" 2>/dev/null
            unset "running[$i]" "job_pid[$i]"
            ended=$((ended + 1)) progress="[$ended/${#job_names[@]}]" told=$SECONDS
            "$report" "$i" "$(<"$logs/$i.status")" $((SECONDS - job_begin[$i]))
        done
        if [ $((SECONDS - told)) -ge 20 ]; then
            names=$(for i in "${!running[@]}"; do echo -n ", ${job_names[i]}"; done)
            echo "[$ended/${#job_names[@]}] running: ${names:2}; $(time_left)"
            told=$SECONDS
        fi
    done
}
