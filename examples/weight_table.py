"""Prints the mean weight of every domain:   python examples/weight_table.py WORKDIR

Means over the last quarter of the steps of the runs WORKDIR/METHOD.SEED, in which every unit
counts in proportion to its tokens; mean and standard deviation over the seeds. A unit has the
domain of its document; a window has that of the document with most of its tokens.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.dataset as ds

from megatron_dwm.config import UserError
from megatron_dwm.config.command_line import run_command
from megatron_dwm.config.printing import printable


def main() -> None:
    """Print the table, Markdown."""
    if len(sys.argv) != 2:
        raise UserError("expected one argument, the WORKDIR of a study")
    found: dict[str, list[dict[str, float]]] = {}
    workdir = Path(sys.argv[1])
    for directory in sorted({file.parent for file in workdir.glob("*.*/weights/*.parquet")}):
        method = directory.parent.name.rsplit(".", 1)[0]
        found.setdefault(method, []).append(_mean_weights(directory))
    if not found:
        raise UserError(f"{workdir}: no run METHOD.SEED with weights in it; name a study's WORKDIR")
    domains = sorted({name for runs in found.values() for means in runs for name in means})
    print("| mean weight | " + " | ".join(printable(name) for name in domains) + " |")
    print("| --- " * (len(domains) + 1) + "|")
    for method, runs in found.items():
        cells = [_spread([means[name] for means in runs if name in means]) for name in domains]
        print(f"| {method} | " + " | ".join(cells) + " |")


def _mean_weights(directory: Path) -> dict[str, float]:
    columns = ["step", "domain", "tokens", "weight"]
    table = ds.dataset(directory, format="parquet").to_table(columns=columns)
    # Every file has a dictionary of its own names, and groups need one for all.
    table = table.set_column(1, "domain", pc.cast(table["domain"], "string"))
    last = pc.max(table["step"]).as_py()
    table = table.filter(pc.greater(table["step"], 0.75 * last))
    weighed = pc.multiply(pc.cast(table["weight"], "double"), table["tokens"])
    table = table.append_column("weighed", weighed)
    sums = table.group_by("domain").aggregate([("weighed", "sum"), ("tokens", "sum")])
    return {row["domain"]: row["weighed_sum"] / row["tokens_sum"] for row in sums.to_pylist()}


def _spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}" if values else "-"


if __name__ == "__main__":
    run_command(main)
