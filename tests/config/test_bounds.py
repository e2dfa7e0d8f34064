"""Every number of a configuration has a bound; what lies outside is one line that names the key."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import re
import typing

import pytest

from megatron_dwm.config import Config, UserError
from megatron_dwm.config.bounds import Bound
from megatron_dwm.config.effect import condition_text
from megatron_dwm.config.key import entries, number_problems
from megatron_dwm.config.load import exit_on_help, load_config


def _numbers() -> dict[str, bool]:
    """Every key of the schema that is a number; whether it may have a fraction."""
    found = {}
    for section, kind in typing.get_type_hints(Config).items():
        for name, hint in typing.get_type_hints(kind).items():
            kinds = {hint, *typing.get_args(hint)} & {int, float}
            if kinds and typing.get_origin(hint) not in (list, dict):
                found[f"{section}.{name}"] = float in kinds
    return found


NUMBERS = _numbers()
DICTS = ["policy.domain_weights"]
RULES = {entry.name: entry.rule for entry in entries(Config())}


def _problems(key: str, value: float) -> list[str]:
    section, name = key.split(".")
    changed = dataclasses.replace(getattr(Config(), section), **{name: value})
    return list(number_problems(dataclasses.replace(Config(), **{section: changed})))


def test_every_number_has_a_bound_and_nothing_else_has() -> None:
    assert {key for key, rule in RULES.items() if rule.bound} == {*NUMBERS, *DICTS}
    assert len(NUMBERS) > 50
    assert list(number_problems(Config())) == []


@pytest.mark.parametrize("key", NUMBERS)
def test_what_no_run_can_use_is_one_line(key: str) -> None:
    bad: list[float] = [-1, -(10**30), 10**31, 10**400]
    if NUMBERS[key]:
        bad = [-1e-30, -1.0, -1e38, 1e38, math.nan, math.inf, -math.inf, 1e308]
    for value in bad:
        [text] = _problems(key, value)
        assert text.startswith(f"{key}: expected a number ") and text.endswith(f"got {value}")
        assert "\n" not in text


@pytest.mark.parametrize("key", NUMBERS)
def test_both_sides_of_each_end(key: str) -> None:
    bound = RULES[key].bound
    assert bound is not None and bound.low is not None and bound.high is not None
    for end, is_open, outward in (
        (bound.low, bound.low_open, -math.inf),
        (bound.high, bound.high_open, math.inf),
    ):
        step = math.nextafter if NUMBERS[key] else lambda value, to: value + (1 if to > 0 else -1)
        inner = step(end, -outward) if is_open else end
        outer = end if is_open else step(end, outward)
        assert _problems(key, inner) == [] and len(_problems(key, outer)) == 1
        said = _problems(key, outer)[0].replace(",", "")
        assert f"{end}" in said or f"{end:g}" in said, said
    assert (_problems(key, 0) == []) == (bound.or_zero or bound.low < 0 or bound.allows(0))


@pytest.mark.parametrize(
    ("bound", "text", "inside", "outside"),
    [
        (Bound(low=0, low_open=True), "above 0", [1e-300, 1e300], [0, -1, math.inf, math.nan]),
        (Bound(low=0), "0 or more", [0, 10**400], [-1e-300, math.inf, math.nan]),
        (Bound(low=0, high=1, high_open=True), "from 0 to below 1", [0, 0.99], [1, -0.1]),
        (Bound(low=0, high=1, low_open=True), "above 0, at most 1", [1e-9, 1], [0, 1.01]),
        (Bound(low=1, high=10**6), "from 1 to 1,000,000", [1, 10**6], [0, 10**6 + 1]),
        (Bound(low=1, low_open=True, or_zero=True), "above 1, or 0", [0, 1.5], [1, 0.5, -1]),
        (Bound(high=3), "at most 3", [3, -9e9], [3.1, -math.inf]),
        (Bound(), "finite", [0, -1e300], [math.nan, math.inf, -math.inf]),
    ],
    ids=lambda value: str(value) if isinstance(value, (str, Bound)) else "",
)
def test_a_bound_says_what_it_holds(
    bound: Bound, text: str, inside: list[float], outside: list[float]
) -> None:
    assert str(bound) == text
    assert all(bound.allows(value) for value in inside)
    assert not any(bound.allows(value) for value in outside)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.seed", "-1"),
        ("run.seed", str(2**64)),
        ("weighting.learning_rate", "1e38"),
        ("training.learning_rate", "nan"),
        ("training.learning_rate", ".nan"),
        ("training.steps", "0"),
        ("training.spike_factor", "0.9"),
        ("model.num_attention_heads", "0"),
        ("training.adam_epsilon", "1e-300"),
        ("policy.domain_temperature", "1e-300"),
        ("parallel.timeout_s", str(10**18)),
    ],
)
def test_loading_refuses(key: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"(?i)^{key}: expected [^\n]* got [^\n]*$"):
        load_config([f"--{key}={value}"])


def test_help_says_every_bound_and_what_a_key_needs() -> None:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as left:
        exit_on_help("prog", ["--help"])
    assert left.value.code == 0
    text = re.sub(r"\s+", " ", output.getvalue())
    for key, rule in RULES.items():
        said = re.split(r" --(?=[a-z]+\.[a-z0-9_]+ )", text.split(f" --{key} ")[1])[0]
        assert rule.bound is None or str(rule.bound) in said, said
        assert not rule.only or f"needs {condition_text(rule.only)}]" in said, said
