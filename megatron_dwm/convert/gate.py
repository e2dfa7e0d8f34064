"""What an export has to pass before it gets its name: equal ids and equal logits.

The wrong exports that people meet (query rows of the wrong head, gate and up exchanged, padding
kept, another norm epsilon, a tokenizer that drops a space) all load and run. They are caught only
by running both models and both tokenizers.

Cost: one forward pass of a few hundred tokens in float32 by transformers and one by Megatron-Core,
one after the other, each with the whole model in memory (Megatron's with its gradient buffers
besides: 8 bytes a parameter); and two encodings of the vocabulary.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_dwm.config import ModelConfig, ParallelConfig, UserError
from megatron_dwm.convert.checkpoint_reader import MODEL_PREFIX, SavedLLM
from megatron_dwm.convert.huggingface import encode_with_huggingface, huggingface_logits
from megatron_dwm.model import build_llm
from megatron_dwm.runtime import bring_up
from megatron_dwm.tokenizer import Tokenizer

LOGITS_TOLERANCE = 1e-4
"""Largest deviation, as a fraction of the largest logit; float32 rounding gives some 1e-6."""

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


class GateError(RuntimeError):
    """The export is wrong; nothing was written."""


def require_equal_ids(tokenizer: Tokenizer, directory: Path) -> int:
    """Compare the ids of the exported tokenizer with training's; the number of texts compared.

    The texts are awkward ones, real text, and every piece of the vocabulary between two letters
    and at the start of a text. Raises `UserError` at the first difference: the SentencePiece
    model is of a kind that tokenizer_files.py cannot express.
    """
    texts = [*AWKWARD_TEXTS, REAL_TEXT, *_texts_of_pieces(tokenizer)]
    for text, ids in zip(texts, encode_with_huggingface(directory, texts), strict=True):
        expected = tokenizer.encode(text)
        if ids != expected:
            raise UserError(
                f"{tokenizer.model_path}: cannot be written as a Hugging Face tokenizer with the "
                f"same ids (text {text[:40]!r} gives {ids[:12]} instead of {expected[:12]}); "
                "only BPE models laid out as Llama 2's can: train one with train_tokenizer.py"
            )
    return len(texts)


def _texts_of_pieces(tokenizer: Tokenizer) -> list[str]:
    words = [piece.text.replace("\u2581", " ") for piece in tokenizer.pieces()]
    return [f"x{word}x" for word in words] + words


def require_equal_logits(
    saved: SavedLLM, tokenizer: Tokenizer, directory: Path, dtype: torch.dtype
) -> float:
    """Compare the exported model's logits with Megatron's; the deviation found.

    `dtype` is what the export keeps parameters in: Megatron's are rounded to it, and both models
    then compute in float32. The deviation is a fraction of the largest logit. Raises `GateError`
    above `LOGITS_TOLERANCE`.
    """
    tokens_BS = gate_tokens(tokenizer, saved.sequence_length)
    found_BSV = huggingface_logits(directory, tokens_BS)
    expected_BSV = megatron_logits(saved, tokens_BS, dtype)
    deviation = relative_deviation(found_BSV, expected_BSV)
    # Written so that a NaN fails.
    if not deviation <= LOGITS_TOLERANCE:
        raise GateError(
            f"the exported model's logits differ from the checkpoint's by {deviation:.1e} of the "
            f"largest logit (at most {LOGITS_TOLERANCE:.0e} expected); nothing was written"
        )
    return deviation


def gate_tokens(tokenizer: Tokenizer, sequence_length: int) -> Tensor:
    """[1, S]: real text and awkward texts as training would pack them, S at most 512."""
    texts = (REAL_TEXT, *AWKWARD_TEXTS)
    packed = [i for text in texts for i in (*tokenizer.encode(text), tokenizer.eod_id)]
    return torch.tensor([packed[: min(sequence_length, 512)]])


def relative_deviation(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a fraction of the largest expected value."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return ((found - expected).abs().max() / expected.abs().max()).item()


def megatron_logits(saved: SavedLLM, tokens_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 logits [B, S, V], padding cut off, of the checkpoint in Megatron's own model.

    Runs in this one process: brings up Megatron's groups and takes them down again. Loads with
    Megatron's own loader, so that it shares nothing with the export.
    """
    parallel = ParallelConfig()
    with bring_up(parallel, seed=0) as runtime:
        llm = build_llm(
            saved.shape,
            ModelConfig(precision="fp32"),
            parallel,
            runtime,
            sequence_length=saved.sequence_length,
            seed=0,
        )
        (module,) = llm.modules
        _load(module, saved)
        logits_BSV = _rounded_forward(module, tokens_BS.to(runtime.device), dtype)
    return logits_BSV[..., : saved.shape.vocab_size].float().cpu()


def _load(module: GPTModel, saved: SavedLLM) -> None:
    wanted = module.sharded_state_dict(prefix=MODEL_PREFIX)
    with warnings.catch_warnings():
        # Megatron-Core 0.16.1 reads through torch's older sharded tensors.
        warnings.filterwarnings("ignore", message="Please use DTensor", category=FutureWarning)
        loaded = dist_checkpointing.load(wanted, str(saved.tensors_directory))
    # What was saved unsharded, the optimiser's step say, comes along unasked.
    names = [name for name in loaded if name.startswith(MODEL_PREFIX)]
    module.load_state_dict({name.removeprefix(MODEL_PREFIX): loaded[name] for name in names})


@torch.no_grad()
def _rounded_forward(module: GPTModel, tokens_BS: Tensor, dtype: torch.dtype) -> Tensor:
    for parameter in module.parameters():
        parameter.copy_(parameter.to(dtype))
    positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    return module.eval()(tokens_BS, positions_BS, None)
