"""How the commands that torchrun starts begin and end, in every process of the job."""

from __future__ import annotations

import contextlib
import json
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

# torchrun ends the other processes as soon as one leaves; the others let the main one speak first.
_OTHERS_WAIT_S = 5.0


def run_job(prog: str, job: Callable[[Loaded], None]) -> None:
    """Read the command line, do the job, leave. One process names a user's mistake.

    That is the main process. A mistake that only another machine can see, such as a file that is
    missing there, is named by the first process of that machine, which waits first: where the main
    process sees the mistake too, a launcher that ends the job ends it with one line.

    `job` does its own heavy imports, so that `--help` and cheap mistakes are answered at once.
    """

    def main() -> None:
        exit_on_help(prog, sys.argv[1:])
        _quiet_upstream()
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


def _quiet_upstream() -> None:
    # Said by Megatron-Core on import, on every machine without these optional packages.
    warnings.filterwarnings("ignore", message=".*(Apex|apex) (is|are) not installed.*")
    # torch 2.13 renames collectives that Megatron-Core 0.16.1 calls by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.*")
    # The CPU redirection is what calls torch there, so upstream's warnings carry its name.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"megatron_dwm\.runtime\.cpu")
    # Megatron-Core's sharded optimiser asks parts of a buffer for a gradient of their own.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a")


def _as_this_process_says(error: UserError | RunError) -> UserError | RunError:
    """The error with where it was seen; leaves without a word where another process speaks."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        return error
    time.sleep(_OTHERS_WAIT_S)
    if os.environ.get("LOCAL_RANK", rank) != "0":
        sys.exit(EXIT_USER_MISTAKE if isinstance(error, UserError) else EXIT_FAILURE)
    return type(error)(f"rank {rank} on {socket.gethostname()}: {error}")


def _tell_torchrun(error: Exception) -> None:
    """Have torchrun end its own report of some twenty lines with this one.

    The file, and its form, are those of torch.distributed.elastic's error handler.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        line = f"error: {error}"
        extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
        content = {"message": {"message": line, "extraInfo": extra}}
        with contextlib.suppress(OSError):  # the line itself is more than torchrun's copy of it
            Path(file).write_text(json.dumps(content), encoding="utf-8")
