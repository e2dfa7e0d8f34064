"""Selection by excess loss over a static reference model.

    score_u = l_u(theta) - l_u(reference);  `policy.keep_ratio` of them, the largest, is kept

Per sample this is RHO-LOSS (Mindermann et al., ICML 2022, arXiv 2206.07137), per token Rho-1 (Lin
et al., NeurIPS 2024, arXiv 2404.07965); documents lie between. A unit is learnable if the reference
predicts it, and worth learning if the LLM does not yet. The reference reads the batch in a forward
pass of its own before every step, under the layout of the LLM. Memory: its parameters; with
`policy.offload_reference` only during that pass.

Or its losses come with the batch (`policy.reference_losses`), from a file that score_data.py wrote:
no cost and no memory. That file has the loss of every token given those before it in its document.
A document inside a window has the same losses as by a pass in training; where a window begins
inside a document, the file's have more context.
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
from megatron_dwm.data.token_losses import TokenLosses, open_token_losses, token_loss_files
from megatron_dwm.model import LLM, ForwardOutputs, LlamaShape, forward_only
from megatron_dwm.model.flops import llm_forward_flops
from megatron_dwm.model.offload import Offload
from megatron_dwm.model.on_disk.megatron_files import is_megatron, newest_iteration
from megatron_dwm.model.passes.objective import unit
from megatron_dwm.runtime import Runtime
from megatron_dwm.tokenizer import Tokenizer
from megatron_dwm.weighting.costs import Costs, Workload, plain_costs
from megatron_dwm.weighting.groups import Grouping
from megatron_dwm.weighting.method import BuildContext, Counters, Method, Needs
from megatron_dwm.weighting.rules import group_size_problems
from megatron_dwm.weighting.top_fraction import keep_largest

_STORED = "policy.reference_losses"


class ExcessLoss(Method):
    """Keeps the units whose loss exceeds the reference's the most."""

    gentler = "raise policy.keep_ratio"
    units: ClassVar[frozenset[str]] = frozenset({"sample", "document", "token"})

    @classmethod
    def parts(cls, config: Config) -> frozenset[Part]:
        """Returns the parts: a reference, a selection, and groups."""
        return frozenset({"reference", "second_llm", "selection", "groups"})

    @classmethod
    def problems(cls, config: Config, num_layers: int, world_size: int) -> Iterator[str]:
        """Check that there is a reference and that groups have several units."""
        if config.policy.reference is None and config.policy.reference_losses is None:
            yield (
                "policy.reference: policy excess_loss needs a reference model (a Hugging Face "
                "directory or a checkpoint), or policy.reference_losses, got none"
            )
        yield from _stored_problems(config)
        yield from group_size_problems(config)

    @classmethod
    def remarks(cls, config: Config, llm: LlamaShape, tokenizer: Tokenizer) -> Iterator[str]:
        """Yields a line if nothing reads `weighting.group`."""
        if config.weighting.group == "global" and _inside_rows(config):
            yield (
                "weighting.group global: no effect: with policy.keep_scope sequence every sample "
                "is a group of its own"
            )

    @classmethod
    def depends_on(cls, config: Config) -> Iterator[tuple[str, Path]]:
        """Yields the reference's files."""
        if (name := _stored(cls, config)) is not None:
            yield from ((_STORED, file) for file in token_loss_files(config.data, name))
            return
        if config.policy.reference is None:
            return
        directory = Path(config.policy.reference)
        # A checkpoint's manifest has the digests of its other files.
        manifest = directory / "manifest.json"
        files = [manifest] if manifest.is_file() else sorted(directory.glob("*.safetensors"))
        if not files and is_megatron(directory):
            files = sorted(newest_iteration(directory).glob("*.distcp"))
        for file in files:
            yield "policy.reference", file

    @classmethod
    def token_losses(cls, config: Config) -> TokenLosses | None:
        """Returns the reference's losses of all tokens, if it does not run."""
        name = _stored(cls, config)
        return None if name is None else open_token_losses(config.data, _STORED, name)

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
        reference = workload.reference or llm
        forward = llm_forward_flops(reference, rows, length, workload.documents.attended_tokens)
        return replace(
            costs,
            reference=forward if _stored(cls, config) is None else 0.0,
            extra_forward=costs.forward if waits and several else 0.0,
        )

    @classmethod
    def build(cls, context: BuildContext) -> ExcessLoss:
        """Build the method with the run's reference model, if it has one."""
        return cls(
            context.config, context.llm.runtime, context.reference, context.reference_offload
        )

    def __init__(
        self, config: Config, runtime: Runtime, reference: LLM | None, offload: Offload
    ) -> None:
        """Offload: of the reference, which is None if the batches carry its losses."""
        self.reference, self.offload = reference, offload
        self.keep_ratio = config.policy.keep_ratio
        self.inside_rows = _inside_rows(config)
        self.micro_batch_size = config.training.micro_batch_size
        is_global = config.weighting.group == "global" and not self.inside_rows
        # A group of one row is a micro-batch of one row.
        size = 1 if self.inside_rows else self.micro_batch_size
        self.grouping = Grouping(runtime, size, is_global)

    def needs(self, counters: Counters) -> Needs:
        """Returns losses, of the whole batch if the group is global."""
        return Needs(losses=True, whole_batch=self.grouping.is_global)

    def weighs(self, counters: Counters) -> bool:
        """True: every step has a pass of the reference."""
        return True

    def reference_losses(self, batch: Batch) -> Tensor | None:
        """Returns float32 [n], the reference's losses of this replica's units (collective)."""
        if self.reference is None:
            return _stored_losses(batch)
        with self.offload.reading():
            return forward_only(self.reference, unit(batch, self.micro_batch_size)).unit_losses_n

    @torch.no_grad()
    def weights(self, batch: Batch, outputs: ForwardOutputs | None, counters: Counters) -> Tensor:
        """Returns float32 [n]: 0, or the weight of kept units; mean 1 in every group."""
        assert outputs is not None and outputs.reference_losses_n is not None
        groups = self.grouping.of(batch)
        excess_Gn = groups.gather(outputs.losses_n - outputs.reference_losses_n)
        return groups.local(keep_largest(excess_Gn, groups.sizes_Gn, self.keep_ratio))


def _stored(method: type[Method], config: Config) -> str | None:
    """Returns the name of the files with the reference's losses; None if a model computes them."""
    return config.policy.reference_losses if "reference" in method.parts(config) else None


def _stored_losses(batch: Batch) -> Tensor:
    """Returns the token-mean losses of the units, from those that the batch carries."""
    assert batch.reference_losses_BS is not None
    counts_n = batch.units.sum_of_rows(batch.loss_mask_BS).clamp(min=1.0)
    return batch.units.sum_of_rows(batch.reference_losses_BS * batch.loss_mask_BS) / counts_n


def _stored_problems(config: Config) -> Iterator[str]:
    """Check that training reads documents as the file's losses were computed: each alone."""
    if config.policy.reference_losses is None:
        return
    if not config.masks_documents:
        yield (
            f"{_STORED}: the files have losses of documents read alone, but attention crosses "
            "their borders here; set data.mask_documents true, or name the model "
            "(policy.reference)"
        )
    if config.data.border_loss:
        yield (
            f"{_STORED}: the files have no loss for the first token of a document, which counts "
            "here as the label of the one before; set data.border_loss false, or name the model "
            "(policy.reference)"
        )


def _inside_rows(config: Config) -> bool:
    return config.weighting.unit == "token" and config.policy.keep_scope == "sequence"
