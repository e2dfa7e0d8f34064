"""The study's tables, Markdown: changes against uniform at equal tokens and at equal FLOPs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from examples.study.outcomes import Difference, Outcome, at_equal_work, difference
from examples.study.spec import BASE, Part, Study

_UNIFORMS = ("uniform", "uniform_1.05", "uniform_1.25", "uniform_2")
"""runs of different lengths, by which uniform's loss is known at other amounts of work"""

Outcomes = Mapping[str, Outcome]


def cells_of(part: Part) -> Iterable[tuple[str, str, str]]:
    """Yields the (size, corpus, target) of a part, each of which has a table."""
    return (
        (size, corpus, target)
        for size in part.sizes
        for corpus in part.corpora
        for target in part.targets
    )


def equal_tokens(study: Study, part: Part, cell: tuple[str, str, str], found: Outcomes) -> str:
    """Returns a table of every method's change against uniform at equal steps and data order."""
    domains = _domains(found)
    rows = []
    for method in _finished(study, part, cell, found):
        pairs = _pairs(study, part, cell, method, found)
        losses = [[ours.losses[name] for ours, _ in pairs] for name in domains]
        base = [[theirs.losses[name] for _, theirs in pairs] for name in domains]
        texts = (
            [_mean(values) for values in losses]
            if method == BASE
            else [shown(difference(*both)) for both in zip(losses, base, strict=True)]
        )
        rows.append([f"`{method}`", str(len(pairs)), *texts, *_costs(pairs)])
    heads = ["method", "seeds", *domains, "effective sample size", "FLOPs against uniform"]
    return table(heads, rows)


def equal_work(study: Study, part: Part, cell: tuple[str, str, str], found: Outcomes) -> str:
    """Returns a table of every method's change against uniform with the same FLOPs.

    Uniform's loss at a method's FLOPs lies between its runs of different lengths.
    """
    domains, rows = _domains(found), []
    for method in _finished(study, part, cell, found):
        if method in _UNIFORMS:
            continue
        pairs = _pairs(study, part, cell, method, found)
        texts = []
        for name in domains:
            theirs = [
                at_equal_work(ours.flops, _uniforms(study, part, cell, seed, found, name))
                for seed, (ours, _) in zip(
                    _seeds(study, part, cell, method, found), pairs, strict=True
                )
            ]
            texts.append(shown(difference([ours.losses[name] for ours, _ in pairs], theirs)))
        rows.append([f"`{method}`", str(len(pairs)), *texts])
    return table(["method", "seeds", *domains], rows)


def shown(change: Difference) -> str:
    """Returns a change with its 95 % interval; bold if the interval is all below or above 0."""
    if math.isnan(change.half_width):
        return f"{change.mean:+.3f}"
    text = f"{change.mean:+.3f} ± {change.half_width:.3f}"
    return f"**{text}**" if abs(change.mean) > change.half_width else text


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _seeds(
    study: Study, part: Part, cell: tuple[str, str, str], method: str, found: Outcomes
) -> list[int]:
    """Returns the seeds of which a method's run and uniform's are finished."""
    return [
        seed
        for seed in part.seeds
        if all(study.run(*cell, name, seed).name in found for name in (method, BASE))
    ]


def _pairs(
    study: Study, part: Part, cell: tuple[str, str, str], method: str, found: Outcomes
) -> list[tuple[Outcome, Outcome]]:
    """Returns a method's outcomes with uniform's, seed by seed."""
    return [
        (
            found[study.run(*cell, method, seed).name],
            found[study.run(*cell, BASE, seed).name],
        )
        for seed in _seeds(study, part, cell, method, found)
    ]


def _finished(study: Study, part: Part, cell: tuple[str, str, str], found: Outcomes) -> list[str]:
    return [m for m in part.methods if _seeds(study, part, cell, m, found)]


def _uniforms(
    study: Study,
    part: Part,
    cell: tuple[str, str, str],
    seed: int,
    found: Outcomes,
    domain: str,
) -> list[tuple[float, float]]:
    runs = [study.run(*cell, m, seed).name for m in _UNIFORMS if m in part.methods]
    return [(found[name].flops, found[name].losses[domain]) for name in runs if name in found]


def _domains(found: Outcomes) -> list[str]:
    return list(next(iter(found.values())).losses) if found else []


def _costs(pairs: Sequence[tuple[Outcome, Outcome]]) -> list[str]:
    sizes = [ours.sample_size for ours, _ in pairs]
    work = [ours.flops / theirs.flops for ours, theirs in pairs]
    return [_mean(sizes, 2), _mean(work, 2)]


def _mean(values: Sequence[float], digits: int = 3) -> str:
    return f"{sum(values) / len(values):.{digits}f}"
