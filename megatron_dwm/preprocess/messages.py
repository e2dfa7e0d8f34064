"""Warnings of preprocessing."""

from __future__ import annotations

import sys

from megatron_dwm.config.printing import printable


def warn(message: str) -> None:
    """Print one line on stderr for something that is no error."""
    print(f"warning: {printable(message)}", file=sys.stderr, flush=True)
