"""The documents that every stage wanted most and least, with their beginnings; searchable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_dwm.report.content import Content
from megatron_dwm.report.documents import WantedDocument, all_equal
from megatron_dwm.report.page import cell_text
from megatron_dwm.report.run_documents import RunDocuments
from megatron_dwm.report.runs import RunSet

_ON_THE_PAGE = 400
_MOST_OF_A_STAGE = 25
_CHARACTERS = 600
_UNITS = {
    "document": "A row of weights/ is a document's piece in a sample",
    "token": "A row of weights/ is a sample, whose weight is the mean over its tokens; its "
    "document is its main one, with most of its tokens",
}
_SAMPLES = "A row of weights/ is a sample; its document is its main one, with most of its tokens"


def documents(runs: RunSet) -> Content:
    """Returns the section with documents of the main run."""
    found = runs.documents
    notes = [] if found is None else list(found.notes)
    wanted = [] if found is None else _wanted(found)
    if found is None:
        notes.append(f"{runs.main.name}: no weights are recorded, so no document is wanted more.")
    elif wanted and all_equal(wanted):
        notes.append("All documents have the same weight, so none is wanted more than another.")
        wanted = []
    elif not wanted:
        notes.append("weights/*.parquet has no document of a weight, so none can be shown.")
    return Content(
        id="documents",
        title="Documents",
        lead="The most and the least wanted documents of every stage, by their mean weight."
        if wanted
        else "",
        notes=notes,
        template="documents.html.j2" if wanted else None,
        values={
            "unit": _UNITS.get(str(runs.main.key("weighting", "unit")), _SAMPLES),
            "documents": [_shown(document) for document in wanted],
            "stages": sorted({document.stage for document in wanted}),
            "domains": sorted({document.domain for document in wanted}),
        },
    )


def _wanted(found: RunDocuments) -> list[WantedDocument]:
    stages: Sequence[int] = found.sums.stages
    count = max(1, min(_MOST_OF_A_STAGE, _ON_THE_PAGE // (2 * max(1, len(stages)))))
    # With very many stages, those at even distances, the first and the last among them.
    most = _ON_THE_PAGE // 2
    if len(stages) > most:
        stages = [stages[i * (len(stages) - 1) // (most - 1)] for i in range(most)]
    return [document for stage in stages for document in found.wanted(stage, count, _CHARACTERS)]


def _shown(document: WantedDocument) -> dict[str, Any]:
    """Returns what the template shows of a document: text and strings."""
    numbers = {
        "weight": document.weight,
        "alignment": document.alignment,
        "times recorded": document.rows,
        **document.scores,
    }
    source = None
    if document.source is not None:
        source = f"{document.source}, record {document.record}"
    return {
        "stage": document.stage,
        "side": document.side,
        "rank": document.rank,
        "number": document.document,
        "domain": document.domain,
        "source": source,
        "numbers": {name.replace("_", " "): cell_text(value) for name, value in numbers.items()},
        "text": None if document.text is None else without_controls(document.text),
    }


def without_controls(text: str) -> str:
    """Returns text in which a control character, which HTML forbids, is a replacement character."""
    return "".join(c if c in "\n\t" or c.isprintable() or ord(c) > 0x9F else "\ufffd" for c in text)
