"""Megatron-Core's model classes: each builds the same LLM, and everything else sees no difference.

Parameters have GPTModel's names in every class, apart from the numbers in `decoder.layers.`, which
blocks.py translates; the names in a checkpoint are equal.
"""
