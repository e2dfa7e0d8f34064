"""A trained weighting model's score of every document: column `weight`, `select_data.py rater`.

The score is a logit: what training's softmax turns into weights. The softmax ignores a constant
that all samples of a group share, and the model reads the group, so logits of different groups
cannot be compared. Therefore every document is scored in a group of its own beside the **same
companions**: as many as a group had in training, less one, drawn from the data with a fixed seed.
Then the score depends on the document and the companions alone, not on its neighbors or the order,
and differences of scores are differences of log-weights in a group with these companions. A group
of one would be a size that the model was never trained with, and with `weighting.encoder llm` it
would hide the loss, which is standardized inside the group.

A document longer than the run's sequences is read in windows of that length (windows.py); its score
is the mean over its tokens of its windows' logits. A companion is the first window of its document.

Cost: a forward pass of the encoder over all tokens (encoder llm: of the LLM), and for each window
the attention across samples of one unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from megatron_dwm.checkpoint.names import CONFIG_FILE
from megatron_dwm.config import ParallelConfig, UserError
from megatron_dwm.data import Batch
from megatron_dwm.files.digest import digest_of_files
from megatron_dwm.files.sidecar_format import TOKENIZER_SHA256, VOCAB_SIZE, facts_in
from megatron_dwm.runtime import bring_up
from megatron_dwm.selection.choice import Scores
from megatron_dwm.selection.language_model import (
    LanguageModel,
    ModelFiles,
    Precision,
    check_model,
    digest_of_model,
    open_model,
)
from megatron_dwm.selection.pool import Pool
from megatron_dwm.selection.qurating import standardized
from megatron_dwm.selection.record import MODEL_DIGEST
from megatron_dwm.selection.select import Progress
from megatron_dwm.selection.tokens import TokenSource
from megatron_dwm.selection.windows import Windows, batch_of, batches_of, scan, windows_of
from megatron_dwm.selection.workers import Span
from megatron_dwm.weighting.encoding import encode
from megatron_dwm.weighting.model import (
    WeightingModel,
    WeightingShape,
    load_weighting_model,
    read_weighting_shape,
)

_OPTION = "--rater"
_SEED = 1234
_LARGEST_GROUPS = 1 << 22
"""numbers in the groups of a chunk of windows (encoder llm)"""

OWN_ENCODER = "has no effect: the rater reads tokens with its own encoder; leave it out"

Score = Callable[[Batch], Tensor]
"""turns windows into a logit each"""


@dataclass(frozen=True, kw_only=True)
class RaterFiles:
    """A weighting model on disk, and how its run used it."""

    directory: Path
    shape: WeightingShape
    sequence_length: int
    group_size: int
    """units in a group"""
    by_tokens: bool
    """True if a unit's share of its group was that of its tokens"""
    early_layer: int
    language_model: ModelFiles | None
    """the LLM whose features it reads; None for an encoder of its own"""


@dataclass(frozen=True, kw_only=True)
class RaterScores:
    """`select_data.py rater --rater`: documents are scored and selected in one command."""

    rater: str
    model: str | None
    precision: Precision
    name = "rater"

    def options(self) -> dict[str, Any]:
        """Both models by their content, too: `--model RUN` is the newest checkpoint of a run."""
        files = sorted(Path(self.rater).glob("weighting.*"))
        named = {"rater": self.rater, "model": self.model, "precision": self.precision}
        digests = {"rater_digest": digest_of_files(files)}
        if self.model is not None:
            digests[MODEL_DIGEST] = digest_of_model(self.model)
        return {**named, **digests}

    def scores(self, pool: Pool, progress: Progress, scratch: Path) -> Scores:  # noqa: ARG002
        """Standardized logits. Raises `UserError` as `check_rater`, and if all are the same."""
        files = check_rater(self.rater, self.model, pool)
        if files.language_model is None and self.model is not None:
            raise UserError(f"--model {self.model}: {OWN_ENCODER}")
        logits_D = document_scores(pool, files, self.precision, progress)
        return standardized(logits_D, pool, f"{_OPTION} {self.rater}: the score")


