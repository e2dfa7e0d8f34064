# shellcheck shell=bash
# Sourced by the commands and jobs of this folder: settings, checks, submission, one attempt of a run.

DWM_REPOSITORY="${DWM_REPOSITORY:-${SLURM_SUBMIT_DIR:-$PWD}}"
DWM_SITE="${DWM_SITE:-$DWM_REPOSITORY/slurm/site.sh}"
export DWM_REPOSITORY DWM_SITE

# A job stops after this many attempts in a row without a new checkpoint.
readonly MAX_ATTEMPTS=3
# Exit codes of tools/run_status.py.
readonly UNFINISHED=3 STOPPED=4
# What its line ends with after the file stop.
readonly BY_FILE='; the file stop ended it'
readonly ATTEMPTS=attempts_without_a_checkpoint

fail() {
    echo "error: $*" >&2
    exit 2
}

one_line() { # one_line TEXT: what sbatch or bash says as one line
    local text="${1//sbatch: error: /}"
    echo "${text//$'\n'/; }"
}

shopt -s globstar # as tools/preprocess_data.py reads **

# shellcheck source=slurm/settings.sh
. "$DWM_REPOSITORY/slurm/settings.sh"

# submit_job SCRIPT [sbatch options] -- [arguments]: prints the job's number.
submit_job() {
    local script="$1" options=() said
    shift
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    [ -f "$DWM_REPOSITORY/slurm/$script.sbatch" ] ||
        fail "$script: no such script; choose one of $(list_scripts); sbatch's options come before it," \
            "each with ="
    check_options_of_job "${DWM_SBATCH[@]}" "${options[@]}"
    check_place_of_options "$script" "$@"
    site_options "$script" "${options[@]}"
    said="$(leave_job && sbatch --parsable "${site_options[@]}" "${options[@]}" \
        "$DWM_REPOSITORY/slurm/$script.sbatch" "$@" 2>&1)" ||
        fail "$script: sbatch refuses: $(one_line "$said")" \
            "(its options, or DWM_ACCOUNT, DWM_PARTITION, DWM_TIME, DWM_SBATCH in $DWM_SITE)"
    # Beside the number, or NUMBER;CLUSTER, there may be warnings.
    grep -vE '^[0-9]+(;.*)?$' <<<"$said" >&2 || true
    grep -oE '^[0-9]+(;|$)' <<<"$said" | tr -d ';'
}

# check_options_of_job SBATCH OPTIONS: those with which a job could not say what is wrong.
check_options_of_job() {
    local option
    for option in "$@" "${SBATCH_EXPORT:+--export=$SBATCH_EXPORT}"; do
        case "$option" in
        --job-name=*/* | -J*/*) fail "$option: a job's log has its name, which cannot have a /" ;;
        --export=ALL* | --export=*DWM_REPOSITORY*) ;;
        --export=*) fail "$option: jobs need two variables; write --export=DWM_REPOSITORY,DWM_SITE" ;;
        esac
    done
}

# check_place_of_options SCRIPT ARGUMENTS: every key of a run has a dot, sbatch's options have none.
check_place_of_options() {
    local word
    [ "$1" = pretrain ] || [ "$1" = transfer ] || return 0
    for word in "${@:2}"; do
        [[ ! "$word" =~ ^--[a-z-]+(=.*)?$ ]] ||
            fail "$1: $word: no key of a run; sbatch's options come before the script's name"
    done
}

# leave_job: a new job must not get the variables of the one from which it is submitted, if there is one.
leave_job() {
    local name
    [ -n "${SLURM_JOB_ID:-}" ] || return 0
    for name in "${!SLURM_@}"; do
        [[ "$name" == SLURM_CONF || "$name" == SLURM_CLUSTERS ]] || unset "$name"
    done
}

list_scripts() { (cd "$DWM_REPOSITORY/slurm" && printf '%s ' *.sbatch | sed 's/\.sbatch//g; s/ $//'); }

