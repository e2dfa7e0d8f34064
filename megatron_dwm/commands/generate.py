"""Sample text from a Hugging Face model directory with transformers.

%(prog)s --model DIR --prompt "Once upon a time" "The river"

Prints each prompt with its continuation. Prompts are encoded as in training; an empty prompt ("")
is the start of a document. A warning names prompts that do not fit in the model's context.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import NoReturn

from megatron_dwm.config import UserError
from megatron_dwm.config.command_line import OneLineParser, run_command
from megatron_dwm.config.printing import printable
from megatron_dwm.files.command_names import name_of_command

# Line breaks and tabs, and the joiners that emoji and several scripts are written with.
_IN_TEXT = "\n\t\u200c\u200d"


def main() -> None:
    """Parse the arguments, sample, print."""
    arguments = _parser().parse_args()
    if not (arguments.model / "config.json").is_file():
        raise UserError(
            f"--model {arguments.model}: not a Hugging Face model directory (config.json); make "
            f"one with {name_of_command('convert')} to-hf"
        )
    _require_text(arguments.prompt)
    if not 0.0 < arguments.top_p <= 1.0:
        raise UserError(f"--top-p {arguments.top_p}: expected above 0, at most 1")
    # Megatron-Core warns on import that optional GPU packages are missing.
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    # Imported here, so that --help and mistakes are answered at once.
    from megatron_dwm.convert.huggingface import generate_text

    texts = generate_text(
        arguments.model,
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    for number, text in enumerate(texts, start=1):
        print(f"--- {number}\n{printable(text, keep=_IN_TEXT)}")


def _require_text(prompts: list[str]) -> None:
    """Raise `UserError` for a prompt that is not UTF-8; Python keeps its bytes as surrogates."""
    for number, prompt in enumerate(prompts, start=1):
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            found = prompt[error.start].encode("utf-8", "surrogateescape").hex()
            raise UserError(
                f"--prompt: text {number} is not UTF-8 (byte 0x{found} after {error.start} "
                "characters); write it in UTF-8"
            ) from None


def _parser() -> OneLineParser:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="Hugging Face directory")
    add(
        "--prompt",
        nargs="+",
        required=True,
        metavar="TEXT",
        help="prompts, in UTF-8; one sample each",
    )
    add(
        "--max-new-tokens",
        type=_number(int, 1),
        default=64,
        metavar="N",
        help="longest continuation, in tokens (default: 64)",
    )
    add(
        "--temperature",
        type=_number(float, 0),
        default=0.8,
        metavar="T",
        help="divides the logits; 0 always takes the most likely token (default: 0.8)",
    )
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the most likely tokens that together have this probability (default: 1)",
    )
    add(
        "--seed",
        type=_number(int, 0),
        default=1234,
        metavar="N",
        help="seed of the sampling (default: 1234)",
    )
    return parser


def _number(kind: type, smallest: int) -> type:
    def number(text: str) -> float:
        value = kind(text)
        if not smallest <= value < float("inf"):
            raise ValueError
        return value

    number.__name__ = f"number from {smallest}"
    return number  # type: ignore[return-value]


def command() -> NoReturn:
    """Run the command and exit."""
    run_command(main)
