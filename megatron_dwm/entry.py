"""Start and end of the commands that torchrun or srun starts, in every process of the job."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from megatron_dwm.config import LostPeer, RunError, UserError
from megatron_dwm.config.command_line import EXIT_FAILURE, EXIT_USER_MISTAKE, run_command
from megatron_dwm.config.load import Loaded, exit_on_help, load
from megatron_dwm.launch import find_launch

# Launchers end all processes soon after one exits, so the others wait for the main one to print.
_OTHERS_WAIT_S = 5.0


def run_job(prog: str, job: Callable[[Loaded], None], about: str = "") -> None:
    """Read the command line, run `job` and exit; one process prints a user's mistake.

    about: what the command does, for its --help, with a space at the end.
    That is the main process. If only another machine can see the mistake, such as a file that is
    missing there, the first process of that machine prints it. It waits before it prints: if the
    main process sees the mistake, too, the launcher ends the job after one line.

    `job` does its own heavy imports, so that `--help` and cheap mistakes are answered at once.
    """

    def main() -> None:
        exit_on_help(prog, sys.argv[1:], about)
        find_launch(os.environ)  # a wrong variable is an error before anything else
        quiet_upstream()
        try:
            job(load(sys.argv[1:], prog))
        except LostPeer as error:
            _tell_torchrun(error)
            raise
        except (UserError, RunError) as error:
            own = _as_this_process_says(error)
            _tell_torchrun(own)
            raise own from error

    run_command(main)


def quiet_upstream() -> None:
    """Hide warnings of other packages that ask nothing of a user."""
    # Megatron-Core prints this on import on every machine without these optional packages.
    warnings.filterwarnings("ignore", message=".*(Apex|apex) (is|are) not installed.*")
    # torch 2.13 renames collectives that Megatron-Core 0.16.1 calls by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.*")
    # The CPU redirection calls torch for Megatron-Core, so upstream's warnings name it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"megatron_dwm\.runtime\.cpu")
    # Megatron-Core's sharded optimizer reads the gradient of parts of a buffer.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a")
    # A torch for CUDA on a machine with its compiler and no GPU; the run's own lines say "cpu".
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def _as_this_process_says(error: UserError | RunError) -> UserError | RunError:
    """Returns the error with this process's name; exits silently if another process prints it."""
    launch = find_launch(os.environ)
    if launch.rank == 0:
        return error
    time.sleep(_OTHERS_WAIT_S)
    if launch.local_rank != 0:
        sys.exit(EXIT_USER_MISTAKE if isinstance(error, UserError) else EXIT_FAILURE)
    return type(error)(f"rank {launch.rank} on {socket.gethostname()}: {error}")


def _tell_torchrun(error: Exception) -> None:
    """Write the error to the file with which torchrun ends its report of some twenty lines.

    torch.distributed.elastic's error handler defines the file and its format.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        line = f"error: {error}"
        extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
        content = {"message": {"message": line, "extraInfo": extra}}
        with contextlib.suppress(OSError):  # the error itself matters more than torchrun's copy
            Path(file).write_text(json.dumps(content), encoding="utf-8")
