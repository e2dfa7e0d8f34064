# shellcheck shell=bash
# Sourced by lib.sh: the site file, and a check of every setting, so that a mistake in it is one line.

readonly NUMBERS=(DWM_GPUS_PER_NODE DWM_MIN_FREE_GB)
readonly NUMBERS_FROM_1=(DWM_RANKS_PER_NODE DWM_CPUS_PER_RANK DWM_CPUS)
readonly WORDS=(DWM_ACCOUNT DWM_PARTITION DWM_CPU_PARTITION DWM_GPU DWM_TIME DWM_CPU_TIME)
readonly LISTS=(DWM_SBATCH DWM_SRUN DWM_CONTAINER)
readonly DIRECTORIES=(DWM_DATA DWM_RUNS DWM_LOGS)
readonly SETTINGS=("${NUMBERS[@]}" "${NUMBERS_FROM_1[@]}" "${WORDS[@]}" "${LISTS[@]}" "${DIRECTORIES[@]}")

# read_site: load the settings and check them.
read_site() {
    local name
    [ -f "$DWM_SITE" ] || fail "$DWM_SITE: no such file (DWM_SITE); copy slurm/site.sh there"
    DWM_SITE="$(realpath -- "$DWM_SITE")"
    load_site
    for name in "${SETTINGS[@]}"; do
        declare -p "$name" >/dev/null 2>&1 || fail "$DWM_SITE: $name is missing; see slurm/site.sh"
    done
    [ -n "$DWM_ACCOUNT" ] ||
        fail "$DWM_SITE: DWM_ACCOUNT is empty; set your account, or none if the cluster has no accounts"
    check_numbers
    check_words
    for name in "${DIRECTORIES[@]}"; do
        [[ "${!name}" == /* ]] || fail "$DWM_SITE: $name: expected a path from /, got '${!name}'"
        mkdir -p "${!name}" 2>/dev/null || fail "$DWM_SITE: $name: cannot make ${!name}"
        [ -w "${!name}" ] || fail "$DWM_SITE: $name: ${!name} cannot be written"
        require_space "$name" "${!name}"
    done
}

# load_site: source the file; names that look like settings and are none are refused.
load_site() {
    local said code name before after
    ! grep -q $'\r' "$DWM_SITE" ||
        fail "$DWM_SITE: its lines end as on Windows; correct it with sed -i 's/\\r\$//' FILE"
    # First in a subshell: a line that fails would end this script before it can say so.
    set +e
    # shellcheck source=slurm/site.sh
    said="$(set -eu; . "$DWM_SITE" 2>&1 >/dev/null)"
    code=$?
    set -e
    [ "$code" = 0 ] || fail "$(one_line "${said:-$DWM_SITE: one of its lines ends with $code}")"
    before=" $(compgen -v DWM_ | tr '\n' ' ')"
    # shellcheck source=slurm/site.sh
    . "$DWM_SITE"
    after="$(compgen -v DWM_)"
    for name in $after; do
        [[ "$before ${SETTINGS[*]} " == *" $name "* ]] ||
            fail "$DWM_SITE: $name: no such setting; correct it, or name a variable of your own otherwise"
    done
    declare -F dwm_environment >/dev/null ||
        fail "$DWM_SITE: the function dwm_environment is missing; see slurm/site.sh"
}

check_numbers() {
    local name
    for name in "${NUMBERS[@]}" "${NUMBERS_FROM_1[@]}"; do
        [[ "${!name}" =~ ^(0|[1-9][0-9]*)$ ]] ||
            fail "$DWM_SITE: $name: expected a whole number, got '${!name}'"
    done
    for name in "${NUMBERS_FROM_1[@]}"; do
        [ "${!name}" != 0 ] || fail "$DWM_SITE: $name: expected 1 or more, got 0"
    done
    [ "$DWM_GPUS_PER_NODE" = 0 ] || [ "$DWM_RANKS_PER_NODE" = "$DWM_GPUS_PER_NODE" ] ||
        fail "$DWM_SITE: DWM_RANKS_PER_NODE: expected $DWM_GPUS_PER_NODE, as many as GPUs," \
            "got $DWM_RANKS_PER_NODE"
}

check_words() {
    local name
    for name in DWM_TIME DWM_CPU_TIME; do
        [ -n "${!name}" ] || fail "$DWM_SITE: $name is empty; set a time limit, as 24:00:00"
    done
    [[ " ${DWM_SBATCH[*]}" == *" --signal"* ]] || (("$(minutes_of "$DWM_TIME")" > 10)) ||
        fail "$DWM_SITE: DWM_TIME=$DWM_TIME: a run is told to save ten minutes before its limit; set more"
    for name in "${LISTS[@]}"; do
        [[ "$(declare -p "$name")" == "declare -a"* ]] ||
            fail "$DWM_SITE: $name: expected words in brackets, as $name=(--one --two)"
    done
}

# minutes_of TIME: whole minutes of a time as Slurm reads it; many for a word, such as UNLIMITED, and
# for 0, which means the same.
minutes_of() {
    local days=0 parts time="$1"
    [[ "$time" =~ ^[0-9]+(-[0-9]+)?(:[0-9]+){0,2}$ && "$time" =~ [1-9] ]] || { echo 1000000 && return; }
    [[ "$time" != *-* ]] || { days="${time%-*}" time="${time#*-}" && [[ "$time" == *:* ]] || time="$time:00"; }
    IFS=: read -ra parts <<<"$time"
    case "$1" in
    *-*) ;;                                       # D-H, D-H:M, D-H:M:S
    *:*:*) ;;                                     # H:M:S
    *) parts=(0 "${parts[@]}") ;;                 # M, M:S
    esac
    echo $((10#$days * 1440 + 10#${parts[0]} * 60 + 10#${parts[1]:-0}))
}

# require_space NAME DIRECTORY
require_space() {
    local free_kib
    free_kib="$(df --output=avail "$2" | tail -n 1)"
    [ "$((free_kib / 976563))" -ge "$DWM_MIN_FREE_GB" ] ||
        fail "$1: $2 has $((free_kib / 976563)) GB free, expected $DWM_MIN_FREE_GB" \
            "(DWM_MIN_FREE_GB in $DWM_SITE); free some space"
}
