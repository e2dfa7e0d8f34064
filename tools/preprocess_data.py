"""megatron-dwm-preprocess, from a clone (megatron_dwm/commands/preprocess_data.py)."""

from megatron_dwm.commands.preprocess_data import command

if __name__ == "__main__":
    command()
