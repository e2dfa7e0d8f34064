"""What preprocessing tells its user besides progress and errors."""

from __future__ import annotations

import sys


def warn(message: str) -> None:
    """One line for the user that is no error."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
