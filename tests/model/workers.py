"""Functions that the ranks of the model tests run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.parallel_state import get_amax_reduction_group
from torch import Tensor

from megatron_dwm.config import ModelConfig, ParallelConfig
from megatron_dwm.model import forward_only, resolve_shape
from megatron_dwm.model.layers.fp8_emulation import Fp8ColumnParallelLinear, Fp8RowParallelLinear
from megatron_dwm.model.llm import transformer_config
from megatron_dwm.model.passes.objective import unit
from megatron_dwm.runtime import bring_up
from tests.bilevel.workers import TRAIN
from tests.tiny import MICRO_BATCH, tiny

EMULATED = (Fp8ColumnParallelLinear, Fp8RowParallelLinear)


def linear_layers(tensor: int, sequence: bool) -> dict[str, Tensor]:
    """Returns outputs and gradients, whole, of a column- and then a row-parallel FP8 layer."""
    with bring_up(ParallelConfig(tensor=tensor, sequence=sequence), seed=1) as runtime:
        model = ModelConfig(hidden_size=32, num_layers=1, num_attention_heads=4)
        parallel = ParallelConfig(tensor=tensor, sequence=sequence)
        config = transformer_config(resolve_shape(model, 64), model, parallel)
        options = {"config": config, "init_method": torch.nn.init.normal_, "bias": False}
        column = Fp8ColumnParallelLinear(32, 48, gather_output=False, **options)
        row = Fp8RowParallelLinear(48, 16, input_is_parallel=True, skip_bias_add=False, **options)
        generator = torch.Generator().manual_seed(7)
        x, up, down, gradient = (
            torch.randn(*size, generator=generator)
            for size in ((8, 3, 32), (48, 32), (16, 48), (8, 3, 16))
        )
        rank = runtime.tensor_rank
        column.weight.data.copy_(up.chunk(tensor)[rank])
        row.weight.data.copy_(down.chunk(tensor, dim=1)[rank])
        mine = (lambda t: t.chunk(tensor)[rank].contiguous()) if sequence else (lambda t: t)
        x = mine(x).requires_grad_()
        output = row(column(x)[0])[0]
        output.backward(mine(gradient))

        def whole(part: Tensor, dim: int, split: bool) -> Tensor:
            parts = [torch.zeros_like(part) for _ in range(tensor)]
            dist.all_gather(parts, part.contiguous(), group=runtime.tensor_group)
            return torch.cat(parts, dim=dim) if split else part

        return {
            "output": whole(output.detach(), 0, sequence),
            "input": whole(x.grad, 0, sequence),
            "column": whole(column.weight.grad, 0, True),
            "row": whole(row.weight.grad, 1, True),
        }


def losses(**layout: Any) -> Tensor:
    """Returns the sample losses of an untrained model."""
    with tiny(steps=0, **layout) as subject:
        return forward_only(subject.llm, unit(subject.batch(TRAIN), MICRO_BATCH)).unit_losses_n


def emulated_modules(**layout: Any) -> list[bool]:
    """Returns for each layer of this rank whether its linear layers are emulated."""
    with tiny(steps=0, fp8_emulation=True, **layout) as subject:
        found = []
        for module in subject.llm.modules:
            assert not isinstance(getattr(module, "output_layer", None), EMULATED)
            for layer in module.decoder.layers:
                linears = [m for m in layer.modules() if "ParallelLinear" in type(m).__name__]
                kinds = {isinstance(m, EMULATED) for m in linears}
                assert len(linears) == 4 and len(kinds) == 1
                found.append(kinds.pop())
        return found


def amax_group(tensor: int, pipeline: int) -> tuple[list[int], list[int], list[int]]:
    """Returns the ranks of the groups of FP8 maxima, tensor parallelism and data parallelism."""
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
    model = ModelConfig(precision="fp8", fp8_recipe="delayed", num_layers=2)
    with bring_up(parallel, seed=1) as runtime:
        shape = resolve_shape(model, 64)
        config = transformer_config(shape, model, parallel, "transformer_engine")
        group = get_amax_reduction_group(
            with_context_parallel=True, tp_only_amax_red=config.tp_only_amax_red
        )
        return tuple(
            dist.get_process_group_ranks(g)
            for g in (group, runtime.tensor_group, runtime.data_group)
        )
