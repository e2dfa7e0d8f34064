"""Measure what things cost: tools/benchmark.py COMMAND ..., see --help.

Every figure is a ratio of two things timed in turn in one run, on random tokens. Run it plainly for
one process, or with torchrun for several. Set OMP_NUM_THREADS to fix the threads of a process.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
import warnings
from pathlib import Path

from benchmarks.settings import Settings

from megatron_dwm.config.command_line import OneLineParser, run_command
from megatron_dwm.config.errors import UserError
from megatron_dwm.launch import find_launch

# torchrun ends the other processes as soon as one leaves; the others let the main one speak first.
_OTHERS_WAIT_S = 5.0
_STEP = "One LLM step of ours against plain Megatron-Core's on the same model and batch."
_HYPERGRADIENT = """
One weighting update's hypergradient against a plain training step: time, whole and in parts; peak
memory (one process); messages sent (several processes). The validation batch is as large as the
training batch.
"""
_CHECKPOINT = "A checkpoint, and an asynchronous one, against torch.save of the same tensors."
_PREPROCESS = "Preprocessing against gigatoken alone and a pool of SentencePiece workers; merge."
_BORDERS = """
Attention inside documents against plain causal attention: time and peak memory, of an LLM's forward
and backward pass and of attention alone. One process; the micro-batch is the batch.
"""
_CONVERT = "to-hf against copying the checkpoint's files; its peak memory."


def main() -> None:
    """Parse the arguments, check the sizes, measure, print."""
    launch = find_launch(os.environ)
    try:
        arguments = _parser().parse_args()
        if arguments.command == "convert":
            _measure_conversion(arguments)
            return
        if arguments.command == "preprocess":
            _measure_preprocessing(arguments)
            return
        settings = _settings(arguments)
        if arguments.command == "borders" and launch.world_size > 1:
            raise UserError("borders: runs in one process, got torchrun's; start it with python")
        settings.check(launch.world_size)
    except UserError:
        if launch.rank == 0:
            raise
        time.sleep(_OTHERS_WAIT_S)
        sys.exit(2)
    # Megatron-Core prints this on import on every machine without its optional packages.
    warnings.filterwarnings("ignore", message=".*(Apex|apex) (is|are) not installed.*")
    # Imported here, so that --help and mistakes answer at once.
    if arguments.command == "step":
        from benchmarks.steps import measure_steps

        measure_steps(settings)
    elif arguments.command == "checkpoint":
        from benchmarks.checkpoint import measure_checkpoints

        measure_checkpoints(settings)
    elif arguments.command == "borders":
        from benchmarks.borders import measure_borders

        measure_borders(settings, memory_repeats=arguments.memory_repeats)
    else:
        from benchmarks.updates import measure_updates

        measure_updates(settings, memory_repeats=arguments.memory_repeats)


def _measure_conversion(arguments: argparse.Namespace) -> None:
    from benchmarks.convert import measure_conversion

    measure_conversion(
        preset=arguments.preset, checkpoint=arguments.checkpoint, rounds=arguments.rounds
    )


def _measure_preprocessing(arguments: argparse.Namespace) -> None:
    for path in (arguments.input, arguments.tokenizer_model):
        if not path.is_file():
            raise UserError(f"{path}: no such file")
    from benchmarks.preprocess import measure_preprocessing

    measure_preprocessing(
        arguments.input,
        arguments.tokenizer_model,
        size_mb=arguments.size_mb,
        rounds=arguments.rounds,
        workers=arguments.workers,
        pool_mb=arguments.pool_mb,
    )


def _settings(arguments: argparse.Namespace) -> Settings:
    if arguments.command == "borders":
        arguments.batch = arguments.micro_batch
    values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Settings)}
    if values["query_groups"] is None:
        values["query_groups"] = values["heads"]
    return Settings(**values)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("step", _STEP),
        ("hypergradient", _HYPERGRADIENT),
        ("checkpoint", _CHECKPOINT),
    ):
        command = commands.add_parser(name, help=text.split(":")[0].strip(), description=text)
        _add_sizes(command)
        _add_layout(command)
        if name == "hypergradient":
            _add_memory_repeats(command)
    _add_borders(commands)
    convert = commands.add_parser("convert", help=_CONVERT, description=_CONVERT)
    presets = ("tiny", "llama-370m", "llama-1.3b")
    convert.add_argument(
        "--preset",
        choices=presets,
        default="llama-370m",
        help="shape of the random model (default: llama-370m)",
    )
    convert.add_argument(
        "--checkpoint", type=Path, metavar="RUN_OR_CHECKPOINT", help="measure this one instead"
    )
    convert.add_argument(
        "--rounds",
        type=_from(1),
        default=3,
        metavar="N",
        help="copies and conversions (default: 3)",
    )
    _add_preprocess(commands)
    return parser


def _add_preprocess(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("preprocess", help=_PREPROCESS, description=_PREPROCESS)
    add = command.add_argument
    add("--input", type=Path, required=True, metavar="FILE", help="JSON Lines to repeat")
    add("--tokenizer-model", type=Path, required=True, metavar="M", help="SentencePiece model")
    for flag, default, text in (
        ("--size-mb", 300, "MB (1024^2) that the input is repeated to"),
        ("--pool-mb", 30, "MB (1024^2) of it for the pool of workers"),
        ("--rounds", 5, "times that everything is measured, in turn"),
        ("--workers", 2, "threads, or processes of the pool"),
    ):
        text = f"{text} (default: {default})"
        add(flag, type=_from(1), default=default, metavar="N", help=text)


def _add_borders(commands: argparse._SubParsersAction) -> None:
    text = _BORDERS.split(":")[0].strip()
    command = commands.add_parser("borders", help=text, description=_BORDERS)
    _add_sizes(command, sequence=1024, batch=8, several_micro_batches=False)
    _add_memory_repeats(command)
    command.set_defaults(
        tensor=1,
        context=1,
        pipeline=1,
        virtual_stages=1,
        sequence_parallel=False,
        sharded_optimizer=False,
    )


def _add_memory_repeats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory-repeats",
        type=_from(0),
        default=3,
        metavar="N",
        help="processes started for each peak of memory; 0 leaves memory out (default: 3)",
    )


def _add_sizes(
    parser: argparse.ArgumentParser,
    *,
    sequence: int = 128,
    batch: int = 16,
    several_micro_batches: bool = True,
) -> None:
    def add(flag: str, default: int, text: str) -> None:
        parser.add_argument(
            flag, type=_from(1), default=default, metavar="N", help=f"{text} (default: {default})"
        )

    add("--layers", 6, "transformer layers")
    add("--hidden", 256, "width of the residual stream")
    add("--heads", 4, "query heads")
    parser.add_argument(
        "--query-groups", type=_from(1), metavar="N", help="key-value heads (default: --heads)"
    )
    add("--ffn", 704, "inner width of the SwiGLU block")
    add("--vocab", 1024, "pieces in the vocabulary")
    add("--sequence", sequence, "tokens in a sample")
    if several_micro_batches:
        add("--batch", batch, "samples in one optimizer step, over all processes")
    add("--micro-batch", batch, "samples in one forward pass of one process")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp8"),
        default="fp32",
        help="arithmetic of parameters and activations; fp8 needs a GPU and Transformer Engine "
        "(default: fp32)",
    )
    add("--repeats", 20, "counted rounds, each of which times everything once")
    add("--warm-up", 3, "rounds before them that are not counted")


def _add_layout(parser: argparse.ArgumentParser) -> None:
    def add(flag: str, text: str) -> None:
        parser.add_argument(
            flag, type=_from(1), default=1, metavar="N", help=f"{text} (default: 1)"
        )

    add("--tensor", "tensor-parallel size, processes")
    add("--context", "context-parallel size, processes")
    add("--pipeline", "pipeline-parallel size, processes")
    add("--virtual-stages", "model chunks on every pipeline stage")
    parser.add_argument(
        "--sequence-parallel",
        action="store_true",
        help="sequence parallelism inside the tensor-parallel group (default: off)",
    )
    parser.add_argument(
        "--sharded-optimizer",
        action="store_true",
        help="shard the optimizer's state over the ranks with the same parameters (default: off)",
    )


def _from(smallest: int) -> type[int]:
    def number(text: str) -> int:
        if int(text) < smallest:
            raise ValueError
        return int(text)

    number.__name__ = f"whole number from {smallest}"
    return number  # type: ignore[return-value]


if __name__ == "__main__":
    run_command(main)
