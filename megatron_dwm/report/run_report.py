"""Writes the report of a run: reads all files first, then plots into `RUN/report/`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dwm.config.errors import UserError
from megatron_dwm.config.outputs import require_writable_parents
from megatron_dwm.config.printing import printable
from megatron_dwm.report.figures import draw_losses, draw_weight_by_domain
from megatron_dwm.report.run_files import read_metrics, read_weights
from megatron_dwm.report.tables import (
    first_steps_of_stages,
    held_out_loss,
    skipped,
    training_loss,
    weight_by_domain_over_steps,
)

DEFAULT_TARGET = "target"


def write_report(
    run_dir: Path, compare: Sequence[Path] = (), target_domain: str | None = None
) -> list[Path]:
    """Write the plots of a run: mean weight by domain over steps, and losses with those of other
    runs.

    Returns the paths of the PNG files.

    Args:
        run_dir: the run whose weights are shown.
        compare: other runs, whose losses are shown too.
        target_domain: held-out domain to show first and to mark; None takes the one called
            "target", if there is one.

    Raises:
        UserError: a directory is not a run, `run_dir` has no weights, or the domain is not held
            out.
    """
    names = run_names([run_dir, *compare])
    metrics = dict(zip(names, (read_metrics(path) for path in (run_dir, *compare)), strict=True))
    weights = read_weights(run_dir)
    _print_skipped(metrics)
    held_out = {name: held_out_loss(lines) for name, lines in metrics.items()}
    known = sorted({domain for by_domain in held_out.values() for domain in by_domain})
    target = _target(target_domain, known)
    folder = run_dir / "report"
    weight_png, loss_png = folder / "weight_by_domain.png", folder / "loss.png"
    _require_folder(folder)
    require_writable_parents([weight_png, loss_png])
    draw_weight_by_domain(
        weight_png,
        weight_by_domain_over_steps(weights),
        first_steps_of_stages(weights),
        f"{names[0]}: mean weight by domain",
    )
    training = {name: training_loss(lines) for name, lines in metrics.items()}
    draw_losses(loss_png, training, held_out, target)
    return [weight_png, loss_png]


def _require_folder(folder: Path) -> None:
    """Create the report's folder in the run's directory, unless that name exists."""
    if not os.path.lexists(folder):
        require_writable_parents([folder])
        folder.mkdir()


def _print_skipped(metrics: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """Print how many steps were skipped, and why: their losses are missing in the plots."""
    for name, lines in metrics.items():
        for reason, count in skipped(lines).items():
            print(printable(f"{name}: skipped {count} times: {reason}"), file=sys.stderr)


def _target(wanted: str | None, known: Sequence[str]) -> str | None:
    if wanted is not None and wanted not in known:
        found = ", ".join(known) or "none"
        raise UserError(f"--target-domain {wanted} is not a held-out domain; choose from {found}")
    if wanted is None and DEFAULT_TARGET in known:
        return DEFAULT_TARGET
    return wanted


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
