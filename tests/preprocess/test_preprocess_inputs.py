"""Every kind of input against the same rows read another way; shards and merges against one run."""

from __future__ import annotations

import codecs
import dataclasses
import datetime
import gzip
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_dwm.config.errors import UserError
from megatron_dwm.preprocess.merge import merge_datasets
from megatron_dwm.preprocess.pipeline import preprocess
from megatron_dwm.preprocess.read.inputs import find_inputs, take_shard
from megatron_dwm.preprocess.settings import PreprocessSettings
from megatron_dwm.tokenizer import build_tokenizer

Run = Callable[..., subprocess.CompletedProcess[str]]
SUFFIXES = ("bin", "idx", "meta.parquet")


def settings_for(inputs: list[object], prefix: Path, model: Path) -> PreprocessSettings:
    return PreprocessSettings(
        inputs=tuple(map(str, inputs)),
        output_prefix=str(prefix),
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=str(model),
        append_eod=True,
    )


@pytest.fixture(scope="module")
def rows(corpus_dir: Path) -> list[dict]:
    """Rows with a nested domain and a score."""
    lines = (corpus_dir / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:90]
    read = [json.loads(line) for line in lines]
    return [
        {"text": r["text"], "meta": {"set": r["domain"]}, "score": i / 7}
        for i, r in enumerate(read)
    ]


