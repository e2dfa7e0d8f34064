"""Every script of slurm/ on a real Slurm of two nodes, at tiny size: the experiment, preemption,
failures.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.site import CORPUS, STEPS, Site
from tests.small_runs.command import without_time

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
    return Experiment(site, _submit_experiment(site), site.folder / "runs" / "paper")


def _submit_experiment(site: Site) -> dict[str, str]:
    """Returns the numbers of the jobs, by title."""
    done = site.run_script(
        *("pipeline.sh", "--name", "paper", "--input", site.folder / "corpus" / "*.jsonl"),
        *("--tokenizer", site.folder / "data" / "my.model", "--metadata-keys", "domain"),
        *("--validation", CORPUS / "validation.jsonl", "--config", site.config),
        *("--target-config", site.target_config, "--shards", 2, "--nodes", 2),
        *("--evaluate", f"--suite local --tasks-dir examples/tasks --data {CORPUS}/lastword.jsonl"),
    )
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^(\S+) +job (\d+)", done.stdout, re.MULTILINE))


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
    # Slurm signals the nodes one after the other, so rank 0 may hear of it from its peer.
    stopped = site.rank_log(f"preempted-{number}", 0, 0)
    assert "(SIGUSR2)" in stopped or "(a signal to another rank)" in stopped
    assert without_time(site.folder / "runs" / "preempted") == without_time(experiment.runs / "dwm")


def test_a_chain_goes_on_after_a_signal_without_requeueing(experiment: Experiment) -> None:
    """Two jobs of one name, one after the other; a third finds nothing to do."""
    site = experiment.site
    first = site.pretrain("chain")
    later = [site.pretrain("chain", "--dependency=singleton") for _ in range(2)]
    _wait_for_steps(site, "chain", 4)
    site.cluster.run("scancel", "--signal=USR2", first)
    fields = [site.cluster.wait(number, "COMPLETED", "FAILED") for number in (first, *later)]
    logs = [site.log(f"chain-{number}") for number in (first, *later)]
    assert [f["JobState"] for f in fields] == ["COMPLETED"] * 3, logs
    assert [f["Restarts"] for f in fields] == ["0"] * 3, logs
    assert "the next job of the chain goes on" in logs[0]
    assert all("finished" in log for log in logs[1:])
    assert "nothing to do" in logs[2]
    assert without_time(site.folder / "runs" / "chain") == without_time(experiment.runs / "dwm")


def test_a_cancelled_run_has_saved_and_does_not_come_back(experiment: Experiment) -> None:
    site = experiment.site
    number = site.pretrain("cancelled")
    _wait_for_steps(site, "cancelled", 4)
    site.cluster.run("scancel", number)
    fields = site.cluster.wait(number, "CANCELLED", "PENDING", "COMPLETED", "FAILED")
    log = site.log(f"cancelled-{number}")
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0"), log
    assert "this job was cancelled: not requeued" in log
    assert "checkpoint step_" in log.splitlines()[-1], log


def test_a_waiting_job_of_another_run_ends_nothing(experiment: Experiment) -> None:
    """Two runs of one name: the first is requeued, though a job of its name waits."""
    site = experiment.site
    first = site.pretrain("first", "--job-name=same")
    second = site.pretrain("second", "--job-name=same")
    _wait_for_steps(site, "first", 4)
    site.cluster.run("scancel", "--signal=USR2", first)
    fields = site.cluster.wait(first, "PENDING", "COMPLETED", "FAILED")
    assert fields["JobState"] == "PENDING", site.log(f"same-{first}")
    site.cluster.run("scancel", first, second)


def test_the_same_experiment_again_has_nothing_to_do(experiment: Experiment) -> None:
    """As after the failure of a part; an array's logs have the numbers of its tasks."""
    site, title = experiment.site, experiment.jobs
    assert "0 rejected" in site.log(f"paper-preprocess-{title['preprocess']}_1")
    for number in title.values():
        site.cluster.wait(number, "COMPLETED", limit_s=200)
    again = _submit_experiment(site)
    for name, number in again.items():
        fields = site.cluster.wait(number, "COMPLETED", "FAILED", "CANCELLED", limit_s=200)
        assert fields["JobState"] == "COMPLETED", name
    done = [name for name in again if name not in ("preprocess", "report")]
    assert all("nothing to do" in site.log(f"paper-{name}-{again[name]}") for name in done)


def test_a_mistake_ends_the_chain_in_one_line(experiment: Experiment) -> None:
    """A prefix that is not there: no requeue, and the job that depends on it is cancelled."""
    site = experiment.site
    number = site.pretrain("mistake", arguments=("--data.train", "/no/such/prefix"))
    after = site.submit(f"--dependency=afterok:{number}", "convert", "to-hf", "x", "--output", "y")
    fields = site.cluster.wait(number, "FAILED", "COMPLETED")
    assert (fields["ExitCode"], fields["Restarts"]) == ("2:0", "0")
    assert site.cluster.wait(after, "CANCELLED", "COMPLETED")["JobState"] == "CANCELLED"
    log = site.log(f"mistake-{number}").splitlines()
    assert [line for line in log if line.startswith("error: ")] == log[-1:], log
    assert "/no/such/prefix" in log[-1] and "not requeued" in log[-2], log


