"""What the ranks of the tests of groups of documents run, and the same by hand, group by group."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.config import ParallelConfig, PolicyConfig, WeightingConfig
from megatron_dwm.data import Batch
from megatron_dwm.model import Features, ForwardOutputs
from megatron_dwm.runtime import Runtime, bring_up
from megatron_dwm.weighting.domain_mean import DomainMean
from megatron_dwm.weighting.dwm import Dwm
from megatron_dwm.weighting.groups import gather_over_data, units_of_replicas
from megatron_dwm.weighting.loss_reweighting import LossReweighting
from megatron_dwm.weighting.model import WeightingModel, WeightingShape, build_weighting_model
from megatron_dwm.weighting.trainer import WeightingTrainer
from tests.documents import LENGTHS, VOCAB_SIZE, documents_of, packed_batch
from tests.tiny import MICRO_BATCH
from tests.weighting.workers import learn, weigh

NUMBER, FEATURES, RATE, BOUND = 7, 12, 0.25, 0.6
DECAY, TEMPERATURE = 0.8, 0.7


@dataclass(frozen=True)
class Whole:
    """A global batch, and values of its documents that every layout has alike.

    is_global: one group; otherwise each micro-batch is one.
    """

    batch: Batch
    is_global: bool

    def values(self, seed: int, *width: int) -> Tensor:
        """Returns random values of all documents."""
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(self.batch.units.count, *width, generator=generator, dtype=torch.float64)

    @cached_property
    def sizes(self) -> Tensor:
        """How much each document counts, from the masks."""
        counts = torch.stack([mask.sum() for _, _, mask in documents_of(self.batch)])
        return (counts > 0).double() if self.batch.equal_shares else counts

    @cached_property
    def losses(self) -> Tensor:
        """Losses; 0 without a counted token, as the LLM's pass gives them."""
        return torch.where(self.sizes > 0, 1.0 + 4.0 * self.values(1), 0.0)

    @property
    def groups(self) -> list[slice]:
        """The documents of each group."""
        rows = self.batch.size if self.is_global else MICRO_BATCH
        lengths = LENGTHS[: self.batch.size]
        firsts = [sum(map(len, lengths[:row])) for row in range(0, self.batch.size + 1, rows)]
        return [slice(*ends) for ends in pairwise(firsts)]

    def part(self, runtime: Runtime) -> tuple[Batch, slice]:
        """Returns this replica's rows, and which of all documents they have."""
        share = self.batch.size // runtime.data_size
        rows = range(runtime.data_rank * share, (runtime.data_rank + 1) * share)
        first, stop = (sum(map(len, LENGTHS[:row])) for row in (rows.start, rows.stop))
        return self.batch.rows(rows.start, rows.stop), slice(first, stop)


def _whole(runtime: Runtime, group: str, rows: int, options: dict[str, Any]) -> Whole:
    batch = packed_batch(NUMBER, runtime, whole=True, **options).rows(0, rows)
    return Whole(batch, group == "global")


def _gathered(values_n: Tensor, batch: Batch, runtime: Runtime) -> Tensor:
    return gather_over_data(values_n, runtime, units_of_replicas(batch, runtime))


