"""Public weights in our model compute transformers' logits, under every parallel layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_dwm.convert.gate import LOGITS_TOLERANCE, relative_deviation
from tests.convert.families import FAMILIES, VOCAB_SIZE, write_llama
from tests.launch import run_ranks

LAYOUTS = {
    "alone": (1, {}),
    "tensor 2": (2, {"tensor": 2}),
    "pipeline 2": (2, {"pipeline": 2}),
    "tensor 2, sequence parallel": (2, {"tensor": 2, "sequence": True}),
    "pipeline 2, interleaved": (2, {"pipeline": 2, "virtual_stages": 2}),
    "tensor 2 x pipeline 2": (4, {"tensor": 2, "pipeline": 2}),
}
ROWS, LENGTH = 2, 40


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {
        name: write_llama(folder / str(number), **changes)
        for number, (name, changes) in enumerate(FAMILIES.items())
    }


@pytest.fixture(scope="module")
def tokens_BS() -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCAB_SIZE, (ROWS, LENGTH), generator=draw)


@pytest.fixture(scope="module")
@torch.no_grad()
def expected_BSV(families: dict[str, Path], tokens_BS: Tensor) -> dict[str, Tensor]:
    """Returns transformers' logits by family."""
    return {
        name: AutoModelForCausalLM.from_pretrained(directory)(tokens_BS).logits
        for name, directory in families.items()
    }


def _labels(expected_BSV: Tensor) -> Tensor:
    """Returns the most likely token at every second position, else the next one by id."""
    likeliest_BS = expected_BSV.argmax(-1)
    likeliest_BS[:, 1::2] = (likeliest_BS[:, 1::2] + 1) % VOCAB_SIZE
    return likeliest_BS


@pytest.fixture(scope="module")
def computed(
    families: dict[str, Path], tokens_BS: Tensor, expected_BSV: dict[str, Tensor]
) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Returns every layout's logits of every family; each world size starts its processes once."""
    found = {}
    for world_size in (1, 2, 4):
        layouts = [name for name, layout in LAYOUTS.items() if layout[0] == world_size]
        keys = [(family, layout) for family in families for layout in layouts]
        cases = [
            {
                "directory": str(families[family]),
                "tokens": tokens_BS.tolist(),
                "labels": _labels(expected_BSV[family]).tolist(),
                "parallel": LAYOUTS[layout][1],
            }
            for family, layout in keys
        ]
        ranks = run_ranks("tests.convert.workers:run_huggingface", world_size, cases)
        found |= {key: of_ranks[-1] for key, of_ranks in zip(keys, ranks, strict=True)}
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(
    family: str,
    layout: str,
    computed: dict[tuple[str, str], dict[str, Tensor]],
    expected_BSV: dict[str, Tensor],
) -> None:
    expected, found = expected_BSV[family], computed[family, layout]
    assert relative_deviation(found["logits"], expected) < LOGITS_TOLERANCE
    assert torch.equal(found["logits"].argmax(-1), expected.argmax(-1))
    # Padding of the vocabulary takes no part in a likelihood.
    labels_BS = _labels(expected)
    likelihood_BS = expected.log_softmax(-1).gather(-1, labels_BS[..., None])[..., 0]
    assert torch.allclose(found["log_likelihood"], likelihood_BS, atol=1e-4)
    assert torch.equal(found["is_likeliest"], expected.argmax(-1) == labels_BS)
