"""The runs of a study (study_file.py reads them)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

from megatron_dwm.config import UserError

BASE = "uniform"
"""the method that all others are compared with"""
JUNK = ("shuffled_words", "random_words", "random_characters")
"""domains that tools/add_junk.py adds"""
NO_TARGET = "novels"
"""in the name of a run that reads no target"""
NATURAL, CONTINUED, PACKED = "natural", "continued", "packed"
"""corpora: without junk; with junk, read by a model that was trained without; short documents"""
CORPORA = (NATURAL, "junk", PACKED, CONTINUED)
SELECTIONS = ("random", "dsir", "rater")


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model, and its training. options: of megatron_dwm.pretrain."""

    name: str
    steps: int
    learning_rate: float
    options: str = ""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to weigh, or to choose beforehand.

    about: what the document says of it. target: it reads the target. domains: of the training text
    that it names. after: methods whose run has to be finished before, of the same size or as
    SIZE/METHOD. steps, rate: factors of the size's steps and learning rate. select: the method of
    tools/select_data.py that keeps half of the corpus; None reads all of it.
    """

    name: str
    options: str
    about: str = ""
    target: bool = False
    domains: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    steps: float = 1.0
    rate: float = 1.0
    select: str | None = None

    @property
    def reads_target(self) -> bool:
        """True if its own run, or its selection, reads the target."""
        return self.target or self.select == "dsir"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run."""

    size: Size
    corpus: str
    target: str
    method: Method
    seed: int

    @property
    def name(self) -> str:
        """The run's folder."""
        return self.beside(self.method.name)

    @property
    def needs(self) -> list[str]:
        """The names of the runs that have to be finished before."""
        start = [self.start] if self.start is not None else []
        return [*start, *map(self.beside, self.method.after)]

    @property
    def start(self) -> str | None:
        """The name of the run whose model this one goes on training; None for a new model."""
        if self.corpus != CONTINUED:
            return None
        return replace(self, corpus=NATURAL, target=NO_TARGET).beside(BASE)

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return round(self.size.steps * self.method.steps)

    @property
    def learning_rate(self) -> float:
        """Peak learning rate of the LLM."""
        return self.size.learning_rate * self.method.rate

    def beside(self, method: str) -> str:
        """Returns the name of the run that differs in its method: METHOD, or SIZE/METHOD."""
        size, _, name = method.rpartition("/")
        parts = (size or self.size.name, self.corpus, self.target, name, self.seed)
        return "-".join(map(str, parts))


@dataclass(frozen=True, kw_only=True)
class Part:
    """Runs that belong to one table. seeds: of every method in it."""

    name: str
    about: str
    sizes: tuple[str, ...]
    corpora: tuple[str, ...]
    targets: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    default: bool = False


@dataclass(frozen=True, kw_only=True)
class Study:
    """Everything in study.yaml."""

    sizes: Mapping[str, Size]
    methods: Mapping[str, Method]
    parts: Mapping[str, Part]

    def for_domains(self, domains: Iterable[str]) -> Study:
        """Returns the study without the methods that name other domains of the training text."""
        there = {*domains, *JUNK}
        methods = {n: m for n, m in self.methods.items() if there.issuperset(m.domains)}
        parts = {
            name: replace(part, methods=tuple(m for m in part.methods if m in methods))
            for name, part in self.parts.items()
        }
        return replace(self, methods=methods, parts=parts)

    def chosen(self, names: Iterable[str]) -> list[Part]:
        """Returns parts by name, or those of the default.

        Raises UserError for an unknown one, and if there is no default.
        """
        names = list(names)
        if not names:
            names = [part.name for part in self.parts.values() if part.default]
        if not names:
            raise UserError("no part of this study has default: true; name one with --part")
        for name in names:
            if name not in self.parts:
                known = ", ".join(self.parts)
                raise UserError(f"--part {name}: no such part; expected one of {known}")
        return [self.parts[name] for name in names]

    @property
    def seeds(self) -> list[int]:
        """The seeds of all parts."""
        return sorted({seed for part in self.parts.values() for seed in part.seeds})

    def runs(self, part: Part) -> Iterator[Run]:
        """Yields a part's runs, seed by seed."""
        cells = product(part.seeds, part.sizes, part.corpora, part.targets, part.methods)
        for seed, size, corpus, target, method in cells:
            yield self.run(size, corpus, target, method, seed)

    def run(self, size: str, corpus: str, target: str, method: str, seed: int) -> Run:
        """Returns one run. One that reads no target is the same for all of them."""
        return Run(
            size=self.sizes[size],
            corpus=corpus,
            target=target if self.reads_target(self.methods[method]) else NO_TARGET,
            method=self.methods[method],
            seed=seed,
        )

    def reads_target(self, method: Method) -> bool:
        """Returns whether a method reads the target, itself or by a run before it."""
        before = [self.methods[name.rpartition("/")[2]] for name in method.after]
        return method.reads_target or any(map(self.reads_target, before))

    def needed(self, run: Run) -> Iterator[Run]:
        """Yields the runs that a run needs, each after those that it needs itself.

        A run that two of them need comes twice; fingerprints of recorded runs have it so.
        """
        cell = (run.corpus, run.target)
        first = [(run.size.name, NATURAL, run.target, BASE)] if run.start is not None else []
        for each in run.method.after:
            size, _, name = each.rpartition("/")
            first.append((size or run.size.name, *cell, name))
        for parts in first:
            needed = self.run(*parts, run.seed)
            yield from self.needed(needed)
            yield needed
