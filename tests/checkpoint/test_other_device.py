"""A checkpoint whose tensors were saved from a GPU, on a rank that has another device or none."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_dwm.checkpoint.manifest import (
    list_checkpoints,
    read_manifest,
    record_file,
    write_manifest,
)
from megatron_dwm.checkpoint.names import TRAINING_FILE
from tests.small_runs.forked import Server


@pytest.mark.skipif(torch.cuda.is_available(), reason="the first GPU is there")
def test_the_state_of_a_method_comes_back_on_this_rank(
    server: Server,
    stopped: tuple[Path, list[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file says of every tensor that it was on the first GPU, as the main process saves it."""
    shutil.copytree(stopped[0], tmp_path / "run")
    checkpoint = list_checkpoints(tmp_path / "run")[-1]
    file = checkpoint / TRAINING_FILE
    content = torch.load(file, weights_only=True)
    assert content["policy"]["model"], "the policy has a model"
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        torch.save(content, file)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(file, weights_only=True)
    manifest = read_manifest(checkpoint)
    files = {**manifest.files, TRAINING_FILE: record_file(file)}
    write_manifest(checkpoint, replace(manifest, files=files))
    server.succeed(tmp_path / "run", stopped[1])
