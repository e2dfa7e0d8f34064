"""A model of Megatron-Core in its data-parallel wrappers: what a gradient's passes need of it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import Module, Parameter

from megatron_dwm.model.layers.choice import LayerKind
from megatron_dwm.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class WrappedModel:
    """One rank's part of a model.

    chunks: Megatron's data-parallel wrappers, one for each model chunk of this rank.
    layer_kind: the implementation of the layers.
    """

    chunks: list[DistributedDataParallel]
    transformer: TransformerConfig
    runtime: Runtime
    layer_kind: LayerKind = "local"

    @property
    def is_quantized(self) -> bool:
        """True if the layers multiply in FP8, emulated or by Transformer Engine."""
        return self.layer_kind == "emulated_fp8" or self.transformer.fp8 is not None

    @property
    def modules(self) -> list[LanguageModule]:
        """The bare models inside the wrappers."""
        return [unwrap(chunk) for chunk in self.chunks]

    @property
    def micro_batches_multiple(self) -> int:
        """The number of micro-batches in a pass has to be a multiple of this.

        Megatron-Core's interleaved schedule asks for a multiple of the pipeline's length.
        """
        return self.runtime.pipeline_size if len(self.chunks) > 1 else 1

    def parameters(self) -> list[Parameter]:
        """Every parameter of this rank, in the wrappers' order."""
        return [parameter for chunk in self.chunks for parameter in chunk.parameters()]


def clear_gradients(model: WrappedModel, optimizer: MegatronOptimizer) -> None:
    """Zero Megatron's gradient buffers and drop the optimizer's views of them, before every pass.

    A view left in `Parameter.grad` would be added to the buffer that it views.
    """
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()


def invalidate_weight_caches(model: WrappedModel) -> None:
    """Make Transformer Engine quantize its weights again, after a change outside the optimizer.

    It quantizes a weight at the first micro-batch of a step and keeps the result. Without FP8 this
    has no effect.
    """
    for chunk in model.chunks:
        chunk.set_is_first_microbatch()


def unwrap(module: Module) -> LanguageModule:
    """The model inside Megatron's wrappers."""
    while not isinstance(module, LanguageModule):
        inner = module.module
        assert isinstance(inner, Module)
        module = inner
    return module
