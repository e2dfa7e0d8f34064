"""Finds the data of public tasks: in Hugging Face's cache, or in a directory of the user's.

A directory for `--data-dir` has a folder for each task, with a JSON Lines file for each split and
the rows of the data set: DIR/sciq/test.jsonl, DIR/sciq/train.jsonl. Nothing is downloaded then.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_dwm.config import UserError
from megatron_dwm.evaluation.digests import SPLITS

_SPLITS = ("training_split", "validation_split", "test_split")
_PROXIES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
_ANSWER_S = 5.0


def with_own_files(spec: Mapping[str, Any], directory: Path, *, few_shot: bool) -> dict[str, Any]:
    """Returns the task `spec`, changed to read its splits from `directory`.

    few_shot: True if solved examples are needed; they come from the training split.
    Raises `FileNotFoundError` with the missing files.
    """
    names = {key: spec[key] for key in _SPLITS if spec.get(key)}
    files = {
        name: (directory / spec["task"] / f"{name}.jsonl").resolve() for name in names.values()
    }
    scored = names.get("test_split") or names["validation_split"]
    solved = {names["training_split"]} if few_shot and "training_split" in names else set()
    needed = {scored} | solved
    missing = [str(files[name]) for name in sorted(needed) if not files[name].is_file()]
    if missing:
        raise FileNotFoundError(", ".join(missing))
    present = {name: str(path) for name, path in files.items() if path.is_file()}
    absent = {key: None for key, name in names.items() if name not in present}
    kwargs = {"data_files": present}
    # A split that nothing reads may be missing; the task is the same (digests.py).
    about = {**(spec.get("metadata") or {}), SPLITS: names}
    return {
        **spec,
        **absent,
        "metadata": about,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": kwargs,
    }


def dataset_of(spec: Mapping[str, Any]) -> str:
    """Returns the name of a task's data set, as `datasets.load_dataset` takes it."""
    name = spec.get("dataset_name")
    return f"{spec['dataset_path']} {name}" if name else str(spec["dataset_path"])


def missing_data(missing: Mapping[str, str], directory: Path | None) -> UserError:
    """Returns the error that lists what is missing, by task, and says how to get it."""
    listed = "; ".join(f"{task}: {what}" for task, what in missing.items())
    if directory is not None:
        return UserError(
            f"--data-dir {directory} lacks the data of {len(missing)} tasks ({listed}); write each "
            "split as JSON Lines with datasets.load_dataset(...)[SPLIT].to_json(FILE) where there "
            "is network"
        )
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return UserError(
        f"the data sets of {len(missing)} tasks are neither in the cache (HF_HOME={home}) nor "
        f"reachable ({listed}); run the same command with --limit 1 where there is network, with "
        "HF_HOME on a shared disk, then here with that HF_HOME and HF_HUB_OFFLINE=1; or keep them "
        "as JSON Lines (--data-dir)"
    )


def hub_is_reachable() -> bool:
    """True if the hub answers. Tried once, because its libraries retry for 30 s in every task.

    Behind a proxy this process cannot tell, and leaves it to the libraries.
    """
    if any(os.environ.get(name) for name in _PROXIES):
        return True
    hub = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        port = hub.port or (80 if hub.scheme == "http" else 443)
        socket.create_connection((hub.hostname or "", port), timeout=_ANSWER_S).close()
    except OSError:
        return False
    return True


def require_splits(directory: Path, names: Sequence[str]) -> None:
    """Raise `UserError` if `--data-dir` is not a directory, or has none of the tasks."""
    if not directory.is_dir():
        raise UserError(
            f"--data-dir {directory}: no such directory; name one with a folder for each task"
        )
    if not any((directory / name).is_dir() for name in names):
        raise UserError(
            f"--data-dir {directory}: it has no folder of a task; expected {directory / names[0]} "
            "with test.jsonl and train.jsonl"
        )
