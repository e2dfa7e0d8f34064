"""Runs a Python command line in a forked process that has its imports already.

`run(command)` does what `python COMMAND` does: arguments, `sys.path`, `__main__`, the exit code of
an exception or `sys.exit`, waiting for threads, and functions registered for the end. Only a fresh
interpreter has modules that are not imported yet, with their output on import, another hash seed,
and options of the interpreter itself. tests/forking/test_forking.py compares the two.
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
    """Give this process its own session, environment, directory and standard streams."""
    os.setsid()
    _die_with(parent)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["cwd"])
    _redirect(0, os.devnull, os.O_RDONLY)
    _redirect(1, order["stdout"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    _redirect(2, order["stderr"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def become_fresh(command: list[str]) -> NoReturn:
    """Replace this process by a fresh interpreter."""
    os.execv(sys.executable, [sys.executable, *command])


def run(command: list[str]) -> NoReturn:
    """Run `-m MODULE ARGUMENTS` or `SCRIPT ARGUMENTS` and end."""
    # Forks would draw the same numbers; Python reseeds its own generator, numpy and torch do not.
    np.random.seed()
    torch.default_generator.seed()
    if os.environ.get("PYTHONWARNINGS") == "ignore":
        warnings.simplefilter("ignore")
    code = _exit_code(command)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code == _INTERRUPTED:  # so that the parent sees the signal
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)


def _exit_code(command: list[str]) -> int:
    """Run the command; returns the exit code that the interpreter would return."""
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
