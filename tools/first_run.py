"""What tools/first_gpu_run.sh asks of the machine, and the report that it leaves.

`first_run.py machine` prints shell assignments: GPUS, PROCESSES, SIZES, NO_FP8, NO_TESTS,
TESTS_AT_ONCE.
`first_run.py report FOLDER` writes FOLDER/report.md from the parts' outputs. Its sections are those
of a torchtitan benchmark submission: who, what, hardware, configuration and results, versions and
date, findings.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from megatron_dwm.config.command_line import OneLineParser, run_command
from megatron_dwm.config.errors import UserError

_REPOSITORY = Path(__file__).resolve().parent.parent
_MOST_PROCESSES = 8
_ERROR_LINES = 15
_VERSIONS = (
    *("python", "torch", "megatron-core", "transformer-engine", "numpy", "NVIDIA apex"),
    *("sentencepiece", "lm-eval"),
)


@dataclass(frozen=True)
class Part:
    """How a part ended. result: its exit code, or `left out`; then command is the reason."""

    name: str
    result: str
    seconds: int
    command: str

    @property
    def ran(self) -> bool:
        """True if the part was started."""
        return self.result != "left out"

    @property
    def verdict(self) -> str:
        """The result in words."""
        if not self.ran:
            return f"left out: {self.command}"
        words = {"0": "done", "124": "failed: over its time limit"}
        return words.get(self.result, f"failed: exit code {self.result}")


def main() -> None:
    """Print the machine, or write the report."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("machine", help="print what the machine can run, for a shell")
    report = commands.add_parser("report", help="write FOLDER/report.md")
    report.add_argument("folder", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    if arguments.command == "machine":
        print("\n".join(f"{k}={shlex.quote(v)}" for k, v in _machine().items()))
        return
    if not (arguments.folder / "parts.tsv").is_file():
        raise UserError(f"{arguments.folder / 'parts.tsv'} is missing; run tools/first_gpu_run.sh")
    text = report_text(arguments.folder)
    (arguments.folder / "report.md").write_text(text, encoding="utf-8")


def _machine() -> dict[str, str]:
    import torch

    from megatron_dwm.config import ModelConfig
    from megatron_dwm.model.layers.choice import choose_layers

    gpus = torch.cuda.device_count()
    device = torch.device("cuda" if gpus else "cpu")
    processes = 1
    while 2 * processes <= min(gpus, _MOST_PROCESSES):
        processes *= 2
    no_tests = "no GPU" if gpus == 0 else ""
    if not no_tests and importlib.util.find_spec("pytest") is None:
        no_tests = "pytest is not installed"
    return {
        "GPUS": str(gpus),
        "PROCESSES": str(processes),
        "SIZES": os.environ.get("SIZES") or ("full" if gpus else "laptop"),
        "NO_FP8": choose_layers(ModelConfig(precision="fp8"), device).reason or "",
        "NO_TESTS": no_tests,
        "TESTS_AT_ONCE": _tests_at_once(),
    }


def _tests_at_once() -> str:
    """Returns pytest's option: each test starts a process, whose imports take most of its time."""
    workers = min(_MOST_PROCESSES, (os.cpu_count() or 1) // 2)
    return f"-n {workers}" if workers > 1 and importlib.util.find_spec("xdist") else ""


def report_text(folder: Path) -> str:
    """Returns the report of the parts that `folder` has."""
    lines = (folder / "parts.tsv").read_text(encoding="utf-8").splitlines()
    parts = {}
    for line in lines:
        name, result, seconds, command = line.split("\t", 3)
        parts[name] = Part(name, result, int(seconds), command)
    from megatron_dwm.runtime.machine import describe_machine

    found = dict(describe_machine())
    blocks = [
        f"# megatron_dwm on {found['devices']}",
        f"Performed by: {os.environ.get('PERFORMED_BY') or '(name, company or team)'}, with "
        "`bash tools/first_gpu_run.sh`.",
        "## Models\n\nRandom Llamas of the sizes that each table states, and a short run on the "
        "sample corpus.",
        "## Hardware\n\n" + _hardware(found),
        "## Results\n\n" + _parts_table(parts.values()),
        *_results(folder, parts),
        *_configurations(folder),
        "## Versions and date\n\n" + _versions(found),
        "## Findings\n\n(anything that surprised you)",
    ]
    text = "\n\n".join(blocks) + "\n"
    # Where things lie on this machine is nobody's business.
    return text.replace(str(folder.resolve()), "WORKDIR").replace(sys.executable, "python")


def _hardware(found: dict[str, str]) -> str:
    rows = [["processor", _processor()]]
    rows += [[name, finding] for name, finding in found.items() if name not in _VERSIONS]
    text = _table(["what", "finding"], rows)
    for command in (["nvidia-smi"], ["nvidia-smi", "topo", "-m"]):
        if shutil.which(command[0]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            text += f"\n\n`{' '.join(command)}`\n\n{_fenced(done.stdout)}"
    return text


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = (
        file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    )
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _parts_table(parts: Iterable[Part]) -> str:
    rows = []
    for part in parts:
        ran = [str(part.seconds), f"`{part.command}`"] if part.ran else ["", ""]
        rows.append([part.name, part.verdict, *ran])
    return _table(["part", "result", "seconds", "command"], rows)


def _results(folder: Path, parts: dict[str, Part]) -> list[str]:
    """Returns a block for every part that was started."""
    blocks = []
    for part in parts.values():
        if not part.ran or part.name == "data":
            continue
        output = (folder / f"{part.name}.out").read_text(encoding="utf-8").strip()
        if part.result != "0":
            errors = (folder / f"{part.name}.err").read_text(encoding="utf-8").splitlines()
            text = _fenced("\n".join([output, *errors[-_ERROR_LINES:]]))
        elif part.name.startswith(("step_", "hypergradient_")):
            text = output
        elif part.name.startswith("dwm_"):
            text = _run_table(folder / "runs" / part.name)
        else:
            text = _fenced(output)
        blocks.append(f"### {part.name}\n\n{text}")
    return blocks


def _run_table(run: Path) -> str:
    """Returns the figures of a short run, from its metrics.jsonl."""
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    steps = [line for line in lines if line["phase"] == "train"]
    updates = [line for line in lines if line["phase"] == "weighting"]
    middle, last = steps[len(steps) // 2], steps[-1]
    rate = (last["tokens"] - middle["tokens"]) / (last["seconds"] - middle["seconds"])
    rows = [
        ["steps, weighting updates", f"{len(steps)}, {len(updates)}"],
        ["loss of the first and the last step", f"{steps[0]['loss']:.3f}, {last['loss']:.3f}"],
        ["tokens a second in the second half, updates included", f"{rate:,.0f}"],
    ]
    if updates:
        what = "target's loss at the first and the last update"
        rows.append([what, f"{updates[0]['val_loss']:.3f}, {updates[-1]['val_loss']:.3f}"])
    return _table(["what", "value"], rows)


def _configurations(folder: Path) -> list[str]:
    """Returns the full configuration of every run."""
    return [
        f"## Configuration of {file.parent.name}\n\n{_fenced(file.read_text(encoding='utf-8'))}"
        for file in sorted(folder.glob("runs/*/config.yaml"))
    ]


def _versions(found: dict[str, str]) -> str:
    import torch

    rows = [["megatron_dwm", _commit()], *([name, found[name]] for name in _VERSIONS)]
    rows.append(["CUDA of torch", str(torch.version.cuda)])
    if torch.cuda.is_available():
        rows.append(["NCCL", ".".join(map(str, torch.cuda.nccl.version()))])
    rows.append(["system", platform.platform()])
    rows.append(["date (UTC)", datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M")])
    return _table(["what", "version"], rows)


def _commit() -> str:
    command = ["git", "-C", str(_REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40"]
    if shutil.which("git") is None:
        return "no git"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "no git checkout"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _fenced(text: str) -> str:
    return f"```\n{text.strip()}\n```"


if __name__ == "__main__":
    run_command(main)
