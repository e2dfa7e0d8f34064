#!/usr/bin/env bash
# Several values of some keys, with several seeds:
#
#   bash examples/sweep.sh CONFIG.yaml OUT_DIR --seeds 1,2,3 --weighting.learning_rate 1e-3,3e-3 \
#       [--list] [--section.key value ...]
#
# A key whose value has commas is swept: there is a run for every combination of values and every seed
# (--seeds, default 1234). All other keys go to every run as they stand; a list, as [a,b], is one value. A run is
# OUT_DIR/KEY=VALUE,KEY=VALUE.SEED, with what it printed in the .log beside it. A finished run is not
# repeated and an interrupted one goes on, so the sweep can be stopped and started again with the same
# command, or with more seeds or values. At the end a table has the final held-out loss of each domain
# (evaluation.path), by setting: mean and standard error over the seeds. --list prints the arguments of
# every run instead, a line each. The environment variables JOBS (runs at a time, default 1) and
# LAUNCH (default python; "torchrun --nproc-per-node 4") may be set.
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/parts.sh"

fail() {
    echo "error: sweep.sh: $*" >&2
    exit 2
}

require_different() { # require_different OPTION A,B,...
    local twice
    twice="$(tr ',' '\n' <<<"$2" | sort | uniq -d | head -n 1)"
    [ -z "$twice" ] || fail "$1: $twice is there twice"
}

case "${1:---help}" in
-h | --help)
    show_help "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac
[ $# -ge 2 ] && [[ "$1" != --* && "$2" != --* ]] || fail "expected CONFIG.yaml and OUT_DIR first; see --help"
config="$1" out="$2" seeds=1234 list='' common=() keys=() values=()
shift 2
[ -f "$config" ] || fail "$config: no such configuration file"

while [ $# -gt 0 ]; do
    case "$1" in
    --list) list=yes ;;
    --seeds)
        [[ "${2:-}" =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "--seeds: expected numbers with commas, as 1,2,3, got '${2:-}'"
        require_different "$1" "$2"
        seeds="$2"
        shift
        ;;
    --run.dir | --run.seed | --run.resume | --run.dir=* | --run.seed=* | --run.resume=*)
        fail "${1%%=*}: set by the sweep (OUT_DIR, --seeds); leave it out"
        ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
    --*.*)
        if [[ "${2:-}" == *,* && "${2:-}" != \[* && "${2:-}" != \{* ]]; then
            [[ "$2" != *[/*?[:space:]]* ]] ||
                fail "$1: values name folders, so they cannot have a blank or one of / * ?; got '$2'"
            [[ ",$2," != *,,* ]] || fail "$1: a value between commas is empty: '$2'"
            require_different "$1" "$2"
            keys+=("${1#--}") values+=("$2")
            shift
        else
            common+=("$1")
        fi
        ;;
    --*) fail "$1: no option of the sweep and no key of a run, which has a dot; see --help" ;;
    *) common+=("$1") ;;
    esac
    shift
done

# settings: a line for each combination, KEY=VALUE,KEY=VALUE; nothing is swept: as_configured.
settings() {
    local lines=('') longer line value number
    for number in "${!keys[@]}"; do
        longer=()
        for line in "${lines[@]}"; do
            for value in ${values[$number]//,/ }; do
                longer+=("${line:+$line,}${keys[$number]}=$value")
            done
        done
        lines=("${longer[@]}")
    done
    printf '%s\n' "${lines[@]:-as_configured}"
}

# arguments_of SETTING SEED: fill the array `arguments` with those of pretrain.
arguments_of() {
    local pair
    arguments=("$config" "${common[@]}")
    [ "$1" = as_configured ] || for pair in ${1//,/ }; do
        arguments+=("--${pair%%=*}" "${pair#*=}")
    done
    arguments+=(--run.dir "$out/$1.$2" --run.seed "$2")
}

runs() { # a line for each run: SETTING SEED
    local setting seed
    settings | while read -r setting; do
        for seed in ${seeds//,/ }; do echo "$setting $seed"; done
    done
}

# require_same_sweep: finished runs of other settings must not be taken for these.
require_same_sweep() {
    local now="$out/sweep.txt"
    mkdir -p "$out"
    if [ -f "$now" ] && [ "$(cat "$now")" != "$(describe)" ]; then
        fail "$now: this OUT_DIR has runs of another configuration or other keys; name another one"
    fi
    describe >"$now.$$" && mv "$now.$$" "$now"
}

describe() { printf '%s\n' "$(cksum <"$config") $config" "keys of every run: ${common[*]}"; }

one_run() { # one_run SETTING SEED
    local run="$out/$1.$2" arguments
    eval "$common_declared" # an array cannot be exported
    arguments_of "$1" "$2"
    if python "$tools/run_status.py" "${arguments[@]}" >/dev/null; then
        echo "$1, seed $2: finished before"
        return
    fi
    echo "$1, seed $2: $run.log"
    # shellcheck disable=SC2086  # LAUNCH has words
    ${LAUNCH:-python} -m megatron_dwm.pretrain "${arguments[@]}" --run.resume true >>"$run.log" 2>&1 || {
        tail -n 3 "$run.log" >&2
        return 1
    }
}

list_runs() { # the arguments of every run, quoted for a shell
    local setting seed arguments
    runs | while read -r setting seed; do
        arguments_of "$setting" "$seed"
        printf '%q ' "${arguments[@]}"
        echo
    done
}

# A task of slurm/sweep.sbatch lists the runs and trains one of them itself.
[ -z "${SWEEP_TASK:-}" ] || require_same_sweep
if [ -n "$list" ]; then
    list_runs
    exit 0
fi

. "$repository/tools/environment.sh" eval,report
list_runs | python "$repository/examples/check_sweep.py"
require_same_sweep
common_declared="$(declare -p common)"
export config out common_declared tools
export -f one_run arguments_of
runs | xargs -P "${JOBS:-1}" -L 1 bash -euc 'one_run "$0" "$1"' || {
    echo "error: sweep.sh: a run failed, see its log; the same command goes on" >&2
    exit 1
}
python "$repository/examples/sweep_table.py" "$out"
