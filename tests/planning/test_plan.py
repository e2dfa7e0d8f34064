"""The command: what it prints, that parts add up, and that mistakes are one line."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dwm.config import Config, TrainingConfig, UserError
from megatron_dwm.planning import GPUS, Plan, make_plan
from megatron_dwm.planning.table import plan_text
from tests.forking.client import run_python
from tests.planning.runs import configured

REPOSITORY = Path(__file__).parent.parent.parent
H100 = GPUS["h100-80gb"]
LARGE = {
    "preset": "llama-1.3b",
    "precision": "bf16",
    "hidden_size": None,
    "num_layers": None,
    "num_attention_heads": None,
    "num_query_groups": None,
    "ffn_hidden_size": None,
    "vocab_size": None,
    "tied_embeddings": None,
}


def run(*arguments: str, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    quiet = {"PYTHONWARNINGS": "ignore"}
    return run_python(["tools/plan.py", *arguments], environment=quiet, fresh=fresh)


def planned(config: Config, gpus: int = 8) -> Plan:
    return make_plan(config, H100, gpus=gpus, mfu=0.4)


def large(**options: object) -> Config:
    return configured(model=LARGE, length=1024, batch=512, micro_batch=4, **options)


def test_tiny_yaml_without_its_data() -> None:
    done = run("examples/tiny.yaml", "--gpus", "2", "--gpu", "a100-40gb", "--parallel.tensor", "2")
    assert done.returncode == 0, done.stderr
    assert "2 x a100-40gb: tensor 2 x pipeline 1 x data 1" in done.stdout
    assert "\nfits: " in done.stdout


def test_json_has_the_same_numbers() -> None:
    arguments = ["examples/tiny.yaml", "--gpus", "1", "--gpu", "h200-141gb", "--json"]
    done = run(*arguments, "--mfu", "0.2", fresh=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"] is True and found["gpu"] == "h200-141gb"
    flops = found["flops"]
    llm = flops["llm"] + flops["recompute"] + flops["reading"] + flops["updates"]
    fp32 = flops["weighing"] + flops["learning"]
    # examples/tiny.yaml is fp32, so one peak counts for all.
    assert found["step_s"] == pytest.approx((llm + fp32) / (0.2 * 67e12))
    memory = found["memory_bytes"][0]
    parts = ("weights", "gradients", "optimizer", "weighting_model", "activations", "working")
    assert memory["step"] == pytest.approx(sum(memory[part] for part in parts))


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (["missing.yaml"], "missing.yaml: no such configuration file"),
        (["examples/tiny.yaml", "--gpus", "0"], "--gpus: expected 1 or more, got 0"),
        (["examples/tiny.yaml", "--mfu", "40"], "--mfu: expected a fraction above 0, at most 1"),
        (["examples/tiny.yaml", "--gpu", "h100"], "argument --gpu: invalid choice: 'h100'"),
        (["examples/tiny.yaml", "--model.layers", "3"], "unknown key 'model.layers'"),
        (["examples/tiny.yaml", "--parallel.tensor", "3"], "parallel.tensor 3 x"),
    ],
)
def test_mistakes_are_one_line(mistake: list[str], said: str) -> None:
    done = run("--gpus", "2", "--gpu", "h100-80gb", *mistake)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert said in done.stderr and not done.stdout


def test_help_names_every_gpu() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in GPUS)


def test_fp8_needs_hardware() -> None:
    config = large()
    config = replace(config, model=replace(config.model, precision="fp8"))
    with pytest.raises(UserError, match="a100-80gb has no FP8"):
        make_plan(config, GPUS["a100-80gb"], gpus=8, mfu=0.4)
    # A byte for either orientation of every weight of the layers, of 24 or, ends in bf16, 22.
    copies = planned(config).stages[0].fp8_copies
    assert copies == 2 * 24 * (4 * 2048**2 + 3 * 2048 * 5504)
    plain_ends = replace(config, model=replace(config.model, fp8_first_last_bf16=True))
    assert planned(plain_ends).stages[0].fp8_copies == pytest.approx(copies * 22 / 24)
    emulated = replace(config, model=replace(config.model, fp8_emulation=True))
    with pytest.raises(UserError, match="model.fp8_emulation: a plan is of"):
        planned(emulated)


def test_a_model_that_does_not_fit_says_what_to_change() -> None:
    config = replace(large(), training=TrainingConfig(global_batch_size=512, micro_batch_size=32))
    assert not planned(config).fits
    text = plan_text(planned(config))
    assert "does not fit: " in text and "try model.recompute full" in text
    changed = replace(config, model=replace(config.model, recompute="full"))
    assert planned(changed).fits and "\nfits: " in plan_text(planned(changed))


def test_a_weighting_model_of_370m_goes_through_its_samples_by_micro_batches() -> None:
    sizes = {"hidden_size": 1024, "num_layers": 24, "num_attention_heads": 16}
    weighting = {**sizes, "ffn_hidden_size": 2816}
    config = large(policy="dwm", weighting=weighting)
    one, eight = (planned(config, gpus) for gpus in (1, 8))
    first, shared = (plan.stages[0].weighting_activations for plan in (one, eight))
    assert first == shared and one.fits
    huge = {"hidden_size": 4096, "num_layers": 32, "num_attention_heads": 32}
    too_large = planned(large(policy="dwm", weighting={**huge, "ffn_hidden_size": 11008}))
    assert any("weighting.encoder llm" in line for line in too_large.to_json()["advice"])


def test_an_encoder_multiplies_in_bf16_beside_a_bf16_llm() -> None:
    """Its time is its FLOPs over the peak of what it multiplies in."""
    own, llm = (planned(large(policy="dwm", weighting={"encoder": e})) for e in ("own", "llm"))
    for plan, peak in ((own, 989e12), (llm, 67e12)):
        cost = plan.cost
        weighting = (cost.weighing + cost.learning) / peak
        rest = (cost.llm + cost.recompute + cost.reading + cost.updates) / 989e12
        assert plan.step_s == pytest.approx((weighting + rest) / (8 * 0.4), rel=1e-3)


def test_uniform_weights_cost_nothing_and_updates_on_training_less_than_fresh() -> None:
    online = {"mode": "online", "encoder": "llm"}
    plain = planned(large())
    fresh = planned(large(policy="dwm", weighting=online))
    inside = planned(large(policy="dwm", weighting={**online, "update_on": "training"}))
    assert plain.cost.share == 0.0 and plain.stages[0].virtual_step == 0.0
    # An update every ten steps: three plain steps, or two.
    rate = fresh.cost.num_updates / 1000
    assert fresh.cost.share == pytest.approx(3 * rate, rel=0.01)
    assert inside.cost.share == pytest.approx(2 * rate, rel=0.01)


def test_recomputation_is_a_forward_pass_more() -> None:
    config = large()
    full = replace(config, model=replace(config.model, recompute="full"))
    more = planned(full).step_s / planned(config).step_s
    assert 1.30 < more < 4 / 3  # all but the output layer
