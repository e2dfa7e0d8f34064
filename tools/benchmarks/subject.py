"""The model, its optimiser, batches of random tokens, and the things that are done with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from megatron_dwm.training.compute import compute_of
from megatron_dwm.training.session import Session

from benchmarks.plain_loop import PlainLoop
from benchmarks.settings import Settings
from megatron_dwm.bilevel import ESTIMATORS, Hypergradient, Problem
from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.config import Config
from megatron_dwm.data.batch import Batch
from megatron_dwm.model import LlamaShape, build_llm, resolve_shape
from megatron_dwm.runtime import Runtime, bring_up
from megatron_dwm.training.optimizer import build_optimizer, build_scheduler
from megatron_dwm.training.step import Lesson, train_step, weighting_update
from megatron_dwm.weighting import DwmPolicy, Policy, UniformPolicy, build_policy, weighting_shape

UNIFORM, OWN, LLM = "uniform", "own", "llm"
"""names of the policies: uniform weights, and the two values of `weighting.encoder`"""

_SEED = 1234
_TRAIN, _VAL = 1, 2


@dataclass(frozen=True)
class Subject:
    """What every measurement works on: `train` and `val` are this replica's rows."""

    session: Session
    policies: dict[str, Policy]
    plain: PlainLoop
    train: Batch
    val: Batch

    @property
    def runtime(self) -> Runtime:
        """Where this process stands."""
        return self.session.runtime

    def plain_step(self) -> None:
        """One step of plain Megatron-Core."""
        self.plain.step()

    def step(self, policy: str) -> None:
        """One LLM step of ours with the weights of one of `policies`."""
        train_step(self._with(policy), self.train)

    def hypergradient(self, estimator: str = "tangent_probe") -> Hypergradient:
        """One hypergradient; the LLM is left as it was."""
        return ESTIMATORS[estimator](self.problem())

    def weighting_update(self, policy: str = OWN) -> None:
        """One hypergradient and the step of the weighting model that follows from it."""
        weighting_update(self._with(policy), self.train, self._lesson())

    def learning_step(self, policy: str = LLM) -> None:
        """One LLM step of ours with a weighting update on its own batch inside."""
        train_step(self._with(policy), self.train, self._lesson())

    def _with(self, policy: str) -> Session:
        return replace(self.session, policy=self.policies[policy])

    def _lesson(self) -> Lesson:
        return Lesson(val=self.val, measure_noise=False)

    def problem(self) -> Problem:
        """The bi-level step, at uniform weights."""
        return Problem(
            llm=self.session.llm,
            optimizer=self.session.optimizer,
            train_batch=self.train,
            weights_n=UniformPolicy().weights(self.train),
            val_batch=self.val,
            micro_batch_size=self.session.config.training.micro_batch_size,
        )


@contextmanager
def opened(settings: Settings) -> Iterator[Runtime]:
    """The processes, joined for as long as the context lasts."""
    with bring_up(settings.config().parallel, seed=_SEED) as runtime:
        yield runtime


def build_subject(settings: Settings, runtime: Runtime) -> Subject:
    """Model, optimiser and batches (collective). No run directory and no data files are needed."""
    config = settings.config()
    shape = resolve_shape(config.model)
    llm = build_llm(
        shape,
        config.model,
        config.parallel,
        runtime,
        sequence_length=settings.sequence,
        seed=_SEED,
    )
    optimizer = build_optimizer(config.training, llm, sharded=settings.sharded_optimizer)
    session = Session(
        config=config,
        runtime=runtime,
        llm=llm,
        optimizer=optimizer,
        scheduler=build_scheduler(config.training, optimizer),
        policy=UniformPolicy(),
        stages=[],
        data=None,  # type: ignore[arg-type]  # batches are made here, not read
        weighting_data=None,
        validation=None,
        evaluation=None,
        last_words=None,
        compute=compute_of(
            config, shape, weighting_shape(config, shape, settings.vocab), runtime.data_size
        ),
        state=TrainState(),
    )
    train, val = (_random_batch(settings, session, number) for number in (_TRAIN, _VAL))
    plain = PlainLoop(session, train.micro_batches(settings.micro_batch))
    return Subject(session, _policies(config, runtime, shape), plain, train, val)


def _policies(config: Config, runtime: Runtime, shape: LlamaShape) -> dict[str, Policy]:
    """Uniform weights, and both weighting models as they are after a first update."""
    policies: dict[str, Policy] = {UNIFORM: UniformPolicy()}
    for encoder in (OWN, LLM):
        changed = replace(config, weighting=replace(config.weighting, encoder=encoder))
        policy = build_policy(changed, runtime, shape, shape.vocab_size)
        assert isinstance(policy, DwmPolicy)
        policy.learned = True
        policies[encoder] = policy
    return policies


def _random_batch(settings: Settings, session: Session, seed: int) -> Batch:
    """This replica's rows of a global batch of random tokens, every one of them counted."""
    size, length = settings.batch, settings.sequence
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, settings.vocab, (size, length + 1), generator=generator)
    whole = Batch(
        tokens_BS=text[:, :-1].contiguous(),
        labels_BS=text[:, 1:].contiguous(),
        loss_mask_BS=torch.ones(size, length),
        position_ids_BS=torch.arange(length).repeat(size, 1),
        sample_ids_B=torch.arange(size),
        document_ids_B=torch.arange(size),
        domains=("random",) * size,
    )
    rows = session.local_rows(size)
    return whole.rows(rows.start, rows.stop).to(session.runtime.device)
