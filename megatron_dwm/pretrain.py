"""`torchrun --nproc-per-node N -m megatron_dwm.pretrain CONFIG.yaml [--section.key value ...]`"""

from __future__ import annotations

from megatron_dwm.config import Config
from megatron_dwm.entry import run_job


def main() -> None:
    """Train one run; see `--help` for every key."""

    def job(config: Config) -> None:
        from megatron_dwm.training.run import run  # noqa: PLC0415

        run(config)

    run_job("megatron_dwm.pretrain", job)


if __name__ == "__main__":
    main()
