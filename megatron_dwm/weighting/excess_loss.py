"""Selection by excess loss over a static reference model.

    score_u = l_u(theta) - l_u(reference);  `policy.keep_ratio` of them, the largest, is kept

Per sample this is RHO-LOSS (Mindermann et al., ICML 2022, arXiv 2206.07137), per token Rho-1 (Lin
et al., NeurIPS 2024, arXiv 2404.07965); documents lie between. A unit is learnable if the reference
predicts it, and worth learning if the LLM does not yet. The reference reads the batch in a forward
pass of its own before every step, under the layout of the LLM. Memory: its parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from megatron_dwm.config import Config
from megatron_dwm.config.key import Part
from megatron_dwm.data import Batch
from megatron_dwm.model import LLM, ForwardOutputs, LlamaShape, forward_only
from megatron_dwm.model.flops import llm_forward_flops
from megatron_dwm.model.passes.objective import unit
from megatron_dwm.weighting.costs import Costs, Workload, plain_costs
from megatron_dwm.weighting.groups import Grouping
from megatron_dwm.weighting.method import BuildContext, Counters, Method, Needs
from megatron_dwm.weighting.rules import group_size_problems
from megatron_dwm.weighting.top_fraction import keep_largest


class ExcessLoss(Method):
    """Keeps the units whose loss exceeds the reference's the most."""

    gentler = "raise policy.keep_ratio"
    units: ClassVar[frozenset[str]] = frozenset({"sample", "document", "token"})

    @classmethod
    def parts(cls, config: Config) -> frozenset[Part]:
        """Returns the parts: a reference, a selection, and groups."""
        return frozenset({"reference", "selection", "groups"})

    @classmethod
    def problems(cls, config: Config, num_layers: int, world_size: int) -> Iterator[str]:
        """Check that there is a reference and that groups have several units."""
        if config.policy.reference is None:
            yield (
                "policy.reference: policy excess_loss needs a reference model (a Hugging Face "
                "directory or a checkpoint), got none"
            )
        yield from group_size_problems(config)

    @classmethod
    def depends_on(cls, config: Config) -> Iterator[tuple[str, Path]]:
        """Yields the reference's files."""
        if config.policy.reference is None:
            return
        directory = Path(config.policy.reference)
        # A checkpoint's manifest has the digests of its other files.
        manifest = directory / "manifest.json"
        for file in [manifest] if manifest.is_file() else sorted(directory.glob("*.safetensors")):
            yield "policy.reference", file

    @classmethod
    def first_weighed_step(cls, config: Config) -> int:
        """Returns 0, since the reference does not change."""
        return 0

    @classmethod
    def costs(cls, config: Config, llm: LlamaShape, workload: Workload) -> Costs:
        """Returns plain costs, the reference's pass, and an extra pass for groups of a batch."""
        costs, training = plain_costs(config, llm, workload), config.training
        rows, length = training.global_batch_size, config.data.sequence_length
        waits = config.weighting.group == "global" and not _inside_rows(config)
        several = rows // workload.replicas > training.micro_batch_size
        return replace(
            costs,
            weighing=llm_forward_flops(
                workload.reference or llm, rows, length, workload.documents.attended_tokens
            ),
            extra_forward=costs.forward if waits and several else 0.0,
        )

    @classmethod
    def build(cls, context: BuildContext) -> ExcessLoss:
        """Build the method with the run's reference model."""
        assert context.reference is not None
        return cls(context.config, context.reference)

    def __init__(self, config: Config, reference: LLM) -> None:
        self.reference = reference
        self.keep_ratio = config.policy.keep_ratio
        self.inside_rows = _inside_rows(config)
        self.micro_batch_size = config.training.micro_batch_size
        is_global = config.weighting.group == "global" and not self.inside_rows
        # A group of one row is a micro-batch of one row.
        size = 1 if self.inside_rows else self.micro_batch_size
        self.grouping = Grouping(reference.runtime, size, is_global)

    def needs(self, counters: Counters) -> Needs:
        """Returns losses, of the whole batch if the group is global."""
        return Needs(losses=True, whole_batch=self.grouping.is_global)

    def weighs(self, counters: Counters) -> bool:
        """True: every step has a pass of the reference."""
        return True

    def reference_losses(self, batch: Batch) -> Tensor | None:
        """Returns float32 [n], the reference's losses of this replica's units (collective)."""
        return forward_only(self.reference, unit(batch, self.micro_batch_size)).unit_losses_n

    @torch.no_grad()
    def weights(self, batch: Batch, outputs: ForwardOutputs | None, counters: Counters) -> Tensor:
        """Returns float32 [n]: 0, or the weight of kept units; mean 1 in every group."""
        assert outputs is not None and outputs.reference_losses_n is not None
        groups = self.grouping.of(batch)
        excess_Gn = groups.gather(outputs.losses_n - outputs.reference_losses_n)
        return groups.local(keep_largest(excess_Gn, groups.sizes_Gn, self.keep_ratio))


def _inside_rows(config: Config) -> bool:
    return config.weighting.unit == "token" and config.policy.keep_scope == "sequence"
