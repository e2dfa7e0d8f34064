"""A run's weights in a size that does not depend on their number: by time, domain and stage.

Only of the rows that the LLM trained on: samples that an update drew for itself are of other
batches. Computed in two passes of bounded memory. Quantiles come from a histogram with 64 bins for
every doubling of the weight, so they are within 0.6 % of the exact ones; means are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_dwm.report.curves import bin_edges, bin_of
from megatron_dwm.report.weight_stream import WeightFiles, codes, stream, trained_on

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_BINS_A_DOUBLING = 64
_LOWEST_EXPONENT, _HIGHEST_EXPONENT = -20, 16
_BINS = (_HIGHEST_EXPONENT - _LOWEST_EXPONENT) * _BINS_A_DOUBLING + 1  # bin 0: weight 0


@dataclass(frozen=True, kw_only=True)
class WeightSummary:
    """Weights in B bins of steps, D domains and S stages.

    step: mean of the recorded steps in each bin [B]; NaN where a bin is empty.
    domains, stages: names and numbers, in the order of the axes below.
    domain_sum, domain_count: sum of the weights, and how many [B, D]; both in proportion to the
        units' tokens, if those are their shares of a batch.
    stage_sum, stage_count: the same [S, D].
    last_steps: the last tenth of the recorded steps, at least one [L].
    last_sum, last_count: the same of these steps [D].
    not_finite: how many rows were left out because their weight is not a finite number.
    histogram: how many weights are in each bin of the weight [B, W].
    least, most: smallest and largest weight [B].
    """

    step: np.ndarray
    domains: tuple[str, ...]
    stages: tuple[int, ...]
    domain_sum: np.ndarray
    domain_count: np.ndarray
    stage_sum: np.ndarray
    stage_count: np.ndarray
    last_steps: np.ndarray
    last_sum: np.ndarray
    last_count: np.ndarray
    not_finite: int
    histogram: np.ndarray
    least: np.ndarray
    most: np.ndarray

    def mean_by_domain(self) -> np.ndarray:
        """Returns the mean weight [B, D]; NaN where there is no weight."""
        return _ratio(self.domain_sum, self.domain_count)

    def mean_by_stage(self) -> np.ndarray:
        """Returns the mean weight [S, D]; NaN where there is no weight."""
        return _ratio(self.stage_sum, self.stage_count)

    def quantiles(self) -> np.ndarray:
        """Returns the quantiles `QUANTILES` of each bin's weights [B, 5]; NaN in an empty bin."""
        total = self.histogram.sum(axis=1, keepdims=True)
        share = _ratio(np.cumsum(self.histogram, axis=1), total)
        found = np.stack([(share < q - 1e-12).sum(axis=1) for q in QUANTILES], axis=1)
        values = np.clip(_middle(found), self.least[:, None], self.most[:, None])
        return np.where(total > 0, values, np.nan)


