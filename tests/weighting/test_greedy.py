"""The greedy choice against a plain loop, in groups with padding and units that do not count."""

from __future__ import annotations

import torch

from megatron_dwm.weighting.greedy import choose_greedily, in_deviations, overlaps
from megatron_dwm.weighting.top_fraction import keep_largest, number_kept, weights_of_kept


def _by_loop(scores: list[float], gram: list[list[float]], left: set[int], count: int) -> set[int]:
    chosen: set[int] = set()
    while len(chosen) < count and left - chosen:
        values = {i: scores[i] - sum(gram[i][j] for j in chosen) for i in sorted(left - chosen)}
        chosen.add(max(values, key=lambda i: values[i]))
    return chosen


def test_equals_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    scores_Gn = torch.randn(6, 12, generator=generator, dtype=torch.float64)
    rows_GnK = torch.randn(6, 12, 5, generator=generator, dtype=torch.float64)
    counts_Gn = torch.rand(6, 12, generator=generator) > 0.3
    counts_Gn[5] = False
    kept_G1 = number_kept(counts_Gn, 0.5)
    gram_Gnn = overlaps(rows_GnK)
    for redundancy in (0.0, 0.3, 30.0):
        chosen_Gn = choose_greedily(scores_Gn, gram_Gnn, counts_Gn, kept_G1, redundancy)
        for group in range(6):
            left = set(counts_Gn[group].nonzero().flatten().tolist())
            gram = (redundancy * gram_Gnn[group]).tolist()
            expected = _by_loop(scores_Gn[group].tolist(), gram, left, int(kept_G1[group]))
            assert set(chosen_Gn[group].nonzero().flatten().tolist()) == expected


def test_without_redundancy_it_keeps_the_largest() -> None:
    scores_Gn = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]])
    sizes_Gn = torch.tensor([[1.0, 2.0, 0.0, 5.0, 1.0]])
    counts_Gn = sizes_Gn > 0
    chosen_Gn = choose_greedily(
        scores_Gn, torch.ones(1, 5, 5), counts_Gn, number_kept(counts_Gn, 0.5), 0.0
    )
    assert chosen_Gn.tolist() == [[False, True, False, False, True]]
    weights_Gn = weights_of_kept(chosen_Gn, sizes_Gn)
    assert torch.equal(weights_Gn, keep_largest(scores_Gn, sizes_Gn, 0.5))
    assert float((weights_Gn * sizes_Gn).sum()) == float(sizes_Gn.sum())


def test_in_deviations_the_average_own_overlap_is_the_scores_deviation() -> None:
    generator = torch.Generator().manual_seed(2)
    scores_Gn = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    gram_Gnn = overlaps(torch.randn(3, 5, 4, generator=generator, dtype=torch.float64))
    counts_Gn = torch.tensor([[True] * 5, [True, True, False, True, False], [False] * 5])
    found_Gnn = in_deviations(gram_Gnn, scores_Gn, counts_Gn)
    for group in range(2):
        counted = counts_Gn[group]
        deviation = scores_Gn[group][counted].std(correction=0)
        torch.testing.assert_close(found_Gnn[group].diagonal()[counted].mean(), deviation)
        ratio = found_Gnn[group] / gram_Gnn[group]
        torch.testing.assert_close(ratio, ratio[0, 0].expand(5, 5))
    # Scales of neither alignments nor steps change a choice; without steps there is no overlap.
    scaled_Gnn = in_deviations(1e6 * gram_Gnn, 3.0 * scores_Gn, counts_Gn)
    torch.testing.assert_close(scaled_Gnn, 3.0 * found_Gnn)
    assert not in_deviations(0.0 * gram_Gnn, scores_Gn, counts_Gn).any()


def test_twins_are_not_both_chosen() -> None:
    rows_GnK = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    chosen_Gn = choose_greedily(
        torch.tensor([[1.0, 0.9, 0.5]]),
        overlaps(rows_GnK),
        torch.ones(1, 3, dtype=torch.bool),
        torch.tensor([[2.0]]),
        1.0,
    )
    assert chosen_Gn.tolist() == [[True, False, True]]
