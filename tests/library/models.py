"""A small language model in plain torch, as somebody else would write one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module
from torch.utils.checkpoint import checkpoint

VOCAB, LENGTH, WIDTH = 31, 10, 12


class Block(Module):
    """Attention without parameters of its own between linear layers, and a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.out = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.second = torch.nn.RMSNorm(WIDTH)
        self.up = torch.nn.Linear(WIDTH, 2 * WIDTH)
        self.down = torch.nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        """Returns [B, S, D]."""
        q, k, v = self.qkv(self.norm(hidden_BSD)).chunk(3, dim=-1)
        hidden_BSD = hidden_BSD + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return hidden_BSD + self.down(F.gelu(self.up(self.second(hidden_BSD))))


class Model(Module):
    """Token and position embeddings, two blocks, and an output layer, tied or not."""

    def __init__(self, *, tied: bool = False, recompute: bool = False, flat: bool = False) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(VOCAB, WIDTH)
        self.positions = torch.nn.Embedding(LENGTH, WIDTH)
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.output = torch.nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.output.weight = self.tokens.weight
        self.recompute, self.flat = recompute, flat

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Returns logits [B, S, V]."""
        places_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
        hidden_BSD = self.tokens(tokens_BS) + self.positions(places_BS)
        for block in self.blocks:
            if self.recompute:
                hidden_BSD = checkpoint(block, hidden_BSD, use_reentrant=False)
            else:
                hidden_BSD = block(hidden_BSD)
        if self.flat:  # as many training loops do before the output layer
            return self.output(hidden_BSD.flatten(0, 1)).view(*tokens_BS.shape, VOCAB)
        return self.output(hidden_BSD)


def text(number: int, rows: int) -> Tensor:
    """Returns int64 [rows, LENGTH + 1]."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(VOCAB, (rows, LENGTH + 1), generator=generator)


def sample_losses(model: Module, text_BS: Tensor) -> Tensor:
    """Returns token-mean losses, [B]."""
    logits_BSV, labels_BS = model(text_BS[:, :-1]), text_BS[:, 1:]
    losses = F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), reduction="none")
    return losses.view(labels_BS.shape).mean(dim=1)
