"""Evaluation of an exported model with lm-evaluation-harness."""
