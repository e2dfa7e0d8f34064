"""Reads the index of a saved model's tensors without trusting it.

Megatron-Core's `torch_dist` format keeps its index, `.metadata`, as a pickle, and both torch's and
Megatron-Core's readers unpickle whatever it names. This file reads it first, with a list of the
classes that it may name, so a checkpoint from elsewhere cannot run code. The index may not name
files outside its folder, either.

When torch refuses a file it prints a page of advice on reading it unsafely; one line replaces it.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

from megatron_dwm.config import UserError

_CHECKPOINT = "torch.distributed.checkpoint"
_MAY_NAME = {
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8"},
    "torch.serialization": {"_get_layout"},
    f"{_CHECKPOINT}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    f"{_CHECKPOINT}.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_CHECKPOINT}.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "collections": {"OrderedDict"},
}
"""the names that an index may contain, by module"""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Find a class that an index may name; refuse all others."""
        if name not in _MAY_NAME.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint does")
        return super().find_class(module, name)


def read_index(directory: Path) -> Metadata:
    """Read the index in `directory`, a `torch_dist` folder.

    Raises OSError, or pickle.UnpicklingError with a few words on what is wrong.
    """
    with (directory / ".metadata").open("rb") as stream:
        try:
            metadata = _IndexUnpickler(stream).load()
        except (OSError, pickle.UnpicklingError):
            raise
        except Exception as error:  # a truncated or forged pickle can raise anything
            raise pickle.UnpicklingError(f"its index cannot be read: {error}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise pickle.UnpicklingError("it is not an index of tensors")
    _require_inside(metadata)
    return metadata


def _require_inside(metadata: Metadata) -> None:
    """Refuse an index that names a file outside its folder."""
    stored = metadata.storage_data.values() if isinstance(metadata.storage_data, dict) else [None]
    for entry in stored:
        name = entry.relative_path if isinstance(entry, _StorageInfo) else None
        if not isinstance(name, str):
            raise pickle.UnpicklingError("its index does not say where the tensors are")
        if name != PurePath(name).name or name in ("", ".."):
            raise pickle.UnpicklingError(f"its index points to {name}, outside the checkpoint")


def require_files(directory: Path, index: Metadata) -> None:
    """Raise UserError unless every file that the index names exists and is long enough."""
    needed_bytes: dict[str, int] = {}
    for place in index.storage_data.values():
        end = place.offset + place.length
        needed_bytes[place.relative_path] = max(end, needed_bytes.get(place.relative_path, 0))
    for name, size_bytes in needed_bytes.items():
        path = directory / name
        if not path.is_file() or path.stat().st_size < size_bytes:
            raise UserError(
                f"{path}: missing or cut short (its index expects {size_bytes} bytes); "
                "the checkpoint is incomplete, take an older one"
            )


@contextmanager
def data_only(path: Path) -> Iterator[None]:
    """Turn the errors of reading `path` into one line, for damaged files and for hidden code.

    Raises UserError.
    """
    try:
        yield
    except (pickle.UnpicklingError, CheckpointException, CheckpointingException) as error:
        cause = _cause(error)
        if isinstance(cause, pickle.UnpicklingError):
            raise UserError(
                f"{path}: it holds more than data, and nothing of it was run; take a checkpoint "
                f"from a source that you trust ({_in_short(cause)})"
            ) from error
        raise UserError(
            f"{path}: it cannot be read; bring back a copy, or take another checkpoint "
            f"({_in_short(cause)})"
        ) from error


def _cause(error: BaseException) -> BaseException:
    """Returns the first error inside torch's collection of errors by rank."""
    if isinstance(error, CheckpointException):
        return next((failure for failure, _ in error.failures.values()), error)
    return error


def _in_short(error: BaseException) -> str:
    """Returns the first line of an error; for a refusal by torch, the name that it refused."""
    text = str(error)
    if "weights_only" in text:
        named = re.search(r"GLOBAL[: ]+([\w.]+)", text)
        return f"it names {named[1]}" if named else "it names objects"
    return (text.splitlines() or [type(error).__name__])[0][:200]
