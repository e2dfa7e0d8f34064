"""The data of a run: indexed training data, the target, held-out text, and batches of them."""

from megatron_dwm.data.batch import Batch
from megatron_dwm.data.feed import Feed, Share
from megatron_dwm.data.sources import CorpusSource, MixedSource, Origins, Source
from megatron_dwm.data.stream import TrainingData
from megatron_dwm.data.validation import EvaluationSet, ValidationSet

__all__ = [
    "Batch",
    "CorpusSource",
    "EvaluationSet",
    "Feed",
    "MixedSource",
    "Origins",
    "Share",
    "Source",
    "TrainingData",
    "ValidationSet",
]
