"""Megatron-Core's Adam and its learning-rate schedule, from our configuration."""

from __future__ import annotations

import math

from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_dwm.config import TrainingConfig
from megatron_dwm.model import LLM


def build_optimizer(config: TrainingConfig, llm: LLM, *, sharded: bool) -> ChainedOptimizer:
    """Build AdamW with global-norm clipping; `sharded` splits its state over replicas."""
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.learning_rate,
            min_lr=config.learning_rate * config.min_learning_rate_fraction,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_epsilon,
            clip_grad=config.clip_grad,
            bf16=llm.transformer.bf16,
            params_dtype=llm.transformer.params_dtype,
            use_distributed_optimizer=sharded,
            overlap_param_gather=llm.chunks[0].ddp_config.overlap_param_gather,
        ),
        llm.chunks,
        use_gloo_process_groups=False,
    )


def build_scheduler(config: TrainingConfig, optimizer: ChainedOptimizer) -> OptimizerParamScheduler:
    """Build a linear warm-up and then a cosine to the smallest rate, counted in steps.

    With S steps, W of them warm-up, step k (from 1) has the rate

        peak * k / W                                                    k <= W
        least + (peak - least) * (1 + cos(pi * (k - W) / (S - W))) / 2  k > W

    In Megatron-LM step k has the rate of k - 1, so its first step changes nothing.
    """
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.learning_rate,
        min_lr=config.learning_rate * config.min_learning_rate_fraction,
        lr_warmup_steps=int(config.steps * config.warmup_fraction),
        lr_decay_steps=config.steps,
        lr_decay_style="cosine",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=config.steps,
        wd_incr_style="constant",
    )
    begin_at(scheduler, 1)
    return scheduler


def learning_rate_of(config: TrainingConfig, step: int) -> float:
    """Returns the rate of a step, counted from 1, by the formula of `build_scheduler`."""
    peak, warm_up = config.learning_rate, int(config.steps * config.warmup_fraction)
    if step <= warm_up:
        return peak * step / warm_up
    least = peak * config.min_learning_rate_fraction
    done = min((step - warm_up) / max(config.steps - warm_up, 1), 1.0)
    return least + (peak - least) * (1 + math.cos(math.pi * done)) / 2


def begin_at(scheduler: OptimizerParamScheduler, step: int) -> None:
    """Set the optimizer's rate to that of the next step, `step`, counted from 1."""
    scheduler.num_steps = step
    scheduler.step(increment=0)
