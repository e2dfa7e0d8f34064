"""A site file for the tests' cluster, and a tiny experiment on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
import zstandard

from tests.forking.client import REPOSITORY
from tests.slurm.cluster import Cluster

CORPUS = REPOSITORY / "examples" / "corpus"
ROWS = 120
STEPS = 40

_SITE = """
DWM_ACCOUNT={account}
DWM_PARTITION={partition}
DWM_CPU_PARTITION=
DWM_GPUS_PER_NODE=0
DWM_RANKS_PER_NODE=1
DWM_CPUS_PER_RANK=1
DWM_CPUS=1
DWM_GPU=
DWM_TIME=30
DWM_CPU_TIME=10
DWM_SBATCH=()
DWM_SRUN=()
DWM_DATA={folder}/data
DWM_RUNS={folder}/runs
DWM_LOGS={folder}/logs
DWM_MIN_FREE_GB={free_gb}
DWM_CONTAINER=()
dwm_environment() {{
    export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
    . "$DWM_REPOSITORY/.venv/bin/activate"
}}
"""


@dataclass(frozen=True)
class Site:
    """A folder with a site file, configurations and a corpus of two files."""

    cluster: Cluster
    folder: Path

    def __post_init__(self) -> None:
        for name in ("corpus", "data", "runs", "logs"):
            (self.folder / name).mkdir()
        self.write_settings()
        self._write_corpus()
        self._write_configuration()

    def write_settings(
        self, *, account: str = "none", partition: str = "main", free_gb: int = 0
    ) -> Path:
        """Write the site file; returns its path."""
        file = self.folder / "site.sh"
        file.write_text(
            _SITE.format(account=account, partition=partition, free_gb=free_gb, folder=self.folder)
        )
        return file

    @property
    def config(self) -> Path:
        """The configuration of a run with weights, two ranks."""
        return self.folder / "tiny.yaml"

    @property
    def target_config(self) -> Path:
        """The configuration of a run with the weighting model of another, one rank."""
        return self.folder / "target.yaml"

    def run_script(self, script: str, *arguments: object) -> Any:
        """Run a script of slurm/ as a user does."""
        command = ["bash", f"slurm/{script}", *map(str, arguments)]
        site = f"DWM_SITE={self.folder / 'site.sh'}"
        return self.cluster.run("env", site, *command)

    def submit(self, *words: object) -> str:
        """Submit one job; returns its number."""
        done = self.run_script("submit.sh", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def pretrain(self, run: str, *options: str, arguments: tuple[str, ...] = ()) -> str:
        """Submit a run with the experiment's data on two nodes; returns the job's number."""
        return self.submit(
            *("--nodes=2", f"--job-name={run}", *options, "pretrain", self.config),
            *("--run.dir", self.folder / "runs" / run, *arguments),
        )

    def log(self, name: str) -> str:
        """Returns the log of a job, by the name and number that its file has."""
        return (self.folder / "logs" / f"{name}.log").read_text()

    def rank_log(self, name: str, attempt: int, rank: int) -> str:
        """Returns what a rank wrote in an attempt of a job."""
        file = self.folder / "logs" / name / f"attempt_{attempt}" / f"rank_{rank}.log"
        return file.read_text() if file.exists() else ""

    def steps_of(self, run: str) -> int:
        """Returns the number of steps that a run has recorded."""
        file = self.folder / "runs" / run / "metrics.jsonl"
        return file.read_text().count('"phase": "train"') if file.is_file() else 0

    def _write_corpus(self) -> None:
        with zstandard.open(CORPUS / "train.jsonl.zst", "rt", encoding="utf-8") as lines:
            rows = [line for line, _ in zip(lines, range(ROWS), strict=False)]
        for part in range(2):
            file = self.folder / "corpus" / f"part_{part}.jsonl"
            file.write_text("".join(rows[part::2]), encoding="utf-8")

    def _write_configuration(self) -> None:
        prefix = self.folder / "data" / "paper_text_document"
        sections = {
            "parallel": {"tensor": 2, "timeout_s": 60},
            "data": {
                **{"train": [str(prefix)], "tokenizer": str(self.folder / "data/my.model")},
                **{"sequence_length": 32, "domain_key": "domain"},
            },
            "validation": {"path": str(CORPUS / "validation.jsonl")},
            "training": {
                **{"global_batch_size": 8, "micro_batch_size": 4, "steps": STEPS},
                "checkpoint_interval_steps": 10,
            },
            "logging": {"tensorboard": False},
            "policy": {"name": "dwm"},
            "weighting": {"mode": "online", "interval_steps": 3, "warmup_steps": 5},
        }
        self.config.write_text(yaml.safe_dump(sections))
        sections["parallel"]["tensor"] = 1
        self.target_config.write_text(yaml.safe_dump(sections))