# site_options SCRIPT SBATCH OPTIONS: set the array site_options to what sbatch needs at this site.
site_options() {
    local log='%x-%j.log'
    [[ " ${*:2}" != *" --array="* && " ${*:2}" != *" -a"* ]] || log='%x-%A_%a.log'
    site_options=("--output=$DWM_LOGS/$log" --kill-on-invalid-dep=yes "${DWM_SBATCH[@]}")
    [ "$DWM_ACCOUNT" = none ] || site_options+=("--account=$DWM_ACCOUNT")
    local partition="$DWM_CPU_PARTITION" gpus="$DWM_GPUS_PER_NODE"
    case "$1" in
    pretrain | transfer | sweep)
        partition="$DWM_PARTITION"
        site_options+=("--time=$DWM_TIME")
        [ "$gpus" = 0 ] || site_options+=("--gpus-per-node=$gpus")
        ;;
    evaluate)
        partition="$DWM_PARTITION"
        site_options+=("--time=$DWM_CPU_TIME" "--cpus-per-task=$DWM_CPUS")
        [ "$gpus" = 0 ] || site_options+=(--gpus-per-node=1)
        ;;
    *) site_options+=("--time=$DWM_CPU_TIME" "--cpus-per-task=$DWM_CPUS") ;;
    esac
    [ -z "$partition" ] || site_options+=("--partition=$partition")
}

# begin_job: settings and environment of a job.
begin_job() {
    [ -n "${SLURM_JOB_ID:-}" ] ||
        fail "$0 is a job; submit it: bash slurm/submit.sh $(basename "$0" .sbatch) ..."
    # A job that was submitted from inside another job's step inherits that step's variables.
    unset "${!SLURM_STEP_@}"
    read_site
    load_environment
    # After sbatch --export=LIST srun would give the ranks that list alone.
    export SLURM_EXPORT_ENV=ALL
    echo "== job $SLURM_JOB_ID, attempt ${SLURM_RESTART_COUNT:-0} (the first is 0), on $SLURM_JOB_NODELIST, $(date)"
}

load_environment() {
    local program="${DWM_CONTAINER[0]:-python}"
    set +u # conda and modules read variables that are not set
    dwm_environment || fail "$DWM_SITE: dwm_environment failed"
    set -u
    command -v "$program" >/dev/null || fail "$DWM_SITE: $program: no such command after dwm_environment"
}

run_python() { "${DWM_CONTAINER[@]}" python "$@"; }

run_tool() { run_python "$DWM_REPOSITORY/tools/$1.py" "${@:2}"; }

# once OUTPUT INPUT... -- COMMAND: run a command, unless its output is there already from the same
# command and the same inputs; OUTPUT.made_from says from which. So an experiment can be submitted again.
once() {
    local output="$1" record="$1.made_from" inputs=() made_from
    shift
    while [ "$1" != -- ]; do
        inputs+=("$1")
        shift
    done
    shift
    made_from="$(printf '%q ' "$@" && list_files "${inputs[@]}")"
    if [ -e "$output" ] && [ -f "$record" ] && [ "$(cat "$record")" = "$made_from" ]; then
        echo "== $output is there already, of the same inputs: nothing to do"
        return
    fi
    "$@"
    echo "$made_from" >"$record"
}

# list_files WORD...: the files that the words, or --option=WORD, name, with sizes and times; other words
# are left out.
list_files() {
    local word
    for word in "$@"; do
        [[ "$word" != -*=* ]] || word="${word#*=}"
        [[ "$word" != -* && -e "$word" ]] || continue
        printf '\n'
        find -L "$word" -type f -printf '%p %s %T@\n' | sort
    done
}

# without_output OUTPUT WORD...: fill the array `inputs` with the words but that of the output; of a run,
# its checkpoints, because a report changes the rest.
without_output() {
    local output="$1" word
    shift
    inputs=()
    for word in "$@"; do
        [[ "$word" != "$output" && "$word" != --output=* ]] || continue
        [ ! -d "$word/checkpoints" ] || word="$word/checkpoints"
        inputs+=("$word")
    done
}

