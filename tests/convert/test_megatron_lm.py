"""Checkpoints of Megatron-LM's form become ours, and Hugging Face's, with the same logits."""

from __future__ import annotations

import pickle
import shutil
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_dwm.config import Config, ModelConfig, ParallelConfig, UserError
from megatron_dwm.convert.checkpoint_reader import open_checkpoint
from megatron_dwm.convert.from_megatron import import_from_megatron
from megatron_dwm.convert.megatron_logits import megatron_logits
from megatron_dwm.convert.to_megatron import export_to_megatron
from megatron_dwm.model.on_disk.megatron_settings import shape_from
from megatron_dwm.run.starting_point import shape_to_start_from
from tests.convert.megatron_workers import SIZES, VOCAB, text
from tests.forking.client import run_python
from tests.launch import run_ranks
from tests.small_runs.command import succeed, without_time
from tests.small_runs.fixtures import Corpus, preprocessed

WORKER = "tests.convert.megatron_workers:save"
CASES: list[dict[str, Any]] = [
    {},
    {"fused": True, "tied": True},
    {"fused": True, "qk_layernorm": True, "add_qkv_bias": True},
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, torch.Tensor]]:
    """A folder as Megatron-LM leaves it, and the model's logits, for every case."""
    folders = [tmp_path_factory.mktemp("saved") / "model" for _ in CASES]
    arguments = [{"folder": str(f), **case} for f, case in zip(folders, CASES, strict=True)]
    logits = [rank for [rank] in run_ranks(WORKER, 1, arguments)]
    return list(zip(folders, logits, strict=True))


def _convert(*arguments: str) -> Any:
    return run_python(["tools/convert_checkpoint.py", "from-megatron", *arguments])


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: str(CASES[n]))
def test_logits_are_megatrons(
    saved: list[tuple[Path, torch.Tensor]], number: int, tmp_path: Path
) -> None:
    folder, logits = saved[number]
    found = import_from_megatron(folder, tmp_path / "ours")
    assert found.source == folder / "iter_0000007" and found.shape.vocab_size == VOCAB
    assert open_checkpoint(tmp_path / "ours").shape == found.shape
    ours = megatron_logits(open_checkpoint(tmp_path / "ours"), text(), torch.float32)
    logits = logits[..., :VOCAB]
    assert (ours[..., :VOCAB] - logits).abs().max() < 1e-5 * logits.abs().max()


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: str(CASES[n]))
def test_megatrons_own_model_reads_what_is_exported(
    saved: list[tuple[Path, torch.Tensor]], number: int, tmp_path: Path
) -> None:
    """There and back, into one process and into two, which pad the vocabulary otherwise."""
    folder, logits = saved[number]
    found = import_from_megatron(folder, tmp_path / "ours")
    exported = export_to_megatron(tmp_path / "ours", tmp_path / "theirs")
    assert exported.folder == "iter_0000000"
    case = {"folder": str(tmp_path / "theirs"), **CASES[number]}
    case.pop("fused", None)
    [[(alone, arguments)]] = run_ranks("tests.convert.megatron_workers:load", 1, [case])
    [ranks] = run_ranks("tests.convert.megatron_workers:load", 2, [{**case, "tensor": 2}])
    together = torch.cat([part for part, _ in ranks], dim=-1)
    for read in (alone, together):
        apart = read[..., :VOCAB] - logits[..., :VOCAB]
        assert apart.abs().max() < 1e-5 * logits.abs().max()
    assert shape_from(arguments, {}, tmp_path) == found.shape


