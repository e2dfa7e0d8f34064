"""The weighting model: samples in, one logit per sample out (METHOD.md, sections 1 and 6).

    pooled_i = token encoder(tokens_i)                        encoder own: transferable
             | linear(the LLM's features of sample i)         encoder llm: almost free
    logit_i  = head(attention across the group)_i + sample_head(pooled_i)

Both heads start at zero, so weights start exactly uniform. The second head reads the pooled
vector directly; without it the weights would collapse back to uniform. A model without attention
across samples has only the second: a unit's logit then does not depend on its group.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from megatron_dwm.config import UserError
from megatron_dwm.weighting.encoder import EncoderLayer, TokenEncoder
from megatron_dwm.weighting.feature_reader import FeatureReader

_SHAPE_FILE = "weighting.json"
_TENSOR_FILE = "weighting.safetensors"
MODEL_FILES = (_SHAPE_FILE, _TENSOR_FILE)


@dataclass(frozen=True, kw_only=True)
class WeightingShape:
    """Architecture of a weighting model, and its input.

    vocab_size: tokens in the tokenizer's vocabulary. num_layers: layers of the model's own encoder.
    feature_size: the LLM's hidden size; 0 for the model's own encoder.
    tokenizer_sha256: digest of the tokenizer whose ids it reads; None if it reads none (encoder
        llm) or if the file does not name it.
    across_samples: units of a group attend to each other; older files do not name it, and have it.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    ffn_hidden_size: int
    encoder: Literal["own", "llm"] = "own"
    feature_size: int = 0
    tokenizer_sha256: str | None = None
    across_samples: bool = True


class WeightingModel(nn.Module):
    """An encoder, attention across samples and two heads; equivariant to the order of samples."""

    def __init__(self, shape: WeightingShape) -> None:
        super().__init__()
        self.shape = shape
        width, heads = shape.hidden_size, shape.num_attention_heads
        if shape.encoder == "own":
            self.encoder: TokenEncoder | FeatureReader = TokenEncoder(
                shape.vocab_size, width, shape.num_layers, heads, shape.ffn_hidden_size
            )
        else:
            remembers = not shape.across_samples
            self.encoder = FeatureReader(shape.feature_size, width, remembers=remembers)
        if shape.across_samples:
            self.across_samples = EncoderLayer(width, heads, shape.ffn_hidden_size)
            self.head = nn.Linear(width, 1)
        self.sample_head = nn.Linear(width, 1)
        for head in (self.head, self.sample_head) if shape.across_samples else (self.sample_head,):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def logits(self, pooled_GnD: Tensor, present_Gn: Tensor | None = None) -> Tensor:
        """Turn pooled vectors [G, n, D] into logits [G, n]; units of one group interact.

        present_Gn: False for padding, which no unit sees; None if there is none. Or [G, n, n]:
            which units each unit sees.
        """
        if not self.shape.across_samples:
            return self.sample_head(pooled_GnD).squeeze(-1)
        mixed_GnD = self.across_samples(pooled_GnD, rotation=None, present_BS=present_Gn)
        return (self.head(mixed_GnD) + self.sample_head(pooled_GnD)).squeeze(-1)

    def logits_beside(self, pooled_nD: Tensor, companions_mD: Tensor) -> Tensor:
        """Returns [n]: the logit of each unit in a group of its own beside the same companions.

        Attention across samples is one layer, so a unit's logit needs only what that unit sees. All
        of them are computed as one group, in which no unit sees another but the companions.
        """
        if not self.shape.across_samples:
            return self.sample_head(pooled_nD).squeeze(-1)
        n = len(pooled_nD)
        everyone_1ND = torch.cat([pooled_nD, companions_mD])[None]
        sees_NN = torch.eye(everyone_1ND.shape[1], dtype=torch.bool, device=pooled_nD.device)
        sees_NN[:, n:] = True
        return self.logits(everyone_1ND, sees_NN[None])[0, :n]

    def files(self) -> dict[str, bytes]:
        """Returns the model as files: `weighting.json` and `weighting.safetensors`."""
        tensors = {name: value.contiguous() for name, value in self.state_dict().items()}
        return {
            _SHAPE_FILE: json.dumps(asdict(self.shape)).encode(),
            _TENSOR_FILE: save(tensors),
        }


