"""The package's defaults are those that the recorded runs of the study were trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples.study.study_file import read_study
from examples.study.workplace import Workplace
from megatron_dwm.config.load import load

RECORDED = Path(__file__).with_name("recorded_settings.json")
SECTIONS = ("data", "validation", "model", "training", "policy", "weighting", "bilevel")
FILES = ("train", "tokenizer", "path", "cache_dir")


def settings_of(method: str, folder: Path) -> dict[str, Any]:
    """Every key of a run of the study but files, with the values that are not given filled in."""
    place = Workplace(folder=folder, study=read_study())
    run = place.study.run("0.16M", "junk", "novels", method, 1)
    command = place.command(run, folder / "data")
    config = load(command[command.index("megatron_dwm.pretrain") + 1 :], "study").config
    return {
        f"{section}.{key}": value
        for section in SECTIONS
        for key, value in vars(getattr(config, section)).items()
        if key not in FILES
    }


@pytest.mark.parametrize("method", ["dwm_ahead", "dwm_own_staged"])
def test_defaults_are_as_recorded(method: str, tmp_path: Path) -> None:
    """A run's fingerprint has the options that the study gives, not the package's defaults.

    Where this fails, the lines of results.jsonl no longer say what the package does now. Give the
    old value in study.yaml, or remove the lines and train again; then change the record.
    """
    recorded = json.loads(RECORDED.read_text())[method]
    found = json.loads(json.dumps(settings_of(method, tmp_path)))
    assert {key: found.get(key, "removed") for key in recorded} == recorded
