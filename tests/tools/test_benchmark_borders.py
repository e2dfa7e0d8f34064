"""The benchmark of attention inside documents prints the rows that it promises."""

from __future__ import annotations

from tests.tools.test_benchmark import numbers, run, tables

TINY = (
    "--layers 2 --hidden 32 --heads 4 --query-groups 2 --ffn 64 --vocab 256 --sequence 64 "
    "--micro-batch 2 --repeats 2 --warm-up 1"
).split()
PLAIN = "plain causal attention"
BORDERS = [
    "documents of 30 to 200 tokens",
    "documents of 400 tokens on average",
    "one border in the micro-batch",
]
NOISE = f"{PLAIN}, again (noise)"
MASK = f"{BORDERS[0]}, by a mask"


def _alone(names: list[str]) -> list[str]:
    return [f"attention alone: {name}" for name in names]


def test_borders() -> None:
    done = run("borders", *TINY, "--memory-repeats", "1")
    assert done.returncode == 0, done.stderr
    found = tables(done.stdout)
    times = [PLAIN, NOISE, *BORDERS]
    steps = [f"a step, {BORDERS[0]}: a weight for each {unit}" for unit in ("row", "document")]
    assert list(found["one pass"]) == [*times, *_alone([*times, MASK]), *steps]
    assert all(value > 0 for cells in found["one pass"].values() for value in numbers(cells))
    memory = [PLAIN, *BORDERS]
    assert list(found["peak memory"]) == [*memory, *_alone([*memory, MASK])]


def test_one_process() -> None:
    done = run("borders", *TINY, processes=2)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: borders: runs in one process")
