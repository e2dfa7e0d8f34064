"""Checks which keys and files a resumed run has changed (docs/robustness.md)."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_dwm.checkpoint.fingerprint import DOMAINS, VALUES
from megatron_dwm.config import Config, UserError
from megatron_dwm.config.paths import PATH_KEYS, is_same_path
from megatron_dwm.weighting import method_class
from megatron_dwm.weighting.loaded import stage_directories

_ALLOWED_BY = {
    DOMAINS: ("data.train", "data.domain_key"),
    VALUES: ("data.train", "policy.column", "policy.difficulty"),
}

# Keys that a resumed run may change; all others decide what is trained.
MAY_CHANGE = {
    "run.dir",
    "run.resume",
    "run.allow_changed",
    "training.learning_rate",
    "training.min_learning_rate_fraction",
    "training.checkpoint_interval_steps",
    "training.checkpoint_async",
    "training.keep_last",
    "training.keep_every",
    "training.max_skipped_steps",
    "training.spike_factor",
    "training.log_interval_steps",
    "training.steps",
    "training.micro_batch_size",
    "data.cache_dir",
    "model.apply_rope_fusion",
    "model.builder",
    "model.cross_entropy_loss_fusion",
    "model.recompute",
    "policy.offload_reference",
    "weighting.learning_rate",
}
# Keys about the start of a run: a resumed run reads its checkpoint instead.
_STARTS_FROM = ("model.init_from", "weighting.load")
# Named first, because they are why other keys changed.
_CAUSES = ("policy.name", "weighting.unit")
MAY_CHANGE_SECTIONS = ("parallel", "logging", "evaluation", "profiling")


def refuse_changes(
    old: Config, new: Config, where: Path, typed: Mapping[str, Any] | None = None
) -> None:
    """Raise UserError for the first key that a resumed run changed but may not change.

    typed: the paths of the old configuration as the user typed them.
    """
    before, now = _flat(old), _flat(new)
    _require_known(new.run.allow_changed, [*now, "model"])
    changed = [
        key
        for key in now
        if before[key] != now[key]
        and not _may_change(key, new)
        and not (key in PATH_KEYS and is_same_path(key, before[key], now[key], typed or {}))
    ]
    if changed:
        changed.sort(key=lambda name: name not in _CAUSES)
        key, others = changed[0], ", ".join(changed[1:])
        raise UserError(
            f"{key}: the run in {where} has {before[key]!r}, now {now[key]!r}; a resumed run "
            f"must keep it; choose another run.dir, or allow it with {_allow(key)}"
            f"{f' (also changed: {others})' if others else ''}"
        )


def refuse_moved_stages(old: Config, new: Config, step: int) -> None:
    """Raise UserError if another `training.steps` moves the ends of stages before step `step`.

    A method that makes no updates writes no files of stages, and may.
    """
    schedules = [method_class(config).schedule(config) for config in (old, new)]
    before, now = ([b for b in schedule.borders if 0 < b <= step] for schedule in schedules)
    key = "training.steps"
    if not schedules[1].num_updates:
        return
    if before != now and old.training.steps != new.training.steps and not _allows(new, key):
        ended = ", ".join(map(str, before)) or "no step"
        would = ", ".join(map(str, now)) or "no step"
        raise UserError(
            f"{key}: with {old.training.steps} steps, stages have ended at {ended}; with "
            f"{new.training.steps} they would have ended at {would}, and files of stages would be "
            f"written again; keep it, choose another run.dir, or allow it with {_allow(key)}"
        )


def without_effect(old: Config, new: Config) -> list[str]:
    """Returns the changed keys that have no effect, since the run reads its checkpoint instead."""
    before, now = _flat(old), _flat(new)
    if old.policy.name != new.policy.name:  # the new one's weighting model has no state yet
        before["weighting.load"] = now["weighting.load"]
    reads = "weighting_model" in method_class(new).parts(new) and new.weighting.frozen
    if reads and new.weighting.load is not None and len(stage_directories(new)) > 1:
        before["weighting.load"] = now["weighting.load"]  # each stage takes its model from there
    return [key for key in _STARTS_FROM if not is_same_path(key, before[key], now[key], {})]


def _require_known(allowed: Iterable[str], known: list[str]) -> None:
    for key in allowed:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise UserError(f"run.allow_changed {key}: no such key; the nearest is {nearest}")


def refuse_changed_files(old: dict[str, str], new: dict[str, str], config: Config) -> None:
    """Raise UserError for the first key whose files have other content than at the checkpoint.

    Keys that are in only one of the two are not compared, since an allowed change of policy can
    add or remove files.
    """
    for key in sorted(old.keys() & new.keys()):
        before, now = old[key], new[key]
        keys = _ALLOWED_BY.get(key, (key,))
        if before != now and not set(keys) & set(config.run.allow_changed):
            allow = _allow(keys[0])
            remedy = f"or allow it with {allow}" if "." in key else "or choose another run"
            raise UserError(
                f"{key}: the content has changed since the checkpoint: it was {before}, now "
                f"{now}; a resumed run must keep it; put it back, {remedy}"
            )


def _may_change(key: str, config: Config) -> bool:
    if _allows(config, key):
        return True
    if key == "training.micro_batch_size" and "groups" in method_class(config).parts(config):
        # Weights are normalized over the group, so another group would be another method.
        return config.weighting.group != "micro_batch"
    return key in MAY_CHANGE or key.split(".")[0] in MAY_CHANGE_SECTIONS


def _allows(config: Config, key: str) -> bool:
    return key in config.run.allow_changed


def _allow(key: str) -> str:
    return f"--run.allow_changed {key}"


def _flat(config: Config) -> dict[str, Any]:
    flat = {
        f"{section}.{key}": value
        for section, values in dataclasses.asdict(config).items()
        for key, value in values.items()
    }
    # Empty follows weighting.unit, so the LLM's attention would change with it unseen.
    return flat | {"data.mask_documents": config.masks_documents}
