"""How well cheaper alignments agree with exact ones, on a run's own checkpoint and batches.

`weighting.update_on ahead` takes the direction at the parameters and moments before the step
(bilevel/ahead.py), possibly from fewer passages. This compares its alignments with the exact ones
(bilevel/hypergradient.py) of the same batches, which are those that follow the newest checkpoint,
at uniform weights. What the exact alignments themselves lose with fewer passages stands beside it:
that is the noise of the target, which no direction removes. Cost: about ten plain steps a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron_dwm.bilevel import ESTIMATORS, AheadProbe, Problem, Target, directions_ahead
from megatron_dwm.bilevel.problem import InnerOptimizer
from megatron_dwm.checkpoint.newest import newest_whole_checkpoint
from megatron_dwm.config import Config, UserError
from megatron_dwm.config.paths import with_absolute_paths
from megatron_dwm.config.printing import printable
from megatron_dwm.data import Batch
from megatron_dwm.model import clear_gradients, forward_backward
from megatron_dwm.model.passes.objective import weighted, weighted_denominator
from megatron_dwm.run.checks import check
from megatron_dwm.run.directory import run_to_resume
from megatron_dwm.run.job import Job, build_job, load_job, parts_of
from megatron_dwm.runtime import bring_up
from megatron_dwm.training.weighed_units import weighed_units
from megatron_dwm.weighting import learns, with_options

BATCHES = 8
"""number of batches, of which the mean correlation is reported"""
Align = Callable[[Job, Batch, Batch, InnerOptimizer], Tensor]


def compare_on_run(config: Config) -> None:
    """Print the correlations on the run in `run.dir`, which stays as it is (collective).

    Raises UserError if it has no checkpoint, if its policy learns from no hypergradients, or if the
    configuration is not that of the run.
    """
    config = with_options(config)
    inputs = check(config)
    if not learns(config) or inputs.target is None:
        raise UserError(
            f"policy.name {config.policy.name}: computes no hypergradients that a direction ahead "
            "could be compared with; name a run that does, such as one of policy dwm"
        )
    run_to_resume(config)
    config = with_absolute_paths(config)
    run_dir = Path(config.run.dir)
    with bring_up(config.parallel, config.run.seed) as runtime:
        newest = newest_whole_checkpoint(run_dir, runtime)
        if newest is None:
            raise UserError(
                f"run.dir: {run_dir} has no complete checkpoint to compare on; train it first, or "
                "leave out run.resume for a check on random tokens"
            )
        job = build_job(config, runtime, inputs)
        load_job(job, parts_of(config, job, inputs, newest), newest)
        found = correlations(job, config.training.steps, config.bilevel.inner_optimizer)
        if runtime.is_main:
            print(f"{'checkpoint':20}{printable(str(newest))}")
            for name, value in found.items():
                print(f"{'alignments':20}{name}: correlation {value:.4f} with the exact ones")


def correlations(job: Job, steps: int, inner: InnerOptimizer) -> dict[str, float]:
    """Returns mean correlations with the exact alignments of whole batches (collective).

    steps, inner: of the run. The batches are those of the next steps, or of the last ones.
    """
    first = min(job.state.step, max(steps - BATCHES, 0))
    found: dict[str, list[float]] = {}
    for number in range(first, min(first + BATCHES, steps)):
        batch, passages = job.feed.training(number), job.feed.validation(number)
        exact_N = _global(job, batch, _exact(job, batch, passages, inner))
        for name, align, fraction in _CONTESTANTS:
            aligned_n = align(job, batch, _part(job, passages, fraction), inner)
            other_N = _global(job, batch, aligned_n)
            pair = torch.stack([exact_N, other_N]).double()
            found.setdefault(name, []).append(float(torch.corrcoef(pair)[0, 1]))
    return {name: sum(values) / len(values) for name, values in found.items()}


def _part(job: Job, passages: Batch, fraction: float) -> Batch:
    """Returns the first of this replica's passages, in whole micro-batches of the pipeline."""
    multiple = job.learner.llm.micro_batches_multiple
    return passages.rows(0, max(1, round(passages.size * fraction / multiple)) * multiple)


def _exact(job: Job, batch: Batch, passages: Batch, inner: InnerOptimizer) -> Tensor:
    problem = Problem(
        llm=job.learner.llm,
        optimizer=job.learner.optimizer,
        train_batch=batch,
        weights_n=_ones(batch),
        val_batch=passages,
        micro_batch_size=job.learner.micro_batch_size,
        inner=inner,
    )
    return ESTIMATORS["tangent_probe"](problem).alignment_n


def _ahead(job: Job, batch: Batch, passages: Batch, inner: InnerOptimizer) -> Tensor:
    llm, optimizer, size = job.learner.llm, job.learner.optimizer, job.learner.micro_batch_size
    target = Target(
        llm=llm, optimizer=optimizer, val_batch=passages, micro_batch_size=size, inner=inner
    )
    probe, weights_n = AheadProbe(llm, directions_ahead(target)), _ones(batch)
    micro_batches = weighted(batch, weights_n, size)
    with probe.attached(micro_batches) as enter:
        denominator = weighted_denominator(batch)
        forward_backward(llm, micro_batches, denominator=denominator, on_micro_batch=enter)
    clear_gradients(llm, optimizer)
    return probe.hypergradient(batch, weights_n).alignment_n


_CONTESTANTS: tuple[tuple[str, Align, float], ...] = (
    ("ahead, all passages", _ahead, 1.0),
    ("ahead, half of the passages", _ahead, 0.5),
    ("ahead, a quarter of the passages", _ahead, 0.25),
    ("exact, half of the passages", _exact, 0.5),
    ("exact, a quarter of the passages", _exact, 0.25),
)


def _ones(batch: Batch) -> Tensor:
    return torch.ones(batch.units.count, device=batch.tokens_BS.device)


def _global(job: Job, batch: Batch, alignment_n: Tensor) -> Tensor:
    """Returns the alignments of all replicas' units that count (collective)."""
    runtime = job.learner.runtime
    units = weighed_units(batch, alignment_n, alignment_n, runtime)
    alignment_N, sizes_N = units.gather(alignment_n, runtime), units.gathered_sizes(runtime)
    return alignment_N if sizes_N is None else alignment_N[sizes_N > 0]
