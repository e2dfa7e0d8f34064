"""Corpora to Megatron's indexed files and a sidecar of metadata.

Records flow one way:

    read/      input files -> chunks of raw records, in order -> texts and metadata, or rejects
    encode/    texts -> token ids and lengths, metadata -> columns; many chunks at once, in order
    write/     ids -> .bin and .idx, metadata -> .meta.parquet, rejects -> .rejects.jsonl, all of
               them in P.unfinished/ until they are complete

    pipeline.py        the three together: tools/preprocess_data.py
    merge.py           several datasets into one: tools/merge_datasets.py
    settings.py        what the user asks for
    megatron_flags.py  flags of Megatron-LM's tool that this one does not have
    records.py         what passes from step to step
    progress.py, messages.py    what the user sees meanwhile
"""
