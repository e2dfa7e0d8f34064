"""The weighting model: pooled samples in, one logit a sample out (METHOD.md, sections 1 and 6).

    logit_i = head(attention across the group)_i + sample_head(pooled_i)

Both heads start at zero, so weights start exactly uniform. The second head, straight from the
pooled vector, keeps the weights from collapsing back to uniform.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megatron_dwm.config import UserError
from megatron_dwm.weighting.encoder import EncoderLayer, TokenEncoder

_SHAPE_FILE = "weighting.json"
_TENSOR_FILE = "weighting.safetensors"


@dataclass(frozen=True, kw_only=True)
class WeightingShape:
    """Architecture of a weighting model."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    ffn_hidden_size: int


class WeightingModel(nn.Module):
    """Encoder, attention across samples, two heads. Permutation-equivariant over a group."""

    def __init__(self, shape: WeightingShape) -> None:
        super().__init__()
        self.shape = shape
        width, heads = shape.hidden_size, shape.num_attention_heads
        self.encoder = TokenEncoder(
            shape.vocab_size, width, shape.num_layers, heads, shape.ffn_hidden_size
        )
        self.across_samples = EncoderLayer(width, heads, shape.ffn_hidden_size)
        self.head = nn.Linear(width, 1)
        self.sample_head = nn.Linear(width, 1)
        for head in (self.head, self.sample_head):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def pool(self, tokens_BS: Tensor) -> Tensor:
        """int64 [B, S] -> [B, D]; each sample by itself."""
        return self.encoder(tokens_BS)

    def logits(self, pooled_GnD: Tensor) -> Tensor:
        """[G, n, D] -> [G, n]; samples of one group see each other."""
        mixed_GnD = self.across_samples(pooled_GnD, rotation=None)
        return (self.head(mixed_GnD) + self.sample_head(pooled_GnD)).squeeze(-1)

    def save(self, directory: Path) -> None:
        """Write a transferable model: `weighting.json` and `weighting.safetensors`."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / _SHAPE_FILE).write_text(json.dumps(asdict(self.shape)), encoding="utf-8")
        tensors = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, directory / _TENSOR_FILE)


def build_weighting_model(shape: WeightingShape, seed: int) -> WeightingModel:
    """A new model from `seed`, alike on every rank; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WeightingModel(shape)


def load_weighting_model(directory: Path, vocab_size: int) -> WeightingModel:
    """A model that `WeightingModel.save` wrote.

    Raises UserError if there is none, or if it reads another vocabulary than `vocab_size` pieces.
    """
    shape_file, tensor_file = directory / _SHAPE_FILE, directory / _TENSOR_FILE
    for file in (shape_file, tensor_file):
        if not file.is_file():
            raise UserError(
                f"weighting.load: {file} is missing; expected a directory such as "
                "RUN/weighting/stage_2"
            )
    shape = WeightingShape(**json.loads(shape_file.read_text(encoding="utf-8")))
    if shape.vocab_size != vocab_size:
        raise UserError(
            f"weighting.load: {directory} was trained with a vocabulary of {shape.vocab_size}, "
            f"the run's tokenizer has {vocab_size}; use the same tokenizer"
        )
    model = WeightingModel(shape)
    model.load_state_dict(load_file(tensor_file))
    return model
