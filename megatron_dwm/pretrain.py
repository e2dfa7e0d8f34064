"""Trains a model: `torchrun -m megatron_dwm.pretrain CONFIG.yaml [--section.key value ...]`."""

from __future__ import annotations

from megatron_dwm.config.effect import warnings_of_effect
from megatron_dwm.config.load import Loaded
from megatron_dwm.entry import run_job


def main() -> None:
    """Train one run; see `--help` for every key."""

    def job(loaded: Loaded) -> None:
        from megatron_dwm.run.start import run
        from megatron_dwm.runtime.warn import print_warning
        from megatron_dwm.weighting import method_class

        config = loaded.config
        parts = method_class(config).parts(config)
        for line in warnings_of_effect(config, loaded.given, parts):
            print_warning(line)
        run(config)

    run_job("megatron_dwm.pretrain", job)


if __name__ == "__main__":
    main()
