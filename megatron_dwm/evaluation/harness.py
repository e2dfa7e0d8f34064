"""Runs lm-evaluation-harness: loads tasks and a model, evaluates, reads the results.

No other file of the package imports lm_eval. Metrics and standard errors are the harness's own.
Cost: some seconds of import, then one forward pass for each question (or answer) and each number of
shots.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from megatron_dwm.config import UserError
from megatron_dwm.config.printing import printable
from megatron_dwm.evaluation.data_files import (
    dataset_of,
    hub_is_reachable,
    missing_data,
    with_own_files,
)
from megatron_dwm.evaluation.digests import TaskDigests, digests_of
from megatron_dwm.evaluation.scores import Score
from megatron_dwm.evaluation.suites import BundledTasks, LocalTasks, require_known
from megatron_dwm.files.command_names import name_of_command

_LOUDNESS = {
    # Warnings about defaults that are wanted here.
    "lm_eval.api.task": logging.ERROR,
    "lm_eval.evaluator": logging.ERROR,
    # Warnings about texts longer than the model's context, which the harness truncates.
    "transformers.tokenization_utils_base": logging.ERROR,
    # Errors that the user also gets as an exception.
    "datasets.packaged_modules": logging.CRITICAL,
}


def run_harness(
    model: Path,
    tasks: BundledTasks | LocalTasks,
    *,
    num_fewshot: Sequence[int],
    limit: int | None,
    batch_size: int,
) -> list[Score]:
    """Returns every metric of every task for each number of shots.

    Args:
        model: Hugging Face directory.
        tasks: what to run.
        num_fewshot: numbers of solved examples before each question; every task runs once for each.
        limit: first examples of each task to use; None uses all.
        batch_size: questions in one forward pass.

    Raises:
        UserError: the directory has no model, a task is unknown or broken, or data is missing.
    """
    _require_model(model)
    _prepare_environment(offline=_is_offline(tasks))
    try:
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"evaluation needs the extra `eval` ({error}): pip install -e '.[eval]'"
        ) from error
    specs: Sequence[str | dict[str, Any]]
    if isinstance(tasks, LocalTasks):
        _require_readable(tasks.directory)
        manager = TaskManager(include_path=str(tasks.directory), include_defaults=False)
        specs = _local_specs(tasks, manager)
    else:
        manager = TaskManager()
        specs = _bundled_specs(tasks, manager, few_shot=max(num_fewshot) > 0)
    # Checked before the model is loaded, which may take long.
    _require_data(manager, specs)
    # With an unknown device it takes a GPU if there is one; its default fails without a GPU.
    language_model = HFLM(pretrained=str(model), device="auto", batch_size=batch_size)
    _hide_bars_without_terminal(language_model)
    scores: list[Score] = []
    for shots in num_fewshot:
        print(f"evaluating {printable(model)} with {shots} shots", file=sys.stderr)
        # The harness would print on stdout, before our table.
        with redirect_stdout(sys.stderr), _count_truncations(shots), _explain_missing_fields():
            loaded = _tasks_with_shots(_load_tasks(manager, specs), shots)
            results = evaluate(language_model, {"tasks": loaded}, limit=limit, log_samples=False)
        digests = {
            name: digests_of(task.dump_config(), task.instances) for name, task in loaded.items()
        }
        scores += read_scores(results, digests)
    return scores


def _require_model(model: Path) -> None:
    if not (model / "config.json").is_file() or not any(model.glob("*.safetensors")):
        raise UserError(
            f"--model {model}: not a Hugging Face model directory (config.json and "
            f"*.safetensors); make one with {name_of_command('convert')} to-hf"
        )


def _is_offline(tasks: BundledTasks | LocalTasks) -> bool:
    if isinstance(tasks, LocalTasks) or tasks.data_dir is not None:
        return True
    if os.environ.get("HF_HUB_OFFLINE") or hub_is_reachable():
        return False
    print("the Hugging Face hub does not answer: only cached data sets are used", file=sys.stderr)
    return True


def _prepare_environment(*, offline: bool) -> None:
    """Settings that the harness's libraries read when they are imported."""
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    for name, level in _LOUDNESS.items():
        logging.getLogger(name).setLevel(level)


def _hide_bars_without_terminal(language_model: Any) -> None:
    """Hide the harness's progress bars, which ignore TQDM_DISABLE, in log files."""
    if sys.stderr.isatty():
        return
    for request in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        quiet = partial(getattr(language_model, request), disable_tqdm=True)
        setattr(language_model, request, quiet)


@contextmanager
def _count_truncations(shots: int) -> Iterator[None]:
    """Print one line for all questions longer than the model, instead of one for each."""
    count = 0

    def drop_and_count(record: logging.LogRecord) -> bool:
        nonlocal count
        truncation = record.getMessage().startswith("Combined length of context")
        count += truncation
        return not truncation

    logger = logging.getLogger("lm_eval.models.huggingface")
    logger.addFilter(drop_and_count)
    try:
        yield
    finally:
        logger.removeFilter(drop_and_count)
    if count:
        print(
            f"{count} questions with {shots} shots are longer than the model's context; "
            "their beginning was cut off",
            file=sys.stderr,
        )


@contextmanager
def _explain_missing_fields() -> Iterator[None]:
    """Raise UserError if a record lacks a field that the task's template uses."""
    from jinja2.exceptions import UndefinedError

    try:
        yield
    except UndefinedError as error:
        raise UserError(
            f"a record of the data lacks a field that its task uses: {error}; correct the "
            "data or the task file"
        ) from error


