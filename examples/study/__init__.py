"""The study: every method on one corpus, at equal tokens and at equal FLOPs."""
