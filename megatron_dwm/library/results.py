"""What a probe of a training pass returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class SampleAlignments:
    """The result of a probed pass; read it after the pass.

    scale: the loss that the pass differentiates is multiplied by this on the way into the gradient
        (data parallelism's mean, the number of tokens); `values` has it already.
    """

    _values_n: Tensor | None = None
    scale: float = 1.0

    @property
    def values_n(self) -> Tensor:
        """float32 [n], <z, gradient of sample i's part of the loss>, in the order of the pass.

        Summed over all samples of the global batch it is <z, g> with g the pass's gradient. If
        sample i's loss is multiplied by a weight w_i, at w_i = 1 the next step changes the
        validation loss by dL_val/dw_i = -lr * value_i.

        Raises RuntimeError before the end of the pass.
        """
        if self._values_n is None:
            raise RuntimeError("the alignments are known when the probed pass has ended")
        return self._values_n

    def end(self, values_n: Tensor) -> None:
        """Record the values, before scaling."""
        self._values_n = values_n * self.scale
