"""Attention inside held-out passages follows `data.mask_documents`; what counts does not."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron_dwm.config.load import load_config
from megatron_dwm.data import Batch
from megatron_dwm.run.inputs import open_held_out, open_model_and_tokenizer
from tests.small_runs.fixtures import Corpus


def _rows(corpus: Corpus, file: Path, *more: str) -> list[Batch]:
    config = load_config([*corpus.arguments(), "--evaluation.path", str(file), *more])
    held_out = open_held_out(config, open_model_and_tokenizer(config)[0])
    assert held_out is not None
    return list(held_out.rows.batches(4))


def test_attention_stops_between_passages_if_it_does_in_training(
    corpus: Corpus, tmp_path: Path
) -> None:
    """Rows of 32 tokens hold several of these passages."""
    file = tmp_path / "heldout.jsonl"
    texts = [f"{word} and some more of it" for word in ("one", "two", "three", "four") * 6]
    file.write_text("".join(json.dumps({"text": t, "domain": "d"}) + "\n" for t in texts))
    plain = _rows(corpus, file)
    masked = _rows(corpus, file, "--data.mask_documents", "true")
    pieces = 0
    for one, other in zip(plain, masked, strict=True):
        assert one.borders_BS is None and other.borders_BS is not None
        assert torch.equal(one.tokens_BS, other.tokens_BS)
        assert torch.equal(one.loss_mask_BS, other.loss_mask_BS)
        eod = open_model_and_tokenizer(load_config(corpus.arguments()))[0].eod_id
        after_end_BS = torch.zeros_like(other.tokens_BS)
        after_end_BS[:, 1:] = other.tokens_BS[:, :-1] == eod
        counted_BS = other.loss_mask_BS > 0  # not the padding of the last row
        assert torch.equal(other.borders_BS[counted_BS], after_end_BS.cumsum(dim=1)[counted_BS])
        pieces += int(other.borders_BS[counted_BS].max())
    assert pieces > 3
