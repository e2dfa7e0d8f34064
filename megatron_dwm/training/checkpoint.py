"""Checkpoints: Megatron-Core's distributed format for the LLM, one small file for the rest.

    checkpoints/step_00000500/llm/         parameters and optimiser, any layout can load them
    checkpoints/step_00000500/training.pt  counters, weighting model and its optimiser
    checkpoints/step_00000500/config.yaml, shape.json   what is needed to read it alone

A checkpoint is written under a temporary name and renamed when it is whole.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.gpt import GPTModel

from megatron_dwm.config import UserError
from megatron_dwm.config.load import save_config
from megatron_dwm.model import LLM, LlamaShape
from megatron_dwm.runtime import Runtime
from megatron_dwm.training.session import Session
from megatron_dwm.training.sharded_adam import create_state, loadable
from megatron_dwm.training.state import TrainState
from megatron_dwm.weighting import LearningPolicy

MODEL_PREFIX = "model."
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lives."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The whole checkpoint with the highest step, or None."""
    found = sorted((run_dir / "checkpoints").glob("step_????????"))
    return found[-1] if found else None


def save_checkpoint(session: Session) -> Path:
    """Write everything that a resumed run needs (collective); the directory comes back."""
    final = checkpoint_dir(session.run_dir, session.state.step)
    partial = final.with_suffix(".partial")
    runtime = session.runtime
    if runtime.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "llm").mkdir(parents=True)
    runtime.barrier()
    dist_checkpointing.save(
        _sharded_state(session, is_loading=False),
        str(partial / "llm"),
        validate_access_integrity=True,
    )
    if runtime.is_main:
        _save_rest(session, partial)
        # A checkpoint of the same step is older than this one: it was resumed from.
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    runtime.barrier()
    return final


def load_checkpoint(session: Session, directory: Path) -> None:
    """Take up a run where `directory` left it (collective); any layout can load."""
    create_state(session.llm, session.optimizer)
    loaded = dist_checkpointing.load(
        _sharded_state(session, is_loading=True), str(directory / "llm")
    )
    for name, module in _named_chunks(session.llm):
        module.load_state_dict(loaded[name])
    with loadable(session.optimizer):
        session.optimizer.load_state_dict(loaded["optimizer"])
    rest = torch.load(directory / "training.pt", weights_only=True)
    for name, value in rest["state"].items():
        setattr(session.state, name, value)
    if isinstance(session.policy, LearningPolicy):
        session.policy.load_state_dict(rest["policy"])
    session.scheduler.num_steps = 0
    session.scheduler.step(increment=session.state.step)


def load_parameters(llm: LLM, directory: Path) -> None:
    """Only the LLM's parameters of a checkpoint (`model.init_from`); collective."""
    loaded = dist_checkpointing.load(_sharded_model(llm), str(directory / "llm"))
    for name, module in _named_chunks(llm):
        module.load_state_dict(loaded[name])


def _named_chunks(llm: LLM) -> list[tuple[str, GPTModel]]:
    """Megatron-LM's names of the model chunks in a state; one chunk is `model`."""
    if len(llm.modules) == 1:
        return [("model", llm.modules[0])]
    return [(f"model{number}", module) for number, module in enumerate(llm.modules)]


def _sharded_model(llm: LLM) -> ShardedStateDict:
    """Every chunk's parameters by local name; the names in the files are global."""
    state = {}
    for chunk, module in _named_chunks(llm):
        sharded = module.sharded_state_dict(prefix=MODEL_PREFIX, metadata=_metadata(llm.runtime))
        state[chunk] = {name.removeprefix(MODEL_PREFIX): value for name, value in sharded.items()}
    return state


def _sharded_state(session: Session, *, is_loading: bool) -> ShardedStateDict:
    model = _sharded_model(session.llm)
    optimizer = session.optimizer.sharded_state_dict(
        model, is_loading=is_loading, metadata=_metadata(session.llm.runtime)
    )
    return {**model, "optimizer": optimizer}


def _metadata(runtime: Runtime) -> dict[str, Any]:
    return {**_SHARDING, "dp_cp_group": runtime.data_group}


def _save_rest(session: Session, directory: Path) -> None:
    policy = session.policy
    torch.save(
        {
            "state": asdict(session.state),
            "policy": policy.state_dict() if isinstance(policy, LearningPolicy) else None,
        },
        directory / "training.pt",
    )
    save_config(session.config, directory / "config.yaml")
    (directory / "shape.json").write_text(json.dumps(asdict(session.llm.shape)), encoding="utf-8")


def read_state(directory: Path) -> TrainState:
    """Only the counters of a checkpoint."""
    return TrainState(**torch.load(directory / "training.pt", weights_only=True)["state"])


def read_shape(directory: Path) -> LlamaShape:
    """The shape of a checkpoint's model. Raises UserError if `directory` is no checkpoint."""
    file = directory / "shape.json"
    if not file.is_file():
        raise UserError(
            f"model.init_from: {file} is missing; expected a checkpoint such as "
            "RUN/checkpoints/step_00001000"
        )
    return LlamaShape(**json.loads(file.read_text(encoding="utf-8")))
