"""Which checkpoints are kept, and that a replaced one is never missing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from pathlib import Path

import pytest

from megatron_dwm.checkpoint.manifest import (
    FileRecord,
    Manifest,
    checkpoint_dir,
    damage_of,
    list_checkpoints,
    read_manifest,
    record_file,
    remove_old,
    tidy,
    write_manifest,
)
from megatron_dwm.checkpoint.newest import newest_whole_checkpoint
from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.config import Config, ParallelConfig, RunConfig, UserError
from megatron_dwm.files.atomic import replace_folder
from megatron_dwm.run.status import saved_status
from megatron_dwm.runtime import bring_up


def _checkpoint(run_dir: Path, step: int, updates: int = 0) -> Path:
    state = TrainState(step=step, stage_updates=updates, mean_loss=0.1 + 0.2)
    directory = checkpoint_dir(run_dir, state)
    directory.mkdir(parents=True)
    (directory / "file").write_bytes(b"123456789")
    # The check value of CRC-32 for these nine bytes, as its specifications give it.
    record = FileRecord(bytes=9, crc32="cbf43926")
    assert record_file(directory / "file") == record and zlib.crc32(b"123456789") == 0xCBF43926
    write_manifest(directory, Manifest(state=state, fingerprint={"a": "b"}, files={"file": record}))
    assert read_manifest(directory).state == state
    return directory


def test_which_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        _checkpoint(tmp_path, step)
    _checkpoint(tmp_path, 8, updates=3)
    remove_old(tmp_path, keep_last=0, keep_every=0)
    assert len(list_checkpoints(tmp_path)) == 6
    remove_old(tmp_path, keep_last=2, keep_every=4)
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["step_00000004", "step_00000008", "step_00000008_update_00000003"] + [
        "step_00000010"
    ]
    remove_old(tmp_path, keep_last=1, keep_every=0)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000010"]


def test_one_that_cannot_be_removed_keeps_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a network file system has it while another process reads the checkpoint."""
    held, remove = _checkpoint(tmp_path, 2), shutil.rmtree
    for step in (4, 6, 8):
        _checkpoint(tmp_path, step)

    def rmtree(path: Path) -> None:
        if path == held:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with pytest.raises(OSError, match="step_00000002"):
        remove_old(tmp_path, keep_last=1, keep_every=0)
    assert [path.name for path in list_checkpoints(tmp_path)] == [held.name, "step_00000008"]


def test_a_linked_checkpoint_is_removed_as_a_link(tmp_path: Path) -> None:
    """Somebody moved an old one to an archive and linked it back."""
    old, kept = _checkpoint(tmp_path / "run", 2), _checkpoint(tmp_path / "run", 4)
    archived = Path(shutil.move(old, tmp_path / "archive"))
    old.symlink_to(archived)
    remove_old(tmp_path / "run", keep_last=1, keep_every=0)
    assert list_checkpoints(tmp_path / "run") == [kept] and (archived / "file").exists()


@pytest.mark.parametrize("change", ["format", "state"])
def test_a_newer_versions_checkpoint_is_no_damaged_one(tmp_path: Path, change: str) -> None:
    """A job of an older installation must not rename what the newer one goes on from."""
    directory = _checkpoint(tmp_path, 2)
    content = json.loads((directory / "manifest.json").read_text())
    content.pop("crc32")
    if change == "format":
        content["format"] += 1
    else:
        content["state"]["of_tomorrow"] = 1
    whole = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    (directory / "manifest.json").write_text(json.dumps({**content, "crc32": f"{whole:08x}"}))
    with bring_up(ParallelConfig(), seed=1) as runtime:
        for find in (damage_of, lambda _: newest_whole_checkpoint(tmp_path, runtime)):
            with pytest.raises(UserError, match="written by a newer version of megatron_dwm"):
                find(directory)
    with pytest.raises(UserError, match="written by a newer version of megatron_dwm"):
        saved_status(Config(run=RunConfig(dir=str(tmp_path))))
    assert list_checkpoints(tmp_path) == [directory]


def test_a_replaced_checkpoint_is_there_until_the_new_one_is(tmp_path: Path) -> None:
    """Whatever a kill leaves between the renames, the next start finds one of the two."""
    final = _checkpoint(tmp_path, 5)
    partial = final.with_name(final.name + ".partial")
    shutil.copytree(final, partial)
    (partial / "newer").touch()
    shutil.copytree(tmp_path, tmp_path.with_name("killed"))
    replace_folder(partial, final)
    assert (final / "newer").exists() and [p.name for p in final.parent.iterdir()] == [final.name]
    killed = tmp_path.with_name("killed") / "checkpoints"
    (killed / final.name).rename(killed / f"{final.name}.replaced")
    tidy(killed.parent)
    assert [p.name for p in killed.iterdir()] == [final.name]
    assert not (killed / final.name / "newer").exists()
