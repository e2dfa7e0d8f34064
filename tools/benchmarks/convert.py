"""to-hf against copying the checkpoint's files, and its peak memory against what it may use.

A checkpoint of random parameters without an optimizer is the hardest case: all that is copied has
to be converted. Every round copies the files and then converts them, in a process each, from a warm
file cache; the conversion's time has everything in it, its start and both models' logits too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from multiprocessing import get_context
from pathlib import Path
from statistics import median

from megatron.core import dist_checkpointing

from benchmarks.table import command, markdown
from megatron_dwm.checkpoint.names import CONFIG_FILE, LLM_FOLDER, MODEL_PREFIX, SHAPE_FILE
from megatron_dwm.config import Config, DataConfig, ModelConfig, ParallelConfig
from megatron_dwm.config.load import save_config
from megatron_dwm.convert.checkpoint_reader import open_checkpoint
from megatron_dwm.model import LlamaShape
from megatron_dwm.model.builders.build import build_module
from megatron_dwm.model.llm import whole_model
from megatron_dwm.model.on_disk.parameter_names import huggingface_shapes
from megatron_dwm.model.shape import PRESETS
from megatron_dwm.runtime import bring_up
from megatron_dwm.tokenizer import train_sentencepiece

_ROOT = Path(__file__).parent.parent.parent
_SEQUENCE_LENGTH = 1024
_VOCABULARY = 1000


@dataclass(frozen=True)
class _Run:
    seconds: float
    peak_bytes: int


def measure_conversion(*, preset: str, checkpoint: Path | None, rounds: int) -> None:
    """Print the table for a random model of `preset`, or for a given checkpoint."""
    environment = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        source = checkpoint or _made_elsewhere(PRESETS[preset], scratch)
        saved = open_checkpoint(source)
        tool = [sys.executable, str(_ROOT / "tools/convert_checkpoint.py"), "to-hf"]
        convert = [*tool, str(saved.directory), "--output", str(scratch / "hf")]
        copies, conversions = [], []
        for _ in range(rounds):
            copy = ["cp", "-r", str(saved.directory), str(scratch / "copy")]
            copies.append(_run(copy, environment))
            conversions.append(_run(convert, environment))
            shutil.rmtree(scratch / "copy")
            shutil.rmtree(scratch / "hf")
        size_bytes = sum(f.stat().st_size for f in saved.directory.rglob("*") if f.is_file())
        _print(saved.shape, saved.dtype.itemsize, size_bytes, copies, conversions)


def _made_elsewhere(shape: LlamaShape, scratch: Path) -> Path:
    """Make a checkpoint of a random model in a separate process.

    Linux counts what a process held when it started another one as that one's peak, too.
    """
    directory = scratch / "checkpoint"
    maker = get_context("spawn").Process(target=_random_checkpoint, args=(shape, directory))
    maker.start()
    maker.join()
    if maker.exitcode:
        raise RuntimeError(f"making a random checkpoint ended with {maker.exitcode}")
    return directory


def _random_checkpoint(shape: LlamaShape, directory: Path) -> None:
    tokenizer = directory.parent / "tokenizer.model"
    (directory / LLM_FOLDER).mkdir(parents=True)
    lines = (_ROOT / "examples/corpus/validation.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    train_sentencepiece(texts, vocab_size=_VOCABULARY, output=tokenizer)
    with bring_up(ParallelConfig(), seed=0):
        module = build_module(whole_model(shape, ModelConfig(), sequence_length=_SEQUENCE_LENGTH))
        state = {"model": module.sharded_state_dict(prefix=MODEL_PREFIX)}
        dist_checkpointing.save(state, str(directory / LLM_FOLDER))
    data = DataConfig(tokenizer=str(tokenizer), sequence_length=_SEQUENCE_LENGTH)
    save_config(Config(data=data), directory / CONFIG_FILE)
    (directory / SHAPE_FILE).write_text(json.dumps(asdict(shape)), encoding="utf-8")


def _run(arguments: Sequence[str], environment: Mapping[str, str]) -> _Run:
    """Returns wall-clock seconds and peak resident memory of a process; raises if it fails."""
    start = time.monotonic()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), arguments)
    return _Run(time.monotonic() - start, usage.ru_maxrss * 1024)


def _print(
    shape: LlamaShape,
    item_bytes: int,
    size_bytes: int,
    copies: Sequence[_Run],
    conversions: Sequence[_Run],
) -> None:
    largest_bytes = item_bytes * max(prod(size) for size in huggingface_shapes(shape).values())
    allowed_bytes = 4 * largest_bytes + 10**9
    copy_s = median(run.seconds for run in copies)
    convert_s = median(run.seconds for run in conversions)
    peak_bytes = max(run.peak_bytes for run in conversions)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"`{command()}`\n")
    print(
        f"{shape.num_parameters() / 1e6:.0f}M parameters, checkpoint of {size_bytes / 1e9:.2f} GB, "
        f"median of {len(copies)} rounds, load average {load} (1, 5, 15 min) on "
        f"{os.cpu_count()} cores.\n"
    )
    rows = [
        ["copy the files, s", f"{copy_s:.1f}", ""],
        ["to-hf, s", f"{convert_s:.1f}", f"{2 * copy_s:.1f}"],
        ["to-hf, peak memory, GB", f"{peak_bytes / 1e9:.2f}", f"{allowed_bytes / 1e9:.2f}"],
    ]
    print(markdown(["", "measured", "target"], rows))
