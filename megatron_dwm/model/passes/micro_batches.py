"""How many rows of a global batch each replica has, and how many rows each micro-batch has.

The pipeline's schedule asks for a number of micro-batches that is a multiple of
`LLM.micro_batches_multiple`. Pure arithmetic: every rank computes the same numbers.
"""

from __future__ import annotations


def rows_of_replica(
    passages: int,
    *,
    micro_batch_size: int,
    replicas: int,
    micro_batches_multiple: int,
    halves: bool,
) -> int:
    """Returns the rows that each data-parallel replica holds of a global batch of `passages`.

    It is the smallest number that makes equal micro-batches and enough of them; rows without loss
    fill the batch up to it. With `halves`, the even rows and the odd rows each make such
    micro-batches.
    """
    parts = 2 if halves else 1
    whole = passages % (parts * micro_batches_multiple * replicas) == 0
    if whole and passages % (micro_batch_size * replicas) == 0:
        return passages // replicas
    share = -(-passages // (parts * replicas))
    multiple = micro_batches_multiple
    micro_batches = multiple * -(-share // (micro_batch_size * multiple))
    return parts * micro_batches * -(-share // micro_batches)


def largest_micro_batch(rows: int, largest: int, micro_batches_multiple: int) -> int:
    """Returns the size of the largest micro-batch, up to `largest`, that divides `rows` evenly.

    Raises ValueError if `rows` is no multiple of `micro_batches_multiple`.
    """
    multiple = micro_batches_multiple
    sizes = [size for size in range(1, largest + 1) if rows % (size * multiple) == 0]
    if not sizes:
        raise ValueError(f"{rows} validation rows are no multiple of {multiple} pipeline stages")
    return max(sizes)


def probed_micro_batches(micro_batches: int, fraction: float) -> int:
    """Returns how many micro-batches of a replica's step are probed (bilevel/ahead.py).

    It is the fraction of them, rounded, and at least one.
    """
    return max(1, round(micro_batches * fraction))
