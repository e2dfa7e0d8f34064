"""`P.unfinished/`: all files of a run until it is complete.

Outputs grow here and move to their own names when all of them are complete. Now and then a
checkpoint says how long each file was when the inputs had been read up to a position: a run that is
killed at any moment is resumed by cutting the files to these lengths and reading on from there.

One run at a time: the directory is locked while a process works in it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from megatron_dwm.config.errors import UserError
from megatron_dwm.config.outputs import require_writable_parents
from megatron_dwm.files.atomic import write_json
from megatron_dwm.files.lock import lock_file
from megatron_dwm.preprocess.encode.metadata import Kind
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
class WorkspaceState:
    """All that a run has to remember; its checkpoint holds it."""

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
    kinds: list[Kind] = field(default_factory=list)
    metadata_seen: list[bool] = field(default_factory=list)

    @property
    def num_rejected(self) -> int:
        """Number of records that are no documents."""
        return sum(self.rejected.values())

    @staticmethod
    def from_json(content: dict[str, Any]) -> WorkspaceState:
        """Build the state from what `dataclasses.asdict` makes of one."""
        position = Position(**content.pop("position"))
        keys = {key: KeyCounts(**counts) for key, counts in content.pop("keys").items()}
        return WorkspaceState(position=position, keys=keys, **content)


class Workspace:
    """The directory, locked; a context that removes it if no run can be resumed from it."""

    def __init__(self, prefix: str, record: RunRecord, *, resume: bool) -> None:
        """Make or open the directory `prefix`.unfinished.

        Raises `UserError` if nothing can be written here, if another run works here, or if a run
        was interrupted here and may not be resumed: `resume` is off, or `record` differs from its
        own.
        """
        self.path = Path(f"{prefix}.unfinished")
        require_writable_parents([self.path])
        self.path.mkdir(exist_ok=True)
        try:
            self._lock = lock_file(self.file("lock"))
        except BlockingIOError:
            raise UserError(f"{self.path}: another run is writing here; wait for it") from None
        try:
            self.state = self._begin_or_resume(record, resume=resume)
        except BaseException:
            self._lock.close()
            raise

    def file(self, name: str) -> Path:
        """Path of `name` in the directory."""
        return self.path / name

    def save(self) -> None:
        """Write the checkpoint; the files that it names have to be on the disk already."""
        write_json(self.path / _CHECKPOINT, asdict(self.state))

    @property
    def has_checkpoint(self) -> bool:
        """True if a run can be resumed from here."""
        return (self.path / _CHECKPOINT).exists()

    def remove(self) -> None:
        """Remove the directory."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _begin_or_resume(self, record: RunRecord, *, resume: bool) -> WorkspaceState:
        if not resume and (self.path / _RECORD).exists():
            raise UserError(
                f"{self.path}: a run was interrupted; pass --resume to go on with it, or remove "
                "this directory to begin again"
            )
        if not self.has_checkpoint:  # nothing here is of any use
            for file in self.path.iterdir():
                if file.name != "lock":
                    file.unlink()
            write_json(self.path / _RECORD, asdict(record))
            return WorkspaceState()
        why = difference_to(self.path / _RECORD, record)
        if why is not None:
            raise UserError(
                f"{self.path}: cannot resume: {why}; remove this directory to begin again"
            )
        content = json.loads((self.path / _CHECKPOINT).read_text(encoding="utf-8"))
        return WorkspaceState.from_json(content)

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
