"""Trains a model: `torchrun -m megatron_dwm.pretrain CONFIG.yaml [--section.key value ...]`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_dwm.config import Config, UserError
from megatron_dwm.config.effect import warnings_of_effect
from megatron_dwm.config.load import Loaded
from megatron_dwm.entry import run_job


def main() -> None:
    """Train one run; see `--help` for every key."""

    def job(loaded: Loaded) -> None:
        from megatron_dwm.preprocess.for_run import texts_of, with_prepared_data
        from megatron_dwm.run.checks import check_before_data
        from megatron_dwm.run.start import run
        from megatron_dwm.runtime import rank_from_environment
        from megatron_dwm.runtime.warn import print_warning
        from megatron_dwm.weighting import method_class

        config = loaded.config
        parts = method_class(config).parts(config)
        for line in warnings_of_effect(config, loaded.given, parts):
            print_warning(line)
        if texts_of(config):
            check_before_data(config)
            config = with_prepared_data(config)
        ended = run(config)
        if ended and config.logging.wandb_project is not None and rank_from_environment() == 0:
            _log_pictures(config, print_warning)

    run_job("megatron_dwm.pretrain", job)


def _log_pictures(config: Config, warn: Callable[[str], None]) -> None:
    """Give W&B the report's pictures."""
    from megatron_dwm.report.run_report import Request, write_report
    from megatron_dwm.run.wandb_board import WandbBoard

    run_dir = Path(config.run.dir)
    try:
        files = write_report(Request(run_dir=run_dir))
    except (UserError, ImportError) as error:
        warn(f"logging.wandb_project: no pictures of the report: {error}")
        return
    board = WandbBoard(run_dir, config, warn)
    board.images({f"report/{file.stem}": file for file in files if file.suffix == ".png"})
    board.close()


if __name__ == "__main__":
    main()
