"""What the run weighted up and down: distribution over time, by domain and stage, and the noise."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megatron_dwm.report.charts import fan, heat, lines
from megatron_dwm.report.content import Cell, Column, Content, Figure, Table, columnar
from megatron_dwm.report.curves import abscissas, at_steps, key, stage_marks
from megatron_dwm.report.over_steps import (
    MAX_LINES,
    MAX_PANELS,
    about_bands,
    dotted,
    over_steps,
    present,
)
from megatron_dwm.report.runs import Group, Run, RunSet
from megatron_dwm.report.weight_stream import weight_files
from megatron_dwm.report.weight_summary import WeightSummary, summarize

_BINS = 40
_TRAINED = "Of the samples that the LLM trained on, not of those that updates drew for themselves."
_WEIGHT = Column(name="weight", title="mean weight", unit="1 = uniform")
_RUN = Column(name="run", title="run")
_DOMAIN = Column(name="domain", title="domain")
_EDGES = ("from_5_percent", "from_25_percent", "median", "to_75_percent", "to_95_percent")
Summaries = Mapping[str, WeightSummary]


def weights(runs: RunSet) -> Content:
    """Returns the section about the weights of batches."""
    # All weights of uniform runs are 1: reading and drawing them would show nothing.
    weighted = [run for run in runs.runs if run.policy != "uniform"]
    found = {run.name: s for run in weighted if (s := _summary_of(run)) is not None}
    missing = [run for run in runs.runs if run.name not in found]
    figures = [
        _by_domain(runs, found),
        _distribution(runs, found),
        *_from_metrics(runs),
        _by_stage(runs, found),
    ]
    return Content(
        id="weights",
        title="Weights",
        lead=f"A weight of 1 is uniform: the mean over every batch is 1.{_about_lines(runs)}",
        figures=present(figures),
        tables=_last_weights(found),
        notes=[*map(_why_missing, missing), *_not_finite(found)],
    )


def _about_lines(runs: RunSet) -> str:
    bands = about_bands(runs)
    # Domains have a color each where one group is shown, and bands of many colors hide each other.
    return f" {bands} Figures of domains have the means alone." if bands else ""


def _not_finite(found: Summaries) -> list[str]:
    return [
        f"{name}: {summary.not_finite:,} recorded weights are not finite numbers and left out."
        for name, summary in found.items()
        if summary.not_finite
    ]


def _summary_of(run: Run) -> WeightSummary | None:
    files = weight_files(run.path)
    by_tokens = run.key("weighting", "unit") == "document"
    by_tokens &= run.key("weighting", "unit_share") != "equal"
    return summarize(files, _BINS, by_tokens=by_tokens) if files else None


def _why_missing(run: Run) -> str:
    if run.policy == "uniform":
        return f"{run.name}: policy uniform gives every sample the weight 1."
    if weight_files(run.path):
        return (
            f"{run.name}: the recorded weights are all of samples that updates drew for "
            "themselves, and none of those that the LLM trained on."
        )
    return (
        f"{run.name}: no weights in weights/*.parquet. They are written with each "
        "checkpoint, for every logging.weights_interval_steps steps (0 records none)."
    )


def _by_domain(runs: RunSet, found: Summaries) -> Figure | None:
    """One plot with a line for each domain, or one plot a domain if groups are compared."""
    names = _domains(found)
    several = sum(any(run.name in found for run in group.runs) for group in runs.groups) > 1
    shown = _by_last_weight(names[: MAX_PANELS if several else MAX_LINES], found)
    rows = [row for group in runs.groups for row in _domain_rows(runs, group, found, shown)]
    if not rows:
        return None
    columns = (_RUN, _DOMAIN, *abscissas(runs), _WEIGHT)
    groups = list(dict.fromkeys(str(row[0]) for row in rows))
    less = "" if len(shown) == len(names) else f" The {len(shown)} largest of {len(names)} domains."
    marks = {} if several else _marks_of(runs, groups[0])
    series = "run" if several else "domain"
    lined = [group.name for group in runs.groups] if several else shown
    return Figure(
        id="weight_by_domain",
        title="Mean weight by domain" if several else f"Mean weight by domain, {groups[0]}",
        caption=f"What the run wanted to read, and when. {_TRAINED}{less}",
        columns=columns,
        data=columnar(columns, rows),
        chart=lines(
            _WEIGHT,
            color=series,
            names=lined,
            reference=1.0,
            dotted=dotted(["run", "domain"], rows),
            marks=bool(marks),
        ),
        series=series,
        names=lined,
        panels="domain" if several else None,
        panel_names=shown if several else (),
        marks=marks,
        wide=True,
    )


def _marks_of(runs: RunSet, group_name: str) -> dict[str, list[Cell]]:
    group = next(group for group in runs.groups if group.name == group_name)
    marks = stage_marks(group.runs[0], runs)
    return marks if marks["step"] else {}


def _domains(found: Summaries) -> list[str]:
    """Returns the names of all domains, those with most weights first."""
    counts: dict[str, float] = {}
    for summary in found.values():
        for name, count in zip(summary.domains, summary.domain_count.sum(axis=0), strict=True):
            counts[name] = counts.get(name, 0.0) + float(count)
    return sorted(counts, key=lambda name: (-counts[name], name))


def _by_last_weight(names: list[str], found: Summaries) -> list[str]:
    """Returns domains in falling order of their last weight in the first run that has weights."""
    summary = next(iter(found.values()), None)
    last = {}
    if summary is not None:
        for name, column in zip(summary.domains, summary.mean_by_domain().T, strict=True):
            known = column[~np.isnan(column)]
            last[name] = known[-1] if len(known) else -np.inf
    return sorted(names, key=lambda name: -last.get(name, 0.0))


def _domain_rows(
    runs: RunSet, group: Group, found: Summaries, domains: list[str]
) -> list[list[Cell]]:
    """Returns the mean over a group's runs of each domain's mean weight, a row for each bin.

    Runs of a group record the same steps, and so have the same bins; one that is behind has others,
    and is left out.
    """
    summaries = [found[run.name] for run in group.runs if run.name in found]
    if not summaries:
        return []
    longest = max(summaries, key=lambda summary: np.nanmax(summary.step))
    same = [s for s in summaries if np.array_equal(s.step, longest.step, equal_nan=True)]
    first = next(run for run in group.runs if found.get(run.name) is longest)
    rows: list[list[Cell]] = []
    for name in domains:
        parts = [s.mean_by_domain()[:, s.domains.index(name)] for s in same if name in s.domains]
        if parts:
            mean = _mean_of_known(np.stack(parts))
            over = at_steps(first, runs, longest.step)
            kept = ~np.isnan(mean)
            rows += [
                [group.name, name, *point, float(value)]
                for point, value in zip(over[kept].tolist(), mean[kept], strict=True)
            ]
    return rows


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """Returns the mean over the first axis without NaN; NaN where there is nothing else."""
    known = ~np.isnan(values)
    count = known.sum(axis=0)
    return np.where(known, values, 0).sum(axis=0) / np.where(count, count, np.nan)


def _distribution(runs: RunSet, found: Summaries) -> Figure | None:
    shown = [run for run in runs.runs if run.name in found][:MAX_PANELS]
    rows: list[list[Cell]] = []
    for run in shown:
        summary = found[run.name]
        table = np.column_stack([at_steps(run, runs, summary.step), summary.quantiles()])
        rows += [[run.name, *row] for row in table[~np.isnan(summary.step)].tolist()]
    if not rows:
        return None
    over = abscissas(runs)
    y = Column(name="weight", title="weight", unit="1 = uniform")
    edges = [Column(name=n, title=n.replace("_", " "), unit="1 = uniform") for n in _EDGES]
    columns = (_RUN, *over, *edges)
    bands = ((_EDGES[0], _EDGES[4]), (_EDGES[1], _EDGES[3]))
    return Figure(
        id="weight_distribution",
        title="Distribution of weights",
        caption=f"Median, middle half (dark) and middle 90 % (pale) of the weights. {_TRAINED}",
        columns=columns,
        data=columnar(columns, rows),
        chart=fan(over[0], y, bands, "median", reference=1.0),
        panels="run" if len(shown) > 1 else None,
        panel_names=[run.name for run in shown] if len(shown) > 1 else (),
    )


def _by_stage(runs: RunSet, found: Summaries) -> Figure | None:
    """Cells of the mean weight by stage and domain, of the first run that has weights."""
    run = next((run for run in runs.runs if run.name in found), None)
    if run is None or len(found[run.name].stages) < 2:
        return None
    summary = found[run.name]
    mean = summary.mean_by_stage()
    last = np.nan_to_num(mean[-1], nan=0.0)
    order = sorted(range(len(summary.domains)), key=lambda i: -last[i])[:60]
    rows: list[list[Cell]] = [
        [summary.stages[s], summary.domains[d], float(mean[s, d]), f"{mean[s, d]:.2f}"]
        for d in order
        for s in range(len(summary.stages))
        if not np.isnan(mean[s, d])
    ]
    stage = Column(name="stage", title="stage")
    columns = (stage, _DOMAIN, _WEIGHT, Column(name="shown", title="as shown"))
    chart = heat(stage, _DOMAIN, _WEIGHT)
    return Figure(
        id="weight_by_stage",
        title=f"Mean weight by domain and stage, {run.name}",
        caption=f"Domains in the order of their weight in the last stage. {_TRAINED}",
        columns=columns,
        data=columnar(columns, rows),
        chart={**chart, "height": max(120, 26 * len(order))},
    )


def _last_weights(found: Summaries) -> list[Table]:
    """Returns the table of each domain's mean weight at the end of each run."""
    last = {}
    for name, summary in found.items():
        totals = zip(summary.domains, summary.last_sum, summary.last_count, strict=True)
        last[name] = {domain: float(total / count) for domain, total, count in totals if count}
    if not last:
        return []
    first = next(iter(last.values()))
    names = sorted(_domains(found), key=lambda domain: -first.get(domain, 0.0))
    rows = [[domain, *(values.get(domain) for values in last.values())] for domain in names]
    columns = [_DOMAIN, *(Column(name=f"run_{i}", title=name) for i, name in enumerate(last))]
    steps = {name: _steps_text(summary.last_steps) for name, summary in found.items()}
    same = len(set(steps.values())) == 1
    which = next(iter(steps.values())) if same else "; ".join(f"{n}: {t}" for n, t in steps.items())
    caption = (
        f"Mean over the last tenth of the steps with recorded weights ({which}); 1 is uniform. "
        + _TRAINED
    )
    return [Table(title="Last mean weights", caption=caption, columns=columns, rows=rows)]


