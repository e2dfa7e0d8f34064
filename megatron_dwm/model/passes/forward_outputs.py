"""What a forward pass of the LLM computes for each unit: its loss and two pooled hidden states.

    final   mean over tokens of the last hidden state, after the final norm
    early   mean over tokens of an early layer's output (METHOD.md, section 3)

Hooks take both during the pass, at the cost of two reductions over [S, B, D]. The last pipeline
stage needs them, because it computes the losses: the stage with the early layer sends it U * D
floats for each micro-batch of U units. They go through a process group of their own, because in the
schedule's group they would be taken for one of its messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from megatron_dwm.model.builders.blocks import layer_ends
from megatron_dwm.model.llm import LLM
from megatron_dwm.model.passes.units import Units


@dataclass(frozen=True, kw_only=True)
class Features:
    """Two pooled hidden states of n units, float32 [n, D], detached."""

    final_nD: Tensor
    early_nD: Tensor

    def flat(self) -> Tensor:
        """[n, 2 D], for one message."""
        return torch.cat([self.final_nD, self.early_nD], dim=1)

    @staticmethod
    def from_flat(flat_n2D: Tensor) -> Features:
        """The inverse of `flat`."""
        final_nD, early_nD = flat_n2D.chunk(2, dim=1)
        return Features(final_nD=final_nD, early_nD=early_nD)


@dataclass(frozen=True, kw_only=True)
class ForwardOutputs:
    """Losses and features of n units from one forward pass, detached.

    losses_n: float32, token-mean losses.
    features: None unless the pass was asked for them.
    reference_losses_n: float32, losses of a reference model; None without one.
    alignment_n: float32, alignments at uniform weights; None unless computed before.
    overlap_nK: float32; the inner product of rows u and v is eta <J grad l_u, J grad l_v>, or an
        estimate; None unless computed before.
    """

    losses_n: Tensor
    features: Features | None = None
    reference_losses_n: Tensor | None = None
    alignment_n: Tensor | None = None
    overlap_nK: Tensor | None = None


class FeatureTap:
    """Collects the `Features` of one pass, micro-batch by micro-batch."""

    def __init__(self, llm: LLM, early_layer: int) -> None:
        """early_layer: its number in the whole model, from 1."""
        self._llm = llm
        self._early_layer = early_layer
        self._micro_batch: tuple[int, Units] | None = None
        self._final: dict[int, Tensor] = {}
        self._early: dict[int, Tensor] = {}
        self._sending: list[tuple[dist.Work, Tensor]] = []
        self._early_is_here = any(number == early_layer for number, _ in self._layers())

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Keep hooks on the model during the context, which is one pass."""
        with ExitStack() as stack:
            for module, store in self._sources():
                hook = self._hook(store)
                stack.callback(module.register_forward_hook(hook).remove)
            yield
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()

    @contextmanager
    def listening(self, micro_batch: int, units: Units) -> Iterator[None]:
        """Record features of this micro-batch during the context, which is its forward pass.

        units: those of the micro-batch.

        Activation recomputation runs modules again in the backward pass, outside this context.
        """
        self._micro_batch = (micro_batch, units)
        yield
        self._micro_batch = None

    def of(self, micro_batch: int) -> Features:
        """Returns the features of a micro-batch after its forward pass (last stage only).

        Under context parallelism they are this part's share, as `_token_mean` returns it.
        """
        final_UD = self._final.pop(micro_batch)
        if self._early_is_here:
            return Features(final_nD=final_UD, early_nD=self._early.pop(micro_batch))
        early_UD = torch.empty_like(final_UD)
        runtime = self._llm.runtime
        assert runtime.side_group is not None
        source = dist.get_global_rank(runtime.side_group, self._early_stage())
        dist.recv(early_UD, source, group=runtime.side_group)
        return Features(final_nD=final_UD, early_nD=early_UD)

    def _sources(self) -> Iterator[tuple[Module, Callable[[int, Tensor], None]]]:
        for number, layer in self._layers():
            if number == self._early_layer:
                yield layer, self._keep_early
        last = self._llm.modules[-1]
        if last.post_process:
            yield last.decoder.final_layernorm, self._final.__setitem__

    def _layers(self) -> Iterator[tuple[int, Module]]:
        for module in self._llm.modules:
            yield from layer_ends(module)

    def _hook(self, store: Callable[[int, Tensor], None]) -> Callable[..., None]:
        def hook(_: Module, __: tuple[Any, ...], output: Any) -> None:
            if self._micro_batch is not None:
                index, units = self._micro_batch
                hidden_SBD = output[0] if isinstance(output, tuple) else output
                store(index, self._token_mean(hidden_SBD, units))

        return hook

    @torch.no_grad()
    def _token_mean(self, hidden_SBD: Tensor, units: Units) -> Tensor:
        """Returns float32 [U, D], means over all tokens of a unit, also if ranks share them.

        Under context parallelism it is this part's share of the mean: those of all parts add up.
        """
        runtime, shared = self._llm.runtime, self._llm.transformer.sequence_parallel
        if units.numbers_BS is not None:
            first = runtime.tensor_rank * len(hidden_SBD) if shared else 0
            mean_UD = units.pool(hidden_SBD.detach(), first=first)
        else:
            mean_UD = hidden_SBD.detach().mean(dim=0, dtype=torch.float32)
        if shared:
            dist.all_reduce(mean_UD, group=runtime.tensor_group)
        if shared and units.numbers_BS is None:
            mean_UD /= runtime.tensor_size
        if runtime.context_size > 1 and units.numbers_BS is None:
            mean_UD /= runtime.context_size
        return mean_UD

    def _keep_early(self, micro_batch: int, early_UD: Tensor) -> None:
        runtime = self._llm.runtime
        if runtime.is_last_stage:
            self._early[micro_batch] = early_UD
            return
        assert runtime.side_group is not None
        last = dist.get_global_rank(runtime.side_group, runtime.pipeline_size - 1)
        work = dist.isend(early_UD, last, group=runtime.side_group)
        assert work is not None, "this rank is in the group"
        self._sending.append((work, early_UD))

    def _early_stage(self) -> int:
        """Returns the pipeline stage of the early layer; chunk 0 of every stage comes first."""
        shape, stages = self._llm.shape, self._llm.runtime.pipeline_size
        layers_a_chunk = shape.num_layers // (stages * len(self._llm.chunks))
        return (self._early_layer - 1) // layers_a_chunk % stages
