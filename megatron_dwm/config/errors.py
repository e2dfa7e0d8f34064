"""Exceptions whose message is the one line that the user sees."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user wrote; its message is the one line that the user sees.

    It names the file, line or key, says what was expected and what to do. Commands print it and
    exit with 2 (see `command_line.run_command`).
    """


class RunError(RuntimeError):
    """A run cannot go on, and nothing that its user wrote is plainly wrong: its numbers are.

    Commands print its message as one line and exit with 1.
    """


class LostPeer(RunError):
    """Another process of the job does not answer. Raised in one of the others, whichever it is."""
