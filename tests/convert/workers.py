"""Runs in separate processes: saves a tiny model, and computes its logits in its layout."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_dwm.config import Config, DataConfig, ModelConfig, ParallelConfig
from megatron_dwm.data import Batch
from megatron_dwm.model import build_llm, resolve_shape
from megatron_dwm.model.on_disk.from_huggingface import load_huggingface
from megatron_dwm.model.on_disk.huggingface_files import open_huggingface
from megatron_dwm.model.passes.predictions import forward_logits, predict
from megatron_dwm.runtime import Runtime, bring_up


def save(
    directory: str, model: dict, data: dict, tokens: list[int], tensor: int = 1, pipeline: int = 1
) -> Tensor:
    """Write a checkpoint directory; returns logits [1, S, V] of `tokens` under this layout."""
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
    config = Config(model=ModelConfig(**model), data=DataConfig(**data), parallel=parallel)
    with bring_up(parallel, 1) as runtime:
        shape = resolve_shape(config.model)
        llm = build_llm(
            shape,
            config.model,
            parallel,
            runtime,
            sequence_length=config.data.sequence_length,
            seed=3,
        )
        (module,) = llm.modules
        _move_norms(module)
        if runtime.is_main:
            _write_beside(Path(directory), config, dataclasses.asdict(shape))
        runtime.barrier()
        state = {
            "model": module.sharded_state_dict(prefix="model."),
            # Saved beside the tensors, as the optimizer's groups are; not the model's.
            "optimizer": {"param_groups": [{"lr": 0.1}], "step": 7},
        }
        dist_checkpointing.save(state, str(Path(directory) / "llm"))
        return _logits(module, torch.tensor([tokens]), runtime)[..., : shape.vocab_size]


@torch.no_grad()
def _move_norms(module: GPTModel) -> None:
    """Change norm scales from 1 and biases from 0: equal ones could be swapped unnoticed."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            module_name = name.rsplit(".", 2)[-2]
            kind = 0.1 * len(module_name) + 0.1 * (ord(module_name[0]) % 7)
            parameter.add_(torch.linspace(-0.5, kind, len(parameter)).to(parameter.dtype))


def _write_beside(directory: Path, config: Config, shape: dict) -> None:
    (directory / "llm").mkdir(parents=True)
    (directory / "shape.json").write_text(json.dumps(shape))
    (directory / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))


@torch.no_grad()
def _logits(module: GPTModel, tokens_BS: Tensor, runtime: Runtime) -> Tensor:
    """Compute logits by hand: send hidden states to the next stage, gather vocabulary slices."""
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    if not runtime.is_first_stage:
        hidden_SBD = torch.empty(*tokens_BS.T.shape, module.config.hidden_size)
        dist.recv(hidden_SBD, src=runtime.rank - 1)
        module.set_input_tensor(hidden_SBD)
    output = module.eval()(tokens_BS, positions_BS, None).float().contiguous()
    if not runtime.is_last_stage:
        dist.send(output, dst=runtime.rank + 1)
        return output
    return _gather(output, runtime)


def run_huggingface(
    directory: str, tokens: list[list[int]], labels: list[list[int]], parallel: dict
) -> dict[str, Tensor] | None:
    """Load a Hugging Face model into a layout; returns the last stage's logits of `tokens` [B, S].

    logits [B, S, V], and what `predict` finds of every label [B, S]. None on earlier stages.
    """
    source = open_huggingface(Path(directory))
    layout = ParallelConfig(**parallel)
    batch = _batch(torch.tensor(tokens), torch.tensor(labels))
    with bring_up(layout, 1) as runtime:
        llm = build_llm(
            source.shape,
            ModelConfig(),
            layout,
            runtime,
            sequence_length=batch.tokens_BS.shape[1],
            seed=3,
        )
        load_huggingface(llm, source)
        parts = [batch.rows(i, i + 1) for i in range(batch.size)]
        slices = forward_logits(llm, parts, lambda _, logits_BSV: logits_BSV.contiguous())
        found = predict(llm, batch, micro_batch_size=1)
        if not runtime.is_last_stage:
            return None
        return {
            "logits": _gather(torch.cat(slices), runtime)[..., : source.shape.vocab_size],
            "log_likelihood": found.log_likelihood_BS,
            "is_likeliest": found.is_likeliest_BS,
        }


def _batch(tokens_BS: Tensor, labels_BS: Tensor) -> Batch:
    size, length = tokens_BS.shape
    return Batch(
        tokens_BS=tokens_BS,
        labels_BS=labels_BS,
        loss_mask_BS=torch.ones(size, length),
        position_ids_BS=torch.arange(length).repeat(size, 1),
        sample_ids_B=torch.arange(size),
        document_ids_U=torch.arange(size),
        domains=("d",) * size,
    )


def _gather(output: Tensor, runtime: Runtime) -> Tensor:
    """Returns the concatenated slices of the vocabulary."""
    slices = [torch.empty_like(output) for _ in range(runtime.tensor_size)]
    dist.all_gather(slices, output, group=runtime.tensor_group)
    return torch.cat(slices, dim=-1)