def dwm_weights_and_gradient(
    encoder: str,
    group: str,
    options: dict[str, Any],
    standardize: bool = True,
    rows: int = len(LENGTHS),
    tensor: int = 1,
    pipeline: int = 1,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Weights of the global batch and phi's gradient of an update: ours and by hand, in float64."""
    with bring_up(ParallelConfig(tensor=tensor, pipeline=pipeline), seed=0) as runtime:
        whole = _whole(runtime, group, rows, options)
        model = _model(encoder)
        config = WeightingConfig(
            encoder=encoder,
            group=group,
            standardize=standardize,
            clip_grad=0.0,
            min_effective_sample_size=BOUND,
        )
        trainer = WeightingTrainer(model, config, runtime, MICRO_BATCH, learned=True)
        trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # form the gradient only
        method, (batch, mine) = Dwm(trainer), whole.part(runtime)
        features = Features(
            final_nD=whole.values(2, FEATURES)[mine], early_nD=whole.values(3, FEATURES)[mine]
        )
        outputs = ForwardOutputs(losses_n=whole.losses[mine], features=features)
        weights = _gathered(weigh(method, batch, outputs), batch, runtime)
        learn(method, batch, whole.values(4)[mine], RATE, outputs=outputs)
        gradient = _gradient(model)
        expected = _weights_by_hand(model, whole)
        model.zero_grad()
        _objective_by_hand(whole, expected, standardize).backward()
        return {
            "weights": (weights, expected.detach()),
            "gradient": (gradient, _gradient(model)),
        }


def _model(encoder: str) -> WeightingModel:
    shape = WeightingShape(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        ffn_hidden_size=24,
        encoder=encoder,
        feature_size=FEATURES if encoder == "llm" else 0,
    )
    model = build_weighting_model(shape, seed=3)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # the heads start at zero: leave that point
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    return model.double()


def _gradient(model: WeightingModel) -> Tensor:
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([gradient.flatten() for gradient in found])


def _weights_by_hand(model: WeightingModel, whole: Whole) -> Tensor:
    """Every document is encoded alone, and every group is a call of its own without padding."""
    found = []
    for group in whole.groups:
        if model.shape.encoder == "own":
            documents = list(documents_of(whole.batch))[group]
            pooled = torch.cat([model.encoder(tokens) for tokens, _, _ in documents])
        else:
            pooled = model.encoder.project(_read_by_hand(whole, group))
        found.append(softmax_by_hand(model.logits(pooled[None])[0], whole.sizes[group]))
    return torch.cat(found)


def _read_by_hand(whole: Whole, group: slice) -> Tensor:
    sizes, losses = whole.sizes[group], whole.losses[group]
    mean = (sizes * losses).sum() / sizes.sum()
    deviation = ((sizes * (losses - mean).square()).sum() / sizes.sum()).sqrt()
    of_losses = torch.where(sizes > 0, (losses - mean) / deviation, 0.0)
    states = [whole.values(seed, FEATURES)[group] for seed in (2, 3)]
    return torch.cat([*(F.rms_norm(s, (FEATURES,)) for s in states), of_losses[:, None]], dim=1)


def softmax_by_hand(logits: Tensor, sizes: Tensor, bound: float = BOUND) -> Tensor:
    """Returns weights whose mean is 1 if each counts `sizes` times, at a fixed temperature."""
    temperature = _temperature_by_hand(logits.detach(), sizes, bound)
    # A document that does not count has a weight all the same: as if it were the largest.
    largest = logits[sizes > 0].max().detach()
    scores = ((logits - largest).clamp(max=0.0) / temperature).exp()
    return scores * sizes.sum() / (sizes * scores).sum()


def _temperature_by_hand(logits: Tensor, sizes: Tensor, bound: float) -> float:
    """Each document of size s is s documents of size 1, of which all have the same logit."""
    many = logits.repeat_interleave(sizes.long())

    def is_held(temperature: float) -> bool:
        shares = torch.softmax(many / temperature, dim=0)
        return float(1.0 / (len(many) * shares.square().sum())) >= bound

    low, high = 1.0, 1.0 if is_held(1.0) else 1e6
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if is_held(middle) else (middle, high)
    return high


def _objective_by_hand(whole: Whole, weights: Tensor, standardize: bool) -> Tensor:
    total = torch.zeros([], dtype=torch.float64)
    for group in whole.groups:
        advantage = _advantage_by_hand(whole, group, weights.detach()[group], standardize)
        total = total - (whole.sizes[group] * advantage * weights[group]).sum()
    return total / whole.sizes.sum()


def _advantage_by_hand(whole: Whole, group: slice, weights: Tensor, standardize: bool) -> Tensor:
    sizes, alignment = whole.sizes[group], whole.values(4)[group]
    if not standardize:
        return alignment * RATE
    share = sizes / sizes.sum()
    variance = (share * alignment.square()).sum() - (share * alignment).sum().square()
    return (alignment - (share * weights * alignment).sum()) / variance.sqrt()


def rule_weights(
    policy: str,
    group: str,
    options: dict[str, Any],
    standardize: bool = True,
    tensor: int = 1,
    pipeline: int = 1,
) -> tuple[Tensor, Tensor]:
    """Weights of the global batch by a method without a model, after it has learned: ours and by
    hand.
    """
    with bring_up(ParallelConfig(tensor=tensor, pipeline=pipeline), seed=0) as runtime:
        whole = _whole(runtime, group, len(LENGTHS), options)
        batch, mine = whole.part(runtime)
        config = PolicyConfig(
            name=policy,
            loss_decay=DECAY,
            loss_temperature=TEMPERATURE,
            domain_decay=DECAY,
            domain_temperature=0.3 if standardize else 0.003,
        )
        weighting = WeightingConfig(
            group=group, standardize=standardize, min_effective_sample_size=BOUND
        )
        kind = {"domain_mean": DomainMean, "loss_reweighting": LossReweighting}[policy]
        method = kind(config, weighting, runtime, MICRO_BATCH)
        outputs = ForwardOutputs(losses_n=whole.losses.float()[mine])
        if policy == "domain_mean":
            learn(method, batch, whole.values(4).float()[mine], RATE, outputs=outputs)
            by_hand = _domain_weights_by_hand(whole, config, standardize)
        else:
            for losses in (whole.losses, whole.losses.square()):
                method.after_step(batch, losses.float()[mine], TrainState())
            by_hand = _loss_weights_by_hand(whole)
        return _gathered(weigh(method, batch, outputs), batch, runtime), by_hand


def _domain_weights_by_hand(whole: Whole, config: PolicyConfig, standardize: bool) -> Tensor:
    ones = torch.ones(whole.batch.units.count, dtype=torch.float64)
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
    for group in whole.groups:
        advantage = _advantage_by_hand(whole, group, ones[group], standardize)
        if not standardize:
            share = whole.sizes[group] / whole.sizes[group].sum()
            advantage = advantage - (share * advantage).sum()
        rows = zip(whole.batch.domains[group], advantage, whole.sizes[group], strict=True)
        for domain, value, size in rows:
            sums[domain] += float(size * value)
            counts[domain] += float(size)
    means = {domain: (1 - DECAY) * sums[domain] / counts[domain] for domain in sums}
    logits = torch.tensor([means[name] / config.domain_temperature for name in whole.batch.domains])
    return _softmax_of_groups(whole, logits.double())


def _loss_weights_by_hand(whole: Whole) -> Tensor:
    share = whole.sizes / whole.sizes.sum()
    mean, square = ((share * whole.losses**power).sum() for power in (1, 2))
    mean = DECAY * mean + (1 - DECAY) * (share * whole.losses**2).sum()
    square = DECAY * square + (1 - DECAY) * (share * whole.losses**4).sum()
    return _softmax_of_groups(
        whole, (whole.losses - mean) / (square - mean**2).sqrt() / TEMPERATURE
    )


def _softmax_of_groups(whole: Whole, logits: Tensor) -> Tensor:
    parts = [softmax_by_hand(logits[group], whole.sizes[group]) for group in whole.groups]
    return torch.cat(parts)
