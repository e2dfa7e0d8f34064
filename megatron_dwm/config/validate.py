"""Combinations of keys that cannot work, found before any process group exists.

Each check is one rule between keys, with the message for a violation. The bound of a single number
is next to its key, in the schema; the rules of a method are in its file, in weighting/.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

from megatron_dwm.config.errors import UserError
from megatron_dwm.config.key import number_problems
from megatron_dwm.config.names import known_keys, nearest_key
from megatron_dwm.config.schema import Config
from megatron_dwm.config.schema_llm import ParallelConfig
from megatron_dwm.config.validate_overlap import overlap_problems
from megatron_dwm.config.validate_profiling import profiling_problems
from megatron_dwm.config.validate_schedule import schedule_problems

# Properties of a run that several keys decide together: the model's shape.
_FINGERPRINTS = ("model",)


class Heads(NamedTuple):
    """Sizes of the model that are divided over processes."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    padded_vocab_size: int
    ffn_hidden_size: int
    head_dim: int | None = None
    has_qk_layernorm: bool = False
    has_qkv_bias: bool = False


def validate_config(config: Config, shape: Heads, world_size: int) -> None:
    """Raise UserError for the first rule that the run breaks.

    shape: sizes of the resolved model. world_size: number of processes.
    """
    for problem in _problems(config, shape, world_size):
        raise UserError(problem)


def validate_layout(config: Config, shape: Heads, world_size: int) -> None:
    """Check only the rules about sizes and processes, for commands that read no data."""
    for problem in _layout_problems(config, shape, world_size):
        raise UserError(problem)


def validate_options(config: Config, shape: Heads, world_size: int) -> None:
    """Check only the rules about FP8 and profiling, for the doctor, which has its own sizes."""
    problems = (
        _fp8(config, shape),
        profiling_problems(config, world_size),
    )
    for problem in chain(*problems):
        raise UserError(problem)


def _problems(config: Config, shape: Heads, world_size: int) -> Iterator[str]:
    yield from _layout_problems(config, shape, world_size)
    yield from _allowed_changes(config)
    yield from _data(config)
    yield from profiling_problems(config, world_size)


def _layout_problems(config: Config, shape: Heads, world_size: int) -> Iterator[str]:
    yield from number_problems(config)
    yield from _model(shape)
    yield from _fp8(config, shape)
    yield from _layout(config, shape, world_size)
    yield from overlap_problems(config, world_size)
    yield from _pipeline(config, shape, world_size)
    yield from _batches(config, world_size)


def _data(config: Config) -> Iterator[str]:
    if not config.data.train:
        yield "data.train: expected at least one prefix of indexed files, got none"
    if config.data.tokenizer is None:
        yield "data.tokenizer: expected the tokenizer model that the data was tokenized with"
    yield from schedule_problems(config)


def _allowed_changes(config: Config) -> Iterator[str]:
    """Check the names: a misspelled one allows nothing, and a new run would not notice."""
    for name in config.run.allow_changed:
        if name not in known_keys() and name not in _FINGERPRINTS:
            yield f"run.allow_changed {name}: no such key; the nearest is {nearest_key(name)}"


def _model(shape: Heads) -> Iterator[str]:
    pairs = "rotary embeddings turn pairs of a head's values"
    if shape.head_dim is not None and shape.head_dim % 2:
        yield f"model.kv_channels {shape.head_dim}: expected an even number: {pairs}"
    if shape.head_dim is None and shape.hidden_size % (2 * shape.num_attention_heads):
        yield (
            f"model.hidden_size {shape.hidden_size}: expected a multiple of twice "
            f"model.num_attention_heads, {2 * shape.num_attention_heads}: {pairs}"
        )
    if shape.has_qk_layernorm and shape.has_qkv_bias:
        yield (
            "model.add_qkv_bias: not with model.qk_layernorm: no model of Hugging Face has both, "
            "so this one could not be exported; leave out one of the two"
        )


def _fp8(config: Config, shape: Heads) -> Iterator[str]:
    model = config.model
    if not model.uses_fp8:
        return
    if model.fp8_first_last_bf16 and model.fp8_recipe == "delayed":
        yield (
            "model.fp8_first_last_bf16: not with model.fp8_recipe delayed, whose maxima are "
            "collected over all layers at once; use tensorwise, blockwise or mxfp8"
        )
    if model.fp8_first_last_bf16 and shape.num_layers <= 2:
        yield (
            f"model.fp8_first_last_bf16: expected more than 2 layers, got {shape.num_layers}: "
            "nothing would be left in FP8"
        )
    if model.fp8_emulation and model.fp8_recipe != "tensorwise":
        yield (
            f"model.fp8_recipe {model.fp8_recipe}: model.fp8_emulation has tensorwise only; leave "
            "out one of the two"
        )
    if model.precision == "fp8" and not model.fp8_emulation:
        yield from _fp8_sizes(config, shape)