def _require_readable(directory: Path) -> None:
    """Raise UserError for a task file that cannot be read; the harness skips it silently."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(directory.rglob("*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # YAML's errors and the loader's own
            raise UserError(f"{path}: not a task file: {_one_line(error)}") from error


def _local_specs(tasks: LocalTasks, manager: Any) -> list[dict[str, Any]]:
    """Returns the tasks' complete configurations, with absolute paths of their data files."""
    known = tuple(manager.all_subtasks)
    if not known:
        raise UserError(
            f"--tasks-dir {tasks.directory}: no task files in it; expected *.yaml with a `task`"
        )
    require_known(tasks.names, known, str(tasks.directory))
    names = tasks.names or known
    if tasks.data is not None and len(names) > 1:
        raise UserError(
            f"--data is for one task, and there are {', '.join(names)}; choose one with --tasks"
        )
    return [_local_spec(manager.task_index[name], tasks.data) for name in names]


def _local_spec(entry: Any, data: Path | None) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    spec = load_yaml(entry.yaml_path)
    options = spec.get("dataset_kwargs") or {}
    files = options.get("data_files")
    if files is None and data is None:
        return spec
    if data is not None:
        split = spec.get("test_split") or spec.get("validation_split") or "test"
        files = {split: str(data.resolve())}
    elif isinstance(files, Mapping):
        files = {split: _absolute(value, entry) for split, value in files.items()}
    else:
        files = _absolute(files, entry)
    return {**spec, "dataset_kwargs": {**options, "data_files": files}}


def _absolute(files: Any, entry: Any) -> Any:
    """Returns file names that are relative to the task file as absolute ones."""
    if not isinstance(files, str):
        return [_absolute(name, entry) for name in files]
    if "://" in files:
        return files
    path = (entry.yaml_path.parent / files).resolve()
    if not any(character in files for character in "*?[") and not path.is_file():
        raise UserError(
            f"{entry.yaml_path}: its data file {path} is missing; name another with --data"
        )
    return str(path)


def _bundled_specs(
    tasks: BundledTasks, manager: Any, *, few_shot: bool
) -> list[str | dict[str, Any]]:
    """Returns the tasks' names, or, with the user's data files, their complete configurations."""
    if tasks.data_dir is None:
        return list(tasks.names)
    specs: list[str | dict[str, Any]] = []
    missing = {}
    for name in tasks.names:
        try:
            specs.append(with_own_files(_spec(manager, name), tasks.data_dir, few_shot=few_shot))
        except FileNotFoundError as error:
            missing[name] = str(error)
    if missing:
        raise missing_data(missing, tasks.data_dir)
    return specs


def _spec(manager: Any, name: str) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(manager.task_index[name].yaml_path)


def _require_data(manager: Any, specs: Sequence[str | dict[str, Any]]) -> None:
    """Load every task once. Raises one UserError for all bundled tasks without data."""
    missing = {}
    for spec in specs:
        try:
            _load_tasks(manager, [spec])
        except UserError as error:
            if isinstance(spec, dict):
                raise
            cause = error.__cause__ or error
            # Without a connection the reason is known; any other has to be said.
            reason = "" if isinstance(cause, OSError) else f" ({_one_line(cause)[:120]})"
            missing[spec] = dataset_of(_spec(manager, spec)) + reason
    if missing:
        raise missing_data(missing, None)


def _load_tasks(manager: Any, specs: Sequence[str | dict[str, Any]]) -> dict[str, Any]:
    """Returns the harness's tasks by name."""
    loaded: dict[str, Any] = {}
    for spec in specs:
        try:
            loaded |= manager.load([deepcopy(spec)])["tasks"]
        except Exception as error:  # the data set library raises many kinds
            raise UserError(_explain(spec, error)) from error
    return loaded


def _tasks_with_shots(tasks: dict[str, Any], shots: int) -> dict[str, Any]:
    """Returns the same tasks, set to `shots` as `lm_eval.simple_evaluate` sets them.

    A task whose own file says 0 stays at 0. (`simple_evaluate` itself also runs git in the working
    directory, which prints a complaint if that is not a repository.)
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    for task in tasks.values():
        if task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return tasks


def _explain(spec: str | dict[str, Any], error: Exception) -> str:
    if isinstance(spec, str):
        return f"task {spec} cannot be loaded: {_one_line(error)}"
    files = spec.get("dataset_kwargs", {}).get("data_files")
    return f"task {spec['task']} (data {files}) cannot be loaded: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:300]


def read_scores(
    results: Mapping[str, Any], digests: Mapping[str, TaskDigests] | None = None
) -> list[Score]:
    """Returns the scores in the results of `lm_eval.evaluate`. digests: of its tasks, by name."""
    known = defaultdict(TaskDigests, digests or {})
    return [
        Score(
            task=task,
            num_fewshot=results["n-shot"][task],
            metric=_metric(figures, key),
            value=value,
            standard_error=_standard_error(figures, key),
            higher_is_better=results["higher_is_better"][task][key.partition(",")[0]],
            num_examples=results["n-samples"][task]["effective"],
            task_digest=known[task].task,
            questions_digest=known[task].questions,
        )
        for task, figures in results["results"].items()
        for key, value in figures.items()
        if "," in key and "_stderr," not in key
    ]


def _metric(figures: Mapping[str, Any], key: str) -> str:
    """Returns a metric's name, with the filter of the answers if the task has it with several."""
    metric, _, metric_filter = key.partition(",")
    alone = sum(other.partition(",")[0] == metric for other in figures) == 1
    return metric if alone else f"{metric} ({metric_filter})"


def _standard_error(figures: Mapping[str, Any], key: str) -> float | None:
    metric, _, metric_filter = key.partition(",")
    error = figures.get(f"{metric}_stderr,{metric_filter}")
    return error if isinstance(error, float) else None
