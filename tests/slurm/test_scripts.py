"""The scripts of slurm/ without a Slurm: the dry run, mistakes, when a job is not requeued."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_dwm.files.run_names import STOPPED
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


def _with_gpus(site: Path, number: int) -> None:
    """So many GPUs a node, and as many ranks, but at least one."""
    text = site.read_text().replace("GPUS_PER_NODE=8", f"GPUS_PER_NODE={number}")
    site.write_text(text.replace("RANKS_PER_NODE=8", f"RANKS_PER_NODE={max(number, 1)}"))


def _one_error(done: subprocess.CompletedProcess[str]) -> str:
    """The only line of a command that ends as after a user's mistake."""
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def _pipeline(site: Path, **changed: str) -> subprocess.CompletedProcess[str]:
    options = {
        **{"name": "paper", "input": str(CORPUS / "[hlv]*.jsonl"), "tokenizer": TINY},
        **{"validation": str(CORPUS / "validation.jsonl"), "config": TINY},
        **{"target-config": TINY, "target-nodes": "2", "shards": "2", **changed},
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return _run(site, "slurm/pipeline.sh", *words, "--dry-run")


def test_the_dry_run_prints_every_job_and_its_plan(site: Path) -> None:
    _with_gpus(site, 1)
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
    _with_gpus(site, 0)
    done = _pipeline(site, links="3")
    assert done.returncode == 0 and not done.stderr, done.stderr
    titles = [block.split("\n")[0] for block in done.stdout.strip().split("\n\n")]
    assert [title for title in titles if title.startswith("dwm")] == [
        *("dwm (after merge)", "dwm (singleton, after dwm)", "dwm (singleton, after dwm)"),
    ]
    assert done.stdout.count("no GPU in slurm/site.sh, so no plan") == 9


def test_a_single_shard_is_not_merged(site: Path) -> None:
    _with_gpus(site, 0)
    done = _pipeline(site, shards="1")
    assert done.returncode == 0 and "dwm (after preprocess)" in done.stdout
    assert "merge" not in done.stdout


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input": "/no/such/*.jsonl"}, "--input: no file matches /no/such/*.jsonl"),
        ({"config": "/no/such.yaml"}, "/no/such.yaml: no such file"),
        ({"shards": "many"}, "--shards: expected a whole number from 1, got 'many'"),
        ({"shards": "4"}, "--shards 4: a file is not cut, and there are 3; take at most as many"),
        ({"name": ""}, "--name is missing"),
        ({"name": "a/b"}, "--name: expected a name for files and jobs, without /, got 'a/b'"),
        ({"nods": "2"}, "unknown option --nods"),
        ({"input": "hf://some/set"}, "--shards 2: hf:// has no files to divide"),
    ],
)
def test_a_mistake_in_the_pipelines_options_is_one_line(
    site: Path, changed: dict[str, str], message: str
) -> None:
    assert message in _one_error(_pipeline(site, **changed))


def test_a_tokenizer_json_and_nested_folders_need_no_more_options(
    site: Path, tmp_path: Path
) -> None:
    _with_gpus(site, 0)
    (tmp_path / "tokenizer.json").write_text("{}")
    for name in ("a/one.jsonl", "a/b/c/two.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    nested, tokenizer = str(tmp_path / "**" / "*.jsonl"), str(tmp_path / "tokenizer.json")
    done = _pipeline(site, input=nested, tokenizer=tokenizer)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_a_mistake_in_a_configuration_ends_the_dry_run_without_a_gpu(
    site: Path, tmp_path: Path
) -> None:
    _with_gpus(site, 0)
    config = tmp_path / "a config.yaml"
    config.write_text(Path(TINY).read_text() + "  wramup_steps: 1\n")
    assert "weighting.wramup_steps" in _one_error(_pipeline(site, config=str(config)))


def test_a_run_that_the_file_stop_ended_can_be_submitted_again(site: Path, tmp_path: Path) -> None:
    _with_gpus(site, 0)
    for model in ("uniform", "dwm", "transfer"):
        (tmp_path / "runs" / "paper" / model).mkdir(parents=True)
        (tmp_path / "runs" / "paper" / model / STOPPED).touch()
    done = _pipeline(site)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.count("no GPU in slurm/site.sh, so no plan") == 3


def test_the_dry_run_plans_a_recipe_that_names_a_weighting_model(site: Path) -> None:
    """The pipeline gives the weighting model itself, once it is there."""
    _with_gpus(site, 8)
    recipes = REPOSITORY / "examples" / "recipes"
    done = _pipeline(
        site,
        config=str(recipes / "llama_370m_dwm.yaml"),
        **{"target-config": str(recipes / "llama_1.3b_transfer.yaml")},
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.count("GPU hours") == 3


def test_the_dry_run_measures_a_corpus_with_spaces(site: Path, tmp_path: Path) -> None:
    _with_gpus(site, 0)
    folder = tmp_path / "a corpus"
    folder.mkdir()
    for name in ("a b.jsonl", "c d.jsonl"):
        (folder / name).write_bytes(b"0" * 2_000_000)
    done = _pipeline(site, input=str(folder / "*.jsonl"))
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "input: 3.9M" in done.stdout


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ACCOUNT=none", "ACCOUNT=", "DWM_ACCOUNT is empty; set your account, or none"),
        ("RANKS_PER_NODE=8", "RANKS_PER_NODE=two", "DWM_RANKS_PER_NODE: expected a whole number"),
        ("MIN_FREE_GB=0", "MIN_FREE_GB=999999999", "GB free, expected 999999999"),
        ('DWM_RUNS="', 'DWM_RUNS="/proc/no', "DWM_RUNS: cannot make /proc/no"),
        ('DWM_RUNS="', 'DWM_RUNS="~', "DWM_RUNS: expected a path from /, got '~"),
        ("DWM_ACCOUNT=none\n", "", "DWM_ACCOUNT is missing"),
        ("DWM_SBATCH=()", "DWM_SBTACH=()\nDWM_SBATCH=()", "DWM_SBTACH: no such setting"),
        ("DWM_SBATCH=()", 'DWM_SBATCH="--a --b"', "DWM_SBATCH: expected words in brackets"),
        ("DWM_SBATCH=()", "DWM_SBATCH=(--export=NONE)", "--export=NONE: jobs need two variables"),
        ("DWM_TIME=24:00:00", "DWM_TIME=", "DWM_TIME is empty"),
        ("DWM_TIME=24:00:00", "DWM_TIME=10", "is told to save ten minutes before its limit"),
        ("DWM_TIME=24:00:00", "DWM_TIME=00:09:30", "is told to save ten minutes before its limit"),
        ("DWM_TIME=24:00:00", "DWM_TIME=24 hours", "hours: command not found"),
        ("DWM_TIME=24:00:00", 'DWM_TIME="24', "unexpected EOF"),
        ("DWM_CPUS=8", "DWM_CPUS=08", "DWM_CPUS: expected a whole number, got '08'"),
        ("DWM_CPUS=8", "DWM_CPUS=0", "DWM_CPUS: expected 1 or more, got 0"),
        ("GPUS_PER_NODE=8", "GPUS_PER_NODE=4", "DWM_RANKS_PER_NODE: expected 4, as many as GPUs"),
        ("dwm_environment()", "dwm_env()", "the function dwm_environment is missing"),
        ("DWM_TIME=24:00:00\n", "DWM_TIME=24:00:00\r\n", "its lines end as on Windows"),
    ],
)
def test_a_mistake_in_the_site_file_is_one_line(
    site: Path, old: str, new: str, message: str
) -> None:
    text = site.read_text()
    assert old in text
    site.write_text(text.replace(old, new), newline="")
    assert message in _one_error(_run(site, "slurm/submit.sh", "pretrain", TINY))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--nodes=2", "pretrian"),
            "pretrian: no such script; choose one of convert",
        ),
        (("--nodes", "2", "pretrain"), "2: no such script"),
        (
            ("pretrain", TINY, "--nodes=2"),
            "--nodes=2: no key of a run; sbatch's options",
        ),
        (("--job-name=a/b", "report"), "--job-name=a/b: a job's log has its name"),
        (("--export=NONE", "report"), "--export=NONE: jobs need two variables"),
    ],
)
def test_a_mistake_in_a_submission_is_one_line(
    site: Path, words: tuple[str, ...], message: str
) -> None:
    assert message in _one_error(_run(site, "slurm/submit.sh", *words))


def test_a_job_that_is_not_submitted_is_one_line(site: Path) -> None:
    line = _one_error(_run(site, "slurm/pretrain.sbatch", TINY))
    assert "submit it: bash slurm/submit.sh pretrain" in line


def test_a_new_job_has_nothing_of_the_one_that_submits_it(site: Path, tmp_path: Path) -> None:
    """Else a job that is no array takes the other's task, and a first attempt is a second."""
    _stub(tmp_path, "sbatch", 'echo "${!SLURM_@}" >&2; echo 7')
    old = {"SLURM_JOB_ID": "3", "SLURM_ARRAY_TASK_ID": "1", "SLURM_RESTART_COUNT": "2"}
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = _run(site, "slurm/submit.sh", "report", "x", **old, SLURM_CONF="/s", PATH=path)
    assert (done.stdout, done.stderr) == ("7\n", "SLURM_CONF\n")


def test_an_output_of_the_same_inputs_is_not_made_again(site: Path, tmp_path: Path) -> None:
    """So that an experiment can be submitted again; other inputs are still refused."""
    log, source, output = tmp_path / "log", tmp_path / "in.idx", tmp_path / "out"
    source.write_text("first")
    _stub(tmp_path, "python", f'echo made >>{log}; echo >"{output}.idx"')
    site.write_text(f"{site.read_text()}\ndwm_environment() {{ PATH={tmp_path}/bin:$PATH; }}\n")
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_SUBMIT_DIR": str(REPOSITORY)}
    words = ("slurm/merge.sbatch", "--input", str(source)[:-4], f"--output-prefix={output}")
    done = [_run(site, *words, **job) for _ in range(2)]
    assert [one.returncode for one in done] == [0, 0], done
    assert log.read_text() == "made\n" and "nothing to do" in done[1].stdout
    source.write_text("second")
    _run(site, *words, **job)
    assert log.read_text() == "made\nmade\n"


@pytest.mark.parametrize("form", ["{} {}", "{}={}"])
def test_an_output_of_a_changed_model_is_made_again(site: Path, tmp_path: Path, form: str) -> None:
    """However the options are written; without an output there is nothing to remember."""
    log, model, output = tmp_path / "log", tmp_path / "model", tmp_path / "scores.json"
    model.mkdir()
    _stub(tmp_path, "python", f'echo made >>{log}; echo >"{output}"')
    site.write_text(f"{site.read_text()}\ndwm_environment() {{ PATH={tmp_path}/bin:$PATH; }}\n")
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_SUBMIT_DIR": str(REPOSITORY)}
    pairs = (("--output", output), ("--model", model))
    words = [word for pair in pairs for word in form.format(*pair).split()]
    for content, made in (("first", 1), ("first", 1), ("second one", 2)):
        (model / "weights").write_text(content)
        os.utime(model / "weights", (1, 1))
        done = _run(site, "slurm/evaluate.sbatch", *words, **job)
        assert done.returncode == 0, done.stderr
        assert log.read_text() == "made\n" * made
    done = _run(site, "slurm/evaluate.sbatch", *form.format(*pairs[1]).split(), **job)
    assert done.returncode == 0 and log.read_text() == "made\n" * 3
    assert not (REPOSITORY / ".made_from").exists()


def _stub(folder: Path, name: str, line: str) -> None:
    """A program in folder/bin."""
    file = folder / "bin" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!/bin/bash\n{line}\n")
    file.chmod(0o755)


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
