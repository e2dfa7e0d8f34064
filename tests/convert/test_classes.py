"""Mistral, Qwen2 and Qwen3: the gate finds wrong tensors, and models that differ are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_dwm.config import UserError
from megatron_dwm.config.architectures import ARCHITECTURES
from megatron_dwm.config.huggingface import read_huggingface_config
from megatron_dwm.convert.checkpoint_reader import SavedLLM
from megatron_dwm.convert.from_hf import import_from_huggingface
from megatron_dwm.convert.gate import GateError
from megatron_dwm.convert.original_files import copy_original_files
from megatron_dwm.convert.to_hf import export_to_huggingface
from megatron_dwm.convert.tokenizer_files import write_tokenizer_files
from megatron_dwm.model import LlamaShape
from megatron_dwm.model.on_disk import parameter_names as layout
from megatron_dwm.model.on_disk.huggingface_files import open_huggingface
from megatron_dwm.tokenizer import Tokenizer
from tests.convert.conftest import Saved
from tests.convert.families import FAMILIES, write_llama
from tests.forking.client import REPOSITORY, run_python
from tests.run.test_head_norms_and_biases import MODELS
from tests.small_runs.command import metrics
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server

QWEN2, QWEN3 = "qwen2: bias, grouped, tied", "qwen3: head norms, own head width, tied"
QKV = "self_attention.linear_qkv"
NORMS = ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tensor-head-norms", {"architectures": ["Qwen3ForCausalLM"], "head_dim": 12}),
        ("tensor-bias", {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2}),
        ("tensor-untied-grouped", {"architectures": ["LlamaForCausalLM"]}),
    ],
)
def test_a_model_trained_here_names_its_class(
    name: str, expected: dict[str, Any], checkpoints: dict[str, Saved], tmp_path: Path
) -> None:
    export_to_huggingface(checkpoints[name].directory, tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert {key: config[key] for key in expected} == expected
    (class_name,) = expected["architectures"]
    assert ARCHITECTURES[config["model_type"]].class_name == class_name
    card = (tmp_path / "hf/README.md").read_text()
    assert f"| architecture | {class_name} |" in card
    assert f"tags: [{config['model_type']}, megatron_dwm]" in card
    # What is exported is what is imported.
    assert open_huggingface(tmp_path / "hf").shape.qk_layernorm == (class_name[:5] == "Qwen3")


def _without_bias(shape: LlamaShape, tensor: Tensor) -> layout.Parts:
    parts = layout.split_qkv(shape, tensor)
    return {n: t * 0 for n, t in parts.items()} if tensor.dim() == 1 else parts


def _bias_in_another_order(shape: LlamaShape, tensor: Tensor) -> layout.Parts:
    """Return the parts of a bias as if all queries came first, then all keys and all values."""
    parts = layout.split_qkv(shape, tensor)
    if tensor.dim() > 1:
        return parts
    cut = tensor.split([len(part) for part in parts.values()])
    return dict(zip(parts, cut, strict=True))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("tensor-head-norms", None),
        ("single-bias", _without_bias),
        ("tensor-bias", _bias_in_another_order),
    ],
)
def test_the_gate_refuses_a_wrong_export(
    name: str,
    split: Callable[[LlamaShape, Tensor], layout.Parts] | None,
    checkpoints: dict[str, Saved],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if split is None:  # exchange the norms of queries and keys
        read, other = SavedLLM.read_layer, dict(zip(NORMS, reversed(NORMS), strict=True))
        exchanged = lambda saved, name, layer: read(saved, other.get(name, name), layer)  # noqa: E731
        monkeypatch.setattr(SavedLLM, "read_layer", exchanged)
    else:
        wrong = replace(layout.LAYER_TENSORS[QKV], split=split)
        monkeypatch.setitem(layout.LAYER_TENSORS, QKV, wrong)
    with pytest.raises(GateError, match="of the largest logit"):
        export_to_huggingface(checkpoints[name].directory, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", [QWEN2, QWEN3])
def test_the_gate_refuses_a_wrong_import(
    family: str, small_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = write_llama(tmp_path / "public", **FAMILIES[family])
    write_tokenizer_files(small_tokenizer, 256, public)
    if family == QWEN3:
        names = [name.removesuffix(".weight") for name in NORMS]
        right = [layout.LAYER_TENSORS[name] for name in names]
        for name, other in zip(names, reversed(right), strict=True):
            monkeypatch.setitem(layout.LAYER_TENSORS, name, other)
    else:

        def join(shape: LlamaShape, parts: layout.Parts) -> Tensor:
            found = layout.join_qkv(shape, parts)
            return found * 0 if found.dim() == 1 else found

        wrong = replace(layout.LAYER_TENSORS[QKV], join=join)
        monkeypatch.setitem(layout.LAYER_TENSORS, QKV, wrong)
    with pytest.raises(GateError, match="of the largest logit"):
        import_from_huggingface(public, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["public"]


@pytest.mark.parametrize("model", MODELS)
def test_a_run_is_exported_with_its_tokenizer(
    server: Server,
    corpus: Corpus,
    qwen_tokenizer: Tokenizer,
    tmp_path: Path,
    model: str,
) -> None:
    """A run under tensor parallelism; the export has the trained tensors, and imports as it was."""
    arguments = [*corpus.arguments(), *MODELS[model], "--training.steps", "3"]
    arguments += ["--parallel.tensor", "2"]
    if model == "qwen2":
        job = server.succeed(tmp_path / "wrong", arguments, ranks=2)
        assert "the model cannot be exported with it" in job.text
        with pytest.raises(UserError, match="tokenizer of Qwen's kind for every Qwen2 model"):
            export_to_huggingface(tmp_path / "wrong", tmp_path / "hf")
        arguments += _data_of(qwen_tokenizer, tmp_path)
    server.succeed(tmp_path / "run", arguments, ranks=2)
    export = export_to_huggingface(tmp_path / "run", tmp_path / "hf")
    assert export.texts_compared > 0 and export.logits_deviation is not None
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert (
        type(exported).__name__
        == {
            "qwen2": "Qwen2ForCausalLM",
            "qwen3": "Qwen3ForCausalLM",
        }[model]
    )
    bias_or_norm = ("q_proj.bias", "q_norm.weight")
    trained = [p for name, p in exported.named_parameters() if name.endswith(bias_or_norm)]
    assert trained and all(len(p.unique()) > 1 for p in trained), "they have learned"
    sources = {"checkpoint": "run/checkpoints/step_00000003", "public": "hf"}
    for name, source in sources.items():
        options = ["--model.init_from", str(tmp_path / source)]
        server.succeed(tmp_path / name, [*arguments, *options], ranks=2)
    first = [metrics(tmp_path / name, "train")[0]["loss"] for name in sources]
    # 1,000 pieces are padded to 1,024 rows, which only the checkpoint keeps; 512 are not padded.
    assert first[0] == pytest.approx(first[1], rel=1e-3 if model == "qwen2" else 0.0)
    assert first[0] < metrics(tmp_path / "run", "train")[0]["loss"]
    import_from_huggingface(tmp_path / "hf", tmp_path / "again")
    export_to_huggingface(tmp_path / "again", tmp_path / "back")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def _data_of(tokenizer: Tokenizer, folder: Path) -> list[str]:
    """Returns the options of data that were preprocessed with this tokenizer."""
    command = ["tools/preprocess_data.py", "--append-eod", "--output-prefix", folder / "data"]
    command += ["--input", REPOSITORY / "examples/corpus/validation.jsonl"]
    command += ["--metadata-keys", "domain", "--tokenizer-type", "HuggingFaceTokenizer"]
    command += ["--tokenizer-model", tokenizer.model_path]
    run_python(list(map(str, command))).check_returncode()
    prefix = f"{folder / 'data'}_text_document"
    return ["--data.train", prefix, "--data.tokenizer", str(tokenizer.model_path)]


COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "window": ({"model_type": "mistral", "sliding_window": 256}, "sliding_window 256 is smaller"),
    # transformers takes 4,096 where the key is absent.
    "window by default": (
        {"model_type": "mistral", "max_position_embeddings": 8192},
        "sliding_window 4096 is smaller than the context of 8192 tokens",
    ),
    "switched on": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 128},
        "sliding_window 128 is smaller",
    ),
    "window of text": ({"model_type": "mistral", "sliding_window": "x"}, "sliding_window is 'x'"),
    "bias of the output": ({"model_type": "qwen3", "attention_bias": True}, "attention_bias True"),
    "experts": ({"model_type": "mixtral"}, "'mixtral' (mixture of experts) is not supported"),
    "experts of Qwen": ({"model_type": "qwen3_moe"}, "(mixture of experts)"),
    "Mamba": ({"model_type": "mamba2"}, "(state-space or recurrent layers)"),
    "Gemma": ({"model_type": "gemma2"}, "soft caps on logits"),
    "unheard of": ({"model_type": "other"}, "'other' is not supported; only 'llama', 'mistral'"),
    "no text": ({"model_type": ["llama"]}, "model_type ['llama'] is not supported"),
    "partial": ({"model_type": "qwen2", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "yarn": (
        {"model_type": "qwen3", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "rope scaling",
    ),
}


def _write(directory: Path, **content: Any) -> Path:
    (directory / "config.json").write_text(json.dumps({**COMMON, **content}))
    return directory


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_one_line(name: str, tmp_path: Path) -> None:
    changes, named = REFUSED[name]
    with pytest.raises(UserError) as raised:
        read_huggingface_config(_write(tmp_path, **changes))
    assert named in str(raised.value) and "\n" not in str(raised.value)
    assert str(raised.value).startswith(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "mistral", "sliding_window": 512},
        {"model_type": "mistral"},
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 128},
        {"model_type": "qwen3", "sliding_window": 128},
        {"model_type": "llama", "sliding_window": 128},
    ],
    ids=str,
)
def test_attention_over_the_whole_context_is_accepted(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    assert read_huggingface_config(_write(tmp_path, **changes)).context_tokens == 512


def test_absent_keys_have_the_defaults_of_their_class(tmp_path: Path) -> None:
    """Compared with transformers' own classes, which have other defaults each."""
    from transformers import AutoConfig

    for model_type in ARCHITECTURES:
        theirs = AutoConfig.for_model(model_type)
        few = {"model_type": model_type, "sliding_window": None}
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        few |= {key: getattr(theirs, key) for key in (*sizes, "vocab_size")}
        (tmp_path / "config.json").write_text(json.dumps(few))
        ours = read_huggingface_config(tmp_path)
        assert ours.num_query_groups == theirs.num_key_value_heads
        assert ours.context_tokens == theirs.max_position_embeddings
        assert ours.norm_epsilon == theirs.rms_norm_eps
        assert ours.rotary_base == theirs.rope_parameters["rope_theta"]
        assert ours.tied_embeddings == theirs.tie_word_embeddings
        width = getattr(theirs, "head_dim", None) or ours.hidden_size // ours.num_attention_heads
        assert (ours.head_dim or ours.hidden_size // ours.num_attention_heads) == width


def test_a_longer_context_drops_a_window_that_was_as_long_as_the_context(tmp_path: Path) -> None:
    """Training attends to the whole row, and transformers would not."""
    original = tmp_path / "original"
    original.mkdir()
    changes = {"model_type": "mistral", "sliding_window": 512, "rms_norm_eps": 1e-5}
    _write(original, **changes)
    shape = replace(
        LlamaShape(
            hidden_size=64,
            num_layers=2,
            num_attention_heads=4,
            num_query_groups=2,
            ffn_hidden_size=80,
            vocab_size=1000,
        ),
        norm_epsilon=1e-5,
    )
    for trained_tokens, window in ((256, 512), (1024, None)):
        shutil.rmtree(tmp_path / "export", ignore_errors=True)
        (tmp_path / "export").mkdir()
        found = copy_original_files(
            original,
            tmp_path / "export",
            shape=shape,
            dtype=torch.float32,
            trained_tokens=trained_tokens,
            special_tokens=None,
        )
        config = json.loads((tmp_path / "export/config.json").read_text())
        assert config["sliding_window"] == window
        assert any("sliding window" in line for line in found.changes) == (window is None)
        assert read_huggingface_config(tmp_path / "export").context_tokens >= trained_tokens
