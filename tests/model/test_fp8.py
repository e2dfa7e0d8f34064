"""Emulated FP8 layers against a plain computation, and the FP8 configuration of a run."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from torch import Tensor

from megatron_dwm.config import Config, ModelConfig, ParallelConfig, UserError
from megatron_dwm.config.validate import Heads, validate_layout
from megatron_dwm.model import resolve_shape
from megatron_dwm.model.layers import fp8_emulation
from megatron_dwm.model.layers.choice import choose_layers, emulated_layers
from megatron_dwm.model.layers.fp8_emulation import ACTIVATIONS, GRADIENTS, Quantized, quantize
from megatron_dwm.model.layers.transformer_engine import unfused_name, version_fits
from megatron_dwm.model.llm import transformer_config
from tests.launch import run_ranks

REPOSITORY = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the nearest values of the format scaled to the tensor's range, in double."""
    stretch = torch.finfo(dtype).max / float(tensor.abs().max())
    scaled = tensor.double() * stretch
    bits, smallest = {ACTIVATIONS: (3, -6), GRADIENTS: (2, -14)}[dtype]
    exponent = scaled.abs().log2().floor().clamp(min=smallest)
    step = torch.exp2(exponent - bits)
    return (scaled / step).round() * step / stretch


def _dequantized(tensor: Quantized) -> Tensor:
    return tensor.values.float() * tensor.scale


@pytest.mark.parametrize("dtype", [ACTIVATIONS, GRADIENTS])
@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
def test_rounding_is_to_the_nearest_value_of_the_format(dtype: torch.dtype, size: float) -> None:
    torch.manual_seed(1)
    tensor = torch.randn(40, 50) * size
    found = _dequantized(quantize(tensor, dtype, None)).double()
    expected = _rounded(tensor, dtype)
    # A value on a rounding border may go either way: one scale is in fp32, the other in double.
    different = (found - expected).abs() > 1e-6 * size
    assert float(different.double().mean()) < 1e-3
    assert torch.equal(
        found.abs().amax(), found.abs().amax().clamp(max=tensor.abs().amax() * 1.001)
    )


def test_zeros_and_what_is_not_a_number() -> None:
    assert torch.equal(
        _dequantized(quantize(torch.zeros(4, 4), ACTIVATIONS, None)), torch.zeros(4, 4)
    )
    broken = torch.tensor([1.0, float("nan")])
    assert _dequantized(quantize(broken, ACTIVATIONS, None)).isnan().any()
    assert _dequantized(quantize(torch.tensor([1.0, float("inf")]), GRADIENTS, None)).isnan().any()


@pytest.fixture(scope="module")
def layers() -> list[dict[str, Tensor]]:
    """Results of one process, of two, and of two with sequence parallelism."""
    [[alone]] = run_ranks(
        "tests.model.workers:linear_layers", 1, [{"tensor": 1, "sequence": False}]
    )
    cases = [{"tensor": 2, "sequence": sequence} for sequence in (False, True)]
    return [alone] + [
        ranks[0] for ranks in run_ranks("tests.model.workers:linear_layers", 2, cases)
    ]


def test_layers_compute_the_product_of_rounded_tensors(layers: list[dict[str, Tensor]]) -> None:
    generator = torch.Generator().manual_seed(7)
    x, up, down, gradient = (
        torch.randn(*size, generator=generator) for size in ((24, 32), (48, 32), (16, 48), (24, 16))
    )
    x4, up4, down4 = (_rounded(tensor, ACTIVATIONS) for tensor in (x, up, down))
    hidden = x4 @ up4.t()
    hidden4, gradient5 = _rounded(hidden.float(), ACTIVATIONS), _rounded(gradient, GRADIENTS)
    inner5 = _rounded((gradient5 @ down4).float(), GRADIENTS)
    expected = {
        "output": hidden4 @ down4.t(),
        "input": inner5 @ up4,
        "column": inner5.t() @ x4,
        "row": gradient5.t() @ hidden4,
    }
    for name, value in expected.items():
        found = layers[0][name].double().reshape(value.shape)
        # One value of many on a rounding border is an eighth of itself in a sum of tens.
        assert float((found - value).norm() / value.norm()) < 5e-3, name


