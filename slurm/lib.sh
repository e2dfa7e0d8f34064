# shellcheck shell=bash
# Sourced by the commands and jobs of this folder: settings, checks, submission, one attempt of a run.

DWM_REPOSITORY="${DWM_REPOSITORY:-$SLURM_SUBMIT_DIR}"
DWM_SITE="${DWM_SITE:-$DWM_REPOSITORY/slurm/site.sh}"
export DWM_REPOSITORY DWM_SITE

# A job stops after this many attempts in a row without a new checkpoint.
readonly MAX_ATTEMPTS=3
readonly ATTEMPTS=attempts_without_a_checkpoint

fail() {
    echo "error: $*" >&2
    exit 2
}

# read_site: load the settings and check them.
read_site() {
    [ -f "$DWM_SITE" ] || fail "$DWM_SITE: no such file (DWM_SITE); copy slurm/site.sh there"
    # shellcheck source=slurm/site.sh
    . "$DWM_SITE"
    [ -n "$DWM_ACCOUNT" ] ||
        fail "$DWM_SITE: DWM_ACCOUNT is empty; set your account, or none if the cluster has no accounts"
    local name
    for name in DWM_GPUS_PER_NODE DWM_RANKS_PER_NODE DWM_CPUS_PER_RANK DWM_CPUS DWM_MIN_FREE_GB; do
        [[ "${!name:-}" =~ ^[0-9]+$ ]] ||
            fail "$DWM_SITE: $name: expected a whole number, got '${!name:-}'"
    done
    for name in DWM_DATA DWM_RUNS DWM_LOGS; do
        mkdir -p "${!name}" 2>/dev/null || fail "$DWM_SITE: $name: cannot make ${!name}"
        require_space "$name" "${!name}"
    done
}

# require_space NAME DIRECTORY
require_space() {
    local free_kib
    free_kib="$(df --output=avail "$2" | tail -n 1)"
    [ "$((free_kib / 976563))" -ge "$DWM_MIN_FREE_GB" ] ||
        fail "$1: $2 has $((free_kib / 976563)) GB free, expected $DWM_MIN_FREE_GB" \
            "(DWM_MIN_FREE_GB in $DWM_SITE); free some space"
}

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
        fail "$script: no such script; choose one of $(list_scripts)"
    site_options "$script"
    said="$(sbatch --parsable "${site_options[@]}" "${options[@]}" \
        "$DWM_REPOSITORY/slurm/$script.sbatch" "$@" 2>&1)" ||
        fail "$script: sbatch refuses: $(one_line "$said") (DWM_ACCOUNT, DWM_PARTITION, DWM_SBATCH in $DWM_SITE)"
    echo "${said##*$'\n'}"
}

list_scripts() { (cd "$DWM_REPOSITORY/slurm" && printf '%s ' *.sbatch | sed 's/\.sbatch//g; s/ $//'); }

one_line() { # one_line TEXT: sbatch's lines as one
    local text="${1//sbatch: error: /}"
    echo "${text//$'\n'/; }"
}

# site_options SCRIPT: set the array site_options to what sbatch needs at this site.
site_options() {
    site_options=("--output=$DWM_LOGS/%x-%j.log" --kill-on-invalid-dep=yes "${DWM_SBATCH[@]}")
    [ "$DWM_ACCOUNT" = none ] || site_options+=("--account=$DWM_ACCOUNT")
    local partition="$DWM_CPU_PARTITION" gpus="$DWM_GPUS_PER_NODE"
    case "$1" in
    pretrain | transfer)
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
    # A job that was submitted from inside another job's step inherits that step's variables.
    unset "${!SLURM_STEP_@}"
    read_site
    dwm_environment || fail "$DWM_SITE: dwm_environment failed"
    echo "== job $SLURM_JOB_ID, attempt $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST, $(date)"
}

run_python() { "${DWM_CONTAINER[@]}" python "$@"; }

run_tool() { run_python "$DWM_REPOSITORY/tools/$1.py" "${@:2}"; }

# train ARGUMENTS OF PRETRAIN: one attempt of a run; requeues the job if the run is to go on.
train() {
    local before after code=0 logs="$DWM_LOGS/$SLURM_JOB_NAME-$SLURM_JOB_ID"
    local attempt="$logs/attempt_${SLURM_RESTART_COUNT:-0}"
    mkdir -p "$attempt"
    trap : TERM USR1 USR2 # the ranks stop; this script has to see how
    if before="$(run_status "$@")"; then
        echo "== $before, nothing to do"
        exit 0
    elif [ $? != 3 ]; then
        exit 2
    fi
    echo "== $before; the ranks write to $attempt/rank_*.log"
    start_ranks "$attempt" "$@" || code=$?
    if [ "$code" = 2 ]; then
        echo "== a mistake in the run's settings: not requeued, jobs after this one are cancelled"
        show_first_error "$attempt" error
        exit 2
    fi
    if after="$(run_status "$@")" && [ "$code" = 0 ]; then
        echo "== $after"
        exit 0
    fi
    count_attempt "$logs" "$before" "$after"
    go_on "$code" "$attempt" "$after" "$(cat "$logs/$ATTEMPTS")"
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
    [ -n "$log" ] || return 0
    if [ "${2:-}" = error ]; then
        grep -m 1 -E "$pattern" "$log" >&2
        return
    fi
    echo "== the first error, in $log:" >&2
    sed -n -E "/$pattern/,\$p" "$log" | tail -n 30 >&2
}

# count_attempt LOGS BEFORE AFTER: count the attempts in a row that left no new checkpoint.
count_attempt() {
    local file="$1/$ATTEMPTS" number=0
    [ ! -f "$file" ] || number="$(cat "$file")"
    if [ "$2" = "$3" ]; then number=$((number + 1)); else number=0; fi
    echo "$number" >"$file"
}

# go_on CODE LOGS STATUS ATTEMPTS: requeue this job, unless the next one of a chain goes on.
go_on() {
    local said
    if [ "$4" -ge "$MAX_ATTEMPTS" ]; then
        echo "== $3; not requeued, jobs after this one are cancelled"
        [ "$1" = 0 ] || show_first_error "$2"
        echo "error: $4 attempts in a row without a new checkpoint, the last with exit code $1" >&2
        exit 1
    fi
    if [ "$1" = 0 ] && [ -n "$(next_links)" ]; then
        echo "== $3; the next job of the chain goes on"
        exit 0
    fi
    echo "== $3, exit code $1; this job is requeued"
    [ "$1" = 0 ] || show_first_error "$2"
    # After the failure of a node, Slurm has requeued it already.
    said="$(scontrol requeue "$SLURM_JOB_ID" 2>&1)" || [[ "$said" == *pending* ]] ||
        fail "Slurm does not requeue this job ($said); submit it again, and the run goes on"
    sleep 120 # Slurm ends this script
    exit 1
}

# next_links: numbers of the jobs of this name that wait for their turn (--dependency=singleton).
next_links() {
    squeue --noheader --user="$(id -un)" --name="$SLURM_JOB_NAME" --states=PENDING --format=%i
}