def check_rater(name: str, model: str | None, pool: Pool) -> RaterFiles:
    """Find the weighting model that a user names.

    model: the language model, which a rater of `weighting.encoder llm` reads; others ignore it.
    Raises `UserError` if it cannot be used, or reads ids of another tokenizer than the data's.
    """
    directory = Path(name)
    shape = read_weighting_shape(directory, _OPTION)
    config = _run_config(directory)
    training, weighting = config["training"], config["weighting"]
    files = None
    if shape.encoder == "own":
        _require_tokenizer(directory, shape, pool)
    else:
        files = _language_model(directory, shape, model, pool)
    is_global = weighting["group"] == "global"
    rows = training["global_batch_size" if is_global else "micro_batch_size"]
    length = config["data"]["sequence_length"]
    of_documents = weighting.get("unit") == "document"
    return RaterFiles(
        directory=directory,
        shape=shape,
        sequence_length=length,
        group_size=_documents_in(rows, length, pool) if of_documents else rows,
        by_tokens=of_documents and weighting.get("unit_share") != "equal",
        early_layer=weighting["early_layer"],
        language_model=files,
    )


def _documents_in(rows: int, length: int, pool: Pool) -> int:
    """Returns how many documents of the data fill so many rows of `length` tokens, on average."""
    lengths_D = pool.tokens_D[pool.tokens_D > 0]
    return rows if not len(lengths_D) else max(rows, round(rows * length / float(lengths_D.mean())))


def document_scores(
    pool: Pool, files: RaterFiles, precision: Precision, progress: Progress
) -> np.ndarray:
    """Returns float64 [D], the score of every document; 0 for one without tokens."""
    model = files.language_model
    vocab_size = files.shape.vocab_size if model is None else model.shape.vocab_size
    name = str(files.directory if model is None else model.directory)
    sums_D = np.zeros(pool.num_documents)
    companions = _companions(pool, files, vocab_size, name)
    with torch.no_grad(), _scorer(files, precision, companions) as score:
        for scanned in scan(pool, vocab_size, name, files.sequence_length, progress):
            windows = scanned.windows
            for chosen_B, batch in scanned.batches():
                logits_B = score(batch).double().cpu().numpy()
                documents_B = scanned.span.begin + windows.documents_W[chosen_B]
                np.add.at(sums_D, documents_B, logits_B * windows.lengths_W[chosen_B])
    return sums_D / np.maximum(pool.tokens_D, 1)


@contextmanager
def _scorer(files: RaterFiles, precision: Precision, companions: list[Batch]) -> Iterator[Score]:
    rater = load_weighting_model(files.directory, files.shape).eval()
    if files.language_model is None:
        with bring_up(ParallelConfig(), seed=0) as runtime:
            yield _own_encoder(rater.to(runtime.device), precision, companions)
        return
    with open_model(files.language_model, precision, files.sequence_length) as model:
        rater.to(model.llm.runtime.device)
        yield _features_of_llm(rater, model, files, companions)


def _own_encoder(rater: WeightingModel, precision: Precision, companions: list[Batch]) -> Score:
    device = next(rater.parameters()).device

    def pooled(batch: Batch) -> Tensor:
        bf16 = precision == "bf16"
        return encode(rater.encoder, batch.to(device), batch.size, bf16=bf16)

    none_0D = torch.zeros(0, rater.shape.hidden_size, device=device)
    pooled_mD = torch.cat([none_0D, *(pooled(batch) for batch in companions)])
    return lambda batch: rater.logits_beside(pooled(batch), pooled_mD)


