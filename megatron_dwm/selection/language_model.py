"""A language model that scores documents: a Hugging Face directory, a checkpoint, or a run.

It runs in this process alone, on its GPU if there is one. Memory: its parameters, and the logits of
one batch (windows.py). Its vocabulary has to be that of the data: its own tokenizer, where the
directory has one, is compared with the facts in the sidecar.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import yaml
from torch import Tensor

from megatron_dwm.checkpoint.kept_files import TOKENIZER, own_tokenizer
from megatron_dwm.checkpoint.manifest import MANIFEST, named_checkpoint
from megatron_dwm.checkpoint.names import CONFIG_FILE, LLM_FOLDER
from megatron_dwm.config import ModelConfig, ParallelConfig, UserError
from megatron_dwm.config.huggingface import read_json_object
from megatron_dwm.data import Batch
from megatron_dwm.files.digest import digest_of_files
from megatron_dwm.files.sidecar_format import TOKENIZER_SHA256, VOCAB_SIZE, facts_in
from megatron_dwm.model import LLM, LlamaShape, PassResult, build_llm, forward_only
from megatron_dwm.model.on_disk.huggingface_files import is_huggingface, open_huggingface
from megatron_dwm.model.passes.objective import unit
from megatron_dwm.model.passes.predictions import predict
from megatron_dwm.run.starting_point import load_model, shape_of_model
from megatron_dwm.runtime import bring_up
from megatron_dwm.selection.pool import Pool
from megatron_dwm.tokenizer import open_tokenizer

_OPTION = "--model"
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A model on disk that has been checked."""

    directory: Path
    shape: LlamaShape
    context_tokens: int
    """longest sequence that it was made for"""

    @property
    def digest(self) -> str:
        """A digest of its weights."""
        return digest_of_files(_weights(self.directory))


@dataclass(frozen=True)
class LanguageModel:
    """A model in memory."""

    llm: LLM

    def losses(self, batch: Batch) -> Tensor:
        """Returns float32 [B, S], the loss of each label in nats; 0 where none counts.

        The rows that pad the vocabulary take no part, as in an exported model.
        """
        batch = batch.to(self.llm.runtime.device)
        found = predict(self.llm, batch, batch.size)
        return (-found.log_likelihood_BS * batch.loss_mask_BS).cpu()

    def training_losses(self, batch: Batch) -> Tensor:
        """Returns float32 [B, S] as training computes them: over the padded vocabulary.

        Tokens are the units of `batch`.
        """
        batch = batch.to(self.llm.runtime.device)
        result = forward_only(self.llm, unit(batch, batch.size))
        return result.unit_losses_n.view(batch.tokens_BS.shape).cpu()

    def features(self, batch: Batch, early_layer: int) -> PassResult:
        """Returns losses and pooled hidden states of the units of `batch`."""
        batch = batch.to(self.llm.runtime.device)
        return forward_only(self.llm, unit(batch, batch.size), early_layer=early_layer)


def check_model(name: str, pool: Pool) -> ModelFiles:
    """Find the model that a user names.

    Raises `UserError` if there is none that can be used, or if its vocabulary is not the data's.
    """
    directory = _directory(name)
    shape = shape_of_model(directory, _OPTION)
    _require_vocabulary(directory, shape, pool)
    return ModelFiles(directory=directory, shape=shape, context_tokens=_context_tokens(directory))


def digest_of_model(name: str) -> str:
    """A digest of the weights of the model that a user names; `UserError` if there is none."""
    return digest_of_files(_weights(_directory(name)))


def _directory(name: str) -> Path:
    directory = Path(name)
    return directory if is_huggingface(directory) else named_checkpoint(directory)


@contextmanager
def open_model(
    files: ModelFiles, precision: Precision, context_tokens: int
) -> Iterator[LanguageModel]:
    """Load the model, for sequences of at most `context_tokens`, for the time of the context."""
    parallel = ParallelConfig()
    with bring_up(parallel, seed=0) as runtime:
        llm = build_llm(
            files.shape,
            ModelConfig(precision=precision),
            parallel,
            runtime,
            sequence_length=context_tokens,
            seed=0,
            trained=False,
        )
        load_model(llm, files.directory)
        with torch.no_grad():
            yield LanguageModel(llm)


def _context_tokens(directory: Path) -> int:
    if is_huggingface(directory):
        return open_huggingface(directory).context_tokens
    path = directory / CONFIG_FILE
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        return int(config["data"]["sequence_length"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{_OPTION}: {path} does not say what data.sequence_length was; bring back a copy"
        ) from None


def _weights(directory: Path) -> list[Path]:
    """The files that hold the weights, or a checkpoint's manifest, which has their checksums."""
    if (directory / MANIFEST).is_file():
        return [directory / MANIFEST]
    if (directory / LLM_FOLDER).is_dir():
        return sorted(path for path in (directory / LLM_FOLDER).iterdir() if path.is_file())
    return [*sorted(directory.glob("*.safetensors")), *sorted(directory.glob("*.bin"))]


def _require_vocabulary(directory: Path, shape: LlamaShape, pool: Pool) -> None:
    """Raise `UserError` unless the model reads the ids of the data's tokenizer."""
    facts = {} if pool.sidecar is None else facts_in(pool.sidecar.schema_arrow)
    if VOCAB_SIZE not in facts:
        return  # each id is compared with the size of the vocabulary when it is read
    size, sha256 = int(facts[VOCAB_SIZE]), facts[TOKENIZER_SHA256]
    made_with = f"{pool.dataset.paths.sidecar} says that the data was made with one of {size}"
    if shape.vocab_size < size:
        raise UserError(
            f"{_OPTION} {directory}: a vocabulary of {shape.vocab_size}, but {made_with}; give a "
            "model with the data's tokenizer"
        )
    is_export = is_huggingface(directory)
    file = own_tokenizer(directory if is_export else directory / TOKENIZER)
    if file is None:
        return
    tokenizer = open_tokenizer(file)
    recorded = _recorded_digest(file) if is_export else tokenizer.sha256
    fits = recorded is None or sha256 in (recorded, tokenizer.sha256)
    if not fits or tokenizer.vocab_size != size:
        raise UserError(
            f"{_OPTION} {directory}: its tokenizer is {(recorded or tokenizer.sha256)[:12]} of "
            f"{tokenizer.vocab_size} pieces, but {made_with} pieces, {sha256[:12]}; give a model "
            "with the data's tokenizer"
        )


def _recorded_digest(tokenizer: Path) -> str | None:
    """The digest of training's tokenizer that an export of ours has; None in any other directory.

    An export spells a SentencePiece model anew as tokenizer.json, whose own digest says nothing.
    """
    settings = tokenizer.with_name("tokenizer_config.json")
    digest = read_json_object(settings).get(TOKENIZER_SHA256) if settings.is_file() else None
    return digest if isinstance(digest, str) else None
