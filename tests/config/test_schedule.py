"""The shares by step as users write them: read, kept in config.yaml, and refused in one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest

from megatron_dwm.config import Config, DataConfig, TrainingConfig, UserError
from megatron_dwm.config.effect import warnings_of_effect
from megatron_dwm.config.load import load, load_config, save_config
from megatron_dwm.config.validate_schedule import schedule_problems

TWO = ["--data.train", "a", "b"]
POINTS = {0: [0.9, 0.1], 800: [1.0, 3.0]}
FILE = """
data:
  train: [a, b]
  schedule:
    0: [0.9, 0.1]
    800: [1, 3]
  schedule_interpolation: linear
"""


def problems(
    schedule: dict[int, list[float]],
    interpolation: Literal["constant", "linear"] = "constant",
    train: Sequence[str | float] = ("a", "b"),
) -> list[str]:
    data = DataConfig(train=list(train), schedule=schedule, schedule_interpolation=interpolation)
    return list(schedule_problems(Config(data=data, training=TrainingConfig(steps=1000))))


def refused_in_file(folder: Path, text: str) -> str:
    file = folder / "config.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config([str(file)])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_and_the_command_line_read_alike_and_again(tmp_path: Path) -> None:
    """As typed, as a file, and from the config.yaml of a run, with typed paths and without."""
    (tmp_path / "typed.yaml").write_text(FILE)
    typed = load_config([str(tmp_path / "typed.yaml")])
    line = ["--data.schedule", "0=0.9,0.1", "800=1,3", "--data.schedule_interpolation", "linear"]
    assert typed == load_config([*TWO, *line])
    assert typed == load_config([*TWO, "--data.schedule", '{"0":[0.9,0.1],"800":[1,3]}', *line[3:]])
    assert typed.data.schedule == POINTS and list(typed.data.schedule) == [0, 800]
    for paths in (None, {"directory": "/somewhere", "data.train": ["a", "b"]}):
        save_config(typed, tmp_path / "config.yaml", paths)
        assert load_config([str(tmp_path / "config.yaml")]) == typed
    assert not problems(typed.data.schedule, "linear") and not problems({})


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            {0: [1, 2, 3]},
            "data.schedule 0: expected 2 shares, one for each prefix of data.train, got 3",
        ),
        ({0: [1, 2], 9: [1]}, "data.schedule 9: expected 2 shares, one for each prefix"),
        ({0: [1, -1]}, "data.schedule 0: expected shares from 0 to 1e+30, got -1"),
        ({0: [1, 1e31]}, "data.schedule 0: expected shares from 0 to 1e+30, got 1e+31"),
        ({0: [0, 0], 5: [1, 1]}, "data.schedule 0: expected a share above 0, got only 0"),
        (
            {0: [1, 0], 5: [2, 0]},
            "data.schedule: b has the share 0 at every point; leave it out of",
        ),
        ({5: [1, 2]}, "data.schedule: expected 0 as the first point, got 5"),
        ({-5: [1, 2], 0: [1, 2]}, "data.schedule: expected 0 as the first point, got -5"),
        ({0: [1, 2], 9: [1, 1], 5: [1, 2]}, "data.schedule: expected rising steps, got 5 after 9"),
        (
            {0: [1, 2], 1000: [2, 1]},
            "data.schedule 1000: this point is beyond the run, expected at most",
        ),
    ],
)
def test_points_that_cannot_be(schedule: dict[int, list[float]], message: str) -> None:
    first = problems(schedule)[0]
    assert first.startswith(message) and "\n" not in first


def test_the_last_point_of_a_line_may_be_the_end_of_the_run() -> None:
    assert not problems({0: [1, 2], 1000: [2, 1]}, "linear")
    [problem] = problems({0: [1, 2], 1001: [2, 1]}, "linear")
    assert "expected at most 1000 (training.steps 1000" in problem


def test_a_schedule_needs_prefixes_without_weights() -> None:
    [problem] = problems({0: [1, 2]}, train=["0.3", "a", "0.7", "b"])
    assert problem.startswith("data.schedule: expected data.train without weights")
    for same in (["a"], ["a", "a"]):
        problem = problems({0: [1, 2]}, train=same)[0]
        assert problem == "data.schedule: expected several prefixes in data.train, got 1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["0=1,x"], "expected STEP=SHARE,SHARE for different steps, got '0=1,x'"),
        (["0=1,2", "0=2,1"], "expected STEP=SHARE,SHARE for different steps, got '0=2,1'"),
        (["0.9", "0.1"], "expected STEP=SHARE,SHARE for different steps, got '0.9'"),
        (["0.5=1,2"], "data.schedule: Expected a whole number. Got value: '0.5'"),
        (["start=1,2"], "data.schedule: Expected a whole number. Got value: 'start'"),
        (["0=1,inf"], "data.schedule: Expected a float. Got value: Infinity"),
    ],
)
def test_words_that_are_no_points(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config([*TWO, "--data.schedule", *words])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_have_no_points(tmp_path: Path) -> None:
    """A step with a fraction would be rounded without a word."""
    text = refused_in_file(tmp_path, FILE.replace("800:", "800.5:"))
    assert "data.schedule: expected whole numbers of steps, got 800.5" in text
    text = refused_in_file(tmp_path, FILE.replace("800:", "later:"))
    assert "data.schedule: expected whole numbers of steps, got 'later'" in text
    text = refused_in_file(tmp_path, FILE.replace("[1, 3]", "[1, much]"))
    assert "data.schedule: Expected a float. Got value: much" in text
    text = refused_in_file(tmp_path, FILE.replace("linear", "cubic"))
    assert "data.schedule_interpolation: expected one of" in text and "cubic" in text


def test_an_interpolation_without_a_schedule_has_no_effect() -> None:
    loaded = load([*TWO, "--data.schedule_interpolation", "linear"])
    with pytest.raises(UserError, match="data.schedule_interpolation: has no effect: .* set"):
        warnings_of_effect(loaded.config, loaded.given, frozenset())
