"""Files in the form of a run's, with plausible numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

DOMAINS = ("arxiv", "books", "c4", "code", "junk", "sotu", "web", "wikipedia")
PULL = dict(zip(DOMAINS, (-0.3, 0.9, 0.02, -0.5, -1.6, 0.3, 0.05, -0.02), strict=True))


def write_run(
    folder: Path,
    *,
    steps: int = 1000,
    gain: float = 0.1,
    seed: int = 0,
    config: dict | None = None,
) -> Path:
    """Write a run of five stages that learned to prefer books and to avoid junk."""
    random = np.random.default_rng(seed)
    (folder / "weights").mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as stream:
        for step in range(1, steps + 1):
            loss = 3.2 + 4.5 * np.exp(-step / 120) + random.normal(0, 0.08)
            line = {"step": step, "stage": _stage(step, steps), "phase": "train", "loss": loss}
            line |= _counters(step)
            stream.write(json.dumps(line) + "\n")
            if step % 100 == 0:
                stream.write(json.dumps(_evaluation(step, gain)) + "\n")
    for stage in range(1, 6):
        pq.write_table(_weights(stage, steps, random), folder / "weights" / f"{stage:03d}.parquet")
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def _counters(step: int) -> dict:
    return {"tokens": step * 4096, "flops": step * 2e12, "seconds": step * 0.25}


def _stage(step: int, steps: int) -> int:
    return (step - 1) * 5 // steps + 1


def _evaluation(step: int, gain: float) -> dict:
    base = 3.4 + 4.0 * np.exp(-step / 150)
    losses = {name: base - 0.2 * i for i, name in enumerate(DOMAINS) if name != "junk"}
    losses["target"] = base - gain * step / 1000
    mean = sum(losses.values()) / len(losses)
    line = {"step": step, "phase": "evaluation", "loss": mean, "domain_loss": losses}
    return line | _counters(step)


def _weights(stage: int, steps: int, random: np.random.Generator) -> pa.Table:
    rows = [
        (step, stage, step * 32 + i, DOMAINS[random.integers(len(DOMAINS))])
        for step in range(10, steps + 1, 10)
        if _stage(step, steps) == stage
        for i in range(32)
    ]
    pull = np.array([PULL[row[3]] for row in rows]) * (stage - 1) / 4
    weight = np.exp(pull + random.normal(0, 0.05, len(rows)))
    by_step = weight.reshape(-1, 32)
    weight = (by_step / by_step.mean(axis=1, keepdims=True)).reshape(-1)
    step, stages, sample, domain = zip(*rows, strict=True)
    return pa.table(
        {
            "step": step,
            "stage": stages,
            "source": ["training"] * len(step),
            "sample_id": sample,
            "document_id": sample,
            "domain": domain,
            "weight": pa.array(weight, pa.float32()),
            "alignment": pa.array(weight - 1, pa.float32()),
        }
    )


@pytest.fixture
def make_run() -> Callable[..., Path]:
    """Returns `write_run`."""
    return write_run
