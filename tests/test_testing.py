"""megatron_dwm.testing: its batches and its plain step are the same under every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_dwm.config import ParallelConfig
from megatron_dwm.runtime import bring_up
from megatron_dwm.testing import plain_step, random_batch, tiny_learner
from tests.launch import run_ranks

ROWS, STEPS = 8, 3


def rows_and_losses(**layout: Any) -> tuple[list[int], list[float]]:
    """Sample numbers of this replica's rows, and the losses of plain steps, 0 without a loss."""
    parallel = ParallelConfig(**layout)
    with bring_up(parallel, seed=1) as runtime:
        tiny = tiny_learner(runtime, parallel=parallel)
        losses = []
        for number in range(STEPS):
            batch = random_batch(number, runtime, rows=ROWS)
            losses.append(plain_step(tiny.llm, tiny.optimizer, batch, micro_batch_size=2))
            tiny.scheduler.step(increment=1)
        return batch.sample_ids_B.tolist(), losses


@pytest.fixture(scope="module")
def alone() -> list[float]:
    [[(rows, losses)]] = run_ranks("tests.test_testing:rows_and_losses", 1, [{}])
    assert rows == list(range(ROWS))
    return losses


def test_replicas_share_the_rows_and_the_loss(alone: list[float]) -> None:
    [ranks] = run_ranks("tests.test_testing:rows_and_losses", 2, [{}])
    assert [rows for rows, _ in ranks] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for _, losses in ranks:
        assert losses == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}], ids=str)
def test_a_plain_step_does_not_depend_on_the_layout(
    layout: dict[str, int], alone: list[float]
) -> None:
    [ranks] = run_ranks("tests.test_testing:rows_and_losses", 2, [layout])
    assert ranks[-1][1] == pytest.approx(alone, rel=1e-5)
    assert torch.tensor(alone).isfinite().all()
