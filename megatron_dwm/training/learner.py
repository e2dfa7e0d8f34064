"""The learner: the LLM with its optimizer and schedule, for steps and hypergradients."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_dwm.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_dwm.model import LLM, LlamaShape, build_llm
from megatron_dwm.model.layers.transformer_engine import start_tensor_overlap
from megatron_dwm.runtime import Runtime
from megatron_dwm.training.optimizer import build_optimizer, build_scheduler


@dataclass(frozen=True, kw_only=True)
class Learner:
    """The LLM with its optimizer; `micro_batch_size` is the number of samples in a forward pass."""

    llm: LLM
    optimizer: ChainedOptimizer
    scheduler: OptimizerParamScheduler
    micro_batch_size: int

    @property
    def runtime(self) -> Runtime:
        """The processes of the job, and this one's position."""
        return self.llm.runtime

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return self.optimizer.param_groups[0]["lr"]


def build_learner(
    shape: LlamaShape,
    model: ModelConfig,
    parallel: ParallelConfig,
    training: TrainingConfig,
    runtime: Runtime,
    *,
    sequence_length: int,
    seed: int,
) -> Learner:
    """Build a new learner; a collective call."""
    if parallel.tp_comm_overlap:
        start_tensor_overlap(
            model,
            runtime.device,
            tokens=training.micro_batch_size * sequence_length // parallel.context,
            hidden_size=shape.hidden_size,
            tensor_size=parallel.tensor,
        )
    llm = build_llm(shape, model, parallel, runtime, sequence_length=sequence_length, seed=seed)
    optimizer = build_optimizer(training, llm, sharded=parallel.sharded_optimizer)
    return Learner(
        llm=llm,
        optimizer=optimizer,
        scheduler=build_scheduler(training, optimizer),
        micro_batch_size=training.micro_batch_size,
    )
