"""Training samples against a second implementation in numpy, and their independence of the run."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_dwm.config.errors import UserError
from megatron_dwm.config.schema import DataConfig
from megatron_dwm.data.batch import Batch
from megatron_dwm.data.stream import TrainingData
from tests.forking.client import run_python

SEQUENCE_LENGTH = 96


def make(train: list[str], cache: Path, num_samples: int = 64, **changes: object) -> TrainingData:
    options = {"seed": 7, "eod_id": 2, "purpose": "training", **changes}
    config = DataConfig(train=train, sequence_length=SEQUENCE_LENGTH)
    return TrainingData(config, num_samples=num_samples, cache_dir=cache, **options)


def same(left: Batch, right: Batch) -> bool:
    return (
        torch.equal(left.tokens_BS, right.tokens_BS)
        and torch.equal(left.labels_BS, right.labels_BS)
        and torch.equal(left.document_ids_U, right.document_ids_U)
        and left.domains == right.domains
    )


class SecondImplementation:
    """One pass in plain numpy: shuffle sequences, join them, cut, shuffle the cuts."""

    def __init__(self, prefix: str, seed: int, borders: np.ndarray) -> None:
        indexed = IndexedDataset(prefix)
        random = np.random.RandomState(seed)
        order = np.arange(len(indexed), dtype=np.int32)
        random.shuffle(order)
        self.text = np.concatenate([indexed[int(i)] for i in order]).astype(np.int64)
        document_of = np.repeat(np.arange(len(borders) - 1), np.diff(borders))
        self.owner = np.concatenate([[document_of[i]] * len(indexed[int(i)]) for i in order])
        cuts = np.arange((len(self.text) - 1) // SEQUENCE_LENGTH, dtype=np.uint32)
        random.shuffle(cuts)
        self.cuts = cuts

    def text_of(self, place: int) -> np.ndarray:
        start = int(self.cuts[place]) * SEQUENCE_LENGTH
        return self.text[start : start + SEQUENCE_LENGTH + 1]

    def most_of(self, place: int) -> int:
        start = int(self.cuts[place]) * SEQUENCE_LENGTH
        # Counter keeps first occurrence among equals
        return Counter(self.owner[start : start + SEQUENCE_LENGTH].tolist()).most_common(1)[0][0]


def test_samples_documents_and_domains_equal_second_implementation(
    corpus: str, documents: list, tmp_path: Path
) -> None:
    per_pass = (sum(len(d.ids) for d in documents) - 1) // SEQUENCE_LENGTH
    data = make([corpus], tmp_path, num_samples=2 * per_pass)
    borders = np.cumsum([0, *[1 if d.ids else 0 for d in documents]])
    for number in (0, 1):
        digest = hashlib.sha256(f"7/training/0/{number}".encode()).hexdigest()
        seed = int(digest[:8], 16)
        second = SecondImplementation(corpus, seed, borders)
        assert len(second.cuts) == per_pass
        ids = range(number * per_pass, (number + 1) * per_pass)
        batch = data.batch(ids)
        for row in range(per_pass):
            text, document = second.text_of(row), second.most_of(row)
            assert np.array_equal(batch.tokens_BS[row].numpy(), text[:-1])
            assert np.array_equal(batch.labels_BS[row].numpy(), text[1:])
            assert int(batch.document_ids_U[row]) == document
            assert batch.domains[row] == documents[document].domain
        assert batch.sample_ids_B.tolist() == list(ids)
        assert batch.loss_mask_BS.eq(1).all() and batch.loss_mask_BS.dtype == torch.float32
        assert batch.position_ids_BS[-1].tolist() == list(range(SEQUENCE_LENGTH))
    assert set(data.domains) == {d.domain for d in documents}


def test_every_token_of_a_pass_is_a_label_once_up_to_the_remainder(
    corpus: str, documents: list, tmp_path: Path
) -> None:
    total = sum(len(d.ids) for d in documents)
    per_pass = (total - 1) // SEQUENCE_LENGTH
    data = make([corpus], tmp_path, num_samples=2 * per_pass)
    every = Counter(token for d in documents for token in d.ids)
    passes = [data.batch(range(n * per_pass, (n + 1) * per_pass)) for n in (0, 1)]
    for batch in passes:
        read = Counter(batch.labels_BS.flatten().tolist())
        assert not read - every
        assert sum((every - read).values()) == total - per_pass * SEQUENCE_LENGTH
        assert total - per_pass * SEQUENCE_LENGTH <= SEQUENCE_LENGTH
    assert not torch.equal(passes[0].tokens_BS, passes[1].tokens_BS)


def test_samples_do_not_depend_on_how_many_are_wanted_nor_on_the_cache(
    corpus: str, tmp_path: Path
) -> None:
    ids = range(5, 40)
    short = make([corpus], tmp_path / "a", num_samples=40).batch(ids)
    assert same(short, make([corpus], tmp_path / "a", num_samples=4000).batch(ids))
    assert same(short, make([corpus], tmp_path / "b", num_samples=41).batch(ids))
    one_by_one = Batch.concatenate([make([corpus], tmp_path / "a").batch([i]) for i in ids])
    assert same(short, one_by_one)


def test_seed_and_purpose_change_the_order(corpus: str, tmp_path: Path) -> None:
    ids = range(32)
    batches = [
        make([corpus], tmp_path, seed=seed, purpose=purpose).batch(ids).tokens_BS
        for seed, purpose in ((7, "training"), (8, "training"), (7, "weighting"))
    ]
    assert not torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


def test_blend_follows_the_weights_and_numbers_documents_through(
    two: list[str], documents: list, tmp_path: Path
) -> None:
    data = make(["30", two[0], "10", two[1]], tmp_path, num_samples=400)
    batch = data.batch(range(400))
    from_first = batch.document_ids_U < 60
    assert int(from_first.sum()) == 300
    for document, domain in zip(batch.document_ids_U.tolist(), batch.domains, strict=True):
        assert documents[document].domain == domain
    longer = make(["0.75", two[0], "0.25", two[1]], tmp_path, num_samples=1234)
    assert same(batch, longer.batch(range(400)))


def test_blend_without_weights_follows_the_size(two: list[str], tmp_path: Path) -> None:
    data = make(two, tmp_path, num_samples=500)
    sizes = [(len(np.memmap(f"{p}.bin", dtype=np.uint16)) - 1) // SEQUENCE_LENGTH for p in two]
    first = int((data.batch(range(500)).document_ids_U < 60).sum())
    assert abs(first - 500 * sizes[0] / sum(sizes)) <= 1


def test_upstreams_blend_is_prefix_stable() -> None:
    weights = np.array([0.61, 0.29, 0.1])
    made = []
    for size in (50, 3001):
        part, position = np.zeros(size, np.int16), np.zeros(size, np.int64)
        helpers.build_blending_indices(part, position, weights, 3, size, False)
        made.append((part, position))
    assert np.array_equal(made[0][0], made[1][0][:50])
    assert np.array_equal(made[0][1], made[1][1][:50])


def test_without_sidecar_the_domain_is_unknown(
    documents: list, tmp_path: Path, indexed_writer: Callable[..., str]
) -> None:
    prefix = indexed_writer(tmp_path / "bare", documents[:30], np.int32)
    data = make([prefix], tmp_path / "cache")
    assert data.domains == ["unknown"] and set(data.batch(range(9)).domains) == {"unknown"}


def test_no_samples_wanted(two: list[str], tmp_path: Path) -> None:
    assert make(two, tmp_path, num_samples=0).domains


def test_changed_data_is_not_read_through_an_old_cache(
    documents: list, tmp_path: Path, indexed_writer: Callable[..., str]
) -> None:
    prefix = indexed_writer(tmp_path / "p", documents[:40])
    before = make([prefix], tmp_path / "cache")
    old = before.batch(range(8))
    indexed_writer(tmp_path / "p", documents[40:80])
    after = make([prefix], tmp_path / "cache")
    assert not torch.equal(after.batch(range(8)).tokens_BS, old.tokens_BS)


def test_nothing_is_printed_or_warned(
    corpus: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make([corpus], tmp_path).batch(range(4))
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
    assert not list(recwarn)
    assert not [r for r in caplog.records if r.levelname != "INFO" and r.levelname != "DEBUG"]


PROGRAM = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from megatron_dwm.config.schema import DataConfig
from megatron_dwm.data.stream import TrainingData
from tests.forking.client import run_python
prefix, cache, out = sys.argv[1:]
dist.init_process_group("gloo")
rank = dist.get_rank()
config = DataConfig(train=[prefix], sequence_length=96)
try:
    data = TrainingData(config, eod_id=2, seed=7, num_samples=3000, cache_dir=Path(cache))
except Exception as error:
    Path(f"{out}.{rank}").write_text(f"{type(error).__name__}: {error}")
    sys.exit(0)
ids = range(2996, 3000) if rank == 1 else range(4)   # rank 1 alone reads the last pass
torch.save(data.batch(ids).tokens_BS, f"{out}.{rank}")
"""


