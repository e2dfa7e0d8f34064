"""Checks the model that a run starts from, or compares with, before processes start.

It is a checkpoint, a Hugging Face directory, or a checkpoint of Megatron-LM or Megatron-Bridge.

A checkpoint's files are compared with the checksums in its manifest. The names and sizes in the
index of its tensors are compared with its shape.json, so that a wrong checkpoint gives one clear
line and not an error of Megatron-Core's loader.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_dwm.checkpoint.kept_files import HUGGINGFACE, TOKENIZER
from megatron_dwm.checkpoint.load import load_parameters, load_trained
from megatron_dwm.checkpoint.manifest import MANIFEST, list_checkpoints, require_whole
from megatron_dwm.checkpoint.names import LLM_FOLDER, MODEL_PREFIX, SHAPE_FILE
from megatron_dwm.checkpoint.parts import TrainedModel
from megatron_dwm.checkpoint.sharded_adam import create_state
from megatron_dwm.checkpoint.sharded_files import data_only
from megatron_dwm.config import Config, ModelConfig, UserError
from megatron_dwm.model import LLM, LlamaShape
from megatron_dwm.model.on_disk.from_huggingface import load_huggingface
from megatron_dwm.model.on_disk.huggingface_files import is_huggingface, open_huggingface
from megatron_dwm.model.on_disk.megatron_files import (
    MOMENTS,
    is_megatron,
    load_megatron,
    open_megatron,
)
from megatron_dwm.model.on_disk.parameter_names import megatron_sizes
from megatron_dwm.model.on_disk.saved_index import read_index
from megatron_dwm.tokenizer import Tokenizer
from megatron_dwm.training.learner import Learner
from megatron_dwm.training.saved_moments import load_moments

_KEY = "model.init_from"


def shape_to_start_from(config: Config) -> LlamaShape | None:
    """Returns the shape of the model of `model.init_from` and checks its files; None without it.

    A run that is resumed has it in its checkpoints, and the model need not be there any more.
    """
    if config.model.init_from is None:
        return None
    if config.run.resume:
        for checkpoint in reversed(list_checkpoints(Path(config.run.dir))):
            # A damaged one is set aside later, when all files are compared with their checksums.
            with suppress(UserError):
                if (checkpoint / MANIFEST).is_file():
                    return _read_shape(checkpoint / SHAPE_FILE, "run.dir")
    shape = shape_of_model(Path(config.model.init_from), _KEY)
    if config.model.init_optimizer:
        _require_optimizer(config, Path(config.model.init_from))
    return shape


def _require_optimizer(config: Config, directory: Path) -> None:
    """Raise UserError unless Adam's moments are there, under names that can be read."""
    rounds = config.model.precision != "fp32" and not config.parallel.grad_reduce_in_fp32
    if rounds and is_megatron(directory):
        raise UserError(
            "model.init_optimizer: Megatron-LM's moments are read through the gradient buffers, "
            "which are in bf16 and would round them; expected parallel.grad_reduce_in_fp32 true"
        )
    if is_huggingface(directory):
        found = False
    elif is_megatron(directory):
        model = open_megatron(directory)
        found = all(model.has(kind) for kind in MOMENTS) and model.iteration >= 0
    else:
        names = _read_index(directory / LLM_FOLDER, _KEY).state_dict_metadata
        found = any(name.startswith("optimizer.state.exp_avg.") for name in names)
    if not found:
        raise UserError(
            f"model.init_optimizer: {directory} has no moments of Adam under the names of the "
            "parameters (optimizer.state.exp_avg....); leave it out, and Adam begins anew"
        )


def load_start(learner: Learner, config: ModelConfig) -> None:
    """Load the parameters of `model.init_from`, and Adam's state if asked for (collective)."""
    directory = Path(config.init_from or "")
    llm, optimizer = learner.llm, learner.optimizer
    if not config.init_optimizer:
        load_model(llm, directory)
        optimizer.reload_model_params()
    elif is_megatron(directory):
        create_state(llm, optimizer)
        load_model(llm, directory)
        optimizer.reload_model_params()
        load_moments(learner, open_megatron(directory))
    else:
        load_trained(TrainedModel(llm=llm, optimizer=optimizer), directory / LLM_FOLDER)


