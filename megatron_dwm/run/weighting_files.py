"""Writes weighting/stage_K of a run: the files of its method, which another run can load.

They are written at the end of every stage and with every checkpoint, so that a run that is stopped
or killed leaves the model of its last checkpoint. The directory is always complete or absent.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_dwm.files.atomic import move_files, partial_path


def save_method_files(
    files: Mapping[str, bytes], run_dir: Path, stage: int, warn: Callable[[str], None]
) -> None:
    """Write `Method.files` (main process); if that fails, warn and let the run continue.

    The description of the model does not change during a run, so new tensors fit an older
    description: after a kill between two renames the files still belong together.
    """
    directory = run_dir / "weighting" / f"stage_{stage}"
    partial = partial_path(directory)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(exist_ok=True)  # not the run directory, if it was removed
        partial.mkdir()
        for name, content in files.items():
            (partial / name).write_bytes(content)
        move_files(partial, directory)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        warn(f"{directory} could not be written: {error}")
