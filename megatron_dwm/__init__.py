"""Pretraining on Megatron-Core with a learned weight for every sample."""

__version__ = "0.2.0"
