"""MegatronProbe in a loop in Megatron-LM's manner, against the product's own passes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.launch import REPOSITORY, run_ranks

# fp32 sums of a few thousand terms, in another order than the product's, with cancellation.
TOLERANCE = 1e-5
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"clip": 0.2, "recompute": "full"}),
    (2, {}),
    (2, {"sharded": True, "clip": 0.2}),
    (2, {"tensor": 2, "sequence": True}),
    (2, {"pipeline": 2, "recompute": "full"}),
    (2, {"pipeline": 2, "virtual_stages": 2, "layers": 4}),
    (2, {"context": 2}),
    (4, {"tensor": 2, "pipeline": 2}),
]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_alignments_are_the_products(size: int) -> None:
    cases = [layout for world_size, layout in LAYOUTS if world_size == size]
    found = run_ranks("tests.library.megatron_workers:probed", size, cases)
    for case, ranks in zip(cases, found, strict=True):
        for rank in ranks:
            assert rank["gradient is the same"], case
            for name in ("ahead", "exact"):
                expected = rank[f"{name} expected"]
                difference = (rank[f"{name} found"] - expected).abs().max()
                assert expected.abs().max() > 0
                assert difference < TOLERANCE * expected.abs().max(), (case, name)


def test_another_pass_than_told_is_an_error() -> None:
    """The pass has 4 micro-batches of 2 samples."""
    told = {
        (1, 2): "more than the 1 micro-batches",
        (5, 2): "had 4 micro-batches, and the probe was told 5",
        (4, 1): "has 2 samples, and the probe was told 1",
    }
    cases = [{"micro_batches": count, "size": size} for count, size in told]
    found = run_ranks("tests.library.megatron_workers:refusal", 1, cases)
    for [message], words in zip(found, told.values(), strict=True):
        assert words in message


@pytest.mark.parametrize("ranks", [1, 2])
def test_rates_that_differ_are_refused_on_every_rank(ranks: int) -> None:
    layout = {} if ranks == 1 else {"pipeline": 2}
    found = run_ranks("tests.library.megatron_workers:refusal_of_rates", ranks, [layout])
    for messages in found[0]:
        assert len(messages) == 2
        assert all("alignments need one for all (no decoupled-lr)" in each for each in messages)


def test_a_mean_loss_counts_the_replicas_once() -> None:
    """The alignments of all samples add up to <z, g>, whoever divides by the replicas."""
    cases = [{"average_in_collective": flag} for flag in (False, True)]
    sums = run_ranks("tests.library.megatron_workers:mean_loss", 2, cases)
    for ranks in sums:
        for found, along in ranks:
            assert abs(along) > 0 and found == pytest.approx(along, rel=1e-4)


def test_a_batch_without_tokens_has_no_alignments() -> None:
    [[values_n]] = run_ranks("tests.library.megatron_workers:batch_without_tokens", 1, [{}])
    assert len(values_n) == 8 and not values_n.any()


def test_the_schedule_reduces_no_direction() -> None:
    """With overlapped reductions the schedule starts them in the last micro-batch."""
    [ranks] = run_ranks("tests.library.megatron_workers:started_reductions", 2, [{}])
    assert all(probed == 0 for _, probed in ranks)
    assert any(plain > 0 for plain, _ in ranks)


@pytest.mark.parametrize("layout", [{}, {"pipeline": 2}], ids=str)
def test_a_validation_pass_that_fails_leaves_the_parameters(layout: dict[str, int]) -> None:
    worker = "tests.library.megatron_workers:left_by_a_failed_validation"
    [ranks] = run_ranks(worker, layout.get("pipeline", 1), [layout])
    for same, refusal in ranks:
        assert same and "is frozen; every parameter has to be trained" in refusal


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(1, ""), (2, "--tensor-model-parallel-size 2"), (2, "--pipeline-model-parallel-size 2")],
)
def test_the_loop_of_the_example(ranks: int, options: str) -> None:
    """Samples that repeat the target's tokens get the larger alignments."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += [
        "--nproc-per-node",
        str(ranks),
        "examples/library/megatron_loop.py",
        "--steps",
        "20",
    ]
    done = subprocess.run(
        [*command, *options.split()], cwd=REPOSITORY, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("repeats")]
    of_target = [float(line[-1]) for line in lines if int(line[2].strip(":")) < 16]
    of_others = [float(line[-1]) for line in lines if int(line[2].strip(":")) >= 16]
    assert len(of_target) == len(of_others) == 4
    assert torch.tensor(of_target).mean() > torch.tensor(of_others).mean()


def test_the_plain_example() -> None:
    command = [sys.executable, "-W", "ignore", "examples/library/plain_torch.py"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    right, wrong = (float(word.rstrip(",")) for word in last.split() if word[0] in "+-")
    assert right > 0 > wrong
