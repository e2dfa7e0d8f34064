"""Public weights survive import and export unchanged; models that cannot be right are refused."""

from __future__ import annotations

import io
import json
import math
import pickle
import resource
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorProperties
from transformers import AutoTokenizer, LlamaForCausalLM

from megatron_dwm.convert.from_hf import import_from_huggingface
from megatron_dwm.convert.gate import LOGITS_TOLERANCE, GateError
from megatron_dwm.convert.to_hf import export_to_huggingface
from megatron_dwm.convert.tokenizer_files import write_tokenizer_files
from megatron_dwm.model.on_disk import parameter_names as layout
from megatron_dwm.tokenizer import Tokenizer
from tests.convert.families import FAMILIES, write_llama
from tests.launch import REPOSITORY

TOOL = REPOSITORY / "tools/convert_checkpoint.py"


def _tensors(directory: Path) -> dict[str, Tensor]:
    files = [load_file(path) for path in directory.glob("*.safetensors")]
    return {name: tensor for tensors in files for name, tensor in tensors.items()}


@pytest.fixture
def llama(small_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """Returns a model directory as others publish it."""
    directory = write_llama(tmp_path / "public", **FAMILIES["smollm2: grouped, tied"])
    write_tokenizer_files(small_tokenizer, 256, directory)
    return directory


CASES: dict[str, dict[str, Any]] = {
    **FAMILIES,
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16, "tie_word_embeddings": True},
    "several files": {"max_shard_size": "100KB"},
}


@pytest.mark.parametrize("name", CASES)
def test_round_trip_keeps_every_bit(name: str, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    public = write_llama(tmp_path / "public", **CASES[name])
    write_tokenizer_files(small_tokenizer, 256, public)
    found = import_from_huggingface(public, tmp_path / "ours")
    assert found.logits_deviation is not None and found.logits_deviation < LOGITS_TOLERANCE
    export = export_to_huggingface(tmp_path / "ours", tmp_path / "back")
    assert export.logits_deviation is not None
    before, after = _tensors(public), _tensors(tmp_path / "back")
    assert set(before) == set(after)
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key
    one, two = (json.loads((d / "config.json").read_text()) for d in (public, tmp_path / "back"))
    added = {"rope_theta", "rope_scaling", "torch_dtype"}
    assert {k: v for k, v in two.items() if k not in added} == one
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (public / file).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "back").eos_token_id == 2


def test_torch_files_are_read_without_running_them(llama: Path, tmp_path: Path) -> None:
    before = _tensors(llama)
    torch.save(before, llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    import_from_huggingface(llama, tmp_path / "ours")
    export_to_huggingface(tmp_path / "ours", tmp_path / "back")
    after = _tensors(tmp_path / "back")
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


class _Harmful:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self._path,)


def _run(
    arguments: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOL), run_name="__main__")
    return stop.value.code, capsys.readouterr().err


