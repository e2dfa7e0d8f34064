"""Settings beside a Megatron checkpoint that change what it computes: read, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_dwm.config import UserError
from megatron_dwm.model.on_disk.megatron_settings import shape_from

LLAMA: dict[str, Any] = {
    **{"hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 96},
    **{"padded_vocab_size": 384, "swiglu": True, "normalization": "RMSNorm"},
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
