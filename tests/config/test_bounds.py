"""Every number of a configuration has bounds; what lies outside is one line that names the key."""

from __future__ import annotations

import dataclasses
import math
import typing

import pytest

from megatron_dwm.config import Config, UserError
from megatron_dwm.config.bounds import BOUNDS, number_problems
from megatron_dwm.config.load import load_config


def _numbers() -> dict[str, bool]:
    """Every key of the schema that is a number; whether it may have a fraction."""
    found = {}
    for section, kind in typing.get_type_hints(Config).items():
        for name, hint in typing.get_type_hints(kind).items():
            kinds = {hint, *typing.get_args(hint)} & {int, float}
            if kinds and typing.get_origin(hint) is not list:
                found[f"{section}.{name}"] = float in kinds
    return found


NUMBERS = _numbers()


def _problems(key: str, value: float) -> list[str]:
    section, name = key.split(".")
    changed = dataclasses.replace(getattr(Config(), section), **{name: value})
    return list(number_problems(dataclasses.replace(Config(), **{section: changed})))


def test_every_number_has_bounds() -> None:
    assert set(BOUNDS) == set(NUMBERS) and len(NUMBERS) > 50
    assert list(number_problems(Config())) == []


@pytest.mark.parametrize("key", NUMBERS)
def test_what_no_run_can_use_is_one_line(key: str) -> None:
    bad: list[float] = [-1, -(10**30), 10**31]
    if NUMBERS[key]:
        bad = [-1e-30, -1.0, -1e38, 1e38, math.nan, math.inf, -math.inf, 1e308]
    for value in bad:
        [text] = _problems(key, value)
        assert text.startswith(f"{key}: expected ") and text.endswith(f"got {value}")
        assert "\n" not in text and len(text) < 140


@pytest.mark.parametrize("key", NUMBERS)
def test_the_ends_are_as_they_are_said(key: str) -> None:
    bounds = BOUNDS[key]
    for end, is_open, outward in (
        (bounds.low, bounds.low_is_open, -math.inf),
        (bounds.high, bounds.high_is_open, math.inf),
    ):
        step = math.nextafter if NUMBERS[key] else lambda value, to: value + (1 if to > 0 else -1)
        inner = step(end, -outward) if is_open else end
        outer = end if is_open else step(end, outward)
        assert _problems(key, inner) == [] and len(_problems(key, outer)) == 1
        said = _problems(key, outer)[0]
        assert f"{end}" in said or f"{end:g}" in said, said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.seed", "-1"),
        ("run.seed", str(2**64)),
        ("weighting.learning_rate", "1e38"),
        ("training.learning_rate", "nan"),
        ("training.learning_rate", ".nan"),
        ("training.steps", "0"),
        ("model.num_attention_heads", "0"),
        ("training.adam_epsilon", "1e-300"),
        ("policy.domain_temperature", "1e-300"),
        ("parallel.timeout_s", str(10**18)),
    ],
)
def test_loading_refuses(key: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"(?i)^{key}: expected [^\n]* got [^\n]*$"):
        load_config([f"--{key}={value}"])
