"""A saved LLM read tensor by tensor, without building it.

Megatron-Core's `torch_dist` format names whole tensors, whatever parallel layout saved them. Layers
are stacked along a leading axis, and the gate and up halves of SwiGLU follow each other. Therefore
torch's own reader of that format reads checkpoints of any layout. A read needs memory for one
layer's tensor and for its largest saved part.

The index of the tensors is a pickle, which only model/on_disk/saved_index.py reads: a checkpoint
cannot run code.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_dwm.checkpoint.fingerprint import TOKENIZER_KEY
from megatron_dwm.checkpoint.kept_files import HUGGINGFACE, TOKENIZER, own_tokenizer
from megatron_dwm.checkpoint.manifest import MANIFEST, named_checkpoint, read_manifest
from megatron_dwm.checkpoint.names import CONFIG_FILE, LLM_FOLDER, MODEL_PREFIX, SHAPE_FILE
from megatron_dwm.config import UserError
from megatron_dwm.config.schema_llm import Builder
from megatron_dwm.model import LlamaShape
from megatron_dwm.model.on_disk.saved_index import read_index, require_files
from megatron_dwm.model.on_disk.tensor_boxes import read_box
from megatron_dwm.runtime import releases


@dataclass(frozen=True, kw_only=True)
class SavedLLM:
    """A checkpoint directory that has been found complete.

    config: content of its config.yaml, the configuration of the run that saved it.
    origin: what it was made from for the moment; None if it lasts.
    """

    directory: Path
    shape: LlamaShape
    config: dict[str, Any]
    origin: Path | None = None

    @property
    def sequence_length(self) -> int:
        """Tokens in a training sample."""
        return self.config["data"]["sequence_length"]

    @property
    def tokenizer_path(self) -> str | None:
        """Path of the tokenizer that the run's configuration names, if any."""
        return self.config["data"].get("tokenizer")

    @property
    def builder(self) -> Builder:
        """Megatron-Core's class that computes its logits: the run's, if this release has it."""
        is_hybrid = (self.config.get("model") or {}).get("builder") == "hybrid"
        return "hybrid" if is_hybrid and releases.has_hybrid_model() else "gpt"

    @property
    def tensors_directory(self) -> Path:
        """The `torch_dist` directory in the checkpoint."""
        return self.directory / LLM_FOLDER

    @property
    def tokenizer_copy(self) -> Path | None:
        """The checkpoint's copy of the run's tokenizer; None in checkpoints of older versions."""
        return own_tokenizer(self.directory / TOKENIZER)

    @property
    def huggingface_directory(self) -> Path | None:
        """Files of the Hugging Face model that training started from; None if there is none."""
        directory = self.directory / HUGGINGFACE
        return directory if directory.is_dir() else None

    @property
    def was_trained_here(self) -> bool:
        """True if a run saved the checkpoint, False if `from-hf` did."""
        return self.tokenizer_path is not None or self.huggingface_directory is None

    @property
    def recorded_tokenizer(self) -> str | None:
        """Digest of the run's tokenizer in the manifest (checkpoint/fingerprint.py), if any."""
        if not (self.directory / MANIFEST).is_file():
            return None
        return read_manifest(self.directory).fingerprint.get(TOKENIZER_KEY)

    @cached_property
    def _metadata(self) -> Metadata:
        return read_index(self.tensors_directory)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the saved parameters."""
        return self._entry("embedding.word_embeddings.weight").properties.dtype

    def read(self, name: str, *, rows: int | None = None) -> Tensor:
        """Returns a parameter outside the layers, or its first `rows`, as saved, on the CPU."""
        size = list(self._entry(name).size)
        return self.read_box(name, [0] * len(size), [rows or size[0], *size[1:]])

    def read_layer(self, name: str, layer: int) -> Tensor:
        """Returns the parameter `decoder.layers.{name}` of layer number `layer` (from 0)."""
        name = f"decoder.layers.{name}"
        size = self._entry(name).size
        box = self.read_box(name, [layer, *[0] * (len(size) - 1)], [1, *size[1:]])
        return box[0]

    def read_box(self, name: str, offsets: list[int], sizes: list[int]) -> Tensor:
        """Returns the part of tensor `name` that begins at `offsets` and has these sizes."""
        entry, folder = self._entry(name), self.tensors_directory
        return read_box(folder, self._metadata, MODEL_PREFIX + name, entry, offsets, sizes)

    def _entry(self, name: str) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata.get(MODEL_PREFIX + name)
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(
                f"{self.tensors_directory}: no tensor {MODEL_PREFIX + name}; this is not a "
                "checkpoint of a Llama model that shape.json beside it describes"
            )
        return entry


def open_checkpoint(path: str | Path) -> SavedLLM:
    """Open the LLM at `path`: a checkpoint, or a run directory (its newest whole checkpoint).

    Compares every file with the checkpoint's manifest first, which reads each file once; converted
    checkpoints have no manifest. Raises `UserError` if there is no checkpoint, or if one of its
    files is missing, broken or cut short.
    """
    directory = named_checkpoint(Path(path))
    shape = _read_shape(directory / SHAPE_FILE)
    config = _read_mapping(directory / CONFIG_FILE)
    data = config.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("sequence_length"), int):
        raise UserError(
            f"{directory / 'config.yaml'}: no data.sequence_length; the checkpoint is damaged, "
            "take another one"
        )
    saved = SavedLLM(directory=directory, shape=shape, config=config)
    _require_complete(saved)
    return saved


def _read_shape(path: Path) -> LlamaShape:
    values = _read_mapping(path)
    unknown = set(values) - {field.name for field in fields(LlamaShape)}
    if unknown:
        raise UserError(
            f"{path}: {min(unknown)} is not known; a newer version wrote it: use that version"
        )
    try:
        return LlamaShape(**values)
    except TypeError as error:
        raise UserError(f"{path}: does not describe a model: {error}") from None


def _read_mapping(path: Path) -> dict[str, Any]:
    """Returns the mapping in a JSON or YAML file."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; the checkpoint is incomplete") from None
    except (ValueError, yaml.YAMLError):
        raise UserError(f"{path}: cannot be read; the checkpoint is damaged") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: cannot be read; the checkpoint is damaged")
    return values


def _require_complete(saved: SavedLLM) -> None:
    """Raise UserError unless every file that the tensors' index names exists and is long enough."""
    index = saved.tensors_directory / ".metadata"
    if not index.is_file():
        raise UserError(f"{index}: no such file; the checkpoint is incomplete, take an older one")
    try:
        index_of_tensors = saved._metadata
    except Exception as error:  # a pickle cut short can raise anything
        raise UserError(f"{index}: cannot be read; the checkpoint is damaged ({error})") from error
    require_files(saved.tensors_directory, index_of_tensors)
