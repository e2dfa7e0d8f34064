"""The wall-clock time of a run's loop, which the state keeps over all starts."""

from __future__ import annotations

import time

from megatron_dwm.checkpoint.state import TrainState


class Clock:
    """Adds the time that passes to `state.seconds`."""

    def __init__(self, state: TrainState) -> None:
        """Start the clock."""
        self._state = state
        self.restart()

    def restart(self) -> None:
        """Begin again from the state's time, which may have been loaded."""
        self._last_s = time.monotonic()

    def lap(self) -> float:
        """Returns the seconds since the last call, and adds them to the state."""
        before_s, self._last_s = self._last_s, time.monotonic()
        self._state.seconds += self._last_s - before_s
        return self._last_s - before_s
