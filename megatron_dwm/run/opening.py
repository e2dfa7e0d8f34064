"""The lines that a run prints before its first step: what is trained, how, and where files are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_dwm.config import Config
from megatron_dwm.run.inputs import RunInputs
from megatron_dwm.run.job import Job
from megatron_dwm.runtime import Runtime


def opening_lines(
    config: Config, job: Job, inputs: RunInputs, runtime: Runtime, newest: Path | None
) -> Iterator[str]:
    """Yields the lines. newest: the checkpoint that the run goes on from."""
    yield _model(config, inputs)
    yield _layout(config, runtime)
    yield from _work(config, job)
    yield f"files: {config.run.dir}"
    if newest is not None:
        yield f"resumed from {newest.name}: step {job.state.step}, update {job.state.updates}"
    elif config.run.resume:
        yield f"no checkpoint in {config.run.dir}: starts from step 0"


def _model(config: Config, inputs: RunInputs) -> str:
    shape = inputs.shape
    return (
        f"model: {shape.num_parameters():,} parameters, {shape.num_layers} layers of width "
        f"{shape.hidden_size}, vocabulary {shape.vocab_size:,}, {config.model.precision}; "
        f"policy {config.policy.name}"
    )


def _layout(config: Config, runtime: Runtime) -> str:
    sizes = {
        "tensor": runtime.tensor_size,
        "context": runtime.context_size,
        "pipeline": runtime.pipeline_size,
        "data": runtime.data_size,
    }
    processes = "1 process" if runtime.world_size == 1 else f"{runtime.world_size} processes"
    product = " x ".join(f"{name} {size}" for name, size in sizes.items())
    sharded = ", sharded optimizer" if config.parallel.sharded_optimizer else ""
    return f"layout: {processes} on {runtime.device.type}, {product}{sharded}"


def _work(config: Config, job: Job) -> Iterator[str]:
    """Yields lines about a step and about the whole run."""
    training, length = config.training, config.data.sequence_length
    rows = training.global_batch_size
    yield (
        f"a step: {rows} rows of {length:,} tokens in micro-batches of "
        f"{training.micro_batch_size}, {rows * length:,} tokens, {job.costs.llm_step:.3g} FLOPs"
    )
    updates = job.schedule.num_updates
    each = f" of {job.costs.update:.3g} FLOPs each" if updates else ""
    stages = len(job.schedule.borders)
    inside = f" in {stages} stages" if stages > 1 else ""
    yield (
        f"the run: {training.steps:,} steps{inside}, {training.steps * rows * length:,} tokens, "
        f"{updates:,} weighting updates{each}"
    )
