"""The study's tables, Markdown: changes against uniform at equal tokens and at equal FLOPs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean

from examples.study.contrasts import UNIFORMS, Cell, Comparison
from examples.study.spec import BASE, Part
from examples.study.statistics import Difference

NONE = "-"
FEWEST = 3
"""seeds of which an interval says anything"""
_SAME_WORK = "1.00"


def equal_tokens(found: Comparison, part: Part, cell: Cell) -> str:
    """Returns a table of every method's change against uniform at equal steps."""
    domains, rows = domains_of(found, cell), []
    for method in trained(found, part, cell):
        if method == BASE:
            texts = _losses(found, cell, BASE, domains)
        elif method in UNIFORMS:
            continue
        else:
            texts = [shown(found.change(cell, method, [name])) for name in domains]
        seeds, pairs = str(len(found.pairs(cell, method))), found.pairs(cell, method)
        size = f"{mean(ours.sample_size for ours, _ in pairs):.2f}"
        rows.append([f"`{method}`", seeds, *texts, size, *_work(found, cell, method)])
    heads = ["method", "seeds", *domains, "effective sample size", "FLOPs", "with runs before it"]
    return table(heads, rows)


def equal_work(found: Comparison, part: Part, cell: Cell) -> str:
    """Returns a table of every method's change against uniform with the same FLOPs.

    Uniform's loss at a method's FLOPs lies between its runs of different lengths, whose rows have
    their change against the shortest. Methods with uniform's FLOPs are left out, and so are those
    whose work lies outside.
    """
    domains, rows = domains_of(found, cell), []
    for method in trained(found, part, cell):
        seeds, work = str(len(found.by_seed(cell, method))), _work(found, cell, method)[1]
        if method == BASE:
            texts = _losses(found, cell, BASE, domains)
        elif method in UNIFORMS:
            texts = [shown(found.change(cell, method, [name])) for name in domains]
        elif work == _SAME_WORK:
            continue
        else:
            changes = [found.change_at_equal_work(cell, method, [name]) for name in domains]
            texts = [shown(change) for change in changes]
            seeds = str(max((c.pairs for c in changes if c is not None), default=0))
            if seeds == "0":
                continue
        rows.append([f"`{method}`", seeds, work, *texts])
    return table(["method", "seeds", "FLOPs, with runs before it", *domains], rows)


def by_size(found: Comparison, methods: Sequence[str], groups: Mapping[str, Sequence[str]]) -> str:
    """Returns a table of methods' changes at every size, for groups of domains."""
    _, corpus, target = found.first_cell
    rows, there = [], set(domains_of(found, found.first_cell))
    for method in methods:
        for size in found.study.sizes:
            cell = (size, corpus, target)
            pairs = found.pairs(cell, method)
            if pairs and {name for group in groups.values() for name in group} <= there:
                changes = [shown(found.change(cell, method, group)) for group in groups.values()]
                counts = [str(len(pairs)), f"{pairs[0][1].flops:.2g}"]
                rows.append([f"`{method}`", size, *counts, *changes, _work(found, cell, method)[0]])
    return table(["method", "size", "seeds", "uniform's FLOPs", *groups, "FLOPs"], rows)


def legend(found: Comparison, methods: Sequence[str]) -> str:
    """Returns a table of what methods do, and whether they read the target."""
    known = [found.study.methods[name] for name in methods]
    rows = [
        [f"`{method.name}`", method.about, "yes" if found.study.reads_target(method) else NONE]
        for method in known
    ]
    return table(["method", "what it does", "reads the target, itself or by a run before it"], rows)


def not_run(found: Comparison) -> list[str]:
    """Returns the runs that are not known, of the parts of which some are: METHOD, SIZE, seeds."""
    missing: dict[tuple[str, str], set[int]] = {}
    for part in found.study.parts.values():
        runs = list(found.study.runs(part))
        unknown = [run for run in runs if found.results.of(run) is None]
        for run in unknown if len(unknown) < len(runs) else []:
            missing.setdefault((run.method.name, run.size.name), set()).add(run.seed)
    return [
        f"`{method}` at {size}, seed {' and '.join(map(str, sorted(seeds)))}"
        for (method, size), seeds in missing.items()
    ]


def trained(found: Comparison, part: Part, cell: Cell) -> list[str]:
    """Returns the methods of a part of which at least one seed can be compared with uniform."""
    return [method for method in part.methods if found.pairs(cell, method)]


def domains_of(found: Comparison, cell: Cell) -> list[str]:
    """Returns the domains of the held-out text."""
    outcomes = list(found.by_seed(cell, BASE).values())
    return list(outcomes[0].losses.by_domain) if outcomes else []


def work_of(found: Comparison, cell: Cell, method: str) -> str:
    """Returns a method's FLOPs, with those of the runs before it, as a multiple of uniform's."""
    return _work(found, cell, method)[1] if found.pairs(cell, method) else NONE


def last_weight(found: Comparison, method: str, domain: str) -> str:
    """Returns the mean weight of a domain's samples in the last tenth of a method's runs."""
    runs = found.by_seed(found.first_cell, method).values()
    last = [run.weights.by_domain.get(domain, [None])[-1] for run in runs]
    known = [weight for weight in last if weight is not None]
    return f"{mean(known):.2f}" if known else NONE


def signal_to_noise(found: Comparison, name: str) -> str:
    """Returns the range over the seeds of a run's signal-to-noise, a median over its updates."""
    runs = found.by_seed(*found.named(name)).values()
    known = [run.signal_to_noise for run in runs if run.signal_to_noise is not None]
    return f"{min(known):.1f} to {max(known):.1f}" if known else NONE


def shown(change: Difference | None, digits: int = 3) -> str:
    """Returns a change with its 95 % interval, bold if that excludes 0; of few seeds the mean."""
    if change is None:
        return NONE
    if change.pairs < FEWEST:
        return f"{change.mean:+.{digits}f}"
    text = f"{change.mean:+.{digits}f} ± {change.half_width:.{digits}f}"
    return f"**{text}**" if abs(change.mean) > change.half_width else text


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _losses(found: Comparison, cell: Cell, method: str, domains: Sequence[str]) -> list[str]:
    losses = [run.last_losses() for run in found.by_seed(cell, method).values()]
    return [f"{mean(each[name] for each in losses):.3f}" for name in domains]


def _work(found: Comparison, cell: Cell, method: str) -> tuple[str, str]:
    """Returns a method's FLOPs, alone and with the runs before it, as multiples of uniform's."""
    base, whole = found.by_seed(cell, BASE), found.work(cell, method)
    alone = [ours.flops / theirs.flops for ours, theirs in found.pairs(cell, method)]
    all_of_it = [whole[seed] / base[seed].flops for seed in whole if seed in base]
    return f"{mean(alone):.2f}", f"{mean(all_of_it):.2f}" if all_of_it else NONE