def shape_of_model(directory: Path, key: str) -> LlamaShape:
    """Returns the shape of the model in `directory` and checks its files.

    key: the configuration key that named it, for messages.
    Raises UserError if it is none of these, or not whole.
    """
    if is_huggingface(directory):
        return open_huggingface(directory).shape
    if is_megatron(directory):
        return open_megatron(directory).shape
    shape = _read_shape(directory / SHAPE_FILE, key)
    if not (directory / LLM_FOLDER / ".metadata").is_file():
        raise UserError(
            f"{key}: {directory / 'llm/.metadata'} is missing; the checkpoint is incomplete"
        )
    require_whole(directory, key)
    _require_tensors(directory / LLM_FOLDER, shape, key)
    return shape


def load_model(llm: LLM, directory: Path) -> None:
    """Load the parameters of a model that `shape_of_model` has checked (collective)."""
    if is_huggingface(directory):
        load_huggingface(llm, open_huggingface(directory))
    elif is_megatron(directory):
        load_megatron(llm, open_megatron(directory))
    else:
        load_parameters(llm, directory)


def _read_shape(path: Path, key: str) -> LlamaShape:
    if not path.is_file():
        steps = list_checkpoints(path.parent)
        newest = f"; this is a run, and its newest checkpoint is {steps[-1]}" if steps else ""
        raise UserError(
            f"{key}: {path} is missing; expected a checkpoint such as "
            "RUN/checkpoints/step_00001000, a Hugging Face directory, or a folder of Megatron-LM's "
            f"latest_checkpointed_iteration.txt{newest}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        unknown = set(values) - {field.name for field in fields(LlamaShape)}
        if unknown:
            raise UserError(f"{key}: {path}: {min(unknown)} is not known; is this a checkpoint?")
        return _checked(LlamaShape(**values))
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{key}: {path} does not describe a model ({reason})") from None


def _checked(shape: LlamaShape) -> LlamaShape:
    """Returns `shape`; raises ValueError unless its numbers are above 0."""
    for field in fields(LlamaShape):
        value: Any = getattr(shape, field.name)
        if field.type == "bool":
            if not isinstance(value, bool):
                raise ValueError(f"{field.name} is {value!r}, expected true or false")
            continue
        if value is None and field.default is None:
            continue
        kind = int if field.type.startswith("int") else (int, float)
        if not isinstance(value, kind) or isinstance(value, bool) or not value > 0:
            raise ValueError(f"{field.name} is {value!r}, expected a number above 0")
    return shape


def _require_tensors(directory: Path, shape: LlamaShape, key: str) -> None:
    """Raise UserError unless the index in `directory` has the tensors of such a model."""
    found = _read_index(directory, key).state_dict_metadata
    for name, size in megatron_sizes(shape).items():
        entry = found.get(MODEL_PREFIX + name)
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(
                f"{key}: {directory} has no tensor {MODEL_PREFIX + name}; it is no checkpoint of "
                "a model that the shape.json next to it describes"
            )
        if tuple(entry.size) != size:
            raise UserError(
                f"{key}: {directory}: tensor {MODEL_PREFIX + name} has shape {list(entry.size)}, "
                f"the shape.json next to it says {list(size)}"
            )


def _read_index(directory: Path, key: str) -> Metadata:
    with data_only(directory / ".metadata"):
        try:
            return read_index(directory)
        except (EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{key}: {directory / '.metadata'} cannot be read; the checkpoint is damaged "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
            ) from error


def warn_of_another_tokenizer(config: Config, tokenizer: Tokenizer) -> None:
    """Warn on stderr if the run's tokenizer is not that of the model that it starts from.

    Prints nothing if the model's tokenizer is not known.
    """
    directory = Path(config.model.init_from or "")
    folders = [directory] if is_huggingface(directory) else []
    folders += [directory / TOKENIZER] if (directory / TOKENIZER).is_dir() else []
    folders = folders or [directory / HUGGINGFACE]
    known = [
        (folder / name).read_bytes()
        for folder in folders
        for name in ("tokenizer.json", "tokenizer.model")
        if (folder / name).is_file()
    ]
    if known and not {tokenizer.content, tokenizer.file} & set(known):
        print(
            f"warning: data.tokenizer {config.data.tokenizer} is not the tokenizer of {_KEY} "
            f"{directory}: the model learned other ids for the same words; name the model's own, "
            "unless this is intended",
            file=sys.stderr,
            flush=True,
        )
