"""What the ranks of the tests of similarity run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.config import Config, ParallelConfig, PolicyConfig, WeightingConfig
from megatron_dwm.config.load import load_config
from megatron_dwm.data import Batch, CorpusSource, TrainingData
from megatron_dwm.data.pieces import document_rules
from megatron_dwm.model import forward_only
from megatron_dwm.model.passes.objective import unit as unit_objective
from megatron_dwm.run.inputs import open_model_and_tokenizer, open_target
from megatron_dwm.runtime import bring_up
from megatron_dwm.training import read_target
from megatron_dwm.weighting.groups import gather_over_data, units_of_replicas
from megatron_dwm.weighting.similarity import Similarity
from tests.documents import document_losses, documents_of, packed_batch
from tests.subjects import with_method
from tests.tiny import MICRO_BATCH, tiny
from tests.weighting.unit_workers import softmax_by_hand

TRAIN, TARGET, TEMPERATURE = 100, 101, 0.02


def weights_from_transformers(run_dir: str, exported: str, step: int) -> Tensor:
    """Weights of the batch of a step (from 0), from an exported model that read the target."""
    config = load_config(["--config", f"{run_dir}/config.yaml"])
    model = LlamaForCausalLM.from_pretrained(exported, dtype=torch.float64).eval()
    with bring_up(ParallelConfig(), seed=0):
        batch, passages = _batch_and_passages(config, step)
    layer = config.policy.similarity_layer
    features = torch.stack([_features(model, layer, each) for each, _ in _units(passages, config)])
    sizes = torch.tensor([size for _, size in _units(passages, config)])
    mean = (sizes[:, None] * features).sum(dim=0) / sizes.sum()
    found = [
        torch.dot(feature, mean) / feature.norm() / mean.norm()
        for feature in (_features(model, layer, each) for each, _ in _units(batch, config))
    ]
    return softmax_by_hand(
        torch.stack(found) / config.policy.similarity_temperature,
        torch.tensor([size for _, size in _units(batch, config)]),
        config.weighting.min_effective_sample_size,
    )


def _batch_and_passages(config: Config, step: int) -> tuple[Batch, Batch]:
    tokenizer, _ = open_model_and_tokenizer(config)
    size = config.training.global_batch_size
    data = TrainingData(
        config.data,
        eod_id=tokenizer.eod_id,
        seed=config.run.seed,
        num_samples=(step + 1) * size,
        cache_dir=Path(config.run.dir) / "by_hand",
        purpose="training",
        rules=document_rules(config),
    )
    target = open_target(config, tokenizer)
    assert target is not None
    return CorpusSource(data, size).rows(step, 0, size), target.batch(0, config.passages)


def _units(batch: Batch, config: Config) -> Iterator[tuple[Tensor, float]]:
    """Yields the tokens [1, length] of each unit, and how much it counts."""
    if config.weighting.unit == "document":
        for tokens, _, mask in documents_of(batch):
            yield tokens, float(mask.sum())
        return
    for tokens, mask in zip(batch.tokens_BS, batch.loss_mask_BS, strict=True):
        last = int(mask.nonzero().max())
        yield tokens[None, : last + 1], 1.0


@torch.no_grad()
def _features(model: LlamaForCausalLM, layer: int, tokens: Tensor) -> Tensor:
    states = model(tokens, output_hidden_states=True).hidden_states
    means = [states[number][0].mean(dim=0) for number in (-1, layer)]
    return torch.cat([mean / mean.square().mean().sqrt() for mean in means])


def steps(unit: str, group: str, **layout: Any) -> dict[str, Tensor]:
    """Weights of the global batch after the target is read, and losses of two steps."""
    with tiny(**layout) as subject:
        runtime = subject.runtime
        method = Similarity(
            PolicyConfig(similarity_temperature=TEMPERATURE, similarity_layer=1),
            WeightingConfig(group=group),
            runtime,
            MICRO_BATCH,
        )
        trained = with_method(subject, method, MICRO_BATCH)
        batch = packed_batch(TRAIN, runtime, unit=unit, uncounted=0.2)
        passages = packed_batch(TARGET, runtime, unit=unit, uncounted=0.2)
        before = [parameter.detach().clone() for parameter in subject.llm.parameters()]
        read = read_target(trained.learner, method, passages)
        assert read is not None
        pairs = zip(before, subject.llm.parameters(), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs), "the LLM does not change"
        first, second = (trained.taken(batch) for _ in range(2))
        counts = units_of_replicas(batch, runtime)
        return {
            "weights": gather_over_data(first.units.weights_n, runtime, counts),
            "losses": torch.tensor([read.val_loss, first.loss, second.loss]),
        }


def deferred(
    unit: str, bound: float = 0.5, micro_batch: int = MICRO_BATCH, **layout: Any
) -> dict[str, Tensor]:
    """Weights of a second batch, and its softmax by hand at the first one's temperature."""
    with tiny(**layout) as subject:
        runtime, policy = subject.runtime, PolicyConfig(similarity_temperature=TEMPERATURE)
        weighting = WeightingConfig(group="global", min_effective_sample_size=bound)
        method = Similarity(policy, weighting, runtime, micro_batch)
        trained = with_method(subject, method, micro_batch)
        one, two, passages = (
            packed_batch(number, runtime, unit=unit, uncounted=0.2)
            for number in (TRAIN, TRAIN + 2, TARGET)
        )
        read_target(trained.learner, method, passages)
        trained.taken(one)
        assert method.deferred is not None and method.deferred.temperature is not None
        temperature = method.deferred.temperature.double()
        outputs = forward_only(subject.llm, unit_objective(two, MICRO_BATCH), early_layer=1).outputs
        weights_n = trained.taken(two).units.weights_n
        counts = units_of_replicas(two, runtime)
        states = [outputs.features.final_nD, outputs.features.early_nD]
        # The states of this LLM are so small that the norm's epsilon counts.
        states = [F.rms_norm(each, each.shape[-1:]).double() for each in states]
        scaled = [gather_over_data(each, runtime, counts) for each in states]
        logits_n = F.cosine_similarity(torch.cat(scaled, dim=1), method.mean.double()) / TEMPERATURE
        sizes_U = two.units.sizes_U
        sizes_U = torch.ones_like(weights_n) if sizes_U is None else sizes_U
        sizes_n = gather_over_data(sizes_U, runtime, counts).double()
        c_n = (logits_n / temperature).exp()
        return {
            "weights": gather_over_data(weights_n, runtime, counts),
            "by hand": c_n * sizes_n.sum() / (sizes_n * c_n).sum(),
            "temperature": temperature,
        }


