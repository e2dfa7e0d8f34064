"""The numbers that README.md gives of the study are those of the recorded outcomes."""

from __future__ import annotations

import json
import re

import pytest

from examples.study.contrasts import Comparison, loss_of
from examples.study.questions import read_questions
from examples.study.results import Results
from examples.study.statistics import Difference
from examples.study.study_file import read_study
from examples.study.workplace import Workplace
from tests.small_runs.fixtures import REPOSITORY

CELL = ("0.16M", "junk", "novels")
LARGER = ("0.6M", "junk", "novels")
PACKED = ("0.16M", "packed", "novels")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """The recorded outcomes."""
    place = Workplace(folder=tmp_path_factory.mktemp("study"), study=read_study())
    place.prepare()
    results = Results.open(place, REPOSITORY / "examples" / "study" / "results.jsonl")
    return Comparison(study=place.study, results=results)


def _change(found: Comparison, cell: tuple[str, str, str], method: str, group: str) -> Difference:
    contrast = "-".join((*cell, method)) + " - " + "-".join((*cell, "uniform"))
    change = found.contrast(contrast, loss_of(read_questions().groups[group]))
    assert change is not None and change.pairs >= 3
    return change


def _work(found: Comparison, method: str) -> float:
    """Returns the mean work of a method, as a multiple of uniform's."""
    theirs = found.work(CELL, "uniform")
    ratios = [ours / theirs[seed] for seed, ours in found.work(CELL, method).items()]
    return sum(ratios) / len(ratios)


def _number(words: str) -> str:
    """Returns the one number that stands at N in a sentence of README.md."""
    text = " ".join((REPOSITORY / "README.md").read_text(encoding="utf-8").split())
    pattern = re.escape(words).replace("N", r"(\d+(?:\.\d+)?)")
    [number] = re.findall(pattern, text)
    return number


@pytest.mark.parametrize(
    ("words", "cell", "method", "group", "digits"),
    [
        ("loss of two unseen novels by N nats", CELL, "dwm_ahead", "unseen", 2),
        ("with the LLM's features python and github lose N.", CELL, "dwm_ahead", "code", 2),
        ("stages (the paper's form) they gain N,", CELL, "dwm_own_staged", "unseen", 2),
        ("in the cheap form, such an encoder gains N for", CELL, "dwm_own_ahead", "unseen", 2),
        ("with no learning (`similarity`), gains N,", CELL, "similarity", "unseen", 2),
        ("the target in the batch gain N.", CELL, "validation_mixing", "unseen", 2),
        ("`update_on ahead`) gains N for as", CELL, "domain_mean_ahead", "unseen", 2),
        ("weighting model of a first run chooses gains N,", CELL, "rater_half", "unseen", 2),
        ("A third as many gain N. At 2.5M", LARGER, "validation_mixing_low", "unseen", 2),
        ("three seeds, learned weights gain N,", LARGER, "dwm_ahead", "unseen", 2),
        ("learned weights gain 0.15, similarity N,", LARGER, "similarity", "unseen", 2),
        ("weighting model of a 0.16M run N; passages", LARGER, "dwm_transferred", "unseen", 2),
        ("(-N nats per token on the study's three", PACKED, "dwm_unit_document", "novels", 2),
    ],
)
def test_a_change_is_the_recorded_one(
    found: Comparison, words: str, cell: tuple[str, str, str], method: str, group: str, digits: int
) -> None:
    change = _change(found, cell, method, group)
    assert not change.low <= 0 <= change.high, "README.md states it as a fact"
    assert _number(words) == f"{abs(change.mean):.{digits}f}"


def test_without_junk_is_the_recorded_change(found: Comparison) -> None:
    """Of plain training on the corpus without junk, against that with it."""
    for words, group in (
        ("best left out: that gains N,", "unseen"),
        ("and N on the other", "others"),
    ):
        measure = loss_of(read_questions().groups[group])
        change = found.contrast("0.16M-natural-novels-uniform - uniform", measure)
        assert change is not None and change.pairs >= 3 and change.high < 0
        assert _number(words) == f"{-change.mean:.2f}"


def test_what_the_page_says_of_sizes(found: Comparison) -> None:
    """docs/study.md: the gain shrinks from size to size, the others lose less, the FLOPs."""
    sizes, groups = ("0.16M", "0.6M", "2.5M"), read_questions().groups

    def changes(group: str) -> list[float]:
        contrasts = [f"{s}-junk-novels-dwm_ahead - {s}-junk-novels-uniform" for s in sizes]
        found_ones = [found.contrast(each, loss_of(groups[group])) for each in contrasts]
        return [change.mean for change in found_ones if change is not None]

    gains, others = [-change for change in changes("unseen")], changes("others")
    assert len(gains) == len(others) == 3
    assert gains == sorted(gains, reverse=True) and others == sorted(others, reverse=True)
    pairs = [found.pairs((size, "junk", "novels"), "dwm_ahead")[0] for size in sizes]
    work = [ours.flops / theirs.flops for ours, theirs in pairs]
    assert [f"{each - 1:.0%}" for each in work] == ["6%", "6%", "4%"]


