"""Every name, argument and attribute of Transformer Engine that our code uses exists.

    bash tests/signatures/prepare.sh [VERSION [MEGATRON_CORE]] && bash tests/run.sh -m signatures

The real package and Megatron-Core's extension are read in an environment of their own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dwm.bilevel.adapters import ADAPTERS, WITHOUT_PARAMETERS
from megatron_dwm.model.layers.pieces import pieces_of
from megatron_dwm.model.layers.transformer_engine import (
    UNFUSED_NAMES,
    UNPICKLES,
    packed_sequences,
    version_fits,
)

REPOSITORY = Path(__file__).parent.parent.parent
PYTHON = REPOSITORY / ".venv-signatures" / "bin" / "python"
TE = "megatron.core.extensions.transformer_engine."
LINEARS = [TE + "TEColumnParallelLinear", TE + "TERowParallelLinear"]
FUSED = TE + "TELayerNormColumnParallelLinear"
NORM = "transformer_engine.pytorch.module.rmsnorm.RMSNorm"

pytestmark = pytest.mark.signatures


@pytest.fixture(scope="module")
def inventory() -> dict[str, Any]:
    if not PYTHON.is_file():
        pytest.skip("no .venv-signatures: bash tests/signatures/prepare.sh makes it")
    done = subprocess.run(
        [PYTHON, "-W", "ignore", "-m", "tests.signatures.inventory"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", UNPICKLES: "0"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_package_is_one_that_we_take(inventory: dict[str, Any]) -> None:
    assert version_fits(inventory["version"])
    assert inventory["has_te"]


def test_every_class_of_the_spec_is_in_the_table(inventory: dict[str, Any]) -> None:
    assert len(inventory["produced"]) == 6
    for name in inventory["produced"]:
        assert name in ADAPTERS or name in WITHOUT_PARAMETERS, name


def test_every_class_of_the_table_exists_under_its_own_name(inventory: dict[str, Any]) -> None:
    assert set(inventory["classes"]) >= {*LINEARS, FUSED, NORM}
    for name, found in inventory["classes"].items():
        assert found.get("name") == name


@pytest.mark.parametrize("name", [*LINEARS, FUSED, NORM])
def test_inputs_have_the_names_that_adapters_read(inventory: dict[str, Any], name: str) -> None:
    assert inventory["classes"][name]["forward"][1] == ADAPTERS[name].input_name


def test_attributes_that_adapters_read_are_set(inventory: dict[str, Any]) -> None:
    for name, attributes in {
        FUSED: ("normalization", "zero_centered_gamma", "eps"),
        NORM: ("zero_centered_gamma", "eps", "weight"),
    }.items():
        for attribute in attributes:
            assert f"self.{attribute}" in inventory["classes"][name]["source"], (name, attribute)
    assert '"layer_norm_weight"' in inventory["classes"][FUSED]["source"]


def test_layers_keep_quantized_weights_under_the_flag_that_we_raise(
    inventory: dict[str, Any],
) -> None:
    for name in (*LINEARS, FUSED):
        source = inventory["classes"][name]["source"]
        assert "self.is_first_microbatch = True" in source
        # 2.16 shortened the name.
        kept = r"update_(workspace|ws) = is_first_microbatch is None or is_first_microbatch"
        assert re.search(kept, source)


def test_frozen_weights_form_no_gradient(inventory: dict[str, Any]) -> None:
    """The probe freezes the parameters, and z is in the buffers that gradients would go to."""
    for name in (*LINEARS, FUSED):
        source = inventory["classes"][name]["source"]
        # From 2.16 on linear layers hand it on in a record of arguments.
        in_record = (
            re.search(r"weight_requires_grad=weight\w*\.requires_grad", source)
            and "bwd_args.requires_wgrad = fwd_args.weight_requires_grad" in source
        )
        assert in_record or "ctx.requires_wgrad = weight.requires_grad" in source


def test_delayed_scales_are_restored_bit_for_bit(inventory: dict[str, Any]) -> None:
    """By each release's own functions and state, on the CPU, also where a layer had none before."""
    assert inventory["scales"]["restored"]
    for name in (*LINEARS, FUSED):
        found = inventory["classes"][name]
        assert {"get_fp8_meta_tensors", "reset_fp8_meta_tensors"} <= set(found["members"])


def test_scales_of_a_checkpoint_are_refused_in_one_line(inventory: dict[str, Any]) -> None:
    """From 2.18 on, and by the last releases of the two before it."""
    version = tuple(int(part) for part in inventory["version"].split("+")[0].split("."))
    line = inventory["scales"]["refusal"]
    if version < (2, 18) and version not in ((2, 16, 1), (2, 17, 1)):
        assert line is None
    else:
        assert line.startswith("step_00000001: ") and "\n" not in line
        assert f"{UNPICKLES}=1" in line


def test_fused_weights_say_how_they_are_split(inventory: dict[str, Any]) -> None:
    """Initialization splits gate and up by the stride that the layer was built with."""
    assert "stride" in inventory["classes"][FUSED]["init"]
    assert "'partition_stride', stride" in inventory["classes"][FUSED]["source"]
    assert "tensor=getattr(self, weight)" in inventory["classes"][FUSED]["source"]


def test_swiglu_is_fused_by_megatron_cores_own_function(inventory: dict[str, Any]) -> None:
    """SwiGLU keeps its input only; its backward is a function of that and the output gradient."""
    assert inventory["mlp"] == "megatron.core.transformer.mlp.MLP"
    assert "self.config.bias_activation_fusion" in inventory["mlp_source"]
    assert "bias_swiglu_impl(" in inventory["mlp_source"]
    assert inventory["swiglu"][:2] == ["input", "bias"]
    assert "swiglu_back(grad_output, input)" in inventory["swiglu_source"]


