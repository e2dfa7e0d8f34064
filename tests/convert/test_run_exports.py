"""A checkpoint is exported without its run: with its tokenizer, or the original model's files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from megatron_dwm.checkpoint.manifest import list_checkpoints, read_manifest, write_manifest
from megatron_dwm.config import UserError
from megatron_dwm.convert.from_hf import import_from_huggingface
from megatron_dwm.convert.to_hf import export_to_huggingface
from megatron_dwm.convert.tokenizer_files import write_tokenizer_files
from megatron_dwm.tokenizer import Tokenizer, train_sentencepiece
from tests.convert.conftest import VOCAB_SIZE
from tests.convert.families import write_llama
from tests.forking.client import REPOSITORY, run_python

CORPUS = REPOSITORY / "examples/corpus/validation.jsonl"
SIZES = [
    *("--data.sequence_length", "64", "--training.global_batch_size", "4"),
    *("--training.micro_batch_size", "4", "--logging.tensorboard", "false"),
]


@dataclass(frozen=True, kw_only=True)
class Project:
    """A directory in which everything is named by a relative path."""

    directory: Path
    arguments: tuple[str, ...]

    def train(self, steps: int, *more: str, cwd: Path | None = None) -> str:
        """Run up to a step; returns stderr, which is the error's line if the run failed."""
        command = ["-m", "megatron_dwm.pretrain", *self.arguments, *more]
        done = run_python(
            [*command, "--training.steps", str(steps)],
            environment={"PYTHONWARNINGS": "ignore"},
            cwd=cwd or self.directory,
        )
        assert done.returncode == 0 or done.stderr.startswith("error: "), done.stderr
        return done.stderr


def preprocessed(folder: Path, kind: str, tokenizer: str) -> None:
    command = ["tools/preprocess_data.py", "--input", CORPUS, "--append-eod"]
    command += ["--output-prefix", folder / "data", "--tokenizer-type", kind]
    command += ["--tokenizer-model", folder / tokenizer]
    run_python(list(map(str, command))).check_returncode()


