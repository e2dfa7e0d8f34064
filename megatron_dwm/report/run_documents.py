"""The documents of a run: what was recorded of them, their data, and their scores; read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_dwm.config.errors import UserError
from megatron_dwm.report.corpus import Corpus, tokens_in_batch
from megatron_dwm.report.document_scores import read_scores, score_columns, text_statistics
from megatron_dwm.report.document_sums import DocumentSums, sum_documents
from megatron_dwm.report.document_texts import DocumentTexts
from megatron_dwm.report.documents import Measure, WantedDocument, describe, most_and_least
from megatron_dwm.report.learning_rates import LearningRates
from megatron_dwm.report.runs import Run
from megatron_dwm.report.score_correlation import Scores
from megatron_dwm.report.weight_rows import WeightRows

SAMPLED_DOCUMENTS = 1000
"""documents whose text statistics are correlated with weights, if there are no score columns"""


@dataclass(frozen=True, kw_only=True)
class RunDocuments:
    """Documents of a run with recorded weights.

    sums: an entry for each document and stage; may be empty, if no row has a document.
    """

    run: Run
    weights: WeightRows
    sums: DocumentSums
    corpus: Corpus
    texts: DocumentTexts

    @cached_property
    def over_stages(self) -> DocumentSums:
        """An entry for each document."""
        return self.sums.over_stages()

    @property
    def notes(self) -> Sequence[str]:
        """What is missing of the data, and why."""
        return [*self.corpus.notes, *self.texts.notes]

    @property
    def has_scores(self) -> bool:
        """True if sidecars have score columns; otherwise statistics of texts take their place."""
        return bool(score_columns(self.corpus))

    @property
    def has_shares(self) -> bool:
        """True if a unit's share of its batch is known."""
        return tokens_in_batch(self.run) is not None

    def scores(self, max_documents: int = SAMPLED_DOCUMENTS) -> Scores:
        """Returns the scores of all documents, or the text statistics of some of them."""
        documents = self.over_stages.document_K
        if self.has_scores:
            return read_scores(self.corpus, documents)
        return text_statistics(self.texts, documents, max_documents)

    def wanted(
        self,
        stage: int | None,
        count: int,
        max_characters: int,
        by: Measure = "weight",
        domain: str | None = None,
        min_rows: int = 1,
    ) -> list[WantedDocument]:
        """Returns the most and the least wanted documents of a stage; None: of the whole run.

        domain: only its documents. min_rows: only those with as many recorded weights.
        Raises `UserError` if the run has no such domain.
        """
        sums = self.over_stages if stage is None else self.sums
        among_K = sums.rows_K >= min_rows
        if stage is not None:
            among_K &= sums.stage_K == stage
        if domain is not None:
            among_K &= sums.domain_K == self._number_of(domain)
        chosen = most_and_least(sums, count, by, among_K)
        documents = np.unique(sums.document_K[np.concatenate(list(chosen.values()))])
        scores = (
            read_scores(self.corpus, documents)
            if self.has_scores
            else text_statistics(self.texts, documents, max(1, len(documents)))
        )
        return describe(
            sums, chosen, self.weights.domains, self.corpus, self.texts, scores, max_characters
        )

    def _number_of(self, domain: str) -> int:
        names = self.weights.domains
        if domain not in names:
            raise UserError(f"no domain {domain} in weights/*.parquet; it has {', '.join(names)}")
        return names.index(domain)


def read_documents(run: Run) -> RunDocuments | None:
    """Read a run's weights and find its data; None if no weights are recorded.

    Raises `UserError` if a file of weights is broken.
    """
    weights = WeightRows.open(run.path)
    if not weights.files:
        return None
    corpus = Corpus.open(run)
    return RunDocuments(
        run=run,
        weights=weights,
        sums=sum_documents(weights, LearningRates.of(run.metrics), tokens_in_batch(run)),
        corpus=corpus,
        texts=DocumentTexts.open(corpus),
    )
