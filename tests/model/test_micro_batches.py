"""How a global batch is cut: equal micro-batches for every replica, and little padding."""

from __future__ import annotations

from itertools import product

import pytest

from megatron_dwm.model.passes.micro_batches import largest_micro_batch, rows_of_replica


@pytest.mark.parametrize("halves", [False, True])
def test_rows_make_equal_micro_batches(halves: bool) -> None:
    parts = 2 if halves else 1
    for passages, size, replicas, multiple in product(range(1, 30), (1, 3, 4), (1, 2, 3), (1, 2)):
        rows = rows_of_replica(
            passages,
            micro_batch_size=size,
            replicas=replicas,
            micro_batches_multiple=multiple,
            halves=halves,
        )
        assert rows * replicas >= passages
        assert rows % parts == 0
        assert largest_micro_batch(rows // parts, size, multiple) <= size


def test_a_batch_that_fits_has_no_padding() -> None:
    rows = rows_of_replica(
        64, micro_batch_size=4, replicas=4, micro_batches_multiple=2, halves=True
    )
    assert rows == 16


def test_rows_that_the_schedule_cannot_take_are_refused() -> None:
    with pytest.raises(ValueError, match="3 validation rows are no multiple of 2 pipeline stages"):
        largest_micro_batch(3, 4, 2)
