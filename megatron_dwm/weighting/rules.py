"""Rules between keys that several methods share; each yields a line for every violation."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_dwm.config import Config
from megatron_dwm.config.methods import learns_from_alignments
from megatron_dwm.model.passes.micro_batches import probed_micro_batches
from megatron_dwm.weighting.noise import why_no_noise


def target_problems(config: Config) -> Iterator[str]:
    """Check that there is a target, for a method that reads one."""
    if config.validation.path is None:
        yield (
            f"validation.path: policy {config.policy.name} needs the target's text (JSON Lines), "
            "got none"
        )


def group_size_problems(config: Config) -> Iterator[str]:
    """Check that weighting groups have several units, for a method that weighs inside groups."""
    weighting, training = config.weighting, config.training
    if weighting.unit != "sample":
        return  # a sample has any number of units
    if weighting.group == "micro_batch" and training.micro_batch_size < 2:
        yield (
            "training.micro_batch_size 1: a weighting group of one sample always weighs 1; "
            "set weighting.group to global or use larger micro-batches"
        )
    if weighting.group == "global" and training.global_batch_size < 2:
        yield (
            "training.global_batch_size 1: a weighting group of one sample always weighs 1; use "
            "larger batches, or policy.name uniform"
        )


def group_problems(config: Config) -> Iterator[str]:
    """Check weighting groups, for a method whose weights are a softmax over them."""
    weighting, training = config.weighting, config.training
    yield from group_size_problems(config)
    if weighting.unit != "sample":
        return
    per_micro_batch = weighting.group == "micro_batch"
    key = "micro_batch_size" if per_micro_batch else "global_batch_size"
    size = training.micro_batch_size if per_micro_batch else training.global_batch_size
    bound = weighting.min_effective_sample_size
    # A bound that no weights can violate looks like a guard but never acts.
    if 0.0 < bound <= 1.0 / size:
        yield (
            f"weighting.min_effective_sample_size {bound}: the effective sample size of a group of "
            f"{size} (training.{key}) is never below {1.0 / size:.3g}, so the bound never acts; "
            "raise it or the group's size, or set it to 0"
        )


def learning_problems(config: Config, world_size: int) -> Iterator[str]:
    """Check the schedule, the noise measurements and the estimator, for a method that learns."""
    weighting = config.weighting
    if weighting.mode == "staged" and weighting.stages > config.training.steps:
        yield (
            f"weighting.stages {weighting.stages}: expected at most training.steps, "
            f"which is {config.training.steps}"
        )
    if config.update_on != "fresh" and weighting.mode == "staged":
        yield (
            f"weighting.update_on {config.update_on}: one LLM step gives one update, and "
            "weighting.mode staged makes many with the LLM frozen; set weighting.mode online"
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
    elif weighting.damp_by_noise and config.bilevel.estimator != "unroll":
        replicas = config.data_parallel_size(world_size)
        if (reason := why_no_noise(config, config.passages, replicas)) is not None:
            yield f"weighting.damp_by_noise: noise cannot be measured: {reason}"
    yield from _first_update(config)
    if config.update_on == "ahead":
        yield from _ahead_problems(config, world_size)
    yield from estimator_problems(config, world_size)


def _first_update(config: Config) -> Iterator[str]:
    """Check the warm-up: Adam's first step does not depend on the size of the gradient."""
    weighting = config.weighting
    if weighting.mode != "online" or config.update_on == "fresh":
        return
    if weighting.warmup_steps < 2:
        yield (
            f"weighting.warmup_steps {weighting.warmup_steps}: expected 2 or more with "
            f"weighting.update_on {config.update_on}, whose first update would come inside the "
            "first step, with Adam's moments empty; some tens let them settle"
        )


def _ahead_problems(config: Config, world_size: int) -> Iterator[str]:
    """Check what an update whose direction comes first cannot do."""
    if config.bilevel.estimator != "tangent_probe":
        yield (
            f"bilevel.estimator {config.bilevel.estimator}: with weighting.update_on ahead the "
            "training pass itself carries the tangent probe; leave it out, or set another "
            "weighting.update_on"
        )
    fraction, count = config.weighting.probe_fraction, config.num_microbatches(world_size)
    if (
        fraction is not None
        and abs(probed_micro_batches(count, fraction) / count - fraction) > 0.02
    ):
        yield (
            f"weighting.probe_fraction {fraction}: a step has {count} micro-batch"
            f"{'es' if count > 1 else ''} per data-parallel replica, of which only whole ones are "
            f"probed; set a multiple of {1 / count:.3g}, or a smaller training.micro_batch_size "
            "(in a resumed run, allow the changed key with run.allow_changed)"
        )


def estimator_problems(config: Config, world_size: int) -> Iterator[str]:
    """Check what the estimators for comparison cannot compute; each also checks it itself."""
    name, advice = config.bilevel.estimator, "use tangent_probe"
    if name == "tangent_probe":
        return
    if config.model.precision != "fp32" or config.model.fp8_emulation:
        yield f"bilevel.estimator {name}: needs model.precision fp32 without FP8; {advice}"
    if name == "unroll" and world_size > 1:
        yield f"bilevel.estimator unroll: runs in one process, got {world_size}; {advice}"
    if name == "unroll" and config.model.recompute != "none":
        yield f"bilevel.estimator unroll: needs model.recompute none; {advice}"
    damps = learns_from_alignments(config.policy.name) and config.weighting.damp_by_noise
    if name == "unroll" and damps:
        yield f"weighting.damp_by_noise: estimator unroll measures no noise; {advice}"
