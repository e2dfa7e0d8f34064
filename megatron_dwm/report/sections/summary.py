"""What the runs are: configuration, tokens, time, and FLOPs by part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from megatron_dwm.report.charts import areas
from megatron_dwm.report.content import Card, Cell, Column, Content, Figure, Table, columnar
from megatron_dwm.report.curves import Value, abscissas, group_rows, key
from megatron_dwm.report.groups import repeated
from megatron_dwm.report.over_steps import over_steps, present
from megatron_dwm.report.runs import Run, RunSet
from megatron_dwm.report.speed import SPEED

_PARTS = ("LLM", "weighing batches", "weighting updates")
_PREFIXES = (
    *((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")),
    (1e3, "k"),
)
_SKIPPED = {"skipped": "step", "skipped_update": "weighting update"}


def summary(runs: RunSet) -> Content:
    """Returns the section with the runs' size, cost and configuration."""
    notes = [note for run in runs.runs for note in (*run.notes, *_skipped(run))]
    notes += [
        f"{run.name} has the settings and the seed of {earlier.name}: it is that run again, and no "
        "other seed, so it is shown beside that one's group."
        for run, earlier in repeated(runs.runs)
    ]
    flops = _flops_by_part(runs)
    if flops is None:
        notes.append("FLOPs by part are missing: a version that did not record them wrote the run.")
    return Content(
        id="summary",
        title="Summary",
        lead=_lead(runs),
        cards=_cards(runs.main, runs),
        figures=present([flops, _speed(runs)]),
        tables=[_runs_table(runs), *_differences(runs)],
        notes=notes,
        template="configuration.html.j2",
        values={"runs": runs.runs},
    )


def _speed(runs: RunSet) -> Figure | None:
    return over_steps(
        runs,
        id="tokens_per_second",
        title="Speed",
        caption="Training tokens a second, without evaluations and updates between steps.",
        y=Column(name="speed", title="speed", unit="tokens/s"),
        phase="train",
        value=key(SPEED),
    )


def _lead(runs: RunSet) -> str:
    if len(runs.runs) == 1:
        return f"The run in {runs.main.path}."
    groups = f"{len(runs.groups)} {'group' if len(runs.groups) == 1 else 'groups'}"
    return (
        f"{len(runs.runs)} runs in {groups}; runs of a group differ in the seed only. "
        f"Numbers on the cards are those of {runs.main.name}."
    )


def skipped(run: Run) -> dict[str, int]:
    """Returns how many steps and weighting updates were skipped, by "what: reason"."""
    found = [line for line in run.metrics if line["phase"] in _SKIPPED]
    return dict(Counter(f"{_SKIPPED[n['phase']]}: {n.get('reason', 'unknown')}" for n in found))


def _skipped(run: Run) -> list[str]:
    return [f"{run.name}: skipped {n} times: {why}" for why, n in skipped(run).items()]


def _cards(run: Run, runs: RunSet) -> list[Card]:
    wanted = run.key("training", "steps")
    step = run.metrics[-1]["step"]
    cards = [
        Card(name="Policy", value=run.policy, detail=_policy_detail(run)),
        Card(name="Model", value=str(run.key("model", "preset") or "unknown")),
        Card(name="Steps", value=f"{step:,}", detail=f"of {wanted:,}" if wanted else ""),
    ]
    tokens, seconds, flops = run.last("tokens"), run.last("seconds"), run.last("flops")
    if tokens is not None:
        speed = f"{tokens / seconds:,.0f} tokens/s" if seconds else ""
        cards.append(Card(name="Training tokens", value=short(tokens), detail=speed))
    if seconds is not None:
        cards.append(Card(name="Time", value=duration(seconds), detail="of the training loop"))
    if flops is not None:
        cards.append(Card(name="Work", value=f"{short(flops)}FLOPs", detail=_weighting_share(run)))
    return [*cards, *_loss_cards(run, runs)]


def _policy_detail(run: Run) -> str:
    if run.policy != "dwm":
        return ""
    words = (run.key("weighting", "mode"), run.key("weighting", "encoder"))
    return f"{words[0]}, encoder {words[1]}" if all(words) else ""


def _weighting_share(run: Run) -> str:
    parts = flops_by_part(run.metrics[-1])
    if parts is None or not parts["total"]:
        return ""
    share = (parts["weighing"] + parts["updates"]) / parts["total"]
    return f"{100 * share:.1f} % of it for weights"