def test_attention_takes_pieces_in_its_packed_form(inventory: dict[str, Any]) -> None:
    """Megatron-Core passes on all that is set, and asks for the mask of the packed form."""
    packed = packed_sequences(pieces_of(torch.tensor([[0, 0, 1], [0, 1, 1]])))
    names = {field.name for field in dataclasses.fields(packed)}
    given = {name for name in names if getattr(packed, name) is not None}
    assert given <= set(inventory["attention"])
    source = inventory["megatrons_attention_source"]
    assert "attn_mask_type = AttnMaskType.padding_causal" in source
    assert "for key in self.kept_packed_seq_params" in source
    source = inventory["attention_source"]
    for condition in ('qkv_format == "thd"', "torch.int32", '"padding" in attn_mask_type'):
        assert condition in source, condition


def test_attention_over_parts_replaces_megatrons_class(inventory: dict[str, Any]) -> None:
    """SelfAttention gives query, key and value by position, and the groups and parts by name."""
    assert inventory["over_parts"][1] == "TEDotProductAttention"
    found = inventory["megatrons_attention"]
    assert found["forward"][1:5] == ["query", "key", "value", "attention_mask"]
    assert "packed_seq_params" in found["forward"] and "pg_collection" in found["init"]
    call = inventory["attention_call"]
    assert "pg_collection=self.pg_collection" in call
    assert re.search(r"self\.core_attention\)?\(\s*query,\s*key,\s*value,\s*attention_mask,", call)
    assert "packed_seq_params=packed_seq_params" in call


def test_norm_is_built_for_rms_norm(inventory: dict[str, Any]) -> None:
    assert "te.pytorch.RMSNorm" in inventory["norm_source"]


def test_checks_of_the_device_give_reasons(inventory: dict[str, Any]) -> None:
    for name in ("is_fp8_available", "is_mxfp8_available", "is_fp8_block_scaling_available"):
        assert inventory["checks"][name] == ["return_reason"]
    assert {"enabled", "fp8_recipe", "fp8_group"} <= set(inventory["checks"]["fp8_autocast"])


def test_recipes_take_the_formats_that_we_set(inventory: dict[str, Any]) -> None:
    assert len(inventory["recipes"]) == 4
    for name, parameters in inventory["recipes"].items():
        assert "fp8_format" in parameters, name
    assert {"amax_history_len", "amax_compute_algo"} <= set(inventory["recipes"]["DelayedScaling"])


def test_our_block_is_made_of_it(inventory: dict[str, Any]) -> None:
    block = inventory["block"]
    assert (block["layers"], block["norm"], block["keys"]) == (2, "TENorm", UNFUSED_NAMES)


def test_heads_have_the_norm_that_layers_have(inventory: dict[str, Any]) -> None:
    assert inventory["head_norms"]["norms"] == ["TENorm", "TENorm"]
    assert inventory["head_norms"]["block"] == inventory["block"]


def test_a_bias_is_a_parameter_only_where_there_is_one(inventory: dict[str, Any]) -> None:
    """Adapters take a bias that is a parameter; without one the layers hold an empty tensor."""
    for name in (LINEARS[0], FUSED):
        assert {"bias", "skip_bias_add"} <= set(inventory["classes"][name]["init"])
        source = inventory["classes"][name]["source"]
        assert "bias = torch.Tensor().to(" in source
        assert "self.te_return_bias = skip_bias_add and bias" in source


def test_adam_is_fused_and_keeps_what_the_virtual_step_reads(inventory: dict[str, Any]) -> None:
    assert inventory["adam"].startswith("transformer_engine.")
    for name in ('"exp_avg"', '"exp_avg_sq"', 'group["step"]'):
        assert name in inventory["adam_source"], name


def test_tensor_overlap_is_started_with_arguments_that_exist(inventory: dict[str, Any]) -> None:
    """Megatron-Core hands the options on to the layers, and leaves the buffers to its caller."""
    buffers = inventory["buffers"]
    given = {"shape", "tp_size", "quantization_modes", "ub_cfgs", "bootstrap_backend"}
    assert given <= set(buffers["initialize_ub"])
    assert set(buffers["modes"]) >= {"NONE", "FP8"}
    of_both = {"ub_overlap_ag", "ub_name"}
    assert of_both | {"ub_overlap_rs"} <= set(inventory["linear"])
    of_norm = {"ub_overlap_rs_dgrad", "ub_bulk_wgrad", "ub_bulk_dgrad"}
    assert of_both | of_norm <= set(inventory["norm_linear"])
    for name in (*LINEARS, FUSED):
        assert "self.config.tp_comm_overlap" in inventory["classes"][name]["source"]


def test_rotary_kernel_takes_what_megatron_core_gives(inventory: dict[str, Any]) -> None:
    rotary = inventory["rotary"]
    assert rotary["functions"]["fused_apply_rotary_pos_emb"][:2] == ["t", "freqs"]
    assert rotary["functions"]["fused_apply_rotary_pos_emb_thd"][:3] == ["t", "cu_seqlens", "freqs"]
    calls = re.findall(r"return apply_rotary_pos_emb\((.*?)\)", rotary["source"], re.DOTALL)
    given = {name for call in calls for name in re.findall(r"(\w+)=", call)}
    assert {"tensor_format", "fused", "cu_seqlens"} <= given <= set(rotary["kernel"])
