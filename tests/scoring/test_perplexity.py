"""Losses of documents against transformers' model of the same weights, one document at a time."""

from __future__ import annotations

import math
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoModelForCausalLM

from megatron_dwm.selection.windows import batch_of, batches_of, windows_of
from tests.selection.conftest import Run, pq_table, write_dataset
from tests.small_runs.fixtures import Corpus

# Sums of float32 in another order, over some hundred tokens.
TOLERANCE = 1e-4


def expected_losses(export: Path, prefix: str, context: int) -> list[list[float]]:
    """Each document's token losses by transformers, in windows that share one token."""
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    found = []
    data = IndexedDataset(prefix)
    for document in range(len(data.document_indices) - 1):
        first, last = data.document_indices[document : document + 2]
        ids = [int(token) for number in range(first, last) for token in data[number]]
        losses: list[float] = []
        for begin in range(0, len(ids) - 1, context):
            window = torch.tensor([ids[begin : begin + context + 1]])
            with torch.no_grad():
                logits = model(input_ids=window[:, :-1]).logits[0]
            losses += F.cross_entropy(logits, window[0, 1:], reduction="none").tolist()
        found.append(losses)
    return found


def test_windows_cover_every_token_once() -> None:
    lengths_D = np.array([0, 1, 7, 8, 9, 17, 0])
    windows = windows_of(lengths_D, 8)
    ids = np.arange(lengths_D.sum())
    read, predicted = [], []
    for chosen_B in batches_of(windows.lengths_W, 16):
        batch = batch_of(ids, windows, chosen_B)
        assert batch.tokens_BS.numel() <= 16
        read += batch.tokens_BS[batch.units_BS >= 0].tolist()
        predicted += batch.labels_BS[batch.loss_mask_BS > 0].tolist()
    assert sorted(read) == ids.tolist()
    firsts = (np.cumsum(lengths_D) - lengths_D)[lengths_D > 0]
    assert sorted(predicted) == sorted({*ids.tolist()} - {*firsts.tolist()})


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_losses_are_those_of_transformers(
    short: Corpus, checkpoint: Path, export: Path, run: Run, tmp_path: Path, kind: str
) -> None:
    data = IndexedDataset(short.prefix)
    texts = [[data[i].tolist()] for i in range(120)]
    documents = [*texts, [], [[5]], [texts[3][0], texts[60][0], texts[119][0]]]
    write_dataset(tmp_path / "d", documents, {})
    model = checkpoint if kind == "checkpoint" else export
    done = run("score_data.py", "--input", tmp_path / "d", "--columns", "loss", "perplexity",
               "--model", model)  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = pq_table(f"{tmp_path}/d.meta.parquet")
    expected = [
        np.mean(losses) if losses else math.log(600)
        for losses in expected_losses(export, str(tmp_path / "d"), 64)
    ]
    assert max(len(d[0]) for d in texts) > 2 * 64, "some documents have several windows"
    loss_D = table.column("loss").to_numpy()
    np.testing.assert_allclose(loss_D, expected, rtol=TOLERANCE)
    np.testing.assert_allclose(table.column("perplexity").to_numpy(), np.exp(loss_D), rtol=1e-12)
    assert "a guess's is" not in done.stderr


def test_a_loss_above_a_guess_is_said(
    short: Corpus, export: Path, run: Run, tmp_path: Path
) -> None:
    """As of data with another tokenizer's ids, here those of the model in reverse order."""
    data = IndexedDataset(short.prefix)
    write_dataset(tmp_path / "d", [[(599 - data[i]).tolist()] for i in range(20)], {})
    done = run("score_data.py", "--input", tmp_path / "d", "--columns", "loss", "--model", export)
    assert done.returncode == 0, done.stderr
    assert f"nats a token, a guess's is {math.log(600):.3g}" in done.stderr


def test_an_export_fits_data_of_its_tokenizer_and_of_training_s(
    short: Corpus, export: Path, run: Run, tmp_path: Path
) -> None:
    """The export spells training's SentencePiece model anew, with another digest."""
    own = sha256((export / "tokenizer.json").read_bytes()).hexdigest()
    for digest in (own, sha256(Path(short.tokenizer).read_bytes()).hexdigest()):
        facts = {"tokenizer_sha256": digest, "vocab_size": "512"}
        write_dataset(tmp_path / digest, [[[1, 2, 511]], [[4, 5]]], {}, facts=facts)
        columns = ("--input", tmp_path / digest, "--columns", "loss", "--model", export)
        done = run("score_data.py", *columns)
        assert done.returncode == 0, done.stderr


def test_mistakes(checkpoint: Path, export: Path, run: Run, tmp_path: Path) -> None:
    documents = [[[1, 2, 599]], [[4, 5]]]
    facts = {"tokenizer_sha256": "f" * 64}
    write_dataset(tmp_path / "d", documents, {})
    write_dataset(tmp_path / "other", documents, {}, facts={**facts, "vocab_size": "512"})
    same_size = {**facts, "vocab_size": "512"}
    write_dataset(tmp_path / "same_size", documents, {}, facts=same_size)
    write_dataset(tmp_path / "larger", documents, {}, facts={**facts, "vocab_size": "900"})
    write_dataset(tmp_path / "ids", [[[1, 2, 600]]], {})
    (tmp_path / "empty").mkdir()
    model = ("--model", checkpoint)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.meta.parquet")}
    for name, options, words in (
        ("d", (), "--columns perplexity: needs --model"),
        ("d", ("--model", tmp_path / "no"), "no such directory"),
        ("d", ("--model", tmp_path / "empty"), "not a checkpoint"),
        ("d", (*model, "--context-tokens", 0), "--context-tokens 0: expected 1 or more"),
        ("d", (*model, "--tokenizer", "x"), "--tokenizer x: has no effect"),
        ("d", ("--precision", "bf16"), "--precision: has no effect without --model"),
        ("d", (*model, "--workers", 2), "--workers: has no effect without statistics of texts"),
        ("d", ("--context-tokens", 8), "--context-tokens: has no effect without --model"),
        ("other", model, "its tokenizer is "),
        ("same_size", ("--model", export), "its tokenizer is "),
        ("larger", model, "a vocabulary of 600, but "),
        ("ids", model, "ids.bin: has an id outside the vocabulary of "),
    ):
        columns = ("--input", tmp_path / name, "--columns", "perplexity")
        done = run("score_data.py", *columns, *options)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert words in done.stderr
    assert {path: path.read_bytes() for path in tmp_path.glob("*.meta.parquet")} == before
