"""megatron-dwm-plan, from a clone (megatron_dwm/commands/plan.py)."""

from megatron_dwm.commands.plan import command

if __name__ == "__main__":
    command()
