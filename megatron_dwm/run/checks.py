"""All checks of a run that need no process group and no model."""

from __future__ import annotations

from megatron_dwm.config import Config
from megatron_dwm.config.validate import validate_config
from megatron_dwm.data.checks import check_data
from megatron_dwm.model.builders.build import require_builder
from megatron_dwm.model.shape import LlamaShape, heads_of
from megatron_dwm.run.inputs import (
    RunInputs,
    open_held_out,
    open_model_and_tokenizer,
    open_target,
)
from megatron_dwm.run.reads import training_reads, update_reads
from megatron_dwm.run.reference import check_reference
from megatron_dwm.run.wandb_board import require_wandb
from megatron_dwm.runtime import world_size_from_environment
from megatron_dwm.runtime.profiling import check_profiling
from megatron_dwm.runtime.warn import print_warning
from megatron_dwm.tokenizer import Tokenizer
from megatron_dwm.weighting import check_method, method_class


def check(config: Config) -> RunInputs:
    """Check the run and return the files that it inputs. Raises UserError for the first mistake."""
    tokenizer, shape = _check_settings(config)
    world_size = world_size_from_environment()
    check_data(config.data, tokenizer, training_reads(config), update_reads(config))
    values = method_class(config).document_values(config)
    target = open_target(config, tokenizer)
    held_out = open_held_out(config, tokenizer)
    for remark in method_class(config).remarks(config, shape, tokenizer):
        print_warning(remark)
    return RunInputs(
        tokenizer=tokenizer,
        shape=shape,
        target=target,
        held_out=held_out,
        reference=check_reference(config, shape, world_size),
        values=values,
        token_losses=method_class(config).token_losses(config),
    )


def check_before_data(config: Config) -> None:
    """Check what does not depend on `data.train`, whose text may take hours to become tokens.

    Raises UserError for the first mistake.
    """
    tokenizer, _ = _check_settings(config)
    open_target(config, tokenizer)
    open_held_out(config, tokenizer)


def _check_settings(config: Config) -> tuple[Tokenizer, LlamaShape]:
    require_builder(config.model.builder)
    tokenizer, shape = open_model_and_tokenizer(config)
    world_size = world_size_from_environment()
    validate_config(config, heads_of(shape), world_size)
    check_method(config, shape.num_layers, world_size)
    check_profiling(config.profiling)
    require_wandb(config)
    return tokenizer, shape
