"""megatron-dwm-score, from a clone (megatron_dwm/commands/score_data.py)."""

from megatron_dwm.commands.score_data import command

if __name__ == "__main__":
    command()
