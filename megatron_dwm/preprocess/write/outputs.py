"""The growing files of a run, their checkpoints, and the files that are made of them at the end.

Each JSON key has the ids (`.bin`) and the signed lengths of its documents (index_writer.py). All
keys together have the draft of the sidecar (Arrow, a new file after every checkpoint) and the
rejects. Memory does not grow with the number of documents.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from megatron_dwm.files.atomic import sync
from megatron_dwm.files.index_format import TokenType, read_numbers
from megatron_dwm.preprocess.encode.encoder import LostRecords, draft_columns
from megatron_dwm.preprocess.encode.metadata import join_kinds
from megatron_dwm.preprocess.records import EncodedChunk, EncodedKey, Reject
from megatron_dwm.preprocess.write.index_writer import tokens_of_documents, write_index
from megatron_dwm.preprocess.write.sidecar import SidecarColumns, write_sidecar
from megatron_dwm.preprocess.write.workspace import KeyCounts, Workspace

REJECTS = "rejects.jsonl"


def draft_schema(num_metadata: int) -> pa.Schema:
    """Schema of the sidecar's draft."""
    record, *metadata = draft_columns(num_metadata)
    own = [("input", pa.int32()), (record, pa.int64())]
    return pa.schema([*own, *((name, pa.string()) for name in metadata)])


