"""weighting/stage_K of a run: what its method has learned, as another run can load it.

It is written at the end of every stage and with every checkpoint, so that a run that is stopped or
killed leaves the model of its last checkpoint. At every moment the directory is whole or not there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_dwm.files.atomic import move_files, partial_path


def save_method_files(
    files: Mapping[str, bytes], run_dir: Path, stage: int, warn: Callable[[str], None]
) -> None:
    """Write `Method.files` (main process); a full disk costs them, not the run.

    What a run describes its model with does not change, so its tensors of this moment go with the
    description of an earlier one: no order of the renames, cut short anywhere, leaves a mixture.
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
