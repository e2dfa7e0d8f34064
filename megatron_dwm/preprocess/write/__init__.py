"""Token ids and metadata to the files that training reads, whole or not at all."""
