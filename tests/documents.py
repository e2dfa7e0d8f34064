"""Packed rows of random documents, and each document run alone through a second Llama.

The second Llama is plain torch in double precision. It shares the parameters with the LLM under
test and no code: attention is a softmax of scores under a mask, and a document begins at position 0
of a row of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dwm.data import Batch
from megatron_dwm.model import LlamaShape
from megatron_dwm.runtime import Runtime
from megatron_dwm.testing import SEQUENCE_LENGTH, VOCAB_SIZE, replica_rows

# Every half of the rows has another number of documents, and so has every pair of rows.
LENGTHS = [
    [5, 1, 10],
    [16],
    [1, 1, 14],
    [3, 3, 3, 3, 4],
    [16],
    [9, 7],
    [1, 1, 6, 8],
    [2, 13, 1],
]
# Whether the label of the row's last token belongs to another document.
ENDS_AT_BORDER = [True, False, False, True, True, False, False, True]
DOCUMENTS = sum(map(len, LENGTHS))
DOMAINS = ("a", "b", "c")


def packed_batch(
    number: int,
    runtime: Runtime,
    *,
    border_loss: bool = True,
    equal: bool = False,
    uncounted: float = 0.0,
    unit: str = "document",
    borders: bool = True,
    whole: bool = False,
) -> Batch:
    """Returns this replica's rows of packed batch `number`, or all rows.

    border_loss, equal: as `data.border_loss` and `weighting.unit_share`.
    uncounted: fraction of the labels, chosen at random, whose loss does not count.
    """
    generator = torch.Generator().manual_seed(number)
    rows = len(LENGTHS)
    text = torch.randint(VOCAB_SIZE, (rows, SEQUENCE_LENGTH + 1), generator=generator)
    mask_BS = (torch.rand(rows, SEQUENCE_LENGTH, generator=generator) >= uncounted).float()
    pieces = [[p for p, n in enumerate(lengths) for _ in range(n)] for lengths in LENGTHS]
    pieces_BS = torch.tensor(pieces)
    if not border_loss:
        ends_BS = torch.zeros_like(mask_BS, dtype=torch.bool)
        ends_BS[:, :-1] = pieces_BS[:, 1:] != pieces_BS[:, :-1]
        ends_BS[:, -1] = torch.tensor(ENDS_AT_BORDER)
        mask_BS[ends_BS] = 0.0
    count = DOCUMENTS if unit == "document" else rows
    batch = Batch(
        tokens_BS=text[:, :-1].contiguous(),
        labels_BS=text[:, 1:].contiguous(),
        loss_mask_BS=mask_BS,
        position_ids_BS=torch.arange(SEQUENCE_LENGTH).repeat(rows, 1),
        sample_ids_B=torch.arange(rows),
        document_ids_U=torch.arange(count),
        domains=tuple(DOMAINS[i * i % 3] for i in range(count)),
        borders_BS=pieces_BS if borders else None,
        units_BS=pieces_BS if unit == "document" else None,
        equal_shares=equal,
    )
    mine = slice(0, rows) if whole else replica_rows(runtime, rows)
    return batch.rows(mine.start, mine.stop).to(runtime.device)


def weights_of(runtime: Runtime, number: int = 0) -> Tensor:
    """Returns weights of this replica's documents that are far from uniform."""
    generator = torch.Generator().manual_seed(number)
    of_documents = torch.rand(DOCUMENTS, generator=generator) * 1.6 + 0.2
    mine = replica_rows(runtime, len(LENGTHS))
    first, stop = (sum(map(len, LENGTHS[:row])) for row in (mine.start, mine.stop))
    return of_documents[first:stop].to(runtime.device)


def documents_of(batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields tokens, labels and float64 mask of every piece between borders, each [1, length]."""
    assert batch.borders_BS is not None
    for row, borders_S in enumerate(batch.borders_BS):
        for piece in borders_S.unique():
            here = borders_S == piece
            columns = (batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS.double())
            yield tuple(values[row][here][None] for values in columns)


def document_losses(shape: LlamaShape, theta: dict[str, Tensor], batch: Batch) -> Tensor:
    """Returns [U], the token-mean loss of every document, each run alone; 0 if no token counts."""
    losses = []
    for tokens, labels, mask in documents_of(batch):
        logits = F.linear(last_hidden(shape, theta, tokens)[-1], _output_weight(theta))
        of_tokens = F.cross_entropy(logits[0], labels[0], reduction="none")
        losses.append((of_tokens * mask[0]).sum() / mask.sum().clamp(min=1.0))
    return torch.stack(losses)


def last_hidden(shape: LlamaShape, theta: dict[str, Tensor], tokens_BS: Tensor) -> list[Tensor]:
    """Returns [B, S, D] after each layer, and after the final norm."""
    hidden = theta["embedding.word_embeddings.weight"][tokens_BS]
    found = []
    for number in range(shape.num_layers):
        part = {
            name.removeprefix(f"decoder.layers.{number}."): value
            for name, value in theta.items()
            if name.startswith(f"decoder.layers.{number}.")
        }
        normed = _norm(shape, hidden, part["input_layernorm.weight"])
        hidden = hidden + _attention(shape, part, normed)
        normed = _norm(shape, hidden, part["pre_mlp_layernorm.weight"])
        gate, up = F.linear(normed, part["mlp.linear_fc1.weight"]).chunk(2, dim=-1)
        hidden = hidden + F.linear(gate * gate.sigmoid() * up, part["mlp.linear_fc2.weight"])
        found.append(hidden)
    return [*found, _norm(shape, hidden, theta["decoder.final_layernorm.weight"])]


def _output_weight(theta: dict[str, Tensor]) -> Tensor:
    return theta.get("output_layer.weight", theta["embedding.word_embeddings.weight"])


def _norm(shape: LlamaShape, hidden: Tensor, gain_D: Tensor) -> Tensor:
    return gain_D * hidden / (hidden.square().mean(-1, keepdim=True) + shape.norm_epsilon).sqrt()


def _attention(shape: LlamaShape, part: dict[str, Tensor], hidden: Tensor) -> Tensor:
    batch, length, width = hidden.shape
    heads, groups = shape.num_attention_heads, shape.num_query_groups
    size, of_group = shape.head_dim or width // heads, heads // groups
    # A group's queries, then its key and its value.
    bias = part.get("self_attention.linear_qkv.bias")
    qkv = F.linear(hidden, part["self_attention.linear_qkv.weight"], bias)
    qkv = qkv.view(batch, length, groups, of_group + 2, size)
    query, key = qkv[..., :of_group, :], qkv[..., of_group : of_group + 1, :]
    if shape.qk_layernorm:
        query = _norm(shape, query, part["self_attention.q_layernorm.weight"])
        key = _norm(shape, key, part["self_attention.k_layernorm.weight"])
    query, key = _rotate(query, shape.rotary_base), _rotate(key, shape.rotary_base)
    scores = torch.einsum("bqghd,bkgxd->bghqk", query, key) / size**0.5
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    shares = scores.masked_fill(future, -torch.inf).softmax(-1)
    mixed = torch.einsum("bghqk,bkgd->bqghd", shares, qkv[..., of_group + 1, :])
    mixed = mixed.reshape(batch, length, heads * size)
    return F.linear(mixed, part["self_attention.linear_proj.weight"])


def _rotate(vectors: Tensor, base: float) -> Tensor:
    """Rotate [B, S, groups, heads, d] by the position, from 0."""
    length, half = vectors.shape[1], vectors.shape[-1] // 2
    frequencies = base ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)[:, None, None]
    first, second = vectors[..., :half], vectors[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
