"""Methods outside the package: `policy.name package.module:Class`, imported as Python does.

A module is looked for in the working directory first, then in PYTHONPATH and among the installed
packages, however a command was started. `python -m` and `torchrun -m` have the working directory in
`sys.path`; an installed command and `python tools/plan.py` have not, so it is added. `python -P`
and PYTHONSAFEPATH leave it out. The class is checked in weighting/plugin_checks.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_dwm.config.errors import UserError

_NAME = r"[^\W\d]\w*"
_PATH = re.compile(rf"{_NAME}(?:\.{_NAME})*:{_NAME}")


def is_plugin(name: str) -> bool:
    """True if `name` has the form `package.module:Class`."""
    return _PATH.fullmatch(name) is not None


def import_plugin(name: str) -> Any:
    """Returns what `package.module:Class` names.

    Raises UserError if there is no such module or attribute, and for an exception in the import,
    with the last line of the user's own code that led to it.
    """
    path, _, attribute = name.partition(":")
    module = _import(name, path)
    try:
        return getattr(module, attribute)
    except AttributeError:
        own = [each for each, value in vars(module).items() if _is_own_class(value, module)]
        raise UserError(
            f"policy.name {name}: {module.__file__ or path} has no {attribute}; its classes are "
            f"{', '.join(own) or 'none'}"
        ) from None


def source_of_plugin(name: str) -> Path | None:
    """Returns the file of the imported module of `package.module:Class`, if it has one."""
    file = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
    return None if file is None else Path(file)


def _import(name: str, path: str) -> ModuleType:
    _look_in_working_directory()
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{path}.".startswith(f"{error.name}."):
            raise UserError(
                f"policy.name {name}: found no module {error.name}; install it, start in the "
                "directory that holds it, or name that directory in PYTHONPATH"
            ) from error
        raise UserError(_failure(name, path, error)) from error
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        raise UserError(_failure(name, path, error)) from error


def _look_in_working_directory() -> None:
    is_safe_path = getattr(sys.flags, "safe_path", False)  # Python 3.11 brought it
    here = str(Path.cwd())
    if not is_safe_path and here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)


def _failure(name: str, path: str, error: BaseException) -> str:
    text = f"policy.name {name}: importing {path} failed{_where(path, error)}: "
    said = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{text}{type(error).__name__}: {' '.join(said.split())}"


def _where(path: str, error: BaseException) -> str:
    """Returns the last line of the user's module or package that the traceback went through."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" at {error.filename} line {error.lineno}"
    spec = importlib.util.find_spec(path.partition(".")[0])
    if spec is None:
        return ""
    places = list(spec.submodule_search_locations or [spec.origin or ""])
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if any(_is_inside(f.filename, place) for place in places)]
    return f" at {own[-1].filename} line {own[-1].lineno}" if own else ""


def _is_inside(file: str, place: str) -> bool:
    return bool(place) and (file == place or Path(place) in Path(file).parents)


def _is_own_class(value: object, module: ModuleType) -> bool:
    return isinstance(value, type) and value.__module__ == module.__name__