@pytest.fixture(scope="module")
def trained(small_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Returns a project with a run of two steps."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(small_tokenizer.model_path, folder / "words.model")
    preprocessed(folder, "SentencePieceTokenizer", "words.model")
    arguments = ("--run.dir", "run", "--data.train", "data_text_document", *SIZES)
    project = Project(directory=folder, arguments=(*arguments, "--data.tokenizer", "words.model"))
    assert "error" not in project.train(2)
    return project


@pytest.fixture
def project(trained: Project, tmp_path: Path) -> Project:
    """Returns a copy to change, in which absolute paths still name the first project's files."""
    shutil.copytree(trained.directory, tmp_path / "project")
    return replace(trained, directory=tmp_path / "project")


@pytest.fixture(scope="module")
def other(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a tokenizer of the same size with other pieces."""
    path = tmp_path_factory.mktemp("other") / "other.model"
    train_sentencepiece(texts[len(texts) // 2 :], vocab_size=VOCAB_SIZE, output=path)
    return path


def test_a_checkpoint_is_exported_without_its_run(
    trained: Project, small_tokenizer: Tokenizer, other: Path, tmp_path: Path
) -> None:
    (checkpoint,) = list_checkpoints(trained.directory / "run")
    assert "tokenizer/tokenizer.model" in read_manifest(checkpoint).files
    shutil.copytree(checkpoint, tmp_path / "alone")
    config = tmp_path / "alone/config.yaml"
    config.write_text(config.read_text().replace(str(trained.directory), "/gone"))
    (tmp_path / "alone/manifest.json").unlink()
    export = export_to_huggingface(tmp_path / "alone", tmp_path / "hf")
    assert export.texts_compared > 0
    text = "The river had risen twice."
    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert exported(text).input_ids == small_tokenizer.encode(text)
    # A wrong one of the same size computes the same logits, and is spelled without fault.
    with pytest.raises(UserError, match="is not the run's tokenizer, of which .* has a copy"):
        export_to_huggingface(checkpoint, tmp_path / "wrong", tokenizer_model=other)
    assert not (tmp_path / "wrong").exists()
    right = trained.directory / "words.model"
    export_to_huggingface(checkpoint, tmp_path / "right", tokenizer_model=right)


def test_an_export_can_be_padded(trained: Project, tmp_path: Path) -> None:
    """The padding token is one that no text gives and that ends nothing."""
    export_to_huggingface(trained.directory / "run", tmp_path / "hf", skip_check=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    rows = tokenizer(["a", "the river"], padding=True)
    assert len(set(map(len, rows.input_ids))) == 1 and 0 in rows.attention_mask[0]
    assert tokenizer.pad_token_id == tokenizer.unk_token_id != tokenizer.eos_token_id
    # transformers 5 has these by itself; 4 reads them here.
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"] == list(rows)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "hf" / name).read_text())
        assert content["pad_token_id"] == tokenizer.pad_token_id


def test_a_checkpoint_without_a_copy_is_compared_with_its_digest(
    project: Project, other: Path, tmp_path: Path
) -> None:
    """Checkpoints of older versions have no copy: their manifest has no tokenizer/ either."""
    (checkpoint,) = list_checkpoints(project.directory / "run")
    manifest = read_manifest(checkpoint)
    files = {k: v for k, v in manifest.files.items() if not k.startswith("tokenizer/")}
    shutil.rmtree(checkpoint / "tokenizer")
    write_manifest(checkpoint, replace(manifest, files=files))
    with pytest.raises(UserError, match="other.model is not the run's tokenizer: .*manifest.json"):
        export_to_huggingface(checkpoint, tmp_path / "hf", tokenizer_model=other)
    right = project.directory / "words.model"
    export_to_huggingface(checkpoint, tmp_path / "hf", tokenizer_model=right)


def test_the_configuration_has_absolute_paths_beside_the_typed_ones(trained: Project) -> None:
    folder = trained.directory
    config = yaml.safe_load((folder / "run/config.yaml").read_text())
    assert config["run"]["dir"] == str(folder / "run")
    assert config["data"]["tokenizer"] == str(folder / "words.model")
    assert config["data"]["train"] == [str(folder / "data_text_document")]
    assert config["typed_paths"] == {
        "directory": str(folder),
        "run.dir": "run",
        "data.tokenizer": "words.model",
        "data.train": ["data_text_document"],
    }


def _as_before(run: Path) -> None:
    """Write config.yaml as older versions did: with paths as they were typed."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["typed_paths"]
    config["run"]["dir"] = "run"
    config["data"] |= {"tokenizer": "words.model", "train": ["data_text_document"]}
    (run / "config.yaml").write_text(yaml.safe_dump(config))


GO_ON = ("--run.resume", "true")


@pytest.mark.parametrize("spoil", [lambda _: None, _as_before], ids=["now", "before"])
def test_relative_paths_may_be_typed_again(project: Project, spoil: Callable) -> None:
    """They may also be typed in a tree that was moved, or come from the run's configuration."""
    spoil(project.directory / "run")
    assert "error" not in project.train(3, *GO_ON)
    elsewhere = replace(project, arguments=(str(project.directory / "run/config.yaml"),))
    assert "error" not in elsewhere.train(4, *GO_ON, cwd=Path("/"))
    names = [path.name for path in list_checkpoints(project.directory / "run")]
    assert names == ["step_00000002", "step_00000003", "step_00000004"]


def test_another_path_is_still_refused(project: Project) -> None:
    for end in ("bin", "idx", "meta.parquet"):
        source = project.directory / f"data_text_document.{end}"
        if source.exists():
            shutil.copy(source, project.directory / f"other.{end}")
    said = project.train(3, *GO_ON, "--data.train", "other")
    assert said.startswith("error: data.train: the run in run has ['/") and "['other']" in said


@pytest.fixture(scope="module")
def public(small_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a model as others publish it: a long context, several ends, a template, settings."""
    directory = write_llama(
        tmp_path_factory.mktemp("public") / "model",
        tie_word_embeddings=True,
        max_position_embeddings=131072,
        eos_token_id=[2, 7],
        pad_token_id=5,
    )
    write_tokenizer_files(small_tokenizer, 131072, directory)
    shutil.copy(small_tokenizer.model_path, directory / "tokenizer.model")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "LICENSE").write_text("as you like")
    settings = {"eos_token_id": [2, 7], "temperature": 0.6, "do_sample": True}
    (directory / "generation_config.json").write_text(json.dumps(settings))
    words = json.loads((directory / "tokenizer_config.json").read_text())
    words |= {"custom": {"kept": True}, "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(words))
    preprocessed(directory.parent, "HuggingFaceTokenizer", "model")
    return directory


def _continued(public: Path, run: Path, *more: str) -> None:
    """Train one step from that model."""
    project = Project(
        directory=public.parent,
        arguments=("--run.dir", str(run), "--data.train", "data_text_document", *SIZES),
    )
    start = () if "--model.init_from" in more else ("--model.init_from", "model")
    said = project.train(1, "--data.tokenizer", "model", *start, *more)
    assert "error" not in said and "is not the tokenizer" not in said


def _assert_original_files(public: Path, export: Path) -> None:
    """Assert that every file but the weights and the card is equal, byte for byte."""
    ours = {"model.safetensors", "README.md"}
    names = {path.name for path in public.iterdir()}
    assert {path.name for path in export.iterdir()} == names | ours
    for name in names - ours:
        assert (export / name).read_bytes() == (public / name).read_bytes(), name


def test_a_model_is_exported_with_its_original_files(public: Path, tmp_path: Path) -> None:
    """Directly and through from-hf, from one run to the next, and with another data type."""
    import_from_huggingface(public, tmp_path / "ours")
    export_to_huggingface(tmp_path / "ours", tmp_path / "back")
    _assert_original_files(public, tmp_path / "back")
    _continued(public, tmp_path / "run", "--model.init_from", str(tmp_path / "ours"))
    (newest,) = list_checkpoints(tmp_path / "run")
    _continued(public, tmp_path / "next", "--model.init_from", str(newest))
    export_to_huggingface(tmp_path / "next", tmp_path / "hf")
    _assert_original_files(public, tmp_path / "hf")
    before, after = (load_file(d / "model.safetensors") for d in (public, tmp_path / "hf"))
    assert set(before) == set(after)
    assert not any(torch.equal(tensor, after[name]) for name, tensor in before.items())
    card = (tmp_path / "hf/README.md").read_text()
    assert "* training sequences have 64 tokens; the context of 131,072 tokens is" in card
    assert "| context | 131,072 tokens |" in card and "## Training" in card
    export_to_huggingface(tmp_path / "next", tmp_path / "bf16", dtype=torch.bfloat16)
    one, two = (json.loads((d / "config.json").read_text()) for d in (public, tmp_path / "bf16"))
    assert two == {**one, "dtype": "bfloat16"}
    assert "kept in bfloat16; the original has float32" in (tmp_path / "bf16/README.md").read_text()


def test_what_training_changed_is_changed_and_listed(
    public: Path, other: Path, tmp_path: Path
) -> None:
    """Here: a longer context, and another tokenizer of the same size."""
    short = tmp_path / "model"
    shutil.copytree(public, short)
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 32}
    (short / "config.json").write_text(json.dumps(config))
    shutil.copy(other, tmp_path / "words.model")
    preprocessed(tmp_path, "SentencePieceTokenizer", "words.model")
    project = Project(
        directory=tmp_path,
        arguments=("--run.dir", "run", "--data.train", "data_text_document", *SIZES),
    )
    said = project.train(1, "--data.tokenizer", "words.model", "--model.init_from", "model")
    assert "warning: data.tokenizer" in said and "is not the tokenizer of model.init_from" in said
    export_to_huggingface(tmp_path / "run", tmp_path / "hf")
    found = json.loads((tmp_path / "hf/config.json").read_text())
    ends = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
    assert found == {**config, "max_position_embeddings": 64, **ends}
    assert not (tmp_path / "hf/chat_template.jinja").exists()
    assert (tmp_path / "hf/LICENSE").exists()
    card = (tmp_path / "hf/README.md").read_text()
    assert "* the context is 64 tokens" in card and "* the tokenizer is another" in card
