"""Training data under a schedule: every prefix goes on where it was, whatever the shares do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_dwm.config import Config, TrainingConfig, WeightingConfig
from megatron_dwm.config.errors import UserError
from megatron_dwm.config.schema import DataConfig
from megatron_dwm.data.checks import MAX_EPOCHS, check_data
from megatron_dwm.data.document_counts import document_counts
from megatron_dwm.data.prefixes import read_indexed_file
from megatron_dwm.data.shares import ReadSteps
from megatron_dwm.data.stream import TrainingData
from megatron_dwm.tokenizer import Tokenizer

LENGTH, STEPS, EACH = 96, 40, 10
READS = ReadSteps(steps=range(STEPS), samples_each=EACH)
SCHEDULE = {0: [1.0, 0.0], 10: [0.5, 0.5], 20: [0.001, 0.999], 30: [0.999, 0.001]}


def make(
    train: list[str], cache: Path, schedule: dict[int, list[float]], reads: ReadSteps = READS
) -> TrainingData:
    config = DataConfig(train=train, sequence_length=LENGTH, schedule=schedule)
    return TrainingData(
        config,
        eod_id=2,
        seed=7,
        num_samples=reads.num_samples,
        cache_dir=cache,
        read_at=reads,
    )


def stream_of(prefixes: list[str], index: int, count: int, cache: Path) -> torch.Tensor:
    """The first samples of one prefix alone: the blend with no share of the other."""
    shares = [float(place == index) for place in range(2)]
    data = make(
        prefixes,
        cache,
        {0: shares, 9999: [1.0, 1.0]},
        ReadSteps(steps=range(1), samples_each=count),
    )
    return data.batch(range(count)).tokens_BS


@pytest.mark.parametrize("interpolated", [False, True])
def test_no_sample_of_a_prefix_is_lost_or_repeated(
    two: list[str], tmp_path: Path, interpolated: bool
) -> None:
    """The samples of each prefix, in the order of the blend, are its stream from the beginning."""
    points = SCHEDULE if not interpolated else dict.fromkeys([0], [0.2, 0.8]) | {39: [0.8, 0.2]}
    batch = make(two, tmp_path, points).batch(range(READS.num_samples))
    is_first = batch.document_ids_U < 60
    for index, rows in enumerate((is_first, ~is_first)):
        count = int(rows.sum())
        assert count > 50
        assert torch.equal(batch.tokens_BS[rows], stream_of(two, index, count, tmp_path))
    if not interpolated:
        by_step = is_first.reshape(STEPS, EACH).sum(1)
        assert by_step[:10].tolist() == [EACH] * 10 and by_step[10:20].tolist() == [EACH // 2] * 10
        assert int(by_step[20:30].sum()) <= 1 and int(by_step[30:].sum()) >= 99


def test_later_points_do_not_change_earlier_samples(two: list[str], tmp_path: Path) -> None:
    """So a run may be resumed with an anneal that it did not plan, also from constant weights."""
    planned = make(two, tmp_path, {0: [3, 1]}).batch(range(400))
    annealed = make(two, tmp_path, {0: [3, 1], 30: [1, 9]}).batch(range(400))
    weighted = DataConfig(train=["3", two[0], "1", two[1]], sequence_length=LENGTH)
    constant = TrainingData(weighted, eod_id=2, seed=7, num_samples=400, cache_dir=tmp_path)
    assert torch.equal(constant.batch(range(400)).tokens_BS, planned.tokens_BS)
    assert torch.equal(planned.tokens_BS[:300], annealed.tokens_BS[:300])
    assert not torch.equal(planned.tokens_BS[300:], annealed.tokens_BS[300:])


def test_a_prefix_named_twice_is_one_with_both_shares(two: list[str], tmp_path: Path) -> None:
    """It has one stream, so none of its samples is read twice before all were read."""
    first, second = two
    once = make(["0.75", first, "0.25", second], tmp_path, {}).batch(range(400))
    twice = make(["0.5", first, "0.25", second, "0.25", first], tmp_path, {}).batch(range(400))
    assert torch.equal(once.tokens_BS, twice.tokens_BS)
    assert torch.equal(once.document_ids_U, twice.document_ids_U)
    per_epoch = read_indexed_file(first).samples_per_epoch(LENGTH)
    of_first = once.tokens_BS[once.document_ids_U < 60][:per_epoch]
    assert len(of_first.unique(dim=0)) == len(of_first)
    scheduled = make([first, second, first], tmp_path, {0: [2, 1, 1], 20: [0, 3, 1]})
    plain = make([first, second], tmp_path, {0: [3, 1], 20: [1, 3]})
    ids = range(READS.num_samples)
    assert torch.equal(scheduled.batch(ids).tokens_BS, plain.batch(ids).tokens_BS)
    # Without weights a prefix counts by its size, here twice.
    sizes = [read_indexed_file(prefix).samples_per_epoch(LENGTH) for prefix in two]
    by_size = make([first, second, first], tmp_path, {}).batch(ids).document_ids_U < 60
    assert abs(int(by_size.sum()) - 400 * 2 * sizes[0] / (2 * sizes[0] + sizes[1])) <= 1


def test_epochs_are_counted_by_the_shares_of_all_steps(
    two: list[str], tokenizer: Tokenizer
) -> None:
    """The second prefix has a share from the second step on, and each reads a hundred epochs."""
    per_epoch = read_indexed_file(two[1]).samples_per_epoch(LENGTH)
    schedule = {0: [1.0, 0.0], 1: [0.0, 1.0]}
    config = DataConfig(train=two, sequence_length=LENGTH, schedule=schedule)
    most = MAX_EPOCHS * per_epoch // 10
    check_data(config, tokenizer, ReadSteps(steps=range(11), samples_each=most))
    long = ReadSteps(steps=range(12), samples_each=most)
    with pytest.raises(UserError, match=f"{two[1]}.bin: .* a smaller share in data.schedule"):
        check_data(config, tokenizer, long)


def test_documents_a_sample_follow_the_mean_of_the_shares(two: list[str]) -> None:
    """Of 30 steps ten read the first prefix alone, and twenty both alike: two thirds, one third."""

    def units(*train: str, schedule: dict[int, list[float]] | None = None) -> float:
        data = DataConfig(train=list(train), sequence_length=LENGTH, schedule=schedule or {})
        config = Config(
            data=data,
            training=TrainingConfig(steps=30),
            weighting=WeightingConfig(unit="document"),
        )
        return document_counts(config).units_per_row

    first, second = units(two[0]), units(two[1])
    assert first != second
    mixed = units(*two, schedule={0: [1, 0], 10: [1, 1]})
    assert mixed == pytest.approx(2 / 3 * first + 1 / 3 * second, rel=1e-12)
