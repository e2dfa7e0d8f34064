"""Corpora to indexed datasets with their sidecars: the whole of `tools/preprocess_data.py`.

Reading is sequential, encoding parallel, writing sequential and in input order, so the output does
not depend on the number of workers. Memory: some batches of records, one row group of each sidecar,
and the lengths of all documents.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_dwm.config.errors import UserError
from megatron_dwm.preprocess.encoding import EncodeSettings, token_dtype
from megatron_dwm.preprocess.progress import progress_over
from megatron_dwm.preprocess.readers import check_inputs, read_batches
from megatron_dwm.preprocess.records import EncodedBatch, EncodedDocument, RecordBatch, Reject
from megatron_dwm.preprocess.rejects import RejectsFile
from megatron_dwm.preprocess.sidecar import OWN_COLUMNS, Sidecar
from megatron_dwm.preprocess.staging import StagedFiles
from megatron_dwm.preprocess.workers import encode_all
from megatron_dwm.preprocess.writer import DatasetCounts, IndexedWriter
from megatron_dwm.tokenizer import Tokenizer, build_tokenizer


@dataclass(frozen=True, kw_only=True)
class PreprocessSettings:
    """What the user asks for; fields are the options of `tools/preprocess_data.py`."""

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer_type: str
    tokenizer_model: str
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    num_workers: int = 1
    metadata_keys: tuple[str, ...] = ()
    on_bad_record: Literal["error", "skip"] = "error"

    @property
    def encoding(self) -> EncodeSettings:
        """The part that workers need."""
        return EncodeSettings(
            tokenizer_kind=self.tokenizer_type,
            tokenizer_model=self.tokenizer_model,
            json_keys=self.json_keys,
            metadata_keys=self.metadata_keys,
            append_eod=self.append_eod,
        )


@dataclass(frozen=True, kw_only=True)
class OutputPaths:
    """Where one JSON key's dataset goes."""

    sidecar: Path
    bin: Path
    idx: Path

    @staticmethod
    def of(output_prefix: str, key: str) -> OutputPaths:
        """Megatron-LM's names: PREFIX_KEY_document.bin and .idx."""
        stem = f"{output_prefix}_{key}_document"
        return OutputPaths(
            sidecar=Path(stem + ".meta.parquet"), bin=Path(stem + ".bin"), idx=Path(stem + ".idx")
        )


@dataclass(frozen=True, kw_only=True)
class PreprocessSummary:
    """What became of the records; for every key: records = documents + empty + rejected."""

    records: int
    rejected: int
    rejects_path: Path
    datasets: dict[str, DatasetCounts]


def preprocess(settings: PreprocessSettings) -> PreprocessSummary:
    """Write one dataset for each JSON key and say what became of the records.

    Raises `UserError`, having left nothing behind, for a missing or damaged input, an unusable
    tokenizer, an output that exists, a bad record (unless they are to be skipped), a key that no
    record has, and a corpus without a single token.
    """
    _check_keys(settings)
    check_inputs(settings.inputs)
    tokenizer = build_tokenizer(settings.tokenizer_type, settings.tokenizer_model)
    paths = {key: OutputPaths.of(settings.output_prefix, key) for key in settings.json_keys}
    rejects_path = Path(f"{settings.output_prefix}.rejects.jsonl")
    # The .idx files last: where one is there, its companions are complete.
    order = [p.sidecar for p in paths.values()] + [p.bin for p in paths.values()]
    order += [rejects_path] + [p.idx for p in paths.values()]
    with StagedFiles(order) as staged, ExitStack() as stack:
        rejects = RejectsFile(staged.partial(rejects_path))
        stack.callback(rejects.close)
        run = _Run(settings, tokenizer, paths, rejects, staged, stack)
        run.consume()
        run.finish()
        staged.publish()
    return PreprocessSummary(
        records=run.num_read,
        rejected=rejects.count,
        rejects_path=rejects_path,
        datasets={key: writer.counts for key, writer in run.writers.items()},
    )


