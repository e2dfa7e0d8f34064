"""The file of a study's results: a line for each finished run, added when the run ends.

A line counts for a run whose settings are the same now, so results can be kept when the runs
themselves are gone, and no other study's are taken for this one's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from examples.study.outcome import Outcome, read_outcome
from examples.study.spec import Run
from examples.study.workplace import Workplace
from megatron_dwm.config import UserError


@dataclass(frozen=True, kw_only=True)
class Results:
    """The outcomes of a study. Only one thread may add to them."""

    place: Workplace
    file: Path
    _known: dict[str, Outcome]

    @staticmethod
    def open(place: Workplace, file: Path) -> Results:
        """Read the file, if it is there. Raises UserError for a line that is no outcome."""
        known: dict[str, Outcome] = {}
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        for number, line in enumerate(lines, start=1):
            try:
                outcome = Outcome.of_line(line)
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{file} line {number}: no outcome of a run; remove it") from None
            known[f"{outcome.run} {outcome.settings}"] = outcome
        return Results(place=place, file=file, _known=known)

    def of(self, run: Run) -> Outcome | None:
        """Returns the outcome of a run with these settings, if it is known."""
        return self._known.get(f"{run.name} {self.place.settings(run)}")

    @property
    def count(self) -> int:
        """How many outcomes there are, of this study or another one."""
        return len(self._known)

    def add(self, run: Run) -> None:
        """Write down what a finished run reached, unless it is known."""
        if self.of(run) is not None:
            return
        settings = self.place.settings(run)
        outcome = read_outcome(self.place.directory(run), run.name, settings)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(outcome.line() + "\n")
        self._known[f"{run.name} {settings}"] = Outcome.of_line(outcome.line())
