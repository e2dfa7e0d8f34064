"""What the study makes of known outcomes: intervals, contrasts, verdicts, the document."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from examples.study.contrasts import Comparison, loss_of, weight_moved
from examples.study.document import write_document
from examples.study.outcome import Curve, Outcome
from examples.study.questions import (
    Check,
    Question,
    claims_table,
    finding,
    predictions_table,
    read_questions,
)
from examples.study.results import Results
from examples.study.settings import file_fingerprint
from examples.study.spec import Study
from examples.study.statistics import Difference
from examples.study.study_file import read_study
from examples.study.workplace import Workplace
from megatron_dwm.config import UserError
from megatron_dwm.config.load import load
from tests.small_runs.fixtures import REPOSITORY

DOMAINS = (
    *("github", "mansfield_park", "persuasion", "pride_and_prejudice", "python"),
    *("sense_and_sensibility", "speeches", "web"),
)
CELL = ("0.16M", "junk", "novels")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A folder with the study's text, and no run."""
    made = Workplace(folder=tmp_path_factory.mktemp("study"), study=read_study())
    made.prepare()
    return made


def _outcome(name: str, settings: str, losses: Mapping[str, float], flops: float = 1.0) -> Outcome:
    steps = [500, 1000]
    curve = {domain: [value + 1.0, value] for domain, value in losses.items()}
    by_domain = {"austen": [1.0, None, 2.0, 3.5, None]}
    weights = Curve(step=[100, 300, 500, 700, 900], flops=[0] * 5, by_domain=by_domain)
    return Outcome(
        run=name,
        settings=settings,
        commit="unknown",
        losses=Curve(step=steps, flops=[flops / 2, flops], by_domain=curve),
        weights=weights,
        flops=flops,
        flops_updates=0.0,
        seconds=1.0,
        sample_size=0.5,
        signal_to_noise=None,
    )


def _known(place: Workplace, file: Path, losses: Mapping[tuple[str, int], float]) -> Comparison:
    """The comparison of runs that ended at a loss in every domain, by method and seed."""
    lines = []
    for (method, seed), loss in losses.items():
        run = place.study.run(*CELL, method, seed)
        flops = place.study.methods[method].steps
        values = dict.fromkeys(DOMAINS, loss)
        lines.append(_outcome(run.name, place.settings(run), values, flops).line() + "\n")
    file.write_text("".join(lines))
    return Comparison(study=place.study, results=Results.open(place, file))


@pytest.fixture
def found(place: Workplace, tmp_path: Path) -> Comparison:
    """Three seeds of uniform, a better and a worse method, and two seeds of another."""
    losses = {("uniform", seed): 4.0 + 0.1 * seed for seed in (1, 2, 3)}
    losses |= {("uniform_1.25", seed): 3.9 + 0.1 * seed for seed in (1, 2, 3)}
    losses |= {("dwm_ahead", seed): 3.8 + 0.1 * seed + 0.01 * seed for seed in (1, 2, 3)}
    losses |= {("excess_loss", seed): 4.4 + 0.1 * seed for seed in (1, 2, 3)}
    losses |= {("dwm_own_staged", seed): 4.3 + 0.1 * seed for seed in (1, 2)}
    return _known(place, tmp_path / "results.jsonl", losses)


def test_contrasts_pair_seeds(found: Comparison) -> None:
    change = found.contrast("dwm_ahead - uniform", loss_of(["web"]))
    assert change is not None and change.pairs == 3
    assert change.mean == pytest.approx(-0.18)
    half = found.contrast("dwm_own_staged - 0.5*dwm_ahead - 0.5*uniform", loss_of(["web"]))
    assert half is not None and half.pairs == 2 and half.mean == pytest.approx(0.3925)
    named = found.contrast("0.16M-junk-novels-dwm_ahead - uniform", loss_of(["web"]))
    assert named == change
    early = found.contrast("uniform", loss_of(["web"], at=0.5))
    assert early is not None and early.mean == pytest.approx(5.2)
    moved = found.contrast("uniform", weight_moved(["austen"], 0.3))
    assert moved is not None and moved.mean == pytest.approx(1.5)
    assert found.contrast("opus - uniform", loss_of(["web"])) is None
    with pytest.raises(UserError, match="no_such: no run of this study"):
        found.contrast("no_such - uniform", loss_of(["web"]))


def test_equal_work_is_uniforms_own_curve(found: Comparison) -> None:
    """A method with uniform's FLOPs is compared with uniform itself."""
    equal = found.change_at_equal_work(CELL, "dwm_ahead", ["web"])
    assert equal is not None and equal.mean == pytest.approx(-0.18)


