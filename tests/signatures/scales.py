"""Our functions on the delayed recipe's scales, on each release's own state and functions.

A layer needs a GPU. Its scales do not, nor do the functions that read, restore and load them.
"""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from typing import Any

import torch

from megatron_dwm.config import UserError


def scales(ours: Any, recipe: Any) -> dict[str, Any]:
    """Change the delayed recipe's scales and restore them; then load some as from a checkpoint.

    ours: our module of Transformer Engine's layers.  recipe: Transformer Engine's recipes.
    """
    base = importlib.import_module("transformer_engine.pytorch.module.base")
    states = importlib.import_module("transformer_engine.pytorch.quantization")
    layer = _layer(base.TransformerEngineBaseModule, recipe.DelayedScaling(), states)
    unused = _layer(base.TransformerEngineBaseModule, recipe.DelayedScaling(), states)
    later, unused.fp8_meta = unused.fp8_meta, {}
    tensors, first = _tensors(layer.fp8_meta), _tensors(later)
    initial = [tensor.clone() for tensor in first]
    for number, tensor in enumerate(tensors):
        tensor.copy_(torch.arange(tensor.numel()).view_as(tensor) + number)
    before = [tensor.clone() for tensor in tensors]
    kept = ours.read_scaling_state([torch.nn.ModuleList([layer, unused])])
    unused.fp8_meta = later
    for tensor in (*tensors, *first):
        tensor.fill_(7.0)
    ours.write_scaling_state(kept)
    return {
        "restored": all(map(torch.equal, (*tensors, *first), (*before, *initial))),
        "refusal": _refusal(ours, layer, {"recipe": recipe.DelayedScaling(), "scale_fwd": before}),
    }


def _tensors(fp8_meta: dict[str, Any]) -> list[torch.Tensor]:
    parts = [fp8_meta[key] for key in ("scaling_fwd", "scaling_bwd")]
    return [tensor for part in parts for tensor in (part.scale, part.amax_history)]


def _layer(base: Any, recipe: Any, states: Any) -> Any:
    """Returns a module that has of a layer only its scales, with the layer's own functions."""
    names = ("get_fp8_meta_tensors", "reset_fp8_meta_tensors", "set_extra_state")
    kind = type("Layer", (torch.nn.Module,), {name: getattr(base, name) for name in names})
    layer = kind()
    layer.fp8_meta = {
        f"scaling_{part}": states.DelayedScalingRecipeState(
            recipe, mode=mode, num_quantizers=3, device=torch.device("cpu")
        )
        for part, mode in (("fwd", "forward"), ("bwd", "backward"))
    }
    return layer


def _refusal(ours: Any, layer: Any, saved: dict[str, Any]) -> str | None:
    """Returns the line about scales of a checkpoint; None if they are taken up to the GPU."""
    tensor = torch.frombuffer(bytearray(pickle.dumps(saved)), dtype=torch.uint8)
    try:
        with ours.scales_are_refused_in_one_line(Path("step_00000001")):
            layer.set_extra_state(tensor)
    except UserError as error:
        return str(error)
    except KeyError:  # unpickled: what is loaded next is not in `saved`
        return None
    raise AssertionError("neither refused nor loaded")
