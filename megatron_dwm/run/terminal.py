"""Shows progress: plain lines and, on an interactive terminal, a bar for each stage."""

from __future__ import annotations

import os
import sys
import time

from tqdm import tqdm

from megatron_dwm.config.printing import printable
from megatron_dwm.weighting.schedule import Schedule


class Terminal:
    """Prints lines on the main process, and nothing on the others.

    On an interactive terminal there is a bar of the current stage's steps and, while several
    updates are made between two steps, one of these.
    """

    def __init__(self, *, shown: bool, schedule: Schedule, interval_steps: int) -> None:
        """interval_steps: steps, or updates between two steps, from one line to the next."""
        self.interval_steps = interval_steps
        self._shown, self._schedule = shown, schedule
        self._interactive = shown and _has_terminal()
        self._bar: tqdm | None = None
        self._bar_title = ""

    def step(self, step: int, stage: int) -> None:
        """Move the bar of a stage after `step` steps."""
        steps = self._schedule.steps_of(stage)
        stages = len(self._schedule.borders)
        title = f"stage {stage}/{stages}" if stages > 1 else "steps"
        self._move(title, "step", step - steps.start, len(steps))

    def update(self, number: int, stage: int) -> None:
        """Move the bar of the updates before a stage's steps; `number` of them are made."""
        if self._schedule.updates_each > 1:
            title = f"stage {stage}/{len(self._schedule.borders)}: weighting updates"
            self._move(title, "update", number, self._schedule.updates_each)

    def has_line(self, number: int, last: int) -> bool:
        """True if the `number`th of `last` steps or updates has a line."""
        return number % self.interval_steps == 0 or number == last

    def show_beside_bar(self, text: str) -> None:
        """Write a few numbers beside the bar, if there is one."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)

    def log(self, text: str) -> None:
        """Print a line that begins with the time."""
        if self._shown:
            self.note(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {text}")

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
            self._bar, self._bar_title = None, ""

    def _move(self, title: str, unit: str, done: int, total: int) -> None:
        """Move the bar with this title; another one is closed first."""
        if not self._interactive:
            return
        if self._bar is None or self._bar_title != title:
            self.close()
            self._bar_title = title
            self._bar = tqdm(
                total=total, initial=done - 1, desc=title, unit=unit, dynamic_ncols=True
            )
        self._bar.update(done - self._bar.n)


def _has_terminal() -> bool:
    """True if stderr is a terminal that is wide enough for a bar."""
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):
        return False