@pytest.mark.parametrize(
    ("between", "alike", "mean", "half", "pairs", "verdict"),
    [
        ([None, 0], False, -0.2, 0.1, 3, True),
        ([None, 0], False, -0.2, 0.3, 3, None),
        ([0, None], False, -0.2, 0.1, 3, False),
        ([-0.3, -0.1], False, -0.2, 0.05, 3, True),
        ([-0.03, 0.03], False, 0.0, 0.5, 3, None),
        (None, True, 0.0, 0.02, 3, True),
        (None, True, 0.1, 4.0, 3, None),
        ([None, 0], False, -0.2, 0.1, 2, None),
        (None, True, 0.3, 0.2, 3, False),
        (None, False, 0.3, 0.2, 3, None),
        ([None, 0], False, -0.2, math.nan, 1, None),
    ],
)
def test_verdicts(
    between: list[float | None] | None,
    alike: bool,
    mean: float,
    half: float,
    pairs: int,
    verdict: bool | None,
) -> None:
    check = Check(contrast="a - b", between=between, alike=alike)
    assert check.verdict(Difference(mean=mean, half_width=half, pairs=pairs)) is verdict


@pytest.mark.parametrize("asked", read_questions().decisions, ids=lambda asked: asked.text)
def test_runs_of_a_decision_differ_in_its_keys_alone(asked: Question, place: Workplace) -> None:
    for check in asked.checks:
        ours, theirs = check.contrast.split(" - ")
        configs = [_keys(place, method) for method in (ours, theirs)]
        differ = {key for key in configs[0] if configs[0][key] != configs[1][key]}
        assert differ == set(asked.keys)


def _keys(place: Workplace, method: str) -> dict[str, object]:
    """Returns what the keys of a method's run come to, defaults that depend on others included."""
    run = place.study.run(*CELL, method, 1)
    command = place.command(run, Path("data"))
    config = load(command[command.index("megatron_dwm.pretrain") + 1 :], "study").config
    found = {
        f"{section}.{key}": value
        for section, keys in asdict(config).items()
        for key, value in keys.items()
    }
    del found["run.dir"]
    return found | {
        "validation.batch_size": config.passages,
        "weighting.update_on": config.update_on,
        "weighting.across_samples": config.weighting.attends_across_samples,
    }


def test_every_question_is_about_runs_of_the_study(found: Comparison) -> None:
    """Names of methods, cells and groups are right, whether or not the runs are known."""
    questions, study = read_questions(), found.study
    cells = {
        (*cell, method)
        for part in study.parts.values()
        for cell in _cells(study, part.name)
        for method in part.methods
    }
    for asked in (*questions.predictions, *questions.claims, *questions.decisions):
        assert asked.untestable or asked.checks, asked.text
        for check in asked.checks:
            questions.answer(check, found)
            assert isinstance(check.domains, list) or check.domains in questions.groups
            for word in check.contrast.split():
                name = word.rpartition("*")[2]
                if name not in ("+", "-"):
                    cell = tuple(name.split("-")) if "-" in name else (*CELL, name)
                    assert cell in cells, name
    for group in questions.groups.values():
        assert set(group) <= set(DOMAINS)


def _cells(study: Study, part: str) -> list[tuple[str, str, str]]:
    from examples.study.contrasts import cells_of

    return cells_of(study.parts[part])


def test_tables_say_what_came_of_it(found: Comparison) -> None:
    questions = read_questions()
    claims = claims_table(questions, found).splitlines()
    [two_seeds] = [line for line in claims if "beat random data" in line]
    assert "not decided" in two_seeds and "`dwm_own_staged - uniform`, novels: +0.300" in two_seeds
    [worse] = [line for line in claims if "a reference that has seen the target helps" in line]
    assert "**does not hold**" in worse and "`excess_loss - uniform`, novels: **+0.400" in worse
    [tasks] = [line for line in claims if "lm-evaluation-harness" in line]
    assert "not testable here" in tasks
    predictions = predictions_table(questions, found).splitlines()
    [ahead] = [line for line in predictions if line.startswith("| `dwm_ahead` |")]
    assert "| not decided<br>**wrong** |" in ahead


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ((-0.05, 0.02), (0.01, 0.05), "gains"),
        ((0.01, 0.05), (-0.05, 0.02), "gains"),
        ((0.05, 0.02), (0.01, 0.05), "**loses**"),
        ((-0.05, 0.02), (0.05, 0.02), "trades"),
        ((0.01, 0.015), (-0.01, 0.015), "changes nothing"),
        ((0.01, 0.025), (-0.01, 0.015), "not decided"),
    ],
)
def test_what_a_change_of_a_default_does(
    ours: tuple[float, float], theirs: tuple[float, float], words: str
) -> None:
    """By means and half widths of the change on the novels, and on the other domains."""

    def of(pairs: int) -> str:
        changes = [Difference(mean=m, half_width=h, pairs=pairs) for m, h in (ours, theirs)]
        return finding(changes[0], changes[1])

    assert of(3) == words and of(2) == "not decided"
    assert finding(None, None) == "no number"