def test_documents_are_selected(experiment: Experiment) -> None:
    """After the experiment's jobs have written the data; a missing prefix is the user's mistake."""
    site = experiment.site
    site.cluster.wait(experiment.jobs["merge"], "COMPLETED")
    data, tokens = site.folder / "data", ("--tokens", 2000)
    chosen = ("--output-prefix", data / "part")
    words = ("select", "random", "--input", data / "paper_text_document", *chosen, *tokens)
    number = site.submit(*words)
    assert site.cluster.wait(number, "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    assert (data / "part.select.json").is_file() and (data / "part.idx").is_file()
    failed = site.submit("select", "random", "--input", data / "no", *chosen, *tokens)
    fields = site.cluster.wait(failed, "FAILED", "COMPLETED")
    assert fields["ExitCode"] == "2:0" and "error: " in site.log(f"select-{failed}")


def test_a_dead_dependency_cancels_the_job(experiment: Experiment) -> None:
    site = experiment.site
    failed = site.submit("merge", "--input", "/no/such/*.idx", "--output-prefix", "x")
    assert site.cluster.wait(failed, "FAILED", "COMPLETED")["ExitCode"] == "2:0"
    assert "error: merge: no file matches /no/such/*.idx" in site.log(f"merge-{failed}")
    after = site.submit(f"--dependency=afterok:{failed}", "report", "x")
    assert site.cluster.wait(after, "CANCELLED", "COMPLETED")["JobState"] == "CANCELLED"


def test_a_full_disk_ends_the_chain_in_one_line(experiment: Experiment, tmp_path: Path) -> None:
    site, mount = experiment.site, ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs"]
    if subprocess.run([*mount, str(tmp_path)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs rights that this process has not")
    try:
        number = site.submit(
            *("--array=0-1", "preprocess", "--input", site.folder / "corpus" / "*.jsonl"),
            *("--tokenizer-type", "SentencePieceTokenizer", "--append-eod"),
            *("--tokenizer-model", site.folder / "data" / "my.model"),
            *("--output-prefix", tmp_path / "full"),
        )
        after = site.submit(f"--dependency=afterok:{number}", "report", "x")
        assert site.cluster.wait(after, "CANCELLED", "COMPLETED")["JobState"] == "CANCELLED"
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
    logs = [file.read_text() for file in site.folder.glob("logs/preprocess-*.log")]
    errors = [line for log in logs for line in log.splitlines() if line.startswith("error: ")]
    assert errors and all("No space left on device" in line for line in errors), logs


def test_a_partition_that_does_not_exist_is_one_line(experiment: Experiment) -> None:
    site = experiment.site
    site.write_settings(partition="no_such")
    done = site.run_script("submit.sh", "pretrain", site.config)
    site.write_settings()
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: pretrain: sbatch refuses: ") and "partition" in line
    assert "DWM_PARTITION" in line, line


def test_a_dead_rank_ends_the_step_and_the_job_goes_on(experiment: Experiment) -> None:
    """The survivor names it at once; the requeued job goes on from the last checkpoint."""
    site = experiment.site
    number = site.pretrain("dead_rank")
    _wait_for_steps(site, "dead_rank", 14)
    [killed] = _processes_of_rank(number, 1)
    os.kill(killed, signal.SIGKILL)
    fields = site.cluster.wait(number, "PENDING", "COMPLETED", "FAILED")
    log = site.log(f"dead_rank-{number}")
    assert fields["JobState"] == "PENDING", log
    errors = [line for line in log.splitlines() if not line.startswith("slurmstepd")]
    assert errors[-1].startswith("error: rank 1 on "), log
    _start_now(site, number)
    assert site.cluster.wait(number, "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    assert without_time(site.folder / "runs" / "dead_rank") == without_time(experiment.runs / "dwm")


def test_a_node_that_goes_down_is_survived(experiment: Experiment) -> None:
    """Slurm itself requeues the job; it goes on from the last checkpoint."""
    site, node = experiment.site, experiment.site.cluster.nodes[1]
    number = site.pretrain("node")
    _wait_for_steps(site, "node", 14)
    site.cluster.kill_node(node)
    # The controller finds it out by itself after SlurmdTimeout and a pause; the test does not wait.
    site.cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    site.cluster.wait(number, "PENDING", limit_s=60)
    site.cluster.start_node(node)
    site.cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
    _start_now(site, number)
    fields = site.cluster.wait(number, "COMPLETED", "FAILED")
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1")
    assert without_time(site.folder / "runs" / "node") == without_time(experiment.runs / "dwm")


def _processes_of_rank(number: str, rank: int) -> list[int]:
    """Returns the process ids of a job's rank."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            variables = (entry / "environ").read_bytes().split(b"\0")
            wanted = {f"SLURM_JOB_ID={number}".encode(), f"SLURM_PROCID={rank}".encode()}
            if wanted <= set(variables) and b"pretrain" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def _wait_for_steps(site: Site, run: str, steps: int) -> None:
    deadline = time.monotonic() + 60
    while site.steps_of(run) < steps:
        assert time.monotonic() < deadline, run
        time.sleep(0.05)


def _start_now(site: Site, number: str) -> None:
    """Slurm lets a requeued job wait for two minutes; tests do not."""
    site.cluster.run("scontrol", "update", f"JobId={number}", "StartTime=now")
