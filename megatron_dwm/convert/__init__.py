"""Checkpoints of ours as Hugging Face directories that have passed a gate."""
