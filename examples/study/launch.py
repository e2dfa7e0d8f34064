"""Trains the runs of a study, several at a time, each after those that it needs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

import yaml

from examples.study.commands import environment
from examples.study.results import Results
from examples.study.spec import Run
from examples.study.workplace import Workplace, last_checkpoint
from megatron_dwm.config import RunError, UserError


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


def to_train(results: Results, runs: Iterable[Run]) -> list[Run]:
    """Returns the runs whose outcome is not known, each once and after those that it needs.

    A needed run is trained again if its outcome is known and its checkpoints are gone.
    """
    place, found = results.place, dict[str, Run]()
    for run in runs:
        if results.of(run) is None:
            needed = [each for each in place.study.needed(run) if not _is_there(place, each)]
            found.update({each.name: each for each in [*needed, run]})
    return list(found.values())


def _is_there(place: Workplace, run: Run) -> bool:
    """True if a run can be used by others: finished, as it is asked for, with its checkpoint."""
    directory = place.directory(run)
    finished = directory.is_dir() and place.is_as_asked(run) and is_finished(directory)
    return finished and last_checkpoint(directory) is not None


def train_all(results: Results, runs: Iterable[Run], jobs: int, *, on_gpus: bool = False) -> None:
    """Train every run whose outcome is not known, at most `jobs` at a time, and add its outcome.

    on_gpus: each of the runs that are trained at a time has a GPU of its own, by number.

    Raises RunError after all runs that could be made, if one failed.
    """
    place, waiting = results.place, to_train(results, runs)
    total, failed = len(waiting), set[str]()
    running: dict[Future[bool], Run] = {}
    trainer = _Trainer(place, jobs, on_gpus=on_gpus)
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            for run in _startable(waiting, running.values(), failed, jobs):
                waiting.remove(run)
                _say(f"{run.name} ({total - len(waiting)} of {total})")
                running[pool.submit(trainer.train, run)] = run
            waiting = [run for run in waiting if not failed & set(run.needs)]
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                run = running.pop(future)
                if future.result():
                    results.add(run)
                else:
                    failed.add(run.name)
    if failed:
        raise RunError(f"{len(failed)} runs failed; see above, and their .log files")


def _startable(
    waiting: Sequence[Run],
    running: Iterable[Run],
    failed: set[str],
    jobs: int,
) -> list[Run]:
    """Returns the first runs whose needs are met, as many as there is room for."""
    busy = len(list(running))
    unfinished = {run.name for run in (*waiting, *running)} | failed
    free = [run for run in waiting if not unfinished & set(run.needs)]
    return free[: max(jobs - busy, 0)]


class _Trainer:
    """Trains runs, each in a thread of its own."""

    def __init__(self, place: Workplace, jobs: int, *, on_gpus: bool) -> None:
        self._place = place
        self._making_data = Lock()
        self._gpus = SimpleQueue[int | None]()
        for number in range(jobs):
            self._gpus.put(number if on_gpus else None)

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
        if self._run(self._place.command(run, data), log):
            last = (log.read_text(encoding="utf-8").strip().splitlines() or ["no message"])[-1]
            return _failed(f"{run.name} failed: {last}")
        return True

    def _run(self, command: list[str], log: Path) -> int:
        gpu = self._gpus.get()
        try:
            with log.open("a", encoding="utf-8") as file:
                done = subprocess.run(command, env=environment(gpu), stdout=file, stderr=file)
        finally:
            self._gpus.put(gpu)
        return done.returncode


def _failed(text: str) -> bool:
    print(text, file=sys.stderr, flush=True)
    return False


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
