"""The final names of a run's files, given in an order that a kill cannot spoil.

An `.idx` gets its name after its `.bin` and its sidecar. The run's record is written last: where it
is, all files are there. A run that was killed among the renames is finished by resuming it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_dwm.config.errors import UserError
from megatron_dwm.config.outputs import refuse_existing, require_possible_names
from megatron_dwm.files.atomic import write_json
from megatron_dwm.files.dataset_paths import DatasetPaths
from megatron_dwm.preprocess.write.outputs import REJECTS
from megatron_dwm.preprocess.write.run_record import RunRecord, difference_to
from megatron_dwm.preprocess.write.workspace import KeyCounts, Workspace, WorkspaceState


@dataclass(frozen=True, kw_only=True)
class FinalPaths:
    """The final paths of one run's files."""

    prefix: str
    keys: tuple[str, ...]

    @property
    def record(self) -> Path:
        """Path of the run's record."""
        return Path(f"{self.prefix}.preprocess.json")

    @property
    def rejects(self) -> Path:
        """Path of the list of records that are no documents; written only if there are any."""
        return Path(f"{self.prefix}.rejects.jsonl")

    def moves(self) -> list[tuple[str, Path]]:
        """Name in the workspace and final path, in the order of renaming."""
        paths = [DatasetPaths.of_key(self.prefix, key) for key in self.keys]
        moves = [(f"{i}.meta.parquet", path.sidecar) for i, path in enumerate(paths)]
        moves += [(f"{i}.bin", path.bin) for i, path in enumerate(paths)]
        moves.append((REJECTS, self.rejects))
        return moves + [(f"{i}.idx", path.idx) for i, path in enumerate(paths)]

    def require_possible_names(self) -> None:
        """Check the names. Raises `UserError` if the file system can have no files so named."""
        require_possible_names([self.record, *(path for _, path in self.moves())])

    def refuse_existing(self) -> None:
        """Raise `UserError` if one of the files exists."""
        refuse_existing([self.record, *(path for _, path in self.moves())])


@dataclass(frozen=True, kw_only=True)
class PreprocessSummary:
    """The totals of a run; for every key: records = documents + empty + rejected."""

    prefix: str
    records: int
    rejected: dict[str, int]
    """number by reason"""
    rejects_path: Path
    datasets: dict[str, KeyCounts]
    was_complete: bool = False
    """True if the output was there already and nothing was done"""


def move_into_place(workspace: Workspace, final_paths: FinalPaths, record: RunRecord) -> None:
    """Move every file to its final name, write the run's record and remove the workspace.

    Raises `UserError` if something has appeared at one of the names since the run began.
    """
    state = workspace.state
    if not state.num_rejected:
        workspace.file(REJECTS).unlink(missing_ok=True)
    left = [move for move in final_paths.moves() if workspace.file(move[0]).exists()]
    refuse_existing(path for _, path in left)
    for name, path in left:
        workspace.file(name).rename(path)
    content = {**asdict(record), "counts": _counts(state)}
    write_json(final_paths.record, content, indent=1)
    workspace.remove()


def read_summary(final_paths: FinalPaths, record: RunRecord) -> PreprocessSummary:
    """Read the totals of the finished run at `final_paths`; `UserError` if it was another run."""
    why = difference_to(final_paths.record, record)
    if why is not None:
        raise UserError(
            f"{final_paths.record}: complete, but not this run: {why}; choose another output"
        )
    counts = json.loads(final_paths.record.read_text(encoding="utf-8"))["counts"]
    return PreprocessSummary(
        prefix=final_paths.prefix,
        records=counts["records"],
        rejected=counts["rejected"],
        rejects_path=final_paths.rejects,
        datasets={key: KeyCounts(**value) for key, value in counts["keys"].items()},
        was_complete=True,
    )


def summary_of(final_paths: FinalPaths, state: WorkspaceState) -> PreprocessSummary:
    """The totals of a run that is finished."""
    return PreprocessSummary(
        prefix=final_paths.prefix,
        records=state.records,
        rejected=state.rejected,
        rejects_path=final_paths.rejects,
        datasets=state.keys,
    )


def _counts(state: WorkspaceState) -> dict[str, object]:
    keys: Sequence[tuple[str, KeyCounts]] = list(state.keys.items())
    return {
        "records": state.records,
        "rejected": state.rejected,
        "keys": {key: asdict(counts) for key, counts in keys},
    }
