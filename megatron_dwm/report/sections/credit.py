"""What documents and domains gave to the validation loss: In-Run Data Shapley, to first order."""

from __future__ import annotations

from megatron_dwm.report.content import Cell, Column, Content, Table
from megatron_dwm.report.credit import DomainCredit, count_updates, credit_by_domain
from megatron_dwm.report.documents import WantedDocument
from megatron_dwm.report.run_documents import RunDocuments
from megatron_dwm.report.runs import RunSet

CREDIT_FILE = "credit_by_document.parquet"
_SHOWN = 15
_CHARACTERS = 90
_CREDIT = Column(name="credit", title="credit", unit="sum of η s")
_MEANING = (
    "Credit is the sum over recorded updates of η s: η is the learning rate of the step and "
    "s = <z, gradient of the unit's loss> its alignment (docs/METHOD.md, section 2). That is the "
    "first-order value of In-Run Data Shapley (Wang et al. 2024), with z, the validation gradient "
    "drawn through one optimizer step, in the place of the plain validation gradient. Positive: "
    "training on it lowers the validation loss. The drop also has the unit's weight and its share "
    "of the batch, η s w tokens / (tokens of the batch): the part of the validation loss, in nats, "
    "that it took off in these steps, through their own gradient and not through momentum."
)


def credit(runs: RunSet) -> Content | None:
    """Returns the section, or None if the run has no alignments and its policy computes none."""
    found = runs.documents
    if found is None or not found.sums.aligned_K.any():
        return None
    domains = credit_by_domain(found.over_stages, found.weights.domains)
    return Content(
        id="credit",
        title="Credit",
        lead=_MEANING,
        tables=[
            _by_domain(domains, _counted(runs, found), with_file=runs.with_tables),
            _by_document(found),
        ],
        notes=_without(found),
    )


def _counted(runs: RunSet, found: RunDocuments) -> str:
    rows = int(found.sums.aligned_K.sum())
    updates = count_updates(runs.main.metrics)
    fresh = runs.main.key("weighting", "update_on") == "fresh"
    of_what = (
        " They are of samples that updates drew for themselves, so credit is what a step on those "
        "would have done."
        if fresh
        else ""
    )
    return (
        f"Summed over {rows:,} recorded alignments. The run made {updates:,} updates; nothing is "
        f"scaled up for those without a record, nor for steps without an update.{of_what}"
    )


def _without(found: RunDocuments) -> list[str]:
    notes = []
    if not any(line.get("lr") for line in found.run.lines("train")):
        notes.append("metrics.jsonl has no learning rates, so credits are 0.")
    if not found.has_shares:
        notes.append(
            "A unit's share of the batch is not known (no config.yaml, or weighting.unit_share "
            "equal), so there are no drops."
        )
    return notes


def _by_domain(domains: list[DomainCredit], counted: str, *, with_file: bool) -> Table:
    file = f" Of every document: {CREDIT_FILE}, beside this page." if with_file else ""
    columns = (
        Column(name="domain", title="domain"),
        _CREDIT,
        Column(name="drop", title="drop", unit="nats"),
        Column(name="mean", title="credit of an alignment"),
        Column(name="weight", title="mean weight"),
        Column(name="aligned", title="alignments"),
        Column(name="documents", title="documents"),
    )
    rows: list[list[Cell]] = [
        [
            each.domain,
            each.credit if each.aligned else None,
            each.drop if each.aligned else None,
            each.credit / each.aligned if each.aligned else None,
            each.weight,
            each.aligned,
            each.documents,
        ]
        for each in domains
    ]
    return Table(
        title="Credit by domain",
        columns=columns,
        rows=rows,
        caption=f"{counted} The largest first.{file}",
    )


def _by_document(found: RunDocuments) -> Table:
    columns = (
        Column(name="document", title="document"),
        Column(name="domain", title="domain"),
        _CREDIT,
        Column(name="weight", title="mean weight"),
        Column(name="text", title="beginning"),
    )
    wanted = found.wanted(None, _SHOWN, _CHARACTERS, by="credit")
    most = [document for document in wanted if document.side == "most"]
    least = [document for document in wanted if document.side == "least"]
    return Table(
        title="Credit by document",
        columns=columns,
        rows=[_row(document) for document in (*most, *reversed(least))],
        caption=f"The {len(most)} largest, and then the {len(least)} smallest.",
    )


def _row(document: WantedDocument) -> list[Cell]:
    text = None if document.text is None else " ".join(document.text.split())
    return [str(document.document), document.domain, document.credit, document.weight, text]