def build_weighting_model(shape: WeightingShape, seed: int) -> WeightingModel:
    """Build a new model from `seed`, equal on every rank; the global generator does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WeightingModel(shape)


def load_weighting_model(directory: Path, expected: WeightingShape) -> WeightingModel:
    """Load a model from the files of `WeightingModel.files`; its sizes replace those of `expected`.

    Raises UserError if there is none, if it is damaged, or if its input is not that of `expected`.
    """
    shape = read_weighting_shape(directory)
    require_same_input(directory, shape, expected)
    model = WeightingModel(shape)
    try:
        model.load_state_dict(load_file(directory / _TENSOR_FILE))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(
            f"weighting.load: {directory / _TENSOR_FILE} does not hold the tensors of the model "
            f"that {_SHAPE_FILE} describes ({str(error).splitlines()[0]}); bring back a copy of it"
        ) from None
    return model


def read_weighting_shape(directory: Path, key: str = "weighting.load") -> WeightingShape:
    """Read the shape from `directory`; `key` is what named it, for messages.

    Raises UserError for a missing or damaged file.
    """
    shape_file, tensor_file = directory / _SHAPE_FILE, directory / _TENSOR_FILE
    whole_runs = key == "weighting.load"
    stages = ", or the run for the models of all its stages" if whole_runs else ""
    for file in (shape_file, tensor_file):
        if not file.is_file():
            raise UserError(
                f"{key}: {file} is missing; expected a directory such as RUN/weighting/stage_2"
                f"{stages}"
            )
    try:
        return WeightingShape(**json.loads(shape_file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{key}: {shape_file} does not describe a weighting model ({error}); bring "
            "back a copy of it"
        ) from None


def unchecked_tokenizer_warning(directory: Path, found: WeightingShape) -> str | None:
    """Returns a line if the file, of an earlier version, names no tokenizer; else None."""
    if found.encoder != "own" or found.tokenizer_sha256 is not None:
        return None
    return (
        f"weighting.load: {directory / _SHAPE_FILE} names no tokenizer, as earlier versions wrote "
        f"it: only the size of the vocabulary, {found.vocab_size}, has been compared; make sure "
        "that data.tokenizer is the one it was trained with"
    )


def require_same_input(directory: Path, found: WeightingShape, wanted: WeightingShape) -> None:
    """Raise UserError if the input of the model in `directory` is not that of the run."""
    if found.encoder != wanted.encoder:
        raise UserError(
            f"weighting.load: {directory} was trained with weighting.encoder {found.encoder}, the "
            f"run has {wanted.encoder}; set the same"
        )
    if found.encoder == "own" and found.vocab_size != wanted.vocab_size:
        raise UserError(
            f"weighting.load: {directory} was trained with a vocabulary of {found.vocab_size}, "
            f"the run's tokenizer has {wanted.vocab_size}; use the same tokenizer"
        )
    ours, theirs = wanted.tokenizer_sha256, found.tokenizer_sha256
    if found.encoder == "own" and ours and theirs and ours != theirs:
        raise UserError(
            f"weighting.load: {directory} was trained with tokenizer {theirs[:12]}, the run's "
            f"data.tokenizer is {ours[:12]} (SHA-256 of the file); use the same tokenizer"
        )
    if found.encoder == "llm" and found.feature_size != wanted.feature_size:
        raise UserError(
            f"weighting.load: {directory} reads features of an LLM of width {found.feature_size}, "
            f"the run's LLM has {wanted.feature_size}; only a model of weighting.encoder own works "
            "with another LLM"
        )
