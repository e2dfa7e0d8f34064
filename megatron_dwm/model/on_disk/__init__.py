"""Names and files of a saved model: Megatron-Core's and Hugging Face's."""
