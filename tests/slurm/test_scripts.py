"""The scripts of slurm/ without a Slurm: the dry run, mistakes, when a job is not requeued."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.forking.client import REPOSITORY

pytestmark = pytest.mark.timeout(120)

CORPUS = REPOSITORY / "examples" / "corpus"
TINY = str(REPOSITORY / "examples" / "tiny.yaml")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The site file that is shipped, with an account and directories of the test."""
    file = tmp_path / "site.sh"
    text = (REPOSITORY / "slurm" / "site.sh").read_text()
    text = text.replace("DWM_ACCOUNT=\n", "DWM_ACCOUNT=none\n").replace("$PWD/", f"{tmp_path}/")
    file.write_text(text.replace("DWM_MIN_FREE_GB=20", "DWM_MIN_FREE_GB=0"))
    return file


def _run(site: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", *command],
        env={**os.environ, "DWM_SITE": str(site), **environment},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )


def _pipeline(site: Path, **changed: str) -> subprocess.CompletedProcess[str]:
    options = {
        **{"name": "paper", "input": str(CORPUS / "*.zst"), "tokenizer": TINY},
        **{"validation": str(CORPUS / "validation.jsonl"), "config": TINY},
        **{"target-config": TINY, "target-nodes": "2", **changed},
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return _run(site, "slurm/pipeline.sh", *words, "--dry-run")


def test_the_dry_run_prints_every_job_and_its_plan(site: Path) -> None:
    site.write_text(site.read_text().replace("GPUS_PER_NODE=8", "GPUS_PER_NODE=1"))
    done = _pipeline(site)
    assert done.returncode == 0 and not done.stderr, done.stderr
    blocks = dict.fromkeys(block.split()[0] for block in done.stdout.strip().split("\n\n"))
    models = ("uniform", "dwm", "transfer")
    assert list(blocks) == [
        *("preprocess", "merge", *models),
        *(f"{what}-{model}" for model in models for what in ("convert", "evaluate")),
        "report",
    ]
    plans = [line for line in done.stdout.splitlines() if "GPU hours" in line]
    assert [line.split(":")[0].strip() for line in plans] == [
        *("1 x h100-80gb", "1 x h100-80gb", "2 x h100-80gb"),
    ]
    assert all("a GPU of" in line and "disk: 2 checkpoints" in line for line in plans)


def test_links_are_jobs_of_one_name(site: Path) -> None:
    """On CPU nodes, which have no plan."""
    site.write_text(site.read_text().replace("GPUS_PER_NODE=8", "GPUS_PER_NODE=0"))
    done = _pipeline(site, links="3")
    assert done.returncode == 0 and not done.stderr, done.stderr
    titles = [block.split("\n")[0] for block in done.stdout.strip().split("\n\n")]
    assert [title for title in titles if title.startswith("dwm")] == [
        *("dwm (after merge)", "dwm (singleton, after dwm)", "dwm (singleton, after dwm)"),
    ]
    assert done.stdout.count("no GPU in slurm/site.sh, so no plan") == 9


def test_a_single_shard_is_not_merged(site: Path) -> None:
    site.write_text(site.read_text().replace("GPUS_PER_NODE=8", "GPUS_PER_NODE=0"))
    done = _pipeline(site, shards="1")
    assert done.returncode == 0 and "dwm (after preprocess)" in done.stdout
    assert "merge" not in done.stdout


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input": "/no/such/*.jsonl"}, "--input: no file matches /no/such/*.jsonl"),
        ({"config": "/no/such.yaml"}, "/no/such.yaml: no such file"),
        ({"shards": "many"}, "--shards: expected a whole number from 1, got 'many'"),
        ({"name": ""}, "--name is missing"),
        ({"nods": "2"}, "unknown option --nods"),
    ],
)
def test_a_mistake_in_the_pipelines_options_is_one_line(
    site: Path, changed: dict[str, str], message: str
) -> None:
    done = _pipeline(site, **changed)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ACCOUNT=none", "ACCOUNT=", "DWM_ACCOUNT is empty; set your account, or none"),
        ("RANKS_PER_NODE=8", "RANKS_PER_NODE=two", "DWM_RANKS_PER_NODE: expected a whole number"),
        ("MIN_FREE_GB=0", "MIN_FREE_GB=999999999", "GB free, expected 999999999"),
        ('DWM_RUNS="', 'DWM_RUNS="/proc/no', "DWM_RUNS: cannot make /proc/no"),
    ],
)
def test_a_mistake_in_the_site_file_is_one_line(
    site: Path, old: str, new: str, message: str
) -> None:
    text = site.read_text()
    assert old in text
    site.write_text(text.replace(old, new))
    done = _run(site, "slurm/submit.sh", "pretrain", TINY)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_script_that_does_not_exist_is_one_line(site: Path) -> None:
    done = _run(site, "slurm/submit.sh", "--nodes=2", "pretrian", TINY)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: pretrian: no such script; choose one of convert evaluate merge")


# Slurm's commands as a job sees them: ranks that end with a code, nothing pending, a requeue.
_STUBS = {
    "srun": "exit ${CODE}",
    "squeue": "true",
    "scontrol": "echo requeued; kill $PPID; sleep 1",
}


@pytest.mark.parametrize("code", ["1", "137", "138"])
def test_three_attempts_without_a_checkpoint_end_the_job(
    site: Path, tmp_path: Path, code: str
) -> None:
    """So a time limit that is shorter than the start is not tried for ever."""
    for name, line in _STUBS.items():
        stub = tmp_path / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f"#!/bin/bash\n{line}\n")
        stub.chmod(0o755)
    job = {
        **{"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "stuck", "SLURM_JOB_NODELIST": "n1"},
        **{"SLURM_JOB_NUM_NODES": "1", "SLURM_SUBMIT_DIR": str(REPOSITORY), "CODE": code},
    }
    site.write_text(f"{site.read_text()}\ndwm_environment() {{ PATH={tmp_path}/bin:$PATH; }}\n")
    command = ["slurm/pretrain.sbatch", TINY, "--run.dir", str(tmp_path / "run")]
    codes = [_run(site, *command, **job, SLURM_RESTART_COUNT=str(n)) for n in range(3)]
    assert "this job is requeued" in codes[0].stdout and "this job is requeued" in codes[1].stdout
    assert codes[2].returncode == 1
    assert codes[2].stderr.splitlines() == [
        f"error: 3 attempts in a row without a new checkpoint, the last with exit code {code}"
    ]


def test_shellcheck_finds_nothing() -> None:
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed")
    scripts = sorted(
        str(file)
        for pattern in ("slurm/*.sh", "slurm/*.sbatch")
        for file in REPOSITORY.glob(pattern)
    )
    done = subprocess.run([program, "-x", *scripts], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
