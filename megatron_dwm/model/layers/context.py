"""Context parallelism: every rank holds two of 2 C equal slices of each row.

Rank r of C has the slices r and 2 C - 1 - r, as Megatron-LM cuts them (get_batch_on_this_cp_rank in
its utils.py): under causal attention a slice costs in proportion to its number, so all ranks do the
same work. Only attention sees more than its own tokens. Here it gathers the keys and values of all
ranks, in one message a layer; the backward pass sums and scatters their gradients. Transformer
Engine's attention passes them around instead.

Cost: keys and values of the whole row on every rank, kept for the backward pass of the layer. A
mask, shared by all layers, of S / C queries times the keys that they can see, which are those of
their own documents at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_dwm.model.layers.kernels import grouped_attention


@dataclass(frozen=True)
class ContextPart:
    """The part of every row that one rank of a context-parallel group holds."""

    rank: int
    size: int

    @property
    def slices(self) -> tuple[int, int]:
        """The numbers of its two slices, of 2 * size."""
        return self.rank, 2 * self.size - 1 - self.rank

    def of_rows(self, values_BS: Tensor) -> Tensor:
        """Returns this part of whole rows, [B, S / size]."""
        slices = values_BS.chunk(2 * self.size, dim=1)
        return torch.cat([slices[number] for number in self.slices], dim=1)


def in_order(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Returns the whole rows of the parts of ranks 0, 1, ...; the inverse of `of_rows`.

    dim: the dimension of the tokens.
    """
    halves = [part.chunk(2, dim=dim) for part in parts]
    first, last = zip(*halves, strict=True)
    return torch.cat([*first, *reversed(last)], dim=dim)


@dataclass(frozen=True)
class SliceMask:
    """What the queries of one slice attend to: keys `first` to `stop` - 1 of the row.

    bias: [B or 1, 1, queries, stop - first] in the precision of attention: 0 for a key that is
        seen, else -inf. Of a mask of bools torch's kernel would keep such a copy for every layer.
    """

    first: int
    stop: int
    bias: Tensor


@dataclass
class PartialRows(PackedSeqParams):
    """A part of rows on its way through the model's argument `packed_seq_params`.

    Megatron-Core hands the object on to every core attention. It leaves the shapes of the format
    "sbhd" alone, and takes the number of rotary positions from `max_seqlen`: here that of the whole
    rows, from which it takes this rank's part itself.
    """

    masks: tuple[SliceMask, SliceMask] = field(kw_only=True)


def partial_rows(
    part: ContextPart,
    borders_BS: Tensor | None,
    length: int,
    device: torch.device,
    dtype: torch.dtype,
) -> PartialRows:
    """Returns what the model takes as `packed_seq_params` for a part of rows.

    borders_BS: int64, the document piece of each token of the whole rows; None: no borders.
    length: tokens of a whole row. dtype: that of attention.
    """
    width = length // (2 * part.size)
    first, last = (
        _mask(borders_BS, number * width, (number + 1) * width, device, dtype)
        for number in part.slices
    )
    return PartialRows(
        qkv_format="sbhd", max_seqlen_q=length, max_seqlen_kv=length, masks=(first, last)
    )


def _mask(
    borders_BS: Tensor | None, start: int, stop: int, device: torch.device, dtype: torch.dtype
) -> SliceMask:
    """Returns the mask of the queries `start` to `stop` - 1."""
    queries = torch.arange(start, stop, device=device)[:, None]
    if borders_BS is None:
        is_seen = (torch.arange(stop, device=device) <= queries)[None]
        return SliceMask(0, stop, _bias(is_seen, dtype))
    # Earlier documents than that of the first query are not seen by any.
    is_open_S = (borders_BS[:, :stop] >= borders_BS[:, start : start + 1]).any(dim=0)
    first = int(is_open_S.int().argmax())
    keys = torch.arange(first, stop, device=device)
    is_same = borders_BS[:, start:stop, None] == borders_BS[:, None, first:stop]
    return SliceMask(first, stop, _bias(is_same & (keys <= queries), dtype))


def _bias(is_seen: Tensor, dtype: torch.dtype) -> Tensor:
    zeros = torch.zeros(is_seen.shape, dtype=dtype, device=is_seen.device)
    return zeros.masked_fill_(~is_seen, -torch.inf)[:, None]


def attend_to_all_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Sequence[SliceMask],
    group: dist.ProcessGroup,
) -> Tensor:
    """Returns causal attention of this rank's queries, [S / C, B, heads * d] (collective).

    query is [S / C, B, heads, d], key and value are [S / C, B, groups, d]: this rank's parts.
    """
    parts = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=group)
    both = in_order(parts.chunk(group.size()), dim=0)
    key_BgSd, value_BgSd = both.permute(1, 2, 0, 3).chunk(2, dim=-1)
    outputs = []
    for query_SBhd, mask in zip(query.chunk(2), masks, strict=True):
        out_BhSd = grouped_attention(
            query_SBhd.permute(1, 2, 0, 3),
            key_BgSd[:, :, mask.first : mask.stop],
            value_BgSd[:, :, mask.first : mask.stop],
            attn_mask=mask.bias,
        )
        outputs.append(out_BhSd.permute(2, 0, 1, 3))
    return torch.cat(outputs).flatten(2)
