"""A run put together: every component that the loop needs, built from the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_dwm.config import Config
from megatron_dwm.data import EvaluationSet, TrainingData, ValidationSet
from megatron_dwm.data.batch import Batch
from megatron_dwm.data.last_words import LastWords
from megatron_dwm.model import LLM, LlamaShape, build_llm
from megatron_dwm.model.passes.micro_batches import rows_of_replica
from megatron_dwm.runtime import Runtime
from megatron_dwm.tokenizer import Tokenizer
from megatron_dwm.training.compute import Compute, compute_of
from megatron_dwm.training.optimiser import build_optimizer, build_scheduler
from megatron_dwm.training.stages import Stage, plan_stages
from megatron_dwm.training.state import TrainState
from megatron_dwm.weighting import DwmPolicy, Policy, build_policy

INDEX_CACHE = "index_cache"
"""folder of a run for the orders of its samples, where data.cache_dir names no other"""


@dataclass(frozen=True)
class Session:
    """One run in this process.

    weighting_data: the same documents in an order of their own, so that weighting updates never
    change what the LLM reads; None where updates draw no batch.  validation: None where the policy
    reads none.  kept_files: small files that every checkpoint has, by path inside (kept_files.py);
    the main process alone has them.
    """

    config: Config
    runtime: Runtime
    llm: LLM
    optimizer: ChainedOptimizer
    scheduler: OptimizerParamScheduler
    policy: Policy
    stages: list[Stage]
    data: TrainingData
    weighting_data: TrainingData | None
    validation: ValidationSet | None
    evaluation: EvaluationSet | None
    last_words: LastWords | None
    compute: Compute
    state: TrainState
    kept_files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return Path(self.config.run.dir)

    @property
    def global_batch_size(self) -> int:
        """Samples in one optimiser step."""
        return self.config.training.global_batch_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one optimiser step."""
        return self.global_batch_size * self.config.data.sequence_length

    def local_rows(self, count: int) -> slice:
        """This replica's rows of a batch of `count`, contiguous in the order of the replicas."""
        share = count // self.runtime.data_size
        return slice(self.runtime.data_rank * share, (self.runtime.data_rank + 1) * share)

    @property
    def num_mixed(self) -> int:
        """Target passages in every batch (policy validation_mixing)."""
        if self.config.policy.name != "validation_mixing":
            return 0
        return round(self.config.policy.mix_fraction * self.global_batch_size)

    def step_rows(self, number: int, rows: slice) -> Batch:
        """Rows of the global batch of LLM step `number` (from 0); target passages come last."""
        ids, border = self.data.ids_of_step(number, self.global_batch_size), self._border
        corpus = ids[rows.start : min(rows.stop, border)]
        first, last = (max(0, row - border) for row in (rows.start, rows.stop))
        if first == last:
            return self.data.batch(corpus)
        assert self.validation is not None
        passages = self.validation.batch(number, self.num_mixed).rows(first, last)
        return Batch.concatenate([self.data.batch(corpus), passages]) if corpus else passages

    @property
    def _border(self) -> int:
        return self.global_batch_size - self.num_mixed

    def training_batch(self, number: int) -> Batch:
        """This replica's samples of LLM step `number` (from 0)."""
        return self.step_rows(number, self.local_rows(self.global_batch_size)).to(
            self.runtime.device
        )

    def update_rows(self, number: int, rows: slice) -> Batch:
        """Rows of the global batch that weighting update `number` (from 0) draws."""
        assert self.weighting_data is not None
        return self.weighting_data.batch(
            self.weighting_data.ids_of_step(number, self.global_batch_size)[rows]
        )

    def update_batch(self, number: int) -> Batch:
        """This replica's samples of weighting update `number` (from 0)."""
        return self.update_rows(number, self.local_rows(self.global_batch_size)).to(
            self.runtime.device
        )

    def gather(self, values_n: Tensor) -> Tensor:
        """Values of every replica's samples, in the order of the global batch (collective)."""
        if self.runtime.data_size == 1:
            return values_n
        whole = values_n.new_empty(len(values_n) * self.runtime.data_size)
        dist.all_gather_into_tensor(whole, values_n.contiguous(), group=self.runtime.data_group)
        return whole

    @property
    def passages(self) -> int:
        """Passages of a validation batch over all replicas: no row of the target comes twice."""
        assert self.validation is not None
        return min(self.config.passages, self.validation.num_rows)

    def validation_batch(self, number: int, *, halves: bool = False) -> Batch:
        """This replica's passages of validation batch `number`, and rows without loss where the
        replicas cannot share them out evenly.

        halves: its even and odd rows are then those of the global batch. Which passages these are
        does not depend on the layout.
        """
        assert self.validation is not None
        micro_batch = self.config.training.micro_batch_size
        share = rows_of_replica(
            self.passages,
            micro_batch_size=micro_batch,
            replicas=self.runtime.data_size,
            micro_batches_multiple=self.llm.micro_batches_multiple,
            halves=halves,
        )
        size = share * self.runtime.data_size
        batch = self.validation.batch(number, self.passages, num_padding=size - self.passages)
        rows = self.local_rows(size)
        return batch.rows(rows.start, rows.stop).to(self.runtime.device)


