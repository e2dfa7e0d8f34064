"""One run from configuration to its last step: checks first, processes after."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_dwm.config import Config, UserError
from megatron_dwm.config.load import load_config, read_typed_paths, save_config
from megatron_dwm.config.paths import typed_paths, with_absolute_paths
from megatron_dwm.config.validate import validate_config
from megatron_dwm.data import EvaluationSet, ValidationSet
from megatron_dwm.data.checks import check_data
from megatron_dwm.data.tokenizer_record import has_special_tokens
from megatron_dwm.model import LLM, LlamaShape, resolve_shape
from megatron_dwm.model.on_disk.from_huggingface import load_huggingface
from megatron_dwm.model.on_disk.huggingface_files import is_huggingface, open_huggingface
from megatron_dwm.model.shape import heads_of
from megatron_dwm.runtime import Runtime, bring_up, world_size_from_environment
from megatron_dwm.runtime.profiling import check_profiling
from megatron_dwm.runtime.stop import StopPoll, stop_signals
from megatron_dwm.tokenizer import Tokenizer, open_tokenizer
from megatron_dwm.training.checkpoint import load_checkpoint, load_parameters
from megatron_dwm.training.fingerprint import (
    DOMAINS,
    fingerprint,
    refuse_changed_files,
    refuse_changes,
    without_effect,
)
from megatron_dwm.training.first_checkpoint import note_start
from megatron_dwm.training.kept_files import kept_files
from megatron_dwm.training.loop import Loop, is_finished
from megatron_dwm.training.manifest import list_checkpoints, read_manifest
from megatron_dwm.training.recorded import drop_records_after
from megatron_dwm.training.resume import (
    newest_whole_checkpoint,
    print_warning,
    require_no_loss,
    say_what_has_no_effect,
)
from megatron_dwm.training.run_lock import LOCK, HeldDirectory, only_job
from megatron_dwm.training.session import INDEX_CACHE, build_session
from megatron_dwm.training.stages import plan_stages
from megatron_dwm.training.starting_point import (
    shape_to_start_from,
    warn_of_another_tokenizer,
)
from megatron_dwm.training.state import TrainState
from megatron_dwm.weighting import weighting_shape
from megatron_dwm.weighting.model import load_weighting_model, what_is_not_compared

# What a start leaves that ended before the run's first file.
_BEFORE_THE_RUN = {LOCK, INDEX_CACHE, "config.yaml.partial"}


def run(config: Config) -> None:
    """Train as `config` says. Raises UserError before any process group exists where it can.

    Until the loop begins a signal ends the process at once; from then on the run saves first, and
    a launcher's second one is harmless until all is taken down.
    """
    shape, tokenizer = check(config)
    before = _run_to_resume(config)
    typed, config = typed_paths(config), with_absolute_paths(config)
    run_dir = Path(config.run.dir)
    with (
        ExitStack() as to_the_end,
        bring_up(config.parallel, config.run.seed) as runtime,
        _claimed(run_dir, runtime) as is_lost,
    ):
        newest = newest_whole_checkpoint(run_dir, runtime) if before else None
        marks = fingerprint(config, shape)
        if before and newest is None:
            require_no_loss(run_dir, before.training)
        state = _state_to_resume(config, newest, marks)
        if is_finished(config, state):
            if runtime.is_main:
                steps = config.training.steps
                print(f"{run_dir} is at step {state.step}: nothing to do up to step {steps}")
            return
        session = build_session(
            config,
            runtime,
            shape,
            tokenizer,
            kept_files=kept_files(config, tokenizer, newest) if runtime.is_main else {},
        )
        if newest is not None:
            load_checkpoint(session, newest)
            say_what_has_no_effect(without_effect(before, config), newest)
        elif config.model.init_from is not None:
            if runtime.is_main:
                warn_of_another_tokenizer(config, tokenizer)
            _start_from(session.llm, Path(config.model.init_from))
            session.optimizer.reload_model_params()
        if runtime.is_main:
            _take_up(config, state, typed, had_checkpoint=newest is not None)
        told = to_the_end.enter_context(stop_signals())
        runtime.barrier()
        Loop(session, StopPoll(runtime, run_dir, told, is_lost), marks, newest).run()


def check(config: Config) -> tuple[LlamaShape, Tokenizer]:
    """Everything about the run that can be wrong without starting it."""
    if config.data.tokenizer is None:
        raise UserError("data.tokenizer: expected a tokenizer model, got none")
    tokenizer = open_tokenizer(
        config.data.tokenizer, include_special_tokens=has_special_tokens(config.data.train)
    )
    shape = resolve_shape(config.model, tokenizer.vocab_size, init_from=shape_to_start_from(config))
    if shape.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size {shape.vocab_size}: the tokenizer {config.data.tokenizer} has "
            f"{tokenizer.vocab_size} pieces; leave model.vocab_size empty or raise it (with "
            "model.init_from, name that model's tokenizer)"
        )
    validate_config(config, heads_of(shape), world_size_from_environment())
    check_profiling(config.profiling)
    check_data(config.data, tokenizer, _num_samples(config))
    _check_held_out_text(config, tokenizer)
    _check_weighting_model(config, shape, tokenizer)
    return shape, tokenizer


def _num_samples(config: Config) -> int:
    """Of training steps, or of weighting updates where these draw more in an order of their own."""
    updates = sum(stage.num_updates for stage in plan_stages(config))
    fresh = updates if config.weighting.update_on == "fresh" else 0
    return max(config.training.steps, fresh) * config.training.global_batch_size


def _check_weighting_model(config: Config, shape: LlamaShape, tokenizer: Tokenizer) -> None:
    """The weighting model that the run starts from has to exist and to fit."""
    if config.policy.name == "dwm" and config.weighting.load is not None:
        directory = Path(config.weighting.load)
        expected = weighting_shape(
            config, shape, tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256
        )
        found = load_weighting_model(directory, expected).shape
        if (text := what_is_not_compared(directory, found)) is not None:
            print_warning(text)


def _start_from(llm: LLM, directory: Path) -> None:
    """Take the parameters of a Hugging Face model or of a checkpoint (collective)."""
    if is_huggingface(directory):
        load_huggingface(llm, open_huggingface(directory))
    else:
        load_parameters(llm, directory)


def _check_held_out_text(config: Config, tokenizer: Tokenizer) -> None:
    if config.learns or config.policy.name == "validation_mixing":
        target = ValidationSet(config.validation, config.data, tokenizer, seed=config.run.seed)
        if config.learns and config.weighting.damp_by_noise and target.num_rows < 2:
            raise UserError(
                f"weighting.damp_by_noise: {config.validation.path} (validation.path) has one row, "
                "and noise is measured between halves; give more text or leave it out"
            )
    if config.evaluation.path is not None:
        EvaluationSet(config.evaluation, config.data, tokenizer)


def _run_to_resume(config: Config) -> Config | None:
    """The configuration of the run that the directory holds and that may go on; None for a new one.

    A run is never written over.
    """
    run_dir = Path(config.run.dir)
    _require_writable(run_dir)
    saved = run_dir / "config.yaml"
    _require_directory(run_dir / "checkpoints")
    if not saved.is_file():
        if any(entry.name not in _BEFORE_THE_RUN for entry in run_dir.iterdir()):
            _point_to_a_copy(run_dir, f"{saved} is missing")
            raise UserError(
                f"run.dir: {run_dir} is not empty and holds no run; choose another directory"
            )
        return None
    if not config.run.resume:
        raise UserError(
            f"run.dir: {run_dir} already holds a run; choose another directory, or go on with "
            "--run.resume true"
        )
    try:
        before, typed = load_config([str(saved)]), read_typed_paths(saved)
    except UserError as error:
        _point_to_a_copy(run_dir, str(error))
        raise
    refuse_changes(before, config, run_dir, typed)
    return before


def _require_directory(checkpoints: Path) -> None:
    """Raise UserError where checkpoints could not be kept, a link to nowhere included."""
    if (checkpoints.exists() or checkpoints.is_symlink()) and not checkpoints.is_dir():
        raise UserError(
            f"run.dir: {checkpoints} is no directory (a disk that is not mounted?); bring it back, "
            "or choose another run.dir"
        )


def _point_to_a_copy(run_dir: Path, trouble: str) -> None:
    """Raise UserError if a checkpoint has the configuration that the run's directory lacks."""
    copies = [path / "config.yaml" for path in list_checkpoints(run_dir)]
    found = [path for path in copies if path.is_file() and path.stat().st_size]
    if found:
        raise UserError(f"run.dir: {trouble}; copy {found[-1]} to {run_dir / 'config.yaml'}")


