"""`P.rejects.jsonl`: the records that are no documents, for `--on-bad-record skip`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TextIO

from megatron_dwm.preprocess.records import Reject

_KEPT_BYTES = 200


class RejectsFile:
    """One JSON object a line: file, line (1-based), reason, first_bytes (up to 200).

    The file comes into being with the first reject.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None
        self.count = 0
        self.first = ""

    def add(self, source_file: str, reject: Reject) -> None:
        """Append one record."""
        if self._file is None:
            self._file = self._path.open("w", encoding="utf-8")
            self.first = f"{source_file}:{reject.number + 1}: {reject.reason}"
        self.count += 1
        row = {
            "file": source_file,
            "line": reject.number + 1,
            "reason": reject.reason,
            "first_bytes": reject.payload[:_KEPT_BYTES].decode("utf-8", "backslashreplace"),
        }
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._file is not None:
            self._file.close()