def _steps_text(steps: np.ndarray) -> str:
    first, last = int(steps[0]), int(steps[-1])
    return f"step {last:,}" if first == last else f"steps {first:,} to {last:,}"


def _from_metrics(runs: RunSet) -> list[Figure | None]:
    return [
        over_steps(
            runs,
            id="effective_sample_size",
            title="Effective sample size",
            caption="The fraction of the batch that would have the same effect with equal weights.",
            y=Column(name="ess", title="effective sample size", unit="fraction of the batch"),
            phase="train",
            value=key("weight_effective_sample_size"),
        ),
        over_steps(
            runs,
            id="weight_entropy",
            title="Entropy of the weights",
            caption="Divided by its largest value: 1 is uniform.",
            y=Column(name="entropy", title="entropy", unit="fraction of the largest"),
            phase="train",
            value=key("weight_entropy"),
        ),
        over_steps(
            runs,
            id="signal_to_noise",
            title="Signal-to-noise of the alignments",
            caption="Above 1 there is more signal than noise in what the weights learn from.",
            y=Column(name="ratio", title="signal-to-noise", unit="ratio of variances"),
            phase="weighting",
            value=key("alignment_signal_to_noise"),
            reference=1.0,
        ),
        over_steps(
            runs,
            id="alignment_agreement",
            title="Agreement of the alignments",
            caption="Correlation over samples of the alignments with either half of the passages.",
            y=Column(name="agreement", title="agreement", unit="correlation"),
            phase="weighting",
            value=key("alignment_agreement"),
        ),
    ]
