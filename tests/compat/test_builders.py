"""HybridModel trains as GPTModel does, and either reads the other's checkpoints.

Both are of the release that runs these tests (tests/compat/run.sh). A layer of GPTModel and its two
blocks in HybridModel call the same kernels with the same operands in the same order, and the
parameters stand in the same order in the buffers, so nothing may differ by a bit.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_dwm.convert.checkpoint_reader import open_checkpoint
from megatron_dwm.convert.from_hf import import_from_huggingface
from megatron_dwm.convert.gate import LOGITS_TOLERANCE, GateError
from megatron_dwm.convert.megatron_logits import megatron_logits
from megatron_dwm.convert.to_hf import export_to_huggingface
from megatron_dwm.convert.tokenizer_files import write_tokenizer_files
from megatron_dwm.model.on_disk import parameter_names as layout
from megatron_dwm.tokenizer import Tokenizer
from tests.convert.conftest import small_tokenizer, texts  # noqa: F401
from tests.convert.families import FAMILIES, write_llama
from tests.launch import run_ranks
from tests.small_runs.command import RESUME, succeed, without_time
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server

CLASSES = {"gpt": "GPTModel", "hybrid": "HybridModel"}
"""values of model.builder, and Megatron-Core's classes"""
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {"layers": 4, "tied": False}),
    "recompute": (1, {"layers": 4, "recompute": "full"}),
    "bf16": (1, {"precision": "bf16", "recompute": "selective"}),
    "FP8, first and last layer in bf16": (
        1,
        {"layers": 4, "fp8_emulation": True, "fp8_first_last_bf16": True},
    ),
    "TP 2 and sequence parallel": (2, {"tensor": 2, "sequence": True}),
    "PP 2": (2, {"pipeline": 2, "layers": 4}),
    "interleaved": (2, {"pipeline": 2, "virtual_stages": 2, "layers": 4, "tied": False}),
    "sharded": (2, {"sharded": True}),
    "norms of heads, TP 2": (2, {"tensor": 2, "qk_layernorm": True, "kv_channels": 12}),
    "bias, PP 2": (2, {"pipeline": 2, "layers": 4, "add_qkv_bias": True}),
}


def _of_both(worker: str, ranks: int, options: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Returns what every rank returned with GPTModel, and with HybridModel."""
    gpt, hybrid = run_ranks(worker, ranks, [{"builder": name, **options} for name in CLASSES])
    return gpt, hybrid


@pytest.mark.parametrize("name", LAYOUTS)
def test_both_classes_save_the_same_tensors(name: str) -> None:
    ranks, options = LAYOUTS[name]
    gpt, hybrid = _of_both("tests.compat.builder_workers:built", ranks, options)
    for (kind, places), (other, others) in zip(gpt, hybrid, strict=True):
        assert (kind, other) == (CLASSES["gpt"], CLASSES["hybrid"])
        assert places == others and len(places) > 6


@pytest.mark.parametrize("name", LAYOUTS)
def test_both_classes_take_the_same_steps(name: str) -> None:
    """Losses, weights from the LLM's features, alignments of an update, what it learned."""
    ranks, options = LAYOUTS[name]
    options = {**options, "group": "micro_batch", "update_on": "training"}
    gpt, hybrid = _of_both("tests.training.feature_workers:steps_and_updates", ranks, options)
    for values, others in zip(gpt, hybrid, strict=True):
        assert values["alignments"].abs().min() > 0
        for key, value in values.items():
            assert torch.equal(value, others[key]), key


def test_both_classes_find_the_same_of_documents() -> None:
    """Alignments and sketches of gradients with documents as units."""
    options = {"border_loss": False, "uncounted": 0.2}
    for worker, of_worker in (
        ("tests.bilevel.unit_workers:alignments", {"options": options}),
        ("tests.bilevel.sketch_workers:sketches", {"size": 64, "units": "document"}),
    ):
        layout = {"tensor": 2, "sequence": True, "layers": 4}
        gpt, hybrid = _of_both(worker, 2, {**of_worker, **layout})
        for values, others in zip(gpt, hybrid, strict=True):
            for key, value in values.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(others[key])), key


def test_attention_stops_at_the_same_borders() -> None:
    worker = "tests.model.border_workers:losses_and_gradients"
    for ranks, options in ((1, {"recompute": "full"}), (2, {"tensor": 2, "sequence": True})):
        gpt, hybrid = _of_both(worker, ranks, options)
        for values, others in zip(gpt, hybrid, strict=True):
            for key, value in values.items():
                assert torch.equal(value, others[key]), key
            packed, alone = others["packed"], others["alone"]
            assert ((packed - alone).abs() <= 1e-6 * alone).all()


