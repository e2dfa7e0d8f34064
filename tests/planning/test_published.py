"""Plans against figures that others have published."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_dwm.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainingConfig
from megatron_dwm.model import LlamaShape, resolve_shape
from megatron_dwm.model.flops import FORWARD_BACKWARD, llm_forward_flops
from megatron_dwm.planning import GPUS
from megatron_dwm.planning.activations import Kernels, layer_bytes
from megatron_dwm.planning.memory import stage_memory
from megatron_dwm.planning.placement import layers_in_flight
from tests.planning.runs import configured

TERA = 1e12


@pytest.mark.parametrize(
    ("precision", "sharded", "published"),
    [
        ("fp32", False, 16),
        ("fp32", True, 8 + 8 / 8),
        ("bf16", False, 18),
        ("bf16", True, 6 + 12 / 8),
        ("fp8", False, 18),
        ("bf16, reduced in bf16", False, 20),
        ("bf16, reduced in bf16", True, 4 + 16 / 8),
    ],
)
def test_bytes_a_parameter_are_megatrons(precision: str, sharded: bool, published: float) -> None:
    """README of Megatron-LM, "Distributed Optimizer", fp32 or bf16 gradients, 8 replicas."""
    precision, _, reduced = precision.partition(", ")
    config = configured(
        model={"precision": precision},
        batch=16,
        sharded_optimizer=sharded,
        grad_reduce_in_fp32=not reduced,
    )
    shape = resolve_shape(config.model)
    found = stage_memory(config, shape, None, world_size=8, stage=0, on_gpu=True)
    total = found.weights + found.gradients + found.optimizer
    assert total / shape.num_parameters() == pytest.approx(published, rel=1e-6)


def _gpt(hidden: int, heads: int, layers: int) -> LlamaShape:
    """A GPT's sizes as a Llama's: SwiGLU with 8/3 of the width has as many weights as 4 H wide."""
    return LlamaShape(
        hidden_size=hidden,
        num_layers=layers,
        num_attention_heads=heads,
        num_query_groups=heads,
        ffn_hidden_size=8 * hidden // 3,
        vocab_size=51200,
    )


@pytest.mark.parametrize(
    ("hidden", "heads", "layers", "batch", "gpus", "seconds", "published"),
    [
        (6144, 64, 48, 4, 8, 1.10, 0.415),
        (12288, 96, 96, 64, 64, 13.75, 0.514),
        (20480, 128, 105, 280, 280, 37.83, 0.560),
        (25600, 160, 128, 512, 512, 71.49, 0.563),
    ],
)
def test_utilization_of_korthikanti(
    hidden: int,
    heads: int,
    layers: int,
    batch: int,
    gpus: int,
    seconds: float,
    published: float,
) -> None:
    """Korthikanti et al. 2022, table 5: 22B to 1T on A100. They count the masked half of attention
    too, so it is added here.
    """
    shape = _gpt(hidden, heads, layers)
    masked = 2 * batch * 2048 * layers * hidden * 2048
    flops = FORWARD_BACKWARD * (llm_forward_flops(shape, batch, 2048) + masked)
    found = flops / (gpus * GPUS["a100-80gb"].peak_flops("bf16") * seconds)
    assert found == pytest.approx(published, abs=0.003)


def test_flops_a_token_of_megatron_bridge() -> None:
    """Llama 3 8B on H100 in FP8: 744 TFLOP/s and 14,451 tokens/s a GPU, sequences of 8,192."""
    shape = LlamaShape(
        hidden_size=4096,
        num_layers=32,
        num_attention_heads=32,
        num_query_groups=8,
        ffn_hidden_size=14336,
        vocab_size=128256,
    )
    a_token = FORWARD_BACKWARD * llm_forward_flops(shape, 1, 8192) / 8192
    assert a_token == pytest.approx(744 * TERA / 14451, rel=2e-3)


def test_flops_of_llama_405b() -> None:
    """Grattafiori et al. 2024: 3.8e25 FLOPs on 15.6 T tokens, 6 N D without attention."""
    shape = resolve_shape(ModelConfig(preset="llama-3.1-405b"))
    found = FORWARD_BACKWARD * llm_forward_flops(shape, 1, 8192) / 8192 * 15.6e12
    assert found == pytest.approx(3.8e25, rel=0.05)


def test_activations_of_korthikanti() -> None:
    """Section 5: full recomputation keeps 2 s b h a layer. Section 4.2: with sequence parallelism
    everything is divided by t; without, what lies outside the parallel products is not.
    """
    shape, kernels = _gpt(12288, 96, 96), Kernels(value_bytes=2, fused=True)

    def a_token(tensor: int, recompute: str = "none", sequence: bool = False) -> float:
        config = Config(
            parallel=ParallelConfig(tensor=tensor, sequence=sequence),
            data=DataConfig(sequence_length=2048),
            training=TrainingConfig(micro_batch_size=10**9),  # the rotation's share vanishes
        )
        return layer_bytes(shape, config, kernels, recompute=recompute)

    assert a_token(1, "full") == 2 * 12288
    assert a_token(8, sequence=True) == pytest.approx(a_token(1) / 8)
    outside = (8 * a_token(8) - a_token(1)) / 7
    # Both norms, input and output, 2 bytes each: 8 of the paper's 10; the rest are dropout masks.
    assert outside == pytest.approx(8 * 12288, rel=1e-3)


@pytest.mark.parametrize(("pipeline", "chunks"), [(1, 1), (4, 1), (8, 1), (4, 2), (8, 3)])
def test_the_first_stage_holds_the_papers_layers(pipeline: int, chunks: int) -> None:
    """Section 4.2.3: L for 1F1B, L (1 + (p - 1)/(p m)) with m interleaved chunks."""
    config = replace(Config(), parallel=ParallelConfig(pipeline=pipeline, virtual_stages=chunks))
    expected = 96 * (1 + (pipeline - 1) / (pipeline * chunks)) if chunks > 1 else 96
    assert layers_in_flight(config, 96, 64, stage=0) == pytest.approx(expected)
