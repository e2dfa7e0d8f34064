"""The adapter of fused norm and linear layers inside a whole model, under tensor parallelism."""

from __future__ import annotations

from tests.launch import run_ranks

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
            # Four steps of Adam from the same start multiply fp32's rounding.
            assert float(difference) < 1e-4, case
            assert fused_names == unfused_names
            assert any(name.endswith("pre_mlp_layernorm.weight") for name in fused_names)
