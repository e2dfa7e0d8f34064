"""Curves in Weights & Biases, beside metrics.jsonl; only this file imports the library.

Scalars have Megatron-LM's names where it has one (training.py of Megatron-LM), else `phase/key` as
in TensorBoard. The curves are over `step`, those of updates over `update`. Both are logged as
values: W&B's own count only rises, and a run that returns to a checkpoint takes steps again. A
resumed run goes on in the same run of W&B, whose id is in RUN/wandb_id.txt. Where and whether W&B
sends is up to its own environment (WANDB_MODE=offline keeps all under RUN/wandb). What fails here
ends the curves, never the run.
"""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_dwm.config import Config, UserError
from megatron_dwm.run.tensorboard import Axis

ID_FILE = "wandb_id.txt"
# Ours -> Megatron-LM's.
_MEGATRON = {
    "train/loss": "lm loss",
    "train/lr": "learning-rate",
    "train/grad_norm": "grad-norm",
    "evaluation/loss": "lm loss validation",
}
_INSTALL = "pip install 'megatron-dwm[wandb]'"


def require_wandb(config: Config) -> None:
    """Raise UserError if the run logs to W&B and the library is not installed."""
    project = config.logging.wandb_project
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(f"logging.wandb_project {project}: wandb is not installed; {_INSTALL}")


class WandbBoard:
    """Logs to one run of Weights & Biases."""

    def __init__(self, run_dir: Path, config: Config, warn: Callable[[str], None]) -> None:
        """Start or continue the run; warns if that fails."""
        self._warn = warn
        self._run: Any = None
        self._attempt(lambda: self._start(run_dir, config))

    def add(self, axis: Axis, number: int, scalars: Mapping[str, float]) -> None:
        """Log values of curves; keys are `phase/key`. axis: what `number` counts."""
        named = {_MEGATRON.get(name, name): value for name, value in scalars.items()}
        self._log({axis: number, **named})

    def histogram(self, step: int, name: str, values_n: Tensor) -> None:
        """Log the distribution of values."""

        def log() -> None:
            import wandb

            found = wandb.Histogram(values_n.float().tolist())
            self._run.log({"step": step, name: found})

        if self._run is not None:
            self._attempt(log)

    def images(self, files: Mapping[str, Path]) -> None:
        """Log pictures, by name."""

        def log() -> None:
            import wandb

            self._run.log({name: wandb.Image(str(file)) for name, file in files.items()})

        if self._run is not None:
            self._attempt(log)

    def close(self) -> None:
        """End the run."""
        run, self._run = self._run, None
        if run is not None:
            self._attempt(run.finish)

    def _start(self, run_dir: Path, config: Config) -> None:
        import wandb

        logging, id_file = config.logging, run_dir / ID_FILE
        run_id = id_file.read_text().strip() if id_file.is_file() else secrets.token_hex(4)
        self._run = wandb.init(
            project=logging.wandb_project,
            entity=logging.wandb_entity,
            name=logging.wandb_exp_name or run_dir.name,
            id=run_id,
            resume="allow",
            dir=str(run_dir),
            config=asdict(config),
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="step")
        for phase in ("weighting", "skipped_update"):
            self._run.define_metric(f"{phase}/*", step_metric="update")
        id_file.write_text(f"{run_id}\n")

    def _log(self, values: Mapping[str, Any]) -> None:
        if self._run is not None:
            self._attempt(lambda: self._run.log(dict(values)))

    def _attempt(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            self._run = None
            line = str(error).partition("\n")[0] or type(error).__name__
            self._warn(f"logging.wandb_project: {line}; W&B has no curves from here on")
