"""Prints the table of examples/study.sh:   python examples/study_table.py WORKDIR [--settings]

Mean and standard deviation over the seeds, at equal steps, of the runs WORKDIR/METHOD.SEED. With
--settings it prints the table of examples/sweep.sh: final losses of the runs WORKDIR/SETTING.SEED,
mean and standard error, none of them a baseline.
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

BASE = "uniform"
LAST_STEPS = 200

Lines = list[dict[str, Any]]


def main() -> None:
    """Print the table of a study or a sweep."""
    words = [word for word in sys.argv[1:] if word != "--settings"]
    if len(words) != 1:
        raise UserError("expected one argument, the WORKDIR of a study, and --settings for a sweep")
    runs = _runs(Path(words[0]))
    if len(words) < len(sys.argv) - 1:
        _print_settings(words[0], runs)
        return
    _print_study(words[0], runs)


def _print_settings(workdir: str, runs: dict[str, dict[str, Lines]]) -> None:
    """Print the final held-out losses (nats a token) of every setting, Markdown."""
    if not runs:
        raise UserError(f"{workdir}: no finished run; let examples/sweep.sh end")
    final = {
        setting: {seed: _final(lines) for seed, lines in by_seed.items()}
        for setting, by_seed in runs.items()
    }
    found = {
        domain for by_seed in final.values() for losses in by_seed.values() for domain in losses
    }
    domains = sorted(found, key=_target_first)
    _print_row(["held-out loss, nats a token", "seeds", *map(_heading, domains)])
    _print_row(["---", *["---:"] * (len(domains) + 1)])
    for setting, by_seed in final.items():
        losses = [[each[name] for each in by_seed.values() if name in each] for name in domains]
        _print_row([_heading(setting), str(len(by_seed)), *map(_mean_and_error, losses)])


def _mean_and_error(values: list[float]) -> str:
    """Returns the mean and, of several values, the standard error of the mean."""
    if len(values) < 2:
        return "".join(f"{value:.3f}" for value in values)
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.3f} ± {error:.3f}"


def _target_first(name: str) -> tuple[bool, str]:
    return name != "target", name


def _heading(name: str) -> str:
    return printable(name).replace("|", "\\|")


def _print_row(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |")


def _print_study(workdir: str, runs: dict[str, dict[str, Lines]]) -> None:
    """Print the study's table, Markdown: every method's change against uniform weights."""
    if BASE not in runs:
        raise UserError(
            f"{workdir}: no finished run of {BASE} to compare with; let examples/study.sh end"
        )
    domains = sorted(_final(next(iter(runs[BASE].values()))), key=_target_first)
    columns = [
        *domains,
        "effective sample size",
        "seconds",
        "TFLOP",
        "uniform's end reached at step",
    ]
    print("| | seeds | " + " | ".join(map(_heading, columns)) + " |")
    print("| --- " * (len(columns) + 2) + "|")
    for method, by_seed in runs.items():
        cells = [_cell(method, by_seed, runs[BASE], domain) for domain in domains]
        print(
            f"| {method} | {len(by_seed)} | " + " | ".join([*cells, *_costs(by_seed, runs)]) + " |"
        )


def _runs(workdir: Path) -> dict[str, dict[str, Lines]]:
    """Returns the lines of every finished run by method and seed, uniform first."""
    found: dict[str, dict[str, Lines]] = {}
    for directory in sorted(
        workdir.glob("*.*"), key=lambda path: (not path.name.startswith(BASE), path)
    ):
        if (directory / "metrics.jsonl").is_file():
            method, seed = directory.name.rsplit(".", 1)
            lines = read_metrics(directory)
            if lines and lines[-1]["step"] == _planned_steps(directory):
                found.setdefault(method, {})[seed] = lines
    return found


def _planned_steps(directory: Path) -> int:
    config = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    return config["training"]["steps"]


def _final(lines: Lines) -> dict[str, float]:
    return {name: series.value[-1] for name, series in held_out_loss(lines).items()}


def _cell(method: str, by_seed: dict[str, Lines], base: dict[str, Lines], domain: str) -> str:
    """Returns the baseline's loss, or another method's change against it, seed by seed."""
    if method == BASE:
        return _spread([_final(lines)[domain] for lines in by_seed.values()], ".3f")
    changes = [_final(by_seed[seed])[domain] - _final(base[seed])[domain] for seed in by_seed]
    return _spread(changes, "+.3f")


def _costs(by_seed: dict[str, Lines], runs: dict[str, dict[str, Lines]]) -> list[str]:
    train = {
        seed: [line for line in lines if line["phase"] == "train"]
        for seed, lines in by_seed.items()
    }
    sizes = [
        statistics.mean(line["weight_effective_sample_size"] for line in lines[-LAST_STEPS:])
        for lines in train.values()
    ]
    return [
        _spread(sizes, ".2f"),
        _spread([lines[-1]["seconds"] for lines in train.values()], ".0f"),
        _spread([lines[-1]["flops"] / 1e12 for lines in train.values()], ".2f"),
        ", ".join(_reached(by_seed[seed], runs[BASE][seed]) for seed in sorted(by_seed)),
    ]


def _reached(lines: Lines, base: Lines) -> str:
    """Returns the first step at which the target's loss is at most the baseline's last one."""
    goal = _final(base)["target"]
    series = held_out_loss(lines)["target"]
    steps = [
        int(step) for step, loss in zip(series.step, series.value, strict=True) if loss <= goal
    ]
    return str(steps[0]) if steps else "never"


def _spread(values: list[float], form: str) -> str:
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):{form.lstrip('+')}}"


if __name__ == "__main__":
    run_command(main)
