"""Names inside a checkpoint directory, and of the tensors in it: spelled here alone."""

LLM_FOLDER = "llm"
TRAINING_FILE = "training.pt"
CONFIG_FILE = "config.yaml"
SHAPE_FILE = "shape.json"
MODEL_PREFIX = "model."
"""begins the names of the LLM's parameters"""
