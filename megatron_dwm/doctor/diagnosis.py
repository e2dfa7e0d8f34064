"""The first thing to run on a new cluster: what the machine can do, and two checks.

borders.py checks that attention stops at the borders of documents. The other check compares the
tangent probe, under the given layout, with a finite difference and, in one process, with
differentiating through the step. The model is the configuration's (or a tiny one), in fp32, on
random tokens, after a few training steps, so that no moment is empty.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from megatron_dwm.bilevel import ESTIMATORS, Problem
from megatron_dwm.config import Config, UserError
from megatron_dwm.config.printing import printable
from megatron_dwm.config.validate import validate_layout, validate_options
from megatron_dwm.data import Batch
from megatron_dwm.doctor.borders import borders_finding
from megatron_dwm.model import resolve_shape
from megatron_dwm.model.builders.build import require_builder
from megatron_dwm.model.layers.choice import choose_layers
from megatron_dwm.model.shape import heads_of
from megatron_dwm.runtime import Runtime, bring_up, world_size_from_environment
from megatron_dwm.runtime.machine import describe_machine
from megatron_dwm.runtime.profiling import check_profiling
from megatron_dwm.testing import random_batch, replica_rows, weighted_gradient
from megatron_dwm.training import Learner, build_learner
from megatron_dwm.weighting import learns, with_options
from megatron_dwm.weighting.groups import gather_over_data
from megatron_dwm.weighting.rules import estimator_problems

# A central difference in fp32 is accurate to about 2e-3 of the largest alignment
# (bilevel/finite_difference.py); the unroll sums the same numbers in another order.
TOLERANCES = {"finite_difference": 1e-2, "unroll": 1e-4}
_MICRO_BATCH = 2
_WARM_UP_STEPS = 4


def diagnose(config: Config) -> bool:
    """Print the report; returns True if all checks hold (collective)."""
    world_size = world_size_from_environment()
    asked = with_options(config)
    require_builder(asked.model.builder)
    validate_options(asked, heads_of(resolve_shape(asked.model)), world_size)
    if learns(asked):
        for problem in estimator_problems(asked, world_size):
            raise UserError(problem)
    check_profiling(asked.profiling)
    config = _checkable(asked, world_size)
    validate_layout(config, heads_of(resolve_shape(config.model)), world_size)
    with bring_up(config.parallel, config.run.seed) as runtime:
        for what, finding in describe_machine():
            _say(runtime, what, finding)
        _say(runtime, "precision", _precision(asked, runtime))
        stops, finding = borders_finding(dataclasses.replace(config, model=asked.model), runtime)
        _say(runtime, "document borders", finding)
        return _estimators_agree(config, runtime) and stops


def _precision(asked: Config, runtime: Runtime) -> str:
    """Returns the precision of such a run on this machine, and that of the check."""
    model = asked.model
    choice = choose_layers(model, runtime.device)
    layers = choice.message(model) or f"model.precision {model.precision}: {choice.kind} layers"
    return f"{layers}; the hypergradient is checked in fp32"


def _checkable(config: Config, world_size: int) -> Config:
    """Returns the configuration in fp32, with the smallest batches that its schedule allows."""
    replicas = max(1, config.data_parallel_size(world_size))
    rows = _MICRO_BATCH * 2 * config.parallel.pipeline * replicas
    return dataclasses.replace(
        config,
        training=dataclasses.replace(
            config.training, micro_batch_size=_MICRO_BATCH, global_batch_size=rows
        ),
        model=dataclasses.replace(
            config.model,
            precision="fp32",
            fp8_emulation=False,
            fp8_recipe="tensorwise",
            fp8_first_last_bf16=False,
        ),
        # It is for Transformer Engine's layers, which have no fp32.
        parallel=dataclasses.replace(config.parallel, tp_comm_overlap=False),
        validation=dataclasses.replace(config.validation, batch_size=None),
    )


def _estimators_agree(config: Config, runtime: Runtime) -> bool:
    problem = _problem(config, runtime)
    _say(runtime, "layout", _layout(config, runtime))
    probed_n = _of_all_replicas(problem, "tangent_probe")
    rivals = ["finite_difference"]
    if runtime.world_size == 1 and config.model.recompute == "none":
        rivals.append("unroll")
    return all([_agrees(problem, probed_n, rival) for rival in rivals])


def _agrees(problem: Problem, probed_n: Tensor, rival: str) -> bool:
    other_n = _of_all_replicas(problem, rival)
    difference = float((probed_n - other_n).abs().max() / other_n.abs().max())
    agrees = difference <= TOLERANCES[rival]
    verdict = "agrees with" if agrees else "DISAGREES WITH"
    _say(
        problem.llm.runtime,
        "hypergradient",
        f"tangent probe {verdict} {rival}: largest relative difference {difference:.1e}, "
        f"tolerance {TOLERANCES[rival]:.0e}",
    )
    return agrees


def _of_all_replicas(problem: Problem, estimator: str) -> Tensor:
    """Returns the alignments of the global batch, in order (collective)."""
    found = ESTIMATORS[estimator](problem)
    return gather_over_data(found.alignment_n, problem.llm.runtime)


def _problem(config: Config, runtime: Runtime) -> Problem:
    """Returns a bi-level step at unequal weights, after a few training steps (collective)."""
    rows = config.training.global_batch_size
    weights_n = torch.linspace(0.5, 1.5, rows)[replica_rows(runtime, rows)].to(runtime.device)
    learner = _trained(config, runtime, weights_n)
    return Problem(
        llm=learner.llm,
        optimizer=learner.optimizer,
        train_batch=_random_batch(config, learner, 0),
        weights_n=weights_n,
        val_batch=_random_batch(config, learner, 1),
        micro_batch_size=learner.micro_batch_size,
        inner=config.bilevel.inner_optimizer,
    )


def _trained(config: Config, runtime: Runtime, weights_n: Tensor) -> Learner:
    """Returns the LLM after a few weighted steps at the peak learning rate (collective)."""
    learner = build_learner(
        resolve_shape(config.model),
        config.model,
        config.parallel,
        dataclasses.replace(config.training, warmup_fraction=0),
        runtime,
        sequence_length=config.data.sequence_length,
        seed=config.run.seed,
    )
    for number in range(2, 2 + _WARM_UP_STEPS):
        batch = _random_batch(config, learner, number)
        weighted_gradient(learner.llm, learner.optimizer, batch, weights_n, _MICRO_BATCH)
        learner.optimizer.step()
        learner.scheduler.step(increment=1)
    return learner


def _random_batch(config: Config, learner: Learner, number: int) -> Batch:
    return random_batch(
        number,
        learner.runtime,
        rows=config.training.global_batch_size,
        sequence_length=config.data.sequence_length,
        vocab_size=learner.llm.shape.vocab_size,
    )


def _layout(config: Config, runtime: Runtime) -> str:
    parallel = config.parallel
    parts = [
        f"tensor {parallel.tensor}",
        *([f"context {parallel.context}"] if parallel.context > 1 else []),
        f"pipeline {parallel.pipeline}",
        f"data {runtime.data_size}",
        *(["sequence parallel"] if parallel.sequence else []),
        *([f"{parallel.virtual_stages} virtual stages"] if parallel.virtual_stages > 1 else []),
        *(["sharded optimizer"] if parallel.sharded_optimizer else []),
    ]
    parameters = resolve_shape(config.model).num_parameters()
    return f"{', '.join(parts)}; {parameters / 1e6:.2f} M parameters, fp32"


def _say(runtime: Runtime, what: str, finding: str) -> None:
    if runtime.is_main:
        print(f"{what:20}{printable(finding)}", flush=True)
