"""The gate of a conversion: equal ids and equal logits, or the output is not written.

The usual wrong exports (query rows of the wrong head, gate and up exchanged, padding kept, another
norm epsilon, a tokenizer that drops a space) all load and run. Only running both models and both
tokenizers finds them.

Cost: one forward pass of at most `GATE_TOKENS` tokens in float32 by transformers and one by
Megatron-Core, each with one layer in memory at a time; and two encodings of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron_dwm.config import RunError, UserError
from megatron_dwm.config.huggingface import CONFIG_NAME, read_json_object
from megatron_dwm.convert.checkpoint_reader import SavedLLM
from megatron_dwm.convert.huggingface import encode_with_huggingface, huggingface_logits
from megatron_dwm.convert.megatron_logits import megatron_logits
from megatron_dwm.files.command_names import name_of_command
from megatron_dwm.model.on_disk.huggingface_files import HuggingFaceModel
from megatron_dwm.tokenizer import Tokenizer

GATE_TOKENS = 128
LOGITS_TOLERANCE = 1e-4
"""Largest deviation, as a fraction of the largest logit; float32 rounding gives about 1e-6."""

AWKWARD_TEXTS = (
    "",
    " ",
    "  ",
    " leading",
    "trailing ",
    "double  spaces   and    more",
    "a" + " " * 70 + "b",
    "\ttab\t\ttabs",
    "line\nline\n\nline\r\n",
    "\u2581 the sign of a space \u2581\u2581",
    "</s>",
    "a</s>b <s> <unk> <0x41> <pad>",
    "<s>at the start, and at the end</s>",
    "0123456789 3.14159 1,000,000",
    "na\u00efve caf\u00e9 cafe\u0301 \u00a0\u2009\u3000 \ufb01 \u2460 \uff21",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b\u3061\u306f \uc548\ub155",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1ec\U0001f1e7 \u2764\ufe0f",
    "\x00\x01\x1f\x7f\u200b\ufeff\ufffd\U0010ffff",
    "aaaaaaaaaaa ababababa ------- ======= ........ ((((()))))",
    "def f(x):\n    return x ** 2  # \u2202f/\u2202x\n",
)

REAL_TEXT = (
    "When the committee met again in the autumn, the river had already risen twice above the old "
    "mark on the bridge. Nobody spoke of it at first. The clerk read the accounts, which came to "
    '$1,284.50, and asked: "Does anyone object?" A child outside was counting boats (seven, then '
    "eight), and her voice came through the window more clearly than his. Later that evening they "
    "voted, 5 to 2, to move the market up the hill; by spring the first stalls stood there, and "
    "the people who had voted against it were the first to sell."
)


class GateError(RunError):
    """The two models differ; nothing was written."""


def require_equal_ids(tokenizer: Tokenizer, directory: Path) -> int:
    """Compare the exported tokenizer's ids with training's; returns the number of texts compared.

    Of training's special tokens around a text, an export adds those before it.

    The texts are `AWKWARD_TEXTS`, `REAL_TEXT`, and every piece of the vocabulary, once between two
    letters and once at the start of a text. Raises `UserError` at the first difference: the
    tokenizer is then of a kind that tokenizer_files.py, or the model's class, cannot express.
    """
    texts = [*AWKWARD_TEXTS, REAL_TEXT, *_texts_of_pieces(tokenizer)]
    for text, ids in zip(texts, encode_with_huggingface(directory, texts), strict=True):
        expected = [*tokenizer.around.before, *tokenizer.encode(text)]
        if ids != expected:
            raise UserError(
                f"{tokenizer.model_path}: cannot be written as a Hugging Face tokenizer with the "
                f"same ids (text {text[:40]!r} gives {ids[:12]} instead of {expected[:12]}); "
                f"{_what_fits(directory)}"
            )
    return len(texts)


def _what_fits(directory: Path) -> str:
    """Returns which tokenizer an export can have."""
    config = directory / CONFIG_NAME
    if config.is_file() and read_json_object(config).get("model_type") == "qwen2":
        return (
            "transformers takes a tokenizer of Qwen's kind for every Qwen2 model, whatever its "
            "files say: train with a tokenizer.json of that kind, or without model.add_qkv_bias"
        )
    return (
        "expected a SentencePiece BPE model with the layout of Llama 2's: train one with "
        f"{name_of_command('tokenizer')}"
    )


def gives_same_ids(one: Tokenizer, other: Tokenizer) -> bool:
    """True if two tokenizers give equal ids on the texts of `require_equal_ids`."""
    if one.vocab_size != other.vocab_size:
        return False
    texts = [*AWKWARD_TEXTS, REAL_TEXT, *_texts_of_pieces(one)]
    return all(one.encode(text) == other.encode(text) for text in texts)


def _texts_of_pieces(tokenizer: Tokenizer) -> list[str]:
    texts = [piece.text.replace("\u2581", " ") for piece in tokenizer.pieces()]
    return [f"x{text}x" for text in texts] + texts


def require_equal_logits(
    saved: SavedLLM, source: HuggingFaceModel, tokens_BS: Tensor, dtype: torch.dtype
) -> float:
    """Compare Megatron-Core's logits of a checkpoint with those of a Hugging Face model.

    Returns the largest deviation as a fraction of the largest logit. `dtype` is the data type of
    the converted parameters: Megatron-Core's are rounded to it, and both models then compute in
    float32. Raises `GateError` above `LOGITS_TOLERANCE`.
    """
    found_BSV = huggingface_logits(source, tokens_BS)
    expected_BSV = megatron_logits(saved, tokens_BS, dtype)
    deviation = relative_deviation(found_BSV, expected_BSV)
    # Written so that a NaN fails.
    if not deviation <= LOGITS_TOLERANCE:
        raise GateError(
            f"the logits of the two models differ by {deviation:.1e} of the largest logit (at most "
            f"{LOGITS_TOLERANCE:.0e} expected); nothing was written; please report it"
        )
    return deviation


def gate_tokens(
    encode: Callable[[str], list[int]], separator: int | None, context_tokens: int
) -> Tensor:
    """Returns [1, S] tokens: real and awkward texts, packed as in training, S at most GATE_TOKENS.

    separator: token after every text, the end of a document; None adds nothing.
    """
    end = [] if separator is None else [separator]
    packed = [token for text in (REAL_TEXT, *AWKWARD_TEXTS) for token in (*encode(text), *end)]
    return torch.tensor([packed[: min(context_tokens, GATE_TOKENS)]])


def relative_deviation(found: Tensor, expected: Tensor) -> float:
    """Returns the largest difference as a fraction of the largest expected value."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return ((found - expected).abs().max() / expected.abs().max()).item()
