"""What weighting costs in FLOPs at the papers' sizes, by formula."""

from __future__ import annotations

import pytest

from megatron_dwm.config import Config, DataConfig, PolicyConfig, TrainingConfig, WeightingConfig
from megatron_dwm.model.flops import llm_forward_flops
from megatron_dwm.model.shape import PRESETS
from megatron_dwm.planning.memory import stage_memory
from megatron_dwm.weighting import method_class
from megatron_dwm.weighting.costs import Costs, Workload

LARGE = PRESETS["llama-1.3b"]


def _costs(micro_batch: int = 16, **weighting: object) -> Costs:
    """1.3B, 4M tokens a step, one replica."""
    config = Config(
        data=DataConfig(sequence_length=1024),
        training=TrainingConfig(global_batch_size=4096, micro_batch_size=micro_batch),
        policy=PolicyConfig(name="dwm"),
        weighting=WeightingConfig(**weighting),
    )
    return method_class(config).costs(config, LARGE, Workload(replicas=1))


def test_a_forward_pass_is_two_flops_for_every_weight_and_token() -> None:
    """The rule of thumb 2 N D (Kaplan et al. 2020), embedding rows apart, and attention."""
    flops = llm_forward_flops(LARGE, 1, 1024)
    matrices = LARGE.num_parameters() - LARGE.vocab_size * LARGE.hidden_size
    attention = 2 * 24 * 2 * 2048 * 512 * 1024  # 24 layers, scores and values, 512 seen positions
    # Norms are 1e-4 of the parameters, the vocabulary's padding 0.
    assert flops == pytest.approx(2 * matrices * 1024 + attention, rel=1e-3)


def test_features_cost_below_one_percent_of_a_large_step() -> None:
    for hidden in (32, 1024):
        spent = _costs(encoder="llm", hidden_size=hidden, ffn_hidden_size=4 * hidden)
        assert (spent.weighing + spent.extra_forward) / spent.llm_step < 0.01


def test_a_370m_encoder_costs_the_papers_nine_percent() -> None:
    """2 * 373.9 / (6 * 1345.4) = 9.26 % by parameters (METHOD.md, section 1); embedding rows are no
    products and attention is extra, so it is 9 % here.
    """
    shape = PRESETS["llama-370m"]
    spent = _costs(
        encoder="own",
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        ffn_hidden_size=shape.ffn_hidden_size,
    )
    assert (spent.weighing + spent.extra_forward) / spent.llm_step == pytest.approx(0.0926, rel=0.1)


def test_an_encoder_in_chunks_runs_forward_once_more() -> None:
    """4,096 rows of one replica by sixteens, and by 4,096; the LLM's passes are the same."""
    in_chunks, at_once = (
        _costs(micro_batch=size, encoder="own", group="global") for size in (16, 4096)
    )
    assert in_chunks.update - at_once.update == pytest.approx(in_chunks.weighing, rel=1e-2)


def test_updates_are_three_steps_or_two() -> None:
    fresh, training = (_costs(encoder="llm", update_on=on) for on in ("fresh", "training"))
    assert fresh.update / fresh.llm_step == pytest.approx(3, rel=1e-4)
    assert training.update / training.llm_step == pytest.approx(2, rel=1e-4)


def test_reading_first_is_counted() -> None:
    attends = {"encoder": "llm", "across_samples": True}
    grouped, whole = (_costs(group=group, **attends) for group in ("micro_batch", "global"))
    assert whole.extra_forward == pytest.approx(whole.llm_step / 3) and grouped.extra_forward == 0.0
    alone = {"encoder": "llm", "group": "global", "across_samples": False}
    deferred, first = _costs(**alone), _costs(**alone, normalizer="first")
    assert deferred.extra_forward == 0.0 and first.extra_forward == whole.extra_forward


def test_a_references_losses_from_a_file_cost_nothing() -> None:
    found = []
    for policy in ({"reference": "model"}, {"reference_losses": "ref"}):
        config = Config(policy=PolicyConfig(name="excess_loss", **policy))
        spent = method_class(config).costs(config, LARGE, Workload(replicas=1))
        memory = stage_memory(config, LARGE, None, world_size=1, stage=0, on_gpu=False)
        found.append((spent.reference / spent.llm_step, memory.reference))
    (with_model, its_bytes), from_file = found
    assert with_model == pytest.approx(1 / 3) and its_bytes > 0
    assert from_file == (0.0, 0.0)
