"""A model in Hugging Face's files: its shape, and its tensors one at a time.

Reads config.json and safetensors (one file or several with an index), or pytorch_model.bin with
torch's restricted unpickler: no code of the directory runs. A model with features that ours lacks
(config/huggingface.py) is refused. Opening reads headers only; reading
a tensor costs its own memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_dwm.config import UserError
from megatron_dwm.config.huggingface import (
    CONFIG_NAME,
    HuggingFaceConfig,
    read_huggingface_config,
    read_json_object,
)
from megatron_dwm.model.on_disk.parameter_names import huggingface_shapes
from megatron_dwm.model.shape import LlamaShape


@dataclass(frozen=True, kw_only=True)
class HuggingFaceModel:
    """A directory that holds a whole model.

    context_tokens: longest sequence that the model supports (max_position_embeddings).
    files: the file that holds each tensor.
    """

    directory: Path
    shape: LlamaShape
    context_tokens: int
    files: Mapping[str, Path]

    def read(self, name: str) -> Tensor:
        """Returns the tensor with Hugging Face's `name`, on the CPU, maybe mapped from the file."""
        path = self.files[name]
        if path.suffix == ".bin":
            return _open_bin(path)[name]
        with safe_open(path, "pt") as tensors:
            return tensors.get_tensor(name)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the model's parameters, from its final norm."""
        return self.read("model.norm.weight").dtype


def is_huggingface(directory: Path) -> bool:
    """True if `directory` has Hugging Face's config.json, which our checkpoints do not have."""
    return (directory / CONFIG_NAME).is_file()


def open_huggingface(directory: Path) -> HuggingFaceModel:
    """Open the model in `directory`.

    Raises `UserError` if there is no model or none that is supported, if a tensor is missing,
    unknown or has a wrong shape, or if a file is truncated.
    """
    config = read_huggingface_config(directory)
    shape = shape_of(config)
    found = _find_tensors(directory)
    _require_tensors(shape, found, directory)
    return HuggingFaceModel(
        directory=directory,
        shape=shape,
        context_tokens=config.context_tokens,
        files={name: path for name, (path, _) in found.items()},
    )


def shape_of(config: HuggingFaceConfig) -> LlamaShape:
    """Returns the shape of the model that a config.json describes."""
    return LlamaShape(**{field.name: getattr(config, field.name) for field in fields(LlamaShape)})


def _find_tensors(directory: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Returns file and shape of every tensor in the directory."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = directory / f"{stem}.{suffix}.index.json"
        whole = directory / f"{stem}.{suffix}"
        if index.is_file():
            names = read_json_object(index).get("weight_map")
            if not isinstance(names, dict):
                raise UserError(f"{index}: has no weight_map; the model is damaged")
            # Path(...).name: an index must not name files outside its directory.
            paths = sorted({directory / Path(str(name)).name for name in names.values()})
        elif whole.is_file():
            paths = [whole]
        else:
            continue
        return {name: (p, size) for p in paths for name, size in _sizes(p).items()}
    raise UserError(f"{directory}: no model.safetensors (or pytorch_model.bin), nor an index of it")


def _sizes(path: Path) -> dict[str, tuple[int, ...]]:
    if not path.is_file():
        raise UserError(f"{path}: missing; the model is incomplete, fetch it again")
    try:
        if path.suffix == ".bin":
            return {name: tuple(tensor.shape) for name, tensor in _open_bin(path).items()}
        with safe_open(path, "pt") as tensors:
            names = list(tensors.keys())
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    except UnpicklingError:
        raise UserError(
            f"{path}: cannot be read: it holds more than tensors, and could run code; take a file "
            "with tensors only"
        ) from None
    except (SafetensorError, OSError, RuntimeError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read ({reason}); fetch it again") from None


def _open_bin(path: Path) -> dict[str, Tensor]:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _require_tensors(
    shape: LlamaShape, found: dict[str, tuple[Path, tuple[int, ...]]], directory: Path
) -> None:
    wanted = huggingface_shapes(shape)
    # Old versions wrote these; the configuration determines them.
    extra = {name for name in set(found) - set(wanted) if not name.endswith("rotary_emb.inv_freq")}
    if shape.tied_embeddings:
        extra.discard("lm_head.weight")
    for name, size in wanted.items():
        if name not in found:
            raise UserError(f"{directory}: no tensor {name}; the model is incomplete")
        if found[name][1] != size:
            raise UserError(
                f"{directory}: tensor {name} has shape {list(found[name][1])}, config.json asks "
                f"for {list(size)}"
            )
    if extra:
        raise UserError(f"{directory}: tensor {min(extra)} is not one of its model class")
