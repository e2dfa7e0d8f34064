"""The held-out loss that a run reports is that of the model it exports, padded or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from megatron_dwm.data.batch import Batch
from megatron_dwm.tokenizer import Tokenizer
from tests.evaluation.conftest import VOCAB_SIZE
from tests.evaluation.held_out_workers import evaluation_set
from tests.launch import REPOSITORY, run_ranks
from tests.tiny import SAMPLES

LAYOUTS = {1: [{}], 2: [{"tensor": 2}, {"pipeline": 2}, {"context": 2}, {}]}
"""By number of processes."""


@torch.no_grad()
def _losses(model: Path, batch: Batch) -> torch.Tensor:
    """Returns token losses [B, S] of Hugging Face's model, 0 where the mask is 0."""
    llama = AutoModelForCausalLM.from_pretrained(model)
    logits_BSV = llama(batch.tokens_BS).logits
    assert logits_BSV.shape[-1] == VOCAB_SIZE  # no multiple of 128
    losses = F.cross_entropy(logits_BSV.flatten(0, 1), batch.labels_BS.flatten(), reduction="none")
    return losses.view_as(batch.loss_mask_BS) * batch.loss_mask_BS


def test_every_layout_reports_the_exported_models_loss(
    model: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    lines = (REPOSITORY / "examples/corpus/heldout.jsonl").read_text().splitlines()
    text = tmp_path / "few.jsonl"
    text.write_text("\n".join(lines[:: len(lines) // 12]) + "\n")
    vocabulary = str(small_tokenizer.model_path)
    held_out = evaluation_set(str(text), vocabulary)
    [whole] = held_out.batches(held_out.num_rows)
    losses_BS = _losses(model, whole)
    expected = {}
    for name in held_out.domains:
        mine = torch.tensor([domain == name for domain in whole.domains])
        expected[name] = float(losses_BS[mine].sum() / whole.loss_mask_BS[mine].sum())
    assert len(expected) > 1
    first = float(losses_BS[:SAMPLES].sum() / whole.loss_mask_BS[:SAMPLES].sum())
    common = {"directory": str(model), "tokenizer": vocabulary, "text": str(text)}
    for processes, layouts in LAYOUTS.items():
        cases = [{**common, "parallel": parallel} for parallel in layouts]
        of_layouts = run_ranks(
            "tests.evaluation.held_out_workers:held_out_losses", processes, cases
        )
        for found, with_padding in (rank for ranks in of_layouts for rank in ranks):
            assert found == pytest.approx(expected, rel=1e-5)
            # Padding is part of the softmax in training: 24 rows of 1,024.
            assert with_padding > first + 0.01
