"""The process that forks: it imports once what the tests' processes need, for some seconds.

    python -m tests.forking.server MODULE ...     imports the modules that there are, then reads one
                                                  JSON order a line and answers with one JSON line

    {"command": [...], "environment": {...}, "cwd": ..., "stdout": ..., "stderr": ..., "fresh": ...}
                                                  ->  pid
    {"wait": [pid, ...], "limit_s": ...}          ->  {"codes": [...], "over": past the limit?}

It has no process group, no threads of its own and computes nothing, so that a fork of it is like a
fresh interpreter. It ends, with all that it has started, when its input ends.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import sys
import time
import warnings
from typing import Any

# Torchrun, too, ends the others when one fails; these may be about to say the same.
GRACE_S = 0.5
_POLL_S = 0.005


class _Children:
    """The processes that nothing has waited for."""

    def __init__(self) -> None:
        self._running: set[int] = set()

    def add(self, pid: int) -> None:
        self._running.add(pid)

    def wait(self, pids: list[int], limit_s: float) -> dict[str, Any]:
        """Wait for them; kills the rest if one fails, if time is over or if nobody listens."""
        codes: dict[int, int] = {}
        deadline, over = time.monotonic() + limit_s, False
        while len(codes) < len(pids):
            self._reap([pid for pid in pids if pid not in codes], codes)
            if not over and any(codes.values()):
                deadline = min(deadline, time.monotonic() + GRACE_S)
            if time.monotonic() > deadline or _nobody_listens():
                over = over or not any(codes.values())
                self.kill([pid for pid in pids if pid not in codes])
            time.sleep(_POLL_S)
        return {"codes": [codes[pid] for pid in pids], "over": over}

    def kill(self, pids: list[int] | None = None) -> None:
        """Kill processes together with those that they have started."""
        for pid in self._running if pids is None else pids:
            for kill in (os.killpg, os.kill):  # the group is not there yet just after the fork
                try:
                    kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def _reap(self, pids: list[int], codes: dict[int, int]) -> None:
        for pid in pids:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
                self._running.discard(pid)


def _nobody_listens() -> bool:
    poll = select.poll()
    poll.register(0, select.POLLHUP)
    return any(event & select.POLLHUP for _, event in poll.poll(0))


def _forks() -> bool:
    """True if a fork of this process can use what is imported.

    A GPU's context does not outlive a fork, and other systems' libraries may not either: there,
    every process is a fresh interpreter.
    """
    import torch

    return sys.platform == "linux" and not torch.cuda.is_available()


def _preload(modules: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in ("tests.forking.child", *modules):
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(module)
    gc.collect()
    gc.freeze()  # collections in the children leave these pages alone, and shared


def _serve(answers: int) -> dict[str, Any] | None:
    """Execute orders until the input ends. Returns the order in a forked child, else None."""
    children, server = _Children(), os.getpid()
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer: Any = children.wait(order["wait"], order["limit_s"])
        else:
            answer = os.fork()
            if answer == 0:
                os.close(answers)
                return {**order, "parent": server}
            children.add(answer)
        try:
            os.write(answers, (json.dumps(answer) + "\n").encode())
        except BrokenPipeError:
            break
    children.kill()
    return None


def _main() -> None:
    # The output of a module on import is no answer.
    answers = os.dup(1)
    os.dup2(2, 1)
    _preload(sys.argv[1:])
    forks = _forks()
    order = _serve(answers)
    if order is not None:
        from tests.forking import child

        child.enter(order, order["parent"])
        begin = child.run if forks and not order["fresh"] else child.become_fresh
        begin(order["command"])


if __name__ == "__main__":
    _main()
