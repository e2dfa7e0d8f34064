"""`hypergradient`: one weighting update against plain training steps, whole and in its parts."""

from __future__ import annotations

from benchmarks.collectives import collectives_table
from benchmarks.memory import memory_table
from benchmarks.settings import Settings
from benchmarks.subject import Subject, build_subject, opened
from benchmarks.table import heading, ratio_table
from benchmarks.timing import Clock, Contestant, alternate, timed
from megatron_dwm.bilevel.problem import sum_over_data
from megatron_dwm.bilevel.tangent_probe import tangent_probe
from megatron_dwm.bilevel.virtual_step import prepare_virtual_step
from megatron_dwm.model import clear_gradients, forward_backward
from megatron_dwm.model.passes.objective import unit, weighted, weighted_denominator

PLAIN = "plain training step"
UPDATE = "hypergradient (tangent probe)"
WHOLE = "weighting update (with the weighting model's own step)"
UNROLL = "hypergradient (unroll)"
AGAINST = "unroll against tangent probe"
GRADIENT = "part: gradient pass"
VIRTUAL = "part: virtual step and restore"
VALIDATION = "part: validation pass"
DIRECTION = "part: direction"
PROBE = "part: probe pass"
SUM = "sum of the parts"
PARTS = (GRADIENT, VIRTUAL, VALIDATION, DIRECTION, PROBE)
UPDATE_TARGET = "at most 3.150"
UNROLL_TARGET = "at least 1.500"


def measure_updates(settings: Settings, *, memory_repeats: int) -> None:
    """Print the tables (main process)."""
    # Memory first: its processes have the machine's memory to themselves.
    memory = memory_table(settings, memory_repeats)
    with opened(settings) as runtime:
        subject = build_subject(settings, runtime)
        times_s = _times(subject, settings)
        collectives = collectives_table(subject)
        if not runtime.is_main:
            return
        print(heading(settings, runtime, subject.num_parameters))
        for table in (_table(times_s), memory, collectives):
            print("\n" + table, flush=True)


def can_unroll(settings: Settings, world_size: int) -> bool:
    """True if the step can be unrolled: in one process and in fp32 (bilevel/unroll.py)."""
    return world_size == 1 and settings.precision == "fp32"


def _times(subject: Subject, settings: Settings) -> dict[str, list[float]]:
    runtime = subject.runtime
    contestants = [
        timed(PLAIN, subject.plain_step, runtime),
        timed(UPDATE, subject.hypergradient, runtime),
        timed(WHOLE, subject.weighting_update, runtime),
        _in_parts(subject),
    ]
    if can_unroll(settings, runtime.world_size):
        contestants.append(timed(UNROLL, lambda: subject.hypergradient("unroll"), runtime))
    return alternate(
        contestants, repeats=settings.repeats, warm_up=settings.warm_up, shown=runtime.is_main
    )


def _in_parts(subject: Subject) -> Contestant:
    """Returns the calls of megatron_dwm/bilevel/hypergradient.py in order, each of them timed."""

    def run() -> dict[str, float]:
        problem = subject.problem()
        llm, optimizer, size = problem.llm, problem.optimizer, problem.micro_batch_size
        train, val = problem.train_batch, problem.val_batch
        subject.runtime.barrier()
        clock, spent_s = Clock(subject.runtime.device), dict.fromkeys((*PARTS, SUM), 0.0)

        clear_gradients(llm, optimizer)
        micro_batches = weighted(train, problem.weights_n, size)
        forward_backward(llm, micro_batches, denominator=weighted_denominator(train))
        spent_s[GRADIENT] += clock.lap()

        step = prepare_virtual_step(llm, optimizer, problem.inner)
        step.enter()
        spent_s[VIRTUAL] += clock.lap()

        clear_gradients(llm, optimizer)
        micro_batches = problem.objective.micro_batches(val, size)
        denominator = problem.objective.denominator(val)
        result = forward_backward(llm, micro_batches, denominator=denominator)
        sum_over_data(llm, problem.objective.sums(result))
        spent_s[VALIDATION] += clock.lap()

        step.direction()
        spent_s[DIRECTION] += clock.lap()

        step.restore()
        spent_s[VIRTUAL] += clock.lap()

        tangent_probe(llm, unit(train, size))
        spent_s[PROBE] += clock.lap()

        step.restore_gradient()
        clear_gradients(llm, optimizer)
        spent_s[VIRTUAL] += clock.lap()
        spent_s[SUM] = sum(spent_s[part] for part in PARTS)
        return spent_s

    return run


def _table(times_s: dict[str, list[float]]) -> str:
    names = [PLAIN, UPDATE, WHOLE, *PARTS, SUM]
    compared = [(name, PLAIN, UPDATE_TARGET if name == UPDATE else "") for name in names]
    if UNROLL in times_s:
        times_s = {**times_s, AGAINST: times_s[UNROLL]}
        compared += [(UNROLL, PLAIN, ""), (AGAINST, UPDATE, UNROLL_TARGET)]
    table = ratio_table("one of", times_s, compared)
    return table if UNROLL in times_s else table + "\n\nUnroll: only in one process and fp32."