# Transformer Engine's products need every dimension in multiples of these.
_FP8_MULTIPLES = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}


def _fp8_sizes(config: Config, shape: Heads) -> Iterator[str]:
    multiple = _FP8_MULTIPLES[config.model.fp8_recipe]
    context = config.parallel.context
    tokens = config.training.micro_batch_size * config.data.sequence_length // context
    all_tokens = "training.micro_batch_size x data.sequence_length"
    width = shape.head_dim or shape.hidden_size // shape.num_attention_heads
    queries = width * shape.num_attention_heads // config.parallel.tensor
    sizes = {
        "model.hidden_size / parallel.tensor": shape.hidden_size // config.parallel.tensor,
        "model.kv_channels x model.num_attention_heads / parallel.tensor": queries,
        "model.ffn_hidden_size / parallel.tensor": shape.ffn_hidden_size // config.parallel.tensor,
        all_tokens + (" / parallel.context" if context > 1 else ""): tokens,
    }
    for what, size in sizes.items():
        if size % multiple:
            yield (
                f"model.precision fp8: expected {what} to be a multiple of {multiple} "
                f"(model.fp8_recipe {config.model.fp8_recipe}), got {size}"
            )


def _layout(config: Config, shape: Heads, world_size: int) -> Iterator[str]:
    parallel = config.parallel
    tensor = parallel.tensor
    if world_size % config.parallel.model_size:
        yield (
            f"{layout_of(parallel)}: expected to divide the number of processes, which is "
            f"{world_size}; start another number (torchrun's --nproc-per-node; under Slurm --nodes "
            "and DWM_RANKS_PER_NODE)"
        )
    for name, value in (
        ("model.num_attention_heads", shape.num_attention_heads),
        ("model.num_query_groups", shape.num_query_groups),
        ("the padded vocabulary", shape.padded_vocab_size),
        ("model.ffn_hidden_size", shape.ffn_hidden_size),
    ):
        if value % tensor:
            yield f"parallel.tensor {tensor}: expected to divide {name}, which is {value}"
    if shape.num_attention_heads % shape.num_query_groups:
        yield (
            f"model.num_query_groups {shape.num_query_groups}: expected to divide "
            f"model.num_attention_heads, which is {shape.num_attention_heads}"
        )
    yield from length_problems(config, "data.sequence_length", config.data.sequence_length)
    if parallel.sequence and tensor == 1:
        yield "parallel.sequence: expected parallel.tensor above 1, got 1"


def layout_of(parallel: ParallelConfig) -> str:
    """Returns the factors of a replica's processes, for a message."""
    context = f" x parallel.context {parallel.context}" if parallel.context > 1 else ""
    return f"parallel.tensor {parallel.tensor}{context} x parallel.pipeline {parallel.pipeline}"


def length_problems(config: Config, what: str, tokens: int) -> Iterator[str]:
    """Yields a line for every rule that rows of `tokens` break, a length that `what` sets."""
    tensor, context = config.parallel.tensor, config.parallel.context
    if context > 1 and tokens % (2 * context):
        yield (
            f"parallel.context {context}: expected {what} to be a multiple of 2 x "
            f"{context} = {2 * context}, because every process has two slices of a sample; it is "
            f"{tokens}"
        )
    elif config.parallel.sequence and (tokens // context) % tensor:
        share = f" / parallel.context {context}" if context > 1 else ""
        yield (
            f"parallel.sequence: expected parallel.tensor {tensor} to divide "
            f"{what}{share}, which is {tokens // context}"
        )


def _pipeline(config: Config, shape: Heads, world_size: int) -> Iterator[str]:
    pipeline = config.parallel.pipeline
    chunks = pipeline * config.parallel.virtual_stages
    if shape.num_layers % chunks:
        yield (
            f"parallel.pipeline {pipeline} x parallel.virtual_stages "
            f"{config.parallel.virtual_stages}: expected to divide model.num_layers, "
            f"which is {shape.num_layers}"
        )
    if config.parallel.virtual_stages > 1:
        if pipeline == 1:
            yield "parallel.virtual_stages: expected parallel.pipeline above 1, got 1"
        elif config.num_microbatches(world_size) % pipeline:
            yield (
                f"parallel.virtual_stages: expected a multiple of parallel.pipeline {pipeline} "
                f"micro-batches, got {config.num_microbatches(world_size)}; change "
                "training.global_batch_size or training.micro_batch_size"
            )


def _batches(config: Config, world_size: int) -> Iterator[str]:
    training = config.training
    replicas = config.data_parallel_size(world_size)
    rows = training.micro_batch_size * replicas
    if training.global_batch_size % rows:
        yield (
            f"training.global_batch_size {training.global_batch_size}: expected a multiple of "
            f"training.micro_batch_size {training.micro_batch_size} x {replicas} data-parallel "
            f"replicas = {rows}"
        )
