"""The file of a study's results: a line for each finished run, added when the run ends.

A line counts for a run whose settings are the same now, so results can be kept when the runs
themselves are gone, and no other study's are taken for this one's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

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
        for number, line in enumerate(_read(file).splitlines(), start=1):
            if not line.strip():
                continue
            try:
                outcome = Outcome.of_line(line)
            except (ValueError, TypeError, KeyError, AttributeError):
                raise UserError(
                    f"--results {file} line {number}: no outcome of a run; remove the line"
                ) from None
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

    def seconds(self, size: str, method: str) -> str:
        """Returns the mean seconds of the known runs of a method at a size, on any machine."""
        names = (f"{size}-", f"-{method}-")
        found = [o.seconds for o in self._known.values() if all(n in o.run for n in names)]
        return f"{mean(found):.0f}" if found else "-"

    def add(self, run: Run) -> None:
        """Write down what a finished run reached, unless it is known."""
        if self.of(run) is not None:
            return
        settings = self.place.settings(run)
        outcome = read_outcome(self.place.directory(run), run.name, settings)
        before = _read(self.file)
        end = "" if not before or before.endswith("\n") else "\n"
        write_text(self.file, f"{before}{end}{outcome.line()}\n")
        self._known[f"{run.name} {settings}"] = Outcome.of_line(outcome.line())


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8") if file.exists() else ""
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"--results {file}: {error}; expected a file of lines") from None
