"""What the models read: indexed training data, validation and held-out text, and their domains."""

from megatron_dwm.data.batch import Batch
from megatron_dwm.data.stream import TrainingData
from megatron_dwm.data.validation import EvaluationSet, ValidationSet

__all__ = ["Batch", "EvaluationSet", "TrainingData", "ValidationSet"]
