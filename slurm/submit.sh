#!/usr/bin/env bash
# Submit one job with the settings of slurm/site.sh:
#   bash slurm/submit.sh [sbatch options, each with =] SCRIPT [arguments of the script]
# SCRIPT is the name of a .sbatch file of this folder. Prints the number of the job.
set -euo pipefail
DWM_REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=slurm/lib.sh
. "$DWM_REPOSITORY/slurm/lib.sh"
case "${1:-}" in
-h | --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac
read_site
options=()
while [ $# -gt 0 ] && [[ "$1" == -* ]]; do
    options+=("$1")
    shift
done
[ $# -gt 0 ] || fail "submit.sh: the script's name is missing; choose one of $(list_scripts)"
script="$1"
shift
submit_job "$script" "${options[@]}" -- "$@"