class GrowingOutputs:
    """The open files of one run, cut to the lengths of its last checkpoint."""

    def __init__(
        self,
        workspace: Workspace,
        json_keys: Sequence[str],
        num_metadata: int,
        dtype: TokenType,
    ) -> None:
        self._workspace = workspace
        self._keys = tuple(json_keys)
        self._dtype = dtype
        self._schema = draft_schema(num_metadata)
        state = workspace.state
        state.keys = state.keys or {key: KeyCounts() for key in self._keys}
        state.kinds = state.kinds or ["none"] * num_metadata
        state.metadata_seen = state.metadata_seen or [False] * num_metadata
        names = [REJECTS]
        for i in range(len(self._keys)):
            names += [_ids_name(i), _lengths_name(i)]
        self._files = {name: self._open(name) for name in names}
        for late in workspace.path.glob("draft-*"):
            if late not in self._segments():
                late.unlink()
        self._draft_file: BinaryIO | None = None
        self._draft: pa.ipc.RecordBatchStreamWriter | None = None

    def add(self, chunk: EncodedChunk) -> None:
        """Append the documents and rejects of `chunk`."""
        state = self._workspace.state
        for i, encoded in enumerate(chunk.keys):
            self._files[_ids_name(i)].write(encoded.ids.data)
            self._files[_lengths_name(i)].write(encoded.signed_lengths.data)
            _count(state.keys[self._keys[i]], encoded)
        if chunk.rows.num_rows:
            sources = pa.array(np.full(chunk.rows.num_rows, chunk.source, np.int32))
            batch = pa.record_batch([sources, *chunk.rows.columns], schema=self._schema)
            self._open_draft().write_batch(batch)
        for reject in chunk.rejects:
            self._add_reject(chunk.source_file, reject)
        state.records += chunk.num_records
        pairs = zip(state.kinds, chunk.kinds, strict=True)
        state.kinds = [join_kinds(a, b) for a, b in pairs]
        seen = zip(state.metadata_seen, chunk.metadata_seen, strict=True)
        state.metadata_seen = [a or b for a, b in seen]
        state.position = chunk.end

    def checkpoint(self) -> None:
        """Force everything to the disk and write the checkpoint that says how long each file is."""
        self._close_draft()
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            self._workspace.state.file_bytes[name] = file.tell()
        self._workspace.save()

    def check_counts(self) -> None:
        """Check that every record is written, empty or rejected. Raises `LostRecords`."""
        state = self._workspace.state
        itemsize = np.dtype(self._dtype).itemsize
        for i, key in enumerate(self._keys):
            counts = state.keys[key]
            accounted = counts.documents + counts.empty + state.num_rejected
            sizes = (self._files[_lengths_name(i)].tell(), self._files[_ids_name(i)].tell())
            num_lengths = counts.documents + counts.empty + counts.continued
            expected = (4 * num_lengths, itemsize * counts.tokens)
            if state.records != accounted or sizes != expected:
                raise LostRecords(
                    f'"{key}": {state.records} records, but {accounted} are accounted for; '
                    f"files of {sizes} bytes, expected {expected}"
                )

    def finish(self, columns: SidecarColumns) -> None:
        """Write index and sidecar of each key in the workspace, and force them to the disk."""
        for i in range(len(self._keys)):
            lengths_path = self._workspace.file(_lengths_name(i))

            def signed_lengths(path: Path = lengths_path) -> Iterator[np.ndarray]:
                with path.open("rb") as file:
                    yield from read_numbers(file, 0, np.int32, path.stat().st_size // 4)

            index = self._workspace.file(f"{i}.idx")
            write_index(index, self._dtype, signed_lengths)
            sidecar = self._workspace.file(f"{i}.meta.parquet")
            write_sidecar(sidecar, columns, self._drafts(), tokens_of_documents(signed_lengths()))
            for path in (index, sidecar):
                sync(path)

    def close(self) -> None:
        """Close all files; what is after the last checkpoint may be lost (a full disk)."""
        files = [*self._files.values(), *([self._draft_file] if self._draft_file else [])]
        for file in files:
            with contextlib.suppress(OSError):
                file.close()

    def _open(self, name: str) -> BinaryIO:
        """Open a file at its end, cut to the length that the checkpoint says."""
        path = self._workspace.file(name)
        file = path.open("r+b" if path.exists() else "w+b")
        file.truncate(self._workspace.state.file_bytes.get(name, 0))
        file.seek(0, os.SEEK_END)
        return file

    def _open_draft(self) -> pa.ipc.RecordBatchStreamWriter:
        if self._draft is None:
            name = f"draft-{self._workspace.state.segments:06d}.arrow"
            self._draft_file = self._workspace.file(name).open("wb")
            self._draft = pa.ipc.new_stream(self._draft_file, self._schema)
        return self._draft

    def _close_draft(self) -> None:
        if self._draft is not None and self._draft_file is not None:
            self._draft.close()
            self._draft_file.flush()
            os.fsync(self._draft_file.fileno())
            self._draft_file.close()
            self._draft = self._draft_file = None
            self._workspace.state.segments += 1

    def _segments(self) -> list[Path]:
        count = self._workspace.state.segments
        return [self._workspace.file(f"draft-{i:06d}.arrow") for i in range(count)]

    def _drafts(self) -> Iterator[pa.RecordBatch]:
        for path in self._segments():
            with path.open("rb") as file, pa.ipc.open_stream(file) as reader:
                yield from reader

    def _add_reject(self, source_file: str, reject: Reject) -> None:
        state = self._workspace.state
        if not state.first_reject:
            state.first_reject = f"{source_file}:{reject.number + 1}: {reject.detail}"
        state.rejected[reject.reason] = state.rejected.get(reject.reason, 0) + 1
        row = {
            "file": source_file,
            "line": reject.number + 1,
            "reason": reject.reason,
            "detail": reject.detail,
            "first_bytes": reject.payload.decode("utf-8", "backslashreplace"),
        }
        self._files[REJECTS].write(json.dumps(row).encode() + b"\n")


def _count(counts: KeyCounts, encoded: EncodedKey) -> None:
    counts.documents += int(np.count_nonzero(encoded.signed_lengths > 0))
    counts.empty += int(np.count_nonzero(encoded.signed_lengths == 0))
    counts.continued += int(np.count_nonzero(encoded.signed_lengths < 0))
    counts.tokens += len(encoded.ids)


def _ids_name(key_index: int) -> str:
    return f"{key_index}.bin"


def _lengths_name(key_index: int) -> str:
    return f"{key_index}.lengths"
