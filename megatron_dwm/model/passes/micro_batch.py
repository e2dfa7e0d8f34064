"""A micro-batch, and the form in which the layers take it.

Without borders a micro-batch is B rows of S tokens. With borders Megatron-Core's own layers take
the rows and their pieces. Transformer Engine takes packed sequences: one row of B * S tokens. A
unit is the same in both forms, so losses, features and alignments of units do not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

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
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    position_ids_BS: Tensor
    coefficients_BS: Tensor
    loss_mask_BS: Tensor
    units: Units
    borders_BS: Tensor | None = None

    @cached_property
    def pieces(self) -> Pieces | None:
        """The document pieces between the borders; all layers share them."""
        return None if self.borders_BS is None else pieces_of(self.borders_BS)

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
    if llm.layer_kind != "transformer_engine":
        return list(micro_batches)
    return [batch if batch.borders_BS is None else batch.flattened() for batch in micro_batches]


def attention_borders(llm: LLM, pieces: Pieces | None) -> PackedSeqParams | None:
    """Returns Megatron-Core's argument for attention inside `pieces`; None if there are none."""
    if pieces is None:
        return None
    if llm.layer_kind == "transformer_engine":
        return packed_sequences(pieces)
    return packed_pieces(pieces)
