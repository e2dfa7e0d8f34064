"""What the weights follow: scores of documents, and the alignments that they are learned from."""

from __future__ import annotations

import numpy as np

from megatron_dwm.files.command_names import name_of_command
from megatron_dwm.report.charts import fan, lines
from megatron_dwm.report.content import Cell, Column, Content, Figure, columnar
from megatron_dwm.report.curves import abscissas, at_steps, bin_edges, bin_of
from megatron_dwm.report.document_scores import TOKENS_OF_TEXT
from megatron_dwm.report.over_steps import FEW_POINTS, dotted, present
from megatron_dwm.report.run_documents import SAMPLED_DOCUMENTS, RunDocuments
from megatron_dwm.report.runs import Run, RunSet
from megatron_dwm.report.score_correlation import correlate_scores
from megatron_dwm.report.weight_against_alignment import (
    BatchCorrelation,
    correlate_batches,
    map_weights,
)

_BINS = 60
_CORRELATION = Column(name="correlation", title="correlation", unit="Pearson's r")
_SCORE = Column(name="score", title="score")
_EDGES = ("from_5_percent", "from_25_percent", "median", "to_75_percent", "to_95_percent")
_FRACTIONS = (0.05, 0.25, 0.5, 0.75, 0.95)
_NO_ALIGNMENTS = (
    "No alignments are recorded, so weights cannot be compared with what would have helped: "
    "either the policy computes none, or no update was made since weights are recorded."
)


def preferences(runs: RunSet) -> Content:
    """Returns the section about the main run's preferences."""
    found = runs.documents
    notes, figures = [], []
    if found is None:
        notes.append(f"{runs.main.name}: no weights are recorded, so there are no preferences.")
    else:
        batches = correlate_batches(found.weights)
        figures = [
            _with_scores(found, runs, notes),
            _with_alignments(runs.main, runs, batches),
            _by_alignment(found, batches),
        ]
        if not len(batches):
            notes.append(_NO_ALIGNMENTS)
    return Content(
        id="preferences",
        title="Preferences",
        lead=f"What the weights of {runs.main.name} follow.",
        figures=present(figures),
        notes=notes,
    )


def _with_scores(found: RunDocuments, runs: RunSet, notes: list[str]) -> Figure | None:
    scores, weights = found.scores(), found.weights
    if not len(scores):
        notes.append(
            "The documents have neither scores in a sidecar nor a text that can be read, so "
            "weights cannot be compared with them."
        )
        return None
    correlation = correlate_scores(weights, scores, weights.first_step, weights.last_step)
    over = at_steps(found.run, runs, correlation.step_T)
    rows: list[list[Cell]] = [
        [name, *point, float(value)]
        for column, name in enumerate(correlation.names)
        for point, value in zip(
            over.tolist(), correlation.correlation_TC[:, column].tolist(), strict=True
        )
        if value == value
    ]
    if not rows:
        notes.append("Weights or scores are the same in all rows, so they have no correlation.")
        return None
    columns = (_SCORE, *abscissas(runs), _CORRELATION)
    names = list(dict.fromkeys(str(row[0]) for row in rows))
    dots = dotted(["score"], rows)
    return Figure(
        id="score_correlation",
        title="Correlation of weights with scores",
        caption=_caption_of_scores(found, len(scores)),
        columns=columns,
        data=columnar(columns, rows),
        chart=lines(_CORRELATION, color="score", names=names, reference=0.0, dotted=dots),
        series="score",
        names=names,
        wide=True,
    )


def _caption_of_scores(found: RunDocuments, count: int) -> str:
    what = (
        f"Scores are the numeric columns of the data's sidecar, of {count:,} documents."
        if found.has_scores
        else f"The sidecar has no score columns ({name_of_command('score')} adds them), so these "
        f"are statistics of the text of {count:,} documents, at most {SAMPLED_DOCUMENTS:,}, each "
        f"of its first {TOKENS_OF_TEXT:,} tokens."
    )
    main = (
        " The score of a sample is that of its main document, the one with most of its tokens."
        if found.run.key("weighting", "unit") != "document"
        else ""
    )
    return f"Over the rows of each interval of steps. {what}{main}"


def _with_alignments(run: Run, runs: RunSet, batches: BatchCorrelation) -> Figure | None:
    known = ~np.isnan(batches.correlation_B)
    if not known.any():
        return None
    steps, values = batches.step_B[known], batches.correlation_B[known]
    edges = bin_edges(steps, _BINS)
    at = bin_of(steps, edges)
    table = [
        [
            steps[at == i].mean(),
            values[at == i].mean(),
            values[at == i].min(),
            values[at == i].max(),
        ]
        for i in np.unique(at)
    ]
    over = at_steps(run, runs, np.array([row[0] for row in table]))
    rows: list[list[Cell]] = [
        [*point, *map(float, row[1:])] for point, row in zip(over.tolist(), table, strict=True)
    ]
    edge = [Column(name=n, title=f"correlation, {n}", unit="Pearson's r") for n in ("low", "high")]
    columns = (*abscissas(runs), _CORRELATION, *edge)
    return Figure(
        id="alignment_correlation",
        title="Correlation of weights with alignments",
        caption="Inside the batch of each recorded update: is the weighting model right? Above 0 "
        "it gives more weight to what lowers the validation loss. The band reaches from the lowest "
        "to the highest batch of an interval; weights are those before the update.",
        columns=columns,
        data=columnar(columns, rows),
        chart=lines(_CORRELATION, band=True, reference=0.0, points=len(rows) <= FEW_POINTS),
    )


def _by_alignment(found: RunDocuments, batches: BatchCorrelation) -> Figure | None:
    counted = map_weights(found.weights, batches)
    if counted is None:
        return None
    centers = (counted.alignment_edges[:-1] + counted.alignment_edges[1:]) / 2
    quantiles, rows_A = counted.quantiles(_FRACTIONS), counted.counts_AW.sum(axis=1)
    rows: list[list[Cell]] = [
        [float(center), *quantile, float(mean), int(count)]
        for center, quantile, mean, count in zip(
            centers, quantiles.tolist(), counted.mean_weight_A, rows_A, strict=True
        )
        if count
    ]
    x = Column(name="alignment", title="alignment", unit="standard deviations of its batch")
    y = Column(name="weight", title="weight", unit="1 = uniform")
    edges = [Column(name=n, title=n.replace("_", " "), unit=y.unit) for n in _EDGES]
    columns = (x, *edges, Column(name="mean", title="mean weight"), Column(name="n", title="rows"))
    bands = ((_EDGES[0], _EDGES[4]), (_EDGES[1], _EDGES[3]))
    return Figure(
        id="weight_by_alignment",
        title="Weight by alignment",
        caption="All rows of updates by their alignment, standardized inside their batch: median, "
        "middle half (dark) and middle 90 % (pale) of their weights. It rises where the weighting "
        "model is right. The outermost points have all rows beyond.",
        columns=columns,
        data=columnar(columns, rows),
        chart=fan(x, y, bands, "median", reference=1.0),
    )
