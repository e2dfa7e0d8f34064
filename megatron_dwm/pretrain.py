"""`torchrun --nproc-per-node N -m megatron_dwm.pretrain CONFIG.yaml [--section.key value ...]`"""

from __future__ import annotations

import os
import sys
import time
import warnings

from megatron_dwm.config import UserError
from megatron_dwm.config.command_line import run_command
from megatron_dwm.config.load import exit_on_help, load_config

# torchrun ends the other processes as soon as one leaves; the others let the main one speak first.
_OTHERS_WAIT_S = 5.0


def main() -> None:
    """Train one run; see `--help` for every key."""
    exit_on_help(sys.argv[1:])
    try:
        config = load_config(sys.argv[1:])
        # Said by Megatron-Core on import, on every machine without these optional packages.
        warnings.filterwarnings("ignore", message=".*(Apex|apex) (is|are) not installed.*")
        from megatron_dwm.training.run import run  # noqa: PLC0415, after cheap mistakes are found

        run(config)
    except UserError:
        if os.environ.get("RANK", "0") == "0":
            raise
        time.sleep(_OTHERS_WAIT_S)
        sys.exit(2)


if __name__ == "__main__":
    run_command(main)
