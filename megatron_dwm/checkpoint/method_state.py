"""What the state of a method may consist of, so that every checkpoint can be loaded again.

Loading runs no code from a file, so it takes only data. Saving would also take other objects.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Size, Tensor

from megatron_dwm.config import UserError

_PLAIN = (type(None), bool, int, float, str, bytes, Tensor)


def require_loadable(name: str, state: dict[str, Any]) -> None:
    """Raise UserError for the first value in a method's `state_dict` that cannot be loaded.

    name: `policy.name`.
    """
    if (found := _other(state, "")) is not None:
        where, kind = found
        raise UserError(
            f"policy {name}: state_dict has a {kind} at {where}; a checkpoint takes tensors, "
            "numbers, text, and lists, tuples and dicts of them"
        )


def _other(value: Any, where: str) -> tuple[str, str] | None:
    """Returns where another value is, and its type; None without one."""
    entries: list[tuple[Any, Any]]
    if type(value) in (list, tuple, Size):
        entries = list(enumerate(value))
    elif type(value) in (dict, OrderedDict):  # of a module: OrderedDict
        entries = [*value.items(), *((f"the key {key!r}", key) for key in value)]
    else:
        kind = type(value)
        plain = kind in _PLAIN or isinstance(value, Tensor)
        return None if plain else (where or "the top", f"{kind.__module__}.{kind.__qualname__}")
    found = (_other(each, f"{where}[{key!r}]") for key, each in entries)
    return next((each for each in found if each is not None), None)
