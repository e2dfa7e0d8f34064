"""The sections of the report, one file each, in the order of the page."""

from __future__ import annotations

from megatron_dwm.report.content import Section
from megatron_dwm.report.sections.benchmarks import benchmarks
from megatron_dwm.report.sections.comparison import comparison
from megatron_dwm.report.sections.credit import credit
from megatron_dwm.report.sections.documents import documents
from megatron_dwm.report.sections.losses import losses
from megatron_dwm.report.sections.preferences import preferences
from megatron_dwm.report.sections.summary import summary
from megatron_dwm.report.sections.tokens import tokens
from megatron_dwm.report.sections.weights import weights

SECTIONS: tuple[Section, ...] = (
    *(summary, losses, comparison, weights, preferences, tokens, documents, credit),
    benchmarks,
)
