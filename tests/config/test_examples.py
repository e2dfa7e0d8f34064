"""The command lines of the shipped scripts set no key in vain."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron_dwm.config.effect import warnings_of_effect
from megatron_dwm.config.load import load
from megatron_dwm.weighting import method_class

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
# The scripts' own functions, with a python that prints the words it is called with.
TYPED = f"""
set -eu
. {EXAMPLES}/parts.sh
python() {{ printf '%s\\n' "$@"; }}
"""


def _policy_trained_by(call: str) -> str:
    done = subprocess.run(["bash", "-c", TYPED + call], capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert words[:2] == ["-m", "megatron_dwm.pretrain"]
    loaded = load(words[2:])
    parts = method_class(loaded.config).parts(loaded.config)
    warnings_of_effect(loaded.config, loaded.given, parts)
    reads_target = "validation.path" in loaded.given.command_line
    assert reads_target == ("target" in parts)
    return loaded.config.policy.name


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ("", "dwm"),
        ("--policy.name uniform", "uniform"),
        ("--weighting.encoder own --weighting.update_on fresh", "dwm"),
    ],
)
def test_the_quickstart(options: str, policy: str) -> None:
    assert options in (EXAMPLES / "quickstart.sh").read_text()
    assert _policy_trained_by(f"train data run 1 {options}") == policy
