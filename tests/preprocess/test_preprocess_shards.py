"""Shards of one list of inputs, and files that lie where a run reads or writes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_dwm.config.errors import UserError
from megatron_dwm.preprocess.merge import merge_datasets
from megatron_dwm.preprocess.pipeline import preprocess
from megatron_dwm.preprocess.read.inputs import find_inputs
from tests.preprocess.test_preprocess_inputs import rows, settings_for, write

__all__ = ["rows"]


def test_shards_of_different_lists_are_not_merged(
    tmp_path: Path, rows: list[dict], model: Path
) -> None:
    """A file appears between two tasks of a job array, which cuts the list elsewhere."""
    for i in range(1, 5):
        write(tmp_path / f"in{i}.jsonl", rows[i : 3 * i])
    asked = dataclasses.replace(
        settings_for([tmp_path / "in*.jsonl"], tmp_path / "s", model), num_shards=2, resume=True
    )
    preprocess(asked)
    write(tmp_path / "in0.jsonl", rows[50:60])
    preprocess(dataclasses.replace(asked, shard=1))
    parts = sorted(str(path) for path in tmp_path.glob("s*_text_document.idx"))
    with pytest.raises(UserError, match="cut from different lists of inputs"):
        merge_datasets(parts, str(tmp_path / "m"))
    with pytest.raises(UserError, match="complete, but not this run: --num-shards: the list of"):
        preprocess(asked)


@pytest.mark.parametrize("given", [".", "*.json*"])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_runs_own_files_are_no_inputs(
    tmp_path: Path, rows: list[dict], model: Path, given: str, num_shards: int
) -> None:
    """The output lies among the inputs; a run that was interrupted goes on, and a finished one."""
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", rows[:5])
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write("broken\n")
    asked = dataclasses.replace(
        settings_for([tmp_path / given], tmp_path / "out", model),
        num_shards=num_shards,
        shard=num_shards - 1,
        checkpoint_interval_s=0.0,
        chunk_bytes=100,
        resume=True,
    )
    with pytest.raises(UserError, match="broken JSON"):
        preprocess(asked)
    assert (tmp_path / f"{Path(asked.prefix).name}.unfinished").is_dir()
    skipping = dataclasses.replace(asked, on_bad_record="skip")
    first, again = preprocess(skipping), preprocess(skipping)
    assert again.was_complete and first.records == again.records == (11 if num_shards == 1 else 6)
    # The files of another run are inputs like any.
    others = find_inputs([str(tmp_path / given)], str(tmp_path / "other"))
    assert f"{asked.prefix}.preprocess.json" in [str(Path(entry.name)) for entry in others]


def test_what_appears_at_an_outputs_name_is_kept(
    tmp_path: Path, rows: list[dict], model: Path
) -> None:
    asked = settings_for([write(tmp_path / "in.jsonl", rows[:9])], tmp_path / "p", model)
    theirs = tmp_path / "p_text_document.idx"

    def appears() -> bool:
        theirs.write_text("of somebody else")
        return False

    with pytest.raises(UserError, match="idx exists; choose another output or remove it"):
        preprocess(asked, appears)
    assert theirs.read_text() == "of somebody else"
    assert not (tmp_path / "p_text_document.bin").exists()
    theirs.unlink()
    assert preprocess(dataclasses.replace(asked, resume=True)).records == 9
