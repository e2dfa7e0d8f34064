"""Pieces of documents in rows, token by token, by a second implementation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_dwm.config.schema import DataConfig, ValidationConfig
from megatron_dwm.data import CorpusSource, MixedSource, TrainingData, ValidationSet
from megatron_dwm.data.batch import NO_ROW, Batch
from megatron_dwm.data.pieces import DocumentRules
from megatron_dwm.tokenizer import Tokenizer
from tests.data.test_stream import SEQUENCE_LENGTH, SecondImplementation

EVERY_RULE = [
    DocumentRules(are_units=units, equal_shares=equal, stop_attention=stop, border_loss=loss)
    for units, equal, stop, loss in product((False, True), repeat=4)
    if units or not equal
]
PASSES = 5
UNITS = DocumentRules(are_units=True, stop_attention=True, border_loss=False)
# Lengths of the sequences of every document.
RAGGED = [[1], [], [300], [5, 7, 90], [2], [1], [96], [1, 1], [150, 0, 3], [0], [48], [40]] * 5
# Borders are often at the ends of rows.
ALIGNED = [[96], [192], [48], [], [48, 48], [1], [95], [288]] * 4


def write(prefix: Path, documents: Sequence[Sequence[int]]) -> str:
    """Write random tokens; a document may have several sequences, or none."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    generator = torch.Generator().manual_seed(0)
    for lengths in documents:
        tokens = torch.randint(3, 500, (sum(lengths),), generator=generator)
        builder.add_document(tokens, list(lengths))
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def data_of(
    prefixes: list[str], cache: Path, rules: DocumentRules, num_samples: int
) -> TrainingData:
    config = DataConfig(train=prefixes, sequence_length=SEQUENCE_LENGTH)
    return TrainingData(
        config, seed=7, eod_id=2, num_samples=num_samples, cache_dir=cache, rules=rules
    )


def pieces_by_hand(owners: list[int]) -> tuple[list[int], list[int], list[bool]]:
    """From the documents of S + 1 tokens: the piece of each of the first S, the documents of the
    pieces, and of which tokens the label begins another document.
    """
    numbers, documents, at_border = [], [], []
    for place, owner in enumerate(owners[:-1]):
        if place == 0 or owner != owners[place - 1]:
            documents.append(owner)
        numbers.append(len(documents) - 1)
        at_border.append(owners[place + 1] != owner)
    return numbers, documents, at_border


