"""Checkpoints: Megatron-Core's distributed format for the LLM, one small file for the rest.

    checkpoints/step_00000500/llm/           parameters and optimiser, any layout can load them
    checkpoints/step_00000500/training.pt    weighting model and its optimiser, random generators
    checkpoints/step_00000500/config.yaml, shape.json   what is needed to read it alone
    checkpoints/step_00000500/tokenizer/     the tokenizer's files (kept_files.py), and
    checkpoints/step_00000500/huggingface/   those of the model that the run started from
    checkpoints/step_00000500/manifest.json  counters, and size and checksum of every other file

It is written under a temporary name and renamed when it is whole, the manifest last. Inside a
weighting phase the name ends in `_update_` and the number of the phase's updates.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.gpt import GPTModel

from megatron_dwm.config import UserError
from megatron_dwm.config.load import save_config
from megatron_dwm.config.printing import printable
from megatron_dwm.model import LLM
from megatron_dwm.model.on_disk.saved_index import data_only
from megatron_dwm.runtime import Runtime
from megatron_dwm.runtime.random_state import random_state, restore_random_state
from megatron_dwm.training.kept_files import write_files
from megatron_dwm.training.manifest import (
    FileRecord,
    Manifest,
    checkpoint_dir,
    publish,
    read_manifest,
    record_file,
    write_manifest,
)
from megatron_dwm.training.optimiser import begin_at
from megatron_dwm.training.optimiser_state import filled, saved_step, under_saved_names
from megatron_dwm.training.session import Session
from megatron_dwm.training.sharded_adam import create_state, loadable
from megatron_dwm.training.sharded_files import (
    DISK_ERRORS,
    ShardedFiles,
    agree,
    load_sharded,
    reason,
    save_object,
    saved_names,
    try_write,
)
from megatron_dwm.training.sharded_plan import SavePlan
from megatron_dwm.weighting import LearningPolicy

MODEL_PREFIX = "model."
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
_REST = ("training.pt", "config.yaml", "shape.json")


class CheckpointSave:
    """A checkpoint on its way to the disk; making one is collective.

    Raises SaveError, on every rank alike, where the disk does.
    """

    def __init__(
        self,
        session: Session,
        fingerprint: dict[str, str],
        *,
        plan: SavePlan,
        background: bool = False,
    ) -> None:
        """Take the state of this moment; with `background` as a copy that a thread writes.

        plan: one for all saves of a session.
        """
        self._session, self._fingerprint = session, fingerprint
        self._state = replace(session.state, passed_over=list(session.state.passed_over))
        self.directory = checkpoint_dir(session.run_dir, self._state)
        self._partial = self.directory.with_name(f"{self.directory.name}.partial")
        self._make_directory()
        self._files = ShardedFiles(
            _sharded_state(session, is_loading=False),
            self._partial / "llm",
            plan,
            copy=background,
        )
        self._rest = _rest_of_state(session)
        self._failure: str | None = None
        self._thread: Thread | None = None
        if background:
            self._rest = copy.deepcopy(self._rest)
            self._thread = Thread(target=self._write, name="checkpoint")
            self._thread.start()
        else:
            self._write()

    @property
    def is_written(self) -> bool:
        """Whether this rank has written its files."""
        return self._thread is None or not self._thread.is_alive()

    def finish(self) -> Path:
        """Wait for the files and give the checkpoint its name (collective); the directory."""
        if self._thread is not None:
            self._thread.join()
        records = self._files.finish(self._failure)
        failure = None
        if self._session.runtime.is_main:
            try:
                self._publish(records)
            except OSError as error:
                failure = reason(error)
        agree(failure)
        return self.directory

    def discard(self) -> None:
        """Remove what was written of a failed save."""
        if self._session.runtime.is_main:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _make_directory(self) -> None:
        failure = None
        if self._session.runtime.is_main:
            try:
                shutil.rmtree(self._partial, ignore_errors=True)
                # Not the run directory: one that was removed is not to be there again.
                self._partial.parent.mkdir(exist_ok=True)
                self._partial.mkdir()
                (self._partial / "llm").mkdir()
            except OSError as error:
                failure = reason(error)
        agree(failure)

    def _write(self) -> None:
        self._failure = try_write(self._files)
        if self._session.runtime.is_main and self._failure is None:
            try:
                _write_rest(self._session, self._rest, self._partial)
            except DISK_ERRORS as error:
                self._failure = reason(error)

    def _publish(self, of_llm: dict[str, FileRecord]) -> None:
        files = {f"llm/{name}": record for name, record in sorted(of_llm.items())}
        rest = (*_REST, *self._session.kept_files)
        files |= {name: record_file(self._partial / name) for name in rest}
        manifest = Manifest(state=self._state, fingerprint=self._fingerprint, files=files)
        write_manifest(self._partial, manifest)
        publish(self._partial, self.directory)


def load_checkpoint(session: Session, directory: Path) -> None:
    """Take up a run where `directory` left it (collective); any layout can load.

    The files have been verified (resume.py); none of them is trusted.
    """
    create_state(session.llm, session.optimizer)
    load_parameters(session.llm, directory)
    _load_optimiser(session, directory / "llm")
    with data_only(directory / "training.pt"):
        rest = torch.load(directory / "training.pt", weights_only=True)
    for name, value in asdict(read_manifest(directory).state).items():
        setattr(session.state, name, value)
    _load_policy(session, rest, directory)
    begin_at(session.scheduler, session.state.step + 1)
    # Another number of ranks has other generators; they begin as the seed says.
    if len(rest["random"]) == session.runtime.world_size:
        restore_random_state(rest["random"][session.runtime.rank])


def _load_policy(session: Session, rest: dict[str, Any], directory: Path) -> None:
    """The policy's state; one of another policy, which had to be allowed, is left out."""
    policy, name = session.policy, session.config.policy.name
    before = rest.get("policy_name", name)
    if before != name:
        if session.runtime.is_main:
            print(
                f"warning: {printable(directory)} has the state of policy {printable(before)}; "
                f"{name} begins anew",
                file=sys.stderr,
                flush=True,
            )
        return
    if not isinstance(policy, LearningPolicy):
        return
    try:
        policy.load_state_dict(rest["policy"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{directory}: the state of policy {name} does not fit what weighting or policy say "
            f"now ({str(error).splitlines()[0]}); put back what run.allow_changed names"
        ) from error


def _load_optimiser(session: Session, directory: Path) -> None:
    """Adam's state, whichever of the two kinds of optimiser saved it and takes it up.

    Apart from the parameters, since a sharded optimiser may ask for those again.
    """
    wanted = _sharded_state(session, is_loading=True)["optimizer"]
    optimizer = under_saved_names(wanted, saved_names(directory))
    loaded = load_sharded({"asked": optimizer}, directory)
    with loadable(session.optimizer):
        step = saved_step(loaded["optimizer"])
        session.optimizer.load_state_dict(filled(optimizer, loaded["asked"], step))


def load_parameters(llm: LLM, directory: Path) -> None:
    """Only the LLM's parameters of a checkpoint (`model.init_from`); collective."""
    loaded = load_sharded(_sharded_model(llm), directory / "llm")
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


def _rest_of_state(session: Session) -> dict[str, Any]:
    """What is no part of the LLM (collective); whole on the main process only."""
    runtime, policy = session.runtime, session.policy
    generators: list[Any] | None = [None] * runtime.world_size if runtime.is_main else None
    if runtime.world_size == 1:
        generators = [random_state()]
    else:
        dist.gather_object(random_state(), generators)
    return {
        "policy_name": session.config.policy.name,
        "policy": policy.state_dict() if isinstance(policy, LearningPolicy) else None,
        "random": generators,
    }


def _write_rest(session: Session, rest: dict[str, Any], directory: Path) -> None:
    save_object(rest, directory / "training.pt")
    save_config(session.config, directory / "config.yaml")
    (directory / "shape.json").write_text(json.dumps(asdict(session.llm.shape)), encoding="utf-8")
    write_files(session.kept_files, directory)
