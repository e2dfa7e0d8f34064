"""The folder of a study: its corpora, targets and runs, and the commands that make them.

    WORKDIR/text.jsonl, tokenizer.model, heldout.jsonl, target.NAME.jsonl
    WORKDIR/data/CORPUS.SEED/    corpus_text_document.*, and the halves that were selected
    WORKDIR/runs/NAME/           a run (spec.py), with NAME.log and NAME.settings beside it

What is finished is left as it is. Every file appears whole, so a study can be killed anywhere.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from examples.study import texts
from examples.study.commands import REPOSITORY, run_tool
from examples.study.corpora import PREFIX, write_corpus
from examples.study.settings import fingerprint
from examples.study.spec import PACKED, Run, Study
from megatron_dwm.files.atomic import new_folder, write_text

_CONFIG = REPOSITORY / "examples" / "tiny.yaml"
_VOCABULARY = 1024
_TOKEN_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """A folder, and the study that is made in it."""

    folder: Path
    study: Study

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of all runs."""
        return self.folder / "tokenizer.model"

    @property
    def held_out(self) -> Path:
        """The held-out text of all runs."""
        return self.folder / "heldout.jsonl"

    def directory(self, run: Run) -> Path:
        """Returns the directory of a run."""
        return self.folder / "runs" / run.name

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
        read = [self._target(run.target)] if run.method.reads_target else []
        read += [self.folder / "text.jsonl", self.held_out]
        return fingerprint(run, _CONFIG, read, self.tokenizer, needed)

    def prepare(self) -> None:
        """Write the text, the targets and the tokenizer."""
        (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        text = self.folder / "text.jsonl"
        if not text.is_file():
            texts.write_training_text(text)
        if not self.held_out.is_file():
            texts.write_held_out(self.held_out)
        for target in texts.TARGETS:
            if not self._target(target).is_file():
                texts.write_target(target, self._target(target))
        if not self.tokenizer.is_file():
            run_tool("train_tokenizer", input=text, vocab_size=_VOCABULARY, output=self.tokenizer)

    def prepare_data(self, run: Run) -> Path:
        """Make the data of a run, unless they are there; returns their prefix."""
        whole = self._make_corpus("junk" if run.start is not None else run.corpus, run.seed)
        if run.method.select is None:
            return whole
        return self._select(run, whole)

    def tokens(self, run: Run) -> int:
        """Returns the tokens of a run's data, which are made if they are missing."""
        return self.prepare_data(run).with_suffix(".bin").stat().st_size // _TOKEN_BYTES

    def command(self, run: Run, data: Path) -> list[str]:
        """Returns the command that trains a run on `data`, or goes on with it."""
        size, method = run.size, run.method
        reads = ["--validation.path", str(self._target(run.target))] if method.target else []
        if method.target and run.target == "last_word":
            reads += ["--validation.loss_on", "last_word"]
        return [
            *(sys.executable, "-m", "megatron_dwm.pretrain", str(_CONFIG), "--run.resume", "true"),
            *("--run.dir", str(self.directory(run)), "--run.seed", str(run.seed)),
            *("--data.train", str(data), "--data.tokenizer", str(self.tokenizer)),
            *("--evaluation.path", str(self.held_out), "--training.micro_batch_size", "32"),
            *("--evaluation.interval_steps", str(max(run.steps // 10, 1))),
            *("--training.checkpoint_interval_steps", str(max(run.steps // 10, 1))),
            *shlex.split(size.options),
            *self._corpus_options(run.corpus),
            *reads,
            *shlex.split(self._filled(run)),
            *("--training.steps", str(run.steps)),
            *("--training.learning_rate", str(run.learning_rate)),
        ]

    def _filled(self, run: Run) -> str:
        """Returns a method's options with the checkpoints that they name."""
        found = run.method.options
        if run.start is not None:
            start = _last_checkpoint(self.folder / "runs" / run.start)
            found = f"--model.init_from {start} --model.init_optimizer true {found}"
        for needed in run.method.after:
            directory = self.folder / "runs" / run.beside(needed)
            found = found.replace(f"{{{needed}.run}}", str(directory))
            if f"{{{needed}}}" in found:
                found = found.replace(f"{{{needed}}}", str(_last_checkpoint(directory)))
        return found

    def _corpus_options(self, corpus: str) -> list[str]:
        if corpus != PACKED:
            return []
        words = "--data.sequence_length 512 --data.mask_documents true"
        return [*words.split(), *"--training.global_batch_size 8".split()]

    def _target(self, name: str) -> Path:
        return self.folder / f"target.{name}.jsonl"

    def _make_corpus(self, corpus: str, seed: int) -> Path:
        folder = self.folder / "data" / f"{corpus}.{seed}"
        if not folder.is_dir():
            folder.parent.mkdir(exist_ok=True)
            with new_folder(folder) as partial:
                write_corpus(corpus, seed, self.folder / "text.jsonl", self.tokenizer, partial)
        return folder / PREFIX

    def _select(self, run: Run, whole: Path) -> Path:
        """Choose half the tokens of a run's corpus."""
        method = str(run.method.select)
        folder = whole.parent.with_name(f"{run.corpus}.{run.seed}.{run.target}.{method}")
        if not folder.is_dir():
            half = whole.with_suffix(".bin").stat().st_size // _TOKEN_BYTES // 2
            with new_folder(folder) as partial:
                run_tool(
                    "select_data",
                    *(method, *self._of_selection(run)),
                    input=whole,
                    output_prefix=partial / PREFIX,
                    tokens=half,
                )
        return folder / PREFIX

    def _of_selection(self, run: Run) -> list[str]:
        if run.method.select == "dsir":
            words = ["--target", str(self._target(run.target)), "--min-words", "10"]
            return [*words, "--tokenizer", str(self.tokenizer)]
        if run.method.select == "rater":
            rater = self.folder / "runs" / run.beside(run.method.after[0])
            return ["--rater", str(_last_stage(rater)), "--tokenizer", str(self.tokenizer)]
        return ["--seed", str(run.seed)]


def _last_checkpoint(directory: Path) -> Path:
    return sorted((directory / "checkpoints").glob("step_*[0-9]"))[-1]


def _last_stage(directory: Path) -> Path:
    stages = (directory / "weighting").glob("stage_*")
    return max(stages, key=lambda stage: int(stage.name.removeprefix("stage_")))
