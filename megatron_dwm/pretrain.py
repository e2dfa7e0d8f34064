"""`torchrun --nproc-per-node N -m megatron_dwm.pretrain CONFIG.yaml [--section.key value ...]`"""

from __future__ import annotations

from megatron_dwm.config.effect import warnings_of_effect
from megatron_dwm.config.load import Loaded
from megatron_dwm.entry import run_job


def main() -> None:
    """Train one run; see `--help` for every key."""

    def job(loaded: Loaded) -> None:
        from megatron_dwm.training.resume import print_warning  # noqa: PLC0415
        from megatron_dwm.training.run import run  # noqa: PLC0415
        from megatron_dwm.weighting.build import parts_of  # noqa: PLC0415

        config = loaded.config
        for line in warnings_of_effect(config, loaded.given, parts_of(config)):
            print_warning(line)
        run(config)

    run_job("megatron_dwm.pretrain", job)


if __name__ == "__main__":
    main()
