"""Names in figures are short and stay different."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from megatron_dwm.report.images import png
from megatron_dwm.report.long_names import MAX_CHARACTERS, short_names
from megatron_dwm.report.run_report import Request, contents_of, read_runs


def test_clipped_names_stay_different() -> None:
    names = {"a": 0, "x" * 50: 0, "x" * 60: 0, "x" * 39 + "…": 0}
    short = short_names(names)
    assert set(short) == {"x" * 50, "x" * 60}
    assert len({*short.values(), "x" * 39 + "…"}) == 3
    assert all(len(name) <= MAX_CHARACTERS for name in short.values())


def test_a_long_domain_does_not_widen_the_plot(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", steps=100)
    names = ["d" * 300, "d" * 299 + "e"]
    line = {"step": 100, "phase": "evaluation", "domain_loss": dict.fromkeys(names, 3.0)}
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(line) + "\n")
    contents = contents_of(read_runs(Request(run_dir=run)))
    [figure] = [each for content in contents for each in content.figures if each.id == "loss"]
    assert len(figure.panel_names) == 3 and max(map(len, figure.panel_names)) <= MAX_CHARACTERS
    assert set(figure.panel_names) == set(figure.data["text"])
    # The width in pixels, from the header of the PNG.
    assert int.from_bytes(png(figure)[16:20], "big") < 2200
