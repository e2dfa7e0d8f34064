"""Trains single runs of a study."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

import yaml

from examples.study.commands import environment
from examples.study.spec import Run
from examples.study.workplace import Workplace, last_checkpoint
from megatron_dwm.config import UserError


def is_finished(directory: Path) -> bool:
    """True if a run has made its last step and its last evaluation."""
    metrics, config = directory / "metrics.jsonl", directory / "config.yaml"
    if not (metrics.is_file() and config.is_file()):
        return False
    steps = yaml.safe_load(config.read_text(encoding="utf-8"))["training"]["steps"]
    last = metrics.read_text(encoding="utf-8").splitlines()[-1:]
    try:
        return bool(last) and json.loads(last[0])["step"] == steps == _evaluated(metrics)
    except ValueError:  # cut short by a kill
        return False


def _evaluated(metrics: Path) -> int | None:
    lines = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
    steps = [line["step"] for line in lines if line["phase"] == "evaluation"]
    return steps[-1] if steps else None


class Trainer:
    """Trains runs, each in a thread of its own."""

    def __init__(self, place: Workplace, jobs: int, gpus: int | None) -> None:
        """Set what is trained, how many at a time, and on how many GPUs."""
        self._place = place
        self._making_data = Lock()
        self._gpus = SimpleQueue[int | None]()
        for number in range(jobs):
            self._gpus.put(number % gpus if gpus else None)
        self._running: list[subprocess.Popen[bytes]] = []
        self.stopped = False

    @contextmanager
    def stopped_by_sigterm(self) -> Iterator[None]:
        """Pass SIGTERM on to the runs, which write a checkpoint and end."""
        before = signal.signal(signal.SIGTERM, self._stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def train(self, run: Run) -> bool:
        """Train a run to its end; False if it failed, with its last line on stderr."""
        directory = self._place.directory(run)
        if not self._place.is_as_asked(run):
            advice = "it was started with other settings; move it away, or name another WORKDIR"
            return _failed(f"{directory}: {advice}")
        if is_finished(directory) and last_checkpoint(directory) is not None:
            return True
        try:
            with self._making_data:
                data = self._place.data(run).prepare()
        except UserError as error:
            return _failed(f"{run.name} has no data: {error}")
        log = directory.with_name(f"{directory.name}.log")
        begin = log.stat().st_size if log.exists() else 0
        failed = self._run(self._place.command(run, data), log) != 0
        if self.stopped:
            return is_finished(directory)
        return not failed or _failed(f"{run.name} failed: {_reason(log, begin)}; see {log}")

    def _run(self, command: list[str], log: Path) -> int:
        gpu = self._gpus.get()
        try:
            with log.open("ab") as file:
                run = subprocess.Popen(command, env=environment(gpu), stdout=file, stderr=file)
            self._running.append(run)
            if self.stopped:
                run.terminate()
            return run.wait()
        finally:
            self._gpus.put(gpu)

    def _stop(self, *_: object) -> None:
        self.stopped = True
        for run in self._running:
            if run.poll() is None:
                run.terminate()


def _reason(log: Path, begin: int) -> str:
    """Returns the error that a run wrote after `begin` bytes of its log, or its last line."""
    lines = log.read_bytes()[begin:].decode("utf-8", "replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no message"])[-1].removeprefix("error: ")


def _failed(text: str) -> bool:
    print(text, file=sys.stderr, flush=True)
    return False
