#!/usr/bin/env bash
# Every method compared:   bash examples/study/run.sh WORKDIR [options]      (--help lists them)
set -euo pipefail
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
. "$repository/tools/environment.sh" study
PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}" exec python -m examples.study "$@"
