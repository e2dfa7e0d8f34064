"""What the method DWM says of a configuration: its keys, rules, schedule, files and costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megatron_dwm.config import Config, WeightingConfig
from megatron_dwm.config.key import Part
from megatron_dwm.model import LlamaShape
from megatron_dwm.tokenizer import Tokenizer
from megatron_dwm.weighting.concentration import GUARDS
from megatron_dwm.weighting.costs import Costs, Workload, learning_costs
from megatron_dwm.weighting.loaded import (
    loaded_files,
    loaded_schedule,
    loaded_shape,
    stage_directories,
)
from megatron_dwm.weighting.model import WeightingShape, unchecked_tokenizer_warning
from megatron_dwm.weighting.pool import ChoosesFromPool
from megatron_dwm.weighting.rules import group_problems, learning_problems, target_problems
from megatron_dwm.weighting.schedule import Schedule, schedule_of
from megatron_dwm.weighting.weigher import defers

_PARTS: frozenset[Part] = frozenset({"weighting_model", "groups", "normalizer", "pool"})
_LEARNING: frozenset[Part] = frozenset(
    {"target", "passages", "updates", "hypergradients", "alignments"}
)


class DwmConfiguration(ChoosesFromPool):
    """The answers of `Dwm` (dwm.py) before anything is built."""

    gentler = f"{GUARDS}, or lower weighting.learning_rate"

    @classmethod
    def parts(cls, config: Config) -> frozenset[Part]:
        """Returns the parts: a weighting model and groups and, unless frozen, those of learning."""
        parts = _PARTS if only_selects(config) else _PARTS | {"softmax"}
        return parts if config.weighting.frozen else parts | _LEARNING

    @classmethod
    def problems(cls, config: Config, num_layers: int, world_size: int) -> Iterator[str]:
        """Check the rules of the weighting model, its groups and, unless frozen, of learning."""
        learns = not config.weighting.frozen
        if learns:
            yield from target_problems(config)
        yield from _model_problems(config, num_layers)
        if not only_selects(config):
            yield from group_problems(config)
        if learns:
            yield from learning_problems(config, world_size)

    @classmethod
    def remarks(cls, config: Config, llm: LlamaShape, tokenizer: Tokenizer) -> Iterator[str]:
        """Yields a line for sizes without effect, or for a loaded model of unknown tokenizer."""
        if config.weighting.load is None:
            yield from _idle_sizes(config.weighting)
            return
        wanted = wanted_shape(config, llm, tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256)
        found = loaded_shape(config, wanted)
        directory = stage_directories(config)[0]
        if (text := unchecked_tokenizer_warning(directory, found)) is not None:
            yield text

    @classmethod
    def depends_on(cls, config: Config) -> Iterator[tuple[str, Path]]:
        """Yields the target's file, or those of a frozen model."""
        yield from super().depends_on(config)
        yield from loaded_files(config)

    @classmethod
    def schedule(cls, config: Config) -> Schedule:
        """Returns the schedule of `weighting.mode`, or of the loaded stages if frozen."""
        return loaded_schedule(config) if config.weighting.frozen else schedule_of(config)

    @classmethod
    def first_weighed_step(cls, config: Config) -> int:
        """Returns 0 with a loaded model, else the step of the first update."""
        return 0 if config.weighting.load is not None else cls.schedule(config).first_update

    @classmethod
    def model_shape(cls, config: Config, llm: LlamaShape) -> WeightingShape:
        """Returns the shape of the model of `weighting.load`, or the configured shape."""
        wanted = wanted_shape(config, llm, llm.vocab_size)
        if config.weighting.load is None:
            return wanted
        return loaded_shape(config, wanted, any_vocabulary=True)

    @classmethod
    def costs(cls, config: Config, llm: LlamaShape, workload: Workload) -> Costs:
        """Returns the costs of learning, including those of the weighting model."""
        return _costs(config, llm, workload, cls.model_shape(config, llm))


