"""Reads what a study trains from its YAML file; every mistake in it is one line."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from examples.study.spec import BASE, CORPORA, SELECTIONS, Method, Part, Size, Study
from megatron_dwm.config import UserError

FILE = Path(__file__).parent / "study.yaml"
_KINDS = ("sizes", "methods", "parts")
_Made = TypeVar("_Made", Size, Method, Part)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_list(of: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(of, value))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


_TYPES: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "str": (_is_text, "text"),
    "str | None": (_is_text, "text"),
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "int": (_is_count, "a whole number above 0"),
    "float": (_is_number, "a number above 0 (YAML takes 3e-3 for text; write 3.0e-3)"),
    "tuple[str, ...]": (_is_list(_is_text), "a list of names"),
    "tuple[int, ...]": (_is_list(_is_count), "a list of whole numbers above 0"),
}


def read_study(file: Path = FILE) -> Study:
    """Returns the study that a file describes.

    Raises UserError for a file that is none, a field that is unknown, missing or of another type,
    and a name that nothing describes.
    """
    found = _read(file)
    study = Study(
        sizes=_all(Size, file, found),
        methods=_all(Method, file, found),
        parts=_all(Part, file, found),
    )
    for part in study.parts.values():
        _check_part(study, part, f"{file}: part {part.name}")
    for method in study.methods.values():
        _check_method(study, method, f"{file}: method {method.name}")
    return study


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"--study {file}: {'is a folder' if file.is_dir() else 'no such file'}")
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--study {file}: no YAML: {reason}") from None
    right = isinstance(found, dict) and set(found) == set(_KINDS)
    if not right or not all(isinstance(found[kind], dict) and found[kind] for kind in _KINDS):
        raise UserError(f"--study {file}: expected sizes, methods and parts, as {FILE} has them")
    return found


def _all(kind: type[_Made], file: Path, found: Mapping[str, Any]) -> dict[str, _Made]:
    word = kind.__name__.lower()
    described = found[f"{word}s"].items()
    return {
        str(name): _made(kind, f"{file}: {word} {name}", str(name), given)
        for name, given in described
    }


def _made(kind: type[_Made], where: str, name: str, given: object) -> _Made:
    known = {field.name: field for field in fields(kind) if field.name != "name"}
    if not isinstance(given, dict):
        raise UserError(f"{where}: expected its fields, {', '.join(known)}; got {given!r}")
    for key in given:
        if key not in known:
            raise UserError(f"{where}: unknown field {key}; expected one of {', '.join(known)}")
    values = {key: _value(field, where, given) for key, field in known.items()}
    return kind(name=name, **{key: value for key, value in values.items() if value is not MISSING})


def _value(field: Field[Any], where: str, given: Mapping[str, Any]) -> Any:
    if field.name not in given:
        if field.default is MISSING:
            raise UserError(f"{where}: has no {field.name}")
        return MISSING
    value = given[field.name]
    is_right, words = _TYPES[str(field.type)]
    if not is_right(value):
        raise UserError(f"{where}: {field.name}: expected {words}, got {value!r}")
    return tuple(value) if isinstance(value, list) else value


def _check_part(study: Study, part: Part, where: str) -> None:
    for kind, names, known in (
        ("size", part.sizes, study.sizes),
        ("corpus", part.corpora, CORPORA),
        ("method", part.methods, study.methods),
    ):
        for name in names:
            if name not in known:
                raise UserError(f"{where}: no {kind} {name}; expected one of {', '.join(known)}")
    if BASE not in part.methods:
        raise UserError(f"{where}: has no method {BASE}, with which all others are compared")


def _check_method(study: Study, method: Method, where: str) -> None:
    for name in method.after:
        size, _, before = name.rpartition("/")
        if before not in study.methods or (size and size not in study.sizes):
            raise UserError(f"{where}: after: no run {name}; expected METHOD or SIZE/METHOD")
    if method.select is not None and method.select not in SELECTIONS:
        raise UserError(f"{where}: select: expected one of {', '.join(SELECTIONS)}")
    try:
        shlex.split(method.options)
    except ValueError as error:
        raise UserError(f"{where}: options: {error}") from None
