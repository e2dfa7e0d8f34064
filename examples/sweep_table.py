"""Prints the table of examples/sweep.sh:   python examples/sweep_table.py OUT

Final held-out losses of the finished runs OUT/SETTING.SEED: mean and standard error over the seeds.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import yaml

from megatron_dwm.config import UserError
from megatron_dwm.config.command_line import run_command
from megatron_dwm.config.printing import printable
from megatron_dwm.report.run_files import read_metrics
from megatron_dwm.report.tables import held_out_loss

Losses = dict[str, float]


def main() -> None:
    """Print the losses (nats per token) of every setting, Markdown."""
    if len(sys.argv) != 2:
        raise UserError("expected one argument, the OUT of a sweep")
    final = _final_losses(Path(sys.argv[1]))
    if not final:
        raise UserError(f"{sys.argv[1]}: no finished run; let examples/sweep.sh end")
    found = {name for by_seed in final.values() for losses in by_seed for name in losses}
    domains = sorted(found, key=lambda name: (name != "target", name))
    _print_row(["held-out loss, nats per token", "seeds", *map(_heading, domains)])
    _print_row(["---", *["---:"] * (len(domains) + 1)])
    for setting, by_seed in final.items():
        losses = [[each[name] for each in by_seed if name in each] for name in domains]
        _print_row([_heading(setting), str(len(by_seed)), *map(_mean_and_error, losses)])


def _final_losses(out: Path) -> dict[str, list[Losses]]:
    """Returns the last losses of every finished run, a list for each setting."""
    found: dict[str, list[Losses]] = {}
    for directory in sorted(out.glob("*.*")):
        if (directory / "metrics.jsonl").is_file():
            lines = read_metrics(directory)
            if lines and lines[-1]["step"] == _planned_steps(directory):
                found.setdefault(directory.name.rsplit(".", 1)[0], []).append(_last(lines))
    return found


def _planned_steps(directory: Path) -> int:
    config = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    return config["training"]["steps"]


def _last(lines: list[dict[str, Any]]) -> Losses:
    return {name: series.value[-1] for name, series in held_out_loss(lines).items()}


def _mean_and_error(values: list[float]) -> str:
    """Returns the mean and, of several values, the standard error of the mean."""
    if len(values) < 2:
        return "".join(f"{value:.3f}" for value in values)
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.3f} ± {error:.3f}"


def _heading(name: str) -> str:
    return printable(name).replace("|", "\\|")


def _print_row(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    run_command(main)
