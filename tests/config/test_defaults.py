"""Defaults that follow from other keys are written out when a configuration is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_dwm.config import Config, PolicyConfig, TrainingConfig, ValidationConfig
from megatron_dwm.config.load import config_text, load_config, save_config

DWM = ["--policy.name", "dwm"]
ONLINE = [*DWM, "--weighting.mode", "online"]


@pytest.mark.parametrize(
    ("arguments", "update_on", "across_samples", "passages"),
    [
        (DWM, "fresh", True, 34),
        (ONLINE, "ahead", True, 9),
        ([*ONLINE, "--weighting.encoder", "llm"], "ahead", False, 9),
        ([*ONLINE, "--weighting.update_on", "training"], "training", True, 34),
        ([*ONLINE, "--bilevel.estimator", "finite_difference"], "fresh", True, 34),
        ([*ONLINE, "--validation.batch_size", "5"], "ahead", True, 5),
        ([*ONLINE, "--weighting.across_samples", "false"], "ahead", False, 9),
    ],
    ids=str,
)
def test_what_empty_keys_stand_for(
    arguments: list[str], update_on: str, across_samples: bool, passages: int
) -> None:
    config = load_config([*arguments, "--training.global_batch_size", "34"])
    assert config.weighting.update_on == update_on
    assert config.weighting.across_samples is across_samples
    assert config.passages == passages
    written = yaml.safe_load(config_text(config))["weighting"]
    assert (written["update_on"], written["across_samples"]) == (update_on, across_samples)


def test_a_method_that_learns_from_no_alignments_reads_whole_validation_batches() -> None:
    arguments = ["--policy.name", "similarity", "--weighting.mode", "online"]
    assert load_config([*arguments, "--training.global_batch_size", "34"]).passages == 34


def test_what_is_loaded_again_stays(tmp_path: Path) -> None:
    config = load_config([*ONLINE, "--weighting.encoder", "llm"])
    file = tmp_path / "config.yaml"
    file.write_text(config_text(config))
    assert load_config([str(file)]) == config


def test_a_configuration_in_code_has_the_same_values() -> None:
    config = Config(
        policy=PolicyConfig(name="dwm"),
        training=TrainingConfig(global_batch_size=34),
        validation=ValidationConfig(batch_size=None),
    )
    assert config.update_on == "fresh" and config.weighting.attends_across_samples
    assert config.passages == 34


@pytest.mark.parametrize("key", ["update_on", "across_samples"])
def test_a_run_s_own_file_without_a_key_is_of_an_earlier_version(tmp_path: Path, key: str) -> None:
    arguments = [*ONLINE, "--weighting.encoder", "llm", "--run.dir", str(tmp_path)]
    earlier = ["--weighting.update_on", "fresh", "--weighting.across_samples", "true"]
    content = yaml.safe_load(config_text(load_config([*arguments, *earlier])))
    del content["weighting"][key]
    own, elsewhere = tmp_path / "config.yaml", tmp_path / "mine.yaml"
    for file in (own, elsewhere):
        file.write_text(yaml.safe_dump(content))
    before = {"update_on": "fresh", "across_samples": True}[key]
    now = {"update_on": "ahead", "across_samples": False}[key]
    assert getattr(load_config([str(own)]).weighting, key) == before
    assert getattr(load_config([str(elsewhere)]).weighting, key) == now
    typed = load_config([str(own), f"--weighting.{key}", str(now).lower()])
    assert getattr(typed.weighting, key) == now


def test_a_runs_configuration_may_follow_the_option(tmp_path: Path) -> None:
    """As --help says; it has a section with the paths as they were typed."""
    path = tmp_path / "config.yaml"
    config = load_config(["--data.train", "a", "--training.steps", "7"])
    save_config(config, path, {"data.train": ["a"]})
    for words in (
        ["--config", str(path)],
        [f"--config={path}"],
        [str(path), "--config", str(path)],
    ):
        assert load_config(words).training.steps == 7
