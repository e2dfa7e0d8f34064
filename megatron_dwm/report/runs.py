"""The runs of a report: their files, read once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dwm.config.errors import UserError
from megatron_dwm.report.run_config import read_config
from megatron_dwm.report.run_files import ends_unfinished, read_metrics
from megatron_dwm.report.speed import with_speed

if TYPE_CHECKING:
    from megatron_dwm.report.run_documents import RunDocuments

DEFAULT_TARGET = "target"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as its small files tell it; weights are read where they are needed.

    name: short and unique in the report.
    config: `config.yaml`, by section; empty if the file is missing or broken.
    config_text: the same as text.
    metrics: lines of `metrics.jsonl`, sorted by step.
    starts: lines of `starts.jsonl`.
    notes: files that are missing or broken, a sentence each.
    """

    name: str
    path: Path
    metrics: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any] = field(default_factory=dict)
    config_text: str = ""
    starts: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()

    def key(self, section: str, name: str) -> Any:
        """Returns a value of the configuration; None if it is not there."""
        values = self.config.get(section)
        return values.get(name) if isinstance(values, Mapping) else None

    @property
    def policy(self) -> str:
        """Name of the policy; "unknown" without a configuration."""
        return str(self.key("policy", "name") or "unknown")

    def lines(self, phase: str) -> list[Mapping[str, Any]]:
        """Returns the lines of one phase, sorted by step."""
        return [line for line in self.metrics if line["phase"] == phase]

    def last(self, key: str) -> Any:
        """Returns the last value of `key` that is not null, in any line; None if there is none."""
        found = (line[key] for line in reversed(self.metrics) if line.get(key) is not None)
        return next(found, None)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs of different seeds whose configurations differ in nothing else that changes training."""

    name: str
    runs: Sequence[Run]


@dataclass(frozen=True, kw_only=True)
class RunSet:
    """All runs of a report.

    runs: the first is the one that the report is about.
    groups: the same runs; groups and their runs in the order of `runs`.
    baseline: group that others are compared with, or None.
    target: held-out domain that the weights should help, or None.
    scores: results of tools/evaluate.py by the run's name, a list of records each.
    with_tables: files of all documents are written beside the page.
    """

    runs: Sequence[Run]
    groups: Sequence[Group]
    baseline: Group | None = None
    target: str | None = None
    scores: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    with_tables: bool = True

    @property
    def main(self) -> Run:
        """The run that the report is about."""
        return self.runs[0]

    @cached_property
    def documents(self) -> RunDocuments | None:
        """Documents of the main run; None if it has no weights. Raises `UserError` as there."""
        from megatron_dwm.report.run_documents import read_documents

        return read_documents(self.main)

    @property
    def compared(self) -> bool:
        """True if there is more than one group."""
        return len(self.groups) > 1


def read_run(path: Path, name: str) -> Run:
    """Returns a run's small files.

    A missing or broken `config.yaml` or `starts.jsonl` is a note. Raises `UserError` if `path` has
    no usable `metrics.jsonl`.
    """
    metrics = with_speed(read_metrics(path))
    config, text, notes = read_config(path / "config.yaml")
    starts, more = _starts(path / "starts.jsonl")
    if ends_unfinished(path):
        more.append("the last line of metrics.jsonl is unfinished and left out")
    return Run(
        name=name,
        path=path,
        metrics=metrics,
        config=config,
        config_text=text,
        starts=starts,
        notes=[f"{name}: {note}" for note in notes + more],
    )


def _starts(path: Path) -> tuple[list[Mapping[str, Any]], list[str]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return [], ["starts.jsonl is missing, so host, versions and commit are unknown"]
    starts: list[Mapping[str, Any]] = []
    broken = 0
    for line in filter(None, lines):
        try:
            content = json.loads(line)
        except ValueError:
            content = None
        if isinstance(content, dict):
            starts.append(content)
        else:
            broken += 1
    notes = [f"starts.jsonl has {broken} line(s) that are not JSON objects"] if broken else []
    return starts, notes


def run_names(run_dirs: Sequence[Path]) -> list[str]:
    """Returns a short name for each run: as many last parts of its path as make it unique.

    Raises:
        UserError: a run is named twice.
    """
    resolved = [path.resolve() for path in run_dirs]
    for path in resolved:
        if resolved.count(path) > 1:
            raise UserError(f"{path} is named twice; compare a run with other runs")
    for parts in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-parts:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    raise AssertionError(f"different paths with equal names: {resolved}")


def baseline_of(groups: Sequence[Group], name: str | None) -> Group | None:
    """Returns the group with the run called `name`, else the first of uniform weights, else None.

    Raises:
        UserError: no run is called `name`.
    """
    if name is None:
        return next((group for group in groups if group.runs[0].policy == "uniform"), None)
    for group in groups:
        if name in (group.name, *(run.name for run in group.runs)):
            return group
    known = ", ".join(run.name for group in groups for run in group.runs)
    raise UserError(f"--baseline {name} is not a run of this report; choose from {known}")


def target_of(runs: Sequence[Run], wanted: str | None) -> str | None:
    """Returns the held-out domain to show first: `wanted`, else the one called "target".

    Raises:
        UserError: `wanted` is not held out.
    """
    known = held_out_domains(runs)
    if wanted is not None and wanted not in known:
        found = ", ".join(known) or "none"
        raise UserError(f"--target-domain {wanted} is not a held-out domain; choose from {found}")
    return DEFAULT_TARGET if wanted is None and DEFAULT_TARGET in known else wanted


def held_out_domains(runs: Sequence[Run]) -> list[str]:
    """Returns the sorted names of the domains that any of the runs has evaluated."""
    lines = (line for run in runs for line in run.lines("evaluation"))
    return sorted({name for line in lines for name in line.get("domain_loss") or {}})
