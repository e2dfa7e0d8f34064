"""Starts a run: checks first, then processes, components and the loop."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_dwm.checkpoint.fingerprint import DOMAINS, fingerprint
from megatron_dwm.checkpoint.first_checkpoint import note_start
from megatron_dwm.checkpoint.manifest import read_manifest
from megatron_dwm.checkpoint.names import CONFIG_FILE
from megatron_dwm.checkpoint.newest import newest_whole_checkpoint
from megatron_dwm.checkpoint.parts import Parts
from megatron_dwm.checkpoint.saver import Saver
from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.config import Config, RunError, UserError
from megatron_dwm.config.load import save_config
from megatron_dwm.config.paths import typed_paths, with_absolute_paths
from megatron_dwm.files.run_names import STOPPED
from megatron_dwm.run.changes import (
    refuse_changed_files,
    refuse_moved_stages,
    without_effect,
)
from megatron_dwm.run.checks import check
from megatron_dwm.run.directory import require_shared, run_to_resume
from megatron_dwm.run.files import RunFiles
from megatron_dwm.run.health import Health
from megatron_dwm.run.inputs import RunInputs
from megatron_dwm.run.job import Job, build_job, load_job, parts_of
from megatron_dwm.run.lock import only_job
from megatron_dwm.run.loop import Loop
from megatron_dwm.run.opening import opening_lines
from megatron_dwm.run.pace import Pace
from megatron_dwm.run.progress import Progress
from megatron_dwm.run.recorded import drop_records_after
from megatron_dwm.run.remarks import remarks
from megatron_dwm.run.reporter import Reporter
from megatron_dwm.run.resume import (
    require_no_loss,
    warn_of_another_rate,
    warn_of_keys_without_effect,
)
from megatron_dwm.run.starting_point import load_start, warn_of_another_tokenizer
from megatron_dwm.run.starts import note_start_of_job
from megatron_dwm.run.status import is_finished
from megatron_dwm.run.terminal import Terminal
from megatron_dwm.run.upkeep import Upkeep
from megatron_dwm.runtime import Runtime, bring_up
from megatron_dwm.runtime.profiling import Window
from megatron_dwm.runtime.stop import StopPoll, stop_signals
from megatron_dwm.runtime.warn import print_warning
from megatron_dwm.weighting import method_class, with_options


def run(config: Config) -> bool:
    """Train the run of `config`. Raises UserError, if possible before any process group exists.

    Returns True if this call took the run's last step.

    Exits with 1 if the final state could not be saved. Until the loop begins, a signal ends the
    process at once. After that the run saves first, and a second signal of the launcher does no
    harm until everything is closed.
    """
    config = with_options(config)
    inputs = check(config)
    before = run_to_resume(config)
    typed, config = typed_paths(config), with_absolute_paths(config)
    run_dir = Path(config.run.dir)
    with (
        ExitStack() as until_exit,
        bring_up(config.parallel, config.run.seed) as runtime,
        _claimed(run_dir, runtime, config.parallel.timeout_s) as is_lost,
    ):
        require_shared(run_dir, runtime)
        newest = newest_whole_checkpoint(run_dir, runtime) if before else None
        found = fingerprint(config, inputs.shape, inputs.values)
        if before and newest is None:
            require_no_loss(run_dir, before.training)
        resumed = _saved_state(config, newest, found)
        if _is_over(config, resumed, runtime):
            return False
        if before:
            refuse_moved_stages(before, config, resumed.step)
        job = build_job(config, runtime, inputs, resumed.updates)
        parts = parts_of(config, job, inputs, newest)
        _start(config, before, job, parts, inputs, newest)
        parts.state_of_method()  # what no checkpoint could take is refused now, not at the first
        if runtime.is_main:
            _write_start(config, job.state, typed, runtime, had_checkpoint=newest is not None)
        received = until_exit.enter_context(stop_signals())
        runtime.barrier()
        stop = StopPoll(runtime, run_dir, received, is_lost)
        saved = _loop(config, job, parts, inputs, found, newest, stop).run()
        if not saved:
            sys.exit(1)
        return is_finished(config, job.state)


def _is_over(config: Config, state: TrainState, runtime: Runtime) -> bool:
    """True if a run at `state` has nothing left to do; prints a line if so."""
    if not is_finished(config, state):
        return False
    if runtime.is_main:
        run_dir, steps = config.run.dir, config.training.steps
        print(f"{run_dir} is at step {state.step}: nothing to do up to step {steps}")
    return True


def _start(
    config: Config,
    before: Config | None,
    job: Job,
    parts: Parts,
    inputs: RunInputs,
    newest: Path | None,
) -> None:
    """Load the checkpoint to resume from, or the parameters of `model.init_from` (collective)."""
    if newest is not None:
        assert before is not None
        load_job(job, parts, newest)
        warn_of_keys_without_effect(without_effect(before, config), newest)
        warn_of_another_rate(before.training, config.training, job.state.step + 1)
    elif config.model.init_from is not None:
        if job.learner.runtime.is_main:
            warn_of_another_tokenizer(config, inputs.tokenizer)
        load_start(job.learner, config.model)


def _loop(
    config: Config,
    job: Job,
    parts: Parts,
    inputs: RunInputs,
    found: dict[str, str],
    newest: Path | None,
    stop: StopPoll,
) -> Loop:
    """Build the loop and everything around it, and print remarks about the run.

    found: fingerprint of the run's files.
    """
    run_dir, runtime = Path(config.run.dir), parts.runtime
    terminal = Terminal(
        shown=runtime.is_main,
        schedule=job.schedule,
        interval_steps=config.training.log_interval_steps,
    )
    health = Health(
        min_effective_sample_size=config.weighting.warn_effective_sample_size,
        min_signal_to_noise=config.bilevel.min_signal_to_noise,
        gentler=method_class(config).gentler,
        warn=terminal.warn,
    )
    files = RunFiles(run_dir, config, terminal.warn) if runtime.is_main else None
    logging = config.logging
    progress = _progress(config, job, terminal, runtime, files)
    report = Reporter(job.state, job.costs, runtime, logging, terminal, health, files, progress)
    saver = Saver(
        *(parts, run_dir, config.training, found),
        newest=newest,
        log=terminal.log,
        warn=terminal.warn,
    )
    window = Window(config.profiling, run_dir / "profile", runtime.rank)
    for line in opening_lines(config, job, inputs, runtime, newest):
        terminal.note(line)
    for remark in remarks(config, inputs, job.costs, runtime, job.state):
        terminal.warn(remark)
    return Loop(job, config, report, Upkeep(job, config, parts, saver, report, stop), window)


def _progress(
    config: Config, job: Job, terminal: Terminal, runtime: Runtime, files: RunFiles | None
) -> Progress:
    tokens = job.feed.global_batch_size * config.data.sequence_length
    processes = runtime.world_size
    pace = Pace(config, job.schedule, job.costs, tokens=tokens, processes=processes)
    return Progress(terminal, pace, job.state, job.schedule, job.costs, runtime.device, files)


@contextmanager
def _claimed(run_dir: Path, runtime: Runtime, timeout_s: float) -> Iterator[Callable[[], bool]]:
    """Hold the run directory for the job; raises UserError on all ranks if another job holds it.

    Gives a function that is true on the main process if the directory was lost since.
    """
    with ExitStack() as stack:
        refusal: list[UserError | RunError | None] = [None]
        is_lost: Callable[[], bool] = lambda: False  # noqa: E731
        if runtime.is_main:
            try:
                is_lost = stack.enter_context(only_job(run_dir, timeout_s)).is_lost
            except (UserError, RunError) as error:
                refusal = [error]
        if runtime.world_size > 1:
            dist.broadcast_object_list(refusal, src=0)
        if refusal[0] is not None:
            raise refusal[0]
        yield is_lost


def _saved_state(config: Config, newest: Path | None, found: dict[str, str]) -> TrainState:
    """Returns the counters to resume from. Raises UserError if a file of the run has changed.

    found: fingerprint of the run's files. A run without a checkpoint starts from step 0.
    """
    if newest is None:
        return TrainState()
    manifest = read_manifest(newest)
    refuse_changed_files(manifest.fingerprint, found, config)
    if DOMAINS not in manifest.fingerprint:
        print_warning(
            f"{newest} does not say what domains the documents of data.train had, as earlier "
            "versions wrote it: whether they have changed since is not checked"
        )
    return manifest.state


def _write_start(
    config: Config,
    state: TrainState,
    typed: dict[str, Any],
    runtime: Runtime,
    *,
    had_checkpoint: bool,
) -> None:
    """Write the resolved configuration, and drop records that a resumed run writes again.

    typed: its paths as the user typed them.
    """
    run_dir = Path(config.run.dir)
    try:
        missing = drop_records_after(run_dir, state, print_warning)
        save_config(config, run_dir / CONFIG_FILE, typed)
        note_start(run_dir, had_one=had_checkpoint)
        (run_dir / STOPPED).unlink(missing_ok=True)
        note_start_of_job(run_dir, state.step, runtime, config.policy.name)
    except OSError as error:
        raise UserError(
            f"run.dir: {error.filename or run_dir} cannot be written ({error.strerror}); free some "
            "space or grant permission, and start again: nothing is lost"
        ) from error
    if missing:
        print_warning(
            f"{run_dir / 'metrics.jsonl'} lacks {missing} of the {state.step} steps up to "
            "the checkpoint: it was removed or cut short, and they are not made up"
        )