def build_session(
    config: Config,
    runtime: Runtime,
    shape: LlamaShape,
    tokenizer: Tokenizer,
    *,
    kept_files: Mapping[str, bytes] | None = None,
) -> Session:
    """Build every component; a collective call. Raises UserError for data that cannot be used."""
    llm = build_llm(
        shape,
        config.model,
        config.parallel,
        runtime,
        sequence_length=config.data.sequence_length,
        seed=config.run.seed,
    )
    optimizer = build_optimizer(config.training, llm, sharded=config.parallel.sharded_optimizer)
    stages = plan_stages(config)
    num_updates = sum(stage.num_updates for stage in stages)
    fresh = num_updates > 0 and config.weighting.update_on == "fresh"
    reads_target = num_updates > 0 or config.policy.name == "validation_mixing"
    policy = build_policy(
        config, runtime, shape, tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256
    )
    validation = _validation(config, tokenizer) if reads_target else None
    return Session(
        config=config,
        runtime=runtime,
        llm=llm,
        optimizer=optimizer,
        scheduler=build_scheduler(config.training, optimizer),
        policy=policy,
        stages=stages,
        data=_stream(config, tokenizer, config.training.steps, "training"),
        weighting_data=_stream(config, tokenizer, num_updates, "weighting") if fresh else None,
        validation=validation,
        evaluation=_evaluation(config, tokenizer),
        last_words=_last_words(config, tokenizer),
        compute=compute_of(
            config,
            shape,
            policy.model.shape if isinstance(policy, DwmPolicy) else None,
            runtime.data_size,
            target_rows=None if validation is None else validation.num_rows,
        ),
        state=TrainState(),
        kept_files=kept_files or {},
    )


def _stream(config: Config, tokenizer: Tokenizer, batches: int, purpose: str) -> TrainingData:
    return TrainingData(
        config.data,
        eod_id=tokenizer.eod_id,
        seed=config.run.seed,
        num_samples=batches * config.training.global_batch_size,
        cache_dir=Path(config.run.dir) / INDEX_CACHE,
        purpose=purpose,
    )


def _validation(config: Config, tokenizer: Tokenizer) -> ValidationSet:
    return ValidationSet(config.validation, config.data, tokenizer, seed=config.run.seed)


def _evaluation(config: Config, tokenizer: Tokenizer) -> EvaluationSet | None:
    if config.evaluation.path is None:
        return None
    return EvaluationSet(config.evaluation, config.data, tokenizer)


def _last_words(config: Config, tokenizer: Tokenizer) -> LastWords | None:
    path = config.evaluation.path
    return None if path is None else LastWords(path, config.data, tokenizer)
