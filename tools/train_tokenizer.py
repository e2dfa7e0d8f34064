"""megatron-dwm-tokenizer, from a clone (megatron_dwm/commands/train_tokenizer.py)."""

from megatron_dwm.commands.train_tokenizer import command

if __name__ == "__main__":
    command()
