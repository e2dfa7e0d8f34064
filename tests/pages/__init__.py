"""The pages of docs/ by task, read and followed."""
