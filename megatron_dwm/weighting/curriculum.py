"""A curriculum: first only the easiest units carry weight, and in the end all of them do.

    c(t) = min(1, ((t / T) (1 - c0^p) + c0^p)^(1/p))        t: steps done

is the competence of Platanios et al. (NAACL 2019, arXiv 1903.09848); p = 1 is a line. A unit is
kept if it is among the easiest fraction c of the corpus, by tokens (data/value_quantiles.py). Kept
units weigh the same, mean 1 in the group; a group without one keeps its easiest. The batches are
those of plain training: a curriculum chooses inside them (Bengio et al., ICML 2009, sample anew).

State: none, for the weights follow from the step and the batch. Cost: one sort at the start;
memory: 4 bytes a document, and 4 a step of the pacing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from megatron_dwm.config import Config, PolicyConfig
from megatron_dwm.config.key import Part
from megatron_dwm.data import Batch
from megatron_dwm.data.value_quantiles import quantiles
from megatron_dwm.data.values import DocumentValues, column_values, token_values
from megatron_dwm.model import ForwardOutputs
from megatron_dwm.weighting.groups import Grouping
from megatron_dwm.weighting.mean_one import mean_one
from megatron_dwm.weighting.method import BuildContext, Counters, Method
from megatron_dwm.weighting.rules import group_size_problems

TOKENS = "tokens"
"""the difficulty that is no column: the document's length, from the index"""


class Curriculum(Method):
    """Equal weights of the units that are easy enough at this step."""

    gentler = "a curriculum begins with few units; raise policy.pacing_start for more"

    @classmethod
    def parts(cls, config: Config) -> frozenset[Part]:
        """Returns the parts: pacing, and groups."""
        return frozenset({"pacing", "groups"})

    @classmethod
    def problems(cls, config: Config, num_layers: int, world_size: int) -> Iterator[str]:
        """Check that groups have several units."""
        yield from group_size_problems(config)

    @classmethod
    def document_values(cls, config: Config) -> DocumentValues | None:
        """Returns the difficulty of every document."""
        difficulty = config.policy.difficulty
        if difficulty == TOKENS:
            return token_values(config.data)
        return column_values(config.data, "policy.difficulty", difficulty, may_be_negative=True)

    @classmethod
    def build(cls, context: BuildContext) -> Curriculum:
        """Build the method: its thresholds need the distribution of the difficulty."""
        config, training = context.config, context.config.training
        assert context.values is not None
        of_units = quantiles(
            config.data,
            context.values,
            steps=training.steps,
            are_documents=config.weighting.unit == "document",
            seed=config.run.seed,
        )
        fractions = competences(config.policy, training.steps)
        is_global = config.weighting.group == "global"
        return cls(
            Grouping(context.llm.runtime, training.micro_batch_size, is_global),
            np.where(fractions < 1.0, of_units.at(fractions), np.inf),
        )

    def __init__(self, grouping: Grouping, thresholds: np.ndarray) -> None:
        """thresholds: the largest difficulty that is kept, for each step before competence 1."""
        self.grouping, self.thresholds = grouping, thresholds

    @torch.no_grad()
    def weights(self, batch: Batch, outputs: ForwardOutputs | None, counters: Counters) -> Tensor:
        """Returns float32 [n]: 0, or the weight of kept units; mean 1 in every group."""
        if counters.step >= len(self.thresholds):
            return torch.ones(batch.units.count, device=batch.tokens_BS.device)
        assert batch.values_U is not None
        groups = self.grouping.of(batch)
        values_Gn, sizes_Gn = groups.gather(batch.values_U), groups.sizes_Gn
        counted_Gn = values_Gn if sizes_Gn is None else values_Gn.where(sizes_Gn > 0, torch.inf)
        threshold = float(self.thresholds[counters.step])
        kept_Gn = values_Gn <= counted_Gn.amin(-1, keepdim=True).clamp(min=threshold)
        return groups.local(mean_one(kept_Gn, sizes_Gn))


def competences(policy: PolicyConfig, steps: int) -> np.ndarray:
    """Returns float64, the fraction of the corpus that is kept, for each step before it is 1."""
    duration, power = policy.pacing_steps * steps, policy.pacing_power
    start = policy.pacing_start**power
    progress = np.arange(math.ceil(round(duration, 6))) / duration
    return np.minimum(1.0, (progress * (1.0 - start) + start) ** (1.0 / power))
