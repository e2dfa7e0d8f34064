"""Settings without effect that no rule of a single key can tell: the method says so."""

from __future__ import annotations

from typing import cast

import pytest

from megatron_dwm.config.load import load_config
from megatron_dwm.model import LlamaShape
from megatron_dwm.tokenizer import Tokenizer
from megatron_dwm.weighting import check_method, method_class

LLM = LlamaShape(
    hidden_size=64,
    num_layers=2,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=176,
    vocab_size=512,
)
DWM = ["--policy.name", "dwm", "--validation.path", "v"]
ALONE = ["--weighting.encoder", "llm", "--weighting.across_samples", "false"]
HEADS = ["--weighting.num_attention_heads", "8"]
EXCESS = ["--policy.name", "excess_loss", "--policy.reference", "r", "--weighting.unit", "token"]
GLOBAL = ["--weighting.group", "global"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*DWM, *ALONE, *HEADS], "weighting.num_attention_heads: no effect"),
        ([*DWM, *HEADS, "--weighting.hidden_size", "48"], None),
        ([*DWM, *ALONE], None),
        (
            [*EXCESS, *GLOBAL, "--policy.keep_scope", "sequence"],
            "weighting.group global: no effect",
        ),
        ([*EXCESS, *GLOBAL], None),
    ],
)
def test_what_nothing_reads_is_said(arguments: list[str], said: str | None) -> None:
    config = load_config(arguments)
    # Nothing here is loaded, so nothing asks for the tokenizer.
    found = list(method_class(config).remarks(config, LLM, cast(Tokenizer, None)))
    assert len(found) == (said is not None)
    assert all(line.startswith(said or "") for line in found)


def test_a_width_need_not_suit_heads_that_are_not_there() -> None:
    arguments = [*DWM, *ALONE, "--weighting.hidden_size", "30"]
    check_method(load_config(arguments), LLM.num_layers, 1)