def test_the_largest_size_is_the_recorded_one(found: Comparison) -> None:
    """One pair of runs, as the sentence says, and no domain that loses."""
    groups, stated = read_questions().groups, _number("weights and similarity gain N each,")
    for method in ("dwm_ahead", "similarity"):
        runs = f"2.5M-junk-novels-{method} - 2.5M-junk-novels-uniform"
        gain = found.contrast(runs, loss_of(groups["unseen"]))
        assert gain is not None and gain.pairs == 1
        assert stated == f"{-gain.mean:.2f}"
    runs = "2.5M-junk-novels-dwm_ahead - 2.5M-junk-novels-uniform"
    for domain in {name for names in groups.values() for name in names}:
        change = found.contrast(runs, loss_of([domain]))
        assert change is not None and change.mean < 0, domain


def test_the_work_is_the_recorded_one(found: Comparison) -> None:
    assert f"{_work(found, 'domain_mean_ahead'):.2f}" == f"{_work(found, 'dwm_ahead'):.2f}"
    assert (
        _number("nats per token for N % more FLOPs") == f"{_work(found, 'dwm_ahead') - 1:.0%}"[:-1]
    )
    own = f"{_work(found, 'dwm_own_ahead') - 1:.0%}"[:-1]
    assert _number("such an encoder gains 0.17 for N % more") == own
    assert _number("cost N times the FLOPs; plain") == f"{_work(found, 'rater_half'):.1f}"


@pytest.mark.parametrize(
    ("method", "cell"),
    [
        ("dwm_own_staged", CELL),
        ("similarity", CELL),
        ("domain_mean_ahead", CELL),
        ("validation_mixing", LARGER),
        ("dwm_ahead", PACKED),
        ("dwm_exact", PACKED),
    ],
)
def test_what_readme_calls_equal_is_not_told_apart(
    found: Comparison, method: str, cell: tuple[str, str, str]
) -> None:
    """An encoder of its own and similarity gain as much; mixing at 0.6M shows no gain, nor does a
    weight for a window.
    """
    base = "dwm_ahead" if cell == CELL else "uniform"
    contrast = "-".join((*cell, method)) + " - " + "-".join((*cell, base))
    group = read_questions().groups["novels" if cell == PACKED else "unseen"]
    change = found.contrast(contrast, loss_of(group))
    assert change is not None and change.low <= 0 <= change.high


def test_what_is_left_at_equal_work(found: Comparison) -> None:
    """Most of the gain with the LLM's features, and nothing that can be shown with its own."""
    group = read_questions().groups["unseen"]
    features = found.change_at_equal_work(CELL, "dwm_ahead", group)
    own = found.change_at_equal_work(CELL, "dwm_own_staged", group)
    gain = _change(found, CELL, "dwm_ahead", "unseen")
    assert features is not None and own is not None
    assert features.mean < gain.mean / 2 and own.low <= 0 <= own.high
    cheap = found.change_at_equal_work(CELL, "dwm_own_ahead", group)
    assert cheap is not None and cheap.high < 0
    assert f"{-cheap.mean:.2f}" == _number("FLOPs, and N at equal FLOPs.")
    chosen = found.change_at_equal_work(CELL, "rater_half", group)
    assert chosen is not None and chosen.low > 0, "plain training ends lower"
    assert f"{chosen.mean:.2f}" == _number("plain training with that many ends N lower.")


def test_every_recorded_run_counts(found: Comparison) -> None:
    """A line of other settings is left out, so a changed fingerprint would empty the tables."""
    lines = (REPOSITORY / "examples" / "study" / "results.jsonl").read_text().splitlines()
    names = [json.loads(line)["run"] for line in lines]
    for name in names:
        *cell, method, seed = name.split("-")
        run = found.study.run(*cell, method, int(seed))
        assert found.results.of(run) is not None, name
    assert len(names) == len(set(names)) > 250


def test_how_often_the_target_was_read() -> None:
    """docs/when_not.md: of the 319 rows of the target a batch of 32 has three, or one."""
    page = (REPOSITORY / "docs" / "when_not.md").read_text(encoding="utf-8")
    steps, rows = read_study().sizes["0.6M"].steps, 319
    assert f"the 80 passages of the target make {rows} rows" in page
    for words, mixed in (("so far: three in a batch of 32", 3), ("one in a batch", 1)):
        times = [f"{at * steps * mixed / rows:.0f}" for at in (0.1, 0.3, 0.5, 0.7, 1.0)]
        assert f"{words} | {' | '.join(times)} |" in page
