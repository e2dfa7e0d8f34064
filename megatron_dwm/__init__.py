"""Pretraining on Megatron-Core with a learned weight for every sample."""

from __future__ import annotations

from typing import Any

__version__ = "0.2.0"

# Also imported from here, when they are asked for: this file is read by every command, --help too.
_LIBRARY = ("MegatronProbe", "ModuleProbe", "SampleAlignments")
__all__ = ["__version__", *_LIBRARY]


def __getattr__(name: str) -> Any:
    if name not in _LIBRARY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_dwm import library

    return getattr(library, name)
