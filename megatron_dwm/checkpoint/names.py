"""Names of the files in a checkpoint directory, and the prefix of its tensors."""

LLM_FOLDER = "llm"
REFERENCE_FOLDER = "reference"
TRAINING_FILE = "training.pt"
CONFIG_FILE = "config.yaml"
SHAPE_FILE = "shape.json"
MODEL_PREFIX = "model."
"""prefix of the names of the LLM's parameters"""
