"""Writes safetensors files shard by shard, with Hugging Face's index.

The shapes are known, so the shards are planned before the first tensor is read, and only one shard
is in memory at a time. A shard has at most twice the bytes of the largest tensor, at least
`SMALLEST_SHARD_BYTES` and at most `LARGEST_SHARD_BYTES`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

SMALLEST_SHARD_BYTES = 200 * 2**20
LARGEST_SHARD_BYTES = 5 * 10**9
# transformers and vLLM read this.
_FILE_METADATA = {"format": "pt"}


def write_shards(
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    directory: Path,
    *,
    shard_bytes: int | None = None,
) -> None:
    """Write model.safetensors, or model-XXXXX-of-XXXXX.safetensors and their index.

    Args:
        shapes: name and shape of every tensor.
        tensors: the same names in the same order, with the tensors.
        dtype: data type of the written tensors.
        directory: where the files are written.
        shard_bytes: largest shard (a larger tensor is a shard of its own); None chooses.
    """
    shards = plan_shards(shapes, dtype, shard_bytes)
    names = _file_names(len(shards))
    source = iter(tensors)
    for file, shard in zip(names, shards, strict=True):
        content = {}
        for expected in shard:
            name, tensor = next(source)
            assert (name, tuple(tensor.shape)) == (expected, shapes[expected]), (name, expected)
            content[name] = tensor.to(dtype).contiguous()
        save_file(content, directory / file, metadata=_FILE_METADATA)
    assert next(source, None) is None, "more tensors than planned"
    if len(shards) > 1:
        _write_index(directory, shapes, dtype, dict(zip(names, shards, strict=True)))


def plan_shards(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, shard_bytes: int | None = None
) -> list[list[str]]:
    """Returns the names of the tensors in each file, in order."""
    sizes = {name: prod(size) * dtype.itemsize for name, size in shapes.items()}
    if shard_bytes is None:
        wanted = max(SMALLEST_SHARD_BYTES, 2 * max(sizes.values()))
        shard_bytes = min(LARGEST_SHARD_BYTES, wanted)
    shards: list[list[str]] = []
    left = 0
    for name, size in sizes.items():
        if size > left:
            shards.append([])
            left = shard_bytes
        shards[-1].append(name)
        left -= size
    return shards


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _write_index(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    shards: Mapping[str, list[str]],
) -> None:
    total = sum(prod(size) for size in shapes.values())
    index = {
        "metadata": {"total_parameters": total, "total_size": total * dtype.itemsize},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
