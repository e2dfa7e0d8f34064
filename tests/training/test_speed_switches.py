"""The engine's speed switches change no bit of a run where the same sums are formed.

With two replicas a sum of gradients has two terms, which may be added in either order. So overlaps
are compared bit for bit. With several buckets the sharded optimizer adds the gradient norm in
another order, so there clipping is off and the norm has a tolerance.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.launch import run_ranks

REDUCE = {"overlap_grad_reduce": True}
BOTH = {**REDUCE, "overlap_param_gather": True}
SHARDED = {"sharded": True}
UPDATES = ("none", "fresh", "training", "ahead")

LAYOUTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *(({"update_on": update}, REDUCE) for update in UPDATES),
    *(({"update_on": update, **SHARDED}, BOTH) for update in UPDATES),
    ({"update_on": "training", **SHARDED, "estimator": "finite_difference"}, BOTH),
    ({"update_on": "training", **SHARDED, "precision": "bf16", "clip": 0.2}, BOTH),
    ({"update_on": "fresh", **SHARDED, "recompute": "full"}, BOTH),
    ({"update_on": "training", **SHARDED, "tensor": 2, "sequence": True}, BOTH),
    ({"update_on": "training", "pipeline": 2}, REDUCE),
    ({"update_on": "training", **SHARDED, "pipeline": 2, "virtual_stages": 2, "layers": 4}, BOTH),
]
ON_FOUR = [
    ({"update_on": "training", **SHARDED, "pipeline": 2}, BOTH),
    ({"update_on": "fresh", "pipeline": 2, "virtual_stages": 2, "layers": 4}, REDUCE),
    ({"update_on": "fresh", **SHARDED, "tensor": 2, "precision": "bf16"}, BOTH),
]
# The model of the tests has 0.03 M parameters.
SMALL = {"ddp_bucket_size": 2000}
IN_BF16 = {"grad_reduce_in_fp32": False}
TRAINED = "tests.training.switch_workers:trained"


def _pairs(layouts: list, ranks: int) -> list[tuple[list[dict], list[dict]]]:
    """What every rank saw without the switches and with them, for every layout."""
    cases = [{**layout, "switches": switches} for layout, on in layouts for switches in ({}, on)]
    found = run_ranks(TRAINED, ranks, cases)
    return list(zip(found[::2], found[1::2], strict=True))


def _assert_equal(plain: list[dict], switched: list[dict], but: tuple[str, ...] = ()) -> None:
    for one, other in zip(plain, switched, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - set(but):
            assert torch.equal(one[name], other[name]), name


@pytest.fixture(scope="module")
def on_two() -> list[tuple[list[dict], list[dict]]]:
    return _pairs(LAYOUTS, 2)


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=lambda number: str(LAYOUTS[number]))
def test_overlaps_change_no_bit(on_two: list, number: int) -> None:
    _assert_equal(*on_two[number])
    assert ("alignment" in on_two[number][0][0]) == (LAYOUTS[number][0]["update_on"] != "none")


def test_overlaps_change_no_bit_on_four_ranks() -> None:
    for plain, switched in _pairs(ON_FOUR, 4):
        _assert_equal(plain, switched)


@pytest.mark.parametrize("sharded", [False, True])
def test_several_buckets_change_the_order_in_the_norm_only(sharded: bool) -> None:
    layout = {"update_on": "training", "sharded": sharded, "clip": 0.0}
    switches = {**(BOTH if sharded else REDUCE), **SMALL}
    [[counts, _]] = run_ranks(
        "tests.training.switch_workers:buckets", 2, [{"sharded": sharded, "switches": switches}]
    )
    assert counts[0] > 3
    [(plain, switched)] = _pairs([(layout, switches)], 2)
    # The sharded optimizer splits every bucket, so a rank has other main parameters.
    _assert_equal(plain, switched, but=("grad_norm", *(("mains",) if sharded else ())))
    for one, other in zip(plain, switched, strict=True):
        # fp32 sums of 30,000 squares in another order.
        torch.testing.assert_close(one["grad_norm"], other["grad_norm"], rtol=1e-5, atol=0)


def test_buffers_have_the_type_that_is_reduced() -> None:
    bf16 = {"precision": "bf16", "switches": IN_BF16}
    cases = [bf16, {**bf16, **SHARDED}, {"switches": IN_BF16}, {"precision": "bf16"}]
    found = run_ranks("tests.training.switch_workers:buffer_types", 2, cases)
    types = [case[0] for case in found]
    assert types == [["torch.bfloat16"]] * 2 + [["torch.float32"]] * 2


def test_overlaps_change_no_bit_of_a_reduction_in_bf16() -> None:
    of_all = {"update_on": "training", "precision": "bf16", "clip": 0.2}
    cases = [
        {**of_all, "switches": IN_BF16},
        {**of_all, "switches": {**IN_BF16, **REDUCE}},
        {**of_all, **SHARDED, "switches": IN_BF16},
        {**of_all, **SHARDED, "switches": {**IN_BF16, **BOTH}},
    ]
    plain, reduced, sharded, both = run_ranks(TRAINED, 2, cases)
    _assert_equal(plain, reduced)
    _assert_equal(sharded, both)


def test_a_reduction_in_bf16_is_as_near_as_its_roundings() -> None:
    """A gradient is rounded after every micro-batch, in the reduction and when it is divided.

    With two micro-batches and two replicas that is four roundings of half a unit, 2**-9, of sums
    that are at most a few times the result; the alignment has z rounded once more. The bounds are
    four times that. Clipping is off where a run is sharded (see above).
    """
    weights = {"weights": [0.5, 1.5] * 4, "precision": "bf16"}
    function = "tests.training.workers:gradient_of_weights"
    cases = [weights, {**weights, "switches": IN_BF16}]
    (fp32, _), (bf16, _) = run_ranks(function, 2, cases)
    error = (bf16.float() - fp32).norm() / fp32.norm()
    assert 0 < error < 4 * 4 * 2**-9
    layout = {"precision": "bf16", "steps": 1, "clip": 0.0}
    cases = [layout, {**layout, "switches": IN_BF16}, {**layout, **SHARDED, "switches": IN_BF16}]
    found = run_ranks("tests.bilevel.workers:alignments", 2, cases)
    (fp32, _), (bf16, _), (sharded, _) = found
    assert (bf16 - fp32).abs().max() < 4 * 5 * 2**-9 * fp32.abs().max()
    assert torch.equal(bf16, sharded)


def test_the_fused_loss_is_the_plain_one() -> None:
    """On a CPU the functions run one by one, and the sums are the same, two messages in one."""
    of_all = {"update_on": "training", "precision": "bf16"}
    layouts = [of_all, {**of_all, "tensor": 2, "sequence": True}, {**of_all, "pipeline": 2}]
    cases = [
        {**layout, "cross_entropy_loss_fusion": on} for layout in layouts for on in (False, True)
    ]
    found = run_ranks(TRAINED, 2, cases)
    for plain, fused in zip(found[::2], found[1::2], strict=True):
        _assert_equal(plain, fused)
