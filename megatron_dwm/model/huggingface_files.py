"""A Llama model in Hugging Face's files: its shape, and its tensors one at a time.

Reads config.json and safetensors (one file or several with an index), or pytorch_model.bin with
torch's restricted unpickler: no code of the directory runs. What the model has that ours has not
(biases, other activations, other rotary embeddings) is refused. Opening reads headers only; a
tensor read costs its own memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_dwm.config import UserError
from megatron_dwm.model.layout import huggingface_shapes
from megatron_dwm.model.shape import LlamaShape

# What Megatron-Core's own Llama 3 scaling holds fixed.
_LLAMA3_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_REFUSED = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu",),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}
"""Keys of config.json, and the values that a model of ours can have."""


@dataclass(frozen=True, kw_only=True)
class HuggingFaceModel:
    """A directory found to hold a whole Llama model.

    context_tokens: longest sequence the model was made for (max_position_embeddings).
    files: the file that holds each tensor.
    """

    directory: Path
    shape: LlamaShape
    context_tokens: int
    files: Mapping[str, Path]

    def read(self, name: str) -> Tensor:
        """The tensor Hugging Face calls `name`, on the CPU; it may be the file's own pages."""
        path = self.files[name]
        if path.suffix == ".bin":
            return _open_bin(path)[name]
        with safe_open(path, "pt") as tensors:
            return tensors.get_tensor(name)

    @property
    def dtype(self) -> torch.dtype:
        """What the model's parameters are kept in."""
        return self.read("model.norm.weight").dtype


def is_huggingface(directory: Path) -> bool:
    """Whether `directory` looks like Hugging Face's (a checkpoint of ours has no config.json)."""
    return (directory / "config.json").is_file()


def open_huggingface(directory: Path) -> HuggingFaceModel:
    """The model in `directory`.

    Raises `UserError` if there is none, it is no Llama that ours can hold, or a tensor is missing,
    unknown or wrongly shaped, or a file cut short.
    """
    if not is_huggingface(directory):
        raise UserError(f"{directory}: not a Hugging Face model directory (no config.json)")
    path = directory / "config.json"
    config = _read_json(path)
    shape = shape_of_config(config, path)
    found = _find_tensors(directory)
    _require_tensors(shape, found, directory)
    return HuggingFaceModel(
        directory=directory,
        shape=shape,
        context_tokens=_whole_number(config, "max_position_embeddings", path, default=2048),
        files={name: place for name, (place, _) in found.items()},
    )


def shape_of_config(config: Mapping[str, Any], path: Path) -> LlamaShape:
    """What a config.json describes; `UserError` naming `path` for what ours cannot be."""
    if config.get("model_type") != "llama":
        raise UserError(
            f"{path}: model_type {config.get('model_type')!r}; only 'llama' can be converted"
        )
    for key, allowed in _REFUSED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(
                f"{path}: {key} {config[key]!r} is not supported; only {allowed[0]!r} is"
            )
    heads = _whole_number(config, "num_attention_heads", path)
    width = _whole_number(config, "hidden_size", path)
    head_dim = _whole_number(config, "head_dim", path, default=width // heads)
    base, scaling = _rotary(config, path)
    return LlamaShape(
        hidden_size=width,
        num_layers=_whole_number(config, "num_hidden_layers", path),
        num_attention_heads=heads,
        num_query_groups=_whole_number(config, "num_key_value_heads", path, default=heads),
        ffn_hidden_size=_whole_number(config, "intermediate_size", path),
        vocab_size=_whole_number(config, "vocab_size", path),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        rotary_base=base,
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        init_std=float(config.get("initializer_range", 0.02)),
        head_dim=None if head_dim * heads == width else head_dim,
        rope_scaling_factor=scaling,
    )


def _rotary(config: Mapping[str, Any], path: Path) -> tuple[float, float | None]:
    """(base, factor of Llama 3's scaling), as transformers 5 and its forerunners spell them."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    base = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) not in (1.0, None):
        raise UserError(f"{path}: a partial rotary embedding is not supported")
    if kind == "default":
        return base, None
    if kind != "llama3" or any(rope.get(key) != value for key, value in _LLAMA3_SCALING.items()):
        wanted = ", ".join(f"{key} {value:g}" for key, value in _LLAMA3_SCALING.items())
        raise UserError(
            f"{path}: rope scaling {rope} is not supported; only Llama 3's is, with {wanted}"
        )
    return base, float(rope["factor"])


def _whole_number(
    config: Mapping[str, Any], key: str, path: Path, *, default: int | None = None
) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{path}: {key} is {value!r}; expected a whole number above 0")
    return value


def _find_tensors(directory: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """File and shape of every tensor in the directory."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = directory / f"{stem}.{suffix}.index.json"
        whole = directory / f"{stem}.{suffix}"
        if index.is_file():
            names = _read_json(index).get("weight_map")
            if not isinstance(names, dict):
                raise UserError(f"{index}: has no weight_map; the model is damaged")
            # Path(...).name: an index must not lead out of its directory.
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
            f"{path}: cannot be read: it holds more than tensors, and could run code"
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
    # Written by old versions; they follow from the configuration.
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
        raise UserError(f"{directory}: tensor {min(extra)} is not one of a Llama model")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; the model is damaged")
    return content
