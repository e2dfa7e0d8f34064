"""Conversion between checkpoints of a run and Hugging Face directories, checked by a gate."""
