"""Rules about messages that overlap: what is refused, and with which words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_dwm.config import (
    Config,
    ModelConfig,
    ParallelConfig,
    TrainingConfig,
    ValidationConfig,
)
from megatron_dwm.config.validate_overlap import overlap_problems

BATCHES = TrainingConfig(global_batch_size=16, micro_batch_size=4)


def problems(config: Config, world_size: int = 4) -> list[str]:
    return list(overlap_problems(replace(config, training=BATCHES), world_size))


@pytest.mark.parametrize(
    ("sharded", "reduce", "missing"),
    [
        (True, True, []),
        (False, True, ["sharded_optimizer"]),
        (True, False, ["overlap_grad_reduce"]),
        (False, False, ["sharded_optimizer", "overlap_grad_reduce"]),
    ],
)
def test_a_gather_needs_what_megatron_asks_for(
    sharded: bool, reduce: bool, missing: list[str]
) -> None:
    parallel = ParallelConfig(
        overlap_param_gather=True, sharded_optimizer=sharded, overlap_grad_reduce=reduce
    )
    found = problems(Config(parallel=parallel))
    assert len(found) == len(missing)
    for line, key in zip(found, missing, strict=True):
        assert f"expected parallel.{key} true" in line


@pytest.mark.parametrize(("passages", "fits"), [(None, True), (8, True), (12, False)])
def test_tensor_overlap_has_one_size_of_micro_batch(passages: int | None, fits: bool) -> None:
    config = Config(
        parallel=ParallelConfig(tensor=2, sequence=True, tp_comm_overlap=True),
        model=ModelConfig(precision="bf16"),
        validation=ValidationConfig(batch_size=passages),
    )
    found = problems(config)
    assert not found if fits else "validation.batch_size" in found[0] and "= 8, got 12" in found[0]


def test_tensor_overlap_is_not_for_emulated_layers() -> None:
    config = Config(
        parallel=ParallelConfig(tensor=2, sequence=True, tp_comm_overlap=True),
        model=ModelConfig(precision="fp8", fp8_emulation=True),
    )
    [line] = problems(config)
    assert "model.fp8_emulation" in line


def test_tensor_overlap_has_no_buffers_for_blocks() -> None:
    config = Config(
        parallel=ParallelConfig(tensor=2, sequence=True, tp_comm_overlap=True),
        model=ModelConfig(precision="fp8", fp8_recipe="blockwise"),
    )
    [line] = problems(config)
    assert "model.fp8_recipe blockwise" in line