def test_layouts_save_what_one_process_saves(tmp_path: Path) -> None:
    """Tensor 2 pads the vocabulary to 512 rows; the parameters themselves are saved whole."""
    case = {"folder": str(tmp_path / "model"), "tensor": 2, "pipeline": 2, "fused": True}
    run_ranks(WORKER, 4, [case])
    found = import_from_megatron(tmp_path / "model" / "iter_0000007", tmp_path / "ours")
    assert found.shape.padded_vocab_size == 384
    ours = open_checkpoint(tmp_path / "ours")
    assert ours.read("output_layer.weight").shape == (384, 64)
    assert ours.read_layer("input_layernorm.weight", 3).std() > 0


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}, {"tensor": 2, "pipeline": 2}], ids=str)
def test_ranks_read_it_without_a_conversion(
    saved: list[tuple[Path, torch.Tensor]], layout: dict[str, int], tmp_path: Path
) -> None:
    """Untied, and tied: then the output layer of another stage is the embedding."""
    cases = []
    for number in (0, 1):
        ours = tmp_path / f"ours{number}"
        import_from_megatron(saved[number][0], ours)
        cases.append({"theirs": str(saved[number][0]), "ours": str(ours), **layout})
    size = layout.get("tensor", 1) * layout.get("pipeline", 1)
    results = run_ranks("tests.convert.megatron_workers:parameters_of_ranks", size, cases)
    assert all(equal for ranks in results for rank in ranks for _, equal in rank)
    assert all(rank for ranks in results for rank in ranks)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with Adam's moments after some steps, and what Megatron's optimizer had."""
    folder = tmp_path_factory.mktemp("trained")
    moments = folder / "moments.pt"
    case = {"folder": str(folder / "model"), "fused": True, "moments": str(moments)}
    run_ranks(WORKER, 1, [case])
    return folder / "model", moments


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}, {"pipeline": 2}, {"data": 2}], ids=str)
@pytest.mark.parametrize("sharded", [False, True])
def test_moments_of_adam_come_along(
    trained: tuple[Path, Path], layout: dict[str, int], sharded: bool
) -> None:
    layout = dict(layout)
    size = layout.pop("data", 1) * layout.get("tensor", 1) * layout.get("pipeline", 1)
    case = {"theirs": str(trained[0]), "moments": str(trained[1]), "sharded": sharded, **layout}
    [ranks] = run_ranks("tests.convert.megatron_workers:wrong_moments", size, [case])
    assert ranks == [[]] * size


def test_a_start_without_moments_is_refused(
    saved: list[tuple[Path, torch.Tensor]], trained: tuple[Path, Path], tmp_path: Path
) -> None:
    import_from_megatron(trained[0], tmp_path / "ours")
    for source in (saved[0][0], tmp_path / "ours"):
        start = ModelConfig(init_from=str(source), init_optimizer=True)
        with pytest.raises(UserError, match=r"^model.init_optimizer: .* has no moments of Adam"):
            shape_to_start_from(Config(model=start))
    rounded = Config(
        model=ModelConfig(init_from=str(trained[0]), init_optimizer=True, precision="bf16"),
        parallel=ParallelConfig(grad_reduce_in_fp32=False),
    )
    with pytest.raises(UserError, match=r"expected parallel.grad_reduce_in_fp32 true"):
        shape_to_start_from(rounded)


def test_a_run_starts_from_it_and_hugging_face_gets_it(
    saved: list[tuple[Path, torch.Tensor]], corpus: Corpus, tmp_path: Path
) -> None:
    theirs, ours = saved[1][0], tmp_path / "ours"
    import_from_megatron(theirs, ours)
    small = _small_vocabulary(corpus, tmp_path)
    begin = ["--training.steps", "2", "--evaluation.at_start", "true"]
    for name, source in (("a", theirs), ("b", ours)):
        start = ["--model.init_from", str(source), *small.held_out()]
        succeed(tmp_path / name, *small.arguments(), *begin, *start)
    assert without_time(tmp_path / "a") == without_time(tmp_path / "b")
    command = ["tools/convert_checkpoint.py", "to-hf", str(theirs), "--output"]
    refused = run_python([*command, str(tmp_path / "hf")])
    assert refused.returncode == 2 and "name it with --tokenizer" in refused.stderr
    done = run_python([*command, str(tmp_path / "hf"), "--tokenizer", small.tokenizer])
    assert done.returncode == 0, done.stderr
    assert f"from {theirs / 'iter_0000007'}" in done.stdout
    assert str(theirs / "iter_0000007") in (tmp_path / "hf" / "README.md").read_text()
    assert {path.name for path in tmp_path.glob(".*")} == set(), "nothing is left beside it"


def _small_vocabulary(corpus: Corpus, folder: Path) -> Corpus:
    """Returns the corpus with a tokenizer of VOCAB pieces."""
    text, model = folder / "text.jsonl", folder / "small.model"
    shutil.copy(Path(corpus.tokenizer).with_name("text.jsonl"), text)
    options = ["--input", str(text), "--vocab-size", str(VOCAB), "--output", str(model)]
    done = run_python(["tools/train_tokenizer.py", *options])
    assert done.returncode == 0, done.stderr
    return preprocessed(text, model)


def test_settings_of_bridge(saved: list[tuple[Path, torch.Tensor]], tmp_path: Path) -> None:
    folder, expected = tmp_path / "iter_0000007", import_from_megatron(saved[0][0], tmp_path / "a")
    shutil.copytree(saved[0][0] / "iter_0000007", folder)
    model = {
        **SIZES,
        "vocab_size": VOCAB,
        "share_embeddings_and_output_weights": False,
        "rotary_base": 50000,
        "layernorm_epsilon": 1e-6,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
    }
    (folder / "run_config.yaml").write_text(yaml.safe_dump({"model": model}))
    found = import_from_megatron(folder, tmp_path / "b")
    assert asdict(found.shape) == asdict(expected.shape)


def test_mistakes_are_one_line(saved: list[tuple[Path, torch.Tensor]], tmp_path: Path) -> None:
    folder = saved[0][0]
    bare = tmp_path / "bare"
    run_ranks(WORKER, 1, [{"folder": str(bare), "with_arguments": False}])
    output = ["--output", str(tmp_path / "none")]
    for arguments, words in (
        ([str(tmp_path), *output], "no .metadata"),
        ([str(bare), *output], "nothing there tells"),
        ([str(folder), *output, "--shape", "num_layers=5"], "give --shape num_layers=4"),
        ([str(folder), *output, "--shape", "num_layers=3"], "give --shape num_layers=N"),
        ([str(folder), *output, "--shape", "ffn_hidden_size=100"], "has the size [192, 64]"),
        ([str(folder), *output, "--shape", "tied_embeddings=true"], "output layer of its own"),
        ([str(folder), *output, "--shape", "width=5"], "expected KEY=VALUE with a KEY of"),
    ):
        done = _convert(*arguments)
        assert done.returncode == 2, done.stdout
        [line] = done.stderr.splitlines()
        assert line.startswith("error: ") and words in line
    assert not (tmp_path / "none").exists()
    done = _convert(str(folder), *output)
    assert done.returncode == 0 and "vocabulary 360" in done.stdout


def test_a_damaged_folder_is_one_line(
    saved: list[tuple[Path, torch.Tensor]], tmp_path: Path
) -> None:
    def damaged(name: str) -> tuple[Path, Path]:
        shutil.copytree(saved[0][0], tmp_path / name)
        return tmp_path / name, tmp_path / name / "iter_0000007" / "__0_0.distcp"

    (short, cut), (gone, removed), (odd, _) = map(damaged, ("short", "gone", "odd"))
    cut.write_bytes(cut.read_bytes()[:5000])
    removed.unlink()
    (odd / "latest_checkpointed_iteration.txt").write_text("abc")
    for folder, words in (
        (short, "missing or cut short"),
        (gone, "missing or cut short"),
        (odd, "has 'abc', expected the number of an iteration"),
    ):
        done = _convert(str(folder), "--output", str(tmp_path / "none"))
        assert done.returncode == 2, done.stdout
        [line] = done.stderr.splitlines()
        assert line.startswith("error: ") and words in line


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    run_ranks(WORKER, 1, [{"folder": str(tmp_path / "model"), "broken": True}])
    done = _convert(str(tmp_path / "model"), "--output", str(tmp_path / "none"))
    assert done.returncode == 2
    assert "final_layernorm.weight has values that are not finite" in done.stderr


class _Code:
    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self._file,)


def test_no_code_of_the_arguments_runs(
    saved: list[tuple[Path, torch.Tensor]], tmp_path: Path
) -> None:
    folder = tmp_path / "iter_0000007"
    shutil.copytree(saved[0][0] / "iter_0000007", folder)
    with zipfile.ZipFile(folder / "common.pt", "w") as archive:
        archive.writestr("common/data.pkl", pickle.dumps({"args": _Code(tmp_path / "ran")}))
    done = _convert(str(folder), "--output", str(tmp_path / "none"))
    assert done.returncode == 2 and "nothing there tells" in done.stderr
    assert not (tmp_path / "ran").exists()
