"""Whole runs of models in the shapes of Qwen3 and Qwen2, whose weights are learned."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.run.test_runs import LAYOUT_TOLERANCE
from tests.small_runs.command import RESUME, metrics, without_time
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server

MODELS = {
    "qwen3": ["--model.qk_layernorm", "true", "--model.kv_channels", "24"],
    "qwen2": ["--model.add_qkv_bias", "true"],
}
DWM = ["--policy.name", "dwm", "--weighting.encoder", "llm"]
UPDATES = {
    "fresh": ["--weighting.update_on", "fresh"],
    "ahead": ["--weighting.update_on", "ahead"],
}
LAYOUTS = {
    "tensor 2": ["--parallel.tensor", "2"],
    "tensor 2, sequence parallel": ["--parallel.tensor", "2", "--parallel.sequence", "true"],
    "pipeline 2": ["--parallel.pipeline", "2"],
}


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("model", MODELS)
def test_layouts_train_alike(
    server: Server, corpus: Corpus, tmp_path: Path, model: str, update: str
) -> None:
    arguments = [*corpus.arguments(), *DWM, *MODELS[model], *UPDATES[update]]
    server.succeed(tmp_path / "alone", arguments)
    alone = {phase: metrics(tmp_path / "alone", phase) for phase in ("train", "weighting")}
    assert alone["train"][-1]["weight_std"] > 0.0
    for name, layout in LAYOUTS.items():
        server.succeed(tmp_path / name, [*arguments, *layout], ranks=2)
        for phase, expected in alone.items():
            ours = metrics(tmp_path / name, phase)
            assert len(ours) == len(expected) > 0
            for line, other in zip(ours, expected, strict=True):
                assert abs(line["loss"] - other["loss"]) < LAYOUT_TOLERANCE, (name, phase, line)


@pytest.mark.parametrize("model", MODELS)
def test_a_run_goes_on_under_another_layout(
    server: Server, corpus: Corpus, tmp_path: Path, model: str
) -> None:
    """Checkpoints have the new parameters and their moments, whole."""
    arguments = [*corpus.arguments(), *DWM, *MODELS[model]]
    arguments += ["--training.checkpoint_interval_steps", "10"]
    server.succeed(tmp_path / "whole", arguments)
    stop = {"name": "send_signal", "place": "training", "number": 15, "rank": 0, "call": 10}
    moved = tmp_path / "moved"
    server.succeed(moved, [*arguments, *LAYOUTS["tensor 2"]], ranks=2, fault=stop)
    assert len(metrics(moved, "train")) < 20
    server.succeed(moved, [*arguments, *RESUME], ranks=1)
    pairs = zip(metrics(moved, "train"), metrics(tmp_path / "whole", "train"), strict=True)
    for line, other in pairs:
        assert abs(line["loss"] - other["loss"]) < LAYOUT_TOLERANCE, line["step"]


def test_defaults_are_a_model_without_them(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    without = ["--model.qk_layernorm", "false", "--model.add_qkv_bias", "false"]
    without += ["--model.kv_channels", "16"]
    for name, options in (("plain", []), ("named", without)):
        server.succeed(tmp_path / name, [*corpus.arguments(), *DWM, *options])
    assert without_time(tmp_path / "plain") == without_time(tmp_path / "named")
