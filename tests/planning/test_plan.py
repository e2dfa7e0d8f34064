"""The command: what it prints, that parts add up, and that mistakes are one line."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dwm.config import BilevelConfig, Config, TrainingConfig, UserError
from megatron_dwm.planning import GPUS, Plan, make_plan
from megatron_dwm.planning.table import plan_text
from megatron_dwm.weighting.model import WeightingModel, WeightingShape
from tests.convert.families import write_llama
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
    llm = sum(flops[part] for part in ("llm", "recompute", "reading", "updates", "noise"))
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
        (
            ["examples/tiny.yaml", "--parallel.tensor", "3"],
            "parallel.tensor 3 x parallel.pipeline 1: expected to divide --gpus, which is 2; give",
        ),
        (["examples/tiny.yaml", "--weighting.stages", "3"], "weighting.stages: has no effect: "),
        (["examples/tiny.yaml", "--weighting.load", "gone"], "weighting.load: gone/weighting.json"),
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


def test_the_documented_example_works_as_written() -> None:
    text = (REPOSITORY / "docs" / "planning.md").read_text()
    [command] = re.findall(r"^python (tools/plan\.py examples/(?:.*\\\n)*.*)$", text, re.MULTILINE)
    done = run(*shlex.split(command.replace("\\\n", " "))[1:])
    assert done.returncode == 0, done.stderr
    assert "1,345,423,360 parameters, bf16" in done.stdout
    assert "64 x h100-80gb: tensor 1 x pipeline 1 x data 64" in done.stdout


@pytest.mark.parametrize(
    ("recipe", "gpus"),
    [
        ("tensorwise", ["h100-80gb", "h200-141gb", "b200-192gb"]),
        ("delayed", ["h100-80gb", "h200-141gb", "b200-192gb"]),
        ("blockwise", ["h100-80gb", "h200-141gb", "b200-192gb"]),
        ("mxfp8", ["b200-192gb"]),
    ],
)
def test_a_recipe_is_planned_where_the_gpu_has_it(recipe: str, gpus: list[str]) -> None:
    """As Transformer Engine checks compute capabilities: 8.9, 9.0 and, for mxfp8, 10.0 on."""
    config = large()
    config = replace(config, model=replace(config.model, precision="fp8", fp8_recipe=recipe))
    for gpu in GPUS.values():
        if gpu.name in gpus:
            assert make_plan(config, gpu, gpus=8, mfu=0.4).fits
            continue
        with pytest.raises(UserError, match=f"(fp8_recipe|precision).*{gpu.name} has"):
            make_plan(config, gpu, gpus=8, mfu=0.4)


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
        rest = (cost.llm + cost.recompute + cost.reading + cost.updates + cost.noise) / 989e12
        assert plan.step_s == pytest.approx((weighting + rest) / (8 * 0.4), rel=1e-3)


def test_a_reference_model_runs_at_the_llms_precision_and_has_its_own_size(tmp_path: Path) -> None:
    """Also where keys of the weighting model, which has no part in it, say something else."""
    write_llama(tmp_path)
    plans = {}
    for name in ("unknown", str(tmp_path)):
        config = large(policy="excess_loss", weighting={"encoder": "llm"})
        policy = replace(config.policy, reference=name)
        plans[name] = planned(replace(config, policy=policy))
    as_large, small = plans.values()
    assert as_large.cost.share == pytest.approx(1 / 3)
    assert as_large.time_share == pytest.approx(1 / 3)
    assert as_large.stages[0].reference == as_large.stages[0].weights
    assert "policy.reference unknown is no Hugging Face model" in plan_text(as_large)
    assert small.reference is not None
    # In bf16; the rows that pad the vocabulary count.
    padded = 2 * 2 * (small.reference.padded_vocab_size - small.reference.vocab_size)
    padded *= small.reference.hidden_size
    assert small.stages[0].reference == 2 * small.reference.num_parameters() + padded
    assert 0 < small.cost.share < 0.01 and "no Hugging Face model" not in plan_text(small)


def test_a_run_that_ends_before_its_first_update_needs_nothing_for_one() -> None:
    config = large(policy="dwm", weighting={"mode": "online", "encoder": "llm"})
    short = planned(replace(config, training=replace(config.training, steps=3)))
    assert planned(config).cost.num_updates > short.cost.num_updates == 0
    for stage in short.stages:
        assert stage.update == stage.step and stage.virtual_step == 0.0
    assert all(line.update_messages == 0 for line in short.traffic)


def test_uniform_weights_cost_nothing_and_updates_on_training_less_than_fresh() -> None:
    online = {"mode": "online", "encoder": "llm", "update_on": "fresh"}
    plain = planned(large())
    fresh = planned(large(policy="dwm", weighting=online))
    inside = planned(large(policy="dwm", weighting={**online, "update_on": "training"}))
    assert plain.cost.share == 0.0 and plain.stages[0].virtual_step == 0.0
    # An update every ten steps: three plain steps, or two, and one for noise in every tenth.
    rate = fresh.cost.num_updates / 1000
    assert fresh.cost.share == pytest.approx(3.1 * rate, rel=0.01)
    assert inside.cost.share == pytest.approx(2.1 * rate, rel=0.01)


@pytest.mark.parametrize(("recompute", "forward_passes"), [("none", 3), ("full", 4)])
def test_a_measurement_of_noise_is_one_more_pass(recompute: str, forward_passes: int) -> None:
    """Against none: of a forward and a backward pass, recomputed layers forward once more."""
    config = large(
        policy="dwm", weighting={"mode": "online", "encoder": "llm", "update_on": "fresh"}
    )
    config = replace(config, model=replace(config.model, recompute=recompute))
    never, always, third = (
        planned(replace(config, bilevel=BilevelConfig(noise_interval_updates=every)))
        for every in (0, 1, 3)
    )
    updates, steps = never.cost.num_updates, config.training.steps
    # The output layer is not recomputed: 5 % of this model.
    a_pass = forward_passes * never.cost.llm / 3
    more_s = (always.step_s - never.step_s) * (8 * 0.4 * H100.bf16_flops)
    assert more_s == pytest.approx(a_pass * updates / steps, rel=0.02)
    measured = len(range(0, updates, 3))
    assert third.cost.noise == pytest.approx(always.cost.noise * measured / updates)
    assert never.cost.noise == 0.0 and "signal-to-noise" not in plan_text(never)
    assert "signal-to-noise" in plan_text(always)


def test_a_weighting_model_to_start_from_has_its_own_sizes(tmp_path: Path) -> None:
    shape = WeightingShape(
        vocab_size=300, hidden_size=64, num_layers=3, num_attention_heads=4, ffn_hidden_size=96
    )
    model = WeightingModel(shape)
    for name, content in model.files().items():
        (tmp_path / name).write_bytes(content)
    start = planned(large(policy="dwm", weighting={"load": str(tmp_path)}))
    count = sum(value.numel() for value in model.parameters())
    per_parameter = 24  # fp32 value, gradient, sum, last gradient, two moments
    assert start.stages[0].weighting_model == per_parameter * count
    with pytest.raises(UserError, match="weighting.load: .* trained with weighting.encoder own"):
        planned(large(policy="dwm", weighting={"load": str(tmp_path), "encoder": "llm"}))
    (tmp_path / "weighting.json").write_text("{")
    with pytest.raises(UserError, match="weighting.json does not describe a weighting model"):
        planned(large(policy="dwm", weighting={"load": str(tmp_path)}))


def test_tables_take_the_unit_of_what_they_hold() -> None:
    """A plan of a tiny run has numbers, too: those of the JSON in the units that the text names."""
    weighting = {"mode": "online", "group": "global", "update_on": "fresh"}
    plan = planned(configured(policy="dwm", weighting=weighting, tensor=2), gpus=2)
    sizes = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "MFLOP": 1e6, "GFLOP": 1e9, "TFLOP": 1e12}
    lines = plan_text(plan).splitlines()
    for title in ("a rank  ", "FLOPs a step", "on the link"):
        [at] = [number for number, line in enumerate(lines) if title in line]
        table = lines[at : lines.index("", at)]
        # Columns end together: no number is wider than its column.
        assert len({len(line) for line in table}) == 1, table
    [peak] = [line.split() for line in lines if line.startswith("peak with weighting updates")]
    [unit] = [line.split()[0] for line in lines if " a rank  " in line]
    assert float(peak[-1]) >= 1
    assert float(peak[-1]) * sizes[unit] == pytest.approx(plan.needed_bytes, abs=sizes[unit] / 200)
    [unit] = [line.split()[-2] for line in lines if line.startswith("FLOPs a step")]
    [llm] = [line.split()[-2] for line in lines if line.startswith("LLM forward")]
    assert float(llm) >= 1
    assert float(llm) * sizes[unit] == pytest.approx(plan.cost.llm, abs=sizes[unit] / 20)
    assert "GB a rank" in plan_text(planned(large()))


def test_recomputation_is_a_forward_pass_more() -> None:
    config = large()
    full = replace(config, model=replace(config.model, recompute="full"))
    more = planned(full).step_s / planned(config).step_s
    assert 1.30 < more < 4 / 3  # all but the output layer


def test_opus_costs_its_pools_and_sketches() -> None:
    """A pool of two batches with 512 of 1024 tokens scored, from step 50 on."""
    pools = {"pool_batches": 2}
    config = large(policy="opus", weighting=pools)
    config = replace(config, policy=replace(config.policy, score_tokens=512))
    scored, without, exact = (
        planned(replace(config, policy=replace(config.policy, **changes)))
        for changes in ({}, {"redundancy": 0.0}, {"jacobian": "exact"})
    )
    plain = planned(large())
    part = 1 - 50 / config.training.steps
    # Half of the tokens of two batches cost one, less attention; passages are a batch.
    for plan, passes in ((scored, 4 + 3), (without, 3 + 3), (exact, 7 + 3)):
        expected = part * passes * plain.cost.llm / 3
        assert plan.cost.pool_passes == pytest.approx(expected, rel=0.03)
    stage, other = scored.stages[0], plain.stages[0]
    parameters = other.gradients / 4
    of_candidates = 4 * 8192 * 2 * 512 / 8
    assert stage.sketches == pytest.approx(12 * parameters + of_candidates)
    assert without.stages[0].sketches == 0.0 == stage.virtual_step < exact.stages[0].virtual_step
    assert stage.update == pytest.approx(stage.step + stage.sketches)


@pytest.mark.parametrize("group", ["micro_batch", "global"])
def test_blade_costs_what_its_run_counts(group: str) -> None:
    """In forward passes: a step 3, a weighed step more, a step of the reference 2 + 3 + 3."""
    config = large(policy="blade", weighting={"group": group})
    rhythm = {"sync_first_step": 4, "sync_interval_steps": 4, "reference_steps": 3}
    config = replace(config, policy=replace(config.policy, **rhythm))
    config = replace(config, training=replace(config.training, steps=12))
    cost = planned(config).cost
    # Of 12 steps, 8 are weighed: by the reference's pass, in a global group also by the LLM's.
    passes = 12 * 3 + 8 * (2 if group == "global" else 1) + 2 * 3 * 8
    assert 12 * (cost.llm + cost.weighting) == pytest.approx(passes * cost.llm / 3)


def test_a_reference_in_host_memory_takes_the_devices_only_at_work() -> None:
    """Its gradients are zero between uses, so the host has no copy of them."""
    config = large(policy="blade")
    config = replace(config, policy=replace(config.policy, sync_first_step=500))
    waiting = replace(config, policy=replace(config.policy, offload_reference=True))
    stays, waits = (planned(each).stages[0] for each in (config, waiting))
    assert stays.reference == stays.weights + stays.gradients + stays.optimizer
    assert waits.reference == 0.0 == stays.reference_on_host
    assert waits.reference_on_host == stays.weights + stays.optimizer
    assert waits.step == stays.step - stays.reference
    at_work = stays.reference + stays.activations + stays.working
    assert waits.update == max(waits.step, waits.always + at_work)
