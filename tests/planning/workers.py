"""Functions that every process of a job runs: what a real model holds, keeps and sends."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_dwm.config import Config
from megatron_dwm.data import Batch
from megatron_dwm.model import clear_gradients, forward_backward, resolve_shape
from megatron_dwm.model.passes.micro_batch import as_layers_take, attention_borders
from megatron_dwm.model.passes.objective import token_mean, unit
from megatron_dwm.runtime import Runtime, bring_up
from megatron_dwm.testing import random_batch
from megatron_dwm.training import Ahead, Learner, build_learner, read_target
from megatron_dwm.weighting.similarity import Similarity
from tests.planning.runs import configured

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "tools"))

from benchmarks.collectives import CountCalls
from benchmarks.settings import Settings
from benchmarks.subject import OWN, build_subject, opened

# Scalars, and the alignments of the few samples of a test.
_SCALARS_BYTES = 64


def measured(what: str, options: dict[str, Any]) -> Any:
    """Run one measurement; one start of the processes serves them all."""
    measurements = {"holdings": holdings, "kept": kept, "sent": sent, "by_link": by_link}
    return {**measurements, "reading": reading, "reduced": reduced}[what](**options)


def holdings(**options: Any) -> dict[str, int]:
    """Count the bytes of weights, gradient buffers and optimizer state after a step."""
    config = configured(**options)
    with bring_up(config.parallel, seed=1) as runtime:
        learner = _learner(config, runtime)
        llm, optimizer = learner.llm, learner.optimizer
        forward_backward(llm, unit(_batch(config, runtime), 2), denominator=1.0)
        optimizer.step()
        own = {parameter.untyped_storage().data_ptr() for parameter in llm.parameters()}
        state = [main for member in optimizer.chained_optimizers for main in _state(member, own)]
        return {
            "parameters": sum(parameter.numel() for parameter in llm.parameters()),
            "weights": sum(map(_bytes, llm.parameters())),
            "gradients": sum(map(_bytes, _gradients(learner))),
            "optimizer": sum(map(_bytes, state)),
        }


def _gradients(learner: Learner) -> list[Tensor]:
    """Returns the buffers, and the optimizer's gradients that are no views of them."""
    chunks = learner.llm.chunks
    buffers = [buffer.grad_data for chunk in chunks for buffer in chunk.buffers]
    inside = {buffer.untyped_storage().data_ptr() for buffer in buffers}
    groups = [group for each in learner.optimizer.chained_optimizers for group in each.param_groups]
    of_mains = [main.grad for group in groups for main in group["params"]]
    return buffers + [g for g in of_mains if g.untyped_storage().data_ptr() not in inside]


def _state(member: Any, own: set[int]) -> list[Tensor]:
    """Returns moments, and the stepped tensors that are not the model's own memory."""
    found = []
    for group in member.optimizer.param_groups:
        for main in group["params"]:
            moments = member.optimizer.state[main]
            found += [moments["exp_avg"], moments["exp_avg_sq"]]
            if main.untyped_storage().data_ptr() not in own:
                found.append(main)
    return found


def kept(**options: Any) -> int:
    """Count the bytes of the tensors that autograd keeps of one micro-batch's forward pass."""
    config = configured(**options)
    with bring_up(config.parallel, seed=1) as runtime:
        llm = _learner(config, runtime).llm
        own = {parameter.untyped_storage().data_ptr() for parameter in llm.parameters()}
        found: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            address = tensor.untyped_storage().data_ptr()
            if address not in own:
                found[address] = tensor
            return tensor

        batch = _batch(config, runtime).rows(0, config.training.micro_batch_size)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            (part,) = as_layers_take(llm, token_mean(batch, batch.size))
            llm.chunks[0](
                part.tokens_BS,
                part.position_ids_BS,
                None,
                labels=part.labels_BS,
                packed_seq_params=attention_borders(llm, part),
            )
        return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def sent(**settings: Any) -> dict[str, int]:
    """Count the bytes this process sends to torch.distributed in a step and a hypergradient."""
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


