"""The public interface of methods outside the package (docs/plugins.md).

    from megatron_dwm.plugin import Batch, Counters, ForwardOutputs, Method

A method is a class that inherits from `Method`, or from `RuleBased` if its weights follow from a
rule inside weighting groups. It states `contract_version`, the version of this interface that it
was written for. A run takes it as `policy.name package.module:Class`.

>>> import torch
>>> class Everything(Method):
...     contract_version = 1
...
...     def weights(self, batch, outputs, counters):
...         return torch.ones(batch.units.count)
>>> Everything.parts(Config())  # the keys that it uses: none of those that methods have
frozenset()

The rest of the package may change without notice. A name leaves this module, or changes what it
means, only together with `CONTRACT_VERSION`.
"""

from __future__ import annotations

from megatron_dwm.config import Config, UserError
from megatron_dwm.config.key import Part
from megatron_dwm.data import Batch, Source, ValidationSet
from megatron_dwm.data.token_losses import TokenLosses, open_token_losses
from megatron_dwm.data.values import DocumentValues, column_values, domain_values
from megatron_dwm.model import LLM, ForwardOutputs, LlamaShape
from megatron_dwm.runtime import Runtime
from megatron_dwm.runtime.warn import print_warning
from megatron_dwm.tokenizer import Tokenizer
from megatron_dwm.weighting.advantage import advantages, known_groups
from megatron_dwm.weighting.concentration import GUARDS, weights_from_logits
from megatron_dwm.weighting.costs import Costs, Workload, learning_costs, plain_costs, reading_costs
from megatron_dwm.weighting.groups import Grouping, Groups, gather_over_data, units_of_replicas
from megatron_dwm.weighting.mean_one import mean_one
from megatron_dwm.weighting.method import (
    CONTRACT_VERSION,
    Alignments,
    BuildContext,
    Counters,
    Method,
    Needs,
    OwnUpdate,
    WeightingUpdate,
)
from megatron_dwm.weighting.model import WeightingShape
from megatron_dwm.weighting.moments import global_moments
from megatron_dwm.weighting.pass_softmax import SOFTMAX_PARTS, PassSoftmax
from megatron_dwm.weighting.pool import ChoosesFromPool, PoolAlignments
from megatron_dwm.weighting.rule_based import RuleBased
from megatron_dwm.weighting.rules import (
    group_problems,
    group_size_problems,
    learning_problems,
    target_problems,
)
from megatron_dwm.weighting.schedule import Schedule, schedule_of

__all__ = [
    "CONTRACT_VERSION",
    "GUARDS",
    "LLM",
    "SOFTMAX_PARTS",
    "Alignments",
    "Batch",
    "BuildContext",
    "ChoosesFromPool",
    "Config",
    "Costs",
    "Counters",
    "DocumentValues",
    "ForwardOutputs",
    "Grouping",
    "Groups",
    "LlamaShape",
    "Method",
    "Needs",
    "OwnUpdate",
    "Part",
    "PassSoftmax",
    "PoolAlignments",
    "RuleBased",
    "Runtime",
    "Schedule",
    "Source",
    "TokenLosses",
    "Tokenizer",
    "UserError",
    "ValidationSet",
    "WeightingShape",
    "WeightingUpdate",
    "Workload",
    "advantages",
    "column_values",
    "domain_values",
    "gather_over_data",
    "global_moments",
    "group_problems",
    "group_size_problems",
    "known_groups",
    "learning_costs",
    "learning_problems",
    "mean_one",
    "open_token_losses",
    "plain_costs",
    "print_warning",
    "reading_costs",
    "schedule_of",
    "target_problems",
    "units_of_replicas",
    "weights_from_logits",
]
