"""What a user runs first on a new cluster: the machine, and is the hypergradient right on it.

The tangent probe is compared, under the given layout, with a finite difference and, in one process,
with differentiating through the step. The model is the configuration's (or a tiny one), in fp32, on
random tokens, after a few training steps so that no moment is empty.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_dwm.bilevel import ESTIMATORS, Problem
from megatron_dwm.config import Config, UserError
from megatron_dwm.config.printing import printable
from megatron_dwm.config.validate import validate_layout, validate_options
from megatron_dwm.data import Batch
from megatron_dwm.model import LLM, build_llm, clear_gradients, forward_backward, resolve_shape
from megatron_dwm.model.layers.choice import choose_layers
from megatron_dwm.model.passes.objective import weighted, weighted_denominator
from megatron_dwm.model.shape import heads_of
from megatron_dwm.runtime import Runtime, bring_up, world_size_from_environment
from megatron_dwm.runtime.machine import describe_machine
from megatron_dwm.runtime.profiling import check_profiling
from megatron_dwm.training.optimizer import build_optimizer, build_scheduler
from megatron_dwm.weighting import learns
from megatron_dwm.weighting.rules import estimator_problems

# A central difference in fp32 is right to about 2e-3 of the largest alignment
# (bilevel/finite_difference.py); the unroll adds up the same numbers in another order.
TOLERANCES = {"finite_difference": 1e-2, "unroll": 1e-4}
_MICRO_BATCH = 2
_WARM_UP_STEPS = 4


def diagnose(config: Config) -> bool:
    """Print everything; True if the estimators agree (collective)."""
    world_size = world_size_from_environment()
    asked = config
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
        return _estimators_agree(config, runtime)


def _precision(asked: Config, runtime: Runtime) -> str:
    """What a run of this configuration would compute in here, and what the check is in."""
    model = asked.model
    choice = choose_layers(model, runtime.device)
    layers = choice.message(model) or f"model.precision {model.precision}: {choice.kind} layers"
    return f"{layers}; what is checked below is fp32"


def _checkable(config: Config, world_size: int) -> Config:
    """The configuration in fp32, with batches just large enough for its schedule."""
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
    """Alignments of the global batch, in order."""
    runtime = problem.llm.runtime
    mine_n = ESTIMATORS[estimator](problem).alignment_n.contiguous()
    whole_n = mine_n.new_empty(len(mine_n) * runtime.data_size)
    dist.all_gather_into_tensor(whole_n, mine_n, group=runtime.data_group)
    return whole_n


def _problem(config: Config, runtime: Runtime) -> Problem:
    llm = build_llm(
        resolve_shape(config.model),
        config.model,
        config.parallel,
        runtime,
        sequence_length=config.data.sequence_length,
        seed=config.run.seed,
    )
    optimizer = build_optimizer(config.training, llm, sharded=config.parallel.sharded_optimizer)
    rows = config.training.global_batch_size
    weights_n = torch.linspace(0.5, 1.5, rows).chunk(runtime.data_size)[runtime.data_rank]
    weights_n = weights_n.to(runtime.device)
    _warm_up(config, llm, optimizer, weights_n)
    return Problem(
        llm=llm,
        optimizer=optimizer,
        train_batch=_random_batch(config, llm, 0),
        weights_n=weights_n,
        val_batch=_random_batch(config, llm, 1),
        micro_batch_size=_MICRO_BATCH,
        inner=config.bilevel.inner_optimizer,
    )


def _warm_up(config: Config, llm: LLM, optimizer: ChainedOptimizer, weights_n: Tensor) -> None:
    """A few real steps at the peak learning rate."""
    scheduler = build_scheduler(dataclasses.replace(config.training, warmup_fraction=0), optimizer)
    for number in range(2, 2 + _WARM_UP_STEPS):
        clear_gradients(llm, optimizer)
        batch = _random_batch(config, llm, number)
        passes = weighted(batch, weights_n, _MICRO_BATCH)
        forward_backward(llm, passes, denominator=weighted_denominator(batch))
        optimizer.step()
        scheduler.step(increment=1)


def _random_batch(config: Config, llm: LLM, number: int) -> Batch:
    """This replica's rows of a batch of random tokens, the same batch under every layout."""
    rows, length = config.training.global_batch_size, config.data.sequence_length
    generator = torch.Generator().manual_seed(number)
    text = torch.randint(llm.shape.vocab_size, (rows, length + 1), generator=generator)
    share = rows // llm.runtime.data_size
    batch = Batch(
        tokens_BS=text[:, :-1].contiguous(),
        labels_BS=text[:, 1:].contiguous(),
        loss_mask_BS=torch.ones(rows, length),
        position_ids_BS=torch.arange(length).repeat(rows, 1),
        sample_ids_B=torch.arange(rows),
        document_ids_B=torch.arange(rows),
        domains=("random",) * rows,
    )
    first = llm.runtime.data_rank * share
    return batch.rows(first, first + share).to(llm.runtime.device)


def _layout(config: Config, runtime: Runtime) -> str:
    parallel = config.parallel
    parts = [
        f"tensor {parallel.tensor}",
        f"pipeline {parallel.pipeline}",
        f"data {runtime.data_size}",
        *(["sequence parallel"] if parallel.sequence else []),
        *([f"{parallel.virtual_stages} virtual stages"] if parallel.virtual_stages > 1 else []),
        *(["sharded optimiser"] if parallel.sharded_optimizer else []),
    ]
    parameters = resolve_shape(config.model).num_parameters()
    return f"{', '.join(parts)}; {parameters / 1e6:.2f} M parameters, fp32"


def _say(runtime: Runtime, what: str, finding: str) -> None:
    if runtime.is_main:
        print(f"{what:20}{printable(finding)}", flush=True)