def write(path: Path, rows: list[dict]) -> Path:
    """`rows` in the format of the ending."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=17)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        new = pa.ipc.new_stream if "stream" in path.name else pa.ipc.new_file
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=13)
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory, rows: list[dict], model: Path) -> bytes:
    """The `.bin` from plain JSON Lines."""
    directory = tmp_path_factory.mktemp("plain")
    preprocess(settings_for([write(directory / "in.jsonl", rows)], directory / "p", model))
    return (directory / "p_text_document.bin").read_bytes()


@pytest.mark.parametrize("name", ["in.parquet", "in.arrow", "stream.arrow", "in.jsonl.gz"])
@pytest.mark.parametrize("chunk_bytes", [2000, 1 << 23])
def test_tables(
    tmp_path: Path, rows: list[dict], ids: bytes, model: Path, name: str, chunk_bytes: int
) -> None:
    source = write(tmp_path / name, rows)
    asked = settings_for([source], tmp_path / "p", model)
    keys = ("meta.set", "score")
    preprocess(dataclasses.replace(asked, metadata_keys=keys, chunk_bytes=chunk_bytes))
    assert (tmp_path / "p_text_document.bin").read_bytes() == ids
    table = pq.read_table(tmp_path / "p_text_document.meta.parquet")
    assert table["record"].to_pylist() == list(range(len(rows)))
    assert table["score"].to_pylist() == [row["score"] for row in rows]
    assert table["meta.set"].to_pylist() == [row["meta"]["set"] for row in rows]


def test_directory_and_pattern_in_the_order_of_paths(
    tmp_path: Path, rows: list[dict], ids: bytes, model: Path
) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "b").mkdir(parents=True)
    write(corpus / "a.jsonl.gz", rows[:30])
    write(corpus / "b" / "b.parquet", rows[30:60])
    write(corpus / "c.jsonl", rows[60:])
    (corpus / "README.md").write_text("not data")
    (corpus / "d.jsonl").write_bytes(b"")
    for name, source in (("d", corpus), ("g", tmp_path / "corpus" / "**" / "*[lzt]")):
        preprocess(settings_for([source], tmp_path / name, model))
        assert (tmp_path / f"{name}_text_document.bin").read_bytes() == ids
    for wrong, words in ((tmp_path / "*.none", "no file matches"), (tmp_path / "e", "no file of")):
        (tmp_path / "e").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=words):
            find_inputs([str(wrong)])


def test_links_to_directories_are_followed_once(tmp_path: Path, rows: list[dict]) -> None:
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for folder in (corpus, elsewhere):
        folder.mkdir()
        write(folder / "a.jsonl", rows[:2])
    (corpus / "web").symlink_to(elsewhere)
    (corpus / ".hidden").symlink_to(elsewhere)
    found = [read.name for read in find_inputs([str(corpus)])]
    assert found == [str(corpus / "a.jsonl"), str(corpus / "web" / "a.jsonl")]
    # A link to what is read anyway is left out, as `current` beside the versions of a corpus.
    (corpus / "v2").mkdir()
    write(corpus / "v2" / "b.jsonl", rows[:2])
    for name, target in (("current", corpus / "v2"), ("self", corpus)):
        (corpus / name).symlink_to(target)
    inside = [read.name for read in find_inputs([str(corpus)])]
    assert inside == [found[0], str(corpus / "v2" / "b.jsonl"), found[1]]
    for target in (elsewhere, tmp_path):
        link = corpus / "again"
        link.symlink_to(target)
        with pytest.raises(UserError, match=r"again.*under another name, which would be read tw"):
            find_inputs([str(corpus)])
        link.unlink()


def test_hub_data_set_is_streamed(
    tmp_path: Path, rows: list[dict], ids: bytes, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", rows)
    name = f"hf://{tmp_path / 'set'}:train"
    asked = settings_for([name], tmp_path / "p", model)
    preprocess(dataclasses.replace(asked, metadata_keys=("meta.set",)))
    assert (tmp_path / "p_text_document.bin").read_bytes() == ids
    table = pq.read_table(tmp_path / "p_text_document.meta.parquet")
    assert set(table["source_file"].to_pylist()) == {name}
    with pytest.raises(UserError, match="hf://.*:none: the data set cannot be opened"):
        preprocess(settings_for([f"hf://{tmp_path / 'set'}:none"], tmp_path / "q", model))


@pytest.mark.parametrize("name", ["in.parquet", "in.jsonl"])
def test_pretokenized_records_with_scores(
    tmp_path: Path, rows: list[dict], ids: bytes, model: Path, name: str
) -> None:
    tokenizer = build_tokenizer("SentencePieceTokenizer", model)
    encoded = [{"input_ids": tokenizer.encode(r["text"]), "score": r["score"]} for r in rows]
    source = write(tmp_path / name, [*encoded, {"input_ids": [600]}, {"input_ids": None}])
    asked = dataclasses.replace(
        settings_for([source], tmp_path / "p", model),
        json_keys=("input_ids",),
        pretokenized=True,
        metadata_keys=("score",),
        on_bad_record="skip",
    )
    summary = preprocess(asked)
    assert summary.rejected == {"wrong type": 2}
    assert (tmp_path / "p_input_ids_document.bin").read_bytes() == ids
    table = pq.read_table(tmp_path / "p_input_ids_document.meta.parquet")
    assert table["score"].to_pylist() == [row["score"] for row in rows]


def test_byte_order_mark_and_long_lines(tmp_path: Path, model: Path) -> None:
    source = tmp_path / "in.jsonl"
    long = json.dumps({"text": "word " * 1000}).encode() + b"\n"
    good = b'{"text": "a b"}\n'
    source.write_bytes(codecs.BOM_UTF8 + good + long + good + long * 2 + good + long[:-1])
    for chunk_bytes in (10, 1 << 20):
        asked = dataclasses.replace(
            settings_for([source], tmp_path / f"p{chunk_bytes}", model),
            on_bad_record="skip", max_record_bytes=100, chunk_bytes=chunk_bytes,
        )  # fmt: skip
        summary = preprocess(asked)
        assert (summary.records, summary.rejected) == (7, {"over-long line": 4})
        rejects = [json.loads(row) for row in summary.rejects_path.open()]
        assert [row["line"] for row in rejects] == [2, 4, 5, 7]


def test_damaged_table_is_one_line(tmp_path: Path, rows: list[dict], model: Path) -> None:
    for name in ("in.parquet", "in.arrow"):
        source = write(tmp_path / name, rows)
        source.write_bytes(source.read_bytes()[:-40])
        with pytest.raises(UserError, match=name):
            preprocess(settings_for([source], tmp_path / "p", model))
        assert not list(tmp_path.glob("p*"))


def test_key_that_is_missing_is_said_after_a_thousand_records(tmp_path: Path, model: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"body": "some text"}\n' * 5000)
    asked = settings_for([source], tmp_path / "p", model)
    asked = dataclasses.replace(asked, on_bad_record="skip", chunk_bytes=25_000)
    with pytest.raises(UserError, match=r"none of the first 1[0-9]{3} records is a .*no key"):
        preprocess(asked)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("num_shards", [1, 2, 3, 5])
def test_shards_merge_to_the_whole(
    tmp_path: Path, rows: list[dict], model: Path, num_shards: int, run_fresh: Run
) -> None:
    cuts = [0, 2, 40, 55, 56, 90]
    for i, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False)):
        some = [{**row, "late": i} if i == 4 else row for row in rows[a:b]]
        write(tmp_path / f"in{i}.jsonl", [*some, {"text": ""}])
    asked = dataclasses.replace(
        settings_for([tmp_path / "in*.jsonl"], tmp_path / "p", model),
        metadata_keys=("score", "late", "meta.set"),
    )
    preprocess(asked)
    for shard in range(num_shards):
        preprocess(
            dataclasses.replace(
                asked, output_prefix=str(tmp_path / "s"), shard=shard, num_shards=num_shards
            )
        )
    parts = sorted(str(path) for path in tmp_path.glob("s*_text_document.idx"))
    done = run_fresh("merge_datasets.py", "--input", *parts, "--output-prefix", tmp_path / "m")
    assert done.returncode == 0, done.stderr
    for suffix in SUFFIXES:
        whole = (tmp_path / f"p_text_document.{suffix}").read_bytes()
        assert (tmp_path / f"m.{suffix}").read_bytes() == whole
    if num_shards > 1:
        with pytest.raises(UserError, match="give all of them, in order"):
            merge_datasets(parts[1:], str(tmp_path / "n"))


def test_tables_with_bytes_and_dates(tmp_path: Path, model: Path) -> None:
    """Binary columns are text; a date is spelled as such, a list of numbers as in JSON."""
    table = pa.table(
        {
            "text": pa.array([b"some text", "caf\u00e9".encode(), b"\xff"], pa.binary()),
            "domain": pa.array([b"web", b"web", b"web"], pa.large_binary()),
            "day": pa.array([datetime.date(2024, 1, 2), None, None]),
            "ids": pa.array([[1, 2], [], None], pa.list_(pa.int64())),
            "md5": pa.array([b"\x00\xff", b"ab", None], pa.binary()),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    asked = dataclasses.replace(
        settings_for([tmp_path / "in.parquet"], tmp_path / "p", model),
        metadata_keys=("domain", "day", "ids", "md5"),
        on_bad_record="skip",
    )
    assert preprocess(asked).rejected == {"invalid UTF-8": 1}
    sidecar = pq.read_table(tmp_path / "p_text_document.meta.parquet")
    assert sidecar.column("domain").to_pylist() == ["web", "web"]
    assert sidecar.column("day").to_pylist() == ["2024-01-02", None]
    assert sidecar.column("ids").to_pylist() == ["[1, 2]", "[]"]
    assert sidecar.column("md5").to_pylist() == ["00ff", "ab"]
    with pytest.raises(UserError, match='"day" is of type date, expected a string'):
        preprocess(
            dataclasses.replace(
                asked, output_prefix=f"{tmp_path}/q", json_keys=("day",), on_bad_record="error"
            )
        )


def test_shards_are_balanced_and_hold_every_file_once(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    for i in range(40):
        (tmp_path / f"{i:02d}.jsonl").write_bytes(b" " * int(generator.integers(1, 1000)))
    inputs = find_inputs([str(tmp_path)])
    total = sum(entry.size_bytes for entry in inputs)
    for num_shards in (1, 2, 7, 40):
        shards = [take_shard(inputs, i, num_shards) for i in range(num_shards)]
        assert [entry for shard in shards for entry in shard] == inputs
        sizes = [sum(entry.size_bytes for entry in shard) for shard in shards]
        assert max(sizes) <= total / num_shards + 1000
    with pytest.raises(UserError, match="take at most 40"):
        take_shard(inputs, 0, 41)
    with pytest.raises(UserError, match="expected 0 to 6"):
        take_shard(inputs, 7, 7)


def test_merge_refuses_what_does_not_go_together(
    tmp_path: Path, rows: list[dict], model: Path
) -> None:
    source = write(tmp_path / "in.jsonl", rows[:5])
    asked = settings_for([source], tmp_path / "a", model)
    a = f"{tmp_path}/a_text_document"
    preprocess(asked)
    b = f"{tmp_path}/b_text_document"
    preprocess(dataclasses.replace(asked, output_prefix=f"{tmp_path}/b", append_eod=False))
    out = tmp_path / "out"
    for inputs, words in (
        ([a, b], "append_eod"),
        ([a, a], "named twice"),
        ([a, f"{tmp_path}/absent"], "no such file"),
    ):
        with pytest.raises(UserError, match=words):
            merge_datasets(inputs, str(out))
    Path(f"{b}.meta.parquet").unlink()
    with pytest.raises(UserError, match="give all or none"):
        merge_datasets([a, b], str(out))
    ids = np.fromfile(f"{b}.bin", np.uint16)
    Path(f"{b}.bin").write_bytes(ids[:-1].tobytes())
    with pytest.raises(UserError, match="it is damaged"):
        merge_datasets([a, b], str(out))
    assert not list(tmp_path.glob("out*"))
