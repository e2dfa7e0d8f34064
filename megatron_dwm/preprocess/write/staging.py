"""Outputs under temporary names until all of them are complete.

A reader never sees half a file, an existing file is never overwritten, and a run that fails leaves
nothing. What a run that was killed outright left (`*.partial`) is replaced by the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from megatron_dwm.config.errors import UserError
from megatron_dwm.config.outputs import require_possible_names, require_writable_parents


class StagedFiles:
    """Context in which `partial(path)` may be written and `publish()` renames."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Raises `UserError` if one of `paths` exists or cannot be written."""
        self._paths = list(paths)
        require_possible_names(self._paths)
        self._refuse_existing()
        require_writable_parents([self.partial(path) for path in self._paths])

    def partial(self, path: Path) -> Path:
        """Temporary name of `path`, in the same directory."""
        assert path in self._paths
        return path.with_name(f"{path.name}.partial")

    def publish(self) -> None:
        """Rename, in the order of `paths`, all that were written; all of them or none."""
        self._refuse_existing()
        published: list[Path] = []
        try:
            for path in self._paths:
                if self.partial(path).exists():
                    self.partial(path).rename(path)
                    published.append(path)
        except BaseException:
            for path in published:
                path.unlink()
            raise

    def _refuse_existing(self) -> None:
        for path in self._paths:
            if path.exists():
                raise UserError(f"{path} exists; choose another output or remove it")

    def __enter__(self) -> StagedFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for path in self._paths:
            self.partial(path).unlink(missing_ok=True)
