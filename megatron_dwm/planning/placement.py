"""Parameters that one rank of a pipeline stage holds, and micro-batches under way in a stage."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dwm.config import Config, ParallelConfig
from megatron_dwm.model import LlamaShape


@dataclass(frozen=True, kw_only=True)
class RankParameters:
    """Numbers of parameters of one rank.

    matrices: those of the layers' matrices, which are split over the tensor-parallel group.
    norms: those of the norms, which are replicated in that group.
    biases: those of queries, keys and values, which are split.
    embedding, output: those of the padded vocabulary's rows; 0 on a stage without them.
    largest: those of the largest single tensor.
    """

    matrices: int
    norms: int
    biases: int
    embedding: int
    output: int
    largest: int

    @property
    def total(self) -> int:
        """Number of all parameters of the rank."""
        return self.matrices + self.norms + self.biases + self.embedding + self.output


def rank_parameters(shape: LlamaShape, parallel: ParallelConfig, stage: int) -> RankParameters:
    """Returns the parameters of one rank of pipeline stage `stage` (from 0)."""
    layers = shape.num_layers // parallel.pipeline
    is_first, is_last = stage == 0, stage == parallel.pipeline - 1
    width, inner = shape.hidden_size, shape.ffn_hidden_size
    heads = shape.num_attention_heads + 2 * shape.num_query_groups
    qkv = width * heads * shape.head_size
    vocabulary = shape.padded_vocab_size * width // parallel.tensor
    # With tied embeddings a single stage shares one tensor; the last of several holds a copy.
    has_output = is_last and not (shape.tied_embeddings and is_first)
    largest = max(qkv, 2 * width * inner) // parallel.tensor
    return RankParameters(
        matrices=layers * shape.layer_matrices // parallel.tensor,
        norms=layers * shape.layer_norms + is_last * width,
        biases=layers * shape.layer_biases // parallel.tensor,
        embedding=vocabulary if is_first else 0,
        output=vocabulary if has_output else 0,
        largest=max(largest, vocabulary) if is_first or is_last else largest,
    )


def layers_in_flight(config: Config, num_layers: int, micro_batches: int, stage: int) -> float:
    """Returns the largest number of layers times micro-batches whose activations a stage holds.

    In 1F1B stage i of p has p - i micro-batches under way. Interleaved with v chunks, a stage holds
    the warm-up of 2 (p - i - 1) + (v - 1) p chunks and one more, each of L / (p v) layers; for the
    first stage that is L (1 + (p - 1) / (p v)) (Korthikanti et al. 2022, section 4.2.3).
    """
    pipeline, chunks = config.parallel.pipeline, config.parallel.virtual_stages
    if chunks == 1:
        under_way = min(micro_batches, pipeline - stage)
    else:
        warm_up = 2 * (pipeline - stage - 1) + (chunks - 1) * pipeline
        under_way = min(micro_batches * chunks, warm_up + 1)
    return under_way * num_layers / (pipeline * chunks)
