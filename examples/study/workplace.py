"""The folder of a study: its corpora, targets and runs, and the commands that make them.

    WORKDIR/text.jsonl, tokenizer.model, heldout.jsonl, target.NAME.jsonl
    WORKDIR/data/CORPUS.SEED/    corpus_text_document.*, and the halves that were selected
    WORKDIR/runs/NAME/           a run (spec.py), with NAME.log beside it

What is finished is left as it is. Every file appears whole, so a study can be killed anywhere.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from examples.study import texts
from examples.study.spec import NATURAL, PACKED, Run, Study
from megatron_dwm.config import UserError
from megatron_dwm.files.atomic import new_folder

REPOSITORY = Path(__file__).parent.parent.parent
_TOOLS = REPOSITORY / "tools"
_CONFIG = REPOSITORY / "examples" / "tiny.yaml"
_VOCABULARY = 1024
_PREFIX = "corpus_text_document"
# Otherwise glibc returns every large tensor's memory to the system and requests it again.
_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
    "MALLOC_TOP_PAD_": "200000000",
}


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
            self._tool("train_tokenizer", input=text, vocab_size=_VOCABULARY, output=self.tokenizer)

    def prepare_data(self, run: Run) -> Path:
        """Make the data of a run, unless they are there; returns their prefix."""
        whole = self._make_corpus("junk" if run.start is not None else run.corpus, run.seed)
        if run.method.select is None:
            return whole
        return self._select(run, whole)

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
            *("--evaluation.interval_steps", str(max(run.steps // 20, 1))),
            *("--training.checkpoint_interval_steps", str(max(run.steps // 10, 1))),
            *shlex.split(size.options),
            *self._corpus_options(run.corpus),
            *reads,
            *shlex.split(self._filled(run)),
            *("--training.steps", str(run.steps)),
        ]

    def environment(self) -> dict[str, str]:
        """Returns the environment of a run, which has one thread."""
        return {**os.environ, **_MEMORY, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}

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
                self._write_corpus(corpus, seed, partial)
        return folder / _PREFIX

    def _write_corpus(self, corpus: str, seed: int, folder: Path) -> None:
        text = self.folder / "text.jsonl"
        if corpus != NATURAL:
            mixed = folder / "mixed.jsonl"
            self._tool("add_junk", input=text, output=mixed, fraction=0.5, seed=seed)
            text = mixed
        if corpus == PACKED:
            short = folder / "short.jsonl"
            self._tool(
                *("../examples/cut_documents",),
                input=text,
                output=short,
                tokenizer=self.tokenizer,
                seed=seed,
            )
            text = short
        self._tool(
            "preprocess_data",
            *("--append-eod", "--metadata-keys", "domain"),
            input=text,
            output_prefix=folder / "corpus",
            tokenizer_type="SentencePieceTokenizer",
            tokenizer_model=self.tokenizer,
        )
        for left in folder.glob("*.jsonl"):
            left.unlink()

    def _select(self, run: Run, whole: Path) -> Path:
        """Choose half the tokens of a run's corpus."""
        method = str(run.method.select)
        folder = whole.parent.with_name(f"{run.corpus}.{run.seed}.{run.target}.{method}")
        if not folder.is_dir():
            half = whole.with_suffix(".bin").stat().st_size // 4  # a token has two bytes
            with new_folder(folder) as partial:
                self._tool(
                    "select_data",
                    *(method, *self._of_selection(run)),
                    input=whole,
                    output_prefix=partial / _PREFIX,
                    tokens=half,
                )
        return folder / _PREFIX

    def _of_selection(self, run: Run) -> list[str]:
        if run.method.select == "dsir":
            words = ["--target", str(self._target(run.target)), "--min-words", "10"]
            return [*words, "--tokenizer", str(self.tokenizer)]
        if run.method.select == "rater":
            rater = self.folder / "runs" / run.beside(run.method.after[0])
            return ["--rater", str(_last_stage(rater)), "--tokenizer", str(self.tokenizer)]
        return ["--seed", str(run.seed)]

    def _tool(self, name: str, *words: str, **options: object) -> None:
        """Run a tool of the repository. Raises UserError with its last line if it fails."""
        given = [f for key, v in options.items() for f in (f"--{key.replace('_', '-')}", str(v))]
        command = [sys.executable, str(_TOOLS / f"{name}.py"), *words, *given]
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment())
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{shlex.join(command)}: {last}")


def _last_checkpoint(directory: Path) -> Path:
    return sorted((directory / "checkpoints").glob("step_*[0-9]"))[-1]


def _last_stage(directory: Path) -> Path:
    stages = (directory / "weighting").glob("stage_*")
    return max(stages, key=lambda stage: int(stage.name.removeprefix("stage_")))
