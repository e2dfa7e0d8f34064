"""The weighting models of `weighting.load`: one, or one for each stage of the run they come from.

`RUN/weighting/stage_K` names one model. `RUN` or `RUN/weighting` name those of all N stages, for a
frozen model: this run then has N stages of equal length, and its stage K has the model that weighed
stage K of the other run. So at the same fraction of both runs the LLMs, which may differ, are
weighed alike. The first stage of a run that began without a model has uniform weights.

All of them are read at the start and kept in host memory, so that a run does not depend on the
files later on. Memory: N times the model, on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from megatron_dwm.config import Config, UserError
from megatron_dwm.config.load import load_config
from megatron_dwm.weighting.model import (
    MODEL_FILES,
    WeightingModel,
    WeightingShape,
    load_weighting_model,
    read_weighting_shape,
    require_same_input,
)
from megatron_dwm.weighting.schedule import Schedule

_KEY = "weighting.load"


def stage_directories(config: Config) -> list[Path]:
    """Returns the directory of each stage's model; that of one model if it is for the whole run.

    Raises UserError if there is none, if a stage is missing, or if a model that learns would have
    several to start from.
    """
    assert config.weighting.load is not None
    directory = Path(config.weighting.load)
    folder = directory / "weighting" if (directory / "weighting").is_dir() else directory
    stages = _stages(folder)
    if not stages or any((directory / name).exists() for name in MODEL_FILES):
        return [directory]
    if stages != list(range(1, len(stages) + 1)):
        raise UserError(
            f"{_KEY}: {folder} has the models of stages {', '.join(map(str, stages))}; expected "
            "all from stage_1 on: bring back the missing ones, or name one of them"
        )
    last = folder / f"stage_{stages[-1]}"
    if len(stages) > 1 and not config.weighting.frozen:
        raise UserError(
            f"{_KEY}: {folder} has the models of {len(stages)} stages, which only a frozen model "
            f"follows (weighting.frozen true); to learn on, name one, such as {last}"
        )
    _require_all(folder, len(stages))
    if len(stages) > config.training.steps:
        raise UserError(
            f"{_KEY}: {folder} has the models of {len(stages)} stages; expected at most "
            f"training.steps, which is {config.training.steps}: name one, such as {last}"
        )
    return [folder / f"stage_{number}" for number in stages]


def loaded_files(config: Config) -> Iterator[tuple[str, Path]]:
    """Yields the key and the files of a frozen model, which a resumed run must find unchanged.

    A model that learns only starts from its files.
    """
    if config.weighting.load is not None and config.weighting.frozen:
        for directory in stage_directories(config):
            for name in MODEL_FILES:
                yield _KEY, directory / name


def loaded_schedule(config: Config) -> Schedule:
    """Returns the stages of a frozen model: as many as there are models, without updates."""
    steps = config.training.steps
    number = 1 if config.weighting.load is None else len(stage_directories(config))
    return Schedule(steps=steps, borders=tuple(steps * stage // number for stage in range(number)))


def loaded_shape(
    config: Config, wanted: WeightingShape, *, any_vocabulary: bool = False
) -> WeightingShape:
    """Returns the shape of the models, which have the input of `wanted`.

    any_vocabulary: its size is not compared, since the run's tokenizer may not exist yet.
    Raises UserError if one cannot be read, has another input or other sizes than the first.
    """
    directories = stage_directories(config)
    shapes = [read_weighting_shape(directory) for directory in directories]
    if any_vocabulary:
        wanted = replace(wanted, vocab_size=shapes[0].vocab_size)
    for directory, shape in zip(directories, shapes, strict=True):
        require_same_input(directory, shape, wanted)
        if shape != shapes[0]:
            raise UserError(
                f"{_KEY}: {directory} has other sizes or another tokenizer than {directories[0]}; "
                "expected the stages of one run"
            )
    return shapes[0]


class StageModels:
    """The models of all stages, in host memory; `put_into` changes the one that is in use."""

    def __init__(self, tensors: list[Mapping[str, Tensor]], schedule: Schedule) -> None:
        """tensors: of each stage, as `Module.state_dict` names them."""
        self._tensors, self._schedule = tensors, schedule
        self._stage: int | None = None

    def put_into(self, model: WeightingModel, step: int) -> None:
        """Give `model` the parameters of the stage of step `step` (from 0)."""
        stage = self._schedule.stage(step)
        if stage != self._stage:
            model.load_state_dict(self._tensors[stage - 1])
            self._stage = stage

    def forget(self) -> None:
        """Put the parameters in anew before the next step: the model has others now."""
        self._stage = None


def load_models(
    config: Config, wanted: WeightingShape
) -> tuple[WeightingModel, StageModels | None]:
    """Returns the model of the first stage, and those of all stages; None if it is the only one.

    Raises UserError as `loaded_shape`.
    """
    shape = loaded_shape(config, wanted)
    models = [load_weighting_model(directory, wanted) for directory in stage_directories(config)]
    if len(models) == 1:
        return models[0], None
    stages = StageModels([model.state_dict() for model in models], loaded_schedule(config))
    model = WeightingModel(shape)
    stages.put_into(model, 0)
    return model, stages


def _stages(folder: Path) -> list[int]:
    """Returns the numbers of the stages that have a folder, ascending."""
    if not folder.is_dir():
        return []
    ends = [path.name.removeprefix("stage_") for path in folder.glob("stage_*") if path.is_dir()]
    return sorted(int(end) for end in ends if end.isdigit())


def _require_all(folder: Path, found: int) -> None:
    """Raise UserError if the run that learned the models has stages that it has not reached."""
    file = folder.parent / "config.yaml"
    if not file.is_file():
        return
    weighting = load_config([str(file)]).weighting
    staged = weighting.mode == "staged" and not weighting.frozen
    if staged and found != weighting.stages:
        raise UserError(
            f"{_KEY}: {folder} has the models of {found} stages, and its run has "
            f"{weighting.stages} ({file}): let it end, or name one of them"
        )
