"""Shapes: the presets have the published sizes, and a configuration changes their fields."""

from __future__ import annotations

import pytest

from megatron_dwm.config import ModelConfig
from megatron_dwm.model import resolve_shape


# METHOD.md, section 1: the papers' two models have 373.9 and 1345.4 million parameters.
@pytest.mark.parametrize(("preset", "millions"), [("llama-370m", 373.9), ("llama-1.3b", 1345.4)])
def test_presets_have_the_papers_sizes(preset: str, millions: float) -> None:
    shape = resolve_shape(ModelConfig(preset=preset))
    assert round(shape.num_parameters() / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        # As the published checkpoints count them (transformers' num_parameters).
        ("llama-2-7b", 6_738_415_616),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
    ],
)
def test_public_models_have_their_published_sizes(preset: str, parameters: int) -> None:
    assert resolve_shape(ModelConfig(preset=preset)).num_parameters() == parameters


def test_configuration_goes_over_the_preset() -> None:
    shape = resolve_shape(ModelConfig(hidden_size=32, num_attention_heads=8), 500)
    assert (shape.hidden_size, shape.num_attention_heads, shape.num_query_groups) == (32, 8, 8)
    assert shape.vocab_size == 500 and shape.padded_vocab_size == 512
    assert resolve_shape(ModelConfig(vocab_size=700), 500).vocab_size == 700
    assert resolve_shape(ModelConfig(tied_embeddings=False)).tied_embeddings is False
