"""The hypergradient for any torch.nn.Module whose parameters enter their modules linearly.

    probe = ModuleProbe(module, optimizer)
    probe.aim(lambda: loss_of(module, validation_batch).backward())
    with probe.attached() as alignments:
        loss_of(module, training_batch).backward()
    optimizer.step()
    alignments.values_n

As library/megatron.py, for one process or torch's DistributedDataParallel (pass the wrapper). A
module f(a; W) that is linear in W has the tangent f(a; Z), which is the module itself called with
its slices of z. So the table has only names: linear, embedding, convolution, norms over features.
Attention, activations and losses have no parameters and need no entry.

The batch is the first dimension of every module's output, [B, ...] or flattened, [B * S, ...].
After the pass the sum of the alignments is compared with <z, g>: a parameter that is used outside
its module (such as F.linear(x, embedding.weight)) is found by that.

`exact` differentiates through the optimizer's next step instead. Cost: as in library/megatron.py,
and two inner products.

A sample whose gradient points along the validation gradient helps:

>>> module = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
>>> probe = ModuleProbe(module, torch.optim.SGD(module.parameters(), lr=0.1))
>>> probe.aim(lambda: module(torch.tensor([[1.0]])).sum().backward())
>>> with probe.attached() as alignments:
...     module(torch.tensor([[2.0], [-3.0]])).mean().backward()
>>> alignments.values_n
tensor([ 1.0000, -1.5000])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from megatron_dwm.bilevel.frozen import frozen_jacobian
from megatron_dwm.bilevel.probe_hooks import AddTangent
from megatron_dwm.library.optimizers import moments_of, relative_rate, require_known, wide
from megatron_dwm.library.results import SampleAlignments
from megatron_dwm.library.torch_step import TorchStep

LINEAR_IN_PARAMETERS: tuple[type[Module], ...] = (
    torch.nn.Linear,
    torch.nn.Embedding,
    torch.nn.LayerNorm,
    torch.nn.RMSNorm,
    torch.nn.GroupNorm,
    torch.nn.Conv1d,
    torch.nn.Conv2d,
    torch.nn.Conv3d,
)
"""classes whose output is linear in their parameters, and for each sample its own"""

# Torch's number of the backward pass that runs, outside of one.
_NONE = -1
# Of the sum of all samples' absolute values: what rounding may change in it.
_CHECK_TOLERANCE = 1e-2


class ModuleProbe:
    """Alignments of the samples of a module and a torch optimizer."""

    def __init__(
        self,
        module: Module,
        optimizer: torch.optim.Optimizer,
        *,
        linear: Sequence[type[Module]] = LINEAR_IN_PARAMETERS,
    ) -> None:
        """Check the module and the optimizer.

        optimizer: AdamW, Adam without weight decay, or SGD without momentum; it says what z is.
        linear: classes that are linear in their parameters; add one of yours to the default.

        Raises:
            ValueError: another optimizer, or one that steps no parameter of the module.
            NotImplementedError: a module has parameters and its class is not in `linear`, or is an
                Embedding with max_norm or scale_grad_by_freq.
        """
        require_known(optimizer)
        self._module, self._optimizer = module, optimizer
        # Gradients are means over the processes.
        wrapped = isinstance(module, DistributedDataParallel)
        group: Any = module.process_group if wrapped else None
        self._group: dist.ProcessGroup | None = group
        self._scale = 1.0 / dist.get_world_size(self._group) if wrapped else 1.0
        self._linear = tuple(linear)
        self._z: dict[int, Tensor] | None = None
        self._probed_modules()  # refuses what it does not know
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(parameter) in stepped for parameter in module.parameters()):
            raise ValueError("ModuleProbe: the optimizer steps no parameter of the module")

    def aim(self, validate: Callable[[], object]) -> None:
        """Compute z from the gradient of a validation pass, which calls backward.

        Drops the gradients before and after. Raises RuntimeError if it leaves no gradient.
        """
        self._optimizer.zero_grad(set_to_none=True)
        validate()
        self._z = {
            id(parameter): self._direction(parameter, group)
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        }
        self._optimizer.zero_grad(set_to_none=True)
        if not self._z:
            raise RuntimeError("ModuleProbe.aim: no gradient: call backward on a validation loss")

    @contextmanager
    def attached(self) -> Iterator[SampleAlignments]:
        """Probe the passes that run during the context, each a micro-batch.

        Raises:
            RuntimeError: without a call of `aim` before, or if a parameter is used outside its
                module, so that alignments would be wrong.
            ValueError: the output of a module is not batch first, or may not be.
        """
        if self._z is None:
            raise RuntimeError("ModuleProbe.attached: call aim with a validation pass before")
        rows, found = _Rows(self._z), SampleAlignments(scale=self._scale)
        before = self._along_z()
        hook = _probed(rows)
        handles = [
            *(
                part.register_forward_hook(hook, with_kwargs=True)
                for part in self._probed_modules()
            ),
            self._module.register_forward_pre_hook(rows.enter, with_kwargs=True),
            self._module.register_forward_hook(rows.leave),
        ]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()
        found.end(rows.values())
        self._check(found.values_n, before)

    def exact(
        self, train: Callable[[], object], validate: Callable[[], object], clip_grad: float = 0.0
    ) -> SampleAlignments:
        """Returns the alignments through the step that `optimizer` would take.

        train, validate: your passes, which call backward; `train` runs twice, on the same batch.
        clip_grad: largest norm, as in torch.nn.utils.clip_grad_norm_; 0 for none.
        Parameters and moments keep their values; the gradients are dropped.
        """
        self._optimizer.zero_grad(set_to_none=True)
        train()
        step = TorchStep.along_gradients(self._optimizer, clip_grad)
        with step.taken():
            self._optimizer.zero_grad(set_to_none=True)
            validate()
        self._z = step.direction()
        self._optimizer.zero_grad(set_to_none=True)
        with self.attached() as found:
            train()
        self._optimizer.zero_grad(set_to_none=True)
        self._z = None
        return found

    def _probed_modules(self) -> list[Module]:
        """Returns the modules with parameters of their own."""
        found = []
        for name, part in self._module.named_modules():
            if not any(True for _ in part.parameters(recurse=False)):
                continue
            _require_tangent(name or "the module", part, self._linear)
            found.append(part)
        return found

    @torch.no_grad()
    def _direction(self, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
        assert parameter.grad is not None
        gradient = wide(parameter.grad.detach()) * relative_rate(self._optimizer, group)
        moments = moments_of(self._optimizer, parameter, group)
        return gradient if moments is None else gradient * frozen_jacobian(moments)

    @torch.no_grad()
    def _along_z(self) -> float:
        """Returns <z, g> of the gradients as they are."""
        assert self._z is not None
        pairs = [
            torch.sum(self._z[id(parameter)].double() * parameter.grad)
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and id(parameter) in self._z
        ]
        return float(sum(pairs))

    def _check(self, values_n: Tensor, before: float) -> None:
        sums = torch.stack([values_n.double().sum(), values_n.double().abs().sum()])
        if self._scale != 1.0:
            dist.all_reduce(sums, group=self._group)
        found, size = sums.tolist()
        along = self._along_z()
        # The loop may have dropped the gradients that were there before.
        missing = min(abs(found - along), abs(found - (along - before)))
        if missing > _CHECK_TOLERANCE * size:
            raise RuntimeError(
                f"the alignments add up to {found:.6g}, and <z, g> is {along:.6g}: a parameter is "
                "used outside the module that owns it, or a module ran outside the probed one"
            )


def _require_tangent(name: str, part: Module, linear: tuple[type[Module], ...]) -> None:
    """Raise NotImplementedError for a module whose output is not linear in its parameters."""
    kind = type(part).__qualname__
    if type(part) not in linear:
        raise NotImplementedError(
            f"{name}: no tangent is known for {kind}; if its output is linear in its parameters, "
            f"sample by sample, pass linear=(*LINEAR_IN_PARAMETERS, {kind})"
        )
    if isinstance(part, torch.nn.Embedding) and (part.max_norm or part.scale_grad_by_freq):
        raise NotImplementedError(
            f"{name}: no tangent is known for an Embedding with max_norm or scale_grad_by_freq"
        )


class _Rows:
    """The samples of the forward pass at hand, and their zeros, whose gradients are alignments."""

    def __init__(self, z: Mapping[int, Tensor]) -> None:
        self._z = z
        self._zeros: list[Tensor] = []
        self._lengths: list[int] = []
        self._at = -1
        self._backward = _NONE  # the last one in which a pass of ours ran back

    def z_of(self, parameter: Tensor) -> Tensor:
        """Returns the slice of z; 0 for a parameter without a validation gradient."""
        found = self._z.get(id(parameter))
        return torch.zeros_like(wide(parameter)) if found is None else found

    def here(self) -> tuple[Tensor, int]:
        """Returns the zeros [B] of the current pass, and the tokens of each sample."""
        if self._at < 0:
            raise RuntimeError("a module ran outside the probed one")
        return self._zeros[self._at], self._lengths[self._at]

    def enter(self, _: Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Begin a pass, forward.

        A pass without gradients has no samples; that of a tangent is one, if the probed module is
        itself linear. A checkpointed module runs again while its pass runs back.
        """
        backward = torch._C._current_graph_task_id()
        if not torch.is_grad_enabled() or (backward != _NONE and backward == self._backward):
            return
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not tensors:
            raise ValueError("the probed module takes no tensor, so the number of samples is open")
        first = tensors[0]
        self._at = len(self._zeros)
        self._lengths.append(first.shape[1] if first.dim() > 1 else 1)
        self._zeros.append(torch.zeros(len(first), device=first.device, requires_grad=True))

    def leave(self, _: Module, __: tuple[Any, ...], output: Any) -> None:
        """Note where the backward pass of this one begins: checkpointed modules run again then."""
        number, tensor = self._at, output[0] if isinstance(output, tuple) else output
        if isinstance(tensor, Tensor) and tensor.requires_grad:

            def enter_again(_: Tensor) -> None:
                self._at, self._backward = number, torch._C._current_graph_task_id()

            tensor.register_hook(enter_again)

    def values(self) -> Tensor:
        """Returns [n], in the order of the passes."""
        if not any(z.grad is not None for z in self._zeros):
            raise RuntimeError("no forward and backward pass of the probed module ran")
        return torch.cat([z.grad if z.grad is not None else z.detach() for z in self._zeros])


