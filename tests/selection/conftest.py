"""Small datasets to select from."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_dwm.files.sidecar_format import sidecar_schema, write_row_groups
from megatron_dwm.preprocess.write.index_writer import write_index
from megatron_dwm.selection.copy import Advance
from tests.forking.client import run_python

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
Run = Callable[..., subprocess.CompletedProcess[str]]
Document = Sequence[Sequence[int]]
"""the ids of each of its sequences"""


@dataclass(frozen=True)
class Dataset:
    """A dataset on disk, and what is in it."""

    prefix: str
    documents: list[Document]
    rows: pa.Table


@contextmanager
def quiet(total_bytes: int) -> Iterator[Advance]:  # noqa: ARG001
    """Progress that shows nothing."""
    yield lambda *_: None


def write_dataset(
    prefix: Path,
    documents: list[Document],
    columns: dict[str, list[Any]],
    *,
    dtype: type[np.number] = np.uint16,
    facts: dict[str, str] | None = None,
) -> Dataset:
    """Write documents with metadata columns, as preprocessing does."""
    lengths = [[len(s) if i == 0 else -len(s) for i, s in enumerate(d)] or [0] for d in documents]
    signed = np.array([n for entry in lengths for n in entry], np.int32)
    write_index(Path(f"{prefix}.idx"), dtype, lambda: iter([signed] if len(signed) else []))
    flat = [i for document in documents for sequence in document for i in sequence]
    Path(f"{prefix}.bin").write_bytes(np.array(flat, dtype).tobytes())
    own = {
        "source_file": ["in.jsonl"] * len(documents),
        "record": list(range(len(documents))),
        "tokens": [sum(map(len, document)) for document in documents],
    }
    metadata = pa.table(columns) if columns else pa.table({"record": own["record"]}).select([])
    schema = sidecar_schema([(f.name, f.type) for f in metadata.schema], facts or {})
    rows = pa.table({**own, **{n: metadata.column(n) for n in metadata.column_names}}, schema)
    write_row_groups(Path(f"{prefix}.meta.parquet"), schema, [rows])
    return Dataset(prefix=str(prefix), documents=documents, rows=rows)


def random_documents(generator: np.random.Generator, count: int) -> list[Document]:
    """Documents of 0 to 4 sequences of 1 to 30 ids."""
    return [
        [generator.integers(0, 60_000, n).tolist() for n in generator.integers(1, 30, sequences)]
        for sequences in generator.integers(0, 5, count)
    ]


@pytest.fixture(scope="session")
def run() -> Run:
    """Runs a script of tools/ with a user's arguments."""

    def run_tool(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return run_python([f"tools/{tool}", *map(str, arguments)])

    return run_tool


@pytest.fixture(scope="session")
def corpus_dir() -> Path:
    """The corpus that the repository ships."""
    return ROOT / "examples" / "corpus"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path) -> Path:
    """A tokenizer of 600 pieces."""
    from megatron_dwm.preprocess.read.texts import read_texts
    from megatron_dwm.tokenizer import train_sentencepiece

    path = tmp_path_factory.mktemp("tokenizer") / "tok.model"
    texts = read_texts([str(corpus_dir / "validation.jsonl")], "text")
    train_sentencepiece(texts, vocab_size=600, output=path)
    return path


@pytest.fixture(scope="session")
def corpus(
    tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path, model: Path, run: Run
) -> str:
    """The prefix of the sample corpus, preprocessed with the tokenizer `model`."""
    folder = tmp_path_factory.mktemp("corpus")
    done = run(
        *("preprocess_data.py", "--input", corpus_dir / "train.jsonl.zst"),
        *("--output-prefix", folder / "c", "--tokenizer-type", "SentencePieceTokenizer"),
        *("--tokenizer-model", model, "--append-eod", "--workers", 1),
        *("--metadata-keys", "meta.redpajama_set_name", "source"),
    )
    assert done.returncode == 0, done.stderr
    return str(folder / "c_text_document")


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """200 random documents, some of several sequences and some empty, in two domains."""
    generator = np.random.default_rng(3)
    documents = random_documents(generator, 200)
    columns = {
        "meta.redpajama_set_name": [("web", "code", None)[i % 3] for i in range(200)],
        "score": generator.normal(size=200).tolist(),
    }
    return write_dataset(tmp_path / "d", documents, columns, facts={"tokenizer_sha256": "abc"})


def pq_table(path: str) -> pa.Table:
    """A sidecar's content."""
    return pq.read_table(path)
