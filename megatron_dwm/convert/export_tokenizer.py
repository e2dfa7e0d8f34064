"""Chooses the tokenizer of an export: the one that the checkpoint was trained with, and no other.

A checkpoint of a run has a copy of the run's tokenizer. Checkpoints of older versions have its path
and its digest; converted checkpoints have the tokenizer of the model that they were converted from.
Any other tokenizer is refused: a model with the wrong one runs, passes every comparison of logits,
and generates garbage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dwm.checkpoint.fingerprint import tokenizer_digests
from megatron_dwm.checkpoint.kept_files import open_own_tokenizer, own_tokenizer
from megatron_dwm.config import UserError
from megatron_dwm.convert.checkpoint_reader import SavedLLM
from megatron_dwm.convert.gate import gives_same_ids
from megatron_dwm.convert.original_files import plain_encoder, special_tokens
from megatron_dwm.convert.tokenizer_files import padding_id
from megatron_dwm.tokenizer import Tokenizer, open_tokenizer


@dataclass(frozen=True, kw_only=True)
class ExportTokenizer:
    """The tokenizer of an export: training's, or the original model's files.

    trained: training's tokenizer; None if the original model's files are copied instead.
    encode: text to ids, without added tokens; raises `UserError` if there is no tokenizer.
    special_tokens: ids, by config.json's names; None if the original ones stay.
    separator: id of the token after every document; None if it is not known.
    """

    trained: Tokenizer | None
    encode: Callable[[str], list[int]]
    special_tokens: dict[str, Any] | None
    separator: int | None


def choose_tokenizer(saved: SavedLLM, given: str | Path | None) -> ExportTokenizer:
    """Returns the tokenizer for the export of a checkpoint.

    given: the tokenizer that the user names, if any; it has to be the one of training.

    Raises `UserError` if it is another, is missing, or has more pieces than the model.
    """
    trained = _trained_tokenizer(saved, given)
    original = saved.huggingface_directory
    if original is not None and (trained is None or _is_original(trained, original)):
        end = special_tokens(original).get("eos_token_id")
        return ExportTokenizer(
            trained=None,
            encode=lambda text: plain_encoder(original)(text),
            special_tokens=None,
            separator=end if isinstance(end, int) else None,
        )
    assert trained is not None
    begin = next(iter(trained.around.before), trained.eod_id)
    ends = {"bos_token_id": begin, "eos_token_id": trained.eod_id}
    ids = {**ends, "pad_token_id": padding_id(trained.pieces(), trained.eod_id)}
    return ExportTokenizer(
        trained=trained, encode=trained.encode, special_tokens=ids, separator=trained.eod_id
    )


def _trained_tokenizer(saved: SavedLLM, given: str | Path | None) -> Tokenizer | None:
    """Returns the tokenizer of training; None if the checkpoint has only the original model's."""
    copy = saved.tokenizer_copy
    if copy is None and not saved.was_trained_here:
        assert saved.huggingface_directory is not None
        copy = own_tokenizer(saved.huggingface_directory)
        if given is None:
            return None
    if copy is None:
        return _require_fitting(saved, _tokenizer_of_older_version(saved, given))
    if given is not None:
        _require_same(open_tokenizer(given), open_tokenizer(copy), saved)
    return _require_fitting(saved, open_own_tokenizer(copy)) if saved.was_trained_here else None


def _require_same(given: Tokenizer, own: Tokenizer, saved: SavedLLM) -> None:
    if (given.sha256, given.eod_id) != (own.sha256, own.eod_id):
        raise UserError(
            f"--tokenizer {given.model_path} is not the run's tokenizer, of which {saved.directory}"
            f" has a copy (SHA-256 {given.sha256[:16]} and {own.sha256[:16]}, end of document "
            f"{given.eod_id} and {own.eod_id}); leave --tokenizer out"
        )


def _tokenizer_of_older_version(saved: SavedLLM, given: str | Path | None) -> Tokenizer:
    """Returns the tokenizer given, or the one that config.yaml names.

    Compares it with the digest that the checkpoint recorded.
    """
    configured = saved.tokenizer_path
    path = given or configured
    if path is None:
        raise UserError(
            f"{saved.directory}: its config.yaml names no data.tokenizer; name the run's tokenizer "
            "with --tokenizer"
        )
    if given is None and not Path(path).exists():
        raise UserError(
            f"{configured}: no such file (data.tokenizer in {saved.directory / 'config.yaml'}); "
            "name the tokenizer model with --tokenizer"
        )
    tokenizer = open_tokenizer(path)
    if saved.recorded_tokenizer is not None:
        _require_recorded(saved, Path(path), saved.recorded_tokenizer)
    elif given is not None and configured is not None and Path(configured).exists():
        _require_configured(tokenizer, configured)
    return tokenizer


def _require_recorded(saved: SavedLLM, path: Path, recorded: str) -> None:
    found = tokenizer_digests(path)
    if recorded not in found:
        raise UserError(
            f"{path} is not the run's tokenizer: {saved.directory / 'manifest.json'} has "
            f"{recorded}, this is {min(found)}; name the run's with --tokenizer"
        )


def _require_configured(tokenizer: Tokenizer, configured: str) -> None:
    if open_tokenizer(configured).sha256 != tokenizer.sha256:
        raise UserError(
            f"--tokenizer {tokenizer.model_path} is not the run's tokenizer {configured}; leave "
            "--tokenizer out"
        )


def _require_fitting(saved: SavedLLM, tokenizer: Tokenizer) -> Tokenizer:
    if tokenizer.vocab_size > saved.shape.vocab_size:
        raise UserError(
            f"{tokenizer.model_path} has {tokenizer.vocab_size} pieces but the model only "
            f"{saved.shape.vocab_size}; name the tokenizer of the run with --tokenizer"
        )
    return tokenizer


def _is_original(trained: Tokenizer, original: Path) -> bool:
    """True if training's tokenizer is the original model's, in whatever form."""
    path = own_tokenizer(original)
    if path is None:
        return False
    if path.read_bytes() == trained.content:
        return True
    try:
        return gives_same_ids(trained, open_tokenizer(path))
    except UserError:  # its end-of-document token is unknown, so training did not use it
        return False
