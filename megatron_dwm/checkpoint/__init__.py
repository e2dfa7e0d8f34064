"""Checkpoints: Megatron-Core's distributed format for the LLM, one small file for the rest.

    checkpoints/step_00000500/llm/           parameters and optimizer, any layout can load them
    checkpoints/step_00000500/training.pt    the method's state, random generators
    checkpoints/step_00000500/config.yaml, shape.json   what is needed to read it alone
    checkpoints/step_00000500/tokenizer/     the tokenizer's files (kept_files.py), and
    checkpoints/step_00000500/huggingface/   those of the model that the run started from
    checkpoints/step_00000500/manifest.json  counters, and size and checksum of every other file

A checkpoint is written under a temporary name, the manifest last, and renamed when it is complete.
Inside a weighting phase the name ends in `_update_` and the number of the phase's updates.
"""
