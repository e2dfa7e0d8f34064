"""Fused norm and linear layers, and fused SwiGLU, in a whole model under tensor parallelism."""

from __future__ import annotations

import torch

from tests.launch import run_ranks
from tests.tiny import MICRO_BATCH, SEQUENCE_LENGTH

CASES = [
    ({}, 1),
    ({"tensor": 2}, 2),
    ({"tensor": 2, "sequence": True, "tied": False, "recompute": "full"}, 2),
]


def test_fused_model_has_the_alignments_and_names_of_the_unfused_one() -> None:
    for case, world_size in CASES:
        both = [{"fused": fused, **case} for fused in (False, True)]
        found = run_ranks("tests.bilevel.fused_workers:alignments_and_names", world_size, both)
        for (unfused, unfused_names), (fused, fused_names) in zip(*found, strict=True):
            difference = (fused - unfused).abs().max() / unfused.abs().max()
            # Four steps of Adam from the same start amplify the rounding of fp32.
            assert float(difference) < 1e-4, case
            assert fused_names == unfused_names
            assert any(name.endswith("pre_mlp_layernorm.weight") for name in fused_names)


def test_fused_swiglu_has_the_alignments_and_gradients_of_the_unfused_one() -> None:
    for world_size, tensor in ((1, {}), (2, {"tensor": 2})):
        cases = [{**tensor, "recompute": how} for how in ("none", "full")]
        found = run_ranks("tests.bilevel.fused_workers:with_swiglu_fused", world_size, cases)
        for case, ranks in zip(cases, found, strict=True):
            for rank in ranks:
                for name in ("alignments", "gradients"):
                    unfused, fused = rank[name]
                    scale = float(unfused.abs().max())
                    torch.testing.assert_close(fused, unfused, rtol=0, atol=1e-6 * scale)
                    assert not torch.equal(fused, unfused), (case, name)
                if case["recompute"] == "none":
                    unfused_bytes, fused_bytes = rank["kept"]
                    # silu of the gate and the offset up projection: 2 x 64 values of 4 bytes a
                    # token in either layer, as planning/activations.py counts.
                    values = 2 * 64 * 2 // world_size
                    expected = 4 * values * MICRO_BATCH * SEQUENCE_LENGTH
                    assert unfused_bytes - fused_bytes == expected
