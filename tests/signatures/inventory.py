"""What the real Transformer Engine and Megatron-Core's extension for it offer, as JSON on stdout.

Run by the signature tests with the interpreter of .venv-signatures. Transformer Engine's compiled
module cannot be had without CUDA: a module that has every name stands for it, so that the Python
files can be imported. No layer can be built this way; classes, signatures and sources can be read.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import json
import os
import sys
import types
import warnings
from typing import Any

from tests.signatures.scales import scales

CHECKS = (
    "is_fp8_available",
    "is_mxfp8_available",
    "is_fp8_block_scaling_available",
    "fp8_autocast",
)
RECIPES = ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")
EXTENSION = "megatron.core.extensions.transformer_engine"


class _AnyName(type):
    """A class in which every attribute is another such class; as a number each is another one."""

    def __index__(cls) -> int:
        return id(cls)

    @property
    def __members__(cls) -> dict[str, Any]:
        """Returns the attributes asked for so far; 2.20 compares an enum's with its own."""
        return {name: value for name, value in vars(cls).items() if isinstance(value, _AnyName)}

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, _AnyName(name, (), {}))
        return getattr(cls, name)


def _stand_in_for_the_compiled_module() -> None:
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    names: Any = _AnyName("names", (), {})
    module = types.ModuleType("transformer_engine_torch")
    module.__getattr__ = lambda name: getattr(names, name)  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda _: None


def _class(name: str) -> dict[str, Any]:
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute, None)
    if found is None:
        return {}
    packages = ("transformer_engine.", "megatron.")
    modules = {base.__module__ for base in found.__mro__ if base.__module__.startswith(packages)}
    return {
        "name": f"{found.__module__}.{found.__qualname__}",
        "forward": list(inspect.signature(found.forward).parameters),
        "init": list(inspect.signature(found.__init__).parameters),
        "members": dir(found),
        # Constructors set attributes and need a GPU to run, so this reads them from the source.
        "source": "".join(inspect.getsource(sys.modules[name]) for name in sorted(modules)),
    }


def _rotary(extension: Any) -> dict[str, Any]:
    """Returns what Megatron-Core's fused rotary embeddings take, and how they call the kernel."""
    kernel = importlib.import_module("transformer_engine.pytorch.attention.rope")
    names = ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd")
    return {
        "kernel": _parameters(kernel.apply_rotary_pos_emb),
        "functions": {name: _parameters(getattr(extension, name)) for name in names},
        "source": "".join(inspect.getsource(getattr(extension, name)) for name in names),
    }


def _over_parts(ours: Any, attention: str) -> dict[str, Any]:
    caller = importlib.import_module("megatron.core.transformer.attention").Attention
    return {
        "megatrons_attention": _class(attention),
        "attention_call": inspect.getsource(caller),
        "over_parts": [base.__qualname__ for base in ours.attention_over_parts().__mro__],
    }


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def _mlp(spec: Any) -> tuple[Any, Any]:
    """Returns the class and its parts; Megatron-Core 0.19 has a call here and no spec."""
    if isinstance(spec, functools.partial):
        return spec.func.__self__, spec.keywords["submodules"]
    return spec.module, spec.submodules


def _block(spec: Any) -> dict[str, Any]:
    return {
        "layers": len(spec.layer_specs),
        "norm": spec.layer_norm.__qualname__,
        "keys": spec.layer_specs[0].submodules.sharded_state_dict_keys_map,
    }


def _head_norms(spec: Any) -> dict[str, Any]:
    heads = spec.layer_specs[0].submodules.self_attention.submodules
    norms = [norm.__qualname__ for norm in (heads.q_layernorm, heads.k_layernorm)]
    return {"norms": norms, "block": _block(spec)}


def _buffers(te: Any) -> dict[str, Any]:
    base = te.module.base
    return {
        "initialize_ub": _parameters(base.initialize_ub),
        "modes": [mode.name for mode in base.UserBufferQuantizationMode],
    }


def main() -> None:
    """Print everything that the tests need to know."""
    warnings.simplefilter("ignore")
    _stand_in_for_the_compiled_module()
    te = importlib.import_module("transformer_engine.pytorch")
    recipe = importlib.import_module("transformer_engine.common.recipe")
    extension = importlib.import_module(EXTENSION)
    specs = importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    layer = specs.get_gpt_layer_with_transformer_engine_spec()
    block_of_mlp, mlp = _mlp(layer.submodules.mlp)
    swiglu = importlib.import_module("megatron.core.fusions.fused_bias_swiglu")
    attention = layer.submodules.self_attention.submodules
    ours = importlib.import_module("megatron_dwm.model.layers.transformer_engine")
    core_attention = te.DotProductAttention
    table = importlib.import_module("megatron_dwm.bilevel.adapters")
    produced = [attention.linear_qkv, attention.core_attention, attention.linear_proj]
    produced += [mlp.linear_fc1, mlp.linear_fc2, te.RMSNorm]
    inventory = {
        "version": importlib.metadata.version("transformer-engine"),
        "has_te": extension.HAVE_TE,
        "produced": [f"{kind.__module__}.{kind.__qualname__}" for kind in produced],
        "classes": {
            name: _class(name)
            for name in (*table.ADAPTERS, *table.WITHOUT_PARAMETERS)
            if not name.startswith("megatron_dwm.")
        },
        "mlp": f"{block_of_mlp.__module__}.{block_of_mlp.__qualname__}",
        "mlp_source": inspect.getsource(block_of_mlp.forward),
        "swiglu": _parameters(swiglu.bias_swiglu_impl),
        "swiglu_source": inspect.getsource(swiglu.SwiGLUFunction),
        "attention": _parameters(core_attention.forward),
        "attention_source": inspect.getsource(core_attention.forward),
        "megatrons_attention_source": inspect.getsource(attention.core_attention.forward),
        **_over_parts(ours, table.WITHOUT_PARAMETERS[0]),
        "norm_source": inspect.getsource(extension.TENorm),
        "checks": {name: _parameters(getattr(te, name)) for name in CHECKS},
        "scales": scales(ours, recipe),
        "recipes": {name: _parameters(getattr(recipe, name)) for name in RECIPES},
        "block": _block(ours.transformer_engine_block_spec(2)),
        "head_norms": _head_norms(ours.transformer_engine_block_spec(2, qk_layernorm=True)),
        "linear": _parameters(te.Linear.__init__),
        "norm_linear": _parameters(te.LayerNormLinear.__init__),
        "buffers": _buffers(te),
        "rotary": _rotary(extension),
        "adam": importlib.import_module("megatron.core.optimizer").Adam.__module__,
        "adam_source": inspect.getsource(te.optimizers.FusedAdam),
    }
    json.dump(inventory, sys.stdout)


if __name__ == "__main__":
    main()
