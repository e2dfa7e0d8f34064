"""What a user should know of a run before its first step: nothing of it stops the run.

Costs one comparison of the passages' texts.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_dwm.training.compute import why_no_noise
from megatron_dwm.training.session import Session

# A fast CPU of many cores; a laptop's makes a tenth of it.
_CPU_FLOPS = 1e12
_SLOW_STEP_S = 60.0


def remarks(session: Session) -> Iterator[str]:
    """A line for everything that is not as the configuration lets one expect."""
    yield from _fewer_passages(session)
    yield from _noise_not_measured(session)
    yield from _shared_passages(session)
    yield from _slow_steps(session)


def _fewer_passages(session: Session) -> Iterator[str]:
    config = session.config
    if session.validation is None or not config.learns or session.passages == config.passages:
        return
    asked_by = (
        "validation.batch_size" if config.validation.batch_size else "training.global_batch_size"
    )
    yield (
        f"a validation batch takes every row of {config.validation.path} (validation.path) once: "
        f"{session.passages}, not the {config.passages} of {asked_by}"
    )


def _noise_not_measured(session: Session) -> Iterator[str]:
    config = session.config
    if session.validation is None or not config.learns or not config.bilevel.noise_interval_updates:
        return
    reason = why_no_noise(config, session.passages)
    if reason is not None:
        yield (
            f"the alignments' signal-to-noise is not measured: {reason} "
            "(bilevel.noise_interval_updates 0 says that none is wanted)"
        )


def _shared_passages(session: Session) -> Iterator[str]:
    if session.validation is None or session.evaluation is None:
        return
    texts = session.evaluation.texts
    shared = session.validation.num_shared(texts)
    if shared:
        yield (
            f"{shared} of the {len(texts)} passages of {session.config.evaluation.path} "
            f"(evaluation.path) stand in {session.config.validation.path} (validation.path) too: "
            "the run learns from them, so their loss is not held out; take them out of one of "
            "the two"
        )


def _slow_steps(session: Session) -> Iterator[str]:
    flops = session.compute.llm_step / session.runtime.world_size
    seconds = flops / _CPU_FLOPS
    if session.runtime.device.type == "cpu" and seconds > _SLOW_STEP_S:
        yield (
            f"a step is {flops:.1e} FLOPs a process, {seconds / 60:,.0f} minutes at "
            f"{_CPU_FLOPS:.0e} a second, which is fast for a CPU: lower data.sequence_length "
            f"({session.config.data.sequence_length}), training.global_batch_size "
            f"({session.global_batch_size}) or the model's size"
        )
