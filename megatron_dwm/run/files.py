"""The files that a run keeps whole while it goes on, whoever removes them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dwm.config import Config
from megatron_dwm.config.load import save_config
from megatron_dwm.run.records import MetricsWriter, WeightRecorder


class RunFiles:
    """metrics.jsonl, weights/ and config.yaml of a run directory (main process only)."""

    def __init__(self, run_dir: Path, config: Config, warn: Callable[[str], None]) -> None:
        self._run_dir, self._config, self._warn = run_dir, config, warn
        self._place = run_dir.stat()
        self.metrics = MetricsWriter(run_dir, tensorboard=config.logging.tensorboard, warn=warn)
        self.weights = WeightRecorder(run_dir)
        self._said_gone = False

    def write(self, line: dict[str, Any]) -> None:
        """Write a line of metrics.jsonl.

        metrics.jsonl and config.yaml are made again if they were removed: without them the
        directory holds no run that could go on or be read. If the directory itself is gone or
        another, the run ends instead (runtime/stop.py).
        """
        self._make_whole()
        self.metrics.write(line)

    def _make_whole(self) -> None:
        config = self._run_dir / "config.yaml"
        try:
            if not os.path.samestat(self._run_dir.stat(), self._place):
                return
            self.metrics.make_whole()
            if not config.is_file():
                save_config(self._config, config)
                self._warn(f"{config} was removed: it is made again")
        except FileNotFoundError:
            return
        except OSError as error:
            if not self._said_gone:
                self._said_gone = True
                self._warn(
                    f"metrics.jsonl or config.yaml was removed from {self._run_dir} and cannot be "
                    f"made again: {error.strerror}"
                )