def test_tensor_parallel_layers_compute_the_same(layers: list[dict[str, Tensor]]) -> None:
    """The ranks share scales, so the quantized values are the same.

    Sums differ by their order, and a value on a rounding border may go the other way.
    """
    for split in layers[1:]:
        for name, value in layers[0].items():
            assert float((split[name] - value).norm() / value.norm()) < 5e-3, name


def test_fp8_changes_the_losses_a_little() -> None:
    cases = [{}, {"fp8_emulation": True}]
    [[plain]], [[fp8]] = ([ranks] for ranks in run_ranks("tests.model.workers:losses", 1, cases))
    assert not torch.equal(plain, fp8)
    torch.testing.assert_close(plain, fp8, rtol=1e-2, atol=0)


def test_first_and_last_layers_can_stay_out() -> None:
    cases = [{"layers": 4, "fp8_first_last_bf16": True}, {"layers": 4}]
    ranks = run_ranks(
        "tests.model.workers:emulated_modules", 2, [{"pipeline": 2, **c} for c in cases]
    )
    assert ranks == [[[False, True], [True, False]], [[True, True], [True, True]]]
    model = ModelConfig(fp8_emulation=True, fp8_first_last_bf16=True)
    assert list(emulated_layers(model, first=0, count=1, total=1)) == []


def test_maxima_are_reduced_over_the_ranks_of_a_stage() -> None:
    cases = [{"tensor": 2, "pipeline": 2}, {"tensor": 2, "pipeline": 1}]
    stages, replicas = run_ranks("tests.model.workers:amax_group", 4, cases)
    for group, tensor, _ in stages:
        assert group == tensor  # never another stage's, which holds other tensors
    for group, tensor, data in replicas:
        assert set(group) == {0, 1, 2, 3} >= set(tensor) | set(data)


def test_recipes_in_megatron_cores_configuration() -> None:
    expected = {
        "delayed": ("hybrid", 1024, "max"),
        "tensorwise": ("hybrid", 1, "most_recent"),
        "blockwise": ("e4m3", 1, "most_recent"),
        "mxfp8": ("e4m3", 1, "most_recent"),
    }
    for recipe, (form, history, algorithm) in expected.items():
        model = ModelConfig(precision="fp8", fp8_recipe=recipe, num_layers=2)
        shape = resolve_shape(model, 64)
        config = transformer_config(shape, model, ParallelConfig(), "transformer_engine")
        assert (config.fp8, config.fp8_recipe) == (form, recipe)
        assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (history, algorithm)
        assert config.bf16 and config.params_dtype == torch.bfloat16 and not config.fp8_param
        assert not config.first_last_layers_bf16 and config.bias_activation_fusion
        local = transformer_config(shape, model, ParallelConfig(), "local")
        assert local.fp8 is None and not local.bias_activation_fusion
    model = dataclasses.replace(model, fp8_first_last_bf16=True)
    config = transformer_config(shape, model, ParallelConfig(), "transformer_engine")
    assert config.first_last_layers_bf16
    assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (1, 1)


def test_megatron_core_keeps_both_blocks_of_first_and_last_layer_in_bf16() -> None:
    """By its own rule, over the blocks of the whole model, from 0."""
    for builder, in_bf16 in (("gpt", [0, 3]), ("hybrid", [0, 1, 6, 7])):
        model = ModelConfig(
            precision="fp8", fp8_first_last_bf16=True, num_layers=4, builder=builder
        )
        shape = resolve_shape(model, 64)
        config = transformer_config(shape, model, ParallelConfig(), "transformer_engine")
        blocks = range(config.num_layers)
        assert [n for n in blocks if is_first_last_bf16_layer(config, n)] == in_bf16