def _probed(rows: _Rows) -> Callable[..., Any]:
    """Returns torch's forward hook for a module that is linear in its parameters."""

    def hook(module: Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        if not (torch.is_grad_enabled() and output.requires_grad):
            return output
        zeros_B, length = rows.here()
        z = {name: rows.z_of(part) for name, part in module.named_parameters(recurse=False)}

        def tangent(gradient: Tensor, kept: Tensor, _: object) -> Tensor:
            inputs = wide(kept) if kept.is_floating_point() else kept
            with torch.autocast(gradient.device.type, enabled=False):
                moved = functional_call(module, z, (inputs,))
            return _by_sample(wide(gradient) * moved, len(zeros_B), length)

        kept = args[0] if args else kwargs["input"]
        if isinstance(module, torch.nn.Embedding):
            _require_samples(kept, len(zeros_B), length)
        return AddTangent.apply(output, zeros_B, kept, tangent, None)

    return hook


def _require_samples(ids: Tensor, count: int, length: int) -> None:
    """Raise ValueError for ids of positions that can be taken for one of each sample."""
    if ids.dim() == 1 and len(ids) == count == length > 1:
        raise ValueError(
            f"an Embedding's ids are {list(ids.shape)} in a batch of {count} samples of {length} "
            "tokens: they may be of the samples or of the positions; give them a batch dimension"
        )


def _by_sample(values: Tensor, count: int, length: int) -> Tensor:
    """Returns [B] from [B, ...], or from the tokens of all samples, [B * S, ...]."""
    if len(values) not in (count, count * length):
        raise ValueError(
            f"a module's output is {list(values.shape)}, expected {count} samples first (or their "
            f"{count * length} tokens); give positions and the like a batch dimension"
        )
    return values.reshape(count, -1).sum(dim=1)
