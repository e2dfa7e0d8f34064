"""Starts processes, devices and Megatron's process groups; the result is a `Runtime`.

`bring_up` is for a `with` block, which a program has. `start` and `Runtime.close` are the same for
a notebook or a session of Python, where no block is open from one cell to the next.
"""

from __future__ import annotations

import atexit
import logging
import os
import random
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_dwm.config import ParallelConfig, UserError
from megatron_dwm.launch import Launch, Launcher, find_launch
from megatron_dwm.runtime.cpu import cuda_redirected_to_cpu
from megatron_dwm.runtime.groups import Group, inner_group_of, side_group_of, tensor_context_group
from megatron_dwm.runtime.peers import Peers, meet


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """This process's device, ranks and process groups (torch.distributed).

    inner_group: the tensor-, context- and pipeline-parallel processes that together train one
        replica of the LLM.
    context_group: the processes with the same parameters and rows, and other parts of each row.
    data_group: the processes with the same place in every replica, which have other rows.
    data_context_group: the processes with the same parameters, over which gradients are summed and
        a sharded optimizer is split: data_group times context_group.
    tensor_context_group: the processes that compute the same layers of the same rows.
    side_group: a second group of the ranks in pipeline_group, for messages that do not belong to
        the schedule; None without pipeline parallelism.
    peers: the other processes of the job; None if there are none.
    open_until_close: what `close` ends; empty but for the runtime that `start` returns.
    """

    device: torch.device
    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    context_rank: int
    context_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    inner_rank: int
    inner_size: int
    tensor_group: Group
    context_group: Group
    pipeline_group: Group
    data_group: Group
    data_context_group: Group
    tensor_context_group: Group
    inner_group: Group
    side_group: Group | None
    peers: Peers | None
    open_until_close: ExitStack = field(default_factory=ExitStack, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """True for the process that writes files and prints; it is rank 0."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        """True if this rank holds the input embedding."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True if this rank holds the output layer and computes losses."""
        return self.pipeline_rank == self.pipeline_size - 1

    def broadcast_from_last_stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy `tensor` from the last pipeline stage to all stages, in place (collective)."""
        if self.pipeline_size > 1:
            source = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(tensor, source, group=self.pipeline_group)
        return tensor

    def sum_over_context(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over the parts of the rows, in place (collective in the context group)."""
        if self.context_size > 1:
            dist.all_reduce(tensor, group=self.context_group)
        return tensor

    def barrier(self) -> None:
        """Wait for every process of the job (collective)."""
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """End what `start` has started (collective); nothing if it has ended, or after `bring_up`.

        The groups are gone then, and torch.cuda and torchrun's variables are as they were before.
        """
        self.open_until_close.close()


@contextmanager
def bring_up(config: ParallelConfig, seed: int) -> Iterator[Runtime]:
    """Initialize torch.distributed and Megatron's groups for the time of the context.

    The backend is NCCL on GPUs and gloo on CPUs. A process that neither torchrun nor srun has
    started among others is a job of one. After an exception the groups are not destroyed, because a
    peer may be inside a collective that never ends: the process exits, and the launcher ends the
    others. If a collective failed because a peer does not answer, raises LostPeer with its name.
    """
    _quiet_upstream()
    launch = find_launch(os.environ)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", _device_index(launch)) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        # NVIDIA's containers turn TF32 on, with which fp32 products have 10 bits of mantissa.
        torch.set_float32_matmul_precision("highest")
    with (
        _exported(launch),
        nullcontext() if on_gpu else cuda_redirected_to_cpu(),
        _joined(config, on_gpu) as peers,
    ):
        _make_groups(config, on_gpu, seed)
        yield _describe(device, peers, timedelta(seconds=config.timeout_s))
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def start(config: ParallelConfig | None = None, seed: int = 1234) -> Runtime:
    """Returns what `bring_up` yields, for a notebook: it lasts until `close`, or until Python ends.

    config: the layout; by default without tensor, context or pipeline parallelism. One process may
        start again after `close`; a job of several has one address, which serves one start.

    Raises:
        UserError: torch.distributed has been initialized already, by `start` or by another program.
        LostPeer: another process of the job did not start. If one ends later, the collective that
            waits for it raises torch's own error.
    """
    if dist.is_initialized():
        raise UserError(
            "torch.distributed is initialized already: call close() of the runtime that start() "
            "returned before, or, where your program made Megatron-Core's groups, take "
            "runtime_of_running_job()"
        )
    with ExitStack() as stack:
        runtime = stack.enter_context(bring_up(config or ParallelConfig(), seed))
        kept = stack.pop_all()
    atexit.register(_close_at_exit, kept, runtime.world_size)
    return replace(runtime, open_until_close=kept)


def _close_at_exit(kept: ExitStack, world_size: int) -> None:
    """Close, but not after an exception that a peer may not have seen, as in `bring_up`."""
    if world_size == 1 or getattr(sys, "last_value", None) is None:
        kept.close()


@contextmanager
def _joined(config: ParallelConfig, on_gpu: bool) -> Iterator[Peers | None]:
    """Create the default process group; yields the peers, None in a job of one process."""
    backend, timeout = "nccl" if on_gpu else "gloo", timedelta(seconds=config.timeout_s)
    if world_size_from_environment() == 1:
        dist.init_process_group(backend, timeout=timeout)
        yield None
        return
    with meet(config.timeout_s) as (store, peers):
        try:
            dist.init_process_group(
                backend,
                store=store,
                rank=rank_from_environment(),
                world_size=world_size_from_environment(),
                timeout=timeout,
            )
            yield peers
        except Exception as error:
            peers.raise_lost(error)


def _make_groups(config: ParallelConfig, on_gpu: bool, seed: int) -> None:
    """Create Megatron's groups and seed the random generators."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        context_parallel_size=config.context,
        virtual_pipeline_model_parallel_size=(
            config.virtual_stages if config.virtual_stages > 1 else None
        ),
        # On a CPU Megatron's groups are gloo groups already.
        create_gloo_process_groups=on_gpu,
        # Megatron-Core converts it to a timedelta, which is exact for seconds as parts of a minute.
        distributed_timeout_minutes=config.timeout_s / 60,
    )
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _describe(device: torch.device, peers: Peers | None, timeout: timedelta) -> Runtime:
    inner_group = inner_group_of(timeout)
    return Runtime(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        inner_rank=dist.get_rank(inner_group),
        inner_size=dist.get_world_size(inner_group),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        context_group=parallel_state.get_context_parallel_group(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
        data_context_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        tensor_context_group=tensor_context_group(),
        inner_group=inner_group,
        side_group=side_group_of(timeout, device),
        peers=peers,
    )


def runtime_of_running_job(timeout_s: float = 600.0) -> Runtime:
    """Returns the runtime of a job whose groups Megatron-Core has made already (collective).

    timeout_s: seconds that a rank waits for the others in the groups that are made here.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    return _describe(device, None, timedelta(seconds=timeout_s))


def _device_index(launch: Launch) -> int:
    """Returns the number of this rank's GPU among those that it sees.

    With --gpus-per-task, srun shows every rank its own GPU only.
    """
    own_only = launch.launcher is Launcher.SRUN and torch.cuda.device_count() == 1
    return 0 if own_only else launch.local_rank


@contextmanager
def _exported(launch: Launch) -> Iterator[None]:
    """Give torch and Megatron-Core torchrun's variables during the context, if they lack them."""
    if launch.launcher is Launcher.TORCHRUN:
        yield
        return
    values = {
        "RANK": launch.rank,
        "LOCAL_RANK": launch.local_rank,
        "WORLD_SIZE": launch.world_size,
        "MASTER_ADDR": launch.host,
        "MASTER_PORT": launch.port or _free_port(),
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: str(value) for name, value in values.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _quiet_upstream() -> None:
    """Silence Megatron-Core, which warns on every start that optional GPU packages are missing.

    0.19 calls torch's loader in a way that makes torch warn at every load.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    warnings.filterwarnings("ignore", "The argument order of load has been changed")
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)


def world_size_from_environment() -> int:
    """Returns the number of processes in this job; needs no process group."""
    return find_launch(os.environ).world_size


def rank_from_environment() -> int:
    """Returns this process's rank; needs no process group."""
    return find_launch(os.environ).rank
