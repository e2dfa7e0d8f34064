"""Merging takes every type that an `.idx` may have, and no multimodal dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_dwm.config.errors import UserError
from megatron_dwm.preprocess.merge import merge_datasets
from megatron_dwm.preprocess.merge_sidecars import common_schema, merge_sidecars
from tests.files.indexed import LENGTHS, write_dataset


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_every_type_is_merged(tmp_path: Path, dtype: type[np.number]) -> None:
    prefixes = [str(tmp_path / name) for name in "ab"]
    for prefix in prefixes:
        write_dataset(Path(prefix), dtype)
    summary = merge_datasets(prefixes, str(tmp_path / "merged"))
    assert (summary.documents, summary.tokens) == (6, 2 * sum(LENGTHS))
    merged = IndexedDataset(str(tmp_path / "merged"))
    assert merged.index.dtype is dtype
    assert [row.tolist() for row in merged[:8]] == 2 * [list(range(n)) for n in LENGTHS]


def test_multimodal_datasets_are_refused(tmp_path: Path) -> None:
    for name in "ab":
        write_dataset(tmp_path / name, np.int32, multimodal=True)
    with pytest.raises(UserError, match="a.idx: multimodal"):
        merge_datasets([str(tmp_path / name) for name in "ab"], str(tmp_path / "merged"))


def test_one_dataset_under_two_names_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_dataset(Path("a"), np.int32)
    for other in ("./a", "b"):
        if other == "b":
            for ending in ("bin", "idx"):
                Path(f"b.{ending}").symlink_to(f"a.{ending}")
        with pytest.raises(UserError, match="named twice, also as a;"):
            merge_datasets(["a", other], "merged")


FLOAT32, LARGE, FLAGS = pa.float32(), pa.large_string(), pa.bool_()


@pytest.mark.parametrize(
    ("first", "second", "merged"),
    [
        (pa.array([1.5, 2.0, None], FLOAT32), pa.array([3.0, 4.0, 5.0], FLOAT32), FLOAT32),
        (pa.array([1.5, 2.0, 3.0], FLOAT32), pa.array([1, 2, 3], pa.int8()), pa.float64()),
        (pa.array([2.5] * 3, FLOAT32), pa.array([1 << 60] * 3, pa.int64()), pa.string()),
        (pa.array(["a", "b", None], LARGE), pa.array(["c", "d", "e"], LARGE), LARGE),
        (pa.array(["a", "b", "c"], LARGE), pa.array([1, 2, 3], pa.int64()), pa.string()),
        (pa.array([True, False, None], FLAGS), pa.array([True, True, True], FLAGS), FLAGS),
        (pa.array([True, False, None], FLAGS), pa.array([1, 2, 3], pa.int64()), None),
    ],
    ids=str,
)
def test_columns_that_other_programs_wrote_keep_their_values(
    tmp_path: Path, first: pa.Array, second: pa.Array, merged: pa.DataType | None
) -> None:
    paths = [tmp_path / f"{name}.parquet" for name in "ab"]
    for path, column in zip(paths, (first, second), strict=True):
        pq.write_table(pa.table({"quality": column}), path)
    if merged is None:
        with pytest.raises(UserError, match=r"column quality has values .* \(bool, int64\)"):
            common_schema(paths)
        return
    merge_sidecars(paths, common_schema(paths), tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet").column(0)
    assert found.type == merged
    values = [*first.to_pylist(), *second.to_pylist()]
    spelled = [None if v is None else str(v).removesuffix(".0") for v in values]
    assert found.to_pylist() == (spelled if merged == pa.string() else values)


def test_one_corpus_divided_twice_is_refused(tmp_path: Path) -> None:
    """A pattern such as sp-* has the shards of an earlier division, too."""
    names = [f"{tmp_path}/sp-{i:05d}-of-{n:05d}_text" for n in (1, 2) for i in range(n)]
    with pytest.raises(UserError, match="the same corpus, divided twice"):
        merge_datasets(names, str(tmp_path / "out"))


def test_a_damaged_sidecar_is_refused(tmp_path: Path) -> None:
    """With no end, and with zeros among its values; the second is seen only when they are read."""
    prefixes = [str(tmp_path / name) for name in "ab"]
    for prefix in prefixes:
        write_dataset(Path(prefix), np.int32)
        column = pa.array([f"a text of {i}" for i in range(3)])
        pq.write_table(pa.table({"quality": column}), f"{prefix}.meta.parquet")
    sidecar = Path(f"{prefixes[1]}.meta.parquet")
    whole = sidecar.read_bytes()
    for damaged in (whole[:40], whole[:4] + bytes(60) + whole[64:]):
        sidecar.write_bytes(damaged)
        with pytest.raises(UserError, match="b.meta.parquet: is not a readable Parquet file"):
            merge_datasets(prefixes, str(tmp_path / "out"))
        assert not list(tmp_path.glob("out*"))
