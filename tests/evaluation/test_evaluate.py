"""The command's scores against plain transformers code, and how it ends on mistakes."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_dwm.config import UserError
from megatron_dwm.evaluation.harness import run_harness
from megatron_dwm.evaluation.suites import LocalTasks
from tests.forking.client import REPOSITORY, run_python

TOOL = REPOSITORY / "tools/evaluate.py"
TASKS = REPOSITORY / "examples/tasks"
SHARED_LAST_WORDS = REPOSITORY.parent / "shared/data/lambada_style.jsonl"
SAMPLE_LAST_WORDS = REPOSITORY / "examples/corpus/lastword.jsonl"


def _evaluate(
    *arguments: object, home: Path, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run the command with its own cache and without network."""
    own = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    return run_python([str(TOOL), *map(str, arguments)], environment=own, fresh=fresh)


@torch.no_grad()
def _last_words(directory: Path, data: Path, limit: int) -> tuple[float, float]:
    """Returns (perplexity, accuracy) of the last word, one passage at a time."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    log_likelihoods, right = [], []
    for line in data.read_text(encoding="utf-8").splitlines()[:limit]:
        text = json.loads(line)["text"]
        ids = tokenizer.encode(text)
        start = len(tokenizer.encode(text.rpartition(" ")[0]))
        scores_SV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        word = torch.tensor(ids[start:])
        before_SV = scores_SV[start - 1 : -1]
        log_likelihoods.append(before_SV.gather(1, word[:, None]).sum().item())
        right.append(torch.equal(before_SV.argmax(-1), word))
    return math.exp(-sum(log_likelihoods) / len(right)), sum(right) / len(right)


@pytest.mark.parametrize("data", [SHARED_LAST_WORDS, SAMPLE_LAST_WORDS], ids=lambda p: p.stem)
def test_last_word_is_plain_transformers(data: Path, model: Path, tmp_path: Path) -> None:
    if not data.is_file():
        pytest.skip(f"{data} is missing")
    output = tmp_path / "scores.json"
    options = ["--suite", "local", "--tasks-dir", TASKS, "--limit", 30]
    # The sample file is what the task names by itself.
    if data == SHARED_LAST_WORDS:
        options += ["--data", data, "--num-fewshot", 0, 2]
    options += ["--output", output]
    done = _evaluate("--model", model, *options, home=tmp_path, fresh=data == SAMPLE_LAST_WORDS)
    assert done.returncode == 0, done.stderr
    written = json.loads(output.read_text())
    scores = {(s["num_fewshot"], s["metric"]): s for s in written["scores"]}
    perplexity, accuracy = _last_words(model, data, 30)
    assert scores[0, "perplexity"]["value"] == pytest.approx(perplexity, rel=1e-4)
    assert scores[0, "acc"]["value"] == accuracy
    assert scores[0, "perplexity"]["standard_error"] > 0
    assert {s["num_examples"] for s in written["scores"]} == {30}
    if data == SHARED_LAST_WORDS:
        assert scores[2, "perplexity"]["value"] != scores[0, "perplexity"]["value"]
    table = done.stdout.splitlines()
    assert table[0].split()[:5] == ["task", "shots", "metric", "better", "value"]
    assert len(table) == 2 + len(scores)
    assert float(table[2].split()[4]) == pytest.approx(perplexity, rel=1e-4)


QUESTION = 'doc_to_text: "{{text.rstrip()[:-(text.split()[-1]|length)].rstrip()}}"'


def test_scores_of_other_questions_are_not_compared(model: Path, tmp_path: Path) -> None:
    """The same file elsewhere has equal digests; another row or another template does not."""
    rows = SAMPLE_LAST_WORDS.read_text(encoding="utf-8").splitlines()
    (tmp_path / "same.jsonl").write_text("\n".join(rows))
    rows[3] = json.dumps({"text": "one two"})
    (tmp_path / "other.jsonl").write_text("\n".join(rows))
    text = (TASKS / "lastword.yaml").read_text()
    assert QUESTION in text
    template = _task_file(tmp_path / "template", text.replace(QUESTION, 'doc_to_text: "{{text}}"'))
    options = ["--model", model, "--suite", "local", "--num-fewshot", 0, 2, "--limit", 4]
    first = tmp_path / "first.json"
    done = _evaluate(*options, "--tasks-dir", TASKS, "--output", first, home=tmp_path)
    assert done.returncode == 0, done.stderr
    for tasks, data, note in (
        (TASKS, "same", ""),
        (TASKS, "other", "first: lastword with 0 shots has other questions"),
        (template, "same", "first: lastword with 0 shots is another task"),
    ):
        more = ["--tasks-dir", tasks, "--data", tmp_path / f"{data}.jsonl", "--compare", first]
        done = _evaluate(*options, *more, home=tmp_path)
        assert done.returncode == 0, done.stderr
        warned = [line for line in done.stderr.splitlines() if line.startswith("warning: --compa")]
        assert len(warned) == 2 * bool(note) and note in "".join(warned)
        beside = [line.split()[-1] for line in done.stdout.splitlines()[2:]]
        assert set(beside) == ({"-"} if note else {"+0.0000"})


def test_questions_longer_than_the_context_are_reported(
    build_model: Callable[[int], Path], tmp_path: Path
) -> None:
    options = ["--suite", "local", "--tasks-dir", TASKS, "--limit", 5]
    done = _evaluate("--model", build_model(16), *options, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "5 questions with 0 shots are longer than the model's context" in done.stderr


def test_missing_data_are_listed(model: Path, tmp_path: Path) -> None:
    done = _evaluate(
        "--model", model, "--suite", "dwm", "--tasks", "sciq", "arc_easy", home=tmp_path
    )
    _assert_mistake(done, "(sciq: allenai/sciq; arc_easy: allenai/ai2_arc ARC-Easy)")
    assert f"HF_HOME={tmp_path}" in done.stderr


def _task_file(directory: Path, text: str) -> Path:
    directory.mkdir()
    (directory / "mine.yaml").write_text(text)
    return directory


def test_mistakes_before_anything_is_loaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text("mine")
    local = ["--model", model, "--suite", "local"]
    cases = {
        "--tasks-dir": local,
        "--tasks-dir /": [*local, "--tasks-dir", "/nowhere"],
        "no such file": [*local, "--tasks-dir", TASKS, "--data", tmp_path / "gone"],
        "exists": [*local, "--tasks-dir", TASKS, "--output", kept],
        "Not a directory": [*local, "--tasks-dir", TASKS, "--output", kept / "x.json"],
        "name too long": [*local, "--tasks-dir", TASKS, "--output", tmp_path / ("x" * 300)],
        "not a task of suite dwm": ["--model", model, "--suite", "dwm", "--tasks", "nothing"],
        "not a Hugging Face": ["--model", tmp_path, *local[2:], "--tasks-dir", TASKS],
        "belong to --suite local": ["--model", model, "--suite", "dwm", "--data", kept],
        "no such directory": ["--model", model, "--suite", "dwm", "--data-dir", tmp_path / "gone"],
        "no folder of a task": ["--model", model, "--suite", "dwm", "--data-dir", tmp_path],
        "--data-dir belongs": [*local, "--tasks-dir", TASKS, "--data-dir", tmp_path],
        "not a file that --output wrote": [*local, "--tasks-dir", TASKS, "--compare", kept],
        "--limit: invalid": [*local, "--tasks-dir", TASKS, "--limit", "few"],
    }
    for named, arguments in cases.items():
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(TOOL), run_name="__main__")
        stderr = capsys.readouterr().err
        assert stop.value.code == 2 and named in stderr
        assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    assert kept.read_text() == "mine"


def test_mistakes_in_tasks(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    missing = _task_file(tmp_path / "missing", (TASKS / "lastword.yaml").read_text())
    broken = _task_file(tmp_path / "broken", "task: [")
    (tmp_path / "empty").mkdir()
    garbled = tmp_path / "garbled.jsonl"
    garbled.write_text('{"text": "one two"}\nnot json\n')
    ragged = tmp_path / "ragged.jsonl"
    ragged.write_text('{"text": "one two"}\n{"other": 1}\n')
    cases = {
        "mine.yaml: its data file": LocalTasks(directory=missing),
        "mine.yaml: not a task file": LocalTasks(directory=broken),
        "garbled.jsonl.* cannot be loaded": LocalTasks(directory=missing, data=garbled),
        "a record of the data lacks": LocalTasks(directory=missing, data=ragged),
        "no task files": LocalTasks(directory=tmp_path / "empty"),
        "not a task of": LocalTasks(directory=TASKS, names=("other",)),
    }
    for message, tasks in cases.items():
        with pytest.raises(UserError, match=message) as raised:
            run_harness(model, tasks, num_fewshot=[0], limit=None, batch_size=1)
        assert "\n" not in str(raised.value)


def _assert_mistake(done: subprocess.CompletedProcess, named: str) -> None:
    assert done.returncode == 2, done.stderr
    assert named in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
