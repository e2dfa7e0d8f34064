#!/usr/bin/env bash
# All tests on a fresh machine: makes .venv if it is missing, then runs pytest with the arguments
# given here.   bash tests/run.sh [pytest args]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/environment.sh dev
# Tests start several processes; more threads than cores only slow them down.
export OMP_NUM_THREADS=1
# Three files at a time, the longest first (tests/conftest.py); -n 0 runs one after the other. With
# two workers, two cores are idle for up to a fifth of the time, while tests wait for Slurm or signals.
exec python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
