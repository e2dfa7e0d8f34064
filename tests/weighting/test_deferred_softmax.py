"""The temperature, scale and drift of a deferred softmax, against closed forms."""

from __future__ import annotations

import pytest
import torch

from megatron_dwm.weighting.concentration import effective_sample_size
from megatron_dwm.weighting.deferred_softmax import DeferredSoftmax

LOGITS_1n = torch.tensor([[0.0, 1.0, -2.0, 4.0, 0.5, 3.0]])
CPU = torch.device("cpu")
SIZES_1n = torch.tensor([[1.0, 2.0, 3.0, 0.0, 1.0, 5.0]])


def settled(bound: float = 0.5, floor: float = 0.0, sizes: bool = False) -> DeferredSoftmax:
    softmax = DeferredSoftmax(min_effective_sample_size=bound, uniform_floor=floor)
    assert not softmax.is_ready
    softmax.settle(LOGITS_1n, SIZES_1n if sizes else None)
    assert softmax.is_ready
    return softmax


@pytest.mark.parametrize("floor", [0.0, 0.3])
@pytest.mark.parametrize("sizes", [False, True])
def test_the_batch_that_sets_the_scale_has_mean_one_and_the_bound(
    floor: float, sizes: bool
) -> None:
    softmax = settled(0.6, floor, sizes)
    sizes_1n = SIZES_1n if sizes else torch.ones_like(LOGITS_1n)
    relative_1n = softmax.relative(LOGITS_1n[0])[None]
    mean = (sizes_1n * relative_1n).sum() / sizes_1n.sum()
    assert float(mean) == pytest.approx(1.0, abs=1e-6)
    size = float(effective_sample_size(relative_1n, sizes_1n)[0])
    assert size == pytest.approx(0.6, abs=1e-4) if not floor else size > 0.6


def test_without_a_bound_the_temperature_is_one() -> None:
    softmax = settled(bound=0.0)
    assert float(softmax.temperature) == 1.0
    ratio = softmax.relative(LOGITS_1n[0]) / LOGITS_1n[0].exp()
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio))


def test_equal_logits_give_exactly_one() -> None:
    softmax = DeferredSoftmax(min_effective_sample_size=0.5, uniform_floor=0.1)
    softmax.settle(torch.full((1, 7), 3.25), None)
    assert torch.equal(softmax.relative(torch.full((3,), 3.25)), torch.ones(3))


@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_drift_is_what_the_next_batch_misses_the_bound_by(floor: float) -> None:
    softmax = settled(0.6, floor)
    used = softmax.relative(2 * LOGITS_1n[0])[None]
    softmax.observe(softmax.relative(LOGITS_1n[0])[None], None)  # an update settled it
    assert float(softmax.drift) == pytest.approx(0.0, abs=1e-5)
    softmax.observe(used, None)
    own = settled(0.6, floor)
    own.settle(2 * LOGITS_1n, None)
    expected = effective_sample_size(used) - effective_sample_size(
        own.relative(2 * LOGITS_1n[0])[None]
    )
    assert float(softmax.drift) == pytest.approx(float(expected[0]), abs=1e-4)
    assert float(softmax.drift) < -0.1
    assert float(softmax.temperature) == pytest.approx(float(own.temperature), rel=1e-4)
    assert float(softmax.reference) == pytest.approx(float(own.reference), rel=1e-4)


def test_a_unit_far_above_the_others_overflows_nothing() -> None:
    softmax = settled()
    relative_n = softmax.relative(torch.tensor([0.0, 1e4]))
    assert torch.isfinite(relative_n).all()
    softmax.observe(relative_n[None], None)
    assert torch.isfinite(softmax.temperature) and torch.isfinite(softmax.reference)


def test_a_batch_far_below_the_last_one_has_a_sum_above_0() -> None:
    """Divided by their mean, weights of such a batch are uniform; the next step's are not."""
    softmax = settled()
    softmax.begin_step()
    relative_n = softmax.relative(LOGITS_1n[0] - 1e4)
    assert float(relative_n.min()) > 0 and torch.isfinite(1 / relative_n).all()
    softmax.observe(relative_n[None], None)
    assert torch.isfinite(softmax.temperature) and torch.isfinite(softmax.reference)


