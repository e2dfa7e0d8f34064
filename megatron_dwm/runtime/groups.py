"""Process groups beside Megatron-Core's, and connections that are made before they are used."""

from __future__ import annotations

from datetime import timedelta
from typing import TypeAlias

import torch
import torch.distributed as dist
from megatron.core import parallel_state

Group: TypeAlias = dist.ProcessGroup


def tensor_context_group() -> Group:
    """Returns the processes that compute the same layers of the same rows."""
    return parallel_state.get_tensor_and_context_parallel_group()


def inner_group_of(timeout: timedelta) -> Group:
    """Returns the group of this rank's replica (collective over the world)."""
    if parallel_state.get_context_parallel_world_size() == 1:
        return parallel_state.get_model_parallel_group()
    # Megatron-Core has no group over all three. Ranks with the same place among the replicas are in
    # one replica.
    replicas: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(replicas, parallel_state.get_data_parallel_rank())
    mine = replicas[dist.get_rank()]
    return _subgroup([rank for rank, replica in enumerate(replicas) if replica == mine], timeout)


def side_group_of(timeout: timedelta, device: torch.device) -> Group | None:
    """Create a second group of this rank's pipeline (collective over the world)."""
    pipeline_group = parallel_state.get_pipeline_model_parallel_group()
    if pipeline_group.size() == 1:
        return None
    group = _subgroup(dist.get_process_group_ranks(pipeline_group), timeout)
    _connect_with_last(group, device)
    return group


def _subgroup(ranks: list[int], timeout: timedelta) -> Group:
    """Create the groups that all ranks ask for; returns this rank's (collective over the world)."""
    ranks_by_process: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(ranks_by_process, ranks)
    groups = sorted(map(list, {*map(tuple, ranks_by_process)}))
    mine, _ = dist.new_subgroups_by_enumeration(groups, timeout=timeout)
    return mine


def _connect_with_last(group: Group, device: torch.device) -> None:
    """Send a number from every rank of `group` to the last one (collective over the group).

    NCCL connects two ranks at the first message between them, and neither returns from that call
    before the other has joined. The first features would be sent while the last stage waits for
    activations of the same rank, so both would wait for ever.
    """
    ranks = dist.get_process_group_ranks(group)
    *others, last = ranks
    number = torch.zeros(1, device=device)
    if dist.get_rank() == last:
        for rank in others:
            dist.recv(number, rank, group=group)
    else:
        dist.send(number, last, group=group)
