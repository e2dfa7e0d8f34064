"""megatron-dwm-generate, from a clone (megatron_dwm/commands/generate.py)."""

from megatron_dwm.commands.generate import command

if __name__ == "__main__":
    command()
