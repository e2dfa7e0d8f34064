"""Every document alike: the baseline of every other selection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_dwm.selection.choice import Scores
from megatron_dwm.selection.pool import Pool
from megatron_dwm.selection.select import Progress


class UniformScores:
    """`select_data.py random`: documents with tokens, all with the same probability."""

    name = "random"

    def options(self) -> dict[str, Any]:
        """There are none."""
        return {}

    def scores(self, pool: Pool, progress: Progress, scratch: Path) -> Scores:  # noqa: ARG002
        """The same score for all."""
        return Scores(
            values_D=np.zeros(pool.num_documents),
            eligible_D=pool.tokens_D > 0,
            eligible_words="all documents",
        )
