"""Contrasts between runs: a sum and difference of what they reached, seed by seed.

A contrast is written as in `dwm_ahead - uniform`, `half - 0.5*dwm_ahead - 0.5*uniform`, or
`0.6M-junk-novels-dwm_ahead - 0.6M-junk-novels-uniform - dwm_ahead + uniform`: names of runs without
their seed; a method alone stands for its runs of the study's first part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from scipy.stats import spearmanr

from examples.study.outcome import Outcome
from examples.study.results import Results
from examples.study.spec import BASE, Part, Run, Study
from examples.study.statistics import Difference, at_equal_work, interval
from megatron_dwm.config import UserError

UNIFORMS = ("uniform", "uniform_1.05", "uniform_1.25", "uniform_2", "uniform_2.5")
"""runs of different lengths, by which uniform's loss is known at other amounts of work"""

_FEWEST_TO_RANK = 3

Cell = tuple[str, str, str]
BySeed = Mapping[int, Outcome]
Measure = Callable[[Outcome], float]


def runs_before(study: Study, run: Run) -> dict[str, Run]:
    """Returns the runs that a run needs by name, each once."""
    return {needed.name: needed for needed in study.needed(run)}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The outcomes of a study, by size, corpus, target, method and seed."""

    study: Study
    results: Results

    @property
    def first_cell(self) -> Cell:
        """Size, corpus and target of the first table."""
        part = next(iter(self.study.parts.values()))
        return part.sizes[0], part.corpora[0], part.targets[0]

    def has_domains(self, names: Iterable[str]) -> bool:
        """Returns whether the held-out text of the first table has all of these domains."""
        outcomes = list(self.by_seed(self.first_cell, BASE).values())
        return bool(outcomes) and set(outcomes[0].losses.by_domain).issuperset(names)

    def by_seed(self, cell: Cell, method: str) -> BySeed:
        """Returns the known outcomes of a method's runs; none if the study has no such runs."""
        if method not in self.study.methods or cell[0] not in self.study.sizes:
            return {}
        runs = {seed: self.study.run(*cell, method, seed) for seed in self.study.seeds}
        found = {seed: self.results.of(run) for seed, run in runs.items()}
        return {seed: outcome for seed, outcome in found.items() if outcome is not None}

    def pairs(self, cell: Cell, method: str) -> list[tuple[Outcome, Outcome]]:
        """Returns a method's outcomes, each with uniform's of the same seed."""
        ours, theirs = self.by_seed(cell, method), self.by_seed(cell, BASE)
        return [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]

    def change(self, cell: Cell, method: str, domains: Sequence[str]) -> Difference | None:
        """Returns a method's change of the mean loss of some domains against uniform."""
        read = loss_of(domains)
        found = [read(ours) - read(theirs) for ours, theirs in self.pairs(cell, method)]
        return interval(found) if found else None

    def change_at_equal_work(
        self, cell: Cell, method: str, domains: Sequence[str]
    ) -> Difference | None:
        """Returns the change against uniform with as many FLOPs; None outside its runs' range.

        The runs that a method needs before its own count as its work.
        """
        read, found = loss_of(domains), []
        longer = {name: self.by_seed(cell, name) for name in UNIFORMS if name in self.study.methods}
        work = self.work(cell, method)
        for seed, ours in self.by_seed(cell, method).items():
            runs = [runs[seed] for runs in longer.values() if seed in runs]
            if seed in work:
                theirs = at_equal_work(work[seed], [(run.flops, read(run)) for run in runs])
                found += [read(ours) - theirs] if theirs is not None else []
        return interval(found) if found else None

    def work(self, cell: Cell, method: str) -> dict[int, float]:
        """Returns by seed the FLOPs of a method's runs with those of the runs that they need.

        Without the runs that uniform needs, too, and without seeds of which not all are known.
        """
        found: dict[int, float] = {}
        for seed, ours in self.by_seed(cell, method).items():
            shared = runs_before(self.study, self.study.run(*cell, BASE, seed))
            runs = runs_before(self.study, self.study.run(*cell, method, seed))
            needed = [self.results.of(run) for name, run in runs.items() if name not in shared]
            known = [outcome.flops for outcome in needed if outcome is not None]
            if len(known) == len(needed):
                found[seed] = ours.flops + sum(known)
        return found

    def contrast(self, words: str, measure: Measure) -> Difference | None:
        """Returns a contrast; None if no seed has all of its runs.

        Raises UserError for a run that the study does not have.
        """
        terms = [(factor, self.by_seed(*self.named(name))) for factor, name in _terms(words)]
        seeds = sorted(set.intersection(*(set(runs) for _, runs in terms)))
        values = [sum(factor * measure(runs[seed]) for factor, runs in terms) for seed in seeds]
        return interval(values) if values else None

    def named(self, name: str) -> tuple[Cell, str]:
        """Returns the cell and the method of a name in a contrast."""
        parts = name.split("-")
        if len(parts) not in (1, 4) or parts[-1] not in self.study.methods:
            raise UserError(f"{name}: no run of this study; expected METHOD or its folder's name")
        cell = (parts[0], parts[1], parts[2]) if len(parts) == 4 else self.first_cell
        return cell, parts[-1]