def only_selects(config: Config) -> bool:
    """True if a frozen model chooses from pools and all weights are 1."""
    weighting = config.weighting
    return weighting.pool_batches > 1 and weighting.kept_weights == "equal"


def _costs(config: Config, llm: LlamaShape, workload: Workload, model: WeightingShape) -> Costs:
    """Returns the costs of learning, of weighing, and of scoring pools."""
    training, weighting = config.training, config.weighting
    rows = training.global_batch_size // workload.replicas
    share = -(-rows // config.parallel.model_size)
    own = weighting.encoder == "own"
    is_global = weighting.group == "global"
    deferred = defers(weighting, model)
    reads_first = not own and is_global and not deferred and rows > training.micro_batch_size
    costs = learning_costs(
        config,
        llm,
        workload,
        update_on=config.update_on,
        model=model,
        extra_forward=reads_first,
        encodes_twice=own and share > training.micro_batch_size,
        frozen=weighting.frozen,
    )
    if deferred and weighting.load is not None:
        costs = replace(costs, first_forward=costs.forward)
    pools = weighting.pool_batches
    if pools == 1:
        return costs
    costs = replace(
        costs,
        pool_passes=0.0 if own else pools * costs.forward,
        pool_scores=pools * costs.weighing,
    )
    without = replace(costs, weighing=0.0, extra_forward=0.0, first_forward=0.0)
    return without if only_selects(config) else costs


def _has_attention(weighting: WeightingConfig) -> bool:
    """True if a model of these settings has transformer layers, of tokens or of samples."""
    return weighting.encoder == "own" or weighting.attends_across_samples


def _idle_sizes(weighting: WeightingConfig) -> Iterator[str]:
    default = WeightingConfig()
    idle = [
        f"weighting.{name}"
        for name in ("num_attention_heads", "ffn_hidden_size")
        if getattr(weighting, name) != getattr(default, name) and not _has_attention(weighting)
    ]
    if idle:
        yield (
            f"{', '.join(idle)}: no effect: a weighting model with weighting.encoder llm and "
            "weighting.across_samples false has no attention"
        )


def _model_problems(config: Config, num_layers: int) -> Iterator[str]:
    weighting = config.weighting
    if weighting.pool_batches > 1 and not weighting.frozen:
        yield (
            f"weighting.pool_batches {weighting.pool_batches}: expected weighting.frozen true with "
            "policy dwm: a model that still learns weighs what it reads; set it, with "
            "weighting.load, or leave weighting.pool_batches at 1"
        )
    if weighting.frozen and weighting.load is None:
        yield "weighting.frozen: expected weighting.load to name a weighting model, got none"
    # A loaded model has its own sizes.
    has_heads = weighting.load is None and _has_attention(weighting)
    if has_heads and weighting.hidden_size % (2 * weighting.num_attention_heads):
        yield (
            f"weighting.hidden_size {weighting.hidden_size}: expected a multiple of twice "
            f"weighting.num_attention_heads, {2 * weighting.num_attention_heads}"
        )
    if weighting.encoder == "llm" and not 1 <= weighting.early_layer <= num_layers:
        yield (
            f"weighting.early_layer {weighting.early_layer}: expected 1 to the LLM's number of "
            f"layers, {num_layers}"
        )


def wanted_shape(
    config: Config, llm: LlamaShape, vocab_size: int, *, tokenizer_sha256: str | None = None
) -> WeightingShape:
    """Returns the shape of the weighting model in the configuration.

    tokenizer_sha256: None if only sizes are needed and there is no tokenizer.
    """
    weighting = config.weighting
    return WeightingShape(
        vocab_size=vocab_size,
        hidden_size=weighting.hidden_size,
        num_layers=weighting.num_layers,
        num_attention_heads=weighting.num_attention_heads,
        ffn_hidden_size=weighting.ffn_hidden_size,
        encoder=weighting.encoder,
        across_samples=weighting.attends_across_samples,
        feature_size=llm.hidden_size if weighting.encoder == "llm" else 0,
        tokenizer_sha256=tokenizer_sha256 if weighting.encoder == "own" else None,
    )