def test_a_line_of_other_settings_does_not_count(place: Workplace, tmp_path: Path) -> None:
    run = place.study.run(*CELL, "uniform", 1)
    file = tmp_path / "results.jsonl"
    file.write_text(_outcome(run.name, "0" * 12, {"web": 4.0}).line() + "\n")
    assert Results.open(place, file).of(run) is None
    file.write_text(file.read_text() + '{"run": "half a line"}\n')
    with pytest.raises(UserError, match="line 2: no outcome of a run"):
        Results.open(place, file)


def test_a_last_line_without_an_end_is_kept(place: Workplace, tmp_path: Path) -> None:
    run = place.study.run(*CELL, "uniform", 1)
    file = tmp_path / "results.jsonl"
    line = _outcome(run.name, place.settings(run), {"web": 4.0}).line()
    file.write_text(line)
    assert Results.open(place, file).of(run) is not None
    assert file.read_text() == line
    file.write_text(line.replace('"flops": 1.0', '"flops": "many"'))
    with pytest.raises(UserError, match="line 1: no outcome"):
        Results.open(place, file)


def test_runs_before_a_method_count_as_its_work(place: Workplace, tmp_path: Path) -> None:
    """A reference of one uniform run, and uniform's curve between two of its lengths."""
    losses = {("uniform", 1): 4.0, ("uniform_2.5", 1): 3.0, ("excess_loss", 1): 3.5}
    alone = _known(place, tmp_path / "a.jsonl", losses)
    assert alone.work(CELL, "excess_loss") == {}, "its reference is not known"
    found = _known(place, tmp_path / "b.jsonl", losses | {("validation_mixing", 1): 4.0})
    assert found.work(CELL, "excess_loss") == {1: 2.0} and found.work(CELL, "uniform") == {1: 1.0}
    equal = found.change_at_equal_work(CELL, "excess_loss", ["web"])
    uniform = 4.0 - math.log(2) / math.log(2.5)
    assert equal is not None and equal.mean == pytest.approx(3.5 - uniform)


def test_another_text(place: Workplace, tmp_path: Path) -> None:
    """Tables of its own domains, nothing about the sample; data of other text stay unused."""
    tokenizer = place.text.tokenizer.read_bytes()
    place = replace(place, folder=tmp_path)
    records = [{"text": f"a short text, number {i} " * 20, "domain": "mine"} for i in range(200)]
    own = ["text.jsonl", "heldout.jsonl"]
    for name in own:
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in records))
    place.text.tokenizer.write_bytes(tokenizer)
    assert place.prepare() == [*own, "tokenizer.model"] and not place.on_sample
    study = place.study.for_domains(place.text.domains)
    assert "hand_set" not in study.methods and "no_junk" in study.methods
    place = replace(place, study=study)
    lines = []
    for method, loss in (("uniform", 2.0), ("dwm_ahead", 1.5)):
        run = study.run(*CELL, method, 1)
        lines.append(_outcome(run.name, place.settings(run), {"mine": loss}).line() + "\n")
    (tmp_path / "results.jsonl").write_text("".join(lines))
    pages = write_document(Results.open(place, tmp_path / "results.jsonl"), tmp_path / "study.md")
    assert pages == [tmp_path / "study.md"]
    output = pages[0]
    assert "| `dwm_ahead` | 1 | -0.500 |" in output.read_text()
    assert "novels by the same author" not in output.read_text()
    assert not (tmp_path / "when_not.md").exists()
    natural = study.run("0.16M", "natural", "novels", "uniform", 1)
    first = place.data(natural).prepare()
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[:100]))
    file_fingerprint.cache_clear()
    second = place.data(natural).prepare()
    assert first != second and first.with_suffix(".bin").stat().st_size > (
        second.with_suffix(".bin").stat().st_size
    )


def test_the_document_is_of_the_recorded_outcomes(place: Workplace, tmp_path: Path) -> None:
    """docs/study.md is what the study writes from examples/study/results.jsonl."""
    recorded = REPOSITORY / "examples" / "study" / "results.jsonl"
    write_document(Results.open(place, recorded), tmp_path / "study.md")
    pages = sorted(path.name for path in tmp_path.glob("*.md"))
    assert pages == ["study.md", "when_not.md"]
    for page in pages:
        assert (tmp_path / page).read_text() == (REPOSITORY / "docs" / page).read_text()
    for picture in tmp_path.glob("*.png"):
        assert (REPOSITORY / "docs" / picture.name).is_file()
