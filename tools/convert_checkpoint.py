"""megatron-dwm-convert, from a clone (megatron_dwm/commands/convert_checkpoint.py)."""

from megatron_dwm.commands.convert_checkpoint import command

if __name__ == "__main__":
    command()
