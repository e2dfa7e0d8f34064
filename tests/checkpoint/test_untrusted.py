"""A checkpoint whose shards or index were made to do harm: one line, and nothing runs."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_dwm.checkpoint.manifest import (
    list_checkpoints,
    read_manifest,
    record_file,
    write_manifest,
)
from megatron_dwm.config import UserError
from megatron_dwm.convert.checkpoint_reader import open_checkpoint
from megatron_dwm.model.on_disk.saved_index import data_only, read_index
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server

PARAMETER = "model.embedding.word_embeddings.weight"


class _Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._command = f"touch {marker}"

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self._command,)


def _place_all(folder: Path, file: Path, names: list[str]) -> None:
    """Every tensor of the index lies in `file`, which it calls by these names in turn."""
    index, size_bytes = read_index(folder), file.stat().st_size
    places = {
        key: _StorageInfo(names[number % len(names)], 0, size_bytes)
        for number, key in enumerate(index.storage_data)
    }
    (folder / ".metadata").write_bytes(pickle.dumps(replace(index, storage_data=places)))


def _objects(folder: Path, payload: _Payload) -> None:
    torch.save(payload, folder / "payload.distcp")
    _place_all(folder, folder / "payload.distcp", ["payload.distcp"])


def _old_objects(folder: Path, payload: _Payload) -> None:
    """As torch saved before it had archives: a bare pickle."""
    torch.save(payload, folder / "old.distcp", _use_new_zipfile_serialization=False)
    _place_all(folder, folder / "old.distcp", ["old.distcp"])


def _outside(folder: Path, payload: _Payload) -> None:
    file = folder.parent / "outside.distcp"
    torch.save(payload, file)
    _place_all(folder, file, [f"../{file.name}"])


def _absolute(folder: Path, payload: _Payload) -> None:
    file = folder.parent / "outside.distcp"
    torch.save(payload, file)
    _place_all(folder, file, [str(file)])


def _cut_short(folder: Path, payload: _Payload) -> None:
    index = folder / ".metadata"
    index.write_bytes(index.read_bytes()[:-40])


def _no_places(folder: Path, payload: _Payload) -> None:
    index = replace(read_index(folder), storage_data=None)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def _no_tensors(folder: Path, payload: _Payload) -> None:
    torch.save({"a": 1}, folder / "data.distcp")
    _place_all(folder, folder / "data.distcp", ["data.distcp"])


# What is done to the folder of tensors, and what the line has to say of it.
HARMS: dict[str, tuple[Callable[[Path, _Payload], None], str]] = {
    "objects": (_objects, "it names posix.system"),
    "objects of old": (_old_objects, "it names posix.system"),
    "outside": (_outside, "points to ../outside.distcp, outside the checkpoint"),
    "absolute": (_absolute, "outside the checkpoint"),
    "cut short": (_cut_short, "truncated"),
    "no places": (_no_places, "does not say where the tensors are"),
    "no tensors": (_no_tensors, "it cannot be read; bring back a copy"),
}


@pytest.fixture(params=HARMS)
def harmed(
    request: pytest.FixtureRequest, stopped: tuple[Path, list[str], Path], tmp_path: Path
) -> tuple[Path, str]:
    """(a checkpoint whose manifest fits, as one who means harm would see to; what to say)."""
    harm, words = HARMS[request.param]
    shutil.copytree(stopped[0], tmp_path / "run")
    checkpoint = list_checkpoints(tmp_path / "run")[-1]
    harm(checkpoint / "llm", _Payload(tmp_path / "marker"))
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    records = {str(path.relative_to(checkpoint)): record_file(path) for path in files}
    del records["manifest.json"]
    write_manifest(checkpoint, replace(read_manifest(checkpoint), files=records))
    return checkpoint, words


@pytest.mark.parametrize("use", ["resume", "resume by 2", "init_from"])
def test_training_refuses_in_one_line(
    server: Server,
    corpus: Corpus,
    stopped: tuple[Path, list[str], Path],
    harmed: tuple[Path, str],
    tmp_path: Path,
    use: str,
) -> None:
    checkpoint, words = harmed
    if use == "init_from":
        init = ["--model.init_from", str(checkpoint), "--training.steps", "1"]
        job = server.run(tmp_path / "new", [*corpus.arguments(), *init])
    else:
        job = server.run(tmp_path / "run", stopped[1], ranks=2 if use.endswith("2") else 1)
    assert job.codes[0] == 2 and "Traceback" not in job.text, job.text
    assert not (tmp_path / "marker").exists()
    [line] = [line for line in job.text.splitlines() if line.startswith("error: ")]
    assert str(checkpoint) in line and words in line, line
    assert "weights_only" not in job.text, "torch's advice is to run it"


def test_a_model_without_its_common_file_is_one_line(
    server: Server, corpus: Corpus, stopped: tuple[Path, list[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(stopped[0], tmp_path / "run")
    checkpoint = list_checkpoints(tmp_path / "run")[-1]
    (checkpoint / "llm/common.pt").unlink()
    (checkpoint / "manifest.json").unlink()  # as what from-hf writes, which has none
    init = ["--model.init_from", str(checkpoint), "--training.steps", "1"]
    job = server.run(tmp_path / "new", [*corpus.arguments(), *init])
    assert job.codes == [2] and "Traceback" not in job.text, job.text
    [line] = [line for line in job.text.splitlines() if line.startswith("error: ")]
    assert f"{checkpoint / 'llm'}: it cannot be read; bring back a copy" in line


def test_tools_refuse_in_one_line(harmed: tuple[Path, str], tmp_path: Path) -> None:
    """As to-hf and generate read it."""
    checkpoint, words = harmed
    with pytest.raises(UserError) as refused:
        open_checkpoint(checkpoint).read("embedding.word_embeddings.weight")
    text = str(refused.value)
    assert words in text and "weights_only" not in text and "\n" not in text
    assert not (tmp_path / "marker").exists()


def test_the_payload_does_what_it_says(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(_Payload(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


def test_a_good_index_passes(stopped: tuple[Path, list[str], Path]) -> None:
    folder = list_checkpoints(stopped[0])[-1] / "llm"
    with data_only(folder):
        assert PARAMETER in read_index(folder).state_dict_metadata


@pytest.mark.parametrize("name", ["llm/.metadata", "llm/common.pt", "training.pt"])
@pytest.mark.parametrize("use", ["resume", "init_from"])
def test_a_harmful_checkpoint_runs_nothing(
    server: Server,
    corpus: Corpus,
    stopped: tuple[Path, list[str], Path],
    tmp_path: Path,
    name: str,
    use: str,
) -> None:
    """Its manifest fits, as one who means harm would see to."""
    if (name, use) == ("training.pt", "init_from"):
        pytest.skip("init_from does not read it")
    run_dir, marker = tmp_path / "run", tmp_path / "marker"
    shutil.copytree(stopped[0], run_dir)
    checkpoint = list_checkpoints(run_dir)[-1]
    payload = _Payload(marker)
    if name.endswith(".pt"):
        torch.save({"model": payload, "state": payload}, checkpoint / name)
    else:
        (checkpoint / name).write_bytes(pickle.dumps(payload))
    manifest = read_manifest(checkpoint)
    files = {**manifest.files, name: record_file(checkpoint / name)}
    write_manifest(checkpoint, replace(manifest, files=files))
    assert pickle.loads(pickle.dumps(_Payload(tmp_path / "proof"))) == 0
    assert (tmp_path / "proof").exists(), "the payload does what it says"
    if use == "resume":
        job = server.run(run_dir, stopped[1])
    else:
        init = ["--model.init_from", str(checkpoint), "--training.steps", "1"]
        job = server.run(tmp_path / "new", [*corpus.arguments(), *init])
    assert job.codes == [2] and not marker.exists(), job.text
    [line] = [line for line in job.text.splitlines() if line.startswith("error: ")]
    assert str(checkpoint) in line and "Traceback" not in job.text
    assert "nothing of it was run" in line and "weights_only" not in job.text
