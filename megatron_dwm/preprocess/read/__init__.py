"""Input files to documents: their texts, and metadata as Python values."""