def _loss_cards(run: Run, runs: RunSet) -> list[Card]:
    evaluated = [line for line in run.lines("evaluation") if line.get("domain_loss")]
    by_domain = evaluated[-1]["domain_loss"] if evaluated else {}
    cards = []
    if runs.target in by_domain:
        cards.append(
            Card(
                name=f"Loss of {runs.target}",
                value=f"{by_domain[runs.target]:.3f}",
                detail=f"nats per token, held out, at step {evaluated[-1]['step']:,}",
            )
        )
    ess = run.last("weight_effective_sample_size")
    if ess is not None:
        cards.append(
            Card(name="Effective sample size", value=f"{ess:.2f}", detail="of the last batch")
        )
    return cards


def short(number: float) -> str:
    """Returns a count with an SI prefix: "1.64 M"."""
    for size, prefix in _PREFIXES:
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:,.0f} "


def duration(seconds: float) -> str:
    """Returns a time in the two largest units: "3 h 20 min"."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{seconds:.3g} s"


def flops_by_part(line: Mapping[str, Any]) -> dict[str, float] | None:
    """Returns FLOPs so far of the LLM, of weighing batches, of updates and of all; None if unknown.

    A line without the parts, but of a run whose weights cost nothing by its policy, is unknown too.
    """
    total, weighing = line.get("flops"), line.get("flops_weighting")
    updates = line.get("flops_updates")
    if total is None or weighing is None or updates is None:
        return None
    return {
        "LLM": total - weighing - updates,
        "weighing": weighing,
        "updates": updates,
        "total": total,
    }


def _flops_by_part(runs: RunSet) -> Figure | None:
    def part(name: str) -> Value:
        return lambda line: (flops_by_part(line) or {}).get(name)

    keys = dict(zip(_PARTS, ("LLM", "weighing", "updates"), strict=True))
    rows: list[list[Cell]] = [
        [name, *row[:5]]
        for name, inner in keys.items()
        for row in group_rows(runs, runs.groups[0], "train", part(inner))
    ]
    if not rows:
        return None
    y = Column(name="work", title="work so far", unit="FLOPs")
    over = abscissas(runs)
    columns = (Column(name="part", title="part"), *over, y)
    return Figure(
        id="flops_by_part",
        title="FLOPs by part",
        caption=f"{runs.groups[0].name}: work of the LLM's own steps, of weighing batches, and of "
        "weighting updates.",
        columns=columns,
        data=columnar(columns, rows),
        chart={**areas(over[0], y, "part", _PARTS), "height": 150},
        series="part",
        names=_PARTS,
    )


def _runs_table(runs: RunSet) -> Table:
    rows: list[list[Cell]] = []
    for run in runs.runs:
        start = run.starts[-1] if run.starts else {}
        versions = start.get("versions") or {}
        rows.append(
            [
                run.name,
                run.policy,
                str(run.key("run", "seed") if run.config else "–"),
                run.metrics[-1]["step"],
                run.last("tokens"),
                run.last("flops"),
                run.last("seconds"),
                len(run.starts) or None,
                str(start.get("host", "–")),
                str(start.get("processes", "–")),
                str(versions.get("megatron-dwm", "–")),
                str(start.get("commit", "–"))[:9],
            ]
        )
    columns = [
        Column(name="run", title="run"),
        Column(name="policy", title="policy"),
        Column(name="seed", title="seed"),
        Column(name="steps", title="steps"),
        Column(name="tokens", title="tokens"),
        Column(name="flops", title="work", unit="FLOPs"),
        Column(name="seconds", title="time", unit="s"),
        Column(name="starts", title="starts"),
        Column(name="host", title="host"),
        Column(name="processes", title="processes"),
        Column(name="version", title="version"),
        Column(name="commit", title="commit"),
    ]
    return Table(title="Runs", columns=columns, rows=rows)


def _differences(runs: RunSet) -> list[Table]:
    """Returns a table of the keys in which the configurations differ, if any do."""
    flat = {run.name: _flat(run.config) for run in runs.runs if run.config}
    if len(flat) < 2:
        return []
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    different = [key for key in keys if len({values.get(key) for values in flat.values()}) > 1]
    columns = [Column(name="key", title="key")]
    columns += [Column(name=f"run_{i}", title=name) for i, name in enumerate(flat)]
    rows = [[key, *(values.get(key, "–") for values in flat.values())] for key in different]
    return [Table(title="Settings that differ", columns=columns, rows=rows)] if rows else []


def _flat(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for section, values in config.items():
        if section != "typed_paths" and isinstance(values, Mapping):
            found.update({f"{section}.{name}": str(value) for name, value in values.items()})
    found.pop("run.dir", None)
    return found
