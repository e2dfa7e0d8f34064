"""What the ranks of the GPU tests run. Sizes are multiples of 32, which MXFP8 asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dwm.bilevel import ESTIMATORS, Problem
from megatron_dwm.bilevel.virtual_step import prepare_virtual_step
from megatron_dwm.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_dwm.data import Batch
from megatron_dwm.model import LLM, build_llm, clear_gradients, forward_backward, resolve_shape
from megatron_dwm.model.layers.choice import choose_layers
from megatron_dwm.model.passes.objective import (
    token_count,
    token_mean,
    weighted,
    weighted_denominator,
)
from megatron_dwm.runtime import bring_up
from megatron_dwm.training.optimizer import build_optimizer

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
    """Why this machine's Transformer Engine cannot run a precision; empty if it can."""
    model = ModelConfig(precision=precision, fp8_recipe=fp8_recipe)
    return choose_layers(model, torch.device("cuda")).reason or ""


@contextmanager
def _problem(
    *,
    precision: str,
    tensor: int = 1,
    pipeline: int = 1,
    sequence: bool = False,
    steps: int = 8,
    **model: Any,
) -> Iterator[Problem]:
    """A bi-level step of a model that was trained for `steps` steps."""
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, sequence=sequence)
    config = ModelConfig(precision=precision, **SHAPE, **model)
    training = TrainingConfig(learning_rate=1e-3, steps=100)
    with bring_up(parallel, seed=1) as runtime:
        llm = build_llm(
            resolve_shape(config), config, parallel, runtime, sequence_length=LENGTH, seed=5
        )
        optimizer = build_optimizer(training, llm, sharded=False)
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
    generator = torch.Generator().manual_seed(number)
    # A few tokens are frequent, so that there is something to learn.
    text = torch.randint(VOCAB, (SAMPLES, LENGTH + 1), generator=generator) // 7
    batch = Batch(
        tokens_BS=text[:, :-1].contiguous(),
        labels_BS=text[:, 1:].contiguous(),
        loss_mask_BS=torch.ones(SAMPLES, LENGTH),
        position_ids_BS=torch.arange(LENGTH).repeat(SAMPLES, 1),
        sample_ids_B=torch.arange(SAMPLES),
        document_ids_B=torch.arange(SAMPLES),
        domains=("random",) * SAMPLES,
    )
    return batch.to(llm.runtime.device)


def _gradient(problem: Problem, batch: Batch) -> Tensor:
    """Leave the weighted gradient in the buffers; the samples' losses come back."""
    clear_gradients(problem.llm, problem.optimizer)
    passes = weighted(batch, problem.weights_n, MICRO_BATCH)
    denominator = weighted_denominator(batch)
    return forward_backward(problem.llm, passes, denominator=denominator).sample_losses_n


def losses_while_training(precision: str, **options: Any) -> dict[str, Any]:
    """Whose layers ran, and the mean losses of the first and the last of some steps."""
    with _problem(precision=precision, steps=0, **options) as problem:
        losses = []
        for _ in range(20):
            losses.append(float(_gradient(problem, problem.train_batch).mean()))
            problem.optimizer.step()
        return {"kind": problem.llm.layer_kind, "losses": losses}


def alignments(precision: str, estimator: str = "tangent_probe", **options: Any) -> Tensor:
    """s of the batch, on the CPU."""
    with _problem(precision=precision, **options) as problem:
        return ESTIMATORS[estimator](problem).alignment_n.float().cpu()


def left_behind(precision: str, **options: Any) -> dict[str, bool]:
    """Which parts are the same, bit for bit, after a hypergradient; the loss speaks for the FP8
    scales and cached weights, which nothing else shows.
    """
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
    """Validation losses at theta, at theta' and at theta again."""
    with _problem(precision=precision, **options) as problem:
        llm = problem.llm
        _gradient(problem, problem.train_batch)
        step = prepare_virtual_step(llm, problem.optimizer, "adam")

        def loss() -> float:
            passes = token_mean(problem.val_batch, MICRO_BATCH)
            clear_gradients(llm, problem.optimizer)
            result = forward_backward(llm, passes, denominator=token_count(problem.val_batch))
            return float(result.sample_losses_n.mean())

        before = loss()
        step.enter()
        stepped = loss()
        step.restore()
        step.give_back()
        return {"before": before, "stepped": stepped, "after": loss()}


def memory_of_an_update(precision: str, **options: Any) -> dict[str, int]:
    """Peak bytes on this GPU: of plain steps, and of a weighting update's hypergradient."""
    with _problem(precision=precision, **options) as problem:
        torch.cuda.reset_peak_memory_stats()
        _gradient(problem, problem.train_batch)
        problem.optimizer.step()
        plain = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        ESTIMATORS["tangent_probe"](problem)
        return {"plain": plain, "update": torch.cuda.max_memory_allocated()}


def backend() -> str:
    """The backend of the world's process group."""
    with _problem(precision="bf16", steps=0):
        return dist.get_backend()