@pytest.mark.parametrize("documents", [RAGGED, ALIGNED], ids=["ragged", "aligned"])
def test_pieces_equal_a_second_implementation(documents: list, tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", documents)
    per_pass = (sum(map(sum, documents)) - 1) // SEQUENCE_LENGTH
    second = []
    for number in range(PASSES):
        seed = int(hashlib.sha256(f"7/training/0/{number}".encode()).hexdigest()[:8], 16)
        second.append(SecondImplementation(prefix, seed, np.cumsum([0, *map(len, documents)])))
    owners = []
    for of_pass, place in product(second, range(per_pass)):
        start = int(of_pass.cuts[place]) * SEQUENCE_LENGTH
        owners.append(of_pass.owner[start : start + SEQUENCE_LENGTH + 1].astype(int).tolist())
    assert any(row[-1] != row[-2] for row in owners), "a border is at the end of a row"
    assert any(row[-1] == row[-2] for row in owners)
    for rules in EVERY_RULE:
        data = data_of([prefix], tmp_path / "cache", rules, PASSES * per_pass)
        batch = data.batch(range(PASSES * per_pass))
        assert_pieces(batch, owners, rules)
        assert_origins(data, batch)


def assert_pieces(batch: Batch, owners: list[list[int]], rules: DocumentRules) -> None:
    numbers, documents, at_border = zip(*map(pieces_by_hand, owners), strict=True)
    mask_BS = ~torch.tensor(at_border) | rules.border_loss
    assert torch.equal(batch.loss_mask_BS, mask_BS.float())
    numbers_BS = torch.tensor(numbers)
    if rules.stop_attention:
        assert torch.equal(batch.borders_BS, numbers_BS)
    else:
        assert batch.borders_BS is None
    units = batch.units
    if not rules.are_units:
        assert batch.units_BS is None and units.count == len(owners) and units.sizes_U is None
        return
    assert torch.equal(batch.units_BS, numbers_BS)
    assert batch.document_ids_U.tolist() == [each for row in documents for each in row]
    assert batch.units_per_row == [len(row) for row in documents]
    first, sizes = 0, []
    for row, (row_numbers, row_documents) in enumerate(zip(numbers, documents, strict=True)):
        assert units.numbers_BS[row].tolist() == [first + number for number in row_numbers]
        first += len(row_documents)
        for number in range(len(row_documents)):
            here = torch.tensor(row_numbers) == number
            sizes.append(float(mask_BS[row][here].sum()))
    counted = torch.tensor(sizes)
    assert units.count == first
    assert torch.equal(units.sizes_U, (counted > 0).float() if rules.equal_shares else counted)


def assert_origins(data: TrainingData, batch: Batch) -> None:
    """Origins read no token and are those of the batch's units."""
    source = CorpusSource(data, batch.size)
    origins, ones_BS = source.origins(0), torch.ones_like(batch.loss_mask_BS)
    assert torch.equal(origins.document_ids_U, batch.document_ids_U)
    assert origins.domains == batch.domains
    assert torch.equal(origins.tokens_U, batch.units.sum_of_rows(ones_BS).long())
    per_row = torch.tensor(batch.units_per_row)
    assert torch.equal(origins.sample_ids_U, batch.sample_ids_B.repeat_interleave(per_row))


def test_documents_of_several_prefixes_are_numbered_through(tmp_path: Path) -> None:
    prefixes = [write(tmp_path / "a", RAGGED[:12]), write(tmp_path / "b", ALIGNED[:8])]
    data = data_of(prefixes, tmp_path / "cache", UNITS, 12)
    batch = data.batch(range(12))
    assert_origins(data, batch)
    lengths = [*map(sum, RAGGED[:12]), *map(sum, ALIGNED[:8])]
    assert max(batch.document_ids_U.tolist()) >= 12
    for document, tokens in zip(
        batch.document_ids_U.tolist(), data.origins(range(12)).tokens, strict=True
    ):
        assert 0 < tokens <= min(lengths[document], SEQUENCE_LENGTH)


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    folder = tmp_path_factory.mktemp("batch")
    return data_of([write(folder / "d", RAGGED)], folder / "cache", UNITS, 12).batch(range(12))


@pytest.mark.parametrize("rows", [(0, 12, 1), (3, 9, 2), (1, 12, 3), (5, 5, 1), (4, 5, 1)], ids=str)
def test_slices_have_the_units_of_their_rows(batch: Batch, rows: tuple[int, int, int]) -> None:
    part = batch.rows(*rows)
    one_by_one = [batch.rows(row, row + 1) for row in range(*rows)]
    assert part.units_per_row == [each.units.count for each in one_by_one]
    assert part.domains == tuple(name for each in one_by_one for name in each.domains)
    found = [part.document_ids_U, part.units.sizes_U]
    expected = [
        [each.document_ids_U for each in one_by_one],
        [each.units.sizes_U for each in one_by_one],
    ]
    for of_part, of_rows in zip(found, expected, strict=True):
        assert of_part.tolist() == [value for row in of_rows for value in row.tolist()]
    counted = part.units.sum_of_rows(part.loss_mask_BS)
    assert counted.tolist() == [
        value for each in one_by_one for value in each.units.sum_of_rows(each.loss_mask_BS).tolist()
    ]


def test_micro_batches_joined_give_the_units_back(batch: Batch) -> None:
    joined = Batch.concatenate(batch.micro_batches(3))
    assert torch.equal(joined.units.numbers_BS, batch.units.numbers_BS)
    assert torch.equal(joined.units.sizes_U, batch.units.sizes_U)
    assert torch.equal(joined.borders_BS, batch.borders_BS)
    assert torch.equal(joined.document_ids_U, batch.document_ids_U)
    assert joined.domains == batch.domains


TEXTS = [
    *("one two three", "four", "", "five six seven eight nine ten " * 40, "eleven", "twelve"),
    *("thirteen fourteen fifteen sixteen", "x"),
]


def target_of(folder: Path, tokenizer: Tokenizer, loss_on: str, rules: DocumentRules) -> tuple:
    """The validation set, and the text and owner of each of its tokens packed by hand."""
    path = folder / "target.jsonl"
    lines = [{"text": text, "domain": f"d{i % 3}"} for i, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = ValidationConfig(path=str(path), loss_on=loss_on)
    data = DataConfig(sequence_length=SEQUENCE_LENGTH)
    found = ValidationSet(config, data, tokenizer, seed=3, rules=rules)
    stream, owner = [], []
    for number, text in enumerate(TEXTS):
        ids = [*tokenizer.encode(text), tokenizer.eod_id] if text else []
        stream += ids
        owner += [number] * len(ids)
    return found, stream, owner


@pytest.mark.parametrize("border_loss", [False, True])
def test_dense_passages_and_their_padding(
    tmp_path: Path, tokenizer: Tokenizer, border_loss: bool
) -> None:
    rules = DocumentRules(are_units=True, stop_attention=True, border_loss=border_loss)
    target, stream, owner = target_of(tmp_path, tokenizer, "all", rules)
    batch = target.batch(0, target.num_rows, num_padding=2)
    assert len(stream) % SEQUENCE_LENGTH > 1 and target.num_rows > 1, "the last row has padding"
    documents, per_row = [], []
    padded = [*owner, *[-1] * SEQUENCE_LENGTH]
    for place, sample in enumerate(batch.sample_ids_B.tolist()):
        row = sample if sample != NO_ROW else int(batch.sample_ids_B[target.num_rows - 1])
        owners = padded[row * SEQUENCE_LENGTH :][: SEQUENCE_LENGTH + 1]
        numbers, of_row, at_border = pieces_by_hand(owners)
        assert batch.borders_BS[place].tolist() == numbers
        units = [n if o >= 0 else -1 for n, o in zip(numbers, owners, strict=False)]
        assert batch.units_BS[place].tolist() == units
        of_batch = [sum(per_row) + n if n >= 0 else -1 for n in units]
        assert batch.units.numbers_BS[place].tolist() == of_batch
        counts = [
            sample != NO_ROW and label >= 0 and (border_loss or not at)
            for label, at in zip(owners[1:], at_border, strict=True)
        ]
        assert batch.loss_mask_BS[place].tolist() == [float(value) for value in counts]
        real = [document for document in of_row if document >= 0]
        documents += real if sample != NO_ROW else [NO_ROW] * len(real)
        per_row.append(len(real))
    assert batch.document_ids_U.tolist() == documents and batch.units_per_row == per_row
    kept = [(d, name) for d, name in zip(documents, batch.domains, strict=True) if d != NO_ROW]
    assert all(name == f"d{document % 3}" for document, name in kept)
    assert (
        torch.equal(batch.units.sizes_U, batch.units.sum_of_rows(batch.loss_mask_BS))
        and batch.units.sizes_U.sum() == batch.loss_mask_BS.sum()
    )


@pytest.mark.parametrize("loss_on", ["all", "last_word"])
@pytest.mark.parametrize(
    "rules", [UNITS, DocumentRules(are_units=True, equal_shares=True)], ids=str
)
def test_corpus_rows_and_passages_of_the_target_in_one_batch(
    tmp_path: Path, tokenizer: Tokenizer, loss_on: str, rules: DocumentRules
) -> None:
    data = data_of([write(tmp_path / "d", RAGGED)], tmp_path / "cache", rules, 12)
    target, *_ = target_of(tmp_path, tokenizer, loss_on, rules)
    source = MixedSource(CorpusSource(data, 6), target, num_mixed=2)
    whole, origins = source.rows(1, 0, 6), source.origins(1)
    parts = [data.batch(range(6, 10)), target.batch(1, 2)]
    for name in ("tokens_BS", "units_BS", "loss_mask_BS", "document_ids_U"):
        expected = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(getattr(whole, name), expected), name
    sizes = torch.cat([part.units.sizes_U for part in parts])
    assert torch.equal(whole.units.sizes_U, sizes)
    assert torch.equal(origins.document_ids_U, whole.document_ids_U)
    assert origins.domains == whole.domains
    numberings = ["training"] * parts[0].units.count + ["target"] * parts[1].units.count
    assert origins.numberings == tuple(numberings)
    in_units = whole.units.sum_of_rows(torch.ones_like(whole.loss_mask_BS))
    assert torch.equal(origins.tokens_U, in_units.long())
    split = Batch.concatenate([source.rows(1, 0, 3), source.rows(1, 3, 6)])
    assert torch.equal(split.units.numbers_BS, whole.units.numbers_BS)
    first = source.origins(1, count=5)
    assert torch.equal(first.tokens_U, origins.tokens_U[: len(first.tokens_U)])
    assert len(first.domains) == source.rows(1, 0, 5).units.count
