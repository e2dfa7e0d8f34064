"""Rules about profiling."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_dwm.config.schema import Config


def profiling_problems(config: Config, world_size: int) -> Iterator[str]:
    """Yields a line for every rule that the run breaks. world_size: number of processes."""
    profiling, steps = config.profiling, config.training.steps
    if profiling.tool == "none":
        return
    if not 1 <= profiling.first_step <= profiling.last_step:
        yield (
            "profiling.first_step, profiling.last_step: expected 1 or more and not falling, got "
            f"{profiling.first_step} and {profiling.last_step}"
        )
    if profiling.first_step > steps:
        yield (
            f"profiling.first_step {profiling.first_step}: expected at most training.steps, "
            f"which is {steps}"
        )
    if not profiling.ranks or not all(0 <= rank < world_size for rank in profiling.ranks):
        yield (
            f"profiling.ranks {profiling.ranks}: expected a list of ranks from 0 to "
            f"{world_size - 1}, such as [0]"
        )
