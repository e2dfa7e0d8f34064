"""A warning of the job, said once."""

from __future__ import annotations

import sys

from megatron_dwm.config.printing import printable
from megatron_dwm.runtime.bring_up import rank_from_environment


def print_warning(text: str) -> None:
    """Print a warning on stderr, in the main process alone, brought up or not."""
    if rank_from_environment() == 0:
        print(f"warning: {printable(text)}", file=sys.stderr, flush=True)
