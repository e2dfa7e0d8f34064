"""Trains the runs of a study, several at a time, each after those that it needs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from signal import SIGTERM

from examples.study.results import Results
from examples.study.spec import Run
from examples.study.trainer import Trainer, is_finished
from examples.study.workplace import Workplace, last_checkpoint


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


def train_all(results: Results, runs: Iterable[Run], jobs: int, *, gpus: int | None = None) -> int:
    """Train every run whose outcome is not known, at most `jobs` at a time, and add its outcome.

    gpus: number of GPUs, over which the runs at a time are spread; None: all run on the CPU.
    SIGTERM stops the runs, each with a checkpoint, and then the study. Returns how many runs
    failed; runs that need one of them are not tried.
    """
    waiting = to_train(results, runs)
    total, failed = len(waiting), set[str]()
    running: dict[Future[bool], Run] = {}
    trainer = Trainer(results.place, jobs, gpus)
    with trainer.stopped_by_sigterm(), ThreadPoolExecutor(jobs) as pool:
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
                elif not trainer.stopped:
                    failed.add(run.name)
            waiting = [] if trainer.stopped else waiting
    if trainer.stopped:
        raise SystemExit(128 + SIGTERM)
    return len(failed)


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


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
