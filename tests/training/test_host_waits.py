"""A step waits for the device once: for its loss, before anything changes (docs/planning.md).

Megatron-Core's own waits are for the gradient norm; torch's Adam for CPUs reads its step counts,
which are on the host.
"""

from __future__ import annotations

import pytest

from tests.launch import run_ranks

# The means of losses and weights, which decide whether the step is taken.
LOSS = {"training/step.py tolist": 1}
METHODS = ["uniform", "dwm", "dwm, features", "dwm, global"]
SHARDED = {"sharded": True, "switches": {"overlap_grad_reduce": True, "overlap_param_gather": True}}


def _waits(cases: list[dict], ranks: int) -> list[list[dict[str, int]]]:
    found = run_ranks("tests.training.wait_workers:waits_of_a_step", ranks, cases)
    return [[_ours(of_rank) for of_rank in of_case] for of_case in found]


def _ours(waits: dict[str, int]) -> dict[str, int]:
    packages = ("megatron/core", "torch/optim")
    return {name: count for name, count in waits.items() if not name.startswith(packages)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_waits_once_for_its_loss(ranks: int) -> None:
    cases = [{"method": method} for method in METHODS]
    if ranks == 2:
        cases += [{"tensor": 2, "sequence": True}, {"pipeline": 2}, {"method": "dwm", **SHARDED}]
    for case, of_ranks in zip(cases, _waits(cases, ranks), strict=True):
        assert of_ranks == [LOSS] * ranks, case


def test_documents_add_waits_for_their_number_and_borders() -> None:
    """The own encoder and the LLM each ask for the borders of every micro-batch.

    Without other replicas nobody has to be told how many documents there are.
    """
    cases = [{"method": method, "documents": True} for method in ("uniform", "dwm", "dwm, global")]
    for size, numbers in ((1, (0, 0, 0)), (2, (1, 1, 2))):
        micro_batches = 4 // size
        for case, of_ranks, number in zip(cases, _waits(cases, size), numbers, strict=True):
            reads = micro_batches * (1 if case["method"] == "uniform" else 2)
            borders = {f"model/layers/pieces.py {kind}": reads for kind in ("cpu", "numpy")}
            counts = {"weighting/groups.py tolist": number} if number else {}
            assert of_ranks == [LOSS | borders | counts] * size, case
