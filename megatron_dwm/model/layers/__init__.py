"""The layers of the LLM: Megatron-Core's own, the same in emulated FP8, or Transformer Engine's."""
