"""Every script of slurm/ on a real Slurm of two nodes, at tiny size: the experiment, preemption,
failures.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.site import CORPUS, STEPS, Site
from tests.training.runs import without_time

pytestmark = pytest.mark.timeout(240)

MODELS = ("uniform", "dwm", "transfer")


@dataclass(frozen=True)
class Experiment:
    """The jobs of one pipeline, by title, and its folder of runs."""

    site: Site
    jobs: dict[str, str]
    runs: Path


@pytest.fixture(scope="session")
def experiment(site: Site) -> Experiment:
    """The paper's main experiment, submitted at once with a tokenizer trained before."""
    tokenizer = site.submit(
        *("train_tokenizer", "--input", site.folder / "corpus" / "*.jsonl"),
        *("--vocab-size", 512, "--output", site.folder / "data" / "my.model"),
    )
    site.cluster.wait(tokenizer, "COMPLETED")
    done = site.run_script(
        *("pipeline.sh", "--name", "paper", "--input", site.folder / "corpus" / "*.jsonl"),
        *("--tokenizer", site.folder / "data" / "my.model", "--metadata-keys", "domain"),
        *("--validation", CORPUS / "validation.jsonl", "--config", site.config),
        *("--target-config", site.target_config, "--shards", 2, "--nodes", 2),
        *("--evaluate", f"--suite local --tasks-dir examples/tasks --data {CORPUS}/lastword.jsonl"),
    )
    assert done.returncode == 0, done.stderr
    jobs = dict(re.findall(r"^(\S+) +job (\d+)", done.stdout, re.MULTILINE))
    return Experiment(site, jobs, site.folder / "runs" / "paper")


def test_the_whole_experiment_runs(experiment: Experiment) -> None:
    cluster, states = experiment.site.cluster, {}
    for title, number in experiment.jobs.items():
        fields = cluster.wait(number, "COMPLETED", "FAILED", "CANCELLED", limit_s=200)
        states[title] = fields["JobState"]
    print("\n".join(f"{title:20}{experiment.jobs[title]:6}{s}" for title, s in states.items()))
    assert set(states.values()) == {"COMPLETED"}, states
    assert len(states) == 2 + 3 * len(MODELS) + 1
    for model in MODELS:
        assert (experiment.runs / "export" / f"{model}.json").is_file()
    assert (experiment.runs / "dwm" / "report" / "loss.png").is_file()


def test_a_preempted_run_ends_as_an_undisturbed_one(experiment: Experiment) -> None:
    """A job of higher priority wants both nodes: the run saves, makes room and is requeued."""
    site = experiment.site
    number = site.pretrain("preempted")
    _wait_for_steps(site, "preempted", 4)
    urgent = site.cluster.run(
        *("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive"),
        *("--output=/dev/null", "--wrap", "sleep 1"),
    ).stdout.strip()
    site.cluster.wait(urgent, "COMPLETED")
    fields = site.cluster.wait(number, "PENDING", "COMPLETED", "FAILED")
    assert fields["JobState"] == "PENDING" and fields["Restarts"] == "1", fields
    assert 4 <= site.steps_of("preempted") < STEPS, "it came too late to test anything"
    _start_now(site, number)
    fields = site.cluster.wait(number, "COMPLETED", "FAILED")
    log = site.log(f"preempted-{number}")
    assert fields["JobState"] == "COMPLETED" and fields["Restarts"] == "1", log
    assert f"of {STEPS} steps: finished" in log
    assert "(SIGUSR2)" in site.rank_log(f"preempted-{number}", 0, 0)
    assert without_time(site.folder / "runs" / "preempted") == without_time(experiment.runs / "dwm")


def _wait_for_steps(site: Site, run: str, steps: int) -> None:
    deadline = time.monotonic() + 60
    while site.steps_of(run) < steps:
        assert time.monotonic() < deadline, run
        time.sleep(0.05)


def _start_now(site: Site, number: str) -> None:
    """Slurm lets a requeued job wait for two minutes; tests do not."""
    site.cluster.run("scontrol", "update", f"JobId={number}", "StartTime=now")
