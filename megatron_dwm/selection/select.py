"""A selection from scores to files: `tools/select_data.py`.

A method gives every document a score (`ScoringMethod`); choice.py draws by them; copy.py writes
what was drawn, documents in the order of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_dwm.config.errors import UserError
from megatron_dwm.config.outputs import (
    refuse_existing,
    require_possible_names,
    require_writable_parents,
    sole_writer,
    why_unwritable,
)
from megatron_dwm.files.atomic import new_files, partial_path, write_json
from megatron_dwm.selection.choice import Domains, Draw, Scores, choose, require_enough
from megatron_dwm.selection.copy import Advance, copy_index, copy_rows, copy_tokens
from megatron_dwm.selection.pool import Pool, open_pool
from megatron_dwm.selection.record import (
    OutputPaths,
    SelectionRecord,
    count_domains,
    finished_before,
    inputs_of,
    remove_killed,
)

Progress = Callable[[int], AbstractContextManager[Advance]]
"""Shows progress over a number of bytes."""


class ScoringMethod(Protocol):
    """Gives every document a score."""

    @property
    def name(self) -> str:
        """As typed on the command line."""
        ...

    def options(self) -> dict[str, Any]:
        """What decides the scores, for the record; `UserError` if it names a missing file."""
        ...

    def scores(self, pool: Pool, progress: Progress, scratch: Path) -> Scores:
        """Score all documents; `scratch` is a folder for temporary files.

        Raises `UserError` if `pool` lacks what the method reads.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What the user asks for, beside the method."""

    input_prefix: str
    output_prefix: str
    draw: Draw
    domain_key: str
    names_domain_key: bool
    """True if the user asked for this column of domains, so that it has to be there"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A selection that is complete."""

    record: SelectionRecord
    was_complete: bool
    """True if it was there already and nothing was done"""
    has_sidecar: bool


def select(selection: Selection, method: ScoringMethod, progress: Progress) -> Outcome:
    """Write the selection, or find that it is there.

    Raises `UserError` for an unusable input, an option that does not fit it, a budget larger than
    the data, and an output that exists or that another process is writing.
    """
    pool = open_pool(selection.input_prefix)
    paths = OutputPaths.of(selection.output_prefix)
    require_possible_names(paths.in_order())
    options = {**_options(selection), **method.options()}
    done = finished_before(paths, method.name, options, inputs_of(pool))
    if done is not None:
        return Outcome(record=done, was_complete=True, has_sidecar=pool.sidecar is not None)
    require_writable_parents([partial_path(path) for path in paths.in_order()])
    try:
        with sole_writer(paths.record):
            remove_killed(paths)
            refuse_existing(paths.in_order())
            record = _select(pool, selection, method, options, progress)
    except OSError as error:
        words = why_unwritable(error)
        if words is None:
            raise
        raise UserError(f"{paths.dataset.bin}: the output cannot be written ({words})") from None
    return Outcome(record=record, was_complete=False, has_sidecar=pool.sidecar is not None)


def _select(
    pool: Pool,
    selection: Selection,
    method: ScoringMethod,
    options: Mapping[str, Any],
    progress: Progress,
) -> SelectionRecord:
    paths = OutputPaths.of(selection.output_prefix)
    inputs = inputs_of(pool)
    domains = _domains(pool, selection)
    # Scoring may take hours, so what cannot succeed is refused before.
    require_enough(pool.tokens_D, domains, selection.draw)
    scores = method.scores(pool, progress, paths.record.parent)
    chosen_D = choose(scores, pool.tokens_D, domains, selection.draw)
    record = SelectionRecord(
        method=method.name,
        options=options,
        inputs=inputs,
        domains=count_domains(pool.tokens_D, domains, chosen_D),
    )
    _write(pool, chosen_D, record, paths, progress)
    return record


def _options(selection: Selection) -> dict[str, Any]:
    draw = selection.draw
    return {
        "tokens": draw.tokens,
        "seed": draw.seed,
        "top_k": draw.top_k,
        "temperature": draw.temperature,
        "domain_key": selection.domain_key,
        "domain_shares": None if draw.shares is None else dict(draw.shares),
    }


def _domains(pool: Pool, selection: Selection) -> Domains:
    shares: Mapping[str, float] = selection.draw.shares or {}
    option = "--domain-shares" if shares else "--domain-key"
    asked = bool(shares) or selection.names_domain_key
    domains = pool.domains(selection.domain_key, option if asked else None)
    for name in shares:
        if name not in domains.names:
            raise UserError(
                f"--domain-shares {name}: no document has this domain; column "
                f"{selection.domain_key} has {', '.join(sorted(domains.names))}"
            )
    return domains


def _write(
    pool: Pool,
    chosen_D: np.ndarray,
    record: SelectionRecord,
    paths: OutputPaths,
    progress: Progress,
) -> None:
    size_bytes = pool.dataset.paths.bin.stat().st_size
    refuse_existing(paths.in_order())
    with new_files(paths.in_order()) as partials, progress(size_bytes) as advance:
        copy_tokens(pool, chosen_D, partials[paths.dataset.bin], advance)
        copy_index(pool, chosen_D, partials[paths.dataset.idx])
        if pool.sidecar is not None:
            copy_rows(pool, chosen_D, partials[paths.dataset.sidecar])
        if inputs_of(pool) != record.inputs:
            raise UserError(f"{pool.prefix}: changed while it was read; begin again")
        write_json(partials[paths.record], record.content(), indent=1)
        refuse_existing(paths.in_order())
