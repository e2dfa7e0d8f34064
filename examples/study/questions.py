"""The questions of questions.yaml, and what the known outcomes answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from examples.study.contrasts import Comparison, Measure, loss_of, weight_moved
from examples.study.statistics import Difference
from examples.study.tables import NONE, shown, table

_FILE = Path(__file__).parent / "questions.yaml"
_LOSS, _AT_EQUAL_WORK, _WEIGHT_MOVED = "loss", "loss at equal work", "weight moved"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison, and what is expected of it; questions.yaml explains the fields."""

    contrast: str
    domains: str | Sequence[str] = "novels"
    between: Sequence[float | None] | None = None
    zero: bool = False
    measure: str = _LOSS
    at: float = 1.0

    def as_expected(self, found: Difference) -> bool | None:
        """Returns whether the mean (with `zero`, the interval) is; None if nothing was expected."""
        if self.zero:
            return found.low <= 0 <= found.high
        if self.between is None:
            return None
        low, high = self.between
        return (low is None or low <= found.mean) and (high is None or found.mean <= high)

    def certain(self, found: Difference) -> bool:
        """Returns whether the whole interval lies on the same side of what is expected."""
        ends = (
            Difference(mean=end, half_width=0.0, pairs=found.pairs)
            for end in (found.low, found.high)
        )
        return found.pairs > 1 and len({self.as_expected(end) for end in ends}) == 1


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prediction, a claim or a decision. about: a method, a paper or a key."""

    about: str
    text: str
    why: str = ""
    untestable: str = ""
    checks: Sequence[Check] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Questions:
    """All questions, and the groups of domains that they name."""

    groups: Mapping[str, Sequence[str]]
    predictions: Sequence[Question]
    claims: Sequence[Question]
    decisions: Sequence[Question]

    def groups_of(self, names: Mapping[str, str]) -> dict[str, Sequence[str]]:
        """Returns groups of domains by the words that a table has for them."""
        return {words: self.groups[name] for words, name in names.items()}

    def answer(self, check: Check, found: Comparison) -> Difference | None:
        """Returns what a check compares; None without its runs, or its domains."""
        domains = self.groups[check.domains] if isinstance(check.domains, str) else check.domains
        try:
            if check.measure == _AT_EQUAL_WORK:
                return found.change_at_equal_work(found.first_cell, check.contrast, domains)
            return found.contrast(check.contrast, _measure(check, domains))
        except KeyError:  # another corpus has other domains
            return None


def read_questions() -> Questions:
    """Returns the questions."""
    found = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    kinds = ("predictions", "claims", "decisions")
    return Questions(
        groups=found["groups"], **{kind: [_question(q) for q in found[kind]] for kind in kinds}
    )


def predictions_table(questions: Questions, found: Comparison) -> str:
    """Returns the predictions beside what came of them."""
    rows = []
    for asked in questions.predictions:
        answers = [(check, questions.answer(check, found)) for check in asked.checks]
        verdicts = "<br>".join(_came_true(check, answer) for check, answer in answers)
        rows.append([asked.about, asked.text, asked.why, _numbers(answers), verdicts])
    return table(["row", "prediction", "why", "result", "right?"], rows)


def claims_table(questions: Questions, found: Comparison) -> str:
    """Returns the papers' claims with their verdicts."""
    rows = []
    for asked in questions.claims:
        answers = [(check, questions.answer(check, found)) for check in asked.checks]
        verdicts = "<br>".join(_verdict(check, answer) for check, answer in answers)
        if asked.untestable:
            verdicts = f"not testable here: {asked.untestable}"
        rows.append([asked.about, asked.text, verdicts, _numbers(answers) or NONE])
    return table(["paper", "claim", "verdict", "number"], rows)


def decisions_table(questions: Questions, found: Comparison) -> str:
    """Returns what a change of each default would change."""
    rows = []
    for asked in questions.decisions:
        answers = [questions.answer(check, found) for check in asked.checks]
        seeds = str(max((answer.pairs for answer in answers if answer is not None), default=0))
        rows.append([asked.about, asked.text, seeds, *map(shown, answers)])
    return table(["default", "instead", "seeds", "the novels", "the other domains"], rows)


def _question(fields: Mapping[str, Any]) -> Question:
    checks = [Check(**check) for check in fields.get("checks", [])]
    return Question(**{**fields, "checks": checks})


def _measure(check: Check, domains: Sequence[str]) -> Measure:
    if check.measure == _WEIGHT_MOVED:
        return weight_moved(domains)
    return loss_of(domains, check.at)


def _numbers(answers: Sequence[tuple[Check, Difference | None]]) -> str:
    return "<br>".join(
        f"{_what(check)}: {shown(answer)}{_seeds(answer)}" for check, answer in answers
    )


def _what(check: Check) -> str:
    domains = check.domains if isinstance(check.domains, str) else ", ".join(check.domains)
    measure = "" if check.measure == _LOSS else f", {check.measure}"
    return f"`{check.contrast.strip()}`, {domains}{measure}"


def _seeds(answer: Difference | None) -> str:
    if answer is None:
        return ""
    return f" ({answer.pairs} seeds)" if answer.pairs > 1 else " (one seed)"


def _came_true(check: Check, answer: Difference | None) -> str:
    if answer is None:
        return "not run"
    found = check.as_expected(answer)
    return NONE if found is None else "yes" if found else "**no**"


def _verdict(check: Check, answer: Difference | None) -> str:
    if answer is None:
        return "not run"
    found = check.as_expected(answer)
    if found is None:
        return NONE
    if not check.zero and not check.certain(answer):
        return "not decided"
    return "holds" if found else "**does not hold**"
