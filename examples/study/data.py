"""The data of a run: a corpus, or the half of it that was selected.

    WORKDIR/data/CORPUS.SEED.FINGERPRINT/            corpus_text_document.*
    WORKDIR/data/CORPUS.SEED.METHOD.FINGERPRINT/     what METHOD selected of it

The fingerprint is of all that the files are made from, so files of another text are not taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.study.commands import run_tool
from examples.study.corpora import JUNK_FRACTION, PREFIX, write_corpus
from examples.study.settings import data_fingerprint, file_fingerprint, vocabulary_fingerprint
from examples.study.spec import CONTINUED, Run
from megatron_dwm.files.atomic import new_folder
from megatron_dwm.files.index_format import read_header


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run trains on.

    folder: where data are kept. rater: folder of the weighting models that a selection is made by;
    rated_by: fingerprints of the runs that learned them.
    """

    folder: Path
    text: Path
    tokenizer: Path
    target: Path
    rater: Path | None
    rated_by: Sequence[str]
    run: Run

    def prepare(self) -> Path:
        """Make the files unless they are there; returns their prefix."""
        whole = self._corpus()
        return whole if self.run.method.select is None else self._selected(whole)

    def tokens(self) -> int:
        """Returns the number of tokens; makes the files unless they are there."""
        return _tokens(self.prepare())

    @property
    def _name(self) -> str:
        return "junk" if self.run.corpus == CONTINUED else self.run.corpus

    @property
    def _fingerprint(self) -> str:
        return data_fingerprint(
            file_fingerprint(self.text), vocabulary_fingerprint(self.tokenizer), JUNK_FRACTION
        )

    def _corpus(self) -> Path:
        name, seed = self._name, self.run.seed
        folder = self.folder / f"{name}.{seed}.{self._fingerprint}"
        if not folder.is_dir():
            self.folder.mkdir(exist_ok=True)
            with new_folder(folder) as partial:
                write_corpus(name, seed, self.text, self.tokenizer, partial)
        return folder / PREFIX

    def _selected(self, whole: Path) -> Path:
        """Choose half the tokens of the corpus."""
        method = str(self.run.method.select)
        target = file_fingerprint(self.target) if method == "dsir" else ""
        made_from = data_fingerprint(self._fingerprint, target, *self.rated_by)
        folder = self.folder / f"{self._name}.{self.run.seed}.{method}.{made_from}"
        if not folder.is_dir():
            with new_folder(folder) as partial:
                run_tool(
                    "select_data",
                    *(method, *self._options(method)),
                    input=whole,
                    output_prefix=partial / PREFIX,
                    tokens=_tokens(whole) // 2,
                )
        return folder / PREFIX

    def _options(self, method: str) -> list[str]:
        if method == "dsir":
            words = ["--target", str(self.target), "--min-words", "10"]
            return [*words, "--tokenizer", str(self.tokenizer)]
        if self.rater is not None:
            return ["--rater", str(_last_stage(self.rater))]
        return ["--seed", str(self.run.seed)]


def _tokens(prefix: Path) -> int:
    header = read_header(prefix.with_suffix(".idx"))
    return prefix.with_suffix(".bin").stat().st_size // header.itemsize


def _last_stage(folder: Path) -> Path:
    return max(folder.glob("stage_*"), key=lambda stage: int(stage.name.removeprefix("stage_")))
