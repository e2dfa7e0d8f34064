"""megatron-dwm-status, from a clone (megatron_dwm/commands/run_status.py)."""

from megatron_dwm.commands.run_status import command

if __name__ == "__main__":
    command()
