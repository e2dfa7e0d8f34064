"""`P.select.json`: what was selected from what, and how. It also tells a selection from another.

The record gets its name first and the `.idx` last. So a record without `.bin` or `.idx` is a
selection that was killed while its files got their names; the next run of the same selection
removes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dwm.config.errors import UserError
from megatron_dwm.files.dataset_paths import SIDECAR_SUFFIX, DatasetPaths
from megatron_dwm.selection.choice import Domains
from megatron_dwm.selection.pool import Pool

MODEL_DIGEST = "model_digest"
"""the option that has the content of a language model"""


@dataclass(frozen=True, kw_only=True)
class Count:
    """Documents and tokens of one domain, in the data and in the selection."""

    documents: int
    tokens: int
    chosen_documents: int
    chosen_tokens: int


@dataclass(frozen=True, kw_only=True)
class SelectionRecord:
    """The content of `P.select.json`."""

    method: str
    options: Mapping[str, Any]
    """everything that decides the choice, the seed included"""
    inputs: list[dict[str, Any]]
    """files with their sizes and times of change"""
    domains: dict[str, Count]

    @property
    def total(self) -> Count:
        """The sums over all domains."""
        counts = [asdict(count) for count in self.domains.values()]
        return Count(**{name: sum(c[name] for c in counts) for name in Count.__dataclass_fields__})

    def content(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "method": self.method,
            "options": dict(self.options),
            "inputs": self.inputs,
            "total": asdict(self.total),
            "domains": {name: asdict(count) for name, count in self.domains.items()},
        }


@dataclass(frozen=True, kw_only=True)
class OutputPaths:
    """The files of a selection."""

    record: Path
    dataset: DatasetPaths

    @staticmethod
    def of(prefix: str) -> OutputPaths:
        """The files of the selection with this prefix."""
        return OutputPaths(record=Path(f"{prefix}.select.json"), dataset=DatasetPaths.of(prefix))

    def in_order(self) -> list[Path]:
        """In the order in which they get their names."""
        return [self.record, self.dataset.sidecar, self.dataset.bin, self.dataset.idx]


def inputs_of(pool: Pool) -> list[dict[str, Any]]:
    """The files of `pool` as a record has them."""
    paths = pool.dataset.paths
    files = [path.absolute() for path in (paths.bin, paths.idx, paths.sidecar) if path.exists()]
    stats = [(path, path.stat()) for path in files]
    return [
        {"file": str(path), "size_bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}
        for path, stat in stats
    ]


def count_domains(tokens_D: np.ndarray, domains: Domains, chosen_D: np.ndarray) -> dict[str, Count]:
    """The counts of every domain, in the order of first appearance."""
    size = len(domains.names)

    def sums(weights_D: np.ndarray | None, mask: np.ndarray | slice) -> list[int]:
        weights = None if weights_D is None else weights_D[mask]
        found = np.bincount(domains.codes_D[mask], weights=weights, minlength=size)
        return [int(value) for value in found]

    everything = slice(None)
    rows = zip(
        sums(None, everything),
        sums(tokens_D, everything),
        sums(None, chosen_D),
        sums(tokens_D, chosen_D),
        strict=True,
    )
    return {
        name: Count(documents=a, tokens=b, chosen_documents=c, chosen_tokens=d)
        for name, (a, b, c, d) in zip(domains.names, rows, strict=True)
    }


def finished_before(
    paths: OutputPaths, method: str, options: Mapping[str, Any], inputs: list[dict[str, Any]]
) -> SelectionRecord | None:
    """The record of the same selection, if it is complete at `paths`.

    Raises `UserError` if there is the record of another selection.
    """
    if not paths.record.exists():
        return None
    found = _read(paths.record)
    if MODEL_DIGEST in options:  # older versions did not record it
        found["options"].setdefault(MODEL_DIGEST, options[MODEL_DIGEST])
    for name, ours in (("method", method), ("options", dict(options)), ("inputs", inputs)):
        if found[name] != json.loads(json.dumps(ours)):
            raise UserError(
                f"{paths.record}: a selection with other {name} is here; choose another output or "
                "remove it"
            )
    if not _is_whole(paths):
        return None
    domains = {name: Count(**count) for name, count in found["domains"].items()}
    return SelectionRecord(method=method, options=options, inputs=inputs, domains=domains)


def remove_killed(paths: OutputPaths) -> None:
    """Remove the files of a selection that was killed while they got their names."""
    if paths.record.exists() and not _is_whole(paths):
        for path in paths.in_order():
            path.unlink(missing_ok=True)


def _is_whole(paths: OutputPaths) -> bool:
    """True if no file is missing that the selection had; it has a sidecar if its input has one."""
    names = [Path(each["file"]).name for each in _read(paths.record)["inputs"]]
    wanted = [paths.dataset.bin, paths.dataset.idx]
    if any(name.endswith(SIDECAR_SUFFIX) for name in names):
        wanted.append(paths.dataset.sidecar)
    return all(path.exists() for path in wanted)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not {"method", "options", "inputs", "domains"} <= set(found):
        raise UserError(f"{path}: not the record of a selection; choose another output")
    return found
