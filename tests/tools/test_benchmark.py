"""The benchmark runs, prints the rows it promises, and says in one line what does not divide."""

from __future__ import annotations

import math
import subprocess

import pytest

from tests.forking.client import run_python

TINY = (
    "--layers 2 --hidden 32 --heads 4 --ffn 64 --vocab 256 --sequence 16 --batch 4 --micro-batch 2 "
    "--repeats 2 --warm-up 1"
).split()
STEP_ROWS = [
    "plain Megatron-Core loop",
    "plain loop, again (noise)",
    "ours, uniform weights",
    "ours, weights from the LLM's features",
    "ours, weights over the batch, divided after the pass (features)",
    "ours, uniform weights, batches read from disk",
    "ours, weights from an encoder of their own",
    "ours, weights by similarity with a target",
    "ours, weights by loss",
    "ours, with an update on the training batch (features)",
    "an update on a fresh batch alone (features)",
    "ours, with an update ahead: a quarter of the passages, all micro-batches probed",
    "ours, with an update ahead: a quarter of the passages, half of the micro-batches",
]
PARTS = [
    "part: gradient pass",
    "part: virtual step and restore",
    "part: validation pass",
    "part: direction",
    "part: probe pass",
]
UPDATE_ROWS = [
    "plain training step",
    "hypergradient (tangent probe)",
    "weighting update (with the weighting model's own step)",
    *PARTS,
    "sum of the parts",
]
UNROLL_ROWS = ["hypergradient (unroll)", "unroll against tangent probe"]
MEMORY_ROWS = ["plain training step", "hypergradient (tangent probe)", *UNROLL_ROWS]
MESSAGES = "torch.distributed, over all processes"


def run(
    *arguments: str, processes: int | None = None, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    command = ["tools/benchmark.py", *arguments]
    return run_python(command, ranks=processes, fresh=fresh, limit_s=300)


def tables(text: str) -> dict[str, dict[str, list[str]]]:
    """Cells by the first cell of their row, by the first column's name."""
    found: dict[str, dict[str, list[str]]] = {}
    rows: dict[str, list[str]] | None = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            rows = None
        elif rows is None:
            rows = found.setdefault(cells[0], {})
        elif set(cells[0]) != {"-"}:
            rows[cells[0]] = cells[1:]
    return found


def numbers(cells: list[str]) -> list[float]:
    """Figures of a row of ratios: size, ratio and either end of the spread."""
    ratio, *_ = cells[2].split(" ± ")
    return [float(cells[0]), float(ratio), *(float(end) for end in cells[3].split(" to "))]


def assert_ratios(rows: dict[str, list[str]], expected: list[str]) -> None:
    assert list(rows) == expected
    for cells in rows.values():
        assert all(math.isfinite(value) and value > 0 for value in numbers(cells)), cells


def test_step() -> None:
    done = run("step", *TINY, fresh=True)
    assert done.returncode == 0, done.stderr
    assert f"tools/benchmark.py step {' '.join(TINY)}`" in done.stdout
    assert_ratios(tables(done.stdout)["one step"], STEP_ROWS)


def test_hypergradient_in_one_process() -> None:
    done = run("hypergradient", *TINY, "--memory-repeats", "1")
    assert done.returncode == 0, done.stderr
    found = tables(done.stdout)
    assert_ratios(found["one of"], UPDATE_ROWS + UNROLL_ROWS)
    assert_ratios(found["peak memory"], MEMORY_ROWS)
    assert "Collectives: none in one process" in done.stdout


def test_hypergradient_in_bf16_has_no_unroll() -> None:
    done = run("hypergradient", *TINY, "--precision", "bf16", "--memory-repeats", "0")
    assert done.returncode == 0, done.stderr
    assert_ratios(tables(done.stdout)["one of"], UPDATE_ROWS)


def test_messages_of_two_processes() -> None:
    layout = ["--tensor", "2", "--repeats", "1"]
    done = run("hypergradient", *TINY, *layout, processes=2)
    assert done.returncode == 0, done.stderr
    found = tables(done.stdout)
    assert_ratios(found["one of"], UPDATE_ROWS)
    calls, of_update, added, *_ = found[MESSAGES]["all"]
    assert int(calls) > 0 and int(added) == int(of_update) - 3 * int(calls)
    # Megatron's forward and backward: two all-reduces of [S, B, D] in fp32 a layer each way.
    activations = 2 * 2 * 2 * (4 * 16 * 32 * 4) * 2
    assert int(found[MESSAGES]["allreduce_"][3]) > activations


@pytest.mark.parametrize(
    ("layout", "added"),
    [
        (["--tensor", "2"], {"all": 0}),
        (["--tensor", "2", "--sequence-parallel"], {"_allgather_base_": 0, "all": 0}),
        (["--pipeline", "2"], {"all": 0}),
        # z, once on each of the two ranks; less is scattered and gathered otherwise.
        (["--sharded-optimizer"], {"_allgather_base_": 2, "all": 0}),
    ],
    ids=str,
)
def test_calls_that_an_update_adds_to_three_steps(layout: list[str], added: dict[str, int]) -> None:
    """At most what README.md and docs/planning.md say."""
    done = run("hypergradient", *TINY, *layout, "--memory-repeats", "0", processes=2)
    assert done.returncode == 0, done.stderr
    found = tables(done.stdout)[MESSAGES]
    assert all(int(found[name][2]) <= most for name, most in added.items()), found


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (["--batch", "7"], "--micro-batch x data-parallel replicas 2: expected to divide --batch"),
        (["--heads", "3"], "--heads 3: expected to divide --hidden, which is 32"),
        (["--tensor", "2"], "expected to divide the number of processes, which is 1"),
        (["--layers", "0"], "argument --layers: invalid whole number from 1 value: '0'"),
    ],
)
def test_sizes_that_do_not_divide(mistake: list[str], said: str) -> None:
    done = run("step", *TINY, *mistake)
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1 and not done.stdout


def test_fp8_needs_a_gpu() -> None:
    done = run("step", *TINY, "--precision", "fp8")
    assert done.returncode == 2 and not done.stdout
    assert "error: --precision fp8: " in done.stderr and "use bf16" in done.stderr


def test_help_states_defaults() -> None:
    done = run("hypergradient", "--help")
    assert done.returncode == 0
    assert "tokens in a sample (default: 128)" in done.stdout
