"""A baseline: train on the target's own passages, all weights equal (METHOD.md, section 6).

In every batch, passages of the target replace some samples of the corpus. Where the target's text
may be trained on, try it before learned weights, with passages that are read some ten times each
(docs/when_not.md has the numbers).
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_dwm.config import Config
from megatron_dwm.config.key import Part
from megatron_dwm.data import MixedSource, Source, ValidationSet
from megatron_dwm.model import LlamaShape
from megatron_dwm.tokenizer import Tokenizer
from megatron_dwm.weighting.rules import target_problems
from megatron_dwm.weighting.uniform import Uniform


class ValidationMixing(Uniform):
    """Uniform weights on batches whose last rows are passages of the target."""

    @classmethod
    def parts(cls, config: Config) -> frozenset[Part]:
        """Returns the parts: a target, and its fraction of every batch."""
        return frozenset({"target", "mixing"})

    @classmethod
    def problems(cls, config: Config, num_layers: int, world_size: int) -> Iterator[str]:
        """Check that there is a target and that batches have passages and corpus samples."""
        yield from target_problems(config)
        size = config.training.global_batch_size
        if not 0 < num_mixed(config) < size:
            yield (
                f"policy.mix_fraction {config.policy.mix_fraction}: expected at least one sample "
                f"of training.global_batch_size {size}, and not all"
            )

    @classmethod
    def remarks(cls, config: Config, llm: LlamaShape, tokenizer: Tokenizer) -> Iterator[str]:
        """Yields a line if training counts only the last words of the target's passages."""
        if config.validation.loss_on == "last_word":
            yield (
                "validation.loss_on last_word: policy validation_mixing trains on the last word of "
                "a passage alone, which then counts as much as all tokens of a sample of the "
                "corpus; to train on whole passages, set validation.loss_on all"
            )

    @classmethod
    def training_source(
        cls, config: Config, corpus: Source, target: ValidationSet | None
    ) -> Source:
        """Returns the corpus with the target's passages as the last rows of every batch."""
        assert target is not None
        return MixedSource(corpus, target, num_mixed=num_mixed(config))


def num_mixed(config: Config) -> int:
    """Returns how many rows of a batch are passages of the target."""
    return round(config.policy.mix_fraction * config.training.global_batch_size)
