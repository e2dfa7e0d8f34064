"""Losses of a reference from a file: the same run as with the model, and files that do not fit."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_dwm.config.schema import DataConfig
from megatron_dwm.data import TrainingData
from megatron_dwm.data.pieces import DocumentRules
from megatron_dwm.data.token_losses import open_token_losses
from megatron_dwm.files.token_losses import losses_path, map_losses, read_header
from tests.scoring.test_perplexity import TOLERANCE, expected_losses
from tests.selection.conftest import Run, write_dataset
from tests.small_runs.command import metrics, pretrain, succeed
from tests.small_runs.fixtures import Corpus

ALONE = ["--data.mask_documents", "true", "--data.border_loss", "false"]
UNITS = [
    ["--weighting.unit", "sample"],
    ["--weighting.unit", "document"],
    ["--weighting.unit", "token"],
]
# Sums in another order are 1e-7 apart; 6 steps of Adam at 3e-3 may multiply that.
RUN_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def aligned(
    short: Corpus, checkpoint: Path, run: Run, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """Documents of 16 tokens, which windows of 32 never cut, with the losses of a reference."""
    prefix = tmp_path_factory.mktemp("aligned") / "d"
    data = IndexedDataset(short.prefix)
    texts = [data[i][:16].tolist() for i in range(len(data)) if len(data[i]) >= 16]
    write_dataset(prefix, [[text] for text in texts], {})
    done = run("score_data.py", "--input", prefix, "--token-losses", "ref", "--model", checkpoint)
    assert done.returncode == 0, done.stderr
    return str(prefix)


def _arguments(corpus: Corpus, prefix: str, *options: str) -> list[str]:
    sizes = ["--data.train", prefix, "--model.vocab_size", "600", "--training.steps", "6"]
    method = ["--policy.name", "excess_loss", "--logging.weights_interval_steps", "1"]
    return [*corpus.arguments(), *sizes, *ALONE, *method, *options]


def test_losses_of_documents(
    short: Corpus, checkpoint: Path, export: Path, run: Run, tmp_path: Path
) -> None:
    """Token by token; the rows that pad the vocabulary take part, as in training."""
    data = IndexedDataset(short.prefix)
    documents = [[data[i].tolist()] for i in range(60)]
    documents.insert(7, [])
    write_dataset(tmp_path / "d", documents, {})
    done = run("score_data.py", "--input", tmp_path / "d", "--token-losses", "ref",
               "--model", checkpoint, "--context-tokens", 40)  # fmt: skip
    assert done.returncode == 0, done.stderr
    path = losses_path(str(tmp_path / "d"), "ref")
    header = read_header(path)
    assert (header.context_tokens, header.num_tokens) == (
        40,
        sum(len(d[0]) for d in documents if d),
    )
    found = map_losses(path, header)
    expected = [
        loss
        for document, losses in zip(
            documents, expected_losses(export, f"{tmp_path}/d", 40), strict=True
        )
        for loss in ([np.nan, *losses] if document else [])
    ]
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    # The padding has 40 of 640 rows, so it adds up to a few hundredths of a nat.
    assert (found >= np.array(expected) - TOLERANCE)[~np.isnan(found)].all()
    np.testing.assert_allclose(found, expected, atol=np.log(640 / 600) * 2)


def test_batches_carry_the_losses_of_their_labels(short: Corpus, tmp_path: Path) -> None:
    """The file says of every token which it is; so each label has to find itself."""
    from megatron_dwm.files.token_losses import TokenLossHeader, data_digest

    prefix = short.prefix
    tokens = np.fromfile(f"{prefix}.bin", IndexedDataset(prefix).index.dtype)
    for end in (".bin", ".idx", ".meta.parquet"):
        shutil.copy(prefix + end, f"{tmp_path}/d{end}")
    header = TokenLossHeader(
        model="m",
        model_digest="x",
        precision="fp32",
        context_tokens=9,
        num_tokens=len(tokens),
        data_digest=data_digest(f"{tmp_path}/d"),
    )
    path = losses_path(f"{tmp_path}/d", "ids")
    path.write_bytes(header.packed() + tokens.astype(np.float32).tobytes())
    config = DataConfig(train=[f"{tmp_path}/d"], sequence_length=33, domain_key="domain")
    data = TrainingData(
        config,
        eod_id=2,
        seed=5,
        num_samples=200,
        cache_dir=tmp_path,
        rules=DocumentRules(stop_attention=True, border_loss=False),
        token_losses=open_token_losses(config, "policy.reference_losses", "ids"),
    )
    batch = data.batch(range(200))
    assert batch.reference_losses_BS is not None
    expected = batch.labels_BS.float() * batch.loss_mask_BS
    assert batch.reference_losses_BS.equal(expected)
    assert 0 < int((batch.loss_mask_BS == 0).sum()) < batch.loss_mask_BS.numel()
    rows = batch.rows(3, 7)
    assert rows.reference_losses_BS is not None and rows.reference_losses_BS.equal(expected[3:7])


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit[-1])
def test_a_run_is_that_with_the_model(
    corpus: Corpus, aligned: str, checkpoint: Path, tmp_path: Path, unit: list[str]
) -> None:
    stored, model = tmp_path / "stored", tmp_path / "model"
    succeed(stored, *_arguments(corpus, aligned, *unit, "--policy.reference_losses", "ref"))
    succeed(model, *_arguments(corpus, aligned, *unit, "--policy.reference", str(checkpoint)))
    lines = zip(metrics(stored, "train"), metrics(model, "train"), strict=True)
    for step, (line, other) in enumerate(lines, start=1):
        for name in ("loss", "weight_std", "weight_min", "weight_max", "grad_norm"):
            assert line[name] == pytest.approx(other[name], rel=RUN_TOLERANCE, abs=1e-6), name
        # Forward and backward are three passes; a batch waits for its weights in one more (group
        # global); the reference's is the only one that is saved.
        assert other["flops"] > line["flops"] * 1.1, step
    tables = [
        ds.dataset(folder / "weights").to_table().sort_by([("step", "ascending")])
        for folder in (stored, model)
    ]
    weights, others = (table.column("weight").to_numpy() for table in tables)
    np.testing.assert_allclose(weights, others, rtol=1e-6)
    assert len(np.unique(weights)) > 1


def test_layouts_read_the_same(corpus: Corpus, aligned: str, tmp_path: Path) -> None:
    options = [*UNITS[2], "--policy.reference_losses", "ref"]
    alone, split = tmp_path / "alone", tmp_path / "split"
    succeed(alone, *_arguments(corpus, aligned, *options))
    layout = ["--parallel.pipeline", "2"]
    succeed(split, *_arguments(corpus, aligned, *options, *layout), processes=2)
    for line, other in zip(metrics(alone, "train"), metrics(split, "train"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=RUN_TOLERANCE)
        assert line["flops"] == other["flops"]


def test_mistakes(corpus: Corpus, aligned: str, checkpoint: Path, run: Run, tmp_path: Path) -> None:
    shutil.copytree(Path(aligned).parent, tmp_path / "data")
    prefix, losses = str(tmp_path / "data" / "d"), losses_path(str(tmp_path / "data" / "d"), "ref")
    whole = losses.read_bytes()

    def fails(words: str, *options: str) -> None:
        done = pretrain(
            tmp_path / "run",
            *_arguments(corpus, prefix, "--policy.reference_losses", "ref", *options),
        )
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert words in done.stderr and not (tmp_path / "run").exists()

    fails("set data.mask_documents true", "--data.mask_documents", "false")
    fails("set data.border_loss false", "--data.border_loss", "true")
    fails("no file ", "--policy.reference_losses", "other")
    fails("policy.reference: has no effect", "--policy.reference", str(checkpoint))
    losses.write_bytes(whole[:-4])
    fails("it was cut short")
    losses.write_bytes(b"x" * 5000)
    fails("no file of token losses of this version")
    losses.write_bytes(whole)
    write_dataset(Path(prefix), [[[3] * 16]] * 50, {})
    fails("has the losses of other data")

    done = run("score_data.py", "--input", prefix, "--token-losses", "ref", "--model", checkpoint)
    assert done.returncode == 2 and "exists; pass --replace" in done.stderr
    assert losses.read_bytes() == whole
    done = run("score_data.py", "--input", prefix, "--token-losses", "ref")
    assert done.returncode == 2 and "--token-losses: needs --model" in done.stderr
    done = run("score_data.py", "--input", prefix, "--token-losses", "../r", "--model", checkpoint)
    assert done.returncode == 2 and "--token-losses ../r: expected a name without /" in done.stderr
    write_dataset(tmp_path / "two", [[[1], [2, 3]]], {})
    done = run("score_data.py", "--input", tmp_path / "two", "--token-losses", "ref",
               "--model", checkpoint)  # fmt: skip
    assert done.returncode == 2 and "documents of several sequences" in done.stderr
    assert not losses_path(str(tmp_path / "two"), "ref").exists()
