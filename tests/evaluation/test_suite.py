"""The ten public tasks in one call, on the user's files; missing files are listed."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dwm.config import UserError
from megatron_dwm.evaluation.data_files import with_own_files
from megatron_dwm.evaluation.harness import run_harness
from megatron_dwm.evaluation.suites import DWM_SUITE, BundledTasks
from tests.evaluation.public_data import ROWS, write_public_data


def test_every_task_with_and_without_examples(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_public_data(tmp_path / "data")
    tasks = BundledTasks(names=DWM_SUITE, data_dir=tmp_path / "data")
    scores = run_harness(model, tasks, num_fewshot=[0, 2], limit=None, batch_size=8)
    found = {(score.task, score.num_fewshot) for score in scores if score.metric == "acc"}
    assert found == {(task, shots) for task in DWM_SUITE for shots in (0, 2)}
    assert {score.num_examples for score in scores} == {ROWS}
    assert all(score.standard_error is not None for score in scores if score.metric == "acc")
    perplexity = {s.num_fewshot: s.value for s in scores if s.metric == "perplexity"}
    assert perplexity[0] != perplexity[2]


def test_a_split_that_nothing_reads_does_not_make_another_task(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = []
    for name in ("all", "some"):
        write_public_data(tmp_path / name)
        if name == "some":
            (tmp_path / name / "sciq/train.jsonl").unlink()
            (tmp_path / name / "sciq/validation.jsonl").unlink(missing_ok=True)
        tasks = BundledTasks(names=("sciq",), data_dir=tmp_path / name)
        scores = run_harness(model, tasks, num_fewshot=[0], limit=2, batch_size=8)
        found.append({(s.task_digest, s.questions_digest) for s in scores})
    everything, some = found
    assert everything == some and all(digest for pair in some for digest in pair)


def test_missing_files_are_listed(model: Path, tmp_path: Path) -> None:
    write_public_data(tmp_path)
    (tmp_path / "sciq/train.jsonl").unlink()
    (tmp_path / "piqa/validation.jsonl").unlink()
    tasks = BundledTasks(names=("sciq", "piqa", "boolq"), data_dir=tmp_path)
    with pytest.raises(UserError, match="lacks the data of 2 tasks") as raised:
        run_harness(model, tasks, num_fewshot=[0, 2], limit=None, batch_size=8)
    assert f"sciq: {tmp_path / 'sciq/train.jsonl'}; piqa: " in str(raised.value)


def test_solved_examples_are_all_that_training_rows_are_for(tmp_path: Path) -> None:
    write_public_data(tmp_path)
    (tmp_path / "sciq/train.jsonl").unlink()
    spec = {
        "task": "sciq",
        "dataset_path": "allenai/sciq",
        "training_split": "train",
        "test_split": "test",
    }
    found = with_own_files(spec, tmp_path, few_shot=False)
    assert found["training_split"] is None
    assert found["dataset_kwargs"] == {"data_files": {"test": str(tmp_path / "sciq/test.jsonl")}}
    with pytest.raises(FileNotFoundError, match="sciq/train.jsonl"):
        with_own_files(spec, tmp_path, few_shot=True)
