"""`torchrun --nproc-per-node N -m megatron_dwm.doctor [CONFIG.yaml] [--section.key value ...]`

Reports what this machine and installation can do, then checks the hypergradient on it. Exits with 1
if the estimators disagree. With `RUN/config.yaml --run.resume true` it compares alignments whose
direction comes ahead of the step with exact ones instead, on the run's newest checkpoint.
"""

from __future__ import annotations

import sys

from megatron_dwm.config.load import Loaded
from megatron_dwm.entry import run_job

_ABOUT = (
    "Report what this machine can do, and check the hypergradient on it; the exit code is 1 if two "
    "ways to compute it disagree. With RUN/config.yaml --run.resume true: compare alignments whose "
    "direction comes ahead of the step with exact ones, on the run's newest checkpoint. "
)


def main() -> None:
    """Report and check, as doctor/diagnosis.py describes."""

    def job(loaded: Loaded) -> None:
        if loaded.config.run.resume:
            from megatron_dwm.doctor.agreement import compare_on_run

            compare_on_run(loaded.config)
            return
        from megatron_dwm.doctor.diagnosis import diagnose

        if not diagnose(loaded.config):
            sys.exit(1)

    run_job("megatron_dwm.doctor", job, _ABOUT)


if __name__ == "__main__":
    main()