# value_of OPTION WORD...: the word after the option, or after its =.
value_of() {
    local option="$1"
    shift
    while [ $# -gt 0 ]; do
        case "$1" in
        "$option="*) echo "${1#*=}" && return ;;
        "$option") echo "${2:-}" && return ;;
        esac
        shift
    done
}

# train ARGUMENTS OF PRETRAIN: one attempt of a run; requeues the job if the run is to go on.
train() {
    local before after code=0 logs="$DWM_LOGS/$SLURM_JOB_NAME-$SLURM_JOB_ID"
    local attempt="$logs/attempt_${SLURM_RESTART_COUNT:-0}"
    check_cpus
    mkdir -p "$attempt"
    trap : TERM USR1 USR2 # the ranks stop; this script has to see how
    local state=0
    before="$(run_status "$@")" || state=$?
    case "$state" in
    0) echo "== $before, nothing to do" && exit 0 ;;
    "$UNFINISHED" | "$STOPPED") ;;
    *) exit 2 ;;
    esac
    echo "== $before; the ranks write to $attempt/rank_*.log"
    start_ranks "$attempt" "$@" || code=$?
    if [ "$code" = 2 ]; then
        echo "== a mistake in the run's settings: not requeued, jobs after this one are cancelled"
        show_first_error "$attempt" error
        exit 2
    fi
    state=0
    after="$(run_status "$@")" || state=$?
    if [ "$state" = 0 ]; then # also if a rank was slow to end, and srun has killed it
        echo "== $after, exit code of the ranks $code"
        exit 0
    elif [ "$state" = "$STOPPED" ] && [ "$code" = 0 ]; then
        echo "== $after: not requeued, jobs after this one are cancelled; submit it again to go on"
        cancel_links "$1"
        exit 1
    fi
    count_attempt "$logs" "${before%"$BY_FILE"}" "${after%"$BY_FILE"}"
    go_on "$code" "$attempt" "$after" "$(cat "$logs/$ATTEMPTS")" "$1"
}

# check_cpus: srun would refuse more than the node has, again in every attempt.
check_cpus() {
    local needed=$((DWM_RANKS_PER_NODE * DWM_CPUS_PER_RANK))
    [ "$needed" -le "${SLURM_CPUS_ON_NODE:-$needed}" ] ||
        fail "$DWM_SITE: DWM_RANKS_PER_NODE x DWM_CPUS_PER_RANK is $needed; this node gives the job" \
            "$SLURM_CPUS_ON_NODE cores"
}

run_status() { run_tool run_status "$@"; }

# start_ranks LOGS ARGUMENTS: srun starts every rank, so that signals reach it and its exit code counts.
start_ranks() {
    local ranks="$DWM_RANKS_PER_NODE" logs="$1"
    shift
    # A rank that fails leaves the others a minute to report it and to end with their own exit codes.
    srun --ntasks="$((SLURM_JOB_NUM_NODES * ranks))" --ntasks-per-node="$ranks" \
        --cpus-per-task="$DWM_CPUS_PER_RANK" --kill-on-bad-exit=0 --wait=60 \
        --output="$logs/rank_%t.log" "${DWM_SRUN[@]}" \
        "${DWM_CONTAINER[@]}" python -m megatron_dwm.pretrain "$@" --run.resume true
}

# show_first_error LOGS [error]: how the log of the rank that failed first ends; its error line only.
show_first_error() {
    local log own='' of_a_peer='' pattern='^(error: |Traceback )'
    while read -r log; do
        grep -qE "$pattern" "$log" || continue
        if grep -qE '^error: .*(not answer|no answer|not start within)' "$log"; then
            of_a_peer="${of_a_peer:-$log}"
        else
            own="${own:-$log}"
        fi
    done < <(find "$1" -name 'rank_*.log' -printf '%T@ %p\n' | sort -n | cut -d ' ' -f 2-)
    log="${own:-$of_a_peer}"
    if [ -z "$log" ]; then
        show_last_lines "$1"
        return
    fi
    if [ "${2:-}" = error ]; then
        grep -m 1 -E "$pattern" "$log" >&2
        return
    fi
    echo "== the first error, in $log:" >&2
    sed -n -E "/$pattern/,\$p" "$log" | tail -n 30 >&2
}

