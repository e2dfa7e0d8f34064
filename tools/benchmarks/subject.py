"""The LLM with its optimizer, batches of random tokens, and the things that are done with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch

from benchmarks.settings import Settings
from megatron_dwm.bilevel import ESTIMATORS, Hypergradient, Problem
from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.config import Config, UserError
from megatron_dwm.data import Batch
from megatron_dwm.model import forward_only, resolve_shape
from megatron_dwm.model.layers.choice import choose_layers
from megatron_dwm.model.passes.objective import unit
from megatron_dwm.runtime import Runtime, bring_up
from megatron_dwm.testing import plain_step, random_batch
from megatron_dwm.training import (
    Ahead,
    Learner,
    UpperLevel,
    build_learner,
    train_step,
    weighting_update,
)
from megatron_dwm.weighting import Method
from megatron_dwm.weighting.dwm import Dwm
from megatron_dwm.weighting.loss_reweighting import LossReweighting
from megatron_dwm.weighting.model import build_weighting_model
from megatron_dwm.weighting.similarity import Similarity
from megatron_dwm.weighting.trainer import WeightingTrainer
from megatron_dwm.weighting.uniform import Uniform

UNIFORM: Final = "uniform"
OWN: Final = "own"
LLM: Final = "llm"
"""names of the methods: uniform weights, and the two values of `weighting.encoder`"""
ALONE = "alone"
"""encoder llm without attention across samples, over the global batch: normalized after the pass"""
SIMILARITY, LOSSES = "similarity", "loss_reweighting"
"""methods that compute weights in the step and learn nothing"""

_SEED = 1234
_TRAIN, _VAL = 1, 2


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What every measurement works on.

    methods: by name.  train, val: this replica's rows.  state: the counters that steps and
    checkpoints ask for; a measured step does not move them.
    """

    config: Config
    learner: Learner
    methods: dict[str, Method]
    train: Batch
    val: Batch
    state: TrainState

    @property
    def runtime(self) -> Runtime:
        """Where this process stands."""
        return self.learner.runtime

    @property
    def num_parameters(self) -> int:
        """Parameters of the LLM."""
        return self.learner.llm.shape.num_parameters()

    def plain_step(self) -> None:
        """Take one step of plain Megatron-Core."""
        learner = self.learner
        plain_step(learner.llm, learner.optimizer, self.train, learner.micro_batch_size)
        learner.scheduler.step(increment=1)

    def step(self, method: str, batch: Batch | None = None) -> None:
        """Take one LLM step of ours with the weights of one of `methods`; None: on `train`."""
        batch = self.train if batch is None else batch
        train_step(self.learner, self.methods[method], batch, self.state)

    def hypergradient(self, estimator: str = "tangent_probe") -> Hypergradient:
        """Returns one hypergradient; the LLM is left as it was."""
        return ESTIMATORS[estimator](self.problem())

    def weighting_update(self, method: str = OWN) -> None:
        """Make one weighting update: a hypergradient, and the weighting model's step on it."""
        weighting_update(
            self.learner, self.methods[method], self.train, self._upper_level(), self.state
        )

    def learning_step(
        self, method: str = LLM, *, ahead: Ahead | None = None, passages: float = 1.0
    ) -> None:
        """Take one LLM step of ours with a weighting update on its own batch inside.

        ahead: the direction comes before the step. passages: fraction of the validation batch.
        """
        val = self.val.rows(0, max(1, round(self.val.size * passages)))
        upper = UpperLevel(passages=val, ahead=ahead)
        train_step(self.learner, self.methods[method], self.train, self.state, upper=upper)

    def problem(self) -> Problem:
        """Returns the bi-level step, at uniform weights."""
        return Problem(
            llm=self.learner.llm,
            optimizer=self.learner.optimizer,
            train_batch=self.train,
            weights_n=torch.ones(self.train.size, device=self.runtime.device),
            val_batch=self.val,
            micro_batch_size=self.learner.micro_batch_size,
        )

    def _upper_level(self) -> UpperLevel:
        return UpperLevel(passages=self.val)


@contextmanager
def opened(settings: Settings) -> Iterator[Runtime]:
    """The processes, joined for as long as the context lasts.

    Raises UserError if the machine has no FP8: another precision would be measured under its name.
    """
    config = settings.config()
    with bring_up(config.parallel, seed=_SEED) as runtime:
        choice = choose_layers(config.model, runtime.device)
        if settings.precision == "fp8" and choice.reason is not None:
            raise UserError(f"--precision fp8: {choice.reason}; use bf16")
        yield runtime


def build_subject(settings: Settings, runtime: Runtime) -> Subject:
    """Build the LLM and its batches (collective), without a run directory or data files."""
    config = settings.config()
    learner = build_learner(
        resolve_shape(config.model),
        config.model,
        config.parallel,
        config.training,
        runtime,
        sequence_length=settings.sequence,
        seed=_SEED,
    )
    train, val = (
        random_batch(
            number,
            runtime,
            rows=settings.batch,
            sequence_length=settings.sequence,
            vocab_size=settings.vocab,
        )
        for number in (_TRAIN, _VAL)
    )
    return Subject(
        config=config,
        learner=learner,
        methods={
            UNIFORM: Uniform(),
            OWN: _weighting_method(config, learner, OWN),
            LLM: _weighting_method(config, learner, LLM),
            ALONE: _deferred_method(config, learner, val),
            SIMILARITY: _similarity(config, learner),
            LOSSES: _loss_reweighting(config, learner),
        },
        train=train,
        val=val,
        state=TrainState(),
    )


def _weighting_method(config: Config, learner: Learner, encoder: Literal["own", "llm"]) -> Dwm:
    """Returns the method with a weighting model whose weights count, as after a first update."""
    config = replace(config, weighting=replace(config.weighting, encoder=encoder))
    shape = Dwm.model_shape(config, learner.llm.shape)
    trainer = WeightingTrainer(
        build_weighting_model(shape, _SEED),
        config.weighting,
        learner.runtime,
        learner.micro_batch_size,
        learned=True,
        bf16=config.model.precision != "fp32",
    )
    return Dwm(trainer)


def _deferred_method(config: Config, learner: Learner, batch: Batch) -> Dwm:
    """Returns the method with the temperature that a step before has set."""
    weighting = replace(config.weighting, group="global", across_samples=False)
    method = _weighting_method(replace(config, weighting=weighting), learner, LLM)
    result = forward_only(
        learner.llm, unit(batch, learner.micro_batch_size), early_layer=weighting.early_layer
    )
    method.weights(batch, result.outputs, TrainState())
    return method


def _similarity(config: Config, learner: Learner) -> Similarity:
    """Returns the method with a target that it has read, a random one."""
    method = Similarity(config.policy, config.weighting, learner.runtime, learner.micro_batch_size)
    method.mean = torch.randn(2 * learner.llm.shape.hidden_size, device=learner.runtime.device)
    return method


def _loss_reweighting(config: Config, learner: Learner) -> LossReweighting:
    """Returns the method with moments, as after the first step; every step updates them."""
    method = LossReweighting(
        config.policy, config.weighting, learner.runtime, learner.micro_batch_size
    )
    method.load_state_dict({"moments": [1.0, 2.0]})
    return method
