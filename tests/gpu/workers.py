"""Functions that the ranks of the GPU tests run. MXFP8 needs sizes in multiples of 32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dwm.bilevel import ESTIMATORS, Problem
from megatron_dwm.bilevel.virtual_step import prepare_virtual_step
from megatron_dwm.config import (
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    TrainingConfig,
)
from megatron_dwm.data import Batch
from megatron_dwm.doctor.borders import borders_finding
from megatron_dwm.model import LLM, clear_gradients, forward_backward, resolve_shape
from megatron_dwm.model.layers.choice import choose_layers
from megatron_dwm.model.passes.objective import token_count, token_mean
from megatron_dwm.runtime import bring_up
from megatron_dwm.testing import random_batch, weighted_gradient
from megatron_dwm.training import build_learner

SAMPLES, MICRO_BATCH, LENGTH, VOCAB = 8, 4, 128, 512
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "num_layers": 4,
    "ffn_hidden_size": 512,
    "num_attention_heads": 8,
    "num_query_groups": 4,
}


def missing(precision: str, fp8_recipe: str = "tensorwise") -> str:
    """Returns why this machine's Transformer Engine cannot run a precision; empty if it can."""
    model = ModelConfig(precision=precision, fp8_recipe=fp8_recipe)
    return choose_layers(model, torch.device("cuda")).reason or ""


@contextmanager
def _problem(
    *,
    precision: str,
    tensor: int = 1,
    context: int = 1,
    pipeline: int = 1,
    sequence: bool = False,
    steps: int = 8,
    **model: Any,
) -> Iterator[Problem]:
    """Yields a bi-level step of a model that was trained for `steps` steps."""
    parallel = ParallelConfig(tensor=tensor, context=context, pipeline=pipeline, sequence=sequence)
    config = ModelConfig(precision=precision, **SHAPE, **model)
    training = TrainingConfig(learning_rate=1e-3, steps=100)
    with bring_up(parallel, seed=1) as runtime:
        learner = build_learner(
            resolve_shape(config),
            config,
            parallel,
            training,
            runtime,
            sequence_length=LENGTH,
            seed=5,
        )
        llm, optimizer = learner.llm, learner.optimizer
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate
        problem = Problem(
            llm=llm,
            optimizer=optimizer,
            train_batch=_batch(llm, 100),
            weights_n=torch.linspace(0.2, 1.8, SAMPLES, device=runtime.device),
            val_batch=_batch(llm, 101),
            micro_batch_size=MICRO_BATCH,
        )
        for number in range(steps):
            _gradient(problem, _batch(llm, number))
            optimizer.step()
        yield problem


def _batch(llm: LLM, number: int) -> Batch:
    batch = random_batch(
        number, llm.runtime, rows=SAMPLES, sequence_length=LENGTH, vocab_size=VOCAB
    )
    # A part of the vocabulary is frequent, so that there is something to learn.
    return replace(batch, tokens_BS=batch.tokens_BS // 7, labels_BS=batch.labels_BS // 7)


def _gradient(problem: Problem, batch: Batch) -> Tensor:
    """Write the weighted gradient into the buffers; returns the losses of the samples."""
    result = weighted_gradient(
        problem.llm, problem.optimizer, batch, problem.weights_n, MICRO_BATCH
    )
    return result.unit_losses_n


def losses_while_training(precision: str, **options: Any) -> dict[str, Any]:
    """Returns the implementation of the layers, and the mean loss of each of 20 steps."""
    with _problem(precision=precision, steps=0, **options) as problem:
        losses = []
        for _ in range(20):
            losses.append(float(_gradient(problem, problem.train_batch).mean()))
            problem.optimizer.step()
        return {"kind": problem.llm.layer_kind, "losses": losses}


def alignments(precision: str, estimator: str = "tangent_probe", **options: Any) -> Tensor:
    """Returns the alignments of the batch, on the CPU."""
    with _problem(precision=precision, **options) as problem:
        return ESTIMATORS[estimator](problem).alignment_n.float().cpu()


def left_behind(precision: str, **options: Any) -> dict[str, bool]:
    """Returns which parts of the state are bit-identical after a hypergradient."""
    with _problem(precision=precision, **options) as problem:
        llm = problem.llm

        def state() -> list[Tensor]:
            return [p.detach().clone() for p in llm.parameters()]

        parameters = state()
        scales = _extra_states(llm)
        ESTIMATORS["tangent_probe"](problem)
        return {
            "parameters": all(map(torch.equal, parameters, state())),
            "scales": scales == _extra_states(llm),
        }


def _extra_states(llm: LLM) -> list[bytes]:
    return [
        module.get_extra_state().cpu().numpy().tobytes()
        for model in llm.modules
        for module in model.modules()
        if hasattr(module, "fp8_meta")
    ]


def stale_weights(precision: str, **options: Any) -> dict[str, float]:
    """Returns validation losses at theta, at theta' and at theta again."""
    with _problem(precision=precision, **options) as problem:
        llm = problem.llm
        _gradient(problem, problem.train_batch)
        step = prepare_virtual_step(llm, problem.optimizer, "adam")

        def loss() -> float:
            passes = token_mean(problem.val_batch, MICRO_BATCH)
            clear_gradients(llm, problem.optimizer)
            result = forward_backward(llm, passes, denominator=token_count(problem.val_batch))
            return float(result.unit_losses_n.mean())

        before = loss()
        step.enter()
        stepped = loss()
        step.direction()
        step.restore()
        step.restore_gradient()
        return {"before": before, "stepped": stepped, "after": loss()}


def memory_of_an_update(precision: str, **options: Any) -> dict[str, int]:
    """Returns peak bytes on this GPU of a plain step, and of a weighting update's hypergradient."""
    with _problem(precision=precision, **options) as problem:
        torch.cuda.reset_peak_memory_stats()
        _gradient(problem, problem.train_batch)
        problem.optimizer.step()
        plain = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        ESTIMATORS["tangent_probe"](problem)
        return {"plain": plain, "update": torch.cuda.max_memory_allocated()}


def backend() -> str:
    """Returns the backend of the world's process group."""
    with _problem(precision="bf16", steps=0):
        return dist.get_backend()


def borders(precision: str, context: int = 1) -> tuple[bool, str]:
    """The doctor's check of document borders."""
    config = Config(
        model=ModelConfig(precision=precision, **SHAPE),
        parallel=ParallelConfig(context=context),
        data=DataConfig(sequence_length=LENGTH),
        training=TrainingConfig(global_batch_size=SAMPLES, micro_batch_size=MICRO_BATCH),
    )
    with bring_up(config.parallel, seed=1) as runtime:
        return borders_finding(config, runtime)