MOVES = {
    "one process": ([], 1, ("gpt", "hybrid", "gpt")),
    "TP 2 and sequence parallel": (
        ["--parallel.tensor", "2", "--parallel.sequence", "true", "--data.mask_documents", "true"],
        2,
        ("hybrid", "gpt", "hybrid"),
    ),
    "PP 2 in bf16": (
        ["--parallel.pipeline", "2", "--model.precision", "bf16"],
        2,
        ("gpt", "hybrid", "gpt"),
    ),
    "sharded": (["--parallel.sharded_optimizer", "true"], 2, ("hybrid", "gpt", "hybrid")),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_run_goes_on_with_the_other_class(
    server: Server, corpus: Corpus, tmp_path: Path, name: str
) -> None:
    """Four steps with each of three classes in turn: the records of a run with GPTModel alone.

    From 0.19 on GPTModel's constructor logs that it is deprecated, which users must not see.
    """
    options, ranks, builders = MOVES[name]
    arguments = [*corpus.arguments(), "--policy.name", "dwm", "--weighting.encoder", "llm"]
    arguments += ["--weighting.warmup_steps", "2", "--training.steps", "12", *options]
    arguments += ["--training.checkpoint_interval_steps", "4"]
    server.succeed(tmp_path / "alone", arguments, ranks=ranks)
    moved = tmp_path / "moved"
    stop = {"name": "send_signal", "place": "training", "number": 15, "rank": 0, "call": 4}
    for builder, fault in zip(builders, (stop, stop, None), strict=True):
        of_builder = [*arguments, *RESUME, "--model.builder", builder]
        job = server.succeed(moved, of_builder, ranks=ranks, fault=fault)
        assert "deprecat" not in job.text.lower()
    assert without_time(moved) == without_time(tmp_path / "alone")


@pytest.fixture(params=["llama3", "qwen3: head norms, own", "qwen2: bias, grouped"])
def public(
    request: pytest.FixtureRequest,
    small_tokenizer: Tokenizer,  # noqa: F811
    tmp_path: Path,
) -> Path:
    """Returns a model directory as others publish it, with every feature of its class."""
    (family,) = [name for name in FAMILIES if name.startswith(request.param)]
    directory = write_llama(tmp_path / "public", **FAMILIES[family])
    write_tokenizer_files(small_tokenizer, 256, directory)
    return directory


def test_the_gate_passes_with_the_other_class(public: Path, tmp_path: Path) -> None:
    found = import_from_huggingface(public, tmp_path / "ours", builder="hybrid")
    assert found.logits_deviation is not None and found.logits_deviation < LOGITS_TOLERANCE
    saved = open_checkpoint(tmp_path / "ours")
    assert saved.builder == "hybrid"
    by_gpt = replace(saved, config={**saved.config, "model": {"builder": "gpt"}})
    tokens_BS = torch.arange(100).view(2, 50)
    logits_BSV = [megatron_logits(each, tokens_BS, torch.float32) for each in (saved, by_gpt)]
    assert torch.equal(*logits_BSV)
    exported = export_to_huggingface(tmp_path / "ours", tmp_path / "theirs")
    assert exported.logits_deviation is not None
    tensors, others = (load_file(d / "model.safetensors") for d in (public, tmp_path / "theirs"))
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_the_gate_refuses_a_wrong_import(
    public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = layout.LAYER_TENSORS["mlp.linear_fc1"]
    join = lambda _, parts: torch.cat([parts["mlp.up_proj"], parts["mlp.gate_proj"]])  # noqa: E731
    monkeypatch.setitem(layout.LAYER_TENSORS, "mlp.linear_fc1", replace(right, join=join))
    with pytest.raises(GateError, match="of the largest logit"):
        import_from_huggingface(public, tmp_path / "ours", builder="hybrid")


def test_a_model_starts_from_a_public_one(public: Path, corpus: Corpus, tmp_path: Path) -> None:
    """model.init_from reads a public model's tensors into either class, under pipelines."""
    arguments = [*corpus.arguments(), "--training.steps", "2", "--model.init_from", str(public)]
    arguments += ["--parallel.pipeline", "2"]
    for builder in CLASSES:
        succeed(tmp_path / builder, *arguments, "--model.builder", builder, processes=2)
    assert without_time(tmp_path / "gpt") == without_time(tmp_path / "hybrid")
