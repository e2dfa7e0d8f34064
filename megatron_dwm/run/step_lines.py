"""Lines of metrics.jsonl whose weight statistics are still on the device.

Reading a statistic makes the host wait for the device, so lines are written together, once every
`logging.metrics_interval_steps` steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_dwm.run.files import RunFiles
from megatron_dwm.run.health import Health
from megatron_dwm.run.records import STATISTICS, weight_statistics
from megatron_dwm.runtime import Runtime
from megatron_dwm.training import OwnUpdateResult, UpdateResult
from megatron_dwm.training.weighed_units import WeighedUnits


@dataclass(frozen=True, kw_only=True)
class _Line:
    before: dict[str, Any]
    statistics: Tensor
    more: dict[str, Tensor]
    after: dict[str, Any]


class StepLines:
    """The lines of steps that are not written yet."""

    def __init__(self, health: Health, files: RunFiles | None) -> None:
        self._health, self._files = health, files
        self._waiting: list[_Line] = []

    def add(
        self,
        before: dict[str, Any],
        statistics: Tensor,
        after: dict[str, Any],
        *,
        more: dict[str, Tensor],
    ) -> None:
        """Keep a line with `weight_statistics`, and `more` of them, between its other keys."""
        self._waiting.append(_Line(before=before, statistics=statistics, more=more, after=after))

    def write(self) -> None:
        """Write the lines; waits for the device."""
        waiting, self._waiting = self._waiting, []
        for line in waiting:
            statistics = named_statistics(line.statistics)
            self._health.effective_sample_size(statistics["weight_effective_sample_size"])
            if self._files is not None:
                more = {name: float(value) for name, value in line.more.items()}
                self._files.write({**line.before, **statistics, **more, **line.after})

    def drop(self) -> None:
        """Drop the lines."""
        self._waiting = []


def batch_statistics(units: WeighedUnits, runtime: Runtime) -> Tensor:
    """Returns `weight_statistics` of the global batch, on the device (collective)."""
    weights_n = units.gather(units.weights_n, runtime)
    return weight_statistics(weights_n, units.gathered_sizes(runtime))


def update_values(
    result: UpdateResult | OwnUpdateResult, alignment_n: Tensor | None
) -> dict[str, float | None]:
    """Returns what a line says about an update, but its weights.

    alignment_n: alignments of the global batch, NaN if not known; None if the update computed none.
    """
    if isinstance(result, OwnUpdateResult):
        return {
            "loss": result.train_loss,
            "val_loss": result.val_loss,
            "weighting_grad_norm": result.grad_norm,
        }
    assert alignment_n is not None
    known_n = alignment_n[~alignment_n.isnan()]
    grad_norm = result.hypergradient.grad_norm
    return {
        "loss": result.train_loss,
        "val_loss": result.hypergradient.val_loss,
        **({} if grad_norm is None else {"grad_norm": grad_norm}),
        "weighting_grad_norm": result.update.grad_norm,
        "weighting_gradient_cosine": result.update.cosine,
        "alignment_mean": float(known_n.mean()),
        "alignment_std": float(known_n.std(correction=0)),
        **({} if result.noise is None else result.noise.columns()),
    }


def named_statistics(statistics: Tensor) -> dict[str, float]:
    """Returns the values of `weight_statistics` by name; waits for the device."""
    return dict(zip(STATISTICS, statistics.tolist(), strict=True))
