"""Real text, tokenized and written with Megatron-Core's own builder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_dwm.tokenizer import Tokenizer, build_tokenizer, train_sentencepiece

SHARED = Path(__file__).parents[3] / "shared" / "data"
CORPUS = Path(__file__).parents[2] / "examples" / "corpus"
# Pieces of the tokenizer that is trained where the one of 32,000 is not at hand.
FEWER_PIECES = 4000
DOMAIN_KEY = "meta.redpajama_set_name"


@dataclass(frozen=True)
class Document:
    """One document of the corpus; an empty one has no tokens and no sequence."""

    ids: list[int]
    domain: str


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with bytes of Megatron-LM's tool, and with passages whose lengths are known."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the files in {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def passages() -> Path:
    """Passages of real text, one a line."""
    lambada = SHARED / "lambada_style.jsonl"
    return lambada if lambada.is_file() else CORPUS / "validation.jsonl"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A real SentencePiece tokenizer, of 32,000 pieces if it is at hand."""
    model = SHARED / "tokenizer_32k.model"
    if not model.is_file():
        model = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
        texts = [record["text"] for record in _lines(CORPUS / "train.jsonl.zst", 4)]
        train_sentencepiece(texts, vocab_size=FEWER_PIECES, output=str(model))
    return build_tokenizer("SentencePieceTokenizer", str(model))


@pytest.fixture(scope="session")
def records() -> list[dict]:
    """Some 150 records of a corpus of several domains."""
    pajama = SHARED / "slimpajama_mini.jsonl.zst"
    return _lines(pajama, 40) if pajama.is_file() else _lines(CORPUS / "train.jsonl.zst", 8)


def _lines(file: Path, step: int) -> list[dict]:
    with zstandard.open(file, "rt", encoding="utf-8") as text:
        return [json.loads(line) for i, line in enumerate(text) if i % step == 0]


@pytest.fixture(scope="session")
def documents(records: list[dict], tokenizer: Tokenizer) -> list[Document]:
    """Their tokens, each ended; two documents are empty."""
    out = [
        Document([*tokenizer.encode(r["text"][:3000]), tokenizer.eod_id], _domain(r))
        for r in records
    ]
    out[3] = Document([], out[3].domain)
    out[-1] = Document([], out[-1].domain)
    return out


def _domain(record: dict) -> str:
    return record["meta"]["redpajama_set_name"]


def write_indexed(prefix: Path, documents: Sequence[Document], dtype: type = np.uint16) -> str:
    """Write the tokens as Megatron-LM's tool does: no sequence for a document without tokens."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        lengths = [len(document.ids)] if document.ids else []
        builder.add_document(torch.tensor(document.ids, dtype=torch.int64), lengths)
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def write_sidecar(
    prefix: Path | str, documents: Sequence[Document], tokenizer: Tokenizer | None, **changes: str
) -> None:
    """Write the metadata that preprocessing leaves beside the tokens."""
    table = pa.table(
        {
            "source_file": ["corpus.jsonl"] * len(documents),
            "record": list(range(len(documents))),
            "tokens": [len(d.ids) for d in documents],
            DOMAIN_KEY: [d.domain for d in documents],
        }
    )
    marks = {"append_eod": "true", **changes}
    if tokenizer is not None:
        marks = {
            "tokenizer_kind": tokenizer.kind,
            "tokenizer_sha256": tokenizer.sha256,
            "vocab_size": str(tokenizer.vocab_size),
            **marks,
        }
    pq.write_table(
        table.replace_schema_metadata(marks), f"{prefix}.meta.parquet", row_group_size=50
    )


@pytest.fixture(scope="session")
def corpus(
    tmp_path_factory: pytest.TempPathFactory, documents: list[Document], tokenizer: Tokenizer
) -> str:
    """Prefix of the indexed corpus with its sidecar."""
    prefix = tmp_path_factory.mktemp("corpus") / "corpus_text_document"
    write_indexed(prefix, documents)
    write_sidecar(prefix, documents, tokenizer)
    return str(prefix)


@pytest.fixture(scope="session")
def two(
    tmp_path_factory: pytest.TempPathFactory, documents: list[Document], tokenizer: Tokenizer
) -> list[str]:
    """Prefixes of the first 60 documents and of the rest, with sidecars."""
    folder = tmp_path_factory.mktemp("two")
    prefixes = []
    for name, part in (("a", documents[:60]), ("b", documents[60:])):
        prefixes.append(write_indexed(folder / name, part))
        write_sidecar(folder / name, part, tokenizer)
    return prefixes


@pytest.fixture
def indexed_writer() -> Callable[..., str]:
    """`write_indexed`, for tests that need other data."""
    return write_indexed


@pytest.fixture
def sidecar_writer() -> Callable[..., None]:
    """`write_sidecar`, for tests that need other data."""
    return write_sidecar
