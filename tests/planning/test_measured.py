"""Plans of small models against the models themselves: bytes counted, not estimated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from megatron_dwm.model import resolve_shape
from megatron_dwm.planning.activations import head_bytes, kernels_of, layer_bytes, mask_bytes
from megatron_dwm.planning.memory import Memory, stage_memory, weighting_parameters
from megatron_dwm.planning.placement import rank_parameters
from megatron_dwm.planning.traffic import traffic_of
from megatron_dwm.weighting import method_class
from megatron_dwm.weighting.model import WeightingModel
from tests.launch import REPOSITORY, run_ranks
from tests.planning.runs import configured

# (number of processes, measurement, options) -> what every rank measured.
Found = Callable[[int, str, dict[str, Any]], list[Any]]

BF16 = {"precision": "bf16"}
QWEN3 = {"qk_layernorm": True, "kv_channels": 24}
QWEN2 = {"add_qkv_bias": True}
HOLDINGS: dict[int, list[dict[str, Any]]] = {
    1: [
        {},
        {"model": BF16},
        {"model": BF16, "grad_reduce_in_fp32": False},
        {"model": {"tied_embeddings": True}},
        {"model": QWEN3},
        {"model": {**QWEN2, **BF16}},
    ],
    2: [
        {"sharded_optimizer": True},
        {"model": BF16, "sharded_optimizer": True},
        {"model": BF16, "sharded_optimizer": True, "grad_reduce_in_fp32": False},
        {"tensor": 2},
        {"context": 2, "sharded_optimizer": True},
        {"tensor": 2, "model": QWEN3},
        {"tensor": 2, "model": QWEN2},
    ],
}


KEPT: dict[int, list[dict[str, Any]]] = {
    1: [
        {"model": {**precision, "recompute": recompute}}
        for precision in ({}, BF16)
        for recompute in ("none", "selective", "full")
    ]
    + [{"model": {**model, **precision}} for model in (QWEN3, QWEN2) for precision in ({}, BF16)]
    + [{"model": {**QWEN3, "num_query_groups": 4}}, {"model": {**QWEN3, "recompute": "full"}}],
    2: [
        {"tensor": 2},
        {"tensor": 2, "sequence": True},
        {"tensor": 2, "sequence": True, "model": BF16},
        {"context": 2},
        {"context": 2, "model": BF16},
        {"context": 2, "model": {"recompute": "full"}},
        {"tensor": 2, "model": QWEN3},
        {"tensor": 2, "sequence": True, "model": {**QWEN3, **BF16}},
        {"context": 2, "model": QWEN3},
        {"context": 2, "model": {**QWEN3, **BF16}},
    ],
}


def layers(case: dict[str, Any], count: int) -> dict[str, Any]:
    return {**case, "model": {**case.get("model", {}), "num_layers": count}}


@pytest.fixture(scope="module")
def found() -> Found:
    """Returns what every rank measured, by number of processes, measurement and options."""
    results: dict[str, list[Any]] = {}
    for world_size in (1, 2):
        cases = [("holdings", options) for options in HOLDINGS[world_size]]
        cases += [("kept", layers(case, count)) for case in KEPT[world_size] for count in (1, 2)]
        if world_size == 2:
            cases += [("sent", {**SETTINGS, **layout}) for layout in LAYOUTS.values()]
        arguments = [{"what": what, "options": options} for what, options in cases]
        ranks = run_ranks("tests.planning.workers:measured", world_size, arguments)
        for (what, options), measured in zip(cases, ranks, strict=True):
            results[json.dumps([world_size, what, options])] = measured
    return lambda *case: results[json.dumps(case)]


def planned(options: dict[str, Any], world_size: int) -> Memory:
    config = configured(**options)
    shape = resolve_shape(config.model)
    return stage_memory(config, shape, None, world_size=world_size, stage=0, on_gpu=False)


@pytest.mark.parametrize("world_size", HOLDINGS)
def test_weights_gradients_and_optimizer(world_size: int, found: Found) -> None:
    for options in HOLDINGS[world_size]:
        ranks = found(world_size, "holdings", options)
        config, plan = configured(**options), planned(options, world_size)
        parameters = rank_parameters(resolve_shape(config.model), config.parallel, 0).total
        for held in ranks:
            assert held["parameters"] == parameters, options
            assert held["weights"] == plan.weights, options
        gradients = sum(held["gradients"] for held in ranks) / len(ranks)
        # Sharded, Megatron pads every bucket to a multiple of the ranks and of 64 values.
        assert gradients == pytest.approx(plan.gradients, rel=0.02), options
        optimizer = sum(held["optimizer"] for held in ranks) / len(ranks)
        assert optimizer == pytest.approx(plan.optimizer, rel=1e-3), options


@pytest.mark.parametrize("world_size", KEPT)
def test_activations_are_what_autograd_keeps(world_size: int, found: Found) -> None:
    """The difference of two layers and one is a layer; the rest is the head."""
    for case in KEPT[world_size]:
        config = configured(**case)
        shape, kernels = resolve_shape(config.model), kernels_of(config, on_gpu=False)
        tokens = config.training.micro_batch_size * config.data.sequence_length
        tokens //= config.parallel.context
        one, two = (found(world_size, "kept", layers(case, count))[0] for count in (1, 2))
        # A recomputed part keeps the state of the random numbers too.
        assert (two - one) / tokens == pytest.approx(layer_bytes(shape, config, kernels), abs=1)
        # Inputs of the pass, the embedding's mask and the angles of the rotation, whatever is left.
        rest = head_bytes(shape, config, kernels) + mask_bytes(config, kernels)
        assert (2 * one - two) / tokens == pytest.approx(rest, rel=0.05), case


SETTINGS = {
    "layers": 4,
    "hidden": 64,
    "heads": 4,
    "query_groups": 2,
    "ffn": 176,
    "vocab": 512,
    "sequence": 64,
    "batch": 8,
    "micro_batch": 2,
    "precision": "fp32",
    "tensor": 1,
    "context": 1,
    "pipeline": 1,
    "virtual_stages": 1,
    "sequence_parallel": False,
    "sharded_optimizer": False,
    "repeats": 1,
    "warm_up": 1,
}
LAYOUTS = {
    "tensor": {"tensor": 2},
    "tensor, sequence": {"tensor": 2, "sequence_parallel": True},
    "pipeline": {"pipeline": 2},
    "pipeline, interleaved": {"pipeline": 2, "virtual_stages": 2},
    "context": {"context": 2},
    "context, sharded": {"context": 2, "sharded_optimizer": True},
    "data": {},
    "data, sharded": {"sharded_optimizer": True, "precision": "bf16"},
}


def test_messages_are_what_torch_distributed_is_handed(found: Found) -> None:
    for name, layout in LAYOUTS.items():
        settings = {**SETTINGS, **layout}
        ranks = found(2, "sent", settings)
        config = configured(
            model={
                "hidden_size": 64,
                "num_layers": 4,
                "ffn_hidden_size": 176,
                "vocab_size": 512,
                "precision": settings["precision"],
            },
            policy="dwm",
            length=64,
            batch=8,
            tensor=settings["tensor"],
            context=settings["context"],
            pipeline=settings["pipeline"],
            virtual_stages=settings["virtual_stages"],
            sequence=settings["sequence_parallel"],
            sharded_optimizer=settings["sharded_optimizer"],
        )
        shape = resolve_shape(config.model)
        lines = {line.link: line for line in traffic_of(config, shape, None, 2, on_gpu=False)}
        link = name.split(",")[0]
        # The ranks that share rows also add up their gradients.
        found_lines = [lines[link], *([lines["data"]] if link == "context" else [])]
        busiest = {key: max(rank[key] for rank in ranks) for key in ("step", "update")}
        # What is left out: norms' gradients, grad norms, losses and alignments.
        step, update = (
            sum(getattr(line, key) for line in found_lines) for key in ("step", "update")
        )
        assert busiest["step"] == pytest.approx(step, rel=0.03), name
        assert busiest["update"] == pytest.approx(update, rel=0.03), name


@pytest.mark.parametrize("encoder", ["own", "llm"])
def test_parameters_of_the_weighting_model(encoder: str) -> None:
    config = configured(policy="dwm", weighting={"encoder": encoder, "num_layers": 3})
    shape = method_class(config).model_shape(config, resolve_shape(config.model))
    assert shape is not None
    real = sum(parameter.numel() for parameter in WeightingModel(shape).parameters())
    assert weighting_parameters(shape) == real


LARGE = {
    **SETTINGS,
    "layers": 6,
    "hidden": 256,
    "heads": 8,
    "query_groups": 8,
    "ffn": 704,
    "vocab": 4096,
    "sequence": 256,
    "micro_batch": 8,
}


@pytest.mark.parametrize(
    ("kind", "peak", "precision"),
    [
        ("plain training step", "step", "fp32"),
        ("hypergradient (tangent probe)", "update", "fp32"),
        ("hypergradient (tangent probe)", "update", "bf16"),
    ],
)
def test_peak_memory_on_a_cpu(kind: str, peak: str, precision: str) -> None:
    """Within 15 %: 22 MB in fp32 and 34 MB in bf16 are the libraries' own, at any size. Every large
    tensor gets memory of its own and gives it back; left to itself glibc's heap adds half as much
    again in gaps.
    """
    settings = {**LARGE, "precision": precision}
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", kind, json.dumps(settings)],
        env={
            **os.environ,
            "PYTHONPATH": f"{REPOSITORY / 'tools'}:{REPOSITORY}",
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    config = configured(
        model={
            "hidden_size": 256,
            "num_layers": 6,
            "num_attention_heads": 8,
            "num_query_groups": 8,
            "ffn_hidden_size": 704,
            "vocab_size": 4096,
            "precision": precision,
        },
        policy="dwm",
        length=256,
        batch=8,
        micro_batch=8,
    )
    plan = stage_memory(
        config, resolve_shape(config.model), None, world_size=1, stage=0, on_gpu=False
    )
    assert int(child.stdout.split()[-1]) == pytest.approx(getattr(plan, peak), rel=0.15)


def test_a_reading_of_the_target_sends_one_way() -> None:
    """The rank that sends the most, to the byte."""
    layouts = [{"tensor": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2}]
    layouts.append({"pipeline": 2, "virtual_stages": 2, "model": {"num_layers": 4}})
    cases = [{"length": 64, **layout, "weighting": {"mode": "online"}} for layout in layouts]
    arguments = [{"what": "reading", "options": case} for case in cases]
    for case, ranks in zip(
        cases, run_ranks("tests.planning.workers:measured", 2, arguments), strict=True
    ):
        config = configured(policy="similarity", **case)
        shape = resolve_shape(config.model)
        for line in traffic_of(config, shape, None, 2, on_gpu=False):
            counted = [rank.get(line.link, (0, 0)) for rank in ranks]
            assert line.update == max(num_bytes for _, num_bytes in counted), (case, line)
            assert line.update_messages == max(number for number, _ in counted), (case, line)


def test_a_reduction_sends_what_the_plan_says() -> None:
    """Overlaps change the number of messages only; bf16 halves their bytes."""
    overlap = {"overlap_grad_reduce": True}
    cases: list[dict[str, Any]] = [
        {"model": BF16},
        {"model": BF16, **overlap},
        {"model": BF16, **overlap, "ddp_bucket_size": 20_000},
        {"model": BF16, **overlap, "grad_reduce_in_fp32": False},
    ]
    arguments = [{"what": "reduced", "options": options} for options in cases]
    found = run_ranks("tests.planning.workers:measured", 2, arguments)
    planned_bytes = []
    for options, ranks in zip(cases, found, strict=True):
        config = configured(**options)
        lines = traffic_of(config, resolve_shape(config.model), None, 2, on_gpu=False)
        [data] = [line for line in lines if line.link == "data"]
        planned_bytes.append(data.step)
        assert set(ranks) == {(data.step_messages, data.step)}, options
    assert planned_bytes[0] == planned_bytes[1] == planned_bytes[2] == 2 * planned_bytes[3]


@pytest.mark.parametrize("sequence", [False, True])
def test_gradients_of_head_norms_are_summed_over_the_tensor_ranks(sequence: bool) -> None:
    layout = {"tensor": 2, "sequence": sequence}
    cases = [{**layout, "model": {**QWEN3, "qk_layernorm": norms}} for norms in (True, False)]
    arguments = [{"what": "reduced", "options": options} for options in cases]
    found = [rank for rank, _ in run_ranks("tests.planning.workers:measured", 2, arguments)]
    plans = []
    for options in cases:
        config = configured(**options)
        lines = traffic_of(config, resolve_shape(config.model), None, 2, on_gpu=False)
        plans.append(next(line for line in lines if line.link == "tensor"))
    with_norms, without = plans
    sent = [one - other for one, other in zip(*found, strict=True)]
    planned = with_norms.step_messages - without.step_messages, with_norms.step - without.step
    assert tuple(sent) == planned
    # Two layers with a norm of queries and one of keys, 24 values each, in one message.
    assert planned == (0 if sequence else 1, 4 * 2 * 2 * 24)