def test_layers_are_chosen_and_the_reason_is_said() -> None:
    for precision in ("fp32", "bf16"):
        choice = choose_layers(ModelConfig(precision=precision), CPU)
        assert (choice.kind, choice.message(ModelConfig())) == ("local", None)
    model = ModelConfig(precision="fp8")
    choice = choose_layers(model, CPU)
    assert choice.kind == "local"
    line = choice.message(model)
    assert "there is no GPU" in line and "fp8_emulation" in line and "\n" not in line
    model = ModelConfig(precision="bf16")
    choice = choose_layers(model, torch.device("cuda"))
    assert choice.kind == "local" and "not installed" in choice.message(model)
    emulated = ModelConfig(precision="fp8", fp8_emulation=True)
    assert choose_layers(emulated, CPU).kind == "emulated_fp8"


def test_names_and_versions() -> None:
    found = unfused_name("decoder.layers.3.self_attention.linear_qkv.layer_norm_weight")
    assert found == "decoder.layers.3.input_layernorm.weight"
    found = unfused_name("decoder.layers.3.mlp.linear_fc1.layer_norm_weight")
    assert found == "decoder.layers.3.pre_mlp_layernorm.weight"
    name = "decoder.layers.3.mlp.linear_fc1.weight"
    assert unfused_name(name) == name
    fits = {"2.9.0": True, "2.20.2+abc": True, "2.21.0": False, "2.8.1": False, "3.0": False}
    assert {version: version_fits(version) for version in fits} == fits


HEADS = Heads(4, 64, 4, 4, 128, 176)
MISTAKES = [
    ({"precision": "fp8", "fp8_recipe": "delayed", "fp8_first_last_bf16": True}, "delayed"),
    ({"fp8_emulation": True, "fp8_recipe": "mxfp8"}, "model.fp8_recipe mxfp8"),
    ({"precision": "fp8", "hidden_size": 72}, "hidden_size / parallel.tensor to be a multiple"),
    ({"precision": "fp8", "ffn_hidden_size": 103}, "ffn_hidden_size / parallel.tensor to be a mul"),
    ({"fp8_emulation": True, "num_layers": 2, "fp8_first_last_bf16": True}, "more than 2 layers"),
]


@pytest.mark.parametrize(("model", "words"), MISTAKES, ids=str)
def test_contradictions_are_mistakes(model: dict, words: str) -> None:
    names = {"num_layers", "hidden_size", "ffn_hidden_size"} & set(model)
    heads = HEADS._replace(**{name: model[name] for name in names})
    with pytest.raises(UserError, match=words):
        validate_layout(Config(model=ModelConfig(**model)), heads, 1)


APEX_PROGRAM = """
import importlib, pathlib, sys
from megatron_dwm.runtime.fused import apex_finding
folder = pathlib.Path(sys.argv[1])
print(apex_finding())
for file in ("apex/__init__.py", "amp_C.py"):
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text("")
    importlib.invalidate_caches()
    print(apex_finding())
"""


def test_another_package_named_apex_is_not_nvidias(tmp_path: Path) -> None:
    """The package index's project of that name is a package without NVIDIA's compiled modules."""
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    command = [sys.executable, "-W", "ignore", "-c", APEX_PROGRAM, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "not installed",
        "a package of that name is installed, but not NVIDIA's",
        "installed",
    ]


def test_without_a_kernel_the_dequantized_tensors_are_multiplied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on CPUs, on GPUs before Ada, and with sizes that are no multiples of 16.

    torch's product of FP8 tensors is what a GPU takes. Small ones run on some CPUs.
    """
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(*size, generator=generator) for size in ((6, 32), (32, 48)))
    operands = quantize(left, ACTIVATIONS, None), quantize(right, ACTIVATIONS, None)
    found = fp8_emulation._product(*operands, torch.float32)
    exact = operands[0].values.double() @ operands[1].values.double()
    exact = exact * operands[0].scale.double() * operands[1].scale.double()
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(fp8_emulation, "_has_kernel", lambda *_: True)
    try:
        of_torch = fp8_emulation._product(*operands, torch.float32)
    except RuntimeError:
        pytest.skip("torch has no product of FP8 tensors on this CPU")
    torch.testing.assert_close(of_torch, found, rtol=1e-5, atol=1e-5)
