"""Settings beside a Megatron checkpoint that change what it computes: read, or refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_dwm.config import UserError
from megatron_dwm.config.architectures import architecture_with
from megatron_dwm.convert.from_megatron import fields_given
from megatron_dwm.model.on_disk.megatron_settings import shape_from

LLAMA: dict[str, Any] = {
    **{"hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 96},
    **{"padded_vocab_size": 384, "swiglu": True, "normalization": "RMSNorm"},
    **{"rotary_base": 10000, "norm_epsilon": 1e-5},
}
PLACE = Path("common.pt")


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({}, None),
        ({"rope_scaling_factor": 4.0}, None),
        ({"use_rope_scaling": False, "rope_scaling_factor": 4.0}, None),
        ({"use_rope_scaling": True, "rope_scaling_factor": 4.0}, 4.0),
        ({"use_rope_scaling": True}, 8.0),
        ({"rope_scaling": True}, 8.0),
    ],
)
def test_scaling_without_a_factor_has_megatron_cores(
    settings: dict[str, Any], factor: float | None
) -> None:
    assert shape_from({**LLAMA, **settings}, {}, PLACE).rope_scaling_factor == factor


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rotary_seq_len_interpolation_factor", 4),
        ("seq_len_interpolation_factor", 4.0),
        ("no_rope_freq", [0, 1]),
        ("activation_func", {"_target_": "torch.nn.functional.gelu"}),
    ],
)
def test_what_a_llama_does_not_compute_is_refused(name: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"common.pt: {name} is .*, expected"):
        shape_from({**LLAMA, name: value}, {}, PLACE)


@pytest.mark.parametrize("name", ["rotary_base", "norm_epsilon"])
def test_what_no_size_shows_has_to_be_said(name: str) -> None:
    settings = {key: value for key, value in LLAMA.items() if key != name}
    with pytest.raises(UserError, match=f"nothing there tells {name}; give each to .* --shape"):
        shape_from(settings, {}, PLACE)
    given = getattr(shape_from(LLAMA, {}, PLACE), name)
    assert shape_from(settings, {name: given}, PLACE) == shape_from(LLAMA, {}, PLACE)


def test_the_words_of_a_shape() -> None:
    words = ["norm_epsilon=1e-6", "rotary_base=1e6", "num_layers=4", "tied_embeddings=False"]
    assert fields_given([*words, "head_dim=16"]) == {
        "norm_epsilon": 1e-6,
        "rotary_base": 1e6,
        "num_layers": 4,
        "tied_embeddings": False,
        "head_dim": 16,
    }
    for word, expected in (
        ("num_layers=2.5", "a whole number above 0"),
        ("head_dim=true", "a whole number above 0"),
        ("rotary_base=.inf", "a number above 0"),
        ("rotary_base=-1", "a number above 0"),
        ("tied_embeddings=1", "true or false"),
        ("num_layers", "a whole number above 0"),
    ):
        with pytest.raises(UserError, match=f"--shape {re.escape(word)}: expected {expected}"):
            fields_given([word])


def test_a_model_that_hugging_face_has_not_is_refused() -> None:
    with pytest.raises(UserError, match="no architecture in Hugging Face"):
        architecture_with(qk_layernorm=True, add_qkv_bias=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rotary_seq_len_interpolation_factor", None),
        ("rotary_seq_len_interpolation_factor", 1),
        ("activation_func", {"_call_": False, "_target_": "torch.nn.functional.silu"}),
        ("activation_func", "megatron.core.fusions.fused_bias_swiglu.bias_swiglu_impl"),
    ],
)
def test_the_same_in_other_words_is_read(name: str, value: object) -> None:
    assert shape_from({**LLAMA, name: value}, {}, PLACE) == shape_from(LLAMA, {}, PLACE)
