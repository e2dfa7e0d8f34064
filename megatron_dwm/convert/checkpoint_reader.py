"""A saved LLM read tensor by tensor, without building it.

Megatron-Core's `torch_dist` format keeps every tensor whole, whatever the parallel layout that
saved it: layers stacked along a leading axis, and the gate and up halves of SwiGLU one after the
other. torch's own reader of that format therefore reads any layout. A read costs the memory of the
one stacked tensor.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_dwm.config import UserError
from megatron_dwm.model import LlamaShape

MODEL_PREFIX = "model."


@dataclass(frozen=True, kw_only=True)
class SavedLLM:
    """A checkpoint directory found complete.

    sequence_length: tokens in a training sample.
    tokenizer_path: the SentencePiece model that the run's configuration names, if any.
    """

    directory: Path
    shape: LlamaShape
    sequence_length: int
    tokenizer_path: str | None

    @property
    def tensors_directory(self) -> Path:
        """The `torch_dist` directory inside."""
        return self.directory / "llm"

    @cached_property
    def _metadata(self) -> Metadata:
        return torch_checkpoint.FileSystemReader(self.tensors_directory).read_metadata()

    @property
    def dtype(self) -> torch.dtype:
        """What the model's parameters were saved as."""
        return self._entry("embedding.word_embeddings.weight").properties.dtype

    def read(self, name: str) -> Tensor:
        """The tensor `name` (without the model's prefix) as saved, on the CPU."""
        entry = self._entry(name)
        key = MODEL_PREFIX + name
        state = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
        reader = torch_checkpoint.FileSystemReader(self.tensors_directory)
        with warnings.catch_warnings():
            # One process is what is meant here.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            torch_checkpoint.load(state, storage_reader=reader, no_dist=True)
        return state[key]

    def _entry(self, name: str) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata.get(MODEL_PREFIX + name)
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(
                f"{self.tensors_directory}: no tensor {MODEL_PREFIX + name}; this is not a "
                "checkpoint of a Llama model that shape.json beside it describes"
            )
        return entry


def open_checkpoint(path: str | Path) -> SavedLLM:
    """The LLM saved at `path`: a checkpoint, or a run directory (its newest checkpoint).

    Raises `UserError` if there is none, or a file of it is missing, broken or cut short.
    """
    directory = _checkpoint_directory(Path(path))
    shape = _read_shape(directory / "shape.json")
    configuration = _read_mapping(directory / "config.yaml")
    data = configuration.get("data") or {}
    if not isinstance(data.get("sequence_length"), int):
        raise UserError(f"{directory / 'config.yaml'}: no data.sequence_length")
    saved = SavedLLM(
        directory=directory,
        shape=shape,
        sequence_length=data["sequence_length"],
        tokenizer_path=data.get("tokenizer"),
    )
    _require_complete(saved)
    return saved


def _checkpoint_directory(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give a run directory or a checkpoint in it")
    if (path / "llm").exists() or (path / "shape.json").exists():
        return path
    found = {
        int(entry.name.removeprefix("step_")): entry
        for entry in (path / "checkpoints").glob("step_*")
        if entry.name.removeprefix("step_").isdigit()
    }
    if not found:
        raise UserError(
            f"{path}: not a checkpoint (no llm/ and shape.json) nor a run with checkpoints/step_*"
        )
    return found[max(found)]


def _read_shape(path: Path) -> LlamaShape:
    values = _read_mapping(path)
    known = {field.name for field in fields(LlamaShape)}
    try:
        return LlamaShape(**{name: value for name, value in values.items() if name in known})
    except TypeError as error:
        raise UserError(f"{path}: does not describe a model: {error}") from None


def _read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a JSON or YAML file."""
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
    """Every file that the index of the tensors names is there, and long enough."""
    index = saved.tensors_directory / ".metadata"
    if not index.is_file():
        raise UserError(f"{index}: no such file; the checkpoint is incomplete, take an older one")
    try:
        places = saved._metadata.storage_data.values()
    except Exception as error:  # a pickle cut short can raise anything
        raise UserError(f"{index}: cannot be read; the checkpoint is damaged ({error})") from error
    needed_bytes: dict[str, int] = {}
    for place in places:
        end = place.offset + place.length
        needed_bytes[place.relative_path] = max(end, needed_bytes.get(place.relative_path, 0))
    for name, size_bytes in needed_bytes.items():
        path = saved.tensors_directory / name
        if not path.is_file() or path.stat().st_size < size_bytes:
            raise UserError(
                f"{path}: missing or cut short (its index expects {size_bytes} bytes); "
                "the checkpoint is incomplete, take an older one"
            )
