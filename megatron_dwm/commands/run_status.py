"""Say how far a run has been saved, and if it is finished.

The arguments are those of pretrain: a configuration, dotted options included.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

from megatron_dwm.config.command_line import run_command
from megatron_dwm.config.load import load
from megatron_dwm.run.status import saved_status

_UNFINISHED, _STOPPED = 3, 4
_USAGE = """usage: {prog} CONFIG.yaml [--section.key value ...]

Print the step of the newest checkpoint in run.dir, and the last step of the configuration. Exits
with 0 if the run is finished, with 3 if it is not, with 4 if it is not and a file `stop` ended its
last attempt, and with 2 after a user's mistake."""


def main() -> None:
    """Print the status."""
    prog = Path(sys.argv[0]).name
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(_USAGE.format(prog=prog))
        return
    status = saved_status(load(sys.argv[1:], prog).config)
    print(status)
    if not status.is_finished:
        sys.exit(_STOPPED if status.was_stopped else _UNFINISHED)


def command() -> NoReturn:
    """Run the command and exit."""
    run_command(main)
