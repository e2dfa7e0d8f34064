"""Writes the parameters of a checkpoint of Megatron-LM or Megatron-Bridge as one of ours.

Optimizer, random state and everything else are left. Cost: the model in memory once, on the CPU.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from tqdm import tqdm

from megatron_dwm.checkpoint.sharded_files import SaveError
from megatron_dwm.config import Config, DataConfig, ModelConfig, UserError
from megatron_dwm.config.printing import printable
from megatron_dwm.config.schema_llm import Precision
from megatron_dwm.convert.output import new_directory, require_free
from megatron_dwm.convert.written_model import write_model
from megatron_dwm.model import LlamaShape
from megatron_dwm.model.initialize import global_parameter_names
from megatron_dwm.model.on_disk.megatron_files import MegatronModel, open_megatron
from megatron_dwm.model.shape import model_keys

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
    kinds = {field.name: str(field.type) for field in fields(LlamaShape)}
    found = {}
    for word in words:
        key, _, text = word.partition("=")
        if key not in kinds:
            raise UserError(f"--shape {word}: expected KEY=VALUE with a KEY of {', '.join(kinds)}")
        try:
            found[key] = _value(kinds[key], text)
        except ValueError as error:
            raise UserError(f"--shape {word}: expected {error}") from None
    return found


def _value(kind: str, text: str) -> bool | int | float:
    """Returns a field's value from its text. Raises ValueError with what was expected."""
    if kind.startswith("bool"):
        if text.lower() not in ("true", "false"):
            raise ValueError("true or false")
        return text.lower() == "true"
    of_kind, name = (int, "a whole number") if kind.startswith("int") else (float, "a number")
    try:
        value = of_kind(text)
    except ValueError:
        raise ValueError(f"{name} above 0") from None
    if not 0 < value < math.inf:
        raise ValueError(f"{name} above 0")
    return value


def import_from_megatron(
    source: str | Path, output: str | Path, given: Mapping[str, Any] | None = None
) -> MegatronImport:
    """Write a checkpoint of Megatron-LM or Bridge as checkpoint directory `output`.

    source, given: as in `open_megatron`.

    Raises UserError: `output` exists or has no room, or as `open_megatron`.
    """
    output = Path(output)
    require_free(output)
    model = open_megatron(Path(source), given)
    try:
        with new_directory(output) as partial:
            write_model(
                partial, _config(model), model.shape, model.dtype, lambda it: _fill(it, model)
            )
    except SaveError as error:
        raise UserError(f"{output}: cannot be written ({error}); nothing is left there") from None
    return MegatronImport(
        directory=output, source=model.folder, dtype=model.dtype, shape=model.shape
    )


@torch.no_grad()
def _fill(module: LanguageModule, model: MegatronModel) -> None:
    """Copy the parameters into a module."""
    parameters = list(global_parameter_names(module, 0))
    if not sys.stderr.isatty():
        print(f"reading {printable(model.folder)}", file=sys.stderr)
    for name, parameter in tqdm(parameters, unit="tensor", disable=not sys.stderr.isatty()):
        parameter.copy_(model.read_finite(name))


def _config(model: MegatronModel) -> Config:
    settings = model.settings
    length = settings.get("seq_length") or settings.get("max_position_embeddings")
    precision: Precision = "bf16" if model.dtype == torch.bfloat16 else "fp32"
    return Config(
        model=ModelConfig(precision=precision, **model_keys(model.shape)),
        data=DataConfig(sequence_length=int(length or _SEQUENCE_LENGTH)),
    )
