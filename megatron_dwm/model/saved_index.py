"""The index of a saved model's tensors, read without trusting it.

Megatron-Core's `torch_dist` format keeps its index, `.metadata`, as a pickle, and both torch's and
Megatron-Core's readers unpickle whatever it names. It is read here with a list of the classes that
it may name, before anything else reads it: a checkpoint from elsewhere cannot run code.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

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

    Raises OSError, pickle.UnpicklingError, or, for a pickle cut short, anything.
    """
    with (directory / ".metadata").open("rb") as stream:
        metadata = _IndexUnpickler(stream).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError("it is no index of tensors")
    return metadata
