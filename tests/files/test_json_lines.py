"""Lines have the numbers that an editor shows; dotted names may be keys of their own."""

from __future__ import annotations

from pathlib import Path

from megatron_dwm.files.json_lines import look_up, numbered_lines


def test_lines_have_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"{}\n \n\n[1]\r\nunfinished")
    assert list(numbered_lines(path)) == [(1, b"{}\n"), (4, b"[1]\r\n"), (5, b"unfinished")]


def test_dotted_names() -> None:
    record: dict[str, object] = {"meta": {"set": None}, "meta.score": 1}
    assert look_up(record, "meta.set") == (True, None)
    assert look_up(record, "meta.score") == (True, 1)
    assert look_up(record, "meta.none") == (False, None)
    assert look_up(record, "meta.set.deeper") == (False, None)
