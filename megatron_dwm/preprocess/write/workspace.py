"""`P.unfinished/`: everything of a run until it is complete.

Outputs grow here and move to their own names when all of them are complete. Now and then a
checkpoint says how long each file was when the inputs had been read up to a position: a run that is
killed at any moment is resumed by cutting the files to these lengths and reading on from there.

One run at a time: the directory is locked while a process works in it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from megatron_dwm.config.errors import UserError
from megatron_dwm.config.outputs import require_writable_parents
from megatron_dwm.preprocess.records import Position
from megatron_dwm.preprocess.write.run_record import RunRecord, difference_to

_CHECKPOINT = "checkpoint.json"
_RECORD = "run.json"


@dataclass(kw_only=True)
class KeyCounts:
    """Running totals of one dataset."""

    documents: int = 0
    """documents with tokens"""
    empty: int = 0
    """documents without"""
    continued: int = 0
    """sequences after the first of their document"""
    tokens: int = 0
    """ids written, ends of document included"""


@dataclass(kw_only=True)
class Progress:
    """All that a run has to remember; what a checkpoint holds."""

    phase: Literal["reading", "publishing"] = "reading"
    position: Position = field(default_factory=Position)
    segments: int = 0
    """files of the sidecar's draft that are complete"""
    file_bytes: dict[str, int] = field(default_factory=dict)
    """length of each growing file"""
    records: int = 0
    keys: dict[str, KeyCounts] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    """number by reason"""
    first_reject: str = ""
    kinds: list[str] = field(default_factory=list)
    metadata_seen: list[bool] = field(default_factory=list)

    @property
    def num_rejected(self) -> int:
        """Records that are no documents."""
        return sum(self.rejected.values())

    @staticmethod
    def from_json(content: dict[str, Any]) -> Progress:
        """The inverse of `dataclasses.asdict`."""
        position = Position(**content.pop("position"))
        keys = {key: KeyCounts(**counts) for key, counts in content.pop("keys").items()}
        return Progress(position=position, keys=keys, **content)


class Workspace:
    """The directory, locked; a context that removes it if nothing in it is worth keeping."""

    def __init__(self, prefix: str, record: RunRecord, *, resume: bool) -> None:
        """Raises `UserError` if nothing can be written here, another run works here, or one was
        interrupted that may not be resumed: because `resume` is off, or `record` is not what it
        was made from."""
        self.path = Path(f"{prefix}.unfinished")
        require_writable_parents([self.path])
        self._existed = self.path.exists()
        self.path.mkdir(exist_ok=True)
        self._lock = _lock(self.path)
        try:
            self.progress = self._take_up(record, resume=resume)
        except BaseException:
            self._lock.close()
            raise

    def file(self, name: str) -> Path:
        """Path of `name` in the directory."""
        return self.path / name

    def save(self) -> None:
        """Write the checkpoint; the files it speaks of have to be on the disk already."""
        _write_json(self.path / _CHECKPOINT, asdict(self.progress))

    @property
    def has_checkpoint(self) -> bool:
        """Whether a run could be resumed from here."""
        return (self.path / _CHECKPOINT).exists()

    def remove(self) -> None:
        """Remove the directory."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _take_up(self, record: RunRecord, *, resume: bool) -> Progress:
        if not resume and (self.path / _RECORD).exists():
            raise UserError(
                f"{self.path}: a run was interrupted; pass --resume to go on with it, or remove "
                "this directory to begin again"
            )
        if not self.has_checkpoint:  # nothing here is of any use
            for file in self.path.iterdir():
                if file.name != "lock":
                    file.unlink()
            _write_json(self.path / _RECORD, asdict(record))
            return Progress()
        why = difference_to(self.path / _RECORD, record)
        if why is not None:
            raise UserError(
                f"{self.path}: cannot resume: {why}; remove this directory to begin again"
            )
        content = json.loads((self.path / _CHECKPOINT).read_text(encoding="utf-8"))
        return Progress.from_json(content)

    def __enter__(self) -> Workspace:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self.has_checkpoint:
            self.remove()
        self._lock.close()


def _lock(directory: Path) -> IO[bytes]:
    file = (directory / "lock").open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{directory}: another run is writing here; wait for it") from None
    return file


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace `path` at once, and be sure of it."""
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)
