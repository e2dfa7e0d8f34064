"""Which runs of a report differ only in the seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_dwm.report.runs import Group, Run

# Keys in which runs of one group may differ: they change neither what is trained on nor how.
_FREE_SECTIONS = {"typed_paths", "parallel", "logging", "profiling"}
_FREE_KEYS = {
    "run": {"seed", "dir", "resume", "allow_changed"},
    "data": {"cache_dir"},
    "evaluation": {"interval_steps"},
    "training": {
        *("checkpoint_interval_steps", "checkpoint_async", "keep_last", "keep_every"),
        "log_interval_steps",
    },
}


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Returns the groups of runs that differ only in the seed, each named after its first run.

    A seed counts once: a second run of it is a group of its own, as is a run without a
    configuration.
    """
    members: list[tuple[str, list[Run]]] = []
    first: dict[str, list[Run]] = {}
    for run in runs:
        key = _without_seed(run.config) if run.config else f"no configuration: {run.name}"
        if key in first and _seed(run) not in map(_seed, first[key]):
            first[key].append(run)
        else:
            members.append((key, [run]))
            first.setdefault(key, members[-1][1])
    return [Group(name=_group_name(found), runs=tuple(found)) for _, found in members]


def with_same_seeds(one: Group, other: Group) -> tuple[Group, Group]:
    """Returns both groups with the runs whose seed both have; as they are if there is none."""
    common = {_seed(run) for run in one.runs} & {_seed(run) for run in other.runs}
    if not common:
        return one, other
    first, second = (
        replace(group, runs=tuple(run for run in group.runs if _seed(run) in common))
        for group in (one, other)
    )
    return first, second


def only(group: Group, counts: Callable[[Run], bool]) -> Group:
    """Returns the group with those of its runs that count."""
    return replace(group, runs=tuple(run for run in group.runs if counts(run)))


def seeds_note(group: Group, baseline: Group) -> str | None:
    """Returns a sentence for two groups that have not the same seeds; None if they have."""
    ours, theirs = ([_seed(run) for run in each.runs] for each in (group, baseline))
    if set(ours) == set(theirs):
        return None
    common = [seed for seed in ours if seed in theirs]
    compared = (
        f"differences of losses are over {', '.join(common)}, work to reach a loss is over all"
        if common
        else "none is in both, so differences contain that of the seeds"
    )
    return (
        f"{group.name} has the seeds {', '.join(ours)} and {baseline.name} {', '.join(theirs)}: "
        f"{compared}."
    )


def repeated(runs: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Returns the runs whose settings and seed an earlier run has, each with that run."""
    first: dict[tuple[str, Any], Run] = {}
    found = []
    for run in runs:
        if run.config:
            earlier = first.setdefault((_without_seed(run.config), _seed(run)), run)
            if earlier is not run:
                found.append((run, earlier))
    return found


def _seed(run: Run) -> str:
    return str(run.key("run", "seed"))


def _group_name(runs: Sequence[Run]) -> str:
    return runs[0].name if len(runs) == 1 else f"{runs[0].name} ({len(runs)} seeds)"


def _without_seed(config: Mapping[str, Any]) -> str:
    kept = {
        section: (
            {key: value for key, value in values.items() if key not in _FREE_KEYS.get(section, ())}
            if isinstance(values, Mapping)
            else values
        )
        for section, values in config.items()
        if section not in _FREE_SECTIONS
    }
    return json.dumps(kept, sort_keys=True, default=str)
