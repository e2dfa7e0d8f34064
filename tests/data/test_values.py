"""Values of documents: read from real metadata, carried by batches, and their distribution."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from megatron_dwm.config import UserError
from megatron_dwm.config.schema import DataConfig
from megatron_dwm.data import Batch, TrainingData
from megatron_dwm.data.pieces import ROWS, DocumentRules
from megatron_dwm.data.value_quantiles import quantiles, row_means
from megatron_dwm.data.values import DocumentValues, column_values, domain_values, token_values
from tests.data.conftest import DOMAIN_KEY, Document

LENGTH, SAMPLES = 96, 48
UNITS = DocumentRules(are_units=True, stop_attention=True)


def _scores(number: int) -> list[float]:
    """Any numbers, of which some are 0 and some are the same."""
    return [round((document * 37 % 101) / 10) / 3 for document in range(number)]


def _with_column(prefix: str, folder: Path, column: pa.Array) -> str:
    """Copy a prefix, and give its metadata the column `score`."""
    copied = str(folder / Path(prefix).name)
    for end in ("bin", "idx"):
        shutil.copy(f"{prefix}.{end}", f"{copied}.{end}")
    table = pq.read_table(f"{prefix}.meta.parquet").append_column("score", column)
    pq.write_table(table, f"{copied}.meta.parquet", row_group_size=7)
    return copied


@pytest.fixture(scope="module")
def scored(two: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two prefixes whose metadata has the column `score`."""
    folder, found = tmp_path_factory.mktemp("scored"), []
    for prefix in two:
        count = pq.read_metadata(f"{prefix}.meta.parquet").num_rows
        found.append(_with_column(prefix, folder, pa.array(_scores(count))))
    return found


def _config(train: list[str]) -> DataConfig:
    return DataConfig(train=train, sequence_length=LENGTH, domain_key=DOMAIN_KEY)


def _read(train: list[str], column: str = "score", may_be_negative: bool = False) -> DocumentValues:
    key = "policy.column"
    return column_values(_config(train), key, column, may_be_negative=may_be_negative)


def _batch(
    train: list[str], cache: Path, rules: DocumentRules, values: DocumentValues | None
) -> Batch:
    data = TrainingData(
        _config(train),
        eod_id=2,
        seed=7,
        num_samples=SAMPLES,
        cache_dir=cache,
        rules=rules,
        values=values,
    )
    return data.batch(range(SAMPLES))


def test_units_have_their_documents_value(scored: list[str], tmp_path: Path) -> None:
    """Of packed rows and a blend of two prefixes; a row has the mean over its tokens."""
    train = ["0.3", scored[0], "0.7", scored[1]]
    values = _read(train)
    columns = [pq.read_table(f"{prefix}.meta.parquet")["score"].to_pylist() for prefix in scored]
    of_documents = torch.tensor(sum(columns, []), dtype=torch.float64)
    units = _batch(train, tmp_path, UNITS, values)
    assert torch.equal(units.values_U, of_documents[units.document_ids_U].float())
    of_tokens_BS = of_documents[units.document_ids_U][units.units.numbers_BS].float().double()
    rows = _batch(train, tmp_path, ROWS, values)
    torch.testing.assert_close(rows.values_U, of_tokens_BS.mean(dim=1).float(), rtol=1e-6, atol=0)
    assert float(rows.values_U.std()) > 0.1
    assert _batch(train, tmp_path, ROWS, None).values_U is None


def test_values_go_with_their_units(scored: list[str], tmp_path: Path) -> None:
    """Through slices of rows, micro-batches and what puts them together again."""
    batch = _batch(scored, tmp_path, UNITS, _read(scored)).to("cpu")
    parts = batch.micro_batches(4)
    assert all(len(part.values_U) == part.units.count for part in parts)
    assert torch.equal(Batch.concatenate(parts).values_U, batch.values_U)
    with pytest.raises(AssertionError):  # rows of the target have no values
        Batch.concatenate([batch, _batch(scored, tmp_path, UNITS, None)])


def test_lengths_and_domains_are_values(two: list[str], documents: list[Document]) -> None:
    values = token_values(_config(two))
    lengths = [len(document.ids) for document in documents]
    assert np.concatenate(values.of_prefixes).tolist() == lengths
    name = documents[0].domain
    weights = domain_values(_config(two), "policy.domain_weights", {name: 2.5})
    expected = [2.5 if document.domain == name else 1.0 for document in documents]
    assert np.concatenate(weights.of_prefixes).tolist() == expected and 1.0 in expected
    assert not values.are_of_a_column and not weights.are_of_a_column
    with pytest.raises(
        UserError, match="policy.domain_weights wbe: no document .* there are "
    ) as e:
        domain_values(_config(two), "policy.domain_weights", {"wbe": 1.0})
    assert name in str(e.value)


