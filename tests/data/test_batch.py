"""Slicing and joining batches."""

from __future__ import annotations

import torch

from megatron_dwm.data.batch import Batch


def make(rows: int, columns: int = 3) -> Batch:
    text = torch.arange(rows * (columns + 1)).reshape(rows, columns + 1)
    return Batch(
        tokens_BS=text[:, :-1],
        labels_BS=text[:, 1:],
        loss_mask_BS=torch.ones(rows, columns),
        position_ids_BS=torch.arange(columns).repeat(rows, 1),
        sample_ids_B=torch.arange(rows),
        document_ids_U=torch.arange(rows) + 100,
        domains=tuple("abcdefgh"[:rows]),
    )


def test_micro_batches_joined_give_the_batch_back() -> None:
    batch = make(6)
    parts = batch.micro_batches(2)
    joined = Batch.concatenate(parts)
    assert [part.size for part in parts] == [2, 2, 2]
    assert parts[1].domains == ("c", "d") and parts[1].sample_ids_B.tolist() == [2, 3]
    assert joined.domains == batch.domains
    assert torch.equal(joined.labels_BS, batch.labels_BS)
    assert torch.equal(joined.document_ids_U, batch.document_ids_U)


def test_rows_share_memory_and_move() -> None:
    batch = make(4)
    assert batch.rows(1, 3).tokens_BS.data_ptr() == batch.tokens_BS[1].data_ptr()
    assert batch.rows(2, 2).size == 0
    assert torch.equal(batch.to("cpu").tokens_BS, batch.tokens_BS)
