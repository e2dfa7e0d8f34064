"""Bytes that one rank sends over each parallel link in a step, and in an update.

The size of a message is that of the tensor that is reduced, gathered, scattered or sent. A ring
moves 2 (n - 1)/n of it through every rank's link for an all-reduce, (n - 1)/n for a gather or a
scatter.

    tensor    four all-reduces of [S, B, H] a layer and micro-batch, two each way; under sequence
              parallelism four gathers and four scatters, and two gathers for weight gradients
    pipeline  one [S, B, H] forward and one backward over every border
    data      the fp32 gradients, once a pass; sharded: scattered, and the parameters gathered
    weighting the weighting model's own gradient, over all ranks

The busiest stage is counted. Scalars, norms' gradients and alignments are left out (below 1 %).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dwm.config import Config
from megatron_dwm.model import LlamaShape
from megatron_dwm.planning.memory import weighting_parameters
from megatron_dwm.planning.placement import rank_parameters
from megatron_dwm.weighting import learns
from megatron_dwm.weighting.model import WeightingShape

_FP32 = 4
# Three fp32 values a token: the largest logit, the label's, the sum of exponentials.
_CROSS_ENTROPY = 3 * _FP32


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes of one rank on one link.

    step, update: sizes of the messages.  step_wire, update_wire: bytes that a ring moves for them.
    """

    link: str
    ranks: int
    step: float
    update: float
    step_wire: float
    update_wire: float


def traffic_of(
    config: Config,
    shape: LlamaShape,
    weighting: WeightingShape | None,
    world_size: int,
    *,
    on_gpu: bool,
) -> list[Traffic]:
    """Returns a line for every link. on_gpu: the layers are Transformer Engine's."""
    fresh = config.weighting.update_on == "fresh"
    updates = float(learns(config))
    # Forward and backward passes of an update: g of its own batch, validation, probe.
    passes = updates * (3 if fresh else 2)
    tensor, pipeline = _tensor(config, shape, world_size), _pipeline(config, shape, world_size)
    probe = _probe_gathers(config, shape, world_size) if on_gpu else 0.0
    size, replicas = config.parallel.tensor, config.data_parallel_size(world_size)
    reduce, gather = _data(config, shape, replicas)
    # The probe forms no gradient; sharded, theta' and theta are gathered, and z.
    sharded = config.parallel.sharded_optimizer and replicas > 1
    update_reduce = (passes - updates) * reduce
    update_gather = updates * (2 * gather + reduce) if sharded else 0.0
    phi = updates * _FP32 * weighting_parameters(weighting) if world_size > 1 else 0.0
    tensor_factor = 2 * (size - 1) / size / (2 if config.parallel.sequence else 1)
    one_way = (replicas - 1) / replicas
    reduce_factor = one_way if sharded else 2 * one_way
    return [
        _line("tensor", size, tensor, passes * tensor + updates * probe, tensor_factor),
        _line("pipeline", config.parallel.pipeline, pipeline, passes * pipeline, 1.0),
        Traffic(
            link="data",
            ranks=replicas,
            step=reduce + gather,
            update=update_reduce + update_gather,
            step_wire=reduce_factor * reduce + one_way * gather,
            update_wire=reduce_factor * update_reduce + one_way * update_gather,
        ),
        _line("weighting", world_size, 0.0, phi, 2 * (world_size - 1) / world_size),
    ]


def _line(link: str, ranks: int, step: float, update: float, factor: float) -> Traffic:
    return Traffic(
        link=link,
        ranks=ranks,
        step=step,
        update=update,
        step_wire=factor * step,
        update_wire=factor * update,
    )


def _hidden_bytes(config: Config, shape: LlamaShape) -> float:
    """Returns the bytes of one micro-batch's hidden states, of the whole sequence."""
    value_bytes = 4 if config.model.precision == "fp32" else 2
    tokens = config.training.micro_batch_size * config.data.sequence_length
    return float(value_bytes * tokens * shape.hidden_size)


def _tensor(config: Config, shape: LlamaShape, world_size: int) -> float:
    """Returns the bytes of one step on the last stage, which is the busiest.

    It has the output layer and, if it is the only stage, the input embedding.
    """
    if config.parallel.tensor == 1:
        return 0.0
    sequence, full = config.parallel.sequence, config.model.recompute == "full"
    layers = shape.num_layers // config.parallel.pipeline
    # Forward and backward, then the forward pass again where layers are recomputed.
    a_layer = (10 if sequence else 4) + (2 * (2 if sequence else 1) if full else 0)
    output = 3 if sequence else 1
    embedding = (2 if sequence else 1) if config.parallel.pipeline == 1 else 0
    tokens = config.training.micro_batch_size * config.data.sequence_length
    hidden = (layers * a_layer + output + embedding) * _hidden_bytes(config, shape)
    return config.num_microbatches(world_size) * (hidden + tokens * _CROSS_ENTROPY)


def _probe_gathers(config: Config, shape: LlamaShape, world_size: int) -> float:
    """Returns the bytes of the gathers that a probe adds to a pass under sequence parallelism.

    The probe gathers the inputs of column-parallel products, as a weight gradient does. It also
    gathers the output gradients of Transformer Engine's row-parallel layers, two a layer; in
    Megatron-Core's layers these are already gathered.
    """
    if config.parallel.tensor == 1 or not config.parallel.sequence:
        return 0.0
    layers = shape.num_layers // config.parallel.pipeline
    return config.num_microbatches(world_size) * 2 * layers * _hidden_bytes(config, shape)


def _pipeline(config: Config, shape: LlamaShape, world_size: int) -> float:
    """Returns the bytes that a middle stage sends in a step, or either stage of two."""
    parallel = config.parallel
    if parallel.pipeline == 1:
        return 0.0
    part = parallel.tensor if parallel.sequence else 1
    # Two stages have one border between them for every chunk but the last, forward and backward;
    # a middle stage has one before and one behind it.
    chunks = parallel.virtual_stages
    sends = 2 * chunks if parallel.pipeline > 2 else 2 * chunks - 1
    return config.num_microbatches(world_size) * sends * _hidden_bytes(config, shape) / part


def _data(config: Config, shape: LlamaShape, replicas: int) -> tuple[float, float]:
    """Returns the bytes of (gradients reduced in a pass, parameters gathered in a step).

    They are those of the largest stage.
    """
    if replicas == 1:
        return 0.0, 0.0
    stages = range(config.parallel.pipeline)
    parameters = max(rank_parameters(shape, config.parallel, stage).total for stage in stages)
    value_bytes = 4 if config.model.precision == "fp32" else 2
    gathered = value_bytes * parameters if config.parallel.sharded_optimizer else 0
    return float(_FP32 * parameters), float(gathered)
