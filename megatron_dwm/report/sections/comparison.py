"""Runs beside the baseline: last held-out losses, and the work to reach the baseline's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np

from megatron_dwm.report.charts import bars, lines
from megatron_dwm.report.content import Cell, Column, Content, Figure, Table, columnar
from megatron_dwm.report.curves import abscissas, group_rows, key, within
from megatron_dwm.report.groups import seeds_note
from megatron_dwm.report.over_steps import MAX_PANELS, dotted
from megatron_dwm.report.reach import (
    MEAN,
    Losses,
    common_steps,
    evaluated,
    held_out,
    newest_losses,
    work_to_reach,
)
from megatron_dwm.report.runs import Group, Run, RunSet, held_out_domains

_SHARE = Column(name="share", title="work", unit="baseline = 1")


@dataclass(frozen=True, kw_only=True)
class Share:
    """A run's work to the baseline's final loss, as a share of the baseline's.

    value: None if it was not reached. at_most: the first evaluation was there already. last_step:
    of the run's evaluations, if that is before the step of the baseline's final loss; else None.
    """

    value: float | None
    at_most: bool
    last_step: int | None


Shares = Mapping[str, Mapping[str, Sequence[Share]]]


def comparison(runs: RunSet) -> Content | None:
    """Returns the section that compares groups; None for a single group."""
    if not runs.compared:
        return None
    if runs.baseline is None:
        note = (
            "No baseline: none of the runs has policy uniform. Compare with one, or name another "
            "with --baseline."
        )
        return Content(id="comparison", title="Comparison", notes=[note], tables=_losses(runs))
    domains = _domains(runs)
    cells = {name: _shares(runs, runs.baseline, name) for name in domains}
    figures = [*_figure(runs, cells), *_difference(runs, runs.baseline, domains)]
    notes = [] if figures else ["No run and baseline have held-out losses to compare."]
    others = [group for group in runs.groups if group is not runs.baseline]
    notes += filter(None, (seeds_note(group, runs.baseline) for group in others))
    return Content(
        id="comparison",
        title="Comparison",
        lead=f"The baseline is {runs.baseline.name}. Work to reach its final loss is counted to "
        "the first evaluation at or below that loss, linear between two evaluations.",
        figures=figures,
        tables=[*([_table(runs, runs.baseline, cells)] if figures else []), *_losses(runs)],
        notes=notes,
    )


def _domains(runs: RunSet) -> list[str]:
    names = sorted(held_out_domains(runs.runs), key=lambda name: name != runs.target)
    return [MEAN, *names] if names else []


def _shares(runs: RunSet, baseline: Group, domain: str) -> dict[str, list[Share]]:
    """Returns for each other group and run the work to the baseline's loss, as its share."""
    final = newest_losses(baseline, domain)
    if final is None:
        return {}
    ends = [held_out(run, domain, final.step) for run in baseline.runs]
    work = [float(rows[-1, 0]) for rows in ends if len(rows)]
    if not work:
        return {}
    found = {}
    for group in runs.groups:
        curves = [(run, rows) for run in group.runs if len(rows := held_out(run, domain))]
        if group is not baseline and curves:
            found[group.name] = [_share(run, rows, final, mean(work)) for run, rows in curves]
    return found


def _share(run: Run, curve: np.ndarray, final: Losses, work: float) -> Share:
    loss = mean(final.values)
    needed = work_to_reach(curve, loss)
    last = int(run.lines("evaluation")[-1]["step"])
    return Share(
        value=None if needed is None else needed / work,
        at_most=bool(curve[0, 1] <= loss),
        last_step=last if last < final.step else None,
    )


def _figure(runs: RunSet, cells: Shares) -> list[Figure]:
    rows: list[list[Cell]] = []
    bounds = False
    for domain, by_group in cells.items():
        for name, shares in by_group.items():
            reached = [share.value for share in shares if share.value is not None]
            bounds |= any(share.at_most for share in shares)
            if reached:
                rows.append([domain, name, mean(reached), min(reached), max(reached)])
    if not rows:
        return []
    side = Column(name="domain", title="held-out domain")
    columns = (
        side,
        Column(name="run", title="run"),
        _SHARE,
        Column(name="low", title="lowest of the runs", unit=_SHARE.unit),
        Column(name="high", title="highest of the runs", unit=_SHARE.unit),
    )
    names = [group.name for group in runs.groups]
    chart = bars(_SHARE, side, color="run", names=names, reference=1.0)
    return [
        Figure(
            id="work_to_baseline",
            title="FLOPs to reach the baseline's final loss",
            caption="Left of 1: reached with less work. A group without a point never reached it."
            + (" Points with ≤ in the table below are upper bounds." if bounds else ""),
            columns=columns,
            data=columnar(columns, rows),
            chart={**chart, "height": max(120, 22 * len(rows))},
            series="run",
            names=names,
            wide=True,
        )
    ]


