"""The learning rate of every step of a run, from metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class LearningRates:
    """Learning rates of T steps, sorted by step; at least one."""

    step_T: np.ndarray
    rate_T: np.ndarray

    @staticmethod
    def of(lines: Iterable[Mapping[str, Any]]) -> LearningRates | None:
        """Collect them from lines of metrics.jsonl; None if no line has one."""
        found = {
            line["step"]: line["lr"]
            for line in lines
            if line.get("phase") == "train" and isinstance(line.get("lr"), float | int)
        }
        if not found:
            return None
        steps = sorted(found)
        rates = np.array([found[step] for step in steps], dtype=np.float64)
        return LearningRates(step_T=np.array(steps, dtype=np.int64), rate_T=rates)

    def at(self, step_R: np.ndarray) -> np.ndarray:
        """The rate of each of these steps; of one without a line (skipped), that of the next line,
        and beyond the last line, that of the last.
        """
        found = np.searchsorted(self.step_T, step_R)
        return self.rate_T[np.minimum(found, len(self.step_T) - 1)]
