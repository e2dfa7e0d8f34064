"""Messages of one rank on each parallel link in a step, and in an update: number and bytes.

The size of a message is that of the tensor that is reduced, gathered, scattered or sent. A ring
moves 2 (n - 1)/n of it through every rank's link for an all-reduce, (n - 1)/n for a gather or a
scatter.

    tensor    four all-reduces of [S, B, H] a layer and micro-batch, two each way; under sequence
              parallelism four gathers and four scatters, and two gathers for weight gradients; then
              the norms' gradients are reduced, once a pass (those of head norms always)
    pipeline  one [S, B, H] forward and one backward over every border; the gradient of a tied
              embedding is summed over the first and the last stage, once a pass
    context   keys and values of a layer gathered forward, their gradients scattered backward; and
              gathered again where attention is recomputed
    data      the gradients, in fp32 or bf16, once a pass; sharded: scattered, and the parameters
              gathered; a message for every model chunk, or for every bucket where they overlap with
              a pass, in the first chunk of the first stage
    weighting the weighting model's own gradient, over all ranks

The busiest stage is counted. Left out are scalars, alignments and sketches, and what the weighting
model reads: pooled vectors inside a replica or over all of them, features of an early layer (below
1 %). So are the passes over pools (weighting/pool.py), whose FLOPs cost.py counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_dwm.config import Config
from megatron_dwm.model import LlamaShape
from megatron_dwm.model.passes.micro_batches import (
    largest_micro_batch,
    probed_micro_batches,
    rows_of_replica,
)
from megatron_dwm.planning.memory import gradient_bytes, has_updates, weighting_parameters
from megatron_dwm.planning.placement import rank_parameters
from megatron_dwm.weighting import learns, method_class
from megatron_dwm.weighting.model import WeightingShape

_FP32 = 4
# Of a vocabulary-parallel loss: the largest logit, the label's, the sum of exponentials, fp32 each.
_CROSS_ENTROPY = 3


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Messages of one rank on one link.

    step, update: bytes of the messages.  step_wire, update_wire: bytes that a ring moves for them.
    step_messages, update_messages: their number.
    """

    link: str
    ranks: int
    step: float
    update: float
    step_wire: float
    update_wire: float
    step_messages: float
    update_messages: float


@dataclass(frozen=True)
class _Sent:
    """Messages of one kind: their number, and their bytes in all."""

    messages: float = 0.0
    num_bytes: float = 0.0

    def __add__(self, other: _Sent) -> _Sent:
        return _Sent(self.messages + other.messages, self.num_bytes + other.num_bytes)

    def __mul__(self, factor: float) -> _Sent:
        return _Sent(self.messages * factor, self.num_bytes * factor)


@dataclass(frozen=True)
class Pass:
    """Micro-batches of one rank's forward and backward pass, and the samples in each."""

    micro_batches: int
    samples: int


def traffic_of(
    config: Config,
    shape: LlamaShape,
    weighting: WeightingShape | None,
    world_size: int,
    *,
    on_gpu: bool,
) -> list[Traffic]:
    """Returns a line for every link. on_gpu: the layers are Transformer Engine's."""
    schedule = method_class(config).schedule(config)
    own_pass = schedule.fresh or method_class(config).aligns_first
    updates = float(has_updates(config))
    # An update may have a pass for its own g; it has that of the validation batch, and the probe,
    # which reads the batch and forms no gradient. If the direction comes ahead, the step's own pass
    # is probed.
    of_batch = updates * (1 + own_pass - schedule.ahead)
    gradients = updates * (1 + own_pass)
    phi = _FP32 * weighting_parameters(weighting)
    learning = _Sent(1, phi) * updates if phi and world_size > 1 else _Sent()
    parallel = config.parallel
    tensor, context, pipeline = parallel.tensor, parallel.context, parallel.pipeline
    batch, target = _training_pass(config, world_size), validation_pass(config, world_size)
    layers, norms = _tensor(config, shape, batch), _norms(config, shape)
    keys = _context(config, shape, batch)
    keys_in_update = keys * of_batch + _context(config, shape, target) * updates
    in_update = layers * of_batch + _tensor(config, shape, target) * updates + norms * gradients
    in_update += _probe_gathers(config, shape, batch, on_gpu=on_gpu) * updates
    tied = _tied(config, shape)
    stages = [
        (
            _pipeline(config, shape, batch, at_end=at_end) + tied * at_end,
            _pipeline(config, shape, batch, at_end=at_end) * of_batch
            + _pipeline(config, shape, target, at_end=at_end) * updates
            + tied * (gradients * at_end),
        )
        for at_end in ((True,) if pipeline <= 2 else (True, False))
    ]
    borders, over_borders = max(stages, key=lambda sent: sent[0].num_bytes)
    if schedule.num_updates and not learns(config):
        # The target is read: a forward pass, of which no gradient comes back.
        in_update = _tensor(config, shape, target, backward=False)
        over_borders = _pipeline(config, shape, target, at_end=True, backward=False)
        keys_in_update = _context(config, shape, target, backward=False)
    tensor_factor = 2 * (tensor - 1) / tensor / (2 if parallel.sequence else 1)
    return [
        _line("tensor", tensor, layers + norms, in_update, tensor_factor),
        _line("context", context, keys, keys_in_update, (context - 1) / context),
        _line("pipeline", pipeline, borders, over_borders, 1.0),
        _data_line(config, shape, world_size, updates=updates, gradients=gradients),
        _line("weighting", world_size, _Sent(), learning, 2 * (world_size - 1) / world_size),
    ]


