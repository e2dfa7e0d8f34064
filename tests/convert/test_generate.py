"""Samples: the greedy one follows the model's logits, step by step."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_dwm.convert.huggingface import generate_text
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


def test_prompts_that_do_not_fit_are_reported(
    small_tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Three prompts: longer than the context, too long for the requested tokens, short enough."""
    directory = write_llama(tmp_path / "model", bos_token_id=2, max_position_embeddings=16)
    write_tokenizer_files(small_tokenizer, 16, directory)
    prompts = ["river " * 20, "The river, the river", "a"]
    sizes = [len(small_tokenizer.encode(prompt)) for prompt in prompts]
    assert sizes[0] > 16 > sizes[1] > 16 - 10 and sizes[2] <= 16 - 10
    capsys.readouterr()
    arguments = ["--model", directory, "--max-new-tokens", 10, "--prompt", *prompts]
    assert _run(arguments, monkeypatch) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "context" in line]
    assert len(told) == 2
    assert told[0].startswith(f"warning: prompt 1 has {sizes[0]} tokens; the model's context is 16")
    assert told[1].startswith(f"warning: prompt 2 has {sizes[1]} tokens, and 10 more are requested")


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


def test_the_models_own_rules_do_not_count(
    small_tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """A penalty and a top-k of 1 in generation_config.json; no token that begins a document."""
    directory = write_llama(tmp_path / "model")
    write_tokenizer_files(small_tokenizer, 256, directory)
    settings = directory / "tokenizer_config.json"
    without = {k: v for k, v in json.loads(settings.read_text()).items() if k != "bos_token"}
    settings.write_text(json.dumps(without))
    found = []
    for own in ({}, {"repetition_penalty": 9.0, "top_k": 1, "do_sample": True}):
        (directory / "generation_config.json").write_text(json.dumps(own))
        for temperature in (0, 1.0):
            asked = [
                "--model",
                directory,
                "--temperature",
                temperature,
                "--prompt",
                "The river",
                "",
            ]
            assert _run([*asked, "--max-new-tokens", 24], monkeypatch) == 0
            found.append(capsys.readouterr().out)
    assert found[:2] == found[2:] and found[0] != found[1]


def test_sampling_is_from_all_tokens(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """At a high temperature every id is about as likely; transformers' default keeps 50 of them."""
    directory = write_llama(tmp_path / "model", bos_token_id=2, eos_token_id=None)
    write_tokenizer_files(small_tokenizer, 256, directory)
    options = {"max_new_tokens": 1, "temperature": 1e4, "top_p": 1.0}
    firsts = {generate_text(directory, [""], seed=seed, **options)[0] for seed in range(150)}
    assert len(firsts) > 50


def test_a_model_without_weights(
    small_tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    directory = write_llama(tmp_path / "model", bos_token_id=2)
    write_tokenizer_files(small_tokenizer, 256, directory)
    for path in directory.glob("*.safetensors"):
        path.unlink()
    capsys.readouterr()
    assert _run(["--model", directory, "--prompt", "a"], monkeypatch) == 2
    assert "transformers cannot read the model" in capsys.readouterr().err


def test_a_prompt_that_is_not_utf_8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The bytes 63 61 66 e9 (Latin-1), as Python reads them from the command line."""
    (tmp_path / "config.json").write_text("{}")
    prompt = os.fsdecode(b"caf\xe9")
    assert _run(["--model", tmp_path, "--prompt", "fine", prompt], monkeypatch) == 2
    assert capsys.readouterr().err == (
        "error: --prompt: text 2 is not UTF-8 (byte 0xe9 after 3 characters); write it in UTF-8\n"
    )
