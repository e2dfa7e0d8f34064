"""A run that starts from public weights starts with exactly their model."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from megatron_dwm.config import Config, DataConfig, ModelConfig, UserError
from megatron_dwm.convert.from_hf import import_from_huggingface
from megatron_dwm.convert.tokenizer_files import write_tokenizer_files
from megatron_dwm.model import resolve_shape
from megatron_dwm.model.on_disk.huggingface_files import open_huggingface
from megatron_dwm.run.checks import check
from megatron_dwm.tokenizer import Tokenizer
from tests.convert.families import VOCAB_SIZE, write_llama
from tests.forking.client import REPOSITORY, run_python
from tests.own_environment import kept_environment
from tests.small_runs.command import RESUME, metrics, pretrain, succeed

SEQUENCE_LENGTH = 64
PASSAGES = 12


@pytest.fixture(scope="module")
def public(small_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_llama(
        tmp_path_factory.mktemp("public"), tie_word_embeddings=True, initializer_range=0.05
    )
    write_tokenizer_files(small_tokenizer, 256, directory)
    return directory


@pytest.fixture(scope="module")
def data(public: Path, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Returns data that were preprocessed with this model's tokenizer."""
    prefix = tmp_path_factory.mktemp("data") / "data"
    command = ["tools/preprocess_data.py", "--output-prefix", prefix, "--append-eod"]
    command += ["--input", REPOSITORY / "examples/corpus/validation.jsonl"]
    command += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", public]
    run_python(list(map(str, command))).check_returncode()
    return DataConfig(train=[f"{prefix}_text_document"], tokenizer=str(public))


@torch.no_grad()
def _last_words(directory: Path, texts: list[str]) -> tuple[float, float]:
    """Perplexity of the last words, and the fraction of passages whose every token is the largest.

    The model is transformers'.
    """
    model = LlamaForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    total, right = 0.0, 0
    for text in texts:
        ids = tokenizer.encode(text)
        start = len(tokenizer.encode(text.rpartition(" ")[0]))
        scores_SV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        word = torch.tensor(ids[start:])
        total += scores_SV[start - 1 : -1].gather(1, word[:, None]).sum().item()
        right += torch.equal(scores_SV[start - 1 : -1].argmax(-1), word)
    return math.exp(-total / len(texts)), right / len(texts)


