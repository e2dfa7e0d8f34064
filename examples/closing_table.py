"""Prints the quickstart's closing table:   python examples/closing_table.py WORKDIR

Compares WORKDIR/runs/dwm (weights from the LLM's features) and WORKDIR/runs/dwm_own (from an
encoder of their own) with WORKDIR/runs/uniform at equal steps and data order.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_dwm.config import UserError
from megatron_dwm.config.command_line import run_command
from megatron_dwm.config.printing import printable
from megatron_dwm.report.run_files import read_metrics
from megatron_dwm.report.tables import held_out_loss, mean_weight_by_domain

RUNS = ("uniform", "dwm", "dwm_own")
EXPORTED = ("uniform", "dwm")
# Long enough to have samples of the rare domains, short enough to be "the end" of the run.
LAST_STEPS = 200
JUNK = ("shuffled_words", "random_words", "random_characters")


def main() -> None:
    """Print the tables of a finished quickstart."""
    if len(sys.argv) != 2:
        raise UserError("expected one argument, the WORKDIR of a finished quickstart")
    workdir = Path(sys.argv[1])
    metrics = {name: read_metrics(workdir / "runs" / name) for name in RUNS}
    _print_losses(workdir, metrics)
    _print_weights(workdir, metrics["dwm"])
    _print_times(workdir, metrics)
    _print_files(workdir)


def _print_losses(workdir: Path, metrics: dict[str, list[dict]]) -> None:
    final = {
        name: {domain: series.value[-1] for domain, series in held_out_loss(lines).items()}
        for name, lines in metrics.items()
    }
    scores = {name: _scores(workdir / "export" / f"{name}.json") for name in EXPORTED}
    names = "".join(f"{name:>10}{'change':>10}" for name in RUNS[1:])
    print(f"{'held-out loss, nats per token':32}{RUNS[0]:>10}{names}")
    ordered = sorted(final["dwm"], key=lambda domain: (domain != "target", domain))
    for domain in ordered:
        label = "target (unseen half)" if domain == "target" else domain
        _row(label, [final[name][domain] for name in RUNS])
    print("\nlast words of the target's unseen half (lm-evaluation-harness)")
    for metric in scores["dwm"]:
        _row(metric, [scores[name][metric] for name in EXPORTED])


def _row(label: str, values: list[float]) -> None:
    """Print the baseline's value, then every other run's value and its change."""
    base, *others = values
    cells = "".join(f"{value:10.4g}{value - base:+10.3g}" for value in others)
    print(f"{'  ' + printable(label):32}{base:10.4g}{cells}")


def _scores(file: Path) -> dict[str, float]:
    content = json.loads(file.read_text(encoding="utf-8"))
    return {score["metric"]: score["value"] for score in content["scores"]}


def _print_weights(workdir: Path, metrics: list[dict]) -> None:
    weights = mean_weight_by_domain(workdir / "runs" / "dwm", LAST_STEPS)
    sizes = [line["weight_effective_sample_size"] for line in metrics if line["phase"] == "train"]
    print(f"\nmean weight by domain, last {LAST_STEPS} steps (1 is uniform)")
    for domain, weight in sorted(weights.items(), key=lambda pair: -pair[1]):
        print(f"{'  ' + printable(domain):32}{weight:10.3f}{'   junk' if domain in JUNK else ''}")
    recent = sizes[-LAST_STEPS:]
    print(f"{'  effective sample size':32}{sum(recent) / len(recent):10.3f}   of a batch")


def _print_times(workdir: Path, metrics: dict[str, list[dict]]) -> None:
    print("\ntime, seconds (trainings run side by side where there are two cores)")
    for line in (workdir / "timings.tsv").read_text(encoding="utf-8").splitlines():
        name, seconds = line.split("\t")
        print(f"{'  ' + name:32}{seconds:>10}")
    for name in RUNS:
        steps = [line for line in metrics[name] if line["phase"] == "train"]
        cost = f"{len(steps)} steps, {steps[-1]['flops'] / 1e12:.2f} TFLOP"
        print(f"{'    of it: ' + name:32}{steps[-1]['seconds']:10.0f}   {cost}")


def _print_files(workdir: Path) -> None:
    print("\nfiles")
    for path, what in (
        ("runs/dwm/report", "plots: weights by domain, losses"),
        ("runs/dwm", "the run: metrics.jsonl, weights/, checkpoints/, weighting/, tensorboard/"),
        ("runs/dwm_own, runs/uniform", "the runs to compare with"),
        ("export/dwm", "the model for transformers"),
    ):
        print(f"  {workdir / path}  {what}")


if __name__ == "__main__":
    run_command(main)
