"""FLOPs of the weighting model by formula, counted as in model/flops.py."""

from __future__ import annotations

from megatron_dwm.weighting.model import WeightingShape


def weighting_forward_flops(
    shape: WeightingShape, samples: int, sequence_length: int, group_size: int
) -> float:
    """FLOPs of weighing `samples` rows of `sequence_length` tokens in groups of `group_size`."""
    width = shape.hidden_size
    layer = 4 * width * width + 3 * width * shape.ffn_hidden_size
    if shape.encoder == "own":
        causal_attention = width * sequence_length
        reading = sequence_length * shape.num_layers * (layer + causal_attention)
    else:
        reading = (2 * shape.feature_size + 1) * width
    across = layer + 2 * width * group_size + 2 * width
    return 2.0 * samples * (reading + across)