def test_runs_start_from_public_weights(
    public: Path, data: DataConfig, texts: list[str], tmp_path: Path
) -> None:
    passages = {
        "long": [" ".join(text.split()[-24:]) for text in texts[: PASSAGES // 3]],
        "short": [" ".join(text.split()[-12:]) for text in texts[PASSAGES // 3 : PASSAGES]],
    }
    lines = [{"text": each, "domain": name} for name in passages for each in passages[name]]
    (tmp_path / "heldout.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with kept_environment():
        import_from_huggingface(public, tmp_path / "ours")
    arguments = [
        *("--data.train", data.train[0], "--data.domain_key", "domain"),
        *("--data.tokenizer", str(public), "--data.sequence_length", str(SEQUENCE_LENGTH)),
        *("--evaluation.path", str(tmp_path / "heldout.jsonl")),
        *("--training.global_batch_size", "8", "--training.micro_batch_size", "4"),
        # So small that the evaluation after the step sees the original model.
        *("--training.steps", "1", "--training.learning_rate", "1e-12"),
        *("--logging.tensorboard", "false"),
    ]
    succeed(tmp_path / "one", *arguments, "--model.init_from", str(public))
    both = ("--model.init_from", str(tmp_path / "ours"), "--parallel.tensor", "2")
    succeed(tmp_path / "two", *arguments, *both, processes=2)
    expected = {name: _last_words(public, those) for name, those in passages.items()}
    [one], [two] = (metrics(tmp_path / name, "evaluation") for name in ("one", "two"))
    for line in (one, two):
        for name, (perplexity, accuracy) in expected.items():
            assert line["domain_last_word_perplexity"][name] == pytest.approx(perplexity, rel=1e-4)
            assert line["domain_last_word_accuracy"][name] == accuracy
            loss = line["domain_loss"][name]
            assert line["domain_perplexity"][name] == pytest.approx(math.exp(loss))
        losses = line["domain_loss"]
        assert line["loss"] == pytest.approx((losses["long"] + losses["short"]) / 2)
        assert abs(losses["long"] - losses["short"]) > 1e-4, "another mean would be another number"
    [step], [other] = (metrics(tmp_path / name, "train") for name in ("one", "two"))
    assert step["loss"] == pytest.approx(other["loss"], rel=1e-6)
    # With fp32 main parameters, which the step writes back into the model.
    for name, more, size in (("plain", [], 1), ("sharded", ["--parallel.sharded_optimizer"], 2)):
        more = [*more, *(["true"] if more else []), "--model.precision", "bf16"]
        start = [*arguments, "--model.init_from", str(public), *more]
        succeed(tmp_path / name, *start, processes=size)
        [line] = metrics(tmp_path / name, "evaluation")
        # bf16 has 8 bits: 0.4 % of a logit of 0.4. Another random model differs by 0.05 and more.
        assert line["domain_loss"] == pytest.approx(one["domain_loss"], abs=0.01)


def test_the_shape_is_that_of_the_public_model(public: Path) -> None:
    found = open_huggingface(public).shape
    config = ModelConfig(init_from=str(public), hidden_size=64, init_std=0.5)
    assert resolve_shape(config, 900, init_from=found) == found
    assert found.vocab_size == VOCAB_SIZE


def test_only_what_differs_is_named(public: Path) -> None:
    found = open_huggingface(public).shape
    config = ModelConfig(init_from=str(public), hidden_size=32, num_layers=4, norm_epsilon=1e-3)
    with pytest.raises(UserError) as raised:
        resolve_shape(config, init_from=found)
    assert str(raised.value) == (
        f"model.init_from: {public} has hidden_size 64 where the run asks for 32, norm_epsilon "
        "1e-06 where the run asks for 0.001 (model.preset and the keys of model): leave them out "
        "or make them equal"
    )
    config = ModelConfig(init_from=str(public), preset="llama-370m")
    with pytest.raises(UserError, match="hidden_size 64 where the run asks for 1024") as raised:
        resolve_shape(config, init_from=found)
    assert "num_query_groups 2 where" in str(raised.value)
    assert "vocab_size" not in str(raised.value)


def test_half_a_model_is_refused_before_anything_starts(
    public: Path, data: DataConfig, tmp_path: Path
) -> None:
    (tmp_path / "half").mkdir()
    cases = {"half": "llm/.metadata is missing", "nowhere": "shape.json is missing"}
    found = open_huggingface(public).shape
    (tmp_path / "half/shape.json").write_text(json.dumps(asdict(found)))
    for name, message in cases.items():
        config = Config(model=ModelConfig(init_from=str(tmp_path / name)), data=data)
        with pytest.raises(UserError, match=message):
            check(config)


def test_a_resumed_run_does_not_need_the_model_any_more(
    public: Path, data: DataConfig, tmp_path: Path
) -> None:
    """The run that it started from has removed that checkpoint since."""
    source = Path(shutil.copytree(public, tmp_path / "source"))
    words = ["--model.init_from", source, "--data.train", data.train[0], "--data.tokenizer"]
    words += [data.tokenizer, "--data.sequence_length", "32", "--training.global_batch_size", "4"]
    words += ["--training.micro_batch_size", "4"]
    run = list(map(str, words))
    succeed(tmp_path / "run", *run, "--training.steps", "2")
    shutil.rmtree(source)
    done = pretrain(tmp_path / "other", *run, "--training.steps", "2")
    assert done.returncode == 2 and "model.init_from" in done.stderr
    succeed(tmp_path / "run", *run, "--training.steps", "3", *RESUME)
    assert len(metrics(tmp_path / "run", "train")) == 3


def test_a_foreign_checkpoint_beside_a_shape_is_refused(
    public: Path, data: DataConfig, tmp_path: Path
) -> None:
    """The tensors in llm/ do not fit shape.json, or shape.json does not describe a model."""
    with kept_environment():
        import_from_huggingface(public, tmp_path / "ours", skip_check=True)
    path = tmp_path / "ours/shape.json"
    right = json.loads(path.read_text())
    cases: dict[str, dict[str, Any]] = {
        r"no tensor model.output_layer.weight": {**right, "tied_embeddings": False},
        r"linear_fc1.weight has shape \[4, 160, 64\], .* says \[4, 192, 64\]": {
            **right,
            "ffn_hidden_size": 96,
        },
        r"shape.json does not describe a model \(.*missing": {"hidden_size": 64},
        r"shape.json does not describe a model \(num_layers is '4'": {**right, "num_layers": "4"},
        r"shape.json: n_embd is not known": {**right, "n_embd": 64},
    }
    config = Config(model=ModelConfig(init_from=str(tmp_path / "ours")), data=data)
    for message, shape in cases.items():
        path.write_text(json.dumps(shape))
        with pytest.raises(UserError, match=f"model.init_from: .*{message}") as raised:
            check(config)
        assert "\n" not in str(raised.value)
    path.write_text(json.dumps(right))
    index = tmp_path / "ours/llm/.metadata"
    index.write_bytes(index.read_bytes()[:100])
    with pytest.raises(UserError, match="metadata"):
        check(config)
