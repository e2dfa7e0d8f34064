"""Samples: the greedy one is what the model's logits say, step by step."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_dwm.convert.tokenizer_files import write_tokenizer_files
from megatron_dwm.tokenizer import Tokenizer
from tests.convert.families import write_llama
from tests.launch import REPOSITORY

TOOL = REPOSITORY / "tools/generate.py"


def _run(arguments: list[object], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOL), run_name="__main__")
    return stop.value.code


@torch.no_grad()
def test_samples(
    small_tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    directory = write_llama(tmp_path / "model", bos_token_id=2)
    write_tokenizer_files(small_tokenizer, 256, directory)
    model = LlamaForCausalLM.from_pretrained(directory)
    ids = small_tokenizer.encode("The river")
    for _ in range(5):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    capsys.readouterr()
    greedy = ["--model", directory, "--max-new-tokens", 5, "--temperature", 0]
    assert _run([*greedy, "--prompt", "The river"], monkeypatch) == 0
    assert capsys.readouterr().out == f"--- 1\n{small_tokenizer.decode(ids)}\n"
    sampled = ["--model", directory, "--max-new-tokens", 5, "--prompt", "The river", ""]
    outputs = []
    for seed in (1, 1, 2):
        assert _run([*sampled, "--seed", seed], monkeypatch) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert outputs[0].startswith("--- 1\nThe river") and "\n--- 2\n" in outputs[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "/nowhere", "--prompt", "a"], "not a Hugging Face model directory"),
        (["--model", "/nowhere"], "--prompt"),
        (["--model", "/nowhere", "--prompt", "a", "--temperature", "-1"], "--temperature"),
    ],
)
def test_mistakes(
    arguments: list[str],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    assert _run(arguments, monkeypatch) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and named in stderr
