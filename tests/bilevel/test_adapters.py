"""The tangents of all module classes, with Transformer Engine's, in double precision.

Each is compared with autograd's per-sample gradient of a plain torch module that computes the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_dwm.bilevel.adapters import (
    ADAPTERS,
    WITHOUT_PARAMETERS,
    adapter_for,
)
from megatron_dwm.bilevel.position import position_of
from megatron_dwm.bilevel.slots import slice_of_z
from megatron_dwm.bilevel.tangents import embedding_tangent, norm_tangent, rms_normed
from megatron_dwm.model import Units

SEQUENCE, BATCH, WIDTH, OUT = 5, 3, 8, 6
EPSILON = 1e-3
ALONE = position_of("", sequence_parallel=False, tensor_rank=0, group=None)
TE = "megatron.core.extensions.transformer_engine."
FUSED = TE + "TELayerNormColumnParallelLinear"
TE_NORM = "transformer_engine.pytorch.module.rmsnorm.RMSNorm"


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Fused(Module):
    """What Transformer Engine's LayerNormLinear computes with RMSNorm, with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.normalization, self.zero_centered_gamma, self.eps = "RMSNorm", False, EPSILON
        self.layer_norm_weight = Parameter(_draw(WIDTH))
        self.weight = Parameter(_draw(OUT, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Returns [S, B, OUT] from [S, B, WIDTH]."""
        rms = (x.square().mean(dim=-1, keepdim=True) + self.eps).sqrt()
        return (self.layer_norm_weight * x / rms) @ self.weight.t()


class Norm(Module):
    """What Transformer Engine's RMSNorm computes, with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.zero_centered_gamma, self.eps = False, EPSILON
        self.weight = Parameter(_draw(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the input normalized, [S, B, WIDTH]."""
        return self.weight * x / (x.square().mean(dim=-1, keepdim=True) + self.eps).sqrt()


class Linear(Module):
    """What Transformer Engine's Linear computes, with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = Parameter(_draw(OUT, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Returns [S, B, OUT] from [S, B, WIDTH]."""
        return x @ self.weight.t()


@dataclass(frozen=True)
class Case:
    """A module with z in its gradient buffers, an input and an output gradient."""

    module: Module
    x_SBD: Tensor
    gradient_SBC: Tensor

    def expected(self) -> Tensor:
        """Returns <z, gradient of sample b's own loss>, [B], from one autograd pass per sample."""
        found = []
        for b in range(BATCH):
            loss = (self.module(self.x_SBD)[:, b] * self.gradient_SBC[:, b]).sum()
            parameters = list(self.module.parameters())
            gradients = torch.autograd.grad(loss, parameters)
            pairs = zip(gradients, parameters, strict=True)
            found.append(sum((g * p.main_grad).sum() for g, p in pairs))
        return torch.stack(found)


ROWS = Units(count=BATCH)


def _case(kind: type[Module]) -> Case:
    torch.manual_seed(3)
    module = kind()
    for parameter in module.parameters():
        parameter.main_grad = _draw(*parameter.shape)
    x_SBD = _draw(SEQUENCE, BATCH, WIDTH)
    return Case(module, x_SBD, _draw(*module(x_SBD).shape))


def _tangent(name: str, case: Case, module: Module | None = None) -> Tensor:
    form = ADAPTERS[name].form(module or case.module, {}, ALONE, slice_of_z)
    return form(case.gradient_SBC, case.x_SBD, ROWS)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (FUSED, Fused),
        (TE_NORM, Norm),
        (TE + "TEColumnParallelLinear", Linear),
        (TE + "TERowParallelLinear", Linear),
    ],
)
def test_tangent_is_autograds_per_sample_gradient(name: str, kind: type[Module]) -> None:
    case = _case(kind)
    torch.testing.assert_close(_tangent(name, case), case.expected(), rtol=1e-12, atol=1e-12)


# Two rows of several units, one of which has padding, and a row that is one unit.
NUMBERS_BS = torch.tensor([[0, 1, 1, 2, 2], [3, 3, 3, 3, 3], [4, 5, 5, -1, -1]])
DOCUMENTS = Units(count=6, numbers_BS=NUMBERS_BS)


def _of_documents(case: Case) -> Tensor:
    """Returns <z, gradient of each document's own loss>, from one autograd pass per document."""
    values_SBC = case.module(case.x_SBD) * case.gradient_SBC
    parameters, found = list(case.module.parameters()), []
    for number in range(DOCUMENTS.count):
        loss = values_SBC[(number == NUMBERS_BS).t()].sum()
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        pairs = zip(gradients, parameters, strict=True)
        found.append(sum((g * p.main_grad).sum() for g, p in pairs))
    return torch.stack(found)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("name", "kind"), [(FUSED, Fused), (TE_NORM, Norm), (TE + "TERowParallelLinear", Linear)]
)
def test_tangent_of_documents_is_autograds(name: str, kind: type[Module], flat: bool) -> None:
    case, units = _case(kind), DOCUMENTS
    gradient, kept = case.gradient_SBC, case.x_SBD
    if flat:  # one row, as Transformer Engine takes documents
        gradient, kept = (t.transpose(0, 1).flatten(0, 1)[:, None] for t in (gradient, kept))
        units = DOCUMENTS.flattened(NUMBERS_BS)
    found = ADAPTERS[name].form(case.module, {}, ALONE, slice_of_z)(gradient, kept, units)
    torch.testing.assert_close(found, _of_documents(case), rtol=1e-12, atol=1e-12)


def test_norms_of_parts_of_the_sequence_add_up_to_documents() -> None:
    """Sequence parallelism: each rank normalizes its part; a norm of heads sees all tokens."""
    case, cut = _case(Norm), 3
    whole = Case(case.module, case.x_SBD, case.gradient_SBC)
    z_D, total = case.module.weight.main_grad, torch.zeros(6, dtype=torch.float64)
    for first, stop in ((0, cut), (cut, SEQUENCE)):
        gradient_SBD, x_SBD = case.gradient_SBC[first:stop], case.x_SBD[first:stop]
        normed_SBD = rms_normed(x_SBD, WIDTH, EPSILON)
        total += norm_tangent(gradient_SBD, normed_SBD, z_D, DOCUMENTS, first=first)
    torch.testing.assert_close(total, _of_documents(whole), rtol=1e-12, atol=1e-12)
    place = position_of("q_layernorm", sequence_parallel=True, tensor_rank=1, group=None)
    heads_SBHD = _draw(SEQUENCE, BATCH, 2, WIDTH)
    of_heads = Case(case.module, heads_SBHD, _draw(*heads_SBHD.shape))
    tangent = ADAPTERS[TE_NORM].form(case.module, {}, place, slice_of_z)
    found = tangent(of_heads.gradient_SBC, heads_SBHD, DOCUMENTS)
    torch.testing.assert_close(found, _of_documents(of_heads), rtol=1e-12, atol=1e-12)


def test_fused_tangent_is_the_central_difference() -> None:
    case, h = _case(Fused), 1e-6
    theta = [p.detach().clone() for p in case.module.parameters()]
    values = []
    for step in (h, -h):
        with torch.no_grad():
            for parameter, value in zip(case.module.parameters(), theta, strict=True):
                parameter.copy_(value + step * parameter.main_grad)
            values.append((case.module(case.x_SBD) * case.gradient_SBC).sum(dim=(0, 2)))
            for parameter, value in zip(case.module.parameters(), theta, strict=True):
                parameter.copy_(value)
    expected = (values[0] - values[1]) / (2 * h)
    torch.testing.assert_close(_tangent(FUSED, case), expected, rtol=1e-7, atol=1e-7)


def test_partial_sums_of_a_split_fused_layer_add_up() -> None:
    """In a column-parallel layer a rank has some rows of the weight, and the whole gain."""
    case = _case(Fused)
    total = torch.zeros(BATCH, dtype=torch.float64)
    for rows in (slice(0, 2), slice(2, OUT)):
        part = Fused()
        for name in ("weight", "layer_norm_weight"):
            whole = getattr(case.module, name)
            cut = rows if name == "weight" else slice(None)
            mine = Parameter(whole.detach()[cut])
            mine.main_grad = whole.main_grad[cut]
            setattr(part, name, mine)
        rank = Case(part, case.x_SBD, case.gradient_SBC[..., rows])
        total += _tangent(FUSED, rank)
    torch.testing.assert_close(total, case.expected(), rtol=1e-12, atol=1e-12)


def test_embedding_tangent_is_autograds() -> None:
    torch.manual_seed(4)
    table, z = _draw(10, WIDTH).requires_grad_(), _draw(10, WIDTH)
    tokens_BS = torch.randint(10, (BATCH, SEQUENCE))
    gradient = _draw(BATCH, SEQUENCE, WIDTH)
    expected = [
        (torch.autograd.grad((F.embedding(t, table) * g).sum(), table)[0] * z).sum()
        for t, g in zip(tokens_BS, gradient, strict=True)
    ]
    parts = [
        embedding_tangent(gradient, tokens_BS, z[a:b], a, b, ROWS) for a, b in ((0, 4), (4, 10))
    ]
    torch.testing.assert_close(sum(parts), torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_unknown_class_with_parameters_is_an_error() -> None:
    with pytest.raises(NotImplementedError, match="no adapter for .*Fused"):
        adapter_for(Fused())


def test_subclass_of_a_known_class_is_unknown() -> None:
    assert adapter_for(torch.nn.Identity()) is None
    known = {f"{__name__}.Norm": ADAPTERS[TE_NORM]}

    class Changed(Norm):
        pass

    assert adapter_for(Norm(), known) is ADAPTERS[TE_NORM]
    with pytest.raises(NotImplementedError):
        adapter_for(Changed(), known)


def test_no_class_is_named_twice() -> None:
    assert not set(WITHOUT_PARAMETERS) & set(ADAPTERS)


@pytest.mark.parametrize(
    ("name", "sequence_parallel", "ranks"),
    [
        ("decoder.layers.0.input_layernorm", False, [0]),
        ("decoder.final_layernorm", False, [0]),
        ("decoder.layers.0.input_layernorm", True, [0, 1]),
        # Every rank normalizes its own heads with a gain that all ranks hold. A value that one rank
        # dropped would be missing from the sum.
        ("decoder.layers.0.self_attention.q_layernorm", False, [0, 1]),
        ("decoder.layers.0.self_attention.k_layernorm", False, [0, 1]),
        ("decoder.layers.0.self_attention.linear_qkv", False, [0, 1]),
    ],
)
def test_a_rank_counts_what_no_other_rank_forms(
    name: str, sequence_parallel: bool, ranks: list[int]
) -> None:
    kind = "tensor_parallel.layers.ColumnParallelLinear" if "linear" in name else None
    adapter = ADAPTERS[f"megatron.core.{kind}"] if kind else ADAPTERS[TE_NORM]
    places = [
        position_of(name, sequence_parallel=sequence_parallel, tensor_rank=rank, group=None)
        for rank in (0, 1)
    ]
    assert [rank for rank in (0, 1) if adapter.counts_at(places[rank])] == ranks


def test_norms_of_split_heads_add_up_to_the_whole() -> None:
    """Compares two ranks of two heads each with autograd on all four heads."""
    whole = _case(Norm)
    heads_SBHD = _draw(SEQUENCE, BATCH, 4, WIDTH)
    whole = Case(whole.module, heads_SBHD, _draw(*heads_SBHD.shape))
    parts = [
        _tangent(TE_NORM, Case(whole.module, x, gradient))
        for x, gradient in zip(
            heads_SBHD.chunk(2, dim=2), whole.gradient_SBC.chunk(2, dim=2), strict=True
        )
    ]
    torch.testing.assert_close(sum(parts), whole.expected(), rtol=1e-12, atol=1e-12)
