"""Convert checkpoints: python tools/convert_checkpoint.py to-hf RUN_OR_CHECKPOINT --output DIR."""

from __future__ import annotations

import argparse
import warnings

from megatron_dwm.config.command_line import run_command

_TO_HF = """
Write a checkpoint as a Hugging Face directory (safetensors, config, tokenizer). The directory gets
its name only when the exported tokenizer gives training's ids and the exported model's logits are
within 1e-4 of the largest logit of Megatron-Core's own model. Works for any parallel layout.
Text is encoded as in training: no beginning of sequence, and "</s>" in a text is plain text.
"""


def main() -> None:
    """Parse the arguments and convert."""
    arguments = _parser().parse_args()
    # Megatron-Core warns on import that optional GPU packages are missing.
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    # Imported here, so that --help answers at once.
    import torch

    from megatron_dwm.convert.to_hf import export_to_huggingface

    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    export = export_to_huggingface(
        arguments.checkpoint, arguments.output, tokenizer_model=arguments.tokenizer, dtype=dtype
    )
    print(
        f"{export.directory}: {str(export.dtype).removeprefix('torch.')} from {export.source}; "
        f"ids equal on {export.texts_compared} texts, logits within "
        f"{export.logits_deviation:.1e} of the largest"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    to_hf = commands.add_parser("to-hf", description=_TO_HF, help="ours to Hugging Face")
    to_hf.add_argument(
        "checkpoint",
        metavar="RUN_OR_CHECKPOINT",
        help="run directory (its newest checkpoint is taken) or RUN/checkpoints/step_N",
    )
    to_hf.add_argument("--output", required=True, help="directory to create; must not exist")
    to_hf.add_argument(
        "--tokenizer",
        metavar="M.model",
        help="SentencePiece model of the run (default: data.tokenizer of its configuration)",
    )
    to_hf.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="type the parameters are kept in (default: the checkpoint's)",
    )
    return parser


if __name__ == "__main__":
    run_command(main)
