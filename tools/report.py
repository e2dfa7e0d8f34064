"""megatron-dwm-report, from a clone (megatron_dwm/commands/report.py)."""

from megatron_dwm.commands.report import command

if __name__ == "__main__":
    command()
