"""The files of a run that it restores if somebody removes them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_dwm.config import Config
from megatron_dwm.config.load import save_config
from megatron_dwm.data import Origins
from megatron_dwm.run.records import MetricsWriter, WeightRecorder
from megatron_dwm.run.token_records import TokenRecorder


class RunFiles:
    """metrics.jsonl, weights/, token_weights/ and config.yaml of a run directory (main process)."""

    def __init__(self, run_dir: Path, config: Config, warn: Callable[[str], None]) -> None:
        self._run_dir, self._config, self._warn = run_dir, config, warn
        self._identity = run_dir.stat()
        self.metrics = MetricsWriter(run_dir, config, warn)
        self._weights = WeightRecorder(run_dir)
        self.tokens = TokenRecorder(run_dir)
        self._warned_of_removal = False
        weighting = config.weighting
        self._by_tokens = weighting.unit == "document" and weighting.unit_share == "tokens"

    def add_weights(
        self,
        step: int,
        stage: int,
        origins: Origins,
        losses_n: Tensor,
        weights_n: Tensor,
        alignment_n: Tensor | None,
    ) -> None:
        """Keep the weights of a global batch, and show their distribution."""
        self._weights.add(step, stage, origins, losses_n, weights_n, alignment_n)
        self.metrics.histogram(step, "train/weight", weights_n)
        if "update" not in origins.numberings:  # which are not the weights that the LLM trains with
            means = _mean_by_domain(origins, weights_n, by_tokens=self._by_tokens)
            self.curves(step, {f"train/weight_by_domain/{name}": m for name, m in means.items()})

    def curves(self, step: int, curves: Mapping[str, float]) -> None:
        """Give the boards values that are not in metrics.jsonl."""
        self.metrics.curves("step", step, curves)

    def flush(self, updates: int) -> None:
        """Write the weights since the last call. Raises OSError; they are then still kept."""
        for records in (self._weights.records, self.tokens.records):
            records.flush(updates)

    def forget(self) -> None:
        """Drop the weights that were not written yet."""
        for records in (self._weights.records, self.tokens.records):
            records.forget()

    def write(self, line: dict[str, Any]) -> None:
        """Write a line of metrics.jsonl.

        First restores metrics.jsonl and config.yaml if they were removed, since without them the
        run cannot be resumed or read. If the directory itself was removed or replaced, the run ends
        instead (runtime/stop.py).
        """
        self._restore()
        self.metrics.write(line)

    def _restore(self) -> None:
        config = self._run_dir / "config.yaml"
        try:
            if not os.path.samestat(self._run_dir.stat(), self._identity):
                return
            self.metrics.restore()
            if not config.is_file():
                save_config(self._config, config)
                self._warn(f"{config} was removed: it is written again")
        except FileNotFoundError:
            return
        except OSError as error:
            if not self._warned_of_removal:
                self._warned_of_removal = True
                self._warn(
                    f"metrics.jsonl or config.yaml was removed from {self._run_dir} and cannot be "
                    f"written again: {error.strerror}"
                )


def _mean_by_domain(origins: Origins, weights_n: Tensor, *, by_tokens: bool) -> dict[str, float]:
    """Returns mean weights; by_tokens: units count in proportion to their tokens."""
    sizes = origins.tokens_U.tolist() if by_tokens else [1] * len(weights_n)
    totals: dict[str, float] = defaultdict(float)
    weighted: dict[str, float] = defaultdict(float)
    for domain, size, weight in zip(origins.domains, sizes, weights_n.tolist(), strict=True):
        totals[domain] += size
        weighted[domain] += size * weight
    return {
        domain: weighted[domain] / totals[domain] for domain in sorted(totals) if totals[domain]
    }
