"""Profiling on a CPU: the window's steps, names in torch's trace, and what needs more than a CPU.

NVTX and DLProf write through a GPU's driver; here only their refusal is tested.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from megatron_dwm.config import ProfilingConfig, UserError
from megatron_dwm.runtime.profiling import DLPROF_MODULE, Window, check_profiling, phase

PROFILED = ProfilingConfig(tool="torch", first_step=3, last_step=5, ranks=[1])


def steps(config: ProfilingConfig, folder: Path, rank: int, count: int = 8) -> None:
    window = Window(config, folder, rank)
    for number in range(1, count + 1):
        window.before_step(number)
        with phase("step"):
            torch.ones(number).sum()
    window.close()


def ranges(file: Path) -> list[str]:
    with gzip.open(file, "rt", encoding="utf-8") as text:
        events = json.load(text)["traceEvents"]
    return [event["name"] for event in events if event.get("cat") == "user_annotation"]


def test_the_trace_holds_the_steps_of_the_window(tmp_path: Path) -> None:
    steps(PROFILED, tmp_path, rank=1)
    (file,) = tmp_path.iterdir()
    assert file.name == "rank_1_steps_3_5.json.gz"
    assert ranges(file).count("step") == 3


def test_a_window_past_the_last_step_ends_with_the_run(tmp_path: Path) -> None:
    steps(PROFILED, tmp_path, rank=1, count=4)
    (file,) = tmp_path.iterdir()
    assert ranges(file).count("step") == 2


def test_an_earlier_trace_is_kept(tmp_path: Path) -> None:
    for _ in range(2):
        steps(PROFILED, tmp_path, rank=1)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("tool", "rank"), [("torch", 0), ("none", 1)])
def test_nothing_is_written_unasked(tool: str, rank: int, tmp_path: Path) -> None:
    config = ProfilingConfig(tool=tool, first_step=3, last_step=5, ranks=[1])
    steps(config, tmp_path / "profile", rank)
    assert not (tmp_path / "profile").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_nvtx_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match="profiling.tool nvtx: needs a GPU"):
        check_profiling(ProfilingConfig(tool="nvtx"))


@pytest.mark.skipif(importlib.util.find_spec(DLPROF_MODULE) is not None, reason="it is installed")
def test_dlprof_without_its_package_is_refused() -> None:
    with pytest.raises(UserError, match=f"profiling.tool dlprof: needs NVIDIA's {DLPROF_MODULE}"):
        check_profiling(ProfilingConfig(tool="dlprof"))
