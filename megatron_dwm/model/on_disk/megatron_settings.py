"""The shape of a model that Megatron-LM or Megatron-Bridge saved, from the settings beside it.

Megatron-LM pickles its arguments into `common.pt`, and since 0.19 into an object among the tensors.
A pickle can run code, so this reads it with an unpickler that makes nothing but plain values, and
an empty object for everything else. Bridge writes `run_config.yaml`.
"""

from __future__ import annotations

import argparse
import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_dwm.config import UserError
from megatron_dwm.files.command_names import name_of_command
from megatron_dwm.model import LlamaShape
from megatron_dwm.model.on_disk.saved_index import data_only, read_index

COMMON, RUN_CONFIG = "common.pt", "run_config.yaml"
_COMMON_STATE = "common_state/"
# What a Llama is in Megatron's arguments; others would be read as one, silently wrong.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "add_bias_linear": (False,),
    "num_moe_experts": (None,),
    "num_experts": (None,),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0, 1),
    "multi_latent_attention": (False,),
    "rotary_interleaved": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "apply_layernorm_1p": (False,),
    "window_size": (None,),
    "rotary_seq_len_interpolation_factor": (None, 1, 1.0),
    "seq_len_interpolation_factor": (None, 1, 1.0),
    "no_rope_freq": (None,),
}
# Megatron-Core's own, where a release has the switch without the number.
_ROPE_SCALING_FACTOR = 8.0


class _Anything:
    """Stands for an object of a class that is not read."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _PlainUnpickler(pickle.Unpickler):
    """Makes plain values and argparse's Namespace; no other class or function is ever called."""

    def find_class(self, module: str, name: str) -> Any:
        known = {"argparse.Namespace": argparse.Namespace, "collections.OrderedDict": OrderedDict}
        return known.get(f"{module}.{name}", _Anything)

    def persistent_load(self, _: Any) -> Any:  # tensors
        return _Anything()


def read_settings(folder: Path) -> dict[str, Any]:
    """Returns Megatron's settings of the saved run, by name; empty if there are none.

    Raises UserError for files that cannot be read.
    """
    if (folder / RUN_CONFIG).is_file():
        return _of_bridge(folder / RUN_CONFIG)
    if (folder / COMMON).is_file():
        return _of_megatron_lm(folder / COMMON, (folder / COMMON).read_bytes())
    return _of_common_state(folder)


def _of_bridge(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
    model = found.get("model") if isinstance(found, dict) else None
    if not isinstance(model, dict):
        raise UserError(f"{path}: has no mapping `model`, which Megatron-Bridge writes")
    data = found.get("dataset") or {}
    return {"seq_length": data.get("sequence_length"), **model}


def _of_common_state(folder: Path) -> dict[str, Any]:
    """Returns what megatron-core 0.19 saves among the tensors, in place of `common.pt`."""
    with data_only(folder / ".metadata"):
        stored = read_index(folder).storage_data
    for place, info in stored.items():
        if place.fqn.startswith(_COMMON_STATE):
            path = folder / info.relative_path
            with path.open("rb") as file:
                file.seek(info.offset)
                return _of_megatron_lm(path, file.read(info.length))
    return {}


def _of_megatron_lm(path: Path, saved: bytes) -> dict[str, Any]:
    """Returns the arguments in bytes that torch saved. path: where they were, for messages."""
    try:
        with zipfile.ZipFile(io.BytesIO(saved)) as archive:
            [name] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            content = _PlainUnpickler(io.BytesIO(archive.read(name))).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None
    if isinstance(content, list) and len(content) == 1:  # 0.19's object is a list of one
        [content] = content
    arguments = content.get("args") if isinstance(content, Mapping) else None
    return dict(vars(arguments)) if isinstance(arguments, argparse.Namespace) else {}


def shape_from(settings: Mapping[str, Any], given: Mapping[str, Any], where: Path) -> LlamaShape:
    """Returns the shape that the settings describe, with fields that the user has given.

    Raises UserError for another architecture than Llama's, and for a field that nothing tells.
    """
    _require_llama(settings, where)
    heads = settings.get("num_attention_heads")
    groups = settings.get("num_query_groups")
    grouped = settings.get("group_query_attention", groups is not None)
    tied = settings.get("share_embeddings_and_output_weights")
    if tied is None and "untie_embeddings_and_output_weights" in settings:
        tied = not settings["untie_embeddings_and_output_weights"]
    scaled = settings.get("use_rope_scaling") or settings.get("rope_scaling")
    found = {
        "hidden_size": settings.get("hidden_size"),
        "num_layers": settings.get("num_layers"),
        "num_attention_heads": heads,
        "num_query_groups": groups if grouped else heads,
        "ffn_hidden_size": settings.get("ffn_hidden_size"),
        "vocab_size": settings.get("vocab_size") or settings.get("padded_vocab_size"),
        "tied_embeddings": tied,
        "rotary_base": settings.get("rotary_base"),
        "norm_epsilon": settings.get("norm_epsilon", settings.get("layernorm_epsilon")),
        "head_dim": settings.get("kv_channels"),
        "rope_scaling_factor": (
            settings.get("rope_scaling_factor") or _ROPE_SCALING_FACTOR if scaled else None
        ),
        "qk_layernorm": settings.get("qk_layernorm"),
        "add_qkv_bias": settings.get("add_qkv_bias"),
        **given,
    }
    known = {name: value for name, value in found.items() if value is not None}
    unsaid = [name for name in ("rotary_base", "norm_epsilon") if name not in known]
    if unsaid:  # the sizes of tensors do not tell, and a default would be another model
        raise UserError(
            f"{where}: nothing there tells {' and '.join(unsaid)}; give each to "
            f"{name_of_command('convert')} from-megatron with --shape KEY=VALUE"
        )
    try:
        shape = LlamaShape(**known)
    except TypeError as error:
        missing = str(error).partition(": ")[2] or str(error)
        raise UserError(
            f"{where}: nothing there tells {missing}; give each to {name_of_command('convert')} "
            "from-megatron with --shape KEY=VALUE"
        ) from None
    plain = shape.hidden_size // shape.num_attention_heads
    return LlamaShape(**{**known, "head_dim": None}) if shape.head_dim == plain else shape


def _require_llama(settings: Mapping[str, Any], where: Path) -> None:
    for name, expected in _REQUIRED.items():
        if name in settings and settings[name] not in expected:
            raise UserError(
                f"{where}: {name} is {settings[name]!r}, expected {expected[0]!r}: only models in "
                "Llama's shape can be read"
            )
    swiglu = settings.get("swiglu", settings.get("gated_linear_unit", True))
    activation = settings.get("activation_func")  # Bridge's; a function by its name
    if activation is not None and not any(name in str(activation) for name in ("silu", "swiglu")):
        raise UserError(
            f"{where}: activation_func is {activation!r}, expected silu: only models in Llama's "
            "shape can be read"
        )
    if not swiglu:
        raise UserError(f"{where}: swiglu is off: only models in Llama's shape can be read")