class _Run:
    """Open writers of one call of `preprocess`."""

    def __init__(
        self,
        settings: PreprocessSettings,
        tokenizer: Tokenizer,
        paths: dict[str, OutputPaths],
        rejects: RejectsFile,
        staged: StagedFiles,
        stack: ExitStack,
    ) -> None:
        self._settings = settings
        self._paths = paths
        self._staged = staged
        self._rejects = rejects
        self.num_read = 0
        self._key_seen = [False] * len(settings.metadata_keys)
        self.writers: dict[str, IndexedWriter] = {}
        self._sidecars: dict[str, Sidecar] = {}
        facts = _facts(tokenizer, settings)
        dtype = token_dtype(tokenizer.vocab_size)
        for key, path in paths.items():
            self.writers[key] = IndexedWriter(staged.partial(path.bin), dtype)
            stack.callback(self.writers[key].close)
            sidecar = Sidecar(staged.partial(path.sidecar), settings.metadata_keys, facts)
            self._sidecars[key] = sidecar
            stack.callback(sidecar.close)

    def consume(self) -> None:
        """Read, encode and write everything."""
        settings = self._settings
        total_bytes = sum(Path(path).stat().st_size for path in settings.inputs)
        batches = self._counted(read_batches(settings.inputs))
        encoded = encode_all(settings.encoding, batches, num_workers=settings.num_workers)
        # Closed at once, so that an error does not wait for workers that go on tokenizing.
        with closing(encoded), progress_over(total_bytes) as progress:
            for batch in encoded:
                self._write(batch)
                progress.advance(batch.consumed_bytes, len(batch.results))

    def finish(self) -> None:
        """Check the totals and complete the files under their temporary names."""
        for key, writer in self.writers.items():
            counts = writer.counts
            assert self.num_read == counts.documents + counts.empty + self._rejects.count
            if counts.tokens == 0:
                raise UserError(self._why_nothing(key))
        for key, seen in zip(self._settings.metadata_keys, self._key_seen, strict=True):
            if not seen:
                raise UserError(f"--metadata-keys {key}: no record has this key")
        for key, writer in self.writers.items():
            writer.finish(self._staged.partial(self._paths[key].idx))
            self._sidecars[key].finish()
        self._rejects.close()

    def _counted(self, batches: Iterable[RecordBatch]) -> Iterable[RecordBatch]:
        for batch in batches:
            self.num_read += len(batch.payloads)
            yield batch

    def _write(self, batch: EncodedBatch) -> None:
        for result in batch.results:
            if isinstance(result, Reject):
                self._reject(batch.source_file, result)
            else:
                self._add(batch.source_file, result)

    def _add(self, source_file: str, document: EncodedDocument) -> None:
        for i, missing in enumerate(document.missing):
            self._key_seen[i] |= not missing
        for key, ids in zip(self._settings.json_keys, document.ids, strict=True):
            self.writers[key].add(ids)
            self._sidecars[key].add(source_file, document.number, len(ids), document.metadata)

    def _reject(self, source_file: str, reject: Reject) -> None:
        if self._settings.on_bad_record == "error":
            raise UserError(
                f"{source_file}:{reject.number + 1}: {reject.reason}; mend the record, or pass "
                "--on-bad-record skip to leave such records out"
            )
        self._rejects.add(source_file, reject)

    def _why_nothing(self, key: str) -> str:
        where = ", ".join(self._settings.inputs)
        if self._rejects.count == self.num_read > 0:
            return f"all {self.num_read} records were rejected; the first: {self._rejects.first}"
        return f'{where}: no document with any text under "{key}"; nothing to write'


def _facts(tokenizer: Tokenizer, settings: PreprocessSettings) -> dict[str, str]:
    """What a trainer has to check before it reads the ids (schema metadata of the sidecar)."""
    return {
        "tokenizer_kind": tokenizer.kind,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": str(tokenizer.vocab_size),
        "append_eod": str(settings.append_eod).lower(),
    }


def _check_keys(settings: PreprocessSettings) -> None:
    for option, keys in (
        ("--json-keys", settings.json_keys),
        ("--metadata-keys", settings.metadata_keys),
    ):
        if len(set(keys)) != len(keys):
            raise UserError(f"{option}: a key is named twice: {' '.join(keys)}")
    for key in settings.json_keys:
        if "/" in key:
            raise UserError(f"--json-keys {key}: a key names output files and cannot hold a slash")
    for key in settings.metadata_keys:
        if key in OWN_COLUMNS:
            raise UserError(f"--metadata-keys {key}: the sidecar has a column of its own so named")
