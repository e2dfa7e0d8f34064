"""GPUs: their memory, and their peak FLOPs a second by precision, dense (without sparsity).

Sources: NVIDIA's data sheets of A100 (SXM), H100 (SXM), H200 (SXM) and DGX B200. Gigabytes are
decimal, as sold, which is a little below what the driver shows. fp32 is without TF32, which is off
in torch by default. FP8 recipes are those that Transformer Engine accepts (docs/gpu.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dwm.config import ModelConfig, UserError

_GB = 10**9
_TERA = 10**12
_HOPPER = ("tensorwise", "delayed", "blockwise")
_BLACKWELL = (*_HOPPER, "mxfp8")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU. fp8_flops is None, and fp8_recipes is empty, if it has no FP8 products."""

    name: str
    memory_bytes: int
    fp32_flops: float
    bf16_flops: float
    fp8_flops: float | None
    fp8_recipes: tuple[str, ...] = ()

    def require(self, model: ModelConfig) -> None:
        """Raise UserError if the GPU lacks the model's FP8; the run would continue in bf16."""
        if model.precision != "fp8":
            return
        if self.fp8_flops is None:
            raise UserError(f"model.precision fp8: {self.name} has no FP8; use bf16")
        if model.fp8_recipe not in self.fp8_recipes:
            raise UserError(
                f"model.fp8_recipe {model.fp8_recipe}: {self.name} has only "
                f"{', '.join(self.fp8_recipes)}, and the run would go on in bf16; use one of these"
            )

    def peak_flops(self, precision: str) -> float:
        """Returns the peak FLOPs a second of a precision that the GPU has (see `require`)."""
        peaks = {"fp32": self.fp32_flops, "bf16": self.bf16_flops, "fp8": self.fp8_flops}
        peak = peaks[precision]
        assert peak is not None, self.name
        return peak


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="a100-40gb",
            memory_bytes=40 * _GB,
            fp32_flops=19.5 * _TERA,
            bf16_flops=312 * _TERA,
            fp8_flops=None,
        ),
        Gpu(
            name="a100-80gb",
            memory_bytes=80 * _GB,
            fp32_flops=19.5 * _TERA,
            bf16_flops=312 * _TERA,
            fp8_flops=None,
        ),
        Gpu(
            name="h100-80gb",
            memory_bytes=80 * _GB,
            fp32_flops=67 * _TERA,
            bf16_flops=989.4 * _TERA,
            fp8_flops=1978.9 * _TERA,
            fp8_recipes=_HOPPER,
        ),
        Gpu(
            name="h200-141gb",
            memory_bytes=141 * _GB,
            fp32_flops=67 * _TERA,
            bf16_flops=989.4 * _TERA,
            fp8_flops=1978.9 * _TERA,
            fp8_recipes=_HOPPER,
        ),
        Gpu(
            # 192 GB on the package; a DGX B200 gives 1,440 GB to eight.
            name="b200-192gb",
            memory_bytes=180 * _GB,
            fp32_flops=75 * _TERA,
            bf16_flops=2250 * _TERA,
            fp8_flops=4500 * _TERA,
            fp8_recipes=_BLACKWELL,
        ),
    )
}
