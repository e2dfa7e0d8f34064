"""ModuleProbe against autograd sample by sample, and against torch's own optimizer step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module
from torch.utils.checkpoint import checkpoint

import megatron_dwm
from megatron_dwm import ModuleProbe
from tests.launch import run_ranks
from tests.library.models import Model, sample_losses, text

ROWS = 6
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "two rates": lambda parameters: torch.optim.AdamW(_two_groups(parameters, 1e-4, 3e-3)),
}


def _two_groups(parameters: Iterable[Tensor], *rates: float) -> list[dict[str, Any]]:
    """Every second parameter has the first rate, the others the second."""
    every = list(parameters)
    return [{"params": every[number::2], "lr": rate} for number, rate in enumerate(rates)]


MODELS: list[dict[str, Any]] = [
    {},
    {"tied": True},
    {"recompute": True, "tied": True},
    {"flat": True},
]


def _trained(optimizer: str, **options: Any) -> tuple[Model, torch.optim.Optimizer]:
    """Returns a model in double precision after a few steps."""
    torch.manual_seed(3)
    model = Model(**options).double()
    stepper = OPTIMIZERS[optimizer](model.parameters())
    for number in range(5):
        stepper.zero_grad()
        sample_losses(model, text(number, ROWS)).mean().backward()
        stepper.step()
    return model, stepper


def _gradient(model: Model, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def _group_of(stepper: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    holds = (g for g in stepper.param_groups if any(p is parameter for p in g["params"]))
    return next(holds)


def _largest_rate(stepper: torch.optim.Optimizer) -> float:
    return max(group["lr"] for group in stepper.param_groups)


@pytest.mark.parametrize("options", MODELS, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_alignments_ahead_are_autograds(optimizer: str, options: dict[str, Any]) -> None:
    model, stepper = _trained(optimizer, **options)
    train, validation = text(50, ROWS), text(51, ROWS)
    h = _gradient(model, sample_losses(model, validation).mean())
    z = []
    for parameter, gradient in zip(model.parameters(), h, strict=True):
        if optimizer == "sgd":
            z.append(gradient)
            continue
        state, group = stepper.state[parameter], _group_of(stepper, parameter)
        beta1, beta2 = group["betas"]
        root = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt()
        first = (1 - beta1) / (1 - beta1 ** (state["step"] + 1))
        rate = group["lr"] / _largest_rate(stepper)
        z.append(rate * torch.where(root > 0, first / (root + group["eps"]), 0.0) * gradient)
    losses = sample_losses(model, train)
    expected = [
        sum((a * b).sum() for a, b in zip(z, _gradient(model, loss / ROWS), strict=True))
        for loss in (sample_losses(model, row[None])[0] for row in train)
    ]
    plain = _gradient(model, losses.mean())

    probe = ModuleProbe(model, stepper)
    probe.aim(lambda: sample_losses(model, validation).mean().backward())
    with probe.attached() as alignments:
        # Two micro-batches, whose backward passes come after both forward passes.
        parts = [sample_losses(model, part).sum() / ROWS for part in train.split(ROWS // 2)]
        for part in parts:
            part.backward()
    found = alignments.values_n.double()
    assert (found - torch.stack(expected)).abs().max() < 1e-5 * found.abs().max()
    for parameter, gradient in zip(model.parameters(), plain, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("clip", [0.0, 0.2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_exact_alignments_are_differences_of_real_steps(optimizer: str, clip: float) -> None:
    """dL_val/dw_i = -lr * s_i, where torch's own optimizer steps on the weighted loss."""
    model, stepper = _trained(optimizer, tied=True)
    train, validation = text(50, ROWS), text(51, ROWS)
    before = copy.deepcopy(model.state_dict())

    def after_step(weights: Tensor) -> float:
        other, its = copy.deepcopy((model, stepper))
        its.zero_grad()
        (weights * sample_losses(other, train)).mean().backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(other.parameters(), clip)
        its.step()
        return float(sample_losses(other, validation).mean().detach())

    probe = ModuleProbe(model, stepper)
    found = probe.exact(
        lambda: sample_losses(model, train).mean().backward(),
        lambda: sample_losses(model, validation).mean().backward(),
        clip_grad=clip,
    )
    h, differences = 1e-4, []
    for number in range(ROWS):
        step = torch.zeros(ROWS, dtype=torch.float64)
        step[number] = h
        differences.append((after_step(1 + step) - after_step(1 - step)) / (2 * h))
    derivatives = -_largest_rate(stepper) * found.values_n.double()
    expected = torch.tensor(differences, dtype=torch.float64)
    # The central difference is exact to h^2 of a smooth function; alignments are fp32.
    assert (derivatives - expected).abs().max() < 1e-4 * expected.abs().max()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_two_processes_of_ddp_find_the_samples_of_one() -> None:
    [[alone]] = run_ranks("tests.library.workers:ddp_alignments", 1, [{}])
    [ranks] = run_ranks("tests.library.workers:ddp_alignments", 2, [{}])
    together = torch.cat(ranks)
    assert (together - alone).abs().max() < 1e-5 * alone.abs().max()


