"""The folder of a study: its text, its runs, and the commands that make them.

    WORKDIR/text.jsonl, ...      the text (study_text.py)
    WORKDIR/data/                the corpora (data.py)
    WORKDIR/runs/NAME/           a run (spec.py), with NAME.log and NAME.settings beside it

Files that are there are left as they are. Every file appears whole, so a study can be killed
anywhere.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from examples.study.commands import REPOSITORY
from examples.study.data import Data
from examples.study.options import options_of
from examples.study.settings import run_fingerprint
from examples.study.spec import Run, Study
from examples.study.study_text import StudyText
from megatron_dwm.files.atomic import write_text

_CONFIG = REPOSITORY / "examples" / "tiny.yaml"


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """A folder, and the study that is made in it.

    scale: factor of the steps of all runs; runs of another scale than 1 are kept apart.
    """

    folder: Path
    study: Study
    scale: float = 1.0

    @property
    def text(self) -> StudyText:
        """The text that all runs are made from."""
        return StudyText(folder=self.folder)

    @property
    def on_sample(self) -> bool:
        """True if all text is the sample corpus', and no run was shortened."""
        return self.text.is_sample and self.scale == 1.0

    def prepare(self) -> list[str]:
        """Make the folder and its text; returns the names of the files that are the user's own.

        Raises UserError for one of them with a mistake in it.
        """
        self._runs.mkdir(parents=True, exist_ok=True)
        return self.text.prepare()

    @property
    def _runs(self) -> Path:
        return self.folder / ("runs" if self.scale == 1.0 else f"runs_x{self.scale:g}")

    def directory(self, run: Run) -> Path:
        """Returns the directory of a run."""
        return self._runs / run.name

    def data(self, run: Run) -> Data:
        """Returns what a run trains on; it may have to be made."""
        return Data(
            folder=self.folder / "data",
            text=self.text.training,
            tokenizer=self.text.tokenizer,
            target=self.text.target(run.target),
            rater=self._stages(run),
            rated_by=[self.settings(each) for each in self.study.needed(run)],
            run=run,
        )

    def is_as_asked(self, run: Run) -> bool:
        """True if the directory of a run has these settings; one that is not there gets them."""
        directory, asked = self.directory(run), self.settings(run)
        mark = directory.with_name(f"{directory.name}.settings")
        if not directory.exists():
            write_text(mark, asked)
        return mark.is_file() and mark.read_text(encoding="utf-8") == asked

    def settings(self, run: Run) -> str:
        """Returns the fingerprint of what a run is asked for; the text has to be there."""
        needed = [self.settings(each) for each in self.study.needed(run)]
        text = self.text.fingerprints(run.target if run.method.reads_target else None)
        words = options_of(run, checkpoint=str, directory=str)
        return run_fingerprint(run, words, _CONFIG, [*text, *needed])

    def command(self, run: Run, data: Path) -> list[str]:
        """Returns the command that trains a run on `data`, or goes on with it."""
        words = options_of(
            run,
            checkpoint=lambda name: last_checkpoint(self._runs / name),
            directory=lambda name: self._runs / name,
        )
        reads = (
            ["--validation.path", str(self.text.target(run.target))] if run.method.target else []
        )
        return [
            *(sys.executable, "-m", "megatron_dwm.pretrain", str(_CONFIG), "--run.resume", "true"),
            *("--run.dir", str(self.directory(run)), "--run.seed", str(run.seed)),
            *("--data.train", str(data), "--data.tokenizer", str(self.text.tokenizer)),
            *("--evaluation.path", str(self.text.held_out)),
            *("--evaluation.interval_steps", str(max(run.steps // 10, 1))),
            *("--training.checkpoint_interval_steps", str(max(run.steps // 10, 1))),
            *reads,
            *words,
        ]

    def _stages(self, run: Run) -> Path | None:
        """Returns where the weighting models are by which a run's data are chosen."""
        if run.method.select != "rater":
            return None
        return self._runs / run.beside(run.method.after[0]) / "weighting"


def last_checkpoint(directory: Path) -> Path | None:
    """Returns the last checkpoint of a run, if there is one."""
    return max((directory / "checkpoints").glob("step_*[0-9]"), default=None)
