"""Sketches of the units' gradients, whose inner products are those of the gradients.

A sketch is a linear map of the whole gradient of a unit, CountSketch (Charikar et al. 2002; OPUS,
arXiv 2602.05400, has it for gradients): element j of the gradient is added with the sign s(j) to
the bucket h(j), one of k. Bucket and sign follow from the element's number in the whole model
(coordinates.py), so the parts that modules, micro-batches and ranks form add up to the same sketch
under every layout, with one sum over the ranks of a replica. Elements may be multiplied by factors
first: with the optimizer's Jacobian the sketch is that of the unit's own part in the step.

    E <sketch x, sketch y> = <x, y>        variance (|x|^2 |y|^2 + <x, y>^2 - 2 sum x_j^2 y_j^2) / k

So a sketch of 8,192 numbers has an error of 1.1 % of |x| |y|, or 1.6 % for y = x. Size 0 stands for
the exact form: a bucket for every element, for tests and small models.

A linear module's part is formed unit by unit: one product of a weight gradient's size, then one
addition for every element of the weight. Cost: in FLOPs one product of a forward pass's size, with
whichever pass carries it; in memory traffic every parameter once for each unit, so a window of
thirty short documents costs thirty times that. Memory: 8 bytes for every parameter of this rank
during the pass, one weight's gradient, and k floats for each unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_dwm.bilevel.coordinates import element_numbers, named_parameters, num_elements
from megatron_dwm.model import LLM, Units

# Constants of the generator splitmix64, as signed integers.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_MIXES = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))


@dataclass(frozen=True, kw_only=True)
class SketchPlan:
    """What to sketch of each unit's gradient.

    size: k, numbers of a sketch; 0 for the exact form, one for every parameter of the whole model.
    factors: float32, the Jacobian's diagonal for this rank's parameters, by id; None: 1.
    seed: chooses the buckets and signs, from 0 to 2^23 - 1.
    """

    size: int
    factors: Mapping[int, Tensor] | None = None
    seed: int = 0

    def prepare(self, llm: LLM, num_units: int) -> UnitSketches:
        """Returns empty sketches of `num_units` units."""
        columns = self.size or num_elements(llm.shape)
        values_nK = torch.zeros(num_units, columns, device=llm.runtime.device)
        places = {
            id(parameter): self._places(llm, name, parameter)
            for name, parameter in named_parameters(llm)
        }
        return UnitSketches(places, values_nK)

    def _places(self, llm: LLM, name: str, parameter: Parameter) -> Places:
        numbers = element_numbers(llm, name, parameter)
        if not self.size:
            buckets, factors = numbers, torch.ones_like(numbers, dtype=torch.float32)
        else:
            buckets, factors = count_sketch(numbers, self.size, self.seed)
        if self.factors is not None:
            factors *= self.factors[id(parameter)]
        return Places(buckets, factors)


@dataclass(frozen=True)
class Places:
    """Where the elements of one parameter go: bucket and signed factor, shaped like it."""

    buckets: Tensor
    factors: Tensor


def count_sketch(numbers: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns buckets, int32 from 0 to size - 1, and signs, float32, of element numbers (int64)."""
    # No model has 2^40 elements, so no number of one seed is a number of another.
    mixed = (numbers + (seed << 40)) * _STEP
    for shift, factor in _MIXES:
        # A shift of a negative number keeps its sign; the mask makes it the unsigned one.
        mixed = (mixed ^ ((mixed >> shift) & (2 ** (64 - shift) - 1))) * factor
    buckets = ((mixed >> 1) & (2**62 - 1)) % size
    return buckets.to(torch.int32), ((mixed & 1) * 2 - 1).float()


@dataclass
class UnitSketches:
    """Sketches of the units of a pass, which its hooks add to.

    places: of this rank's parameters, by id. values_nK: float32, K numbers of each unit.
    """

    places: Mapping[int, Places]
    values_nK: Tensor
    _by_unit: dict[int, tuple[Tensor, list[int]]] = field(default_factory=dict)

    def add_linear(
        self, weight: Tensor, gradient_SBC: Tensor, kept_SBD: Tensor, units: Units, first: int
    ) -> None:
        """Add sum_t d_t x_t^T of each unit, the gradient of W in y = x W^T.

        first: the row of the first of these units; also for the functions below.
        """
        places, (order_T, counts) = self.places[id(weight)], self._tokens(kept_SBD, units, first)
        buckets = places.buckets.flatten()
        gradients = gradient_SBC.flatten(0, 1)[order_T].split(counts)
        inputs = kept_SBD.flatten(0, 1)[order_T].split(counts)
        # The first part has the tokens of no unit.
        for number, (d_TC, x_TD) in enumerate(zip(gradients[1:], inputs[1:], strict=True)):
            product_CD = (d_TC.t() @ x_TD).float() * places.factors
            self.values_nK[first + number].index_add_(0, buckets, product_CD.flatten())

    def add_vector(
        self, gain: Tensor, products_SBD: Tensor, units: Units, first: int, *, position: int = 0
    ) -> None:
        """Add the sum over each unit's tokens, the gradient of a vector.

        products_SBD: for a norm of heads [S, B, heads, D]. position: of the first token in its row.
        """
        if products_SBD.dim() == 4:
            products_SBD = products_SBD.sum(dim=2, dtype=torch.float32)
        places, numbers_SB = self.places[id(gain)], units.of_sequence(products_SBD, first=position)
        sums_UD = products_SBD.new_zeros(units.count + 1, len(gain), dtype=torch.float32)
        sums_UD.index_add_(0, numbers_SB.flatten() + 1, products_SBD.flatten(0, 1).float())
        rows_UK = self.values_nK[first : first + units.count]
        rows_UK.index_add_(1, places.buckets, sums_UD[1:] * places.factors)

    def add_rows(
        self, table: Tensor, gradient_SBD: Tensor, rows_SB: Tensor, units: Units, first: int
    ) -> None:
        """Add each token's gradient to its row of a table of vectors; row -1 is on no row here."""
        places = self.places[id(table)]
        numbers_T = units.of_sequence(gradient_SBD).flatten()
        counted_T = (rows_SB.flatten() >= 0) & (numbers_T >= 0)
        rows_T, numbers_T = rows_SB.flatten()[counted_T], numbers_T[counted_T]
        values_TD = gradient_SBD.flatten(0, 1)[counted_T].float() * places.factors[rows_T]
        columns = self.values_nK.shape[1]
        flat_TD = (first + numbers_T)[:, None] * columns + places.buckets[rows_T]
        self.values_nK.view(-1).index_add_(0, flat_TD.flatten(), values_TD.flatten())

    def _tokens(self, kept_SBD: Tensor, units: Units, first: int) -> tuple[Tensor, list[int]]:
        """Returns the tokens in the order of their units, and the number of each unit's tokens."""
        if first not in self._by_unit:
            numbers_T = units.of_sequence(kept_SBD).flatten() + 1
            counts_U = numbers_T.bincount(minlength=units.count + 1)
            self._by_unit[first] = (numbers_T.argsort(stable=True), counts_U.tolist())
        return self._by_unit[first]
