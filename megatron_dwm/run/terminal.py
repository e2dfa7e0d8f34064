"""Shows progress: a bar on an interactive terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

from tqdm import tqdm

from megatron_dwm.config.printing import printable
from megatron_dwm.training import Taken


class Terminal:
    """Shows loss, speed and remaining time on the main process, and nothing on the others."""

    def __init__(
        self, *, shown: bool, first_step: int, steps: int, tokens_per_step: int, interval_steps: int
    ) -> None:
        self._shown = shown
        self._steps = steps
        self._first_step = first_step
        self._tokens_per_step = tokens_per_step
        self._interval_steps = interval_steps
        self._start_s = time.monotonic()
        interactive = shown and sys.stderr.isatty()
        self._bar = (
            tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True)
            if interactive
            else None
        )

    def step(self, step: int, stage: int, result: Taken) -> None:
        """Show the result of step `step`."""
        if self._bar is not None:
            self._bar.update(1)
            self._bar.set_postfix_str(
                f"loss {result.loss:.3f}, {self._tokens_per_s(step):,.0f} tok/s"
            )
        elif self._shown and (step % self._interval_steps == 0 or step == self._steps):
            left = timedelta(seconds=round(self._seconds_per_step(step) * (self._steps - step)))
            print(
                f"step {step}/{self._steps} stage {stage} loss {result.loss:.4f} "
                f"lr {result.learning_rate:.2e} grad norm {result.grad_norm:.3f} "
                f"{self._tokens_per_s(step):,.0f} tokens/s, {left} left",
                flush=True,
            )

    def note(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        if self._bar is not None:
            self._bar.write(printable(text))
        elif self._shown:
            print(printable(text), flush=True)

    def warn(self, text: str) -> None:
        """Print a warning on stderr without disturbing the bar."""
        if self._bar is not None:
            self._bar.write(f"warning: {printable(text)}", file=sys.stderr)
        elif self._shown:
            print(f"warning: {printable(text)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()

    def _seconds_per_step(self, step: int) -> float:
        return (time.monotonic() - self._start_s) / max(step - self._first_step, 1)

    def _tokens_per_s(self, step: int) -> float:
        return self._tokens_per_step / self._seconds_per_step(step)
