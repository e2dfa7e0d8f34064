"""What the models read: indexed training data, validation and held-out text, and their domains."""