def _difference(runs: RunSet, baseline: Group, domains: Sequence[str]) -> list[Figure]:
    """Returns the plots of each domain's loss less the baseline's, at the steps that both have."""
    rows: list[list[Cell]] = []
    for domain in domains[:MAX_PANELS]:
        value = key("loss") if domain == MEAN else within("domain_loss", domain)
        for group in runs.groups:
            if group is not baseline:
                pair = evaluated(group, baseline, domain)
                steps = common_steps(pair, domain)
                curve, other = (group_rows(runs, each, "evaluation", value, steps) for each in pair)
                base = {row[0]: row[4] for row in other}
                rows += [
                    [domain, group.name, *row[:4], *(loss - base[row[0]] for loss in row[4:])]
                    for row in curve
                    if row[0] in base
                ]
    return [_difference_figure(runs, rows)] if rows else []


def _difference_figure(runs: RunSet, rows: Sequence[Sequence[Cell]]) -> Figure:
    y = Column(name="difference", title="loss, less the baseline's", unit="nats per token")
    panel, series = Column(name="domain", title="held-out domain"), Column(name="run", title="run")
    edges = [Column(name=n, title=f"{n} of the runs", unit=y.unit) for n in ("low", "high")]
    columns = (panel, series, *abscissas(runs), y, *edges)
    names = [group.name for group in runs.groups]
    chart = lines(
        y,
        color="run",
        names=names,
        band=any(len(group.runs) > 1 for group in runs.groups),
        reference=0.0,
        dotted=dotted(["domain", "run"], rows),
    )
    return Figure(
        id="loss_difference",
        title="Held-out loss, less the baseline's",
        caption="Below 0: better than the baseline at the same step.",
        columns=columns,
        data=columnar(columns, rows),
        chart=chart,
        series="run",
        names=names,
        panels="domain",
        panel_names=list(dict.fromkeys(str(row[0]) for row in rows)),
    )


def _table(runs: RunSet, baseline: Group, cells: Shares) -> Table:
    groups = [group.name for group in runs.groups if group is not baseline]
    columns = [
        Column(name="domain", title="held-out domain"),
        Column(name="loss", title="baseline's final loss", unit="nats per token"),
        Column(name="step", title="its step"),
    ]
    columns += [Column(name=f"group_{i}", title=name) for i, name in enumerate(groups)]
    rows: list[list[Cell]] = []
    for domain, by in cells.items():
        final = newest_losses(baseline, domain)
        if by and final is not None:
            shares = (_text(by.get(name)) for name in groups)
            rows.append([domain, mean(final.values), final.step, *shares])
    return Table(
        title="FLOPs to reach the baseline's final loss",
        caption="As a multiple of the baseline's FLOPs: mean over the seeds that reached it. ≤: "
        "the first evaluation was at or below that loss already, so less work may have sufficed.",
        columns=columns,
        rows=rows,
    )


def _text(shares: Sequence[Share] | None) -> str | None:
    if shares is None:
        return None
    reached = [share for share in shares if share.value is not None]
    if not reached:
        behind = [share.last_step for share in shares if share.last_step is not None]
        return f"not reached by step {max(behind):,}" if behind else "not reached"
    seeds = f" ({len(reached)} of {len(shares)} seeds)" if len(shares) > 1 else ""
    sign = "≤ " if any(share.at_most for share in reached) else ""
    return f"{sign}{mean(share.value or 0.0 for share in reached):.2f} ×{seeds}"


def _losses(runs: RunSet) -> list[Table]:
    """Returns the table of last held-out losses, with the difference to the baseline."""
    last = {
        domain: [newest_losses(group, domain) for group in runs.groups] for domain in _domains(runs)
    }
    steps = {losses.step for row in last.values() for losses in row if losses is not None}
    rows: list[list[Cell]] = [
        [
            domain,
            *(
                _loss_text(runs, group, domain, losses, with_step=len(steps) > 1)
                for group, losses in zip(runs.groups, row, strict=True)
            ),
        ]
        for domain, row in last.items()
    ]
    if not rows:
        return []
    columns = [Column(name="domain", title="held-out domain")]
    columns += [Column(name=f"group_{i}", title=g.name) for i, g in enumerate(runs.groups)]
    caption = "Nats per token" + (f", at step {max(steps):,}. " if len(steps) == 1 else ". ")
    if len(steps) > 1:
        caption += "Runs end at different steps, so each loss has its step. "
    if any(len(group.runs) > 1 for group in runs.groups):
        caption += "Of the newest step that all seeds have evaluated; ±: standard error over them. "
    if runs.baseline is not None:
        caption += (
            "In parentheses: less the baseline's, at the newest step that both have evaluated."
        )
    title = "Last held-out losses"
    return [Table(title=title, caption=caption.strip(), columns=columns, rows=rows)]


def _loss_text(
    runs: RunSet, group: Group, domain: str, last: Losses | None, *, with_step: bool
) -> str | None:
    if last is None:
        return None
    text = f"{mean(last.values):.3f}"
    if len(last.values) > 1:
        text += f" ± {stdev(last.values) / math.sqrt(len(last.values)):.3f}"
    text += f" at step {last.step:,}" if with_step else ""
    if runs.baseline is None or group is runs.baseline:
        return text
    ours, theirs = evaluated(group, runs.baseline, domain)
    own = newest_losses(ours, domain, beside=theirs)
    base = newest_losses(theirs, domain, beside=ours)
    if own is None or base is None:
        return text
    where = "" if own.step == last.step else f" at step {own.step:,}"
    return f"{text} ({mean(own.values) - mean(base.values):+.3f}{where})"
