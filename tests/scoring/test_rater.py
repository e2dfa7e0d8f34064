"""Scores of a weighting model against windows that are scored one at a time, in plain groups."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_dwm.tokenizer import open_tokenizer
from megatron_dwm.weighting.model import WeightingModel, WeightingShape, build_weighting_model
from tests.selection.conftest import Run, pq_table
from tests.small_runs.command import succeed
from tests.small_runs.fixtures import Corpus

LENGTH, GROUP, EARLY = 24, 5, 1
SHAPE = WeightingShape(
    vocab_size=512, hidden_size=32, num_layers=2, num_attention_heads=4, ffn_hidden_size=64
)


def write_rater(run_dir: Path, shape: WeightingShape) -> WeightingModel:
    """A model whose heads are not zero, where a run would leave it."""
    model = build_weighting_model(shape, seed=3)
    for head in (model.head, model.sample_head):
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(5))
    directory = run_dir / "weighting" / "stage_1"
    directory.mkdir(parents=True)
    for name, content in model.files().items():
        (directory / name).write_bytes(content)
    config = {
        "data": {"sequence_length": LENGTH},
        "weighting": {"group": "micro_batch", "early_layer": EARLY},
        "training": {"global_batch_size": 2 * GROUP, "micro_batch_size": GROUP},
    }
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    return model


@pytest.fixture
def data(short: Corpus, tmp_path: Path) -> str:
    for end in (".bin", ".idx", ".meta.parquet"):
        shutil.copy(short.prefix + end, f"{tmp_path}/d{end}")
    return f"{tmp_path}/d"


def _documents(prefix: str) -> list[list[int]]:
    data = IndexedDataset(prefix)
    return [data[i].tolist() for i in range(len(data))]


def _companions(documents: list[list[int]]) -> list[list[int]]:
    drawn = np.random.default_rng(1234).choice(len(documents), GROUP - 1, replace=False)
    return [documents[i][:LENGTH] for i in sorted(drawn)]


def _mean_over_windows(document: list[int], logit: object) -> float:
    windows = [document[i : i + LENGTH] for i in range(0, len(document), LENGTH)]
    labels = [document[i + 1 : i + 1 + LENGTH] for i in range(0, len(document), LENGTH)]
    values = [logit(window, label) for window, label in zip(windows, labels, strict=True)]
    return float(np.average(values, weights=[len(window) for window in windows]))


@torch.no_grad()
def test_own_encoder(data: str, short: Corpus, run: Run, tmp_path: Path) -> None:
    sha256 = open_tokenizer(short.tokenizer).sha256
    model = write_rater(tmp_path / "run", replace(SHAPE, tokenizer_sha256=sha256))
    rater = tmp_path / "run" / "weighting" / "stage_1"
    done = run("score_data.py", "--input", data, "--columns", "weight", "--rater", rater)
    assert done.returncode == 0, done.stderr
    found = pq_table(f"{data}.meta.parquet").column("weight").to_numpy()
    documents = _documents(data)
    encoded = [model.encoder(torch.tensor([text])) for text in _companions(documents)]

    def logit(window: list[int], _: list[int]) -> float:
        group_1nD = torch.cat([model.encoder(torch.tensor([window])), *encoded])[None]
        return float(model.logits(group_1nD)[0, 0])

    expected = [_mean_over_windows(document, logit) for document in documents]
    # float32, of encoders that see padded rows beside it.
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.std(expected) > 0.1


@torch.no_grad()
def test_features_of_the_llm(data: str, run: Run, tmp_path: Path) -> None:
    shape = replace(SHAPE, encoder="llm", feature_size=64)
    model = write_rater(tmp_path / "run", shape)
    rater = tmp_path / "run" / "weighting" / "stage_1"
    # 512 ids need no padding, which would take part in the losses that the features have.
    config = LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                         num_attention_heads=4, initializer_range=0.2)  # fmt: skip
    torch.manual_seed(8)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    done = run("score_data.py", "--input", data, "--columns", "weight", "--rater", rater,
               "--model", tmp_path / "hf")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = pq_table(f"{data}.meta.parquet").column("weight").to_numpy()
    llm = LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    documents = _documents(data)

    def row(window: list[int], labels: list[int]) -> Tensor:
        out = llm(input_ids=torch.tensor([window]), output_hidden_states=True)
        hidden = [out.hidden_states[layer][0].mean(dim=0) for layer in (-1, EARLY)]
        logits = out.logits[0, : len(labels)]
        loss = F.cross_entropy(logits, torch.tensor(labels)) if labels else torch.tensor(0.0)
        return torch.cat([*hidden, loss[None]])

    companions = [row(text, text[1:]) for text in _companions(documents)]
    whole = [i for i, document in enumerate(documents) if len(document) > 1]

    def logit(window: list[int], labels: list[int]) -> float:
        rows_1nK = torch.stack([row(window, labels), *companions])[None]
        sizes_1n = torch.ones(1, GROUP)
        sizes_1n[0, 0] = bool(labels)
        return float(model.logits(model.encoder(rows_1nK, sizes_1n))[0, 0])

    expected = [_mean_over_windows(documents[i], logit) for i in whole]
    # Losses of float32, divided by their deviation inside a group.
    np.testing.assert_allclose(found[whole], expected, atol=1e-3)
    assert np.std(expected) > 0.1


@pytest.mark.parametrize("unit", ["sample", "document"])
@torch.no_grad()
def test_groups_of_one_row(data: str, short: Corpus, run: Run, tmp_path: Path, unit: str) -> None:
    """A row is a group of one sample, or of as many documents as fill it."""
    sha256 = open_tokenizer(short.tokenizer).sha256
    model = write_rater(tmp_path / "run", replace(SHAPE, tokenizer_sha256=sha256))
    file = tmp_path / "run" / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config["training"]["micro_batch_size"] = 1
    config["weighting"]["unit"] = unit
    config["data"]["sequence_length"] = 512
    file.write_text(yaml.safe_dump(config))
    rater = tmp_path / "run" / "weighting" / "stage_1"
    done = run("score_data.py", "--input", data, "--columns", "weight", "--rater", rater)
    assert done.returncode == 0, done.stderr
    found = pq_table(f"{data}.meta.parquet").column("weight").to_numpy()
    documents = _documents(data)
    mean = np.mean([len(document) for document in documents])
    count = 1 if unit == "sample" else round(512 / mean)
    assert (count == 1) == (unit == "sample")
    drawn = np.random.default_rng(1234).choice(len(documents), count - 1, replace=False)
    encoded = [model.encoder(torch.tensor([documents[i]])) for i in sorted(drawn)]
    for number in range(0, len(documents), 37):
        alone = model.encoder(torch.tensor([documents[number]]))
        expected = float(model.logits(torch.cat([alone, *encoded])[None])[0, 0])
        assert found[number] == pytest.approx(expected, abs=2e-5)


def test_scored_and_selected_in_one(data: str, corpus: Corpus, run: Run, tmp_path: Path) -> None:
    """With the weighting model of a real run, as with its column."""
    method = ["--policy.name", "dwm", "--weighting.encoder", "own", "--training.steps", "8"]
    succeed(tmp_path / "run", *corpus.arguments(), *method)
    [rater, *_] = sorted((tmp_path / "run" / "weighting").glob("stage_*"))
    common = ("select_data.py", "rater", "--input", data, "--tokens", 2000, "--top-k")
    one = run(*common, "--output-prefix", tmp_path / "one", "--rater", rater)
    assert one.returncode == 0, one.stderr
    done = run("score_data.py", "--input", data, "--columns", "weight", "--rater", rater)
    assert done.returncode == 0, done.stderr
    two = run(*common, "--output-prefix", tmp_path / "two", "--column", "weight")
    assert two.returncode == 0, two.stderr
    assert (tmp_path / "one.bin").read_bytes() == (tmp_path / "two.bin").read_bytes()
    table = pq_table(f"{data}.meta.parquet")
    best = table.sort_by([("weight", "descending")]).column("tokens").to_numpy()
    count = int(np.searchsorted(np.cumsum(best), 2000)) + 1
    assert pq_table(f"{tmp_path}/one.meta.parquet").num_rows == count
    assert json.loads((tmp_path / "one.select.json").read_text())["method"] == "rater"


def test_mistakes(data: str, checkpoint: Path, run: Run, tmp_path: Path) -> None:
    write_rater(tmp_path / "other", replace(SHAPE, tokenizer_sha256="f" * 64))
    write_rater(tmp_path / "size", replace(SHAPE, vocab_size=300))
    write_rater(tmp_path / "wide", replace(SHAPE, encoder="llm", feature_size=48))
    write_rater(tmp_path / "moved", replace(SHAPE, encoder="llm", feature_size=64))
    (tmp_path / "moved" / "config.yaml").unlink()
    before = sorted(tmp_path.iterdir()), Path(f"{data}.meta.parquet").read_bytes()
    model = ("--model", checkpoint)
    for run_name, options, words in (
        ("other", (), "was trained with tokenizer ffffffffffff of 512 pieces, but "),
        ("size", (), "was trained with tokenizer "),
        ("wide", (), "reads the LLM's features (weighting.encoder llm); name the checkpoint"),
        ("wide", model, "has hidden states of width 64, but "),
        ("moved", model, "config.yaml is not the configuration of its run"),
        ("no", model, "weighting.json is missing; expected a directory such as"),
    ):
        rater = ("--rater", tmp_path / run_name / "weighting" / "stage_1")
        outputs = ("--output-prefix", tmp_path / "o", "--tokens", 100)
        for command in (
            ("score_data.py", "--columns", "weight"),
            ("select_data.py", "rater", *outputs),
        ):
            done = run(*command, "--input", data, *rater, *options)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
            assert words in done.stderr and "--rater" in done.stderr
    one = ("select_data.py", "rater", "--input", data, "--output-prefix", tmp_path / "o")
    for options, words in (
        (("--tokens", 10**9, "--rater", tmp_path / "no"), "--tokens 1000000000: the data has "),
        (("--tokens", 9, "--column", "domain"), "column domain (--column) is of type string"),
        (("--tokens", 9, "--column", "tokens", *model), "--model: has no effect with --column"),
        (("--tokens", 9), "one of the arguments --rater --column is required"),
    ):
        done = run(*one, *options)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert words in done.stderr
    assert (sorted(tmp_path.iterdir()), Path(f"{data}.meta.parquet").read_bytes()) == before
