"""Converts a Hugging Face model to a checkpoint; the gate compares both models first.

The checkpoint has what a run's has, without the optimizer: `llm/` in Megatron-Core's distributed
format, shape.json and config.yaml. `model.init_from` and `to-hf` read it under any layout. The
model's other files are copied too. Cost: the whole model in memory once, on the CPU, and the cost
of gate.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from tqdm import tqdm

from megatron_dwm.checkpoint.kept_files import HUGGINGFACE, huggingface_files, write_files
from megatron_dwm.checkpoint.sharded_files import SaveError
from megatron_dwm.config import Config, DataConfig, ModelConfig, UserError
from megatron_dwm.config.printing import printable
from megatron_dwm.config.schema_llm import Builder, Precision
from megatron_dwm.convert.checkpoint_reader import open_checkpoint
from megatron_dwm.convert.gate import gate_tokens, require_equal_logits
from megatron_dwm.convert.original_files import plain_encoder, special_tokens
from megatron_dwm.convert.output import new_directory, require_free
from megatron_dwm.convert.written_model import write_model
from megatron_dwm.model.builders.build import require_builder
from megatron_dwm.model.initialize import global_parameter_names
from megatron_dwm.model.on_disk.huggingface_files import HuggingFaceModel, open_huggingface
from megatron_dwm.model.on_disk.parameter_names import megatron_tensor
from megatron_dwm.model.shape import model_keys


@dataclass(frozen=True, kw_only=True)
class Import:
    """What was written.

    logits_deviation: as a fraction of the largest logit; None if the comparison was skipped.
    """

    directory: Path
    source: Path
    dtype: torch.dtype
    logits_deviation: float | None


def import_from_huggingface(
    source: str | Path, output: str | Path, *, skip_check: bool = False, builder: Builder = "gpt"
) -> Import:
    """Write Hugging Face directory `source` as checkpoint directory `output`.

    Parameters keep their data type. `builder` (model.builder) writes them and computes the logits.

    Raises:
        UserError: `output` exists or has no room; `source` is not a complete model of a supported
            kind; or it has no tokenizer for the comparison of logits; or the release of
            Megatron-Core lacks the builder's class.
        GateError: the two models compute different logits; `output` is then not written.
    """
    output = Path(output)
    require_builder(builder)
    require_free(output)
    model = open_huggingface(Path(source))
    # RunInputs first, so that a missing tokenizer is an error before the long part.
    encode = None if skip_check else plain_encoder(model.directory)
    try:
        with new_directory(output) as partial:
            _write(model, partial, builder)
            deviation = None if encode is None else _compare_logits(model, partial, encode)
    except SaveError as error:
        raise UserError(f"{output}: cannot be written ({error}); nothing is left there") from None
    return Import(
        directory=output, source=model.directory, dtype=model.dtype, logits_deviation=deviation
    )


def _write(model: HuggingFaceModel, directory: Path, builder: Builder) -> None:
    config = _config(model, builder)
    write_model(directory, config, model.shape, model.dtype, lambda module: _fill(module, model))
    write_files(huggingface_files(model.directory), directory / HUGGINGFACE)


@torch.no_grad()
def _fill(module: LanguageModule, model: HuggingFaceModel) -> None:
    parameters = list(global_parameter_names(module, 0))
    if not sys.stderr.isatty():
        print(f"reading {printable(model.directory)}", file=sys.stderr)
    for name, parameter in tqdm(parameters, unit="tensor", disable=not sys.stderr.isatty()):
        parameter.copy_(megatron_tensor(model.shape, name, model.read))


def _config(model: HuggingFaceModel, builder: Builder) -> Config:
    """Returns the configuration of a run that has this model, as far as it is known."""
    precision: Precision = "bf16" if model.dtype == torch.bfloat16 else "fp32"
    return Config(
        model=ModelConfig(precision=precision, builder=builder, **model_keys(model.shape)),
        data=DataConfig(sequence_length=model.context_tokens),
    )


def _compare_logits(
    model: HuggingFaceModel, directory: Path, encode: Callable[[str], list[int]]
) -> float:
    separator = special_tokens(directory / HUGGINGFACE).get("eos_token_id")
    end = separator if isinstance(separator, int) else None
    tokens_BS = gate_tokens(encode, end, model.context_tokens)
    return require_equal_logits(open_checkpoint(directory), model, tokens_BS, model.dtype)
