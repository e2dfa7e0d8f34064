"""The wheel alone: built, installed into an empty folder, and used from another one.

Torch and the other requirements are those of the environment that runs the tests.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.files.test_command_names import OF_A_CLONE

REPOSITORY = Path(__file__).parent.parent.parent
CORPUS = REPOSITORY / "examples" / "corpus"
SOURCES = ("megatron_dwm", "pyproject.toml", "setup.py", "README.md", "LICENSE")
# Python 3.10 has no reader of TOML.
_PROJECT = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
COMMANDS = re.findall(r'^(megatron-dwm-\w+) = "', _PROJECT, re.MULTILINE)
LIMIT_S = 150.0
SMALL = """
data: {sequence_length: 32, domain_key: domain}
training: {steps: 5, global_batch_size: 8, micro_batch_size: 4, learning_rate: 3.0e-3}
validation: {path: validation.jsonl}
weighting: {mode: online, interval_steps: 2, warmup_steps: 2, encoder: llm, group: global}
logging: {weights_interval_steps: 1}
"""


@dataclass(frozen=True)
class Installed:
    """Where the wheel is installed, and a folder to work in that has nothing of the repository."""

    site: Path
    folder: Path

    def run(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run an installed command by its name, or `python` with arguments."""
        program = sys.executable if command == "python" else str(self.site / "bin" / command)
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        environment = {**kept, "PYTHONPATH": str(self.site), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [program, *arguments],
            cwd=self.folder,
            env={**environment, "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )

    def succeed(self, command: str, *arguments: str) -> str:
        """Run, fail the test with the output if it does not succeed, and return what it prints."""
        done = self.run(command, *arguments)
        assert done.returncode == 0, f"{command} {arguments}\n{done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the sources, built elsewhere, so that the clone gets no build folder."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    pip = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."]
    done = subprocess.run([sys.executable, *pip], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [found] = (folder / "dist").glob("megatron_dwm-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel installed, and in the working folder a corpus that its own commands made."""
    site, folder = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("work")
    pip = ["-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, *pip], check=True, capture_output=True)
    found = Installed(site, folder)
    texts = (CORPUS / "heldout.jsonl").read_text().splitlines()
    (folder / "text.jsonl").write_text("\n".join(texts * 3))
    shutil.copy(CORPUS / "validation.jsonl", folder)
    (folder / "small.yaml").write_text(SMALL)
    train = ["--input", "text.jsonl", "--vocab-size", "512", "--output", "tokenizer.model"]
    found.succeed("megatron-dwm-tokenizer", *train)
    given = ["--input", "text.jsonl", "--output-prefix", "my", "--append-eod"]
    given += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "tokenizer.model"]
    found.succeed("megatron-dwm-preprocess", *given, "--metadata-keys", "domain")
    return found


DATA = ["--data.train", "my_text_document", "--data.tokenizer", "tokenizer.model"]


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if name.startswith("megatron_dwm/")}
    package = REPOSITORY / "megatron_dwm"
    ours = {
        str(path.relative_to(REPOSITORY))
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files == ours


def test_it_is_the_wheel_that_runs(installed: Installed) -> None:
    where = installed.succeed("python", "-c", "import megatron_dwm; print(megatron_dwm.__file__)")
    assert Path(where.strip()).is_relative_to(installed.site)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_help(installed: Installed, name: str) -> None:
    text = installed.succeed(name, "--help")
    assert text.startswith("usage: ") and not OF_A_CLONE.search(text)
    done = installed.run(name, "--unheard-of", "x")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (["generate", "--model", ".", "--prompt", "x"], "megatron-dwm-convert to-hf"),
        (["evaluate", "--model", ".", "--suite", "dwm"], "megatron-dwm-convert to-hf"),
        (["score", "--input", "bare", "--columns", "length"], "megatron-dwm-preprocess writes"),
        (["select", "random", "--help"], "usage: megatron-dwm-select random"),
        (["select", "rater", "--help"], "megatron-dwm-score --columns weight"),
        (["score", "--help"], "megatron-dwm-select qurating"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_messages_name_installed_commands(
    installed: Installed, command: list[str], named: str
) -> None:
    for ending in ("bin", "idx"):
        source = installed.folder / f"my_text_document.{ending}"
        shutil.copy(source, installed.folder / f"bare.{ending}")
    done = installed.run(f"megatron-dwm-{command[0]}", *command[1:])
    assert done.returncode == (0 if "--help" in command else 2)
    text = done.stdout + done.stderr
    # argparse breaks lines at hyphens, too.
    assert "".join(named.split()) in "".join(text.split()) and not OF_A_CLONE.search(text)


def test_train_plan_and_report(installed: Installed) -> None:
    """Five steps with a weighting model, which needs every folder but the conversion's."""
    configuration = ["small.yaml", *DATA, "--policy.name", "dwm", "--run.dir", "run"]
    plan = installed.succeed(
        "megatron-dwm-plan", *configuration, "--gpus", "1", "--gpu", "h100-80gb", "--brief"
    )
    assert "fits" in plan
    installed.succeed("megatron-dwm-pretrain", *configuration)
    lines = map(json.loads, (installed.folder / "run/metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if line["phase"] == "train"] == [1, 2, 3, 4, 5]
    assert "of 5 steps: finished" in installed.succeed("megatron-dwm-status", *configuration)
    pictures = installed.succeed("megatron-dwm-report", "run").split()
    assert pictures and all((installed.folder / each).is_file() for each in pictures)


def test_the_doctor(installed: Installed) -> None:
    """Its check of the hypergradient, on the machine that runs the tests."""
    text = installed.succeed("megatron-dwm-doctor")
    assert "tangent probe agrees with finite_difference" in text
    assert "tangent probe agrees with unroll" in text


EXAMPLE = ["loss_rank.yaml", *DATA, "--data.sequence_length", "32", "--evaluation.path", "null"]
EXAMPLE += ["--training.global_batch_size", "8", "--training.micro_batch_size", "4"]
EXAMPLE += ["--training.steps", "4"]


def _copy_example(folder: Path) -> None:
    for name in ("loss_rank.py", "loss_rank.yaml"):
        shutil.copy(REPOSITORY / "examples" / "plugin" / name, folder)


def _train_lines(run_dir: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_the_example_of_a_method_outside(installed: Installed) -> None:
    """A copy of examples/plugin beside the data: `python -m` and the command find it alike."""
    _copy_example(installed.folder)
    module = ["-m", "megatron_dwm.pretrain", *EXAMPLE, "--run.dir", "of_module"]
    installed.succeed("python", *module)
    installed.succeed("megatron-dwm-pretrain", *EXAMPLE, "--run.dir", "of_command")
    lines = _train_lines(installed.folder / "of_module")
    assert lines == _train_lines(installed.folder / "of_command")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["weight_std"] == 0.0 < lines[-1]["weight_std"]


def test_its_configuration_says_what_was_trained(installed: Installed) -> None:
    """What the run writes down trains it again, without the file that it was started with."""
    _copy_example(installed.folder)
    installed.succeed("megatron-dwm-pretrain", *EXAMPLE, "--run.dir", "first")
    config = (installed.folder / "first" / "config.yaml").read_text()
    assert "name: loss_rank:RecentLossRank" in config and "window_steps: 8" in config
    (installed.folder / "loss_rank.yaml").unlink()
    installed.succeed("megatron-dwm-pretrain", "first/config.yaml", "--run.dir", "second")
    first, second = (_train_lines(installed.folder / name) for name in ("first", "second"))
    assert first == second
    done = installed.run("megatron-dwm-pretrain", *EXAMPLE[1:], "--policy.options.windows", "3")
    assert done.returncode == 2 and "policy.options: has no effect" in done.stderr
