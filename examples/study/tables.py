"""The study's tables, Markdown: changes against uniform at equal tokens and at equal FLOPs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean

from examples.study.contrasts import UNIFORMS, Cell, Comparison
from examples.study.spec import BASE, Part
from examples.study.statistics import Difference

NONE = "-"


def equal_tokens(found: Comparison, part: Part, cell: Cell) -> str:
    """Returns a table of every method's change against uniform at equal steps and data order."""
    domains, rows = domains_of(found, cell), []
    for method in trained(found, part, cell):
        if method == BASE:
            losses = [run.last_losses() for run in found.by_seed(cell, BASE).values()]
            texts = [f"{mean(each[name] for each in losses):.3f}" for name in domains]
        else:
            texts = [shown(found.change(cell, method, [name])) for name in domains]
        seeds = str(len(found.pairs(cell, method)))
        rows.append([f"`{method}`", seeds, *texts, *_costs(found, cell, method)])
    heads = ["method", "seeds", *domains, "effective sample size", "FLOPs", "seconds"]
    return table(heads, rows)


def equal_work(found: Comparison, part: Part, cell: Cell) -> str:
    """Returns a table of every method's change against uniform with the same FLOPs.

    Uniform's loss at a method's FLOPs lies between its runs of different lengths.
    """
    domains = domains_of(found, cell)
    rows = [
        [
            f"`{method}`",
            _costs(found, cell, method)[1],
            *(shown(found.change_at_equal_work(cell, method, [name])) for name in domains),
        ]
        for method in trained(found, part, cell)
        if method not in UNIFORMS
    ]
    return table(["method", "FLOPs", *domains], rows)


def by_size(found: Comparison, methods: Sequence[str], groups: Mapping[str, Sequence[str]]) -> str:
    """Returns a table of methods' changes at every size, for groups of domains."""
    _, corpus, target = found.first_cell
    rows = []
    for method in methods:
        for size in found.study.sizes:
            cell = (size, corpus, target)
            pairs = found.pairs(cell, method)
            if pairs:
                changes = [shown(found.change(cell, method, group)) for group in groups.values()]
                counts = [str(len(pairs)), f"{pairs[0][1].flops:.2g}"]
                rows.append(
                    [f"`{method}`", size, *counts, *changes, _costs(found, cell, method)[1]]
                )
    return table(["method", "size", "seeds", "uniform's FLOPs", *groups, "FLOPs"], rows)


def trained(found: Comparison, part: Part, cell: Cell) -> list[str]:
    """Returns the methods of a part of which at least one seed can be compared with uniform."""
    return [method for method in part.methods if found.pairs(cell, method)]


def domains_of(found: Comparison, cell: Cell) -> list[str]:
    """Returns the domains of the held-out text."""
    outcomes = list(found.by_seed(cell, BASE).values())
    return list(outcomes[0].losses.by_domain) if outcomes else []


def work_of(found: Comparison, cell: Cell, method: str) -> str:
    """Returns the FLOPs of a method as a multiple of uniform's."""
    pairs = found.pairs(cell, method)
    return _costs(found, cell, method)[1] if pairs else NONE


def shown(change: Difference | None, digits: int = 3) -> str:
    """Returns a change with its 95 % interval; bold if the interval is all below or above 0."""
    if change is None:
        return NONE
    if math.isnan(change.half_width):
        return f"{change.mean:+.{digits}f}"
    text = f"{change.mean:+.{digits}f} ± {change.half_width:.{digits}f}"
    return f"**{text}**" if abs(change.mean) > change.half_width else text


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _costs(found: Comparison, cell: Cell, method: str) -> list[str]:
    """Returns the effective sample size, and FLOPs and seconds as multiples of uniform's."""
    pairs = found.pairs(cell, method)
    size = mean(ours.sample_size for ours, _ in pairs)
    work = mean(ours.flops / theirs.flops for ours, theirs in pairs)
    seconds = mean(ours.seconds / theirs.seconds for ours, theirs in pairs)
    return [f"{size:.2f}", f"{work:.2f}", f"{seconds:.1f}"]
