"""Compares the tokenizer that a sidecar records with the tokenizer of a run.

Two tokenizers with equal files may produce different documents: the end-of-document id is
configured outside of tokenizer.json, and documents may or may not have special tokens around their
text (such as Llama 3's beginning of text; data/special_tokens.py). Validation and held-out text
gets the same special tokens as the training data.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dwm.config.errors import UserError
from megatron_dwm.files.sidecar_format import (
    EOD_ID,
    Facts,
    lacks_end,
    special_tokens,
    spell_ids,
)
from megatron_dwm.runtime import rank_from_environment

if TYPE_CHECKING:
    from megatron_dwm.tokenizer import Tokenizer


def check_record(recorded: Facts, sidecar: Path, tokenizer: Tokenizer) -> None:
    """Check the end-of-document id and the special tokens that `sidecar` records.

    Raises:
        UserError: they differ from those of `tokenizer`.
    """
    end = recorded.get(EOD_ID)
    if end is None:
        if lacks_end(recorded) and rank_from_environment() == 0:
            print(
                f"warning: {sidecar} does not say which id ends a document (it was written by an "
                f"older version); taken to be {tokenizer.eod_id}, as data.tokenizer has it",
                file=sys.stderr,
                flush=True,
            )
    elif end != str(tokenizer.eod_id):
        raise UserError(
            f"{sidecar} says that id {end} ends a document, but with data.tokenizer "
            f"{tokenizer.model_path} it is {tokenizer.eod_id}: use the same eos_token"
        )
    found = special_tokens(recorded)
    own = spell_ids(tokenizer.around.before), spell_ids(tokenizer.around.after)
    if found != own:
        raise UserError(
            f"{sidecar} says that its documents have special tokens {_spell(found)}, but they "
            f"would be {_spell(own)} with data.tokenizer {tokenizer.model_path} and the other "
            "data.train: preprocess all with the same tokenizer and the same of "
            "--tokenizer-hf-include-special-tokens and --tokenizer-hf-no-include-special-tokens"
        )


def _spell(tokens: tuple[str, str]) -> str:
    before, after = (f"[{ids}]" if ids else "none" for ids in tokens)
    return f"(before the text {before}, after it {after})"