def _require_writable(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"run.dir: cannot make {run_dir} ({error.strerror}); name another directory"
        ) from error
    if not os.access(run_dir, os.W_OK | os.X_OK):
        raise UserError(f"run.dir: {run_dir} cannot be written; name another directory")


@contextmanager
def _claimed(run_dir: Path, runtime: Runtime) -> Iterator[Callable[[], bool]]:
    """The main process holds the directory for the job; if it cannot, all ranks raise UserError.

    The value is asked by the main process whether it has lost the directory since.
    """
    with ExitStack() as stack:
        refusal: list[str | None] = [None]
        held: HeldDirectory | None = None
        if runtime.is_main:
            try:
                held = stack.enter_context(only_job(run_dir))
            except UserError as error:
                refusal = [str(error)]
        if runtime.world_size > 1:
            dist.broadcast_object_list(refusal, src=0)
        if refusal[0] is not None:
            raise UserError(refusal[0])
        yield (lambda: False) if held is None else held.is_lost


def _state_to_resume(config: Config, newest: Path | None, marks: dict[str, str]) -> TrainState:
    """The counters to go on from. Raises UserError if what the run depends on has changed.

    A run that was killed before its first checkpoint begins again.
    """
    if newest is None:
        return TrainState()
    manifest = read_manifest(newest)
    refuse_changed_files(manifest.fingerprint, marks, config)
    if DOMAINS not in manifest.fingerprint:
        print_warning(
            f"{newest} does not say what domains the documents of data.train had, as earlier "
            "versions wrote it: whether they have changed since is not checked"
        )
    return manifest.state


def _take_up(
    config: Config, state: TrainState, typed: dict[str, Any], *, had_checkpoint: bool
) -> None:
    """Write the resolved configuration; drop what a resumed run will write again.

    typed: how its paths were typed.
    """
    run_dir = Path(config.run.dir)
    try:
        missing = drop_records_after(run_dir, state, print_warning)
        save_config(config, run_dir / "config.yaml", typed)
        note_start(run_dir, had_one=had_checkpoint)
    except OSError as error:
        raise UserError(
            f"run.dir: {error.filename or run_dir} cannot be written ({error.strerror}); make room "
            "or give leave, and start again: nothing is lost"
        ) from error
    if missing:
        print_warning(
            f"{run_dir / 'metrics.jsonl'} lacks {missing} of the {state.step} steps up to "
            "the checkpoint: it was removed or cut short, and they are not made up"
        )
