"""Exit codes and one-line errors of every command: 0 success, 2 a user's mistake, 1 a failure."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from megatron_dwm.config.errors import RunError, UserError
from megatron_dwm.config.printing import printable

EXIT_FAILURE = 1
EXIT_USER_MISTAKE = 2
EXIT_INTERRUPTED = 130  # the shell's number for Ctrl-C


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports a mistake as one line, without the usage; parse inside `run_command`.

    Options may not be abbreviated: a word cut short would change its meaning with a new option.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Raise `UserError`."""
        raise UserError(f"{message}; see --help")


def run_command(main: Callable[[], None]) -> NoReturn:
    """Call `main` and end the process.

    A `UserError` prints one line on stderr and exits with 2; a `RunError` prints one line and exits
    with 1. A package that is not installed is a user's mistake. Any other exception prints its
    traceback and exits with 1. Ctrl-C prints one line and exits with 130.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        sys.exit(EXIT_USER_MISTAKE)
    except RunError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        sys.exit(EXIT_FAILURE)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", __name__.partition(".")[0]):
            raise
        print(
            f"error: the package {missing} is not installed, and {_importer(error)} imports it; "
            "install what megatron-dwm needs with this Python (pyproject.toml)",
            file=sys.stderr,
        )
        sys.exit(EXIT_USER_MISTAKE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(0)


def _importer(error: ModuleNotFoundError) -> str:
    """Returns the name of the module that could not import another."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame.tb_frame.f_globals.get("__name__", "a module") if frame else "a module"
