"""Data for the examples: the sample corpus, and junk to mix into it."""