# show_last_lines LOGS: how the first rank's log ends, which may have a warning, as of a full disk.
show_last_lines() {
    [ -s "$1/rank_0.log" ] || return 0
    echo "== no rank wrote an error; the end of $1/rank_0.log:" >&2
    tail -n 3 "$1/rank_0.log" >&2
}

# count_attempt LOGS BEFORE AFTER: count the attempts in a row that left no new checkpoint.
count_attempt() {
    local file="$1/$ATTEMPTS" number=0
    [ ! -f "$file" ] || number="$(cat "$file")"
    if [ "$2" = "$3" ]; then number=$((number + 1)); else number=0; fi
    echo "$number" >"$file"
}

# go_on CODE LOGS STATUS ATTEMPTS CONFIGURATION: requeue this job, unless the user has cancelled it or
# the next one of a chain goes on.
go_on() {
    local said
    if was_cancelled; then
        echo "== $3; this job was cancelled: not requeued"
        exit 1
    fi
    if [ "$4" -ge "$MAX_ATTEMPTS" ]; then
        echo "== $3; not requeued, jobs after this one are cancelled"
        [ "$1" = 0 ] || show_first_error "$2"
        echo "error: $4 attempts in a row without a new checkpoint, the last with exit code $1" >&2
        exit 1
    fi
    if [ "$1" = 0 ] && [ -n "$(next_links "$5")" ]; then
        echo "== $3; the next job of the chain goes on"
        exit 0
    fi
    echo "== $3, exit code $1; this job is requeued"
    [ "$1" = 0 ] || show_first_error "$2"
    # After the failure of a node, Slurm has requeued it already.
    said="$(scontrol requeue "$(this_job)" 2>&1)" || [[ "$said" == *pending* ]] ||
        fail "Slurm does not requeue this job ($said); submit it again, and the run goes on"
    sleep 120 # Slurm ends this script
    exit 1
}

# this_job: the job's number; a task of an array has one of its own, because scontrol takes the last
# task's SLURM_JOB_ID for the whole array.
this_job() {
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
        echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        echo "$SLURM_JOB_ID"
    fi
}

# was_cancelled: true if scancel ends this job, which would otherwise come back at once. Slurm then
# calls it completing, without a reason. After a requeue, its restarts are one more; at its time limit,
# on a node's failure and for a job of higher priority there is a reason or a time of preemption.
was_cancelled() {
    local shown
    shown="$(scontrol show job --oneliner "$(this_job)" 2>/dev/null)" || return 1
    [[ "$shown" != *" JobState=CANCELLED"* ]] || return 0
    [[ "$shown" == *" JobState=COMPLETING Reason=None "* && "$shown" != *" PreemptTime="[0-9]* &&
        "$shown" == *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]
}

# cancel_links CONFIGURATION: the next jobs of a chain would go on with the run.
cancel_links() {
    local waiting
    mapfile -t waiting < <(next_links "$1")
    [ "${#waiting[@]}" = 0 ] || scancel "${waiting[@]}"
}

# next_links CONFIGURATION: numbers of the jobs of this run that wait for their turn. Their name,
# directory and command are this job's; a job of the same name may train another run, and so do the
# other tasks of an array.
next_links() {
    local own number what
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || return 0
    read -r own < <(squeue --noheader --jobs="$(this_job)" --format='%j %Z %o') || true
    # Where Slurm does not show a job's arguments, two runs would look alike.
    [[ "${own:-}" == *"$1"* ]] || return 0
    squeue --noheader --user="$(id -un)" --states=PENDING --format='%i %j %Z %o' |
        while read -r number what; do
            [ "$what" != "$own" ] || echo "$number"
        done
}
