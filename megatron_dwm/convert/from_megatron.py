"""Reads the parameters of a checkpoint that Megatron-LM or Megatron-Bridge saved (`torch_dist`).

Their tensors are stacked and laid out as ours are. What differs: names have no prefix; the norm
scales of Transformer Engine's layers carry the name of the linear layer that they are fused with;
layers may be saved one by one; and the vocabulary is padded to a multiple of the tensor-parallel
size, too. Optimizer, random state and everything else are left. No file runs code. Cost: the model
in memory once, on the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from tqdm import tqdm

from megatron_dwm.checkpoint.sharded_files import SaveError
from megatron_dwm.config import Config, DataConfig, ModelConfig, UserError
from megatron_dwm.config.printing import printable
from megatron_dwm.config.schema_llm import Precision
from megatron_dwm.convert.megatron_arguments import read_settings, shape_from
from megatron_dwm.convert.output import new_directory, require_free
from megatron_dwm.convert.tensor_boxes import read_box
from megatron_dwm.convert.written_model import write_model
from megatron_dwm.model import LlamaShape
from megatron_dwm.model.initialize import global_parameter_names
from megatron_dwm.model.layers.transformer_engine import UNFUSED_NAMES
from megatron_dwm.model.on_disk.parameter_names import EMBEDDING, OUTPUT, layer_sizes
from megatron_dwm.model.on_disk.saved_index import data_only, read_index
from megatron_dwm.model.shape import model_keys

LATEST = "latest_checkpointed_iteration.txt"
_LAYERS = "decoder.layers."
_FUSED = {unfused: fused for fused, unfused in UNFUSED_NAMES.items()}
# Megatron-LM's default; the sequence length only bounds what exports say of the context.
_SEQUENCE_LENGTH = 4096


@dataclass(frozen=True, kw_only=True)
class MegatronImport:
    """What was written. source: the folder of one iteration."""

    directory: Path
    source: Path
    dtype: torch.dtype
    shape: LlamaShape


def fields_given(words: Iterable[str]) -> dict[str, Any]:
    """Returns fields of LlamaShape from words KEY=VALUE. Raises UserError."""
    known, found = [field.name for field in fields(LlamaShape)], {}
    for word in words:
        key, sign, text = word.partition("=")
        value = yaml.safe_load(text) if sign else None
        if key not in known:
            raise UserError(f"--shape {word}: expected KEY=VALUE with a KEY of {', '.join(known)}")
        if not isinstance(value, (int, float)):
            raise UserError(f"--shape {word}: expected a number, true or false")
        found[key] = value
    return found


def import_from_megatron(
    source: str | Path, output: str | Path, given: Mapping[str, Any] | None = None
) -> MegatronImport:
    """Write a checkpoint of Megatron-LM or Bridge as checkpoint directory `output`.

    source: the folder of `latest_checkpointed_iteration.txt`, or of one iteration.
    given: fields of LlamaShape that the saved settings lack, or have wrong.

    Raises UserError: `output` exists or has no room; `source` has no such checkpoint, or one of a
    model that is no Llama, or whose tensors have other sizes than the shape says.
    """
    output = Path(output)
    require_free(output)
    folder = _iteration(Path(source))
    settings = read_settings(folder)
    saved = _Saved(folder=folder, shape=shape_from(settings, given or {}, folder))
    saved.require_tensors()
    length = settings.get("seq_length") or settings.get("max_position_embeddings")
    config = _config(saved, int(length or _SEQUENCE_LENGTH))
    try:
        with new_directory(output) as partial:
            write_model(partial, config, saved.shape, saved.dtype, saved.fill)
    except SaveError as error:
        raise UserError(f"{output}: cannot be written ({error}); nothing is left there") from None
    return MegatronImport(directory=output, source=folder, dtype=saved.dtype, shape=saved.shape)


def _iteration(source: Path) -> Path:
    """Returns the folder of the newest iteration, or `source` if it is one."""
    folder = source
    if (source / LATEST).is_file():
        word = (source / LATEST).read_text(encoding="utf-8").strip()
        folder = source / ("release" if word == "release" else f"iter_{int(word or 0):07d}")
    if (folder / "mp_rank_00").is_dir() or list(folder.glob("mp_rank_*")):
        raise UserError(
            f"{folder}: saved with --ckpt-format torch, one file a rank; convert it with "
            "Megatron-LM's --ckpt-convert-format torch_dist"
        )
    if not (folder / ".metadata").is_file():
        raise UserError(
            f"{folder}: no .metadata; expected a folder that Megatron-LM saved with --ckpt-format "
            f"torch_dist: iter_0001000, or that with {LATEST}"
        )
    return folder


@dataclass(frozen=True, kw_only=True)
class _Saved:
    """A folder of tensors, and the shape of the model that they are."""

    folder: Path
    shape: LlamaShape

    @cached_property
    def _index(self) -> Metadata:
        with data_only(self.folder / ".metadata"):
            return read_index(self.folder)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the parameters."""
        return self._entry(EMBEDDING).properties.dtype

    def require_tensors(self) -> None:
        """Raise UserError unless every parameter is there, in the size that the shape says."""
        for number in range(self.shape.num_layers):
            for name, size in layer_sizes(self.shape).items():
                self._require(f"{_LAYERS}{number}.{name}", size)
        rows = self._rows(EMBEDDING)
        self._require(EMBEDDING, (rows, self.shape.hidden_size))
        if rows < self.shape.vocab_size:
            raise UserError(
                f"{self.folder}: the embedding has {rows} rows, fewer than vocab_size "
                f"{self.shape.vocab_size}; give --shape vocab_size=N"
            )
        if self.shape.tied_embeddings and OUTPUT in self._index.state_dict_metadata:
            raise UserError(
                f"{self.folder}: it has an output layer of its own, and the settings say that it "
                "is tied; give --shape tied_embeddings=false"
            )
        if not self.shape.tied_embeddings:
            self._require(OUTPUT, (rows, self.shape.hidden_size))

    @torch.no_grad()
    def fill(self, module: LanguageModule) -> None:
        """Copy the parameters into a module."""
        parameters = list(global_parameter_names(module, 0))
        if not sys.stderr.isatty():
            print(f"reading {printable(self.folder)}", file=sys.stderr)
        for name, parameter in tqdm(parameters, unit="tensor", disable=not sys.stderr.isatty()):
            parameter.copy_(self._read(name, parameter))

    def _read(self, name: str, like: Tensor) -> Tensor:
        """Returns a parameter; rows of padding that are not there are 0."""
        if name in (EMBEDDING, OUTPUT):
            rows = min(len(like), self._rows(name))
            whole = torch.zeros_like(like)
            whole[:rows] = self._box(name, [0, 0], [rows, like.shape[1]])
            return whole
        saved, number = self._find(name)
        if number is None:
            return self._box(saved, [0] * like.dim(), list(like.shape))
        return self._box(saved, [number, *[0] * like.dim()], [1, *like.shape])[0]

    def _box(self, name: str, offsets: list[int], sizes: list[int]) -> Tensor:
        return read_box(self.folder, self._index, name, self._entry(name), offsets, sizes)

    def _rows(self, name: str) -> int:
        return self._entry(name).size[0]

    def _require(self, name: str, size: tuple[int, ...]) -> None:
        saved, number = self._find(name)
        found = tuple(self._entry(saved).size)
        found = found[1:] if number is not None else found
        if found != size:
            raise UserError(
                f"{self.folder}: tensor {saved} has the size {list(found)} a layer, the settings "
                f"say {list(size)}; give --shape KEY=VALUE for what they have wrong"
            )

    def _find(self, name: str) -> tuple[str, int | None]:
        """Returns the saved name of a parameter, and its number in a stack of layers."""
        tensors = self._index.state_dict_metadata
        for candidate, number in _candidates(name):
            if candidate in tensors:
                layers = self._entry(candidate).size[0]
                if number is not None and number >= layers:
                    raise UserError(
                        f"{self.folder}: {candidate} has {layers} layers, the settings say "
                        f"{self.shape.num_layers}; give --shape num_layers={layers}"
                    )
                return candidate, number
        raise UserError(
            f"{self.folder}: no tensor {name}; expected the model of Megatron-LM in Llama's shape"
        )

    def _entry(self, name: str) -> TensorStorageMetadata:
        entry = self._index.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(f"{self.folder}: no tensor {name}")
        return entry


def _candidates(name: str) -> Iterator[tuple[str, int | None]]:
    """Yields the names under which Megatron may have saved a parameter; None: not stacked."""
    spellings = [name]
    spellings += [name.replace(ours, theirs) for ours, theirs in _FUSED.items() if ours in name]
    for spelling in spellings:
        if not spelling.startswith(_LAYERS):
            yield spelling, None
            continue
        number, _, inner = spelling.removeprefix(_LAYERS).partition(".")
        yield f"{_LAYERS}{inner}", int(number)
        yield spelling, None


def _config(saved: _Saved, sequence_length: int) -> Config:
    precision: Precision = "bf16" if saved.dtype == torch.bfloat16 else "fp32"
    return Config(
        model=ModelConfig(precision=precision, **model_keys(saved.shape)),
        data=DataConfig(sequence_length=sequence_length),
    )
