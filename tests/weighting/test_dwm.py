"""The weighting model and its update, under every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_dwm.checkpoint.kept_files import write_files
from megatron_dwm.config import UserError
from megatron_dwm.weighting.model import build_weighting_model, load_weighting_model
from tests.launch import run_ranks
from tests.weighting.workers import LENGTH, SAMPLES, SHAPE, VOCAB

UPDATES = 8
UPDATES_TO_LEARN = 80


LAYOUTS = [
    ({"tensor": 2}, 2),
    ({"pipeline": 2}, 2),
    ({}, 2),
    ({"tensor": 2}, 4),
    ({"context": 2}, 4),
]
GROUPS = ["micro_batch", "global"]


@pytest.fixture(scope="module")
def results() -> dict[tuple, list[dict[str, torch.Tensor]]]:
    """(group, updates, layout, processes) -> what every rank found."""
    found = {}
    for size in (1, 2, 4):
        cases = [
            {"group": group, "updates": updates, **layout}
            for group in GROUPS
            for updates in (1, UPDATES, *([UPDATES_TO_LEARN] if size == 1 else []))
            for layout, world_size in [({}, 1), *LAYOUTS]
            if world_size == size
        ]
        ranks = run_ranks("tests.weighting.workers:weights_after_updates", size, cases)
        found.update({_key(c, size): result for c, result in zip(cases, ranks, strict=True)})
    return found


def _key(case: dict, world_size: int) -> tuple:
    return (*sorted(case.items()), world_size)


@pytest.mark.parametrize("group", GROUPS)
def test_learns(results: dict, group: str) -> None:
    [alone] = results[_key({"group": group, "updates": UPDATES_TO_LEARN}, 1)]
    assert torch.equal(alone["before"], torch.ones(SAMPLES))
    correlation = torch.corrcoef(torch.stack([alone["after"], alone["signal"]]))[0, 1]
    assert correlation > 0.3, "weights follow the alignments they were trained on"


# Sums in another order: a few 1e-7. Eight steps of AdamW may turn a rounding error of a tiny
# gradient into a visible part of a step, hence the wider bound there.
@pytest.mark.parametrize(("updates", "tolerance"), [(1, 1e-6), (UPDATES, 1e-4)])
@pytest.mark.parametrize(("layout", "world_size"), LAYOUTS, ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_layouts_agree(
    results: dict, group: str, layout: dict, world_size: int, updates: int, tolerance: float
) -> None:
    [alone] = results[_key({"group": group, "updates": updates}, 1)]
    ranks = results[_key({"group": group, "updates": updates, **layout}, world_size)]
    for rank in ranks:
        assert torch.equal(rank["parameters"], ranks[0]["parameters"]), "replicas drifted apart"
        torch.testing.assert_close(rank["after"], alone["after"], rtol=tolerance, atol=tolerance)


def test_gradient_is_the_chain_rule() -> None:
    cases = [{"standardize": s, "group": g} for s in (True, False) for g in GROUPS]
    for [(found, expected)] in run_ranks(
        "tests.weighting.workers:gradient_and_difference", 1, cases
    ):
        # Central differences in double precision with h 1e-6: truncation 1e-12, rounding 1e-10.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-12)


def test_permuting_a_group_permutes_its_logits() -> None:
    model = build_weighting_model(SHAPE, seed=1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    tokens = torch.randint(0, VOCAB, (6, LENGTH))
    order = torch.randperm(6)
    logits = model.logits(model.encoder(tokens)[None])
    permuted = model.logits(model.encoder(tokens[order])[None])
    torch.testing.assert_close(permuted, logits[:, order], rtol=1e-5, atol=1e-6)


def test_saved_models_come_back(tmp_path: Path) -> None:
    model = build_weighting_model(SHAPE, seed=1)
    write_files(model.files(), tmp_path / "stage_2")
    again = load_weighting_model(tmp_path / "stage_2", SHAPE)
    assert again.shape == model.shape
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_loading_what_is_no_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="weighting.load"):
        load_weighting_model(tmp_path, SHAPE)
    write_files(build_weighting_model(SHAPE, seed=1).files(), tmp_path)
    with pytest.raises(UserError, match=f"{VOCAB}.*{VOCAB + 1}"):
        load_weighting_model(tmp_path, replace(SHAPE, vocab_size=VOCAB + 1))
