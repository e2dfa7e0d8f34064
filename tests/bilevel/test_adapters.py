"""The tangents of all module classes, with Transformer Engine's, in double precision.

Each is compared with autograd's per-sample gradient of a plain torch module that computes the same.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_dwm.bilevel.adapters import (
    ADAPTERS,
    TORCH,
    WITHOUT_PARAMETERS,
    adapter_for,
    class_name,
)
from megatron_dwm.bilevel.position import position_of
from megatron_dwm.bilevel.slots import slice_of_z
from megatron_dwm.bilevel.tangents import embedding_tangent, norm_tangent, rms_normed
from tests.bilevel.modules import (
    ALONE,
    BATCH,
    COLUMN,
    DOCUMENTS,
    EPSILON,
    FUSED,
    LAYER_NORM,
    NUMBERS_BS,
    OUT,
    ROW,
    ROWS,
    SEQUENCE,
    TE,
    TE_NORM,
    WIDTH,
    WITH_BIAS,
    Case,
    Fused,
    Linear,
    Norm,
    WithBias,
    case_of,
    draw,
)


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
        *WITH_BIAS,
    ],
)
def test_tangent_is_autograds_per_sample_gradient(name: str, kind: Callable[[], Module]) -> None:
    case = case_of(kind)
    torch.testing.assert_close(_tangent(name, case), case.expected(), rtol=1e-12, atol=1e-12)


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
    ("name", "kind"),
    [(FUSED, Fused), (TE_NORM, Norm), (TE + "TERowParallelLinear", Linear), *WITH_BIAS],
)
def test_tangent_of_documents_is_autograds(
    name: str, kind: Callable[[], Module], flat: bool
) -> None:
    case, units = case_of(kind), DOCUMENTS
    gradient, kept = case.gradient_SBC, case.x_SBD
    if flat:  # one row, as Transformer Engine takes documents
        gradient, kept = (t.transpose(0, 1).flatten(0, 1)[:, None] for t in (gradient, kept))
        units = DOCUMENTS.flattened(NUMBERS_BS)
    found = ADAPTERS[name].form(case.module, {}, ALONE, slice_of_z)(gradient, kept, units)
    torch.testing.assert_close(found, _of_documents(case), rtol=1e-12, atol=1e-12)


def test_norms_of_parts_of_the_sequence_add_up_to_documents() -> None:
    """Sequence parallelism: each rank normalizes its part; a norm of heads sees all tokens."""
    case, cut = case_of(Norm), 3
    whole = Case(case.module, case.x_SBD, case.gradient_SBC)
    z_D, total = case.module.weight.main_grad, torch.zeros(6, dtype=torch.float64)
    for first, stop in ((0, cut), (cut, SEQUENCE)):
        gradient_SBD, x_SBD = case.gradient_SBC[first:stop], case.x_SBD[first:stop]
        normed_SBD = rms_normed(x_SBD, WIDTH, EPSILON)
        total += norm_tangent(gradient_SBD, normed_SBD, z_D, DOCUMENTS, first=first)
    torch.testing.assert_close(total, _of_documents(whole), rtol=1e-12, atol=1e-12)
    place = position_of("q_layernorm", sequence_parallel=True, tensor_rank=1, group=None)
    heads_SBHD = draw(SEQUENCE, BATCH, 2, WIDTH)
    of_heads = Case(case.module, heads_SBHD, draw(*heads_SBHD.shape))
    tangent = ADAPTERS[TE_NORM].form(case.module, {}, place, slice_of_z)
    found = tangent(of_heads.gradient_SBC, heads_SBHD, DOCUMENTS)
    torch.testing.assert_close(found, _of_documents(of_heads), rtol=1e-12, atol=1e-12)


def test_fused_tangent_is_the_central_difference() -> None:
    case, h = case_of(Fused), 1e-6
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
    case = case_of(Fused)
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
    table, z = draw(10, WIDTH).requires_grad_(), draw(10, WIDTH)
    tokens_BS = torch.randint(10, (BATCH, SEQUENCE))
    gradient = draw(BATCH, SEQUENCE, WIDTH)
    expected = [
        (torch.autograd.grad((F.embedding(t, table) * g).sum(), table)[0] * z).sum()
        for t, g in zip(tokens_BS, gradient, strict=True)
    ]
    parts = [
        embedding_tangent(gradient, tokens_BS, z[a:b], a, b, ROWS) for a, b in ((0, 4), (4, 10))
    ]
    torch.testing.assert_close(sum(parts), torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_only_one_rank_counts_the_bias_of_a_row_parallel_layer() -> None:
    """Each rank has some columns of the weight and of the input, and the whole bias."""
    case = case_of(WithBias)
    total = torch.zeros(BATCH, dtype=torch.float64)
    for rank, columns in enumerate((slice(0, 3), slice(3, WIDTH))):
        part = WithBias()
        part.bias, part.weight = case.module.bias, Parameter(case.module.weight[:, columns])
        part.weight.main_grad = case.module.weight.main_grad[:, columns]
        place = position_of("x", sequence_parallel=False, tensor_rank=rank, group=None)
        tangent = ADAPTERS[ROW].form(part, {}, place, slice_of_z)
        total += tangent(case.gradient_SBC, case.x_SBD[..., columns], ROWS)
    torch.testing.assert_close(total, case.expected(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("flat", [False, True])
def test_tangent_of_learned_positions_is_autograds(flat: bool) -> None:
    torch.manual_seed(5)
    table = torch.nn.Embedding(SEQUENCE + 2, WIDTH, dtype=torch.float64)
    table.weight.main_grad = draw(SEQUENCE + 2, WIDTH)
    positions_BS = torch.arange(SEQUENCE).expand(BATCH, SEQUENCE)
    gradient_BSD, units = draw(BATCH, SEQUENCE, WIDTH), DOCUMENTS if flat else ROWS
    tangent = ADAPTERS[TORCH + "sparse.Embedding"].form(table, {}, ALONE, slice_of_z)
    numbers_BS = NUMBERS_BS if flat else torch.arange(BATCH)[:, None].expand(BATCH, SEQUENCE)
    expected = []
    for number in range(units.count):
        loss = (table(positions_BS) * gradient_BSD)[number == numbers_BS].sum()
        (gradient,) = torch.autograd.grad(loss, table.weight)
        expected.append((gradient * table.weight.main_grad).sum())
    found = tangent(gradient_BSD, positions_BS, units)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_a_parameter_that_the_adapter_does_not_read_is_an_error() -> None:
    known = {class_name(WithBias()): ADAPTERS[TE + "TERowParallelLinear"]}
    with pytest.raises(NotImplementedError, match="WithBias does not read its parameter bias"):
        adapter_for(WithBias(), known)


def test_a_norm_without_parameters_has_no_tangent() -> None:
    assert adapter_for(torch.nn.LayerNorm(WIDTH, elementwise_affine=False)) is None
    assert adapter_for(torch.nn.LayerNorm(WIDTH, bias=False)) is ADAPTERS[LAYER_NORM]


def test_unknown_class_with_parameters_is_an_error() -> None:
    with pytest.raises(NotImplementedError, match="no adapter for .*Fused"):
        adapter_for(Fused())


def test_subclass_of_a_known_class_is_unknown() -> None:
    assert adapter_for(torch.nn.Identity()) is None
    known = {class_name(Norm()): ADAPTERS[TE_NORM]}

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
        # They are added before the sequence is cut.
        ("embedding.position_embeddings", False, [0]),
        ("embedding.position_embeddings", True, [0]),
    ],
)
def test_a_rank_counts_what_no_other_rank_forms(
    name: str, sequence_parallel: bool, ranks: list[int]
) -> None:
    kind = COLUMN if "linear" in name else TE_NORM
    adapter = ADAPTERS[TORCH + "sparse.Embedding" if "position" in name else kind]
    places = [
        position_of(name, sequence_parallel=sequence_parallel, tensor_rank=rank, group=None)
        for rank in (0, 1)
    ]
    assert [rank for rank in (0, 1) if adapter.counts_at(places[rank])] == ranks


def test_norms_of_split_heads_add_up_to_the_whole() -> None:
    """Compares two ranks of two heads each with autograd on all four heads."""
    whole = case_of(Norm)
    heads_SBHD = draw(SEQUENCE, BATCH, 4, WIDTH)
    whole = Case(whole.module, heads_SBHD, draw(*heads_SBHD.shape))
    parts = [
        _tangent(TE_NORM, Case(whole.module, x, gradient))
        for x, gradient in zip(
            heads_SBHD.chunk(2, dim=2), whole.gradient_SBC.chunk(2, dim=2), strict=True
        )
    ]
    torch.testing.assert_close(sum(parts), whole.expected(), rtol=1e-12, atol=1e-12)
