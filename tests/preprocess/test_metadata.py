"""Metadata values as columns: exact, whatever the order, the workers and the shards."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_dwm.preprocess.merge import merge_datasets
from megatron_dwm.preprocess.pipeline import preprocess
from megatron_dwm.preprocess.settings import PreprocessSettings

LONG = 2**53 + 1  # the first whole number that a double rounds


def write_sidecar(directory: Path, model: Path, values: list[list[object]]) -> pa.Table:
    """The sidecar of files with these metadata values."""
    directory.mkdir()
    inputs = []
    for number, column in enumerate(values):
        inputs.append(directory / f"in{number}.jsonl")
        rows = [json.dumps({"text": "a", "n": value}) for value in column]
        inputs[-1].write_text("\n".join(rows))
    settings = PreprocessSettings(
        inputs=tuple(map(str, inputs)),
        output_prefix=str(directory / "p"),
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=str(model),
        metadata_keys=("n",),
        num_workers=2,
    )
    preprocess(settings)
    return pq.read_table(directory / "p_text_document.meta.parquet")


@pytest.mark.parametrize("order", itertools.permutations([[LONG, -LONG], [0.5, 1.0], [3, None]]))
def test_large_integers_beside_floats_are_not_rounded(
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture,
    order: tuple[list[object], ...],
) -> None:
    column = write_sidecar(tmp_path / "one", model, list(order))["n"]
    assert column.type == pa.string()
    spelled = {LONG: str(LONG), -LONG: str(-LONG), 0.5: "0.5", 1.0: "1", 3: "3", None: None}
    assert column.to_pylist() == [spelled[value] for values in order for value in values]
    [warning] = capsys.readouterr().err.splitlines()
    assert "--metadata-keys n" in warning and "2^53" in warning


def test_columns_of_one_sort_keep_their_type(tmp_path: Path, model: Path) -> None:
    whole = write_sidecar(tmp_path / "whole", model, [[LONG, 2**63 - 1], [-(2**63), 0]])["n"]
    assert (whole.type, whole.to_pylist()) == (pa.int64(), [LONG, 2**63 - 1, -(2**63), 0])
    small = write_sidecar(tmp_path / "small", model, [[2**53, -(2**53)], [0.1]])["n"]
    assert (small.type, small.to_pylist()) == (pa.float64(), [2.0**53, -(2.0**53), 0.1])


@pytest.mark.parametrize("others", [[[0.5, 1]], [[0.5, 1], ["x"]], [["x", 1], [2.0, 1e300]], [[7]]])
def test_shards_merge_to_what_one_run_writes(
    tmp_path: Path, model: Path, others: list[list[object]]
) -> None:
    parts = [[LONG, 1], *others]
    whole = write_sidecar(tmp_path / "whole", model, parts)["n"]
    for number, part in enumerate(parts):
        write_sidecar(tmp_path / str(number), model, [part])
    prefixes = [str(tmp_path / str(i) / "p_text_document") for i in range(len(parts))]
    merge_datasets(prefixes, str(tmp_path / "merged"))
    merged = pq.read_table(tmp_path / "merged.meta.parquet")["n"]
    assert merged.type == whole.type
    assert merged.to_pylist() == whole.to_pylist()
