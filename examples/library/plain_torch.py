"""Alignments of samples for a plain PyTorch model: no Megatron-Core in the loop.

    python examples/library/plain_torch.py

A small network learns to add two digits. Half of the training samples have wrong answers. The
target's samples are right, so the wrong ones get negative alignments: a larger weight for them
would raise the target's loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from megatron_dwm import ModuleProbe

DIGITS, SAMPLES, STEPS = 10, 64, 200


class Adder(Module):
    """Any module of linear, embedding and norm layers, put together in any way."""

    def __init__(self) -> None:
        super().__init__()
        self.digits = torch.nn.Embedding(DIGITS, 32)
        self.norm = torch.nn.LayerNorm(64)
        self.inner = torch.nn.Linear(64, 128)
        self.answer = torch.nn.Linear(128, 2 * DIGITS - 1)

    def forward(self, pair_B2: Tensor) -> Tensor:
        """Returns logits of the sum, [B, 19]."""
        return self.answer(F.gelu(self.inner(self.norm(self.digits(pair_B2).flatten(1)))))


def batch(number: int, *, wrong: bool) -> tuple[Tensor, Tensor]:
    """Returns pairs and answers; with `wrong`, those of the odd samples are too large by one."""
    pair_B2 = torch.randint(DIGITS, (SAMPLES, 2), generator=torch.Generator().manual_seed(number))
    answer_B = pair_B2.sum(dim=1)
    if wrong:
        answer_B[1::2] = (answer_B[1::2] + 1) % (2 * DIGITS - 1)
    return pair_B2, answer_B


def main() -> None:
    """Train, and print the mean alignment of right and wrong samples."""
    torch.manual_seed(1)
    model = Adder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    probe = ModuleProbe(model, optimizer)

    def backward(number: int, *, wrong: bool) -> Tensor:
        pair_B2, answer_B = batch(number, wrong=wrong)
        loss = F.cross_entropy(model(pair_B2), answer_B)
        loss.backward()
        return loss.detach()

    for step in range(STEPS):
        probe.aim(lambda: backward(10_000, wrong=False))
        with probe.attached() as alignments:
            loss = backward(step, wrong=True)
        optimizer.step()
        if step % 50 == 49:
            right, wrong = alignments.values_n[0::2].mean(), alignments.values_n[1::2].mean()
            print(
                f"step {step + 1} loss {loss:.3f}: mean alignment of right samples {right:+.2e}, "
                f"of wrong ones {wrong:+.2e}"
            )


if __name__ == "__main__":
    main()
