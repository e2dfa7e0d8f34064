"""What preprocessing tells its user besides progress and errors."""

from __future__ import annotations

import sys

from megatron_dwm.config.printing import printable


def warn(message: str) -> None:
    """One line for the user that is no error."""
    print(f"warning: {printable(message)}", file=sys.stderr, flush=True)
