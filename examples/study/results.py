"""The file of a study's results: a line for each finished run, added when the run ends.

A line counts for a run whose settings are the same now, so results can be kept when the runs
themselves are gone, and no other study's are taken for this one's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from examples.study.outcome import Outcome, read_outcome
from examples.study.spec import Run
from examples.study.workplace import Workplace
from megatron_dwm.config import UserError
from megatron_dwm.files.atomic import write_text

_COMMIT_CHARACTERS = 10


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
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a kill cut the last line short; its run is read again
            write_text(file, whole)
        for number, line in enumerate(whole.splitlines(), start=1):
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
    def commits(self) -> Mapping[str, int]:
        """How many of this study's runs are known, by the commit of the code that made them."""
        study = self.place.study
        runs = {run.name: run for part in study.parts.values() for run in study.runs(part)}
        found = [outcome for run in runs.values() if (outcome := self.of(run)) is not None]
        return Counter(outcome.commit[:_COMMIT_CHARACTERS] for outcome in found)

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
