"""A key without effect: an error on the command line, a warning in a file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_dwm.config import Config, UserError
from megatron_dwm.config.effect import Given, warnings_of_effect
from megatron_dwm.config.key import Part, entries
from megatron_dwm.config.load import load, save_config
from megatron_dwm.config.methods import METHODS
from megatron_dwm.config.names import known_keys
from megatron_dwm.weighting import learns, method_class

UNIFORM = "--policy.name uniform"
OWN = "--policy.name dwm"
LLM = "--policy.name dwm --weighting.encoder llm"
ONLINE = "--policy.name dwm --weighting.mode online"
LOADED = "--policy.name dwm --weighting.load w"
FROZEN = f"{LOADED} --weighting.frozen true"
DOMAINS = "--policy.name domain_mean"
MIXING = "--policy.name validation_mixing"
ALIGNED = "--policy.name gradient_alignment"
GREEDY = f"{ALIGNED} --policy.alignment_choice greedy"
OPUS = "--policy.name opus --weighting.pool_batches 2"
SIMILARITY = "--policy.name similarity --weighting.mode online"
FIXED = "--policy.name fixed"
CURRICULUM = "--policy.name curriculum"
UNROLL = "--policy.name dwm --bilevel.estimator unroll"

# (mode, key, a value that differs from the default, what the line says)
WITHOUT_EFFECT = [
    (ONLINE, "weighting.stages", "4", "weighting.mode is online, and it needs weighting.mode"),
    (ONLINE, "weighting.updates_per_stage", "4", "needs weighting.mode staged"),
    (OWN, "weighting.interval_steps", "4", "needs weighting.mode online"),
    (OWN, "weighting.warmup_steps", "4", "needs weighting.mode online"),
    (OWN, "weighting.early_layer", "2", "needs weighting.encoder llm"),
    (LLM, "weighting.num_layers", "2", "weighting.encoder own"),
    *[
        (LOADED, f"weighting.{name}", "8", "weighting.load is w, and it needs weighting.load empty")
        for name in ("hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size")
    ],
    *[
        (FROZEN, f"weighting.{name}", "0.5", "weighting.frozen is true, and it needs")
        for name in ("learning_rate", "weight_decay", "clip_grad")
    ],
    (FROZEN, "validation.path", "v", "policy dwm with weighting.frozen reads no target"),
    (FROZEN, "weighting.mode", "online", "learns no weights"),
    (FROZEN, "weighting.stages", "4", "learns no weights"),
    (FROZEN, "weighting.standardize", "false", "learns nothing from alignments"),
    (FROZEN, "bilevel.inner_optimizer", "sgd", "computes no hypergradients"),
    (OWN, "policy.domain_decay", "0.5", "policy dwm keeps no means of domains"),
    (OWN, "policy.domain_temperature", "0.4", "policy dwm keeps no means of domains"),
    (OWN, "policy.mix_fraction", "0.2", "policy dwm mixes no target passages"),
    (DOMAINS, "weighting.encoder", "llm", "policy domain_mean has no weighting model"),
    (DOMAINS, "weighting.load", "w", "policy domain_mean has no weighting model"),
    (DOMAINS, "weighting.frozen", "true", "policy domain_mean has no weighting model"),
    (DOMAINS, "weighting.learning_rate", "0.5", "policy domain_mean has no weighting model"),
    (DOMAINS, "policy.mix_fraction", "0.2", "policy domain_mean mixes no target passages"),
    (MIXING, "validation.batch_size", "4", "reads no validation batches"),
    (SIMILARITY, "weighting.update_on", "training", "learns nothing from alignments"),
    (DOMAINS, "weighting.normalizer", "first", "domain_mean cannot divide its weights after"),
    (f"{SIMILARITY} --weighting.group micro_batch", "weighting.normalizer", "first", "is micro_b"),
    (SIMILARITY, "bilevel.estimator", "unroll", "policy similarity computes no hypergradients"),
    (ALIGNED, "weighting.mode", "online", "alignment_choice softmax learns no weights"),
    (ALIGNED, "weighting.standardize", "false", "learns nothing from alignments"),
    (OWN, "policy.alignment_interval", "4", "policy dwm computes no alignments of the batches"),
    (OWN, "policy.alignment_choice", "greedy", "policy dwm does not weigh by the batch's own"),
    (
        ALIGNED,
        "policy.keep_ratio",
        "0.4",
        "policy.alignment_choice softmax has no fraction of units to keep",
    ),
    (ALIGNED, "policy.redundancy", "2", "alignment_choice softmax chooses nothing one by one"),
    (ALIGNED, "policy.sketch_size", "64", "alignment_choice softmax chooses nothing one by one"),
    (ALIGNED, "policy.jacobian", "exact", "alignment_choice softmax draws nothing from a pool"),
    (ALIGNED, "weighting.pool_batches", "2", "alignment_choice softmax trains on every batch"),
    (GREEDY, "policy.alignment_decay", "0.5", "needs policy.alignment_choice softmax"),
    (GREEDY, "policy.alignment_temperature", "2", "needs policy.alignment_choice softmax"),
    (GREEDY, "weighting.uniform_floor", "0.1", "alignment_choice greedy has no softmax"),
    (f"{GREEDY} --policy.redundancy 0", "policy.sketch_size", "64", "needs policy.redundancy set"),
    (
        f"{OPUS} --policy.redundancy 0",
        "policy.overlap_unit",
        "deviation",
        "needs policy.redundancy",
    ),
    (OPUS, "bilevel.estimator", "unroll", "policy opus computes no hypergradients"),
    (OPUS, "weighting.group", "global", "policy opus weighs every sample the same"),
    (OPUS, "policy.keep_ratio", "0.4", "policy opus has no fraction of units to keep"),
    (OWN, "policy.similarity_temperature", "0.4", "policy dwm compares no features"),
    (MIXING, "weighting.group", "global", "weighs every sample the same"),
    (MIXING, "policy.domain_decay", "0.5", "keeps no means of domains"),
    (OWN, "policy.column", "quality", "policy dwm has no weights of its own for documents"),
    (OWN, "policy.domain_weights", "{web: 2}", "has no weights of its own for documents"),
    (FIXED, "weighting.uniform_floor", "0.1", "policy fixed has no softmax over a group"),
    (FIXED, "policy.pacing_start", "0.5", "policy fixed has no curriculum"),
    (CURRICULUM, "policy.column", "quality", "policy curriculum has no weights of its own"),
    (UNIFORM, "validation.path", "nowhere.jsonl", "policy uniform reads no target"),
    (UNIFORM, "validation.loss_on", "last_word", "policy uniform reads no target"),
    (UNIFORM, "weighting.warn_effective_sample_size", "0.2", "weighs every sample the same"),
    (UNROLL, "bilevel.noise_interval_updates", "4", "bilevel.estimator is unroll"),
    (UNROLL, "bilevel.min_signal_to_noise", "0.2", "bilevel.estimator is unroll"),
    (
        f"{OWN} --bilevel.noise_interval_updates 0",
        "bilevel.min_signal_to_noise",
        "0.2",
        "bilevel.noise_interval_updates is 0, and it needs .*bilevel.noise_interval_updates set",
    ),
    (
        "",
        "training.keep_every",
        "10",
        "training.keep_last is 0, and it needs training.keep_last set",
    ),
    (
        "",
        "evaluation.interval_steps",
        "7",
        "evaluation.path is empty, and it needs evaluation.path set or evaluation.sets set",
    ),
    ("", "profiling.first_step", "3", "profiling.tool is none, and it needs profiling.tool torch"),
    ("", "profiling.last_step", "13", "profiling.tool is none"),
    ("", "profiling.ranks", "[1]", "profiling.tool is none"),
    ("", "run.allow_changed", "[run.seed]", "run.resume is false, and it needs run.resume true"),
    ("", "model.fp8_recipe", "delayed", "needs model.precision fp8 or model.fp8_emulation true"),
    ("", "model.fp8_first_last_bf16", "true", "model.precision is fp32, and it needs"),
    ("--model.init_from m", "model.init_std", "0.1", "model.init_from is m, and it needs"),
]


def parts_of(config: Config) -> frozenset[Part]:
    return method_class(config).parts(config)


def _judged(arguments: list[str]) -> list[str]:
    loaded = load(arguments)
    return warnings_of_effect(loaded.config, loaded.given, parts_of(loaded.config))


@pytest.mark.parametrize(("mode", "key", "value", "words"), WITHOUT_EFFECT)
def test_the_command_line_is_refused_and_a_file_is_warned(
    tmp_path: Path, mode: str, key: str, value: str, words: str
) -> None:
    with pytest.raises(UserError, match=rf"^{re.escape(key)}: has no effect: .*{words}") as caught:
        _judged([*mode.split(), f"--{key}", value])
    assert str(caught.value).endswith("; leave it out")
    file = tmp_path / "run.yaml"
    section, name = key.split(".")
    file.write_text(f"{section}: {{{name}: {value}}}")
    [line] = _judged([str(file), *mode.split()])
    assert re.match(rf"{re.escape(key)}: set in the configuration file, has no effect: ", line)
    assert re.search(words, line) and "\n" not in line
    with pytest.raises(UserError, match=key):  # an option over a file's key is an option
        _judged([str(file), *mode.split(), f"--{key}={value}"])


def test_an_empty_value_takes_back_what_a_file_says(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("validation: {path: v.jsonl}")
    arguments = [str(file), "--policy.name", "uniform"]
    assert len(_judged(arguments)) == 1
    assert _judged([*arguments, "--validation.path", "null"]) == []


@pytest.mark.parametrize("policy", ["uniform", "validation_mixing"])
def test_nothing_of_the_weighting_model_is_for_policies_without_one(policy: str) -> None:
    """All of `weighting`, `bilevel` and the domains' keys, at their defaults as at any value.

    Every policy has units.
    """
    loaded = load(["--policy.name", policy])
    for entry in entries(loaded.config):
        ours = entry.name.startswith(("weighting.", "bilevel.", "policy.domain_"))
        given = Given(command_line=frozenset({entry.name}))
        # An empty value asks for nothing.
        if ours and not entry.name.startswith("weighting.unit") and entry.value is not None:
            with pytest.raises(UserError, match=f"{entry.name}: has no effect: policy {policy}"):
                warnings_of_effect(loaded.config, given, parts_of(loaded.config))


WITH_EFFECT = [
    f"{OWN} --weighting.stages 4 --weighting.updates_per_stage 4 --weighting.num_layers 2",
    f"{OWN} --weighting.update_on fresh --weighting.ffn_hidden_size 32 --validation.path v",
    f"{LLM} --weighting.early_layer 2 --weighting.ffn_hidden_size 32 --weighting.hidden_size 8",
    f"{ONLINE} --weighting.interval_steps 4 --weighting.warmup_steps 4",
    f"{ONLINE} --weighting.update_on training",
    f"{FROZEN} --weighting.group global --weighting.uniform_floor 0.1 --weighting.encoder llm",
    f"{FROZEN} --weighting.encoder llm --weighting.early_layer 2",
    f"{DOMAINS} --policy.domain_decay 0.5 --weighting.mode online --weighting.standardize false",
    f"{DOMAINS} --weighting.damp_by_noise true --weighting.min_effective_sample_size 0",
    f"{FIXED} --policy.domain_weights web=2 code=0.5 --weighting.group global",
    f"{CURRICULUM} --policy.difficulty quality --policy.pacing_steps 0.2",
    f"{MIXING} --policy.mix_fraction 0.2 --validation.path v --validation.loss_on last_word",
    f"{SIMILARITY} --policy.similarity_layer 2 --weighting.interval_steps 4 --validation.path v",
    f"{SIMILARITY} --weighting.freeze_after 0.5 --validation.batch_size 4",
    f"{ALIGNED} --policy.alignment_interval 2 --policy.alignment_warmup 4 --validation.path v",
    f"{ALIGNED} --bilevel.noise_interval_updates 4 --bilevel.inner_optimizer sgd",
    "--training.keep_every 10 --training.keep_last 1",
    "--evaluation.path e --evaluation.interval_steps 9",
    "--evaluation.sets a=e b=f --evaluation.at_start true",
    "--profiling.tool torch --profiling.first_step 3",
    "--run.resume true --run.allow_changed run.seed",
    "--model.precision fp8 --model.fp8_recipe delayed",
    "--model.fp8_emulation true --model.fp8_recipe tensorwise --model.fp8_first_last_bf16 true",
]


@pytest.mark.parametrize("arguments", WITH_EFFECT)
def test_what_has_an_effect_passes_and_its_resolved_file_says_nothing(
    tmp_path: Path, arguments: str
) -> None:
    assert _judged(arguments.split()) == []
    save_config(load(arguments.split()).config, tmp_path / "config.yaml")
    again = load([str(tmp_path / "config.yaml")])
    assert again.given.file == frozenset(known_keys())
    assert _judged([str(tmp_path / "config.yaml")]) == []


def test_a_shared_file_gives_one_line_a_reason_and_the_command_line_one_in_all() -> None:
    tiny = str(Path(__file__).parent.parent.parent / "examples" / "tiny.yaml")
    assert _judged([tiny]) == []
    lines = _judged([tiny, *UNIFORM.split()])
    assert lines == [
        "validation.path: set in the configuration file, has no effect: policy uniform reads no "
        "target",
        "weighting.encoder: set in the configuration file, has no effect: policy uniform has no "
        "weighting model",
        "weighting.mode: set in the configuration file, has no effect: policy uniform learns no "
        "weights",
        "weighting.group: set in the configuration file, has no effect: policy uniform weighs "
        "every sample the same",
    ]
    with pytest.raises(UserError) as caught:
        _judged(["--policy.mix_fraction", "0.2", "--weighting.stages", "3"])
    assert str(caught.value).endswith("leave it out (also without effect: weighting.stages)")


def test_the_last_place_counts(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("training: {steps: 3, keep_last: 2}\nrun: {seed: 5}")
    second.write_text("training: {steps: 4}")
    given = load([str(first), "--training.steps", "5", "--training.keep_last=1"]).given
    assert given.command_line == {"training.steps", "training.keep_last"}
    assert given.file == {"run.seed"}
    loaded = load(["--training.steps", "5", "--data.train", "a", "--config", str(second)])
    assert loaded.config.training.steps == 4
    assert loaded.given == Given(
        command_line=frozenset({"data.train"}), file=frozenset({"training.steps"})
    )
    with pytest.raises(UserError, match="second.yaml: unknown key 'training.stps'"):
        second.write_text("training: {stps: 4}")
        load([f"--config={second}"])


def test_every_policy_says_its_parts() -> None:
    used = {entry.rule.part for entry in entries(Config())} - {None}
    runs = [load(["--policy.name", name]).config for name in METHODS]
    assert used == frozenset().union(*map(parts_of, runs))


def test_a_frozen_key_does_not_stop_a_policy_without_a_weighting_model(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("weighting: {load: w, frozen: true}")
    assert learns(load([str(file), *DOMAINS.split()]).config)
    assert not learns(load([str(file), *OWN.split()]).config)
