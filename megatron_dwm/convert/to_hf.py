"""A checkpoint of ours as a Hugging Face directory that has passed the gates.

Everything is written into a directory beside the wanted one, which is renamed when the gates have
passed. Cost: see gate.py; the export itself holds the model once.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_dwm.config import UserError
from megatron_dwm.convert.checkpoint_reader import SavedLLM, open_checkpoint
from megatron_dwm.convert.gate import require_equal_ids, require_equal_logits
from megatron_dwm.convert.huggingface import llama_config, write_model
from megatron_dwm.convert.tokenizer_files import write_tokenizer_files
from megatron_dwm.convert.weights import huggingface_tensors, num_huggingface_tensors
from megatron_dwm.tokenizer import Tokenizer, build_tokenizer


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written.

    texts_compared: texts whose ids were equal.
    logits_deviation: fraction of the largest logit.
    """

    directory: Path
    source: Path
    dtype: torch.dtype
    texts_compared: int
    logits_deviation: float


def export_to_huggingface(
    source: str | Path,
    output: str | Path,
    *,
    tokenizer_model: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> Export:
    """Write checkpoint `source` (or a run's newest) as Hugging Face directory `output`.

    Args:
        source: a run directory or a checkpoint directory.
        output: directory to create.
        tokenizer_model: SentencePiece model; None takes the one in the run's configuration.
        dtype: what parameters are kept in; None keeps the checkpoint's.

    Raises:
        UserError: `output` exists, `source` is not a whole checkpoint, or the tokenizer is
            missing, not the run's, or not expressible.
        GateError: the exported model computes something else; `output` is then not written.
    """
    output = Path(output)
    _require_free(output)
    saved = open_checkpoint(source)
    tokenizer = _open_tokenizer(saved, tokenizer_model)
    dtype = dtype or saved.dtype
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir()
    try:
        _write(saved, tokenizer, dtype, partial)
        texts_compared = require_equal_ids(tokenizer, partial)
        deviation = require_equal_logits(saved, tokenizer, partial, dtype)
        _require_free(output)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Export(
        directory=output,
        source=saved.directory,
        dtype=dtype,
        texts_compared=texts_compared,
        logits_deviation=deviation,
    )


def _require_free(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise UserError(f"{output} exists; name another --output or remove it")


def _open_tokenizer(saved: SavedLLM, given: str | Path | None) -> Tokenizer:
    """The tokenizer given, which must be the run's if that is still there; else the run's."""
    configured = saved.tokenizer_path
    if given is None and configured is None:
        raise UserError(f"{saved.directory}: its config.yaml names no data.tokenizer; --tokenizer")
    if given is None and not Path(configured).is_file():
        raise UserError(
            f"{configured}: no such file (data.tokenizer in {saved.directory / 'config.yaml'}); "
            "name the SentencePiece model with --tokenizer"
        )
    tokenizer = build_tokenizer("SentencePieceTokenizer", given or configured)
    if given is not None and configured is not None and Path(configured).is_file():
        trained_with = build_tokenizer("SentencePieceTokenizer", configured)
        if trained_with.sha256 != tokenizer.sha256:
            raise UserError(f"--tokenizer {given} is not the run's tokenizer {configured}")
    if tokenizer.vocab_size > saved.shape.vocab_size:
        raise UserError(
            f"{tokenizer.model_path} has {tokenizer.vocab_size} pieces but the model only "
            f"{saved.shape.vocab_size}; name the tokenizer of the run with --tokenizer"
        )
    return tokenizer


def _write(saved: SavedLLM, tokenizer: Tokenizer, dtype: torch.dtype, directory: Path) -> None:
    config = llama_config(
        saved.shape, sequence_length=saved.sequence_length, eod_id=tokenizer.eod_id
    )
    tensors = huggingface_tensors(saved.shape, saved.read)
    write_model(config, _with_progress(tensors, saved), dtype, directory)
    write_tokenizer_files(tokenizer, saved.sequence_length, directory)


def _with_progress(
    tensors: Iterable[tuple[str, Tensor]], saved: SavedLLM
) -> Iterable[tuple[str, Tensor]]:
    if not sys.stderr.isatty():
        print(f"reading {saved.directory}", file=sys.stderr)
    total = num_huggingface_tensors(saved.shape)
    return tqdm(tensors, total=total, unit="tensor", disable=not sys.stderr.isatty())
