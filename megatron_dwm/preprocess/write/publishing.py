"""From the workspace to the names that the user knows, in an order that a kill cannot spoil.

The `.idx` files come after their companions, and the run's record last: where it is, all is there.
Renaming is repeated until done, so a run that was killed here is finished by resuming it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_dwm.config.errors import UserError
from megatron_dwm.config.outputs import require_possible_names
from megatron_dwm.preprocess.settings import OutputPaths
from megatron_dwm.preprocess.write.outputs import REJECTS
from megatron_dwm.preprocess.write.run_record import RunRecord, difference_to
from megatron_dwm.preprocess.write.workspace import KeyCounts, Progress, Workspace


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Final names of one run's files."""

    prefix: str
    keys: tuple[str, ...]

    @property
    def record(self) -> Path:
        """The run's record."""
        return Path(f"{self.prefix}.preprocess.json")

    @property
    def rejects(self) -> Path:
        """Records that are no documents; there only if there are any."""
        return Path(f"{self.prefix}.rejects.jsonl")

    def moves(self) -> list[tuple[str, Path]]:
        """Name in the workspace and final path, in the order of renaming."""
        paths = [OutputPaths.of_key(self.prefix, key) for key in self.keys]
        moves = [(f"{i}.meta.parquet", path.sidecar) for i, path in enumerate(paths)]
        moves += [(f"{i}.bin", path.bin) for i, path in enumerate(paths)]
        moves.append((REJECTS, self.rejects))
        return moves + [(f"{i}.idx", path.idx) for i, path in enumerate(paths)]

    def require_possible_names(self) -> None:
        """Raises `UserError` if the file system can have no files of these names."""
        require_possible_names([self.record, *(path for _, path in self.moves())])

    def refuse_existing(self) -> None:
        """Raises `UserError` if one of the files is there."""
        for path in [self.record, *(path for _, path in self.moves())]:
            if path.exists():
                raise UserError(f"{path} exists; choose another output or remove it")


@dataclass(frozen=True, kw_only=True)
class PreprocessSummary:
    """What became of the records; for every key: records = documents + empty + rejected."""

    prefix: str
    records: int
    rejected: dict[str, int]
    """number by reason"""
    rejects_path: Path
    datasets: dict[str, KeyCounts]
    was_complete: bool = False
    """whether the output was there already and nothing was done"""


def publish(workspace: Workspace, targets: Targets, record: RunRecord) -> None:
    """Move everything to its final name and remove the workspace."""
    progress = workspace.progress
    if not progress.num_rejected:
        workspace.file(REJECTS).unlink(missing_ok=True)
    for name, path in targets.moves():
        if workspace.file(name).exists():
            workspace.file(name).rename(path)
    content = {**asdict(record), "counts": _counts(progress)}
    new = workspace.file("published.json")
    new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    new.rename(targets.record)
    workspace.remove()


def complete_run(targets: Targets, record: RunRecord) -> PreprocessSummary:
    """What the finished run behind `targets.record` made; `UserError` if it was another run."""
    why = difference_to(targets.record, record)
    if why is not None:
        raise UserError(
            f"{targets.record}: complete, but not this run: {why}; choose another output"
        )
    counts = json.loads(targets.record.read_text(encoding="utf-8"))["counts"]
    return PreprocessSummary(
        prefix=targets.prefix,
        records=counts["records"],
        rejected=counts["rejected"],
        rejects_path=targets.rejects,
        datasets={key: KeyCounts(**value) for key, value in counts["keys"].items()},
        was_complete=True,
    )


def summary_of(targets: Targets, progress: Progress) -> PreprocessSummary:
    """The totals of a run that is through."""
    return PreprocessSummary(
        prefix=targets.prefix,
        records=progress.records,
        rejected=progress.rejected,
        rejects_path=targets.rejects,
        datasets=progress.keys,
    )


def _counts(progress: Progress) -> dict[str, object]:
    keys: Sequence[tuple[str, KeyCounts]] = list(progress.keys.items())
    return {
        "records": progress.records,
        "rejected": progress.rejected,
        "keys": {key: asdict(counts) for key, counts in keys},
    }
