"""The tangent probe in FP8 against double precision and against training's own gradients.

A finite difference does not work there; a test shows it.
"""

from __future__ import annotations

import pytest
import torch

from tests.launch import run_ranks

WORKERS = "tests.bilevel.fp8_workers:"
# As in fp32 (test_hypergradient.py), where the quantized values are equal: the sums are in fp32.
REFERENCE_TOLERANCE = 1e-5
# A sum in another order, or in double precision, sometimes moves a value across a rounding border,
# by an eighth of itself.
LAYOUT_TOLERANCE = 0.05
LAYOUTS = [
    {"tensor": 2},
    {"tensor": 2, "sequence": True, "tied": False},
    {"pipeline": 2},
    {"pipeline": 2, "recompute": "full"},
    {"context": 2},
]


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


def test_probe_is_the_straight_through_gradient_in_double_precision() -> None:
    """The last bits of the sums move a value in one of some forty samples.

    So two of the eight may differ by such a move; a wrong formula would change all.
    """
    cases = [{}, {"tied": False, "query_groups": 4}]
    for [(found, expected)] in run_ranks(WORKERS + "probe_and_reference", 1, cases):
        errors = (found.double() - expected).abs() / expected.abs().max()
        assert (errors < REFERENCE_TOLERANCE).sum() >= 6, errors
        assert errors.max() < LAYOUT_TOLERANCE


def test_probe_adds_up_to_what_training_computes() -> None:
    """The samples of a micro-batch share their scales."""
    cases = [{}, {"recompute": "full"}]
    for [(probed, trained)] in run_ranks(WORKERS + "probe_and_layer_gradients", 1, cases):
        assert probed == pytest.approx(trained, rel=1e-4)


def test_finite_differences_fail() -> None:
    cases = [{"fp8_emulation": False}, {"fp8_emulation": True}]
    errors = [
        [_relative(difference, probed) for difference in differences]
        for [(probed, differences)] in run_ranks(WORKERS + "probe_and_differences", 1, cases)
    ]
    exact, quantized = errors
    best = exact.index(min(exact))
    assert exact[best] < 2e-3
    # At the step that is best in fp32, and at every smaller step, the difference is noise.
    assert min(quantized[best:]) > 0.2
    assert min(quantized) > 20 * exact[best]


def test_layouts_agree() -> None:
    cases = [{"fp8_emulation": True, **layout} for layout in LAYOUTS]
    ranks = run_ranks("tests.bilevel.workers:alignments", 2, cases)
    alone = [{k: v for k, v in case.items() if k in ("fp8_emulation", "tied")} for case in cases]
    expected = run_ranks("tests.bilevel.workers:alignments", 1, alone)
    for case, found, [whole] in zip(cases, ranks, expected, strict=True):
        for alignments in found:
            assert _relative(alignments, whole) < LAYOUT_TOLERANCE, case


def test_alignments_in_fp8_rank_the_samples_as_in_fp32() -> None:
    cases = [{"steps": 40}]
    [[(exact, quantized)]] = run_ranks(WORKERS + "alignments_in_fp32_and_fp8", 1, cases)
    assert not torch.equal(exact, quantized)
    assert float(torch.corrcoef(torch.stack([exact, quantized]))[0, 1]) > 0.95


def test_unrounded_tangents_are_near_the_rounded_ones() -> None:
    """Transformer Engine does not expose rounded values, so the tangent does not use them."""
    [[(rounded, plain)]] = run_ranks(WORKERS + "rounded_and_unrounded_tangents", 1, [{}])
    assert not torch.equal(rounded, plain)
    assert _relative(plain, rounded) < 0.1


def test_nothing_is_left_behind() -> None:
    cases = [{"fp8_emulation": True}, {"fp8_emulation": True, "precision": "bf16", "clip": 0.2}]
    for [parts] in run_ranks("tests.bilevel.workers:everything_restored", 1, cases):
        assert all(parts.values()), parts


def test_virtual_step_and_the_way_back_renew_quantized_weights() -> None:
    assert run_ranks(WORKERS + "caches_invalidated", 1, [{}]) == [[[True, True, True, True]]]


def test_cross_checks_refuse_fp8() -> None:
    cases = [{"estimator": name, "fp8_emulation": True} for name in ("finite_difference", "unroll")]
    for [message] in run_ranks("tests.bilevel.workers:refused", 1, cases):
        assert "tangent_probe" in message
