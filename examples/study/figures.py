"""The study's pictures: what every method changes, the losses on the way, and the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean

from examples.study.contrasts import UNIFORMS, Cell, Comparison, loss_of
from examples.study.outcome import Outcome
from examples.study.spec import BASE, Part
from examples.study.tables import trained
from megatron_dwm.report.charts import bars, heat, lines
from megatron_dwm.report.content import Cell as Value
from megatron_dwm.report.content import Column, Figure, columnar

_CURVES = ("uniform", "validation_mixing", "dwm_ahead", "similarity", "domain_mean", "excess_loss")
_LONGER = "ends of longer uniform runs"
_LOW, _HIGH = Column(name="low", title="low"), Column(name="high", title="high")
_LOSS = Column(name="loss", title="held-out loss", unit="nats per token")
_FLOPS = Column(name="flops", title="work of the run", unit="FLOPs")
_METHOD = Column(name="method", title="method")
_CHANGE = Column(name="change", title="change against uniform", unit="nats per token")
_TEXTS = Column(name="texts", title="held-out text")
_BAR_HEIGHT = 26

Texts = Mapping[str, Sequence[str]]
"""domains by the words that name them in a picture"""


def changes(found: Comparison, part: Part, cell: Cell, texts: Texts) -> Figure | None:
    """Returns every method's change against uniform at equal tokens, with its interval."""
    rows: list[Sequence[Value]] = []
    methods = [method for method in trained(found, part, cell) if method not in UNIFORMS]
    for method in methods:
        for name, domains in texts.items():
            change = found.change(cell, method, domains)
            assert change is not None
            rows.append([method, name, change.mean, change.low, change.high])
    if not rows:
        return None
    columns = [_METHOD, _TEXTS, _CHANGE, _LOW, _HIGH]
    chart = bars(_CHANGE, _METHOD, color=_TEXTS.name, names=list(texts), reference=0.0)
    return Figure(
        id=part.name,
        title="Change of the held-out loss against uniform, at equal tokens",
        caption="Mean over the seeds and 95 % interval.",
        columns=columns,
        data=columnar(columns, rows),
        chart={**chart, "height": _BAR_HEIGHT * len(methods)},
        series=_TEXTS.name,
        names=list(texts),
    )


def curves(found: Comparison, part: Part, cell: Cell, domains: Sequence[str]) -> Figure | None:
    """Returns the mean loss of some domains over FLOPs, over the seeds that all methods have."""
    methods = [name for name in trained(found, part, cell) if name in _CURVES]
    runs = {method: found.by_seed(cell, method) for method in methods}
    seeds = set.intersection(*map(set, runs.values())) if runs else set()
    rows: list[Sequence[Value]] = [
        [method, *point]
        for method in methods
        for point in _points(
            [runs[method][seed] for seed in sorted(seeds)],
            domains,
            before=_work_before(found, cell, method, sorted(seeds)),
        )
    ]
    if not rows:
        return None
    longer = list(_ends(found, cell, domains, sorted(seeds)))
    rows += longer
    methods += [_LONGER] if longer else []
    columns = [_METHOD, _FLOPS, _LOSS]
    return Figure(
        id=f"{part.name}_curves",
        title="Held-out loss of the novels over the work done; ends of curves compare",
        caption="Mean over the seeds that all have; with the runs that a method needs before.",
        columns=columns,
        data=columnar(columns, rows),
        chart=lines(_LOSS, x=_FLOPS, color=_METHOD.name, names=methods),
        series=_METHOD.name,
        names=methods,
    )


def _ends(
    found: Comparison, cell: Cell, domains: Sequence[str], seeds: Sequence[int]
) -> Iterator[Sequence[Value]]:
    """Yields FLOPs and last loss of uniform's runs of all lengths that have these seeds."""
    for name in UNIFORMS:
        runs = found.by_seed(cell, name) if name in found.study.methods else {}
        if name != BASE and set(seeds) <= set(runs):
            outcomes = [runs[seed] for seed in seeds]
            flops = mean(outcome.flops for outcome in outcomes)
            yield [_LONGER, flops, mean(map(loss_of(domains), outcomes))]


def _work_before(found: Comparison, cell: Cell, method: str, seeds: Sequence[int]) -> float:
    """Returns the mean FLOPs of the runs that a method needs before its own."""
    work, ours = found.work(cell, method), found.by_seed(cell, method)
    known = [work[seed] - ours[seed].flops for seed in seeds if seed in work]
    return mean(known) if known else 0.0


def _points(
    outcomes: Sequence[Outcome], domains: Sequence[str], before: float
) -> Iterator[list[float]]:
    """Yields FLOPs and loss after every tenth of the run but the first two.

    before: FLOPs that were spent when the runs began.
    """
    if not outcomes:
        return
    for tenth in range(2, len(outcomes[0].losses.step)):
        read = loss_of(domains, outcomes[0].losses.step[tenth] / outcomes[0].losses.step[-1])
        yield [before + outcomes[0].losses.flops[tenth], mean(map(read, outcomes))]


def weights(found: Comparison, part: Part, cell: Cell, method: str) -> Figure | None:
    """Returns the mean weight of the training samples by domain, in tenths of the run."""
    outcomes = list(found.by_seed(cell, method).values())
    if not outcomes or not outcomes[0].weights.step:
        return None
    domain, tenth = (
        Column(name="domain", title="domain"),
        Column(name="tenth", title="part of the run", unit="%"),
    )
    weight, label = Column(name="weight", title="mean weight"), Column(name="shown", title="shown")
    rows: list[Sequence[Value]] = []
    for name in sorted({name for run in outcomes for name in run.weights.by_domain}):
        for i in range(len(outcomes[0].weights.step)):
            lists = [run.weights.by_domain.get(name) for run in outcomes]
            values = [each[i] for each in lists if each is not None and i < len(each)]
            known = [value for value in values if value is not None]
            if known:
                percent = round(100 * (i + 1) / len(outcomes[0].weights.step))
                rows.append([name, percent, mean(known), f"{mean(known):.2f}"])
    columns = [domain, tenth, weight, label]
    return Figure(
        id=f"{part.name}_weights_{method}",
        title=f"Mean weight by domain during the run: {method}",
        caption="1 is uniform.",
        columns=columns,
        data=columnar(columns, rows),
        chart=heat(tenth, domain, weight),
    )
