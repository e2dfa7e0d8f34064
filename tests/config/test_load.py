"""Configuration files and overrides, and every mistake in them that has to be one line."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from megatron_dwm.config import Config, UserError
from megatron_dwm.config.defaults import with_defaults
from megatron_dwm.config.load import config_text, load_config, save_config
from megatron_dwm.config.megatron_flags import COUNTERPARTS, WITHOUT
from megatron_dwm.config.names import known_keys
from megatron_dwm.config.paths import with_absolute_paths
from megatron_dwm.config.validate import Heads, length_problems, validate_config
from megatron_dwm.weighting import check_method

REPOSITORY = Path(__file__).parent.parent.parent

FIXED_KEYS = """
run.dir run.seed parallel.tensor parallel.pipeline parallel.sharded_optimizer model.preset
model.precision model.init_from data.train data.tokenizer data.sequence_length validation.path
validation.loss_on training.steps training.global_batch_size training.micro_batch_size
training.learning_rate training.checkpoint_interval_steps policy.name weighting.stages
weighting.updates_per_stage weighting.load bilevel.estimator
""".split()


def _write(folder: Path, text: str) -> str:
    file = folder / "run.yaml"
    file.write_text(text)
    return str(file)


def test_keys_that_users_type_exist() -> None:
    assert set(FIXED_KEYS) <= set(known_keys())


@pytest.mark.parametrize("file", sorted((REPOSITORY / "examples").glob("*.yaml")), ids=str)
def test_shipped_configurations_load(file: Path) -> None:
    assert isinstance(load_config([str(file)]), Config)


def test_overrides_win_and_everything_comes_back(tmp_path: Path) -> None:
    file = _write(tmp_path, "training: {steps: 7, learning_rate: 1e-3}\ndata: {train: [0.3, a]}")
    config = load_config([file, "--training.steps", "9", "--run.seed=4"])
    assert (config.training.steps, config.training.learning_rate) == (9, 1e-3)
    assert config.data.train == [0.3, "a"] and config.run.seed == 4
    save_config(config, tmp_path / "again.yaml")
    assert load_config([str(tmp_path / "again.yaml")]) == config


def test_blends_are_typed_as_megatrons_data_path() -> None:
    words = ["--data.train", "0.3", "a", "0.7", "b", "--training.steps", "3"]
    config = load_config(words)
    assert config.data.train == ["0.3", "a", "0.7", "b"] and config.training.steps == 3


def test_configurations_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().training.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training: {learning_rte: 3}", ["learning_rte", "'training.learning_rate'", "run.yaml"]),
        ("trainig: {steps: 3}", ["trainig", "'training'"]),
        ("training: {steps: abc}", ["training.steps", "int", "abc"]),
        ("training: 3", ["training", "keys"]),
        ("training: [", ["line", "YAML"]),
        ("- 3", ["sections"]),
        ("model: {precision: fp3}", ["model.precision", "fp32", "bf16"]),
    ],
)
def test_mistakes_in_a_file_are_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config([_write(tmp_path, text)])
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--training.stps", "3"], ["training.stps", "'training.steps'"]),
        (["--training.steps", "3.5"], ["training.steps", "3.5"]),
        (["--training.steps"], ["training.steps"]),
        (["nowhere.yaml"], ["nowhere.yaml", "no such"]),
        (["--run.seed", "1", "stray"], ["stray"]),
        (["--train-iters", "10"], ["--train-iters is a flag of Megatron-LM's", "training.steps"]),
        (["--lr=3e-4"], ["--lr is a flag of Megatron-LM's: here it is training.learning_rate"]),
        (["--rampup-batch-size", "1", "1", "9"], ["--rampup-batch-size", "has one size"]),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_megatrons_flags_name_keys_that_exist_and_stand_in_the_document() -> None:
    document = (REPOSITORY / "docs" / "megatron.md").read_text(encoding="utf-8")
    for flag, words in {**COUNTERPARTS, **WITHOUT}.items():
        assert f"| `--{flag}` | {words} |" in document
    training, recipe = Config().training, Config().model.fp8_recipe
    for words in (
        f"0.999 there and {training.adam_beta2} here, `--weight-decay` 0.01 and "
        f"{training.weight_decay}, the warm-up 0 and {training.warmup_fraction} of the steps, "
        f"`--min-lr` 0 and {training.min_learning_rate_fraction} of the peak",
        f"`--fp8-recipe` delayed and {recipe}",
    ):
        assert words in " ".join(document.split())
    keys = {name for words in COUNTERPARTS.values() for name in re.findall(r"\w+\.\w+", words)}
    assert keys - {"run.dir/tensorboard"} <= set(known_keys())


SHAPE = Heads(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    padded_vocab_size=1024,
    ffn_hidden_size=176,
)
DWM = ["--policy.name", "dwm", "--validation.path", "v"]
MIXING = ["--policy.name", "validation_mixing", "--validation.path", "v"]
LOAD = ["--weighting.load", "w"]
MICRO = ["--training.micro_batch_size", "4"]
TARGET = ["--validation.path", "v"]
LOAD_DWM = ["--policy.name", "dwm", *LOAD, "--weighting.frozen", "true"]
IN_STEP = ["--weighting.mode", "online", "--weighting.update_on", "training"]
FRESH = ["--weighting.mode", "online", "--weighting.update_on", "fresh"]
GLOBAL = ["--weighting.group", "global"]
QUARTER = ["--weighting.min_effective_sample_size", "0.25"]
GOOD = ["--data.train", "a", "--data.tokenizer", "t"]


def judge(config: Config, shape: Heads, world_size: int) -> None:
    """All rules, those of the method included."""
    validate_config(config, shape, world_size)
    check_method(config, shape.num_layers, world_size)


def test_a_good_configuration_passes() -> None:
    judge(load_config(GOOD), SHAPE, world_size=1)
    judge(load_config([*GOOD, "--parallel.tensor", "2", "--parallel.pipeline", "2"]), SHAPE, 4)


@pytest.mark.parametrize(
    ("arguments", "world_size", "word"),
    [
        (["--training.steps", "0"], 1, "training.steps"),
        (["--training.micro_batch_size", "5"], 1, "training.global_batch_size"),
        (["--training.micro_batch_size", "32"], 2, "2 data-parallel"),
        (["--parallel.tensor", "3"], 3, "parallel.tensor"),
        (["--parallel.tensor", "2"], 3, "number of processes"),
        (["--parallel.tensor", "4"], 4, "query_groups"),
        (["--parallel.pipeline", "4"], 4, "num_layers"),
        (["--parallel.sequence", "true"], 1, "parallel.sequence"),
        (["--parallel.context", "2"], 3, "parallel.context 2 x parallel.pipeline 1"),
        (["--parallel.context", "2", "--data.sequence_length", "34"], 2, "multiple of 2 x 2 = 4"),
        (["--data.sequence_length", "0"], 1, "data.sequence_length"),
        (["--policy.name", "dwm"], 1, "validation.path"),
        (["--policy.name", "dwm", "--weighting.frozen", "true"], 1, "weighting.load"),
        (["--weighting.uniform_floor", "1.0"], 1, "weighting.uniform_floor"),
        (["--training.clip_grad=-1"], 1, "training.clip_grad"),
        (["--training.spike_factor", "0.9"], 1, "training.spike_factor"),
        (["--validation.batch_size", "0"], 1, "validation.batch_size"),
        ([*DWM, "--weighting.update_on", "training"], 1, "weighting.mode online"),
        ([*DWM, "--weighting.encoder", "llm", "--weighting.early_layer", "3"], 1, "early_layer"),
        ([*DWM, "--weighting.freeze_after", "0"], 1, "freeze_after"),
        ([*DWM, *IN_STEP, "--weighting.warmup_steps", "0"], 1, "weighting.warmup_steps 0: .* 2"),
        ([*DWM, *IN_STEP, "--weighting.warmup_steps", "1"], 1, "weighting.warmup_steps 1: .* 2"),
        ([*DWM, "--training.micro_batch_size", "2"], 1, "group of 2 .* never below 0.5,"),
        ([*LOAD_DWM, "--training.micro_batch_size", "2"], 1, "min_effective_sample_size 0.5: "),
        ([*DWM, *GLOBAL, "--weighting.min_effective_sample_size", "0.03"], 1, "global_batch_size"),
        (["--policy.name", "domain_mean", *TARGET, *MICRO, *QUARTER], 1, "group of 4"),
        (
            [*DWM, "--weighting.damp_by_noise", "true", "--bilevel.noise_interval_updates", "0"],
            1,
            "noise_interval_updates",
        ),
        (
            [*DWM, "--weighting.damp_by_noise", "true", "--validation.batch_size", "1"],
            1,
            "validation.batch_size",
        ),
        (["--policy.name", "domain_mean"], 1, "validation.path"),
        (["--policy.name", "validation_mixing"], 1, "validation.path"),
        ([*MIXING, "--policy.mix_fraction", "0.01"], 1, "policy.mix_fraction"),
        ([*MIXING, "--policy.mix_fraction", "0.99"], 1, "policy.mix_fraction"),
        (["--run.allow_changed", "run.sead"], 1, "run.allow_changed run.sead: .* is run.seed$"),
        ([*DWM, "--bilevel.estimator", "unroll", *MICRO], 2, "one process"),
        ([*DWM, "--bilevel.estimator", "unroll", "--model.recompute", "full"], 1, "recompute"),
        (
            [*DWM, "--bilevel.estimator", "finite_difference", "--model.precision", "bf16"],
            1,
            "fp32",
        ),
    ],
)
def test_impossible_combinations_are_named(
    arguments: list[str], world_size: int, word: str
) -> None:
    with pytest.raises(UserError, match=word):
        judge(load_config([*GOOD, *arguments]), SHAPE, world_size)


@pytest.mark.parametrize(
    "arguments",
    [
        [*DWM, *IN_STEP, "--weighting.warmup_steps", "2"],
        [*DWM, *FRESH, "--weighting.warmup_steps", "0"],
        [*LOAD_DWM, *IN_STEP, "--weighting.warmup_steps", "0"],
        [*DWM, *MICRO, "--weighting.min_effective_sample_size", "0.26"],
        [*DWM, *MICRO, "--weighting.min_effective_sample_size", "0"],
        ["--training.micro_batch_size", "2"],
    ],
    ids=" ".join,
)
def test_their_neighbors_pass(arguments: list[str]) -> None:
    judge(load_config([*GOOD, *arguments]), SHAPE, world_size=1)


LOADED = ["--policy.name", "dwm", "--weighting.load", "w", "--weighting.frozen", "true"]
ABOUT_LEARNING = [
    (["--training.steps", "3"], 1, "weighting.stages 5"),
    (["--weighting.update_on", "training"], 1, "weighting.mode online"),
    (
        ["--weighting.damp_by_noise", "true", "--bilevel.noise_interval_updates", "0"],
        1,
        "noise_interval_updates",
    ),
    (["--weighting.damp_by_noise", "true", "--validation.batch_size", "1"], 1, "2 or more"),
    (["--bilevel.estimator", "unroll", "--weighting.damp_by_noise", "true"], 1, "measures no"),
    (["--bilevel.estimator", "unroll", *MICRO], 2, "one process"),
    (["--bilevel.estimator", "unroll", "--model.recompute", "full"], 1, "recompute none"),
    (["--bilevel.estimator", "finite_difference", "--model.precision", "bf16"], 1, "fp32"),
]


@pytest.mark.parametrize(("arguments", "world_size", "word"), ABOUT_LEARNING)
def test_a_frozen_run_keeps_no_rule_about_learning(
    arguments: list[str], world_size: int, word: str
) -> None:
    """The same that a learning run is refused for; it needs no target either."""
    judge(load_config([*GOOD, *LOADED, *arguments]), SHAPE, world_size)
    with pytest.raises(UserError, match=word):
        judge(load_config([*GOOD, *DWM, *arguments]), SHAPE, world_size)


def test_a_loaded_models_sizes_are_its_own() -> None:
    """The configured ones play no part, so they are not judged; what weighs alone still is."""
    judge(load_config([*GOOD, *LOADED, "--weighting.hidden_size", "30"]), SHAPE, 1)
    with pytest.raises(UserError, match="weighting.hidden_size 30"):
        judge(load_config([*GOOD, *DWM, "--weighting.hidden_size", "30"]), SHAPE, 1)
    with pytest.raises(UserError, match="always weighs 1"):
        one = ["--training.micro_batch_size", "1"]
        judge(load_config([*GOOD, *LOADED, *one]), SHAPE, 1)


@pytest.mark.parametrize("passages", [1, 4, 7])
def test_any_number_of_passages_goes_through_any_layout(passages: int) -> None:
    """Rows without loss fill up what two replicas of two interleaved stages do not share out."""
    layout = ["--parallel.pipeline", "2", "--parallel.virtual_stages", "2"]
    sizes = ["--training.micro_batch_size", "2", "--validation.batch_size", str(passages)]
    config = load_config([*GOOD, *DWM, *GLOBAL, *layout, *sizes])
    judge(config, SHAPE._replace(num_layers=4), 4)


def test_weights_of_domains_have_names(tmp_path: Path) -> None:
    """On the command line, in a file, and both: the later one replaces the earlier one."""
    typed = ["--policy.domain_weights", "web=2", "a=b=0.5"]
    assert load_config(typed).policy.domain_weights == {"web": 2.0, "a=b": 0.5}
    file = tmp_path / "run.yaml"
    file.write_text("policy: {domain_weights: {web: 3, code: 1}}")
    assert load_config([str(file)]).policy.domain_weights == {"web": 3.0, "code": 1.0}
    assert load_config([str(file), *typed]).policy.domain_weights == {"web": 2.0, "a=b": 0.5}
    file.write_text(config_text(load_config(typed)))
    assert load_config([str(file)]).policy.domain_weights == {"web": 2.0, "a=b": 0.5}


@pytest.mark.parametrize("words", ["web", "web=x", "=2", "a=1 a=2", "web=nan", "web=-1", "[1]"])
def test_wrong_weights_of_domains_are_one_line(words: str) -> None:
    with pytest.raises(UserError, match="^policy.domain_weights.*[Ee]xpected .*") as caught:
        load_config(["--policy.domain_weights", *words.split()])
    assert "\n" not in str(caught.value)


def test_no_arguments_give_the_defaults() -> None:
    assert load_config([]) == with_defaults(Config())


def test_a_home_directory_is_named_as_in_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no shell has replaced it: in a file, and after =."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "run.yaml"
    file.write_text("data: {train: [0.3, ~/a, 0.7, /b/~c], tokenizer: ~/t}\nrun: {dir: ~/r}")
    config = load_config([str(file), "--policy.reference=~/m", "--evaluation.path=~/e"])
    assert config.data.train == [0.3, f"{tmp_path}/a", 0.7, "/b/~c"]
    assert config.data.tokenizer == f"{tmp_path}/t" and config.run.dir == f"{tmp_path}/r"
    assert config.policy.reference == f"{tmp_path}/m"
    assert config.evaluation.path == f"{tmp_path}/e"
    with pytest.raises(UserError, match=r"run.dir ~no-such-user/x: ~ names no known user"):
        load_config(["--run.dir", "~no-such-user/x"])


def test_a_reference_is_a_path_like_others() -> None:
    config = load_config(["--policy.name", "excess_loss", "--policy.reference", "ref/step_1"])
    assert with_absolute_paths(config).policy.reference == str(Path("ref/step_1").absolute())


def test_missing_data_is_named() -> None:
    with pytest.raises(UserError, match="data.train"):
        judge(load_config(["--data.tokenizer", "t"]), SHAPE, 1)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("data.mask_documents", "Expected a bool, or null"),
        ("model.num_layers", "Expected a int, or null"),
        ("model.preset", r"expected one of \['tiny', .*\], or null"),
    ],
)
def test_a_wrong_value_of_a_key_that_may_be_empty(key: str, expected: str) -> None:
    with pytest.raises(UserError, match=rf"^{key}: {expected}\. Got value: maybe$"):
        load_config([f"--{key}", "maybe"])


def test_the_tensor_size_divides_a_part_of_a_sample() -> None:
    layout = ["--parallel.tensor", "4", "--parallel.sequence", "true", "--parallel.context", "2"]
    config = load_config([*GOOD, *layout])
    [problem] = length_problems(config, "data.sequence_length", 20)
    assert problem == (
        "parallel.sequence: expected parallel.tensor 4 to divide data.sequence_length / "
        "parallel.context 2, which is 10"
    )
    assert not [*length_problems(config, "data.sequence_length", 24)]
