"""Converts a checkpoint to a Hugging Face directory; the gate compares ids and logits first.

Everything is written into a directory beside the output, which is renamed when the comparisons have
succeeded. Cost: one pass over the model's tensors, and the cost of gate.py; memory for one shard
(shards.py) or one layer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_dwm.config import UserError
from megatron_dwm.config.printing import printable
from megatron_dwm.convert.checkpoint_reader import SavedLLM, open_checkpoint
from megatron_dwm.convert.export_tokenizer import ExportTokenizer, choose_tokenizer
from megatron_dwm.convert.from_megatron import import_from_megatron
from megatron_dwm.convert.gate import gate_tokens, require_equal_ids, require_equal_logits
from megatron_dwm.convert.huggingface import write_config
from megatron_dwm.convert.model_card import model_card
from megatron_dwm.convert.original_files import CopiedFiles, copy_original_files
from megatron_dwm.convert.output import new_directory, require_free
from megatron_dwm.convert.shards import write_shards
from megatron_dwm.convert.tensors import huggingface_tensors
from megatron_dwm.convert.tokenizer_files import write_tokenizer_files
from megatron_dwm.model.on_disk.huggingface_files import open_huggingface
from megatron_dwm.model.on_disk.megatron_files import is_megatron
from megatron_dwm.model.on_disk.parameter_names import huggingface_shapes


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written.

    texts_compared: texts whose ids were equal; 0 if the original tokenizer's files were copied.
    logits_deviation: as a fraction of the largest logit; None if the comparison was skipped.
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
        source: a run directory, a checkpoint directory, or a checkpoint of Megatron-LM or
            Megatron-Bridge, which has no tokenizer: name it.
        output: directory to create.
        tokenizer_model: the run's tokenizer. None takes the checkpoint's copy, or, in checkpoints
            of older versions, which have no copy, the tokenizer that their configuration names.
        dtype: data type of the exported parameters; None keeps the checkpoint's.
        skip_check: do not compare logits, and say so in the model card.

    Raises:
        UserError: `output` exists, `source` is not a complete checkpoint, or the tokenizer is
            missing, is not the run's, or cannot be written in Hugging Face's format.
        GateError: the exported model computes different logits; `output` is then not written.
    """
    output = Path(output)
    require_free(output)
    if is_megatron(Path(source)) and tokenizer_model is None:
        raise UserError(f"{source}: Megatron-LM saves no tokenizer; name it with --tokenizer")
    with _opened(Path(source), output) as saved:
        return _export(saved, output, tokenizer_model, dtype, skip_check=skip_check)


@contextmanager
def _opened(source: Path, output: Path) -> Iterator[SavedLLM]:
    """Gives the checkpoint; Megatron-LM's is written as one of ours first, beside the output."""
    if not is_megatron(source):
        yield open_checkpoint(source)
        return
    with TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        found = import_from_megatron(source, Path(folder) / "checkpoint")
        yield replace(open_checkpoint(found.directory), origin=found.source)


def _export(
    saved: SavedLLM,
    output: Path,
    tokenizer_model: str | Path | None,
    dtype: torch.dtype | None,
    *,
    skip_check: bool,
) -> Export:
    tokenizer = choose_tokenizer(saved, tokenizer_model)
    dtype = dtype or saved.dtype
    with new_directory(output) as partial:
        copied = _write(saved, tokenizer, dtype, partial)
        compared = 0 if tokenizer.trained is None else require_equal_ids(tokenizer.trained, partial)
        deviation = None if skip_check else _compare_logits(saved, tokenizer, partial, dtype)
        card = _card(saved, tokenizer, copied, dtype, deviation)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return Export(
        directory=output,
        source=saved.origin or saved.directory,
        dtype=dtype,
        texts_compared=compared,
        logits_deviation=deviation,
    )


def _write(
    saved: SavedLLM, tokenizer: ExportTokenizer, dtype: torch.dtype, directory: Path
) -> CopiedFiles | None:
    """Write everything but the card; returns what was copied from an original model, if any."""
    copied = None
    if saved.huggingface_directory is None:
        # The end-of-document token is also the beginning of sequence (tokenizer_files.py).
        write_config(
            saved.shape,
            context_tokens=saved.sequence_length,
            special_tokens=tokenizer.special_tokens or {},
            dtype=dtype,
            directory=directory,
        )
    else:
        copied = copy_original_files(
            saved.huggingface_directory,
            directory,
            shape=saved.shape,
            dtype=dtype,
            trained_tokens=saved.sequence_length if saved.was_trained_here else 0,
            special_tokens=tokenizer.special_tokens,
        )
    shapes = huggingface_shapes(saved.shape)
    tensors = _with_progress(huggingface_tensors(saved), saved, len(shapes))
    write_shards(shapes, tensors, dtype, directory)
    for path in directory.glob("*.safetensors"):  # safetensors lets only their owner read them
        path.chmod((directory / "config.json").stat().st_mode)
    if tokenizer.trained is not None:
        write_tokenizer_files(tokenizer.trained, _context(saved, copied), directory)
    return copied


def _context(saved: SavedLLM, copied: CopiedFiles | None) -> int:
    return saved.sequence_length if copied is None else copied.context_tokens


def _card(
    saved: SavedLLM,
    tokenizer: ExportTokenizer,
    copied: CopiedFiles | None,
    dtype: torch.dtype,
    deviation: float | None,
) -> str:
    changes = () if copied is None else copied.changes
    if copied is not None and tokenizer.trained is not None:
        changes += (
            f"the tokenizer is another (`{saved.tokenizer_path or tokenizer.trained.model_path}`); "
            "the original one, and its chat template, are left out",
        )
    return model_card(
        saved,
        dtype=_name(dtype),
        context_tokens=_context(saved, copied),
        changes=changes,
        logits_deviation=deviation,
    )


def _compare_logits(
    saved: SavedLLM, tokenizer: ExportTokenizer, directory: Path, dtype: torch.dtype
) -> float:
    tokens_BS = gate_tokens(tokenizer.encode, tokenizer.separator, saved.sequence_length)
    return require_equal_logits(saved, open_huggingface(directory), tokens_BS, dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _with_progress(
    tensors: Iterable[tuple[str, Tensor]], saved: SavedLLM, total: int
) -> Iterable[tuple[str, Tensor]]:
    if not sys.stderr.isatty():
        print(f"reading {printable(saved.directory)}", file=sys.stderr)
    return tqdm(tensors, total=total, unit="tensor", disable=not sys.stderr.isatty())