def validation_loss() -> tuple[float, float]:
    """The loss that a reading records, and that of every document alone in double precision."""
    with tiny() as subject:
        method = Similarity(PolicyConfig(), WeightingConfig(), subject.runtime, MICRO_BATCH)
        trained = with_method(subject, method, MICRO_BATCH)
        passages = packed_batch(TARGET, subject.runtime, uncounted=0.2)
        read = read_target(trained.learner, method, passages)
        assert read is not None
        module = subject.llm.modules[0]
        theta = {name: p.detach().double() for name, p in module.named_parameters()}
        losses, sizes = document_losses(subject.llm.shape, theta, passages), passages.units.sizes_U
        return read.val_loss, float((losses * sizes).sum() / sizes.sum())


def not_finite() -> tuple[bool, bool]:
    """Whether a reading of an LLM that is broken is left out, and the weights stay uniform."""
    with tiny() as subject:
        method = Similarity(PolicyConfig(), WeightingConfig(), subject.runtime, MICRO_BATCH)
        trained = with_method(subject, method, MICRO_BATCH)
        batch = packed_batch(TRAIN, subject.runtime)
        subject.llm.parameters()[0].data.fill_(float("nan"))
        read = read_target(trained.learner, method, batch)
        weights_n = method.weights(batch, None, TrainState())
        return read is None, torch.equal(weights_n, torch.ones_like(weights_n))
