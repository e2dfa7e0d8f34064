"""What a selection writes: in Megatron-Core's reader, byte for byte, and row for row."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_dwm.preprocess.merge import merge_datasets
from megatron_dwm.selection import copy
from megatron_dwm.selection.pool import open_pool
from tests.selection.conftest import Dataset, Run, pq_table, random_documents, write_dataset

RANDOM = ("select_data.py", "random")


def documents_in(prefix: str) -> list[list[list[int]]]:
    """All documents of a dataset as Megatron-Core reads it: the ids of their sequences."""
    data = IndexedDataset(prefix)
    borders = data.document_indices
    return [
        [data[i].tolist() for i in range(begin, end)]
        for begin, end in zip(borders[:-1], borders[1:], strict=True)
    ]


def check(dataset: Dataset, output: str) -> list[int]:
    """Compare a selection with its input; returns the numbers of the chosen documents."""
    rows = pq_table(f"{output}.meta.parquet")
    chosen = rows.column("record").to_pylist()
    assert chosen == sorted(set(chosen))
    assert documents_in(output) == [list(map(list, dataset.documents[i])) for i in chosen]
    assert all(dataset.documents[i] for i in chosen)
    assert rows.equals(dataset.rows.take(chosen))
    assert rows.schema.equals(dataset.rows.schema, check_metadata=True)
    return chosen


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_documents_and_rows_are_those_of_the_input(
    tmp_path: Path, run: Run, dtype: type[np.number]
) -> None:
    documents = random_documents(np.random.default_rng(8), 300)
    dataset = write_dataset(tmp_path / "d", documents, {"n": list(range(300))}, dtype=dtype)
    done = run(*RANDOM, "--input", f"{tmp_path}/d.idx", "--output-prefix", tmp_path / "o",
               "--tokens", 3000)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the table names no domains: --domain-key" in done.stdout
    chosen = check(dataset, str(tmp_path / "o"))
    tokens = sum(len(s) for i in chosen for s in documents[i])
    longest = max(sum(map(len, d)) for d in documents)
    assert 3000 <= tokens < 3000 + longest
    record = json.loads((tmp_path / "o.select.json").read_text())
    assert record["total"]["chosen_tokens"] == tokens
    assert record["total"]["documents"] == 300
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("o")) == [
        *("o.bin", "o.idx", "o.meta.parquet", "o.select.json"),
    ]


def test_runs_are_cut_at_the_borders_of_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy, "_WINDOW_BYTES", 100)
    documents = random_documents(np.random.default_rng(9), 200)
    write_dataset(tmp_path / "d", documents, {"n": list(range(200))}, dtype=np.int32)
    pool = open_pool(str(tmp_path / "d"))
    chosen = np.random.default_rng(10).random(200) < 0.6
    windows: list[int] = []
    copy.copy_tokens(pool, chosen, tmp_path / "o.bin", lambda size, _: windows.append(size))
    ids = [id for i in np.flatnonzero(chosen) for part in documents[i] for id in part]
    assert np.fromfile(tmp_path / "o.bin", np.int32).tolist() == ids
    assert len(windows) > 20 and sum(windows) == (tmp_path / "d.bin").stat().st_size


def test_everything_is_the_input_without_empty_documents(dataset: Dataset, run: Run) -> None:
    output = f"{dataset.prefix}_all"
    total = sum(len(s) for d in dataset.documents for s in d)
    done = run(*RANDOM, "--input", dataset.prefix, "--output-prefix", output, "--tokens", total)
    assert done.returncode == 0, done.stderr
    assert check(dataset, output) == [i for i, d in enumerate(dataset.documents) if d]
    assert Path(f"{output}.bin").read_bytes() == Path(f"{dataset.prefix}.bin").read_bytes()


def test_complements_merge_to_the_corpus(corpus: str, tmp_path: Path, run: Run) -> None:
    """Real text: a selection's files are good for merging, and its report adds up."""
    outputs = []
    for seed in (1, 2):
        outputs.append(str(tmp_path / f"s{seed}"))
        done = run(*RANDOM, "--input", corpus, "--output-prefix", outputs[-1],
                   "--tokens", 100_000, "--seed", seed)  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert documents_in(outputs[0]) != documents_in(outputs[1])
    summary = merge_datasets(outputs, str(tmp_path / "both"))
    totals = [json.loads(Path(f"{o}.select.json").read_text())["total"] for o in outputs]
    assert summary.tokens == sum(total["chosen_tokens"] for total in totals)
    table = pq_table(f"{corpus}.meta.parquet")
    assert totals[0]["tokens"] == sum(table.column("tokens").to_pylist())


def test_shares_are_met(dataset: Dataset, run: Run) -> None:
    output = f"{dataset.prefix}_shares"
    done = run(*RANDOM, "--input", dataset.prefix, "--output-prefix", output, "--tokens", 1000,
               "--domain-shares", "web=0.7", "unknown=0.3")  # fmt: skip
    assert done.returncode == 0, done.stderr
    check(dataset, output)
    domains = json.loads(Path(f"{output}.select.json").read_text())["domains"]
    assert list(domains) == ["web", "code", "unknown"]
    longest = max(sum(map(len, d)) for d in dataset.documents)
    for name, budget in (("web", 700), ("code", 0), ("unknown", 300)):
        assert 0 <= domains[name]["chosen_tokens"] - budget < longest
    assert "code: 0 of" in done.stdout


def test_without_a_sidecar(dataset: Dataset, run: Run) -> None:
    Path(f"{dataset.prefix}.meta.parquet").unlink()
    output = f"{dataset.prefix}_bare"
    done = run(*RANDOM, "--input", dataset.prefix, "--output-prefix", output, "--tokens", 500)
    assert done.returncode == 0, done.stderr
    assert "no .meta.parquet, so neither has the result" in done.stdout
    assert not Path(f"{output}.meta.parquet").exists()
    assert documents_in(output)


def test_a_selection_without_its_sidecar_is_made_again(dataset: Dataset, run: Run) -> None:
    output = f"{dataset.prefix}_o"
    command = [*RANDOM, "--input", dataset.prefix, "--output-prefix", output, "--tokens", 500]
    assert run(*command).returncode == 0
    sidecar = Path(f"{output}.meta.parquet")
    before = sidecar.read_bytes()
    sidecar.unlink()
    done = run(*command)
    assert done.returncode == 0 and "complete already" not in done.stdout, done.stderr
    assert sidecar.read_bytes() == before


def test_same_selection_again(dataset: Dataset, run: Run) -> None:
    output = f"{dataset.prefix}_o"

    def select(*options: object) -> tuple[int, str, str]:
        done = run(*RANDOM, "--input", dataset.prefix, "--output-prefix", output, *options)
        return done.returncode, done.stdout, done.stderr

    code, first, _ = select("--tokens", 500)
    before = {p.name: p.stat().st_mtime_ns for p in Path(output).parent.glob("d_o.*")}
    assert code == 0
    code, again, _ = select("--tokens", 500)
    assert (code, again) == (0, f"{output}: complete already; nothing to do\n{first}")
    code, _, stderr = select("--tokens", 501)
    assert code == 2
    assert "a selection with other options is here" in stderr
    assert before == {p.name: p.stat().st_mtime_ns for p in Path(output).parent.glob("d_o.*")}
