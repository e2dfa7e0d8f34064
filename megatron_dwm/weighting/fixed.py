"""Fixed weights: a number of every document that was known before, from a column or by domain.

So the scores of any quality classifier are a baseline (docs/METHOD.md, section 6). The weights of a
group are the units' values divided by the group's mean; a group in which all values are 0 weighs 1
each. There is no model, no target and no update. Cost: none; memory: 4 bytes a document.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_dwm.config import Config, UserError
from megatron_dwm.config.key import Part
from megatron_dwm.data import Batch
from megatron_dwm.data.value_quantiles import quantiles
from megatron_dwm.data.values import DocumentValues, column_values, domain_values
from megatron_dwm.model import ForwardOutputs
from megatron_dwm.runtime.warn import print_warning
from megatron_dwm.weighting.groups import Grouping
from megatron_dwm.weighting.mean_one import mean_one
from megatron_dwm.weighting.method import BuildContext, Counters, Method
from megatron_dwm.weighting.rules import group_size_problems


class Fixed(Method):
    """Weights in proportion to the values of the units."""

    gentler = "make the weights of documents differ less"

    @classmethod
    def parts(cls, config: Config) -> frozenset[Part]:
        """Returns the parts: weights of documents, and groups."""
        return frozenset({"values", "groups"})

    @classmethod
    def problems(cls, config: Config, num_layers: int, world_size: int) -> Iterator[str]:
        """Check that there is one source of weights and that groups have several units."""
        policy = config.policy
        if policy.column is None and not policy.domain_weights:
            yield (
                "policy.column: policy fixed needs a column of the metadata, or weights of domains "
                "(policy.domain_weights), got neither"
            )
        if policy.column is not None and policy.domain_weights:
            yield "policy.column and policy.domain_weights: expected one of the two, got both"
        yield from group_size_problems(config)

    @classmethod
    def document_values(cls, config: Config) -> DocumentValues | None:
        """Returns the weights of all documents. Raises UserError if they are all 0."""
        policy = config.policy
        if policy.column is None:
            named = "policy.domain_weights"
            values = domain_values(config.data, named, policy.domain_weights)
        else:
            named = f"policy.column {policy.column}"
            values = column_values(
                config.data, "policy.column", policy.column, may_be_negative=False
            )
        if not any(values_D.any() for values_D in values.of_prefixes):
            raise UserError(f"{named}: every document of data.train weighs 0, expected some above")
        return values

    @classmethod
    def build(cls, context: BuildContext) -> Fixed:
        """Build the method; warns if some groups will have no unit above 0."""
        config, runtime = context.config, context.llm.runtime
        size = config.training.micro_batch_size
        assert context.values is not None
        _warn_of_groups_without_weight(config, context.values)
        return cls(Grouping(runtime, size, config.weighting.group == "global"))

    def __init__(self, grouping: Grouping) -> None:
        self.grouping = grouping

    @torch.no_grad()
    def weights(self, batch: Batch, outputs: ForwardOutputs | None, counters: Counters) -> Tensor:
        """Returns float32 [n], mean 1 in every weighting group."""
        assert batch.values_U is not None
        groups = self.grouping.of(batch)
        return groups.local(mean_one(groups.gather(batch.values_U), groups.sizes_Gn))


def _warn_of_groups_without_weight(config: Config, values: DocumentValues) -> None:
    """Warn if one or more groups of the run are expected to have only units of weight 0.

    All units of a group weigh 0 if all its rows do, also where documents are the units.
    """
    if all(values_D.all() for values_D in values.of_prefixes):
        return
    of_rows = quantiles(
        config.data,
        values,
        steps=config.training.steps,
        are_documents=False,
        seed=config.run.seed,
    )
    training, is_global = config.training, config.weighting.group == "global"
    size = training.global_batch_size if is_global else training.micro_batch_size
    fraction = of_rows.fraction_up_to(0.0) ** size
    expected = fraction * training.steps * training.global_batch_size / size
    if expected >= 1.0:
        print_warning(
            f"in about {fraction:.1%} of the weighting groups ({expected:,.0f} of the run) every "
            "unit has the value 0; these units weigh 1 each: enlarge the groups (weighting.group "
            "global, training.micro_batch_size), or take such documents out of data.train"
        )
