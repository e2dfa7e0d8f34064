"""The manifest of a checkpoint: manifest.json, with the size and checksum of every file.

It is written last, then the directory gets its name. A directory without a manifest is not a
complete checkpoint. Checksums are CRC-32: they find corruption and truncation, not tampering, and
zlib computes several GB/s, so they do not slow a save down.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_dwm.checkpoint.names import LLM_FOLDER, SHAPE_FILE
from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.config import UserError
from megatron_dwm.config.printing import printable
from megatron_dwm.files.atomic import restore_replaced, write_text

MANIFEST = "manifest.json"
_FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})(?:_update_(\d{8,}))?")
_BLOCK_BYTES = 1 << 20  # fits into a processor's cache


class Unreadable(ValueError):
    """A file system's error, which says nothing about what a file holds."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size and checksum of one file; `crc32` has eight hexadecimal digits."""

    bytes: int
    crc32: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of manifest.json.

    state: the counters. fingerprint: digests of what the run depends on, by key.
    files: records by path inside the checkpoint.
    """

    state: TrainState
    fingerprint: dict[str, str]
    files: dict[str, FileRecord]


def checkpoint_dir(run_dir: Path, state: TrainState) -> Path:
    """Returns the directory for the checkpoint of a state, by its step and updates."""
    name = f"step_{state.step:08d}"
    if state.stage_updates:
        name += f"_update_{state.stage_updates:08d}"
    return run_dir / "checkpoints" / name


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Returns the directories with a checkpoint's name, complete or not, oldest first."""
    found = [(_order(path), path) for path in (run_dir / "checkpoints").glob("step_*")]
    return [path for _, path in sorted(pair for pair in found if pair[0] is not None)]


def _order(path: Path) -> tuple[int, int] | None:
    match = _NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def record_file(path: Path) -> FileRecord:
    """Read a file once and return its size and checksum."""
    checksum, size_bytes = 0, 0
    block = memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as stream:
        while length := stream.readinto(block):
            checksum, size_bytes = zlib.crc32(block[:length], checksum), size_bytes + length
    return FileRecord(bytes=size_bytes, crc32=f"{checksum:08x}")


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `directory`/manifest.json, all of it or nothing."""
    content = {"format": _FORMAT, **asdict(manifest)}
    text = json.dumps({**content, "crc32": _own_checksum(content)}, indent=1)
    write_text(directory / MANIFEST, text)


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a checkpoint. Raises ValueError with the file and the problem.

    It is Unreadable if the file system has an error. Raises UserError if it is whole, but of a
    newer version of this package.
    """
    file = directory / MANIFEST
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        claimed = content.pop("crc32")
        known = content.pop("format")
        if claimed != _own_checksum({"format": known, **content}):
            raise ValueError("checksum differs")
        if known != _FORMAT or set(content["state"]) - {each.name for each in fields(TrainState)}:
            raise UserError(
                f"{file}: written by a newer version of megatron_dwm; go on with that version"
            )
        return Manifest(
            state=TrainState(**content["state"]),
            fingerprint=content["fingerprint"],
            files={name: FileRecord(**record) for name, record in content["files"].items()},
        )
    except UserError:
        raise
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except (IsADirectoryError, NotADirectoryError):
        raise ValueError(f"{MANIFEST} is no file") from None
    except OSError as error:
        raise Unreadable(f"{MANIFEST} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{MANIFEST} is damaged: it is not as it was written") from None


def _own_checksum(content: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def find_damage(directory: Path, files: Iterable[tuple[str, FileRecord]]) -> str | None:
    """Returns what is wrong with the first file that differs from its record; None if all match.

    Raises Unreadable for an error of the file system.
    """
    for name, expected in files:
        path = directory / name
        try:
            size_bytes = path.stat().st_size
            if size_bytes != expected.bytes:
                return f"{name} has {size_bytes} bytes instead of {expected.bytes}"
            if record_file(path).crc32 != expected.crc32:
                return f"{name} has another checksum"
        except FileNotFoundError:
            return f"{name} is missing"
        except (IsADirectoryError, NotADirectoryError):
            return f"{name} is no file"
        except OSError as error:
            raise Unreadable(f"{name} cannot be read ({error.strerror})") from None
    return None


def damage_of(directory: Path) -> str | None:
    """Returns what is wrong with a checkpoint, or None; reads every file of it."""
    try:
        return find_damage(directory, read_manifest(directory).files.items())
    except UserError:
        raise
    except ValueError as error:
        return str(error)


def require_whole(directory: Path, key: str) -> None:
    """Check a checkpoint that a user named; a converted one has no manifest and passes.

    Raises UserError with the damaged file.
    """
    damage = damage_of(directory) if (directory / MANIFEST).exists() else None
    if damage is not None:
        raise UserError(f"{key}: {directory} is damaged: {damage}; name another checkpoint")


def named_checkpoint(path: Path) -> Path:
    """Returns the checkpoint that a user named: `path` itself, or the newest complete one of a run.

    Prints a warning for a damaged checkpoint of a run. Raises UserError if there is none.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give a run directory or a checkpoint in it")
    if (path / LLM_FOLDER).exists() or (path / SHAPE_FILE).exists():
        require_whole(path, "checkpoint")
        return path
    found = list_checkpoints(path)
    if not found:
        raise UserError(
            f"{path}: not a checkpoint (no llm/ and shape.json) nor a run with checkpoints/step_*"
        )
    for directory in reversed(found):
        damage = damage_of(directory)
        if damage is None:
            return directory
        what = printable(f"{directory} is damaged: {damage}")
        print(f"warning: {what}; taking the one before", file=sys.stderr)
    raise UserError(f"{path}: none of its checkpoints is whole; bring back a copy of one")


def tidy(run_dir: Path) -> None:
    """Remove the files of a killed save, and restore the checkpoint that it was replacing."""
    restore_replaced(run_dir / "checkpoints", "step_*")


def set_aside(directory: Path) -> None:
    """Rename a damaged checkpoint, so that it is never loaded or counted again."""
    target = directory.with_name(f"{directory.name}.damaged")
    shutil.rmtree(target, ignore_errors=True)
    directory.rename(target)


def remove_old(run_dir: Path, *, keep_last: int, keep_every: int) -> None:
    """Keep the newest `keep_last` checkpoints, and those at multiples of `keep_every` steps.

    Raises the last OSError of those that cannot be removed, after all the others are.
    """
    if not keep_last:
        return
    failure: OSError | None = None
    for directory in list_checkpoints(run_dir)[:-keep_last]:
        step, update = _order(directory) or (0, 0)
        if not (keep_every and step % keep_every == 0 and update == 0):
            try:
                if directory.is_symlink():  # moved away and linked back
                    directory.unlink()
                else:
                    shutil.rmtree(directory)
            except OSError as error:
                failure = error
    if failure is not None:
        raise failure
