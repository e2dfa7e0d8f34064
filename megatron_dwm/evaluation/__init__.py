"""lm-evaluation-harness on an exported model."""
