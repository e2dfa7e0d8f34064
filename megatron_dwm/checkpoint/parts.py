"""The contents of a checkpoint: the stateful parts of a run, in the form for Megatron-Core."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.optimizer import ChainedOptimizer

from megatron_dwm.checkpoint.bucket_padding import places_without_padding
from megatron_dwm.checkpoint.method_state import require_loadable
from megatron_dwm.checkpoint.names import LLM_FOLDER, MODEL_PREFIX, REFERENCE_FOLDER
from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.model import LLM
from megatron_dwm.model.offload import Offload
from megatron_dwm.model.parameter_gather import gather_now
from megatron_dwm.runtime import Runtime
from megatron_dwm.runtime.random_state import random_state

_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}


class Stateful(Protocol):
    """An object whose state is the same on every rank."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model with its optimizer; `offload` has both on the device while they are in use."""

    llm: LLM
    optimizer: ChainedOptimizer
    offload: Offload = field(default_factory=Offload)

    def sharded(self, *, is_loading: bool) -> ShardedStateDict:
        """Returns the state of both, in the sharded form of Megatron-Core (collective)."""
        if not is_loading:
            gather_now(self.llm)
        model = sharded_model(self.llm)
        with places_without_padding(self.optimizer):
            optimizer = self.optimizer.sharded_state_dict(
                model, is_loading=is_loading, metadata=_metadata(self.llm.runtime)
            )
        return {**model, "optimizer": optimizer}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The stateful parts of a run.

    reference: a second model that the method trains; None if it trains none.
    state: the counters. method_name: the policy's name, saved with its state.
    files: small files of every checkpoint, by path inside; only the main process has them.
    """

    llm: LLM
    optimizer: ChainedOptimizer
    method_name: str
    method: Stateful
    state: TrainState
    reference: TrainedModel | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def runtime(self) -> Runtime:
        """The processes of the job, and this one's position."""
        return self.llm.runtime

    @property
    def models(self) -> dict[str, TrainedModel]:
        """The models of the run by the folder of a checkpoint that has their tensors."""
        found = {LLM_FOLDER: TrainedModel(llm=self.llm, optimizer=self.optimizer)}
        if self.reference is not None:
            found[REFERENCE_FOLDER] = self.reference
        return found

    def state_of_method(self) -> dict[str, Any]:
        """Returns the method's `state_dict`. Raises UserError if it could not be loaded again."""
        state = self.method.state_dict()
        require_loadable(self.method_name, state)
        return state

    def rest(self) -> dict[str, Any]:
        """Returns the rest of the state (collective); complete only on the main process."""
        runtime = self.runtime
        generators: list[Any] | None = [None] * runtime.world_size if runtime.is_main else None
        if runtime.world_size == 1:
            generators = [random_state()]
        else:
            dist.gather_object(random_state(), generators)
        return {
            "policy_name": self.method_name,
            "policy": self.state_of_method(),
            "random": generators,
        }


def named_chunks(llm: LLM) -> list[tuple[str, LanguageModule]]:
    """Returns the model chunks with Megatron-LM's names; a single chunk is `model`."""
    if len(llm.modules) == 1:
        return [("model", llm.modules[0])]
    return [(f"model{number}", module) for number, module in enumerate(llm.modules)]


def sharded_model(llm: LLM) -> ShardedStateDict:
    """Returns every chunk's parameters by local name; the names in the files are global."""
    state = {}
    for chunk, module in named_chunks(llm):
        sharded = module.sharded_state_dict(prefix=MODEL_PREFIX, metadata=_metadata(llm.runtime))
        state[chunk] = {name.removeprefix(MODEL_PREFIX): value for name, value in sharded.items()}
    return state


def _metadata(runtime: Runtime) -> dict[str, Any]:
    return {**_SHARDING, "dp_cp_group": runtime.data_context_group}
