"""The page of a real tiny run in headless Chromium: plots, controls, downloads, no network.

Needs playwright (extra dev) and a Chromium of the system; nothing is downloaded. Without a
screen Chromium sometimes makes no frames for minutes, so nothing here but the test of scrolling
waits for one: buttons are pressed by keyboard, since Playwright's clicks wait for two.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from megatron_dwm.report.run_report import Request, contents_of, read_runs, write_report
from tests.small_runs.command import succeed
from tests.small_runs.fixtures import Corpus

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
WAIT_MS = 120_000
NASTY = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"
PHONE = {"width": 390, "height": 844}


@dataclass
class Opened:
    """A page and what it complained about. requests: addresses outside file:, data: and blob:."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def draw_all(self) -> None:
        """Draw every figure, as before printing, which waits for no frame."""
        self.page.evaluate("dispatchEvent(new Event('beforeprint'))")
        for figure in self.page.locator("figure.figure").all():
            figure.locator(".plot svg").first.wait_for(timeout=WAIT_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, or a skip that says what is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is missing: extra dev")
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH: apt-get install chromium")
    # Chromium's own sandbox does not start for root.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM, args=options, timeout=WAIT_MS
        )
        yield started
        started.close()


@pytest.fixture(scope="module")
def runs(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds of dwm and one uniform run; a domain's name of the first is HTML."""
    folder = tmp_path_factory.mktemp("runs")
    held_out = folder / "heldout.jsonl"
    rows = [{"domain": name, "text": "It was the best of times."} for name in ("target", NASTY)]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--evaluation.path", str(held_out), "--evaluation.interval_steps", "5"]
    common += ["--logging.weights_interval_steps", "2"]
    learned = ["--policy.name", "dwm", "--bilevel.noise_interval_updates", "1"]
    for name, seed, more in (
        ("dwm", "1", learned),
        ("dwm_2", "2", learned),
        ("uniform", "1", ["--policy.name", "uniform"]),
    ):
        succeed(folder / name, *corpus.arguments(), *common, "--run.seed", seed, *more)
    for file in (folder / "dwm" / "weights").glob("*.parquet"):
        table = pq.read_table(file)
        names = [NASTY if n == "web" else n for n in table["domain"].to_pylist()]
        pq.write_table(
            table.set_column(table.column_names.index("domain"), "domain", [names]), file
        )
    return [folder / name for name in ("dwm", "dwm_2", "uniform")]


@pytest.fixture(scope="module")
def request_(runs: list[Path]) -> Request:
    """A report on the runs, written."""
    found = Request(run_dir=runs[0], compare=runs[1:])
    write_report(found)
    return found


@pytest.fixture(autouse=True)
def closed(browser: Any) -> Iterator[None]:
    """Close a test's pages: one behind another makes fewer frames."""
    yield
    for context in browser.contexts:
        context.close()


def opened(browser: Any, path: Path, **options: Any) -> Opened:
    context = browser.new_context(accept_downloads=True, **options)
    found = Opened(page=context.new_page())
    page = found.page
    page.set_default_timeout(WAIT_MS)
    loud = ("error", "warning")
    page.on("console", lambda m: found.complaints.append(m.text) if m.type in loud else None)
    page.on("pageerror", lambda error: found.complaints.append(str(error)))
    ours = ("file:", "data:", "blob:")
    page.on("request", lambda r: None if r.url.startswith(ours) else found.requests.append(r.url))
    page.goto(path.as_uri())
    return found


def quiet(found: Opened) -> None:
    assert found.complaints == [] and found.requests == []
    assert found.page.title() != "owned"


def makes_frames(page: Any) -> bool:
    """Whether a frame comes within 20 seconds."""
    wait = "requestAnimationFrame(() => done(true)); setTimeout(() => done(false), 20000)"
    return bool(page.evaluate(f"new Promise(done => {{{wait}}})"))


def test_a_figure_is_drawn_when_it_is_about_to_be_seen(browser: Any, request_: Request) -> None:
    page = opened(browser, request_.page).page
    last = page.locator("figure.figure").last
    assert last.locator(".plot svg").count() == 0
    last.evaluate("figure => figure.scrollIntoView()")
    try:
        last.locator(".plot svg").first.wait_for(timeout=WAIT_MS)
    except Exception:
        if makes_frames(page):
            raise
        pytest.skip("Chromium makes no frames here")


def test_every_plot_has_data(browser: Any, request_: Request) -> None:
    found = opened(browser, request_.page)
    found.draw_all()
    contents = contents_of(read_runs(request_))
    figures = {figure.id: figure for content in contents for figure in content.figures}
    assert {"loss", "weight_by_domain", "effective_sample_size", "held_out_loss"} <= set(figures)
    for name, figure in figures.items():
        plots = found.page.locator(f"#figure-{name} .plot")
        assert plots.count() == (len(figure.panel_names) if figure.panels else 1), name
        for plot in plots.all():
            drawn = plot.locator("g.mark-line path, g.mark-area path, g.mark-symbol path")
            assert any(path.get_attribute("d") for path in drawn.all()), name
            titles = plot.locator("g.role-axis-title text").all_text_contents()
            assert titles and all(titles), name
    # Figures clip long names.
    assert NASTY[:30] in found.page.locator("#figure-weight_by_domain").inner_text()
    quiet(found)


def test_the_abscissa_can_be_chosen_by_keyboard(browser: Any, request_: Request) -> None:
    found = opened(browser, request_.page)
    found.draw_all()
    page = found.page
    page.locator("#abscissa input:checked").focus()
    for label in ("training tokens", "work so far (FLOPs)", "wall-clock time (s)"):
        page.keyboard.press("ArrowRight")
        title = page.locator("#figure-loss .plot").last.get_by_text(label)
        title.first.wait_for()
    found.draw_all()
    others = page.locator("#figure-effective_sample_size svg").get_by_text("optimizer step")
    assert others.count() == 0
    quiet(found)


def test_lines_can_be_hidden_and_data_shown(browser: Any, request_: Request) -> None:
    found = opened(browser, request_.page)
    found.draw_all()
    figure = found.page.locator("#figure-effective_sample_size")
    buttons = figure.locator(".legend button")
    assert buttons.all_inner_texts() == ["dwm (2 seeds)", "uniform"]
    lines = figure.locator("g.mark-line path")
    assert lines.count() == 2
    turn = int(figure.get_attribute("data-drawn"))
    buttons.first.press("Enter")
    found.page.wait_for_function(
        "([e, turn]) => Number(e.dataset.drawn) > turn",
        arg=[figure.element_handle(), turn],
        polling=100,
    )
    assert buttons.first.get_attribute("aria-pressed") == "false" and lines.count() == 1
    figure.get_by_role("button", name="Show the data").press("Enter")
    assert "effective sample size" in figure.locator(".data table").inner_text()
    quiet(found)


def test_figures_are_saved_as_png_and_csv(browser: Any, request_: Request, tmp_path: Path) -> None:
    found = opened(browser, request_.page)
    found.draw_all()
    contents = contents_of(read_runs(request_))
    for figure in (figure for content in contents for figure in content.figures):
        place = found.page.locator(f"#figure-{figure.id}")
        for kind in ("PNG", "CSV"):
            with found.page.expect_download() as download:
                place.get_by_role("button", name=kind, exact=False).first.press("Enter")
            assert download.value.suggested_filename == f"{figure.id}.{kind.lower()}"
            download.value.save_as(tmp_path / download.value.suggested_filename)
            # Chromium drops what a page downloads beyond ten files a second.
            found.page.wait_for_timeout(150)
        assert (tmp_path / f"{figure.id}.png").read_bytes().startswith(b"\x89PNG")
        with (tmp_path / f"{figure.id}.csv").open(newline="") as file:
            rows = list(csv.reader(file))
        assert rows[0] == [column.label for column in figure.columns]
        assert len(rows) == figure.num_rows + 1
    quiet(found)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_follows_the_system(
    browser: Any, request_: Request, scheme: str
) -> None:
    found = opened(browser, request_.page, viewport=PHONE, color_scheme=scheme)
    found.draw_all()
    page = found.page
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    other = {"light": "dark", "dark": "light"}[scheme]
    while page.evaluate("document.documentElement.dataset.theme") != other:
        page.locator("#theme").press("Enter")
    found.draw_all()
    quiet(found)
