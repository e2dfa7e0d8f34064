"""Reads the parameters of a checkpoint that Megatron-LM or Megatron-Bridge saved (`torch_dist`).

Their tensors are stacked and laid out as ours are. What differs: names have no prefix; the norm
scales of Transformer Engine's layers carry the name of the linear layer that they are fused with;
layers may be saved one by one; and the vocabulary is padded to a multiple of the tensor-parallel
size, too. No file runs code. A read needs memory for one tensor of one layer and for the largest
saved piece.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_dwm.config import UserError
from megatron_dwm.model.builders.blocks import first_layer
from megatron_dwm.model.initialize import global_parameter_names, slice_of_rank
from megatron_dwm.model.layers.transformer_engine import UNFUSED_NAMES
from megatron_dwm.model.llm import LLM
from megatron_dwm.model.on_disk.megatron_settings import read_settings, shape_from
from megatron_dwm.model.on_disk.parameter_names import EMBEDDING, FINAL_NORM, OUTPUT, layer_sizes
from megatron_dwm.model.on_disk.saved_index import data_only, read_index, require_files
from megatron_dwm.model.on_disk.tensor_boxes import read_box
from megatron_dwm.model.shape import LlamaShape

LATEST = "latest_checkpointed_iteration.txt"
MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "main"
"""the fp32 parameters of an optimizer in mixed precision"""
_PREFIXES = {kind: (f"optimizer.state.{kind}.",) for kind in MOMENTS} | {
    "": ("",),
    MAIN: ("optimizer.state.fp32_param.", "optimizer.state.param."),
}
_LAYERS = "decoder.layers."
_FUSED = {unfused: fused for fused, unfused in UNFUSED_NAMES.items()}


def is_megatron(directory: Path) -> bool:
    """True if Megatron-LM or Bridge saved the directory, or one of its iterations."""
    return (directory / LATEST).is_file() or (directory / ".metadata").is_file()


def open_megatron(source: Path, given: Mapping[str, Any] | None = None) -> MegatronModel:
    """Returns the model in the folder of `latest_checkpointed_iteration.txt`, or of an iteration.

    given: fields of LlamaShape that the saved settings lack, or have wrong.

    Raises UserError: there is no such checkpoint, or it is of a model that is no Llama, or its
    tensors have other sizes than the shape says.
    """
    folder = newest_iteration(source)
    with data_only(folder / ".metadata"):
        require_files(folder, read_index(folder))
    settings = read_settings(folder)
    shape = shape_from(settings, given or {}, folder)
    model = MegatronModel(folder=folder, settings=settings, shape=shape)
    model.require_tensors()
    return model


@torch.no_grad()
def load_megatron(llm: LLM, source: MegatronModel) -> None:
    """Copy `source` into the parameters of this rank, in the precision of the parameters.

    The LLM has to have the shape of `source`. Every rank reads the tensors of its own layers.
    """
    assert llm.shape == source.shape, (llm.shape, source.shape)
    runtime = llm.runtime
    for module in llm.modules:
        for name, parameter in global_parameter_names(module, first_layer(module)):
            whole = source.read_finite(name)
            mine = slice_of_rank(whole, parameter, runtime.tensor_rank, runtime.tensor_size)
            parameter.copy_(mine)


def newest_iteration(source: Path) -> Path:
    """Returns the folder of the newest iteration, or `source` if it is one.

    Raises UserError if there is none, or if it is in another format.
    """
    folder = source
    if (source / LATEST).is_file():
        word = (source / LATEST).read_text(encoding="utf-8").strip()
        if word != "release" and not word.isdigit():
            raise UserError(f"{source / LATEST}: has {word!r}, expected the number of an iteration")
        folder = source / (word if word == "release" else f"iter_{int(word):07d}")
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
class MegatronModel:
    """A folder of tensors, the settings saved with them, and the shape of the model."""

    folder: Path
    settings: Mapping[str, Any]
    shape: LlamaShape

    @cached_property
    def index(self) -> Metadata:
        """The index of the saved tensors."""
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
        self._require_no_others()
        self._require(FINAL_NORM, (self.shape.hidden_size,))
        rows = self._rows(EMBEDDING)
        self._require(EMBEDDING, (rows, self.shape.hidden_size))
        if rows < self.shape.vocab_size:
            raise UserError(
                f"{self.folder}: the embedding has {rows} rows, fewer than vocab_size "
                f"{self.shape.vocab_size}; give --shape vocab_size=N"
            )
        if self.shape.tied_embeddings and OUTPUT in self.index.state_dict_metadata:
            raise UserError(
                f"{self.folder}: it has an output layer of its own, and the settings say that it "
                "is tied; give --shape tied_embeddings=false"
            )
        if not self.shape.tied_embeddings:
            self._require(OUTPUT, (rows, self.shape.hidden_size))

    def _require_no_others(self) -> None:
        """Raise UserError if the model has layers or tensors that the shape leaves out."""
        shape, saved = self.shape, self.index.state_dict_metadata
        for name in (each for each in saved if each.startswith(_LAYERS)):
            number, *_ = name.removeprefix(_LAYERS).partition(".")
            layers = int(number) + 1 if number.isdigit() else _stacked(saved[name])
            if layers is not None and layers > shape.num_layers:
                raise UserError(
                    f"{self.folder}: by {name} it has at least {layers} layers, the settings say "
                    f"{shape.num_layers}; give --shape num_layers=N"
                )
            for words, key, is_there in (
                ("linear_qkv.bias", "add_qkv_bias", shape.add_qkv_bias),
                ("q_layernorm.weight", "qk_layernorm", shape.qk_layernorm),
                ("k_layernorm.weight", "qk_layernorm", shape.qk_layernorm),
            ):
                if name.endswith(words) and not is_there:
                    raise UserError(
                        f"{self.folder}: it has {name}, and the settings say that there is none; "
                        f"give --shape {key}=true"
                    )

    @property
    def iteration(self) -> int:
        """Number of the saved iteration. Raises UserError if the folder is not named by one."""
        found = re.fullmatch(r"iter_(\d+)", self.folder.name)
        if found is None:
            raise UserError(f"{self.folder}: expected iter_N, whose N is Adam's step count")
        return int(found[1])

    def has(self, kind: str) -> bool:
        """True if the optimizer's tensors of this kind are there, under the parameters' names."""
        saved, numbers = self.index.state_dict_metadata, range(self.shape.num_layers)
        layers = [f"{_LAYERS}{n}.{name}" for n in numbers for name in layer_sizes(self.shape)]
        return all(
            any(spelled in saved for spelled, _ in _candidates(name, _PREFIXES[kind]))
            for name in (EMBEDDING, FINAL_NORM, *layers)
        )

    def read(self, name: str, kind: str = "") -> Tensor:
        """Returns the whole parameter `name`, as saved, on the CPU; rows of padding are 0.

        kind: one of `MOMENTS`, or `MAIN`: what the optimizer has of it.
        """
        if name == OUTPUT and self.shape.tied_embeddings:
            name = EMBEDDING
        if name in (EMBEDDING, OUTPUT):
            return self._read_vocabulary(name, kind)
        saved, number = self._find(name, kind)
        size = self._entry(saved).size
        if number is None:
            return self._box(saved, [0] * len(size), list(size))
        return self._box(saved, [number, *[0] * (len(size) - 1)], [1, *size[1:]])[0]

    def read_finite(self, name: str) -> Tensor:
        """Returns `read(name)`; raises UserError if a value is not finite: the file is damaged."""
        whole = self.read(name)
        if not bool(whole.isfinite().all()):
            raise UserError(f"{self.folder}: {name} has values that are not finite; it is damaged")
        return whole

    def _read_vocabulary(self, name: str, kind: str) -> Tensor:
        saved, _ = self._find(name, kind)
        entry = self._entry(saved)
        rows = min(self.shape.padded_vocab_size, entry.size[0])
        size = (self.shape.padded_vocab_size, self.shape.hidden_size)
        whole = torch.zeros(size, dtype=entry.properties.dtype)
        whole[:rows] = self._box(saved, [0, 0], [rows, size[1]])
        return whole

    def _box(self, name: str, offsets: list[int], sizes: list[int]) -> Tensor:
        return read_box(self.folder, self.index, name, self._entry(name), offsets, sizes)

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

    def _find(self, name: str, kind: str = "") -> tuple[str, int | None]:
        """Returns the saved name of a parameter, and its number in a stack of layers."""
        tensors = self.index.state_dict_metadata
        for candidate, number in _candidates(name, _PREFIXES[kind]):
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
        entry = self.index.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(f"{self.folder}: no tensor {name}")
        return entry


def _stacked(entry: Any) -> int | None:
    """Returns the layers in a stack of tensors; None for what is no tensor."""
    return entry.size[0] if isinstance(entry, TensorStorageMetadata) else None


def _candidates(name: str, prefixes: Iterable[str]) -> Iterator[tuple[str, int | None]]:
    """Yields the names under which Megatron may have saved a parameter; None: not stacked."""
    for prefix in prefixes:
        for candidate, number in _spellings(name):
            yield prefix + candidate, number


def _spellings(name: str) -> Iterator[tuple[str, int | None]]:
    spellings = [name]
    spellings += [name.replace(ours, theirs) for ours, theirs in _FUSED.items() if ours in name]
    for spelling in spellings:
        if not spelling.startswith(_LAYERS):
            yield spelling, None
            continue
        number, _, inner = spelling.removeprefix(_LAYERS).partition(".")
        yield f"{_LAYERS}{inner}", int(number)
        yield spelling, None
