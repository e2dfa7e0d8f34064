"""What the user asks of `tools/preprocess_data.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_dwm.config.errors import UserError
from megatron_dwm.files.sidecar_format import OWN_COLUMNS
from megatron_dwm.preprocess.read.lines import CHUNK_BYTES

MAX_RECORD_BYTES = 32 << 20
CHECKPOINT_INTERVAL_S = 30.0


@dataclass(frozen=True, kw_only=True)
class PreprocessSettings:
    """The options of `tools/preprocess_data.py`, and the size of a chunk."""

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer_type: str
    tokenizer_model: str
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    include_special_tokens: bool = True
    """True if texts get the special tokens that a tokenizer.json asks for"""
    num_workers: int = 1
    metadata_keys: tuple[str, ...] = ()
    on_bad_record: Literal["error", "skip"] = "error"
    pretokenized: bool = False
    max_record_bytes: int = MAX_RECORD_BYTES
    shard: int = 0
    num_shards: int = 1
    resume: bool = False
    checkpoint_interval_s: float = CHECKPOINT_INTERVAL_S
    chunk_bytes: int = CHUNK_BYTES

    def __post_init__(self) -> None:
        """Check the keys and numbers. Raises `UserError` for an impossible one."""
        self._check_keys()
        if self.num_workers < 1:
            raise UserError(f"--workers {self.num_workers}: at least 1 is needed")
        if self.max_record_bytes < 1:
            raise UserError(f"--max-record-bytes {self.max_record_bytes}: expected 1 or more")
        if self.num_shards < 1:
            raise UserError(f"--num-shards {self.num_shards}: expected 1 or more")
        if not 0 <= self.checkpoint_interval_s < math.inf:
            raise UserError(
                f"--checkpoint-seconds {self.checkpoint_interval_s}: expected 0 or more"
            )

    @property
    def prefix(self) -> str:
        """`output_prefix`, with the shard's number if there are several."""
        if self.num_shards == 1:
            return self.output_prefix
        return f"{self.output_prefix}-{self.shard:05d}-of-{self.num_shards:05d}"

    @property
    def columns(self) -> tuple[str, ...]:
        """Top-level columns of a table that hold the JSON keys and the metadata keys."""
        outer = [key.split(".")[0] for key in self.metadata_keys]
        return tuple(dict.fromkeys((*self.json_keys, *self.metadata_keys, *outer)))

    def _check_keys(self) -> None:
        for option, keys in (
            ("--json-keys", self.json_keys),
            ("--metadata-keys", self.metadata_keys),
        ):
            if len(set(keys)) != len(keys):
                raise UserError(f"{option}: a key is named twice: {' '.join(keys)}")
        for key in self.json_keys:
            if "/" in key:
                raise UserError(
                    f"--json-keys {key}: a key names output files and cannot hold a slash"
                )
        for key in self.metadata_keys:
            if key in OWN_COLUMNS:
                raise UserError(
                    f"--metadata-keys {key}: the sidecar has a column of its own so named"
                )
