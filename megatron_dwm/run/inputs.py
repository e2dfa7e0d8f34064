"""Opens the user's files before a run starts; each is read once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_dwm.checkpoint.kept_files import had_special_tokens
from megatron_dwm.checkpoint.manifest import list_checkpoints
from megatron_dwm.config import Config, UserError
from megatron_dwm.data import EvaluationSet, ValidationSet
from megatron_dwm.data.last_words import LastWords
from megatron_dwm.data.pieces import document_rules
from megatron_dwm.data.special_tokens import has_special_tokens
from megatron_dwm.data.token_losses import TokenLosses
from megatron_dwm.data.values import DocumentValues
from megatron_dwm.model import LlamaShape, resolve_shape
from megatron_dwm.run.starting_point import shape_to_start_from
from megatron_dwm.tokenizer import Tokenizer, open_tokenizer
from megatron_dwm.training.evaluation import HeldOut
from megatron_dwm.weighting import method_class


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """The inputs files of a run.

    target: None if the method reads none. held_out: None without evaluation.
    reference: shape of the reference model; None if the method has none.
    values: those of the documents; None if the method reads none.
    token_losses: those of a reference, from files; None if the method reads none.
    """

    tokenizer: Tokenizer
    shape: LlamaShape
    target: ValidationSet | None
    held_out: HeldOut | None
    reference: LlamaShape | None = None
    values: DocumentValues | None = None
    token_losses: TokenLosses | None = None


def open_model_and_tokenizer(config: Config) -> tuple[Tokenizer, LlamaShape]:
    """Open the tokenizer and find the model's shape.

    Raises UserError if one of them cannot be used, or if they do not fit together.
    """
    if config.data.tokenizer is None:
        raise UserError("data.tokenizer: expected a tokenizer model, got none")
    tokenizer = open_tokenizer(
        config.data.tokenizer, include_special_tokens=has_special_tokens(config.data, _kept(config))
    )
    shape = resolve_shape(config.model, tokenizer.vocab_size, init_from=shape_to_start_from(config))
    if shape.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size {shape.vocab_size}: the tokenizer {config.data.tokenizer} has "
            f"{tokenizer.vocab_size} pieces; leave model.vocab_size empty or raise it (with "
            "model.init_from, name that model's tokenizer)"
        )
    return tokenizer, shape


def _kept(config: Config) -> bool | None:
    """Returns whether a run that is resumed has had special tokens; None if it has not begun."""
    found = list_checkpoints(Path(config.run.dir)) if config.run.resume else []
    return had_special_tokens(found[-1]) if found else None


def open_target(config: Config, tokenizer: Tokenizer) -> ValidationSet | None:
    """Open the target of a method that reads one. Raises UserError if it cannot be used."""
    parts = method_class(config).parts(config)
    if "target" not in parts:
        return None
    target = ValidationSet(
        config.validation,
        config.data,
        tokenizer,
        seed=config.run.seed,
        rules=document_rules(config),
    )
    if "alignments" in parts and config.weighting.damp_by_noise and target.num_rows < 2:
        raise UserError(
            f"weighting.damp_by_noise: {config.validation.path} (validation.path) has one row, "
            "and noise is measured between halves; give more text or leave it out"
        )
    return target


def open_held_out(config: Config, tokenizer: Tokenizer) -> HeldOut | None:
    """Open the held-out text, if configured. Raises UserError if it cannot be used."""
    if not config.evaluation.is_on:
        return None
    return HeldOut(
        rows=EvaluationSet(
            config.evaluation, config.data, tokenizer, stop_attention=config.masks_documents
        ),
        last_words=LastWords(config.evaluation, config.data, tokenizer),
    )