class _Embedded(Module):
    """Ids, and positions without a batch dimension, or an embedding that changes its own rows."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(31, 4, **options)
        self.positions = torch.nn.Embedding(ROWS, 4)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Returns [B, S, D]."""
        return self.tokens(tokens_BS) * self.positions(torch.arange(tokens_BS.shape[1]))


class _Functional(Model):
    """The embedding is used outside its module."""

    def forward(self, tokens_BS: Tensor) -> Tensor:
        return super().forward(tokens_BS) + F.linear(self.tokens(tokens_BS), self.tokens.weight)


class _Shared(Model):
    """Positions without a batch dimension."""

    def forward(self, tokens_BS: Tensor) -> Tensor:
        hidden_BSD = self.tokens(tokens_BS) + self.positions(torch.arange(tokens_BS.shape[1]))
        return self.output(hidden_BSD)


def _probed(model: Module) -> None:
    stepper = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = ModuleProbe(model, stepper)
    probe.aim(lambda: sample_losses(model, text(51, ROWS)).mean().backward())
    with probe.attached():
        sample_losses(model, text(50, ROWS)).mean().backward()


def test_a_module_that_is_linear_itself() -> None:
    """Against the gradient of each sample's loss."""
    layer = torch.nn.Linear(3, 2).double()
    x_B3 = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    probe = ModuleProbe(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    probe.aim(lambda: layer(x_B3[:2]).pow(2).mean().backward())
    layer(x_B3[:2]).pow(2).mean().backward()
    z = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    with probe.attached() as found:
        layer(x_B3).pow(2).sum(dim=1).mean().backward()
    with torch.no_grad():
        layer(x_B3)  # without gradients, and outside: counts nothing
    for number, x_3 in enumerate(x_B3):
        layer.zero_grad()
        (layer(x_3[None]).pow(2).sum() / len(x_B3)).backward()
        pairs = zip(z, layer.parameters(), strict=True)
        expected = sum(float((a * b.grad).sum()) for a, b in pairs)
        assert float(found.values_n[number]) == pytest.approx(expected, rel=1e-6)
    assert len(found.values_n) == len(x_B3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_whole_module_may_be_checkpointed(reentrant: bool) -> None:
    """It runs again in the backward pass, which adds no samples."""
    model, stepper = _trained("adamw")
    train, validation = text(50, ROWS), text(51, ROWS)
    probe = ModuleProbe(model, stepper)

    def losses(tokens_BS: Tensor, run: Callable[..., Tensor]) -> Tensor:
        return F.cross_entropy(run(tokens_BS[:, :-1]).flatten(0, 1), tokens_BS[:, 1:].flatten())

    def again(tokens_BS: Tensor) -> Tensor:
        anchor = torch.zeros((), requires_grad=True)  # a reentrant pass needs an input with one
        return checkpoint(lambda t, _: model(t), tokens_BS, anchor, use_reentrant=reentrant)

    found = []
    for run in (model, again):
        probe.aim(lambda: losses(validation, model).backward())
        with probe.attached() as alignments:
            for part in train.split(ROWS // 2):
                losses(part, run).backward()
        found.append(alignments.values_n)
    plain_n, again_n = found
    assert len(again_n) == ROWS
    assert torch.allclose(again_n, plain_n, rtol=1e-9, atol=0.0)


def test_what_would_be_wrong_is_refused() -> None:
    _probed(Model())
    with pytest.raises(RuntimeError, match="used outside the module that owns it"):
        _probed(_Functional())
    with pytest.raises(ValueError, match="expected 6 samples first"):
        _probed(_Shared())
    square = _Embedded()
    probe = ModuleProbe(square, torch.optim.SGD(square.parameters(), lr=0.1))
    ids = text(50, ROWS)[:, :ROWS]
    probe.aim(lambda: square(ids).pow(2).mean().backward())
    with pytest.raises(ValueError, match="of the samples or of the positions"), probe.attached():
        square(ids).pow(2).mean().backward()
    for options in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}):
        changing = _Embedded(**options)
        with pytest.raises(NotImplementedError, match="with max_norm or scale_grad_by_freq"):
            ModuleProbe(changing, torch.optim.SGD(changing.parameters(), lr=0.1))
    attention = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True)
    with pytest.raises(NotImplementedError, match=r"self_attn: .* MultiheadAttention.*linear="):
        ModuleProbe(attention, torch.optim.SGD(attention.parameters(), lr=0.1))


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, lr=0.1),
    ],
)
def test_other_optimizers_are_refused(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    model = Model()
    with pytest.raises(ValueError, match="expected torch.optim.AdamW, Adam without"):
        ModuleProbe(model, optimizer(model.parameters()))


def test_order_of_calls() -> None:
    model = Model()
    probe = ModuleProbe(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="call aim"), probe.attached():
        pass
    with pytest.raises(RuntimeError, match="no gradient: call backward"):
        probe.aim(lambda: None)
    probe.aim(lambda: sample_losses(model, text(50, ROWS)).mean().backward())
    with pytest.raises(RuntimeError, match="no forward and backward pass"), probe.attached():
        sample_losses(model, text(50, ROWS))
    with pytest.raises(ValueError, match="steps no parameter of the module"):
        ModuleProbe(model, torch.optim.SGD(Model().parameters(), lr=0.1))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = megatron_dwm.Nothing
