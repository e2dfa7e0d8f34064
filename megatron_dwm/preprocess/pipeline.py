"""Turns corpora into indexed datasets with their sidecars: `tools/preprocess_data.py`.

Reading is sequential, encoding parallel, writing sequential and in input order, so the output does
not depend on the number of workers, the size of chunks or how often the run was interrupted.
Memory is some chunks, the tokenizers' caches and a row group of the sidecar, whatever the input.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

from megatron_dwm.config.errors import UserError
from megatron_dwm.config.outputs import why_unwritable
from megatron_dwm.files.command_names import name_of_command
from megatron_dwm.files.sidecar_format import INPUTS_OF_SHARDS, Facts
from megatron_dwm.preprocess.encode.encoder import EncodeSettings, token_dtype
from megatron_dwm.preprocess.encode.workers import encode_all
from megatron_dwm.preprocess.messages import warn
from megatron_dwm.preprocess.progress import progress_over
from megatron_dwm.preprocess.read.documents import DocumentSettings
from megatron_dwm.preprocess.read.inputs import (
    Input,
    ReadSettings,
    digest_of_inputs,
    find_inputs,
    read_inputs,
    take_shard,
)
from megatron_dwm.preprocess.record_checks import RecordChecks
from megatron_dwm.preprocess.records import EncodedChunk
from megatron_dwm.preprocess.settings import PreprocessSettings
from megatron_dwm.preprocess.write.final_files import (
    FinalPaths,
    PreprocessSummary,
    move_into_place,
    read_summary,
    summary_of,
)
from megatron_dwm.preprocess.write.outputs import GrowingOutputs
from megatron_dwm.preprocess.write.run_record import RunRecord
from megatron_dwm.preprocess.write.sidecar import SidecarColumns, facts_of
from megatron_dwm.preprocess.write.workspace import Workspace
from megatron_dwm.tokenizer import Tokenizer, build_tokenizer, remembered_engine


class Stopped(Exception):
    """Raised when the run has stopped because it was asked to; it can be resumed."""


def preprocess(
    settings: PreprocessSettings, should_stop: Callable[[], bool] = lambda: False
) -> PreprocessSummary:
    """Write one dataset for each JSON key and return the totals.

    `should_stop` is called after every chunk; if it returns True the run makes a checkpoint and
    raises `Stopped`. Raises `UserError` for a missing or damaged input, an unusable tokenizer, an
    output that exists, a bad record (unless they are skipped), a key that no record has, a corpus
    without a single token, and a full disk. The work before the last checkpoint is kept for
    `resume`.
    """
    everything = find_inputs(settings.inputs, settings.output_prefix)
    inputs = take_shard(everything, settings.shard, settings.num_shards)
    tokenizer = build_tokenizer(
        settings.tokenizer_type,
        settings.tokenizer_model,
        # Ids that another program made are taken as they are.
        include_special_tokens=settings.include_special_tokens and not settings.pretokenized,
    )
    record = RunRecord.of(settings, inputs, everything, tokenizer)
    final_paths = FinalPaths(prefix=settings.prefix, keys=settings.json_keys)
    final_paths.require_possible_names()
    if settings.resume and final_paths.record.exists():
        return read_summary(final_paths, record)
    with (
        _disk_errors(settings),
        Workspace(settings.prefix, record, resume=settings.resume) as workspace,
    ):
        if workspace.state.phase == "reading":
            final_paths.refuse_existing()
            facts = facts_of(tokenizer, append_eod=settings.append_eod)
            if settings.num_shards > 1:
                facts[INPUTS_OF_SHARDS] = digest_of_inputs(everything)
            run = _Run(settings, inputs, tokenizer, workspace, should_stop, facts)
            run.read_all()
            run.complete()
        move_into_place(workspace, final_paths, record)
        return summary_of(final_paths, workspace.state)


@contextmanager
def _disk_errors(settings: PreprocessSettings) -> Iterator[None]:
    """Turn a full or read-only disk into a `UserError`."""
    try:
        yield
    except OSError as error:
        words = why_unwritable(error)
        if words is None:
            raise
        raise UserError(
            f"{settings.prefix}: the output cannot be written ({words}); nothing has "
            "its final name yet; make room and run the same command with --resume"
        ) from None


@dataclass
class _Run:
    """One call of `preprocess`, between its inputs and its workspace."""

    settings: PreprocessSettings
    inputs: list[Input]
    tokenizer: Tokenizer
    workspace: Workspace
    should_stop: Callable[[], bool]
    facts: Facts
    """of the sidecars"""

    def __post_init__(self) -> None:
        self._state = self.workspace.state
        self._checks = RecordChecks(self.settings, self.workspace)
        self._refuse_mixed_modes()

    def read_all(self) -> None:
        """Read, encode and write everything from the last checkpoint on."""
        settings = self.settings
        outputs = GrowingOutputs(
            self.workspace,
            settings.json_keys,
            len(settings.metadata_keys),
            token_dtype(self.tokenizer.vocab_size),
        )
        with closing(outputs):
            self._read_into(outputs)
            self._checks.all_records()
            outputs.checkpoint()
            outputs.check_counts()

    def complete(self) -> None:
        """Write indices and sidecars; from here on only renaming is left."""
        self._refuse_changed_inputs()
        outputs = GrowingOutputs(
            self.workspace,
            self.settings.json_keys,
            len(self.settings.metadata_keys),
            token_dtype(self.tokenizer.vocab_size),
        )
        with closing(outputs):
            outputs.finish(
                SidecarColumns(
                    metadata_keys=self.settings.metadata_keys,
                    kinds=tuple(self._state.kinds),
                    source_names=tuple(entry.name for entry in self.inputs),
                    facts=self.facts,
                )
            )
        self._state.phase = "publishing"
        self.workspace.save()

    def _read_into(self, outputs: GrowingOutputs) -> None:
        settings = self.settings
        choice = remembered_engine(self.tokenizer)
        if choice.warning is not None and not settings.pretokenized:
            warn(choice.warning)
        read = ReadSettings(
            columns=settings.columns,
            max_record_bytes=settings.max_record_bytes,
            chunk_bytes=settings.chunk_bytes,
        )
        chunks = read_inputs(self.inputs, self._state.position, read)
        encoded = encode_all(
            _encode_settings(settings, self.tokenizer),
            choice.build,
            chunks,
            num_workers=settings.num_workers,
        )
        last_checkpoint_s = time.monotonic()
        # Closed at once, so that an error does not wait for workers that go on tokenizing.
        with closing(encoded), progress_over(self._bytes_left()) as bar:
            for chunk in encoded:
                self._refuse_rejects(chunk)
                outputs.add(chunk)
                bar.advance(chunk.consumed_bytes, len(chunk.rows))
                self._checks.first_records()
                if self.should_stop():
                    outputs.checkpoint()
                    raise Stopped
                if time.monotonic() - last_checkpoint_s >= settings.checkpoint_interval_s:
                    outputs.checkpoint()
                    last_checkpoint_s = time.monotonic()

    def _bytes_left(self) -> int:
        return sum(entry.size_bytes for entry in self.inputs[self._state.position.input :])

    def _refuse_rejects(self, chunk: EncodedChunk) -> None:
        if self.settings.on_bad_record == "error" and chunk.rejects:
            reject = min(chunk.rejects, key=lambda reject: reject.number)
            raise UserError(
                f"{chunk.source_file}:{reject.number + 1}: {reject.detail}; correct the record; "
                f"{name_of_command('preprocess')} --on-bad-record skip leaves such records out"
            )

    def _refuse_mixed_modes(self) -> None:
        """Refuse to resume with --on-bad-record error if records have been skipped."""
        if self.settings.on_bad_record == "error" and self._state.num_rejected:
            raise UserError(
                f"{self.workspace.path}: cannot resume with --on-bad-record error: "
                f"{self._state.num_rejected} records have been skipped"
            )

    def _refuse_changed_inputs(self) -> None:
        for entry in self.inputs:
            if not entry.is_hub and find_inputs([entry.name]) != [entry]:
                self.workspace.remove()
                raise UserError(f"{entry.name}: changed while it was read; begin again")


def _encode_settings(settings: PreprocessSettings, tokenizer: Tokenizer) -> EncodeSettings:
    return EncodeSettings(
        documents=DocumentSettings(
            json_keys=settings.json_keys,
            metadata_keys=settings.metadata_keys,
            max_record_bytes=settings.max_record_bytes,
            vocab_size=tokenizer.vocab_size,
            pretokenized=settings.pretokenized,
        ),
        dtype=token_dtype(tokenizer.vocab_size),
        around=tokenizer.around,
        eod_id=tokenizer.eod_id if settings.append_eod else None,
    )
