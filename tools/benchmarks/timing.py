"""Times of several things taken in turn, so that a busy machine slows all of them equally."""

from __future__ import annotations

import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from megatron_dwm.runtime import Runtime

# One run of a contestant: seconds by the name of what was timed.
Contestant = Callable[[], dict[str, float]]
_LINES = 4
_ORDER_SEED = 0
# Of a normal sample: sqrt(pi / 2) standard errors of the mean, 1.349 deviations between quartiles.
_ERROR_OF_MEDIAN = math.sqrt(math.pi / 2) / 1.349


@dataclass(frozen=True)
class Ratio:
    """One thing's time over another's, round by round.

    median, low, high: of the ratios of the rounds, with their quartiles.
    error: standard error of that median, from the quartiles as if the ratios were normal.
    of_fastest: the fastest round of the one over the fastest of the other; other programs can
        only ever slow a round down.
    """

    median: float
    error: float
    low: float
    high: float
    of_fastest: float


class Clock:
    """Measures wall-clock seconds between laps; waits for the device first."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last_s = self._now_s()

    def lap(self) -> float:
        """Returns the seconds since the last lap."""
        before_s, self._last_s = self._last_s, self._now_s()
        return self._last_s - before_s

    def _now_s(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def timed(name: str, call: Callable[[], object], runtime: Runtime) -> Contestant:
    """Returns `call` as a contestant, which all processes begin together."""

    def run() -> dict[str, float]:
        runtime.barrier()
        clock = Clock(runtime.device)
        call()
        return {name: clock.lap()}

    return run


def alternate(
    contestants: list[Contestant], *, repeats: int, warm_up: int, shown: bool
) -> dict[str, list[float]]:
    """Returns the seconds of every name in every counted round.

    The order is drawn anew for every round, because what ran before has filled the caches; every
    process draws the same.
    """
    times_s: dict[str, list[float]] = {}
    order = random.Random(_ORDER_SEED)
    for number in _rounds(repeats + warm_up, shown):
        for contestant in order.sample(contestants, len(contestants)):
            for name, seconds in contestant().items():
                if number >= warm_up:
                    times_s.setdefault(name, []).append(seconds)
    return times_s


def ratio(times_s: Sequence[float], base_s: Sequence[float]) -> Ratio:
    """Returns the ratio of two lists of the rounds' times, in the same order."""
    ratios = sorted(a / b for a, b in zip(times_s, base_s, strict=True))
    low, high = _quartiles(ratios)
    error = _ERROR_OF_MEDIAN * (high - low) / math.sqrt(len(ratios))
    return Ratio(statistics.median(ratios), error, low, high, min(times_s) / min(base_s))


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _rounds(count: int, shown: bool) -> Iterator[int]:
    """Yields 0 to count - 1, with a bar on a terminal and a few plain lines elsewhere."""
    interactive = shown and sys.stderr.isatty()
    every = max(1, count // _LINES)
    for number in tqdm(range(count), unit="round", disable=not interactive):
        yield number
        if shown and not interactive and (number + 1) % every == 0:
            print(f"round {number + 1}/{count}", file=sys.stderr, flush=True)