def test_the_drift_of_logits_that_jump_is_a_number() -> None:
    softmax = settled(bound=0.0)
    for shift in (55.0, -55.0):
        softmax.begin_step()
        softmax.observe(softmax.relative(LOGITS_1n[0] + shift)[None], None)
        assert softmax.drift is not None and abs(float(softmax.drift)) < 1e-3


def test_a_unit_without_weight_settles_as_the_others_do() -> None:
    softmax = DeferredSoftmax(min_effective_sample_size=0.0, uniform_floor=0.0)
    logits_1n = torch.cat([LOGITS_1n, torch.tensor([[-torch.inf]])], dim=1)
    softmax.settle_first(logits_1n, None)
    softmax.begin_step()
    relative_n = softmax.relative(logits_1n[0])
    found_n = relative_n / relative_n.mean()
    expected_n = torch.softmax(logits_1n[0], dim=0) * logits_1n.shape[1]
    torch.testing.assert_close(found_n, expected_n, rtol=1e-5, atol=1e-12)


def test_a_batch_without_a_unit_that_counts_settles_nothing() -> None:
    softmax = DeferredSoftmax(min_effective_sample_size=0.5, uniform_floor=0.0)
    softmax.settle_first(LOGITS_1n, torch.zeros_like(LOGITS_1n))
    assert not softmax.is_ready
    softmax.settle_first(LOGITS_1n, torch.ones_like(LOGITS_1n))
    assert softmax.is_ready


def test_an_empty_state_is_that_before_the_first_batch() -> None:
    softmax = settled()
    softmax.observe(softmax.relative(LOGITS_1n[0])[None], None)
    softmax.load_state_dict({}, CPU)
    assert not softmax.is_ready and softmax.statistics() == {}


def test_state_is_all_that_a_resumed_run_needs() -> None:
    softmax, other = settled(), DeferredSoftmax(min_effective_sample_size=0.5, uniform_floor=0.0)
    softmax.observe(softmax.relative(LOGITS_1n[0])[None], None)
    other.load_state_dict(softmax.state_dict(), CPU)
    assert torch.equal(other.relative(LOGITS_1n[0]), softmax.relative(LOGITS_1n[0]))
    softmax.observe(softmax.relative(3 * LOGITS_1n[0])[None], None)
    other.observe(other.relative(3 * LOGITS_1n[0])[None], None)
    assert torch.equal(other.temperature, softmax.temperature)


def test_the_step_after_an_update_between_steps_sets_the_temperature_anew() -> None:
    """The update's batch gives T for that step; the next one's is that step's own, as ever."""
    updated, plain = settled(0.6), settled(0.6)
    updated.settle(5 * LOGITS_1n, None)
    for softmax in (updated, plain):
        softmax.begin_step()
        logits_n = 3 * LOGITS_1n[0]
        softmax.observe(softmax.relative(logits_n)[None], None)
    assert float(updated.temperature) == pytest.approx(float(plain.temperature), rel=1e-5)


def test_state_goes_to_the_device_of_the_rank() -> None:
    """A checkpoint's tensors are the main process's, on another device than this rank's."""
    softmax = settled()
    softmax.load_state_dict(softmax.state_dict(), torch.device("meta"))
    assert softmax.temperature.device.type == softmax.reference.device.type == "meta"


@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_an_update_inside_a_step_leaves_the_drift_of_that_step(floor: float) -> None:
    alone, updated = settled(0.6, floor), settled(0.6, floor)
    for softmax in (alone, updated):
        softmax.begin_step()
        relative_1n = softmax.relative(2 * LOGITS_1n[0])[None]
        if softmax is updated:
            softmax.settle(5 * LOGITS_1n, None)
        softmax.observe(relative_1n, None)
    assert float(updated.drift) == pytest.approx(float(alone.drift), abs=1e-6)
    assert float(alone.drift) < -0.1
    assert float(updated.temperature) > 2 * float(alone.temperature)
