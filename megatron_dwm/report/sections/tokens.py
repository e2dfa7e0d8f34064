"""What methods that weigh tokens kept: by domain, by excess loss, and inside some rows."""

from __future__ import annotations

from typing import Any

from megatron_dwm.report.charts import histogram, lines
from megatron_dwm.report.content import Cell, Column, Content, Figure, columnar
from megatron_dwm.report.curves import abscissas, at_steps
from megatron_dwm.report.document_texts import DocumentTexts
from megatron_dwm.report.over_steps import MAX_LINES, dotted, present
from megatron_dwm.report.page import cell_text
from megatron_dwm.report.run_documents import RunDocuments
from megatron_dwm.report.runs import Run, RunSet
from megatron_dwm.report.sections.documents import without_controls
from megatron_dwm.report.token_rows import (
    TokenFiles,
    TokenRow,
    excess_histogram,
    kept_shares,
    rows_in_full,
)

_ROWS = 12
_TOKENS_OF_A_ROW = 1024
_KEPT = Column(name="kept", title="kept tokens", unit="fraction")
_STATES = ("kept", "dropped")


def tokens(runs: RunSet) -> Content | None:
    """Returns the section, or None if the main run does not weigh tokens."""
    run = runs.main
    files = TokenFiles.open(run.path)
    if not files.paths and not files.notes:
        if run.key("weighting", "unit") != "token":
            return None
        return Content(id="tokens", title="Tokens", notes=[_why_missing(run)])
    notes = list(files.notes)
    by_excess = _by_excess(files)
    if by_excess is None:
        notes.append("No excess losses are recorded: no reference had been read yet.")
    rows = _rows(files, runs.documents, notes)
    return Content(
        id="tokens",
        title="Tokens",
        lead="Which tokens of its batches the run trained on.",
        figures=present([_by_domain(files, run, runs), by_excess]),
        notes=notes,
        template="tokens.html.j2" if rows else None,
        values={"rows": rows},
    )


def _why_missing(run: Run) -> str:
    return (
        f"{run.name}: no tokens in token_weights/*.parquet. They are written with each checkpoint, "
        "every logging.weights_interval_steps steps (0 records none); older versions wrote none."
    )


def _by_domain(files: TokenFiles, run: Run, runs: RunSet) -> Figure | None:
    shares = kept_shares(files)
    if shares is None:
        return None
    order = sorted(range(len(shares.domains)), key=lambda d: -shares.counted_TD[:, d].sum())
    over = at_steps(run, runs, shares.step_T).tolist()
    rows: list[list[Cell]] = [
        [shares.domains[d], *over[t], float(shares.kept_TD[t, d] / shares.counted_TD[t, d])]
        for d in order[:MAX_LINES]
        for t in range(len(over))
        if shares.counted_TD[t, d]
    ]
    names = list(dict.fromkeys(str(row[0]) for row in rows))
    columns = (Column(name="domain", title="domain"), *abscissas(runs), _KEPT)
    return Figure(
        id="kept_by_domain",
        title="Kept tokens by domain",
        caption="Of all rows of the recorded steps, by their main document's domain. An interval "
        "without rows of a domain is left out.",
        columns=columns,
        data=columnar(columns, rows),
        chart=lines(_KEPT, color="domain", names=names, dotted=dotted(["domain"], rows)),
        series="domain",
        names=names,
        wide=True,
    )


def _by_excess(files: TokenFiles) -> Figure | None:
    found = excess_histogram(files)
    if found is None:
        return None
    centers = (found.edges[:-1] + found.edges[1:]) / 2
    rows: list[list[Cell]] = [
        [name, float(center), int(count)]
        for name, counts in zip(_STATES, (found.kept, found.dropped), strict=True)
        for center, count in zip(centers, counts, strict=True)
    ]
    x = Column(name="excess", title="excess loss", unit="nats")
    y = Column(name="count", title="tokens")
    columns = (Column(name="state", title="token"), x, y)
    return Figure(
        id="excess_loss",
        title="Excess loss of kept and dropped tokens",
        caption="Loss less the reference's, of the tokens that were recorded in full (the first "
        "rows of each recorded batch). The outermost points have all tokens beyond.",
        columns=columns,
        data=columnar(columns, rows),
        chart=histogram(x, y, "state", _STATES),
        series="state",
        names=_STATES,
        wide=True,
    )


def _rows(files: TokenFiles, documents: RunDocuments | None, notes: list[str]) -> list[Any]:
    """Returns the rows that the template shows, each with its tokens, the latest first."""
    texts = None if documents is None else documents.texts
    found = rows_in_full(files, _ROWS)
    if found and (texts is None or texts.tokenizer is None):
        notes.append("The tokenizer cannot be read, so tokens are shown as ids.")
    return [_row(row, texts) for row in reversed(found)]


def _row(row: TokenRow, texts: DocumentTexts | None) -> dict[str, Any]:
    ids = row.ids[:_TOKENS_OF_A_ROW]
    spelled = None if texts is None else texts.tokens(ids)
    shown = [f" {token}" for token in ids] if spelled is None else spelled
    largest = max(1.0, *row.weights)
    return {
        "step": row.step,
        "domain": row.domain,
        "document": row.document,
        "more": len(row.ids) - len(ids),
        "kept": sum(weight > 0 for weight in row.weights),
        "counted": sum(weight >= 0 for weight in row.weights),
        "tokens": [
            {
                "text": without_controls(text),
                "state": "none" if weight < 0 else "kept" if weight > 0 else "dropped",
                "share": round(max(weight, 0.0) / largest, 3),
                "title": _title(row, number),
            }
            for number, (text, weight) in enumerate(zip(shown, row.weights, strict=False))
        ],
    }


def _title(row: TokenRow, number: int) -> str:
    if row.weights[number] < 0:
        return "its loss does not count"
    numbers = {"weight": row.weights[number], "loss": row.losses[number]}
    if row.excess is not None:
        numbers["excess"] = row.excess[number]
    return ", ".join(f"{name} {cell_text(round(value, 4))}" for name, value in numbers.items())
