"""Records the weights of global batches: all ranks gather, the main process keeps."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.config import LoggingConfig
from megatron_dwm.data import Origins
from megatron_dwm.run.files import RunFiles
from megatron_dwm.run.token_records import ReadRows, gather_token_weights
from megatron_dwm.runtime import Runtime
from megatron_dwm.training.weighed_units import WeighedUnits

# Looks up the origins of a global batch's rows when they are needed.
FindOrigins = Callable[[], Origins]


class BatchRecords:
    """Writes weights/ and, where tokens are the units, token_weights/."""

    def __init__(
        self, state: TrainState, runtime: Runtime, config: LoggingConfig, files: RunFiles | None
    ) -> None:
        """`files` is None except on the main process."""
        self._state, self._runtime, self._files = state, runtime, files
        self._interval = config.weights_interval_steps
        self._token_rows = config.weights_token_rows

    def is_due(self) -> bool:
        """True if the weights of the step that was just counted are recorded."""
        return self._interval > 0 and self._state.step % self._interval == 0

    def is_on(self) -> bool:
        """True if the run records weights at all."""
        return self._interval > 0

    def weights(
        self, stage: int, origins: FindOrigins, units: WeighedUnits, alignment_n: Tensor | None
    ) -> None:
        """Record the weights of a global batch (collective); `alignment_n` is of all replicas."""
        units = units.recorded()
        losses_n = units.gather(units.losses_n, self._runtime)
        weights_n = units.gather(units.weights_n, self._runtime)
        if self._files is not None:
            step = self._state.step
            self._files.add_weights(step, stage, origins(), losses_n, weights_n, alignment_n)

    def tokens(
        self, stage: int, origins: FindOrigins, units: WeighedUnits, read_rows: ReadRows
    ) -> None:
        """Record the tokens of a global batch if they are its units (collective)."""
        if units.rows is None:
            return
        found = gather_token_weights(units, self._token_rows, self._runtime)
        if self._files is not None:
            self._files.tokens.add(self._state.step, stage, origins(), found, read_rows)
