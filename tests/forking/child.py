"""A Python command line in a process that has been forked with everything imported already.

`run(order)` does what `python COMMAND` does from its first line to its end: arguments, `sys.path`,
`__main__`, what an exception or `sys.exit` becomes, threads that are waited for, what was
registered for the end. What it cannot give is in a fresh interpreter only: modules that nobody has
imported yet, with what they say while they are imported, another hash seed, and options of the
interpreter itself. tests/forking/test_forking.py holds one against the other.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import runpy
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_INTERRUPTED = -signal.SIGINT


def enter(order: dict[str, Any], parent: int) -> None:
    """Become a process of its own: session, environment, directory, standard streams."""
    os.setsid()
    _die_with(parent)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["cwd"])
    _redirect(0, os.devnull, os.O_RDONLY)
    _redirect(1, order["stdout"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    _redirect(2, order["stderr"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def become_fresh(command: list[str]) -> NoReturn:
    """A fresh interpreter in this process."""
    os.execv(sys.executable, [sys.executable, *command])


def run(command: list[str]) -> NoReturn:
    """Run `-m MODULE ARGUMENTS` or `SCRIPT ARGUMENTS` and end."""
    # Forks would draw alike; Python's own generator sees to that itself.
    np.random.seed()
    torch.default_generator.seed()
    if os.environ.get("PYTHONWARNINGS") == "ignore":
        warnings.simplefilter("ignore")
    code = _exit_code(command)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code == _INTERRUPTED:  # the parent shall see the signal
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)


def _exit_code(command: list[str]) -> int:
    """What the interpreter makes of the command's end."""
    try:
        _call(command)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        return _INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _call(command: list[str]) -> None:
    first, *arguments = command
    if first == "-m":
        module, *arguments = arguments
        sys.argv, sys.path[0] = ["-m", *arguments], str(Path.cwd())
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [first, *arguments], str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


def _redirect(number: int, path: str, flags: int) -> None:
    opened = os.open(path, flags, 0o600)
    os.dup2(opened, number)
    os.close(opened)


def _die_with(parent: int) -> None:
    """Ask the kernel for SIGKILL when the parent ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
