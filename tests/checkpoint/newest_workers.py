"""What the ranks of tests/checkpoint/test_newest.py run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from megatron_dwm.checkpoint import newest
from megatron_dwm.checkpoint.manifest import FileRecord, Unreadable
from megatron_dwm.checkpoint.newest import newest_whole_checkpoint
from megatron_dwm.config import ParallelConfig, RunError, UserError
from megatron_dwm.run.directory import require_shared
from megatron_dwm.runtime import bring_up


def chosen(run_dir: str) -> str | None:
    """The newest checkpoint, where the second rank's folder is as it was before the last one."""
    with bring_up(ParallelConfig(), seed=1) as runtime:
        upstream = newest.list_checkpoints
        newest.list_checkpoints = lambda path: upstream(path)[: -1 if runtime.rank else None]
        try:
            found = newest_whole_checkpoint(Path(run_dir), runtime)
        finally:
            newest.list_checkpoints = upstream
        return None if found is None else found.name


def other_directory(run_dir: str) -> str:
    """What every rank says where the second one has a directory of its own under the name."""
    with bring_up(ParallelConfig(), seed=1) as runtime:
        own = Path(run_dir) / str(runtime.rank)
        own.mkdir()
        require_shared(Path(run_dir), runtime)
        try:
            require_shared(own, runtime)
        except UserError as error:
            return str(error)
        return "nothing"


def unreadable(run_dir: str) -> str:
    """What every rank says where the second one's file system has an error for the newest."""
    with bring_up(ParallelConfig(), seed=1) as runtime:
        upstream = newest.find_damage

        def fails(directory: Path, files: Iterable[tuple[str, FileRecord]]) -> str | None:
            if runtime.rank == 1:
                raise Unreadable("a.bin cannot be read (Input/output error)")
            return upstream(directory, files)

        newest.find_damage = fails
        try:
            newest_whole_checkpoint(Path(run_dir), runtime)
        except RunError as error:
            return str(error)
        finally:
            newest.find_damage = upstream
        return "nothing"