def loss_of(domains: Sequence[str], at: float = 1.0) -> Measure:
    """Returns what reads the mean held-out loss of some domains after a part of the steps."""

    def read(outcome: Outcome) -> float:
        steps = outcome.losses.step
        nearest = min(range(len(steps)), key=lambda i: abs(steps[i] - at * steps[-1]))
        values = [outcome.losses.by_domain[name][nearest] for name in domains]
        assert all(value is not None for value in values)
        return mean(value or 0.0 for value in values)

    return read


def loss_since(domains: Sequence[str], since: float, at: float) -> Measure:
    """Returns what reads the change of the mean loss of some domains between two parts of a run."""
    before, after = loss_of(domains, since), loss_of(domains, at)
    return lambda outcome: after(outcome) - before(outcome)


def weight_moved(domains: Sequence[str], since: float) -> Measure:
    """Returns what reads how the mean weight of some domains changed since a part of the run.

    A part of a run without samples of a domain has no weight of it, and is passed over.
    """

    def read(outcome: Outcome) -> float:
        first = int(since * len(outcome.weights.step))
        moves = []
        for name in domains:
            known = [w for w in outcome.weights.by_domain[name][first:] if w is not None]
            if not known:
                raise KeyError(name)
            moves.append(known[-1] - known[0])
        return mean(moves)

    return read


def order_kept(since: float) -> Measure:
    """Returns what reads the rank correlation (Spearman) of the domains' mean weights.

    It is that of the last part of the run with the part that begins at `since`. A run that knows
    the weights of fewer than three domains in both raises KeyError.
    """

    def read(outcome: Outcome) -> float:
        first = int(since * len(outcome.weights.step))
        pairs = [(ws[first], ws[-1]) for ws in outcome.weights.by_domain.values()]
        known = [pair for pair in pairs if None not in pair]
        if len(known) < _FEWEST_TO_RANK:
            raise KeyError("weights")
        return float(spearmanr([a for a, _ in known], [b for _, b in known]).statistic)

    return read


def cells_of(part: Part) -> list[Cell]:
    """Returns the (size, corpus, target) of a part, each of which has a table."""
    return [
        (size, corpus, target)
        for size in part.sizes
        for corpus in part.corpora
        for target in part.targets
    ]


def _terms(words: str) -> list[tuple[float, str]]:
    """Returns the names in a contrast with their factors."""
    signs, found, sign = {"+": 1.0, "-": -1.0}, [], 1.0
    for word in words.split():
        if word in signs:
            sign = signs[word]
        else:
            factor, _, name = word.rpartition("*")
            found.append((sign * float(factor or 1), name))
    return found
