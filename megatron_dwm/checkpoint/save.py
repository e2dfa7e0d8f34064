"""Writes one checkpoint."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from threading import Thread

from megatron_dwm.checkpoint.kept_files import write_files
from megatron_dwm.checkpoint.manifest import (
    FileRecord,
    Manifest,
    checkpoint_dir,
    record_file,
    write_manifest,
)
from megatron_dwm.checkpoint.names import TRAINING_FILE
from megatron_dwm.checkpoint.parts import Parts
from megatron_dwm.checkpoint.sharded_files import (
    DISK_ERRORS,
    ShardedFiles,
    agree,
    reason,
    save_object,
    try_write,
)
from megatron_dwm.checkpoint.sharded_plan import SavePlan
from megatron_dwm.files.atomic import partial_path, replace_folder, sync, sync_names


class CheckpointSave:
    """A checkpoint that is being written; the constructor is collective.

    Raises SaveError on every rank if writing fails on any.
    """

    def __init__(
        self,
        parts: Parts,
        run_dir: Path,
        fingerprint: dict[str, str],
        *,
        plans: dict[str, SavePlan],
        background: bool = False,
    ) -> None:
        """Save the current state; with `background`, copy it and let a thread write the copy.

        plans: by the folder of a model; shared by all saves of a run, which fill it.
        """
        self._fingerprint, self._runtime, self._kept = fingerprint, parts.runtime, parts.files
        self._state = replace(parts.state, passed_over=list(parts.state.passed_over))
        self.directory = checkpoint_dir(run_dir, self._state)
        self._partial = partial_path(self.directory)
        self._make_directory(parts.models)
        self._files = {
            folder: ShardedFiles(
                model.sharded(is_loading=False),
                self._partial / folder,
                plans.setdefault(folder, SavePlan()),
                copy=background,
            )
            for folder, model in parts.models.items()
        }
        self._rest = parts.rest()
        # What the thread cannot report, such as a want of memory, must not look like a success.
        self._failure: str | None = "the thread that writes the files ended early"
        self._thread: Thread | None = None
        if background:
            self._rest = copy.deepcopy(self._rest)
            self._thread = Thread(target=self._write, name="checkpoint")
            self._thread.start()
        else:
            self._write()

    @property
    def is_written(self) -> bool:
        """True once this rank has written its files."""
        return self._thread is None or not self._thread.is_alive()

    def finish(self) -> Path:
        """Wait for the files, then rename the checkpoint to its final name (collective)."""
        if self._thread is not None:
            self._thread.join()
        records = {
            f"{folder}/{name}": record
            for folder, files in self._files.items()
            for name, record in sorted(files.finish(self._failure).items())
        }
        failure = None
        if self._runtime.is_main:
            try:
                self._complete(records)
            except OSError as error:
                failure = reason(error)
        agree(failure)
        return self.directory

    def discard(self) -> None:
        """Remove the files of a failed save."""
        if self._runtime.is_main:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _make_directory(self, folders: Iterable[str]) -> None:
        failure = None
        if self._runtime.is_main:
            try:
                shutil.rmtree(self._partial, ignore_errors=True)
                # Without `parents`: a run directory that was removed must not be created again.
                self._partial.parent.mkdir(exist_ok=True)
                self._partial.mkdir()
                for folder in folders:
                    (self._partial / folder).mkdir()
            except OSError as error:
                failure = reason(error)
        agree(failure)

    def _write(self) -> None:
        failures = [try_write(files) for files in self._files.values()]
        failure = next((failure for failure in failures if failure is not None), None)
        if self._runtime.is_main and failure is None:
            try:
                save_object(self._rest, self._partial / TRAINING_FILE)
                write_files(self._kept, self._partial)
            except DISK_ERRORS as error:
                failure = reason(error)
        self._failure = failure

    def _complete(self, of_models: dict[str, FileRecord]) -> None:
        files = dict(of_models)
        rest = (TRAINING_FILE, *self._kept)
        files |= {name: record_file(self._partial / name) for name in rest}
        # Before an older checkpoint is removed, this one survives a power cut.
        sync(self._partial)
        manifest = Manifest(state=self._state, fingerprint=self._fingerprint, files=files)
        write_manifest(self._partial, manifest)
        sync_names(self._partial)
        replace_folder(self._partial, self.directory)
