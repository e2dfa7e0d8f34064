"""Convert models between checkpoints of a run, Hugging Face directories and Megatron-LM.

%(prog)s to-hf RUN_OR_CHECKPOINT_OR_MEGATRON_DIR --output DIR
%(prog)s from-hf DIR --output CHECKPOINT
%(prog)s to-megatron RUN_OR_CHECKPOINT --output DIR
%(prog)s from-megatron DIR --output CHECKPOINT
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path
from typing import Any, NoReturn, get_args

from megatron_dwm.config.command_line import OneLineParser, run_command
from megatron_dwm.config.huggingface import read_huggingface_config
from megatron_dwm.config.schema_llm import Builder
from megatron_dwm.convert.output import require_free
from megatron_dwm.entry import quiet_upstream

_TO_HF = """
Write a checkpoint as a Hugging Face directory (safetensors, config, tokenizer, model card). The
directory is written only if the exported tokenizer gives training's ids and the exported model's
logits differ from Megatron-Core's by at most 1e-4 of the largest logit. Reads any parallel layout,
one tensor at a time. Text is encoded as in training: no beginning of sequence, and "</s>" in a text
is plain text. If training started from a Hugging Face model (model.init_from), its configuration
and tokenizer files are copied. A checkpoint of Megatron-LM or Megatron-Bridge (as in from-megatron)
can be named, too, together with its tokenizer.
"""
_FROM_HF = """
Write a Hugging Face model (Llama, such as Llama 2, Llama 3, SmolLM2 and TinyLlama; Mistral; Qwen2;
Qwen3) as a checkpoint, from which a run can start under any parallel layout (model.init_from, which
also accepts the Hugging Face directory itself). The checkpoint is written only if Megatron-Core's
logits differ from transformers' by at most 1e-4 of the largest logit.
"""
_TO_MEGATRON = """
Write the parameters of a checkpoint as Megatron-LM saves them: iter_N (--ckpt-format torch_dist)
beside latest_checkpointed_iteration.txt, with the arguments that --use-checkpoint-args takes. There
is no optimizer in it: load it with --finetune, or with --no-load-optim --no-load-rng.
"""
_FROM_MEGATRON = """
Write the parameters of a checkpoint of Megatron-LM or Megatron-Bridge (--ckpt-format torch_dist; a
model in Llama's shape) as a checkpoint, from which a run can start (model.init_from) and which
to-hf reads. DIR is the folder of latest_checkpointed_iteration.txt, or of one iteration. The shape
comes from the saved arguments (common.pt, of which no code is run) or from run_config.yaml; --shape
gives what they lack. The optimizer is left.
"""
_SKIP = "do not compare logits; the model card of to-hf says so (default: compare)"


def main() -> None:
    """Parse the arguments and convert."""
    arguments = _parser().parse_args()
    # Megatron-Core warns on import that optional GPU packages are missing.
    quiet_upstream()
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    # A model that fits in the host's memory may not fit on a GPU, and a training may be using it.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    arguments.convert(arguments)


def _to_hf(arguments: argparse.Namespace) -> None:
    require_free(arguments.output)
    # Imported here, so that --help answers at once.
    import torch

    from megatron_dwm.convert.to_hf import export_to_huggingface

    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    export = export_to_huggingface(
        arguments.checkpoint,
        arguments.output,
        tokenizer_model=arguments.tokenizer,
        dtype=dtype,
        skip_check=arguments.skip_check,
    )
    print(
        f"{export.directory}: {str(export.dtype).removeprefix('torch.')} from {export.source}; "
        f"{_ids(export.texts_compared)}, {_logits(export.logits_deviation)}"
    )


def _from_hf(arguments: argparse.Namespace) -> None:
    # Mistakes in small files are reported before torch is imported, which takes seconds.
    require_free(arguments.output)
    read_huggingface_config(arguments.directory)
    from megatron_dwm.convert.from_hf import import_from_huggingface

    found = import_from_huggingface(
        arguments.directory,
        arguments.output,
        skip_check=arguments.skip_check,
        builder=arguments.builder,
    )
    print(
        f"{found.directory}: {str(found.dtype).removeprefix('torch.')} from {found.source}; "
        f"{_logits(found.logits_deviation)}"
    )


def _from_megatron(arguments: argparse.Namespace) -> None:
    require_free(arguments.output)
    from megatron_dwm.convert.from_megatron import fields_given, import_from_megatron

    given = fields_given(arguments.shape)

    found = import_from_megatron(arguments.directory, arguments.output, given)
    print(
        f"{found.directory}: {str(found.dtype).removeprefix('torch.')} from {found.source}; "
        f"{found.shape.num_parameters():,} parameters, vocabulary {found.shape.vocab_size:,}"
    )


def _to_megatron(arguments: argparse.Namespace) -> None:
    require_free(arguments.output)
    from megatron_dwm.convert.to_megatron import export_to_megatron

    found = export_to_megatron(arguments.checkpoint, arguments.output)
    print(f"{found.directory}: {found.folder} from {found.source}")


def _ids(texts_compared: int) -> str:
    return f"ids equal on {texts_compared} texts" if texts_compared else "tokenizer files copied"


def _logits(deviation: float | None) -> str:
    if deviation is None:
        return "logits NOT compared (--skip-check)"
    return f"logits within {deviation:.1e} of the largest"


def _parser() -> OneLineParser:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(
        required=True, metavar="{to-hf,from-hf,to-megatron,from-megatron}"
    )
    to_hf = commands.add_parser("to-hf", description=_TO_HF, help="checkpoint to Hugging Face")
    to_hf.set_defaults(convert=_to_hf)
    to_hf.add_argument(
        "checkpoint",
        type=Path,
        metavar="RUN_OR_CHECKPOINT",
        help="run directory (its newest complete checkpoint), RUN/checkpoints/step_N, or a folder "
        "that Megatron-LM saved",
    )
    to_hf.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="the run's tokenizer; only checkpoints that have no copy of it need this (those of "
        "older versions and of Megatron-LM); any other tokenizer is refused (default: the "
        "checkpoint's copy, else data.tokenizer of its configuration)",
    )
    to_hf.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="data type of the exported parameters (default: the checkpoint's)",
    )
    from_hf = commands.add_parser(
        "from-hf", description=_FROM_HF, help="Hugging Face to checkpoint"
    )
    from_hf.set_defaults(convert=_from_hf)
    from_hf.add_argument("directory", type=Path, metavar="DIR", help="Hugging Face directory")
    from_hf.add_argument(
        "--builder",
        choices=get_args(Builder),
        default="gpt",
        help="Megatron-Core's class that the logits are compared with, as model.builder (default: "
        "gpt); to-hf takes the run's",
    )
    to_megatron, from_megatron = _add_megatron(commands)
    for command in (to_hf, from_hf, to_megatron, from_megatron):
        command.add_argument(
            "--output",
            type=Path,
            required=True,
            help="directory to create; it must not exist, and its parent must",
        )
        if command in (to_hf, from_hf):
            command.add_argument("--skip-check", action="store_true", help=_SKIP)
    return parser


def _add_megatron(commands: Any) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    to_megatron = commands.add_parser(
        "to-megatron", description=_TO_MEGATRON, help="checkpoint to Megatron-LM's"
    )
    to_megatron.set_defaults(convert=_to_megatron)
    to_megatron.add_argument(
        "checkpoint",
        type=Path,
        metavar="RUN_OR_CHECKPOINT",
        help="run directory (its newest complete checkpoint) or RUN/checkpoints/step_N",
    )
    from_megatron = commands.add_parser(
        "from-megatron", description=_FROM_MEGATRON, help="Megatron-LM's to checkpoint"
    )
    from_megatron.set_defaults(convert=_from_megatron)
    from_megatron.add_argument("directory", type=Path, metavar="DIR", help="what was saved")
    from_megatron.add_argument(
        "--shape",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="fields of the shape, such as vocab_size=32000 tied_embeddings=false (default: as "
        "saved)",
    )
    return to_megatron, from_megatron


def command() -> NoReturn:
    """Run the command and exit."""
    run_command(main)
