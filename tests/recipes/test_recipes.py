"""Every recipe fits where its head says, costs what its head says, and runs at a small size."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_dwm.tokenizer.opening import open_tokenizer
from megatron_dwm.weighting.model import WeightingShape, build_weighting_model
from tests.forking.client import REPOSITORY, run_python
from tests.small_runs.command import metrics
from tests.small_runs.fixtures import CORPUS, Corpus

FOLDER = REPOSITORY / "examples" / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
FIGURES = re.compile(r"at 40 % of the (?:FP8 )?peak: ([\d,.]+) GPU hours, ([\d.]+) GB a GPU")
QUIET = {"PYTHONWARNINGS": "ignore"}

SMALL_ENCODER = {
    "weighting.hidden_size": 32,
    "weighting.num_layers": 1,
    "weighting.num_attention_heads": 4,
    "weighting.ffn_hidden_size": 64,
}
TARGET = {"validation.batch_size": 4}
# An update inside a step comes inside the second at the earliest, and needs a step after it.
ONLINE = {"weighting.warmup_steps": 2}
SMOKE: dict[str, tuple[int, dict[str, object]]] = {
    "llama_370m_uniform": (2, {}),
    "llama_370m_dwm": (
        2,
        {**TARGET, **SMALL_ENCODER, "weighting.stages": 2, "weighting.updates_per_stage": 2},
    ),
    "llama_370m_dwm_features": (2, {**TARGET, **ONLINE}),
    "llama_1.3b_transfer": (2, {}),
    "llama_7b_fp8": (4, {**TARGET, **ONLINE}),
    "llama_7b_32k": (
        4,
        {**TARGET, **ONLINE, "parallel.context": 2, "training.micro_batch_size": 1},
    ),
    "llama_70b_dwm_fp8": (
        4,
        {
            **TARGET,
            **ONLINE,
            **SMALL_ENCODER,
            "parallel.tensor": 2,
            "parallel.pipeline": 2,
            "training.micro_batch_size": 1,
        },
    ),
}
SIZES: dict[str, object] = {
    "model.hidden_size": 64,
    "model.num_layers": 2,
    "model.num_attention_heads": 4,
    "model.num_query_groups": 2,
    "model.ffn_hidden_size": 128,
    "data.sequence_length": 32,
    "training.steps": 3,
    "training.global_batch_size": 8,
    "training.micro_batch_size": 4,
}


def head(recipe: str) -> list[str]:
    """The lines of the comment at a recipe's head, without its sign."""
    lines = (FOLDER / f"{recipe}.yaml").read_text().splitlines()
    return [line[1:] for line in lines if line.startswith("#")]


def prose(recipe: str) -> str:
    return " ".join(" ".join(head(recipe)).split())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a checkout after llama_370m_dwm.yaml has left its weighting model."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("tools", "examples"):
        (folder / name).symlink_to(REPOSITORY / name)
    # A plan reads the sizes only.
    shape = WeightingShape(
        vocab_size=32000,
        hidden_size=1024,
        num_layers=24,
        num_attention_heads=16,
        ffn_hidden_size=2816,
    )
    for number in range(1, 6):
        stage = folder / "runs" / "llama_370m_dwm" / "weighting" / f"stage_{number}"
        stage.mkdir(parents=True)
        (stage / "weighting.json").write_text(json.dumps(asdict(shape)))
        (stage / "weighting.safetensors").touch()
    return folder


def test_there_is_a_smoke_run_for_every_recipe() -> None:
    assert set(RECIPES) == set(SMOKE)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_plan_says_what_the_head_says(recipe: str, checkout: Path) -> None:
    [command] = [line for line in head(recipe) if "tools/plan.py" in line]
    words = shlex.split(command)
    assert words[:3] == ["python", "tools/plan.py", f"examples/recipes/{recipe}.yaml"]
    done = run_python([*words[1:], "--json"], environment=QUIET, cwd=checkout)
    assert done.returncode == 0 and not done.stderr, done.stderr
    plan = json.loads(done.stdout)
    assert f"Machine: {plan['gpus']} x {plan['gpu']}." in prose(recipe)
    assert plan["fits"], plan["advice"]
    found = FIGURES.search(prose(recipe))
    assert found is not None
    gpu_hours = plan["run_s"] * plan["gpus"] / 3600
    assert found[1] == f"{gpu_hours:,.1f}"
    assert found[2] == f"{plan['needed_bytes'] / 1e9:.1f}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_few_steps_at_a_small_size(
    recipe: str,
    corpus: Corpus,
    tmp_path: Path,
) -> None:
    """The same file: only sizes, and where the data is, are given on the command line."""
    processes, sizes = SMOKE[recipe]
    values = {**SIZES, **sizes, **_places(recipe, corpus, tmp_path)}
    run = tmp_path / "run"
    values["run.dir"] = run
    options = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    command = ["-m", "megatron_dwm.pretrain", str(FOLDER / f"{recipe}.yaml"), *options]
    done = run_python(command, environment=QUIET, ranks=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    warned = [line for line in done.stderr.splitlines() if "warning" in line]
    # Small samples have few documents.
    warned = [line for line in warned if "documents on average" not in line]
    text = (FOLDER / f"{recipe}.yaml").read_text()
    if "precision: fp8" in text:  # without a GPU such a run continues in bf16
        assert "model.precision fp8" in warned.pop(0)
    assert not warned
    assert [line["step"] for line in metrics(run, "train")] == [1, 2, 3]
    learns = "name: dwm" in text and "frozen: true" not in text
    assert bool(metrics(run, "weighting")) == learns


def _places(recipe: str, corpus: Corpus, folder: Path) -> dict[str, object]:
    places: dict[str, object] = {
        "data.train": corpus.prefix,
        "data.tokenizer": corpus.tokenizer,
        "data.domain_key": "domain",
        "evaluation.path": _few_lines(CORPUS / "heldout.jsonl", folder),
    }
    if "validation.batch_size" in SMOKE[recipe][1]:
        places["validation.path"] = CORPUS / "validation.jsonl"
    if recipe == "llama_1.3b_transfer":
        places["weighting.load"] = _weighting_model(corpus.tokenizer, folder / "stage_5")
    return places


def _few_lines(file: Path, folder: Path) -> Path:
    lines = file.read_text().splitlines(keepends=True)
    (folder / file.name).write_text("".join(lines[:4]))
    return folder / file.name


def _weighting_model(tokenizer: str, folder: Path) -> Path:
    read = open_tokenizer(tokenizer)
    shape = WeightingShape(
        vocab_size=read.vocab_size,
        hidden_size=32,
        num_layers=1,
        num_attention_heads=4,
        ffn_hidden_size=64,
        tokenizer_sha256=read.sha256,
    )
    folder.mkdir()
    for name, content in build_weighting_model(shape, seed=1).files().items():
        (folder / name).write_bytes(content)
    return folder