def run_ranks(world: int, tmp_path: Path, *arguments: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    run_python([str(program), *arguments], ranks=world).check_returncode()


def test_processes_share_the_cache_and_read_alike(corpus: str, tmp_path: Path) -> None:
    run_ranks(2, tmp_path, corpus, str(tmp_path / "cache"), str(tmp_path / "out"))
    data = make([corpus], tmp_path / "own", num_samples=3000)
    assert torch.equal(torch.load(tmp_path / "out.0"), data.batch(range(4)).tokens_BS)
    assert torch.equal(torch.load(tmp_path / "out.1"), data.batch(range(2996, 3000)).tokens_BS)


def test_failure_to_build_reaches_every_rank(corpus: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    run_ranks(2, tmp_path, corpus, str(tmp_path / "file" / "cache"), str(tmp_path / "out"))
    for rank in (0, 1):
        message = (tmp_path / f"out.{rank}").read_text()
        assert message.startswith("UserError: data.cache_dir") and "\n" not in message


def test_cache_that_a_rank_cannot_see_is_the_users_to_mend(
    corpus: str, two: list[str], tmp_path: Path
) -> None:
    for train in ([corpus], two):
        data = make(train, tmp_path / "cache")
        shutil.rmtree(tmp_path / "cache")
        with pytest.raises(UserError, match="file system that all nodes share"):
            data.batch(range(4))