def reduced(**options: Any) -> tuple[int, int]:
    """Count (messages, bytes) that this process sends to reduce the gradients of a second pass."""
    config = configured(**options)
    with bring_up(config.parallel, seed=1) as runtime:
        learner = _learner(config, runtime)
        llm, passes = learner.llm, unit(_batch(config, runtime), 2)
        for _ in range(2):
            clear_gradients(llm, learner.optimizer)
            with CountCalls() as counter:
                forward_backward(llm, passes, denominator=1.0)
    sizes = [message.num_bytes for message in counter.traffic.messages]
    sizes = [size for size in sizes if size > _SCALARS_BYTES]
    return len(sizes), sum(sizes)


def reading(**options: Any) -> dict[str, tuple[int, int]]:
    """Count (messages, bytes) of hidden states that this process sends when it reads the target."""
    config = configured(policy="similarity", **options)
    with bring_up(config.parallel, seed=1) as runtime:
        learner, size = _learner(config, runtime), config.training.micro_batch_size
        method = Similarity(config.policy, config.weighting, runtime, size)
        with CountCalls() as counter:
            read_target(learner, method, _batch(config, runtime))
    # Features of a few samples are left out of a plan, and sent over other groups or small.
    smallest = 4 * size * config.data.sequence_length
    links = {"tensor": [], "pipeline": []}
    for message in counter.traffic.messages:
        if message.num_bytes >= smallest and message.name != "broadcast_":
            links["pipeline" if message.name == "send" else "tensor"].append(message.num_bytes)
    return {link: (len(found), sum(found)) for link, found in links.items()}


def by_link(*, passages: int, **settings: Any) -> dict[str, dict[str, tuple[int, int]]]:
    """Count (messages, bytes) of this process on every link in a step and in a weighting update.

    ahead: what an update whose direction comes ahead adds to a step, half of it probed.
    A layout with several tensor, pipeline and data ranks: then a group's ranks say what it is.
    """
    with opened(Settings(**settings)) as runtime:
        subject = build_subject(Settings(**settings), runtime)
        length, vocab_size = settings["sequence"], settings["vocab"]
        sizes = {"rows": passages, "sequence_length": length, "vocab_size": vocab_size}
        subject = replace(subject, val=random_batch(2, runtime, **sizes))
        links = {
            _ranks(runtime.tensor_group): "tensor",
            _ranks(runtime.context_group): "context",
            _ranks(runtime.data_context_group): "data",
            tuple(range(runtime.world_size)): "weighting",
        }
        counts = {}
        half = Ahead(fraction=0.5)
        for name, call in (
            ("step", subject.plain_step),
            ("update", subject.weighting_update),
            ("weighted", lambda: subject.step(OWN)),
            ("ahead", lambda: subject.learning_step(OWN, ahead=half)),
        ):
            with CountCalls() as counter:
                call()
            found: dict[str, tuple[int, int]] = {}
            for message in counter.traffic.messages:
                # Megatron-Core's interleaved schedule sends over the group of all processes.
                link = "pipeline" if message.name == "send" else links.get(message.ranks)
                if link is not None and message.num_bytes > _SCALARS_BYTES:
                    messages, num_bytes = found.get(link, (0, 0))
                    found[link] = (messages + 1, num_bytes + message.num_bytes)
            counts[name] = found
        ahead, weighted = counts["ahead"], counts.pop("weighted")
        for link, (messages, num_bytes) in ahead.items():
            before = weighted.get(link, (0, 0))
            ahead[link] = (messages - before[0], num_bytes - before[1])
        return counts


def _ranks(group: Any) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def _learner(config: Config, runtime: Runtime) -> Learner:
    return build_learner(
        resolve_shape(config.model),
        config.model,
        config.parallel,
        config.training,
        runtime,
        sequence_length=config.data.sequence_length,
        seed=1,
    )


def _batch(config: Config, runtime: Runtime) -> Batch:
    rows, length = config.training.global_batch_size, config.data.sequence_length
    return random_batch(1, runtime, rows=rows, sequence_length=length)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
