"""A program that prints what it sees of its process, and then ends in one of many ways.

python tests/forking/program.py HOW       prints what it sees as JSON, then ends in that way
"""

from __future__ import annotations

import atexit
import json
import os
import random
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGUSR1, signal.SIGCHLD)


def seen() -> dict[str, object]:
    """Returns the state of the process, without the parts that differ in every process."""
    umask = os.umask(0)
    os.umask(umask)
    return {
        "argv": sys.argv,
        "path[0]": sys.path[0],
        "cwd": str(Path.cwd()),
        "environment": {k: v for k, v in os.environ.items() if k.startswith("TEST_")},
        "main": sys.modules["__main__"].__dict__ is globals(),
        "file": __file__,
        "umask": umask,
        "signals": [str(signal.getsignal(number)) for number in SIGNALS],
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "input": sys.stdin.read(),
        "streams": [(s.encoding, s.errors, s.line_buffering) for s in (sys.stdout, sys.stderr)],
        "filters": [(entry[0], entry[2].__name__) for entry in warnings.filters],
    }


def seen_of_torch() -> dict[str, object]:
    """Returns the state of the libraries."""
    import torch
    from megatron.core import parallel_state

    return {
        "threads": [torch.get_num_threads(), threading.active_count()],
        "default": [str(torch.get_default_dtype()), torch.is_grad_enabled()],
        "groups": [torch.distributed.is_initialized(), parallel_state.is_initialized()],
    }


def _draws() -> list[float]:
    import numpy as np
    import torch

    return [random.random(), np.random.random(), float(torch.rand(()))]


def _speak_late() -> None:
    time.sleep(0.2)
    print("a thread")


ENDS = {
    "by itself": lambda: None,
    "0": lambda: sys.exit(0),
    "3": lambda: sys.exit(3),
    "259": lambda: sys.exit(259),
    "-1": lambda: sys.exit(-1),
    "words": lambda: sys.exit("words at the end"),
    "nothing": lambda: sys.exit(),
    "error": lambda: [][0],
    "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT) or time.sleep(10),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(10),
    "at once": lambda: os._exit(7),
    "warning": lambda: warnings.warn("beware", stacklevel=1),
    "modules": lambda: print("torch" in sys.modules),
    "torch": lambda: print(json.dumps(seen_of_torch())),
    "draws": lambda: print(json.dumps(_draws())),
    "rank 0 fails": lambda: sys.exit(5) if os.environ["RANK"] == "0" else time.sleep(60),
    "sleep": lambda: time.sleep(60),
}


def _main() -> None:
    how = sys.argv[1]
    print(json.dumps(seen()), flush=how == "sleep")
    atexit.register(print, "at exit")
    if how not in ("sleep", "torch"):
        threading.Thread(target=_speak_late).start()
    ENDS[how]()


if __name__ == "__main__":
    _main()
