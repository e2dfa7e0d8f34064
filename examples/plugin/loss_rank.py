"""Two weighting methods outside the package: samples weigh by the rank of their loss.

    r_i = the fraction of other losses below l_i, half of those equal to it counted       in (0, 1)
    w   = the guarded softmax of strength * r over the weighting group

`LossRank` ranks a sample among its weighting group, `RecentLossRank` among the losses of the last
few batches. A rank is bounded, so that one broken document with an enormous loss weighs no more
than the next hardest one, which a softmax of losses does not give.

    python -m megatron_dwm.pretrain CONFIG.yaml --policy.name loss_rank:LossRank
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_dwm.plugin import (
    GUARDS,
    Batch,
    BuildContext,
    Config,
    Costs,
    Counters,
    ForwardOutputs,
    LlamaShape,
    Needs,
    Part,
    RuleBased,
    Workload,
    gather_over_data,
    group_problems,
    reading_costs,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """`--policy.options.NAME`: types and defaults; the docstrings are the help texts."""

    strength: float = 1.0
    """logarithm of how much more the hardest sample weighs than the easiest; below 0 easy samples
    weigh more"""

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise ValueError(f"strength: expected a finite number, got {self.strength}")


class LossRank(RuleBased):
    """Weights from the rank of a sample's loss among those of its weighting group."""

    contract_version = 1
    options: ClassVar[type] = Options
    units = frozenset({"sample"})
    gentler = f"{GUARDS}, or lower policy.options.strength"
    own: Options

    @classmethod
    def build(cls, context: BuildContext) -> LossRank:
        """Build the method with the options of the run."""
        method = super().build(context)
        assert isinstance(method, LossRank)
        method.own = cls.own_options(context.config)
        return method

    @classmethod
    def parts(cls, config: Config) -> frozenset[Part]:
        """Returns the parts: weights inside groups, by a guarded softmax."""
        return frozenset({"groups", "softmax"})

    @classmethod
    def problems(cls, config: Config, num_layers: int, world_size: int) -> Iterator[str]:
        """Check that groups have several samples."""
        yield from group_problems(config)

    @classmethod
    def first_weighed_step(cls, config: Config) -> int:
        """Returns 0: the first step has weights already."""
        return 0

    @classmethod
    def costs(cls, config: Config, llm: LlamaShape, workload: Workload) -> Costs:
        """Returns plain costs, and a forward pass more if a group has several micro-batches."""
        return reading_costs(config, llm, workload)

    def needs(self, counters: Counters) -> Needs:
        """Returns the samples' losses, of the whole group."""
        return Needs(losses=True, whole_batch=self.grouping.is_global)

    def weighs(self, counters: Counters) -> bool:
        """True: every step has weights, which the run's FLOPs count."""
        return True

    @torch.no_grad()
    def weights(self, batch: Batch, outputs: ForwardOutputs | None, counters: Counters) -> Tensor:
        """Returns float32 [n], mean 1 in every weighting group."""
        assert outputs is not None
        groups = self.grouping.of(batch)
        losses_Gn = groups.gather(outputs.losses_n)
        ranks_n = groups.local(ranks_among(losses_Gn, losses_Gn))
        return groups.local(self.group_weights(self.own.strength * ranks_n, groups))


@dataclass(frozen=True, kw_only=True)
class RecentOptions(Options):
    """The options of `LossRank`, and one more."""

    window_steps: int = 8
    """steps whose losses a sample is ranked among"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window_steps < 1:
            raise ValueError(f"window_steps: expected 1 or more, got {self.window_steps}")


class RecentLossRank(LossRank):
    """Weights from the rank of a sample's loss among those of the last steps.

    Its state is these losses, the same on every rank. A checkpoint keeps it, so that a resumed run
    goes on bit for bit.
    """

    options = RecentOptions
    own: RecentOptions
    recent_KB: Tensor | None = None
    """float32, the losses of the last steps, a row for each global batch"""

    @classmethod
    def first_weighed_step(cls, config: Config) -> int:
        """Returns 1, since the first batch is only ranked among."""
        return 1

    def needs(self, counters: Counters) -> Needs:
        """Returns nothing for the first batch, then what `LossRank` reads."""
        return Needs() if self.recent_KB is None else super().needs(counters)

    def weighs(self, counters: Counters) -> bool:
        """True after the first batch."""
        return self.recent_KB is not None

    @torch.no_grad()
    def weights(self, batch: Batch, outputs: ForwardOutputs | None, counters: Counters) -> Tensor:
        """Returns float32 [n], mean 1 in every weighting group; all 1 for the first batch."""
        if self.recent_KB is None:
            return torch.ones(batch.units.count, device=batch.tokens_BS.device)
        assert outputs is not None
        groups = self.grouping.of(batch)
        ranks_n = ranks_among(outputs.losses_n, self.recent_KB.flatten())
        return groups.local(self.group_weights(self.own.strength * ranks_n, groups))

    @torch.no_grad()
    def after_step(self, batch: Batch, losses_n: Tensor, counters: Counters) -> None:
        """Remember the losses of this global batch (every rank gathers them)."""
        losses_1B = gather_over_data(losses_n.detach(), self.runtime)[None]
        recent = [losses_1B] if self.recent_KB is None else [self.recent_KB, losses_1B]
        self.recent_KB = torch.cat(recent)[-self.own.window_steps :]

    def state_dict(self) -> dict[str, Any]:
        """Returns the recent losses: tensors, numbers and text, no other objects."""
        return {"recent": None if self.recent_KB is None else self.recent_KB.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of `state_dict`."""
        recent = state["recent"]
        self.recent_KB = None if recent is None else recent.to(self.runtime.device)


def ranks_among(losses_Gn: Tensor, others_GN: Tensor) -> Tensor:
    """Returns [..., n]: the fraction of `others_GN` below each loss, and half of those equal."""
    sorted_GN = others_GN.sort().values
    below_Gn = torch.searchsorted(sorted_GN, losses_Gn.contiguous())
    up_to_Gn = torch.searchsorted(sorted_GN, losses_Gn.contiguous(), right=True)
    return (below_Gn + up_to_Gn).float() / (2 * others_GN.shape[-1])
