"""What the ranks of the tests of selection by excess loss run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dwm.config import (
    Config,
    ModelConfig,
    ParallelConfig,
    PolicyConfig,
    TrainingConfig,
    WeightingConfig,
)
from megatron_dwm.data import Batch
from megatron_dwm.model import LLM, build_llm
from megatron_dwm.model.offload import Offload
from megatron_dwm.runtime import Runtime
from megatron_dwm.testing import SEQUENCE_LENGTH
from megatron_dwm.weighting import Method
from megatron_dwm.weighting.excess_loss import ExcessLoss
from megatron_dwm.weighting.uniform import Uniform
from tests.documents import packed_batch
from tests.subjects import Subject, with_method
from tests.tiny import MICRO_BATCH, SAMPLES, Tiny, tiny


def batch_of(runtime: Runtime, unit: str, number: int = 0) -> Batch:
    """This replica's rows of a packed batch, of which a fifth of the labels does not count."""
    kind = "document" if unit == "document" else "sample"
    batch = packed_batch(number, runtime, unit=kind, uncounted=0.2)
    return replace(batch, tokens_are_units=True) if unit == "token" else batch


def config_of(unit: str, scope: str, group: str, ratio: float) -> Config:
    return Config(
        training=TrainingConfig(global_batch_size=SAMPLES, micro_batch_size=MICRO_BATCH),
        policy=PolicyConfig(name="excess_loss", keep_ratio=ratio, keep_scope=scope),
        weighting=WeightingConfig(unit=unit, group=group),
    )


def reference_of(subject: Tiny, layout: dict[str, Any]) -> LLM:
    """An untrained model of the same shape, from another seed."""
    parallel = ParallelConfig(
        tensor=layout.get("tensor", 1),
        pipeline=layout.get("pipeline", 1),
        virtual_stages=layout.get("virtual_stages", 1),
        sequence=layout.get("sequence", False),
    )
    return build_llm(
        subject.llm.shape,
        ModelConfig(),
        parallel,
        subject.runtime,
        sequence_length=SEQUENCE_LENGTH,
        seed=77,
        trained=False,
    )


def _stepped(trained: Subject, unit: str) -> dict[str, Tensor]:
    """What the first of two steps weighed, and the losses of both."""
    runtime = trained.learner.runtime
    first, second = (trained.taken(batch_of(runtime, unit, number)) for number in (0, 1))
    return {
        "weights": first.units.gather(first.units.weights_n, runtime),
        "losses": torch.tensor([first.loss, first.weighted_loss, second.loss]),
    }


def steps(unit: str, scope: str, group: str, ratio: float, **layout: Any) -> dict[str, Tensor]:
    """Weights and losses of two steps under a layout."""
    with tiny(**layout) as subject:
        method = ExcessLoss(
            config_of(unit, scope, group, ratio),
            subject.runtime,
            reference_of(subject, layout),
            Offload(),
        )
        return _stepped(with_method(subject, method, MICRO_BATCH), unit)


def everything_kept(unit: str, scope: str, group: str) -> list[list[Tensor]]:
    """Parameters after two steps that keep all units, and after two with uniform weights."""
    found = []
    for selects in (True, False):
        with tiny() as subject:
            method: Method = Uniform()
            if selects:
                config = config_of(unit, scope, group, 1.0)
                method = ExcessLoss(config, subject.runtime, reference_of(subject, {}), Offload())
            _stepped(with_method(subject, method, MICRO_BATCH), unit)
            found.append([parameter.detach().clone() for parameter in subject.llm.parameters()])
    return found


def weights_by_hand(unit: str, scope: str, group: str, ratio: float) -> dict[str, Tensor]:
    """The weights of the product's step, and those of a plain loop over units, in one process."""
    with tiny() as subject:
        reference = reference_of(subject, {})
        batch = batch_of(subject.runtime, unit)
        excess_BS = _token_losses(subject.llm, batch) - _token_losses(reference, batch)
        method = ExcessLoss(
            config_of(unit, scope, group, ratio), subject.runtime, reference, Offload()
        )
        ours = _stepped(with_method(subject, method, MICRO_BATCH), unit)["weights"]
    return {"ours": ours, "by hand": torch.tensor(_by_hand(batch, excess_BS, scope, group, ratio))}


@torch.no_grad()
def _token_losses(llm: LLM, batch: Batch) -> Tensor:
    """Losses [B, S] from logits, every document alone."""
    losses_BS = torch.zeros(batch.tokens_BS.shape, dtype=torch.float64)
    assert batch.borders_BS is not None
    for row, borders_S in enumerate(batch.borders_BS):
        for piece in borders_S.unique():
            here = borders_S == piece
            tokens, labels = batch.tokens_BS[row][here], batch.labels_BS[row][here]
            logits = llm.modules[0](tokens[None], torch.arange(len(tokens))[None], None)
            losses_BS[row, here] = F.cross_entropy(logits[0].double(), labels, reduction="none")
    return losses_BS


def _by_hand(batch: Batch, excess_BS: Tensor, scope: str, group: str, ratio: float) -> list[float]:
    units, size = batch.units, len(batch.tokens_BS) if group == "global" else MICRO_BATCH
    size = 1 if scope == "sequence" else size
    numbers_BS = units.numbers_BS
    if numbers_BS is None:
        numbers_BS = torch.arange(batch.size)[:, None].expand(excess_BS.shape)
    weights = [0.0] * units.count
    for first in range(0, batch.size, size):
        rows = slice(first, first + size)
        scores: dict[int, list[float]] = {}
        for row in range(*rows.indices(batch.size)):
            for place in range(excess_BS.shape[1]):
                if batch.loss_mask_BS[row, place]:
                    unit = int(numbers_BS[row, place])
                    scores.setdefault(unit, []).append(float(excess_BS[row, place]))
        means = {unit: sum(values) / len(values) for unit, values in scores.items()}
        count = max(1, round(ratio * len(means)))
        kept = sorted(means, key=lambda unit: -means[unit])[:count]
        sizes = {unit: 1.0 if units.sizes_U is None else len(scores[unit]) for unit in means}
        for unit in kept:
            weights[unit] = sum(sizes.values()) / sum(sizes[each] for each in kept)
    return weights
