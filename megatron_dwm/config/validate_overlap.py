"""Rules about messages that overlap with computation."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_dwm.config.schema import Config


def overlap_problems(config: Config, world_size: int) -> Iterator[str]:
    """Yields a line for every rule that the run breaks. world_size: number of processes."""
    parallel = config.parallel
    if parallel.overlap_param_gather and not parallel.sharded_optimizer:
        yield (
            "parallel.overlap_param_gather: expected parallel.sharded_optimizer true, as in "
            "Megatron: without it every replica steps all parameters and gathers none"
        )
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield (
            "parallel.overlap_param_gather: expected parallel.overlap_grad_reduce true, as in "
            "Megatron"
        )
    if parallel.tp_comm_overlap:
        yield from _tensor_overlap(config, world_size)


def _tensor_overlap(config: Config, world_size: int) -> Iterator[str]:
    """Transformer Engine's buffers are made for the tokens of one size of micro-batch."""
    if config.model.fp8_emulation:
        yield (
            "parallel.tp_comm_overlap: model.fp8_emulation is for Megatron-Core's own layers, and "
            "the overlap for Transformer Engine's; leave out one of the two"
        )
    if config.model.precision == "fp8" and config.model.fp8_recipe == "blockwise":
        yield (
            "parallel.tp_comm_overlap: Transformer Engine has no buffers for model.fp8_recipe "
            "blockwise; use another recipe, or leave it out"
        )
    rows = config.training.micro_batch_size * config.data_parallel_size(world_size)
    if config.passages % rows:
        yield (
            f"parallel.tp_comm_overlap: expected a validation batch of a multiple of "
            f"training.micro_batch_size x {config.data_parallel_size(world_size)} data-parallel "
            f"replicas = {rows}, got {config.passages}; change validation.batch_size"
        )