def _edit(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _cut_short(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _harmful_bin(directory: Path) -> None:
    torch.save({"x": _Harmful(directory.parent / "ran")}, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def _index_of_missing_file(directory: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0}
SPOILERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "not a model": (lambda d: (d / "config.json").unlink(), "not a Hugging Face model directory"),
    "not json": (lambda d: (d / "config.json").write_text("{"), "config.json"),
    "architecture": (lambda d: _edit(d, model_type="gpt2"), "model_type 'gpt2'"),
    "attention bias": (lambda d: _edit(d, attention_bias=True), "attention_bias True"),
    "mlp bias": (lambda d: _edit(d, mlp_bias=True), "mlp_bias True"),
    "activation": (lambda d: _edit(d, hidden_act="gelu"), "hidden_act 'gelu'"),
    "quantized": (lambda d: _edit(d, quantization_config={"bits": 4}), "quantization_config"),
    "yarn": (lambda d: _edit(d, rope_parameters=YARN), "rope scaling"),
    "old yarn": (lambda d: _edit(d, rope_parameters=None, rope_scaling=YARN), "rope scaling"),
    "width": (lambda d: _edit(d, intermediate_size=96), "has shape [80, 64]"),
    "layers": (lambda d: _edit(d, num_hidden_layers=5), "no tensor model.layers.4."),
    "fewer layers": (lambda d: _edit(d, num_hidden_layers=3), "is not one of its model class"),
    "text for a number": (lambda d: _edit(d, hidden_size="64"), "hidden_size is '64'"),
    "no epsilon": (lambda d: _edit(d, rms_norm_eps=None), "rms_norm_eps is None"),
    "text for a base": (lambda d: _edit(d, rope_theta="abc", rope_parameters=None), "'abc'"),
    "base not finite": (lambda d: _edit(d, rope_parameters={"rope_theta": math.inf}), "is inf"),
    "text for the rope": (lambda d: _edit(d, rope_scaling="abc"), "rope_scaling is 'abc'"),
    "no factor": (lambda d: _edit(d, rope_parameters=LLAMA3), "factor is None"),
    "text for a truth": (lambda d: _edit(d, tie_word_embeddings="false"), "tie_word_embeddings"),
    "groups": (lambda d: _edit(d, num_key_value_heads=3), "num_key_value_heads 3 does not"),
    "no tensors": (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors"),
    "cut short": (_cut_short, "cannot be read"),
    "missing shard": (_index_of_missing_file, "model-00001-of-00001.safetensors: missing"),
    "harmful": (_harmful_bin, "cannot be read"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer"),
}


@pytest.mark.parametrize("spoiler", SPOILERS)
def test_what_cannot_be_right_is_one_line(
    spoiler: str,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    spoil, named = SPOILERS[spoiler]
    spoil(llama)
    code, stderr = _run(["from-hf", llama, "--output", tmp_path / "ours"], monkeypatch, capsys)
    assert code == 2
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    assert named in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["public"]


def test_a_wrong_configuration_is_reported_before_torch_is_imported(llama: Path) -> None:
    """Runs in a fresh interpreter and checks that nothing has imported torch."""
    _edit(llama, rope_theta="abc", rope_parameters=None)
    program = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop: sys.exit(3 if 'torch' in sys.modules else stop.code)\n"
    )
    tool = [TOOL, "from-hf", llama, "--output", llama.with_name("ours")]
    done = subprocess.run([sys.executable, "-c", program, *tool], capture_output=True, text=True)
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert done.stderr == (
        f"error: {llama / 'config.json'}: rope_theta is 'abc'; expected a number above 0\n"
    )


def test_a_directory_for_the_output_is_not_made(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for command, source in (("from-hf", llama), ("to-hf", tmp_path / "ours")):
        output = tmp_path / "missing/one/ours"
        code, stderr = _run([command, source, "--output", output], monkeypatch, capsys)
        assert code == 2
        assert stderr == f"error: {output.parent}: no such output directory; make it first\n"
    assert [path.name for path in tmp_path.iterdir()] == ["public"]


def test_existing_output_is_left_alone(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "kept").write_text("mine")
    code, stderr = _run(["from-hf", llama, "--output", tmp_path / "kept"], monkeypatch, capsys)
    assert (code, (tmp_path / "kept").read_text()) == (2, "mine")
    assert stderr == f"error: {tmp_path / 'kept'} exists; name another --output or remove it\n"


def test_wrong_permutation_is_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    name = "mlp.linear_fc1"
    right = layout.LAYER_TENSORS[name]

    def up_first(_: object, parts: dict[str, Tensor]) -> Tensor:
        return torch.cat([parts["mlp.up_proj"], parts["mlp.gate_proj"]])

    monkeypatch.setitem(layout.LAYER_TENSORS, name, replace(right, join=up_first))
    with pytest.raises(GateError, match="of the largest logit"):
        import_from_huggingface(llama, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["public"]
    code, stderr = _run(["from-hf", llama, "--output", tmp_path / "ours"], monkeypatch, capsys)
    assert code == 1
    assert stderr.splitlines()[-1].startswith("error: the logits of the two models differ by")
    assert "Traceback" not in stderr
    found = import_from_huggingface(llama, tmp_path / "ours", skip_check=True)
    assert found.logits_deviation is None


def test_every_release_reads_what_is_written(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron-Core before 0.19 wants common.pt; torch before 2.15, five values a tensor."""
    saved, read = TensorProperties.__getstate__, TensorProperties.__setstate__
    # As torch 2.15 does, where the installed one has no strides.
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda p: (*saved(p)[:5], (1,)))
    monkeypatch.setattr(TensorProperties, "__setstate__", lambda p, state: read(p, state[:5]))
    import_from_huggingface(llama, tmp_path / "ours", skip_check=True)
    assert torch.load(tmp_path / "ours/llm/common.pt", weights_only=True) == {}
    index = (tmp_path / "ours/llm/.metadata").read_bytes()

    class Properties:
        def __setstate__(self, state: tuple[Any, ...]) -> None:
            self.dtype, _, _, _, _ = state

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return Properties if name == "TensorProperties" else super().find_class(module, name)

    found = Reader(io.BytesIO(index)).load().state_dict_metadata
    tensors = [tensor for tensor in found.values() if hasattr(tensor, "properties")]
    assert tensors and {tensor.properties.dtype for tensor in tensors} == {torch.float32}


def test_a_full_disk_is_one_line(llama: Path, tmp_path: Path) -> None:
    """As where files may not grow beyond the first tensors."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # noqa: E731
    done = subprocess.run(
        [sys.executable, TOOL, "from-hf", llama, "--output", tmp_path / "ours"],
        capture_output=True,
        text=True,
        timeout=240,
        preexec_fn=limit,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'ours'}: cannot be written")
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["public"]


def test_a_checkpoint_cannot_run_code(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import_from_huggingface(llama, tmp_path / "ours", skip_check=True)
    index = tmp_path / "ours/llm/.metadata"
    index.write_bytes(pickle.dumps(_Harmful(tmp_path / "ran")))
    code, stderr = _run(
        ["to-hf", tmp_path / "ours", "--output", tmp_path / "hf"], monkeypatch, capsys
    )
    assert code == 2 and "which no checkpoint does" in stderr
    assert not (tmp_path / "ran").exists()


@torch.no_grad()
def test_export_runs_as_any_user_would_run_it(llama: Path, tmp_path: Path) -> None:
    import_from_huggingface(llama, tmp_path / "ours")
    shutil.move(tmp_path / "ours", tmp_path / "elsewhere")
    export_to_huggingface(tmp_path / "elsewhere", tmp_path / "back")
    tokens_BS = torch.arange(3, 99)[None]
    before, after = (
        LlamaForCausalLM.from_pretrained(directory)(tokens_BS).logits
        for directory in (llama, tmp_path / "back")
    )
    assert torch.equal(before, after)
