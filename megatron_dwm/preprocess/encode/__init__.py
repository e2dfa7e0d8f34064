"""Documents to token ids and columns of metadata, in several threads."""
