"""The sections of the report, one file each, in the order of the page."""

from __future__ import annotations

from megatron_dwm.report.content import Section
from megatron_dwm.report.sections.benchmarks import benchmarks
from megatron_dwm.report.sections.comparison import comparison
from megatron_dwm.report.sections.losses import losses
from megatron_dwm.report.sections.summary import summary
from megatron_dwm.report.sections.weights import weights

SECTIONS: tuple[Section, ...] = (summary, losses, comparison, weights, benchmarks)
