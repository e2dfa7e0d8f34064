"""How the commands that torchrun starts begin and end, in every process of the job."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable

from megatron_dwm.config import Config, RunError, UserError
from megatron_dwm.config.command_line import EXIT_FAILURE, EXIT_USER_MISTAKE, run_command
from megatron_dwm.config.load import exit_on_help, load_config

# torchrun ends the other processes as soon as one leaves; the others let the main one speak first.
_OTHERS_WAIT_S = 5.0


def run_job(prog: str, job: Callable[[Config], None]) -> None:
    """Read the command line, do the job, leave. Only the main process names a user's mistake.

    `job` does its own heavy imports, so that `--help` and cheap mistakes are answered at once.
    """

    def main() -> None:
        exit_on_help(prog, sys.argv[1:])
        # Said by Megatron-Core on import, on every machine without these optional packages.
        warnings.filterwarnings("ignore", message=".*(Apex|apex) (is|are) not installed.*")
        # torch 2.13 renames collectives that Megatron-Core 0.16.1 calls by their old names.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.*")
        # The CPU redirection is what calls torch there, so upstream's warnings carry its name.
        warnings.filterwarnings(
            "ignore", category=FutureWarning, module=r"megatron_dwm\.runtime\.cpu"
        )
        # Megatron-Core's sharded optimiser asks parts of a buffer for a gradient of their own.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a")
        try:
            job(load_config(sys.argv[1:], prog))
        except (UserError, RunError) as error:
            if os.environ.get("RANK", "0") == "0":
                raise
            time.sleep(_OTHERS_WAIT_S)
            sys.exit(EXIT_USER_MISTAKE if isinstance(error, UserError) else EXIT_FAILURE)

    run_command(main)
