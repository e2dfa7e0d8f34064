"""A checkpoint of ours as a Hugging Face directory that has passed the gates.

Everything is written into a directory beside the wanted one, which is renamed when the gates have
passed. Cost: one pass over the model's tensors to write them, and gate.py's; in memory one shard
(shards.py) or one layer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_dwm.config.printing import printable
from megatron_dwm.convert.checkpoint_reader import SavedLLM, open_checkpoint
from megatron_dwm.convert.export_tokenizer import Words, open_words
from megatron_dwm.convert.gate import gate_tokens, require_equal_ids, require_equal_logits
from megatron_dwm.convert.huggingface import write_config
from megatron_dwm.convert.model_card import model_card
from megatron_dwm.convert.original_files import PutBack, put_back
from megatron_dwm.convert.output import new_directory, require_free
from megatron_dwm.convert.shards import write_shards
from megatron_dwm.convert.tensors import huggingface_tensors
from megatron_dwm.convert.tokenizer_files import write_tokenizer_files
from megatron_dwm.model.on_disk.huggingface_files import open_huggingface
from megatron_dwm.model.on_disk.parameter_names import huggingface_shapes


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
        tokenizer_model: the run's tokenizer. None takes the checkpoint's own copy; only older
            checkpoints have none, and then it is the one that their configuration names.
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
    words = open_words(saved, tokenizer_model)
    dtype = dtype or saved.dtype
    with new_directory(output) as partial:
        came = _write(saved, words, dtype, partial)
        compared = 0 if words.trained is None else require_equal_ids(words.trained, partial)
        deviation = None if skip_check else _compare_logits(saved, words, partial, dtype)
        card = _card(saved, words, came, dtype, deviation)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return Export(
        directory=output,
        source=saved.directory,
        dtype=dtype,
        texts_compared=compared,
        logits_deviation=deviation,
    )


def _write(saved: SavedLLM, words: Words, dtype: torch.dtype, directory: Path) -> PutBack | None:
    """Everything but the card; what came back of a model from elsewhere."""
    came = None
    if saved.huggingface_directory is None:
        # The end-of-document token is also the beginning of sequence (see tokenizer_files.py).
        write_config(
            saved.shape,
            context_tokens=saved.sequence_length,
            special_tokens=words.special_tokens or {},
            dtype=dtype,
            directory=directory,
        )
    else:
        came = put_back(
            saved.huggingface_directory,
            directory,
            shape=saved.shape,
            dtype=dtype,
            trained_tokens=saved.sequence_length if saved.was_trained_here else 0,
            special_tokens=words.special_tokens,
        )
    shapes = huggingface_shapes(saved.shape)
    tensors = _with_progress(huggingface_tensors(saved), saved, len(shapes))
    write_shards(shapes, tensors, dtype, directory)
    for path in directory.glob("*.safetensors"):  # written readable by their owner alone
        path.chmod((directory / "config.json").stat().st_mode)
    if words.trained is not None:
        write_tokenizer_files(words.trained, _context(saved, came), directory)
    return came


def _context(saved: SavedLLM, came: PutBack | None) -> int:
    return saved.sequence_length if came is None else came.context_tokens


def _card(
    saved: SavedLLM, words: Words, came: PutBack | None, dtype: torch.dtype, deviation: float | None
) -> str:
    changes = () if came is None else came.changes
    if came is not None and words.trained is not None:
        changes += (
            f"the tokenizer is another (`{saved.tokenizer_path or words.trained.model_path}`); "
            "the one that the model came with, and its chat template, are left out",
        )
    return model_card(
        saved,
        dtype=_name(dtype),
        context_tokens=_context(saved, came),
        changes=changes,
        logits_deviation=deviation,
    )


def _compare_logits(saved: SavedLLM, words: Words, directory: Path, dtype: torch.dtype) -> float:
    tokens_BS = gate_tokens(words.encode, words.separator, saved.sequence_length)
    return require_equal_logits(saved, open_huggingface(directory), tokens_BS, dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _with_progress(
    tensors: Iterable[tuple[str, Tensor]], saved: SavedLLM, total: int
) -> Iterable[tuple[str, Tensor]]:
    if not sys.stderr.isatty():
        print(f"reading {printable(saved.directory)}", file=sys.stderr)
    return tqdm(tensors, total=total, unit="tensor", disable=not sys.stderr.isatty())
