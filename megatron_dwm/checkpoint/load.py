"""Loads a checkpoint under any layout. Its checksums were verified, but no file may run code."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_dwm.checkpoint.manifest import read_manifest
from megatron_dwm.checkpoint.names import LLM_FOLDER, TRAINING_FILE
from megatron_dwm.checkpoint.optimizer_state import filled, saved_step, under_saved_names
from megatron_dwm.checkpoint.parts import Parts, TrainedModel, named_chunks, sharded_model
from megatron_dwm.checkpoint.sharded_adam import create_state, loadable
from megatron_dwm.checkpoint.sharded_files import load_sharded, saved_names
from megatron_dwm.config import UserError
from megatron_dwm.config.plugins import is_plugin
from megatron_dwm.model import LLM
from megatron_dwm.model.layers.transformer_engine import scales_are_refused_in_one_line
from megatron_dwm.model.on_disk.saved_index import data_only
from megatron_dwm.runtime.random_state import restore_random_state
from megatron_dwm.runtime.warn import print_warning


def load_checkpoint(parts: Parts, directory: Path) -> None:
    """Load the state of every part from `directory` (collective).

    The learning rate is not loaded: it follows from the configuration and the step.
    """
    for folder, model in parts.models.items():
        # A run may have taken up a method with a reference since.
        if folder == LLM_FOLDER or (directory / folder).is_dir():
            load_trained(model, directory / folder)
    with data_only(directory / TRAINING_FILE):
        # It has tensors of the main process's device, which is not this one's.
        rest = torch.load(directory / TRAINING_FILE, weights_only=True, map_location="cpu")
    for name, value in asdict(read_manifest(directory).state).items():
        setattr(parts.state, name, value)
    _load_method(parts, rest, directory)
    # With another number of ranks the generators start from the seed.
    if len(rest["random"]) == parts.runtime.world_size:
        restore_random_state(rest["random"][parts.runtime.rank])


def load_trained(model: TrainedModel, folder: Path) -> None:
    """Load a model and its optimizer from the folder of a checkpoint that has both (collective)."""
    with model.offload.learning():
        create_state(model.llm, model.optimizer)
        _load_parameters(model.llm, folder)
        _load_optimizer(model, folder)


def load_parameters(llm: LLM, directory: Path) -> None:
    """Load only the LLM's parameters of a checkpoint (`model.init_from`); collective."""
    _load_parameters(llm, directory / LLM_FOLDER)


def _load_parameters(llm: LLM, folder: Path) -> None:
    saved = saved_names(folder)
    wanted = {
        name: {key: item for key, item in chunk.items() if not _is_unsaved_state(item, saved)}
        for name, chunk in sharded_model(llm).items()
    }
    loaded = load_sharded(wanted, folder)
    with scales_are_refused_in_one_line(folder):
        for name, module in named_chunks(llm):
            own = module.state_dict()
            kept = {key: own[key] for key in own.keys() - wanted[name].keys() if _is_extra(key)}
            module.load_state_dict({**loaded[name], **kept})


def _is_unsaved_state(item: Any, saved: set[str]) -> bool:
    """True for what Transformer Engine's norms keep besides their scale, and others do not save."""
    is_extra = isinstance(item, ShardedObject) and _is_extra(item.key)
    return is_extra and item.unique_key not in saved


def _is_extra(name: str) -> bool:
    return name.endswith("_extra_state")


def _load_method(parts: Parts, rest: dict[str, Any], directory: Path) -> None:
    """Load the method's state. The state of another method, if the user allowed it, is skipped."""
    name = parts.method_name
    before = rest.get("policy_name", name)
    if before != name:
        print_warning(f"{directory} has the state of policy {before}; {name} starts without one")
        return
    try:
        # Earlier versions saved None for a method without a state.
        parts.method.load_state_dict(rest["policy"] or {})
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        what, advice = "what weighting or policy say", "put back what run.allow_changed names"
        if is_plugin(name):
            what, advice = "its options or code", "go back to those that the checkpoint is from"
        raise UserError(
            f"{directory}: the state of policy {name} does not fit {what} now "
            f"({(str(error) or type(error).__name__).splitlines()[0]}); {advice}"
        ) from error


def _load_optimizer(model: TrainedModel, directory: Path) -> None:
    """Load Adam's state, from a plain or a sharded optimizer into either.

    It is loaded apart from the parameters, since a sharded optimizer may read those again.
    """
    wanted = model.sharded(is_loading=True)["optimizer"]
    optimizer = under_saved_names(wanted, saved_names(directory))
    loaded = load_sharded({"wanted": optimizer}, directory)
    with loadable(model.optimizer):
        step = saved_step(loaded["optimizer"])
        model.optimizer.load_state_dict(filled(optimizer, loaded["wanted"], step))
