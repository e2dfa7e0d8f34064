"""The page's documents and tokens in headless Chromium: search, filters, text of documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dwm.report.run_report import Request, write_report
from tests.report.test_browser import browser, opened, quiet  # noqa: F401
from tests.small_runs.command import succeed
from tests.small_runs.fixtures import Corpus, preprocessed

SCRIPT = "<script>document.title='owned'</script><b>bold</b> & \x1b[31mred"
EVERY_STEP = ["--logging.weights_interval_steps", "1"]
DWM = ["--policy.name", "dwm", "--weighting.encoder", "llm", "--weighting.update_on", "training"]
BLADE = ["--policy.name", "blade", "--weighting.unit", "token", "--policy.sync_first_step", "2"]
BLADE += ["--policy.sync_interval_steps", "4", "--policy.reference_steps", "1"]


@pytest.fixture(scope="module")
def scripts(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Forty documents, each of which begins with its number and a script."""
    file = tmp_path_factory.mktemp("scripts") / "scripts.jsonl"
    records = [
        {"text": f"number{n}x {SCRIPT} " + f"word{n} " * 60, "domain": f"d{n % 3}"}
        for n in range(40)
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return preprocessed(file, corpus.tokenizer)


def _page(corpus: Corpus, folder: Path, options: list[str]) -> Path:
    succeed(folder / "run", *corpus.arguments(), *EVERY_STEP, *options, "--training.steps", "8")
    write_report(request := Request(run_dir=folder / "run"))
    return request.page


@pytest.fixture(scope="module")
def of_documents(scripts: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _page(scripts, tmp_path_factory.mktemp("documents"), DWM)


@pytest.fixture(scope="module")
def of_tokens(scripts: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _page(scripts, tmp_path_factory.mktemp("tokens"), BLADE)


def test_documents_are_searched_and_filtered(browser: Any, of_documents: Path) -> None:  # noqa: F811
    found = opened(browser, of_documents)
    page = found.page
    items = page.locator(".document-list > li")
    every = items.count()
    output = page.locator(".filters output")
    assert output.inner_text() == f"{every} of {every} documents" and every >= 10

    # By keyboard alone: from the search field to the choices, and back.
    wanted = items.first.locator(".text").inner_text().split()[0]
    page.get_by_role("searchbox").focus()
    page.keyboard.type(f"{wanted.upper()} script")
    visible = page.locator(".document-list > li:visible")
    assert visible.count() == 1 and wanted in visible.first.inner_text()
    assert output.inner_text() == f"1 of {every} documents"
    page.keyboard.press("Enter")
    assert visible.count() == 1, "Enter sends no form"
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.press("Delete")
    assert visible.count() == every

    filters = page.locator(".filters")
    for name, attribute, value in (
        ("Wanted", "data-side", "least"),
        ("Domain", "data-domain", "d1"),
    ):
        filters.get_by_label(name).select_option(value)
        shown = [item.get_attribute(attribute) for item in visible.all()]
        assert shown and set(shown) == {value} and len(shown) < every
        filters.get_by_label(name).select_option("")
    page.get_by_role("searchbox").fill("nothing has these words")
    assert visible.count() == 0 and output.inner_text() == f"0 of {every} documents"
    quiet(found)


def test_text_of_documents_is_text(browser: Any, of_documents: Path) -> None:  # noqa: F811
    found = opened(browser, of_documents)
    texts = found.page.locator(".document-list .text").all_inner_texts()
    assert texts and all("<script>document.title='owned'</script><b>bold</b>" in t for t in texts)
    assert found.page.locator(".document-list script, .document-list b").count() == 0
    assert all("\x1b" not in text for text in texts)
    credit = found.page.locator("#credit table").all_inner_texts()
    assert len(credit) == 2 and "<script>" in credit[1]
    quiet(found)


def test_tokens_are_colored_by_weight(browser: Any, of_tokens: Path) -> None:  # noqa: F811
    found = opened(browser, of_tokens)
    page = found.page
    found.draw_all()
    rows = page.locator(".tokens details")
    for number in range(rows.count()):
        if rows.nth(number).get_attribute("open") is None:
            rows.nth(number).locator("summary").press("Enter")
    kept, dropped = (page.locator(f".colored .{state}") for state in ("kept", "dropped"))
    assert kept.count() > 0 and dropped.count() > 0
    background = "e => getComputedStyle(e).backgroundColor"
    assert kept.first.evaluate(background) != dropped.first.evaluate(background)
    assert kept.first.get_attribute("title").startswith("weight ")
    assert "document.title" in " ".join(page.locator(".colored").all_inner_texts())
    quiet(found)
