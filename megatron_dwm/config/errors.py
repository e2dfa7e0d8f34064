"""Exceptions whose message is the one line that a user sees."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user wrote.

    The message names the file, line or key, what was expected and what to do. Commands print it
    as one line and exit with 2 (see `command_line.run_command`).
    """


class RunError(RuntimeError):
    """A run cannot continue, and the cause is not a clear mistake in what the user wrote.

    Commands print the message as one line and exit with 1.
    """


class LostPeer(RunError):
    """Another process of the job does not answer; raised in any process that waits for it."""
