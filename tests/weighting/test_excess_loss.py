"""Selection by excess loss (RHO-LOSS, Rho-1): by hand, by brute force, in every layout."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dwm.config import Config, PolicyConfig
from megatron_dwm.weighting.excess_loss import ExcessLoss
from megatron_dwm.weighting.top_fraction import keep_largest
from tests.launch import run_ranks

WORKERS = "tests.weighting.excess_workers:"
CASES = [
    ("sample", "group", "micro_batch"),
    ("sample", "group", "global"),
    ("document", "group", "micro_batch"),
    ("document", "group", "global"),
    ("token", "sequence", "micro_batch"),
    ("token", "group", "micro_batch"),
    ("token", "group", "global"),
]
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {"tensor": 2, "sequence": True}),
    (2, {"pipeline": 2}),
    (2, {"sharded": True}),
    (4, {"tensor": 2, "pipeline": 2}),
]


def _case(unit: str, scope: str, group: str, ratio: float = 0.4) -> dict[str, Any]:
    return {"unit": unit, "scope": scope, "group": group, "ratio": ratio}


@pytest.mark.parametrize("seed", range(4))
def test_the_largest_are_the_linear_oracles(seed: int) -> None:
    """Of all ways to keep k units the chosen one has the largest sum (BLADE's linear oracle)."""
    scores_n = torch.randn(7, generator=torch.Generator().manual_seed(seed))
    for k in range(1, 8):
        weights_n = keep_largest(scores_n[None], None, k / 7)[0]
        best = max(combinations(range(7), k), key=lambda kept: float(scores_n[list(kept)].sum()))
        assert weights_n.nonzero().flatten().tolist() == list(best)
        torch.testing.assert_close(weights_n[list(best)], torch.full((k,), 7 / k))


def test_sizes_count_and_size_0_is_never_kept() -> None:
    scores_Gn = torch.tensor([[9.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0]])
    sizes_Gn = torch.tensor([[0.0, 4.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    weights_Gn = keep_largest(scores_Gn, sizes_Gn, 0.7)
    torch.testing.assert_close(weights_Gn[0], torch.tensor([0.0, 0.0, 7 / 3, 7 / 3]))
    assert weights_Gn[1].isfinite().all()


def test_a_score_that_is_no_number_is_kept_last() -> None:
    scores_Gn = torch.tensor([[torch.nan, 1.0, 2.0, torch.nan]])
    assert keep_largest(scores_Gn, None, 0.5).tolist() == [[0.0, 2.0, 2.0, 0.0]]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_by_hand(case: tuple[str, str, str]) -> None:
    [[found]] = run_ranks(WORKERS + "weights_by_hand", 1, [_case(*case)])
    torch.testing.assert_close(found["ours"], found["by hand"].float(), rtol=1e-6, atol=0.0)
    assert 0.0 in found["ours"]


def test_keeping_everything_is_uniform_bit_for_bit() -> None:
    cases = [{"unit": unit, "scope": scope, "group": group} for unit, scope, group in CASES]
    for [[kept, uniform]] in run_ranks(WORKERS + "everything_kept", 1, cases):
        for parameter, other in zip(kept, uniform, strict=True):
            assert torch.equal(parameter, other)


@pytest.mark.parametrize(("size", "layout"), LAYOUTS, ids=str)
def test_layouts_keep_the_same(size: int, layout: dict[str, Any]) -> None:
    # A micro-batch of DP 2 has the rows of one process's.
    cases = [_case(*case) for case in CASES]
    alone = run_ranks(WORKERS + "steps", 1, cases)
    split = run_ranks(WORKERS + "steps", size, [{**case, **layout} for case in cases])
    for [expected], ranks in zip(alone, split, strict=True):
        for found in ranks:
            assert torch.equal(found["weights"], expected["weights"])
            # Sums in another order, through one step of Adam.
            torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=0.0)


def test_of_a_folder_of_megatron_lms_the_newest_iteration_counts(tmp_path: Path) -> None:
    """A resumed run must find that one unchanged; older ones may be removed meanwhile."""
    for number in (5, 7):
        folder = tmp_path / f"iter_000000{number}"
        folder.mkdir()
        for name in (".metadata", "__0_0.distcp"):
            (folder / name).touch()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    config = Config(policy=PolicyConfig(name="excess_loss", reference=str(tmp_path)))
    found = list(ExcessLoss.depends_on(config))
    assert found == [("policy.reference", tmp_path / "iter_0000007" / "__0_0.distcp")]
