"""The index of a saved model's tensors, read without trusting it.

Megatron-Core's `torch_dist` format keeps its index, `.metadata`, as a pickle, and both torch's and
Megatron-Core's readers unpickle whatever it names. It is read here with a list of the classes that
it may name, before anything else reads it: a checkpoint from elsewhere cannot run code. Nor may it
name files outside its folder.

What torch says of a file that it will not read is a page of advice to read it unsafely. It is
replaced by one line.
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
"""What an index may name, by module."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Only the classes of an index."""
        if name not in _MAY_NAME.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint does")
        return super().find_class(module, name)


def read_index(directory: Path) -> Metadata:
    """The index in `directory`, a `torch_dist` folder.

    Raises OSError, or pickle.UnpicklingError that says in a few words what is wrong.
    """
    with (directory / ".metadata").open("rb") as stream:
        try:
            metadata = _IndexUnpickler(stream).load()
        except (OSError, pickle.UnpicklingError):
            raise
        except Exception as error:  # a pickle cut short or made up can raise anything
            raise pickle.UnpicklingError(f"its index cannot be read: {error}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise pickle.UnpicklingError("it is no index of tensors")
    _require_inside(metadata)
    return metadata


def _require_inside(metadata: Metadata) -> None:
    """Every file that the index names lies beside it."""
    places = metadata.storage_data.values() if isinstance(metadata.storage_data, dict) else [None]
    for place in places:
        name = place.relative_path if isinstance(place, _StorageInfo) else None
        if not isinstance(name, str):
            raise pickle.UnpicklingError("its index does not say where the tensors are")
        if name != PurePath(name).name or name in ("", ".."):
            raise pickle.UnpicklingError(f"its index points to {name}, outside the checkpoint")


@contextmanager
def data_only(path: Path) -> Iterator[None]:
    """What cannot be read, or not without running it, becomes one line that names `path`.

    Raises UserError.
    """
    try:
        yield
    except (pickle.UnpicklingError, CheckpointException, CheckpointingException) as error:
        cause = _cause(error)
        if isinstance(cause, pickle.UnpicklingError):
            raise UserError(
                f"{path}: it holds something else than data, and nothing of it was run; take a "
                f"checkpoint from whom you trust ({_in_short(cause)})"
            ) from error
        raise UserError(
            f"{path}: it cannot be read; bring back a copy, or take another checkpoint "
            f"({_in_short(cause)})"
        ) from error


def _cause(error: BaseException) -> BaseException:
    """Torch's reader gathers what went wrong, by rank."""
    if isinstance(error, CheckpointException):
        return next((failure for failure, _ in error.failures.values()), error)
    return error


def _in_short(error: BaseException) -> str:
    """The first line of an error; of torch's refusal only what it refused."""
    text = str(error)
    if "weights_only" in text:
        named = re.search(r"GLOBAL[: ]+([\w.]+)", text)
        return f"it names {named[1]}" if named else "it names objects"
    return (text.splitlines() or [type(error).__name__])[0][:200]
