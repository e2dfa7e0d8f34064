"""The folder of a study: its text, its runs, and the commands that make them.

    WORKDIR/text.jsonl, tokenizer.model, heldout.jsonl, target.NAME.jsonl
    WORKDIR/data/                the corpora (data.py)
    WORKDIR/runs/NAME/           a run (spec.py), with NAME.log and NAME.settings beside it

What is finished is left as it is. Every file appears whole, so a study can be killed anywhere.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from examples.study import texts
from examples.study.commands import REPOSITORY, run_tool
from examples.study.data import Data
from examples.study.options import options_of
from examples.study.settings import file_fingerprint, run_fingerprint, vocabulary_fingerprint
from examples.study.spec import Run, Study
from megatron_dwm.files.atomic import write_text

_CONFIG = REPOSITORY / "examples" / "tiny.yaml"
_VOCABULARY = 1024


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """A folder, and the study that is made in it."""

    folder: Path
    study: Study

    @property
    def text(self) -> Path:
        """The training text of all corpora."""
        return self.folder / "text.jsonl"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of all runs."""
        return self.folder / "tokenizer.model"

    @property
    def held_out(self) -> Path:
        """The held-out text of all runs."""
        return self.folder / "heldout.jsonl"

    def target(self, name: str) -> Path:
        """Returns the passages of a target."""
        return self.folder / f"target.{name}.jsonl"

    @cached_property
    def domains(self) -> set[str]:
        """The domains of the training text."""
        with self.text.open(encoding="utf-8") as lines:
            return {json.loads(line).get("domain", "") for line in lines}

    def prepare(self) -> None:
        """Write the text, the targets and the tokenizer, unless they are there."""
        (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        if not self.text.is_file():
            texts.write_training_text(self.text)
        if not self.held_out.is_file():
            texts.write_held_out(self.held_out)
        for target in texts.TARGETS:
            if not self.target(target).is_file():
                texts.write_target(target, self.target(target))
        if not self.tokenizer.is_file():
            run_tool(
                "train_tokenizer", input=self.text, vocab_size=_VOCABULARY, output=self.tokenizer
            )

    def directory(self, run: Run) -> Path:
        """Returns the directory of a run."""
        return self.folder / "runs" / run.name

    def data(self, run: Run) -> Data:
        """Returns what a run trains on; it may have to be made."""
        return Data(
            folder=self.folder / "data",
            text=self.text,
            tokenizer=self.tokenizer,
            target=self.target(run.target),
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
        read = [self.text, self.held_out]
        if run.method.reads_target:
            read.append(self.target(run.target))
        made_from = [*map(file_fingerprint, read), vocabulary_fingerprint(self.tokenizer), *needed]
        words = options_of(run, checkpoint=str, directory=str)
        return run_fingerprint(run, words, _CONFIG, made_from)

    def command(self, run: Run, data: Path) -> list[str]:
        """Returns the command that trains a run on `data`, or goes on with it."""
        runs = self.folder / "runs"
        words = options_of(
            run,
            checkpoint=lambda name: last_checkpoint(runs / name),
            directory=lambda name: runs / name,
        )
        reads = ["--validation.path", str(self.target(run.target))] if run.method.target else []
        return [
            *(sys.executable, "-m", "megatron_dwm.pretrain", str(_CONFIG), "--run.resume", "true"),
            *("--run.dir", str(self.directory(run)), "--run.seed", str(run.seed)),
            *("--data.train", str(data), "--data.tokenizer", str(self.tokenizer)),
            *("--evaluation.path", str(self.held_out)),
            *("--evaluation.interval_steps", str(max(run.steps // 10, 1))),
            *("--training.checkpoint_interval_steps", str(max(run.steps // 10, 1))),
            *reads,
            *words,
        ]

    def _stages(self, run: Run) -> Path | None:
        """Returns where the weighting models are by which a run's data are chosen."""
        if run.method.select != "rater":
            return None
        return self.folder / "runs" / run.beside(run.method.after[0]) / "weighting"


def last_checkpoint(directory: Path) -> Path | None:
    """Returns the last checkpoint of a run, if there is one."""
    return max((directory / "checkpoints").glob("step_*[0-9]"), default=None)
