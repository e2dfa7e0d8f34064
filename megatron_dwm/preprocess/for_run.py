"""Text that a run names as its training data: preprocessed once, into a cache.

A file of `data.train` with the ending of a text format becomes Megatron's indexed files by the code
of `tools/preprocess_data.py`, with --append-eod, `data.tokenizer`, and the metadata that the run
reads. The cache is `data.cache_dir`, or the folder prepared_data beside `run.dir`, which the runs
of a comparison share. The files' name has a digest of the text's path, size and time, of the
tokenizer and of the keys, so a changed text is preprocessed anew, and the run's config.yaml has the
prefix. The first process does it, under a lock; the others wait for its result, or for its refusal
in PREFIX.refused. An interrupted job goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_dwm.config import Config, UserError
from megatron_dwm.files.atomic import write_json
from megatron_dwm.files.lock import lock_file
from megatron_dwm.files.sidecar_format import OWN_COLUMNS
from megatron_dwm.launch import find_launch
from megatron_dwm.preprocess.pipeline import preprocess
from megatron_dwm.preprocess.read.inputs import is_known
from megatron_dwm.preprocess.settings import PreprocessSettings
from megatron_dwm.preprocess.write.final_files import FinalPaths
from megatron_dwm.tokenizer import kind_of

FOLDER = "prepared_data"
_KEY = "text"
_POLL_S = 0.5
# A waiting process says so after this time.
_SILENT_S = 60.0
# The first process has removed what an earlier job refused by then.
_REMOVED_S = 30.0


def with_prepared_data(config: Config) -> Config:
    """Returns the run with a prefix of indexed files for every text in `data.train`.

    Raises UserError for a text that is missing or has no documents, and without `data.tokenizer`.
    """
    entries = config.data.train
    prefixes = {text: _prepared(Path(text), config) for text in texts_of(config)}
    train = [prefixes.get(entry, entry) if isinstance(entry, str) else entry for entry in entries]
    return replace(config, data=replace(config.data, train=train))


def texts_of(config: Config) -> list[str]:
    """Returns the files of text in `data.train`."""
    return [each for each in config.data.train if isinstance(each, str) and is_known(Path(each))]


def _prepared(text: Path, config: Config) -> str:
    """Returns the prefix of the indexed files of a text."""
    if config.data.tokenizer is None:
        raise UserError(f"data.train {text}: text needs data.tokenizer, by which it becomes tokens")
    if not text.is_file():
        raise UserError(f"data.train {text}: no such file")
    settings = _settings(text, config)
    done = FinalPaths(prefix=settings.prefix, keys=settings.json_keys).record
    refused = Path(f"{settings.prefix}.refused")
    earlier = _refusal(refused)
    if find_launch(os.environ).rank == 0:
        if not done.is_file():
            print(f"data.train {text}: tokens are written to {settings.prefix}_*", flush=True)
        with suppress(OSError):  # what is wrong with the folder is said when it is made
            refused.unlink(missing_ok=True)
        try:
            _preprocess(settings)
        except UserError as error:
            with suppress(OSError):  # a full disk, say, which must not hide the error
                content = {"job": _job(), "time_ns": time.time_ns(), "error": str(error)}
                write_json(refused, content)
            raise
    _wait_for(done, refused, earlier)
    return f"{settings.prefix}_{_KEY}_document"


def _job() -> str:
    """Returns what the processes of this job have in common, and those of another have not."""
    launch = find_launch(os.environ)
    return f"{launch.world_size} processes at {launch.host}:{launch.port}"


def _refusal(refused: Path) -> dict[str, Any] | None:
    """Returns what is in the file of a refusal; None if there is none, or no more."""
    try:
        return json.loads(refused.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _wait_for(done: Path, refused: Path, earlier: dict[str, Any] | None) -> None:
    """Wait until the first process has written the files; says so once if it takes a while.

    earlier: the refusal that was there at the start. A job that is started again may have the name
    of the one before, so this counts only if the first process leaves it there.
    Raises UserError if the first process has refused the text.
    """
    start_s, is_said = time.monotonic(), False
    while not done.is_file():
        waited_s, found = time.monotonic() - start_s, _refusal(refused)
        counts = found is not None and (found != earlier or waited_s > _REMOVED_S)
        if found is not None and counts and found["job"] == _job():
            raise UserError(found["error"])
        if not is_said and waited_s > _SILENT_S:
            rank, host = find_launch(os.environ).rank, socket.gethostname()
            print(
                f"warning: rank {rank} on {host} waits for {done}, which rank 0 writes; every "
                "machine has to see this folder",
                file=sys.stderr,
                flush=True,
            )
            is_said = True
        time.sleep(_POLL_S)


def _settings(text: Path, config: Config) -> PreprocessSettings:
    assert config.data.tokenizer is not None
    policy, tokenizer = config.policy, Path(config.data.tokenizer)
    keys = (config.data.domain_key, policy.column, policy.difficulty)
    asked = [key for key in keys if key is not None and key not in OWN_COLUMNS]
    metadata = tuple(dict.fromkeys(asked))
    known = [*(_identity(path) for path in (text, tokenizer)), metadata]
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]
    folder = config.data.cache_dir or Path(config.run.dir).absolute().parent / FOLDER
    return PreprocessSettings(
        inputs=(str(text),),
        output_prefix=str(Path(folder) / f"{text.name.partition('.')[0]}-{digest}"),
        tokenizer_type=kind_of(tokenizer),
        tokenizer_model=str(tokenizer),
        json_keys=(_KEY,),
        append_eod=True,
        num_workers=len(os.sched_getaffinity(0)),
        metadata_keys=metadata,
        resume=True,
    )


def _identity(path: Path) -> tuple[str, int, int]:
    """Returns a file's path, size and time of change, in nanoseconds."""
    found = path.stat() if path.exists() else None
    size_and_time = (found.st_size, found.st_mtime_ns) if found else (0, 0)
    return (str(path.absolute()), *size_and_time)


def _preprocess(settings: PreprocessSettings) -> None:
    """Write the files, or go on where another job stopped; waits while one is at it."""
    lock = Path(f"{settings.prefix}.lock")
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = lock_file(lock)
        except BlockingIOError:
            time.sleep(_POLL_S)
            continue
        except OSError as error:
            raise UserError(
                f"{lock.parent}: the tokens of data.train cannot be written here "
                f"({error.strerror}); set data.cache_dir to a folder that can be written"
            ) from None
        with file:
            preprocess(settings)
        return