BAD: list[tuple[str, list, pa.DataType, str]] = [
    ("null", [1.0, None, 2.0], pa.float64(), "document 1 of .*counted from 0.* has null: expected"),
    ("nan", [1.0, 2.0, float("nan")], pa.float32(), "document 2 of .* has nan: expected a finite"),
    ("inf", [float("inf"), 2.0, 1.0], pa.float64(), "document 0 of .* has inf: expected a finite"),
    ("too large", [1e300, 2.0, 1.0], pa.float64(), r"document 0 of .* has 1e\+300: expected"),
    ("negative", [1, 2, -3], pa.int64(), "document 2 of .* has -3: expected .*, 0 or more"),
    ("text", ["1", "2", "3"], pa.string(), "it is string, expected numbers"),
    ("nothing", [None] * 3, pa.null(), "document 0 of .* has null: expected"),
]


@pytest.mark.parametrize(("values", "kind", "words"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_values_are_named(
    two: list[str], tmp_path: Path, values: list, kind: pa.DataType, words: str
) -> None:
    count = pq.read_metadata(f"{two[0]}.meta.parquet").num_rows
    good = pa.array([values[-1] if kind != pa.int64() else 1] * count, kind).to_pylist()
    column = pa.array([*values, *good[3:]], kind)
    prefix = _with_column(two[0], tmp_path, column)
    with pytest.raises(UserError, match=f"^policy.column score: .*{words}") as caught:
        _read([prefix])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kind", [pa.int8(), pa.uint64(), pa.float16(), pa.float32(), pa.bool_(), pa.decimal128(5, 2)]
)
def test_every_kind_of_number_is_read(two: list[str], tmp_path: Path, kind: pa.DataType) -> None:
    count = pq.read_metadata(f"{two[0]}.meta.parquet").num_rows
    numbers = np.arange(count, dtype=np.float16) % 2
    narrow = numbers if kind == pa.float16() else numbers.astype(np.int8)
    prefix = _with_column(two[0], tmp_path, pa.array(narrow).cast(kind))
    assert _read([prefix]).of_prefixes[0].tolist() == numbers.tolist()


def test_what_may_be_negative_is_read(two: list[str], tmp_path: Path) -> None:
    count = pq.read_metadata(f"{two[0]}.meta.parquet").num_rows
    prefix = _with_column(two[0], tmp_path, pa.array([-1.5] * count))
    assert set(_read([prefix], may_be_negative=True).of_prefixes[0].tolist()) == {-1.5}


def test_a_missing_column_or_file_is_named(scored: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"scor: .*no such column: it has .*{DOMAIN_KEY}, score$"):
        _read(scored, "scor")
    for end in ("bin", "idx"):
        shutil.copy(f"{scored[0]}.{end}", tmp_path / f"alone.{end}")
    with pytest.raises(UserError, match="policy.column score: there is no .*alone.meta.parquet"):
        _read([str(tmp_path / "alone")])


def _tokens_by_value(documents: list[Document], values: list[float]) -> Iterator[float]:
    for document, value in zip(documents, values, strict=True):
        yield from [value] * len(document.ids)


def test_quantiles_of_documents_count_tokens(scored: list[str], documents: list[Document]) -> None:
    """Token by token, sorted; the second prefix counts three times as much as the first."""
    parts = [documents[:60], documents[60:]]
    tokens = [sorted(_tokens_by_value(part, _scores(len(part)))) for part in parts]
    found = quantiles(
        _config(["1", scored[0], "3", scored[1]]),
        _read(scored),
        steps=9,
        are_documents=True,
        seed=1,
    )
    for value in (0.0, 0.4, 1.0, 2.0, 4.0):
        by_hand = [
            sum(np.float32(t) <= np.float32(value) for t in each) / len(each) for each in tokens
        ]
        share = 0.25 * by_hand[0] + 0.75 * by_hand[1]
        assert found.fraction_up_to(np.float32(value)) == pytest.approx(share, rel=1e-9)
    for fraction in (0.01, 0.3, 0.77, 1.0):
        [value] = found.at(np.array([fraction]))
        assert found.fraction_up_to(value) >= fraction
        below = found.values_N[found.values_N < value]
        assert not len(below) or found.fraction_up_to(below[-1]) < fraction


def test_quantiles_of_rows_are_those_of_an_epoch(scored: list[str], tmp_path: Path) -> None:
    """The rows of the run, which cuts the same documents in another order."""
    found = quantiles(_config(scored[:1]), _read(scored[:1]), steps=9, are_documents=False, seed=1)
    rows = _batch(scored[:1], tmp_path, ROWS, _read(scored[:1])).values_U.numpy()
    assert len(found.values_N) > SAMPLES
    assert abs(np.quantile(rows, 0.5) - found.at(np.array([0.5]))[0]) < 0.5
    values = np.array([1.0, 0.7, 3.0], dtype=np.float32)
    # 4 tokens of 1.0; one of 1.0, three of 0.7; two of 0.7, two of 3.0; the rest is no whole row.
    means = row_means(values, np.array([5, 5, 4]), 4)
    assert means.tolist() == pytest.approx([1.0, 0.775, 1.85], rel=1e-7)
    assert row_means(values[1:2], np.array([12]), 4).tolist() == [values[1]] * 3
