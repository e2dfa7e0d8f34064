"""Norms of heads and biases: initial values, weight decay, names on disk, counts, mistakes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from megatron_dwm.config import Config, ModelConfig, ParallelConfig, UserError
from megatron_dwm.config.architectures import ARCHITECTURES, architecture_with
from megatron_dwm.config.load import load_config
from megatron_dwm.config.validate import validate_layout
from megatron_dwm.model import LlamaShape, resolve_shape
from megatron_dwm.model.flops import llm_forward_flops
from megatron_dwm.model.on_disk.parameter_names import huggingface_shapes, megatron_sizes
from megatron_dwm.model.shape import PRESETS, heads_of
from megatron_dwm.planning.placement import rank_parameters
from tests.launch import run_ranks

WORKERS = "tests.model.head_workers"
QWEN3 = {"qk_layernorm": True, "kv_channels": 12}
QWEN2 = {"add_qkv_bias": True}
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"tied": False}),
    (2, {"tensor": 2}),
    (2, {"pipeline": 2, "sharded": False}),
    (2, {"sharded": True}),
]
_ATTENTION = "decoder.layers.0.self_attention."
_BOTH = ("linear_qkv.weight", "linear_proj.weight")
ATTENTION = {
    str(QWEN3): (*_BOTH, "q_layernorm.weight", "k_layernorm.weight"),
    str(QWEN2): (*_BOTH, "linear_qkv.bias"),
}


def _found(size: int, layout: dict[str, Any], model: dict[str, Any]) -> list[dict[str, Any]]:
    [ranks] = run_ranks(f"{WORKERS}:built", size, [{**layout, **model}])
    return ranks


def _shape(model: dict[str, Any], tied: bool = True) -> LlamaShape:
    tiny = ModelConfig(
        vocab_size=256,
        hidden_size=32,
        num_layers=2,
        ffn_hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        tied_embeddings=tied,
        **model,
    )
    return resolve_shape(tiny)


@pytest.mark.parametrize("model", [QWEN3, QWEN2], ids=["qwen3", "qwen2"])
@pytest.mark.parametrize(("size", "layout"), LAYOUTS, ids=str)
def test_a_built_model_is_what_the_shape_says(
    size: int, layout: dict[str, Any], model: dict[str, Any]
) -> None:
    ranks = _found(size, layout, model)
    shape = _shape(model, layout.get("tied", True))
    saved = {name: whole for rank in ranks for name, whole in rank["saved"].items()}
    assert saved == {f"model.{name}": s for name, s in megatron_sizes(shape).items()}
    parallel = ParallelConfig(**{k: v for k, v in layout.items() if k in ("tensor", "pipeline")})
    for stage, rank in enumerate(ranks):
        of_stage = rank_parameters(shape, parallel, stage if parallel.pipeline > 1 else 0)
        assert rank["parameters"] == of_stage.total
    if size == 1:
        padding = (shape.padded_vocab_size - shape.vocab_size) * shape.hidden_size
        assert ranks[0]["parameters"] == shape.num_parameters() + padding
    for rank in ranks:
        initial = rank["initial"]
        if stage == 0 or "pipeline" not in layout:
            assert {name for name in initial if name.startswith(_ATTENTION)} == {
                _ATTENTION + name for name in ATTENTION[str(model)]
            }
        for name, values in initial.items():
            if name.endswith("norm.weight"):
                assert values == (1.0, 1.0)
            if name.endswith(".bias"):
                assert values == (0.0, 0.0)
        decayed = {name for name, decay in rank["decay"].items() if decay > 0}
        assert decayed == {name for name in initial if not name.endswith(("norm.weight", ".bias"))}


@pytest.mark.parametrize("preset", PRESETS)
def test_counts_are_sums_over_sizes(preset: str) -> None:
    shape = PRESETS[preset]
    count = sum(math.prod(size) for size in huggingface_shapes(shape).values())
    assert shape.num_parameters() == count
    # Two for a multiply-add of every matrix outside the embedding, and of half the scores.
    of_layers = (
        shape.num_layers * shape.layer_matrices + shape.padded_vocab_size * shape.hidden_size
    )
    scores = shape.num_layers * shape.num_attention_heads * shape.head_size * 128
    assert llm_forward_flops(shape, 3, 128) == 2 * 3 * 128 * (of_layers + scores)


@pytest.mark.parametrize(
    ("preset", "parameters"),
    # As the published checkpoints have them; the report's 0.44B and 1.4B leave embeddings out.
    [("qwen3-0.6b", 596_049_920), ("qwen3-1.7b", 1_720_574_976)],
)
def test_presets_are_the_published_models(preset: str, parameters: int) -> None:
    shape = resolve_shape(ModelConfig(preset=preset))  # type: ignore[arg-type]
    assert shape.num_parameters() == parameters
    assert shape.head_size == 128 and shape.qk_layernorm and not shape.add_qkv_bias
    assert (shape.num_layers, shape.num_query_groups, shape.vocab_size) == (28, 8, 151936)
    assert (shape.rotary_base, shape.norm_epsilon, shape.tied_embeddings) == (1e6, 1e-6, True)


@pytest.mark.parametrize("preset", ["qwen3-0.6b", "qwen3-1.7b"])
def test_a_preset_built_has_its_number_of_parameters(preset: str) -> None:
    """Nothing is initialized, so no memory is touched."""
    [[counts]] = run_ranks(f"{WORKERS}:count", 1, [{"preset": preset}])
    assert counts == PRESETS[preset].num_parameters()  # 151,936 is a multiple of 128


def test_the_record_of_a_model_without_them_is_that_of_earlier_versions() -> None:
    """A resumed run compares it, and earlier versions refuse a field that they do not know."""
    plain = PRESETS["tiny"]
    assert not {"qk_layernorm", "add_qkv_bias"} & plain.record().keys()
    assert list(plain.record())[-2:] == ["head_dim", "rope_scaling_factor"]
    for shape in (plain, PRESETS["qwen3-0.6b"], replace(plain, add_qkv_bias=True, head_dim=24)):
        assert LlamaShape(**shape.record()) == shape
    assert PRESETS["qwen3-0.6b"].record()["qk_layernorm"] is True


def test_heads_may_have_any_width() -> None:
    config = ModelConfig(hidden_size=64, num_attention_heads=4, kv_channels=16)
    assert resolve_shape(config).head_dim is None  # that of hidden_size / num_attention_heads
    assert resolve_shape(replace(config, kv_channels=40)).head_size == 40
    assert resolve_shape(replace(config, kv_channels=None)).head_size == 16
    found = resolve_shape(replace(config, kv_channels=40))
    with pytest.raises(UserError, match="kv_channels 40 where the run asks for 16"):
        resolve_shape(replace(config, init_from="x"), init_from=found)
    with pytest.raises(UserError, match="qk_layernorm False where the run asks for True"):
        resolve_shape(replace(config, kv_channels=40, qk_layernorm=True), init_from=found)
    assert resolve_shape(replace(config, kv_channels=40), init_from=found) == found
    # 16 heads of 128 are as wide as the model: two ways to write one shape.
    assert resolve_shape(ModelConfig(preset="qwen3-1.7b")).head_dim is None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"kv_channels": 15}, "model.kv_channels 15: expected an even number"),
        ({"qk_layernorm": True, "add_qkv_bias": True}, "model.add_qkv_bias: not with model.qk"),
        (
            {"hidden_size": 60, "num_attention_heads": 4},
            "model.hidden_size 60: expected a multiple",
        ),
    ],
)
def test_combinations_without_sense_are_one_line(model: dict[str, Any], message: str) -> None:
    config = Config(model=ModelConfig(**model))
    with pytest.raises(UserError, match=message) as raised:
        validate_layout(config, heads_of(resolve_shape(config.model)), 1)
    assert "\n" not in str(raised.value)
    # The width is free if it does not follow from the model's.
    free = Config(model=ModelConfig(hidden_size=60, num_attention_heads=4, kv_channels=16))
    validate_layout(free, heads_of(resolve_shape(free.model)), 1)


def test_what_megatron_has_and_this_has_not_is_said() -> None:
    for key, words in {
        "model.num_experts": "mixture of experts is not supported",
        "model.moe_router_topk": "mixture of experts",
        "model.hybrid_layer_pattern": "Mamba",
        "training.optimizer": "an optimizer other than AdamW (Muon",
        "model.window_size": "a sliding window",
        "model.rotary_percent": "a partial rotary embedding",
        "model.add_bias_linear": "a bias in the MLP",
        "model.rope_scaling": "a rotary scaling",
        "model.attn_logit_softcapping": "a soft cap on logits",
    }.items():
        with pytest.raises(UserError) as raised:
            load_config([f"--{key}", "2"])
        assert str(raised.value).startswith(f"unknown key '{key}': ")
        assert words in str(raised.value) and "\n" not in str(raised.value)


def test_every_shape_that_is_allowed_has_a_class() -> None:
    for norms, bias, class_name in (
        (False, False, "LlamaForCausalLM"),
        (True, False, "Qwen3ForCausalLM"),
        (False, True, "Qwen2ForCausalLM"),
    ):
        found = architecture_with(qk_layernorm=norms, add_qkv_bias=bias)
        assert found.class_name == class_name and ARCHITECTURES[found.model_type] is found
