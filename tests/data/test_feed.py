"""What a feed hands out follows from numbers alone, read ahead or not; origins read no token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_dwm.config.schema import DataConfig, ValidationConfig
from megatron_dwm.data import (
    Batch,
    CorpusSource,
    Feed,
    MixedSource,
    Share,
    Source,
    TrainingData,
    ValidationSet,
)
from megatron_dwm.tokenizer import Tokenizer

SIZE, STEPS, LENGTH = 6, 8, 32


@pytest.fixture(scope="module")
def data(
    corpus: str, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> TrainingData:
    return TrainingData(
        DataConfig(train=[corpus], sequence_length=LENGTH),
        eod_id=tokenizer.eod_id,
        seed=3,
        num_samples=SIZE * STEPS,
        cache_dir=tmp_path_factory.mktemp("cache"),
    )


@pytest.fixture(scope="module")
def target(
    tokenizer: Tokenizer, passages: Path, tmp_path_factory: pytest.TempPathFactory
) -> ValidationSet:
    lines = passages.read_text().splitlines()[:20]
    file = tmp_path_factory.mktemp("target") / "target.jsonl"
    file.write_text("".join(line + "\n" for line in lines))
    config = DataConfig(sequence_length=LENGTH)
    return ValidationSet(ValidationConfig(path=str(file)), config, tokenizer, seed=3)


def feed_of(training: Source, share: Share, target: ValidationSet | None = None) -> Feed:
    return Feed(
        training,
        share,
        steps=STEPS,
        device=torch.device("cpu"),
        target=target,
        passages=4,
    )


def alone(micro_batch: int = 2) -> Share:
    return Share(replicas=1, replica=0, micro_batch_size=micro_batch)


def assert_equal(found: Batch, expected: Batch) -> None:
    assert torch.equal(found.tokens_BS, expected.tokens_BS)
    assert torch.equal(found.sample_ids_B, expected.sample_ids_B)
    assert found.domains == expected.domains


@pytest.mark.parametrize("order", [range(STEPS), [0, 1, 5, 5, 2, 7, 3], [7, 0]], ids=str)
def test_batches_do_not_depend_on_what_was_read_before(
    data: TrainingData, order: list[int]
) -> None:
    feed = feed_of(CorpusSource(data, SIZE), alone())
    for step in order:
        assert_equal(feed.training(step), data.batch(range(step * SIZE, (step + 1) * SIZE)))


def test_replicas_share_the_batch_out_in_order(data: TrainingData) -> None:
    shares = [Share(replicas=3, replica=r, micro_batch_size=2) for r in range(3)]
    parts = []
    for share in shares:
        feed = feed_of(CorpusSource(data, SIZE), share)
        parts.append(feed.training(2))
    assert_equal(Batch.concatenate(parts), data.batch(range(2 * SIZE, 3 * SIZE)))


@pytest.mark.parametrize("replicas", [1, 2])
def test_rows_chosen_from_a_pool_come_from_any_part_of_it(
    data: TrainingData, replicas: int
) -> None:
    """Pools of two batches; the rows that replicas get are not those that they have read."""
    pool, pools, rows = CorpusSource(data, 2 * SIZE), [], [1, 3, 4, 8, 10, 11]
    parts = []
    for replica in range(replicas):
        share = Share(replicas=replicas, replica=replica, micro_batch_size=1)
        feed = Feed(pool, share, steps=STEPS // 2, device=torch.device("cpu"), pool_batches=2)
        assert feed.global_batch_size == SIZE
        pools.append(feed.training(3))
        parts.append(feed.chosen(3, rows))
        origins = feed.origins(3)
        assert feed.sample_range(3) == range(6 * SIZE, 8 * SIZE)
    expected = data.batch([6 * SIZE + row for row in rows])
    assert_equal(Batch.concatenate(pools), data.batch(range(6 * SIZE, 8 * SIZE)))
    assert_equal(Batch.concatenate(parts), expected)
    assert torch.equal(origins.sample_ids_U, expected.sample_ids_B)
    assert origins.domains == expected.domains and set(origins.numberings) == {"training"}


def test_origins_are_those_of_the_batch(data: TrainingData, target: ValidationSet) -> None:
    corpus = CorpusSource(data, SIZE)
    for source in (corpus, MixedSource(corpus, target, num_mixed=2)):
        whole, origins = source.rows(3, 0, SIZE), source.origins(3)
        assert torch.equal(whole.sample_ids_B, origins.sample_ids_U)
        assert torch.equal(whole.document_ids_U, origins.document_ids_U)
        assert whole.domains == origins.domains
    assert origins.numberings == ("training",) * 4 + ("target",) * 2


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_target_passages_are_the_last_rows_under_every_layout(
    data: TrainingData, target: ValidationSet, replicas: int
) -> None:
    source = MixedSource(CorpusSource(data, SIZE), target, num_mixed=3)
    share = SIZE // replicas
    parts = [source.rows(1, r * share, (r + 1) * share) for r in range(replicas)]
    expected = [data.batch(range(SIZE, SIZE + 3)), target.batch(1, 3)]
    assert_equal(Batch.concatenate(parts), Batch.concatenate(expected))


def test_an_error_in_the_thread_is_raised_by_the_step_that_reads_it(data: TrainingData) -> None:
    class Broken(CorpusSource):
        def rows(self, number: int, start: int, stop: int) -> Batch:
            if number == 1:
                raise OSError("the disk is gone")
            return super().rows(number, start, stop)

    feed = feed_of(Broken(data, SIZE), alone())
    feed.training(0)
    with pytest.raises(OSError, match="the disk is gone"):
        feed.training(1)


def test_nothing_is_read_past_the_last_step(data: TrainingData) -> None:
    """The batch after it may not exist."""
    feed = feed_of(CorpusSource(data, SIZE), alone())
    feed.training(STEPS - 1)


def test_a_validation_batch_has_no_more_passages_than_asked_for(
    data: TrainingData, target: ValidationSet
) -> None:
    feed = feed_of(CorpusSource(data, SIZE), alone(), target)
    assert feed.passages == 4
    found = feed.validation(0)
    assert int((found.loss_mask_BS.sum(dim=1) > 0).sum()) == 4