def _training_pass(config: Config, world_size: int) -> Pass:
    return Pass(config.num_microbatches(world_size), config.training.micro_batch_size)


def validation_pass(config: Config, world_size: int) -> Pass:
    """Returns a rank's pass of a validation batch, rows without loss included (data/feed.py)."""
    parallel, largest = config.parallel, config.training.micro_batch_size
    multiple = parallel.pipeline if parallel.virtual_stages > 1 else 1
    rows = rows_of_replica(
        config.passages,
        micro_batch_size=largest,
        replicas=config.data_parallel_size(world_size),
        micro_batches_multiple=multiple,
        halves=False,
    )
    samples = largest_micro_batch(rows, largest, multiple)
    return Pass(rows // samples, samples)


def _line(link: str, ranks: int, step: _Sent, update: _Sent, factor: float) -> Traffic:
    return Traffic(
        link=link,
        ranks=ranks,
        step=step.num_bytes,
        update=update.num_bytes,
        step_wire=factor * step.num_bytes,
        update_wire=factor * update.num_bytes,
        step_messages=step.messages,
        update_messages=update.messages,
    )


def _data_line(
    config: Config, shape: LlamaShape, world_size: int, *, updates: float, gradients: float
) -> Traffic:
    """Returns the line of the link over which gradients are summed, data- and context-parallel.

    gradients: passes of an update that form some.
    """
    ranks = config.gradient_ranks(world_size)
    reduce, gather = _data(config, shape, ranks)
    sharded = config.parallel.sharded_optimizer and ranks > 1
    in_update = reduce * gradients
    # Sharded, theta' and theta are gathered, and z; ahead of the step, z alone.
    parameters = 0 if method_class(config).schedule(config).ahead else 2
    gathered = (gather * parameters + reduce) * updates if sharded else _Sent()
    one_way = (ranks - 1) / ranks
    factor = one_way if sharded else 2 * one_way
    step, update = reduce + gather, in_update + gathered
    return Traffic(
        link="data",
        ranks=ranks,
        step=step.num_bytes,
        update=update.num_bytes,
        step_wire=factor * reduce.num_bytes + one_way * gather.num_bytes,
        update_wire=factor * in_update.num_bytes + one_way * gathered.num_bytes,
        step_messages=step.messages,
        update_messages=update.messages,
    )


def _hidden(config: Config, shape: LlamaShape, run: Pass) -> _Sent:
    """Returns one message with a micro-batch's hidden states, of this rank's part of the rows."""
    return _Sent(1, float(_value_bytes(config) * _tokens(config, run) * shape.hidden_size))


def _value_bytes(config: Config) -> int:
    return 4 if config.model.precision == "fp32" else 2


def _tokens(config: Config, run: Pass) -> int:
    """Returns the tokens of a micro-batch that a context-parallel rank holds."""
    return run.samples * config.data.sequence_length // config.parallel.context


def _context(config: Config, shape: LlamaShape, run: Pass, *, backward: bool = True) -> _Sent:
    """Returns the gathers of keys and values in a pass, and the scatters of their gradients.

    Transformer Engine passes them from rank to rank instead, which moves as many bytes.
    """
    parallel = config.parallel
    if parallel.context == 1:
        return _Sent()
    width = 2 * shape.num_query_groups * shape.head_size // parallel.tensor
    tokens = run.samples * config.data.sequence_length
    message = _Sent(1, float(_value_bytes(config) * tokens * width))
    again = config.model.recompute != "none"
    times = 2 + again if backward else 1
    return message * (times * run.micro_batches * (shape.num_layers // parallel.pipeline))


def _tensor(config: Config, shape: LlamaShape, run: Pass, *, backward: bool = True) -> _Sent:
    """Returns the messages of one pass on the last stage, which is the busiest.

    It has the output layer and, if it is the only stage, the input embedding.
    """
    if config.parallel.tensor == 1:
        return _Sent()
    sequence, full = config.parallel.sequence, config.model.recompute == "full"
    layers = shape.num_layers // config.parallel.pipeline
    # Forward and backward, then the forward pass again where layers are recomputed.
    a_layer = (10 if sequence else 4) + (2 * (2 if sequence else 1) if full else 0)
    output = 3 if sequence else 1
    embedding = (2 if sequence else 1) if config.parallel.pipeline == 1 else 0
    if not backward:
        a_layer, output = (4, 1) if sequence else (2, 0)
        embedding = int(config.parallel.pipeline == 1)
    hidden = _hidden(config, shape, run) * (layers * a_layer + output + embedding)
    loss = _Sent(1, _FP32 * _tokens(config, run)) * _CROSS_ENTROPY
    if config.model.cross_entropy_loss_fusion and config.model.precision != "fp32":
        loss = _Sent(loss.messages - 1, loss.num_bytes)  # both sums are one message
    return (hidden + loss) * run.micro_batches


def _norms(config: Config, shape: LlamaShape) -> _Sent:
    """Returns the norms' gradients that are parts on every rank.

    Those of head norms always are, the others under sequence parallelism.
    """
    parallel = config.parallel
    norms = rank_parameters(shape, parallel, parallel.pipeline - 1).norms
    if not parallel.sequence:
        norms = shape.num_layers // parallel.pipeline * (shape.layer_norms - 2 * shape.hidden_size)
    return _Sent(1, gradient_bytes(config) * norms) if norms and parallel.tensor > 1 else _Sent()


def _probe_gathers(config: Config, shape: LlamaShape, run: Pass, *, on_gpu: bool) -> _Sent:
    """Returns the gathers that a probe adds to a pass under sequence parallelism.

    It gathers the output gradients of Transformer Engine's row-parallel layers, two a layer; in
    Megatron-Core's layers these are already gathered. It also gathers the inputs of column-parallel
    products, two a layer and the output layer's, and the gradient of the embedding's output: in a
    pass of its own, in place of the weight gradients that are not formed; in a training pass,
    besides them. The first stage of several has the embedding, the last the output layer.
    """
    if config.parallel.tensor == 1 or not config.parallel.sequence:
        return _Sent()
    layers = shape.num_layers // config.parallel.pipeline
    gathers, micro_batches = 2 * layers * on_gpu, run.micro_batches
    if method_class(config).schedule(config).ahead:
        gathers += 2 * layers + 1 + (config.parallel.pipeline == 1)
        micro_batches = probed_micro_batches(micro_batches, config.weighting.probe_fraction)
    return _hidden(config, shape, run) * (gathers * micro_batches)


def _tied(config: Config, shape: LlamaShape) -> _Sent:
    """Returns the gradient of an embedding that the first and the last stage hold."""
    pipeline, tensor = config.parallel.pipeline, config.parallel.tensor
    if pipeline == 1 or not shape.tied_embeddings:
        return _Sent()
    rows = shape.padded_vocab_size * shape.hidden_size // tensor
    return _Sent(1, float(gradient_bytes(config) * rows))


def _pipeline(
    config: Config, shape: LlamaShape, run: Pass, *, at_end: bool, backward: bool = True
) -> _Sent:
    """Returns what a stage sends in a pass.

    at_end: of the first or the last stage, not of one between.
    backward: False for a forward pass alone, in which the first stage of two sends.
    """
    parallel = config.parallel
    if parallel.pipeline == 1:
        return _Sent()
    part = parallel.tensor if parallel.sequence else 1
    # Two stages have one border between them for every chunk but the last, forward and backward;
    # a middle stage has one before and one behind it.
    chunks = parallel.virtual_stages
    sends = 2 * chunks - at_end
    if not backward:
        sends = chunks
    whole = _hidden(config, shape, run)
    share = _Sent(1, whole.num_bytes / part)
    return share * (run.micro_batches * sends)


def _data(config: Config, shape: LlamaShape, ranks: int) -> tuple[_Sent, _Sent]:
    """Returns (gradients reduced in a pass, parameters gathered in a step) of the largest stage.

    ranks: those that hold the same parameters. Gradients of a model chunk lie in one buffer.
    """
    if ranks == 1:
        return _Sent(), _Sent()
    stages = range(config.parallel.pipeline)
    parameters = max(rank_parameters(shape, config.parallel, stage).total for stage in stages)
    messages = _buckets(config, parameters, ranks)
    reduced = _Sent(messages, float(gradient_bytes(config) * parameters))
    if not config.parallel.sharded_optimizer:
        return reduced, _Sent()
    return reduced, _Sent(messages, float(_value_bytes(config) * parameters))


def _buckets(config: Config, parameters: int, ranks: int) -> int:
    """Returns the number of messages with the gradients of a rank with so many parameters.

    A bucket ends with the parameter that fills it, so there may be fewer where parameters are large
    beside a bucket.
    """
    parallel, chunks = config.parallel, config.parallel.virtual_stages
    if not parallel.overlap_grad_reduce:
        return chunks
    size = parallel.ddp_bucket_size or max(40_000_000, 1_000_000 * ranks)
    return chunks - 1 + math.ceil(parameters / chunks / size)
