"""The weighting model's token encoder: a small Llama that turns each unit into one vector.

A unit is what gets a weight: a row of the micro-batch, or whatever `Units` pools.

It is plain PyTorch: every rank has the whole encoder, so nothing is split over processes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dwm.model.layers.kernels import grouped_attention
from megatron_dwm.model.layers.pieces import Pieces, attend
from megatron_dwm.model.passes.units import Units

ROTARY_BASE = 10000.0
INIT_STD = 0.02


class TokenEncoder(nn.Module):
    """Maps tokens_BS to the mean over each unit's tokens of the last hidden state, [U, D].

    Attention is causal, as in the LLM.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, num_layers: int, num_heads: int, ffn_size: int
    ) -> None:
        super().__init__()
        self.head_size = hidden_size // num_heads
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.ModuleList(
            EncoderLayer(hidden_size, num_heads, ffn_size) for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(hidden_size, eps=1e-5)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=INIT_STD)
        nn.init.normal_(self.embedding.weight, std=1.0)

    def forward(
        self, tokens_BS: Tensor, pieces: Pieces | None = None, units: Units | None = None
    ) -> Tensor:
        """Encode int64 [B, S] into float32 [U, D].

        pieces: attention stays inside each of them; None: inside each row.
        units: what is pooled; None: each row, also if it has several pieces.
        """
        hidden_BSD = self.embedding(tokens_BS)
        rotation = rotary_angles(tokens_BS.shape[1], self.head_size, hidden_BSD.device)
        for layer in self.layers:
            hidden_BSD = layer(hidden_BSD, rotation, pieces)
        hidden_BSD = self.norm(hidden_BSD)
        if units is None or units.numbers_BS is None:
            return hidden_BSD.mean(dim=1)
        return units.pool(hidden_BSD.transpose(0, 1))


class EncoderLayer(nn.Module):
    """Attention and SwiGLU, each after a norm, each added to the residual stream."""

    def __init__(self, hidden_size: int, num_heads: int, ffn_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_size = hidden_size // num_heads
        self.attention_norm = nn.RMSNorm(hidden_size, eps=1e-5)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.ffn_norm = nn.RMSNorm(hidden_size, eps=1e-5)
        self.gate_up = nn.Linear(hidden_size, 2 * ffn_size, bias=False)
        self.down = nn.Linear(ffn_size, hidden_size, bias=False)

    def forward(
        self,
        hidden_BSD: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        pieces: Pieces | None = None,
        present_BS: Tensor | None = None,
    ) -> Tensor:
        """Transform [B, S, D]: causally over S with a rotation, as an unordered set without one.

        pieces: attention with a rotation stays inside each of them; None: inside each row.
        present_BS: False for padding of a set, which nothing attends to; None: no padding. Or
            [B, S, S]: what each of its members attends to.
        """
        batch, length, width = hidden_BSD.shape
        qkv = self.qkv(self.attention_norm(hidden_BSD))
        query, key, value = (
            part.view(batch, length, self.num_heads, self.head_size).transpose(1, 2)
            for part in qkv.chunk(3, dim=-1)
        )
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        if pieces is None or pieces.are_rows:
            seen = None if present_BS is None else present_BS.reshape(batch, 1, -1, length)
            mixed = grouped_attention(
                query, key, value, attn_mask=seen, is_causal=rotation is not None
            ).transpose(1, 2)
        else:
            assert rotation is not None, "a set of samples has no borders"
            mixed = attend(
                query.transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                pieces.batch_first,
            )
        hidden_BSD = hidden_BSD + self.out(mixed.reshape(batch, length, width))
        gate, up = self.gate_up(self.ffn_norm(hidden_BSD)).chunk(2, dim=-1)
        return hidden_BSD + self.down(F.silu(gate) * up)


def rotary_angles(length: int, head_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns (cos, sin) of the rotary angles, each [S, head_size / 2]."""
    exponents = torch.arange(0, head_size, 2, device=device, dtype=torch.float32) / head_size
    positions = torch.arange(length, device=device, dtype=torch.float32)
    angles = torch.outer(positions, ROTARY_BASE**-exponents)
    return angles.cos(), angles.sin()


def rotate(vectors_BHSd: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Apply the rotary position embedding to the two halves of every vector."""
    cos, sin = rotation
    first, second = vectors_BHSd.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
