"""From corpora to Megatron's indexed files.

Records flow one way, each step in its own file:

    readers.py    files -> batches of raw records, in order
    encoding.py   a raw record -> token ids and metadata, or the reason why not
    workers.py    the same for many batches at once, in order, over processes
    writer.py     ids -> .bin and .idx;  sidecar.py  -> .meta.parquet;  rejects.py -> .rejects.jsonl
    staging.py    temporary names until everything is complete
    pipeline.py   the whole
"""
