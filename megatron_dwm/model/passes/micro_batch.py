"""A micro-batch, and the form in which the layers take it.

Without borders a micro-batch is B rows of S tokens. With borders Megatron-Core's own layers take
the rows and their pieces. Transformer Engine takes packed sequences: one row of B * S tokens. Under
context parallelism every rank takes its part of each row, with borders or without (context.py). A
unit is the same in all forms, so losses, features and alignments of units do not depend on them;
those of a part are sums to be added over the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_dwm.model.layers.context import ContextPart, PartialRows, partial_rows
from megatron_dwm.model.layers.kernels import attention_dtype
from megatron_dwm.model.layers.local import packed_pieces
from megatron_dwm.model.layers.pieces import Pieces, pieces_of
from megatron_dwm.model.layers.transformer_engine import packed_sequences
from megatron_dwm.model.llm import LLM
from megatron_dwm.model.passes.units import Units


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass.

    coefficients_BS: float32 factor of every token's loss.
    loss_mask_BS: float32, 1 for a token that counts in its unit's loss; not in the objective.
    units: what gets a weight.
    borders_BS: int64, number of each token's document piece in its row. Attention stops where it
        changes. None: attention has no borders.
    part: which tokens of its rows it has; None: all. `borders_BS` is of whole rows always.
    whole_counts_U: float32, see `token_counts_U`; None: whole rows.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    position_ids_BS: Tensor
    coefficients_BS: Tensor
    loss_mask_BS: Tensor
    units: Units
    borders_BS: Tensor | None = None
    part: ContextPart | None = None
    whole_counts_U: Tensor | None = None

    @cached_property
    def pieces(self) -> Pieces | None:
        """The document pieces between the borders; all layers share them."""
        return None if self.borders_BS is None else pieces_of(self.borders_BS)

    def partial_rows(self, dtype: torch.dtype) -> PartialRows:
        """Returns what attention needs to know of the other parts, for all layers.

        dtype: of the activations.
        Its masks are large, so nothing keeps them longer than the backward pass does.
        """
        assert self.part is not None
        length, device = self.tokens_BS.shape[1] * self.part.size, self.tokens_BS.device
        attends_in = attention_dtype(dtype, device)
        return partial_rows(self.part, self.borders_BS, length, device, attends_in)

    @cached_property
    def token_counts_U(self) -> Tensor:
        """float32, counted tokens of each unit in whole rows."""
        if self.whole_counts_U is not None:
            return self.whole_counts_U
        return self.units.sum_of_rows(self.loss_mask_BS)

    def of_part(self, part: ContextPart) -> MicroBatch:
        """Returns a part of every row."""
        return MicroBatch(
            tokens_BS=part.of_rows(self.tokens_BS),
            labels_BS=part.of_rows(self.labels_BS),
            position_ids_BS=part.of_rows(self.position_ids_BS),
            coefficients_BS=part.of_rows(self.coefficients_BS.expand_as(self.tokens_BS)),
            loss_mask_BS=part.of_rows(self.loss_mask_BS),
            units=self.units.of_part(part),
            borders_BS=self.borders_BS,
            part=part,
            whole_counts_U=self.token_counts_U,
        )

    def flattened(self) -> MicroBatch:
        """Returns the micro-batch as one row, with a border between any two of its rows."""
        borders_BS = self.borders_BS
        assert borders_BS is not None, "without borders a row would continue in the next one"
        last_B = borders_BS[:, -1] + 1
        before_B = last_B.cumsum(dim=0) - last_B
        return MicroBatch(
            tokens_BS=self.tokens_BS.reshape(1, -1),
            labels_BS=self.labels_BS.reshape(1, -1),
            position_ids_BS=self.position_ids_BS.reshape(1, -1),
            coefficients_BS=self.coefficients_BS.reshape(1, -1),
            loss_mask_BS=self.loss_mask_BS.reshape(1, -1),
            units=self.units.flattened(borders_BS),
            borders_BS=(borders_BS + before_B[:, None]).reshape(1, -1),
        )


def as_layers_take(llm: LLM, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Returns the micro-batches in the form that the layers of `llm` take."""
    if llm.runtime.context_size > 1:
        part = ContextPart(llm.runtime.context_rank, llm.runtime.context_size)
        return [batch.of_part(part) for batch in micro_batches]
    if llm.layer_kind != "transformer_engine":
        return list(micro_batches)
    return [batch if batch.borders_BS is None else batch.flattened() for batch in micro_batches]


def attention_borders(llm: LLM, batch: MicroBatch) -> PackedSeqParams | None:
    """Returns Megatron-Core's `packed_seq_params`: what attention does not see from the rows.

    batch: in the form that the layers take.
    """
    on_transformer_engine = llm.layer_kind == "transformer_engine"
    if batch.pieces is None:
        # Transformer Engine's attention knows the parts of plain rows by itself.
        return (
            None
            if batch.part is None or on_transformer_engine
            else batch.partial_rows(llm.transformer.params_dtype)
        )
    if batch.part is not None:
        return batch.partial_rows(llm.transformer.params_dtype)
    return packed_sequences(batch.pieces) if on_transformer_engine else packed_pieces(batch.pieces)
