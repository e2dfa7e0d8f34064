"""megatron-dwm-evaluate, from a clone (megatron_dwm/commands/evaluate.py)."""

from megatron_dwm.commands.evaluate import command

if __name__ == "__main__":
    command()
