"""Passes of micro-batches through Megatron-Core's pipeline schedules, and what they compute."""
