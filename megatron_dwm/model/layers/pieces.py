"""Causal attention inside each document of a packed window, without a mask.

A window of S tokens often holds several documents; the part of a document in one window is a piece.
The pieces of a micro-batch are sorted by length and cut into buckets of similar length. A bucket
is a batch of its own, [pieces, longest], padded on the right, on which torch's causal kernel runs:
no real query sees the padding, which comes after it. Nothing of size S x S is formed.

Cost: a bucket's longest piece is at most RATIO times as long as its shortest, so there are at most
1 + log(S) / log(RATIO) buckets, at most RATIO times as many places as tokens, and at most RATIO^2
times the exact sum of squared lengths. Query, key, value and output are copied once each way. The
indices are made once for a micro-batch, on the host, and all layers and the backward pass use them.

Positions: rotary embeddings make attention a function of the distance between two tokens, so the
place in the window at which a document begins changes rounding and nothing else. Positions here go
on over borders; Transformer Engine's packed form begins anew at each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_dwm.model.layers.kernels import grouped_attention

RATIO = 1.25


@dataclass(frozen=True, eq=False)
class Buckets:
    """Places for tokens: bucket after bucket, in each piece after piece, padded on the right.

    sizes: number of pieces and of places a piece, of every bucket.
    tokens_R: int64, which token is at a place; some token at an empty one.
    empty: int64, the places without a token.
    places_T: int64, the place of every token.
    """

    sizes: tuple[tuple[int, int], ...]
    tokens_R: Tensor
    empty: Tensor
    places_T: Tensor


@dataclass(frozen=True, eq=False)
class Pieces:
    """The pieces of documents in a micro-batch, row after row.

    num_rows, row_length: B and S.
    lengths_P: int64, tokens of every piece, on the host.
    cu_seqlens: int32 [P + 1], the first token of every piece among all B * S, and B * S.
    """

    num_rows: int
    row_length: int
    lengths_P: np.ndarray
    cu_seqlens: Tensor

    @property
    def are_rows(self) -> bool:
        """True if every row is one piece, so that plain causal attention is the same."""
        return len(self.lengths_P) == self.num_rows

    @property
    def max_length(self) -> int:
        """Tokens of the longest piece."""
        return int(self.lengths_P.max())

    @cached_property
    def batch_first(self) -> Buckets:
        """Buckets of the tokens of a tensor [B, S, ...]."""
        sizes, tokens_R, is_real_R = _places(self.lengths_P)
        places_T = np.empty(self.num_rows * self.row_length, dtype=np.int64)
        places_T[tokens_R[is_real_R]] = np.flatnonzero(is_real_R)
        arrays = (tokens_R, np.flatnonzero(~is_real_R), places_T)
        return Buckets(sizes, *(torch.from_numpy(a).to(self.cu_seqlens.device) for a in arrays))

    @cached_property
    def sequence_first(self) -> Buckets:
        """Buckets of the tokens of a tensor [S, B, ...], as Megatron-Core's are."""
        other = self.batch_first
        row_R = other.tokens_R.div(self.row_length, rounding_mode="floor")
        tokens_R = other.tokens_R % self.row_length * self.num_rows + row_R
        places_T = other.places_T.view(self.num_rows, self.row_length).t().flatten()
        return Buckets(other.sizes, tokens_R, other.empty, places_T)


def pieces_of(borders_BS: Tensor) -> Pieces:
    """Returns the pieces of a micro-batch.

    borders_BS: int64, the number of each token's piece in its row, from 0, never decreasing.
    """
    borders = borders_BS.cpu().numpy()
    begins_BS = np.ones(borders.shape, dtype=bool)
    begins_BS[:, 1:] = borders[:, 1:] != borders[:, :-1]
    bounds = np.append(np.flatnonzero(begins_BS), borders.size)
    cu_seqlens = torch.from_numpy(bounds.astype(np.int32)).to(borders_BS.device)
    return Pieces(borders.shape[0], borders.shape[1], np.diff(bounds), cu_seqlens)


def attend(query: Tensor, key: Tensor, value: Tensor, buckets: Buckets) -> Tensor:
    """Returns causal attention inside every piece, in the shape of `query`.

    query is [X, Y, heads, d], key and value [X, Y, groups, d]; X and Y are B and S in the order
    that `buckets` were made for.
    """
    outputs_RC = []
    for query_PHLd, key_PHLd, value_PHLd in zip(
        *(_bucketed(tensor, buckets) for tensor in (query, key, value)), strict=True
    ):
        out_PHLd = grouped_attention(query_PHLd, key_PHLd, value_PHLd, is_causal=True)
        outputs_RC.append(out_PHLd.transpose(1, 2).flatten(2).flatten(0, 1))
    return _Collect.apply(torch.cat(outputs_RC), buckets).view(query.shape)


def _bucketed(tensor: Tensor, buckets: Buckets) -> list[Tensor]:
    """Returns [pieces, heads, length, d] for every bucket; `tensor` is as `attend` takes it."""
    placed_RC = _Place.apply(tensor.flatten(2).flatten(0, 1), buckets)
    parts = placed_RC.split([pieces * length for pieces, length in buckets.sizes])
    return [
        part.view(*size, *tensor.shape[2:]).transpose(1, 2)
        for part, size in zip(parts, buckets.sizes, strict=True)
    ]


def _places(lengths_P: np.ndarray) -> tuple[tuple[tuple[int, int], ...], np.ndarray, np.ndarray]:
    """Returns the buckets' sizes, the token at every place, and whether a place has one."""
    first_P = np.cumsum(lengths_P) - lengths_P
    longest_first = np.argsort(-lengths_P, kind="stable")
    sizes, tokens, is_real = [], [], []
    while len(longest_first):
        longest = lengths_P[longest_first[0]]
        size = np.searchsorted(-lengths_P[longest_first], -longest / RATIO, side="right")
        chosen, longest_first = longest_first[:size], longest_first[size:]
        place = np.arange(longest)
        is_real.append((place < lengths_P[chosen, None]).ravel())
        tokens.append(np.where(is_real[-1], (first_P[chosen, None] + place).ravel(), 0))
        sizes.append((int(size), int(longest)))
    return tuple(sizes), np.concatenate(tokens), np.concatenate(is_real)


class _Place(torch.autograd.Function):
    """Puts the tokens [T, C] at their places [R, C]; the others are 0. The adjoint of _Collect."""

    @staticmethod
    def forward(ctx: Any, values_TC: Tensor, buckets: Buckets) -> Tensor:
        ctx.buckets = buckets
        return values_TC.index_select(0, buckets.tokens_R).index_fill_(0, buckets.empty, 0)

    @staticmethod
    def backward(ctx: Any, gradient_RC: Tensor) -> tuple[Tensor, None]:
        return _Collect.apply(gradient_RC, ctx.buckets), None


class _Collect(torch.autograd.Function):
    """Takes the tokens [T, C] from their places [R, C]. The adjoint of _Place."""

    @staticmethod
    def forward(ctx: Any, values_RC: Tensor, buckets: Buckets) -> Tensor:
        ctx.buckets = buckets
        return values_RC.index_select(0, buckets.places_T)

    @staticmethod
    def backward(ctx: Any, gradient_TC: Tensor) -> tuple[Tensor, None]:
        return _Place.apply(gradient_TC, ctx.buckets), None
