"""Checks the settings of examples/sweep.sh before anything is trained.

It reads what `bash examples/sweep.sh ... --list` prints: the arguments of a run in each line.
"""

from __future__ import annotations

import shlex
import sys
import warnings

from megatron_dwm.config import UserError
from megatron_dwm.config.command_line import run_command
from megatron_dwm.config.effect import warnings_of_effect
from megatron_dwm.config.load import load


def main() -> None:
    """Raise UserError for the first run that pretrain would refuse for its keys."""
    runs = [load(shlex.split(line), "sweep.sh") for line in sys.stdin]
    # Megatron-Core says on import that optional packages for GPUs are missing.
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    from megatron_dwm.run.checks import check
    from megatron_dwm.weighting import method_class

    for run in runs:
        if not run.config.evaluation.is_on:
            raise UserError("evaluation.path: not set; the table has the losses of held-out text")
        # Raises for a key of the command line; what it returns, the run itself prints.
        warnings_of_effect(run.config, run.given, method_class(run.config).parts(run.config))
        check(run.config)


if __name__ == "__main__":
    run_command(main)
