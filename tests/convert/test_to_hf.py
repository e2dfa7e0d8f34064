"""The exported model computes what the trained model did; a wrong export is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_dwm.convert import to_hf
from megatron_dwm.convert.gate import LOGITS_TOLERANCE, GateError, relative_deviation
from megatron_dwm.convert.shards import plan_shards, write_shards
from megatron_dwm.convert.to_hf import export_to_huggingface
from megatron_dwm.model import LlamaShape
from megatron_dwm.model.on_disk import parameter_names as layout
from tests.convert.conftest import LAYOUTS, SEQUENCE_LENGTH, VOCAB_SIZE, Saved, make_run


@torch.no_grad()
def _logits(directory: Path, tokens_BS: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model(tokens_BS).logits


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "bf16" not in name])
def test_logits_are_those_of_the_layout_that_saved(
    name: str, checkpoints: dict[str, Saved], tmp_path: Path
) -> None:
    saved = checkpoints[name]
    export = export_to_huggingface(saved.directory, tmp_path / "hf")
    found_BSV = _logits(tmp_path / "hf", saved.tokens_BS)
    assert relative_deviation(found_BSV, saved.logits_BSV) < LOGITS_TOLERANCE
    assert torch.equal(found_BSV.argmax(-1), saved.logits_BSV.argmax(-1))
    assert export.logits_deviation < LOGITS_TOLERANCE
    assert list(tmp_path.iterdir()) == [tmp_path / "hf"]


def test_configuration_says_what_the_model_is(
    checkpoints: dict[str, Saved], tmp_path: Path
) -> None:
    export_to_huggingface(checkpoints["tensor-untied-grouped"].directory, tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-4,
        "rope_theta": 5000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": SEQUENCE_LENGTH,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    assert {key: config[key] for key in expected} == expected
    assert config["rope_parameters"]["rope_theta"] == 5000.0
    assert json.loads((tmp_path / "hf/generation_config.json").read_text())["eos_token_id"] == 2


@pytest.mark.parametrize(
    ("name", "dtype", "kept"),
    [
        ("single-bf16-full", None, torch.bfloat16),
        ("single-bf16-full", torch.float32, torch.float32),
        ("single-tied-grouped", torch.bfloat16, torch.bfloat16),
    ],
)
def test_parameters_keep_the_wanted_type(
    name: str,
    dtype: torch.dtype | None,
    kept: torch.dtype,
    checkpoints: dict[str, Saved],
    tmp_path: Path,
) -> None:
    export = export_to_huggingface(checkpoints[name].directory, tmp_path / "hf", dtype=dtype)
    with safe_open(tmp_path / "hf/model.safetensors", "pt") as tensors:
        assert {tensors.get_tensor(key).dtype for key in tensors.keys()} == {kept}  # noqa: SIM118
        assert ("lm_head.weight" in tensors.keys()) == (name == "single-bf16-full")  # noqa: SIM118
    assert export.dtype == kept


def test_bf16_export_is_near_the_bf16_model(checkpoints: dict[str, Saved], tmp_path: Path) -> None:
    saved = checkpoints["single-bf16-full"]
    export_to_huggingface(saved.directory, tmp_path / "hf")
    # Megatron's logits were computed in bf16: 8 bits of mantissa through two layers.
    assert relative_deviation(_logits(tmp_path / "hf", saved.tokens_BS), saved.logits_BSV) < 0.05


def _ungrouped(shape: LlamaShape, qkv_CH: Tensor) -> dict[str, Tensor]:
    """Order rows as all queries, all keys, all values: right only for one query group."""
    width = shape.head_size * shape.num_query_groups
    sizes = [len(qkv_CH) - 2 * width, width, width]
    names = layout.LAYER_TENSORS["self_attention.linear_qkv"].parts
    return dict(zip(names, qkv_CH.split(sizes), strict=True))


def _up_first(shape: LlamaShape, fc1_CH: Tensor) -> dict[str, Tensor]:
    up_FH, gate_FH = fc1_CH.split(shape.ffn_hidden_size)
    return {"mlp.gate_proj": gate_FH, "mlp.up_proj": up_FH}


def _interleaved(shape: LlamaShape, qkv_CH: Tensor) -> dict[str, Tensor]:
    """Order a head's rows as rotary embeddings of neighboring pairs need them."""
    parts = layout.split_qkv(shape, qkv_CH)
    for name in ("self_attn.q_proj", "self_attn.k_proj"):
        pairs = parts[name].view(-1, 2, shape.head_size // 2, shape.hidden_size)
        parts[name] = pairs.transpose(1, 2).reshape(parts[name].shape)
    return parts


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("self_attention.linear_qkv", _ungrouped),
        ("self_attention.linear_qkv", _interleaved),
        ("mlp.linear_fc1", _up_first),
    ],
)
def test_wrong_permutation_is_refused(
    source: str,
    wrong: Callable[[LlamaShape, Tensor], dict[str, Tensor]],
    checkpoints: dict[str, Saved],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = layout.LAYER_TENSORS[source]
    monkeypatch.setitem(layout.LAYER_TENSORS, source, replace(right, split=wrong))
    directory = checkpoints["single-tied-grouped"].directory
    with pytest.raises(GateError, match="of the largest logit"):
        export_to_huggingface(directory, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []
    # Who insists gets it, and the card says so.
    export = export_to_huggingface(directory, tmp_path / "hf", skip_check=True)
    assert export.logits_deviation is None
    assert "**The comparison of logits was skipped" in (tmp_path / "hf/README.md").read_text()


def test_several_files_have_an_index(
    checkpoints: dict[str, Saved], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = checkpoints["pipeline-untied-full"]
    small = partial(write_shards, shard_bytes=150_000)
    monkeypatch.setattr(to_hf, "write_shards", small)
    export_to_huggingface(saved.directory, tmp_path / "hf")
    files = sorted(tmp_path.glob("hf/model-*.safetensors"))
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert len(files) > 1
    assert {path.name for path in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(
        tensors.get_tensor(key).nbytes
        for path in files
        for tensors in [safe_open(path, "pt")]
        for key in tensors.keys()  # noqa: SIM118
    )
    found_BSV = _logits(tmp_path / "hf", saved.tokens_BS)
    assert relative_deviation(found_BSV, saved.logits_BSV) < LOGITS_TOLERANCE


def test_shards_respect_their_bounds() -> None:
    shapes = {"a": (3,), "b": (2,), "c": (40,), "d": (1,), "e": (5,)}
    assert plan_shards(shapes, torch.float32, 24) == [["a", "b"], ["c"], ["d", "e"]]
    assert plan_shards(shapes, torch.float32, 4000) == [list(shapes)]


def test_model_card_describes_the_run(checkpoints: dict[str, Saved], tmp_path: Path) -> None:
    run = tmp_path / "my_run"
    make_run(checkpoints["single-tied-grouped"].directory, run, ["step_00000020"])
    lines = [
        {"step": 10, "phase": "train", "loss": 7.5},
        {"step": 20, "phase": "train", "loss": 6.25},
        {"step": 20, "phase": "evaluation", "domain_loss": {"books": 5.125}},
        {"step": 30, "phase": "train", "loss": 1.0},
    ]
    forged = {"step": 19, "phase": "weighting", "domain_loss": {"a\nb | c": 1.0}}
    foreign = ["[1, 2]", "null", '{"step": "x"}', json.dumps(forged), "{broken"]
    (run / "metrics.jsonl").write_text("\n".join([*map(json.dumps, lines), *foreign]))
    with (run / "metrics.jsonl").open("ab") as stream:
        stream.write(b"\n\xff\n")
    export = export_to_huggingface(run, tmp_path / "hf")
    card = (tmp_path / "hf/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for expected in (
        "# my_run, step 00000020",
        "| loss | 6.25 |",
        "| domain_loss: books | 5.125 |",
        "| domain_loss: a\\nb / c | 1 |",
        "| policy (how samples are weighted) | uniform |",
        f"{export.logits_deviation:.1e} of the largest logit",
        "norm_epsilon: 0.0001",
    ):
        assert expected in card, expected
