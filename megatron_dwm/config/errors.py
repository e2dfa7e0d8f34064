"""The one exception that means: the user can mend this."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user wrote; its message is the one line that the user sees.

    It names the file, line or key, says what was expected and what to do. Commands print it and
    exit with 2 (see `command_line.run_command`).
    """
