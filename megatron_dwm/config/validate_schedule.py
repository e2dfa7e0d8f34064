"""Rules about the shares of prefixes by step (data.schedule)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from megatron_dwm.config.bounds import FACTOR
from megatron_dwm.config.paths import is_weight
from megatron_dwm.config.schema import Config


def schedule_problems(config: Config) -> Iterator[str]:
    """Yields a line for every rule that `data.schedule` breaks; nothing without a schedule."""
    schedule = config.data.schedule
    if not schedule:
        return
    prefixes = config.data.train
    if any(is_weight(entry) for entry in prefixes):
        yield (
            "data.schedule: expected data.train without weights, since the schedule has the "
            "shares; leave out one of the two"
        )
        return
    if len(set(prefixes)) < 2:
        yield f"data.schedule: expected several prefixes in data.train, got {len(set(prefixes))}"
    yield from _step_problems(list(schedule), config)
    for step, shares in schedule.items():
        yield from _share_problems(f"data.schedule {step}", shares, len(prefixes))
    yield from _unread(schedule.values(), prefixes)


def _step_problems(points: list[int], config: Config) -> Iterator[str]:
    steps, is_linear = config.training.steps, config.data.schedule_interpolation == "linear"
    if points[0] != 0:
        yield f"data.schedule: expected 0 as the first point, got {points[0]}"
    for before, point in zip(points, points[1:], strict=False):
        if point <= before:
            yield f"data.schedule: expected rising steps, got {point} after {before}"
    # On a line to the end of the run, every step has an effect of the last point.
    last = steps if is_linear else steps - 1
    if points[-1] > last:
        yield (
            f"data.schedule {points[-1]}: this point is beyond the run, expected at most {last} "
            f"(training.steps {steps}, data.schedule_interpolation "
            f"{config.data.schedule_interpolation})"
        )


def _share_problems(where: str, shares: Sequence[float], prefixes: int) -> Iterator[str]:
    if len(shares) != prefixes:
        yield (
            f"{where}: expected {prefixes} shares, one for each prefix of data.train, got "
            f"{len(shares)}"
        )
    for share in shares:
        if not FACTOR.allows(share):
            yield f"{where}: expected shares {FACTOR}, got {share}"
    if not any(shares):
        yield f"{where}: expected a share above 0, got only 0"


def _unread(points: Iterable[Sequence[float]], prefixes: Sequence[str | float]) -> Iterator[str]:
    for prefix, shares in zip(prefixes, zip(*points, strict=False), strict=False):
        if not any(shares):
            yield (
                f"data.schedule: {prefix} has the share 0 at every point; leave it out of "
                "data.train"
            )
