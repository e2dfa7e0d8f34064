"""lm-evaluation-harness: load tasks and a model, run them, read its results.

The only file of the package that imports lm_eval. The harness alone decides what a figure means;
its standard errors are passed on. Cost: some seconds of import, then one forward pass for each
question (or answer) and each number of shots.
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
from megatron_dwm.evaluation.digests import Asked, asked_by
from megatron_dwm.evaluation.scores import Score
from megatron_dwm.evaluation.suites import BundledTasks, LocalTasks, require_known

_LOUDNESS = {
    # Warnings about defaults that we mean to take.
    "lm_eval.api.task": logging.ERROR,
    "lm_eval.evaluator": logging.ERROR,
    # Warnings about texts longer than the model, which the harness cuts.
    "transformers.tokenization_utils_base": logging.ERROR,
    # Errors that reach the user as an exception too.
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
    """Every metric of every task for each number of shots.

    Args:
        model: Hugging Face directory.
        tasks: what to run.
        num_fewshot: numbers of solved examples before each question, each a round of its own.
        limit: first examples of each task to use; None uses all.
        batch_size: questions in one forward pass.

    Raises:
        UserError: no model in the directory, an unknown or broken task, or its data is missing.
    """
    _require_model(model)
    _prepare_environment(offline=_stays_offline(tasks))
    try:
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"evaluation needs the extra `eval` ({error}): pip install -e '.[eval]'"
        ) from error
    if isinstance(tasks, LocalTasks):
        _require_readable(tasks.directory)
        manager = TaskManager(include_path=str(tasks.directory), include_defaults=False)
        specs = _local_specs(tasks, manager)
    else:
        manager = TaskManager()
        specs = _bundled_specs(tasks, manager, few_shot=max(num_fewshot) > 0)
    # Before the model, which may take long to load.
    _require_data(manager, specs, tasks)
    # Asked for a device it does not know, it takes the GPU if there is one; its default insists.
    language_model = HFLM(pretrained=str(model), device="auto", batch_size=batch_size)
    _hide_bars_without_terminal(language_model)
    scores: list[Score] = []
    for shots in num_fewshot:
        print(f"evaluating {printable(model)} with {shots} shots", file=sys.stderr)
        # Its standard output would stand before our table.
        with redirect_stdout(sys.stderr), _truncations_counted(shots), _records_blamed():
            loaded = _tasks_with_shots(_load_tasks(manager, specs), shots)
            results = evaluate(language_model, {"tasks": loaded}, limit=limit, log_samples=False)
        asked = {
            name: asked_by(task.dump_config(), task.instances) for name, task in loaded.items()
        }
        scores += read_scores(results, asked)
    return scores


def _require_model(model: Path) -> None:
    if not (model / "config.json").is_file() or not any(model.glob("*.safetensors")):
        raise UserError(
            f"--model {model}: not a Hugging Face model directory (config.json and "
            "*.safetensors); make one with tools/convert_checkpoint.py to-hf"
        )


def _stays_offline(tasks: BundledTasks | LocalTasks) -> bool:
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
    """These pass their own `disable` to tqdm, over TQDM_DISABLE."""
    if sys.stderr.isatty():
        return
    for request in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        quiet = partial(getattr(language_model, request), disable_tqdm=True)
        setattr(language_model, request, quiet)


@contextmanager
def _truncations_counted(shots: int) -> Iterator[None]:
    """One line for all questions longer than the model, where the harness has one for each."""
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
            "they lost their beginning",
            file=sys.stderr,
        )


@contextmanager
def _records_blamed() -> Iterator[None]:
    """A template that meets a record without its field is the data's or the task file's fault."""
    from jinja2.exceptions import UndefinedError

    try:
        yield
    except UndefinedError as error:
        raise UserError(f"a record of the data lacks what its task asks for: {error}") from error


def _require_readable(directory: Path) -> None:
    """The harness leaves a task file out when it cannot read it, and says nothing."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(directory.rglob("*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # YAML's errors and the loader's own
            raise UserError(f"{path}: not a task file: {_one_line(error)}") from error


def _local_specs(tasks: LocalTasks, manager: Any) -> list[dict[str, Any]]:
    """The tasks' whole configurations, with their data files by absolute path."""
    known = tuple(manager.all_subtasks)
    if not known:
        raise UserError(f"--tasks-dir {tasks.directory}: no task files (*.yaml with a `task`)")
    require_known(tasks.names, known, str(tasks.directory))
    names = tasks.names or known
    if tasks.data is not None and len(names) > 1:
        raise UserError(f"--data is for one task, and there are {', '.join(names)}; use --tasks")
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
    """A file name, or several, relative to the task file."""
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
    """The tasks' names, or with files of the user's own their whole configurations."""
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


def _require_data(
    manager: Any, specs: Sequence[str | dict[str, Any]], tasks: BundledTasks | LocalTasks
) -> None:
    """Load every task once; all bundled ones whose data are missing are named together."""
    missing = {}
    for spec in specs:
        try:
            _load_tasks(manager, [spec])
        except UserError as error:
            if isinstance(spec, dict):
                raise
            cause = error.__cause__
            # Without a connection that is the reason; any other has to be told.
            reason = "" if isinstance(cause, OSError) else f" ({_one_line(cause)[:120]})"
            missing[spec] = dataset_of(_spec(manager, spec)) + reason
    if missing:
        raise missing_data(missing, None)


def _load_tasks(manager: Any, specs: Sequence[str | dict[str, Any]]) -> dict[str, Any]:
    """The harness's tasks by name."""
    loaded: dict[str, Any] = {}
    for spec in specs:
        try:
            loaded |= manager.load([deepcopy(spec)])["tasks"]
        except Exception as error:  # whatever the data set library makes of it
            raise UserError(_explain(spec, error)) from error
    return loaded


def _tasks_with_shots(tasks: dict[str, Any], shots: int) -> dict[str, Any]:
    """The same tasks, freshly loaded, set to `shots` as `lm_eval.simple_evaluate` sets them.

    A task whose own file says 0 stays at 0. (`simple_evaluate` itself would go on to ask git about
    the working directory, which complains on the terminal where there is no repository.)
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


def _one_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:300]


def read_scores(
    results: Mapping[str, Any], asked: Mapping[str, Asked] | None = None
) -> list[Score]:
    """The records in what `lm_eval.evaluate` gives. asked: what its tasks asked, by name."""
    digests = defaultdict(Asked, asked or {})
    return [
        Score(
            task=task,
            num_fewshot=results["n-shot"][task],
            metric=key.partition(",")[0],
            value=value,
            standard_error=_standard_error(figures, key),
            higher_is_better=results["higher_is_better"][task][key.partition(",")[0]],
            num_examples=results["n-samples"][task]["effective"],
            task_digest=digests[task].task,
            questions_digest=digests[task].questions,
        )
        for task, figures in results["results"].items()
        for key, value in figures.items()
        if "," in key and "_stderr," not in key
    ]


def _standard_error(figures: Mapping[str, Any], key: str) -> float | None:
    metric, _, metric_filter = key.partition(",")
    error = figures.get(f"{metric}_stderr,{metric_filter}")
    return error if isinstance(error, float) else None
