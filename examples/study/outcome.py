"""What a finished run reached, in a size that can be kept: one line of a study's results."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from megatron_dwm.report.run_files import read_metrics
from megatron_dwm.report.weight_stream import weight_files
from megatron_dwm.report.weight_summary import summarize

_POINTS = 10
_DIGITS = 5

Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Values at some steps of a run: by domain, at each of them."""

    step: Sequence[float]
    flops: Sequence[float]
    by_domain: Mapping[str, Sequence[float | None]]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished run.

    run: its name. settings: fingerprint of what was asked for (workplace.py). commit: of the code.
    losses: held-out losses, nats per token, at ten evaluations; the last is after the last step.
    weights: mean weight of the training samples in ten parts of the run. flops: of the whole run;
    flops_updates: the part of updates. seconds: of its loop. sample_size: mean effective sample
    size of the last fifth of the steps. signal_to_noise: median over the updates that measured it.
    """

    run: str
    settings: str
    commit: str
    losses: Curve
    weights: Curve
    flops: float
    flops_updates: float
    seconds: float
    sample_size: float
    signal_to_noise: float | None

    def last_losses(self) -> dict[str, float]:
        """Returns the losses after the last step, by domain."""
        return _last(self.losses)

    def line(self) -> str:
        """Returns the line of a file of results."""
        return json.dumps(_rounded(asdict(self)))

    @staticmethod
    def of_line(line: str) -> Outcome:
        """Returns what a line says. Raises ValueError, TypeError or KeyError if it is another."""
        found = json.loads(line)
        numbers = [found[key] for key in ("flops", "flops_updates", "seconds", "sample_size")]
        curves = [found[key] for key in ("losses", "weights")]
        numbers += [value for curve in curves for key in ("step", "flops") for value in curve[key]]
        if not all(isinstance(value, int | float) for value in numbers):
            raise ValueError("no number")
        losses, weights = (Curve(**found.pop(name)) for name in ("losses", "weights"))
        return Outcome(**found, losses=losses, weights=weights)


def read_outcome(directory: Path, run: str, settings: str) -> Outcome:
    """Returns the outcome of a finished run."""
    lines = read_metrics(directory)
    steps = [line for line in lines if line["phase"] == "train"]
    last = steps[-max(len(steps) // 5, 1) :]
    ratios = [line["alignment_signal_to_noise"] for line in lines if _has_ratio(line)]
    starts = (directory / "starts.jsonl").read_text(encoding="utf-8").splitlines()
    return Outcome(
        run=run,
        settings=settings,
        commit=json.loads(starts[-1]).get("commit") or "unknown",
        losses=_losses([line for line in lines if line["phase"] == "evaluation"]),
        weights=_weights(directory, steps),
        flops=lines[-1]["flops"],
        flops_updates=lines[-1]["flops_updates"],
        seconds=lines[-1]["seconds"],
        sample_size=mean(line["weight_effective_sample_size"] for line in last),
        signal_to_noise=median(ratios) if ratios else None,
    )


def _has_ratio(line: Mapping[str, Any]) -> bool:
    return line.get("alignment_signal_to_noise") is not None


def _losses(evaluations: Lines) -> Curve:
    every = max(len(evaluations) // _POINTS, 1)
    chosen = evaluations[::-every][::-1]
    return Curve(
        step=[line["step"] for line in chosen],
        flops=[line["flops"] for line in chosen],
        by_domain={
            name: [line["domain_loss"][name] for line in chosen]
            for name in chosen[-1]["domain_loss"]
        },
    )


def _weights(directory: Path, steps: Lines) -> Curve:
    """Returns the mean weights of the samples that the LLM trained on."""
    summary = summarize(weight_files(directory), _POINTS)
    if summary is None:
        return Curve(step=[], flops=[], by_domain={})
    flops = {line["step"]: line["flops"] for line in steps}
    means = summary.mean_by_domain()
    return Curve(
        step=summary.step.tolist(),
        flops=[flops[int(step)] for step in summary.step],
        by_domain={
            name: [None if math.isnan(value) else value for value in means[:, i].tolist()]
            for i, name in enumerate(summary.domains)
        },
    )


def _last(curve: Curve) -> dict[str, float]:
    last = {name: values[-1] for name, values in curve.by_domain.items()}
    return {name: value for name, value in last.items() if value is not None}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(part) for part in value]
    if isinstance(value, float):
        return round(value, _DIGITS) if abs(value) < 1e6 else float(f"{value:.6g}")
    return value
