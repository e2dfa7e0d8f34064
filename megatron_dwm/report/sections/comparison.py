"""Runs beside the baseline: last held-out losses, and the work to reach the baseline's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev

from megatron_dwm.report.charts import bars, lines
from megatron_dwm.report.content import Cell, Column, Content, Figure, Table, columnar
from megatron_dwm.report.curves import abscissas, group_rows, key, within
from megatron_dwm.report.over_steps import MAX_PANELS, dotted
from megatron_dwm.report.reach import MEAN, held_out, work_to_reach
from megatron_dwm.report.runs import Group, RunSet, held_out_domains

_SHARE = Column(name="share", title="work", unit="baseline = 1")


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


def _final_loss(group: Group, domain: str) -> list[float]:
    found = [held_out(run, domain) for run in group.runs]
    return [float(rows[-1, 1]) for rows in found if len(rows)]


def _shares(runs: RunSet, baseline: Group, domain: str) -> dict[str, list[float | None]]:
    """Returns for each other group and run the work to the baseline's loss, as its share."""
    losses = _final_loss(baseline, domain)
    work = [float(rows[-1, 0]) for run in baseline.runs if len(rows := held_out(run, domain))]
    if not losses or not work:
        return {}
    found = {}
    for group in runs.groups:
        curves = [rows for run in group.runs if len(rows := held_out(run, domain))]
        if group is not baseline and curves:
            needed = [work_to_reach(rows, mean(losses)) for rows in curves]
            found[group.name] = [None if n is None else n / mean(work) for n in needed]
    return found


def _figure(runs: RunSet, cells: dict[str, dict[str, list[float | None]]]) -> list[Figure]:
    rows: list[list[Cell]] = []
    for domain, by_group in cells.items():
        for name, shares in by_group.items():
            reached = [share for share in shares if share is not None]
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
            caption="Left of 1: reached with less work. A group without a point never reached it.",
            columns=columns,
            data=columnar(columns, rows),
            chart={**chart, "height": max(120, 22 * len(rows))},
            series="run",
            names=names,
        )
    ]


def _difference(runs: RunSet, baseline: Group, domains: Sequence[str]) -> list[Figure]:
    """Returns the plots of each domain's loss less the baseline's, at the steps that both have."""
    rows: list[list[Cell]] = []
    for domain in domains[:MAX_PANELS]:
        value = key("loss") if domain == MEAN else within("domain_loss", domain)
        base = {row[0]: row[4] for row in group_rows(runs, baseline, "evaluation", value)}
        for group in runs.groups:
            if group is not baseline:
                curve = group_rows(runs, group, "evaluation", value)
                rows += [
                    [domain, group.name, *row[:4], *(loss - base[row[0]] for loss in row[4:])]
                    for row in curve
                    if row[0] in base
                ]
    return [_difference_figure(runs, rows)] if rows else []


def _difference_figure(runs: RunSet, rows: Sequence[Sequence[Cell]]) -> Figure:
    y = Column(name="difference", title="loss, less the baseline's", unit="nats a token")
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


def _table(runs: RunSet, baseline: Group, cells: dict[str, dict[str, list[float | None]]]) -> Table:
    groups = [group.name for group in runs.groups if group is not baseline]
    columns = [Column(name="domain", title="held-out domain")]
    columns += [Column(name="loss", title="baseline's final loss", unit="nats a token")]
    columns += [Column(name=f"group_{i}", title=name) for i, name in enumerate(groups)]
    rows: list[list[Cell]] = [
        [domain, mean(_final_loss(baseline, domain)), *(_text(by.get(name)) for name in groups)]
        for domain, by in cells.items()
        if by
    ]
    return Table(
        title="FLOPs to reach the baseline's final loss",
        caption="As a multiple of the baseline's FLOPs: mean over the seeds that reached it.",
        columns=columns,
        rows=rows,
    )


def _text(shares: Sequence[float | None] | None) -> str | None:
    if shares is None:
        return None
    reached = [share for share in shares if share is not None]
    if not reached:
        return "not reached"
    seeds = f" ({len(reached)} of {len(shares)} seeds)" if len(shares) > 1 else ""
    return f"{mean(reached):.2f} ×{seeds}"


def _losses(runs: RunSet) -> list[Table]:
    """Returns the table of last held-out losses, with the difference to the baseline."""
    rows: list[list[Cell]] = []
    for domain in _domains(runs):
        base = _final_loss(runs.baseline, domain) if runs.baseline else []
        row: list[Cell] = [domain]
        for group in runs.groups:
            row.append(_loss_text(_final_loss(group, domain), base, group is runs.baseline))
        rows.append(row)
    columns = [Column(name="domain", title="held-out domain")]
    columns += [Column(name=f"group_{i}", title=g.name) for i, g in enumerate(runs.groups)]
    caption = "Nats a token. ±: standard error over seeds. In parentheses: less the baseline's."
    table = Table(title="Last held-out losses", caption=caption, columns=columns, rows=rows)
    return [table] if rows else []


def _loss_text(losses: Sequence[float], base: Sequence[float], is_base: bool) -> str | None:
    if not losses:
        return None
    text = f"{mean(losses):.3f}"
    if len(losses) > 1:
        text += f" ± {stdev(losses) / math.sqrt(len(losses)):.3f}"
    return text if is_base or not base else f"{text} ({mean(losses) - mean(base):+.3f})"