def summarize(
    files: WeightFiles, max_bins: int, *, by_tokens: bool = False
) -> WeightSummary | None:
    """Returns the summary of a run's weights in at most so many bins of steps.

    by_tokens: means count a unit in proportion to its tokens, as those of a run do whose units are
        documents; quantiles count every unit.

    None if no row is of a sample that the LLM trained on. Raises `UserError` if a file is broken.
    """
    steps = _trained_steps(files)
    if not len(steps):
        return None
    edges = bin_edges(steps, max_bins)
    bins = len(edges) - 1
    last_steps = steps[-max(1, len(steps) // 10) :]
    counter = _Counter(bins)
    not_finite = 0
    columns = ("step", "stage", "source", "domain", "weight")
    for batch in stream(files, (*columns, "tokens") if by_tokens else columns):
        weight = batch["weight"].to_numpy().astype(np.float64)
        trained, finite = trained_on(batch), np.isfinite(weight)
        not_finite += int((trained & ~finite).sum())
        kept = trained & finite
        step = batch["step"].to_numpy()[kept]
        size = np.ones(len(kept))
        if by_tokens:
            size = batch["tokens"].fill_null(1).to_numpy().astype(np.float64)
        counter.add(
            bin_of(step, edges),
            batch["stage"].fill_null(1).to_numpy()[kept],
            codes(batch["domain"], counter.domains)[kept],
            weight[kept],
            size[kept],
            step >= last_steps[0],
        )
    number = bin_of(steps, edges)
    mean_step = _ratio(
        np.bincount(number, weights=steps, minlength=bins), np.bincount(number, minlength=bins)
    )
    return counter.summary(mean_step, last_steps, not_finite)


def _trained_steps(files: WeightFiles) -> np.ndarray:
    """Returns the sorted steps with rows of samples that the LLM trained on."""
    found = np.empty(0, np.int64)
    for batch in stream(files, ("step", "source")):
        found = np.union1d(found, np.unique(batch["step"].to_numpy()[trained_on(batch)]))
    return found


class _Counter:
    """Adds up batches of weights."""

    def __init__(self, bins: int) -> None:
        self.bins = bins
        self.domains: dict[str, int] = {}
        self._stages: dict[int, int] = {}
        self._by_bin = np.zeros((2, bins, 0))
        self._by_stage = np.zeros((2, 0, 0))
        self._last = np.zeros((2, 2, 0))  # of the last steps, and of the others
        self._histogram = np.zeros((bins, _BINS), np.int64)
        self._least, self._most = np.full(bins, np.inf), np.full(bins, -np.inf)

    def add(
        self,
        bin: np.ndarray,
        stage: np.ndarray,
        domain: np.ndarray,
        weight: np.ndarray,
        size: np.ndarray,
        last: np.ndarray,
    ) -> None:
        """Add rows: bin, stage, number of the domain, weight, its share, is it of the last [N]."""
        present, inverse = np.unique(stage, return_inverse=True)
        rows = [self._stages.setdefault(int(s), len(self._stages)) for s in present]
        self._by_bin = self._sums(self._by_bin, bin, domain, weight, size)
        self._by_stage = self._sums(
            self._by_stage, np.array(rows, np.int64)[inverse], domain, weight, size
        )
        self._last = self._sums(self._last, 1 - last.astype(np.int64), domain, weight, size)
        cells = bin * _BINS + _weight_bin(weight)
        count = self.bins * _BINS
        self._histogram += np.bincount(cells, minlength=count).reshape(self.bins, _BINS)
        np.minimum.at(self._least, bin, weight)
        np.maximum.at(self._most, bin, weight)

    def _sums(
        self,
        so_far: np.ndarray,
        row: np.ndarray,
        domain: np.ndarray,
        weight: np.ndarray,
        size: np.ndarray,
    ) -> np.ndarray:
        """Returns sums and counts [2, R, D] with these rows added; R and D grow as needed."""
        shape = (max(so_far.shape[1], int(row.max(initial=-1)) + 1), len(self.domains))
        cells, count = row * shape[1] + domain, shape[0] * shape[1]
        total = np.stack(
            [
                np.bincount(cells, weights=of_row, minlength=count)
                for of_row in (weight * size, size)
            ]
        ).reshape(2, *shape)
        total[:, : so_far.shape[1], : so_far.shape[2]] += so_far
        return total

    def summary(self, step: np.ndarray, last_steps: np.ndarray, not_finite: int) -> WeightSummary:
        """Returns what was added, with domains (those that have rows) and stages sorted."""
        count = self._by_bin[1].sum(axis=0)
        names = sorted(name for name, at in self.domains.items() if at < len(count) and count[at])
        stages = sorted(self._stages)
        columns = [self.domains[name] for name in names]
        rows = [self._stages[stage] for stage in stages]
        return WeightSummary(
            step=step,
            domains=tuple(names),
            stages=tuple(stages),
            domain_sum=self._by_bin[0][:, columns],
            domain_count=self._by_bin[1][:, columns],
            stage_sum=self._by_stage[0][rows][:, columns],
            stage_count=self._by_stage[1][rows][:, columns],
            last_steps=last_steps,
            last_sum=self._last[0][0][columns],
            last_count=self._last[1][0][columns],
            not_finite=not_finite,
            histogram=self._histogram,
            least=self._least,
            most=self._most,
        )


def _weight_bin(weight: np.ndarray) -> np.ndarray:
    """Returns the number of each weight's bin of the histogram."""
    with np.errstate(divide="ignore", invalid="ignore"):
        exponent = (np.log2(weight) - _LOWEST_EXPONENT) * _BINS_A_DOUBLING
    number = np.nan_to_num(np.floor(exponent), nan=-1, neginf=-1, posinf=_BINS)
    return np.clip(number + 1, 0, _BINS - 1).astype(np.int64)


def _middle(bins: np.ndarray) -> np.ndarray:
    """Returns the weight in the middle of each bin of the histogram."""
    exponent = (bins - 0.5) / _BINS_A_DOUBLING + _LOWEST_EXPONENT
    return np.where(bins == 0, 0.0, 2.0**exponent)


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return sums / np.where(counts > 0, counts, np.nan)
