"""Rules about policies and the weighting model."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_dwm.config.schema import LEARNING_POLICIES, Config


def policy_problems(config: Config, num_layers: int) -> Iterator[str]:
    """A line for every rule that the run breaks. num_layers: of the LLM."""
    if not config.data.train:
        yield "data.train: expected at least one prefix of indexed files, got none"
    if config.data.tokenizer is None:
        yield "data.tokenizer: expected the tokenizer model that the data was tokenized with"
    yield from _validation_text(config)
    if config.policy.name == "dwm":
        yield from _weighting_model(config, num_layers)
    if config.policy.name in LEARNING_POLICIES:
        yield from _groups(config)
        yield from _concentration(config)
    if config.learns:
        yield from _learning(config)
        yield from _first_update(config)


def _validation_text(config: Config) -> Iterator[str]:
    mixes = config.policy.name == "validation_mixing"
    if (config.learns or mixes) and config.validation.path is None:
        yield (
            f"validation.path: policy {config.policy.name} needs the target's text (JSON Lines), "
            "got none"
        )
    batch_size = config.training.global_batch_size
    if mixes and not 0 < round(config.policy.mix_fraction * batch_size) < batch_size:
        yield (
            f"policy.mix_fraction {config.policy.mix_fraction}: expected at least one sample of "
            f"training.global_batch_size {batch_size}, and not all"
        )


def _weighting_model(config: Config, num_layers: int) -> Iterator[str]:
    weighting = config.weighting
    if weighting.frozen and weighting.load is None:
        yield "weighting.frozen: expected weighting.load to name a weighting model, got none"
    # A loaded model has its own sizes.
    if weighting.load is None and weighting.hidden_size % (2 * weighting.num_attention_heads):
        yield (
            f"weighting.hidden_size {weighting.hidden_size}: expected a multiple of twice "
            f"weighting.num_attention_heads, {2 * weighting.num_attention_heads}"
        )
    if weighting.encoder == "llm" and not 1 <= weighting.early_layer <= num_layers:
        yield (
            f"weighting.early_layer {weighting.early_layer}: expected 1 to the LLM's number of "
            f"layers, {num_layers}"
        )


def _groups(config: Config) -> Iterator[str]:
    """What weights need, learned in this run or before it."""
    if config.weighting.group == "micro_batch" and config.training.micro_batch_size < 2:
        yield (
            "training.micro_batch_size 1: a weighting group of one sample always weighs 1; "
            "set weighting.group to global or use larger micro-batches"
        )


def _learning(config: Config) -> Iterator[str]:
    """What only updates need: a frozen weighting model has none."""
    weighting = config.weighting
    if weighting.mode == "staged" and weighting.stages > config.training.steps:
        yield (
            f"weighting.stages {weighting.stages}: expected at most training.steps, "
            f"which is {config.training.steps}"
        )
    if weighting.update_on == "training" and weighting.mode == "staged":
        yield (
            "weighting.update_on training: one LLM step gives one update, and weighting.mode "
            "staged makes many with the LLM frozen; set weighting.mode online"
        )
    if weighting.damp_by_noise and not config.bilevel.noise_interval_updates:
        yield (
            "weighting.damp_by_noise: expected bilevel.noise_interval_updates above 0, so that "
            "the noise is measured"
        )
    if weighting.damp_by_noise and config.passages < 2:
        yield (
            "weighting.damp_by_noise: expected 2 or more passages in validation.batch_size, got "
            f"{config.passages}: noise is measured between halves"
        )


def _concentration(config: Config) -> Iterator[str]:
    """A bound that no weights can break looks like a guard and is none."""
    weighting, training = config.weighting, config.training
    per_micro_batch = weighting.group == "micro_batch"
    key = "micro_batch_size" if per_micro_batch else "global_batch_size"
    size = training.micro_batch_size if per_micro_batch else training.global_batch_size
    bound = weighting.min_effective_sample_size
    if 0.0 < bound <= 1.0 / size:
        yield (
            f"weighting.min_effective_sample_size {bound}: the effective sample size of a group of "
            f"{size} (training.{key}) is never below {1.0 / size:.3g}, so the bound never acts; "
            "raise it or the group's size, or set it to 0"
        )


def _first_update(config: Config) -> Iterator[str]:
    """Adam's first step does not depend on the gradient's size, so it teaches nothing."""
    weighting = config.weighting
    if (weighting.mode, weighting.update_on) != ("online", "training"):
        return
    if weighting.warmup_steps < 2:
        yield (
            f"weighting.warmup_steps {weighting.warmup_steps}: expected 2 or more with "
            "weighting.update_on training, whose first update would come inside the first step, "
            "with Adam's moments empty; some tens let them settle"
        )
