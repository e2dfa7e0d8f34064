"""Warnings about a run before its first step; none of them stops the run.

Costs one comparison of the passages' texts.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.config import Config
from megatron_dwm.data.document_counts import document_counts
from megatron_dwm.run.inputs import RunInputs
from megatron_dwm.runtime import Runtime
from megatron_dwm.tokenizer import JSON_KINDS
from megatron_dwm.weighting import learns, method_class
from megatron_dwm.weighting.costs import Costs
from megatron_dwm.weighting.noise import why_no_noise
from megatron_dwm.weighting.validation_mixing import num_mixed

# A fast CPU with many cores; a laptop has a tenth of it.
_CPU_FLOPS = 1e12
_SLOW_STEP_S = 60.0
_FEW_UNITS = 1.1
# In docs/when_not.md mixing was level with learned weights at 20 readings, and lost from there.
_MANY_READINGS, _GOOD_READINGS = 20, 10
_ALONE = ", alone in their groups, and always 1: set weighting.group global"


def remarks(
    config: Config, inputs: RunInputs, costs: Costs, runtime: Runtime, state: TrainState
) -> Iterator[str]:
    """Yields a line for everything that a user would not expect from the configuration."""
    yield from _updates(config, inputs, runtime.data_size)
    yield from _shared_passages(config, inputs)
    yield from _repeated_passages(config, inputs)
    yield from _documents(config)
    yield from _slow_steps(config, costs, runtime)
    yield from _nothing_is_learned(config)
    yield from _no_pool_is_scored(config, costs)
    yield from _extra_forward_pass(costs)
    yield from _keeps_all(config)
    yield from _nothing_is_profiled(config, state)
    yield from _no_export(inputs)


def _updates(config: Config, inputs: RunInputs, replicas: int) -> Iterator[str]:
    """Yields lines about small validation batches and noise that is not measured."""
    if inputs.target is None or "passages" not in method_class(config).parts(config):
        return
    passages = min(config.passages, inputs.target.num_rows)
    if passages != config.passages:
        yield (
            f"a validation batch takes every row of {config.validation.path} (validation.path) "
            f"once: {passages}, not the {config.passages} of {_asked_by(config)}"
        )
    reason = why_no_noise(config, passages, replicas) if learns(config) else None
    if config.bilevel.noise_interval_updates and reason is not None:
        yield (
            f"the alignments' signal-to-noise is not measured: {reason} "
            "(bilevel.noise_interval_updates 0 says that none is wanted)"
        )


def _asked_by(config: Config) -> str:
    """Returns the key that decides how many passages a validation batch has, in words."""
    if config.validation.batch_size:
        return "validation.batch_size"
    share = "a quarter of " if config.passages < config.training.global_batch_size else ""
    return f"{share}training.global_batch_size"


def _shared_passages(config: Config, inputs: RunInputs) -> Iterator[str]:
    if inputs.target is None or inputs.held_out is None:
        return
    texts = inputs.held_out.rows.texts
    shared = inputs.target.num_shared(texts)
    if shared:
        yield (
            f"{shared} of the {len(texts)} passages of {_held_out_files(config)} are also in "
            f"{config.validation.path} (validation.path): "
            "the run learns from them, so their loss is not held out; take them out of one of "
            "the two"
        )


def _repeated_passages(config: Config, inputs: RunInputs) -> Iterator[str]:
    if inputs.target is None or "mixing" not in method_class(config).parts(config):
        return
    rows, mixed, steps = inputs.target.num_rows, num_mixed(config), config.training.steps
    readings = steps * mixed / rows
    if readings < _MANY_READINGS:
        return
    fewer = max(1, round(_GOOD_READINGS * rows / steps))
    fraction = fewer / config.training.global_batch_size
    helps = fewer < mixed and steps * fewer / rows < _MANY_READINGS
    advice = f"lower policy.mix_fraction to {fraction:.3g}" if helps else "add passages"
    yield (
        f"policy {config.policy.name} reads each of the {rows:,} rows of {config.validation.path} "
        f"(validation.path) {readings:,.0f} times in {steps:,} steps: the model may learn them by "
        f"heart and gain nothing on other text like them; {advice}, or compare with learned "
        "weights (docs/when_not.md)"
    )


def _no_export(inputs: RunInputs) -> Iterator[str]:
    if inputs.shape.add_qkv_bias and inputs.tokenizer.kind not in JSON_KINDS:
        yield (
            f"model.add_qkv_bias with a {inputs.tokenizer.kind}: the model cannot be exported with "
            "it, because transformers takes a tokenizer of Qwen's kind for every Qwen2 model "
            "(docs/huggingface.md)"
        )


def _held_out_files(config: Config) -> str:
    """Returns the files with the keys that name them."""
    path, sets = config.evaluation.path, config.evaluation.sets
    files = [] if path is None else [f"{path} (evaluation.path)"]
    return ", ".join([*files, *(f"{file} (evaluation.sets {name})" for name, file in sets.items())])


def _documents(config: Config) -> Iterator[str]:
    """Yields lines about documents that are units."""
    if config.weighting.unit != "document":
        return
    if not config.masks_documents:
        yield (
            "weighting.unit document without data.mask_documents: attention reads the documents "
            "before, so a document's loss and alignment depend on them"
        )
    counts = document_counts(config)
    if counts.units_per_row < _FEW_UNITS:
        yield (
            f"weighting.unit document: a sample of {config.data.sequence_length} tokens has "
            f"{counts.units_per_row:.2f} documents on average, so most weights are of whole samples"
            f"{_ALONE if _are_alone(config) else ''}"
        )


def _are_alone(config: Config) -> bool:
    """True if a weighting group is one sample."""
    alone = config.weighting.group == "micro_batch" and config.training.micro_batch_size == 1
    return alone and "groups" in method_class(config).parts(config)


def _slow_steps(config: Config, costs: Costs, runtime: Runtime) -> Iterator[str]:
    flops = costs.llm_step / runtime.world_size
    seconds = flops / _CPU_FLOPS
    if runtime.device.type == "cpu" and seconds > _SLOW_STEP_S:
        yield (
            f"a step is {flops:.1e} FLOPs a process, {seconds / 60:,.0f} minutes at "
            f"{_CPU_FLOPS:.0e} a second, which is fast for a CPU: lower data.sequence_length "
            f"({config.data.sequence_length}), training.global_batch_size "
            f"({config.training.global_batch_size}) or the model's size"
        )


def _nothing_is_learned(config: Config) -> Iterator[str]:
    method, steps = method_class(config), config.training.steps
    parts = method.parts(config)
    if not parts & {"updates", "hypergradients"} or method.schedule(config).num_updates:
        return
    advice = "lower weighting.warmup_steps, raise weighting.freeze_after or train longer"
    if "updates" in parts and config.weighting.mode == "staged":
        advice = "raise weighting.stages or weighting.freeze_after, or train longer"
    if "updates" not in parts:
        advice = "lower policy.alignment_warmup or train longer"
    yield f"policy {config.policy.name} makes no weighting update in {steps} steps: {advice}"


def _no_pool_is_scored(config: Config, costs: Costs) -> Iterator[str]:
    steps = config.training.steps
    if costs.pool_passes and not costs.pools(steps):
        yield (
            f"policy {config.policy.name} draws at random in all {steps} steps: lower "
            "policy.alignment_warmup or train longer"
        )


def _extra_forward_pass(costs: Costs) -> Iterator[str]:
    if costs.extra_forward:
        yield (
            "weighting.group global with several micro-batches: "
            "every step needs an extra forward pass before it has weights (a third more time); to "
            "avoid it, set weighting.group micro_batch or a larger training.micro_batch_size, or "
            "weighting.normalizer deferred (policies similarity and loss_reweighting, and dwm with "
            "weighting.encoder llm and weighting.across_samples false)"
        )


def _keeps_all(config: Config) -> Iterator[str]:
    """Yields a line if rounding keeps every sample of a group; a row has any number of others."""
    weighting, ratio = config.weighting, config.policy.keep_ratio
    parts = method_class(config).parts(config)
    if "selection" not in parts or weighting.unit != "sample" or ratio == 1.0:
        return
    per_micro_batch = weighting.group == "micro_batch"
    name = "micro_batch_size" if per_micro_batch else "global_batch_size"
    size = getattr(config.training, name)
    if round(ratio * size) >= size:
        yield (
            f"policy.keep_ratio {ratio}: of a group of {size} samples (training.{name}) that is "
            "all of them, so this is plain training; lower it, or weigh larger groups"
        )


def _nothing_is_profiled(config: Config, state: TrainState) -> Iterator[str]:
    profiling, step = config.profiling, state.step
    if profiling.tool != "none" and profiling.last_step <= step:
        yield (
            f"profiling.last_step {profiling.last_step}: the run is at step {step} already, so "
            "nothing is profiled"
        )
