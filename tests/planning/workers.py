"""Run in every process of a job: what a real model holds, keeps and sends."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_dwm.config import Config
from megatron_dwm.data import Batch
from megatron_dwm.model import LLM, build_llm, forward_backward, resolve_shape
from megatron_dwm.model.passes.objective import unit
from megatron_dwm.runtime import bring_up
from megatron_dwm.training.optimizer import build_optimizer
from tests.planning.runs import configured

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "tools"))

from benchmarks.collectives import CountCalls  # noqa: E402
from benchmarks.settings import Settings  # noqa: E402
from benchmarks.subject import build_subject, opened  # noqa: E402


def measured(what: str, options: dict[str, Any]) -> Any:
    """One start of the processes serves every measurement."""
    return {"holdings": holdings, "kept": kept, "sent": sent}[what](**options)


def holdings(**options: Any) -> dict[str, int]:
    """Bytes of weights, gradient buffers and optimiser state after a step, counted."""
    config = configured(**options)
    with bring_up(config.parallel, seed=1) as runtime:
        llm = _llm(config, runtime)
        optimizer = build_optimizer(config.training, llm, sharded=config.parallel.sharded_optimizer)
        forward_backward(llm, unit(_batch(config, runtime.data_size), 2), denominator=1.0)
        optimizer.step()
        own = {parameter.untyped_storage().data_ptr() for parameter in llm.parameters()}
        state = [main for member in optimizer.chained_optimizers for main in _state(member, own)]
        return {
            "parameters": sum(parameter.numel() for parameter in llm.parameters()),
            "weights": sum(map(_bytes, llm.parameters())),
            "gradients": sum(
                _bytes(buffer.grad_data) for chunk in llm.chunks for buffer in chunk.buffers
            ),
            "optimizer": sum(map(_bytes, state)),
        }


def _state(member: Any, own: set[int]) -> list[Tensor]:
    """Moments, and the tensors that are stepped where they are not the model's own memory."""
    found = []
    for group in member.optimizer.param_groups:
        for main in group["params"]:
            moments = member.optimizer.state[main]
            found += [moments["exp_avg"], moments["exp_avg_sq"]]
            if main.untyped_storage().data_ptr() not in own:
                found.append(main)
    return found


def kept(**options: Any) -> int:
    """Bytes of the different tensors that autograd keeps of one micro-batch's forward pass."""
    config = configured(**options)
    with bring_up(config.parallel, seed=1) as runtime:
        llm = _llm(config, runtime)
        own = {parameter.untyped_storage().data_ptr() for parameter in llm.parameters()}
        found: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            address = tensor.untyped_storage().data_ptr()
            if address not in own:
                found[address] = tensor
            return tensor

        batch = _batch(config, runtime.data_size).rows(0, config.training.micro_batch_size)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            llm.chunks[0](batch.tokens_BS, batch.position_ids_BS, None, labels=batch.labels_BS)
        return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def sent(**settings: Any) -> dict[str, int]:
    """Bytes that this process hands to torch.distributed in a plain step and a hypergradient."""
    with opened(Settings(**settings)) as runtime:
        subject = build_subject(Settings(**settings), runtime)
        counts = {}
        for name, call in (
            ("step", subject.plain_step),
            ("update", lambda: subject.hypergradient("tangent_probe")),
        ):
            with CountCalls() as counter:
                call()
            counts[name] = sum(counter.traffic.num_bytes.values())
        return counts


def _llm(config: Config, runtime: Any) -> LLM:
    return build_llm(
        resolve_shape(config.model),
        config.model,
        config.parallel,
        runtime,
        sequence_length=config.data.sequence_length,
        seed=1,
    )


def _batch(config: Config, replicas: int) -> Batch:
    size = config.training.global_batch_size // replicas
    length = config.data.sequence_length
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, 256, (size, length + 1), generator=generator)
    return Batch(
        tokens_BS=text[:, :-1].contiguous(),
        labels_BS=text[:, 1:].contiguous(),
        loss_mask_BS=torch.ones(size, length),
        position_ids_BS=torch.arange(length).repeat(size, 1),
        sample_ids_B=torch.arange(size),
        document_ids_B=torch.arange(size),
        domains=("d",) * size,
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
