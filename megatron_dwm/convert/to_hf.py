"""A checkpoint of ours as a Hugging Face directory that has passed the gates.

Everything is written into a directory beside the wanted one, which is renamed when the gates have
passed. Cost: one pass over the model's tensors to write them, and gate.py's; in memory one shard
(shards.py) or one layer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_dwm.config import UserError
from megatron_dwm.config.printing import printable
from megatron_dwm.convert.carried_files import plain_encoder, put_back, special_tokens
from megatron_dwm.convert.checkpoint_reader import SavedLLM, open_checkpoint
from megatron_dwm.convert.gate import gate_tokens, require_equal_ids, require_equal_logits
from megatron_dwm.convert.huggingface import write_config
from megatron_dwm.convert.model_card import model_card
from megatron_dwm.convert.output import new_directory, require_free
from megatron_dwm.convert.shards import write_shards
from megatron_dwm.convert.tokenizer_files import write_tokenizer_files
from megatron_dwm.convert.weights import huggingface_tensors
from megatron_dwm.model.huggingface_files import open_huggingface
from megatron_dwm.model.layout import huggingface_shapes
from megatron_dwm.tokenizer import Tokenizer, open_tokenizer


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written.

    texts_compared: texts whose ids were equal; 0 where the tokenizer's files were carried along.
    logits_deviation: fraction of the largest logit; None where the check was skipped.
    """

    directory: Path
    source: Path
    dtype: torch.dtype
    texts_compared: int
    logits_deviation: float | None


def export_to_huggingface(
    source: str | Path,
    output: str | Path,
    *,
    tokenizer_model: str | Path | None = None,
    dtype: torch.dtype | None = None,
    skip_check: bool = False,
) -> Export:
    """Write checkpoint `source` (or a run's newest) as Hugging Face directory `output`.

    Args:
        source: a run directory or a checkpoint directory.
        output: directory to create.
        tokenizer_model: tokenizer model; None takes the one in the run's configuration, or the
            one that came with the Hugging Face model that the checkpoint was converted from.
        dtype: what parameters are kept in; None keeps the checkpoint's.
        skip_check: leave out the comparison of logits, and say so in the model card.

    Raises:
        UserError: `output` exists, `source` is not a whole checkpoint, or the tokenizer is
            missing, not the run's, or not expressible.
        GateError: the exported model computes something else; `output` is then not written.
    """
    output = Path(output)
    require_free(output)
    saved = open_checkpoint(source)
    words = _open_words(saved, tokenizer_model)
    dtype = dtype or saved.dtype
    with new_directory(output) as partial:
        _write(saved, words, dtype, partial)
        compared = 0 if words.trained is None else require_equal_ids(words.trained, partial)
        deviation = None if skip_check else _compare_logits(saved, words, partial, dtype)
        card = model_card(saved, dtype=_name(dtype), logits_deviation=deviation)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return Export(
        directory=output,
        source=saved.directory,
        dtype=dtype,
        texts_compared=compared,
        logits_deviation=deviation,
    )


@dataclass(frozen=True, kw_only=True)
class _Words:
    """How text becomes ids: training's tokenizer, or else files carried along from elsewhere.

    encode: None where there are neither.
    """

    trained: Tokenizer | None
    carried: Path | None
    encode: Callable[[str], list[int]]
    special_tokens: dict[str, Any]


def _open_words(saved: SavedLLM, given: str | Path | None) -> _Words:
    carried = saved.huggingface_directory
    if given is None and saved.tokenizer_path is None and carried is not None:
        return _Words(
            trained=None,
            carried=carried,
            encode=plain_encoder(carried),
            special_tokens=special_tokens(carried),
        )
    tokenizer = _open_tokenizer(saved, given)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eod_id)
    return _Words(trained=tokenizer, carried=None, encode=tokenizer.encode, special_tokens=ends)


def _open_tokenizer(saved: SavedLLM, given: str | Path | None) -> Tokenizer:
    """The tokenizer given, which must be the run's if that is still there; else the run's."""
    configured = saved.tokenizer_path
    if given is None and configured is None:
        raise UserError(f"{saved.directory}: its config.yaml names no data.tokenizer; --tokenizer")
    if given is None and not Path(configured).exists():
        raise UserError(
            f"{configured}: no such file (data.tokenizer in {saved.directory / 'config.yaml'}); "
            "name the tokenizer model with --tokenizer"
        )
    tokenizer = open_tokenizer(given or configured)
    if given is not None and configured is not None and Path(configured).exists():
        trained_with = open_tokenizer(configured)
        if trained_with.sha256 != tokenizer.sha256:
            raise UserError(f"--tokenizer {given} is not the run's tokenizer {configured}")
    if tokenizer.vocab_size > saved.shape.vocab_size:
        raise UserError(
            f"{tokenizer.model_path} has {tokenizer.vocab_size} pieces but the model only "
            f"{saved.shape.vocab_size}; name the tokenizer of the run with --tokenizer"
        )
    return tokenizer


def _write(saved: SavedLLM, words: _Words, dtype: torch.dtype, directory: Path) -> None:
    # The end-of-document token is also the beginning of sequence (see tokenizer_files.py).
    write_config(
        saved.shape,
        context_tokens=saved.sequence_length,
        special_tokens=words.special_tokens,
        dtype=dtype,
        directory=directory,
    )
    shapes = huggingface_shapes(saved.shape)
    tensors = _with_progress(huggingface_tensors(saved), saved, len(shapes))
    write_shards(shapes, tensors, dtype, directory)
    for path in directory.glob("*.safetensors"):  # written readable by their owner alone
        path.chmod((directory / "config.json").stat().st_mode)
    if words.trained is not None:
        write_tokenizer_files(words.trained, saved.sequence_length, directory)
    elif words.carried is not None:
        put_back(words.carried, directory)


def _compare_logits(saved: SavedLLM, words: _Words, directory: Path, dtype: torch.dtype) -> float:
    separator = words.special_tokens.get("eos_token_id")
    end = separator if isinstance(separator, int) else None
    tokens_BS = gate_tokens(words.encode, end, saved.sequence_length)
    return require_equal_logits(saved, open_huggingface(directory), tokens_BS, dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _with_progress(
    tensors: Iterable[tuple[str, Tensor]], saved: SavedLLM, total: int
) -> Iterable[tuple[str, Tensor]]:
    if not sys.stderr.isatty():
        print(f"reading {printable(saved.directory)}", file=sys.stderr)
    return tqdm(tensors, total=total, unit="tensor", disable=not sys.stderr.isatty())
