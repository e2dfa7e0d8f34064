"""Writes a converted model as the checkpoint of a run, without an optimizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule

from megatron_dwm.checkpoint.names import CONFIG_FILE, LLM_FOLDER, MODEL_PREFIX, SHAPE_FILE
from megatron_dwm.checkpoint.sharded_files import ShardedFiles, try_write
from megatron_dwm.checkpoint.sharded_plan import SavePlan
from megatron_dwm.config import Config, ModelConfig, ParallelConfig
from megatron_dwm.config.load import save_config
from megatron_dwm.config.schema_llm import Builder
from megatron_dwm.model import LlamaShape
from megatron_dwm.model.builders.build import build_module
from megatron_dwm.model.llm import whole_model
from megatron_dwm.runtime import bring_up


def write_model(
    directory: Path,
    config: Config,
    shape: LlamaShape,
    dtype: torch.dtype,
    fill: Callable[[LanguageModule], None],
) -> None:
    """Write `llm/`, shape.json and config.yaml into `directory`.

    config: of a run that has this model, as far as it is known. fill: copies the parameters in.
    Raises SaveError if the files cannot be written.
    """
    (directory / LLM_FOLDER).mkdir()
    builder, length = config.model.builder, config.data.sequence_length
    with built_model(shape, dtype, sequence_length=length, builder=builder) as module:
        fill(module)
        state = {"model": module.sharded_state_dict(prefix=MODEL_PREFIX)}
        save_tensors(state, directory / LLM_FOLDER)
    (directory / SHAPE_FILE).write_text(json.dumps(shape.record()), encoding="utf-8")
    save_config(config, directory / CONFIG_FILE)


@contextmanager
def built_model(
    shape: LlamaShape,
    dtype: torch.dtype,
    *,
    sequence_length: int,
    builder: Builder = "gpt",
) -> Iterator[LanguageModule]:
    """Give the whole model, without values, in a job of one process."""
    with bring_up(ParallelConfig(), seed=0):
        chunk = whole_model(
            shape,
            ModelConfig(precision="fp32", builder=builder),
            sequence_length=sequence_length,
            perform_initialization=False,
            params_dtype=dtype,
        )
        yield build_module(chunk)


def save_tensors(state: dict[str, Any], folder: Path) -> None:
    """Write a sharded state as runs do, which every release of Megatron-Core reads.

    Raises SaveError if the files cannot be written.
    """
    files = ShardedFiles(state, folder, SavePlan(), copy=False)
    files.finish(try_write(files))