def _features_of_llm(
    rater: WeightingModel, model: LanguageModel, files: RaterFiles, companions: list[Batch]
) -> Score:
    def rows(batch: Batch) -> tuple[Tensor, Tensor]:
        """Features and loss of each window, and its size in the group; 0 without counted labels."""
        found = model.features(batch, files.early_layer)
        assert found.features is not None
        rows_nK = torch.cat([found.features.flat(), found.unit_losses_n[:, None]], dim=1)
        counts_n = found.token_counts_n
        return rows_nK, counts_n.float() if files.by_tokens else (counts_n > 0).float()

    parts = [rows(batch) for batch in companions]

    def score(batch: Batch) -> Tensor:
        rows_BK, sizes_B = rows(batch)
        rows_mK = torch.cat([rows_BK[:0], *(part[0] for part in parts)])
        sizes_m = torch.cat([sizes_B[:0], *(part[1] for part in parts)])
        size = max(1, _LARGEST_GROUPS // (rows_mK.numel() + rows_mK.shape[1]))
        logits = []
        for part_GK, sizes_G in zip(rows_BK.split(size), sizes_B.split(size), strict=True):
            groups = len(part_GK)
            rows_GnK = torch.cat([part_GK[:, None], rows_mK.expand(groups, -1, -1)], dim=1)
            sizes_Gn = torch.cat([sizes_G[:, None], sizes_m.expand(groups, -1)], dim=1)
            logits.append(rater.logits(rater.encoder(rows_GnK, sizes_Gn))[:, 0])
        return torch.cat(logits)

    return score


def _companions(pool: Pool, files: RaterFiles, vocab_size: int, name: str) -> list[Batch]:
    """The first windows of documents that are drawn without replacement."""
    eligible = np.flatnonzero(pool.tokens_D > 0)
    if not len(eligible):
        raise UserError(f"{pool.prefix}: no document has a token; there is nothing to score")
    count = min(files.group_size - 1, len(eligible))
    drawn = np.sort(np.random.default_rng(_SEED).choice(eligible, count, replace=False)).tolist()
    source = TokenSource.of(pool)
    spans = [Span(begin=document, end=document + 1) for document in drawn]
    texts = [source.read(span, vocab_size, name).ids[: files.sequence_length] for span in spans]
    if not texts:  # a group of one
        return []
    lengths_m = np.array([len(text) for text in texts], dtype=np.int64)
    windows: Windows = windows_of(lengths_m, files.sequence_length)
    ids = np.concatenate(texts)
    return [batch_of(ids, windows, chosen_B) for chosen_B in batches_of(lengths_m)]


def _run_config(directory: Path) -> dict[str, Any]:
    """The configuration of the run that trained the model."""
    path = directory.resolve().parent.parent / CONFIG_FILE
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        names = ("data", "sequence_length"), ("weighting", "group"), ("weighting", "early_layer")
        sizes = ("training", "global_batch_size"), ("training", "micro_batch_size")
        for section, key in (*names, *sizes):
            config[section][key]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        raise UserError(
            f"{_OPTION} {directory}: {path} is not the configuration of its run, which has the "
            "length of its windows and the size of its groups; name RUN/weighting/stage_K"
        ) from None
    return config


def _require_tokenizer(directory: Path, shape: WeightingShape, pool: Pool) -> None:
    facts = {} if pool.sidecar is None else facts_in(pool.sidecar.schema_arrow)
    ours, size = facts.get(TOKENIZER_SHA256), int(facts.get(VOCAB_SIZE, shape.vocab_size))
    theirs = shape.tokenizer_sha256 or ours
    if size != shape.vocab_size or (ours is not None and theirs != ours):
        raise UserError(
            f"{_OPTION} {directory}: was trained with tokenizer {(theirs or '')[:12]} of "
            f"{shape.vocab_size} pieces, but {pool.dataset.paths.sidecar} says that the data was "
            f"made with {(ours or '')[:12]} of {size}; its encoder reads ids, so score data of its "
            "own tokenizer"
        )


def _language_model(
    directory: Path, shape: WeightingShape, model: str | None, pool: Pool
) -> ModelFiles:
    if model is None:
        raise UserError(
            f"{_OPTION} {directory}: reads the LLM's features (weighting.encoder llm); name the "
            "checkpoint that it was trained with (--model)"
        )
    files = check_model(model, pool)
    if files.shape.hidden_size != shape.feature_size:
        raise UserError(
            f"--model {files.directory}: has hidden states of width {files.shape.hidden_size}, but "
            f"{_OPTION} {directory} reads those of width {shape.feature_size}; name the LLM of "
            "its run"
        )
    return files
