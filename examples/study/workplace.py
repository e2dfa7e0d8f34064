"""The folder of a study: its text, its runs, and the commands that make them.

    WORKDIR/text.jsonl, tokenizer.model, heldout.jsonl, target.NAME.jsonl
    WORKDIR/data/                the corpora (data.py)
    WORKDIR/sample.json          fingerprints of those of these files that were written here
    WORKDIR/runs/NAME/           a run (spec.py), with NAME.log and NAME.settings beside it

Files that are there are left as they are; they may be the user's. Every file appears whole, so a
study can be killed anywhere.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from examples.study import texts
from examples.study.commands import REPOSITORY, run_tool
from examples.study.data import Data
from examples.study.options import options_of
from examples.study.own_text import check_records, check_tokenizer
from examples.study.settings import file_fingerprint, run_fingerprint, vocabulary_fingerprint
from examples.study.spec import Run, Study
from megatron_dwm.config import UserError
from megatron_dwm.files.atomic import write_json, write_text

_CONFIG = REPOSITORY / "examples" / "tiny.yaml"
_VOCABULARY = 1024
_TOKENIZER_OF = "tokenizer.model is of text.jsonl"


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """A folder, and the study that is made in it.

    scale: factor of the steps of all runs; runs of another scale than 1 are kept apart.
    """

    folder: Path
    study: Study
    scale: float = 1.0

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
        return check_records(self.text, domain=True)

    @property
    def on_sample(self) -> bool:
        """True if all text is the sample corpus', and no run was shortened."""
        written = self._written()
        ours = all(written.get(file.name) == file_fingerprint(file) for file in self._texts)
        return ours and self.scale == 1.0

    def prepare(self) -> list[str]:
        """Write the text, the targets and the tokenizer, unless they are there.

        Returns the names of the files that are the user's own. Raises UserError for one of them
        with a mistake in it.
        """
        self._runs.mkdir(parents=True, exist_ok=True)
        written = self._written()
        writers: dict[Path, Callable[[Path], None]] = {
            self.text: texts.write_training_text,
            self.held_out: texts.write_held_out,
            **{self.target(name): partial(texts.write_target, name) for name in texts.TARGETS},
        }
        for file, write in writers.items():
            if not file.is_file():
                write(file)
                written[file.name] = file_fingerprint(file)
        write_json(self._sample, written)
        own = [file.name for file in writers if written.get(file.name) != file_fingerprint(file)]
        for file in writers:
            check_records(file, domain=file in (self.text, self.held_out))
        self._prepare_tokenizer(written)
        return own

    def _prepare_tokenizer(self, written: dict[str, str]) -> None:
        """Train the tokenizer, unless it is the user's, or that of this text."""
        trained_on = file_fingerprint(self.text)
        ours = written.get(_TOKENIZER_OF) not in (None, trained_on)
        if self.tokenizer.is_file() and not ours:
            check_tokenizer(self.tokenizer)
            return
        self.tokenizer.unlink(missing_ok=True)
        run_tool("train_tokenizer", input=self.text, vocab_size=_VOCABULARY, output=self.tokenizer)
        write_json(self._sample, {**written, _TOKENIZER_OF: trained_on})

    @property
    def _texts(self) -> list[Path]:
        return [self.text, self.held_out, *map(self.target, texts.TARGETS)]

    @property
    def _sample(self) -> Path:
        return self.folder / "sample.json"

    def _written(self) -> dict[str, str]:
        if not self._sample.is_file():
            return {}
        return json.loads(self._sample.read_text(encoding="utf-8"))

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
        for file in read:
            if not file.is_file():
                raise UserError(f"{file}: no such file; a part of the study reads it")
        made_from = [*map(file_fingerprint, read), vocabulary_fingerprint(self.tokenizer), *needed]
        words = options_of(run, checkpoint=str, directory=str)
        return run_fingerprint(run, words, _CONFIG, made_from)

    def command(self, run: Run, data: Path) -> list[str]:
        """Returns the command that trains a run on `data`, or goes on with it."""
        words = options_of(
            run,
            checkpoint=lambda name: last_checkpoint(self._runs / name),
            directory=lambda name: self._runs / name,
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
        return self._runs / run.beside(run.method.after[0]) / "weighting"


def last_checkpoint(directory: Path) -> Path | None:
    """Returns the last checkpoint of a run, if there is one."""
    return max((directory / "checkpoints").glob("step_*[0-9]"), default=None)
