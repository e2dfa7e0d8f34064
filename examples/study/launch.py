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

import yaml

from examples.study.commands import environment
from examples.study.results import Results
from examples.study.spec import Run
from examples.study.workplace import Workplace
from megatron_dwm.config import RunError


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
            needed = [n for n in place.study.needed(run) if not is_finished(place.directory(n))]
            found.update({each.name: each for each in [*needed, run]})
    return list(found.values())


def train_all(results: Results, runs: Iterable[Run], jobs: int, *, on_gpus: bool = False) -> None:
    """Train every run whose outcome is not known, at most `jobs` at a time, and add its outcome.

    on_gpus: each of the runs that are trained at a time has a GPU of its own, by number.

    Raises RunError after all runs that could be made, if one failed.
    """
    place, waiting = results.place, to_train(results, runs)
    total, failed = len(waiting), set[str]()
    running: dict[Future[bool], Run] = {}
    free = SimpleQueue[int | None]()
    for number in range(jobs):
        free.put(number if on_gpus else None)
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            for run in _startable(waiting, running.values(), failed, jobs):
                waiting.remove(run)
                _say(f"{run.name} ({total - len(waiting)} of {total})")
                data = place.prepare_data(run)
                running[pool.submit(_train, place, run, data, free)] = run
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


def _train(place: Workplace, run: Run, data: Path, free: SimpleQueue[int | None]) -> bool:
    """Train a run to its end; False if it failed, with its last line on stderr."""
    directory = place.directory(run)
    if not place.is_as_asked(run):
        advice = "it was started with other settings; move it away, or name another WORKDIR"
        print(f"{directory}: {advice}", file=sys.stderr, flush=True)
        return False
    if is_finished(directory):
        return True
    log = directory.with_name(f"{directory.name}.log")
    command, gpu = place.command(run, data), free.get()
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(command, env=environment(gpu), stdout=file, stderr=file)
    free.put(gpu)
    if done.returncode:
        last = (log.read_text(encoding="utf-8").strip().splitlines() or ["no message"])[-1]
        print(f"{run.name} failed: {last}", file=sys.stderr, flush=True)
    return done.returncode == 0


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
