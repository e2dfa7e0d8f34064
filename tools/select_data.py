"""megatron-dwm-select, from a clone (megatron_dwm/commands/select_data.py)."""

from megatron_dwm.commands.select_data import command

if __name__ == "__main__":
    command()
