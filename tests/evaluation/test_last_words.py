"""The model in training scores as lm-evaluation-harness scores its export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_dwm.config import DataConfig, EvaluationConfig
from megatron_dwm.data.last_words import LastWords
from megatron_dwm.evaluation.harness import run_harness
from megatron_dwm.evaluation.suites import LocalTasks
from megatron_dwm.tokenizer import Tokenizer
from tests.launch import REPOSITORY, run_ranks

TASKS = REPOSITORY / "examples/tasks"
# Passages of both kinds: those it has learned by heart, and others.
LEARNED, PASSAGES = 6, 26
LAYOUTS = {1: [{}], 2: [{"tensor": 2}, {"pipeline": 2}, {"context": 2}, {}]}
"""By number of processes."""


@pytest.fixture(scope="module")
def passages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = (REPOSITORY / "examples/corpus/lastword.jsonl").read_text(encoding="utf-8")
    path = tmp_path_factory.mktemp("passages") / "short.jsonl"
    words = [json.loads(line)["text"].split()[-40:] for line in lines.splitlines()[:PASSAGES]]
    # A last word may begin a line, and passages may end with white space.
    borders, ends = (" ", "\n", "\n\n  "), ("", "\n")
    short = [
        " ".join(each[:-1]) + borders[i % 3] + each[-1] + ends[i % 2]
        for i, each in enumerate(words)
    ]
    domains = ["odd", "even"]
    records = [{"text": text, "domain": domains[i % 2]} for i, text in enumerate(short)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def knowing(model: Path, passages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the random model after it has learned the last words of some passages."""
    directory = tmp_path_factory.mktemp("knowing")
    llama = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [json.loads(line)["text"] for line in passages.read_text().splitlines()[:LEARNED]]
    optimizer = torch.optim.AdamW(llama.parameters(), lr=3e-3)
    for _ in range(40):
        for text in texts:
            ids = torch.tensor([tokenizer.encode(text.rstrip())])
            labels = ids.clone()
            beginning = text.rstrip()[: -len(text.split()[-1])].rstrip()
            labels[:, : len(tokenizer.encode(beginning))] = -100
            llama(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    llama.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_every_layout_scores_as_the_harness(
    knowing: Path, small_tokenizer: Tokenizer, passages: Path
) -> None:
    tasks = LocalTasks(directory=TASKS, data=passages)
    scores = run_harness(knowing, tasks, num_fewshot=[0], limit=None, batch_size=8)
    expected = {score.metric: score.value for score in scores}
    assert LEARNED / PASSAGES <= expected["acc"] < 1
    common = {
        "directory": str(knowing),
        "tokenizer": str(small_tokenizer.model_path),
        "text": str(passages),
    }
    for processes, layouts in LAYOUTS.items():
        cases = [{**common, "parallel": parallel} for parallel in layouts]
        of_layouts = run_ranks("tests.evaluation.workers:last_words", processes, cases)
        for found in (rank for ranks in of_layouts for rank in ranks):
            assert set(found) == {"odd", "even"}
            counts = [score["passages"] for score in found.values()]
            assert counts == [PASSAGES / 2] * 2
            accuracies = [score["accuracy"] for score in found.values()]
            assert sum(accuracies) / 2 == pytest.approx(expected["acc"], abs=1e-9)
            product = found["odd"]["perplexity"] * found["even"]["perplexity"]
            assert product**0.5 == pytest.approx(expected["perplexity"], rel=1e-4)


def test_passages_without_a_question_are_left_out(
    small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "text.jsonl"
    texts = ["", "a", "one two", "  "]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config, named = DataConfig(sequence_length=8), EvaluationConfig(sets={"mine": str(path)})
    words = LastWords(named, config, small_tokenizer)
    assert words.num_rows == 1
    [batch] = words.batches(4)
    assert batch.loss_mask_BS.any(dim=1).tolist() == [True, False, False, False]
    path.write_text(json.dumps({"text": "a"}) + "\n")
    assert list(LastWords(named, config, small_tokenizer).batches(4)) == []
