"""Adds columns to the sidecar of a dataset: `tools/score_data.py`.

Statistics: texts are decoded and measured by several processes. Losses and
scores (perplexity.py, rater.py): a model reads all documents, in this process. The values are kept
in memory, 8 bytes a document and column.
Then the table is written anew, a row group at a time, with the new columns
last, and takes the place of the old one at once. Columns that were there keep their values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_dwm.config.errors import UserError
from megatron_dwm.config.outputs import require_writable_parents, sole_writer, why_unwritable
from megatron_dwm.files.atomic import new_file
from megatron_dwm.files.command_names import name_of_command
from megatron_dwm.files.sidecar_format import OWN_COLUMNS, write_row_groups
from megatron_dwm.selection.pool import Pool, open_pool
from megatron_dwm.selection.record import inputs_of
from megatron_dwm.selection.select import Progress
from megatron_dwm.selection.statistics import STATISTICS, Texts
from megatron_dwm.selection.texts import TextSource, open_texts
from megatron_dwm.selection.workers import Span, map_spans, spans_of

if TYPE_CHECKING:
    from megatron_dwm.selection.language_model import Precision

LOSS_COLUMNS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "loss": lambda losses_D: losses_D,
    "perplexity": np.exp,
}
"""each column of perplexity.py, from the mean losses of documents"""
RATER_COLUMN = "weight"
"""the score of rater.py"""


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """What the user asks of `tools/score_data.py`."""

    prefix: str
    columns: tuple[str, ...]
    """names in `STATISTICS` and `LOSS_COLUMNS`, and `RATER_COLUMN`"""
    tokenizer: str | None = None
    """the tokenizer of the data, which statistics need"""
    model: str | None = None
    """the language model, which losses need, and a rater that reads its features"""
    rater: str | None = None
    """directory of a weighting model"""
    precision: Precision = "fp32"
    context_tokens: int | None = None
    """longest window that the model reads; None: its own context"""
    num_workers: int = 1
    replaces: bool = False
    """True if a column that is there may get new values"""

    @property
    def statistics(self) -> tuple[str, ...]:
        """The columns that are statistics of texts."""
        return tuple(name for name in self.columns if name in STATISTICS)

    @property
    def losses(self) -> tuple[str, ...]:
        """The columns that are losses of a model."""
        return tuple(name for name in self.columns if name in LOSS_COLUMNS)

    @property
    def logits(self) -> tuple[str, ...]:
        """The column of a rater, if it is named."""
        return tuple(name for name in self.columns if name == RATER_COLUMN)


@dataclass(frozen=True, kw_only=True)
class StatisticsWork:
    """Measures the documents of a dataset."""

    source: TextSource
    columns: tuple[str, ...]

    def build(self) -> Callable[[Span], dict[str, np.ndarray]]:
        """Open the texts."""
        read = self.source.open()

        def measure(span: Span) -> dict[str, np.ndarray]:
            texts = Texts(read(span))
            return {name: STATISTICS[name](texts) for name in self.columns}

        return measure


def score(settings: ScoreSettings, progress: Progress) -> dict[str, np.ndarray]:
    """Add the columns, and return their values.

    Raises `UserError` for an unusable dataset or tokenizer, a column that is there, and a sidecar
    that another process is writing.
    """
    paths = open_pool(settings.prefix).dataset.paths
    require_writable_parents([paths.sidecar])
    with sole_writer(paths.sidecar):
        return _score(settings, open_pool(settings.prefix), progress)


def _score(settings: ScoreSettings, pool: Pool, progress: Progress) -> dict[str, np.ndarray]:
    sidecar = pool.require_sidecar(name_of_command("score"))
    _check_columns(settings, sidecar.schema_arrow.names, pool.dataset.paths.sidecar)
    before = inputs_of(pool)
    values = _values(settings, pool, progress)
    if inputs_of(pool) != before:
        raise UserError(f"{pool.prefix}: changed while it was read; begin again")
    write_columns(pool.dataset.paths.sidecar, sidecar, values)
    return values


def write_columns(path: Path, sidecar: pq.ParquetFile, values: dict[str, np.ndarray]) -> None:
    """Write `sidecar` with these columns to `path`, in place of the file that it was read from."""
    schema = sidecar.schema_arrow
    for name, column in values.items():
        field = pa.field(name, pa.from_numpy_dtype(column.dtype))
        at = schema.get_field_index(name)
        schema = schema.append(field) if at < 0 else schema.set(at, field)

    def tables() -> Iterator[pa.Table]:
        row = 0
        for group in range(sidecar.num_row_groups):
            table = sidecar.read_row_group(group)
            columns = {name: table.column(name) for name in table.column_names}
            for name, column in values.items():
                columns[name] = pa.chunked_array([column[row : row + table.num_rows]])
            row += table.num_rows
            yield pa.table([columns[name] for name in schema.names], schema=schema)

    try:
        with new_file(path) as partial:
            write_row_groups(partial, schema, tables())
    except OSError as error:
        words = why_unwritable(error)
        if words is None:
            raise
        raise UserError(f"{path}: cannot be written ({words}); it is as it was") from None


def _check_columns(settings: ScoreSettings, names: Sequence[str], sidecar: Path) -> None:
    known = (*STATISTICS, *LOSS_COLUMNS, RATER_COLUMN)
    for name in settings.columns:
        if name not in known:
            raise UserError(f"--columns {name}: not known; choose among {', '.join(known)}")
        if settings.columns.count(name) > 1:
            raise UserError(f"--columns {name}: named twice")
        assert name not in OWN_COLUMNS
        if name in names and not settings.replaces:
            raise UserError(f"{sidecar}: has a column {name}; pass --replace to give it new values")
    _require_option("--tokenizer", settings.tokenizer, settings.statistics, STATISTICS)
    _require_option("--rater", settings.rater, settings.logits, [RATER_COLUMN])
    if not settings.logits:
        _require_option("--model", settings.model, settings.losses, LOSS_COLUMNS)
    if settings.context_tokens is not None and not settings.losses:
        raise UserError("--context-tokens: has no effect; only columns loss, perplexity read it")


def _require_option(
    option: str, value: str | None, columns: Sequence[str], readers: Iterable[str]
) -> None:
    """Raise `UserError` if the columns need an option that is not given, or none reads it."""
    if columns and value is None:
        raise UserError(f"--columns {columns[0]}: needs {option}")
    if value is not None and not columns:
        raise UserError(
            f"{option} {value}: has no effect; only columns {', '.join(readers)} read it"
        )


def _values(settings: ScoreSettings, pool: Pool, progress: Progress) -> dict[str, np.ndarray]:
    """The values of all columns, in the order in which they were named."""
    found: dict[str, np.ndarray] = {}
    if settings.logits:
        found |= _logits(settings, pool, progress)
    if settings.losses:
        found |= _losses(settings, pool, progress)
    if settings.statistics:
        found |= _measure(settings, pool, progress)
    return {name: found[name] for name in settings.columns}


def _losses(settings: ScoreSettings, pool: Pool, progress: Progress) -> dict[str, np.ndarray]:
    # Imported here: the processes that measure texts do not wait for the LLM's libraries.
    from megatron_dwm.selection.language_model import check_model
    from megatron_dwm.selection.perplexity import document_losses

    if settings.model is None:
        raise UserError(f"--columns {settings.losses[0]}: needs --model")
    files = check_model(settings.model, pool)
    context_tokens = settings.context_tokens or files.context_tokens
    losses_D = document_losses(pool, files, settings.precision, context_tokens, progress)
    return {name: LOSS_COLUMNS[name](losses_D) for name in settings.losses}


def _logits(settings: ScoreSettings, pool: Pool, progress: Progress) -> dict[str, np.ndarray]:
    from megatron_dwm.selection.rater import OWN_ENCODER, check_rater, document_scores

    assert settings.rater is not None
    files = check_rater(settings.rater, settings.model, pool)
    if files.language_model is None and settings.model is not None and not settings.losses:
        raise UserError(f"--model {settings.model}: {OWN_ENCODER}")
    return {RATER_COLUMN: document_scores(pool, files, settings.precision, progress)}


def _measure(settings: ScoreSettings, pool: Pool, progress: Progress) -> dict[str, np.ndarray]:
    assert settings.tokenizer is not None
    source = open_texts(pool, settings.tokenizer)
    work = StatisticsWork(source=source, columns=settings.statistics)
    spans = spans_of(pool.tokens_D)
    found: dict[str, list[np.ndarray]] = {name: [] for name in settings.statistics}
    with progress(pool.dataset.paths.bin.stat().st_size) as advance:
        results = map_spans(work, spans, settings.num_workers)
        for span, result in zip(spans, results, strict=True):
            for name, values in result.items():
                found[name].append(values)
            num_tokens = int(pool.tokens_D[span.begin : span.end].sum())
            advance(num_tokens * pool.dataset.header.itemsize, span.end - span.begin)
    return {name: np.concatenate(blocks or [np.zeros(0)]) for name, blocks in found.items()}
