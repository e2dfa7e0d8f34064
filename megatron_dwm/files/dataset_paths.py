"""The files of one indexed dataset, by its prefix."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SIDECAR_SUFFIX = ".meta.parquet"


@dataclass(frozen=True, kw_only=True)
class DatasetPaths:
    """Paths of the files that share a prefix."""

    bin: Path
    """token ids"""
    idx: Path
    """lengths, offsets and document borders (index_format.py)"""
    sidecar: Path
    """metadata of the documents (sidecar_format.py); a dataset may lack it"""

    @staticmethod
    def of(prefix: str) -> DatasetPaths:
        """The paths of the dataset with this prefix."""
        return DatasetPaths(
            bin=Path(f"{prefix}.bin"),
            idx=Path(f"{prefix}.idx"),
            sidecar=Path(f"{prefix}{SIDECAR_SUFFIX}"),
        )

    @staticmethod
    def of_key(output_prefix: str, key: str) -> DatasetPaths:
        """The paths of one JSON key's dataset, named as Megatron-LM's tool names it.

        >>> str(DatasetPaths.of_key("data/my", "text").idx)
        'data/my_text_document.idx'
        """
        return DatasetPaths.of(f"{output_prefix}_{key}_document")
