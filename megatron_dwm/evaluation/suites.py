"""Selects the tasks of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_dwm.config import UserError
from megatron_dwm.evaluation.data_files import require_splits

DWM_SUITE = (
    "sciq",
    "arc_easy",
    "arc_challenge",
    "logiqa",
    "boolq",
    "hellaswag",
    "piqa",
    "winogrande",
    "openbookqa",
    "lambada_openai",
)
"""The papers' nine tasks (METHOD.md, section 1) and LAMBADA, by lm-evaluation-harness's names."""


@dataclass(frozen=True, kw_only=True)
class BundledTasks:
    """Tasks that are part of the harness, which downloads their data or finds it in its cache.

    data_dir: directory with their data instead (data_files.py); nothing is downloaded then.
    """

    names: tuple[str, ...]
    data_dir: Path | None = None


@dataclass(frozen=True, kw_only=True)
class LocalTasks:
    """Task files in a directory, with the data files that they name; nothing is downloaded.

    names: tasks to run; empty runs all.
    data: file to read instead of the data file of the only task.
    """

    directory: Path
    names: tuple[str, ...] = ()
    data: Path | None = None


def select_tasks(
    suite: str,
    names: tuple[str, ...],
    *,
    tasks_dir: Path | None,
    data: Path | None,
    data_dir: Path | None,
) -> BundledTasks | LocalTasks:
    """Returns the tasks that the command line selects.

    Raises `UserError` if its options contradict each other.
    """
    if suite == "local":
        if data_dir is not None:
            raise UserError("--data-dir belongs to --suite dwm; use --data with --suite local")
        if tasks_dir is None:
            raise UserError("--suite local needs --tasks-dir: a directory of task files (.yaml)")
        if not tasks_dir.is_dir():
            raise UserError(
                f"--tasks-dir {tasks_dir}: no such directory; name one with task files (.yaml)"
            )
        if data is not None and not data.is_file():
            raise UserError(f"--data {data}: no such file; name a JSON Lines file")
        if data is not None and data.stat().st_size == 0:
            raise UserError(f"--data {data} is empty; expected a JSON object in every line")
        return LocalTasks(directory=tasks_dir, names=names, data=data)
    if tasks_dir is not None or data is not None:
        raise UserError(
            f"--tasks-dir and --data belong to --suite local, not to {suite}; use --data-dir"
        )
    require_known(names, DWM_SUITE, f"suite {suite}")
    if data_dir is not None:
        require_splits(data_dir, names or DWM_SUITE)
    return BundledTasks(names=names or DWM_SUITE, data_dir=data_dir)


def require_known(names: tuple[str, ...], known: tuple[str, ...], where: str) -> None:
    """Raise `UserError` for the first of `names` that is not in `known`."""
    for name in names:
        if name not in known:
            raise UserError(
                f"--tasks {name}: not a task of {where}; choose from {', '.join(known)}"
            )
