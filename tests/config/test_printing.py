"""Nothing that moves a cursor or begins a line comes through, and nothing else is touched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dwm.config.printing import printable

# ECMA-48 and Unicode, by number: C0 and C1 controls, DEL, the two separators of lines and
# paragraphs, and the marks that turn the direction of writing.
_DANGEROUS = [*range(0x20), 0x7F, *range(0x80, 0xA0), 0x2028, 0x2029]
_DANGEROUS += [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xD800]


@pytest.mark.parametrize("code", _DANGEROUS, ids=hex)
def test_controls_are_spelled_out(code: int) -> None:
    shown = printable(f"a{chr(code)}b")
    assert shown.isascii() and shown.startswith("a\\") and shown.endswith("b")
    # Python reads the spelling as the character that it stands for.
    assert shown.encode().decode("unicode_escape") == f"a{chr(code)}b"


@pytest.mark.parametrize("text", ["wikipedia", "c4 (en)", "naïve 維基 Київ 🙂", "a\\b|$x"])
def test_names_stay_as_they_are(text: str) -> None:
    assert printable(text) == text


def test_what_is_kept_is_kept() -> None:
    assert printable("a\n\tb\x1b[2J", keep="\n\t") == "a\n\tb\\x1b[2J"


@pytest.mark.parametrize("kind", ["UserError", "RunError"])
def test_an_error_is_one_line_whatever_it_quotes(kind: str) -> None:
    program = (
        "from megatron_dwm.config import RunError, UserError\n"
        "from megatron_dwm.config.command_line import run_command\n"
        "def main() -> None:\n"
        f"    raise {kind}('no column x: it has \\x1b[2K\\nstep 9/9, \\udc80')\n"
        "run_command(main)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert done.returncode in (1, 2)
    assert done.stderr == b"error: no column x: it has \\x1b[2K\\nstep 9/9, \\udc80\n"


@pytest.mark.parametrize("missing", ["unheard_of", "megatron_dwm.unheard_of"])
def test_a_package_that_is_not_installed_is_one_line(missing: str, tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(f"import {missing}\n")
    program = (
        "from megatron_dwm.config.command_line import run_command\n"
        "def main() -> None:\n"
        "    import theirs\n"
        "run_command(main)"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    if missing == "unheard_of":
        assert (done.returncode, done.stderr) == (
            2,
            "error: the package unheard_of is not installed, and theirs imports it; install what "
            "megatron-dwm needs with this Python (pyproject.toml)\n",
        )
    else:  # a mistake in this package, of which a traceback says more
        assert done.returncode == 1 and "Traceback" in done.stderr
