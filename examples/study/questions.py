"""The questions of questions.yaml, and what the known outcomes answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from examples.study.contrasts import (
    Comparison,
    Measure,
    loss_of,
    loss_since,
    order_kept,
    weight_moved,
)
from examples.study.statistics import Difference, holm, p_value
from examples.study.tables import FEWEST, NONE, shown, table
from megatron_dwm.config import UserError

_FILE = Path(__file__).parent / "questions.yaml"
_LOSS, _AT_EQUAL_WORK = "loss", "loss at equal work"
_WEIGHT_MOVED, _ORDER = "weight moved", "order of the weights"
_ALIKE = 0.03
"""nats per token: about the spread of a method over the seeds"""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison, and what is expected of it; questions.yaml explains the fields."""

    contrast: str
    domains: str | Sequence[str] = "novels"
    between: Sequence[float | None] | None = None
    alike: bool = False
    measure: str = _LOSS
    at: float = 1.0
    since: float | None = None

    def verdict(self, found: Difference) -> bool | None:
        """Returns whether the answer is as expected.

        True if its whole interval is, False if no part of it is; None between, for few pairs,
        and if nothing is expected.
        """
        if not self.is_judged(found):
            return None
        low, high = self._bounds
        if low <= found.low and found.high <= high:
            return True
        return False if found.high < low or high < found.low else None

    def is_judged(self, found: Difference) -> bool:
        """True if something is expected, and the seeds are enough to decide."""
        return self.expects and found.pairs >= FEWEST

    def p_value(self, found: Difference) -> float:
        """Returns the p of the verdict: of the bound that was the hardest to pass.

        1 where nothing is decided.
        """
        verdict = self.verdict(found)
        if verdict is None:
            return 1.0
        passed = [p_value(found, bound) for bound in self._bounds if math.isfinite(bound)]
        if verdict:
            return max(passed)
        low, high = self._bounds
        return p_value(found, low if found.high < low else high)

    @property
    def expects(self) -> bool:
        """True if there is a verdict to give."""
        return self.alike or self.between is not None

    @property
    def expected(self) -> str:
        """Returns what decides, in words; empty if nothing does."""
        if not self.expects:
            return ""
        if self.alike:
            return f"within {_ALIKE:g} of 0"
        low, high = self._bounds
        if math.isinf(low):
            return f"below {high:g}"
        return f"above {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"

    @property
    def _bounds(self) -> tuple[float, float]:
        low, high = (-_ALIKE, _ALIKE) if self.between is None else self.between
        return -math.inf if low is None else low, math.inf if high is None else high


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prediction, a claim or a decision. about: a method, a paper or a key.

    keys: of a decision, those in which the runs of its contrasts differ.
    """

    about: str
    text: str
    why: str = ""
    untestable: str = ""
    keys: Sequence[str] = ()
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
        except (KeyError, UserError):  # another text has other domains, another study other methods
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
        verdicts = "<br>".join(
            _verdict(check, answer, "right", "**wrong**") for check, answer in answers
        )
        rows.append([asked.about, asked.text, asked.why, _numbers(answers), verdicts])
    return table(["row", "prediction", "why", "result", "verdict"], rows)


def claims_table(questions: Questions, found: Comparison) -> str:
    """Returns the papers' claims with their verdicts."""
    rows = []
    for asked in questions.claims:
        answers = [(check, questions.answer(check, found)) for check in asked.checks]
        verdicts = "<br>".join(
            _verdict(check, answer, "holds", "**does not hold**") for check, answer in answers
        )
        if asked.untestable:
            verdicts = f"not testable here: {asked.untestable}"
        rows.append([asked.about, asked.text, verdicts, _numbers(answers) or NONE])
    return table(["paper", "claim", "verdict", "number"], rows)


def multiple_tests(asked: Sequence[Question], questions: Questions, found: Comparison) -> str:
    """Returns which verdicts of a table stand if all of its tests count (Holm 1979)."""
    checks = [check for question in asked for check in question.checks]
    answers = [(check, questions.answer(check, found)) for check in checks]
    judged = [(c, a) for c, a in answers if a is not None and c.is_judged(a)]
    stands = holm([check.p_value(answer) for check, answer in judged])
    decided = [check.verdict(answer) is not None for check, answer in judged]
    names = [_what(check) for (check, _), stand in zip(judged, stands, strict=True) if stand]
    text = (
        f"{len(judged)} numbers of the table were judged, one by one at 5 %, and {sum(decided)} of "
        f"the verdicts are decided. If all tests count (Holm's method), {len(names)} stand"
    )
    return f"{text}:\n{'; '.join(names)}." if names else f"{text}."


def decisions_table(questions: Questions, found: Comparison) -> str:
    """Returns what a change of each default changes: the target's kind first, then the rest."""
    rows = []
    for asked in questions.decisions:
        ours, theirs = (questions.answer(check, found) for check in asked.checks)
        seeds = str(ours.pairs if ours is not None else 0)
        change = [shown(ours), shown(theirs), finding(ours, theirs)]
        rows.append([asked.about, asked.text, seeds, *change])
    heads = ["default", "instead", "seeds", "the novels", "the other domains", "so the change"]
    return table(heads, rows)


def finding(ours: Difference | None, theirs: Difference | None) -> str:
    """Returns what a change does, from its two changes of the loss: of the target's kind, and else.

    As in bold numbers, an interval of fewer than three seeds shows nothing.
    """
    if ours is None or theirs is None:
        return "no number"
    signs = {_sign(ours), _sign(theirs)}
    if signs == {-1, 1}:
        return "trades"
    if signs != {0}:
        return "gains" if -1 in signs else "**loses**"
    both = (ours, theirs)
    alike = all(c.pairs >= FEWEST and c.low >= -_ALIKE and c.high <= _ALIKE for c in both)
    return "changes nothing" if alike else "not decided"


def _sign(change: Difference) -> int:
    """Returns the sign of a change whose whole interval has it, or 0."""
    if change.pairs < FEWEST or change.low <= 0 <= change.high:
        return 0
    return 1 if change.low > 0 else -1


def _question(fields: Mapping[str, Any]) -> Question:
    checks = [Check(**check) for check in fields.get("checks", [])]
    return Question(**{**fields, "checks": checks})


def _measure(check: Check, domains: Sequence[str]) -> Measure:
    since = 0.0 if check.since is None else check.since
    if check.measure == _WEIGHT_MOVED:
        return weight_moved(domains, since)
    if check.measure == _ORDER:
        return order_kept(since)
    if check.since is not None:
        return loss_since(domains, check.since, check.at)
    return loss_of(domains, check.at)


def _numbers(answers: Sequence[tuple[Check, Difference | None]]) -> str:
    return "<br>".join(
        f"{_what(check)}: {shown(answer)}{_seeds(answer)}{_expected(check)}"
        for check, answer in answers
    )


def _what(check: Check) -> str:
    domains = check.domains if isinstance(check.domains, str) else ", ".join(check.domains)
    measure = "" if check.measure == _LOSS else f", {check.measure}"
    return f"`{check.contrast.strip()}`, {domains}{measure}"


def _expected(check: Check) -> str:
    return f"; asked: {check.expected}" if check.expects else ""


def _seeds(answer: Difference | None) -> str:
    if answer is None:
        return ""
    return f" ({answer.pairs} seeds)" if answer.pairs > 1 else " (one seed)"


def _verdict(check: Check, answer: Difference | None, true: str, false: str) -> str:
    if answer is None:
        return "no number"
    if not check.expects:
        return NONE
    return {True: true, False: false, None: "not decided"}[check.verdict(answer)]
