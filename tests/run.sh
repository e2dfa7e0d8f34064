#!/usr/bin/env bash
# All tests on a fresh machine: makes .venv if it is missing, then runs pytest with the arguments
# given here.   bash tests/run.sh [pytest args]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/environment.sh dev
# Tests start several processes; more threads than cores only slow them down.
export OMP_NUM_THREADS=1
# Three files at a time, the longest first (tests/conftest.py); -n 0 runs one after the other. Of two
# cores, one worker each leaves up to a fifth idle, while a test waits for Slurm or for a signal.
exec python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
